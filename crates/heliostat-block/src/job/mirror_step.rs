//! [`next_step`]: what a mirror does next, as a function of what it can see.
//!
//! Pure; its test is a table. The loop in `mirror` makes the [`View`], carries the [`Step`] out, and asks
//! again. Every rule about order (nothing is launched while paused, READY needs a flush, the pivot needs a
//! closed gate with nothing dirty behind it) stands here and nowhere else.

use super::{End, JobStatus, Orders};

/// The gate of the source, as the job holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Guests come and go.
    Open,
    /// Closed by the job; requests are still in flight behind it.
    Closing,
    /// Closed, nothing behind it.
    Closed,
}

/// Whether the target is known to be durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TargetFlush {
    /// Something was written since the last good flush.
    Needed,
    /// A flush is on its way.
    Running,
    /// Everything written has been flushed.
    Good,
}

/// The first pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// Some of the source has not been looked at; nobody is looking.
    Ahead,
    /// The next piece is being looked at.
    Running,
    /// All of it has been looked at.
    Over,
}

/// Where the others of a mirror's group are; see `group`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Others {
    /// As far as it is. So are those of a mirror without a group.
    Here,
    /// Not as far: it does not go on to what all do together.
    Apart,
    /// Closing their gates, and it is to close its own.
    Called,
}

/// All that a mirror looks at to decide.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub status: JobStatus,
    pub orders: Orders,
    /// An error that the policy reports.
    pub failed: bool,
    pub scan: Scan,
    /// A dirty range could be copied now: it is free, and there is room for it.
    pub copyable: bool,
    /// The limit allows a copy now.
    pub pace_allows: bool,
    /// Nothing is dirty.
    pub clean: bool,
    /// What is left fits the pause budget.
    pub nearly_clean: bool,
    /// Copies in flight.
    pub copies: usize,
    /// Doubled writes.
    pub doubled: usize,
    /// Target writes of unknown fate.
    pub unknown: usize,
    pub flush: TargetFlush,
    /// A flush has succeeded that began in this attempt at READY, or at the end, and what was written since is
    /// little; so that the one at the closed gate is short.
    pub flushed: bool,
    /// So much was written since the last good flush that it would be a pity to lose it.
    pub flush_due: bool,
    pub gate: Gate,
    /// The gates below the source's are closed, down to that of the node that is replaced, with nothing behind them.
    /// Nothing can be copied then: the copies pass them.
    pub closed_below: bool,
    /// Guests have waited at the gate long enough.
    pub held_too_long: bool,
    /// An ignored error asks for a rest.
    pub resting: bool,
    pub others: Others,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing to do before something changes.
    Wait,
    /// The same, and marks are worth waking for.
    WaitForMarks,
    /// Look at the next piece of the source.
    Scan,
    /// Launch one copy.
    Copy,
    /// Flush the target.
    Flush,
    /// Say READY.
    BecomeReady,
    /// Say that it is paused.
    BecomePaused,
    /// Say that it goes on.
    Continue,
    /// Say that it waits for `finalize`.
    BecomePending,
    /// Close the source's gate.
    CloseGate,
    /// Close those below it, down to that of the node that is replaced.
    CloseBelow,
    /// Open it again: the end was withdrawn, or the job is to pause.
    OpenGate,
    /// Put the target in the source's place, and end.
    Pivot,
    /// End with a consistent copy.
    EndWithCopy,
    /// Say that it is aborting, and take no more doubled writes.
    Abort,
    /// End as cancelled or failed; nothing is on its way any more.
    EndAborted,
}

impl Step {
    /// Whether the job says it: its figures must be those of that moment.
    pub(crate) const fn is_said(self) -> bool {
        matches!(
            self,
            Self::BecomeReady | Self::BecomePaused | Self::Continue | Self::BecomePending | Self::Abort
        )
    }
}

impl End {
    /// The last step of a mirror that ends so.
    pub(crate) const fn step(self) -> Step {
        match self {
            Self::Complete => Step::Pivot,
            Self::Copy => Step::EndWithCopy,
        }
    }
}

/// Decides the next step. Looks at nothing but its argument.
pub(crate) fn next_step(view: View) -> Step {
    if view.status == JobStatus::Aborting {
        let work_over = view.copies == 0 && view.scan != Scan::Running && view.flush != TargetFlush::Running;
        return if work_over && view.doubled + view.unknown == 0 { Step::EndAborted } else { Step::Wait };
    }
    // One that is held keeps its failure until it is let go, as QEMU's does.
    if view.orders.cancelled || (view.failed && !view.orders.paused) {
        return match (view.gate, view.status) {
            (Gate::Closing | Gate::Closed, _) => Step::OpenGate,
            (Gate::Open, JobStatus::Paused | JobStatus::Standby) => Step::Continue,
            (Gate::Open, _) => Step::Abort,
        };
    }
    if view.orders.paused {
        return paused(view);
    }
    match view.status {
        JobStatus::Paused | JobStatus::Standby => Step::Continue,
        JobStatus::Running => towards_ready(view),
        JobStatus::Ready | JobStatus::Pending => in_step(view),
        // Waiting is left in the same breath as it is entered; the others have no steps left.
        _ => Step::Wait,
    }
}

fn paused(view: View) -> Step {
    if view.gate != Gate::Open {
        return Step::OpenGate;
    }
    let quiet = view.copies == 0 && view.flush != TargetFlush::Running && view.scan != Scan::Running;
    match view.status {
        JobStatus::Running | JobStatus::Ready if quiet => Step::BecomePaused,
        _ => Step::Wait,
    }
}

fn towards_ready(view: View) -> Step {
    // Before the next copy: a guest that never stops writing must not put READY off for ever.
    if view.scan == Scan::Over && view.nearly_clean && !view.resting {
        match view.flush {
            _ if view.flushed && view.others == Others::Apart => {}
            _ if view.flushed => return Step::BecomeReady,
            TargetFlush::Running => {}
            // Also when nothing was written: READY promises that a flush of this target works.
            TargetFlush::Needed | TargetFlush::Good => return Step::Flush,
        }
    }
    if wants_flush(view) {
        return Step::Flush;
    }
    if view.scan == Scan::Ahead && !view.resting {
        return Step::Scan;
    }
    if may_copy(view) { Step::Copy } else { Step::Wait }
}

/// Whether to flush beside the copies.
fn wants_flush(view: View) -> bool {
    view.flush_due && view.flush == TargetFlush::Needed && !view.resting
}

fn may_copy(view: View) -> bool {
    view.copyable && view.pace_allows && !view.resting
}

fn in_step(view: View) -> Step {
    let withdrawn = view.orders.end.is_none() || !view.orders.finalize;
    let waits_in_vain = withdrawn || view.resting || view.held_too_long || view.others == Others::Apart;
    match view.gate {
        Gate::Closing | Gate::Closed if waits_in_vain => return Step::OpenGate,
        Gate::Closing => return if copy_at_gate(view) { Step::Copy } else { Step::Wait },
        Gate::Closed => return behind_closed_gate(view),
        Gate::Open => {}
    }
    // The others' guests wait already.
    if view.others == Others::Called && !withdrawn && !view.resting && view.unknown == 0 {
        return Step::CloseGate;
    }
    // Before the next copy, for the same reason as above.
    if view.orders.end.is_some() && view.nearly_clean && !view.resting {
        match (view.flushed, view.status) {
            (false, _) if view.flush != TargetFlush::Running => return Step::Flush,
            (false, _) => {}
            (true, _) if view.others == Others::Apart => {}
            (true, JobStatus::Ready) if !view.orders.finalize => return Step::BecomePending,
            // What nobody can say the end of would hold guests at the gate.
            (true, _) if !view.orders.finalize || view.unknown > 0 => {}
            (true, _) => return Step::CloseGate,
        }
    }
    if wants_flush(view) {
        return Step::Flush;
    }
    if may_copy(view) { Step::Copy } else { Step::WaitForMarks }
}

/// Guests wait, so the limit does not.
fn copy_at_gate(view: View) -> bool {
    view.copyable && !view.resting
}

fn behind_closed_gate(view: View) -> Step {
    if copy_at_gate(view) {
        return Step::Copy;
    }
    if !view.clean || view.copies > 0 || view.doubled + view.unknown > 0 {
        return Step::Wait;
    }
    match (view.flush, view.orders.end) {
        (TargetFlush::Running, _) => Step::Wait,
        (TargetFlush::Needed, _) => Step::Flush,
        (TargetFlush::Good, Some(End::Complete)) if !view.closed_below => Step::CloseBelow,
        (TargetFlush::Good, Some(end)) => end.step(),
        (TargetFlush::Good, None) => Step::OpenGate,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::job::CopyMode;

    const ORDERS: Orders = Orders {
        paused: false,
        cancelled: false,
        end: None,
        finalize: true,
        speed: 0,
        copy_mode: CopyMode::Background,
        target_deadline: None,
        stint: 0,
    };

    /// Ready, in step, everything copied and flushed, nothing wanted.
    pub(crate) const READY: View = View {
        status: JobStatus::Ready,
        orders: ORDERS,
        failed: false,
        scan: Scan::Over,
        copyable: false,
        pace_allows: true,
        clean: true,
        nearly_clean: true,
        copies: 0,
        doubled: 0,
        unknown: 0,
        flush: TargetFlush::Good,
        flushed: false,
        flush_due: false,
        gate: Gate::Open,
        closed_below: true,
        held_too_long: false,
        resting: false,
        others: Others::Here,
    };

    const RUNNING: View = View { status: JobStatus::Running, ..READY };
    const COMPLETE: Orders = Orders { end: Some(End::Complete), ..ORDERS };
    const SOFT_CANCEL: Orders = Orders { end: Some(End::Copy), ..ORDERS };
    const CLOSED: View = View { gate: Gate::Closed, flushed: true, orders: COMPLETE, ..READY };

    fn check(table: &[(&str, View, Step)]) {
        for (what, view, step) in table {
            assert_eq!(next_step(*view), *step, "{what}");
        }
    }

    #[test]
    fn on_the_way_to_ready() {
        let dirty = View { clean: false, nearly_clean: false, copyable: true, ..RUNNING };
        check(&[
            (
                "looking on comes before copies: it is what progress is told from",
                View { scan: Scan::Ahead, ..dirty },
                Step::Scan,
            ),
            (
                "much that is not flushed comes before copies, which go on beside it",
                View { flush_due: true, flush: TargetFlush::Needed, ..dirty },
                Step::Flush,
            ),
            (
                "one flush at a time",
                View { flush_due: true, flush: TargetFlush::Running, ..dirty },
                Step::Copy,
            ),
            ("copies beside the look", View { scan: Scan::Running, ..dirty }, Step::Copy),
            (
                "the limit holds copies, not looking",
                View { scan: Scan::Ahead, pace_allows: false, ..dirty },
                Step::Scan,
            ),
            ("the limit holds copies", View { pace_allows: false, ..dirty }, Step::Wait),
            ("one look at a time", View { scan: Scan::Running, copyable: false, ..dirty }, Step::Wait),
            ("READY needs a flush, even when nothing was written", RUNNING, Step::Flush),
            ("a flush takes its time", View { flush: TargetFlush::Running, ..RUNNING }, Step::Wait),
            (
                "copies go on beside it",
                View { flush: TargetFlush::Running, copyable: true, clean: false, ..RUNNING },
                Step::Copy,
            ),
            (
                "READY before the next of a steady writer's copies",
                View { flushed: true, copyable: true, clean: false, ..RUNNING },
                Step::BecomeReady,
            ),
            ("flushed", View { flushed: true, ..RUNNING }, Step::BecomeReady),
            (
                "READY with a little left",
                View { flushed: true, clean: false, copies: 1, ..RUNNING },
                Step::BecomeReady,
            ),
            (
                "not with much left",
                View { flushed: true, clean: false, nearly_clean: false, copies: 1, ..RUNNING },
                Step::Wait,
            ),
            ("an ignored error rests", View { resting: true, ..dirty }, Step::Wait),
        ]);
    }

    #[test]
    fn in_step_and_to_the_end() {
        let ending = View { orders: COMPLETE, ..READY };
        let flushed = View { flushed: true, ..ending };
        let manual = Orders { finalize: false, ..COMPLETE };
        check(&[
            ("nothing to do", READY, Step::WaitForMarks),
            ("a mark", View { copyable: true, clean: false, ..READY }, Step::Copy),
            (
                "the limit holds in READY too",
                View { copyable: true, clean: false, pace_allows: false, ..READY },
                Step::WaitForMarks,
            ),
            ("the long flush comes before the gate", ending, Step::Flush),
            ("then the gate", flushed, Step::CloseGate),
            ("not with a write of unknown fate", View { unknown: 1, ..flushed }, Step::WaitForMarks),
            (
                "also with a little dirty",
                View { clean: false, copies: 2, copyable: true, ..flushed },
                Step::CloseGate,
            ),
            (
                "the long flush runs beside copies",
                View { flush: TargetFlush::Running, copyable: true, clean: false, ..ending },
                Step::Copy,
            ),
            (
                "not with much dirty",
                View { clean: false, nearly_clean: false, ..flushed },
                Step::WaitForMarks,
            ),
            ("a manual end waits in PENDING", View { orders: manual, ..flushed }, Step::BecomePending),
            (
                "and holds no guest there",
                View { orders: manual, status: JobStatus::Pending, ..flushed },
                Step::WaitForMarks,
            ),
            (
                "it copies there",
                View { orders: manual, status: JobStatus::Pending, copyable: true, ..flushed },
                Step::Copy,
            ),
            (
                "finalize closes the gate",
                View { orders: COMPLETE, status: JobStatus::Pending, ..flushed },
                Step::CloseGate,
            ),
        ]);
    }

    #[test]
    fn behind_the_gate() {
        let withdrawn = Orders { finalize: false, ..COMPLETE };
        check(&[
            (
                "copies while it closes",
                View { gate: Gate::Closing, copyable: true, clean: false, ..CLOSED },
                Step::Copy,
            ),
            ("waits for requests in flight", View { gate: Gate::Closing, ..CLOSED }, Step::Wait),
            (
                "copies without the limit",
                View { copyable: true, clean: false, pace_allows: false, ..CLOSED },
                Step::Copy,
            ),
            ("waits for copies", View { copies: 1, ..CLOSED }, Step::Wait),
            ("waits for doubled writes", View { doubled: 1, ..CLOSED }, Step::Wait),
            ("waits for unknown writes", View { unknown: 1, ..CLOSED }, Step::Wait),
            ("but not for ever", View { unknown: 1, held_too_long: true, ..CLOSED }, Step::OpenGate),
            ("nor for a drain", View { gate: Gate::Closing, held_too_long: true, ..CLOSED }, Step::OpenGate),
            ("waits for what cannot be copied yet", View { clean: false, ..CLOSED }, Step::Wait),
            ("flushes", View { flush: TargetFlush::Needed, ..CLOSED }, Step::Flush),
            ("waits for the flush", View { flush: TargetFlush::Running, ..CLOSED }, Step::Wait),
            ("pivots", CLOSED, Step::Pivot),
            ("or leaves a copy", View { orders: SOFT_CANCEL, ..CLOSED }, Step::EndWithCopy),
            ("a withdrawn end opens it", View { orders: ORDERS, ..CLOSED }, Step::OpenGate),
            ("a withdrawn finalize opens it", View { orders: withdrawn, ..CLOSED }, Step::OpenGate),
            (
                "also before the last request is out",
                View { gate: Gate::Closing, orders: withdrawn, ..CLOSED },
                Step::OpenGate,
            ),
            (
                "an error that rests opens it",
                View { resting: true, clean: false, copyable: true, ..CLOSED },
                Step::OpenGate,
            ),
            (
                "a pause opens it",
                View { orders: Orders { paused: true, ..COMPLETE }, ..CLOSED },
                Step::OpenGate,
            ),
        ]);
    }

    #[test]
    fn in_a_group() {
        use Others::{Apart, Called};
        let (ending, running) = (View { orders: COMPLETE, ..READY }, View { flushed: true, ..RUNNING });
        let flushed = View { flushed: true, ..ending };
        let busy = View { copyable: true, clean: false, nearly_clean: false, ..ending };
        let manual = Orders { finalize: false, ..COMPLETE };
        check(&[
            ("READY waits for the others", View { others: Apart, ..running }, Step::Wait),
            (
                "and copies meanwhile",
                View { others: Apart, copyable: true, clean: false, ..running },
                Step::Copy,
            ),
            (
                "and flushes what has been copied since",
                View { others: Apart, flushed: false, flush: TargetFlush::Needed, ..running },
                Step::Flush,
            ),
            ("PENDING waits", View { others: Apart, orders: manual, ..flushed }, Step::WaitForMarks),
            ("the gate waits", View { others: Apart, ..flushed }, Step::WaitForMarks),
            ("called, it closes its gate with much left", View { others: Called, ..busy }, Step::CloseGate),
            (
                "but not where the end was withdrawn",
                View { others: Called, orders: manual, ..flushed },
                Step::BecomePending,
            ),
            ("nor with a write of unknown fate", View { others: Called, unknown: 1, ..busy }, Step::Copy),
            ("nor while it rests", View { others: Called, resting: true, ..busy }, Step::WaitForMarks),
            ("behind the gate it is as alone", View { others: Called, ..CLOSED }, Step::Pivot),
            ("the others have opened theirs", View { others: Apart, ..CLOSED }, Step::OpenGate),
        ]);
    }

    #[test]
    fn where_a_node_below_is_replaced() {
        let closed = View { closed_below: false, ..CLOSED };
        let copy = Orders { end: Some(End::Copy), ..COMPLETE };
        check(&[
            ("the gates below are closed last", closed, Step::CloseBelow),
            ("not before the flush", View { flush: TargetFlush::Needed, ..closed }, Step::Flush),
            ("nor while something is left", View { clean: false, copyable: true, ..closed }, Step::Copy),
            ("nor for a copy, which replaces nothing", View { orders: copy, ..closed }, Step::EndWithCopy),
            ("then comes the pivot", View { closed_below: true, ..closed }, Step::Pivot),
        ]);
    }

    #[test]
    fn pause_and_abort() {
        let pause = Orders { paused: true, ..ORDERS };
        let cancel = Orders { cancelled: true, ..ORDERS };
        let aborting = View { status: JobStatus::Aborting, orders: cancel, ..READY };
        check(&[
            ("a pause waits for copies", View { orders: pause, copies: 1, ..READY }, Step::Wait),
            ("a pause launches none", View { orders: pause, copies: 1, copyable: true, ..READY }, Step::Wait),
            ("paused", View { orders: pause, ..READY }, Step::BecomePaused),
            (
                "stays paused",
                View { orders: pause, status: JobStatus::Standby, copyable: true, ..READY },
                Step::Wait,
            ),
            ("goes on", View { status: JobStatus::Paused, ..RUNNING }, Step::Continue),
            ("cancel", View { orders: cancel, ..READY }, Step::Abort),
            ("cancel beats pause", View { orders: Orders { paused: true, ..cancel }, ..READY }, Step::Abort),
            ("failure", View { failed: true, ..READY }, Step::Abort),
            (
                "a paused job that has failed waits to be let go",
                View { failed: true, orders: pause, status: JobStatus::Standby, ..READY },
                Step::Wait,
            ),
            (
                "then it goes on before it aborts",
                View { failed: true, status: JobStatus::Standby, ..READY },
                Step::Continue,
            ),
            ("it can be paused still", View { failed: true, orders: pause, ..READY }, Step::BecomePaused),
            ("failure opens the gate first", View { failed: true, ..CLOSED }, Step::OpenGate),
            (
                "a paused job goes on before it aborts",
                View { orders: cancel, status: JobStatus::Standby, ..READY },
                Step::Continue,
            ),
            ("aborting waits for copies", View { copies: 1, ..aborting }, Step::Wait),
            ("and for target writes", View { doubled: 1, ..aborting }, Step::Wait),
            ("and for the look at the source", View { scan: Scan::Running, ..aborting }, Step::Wait),
            ("aborted", aborting, Step::EndAborted),
        ]);
    }
}
