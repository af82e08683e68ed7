//! [`Watch`]: hears what one job says, and holds it to it.
//!
//! Called on the job's own steps: when it says its end, nothing else has run since the gate, so that source and
//! target can be compared as they stood there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use heliostat_block::convert::usize_from;
use heliostat_block::graph::Role;
use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{
    CopyMode, End, ErrorAction, Force, Job, JobEvent, JobStatus, OnError, Operation, Verb, may_become,
};

use crate::bench::{Bench, QUICK};
use crate::medium::Medium;
use crate::named::Named;

/// Why a pivot is refused.
pub(crate) const REFUSAL: &str = "the pivot is refused";

/// What is known of a job, beside what it says itself.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) source: usize,
    pub(crate) target: usize,
    pub(crate) sync: SyncMode,
    pub(crate) on_source_error: OnError,
    pub(crate) on_target_error: OnError,
    /// The oracle's moment at which the source's writes began to be heard.
    pub(crate) since: u64,
    /// How long a guest waits for the target.
    pub(crate) deadline: Duration,
    pub(crate) auto_finalize: bool,
    /// It begins in write-blocking mode.
    pub(crate) doubles: bool,
    /// A verb that is said in the very moment in which a status is announced.
    pub(crate) impulse: Option<(JobStatus, Verb)>,
    /// After the pivot the target stands on the source.
    pub(crate) stands: bool,
    /// Its pivot is refused.
    pub(crate) is_refused: bool,
}

/// Hears one job.
pub(crate) struct Watch {
    bench: Arc<Bench>,
    known: Known,
    heard: Mutex<Heard>,
}

#[derive(Default)]
struct Heard {
    status: Option<JobStatus>,
    ready: bool,
    reported: bool,
    end: Option<JobEvent>,
    /// What was asked, and accepted.
    cancelled: bool,
    wanted: Option<End>,
    dismissed: bool,
    resumed: bool,
    impulse_done: bool,
    gate_asked: bool,
    /// `finalize` was accepted, and no error has taken it back.
    finalized: bool,
    /// Requests that the target had been asked when the job said that it was paused.
    quiet_at: Option<u64>,
    /// Guests' writes may go to the target at any time.
    doubles: bool,
    /// The last figures: bytes done.
    offset: u64,
}

impl Watch {
    pub(crate) fn new(bench: Arc<Bench>, known: Known) -> Arc<Self> {
        let heard = Heard { doubles: known.doubles, ..Heard::default() };
        Arc::new(Self { bench, known, heard: Mutex::new(heard) })
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, what: &str) {
        self.bench.world.fail(format!("job: {what}"));
    }

    /// Whether the end has been said and the job is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.heard().status == Some(JobStatus::Null)
    }

    /// Looks at the job's figures.
    pub(crate) fn look(&self, job: &Job) {
        let figures = job.figures();
        let before = std::mem::replace(&mut self.heard().offset, figures.offset);
        if figures.len != figures.offset + figures.dirty || figures.offset < before {
            self.fail(&format!("its figures make no sense: {before} bytes done before, now {figures:?}"));
        }
    }

    /// Asks a verb of the job, and remembers if it was accepted.
    pub(crate) fn ask(&self, job: &Job, verb: Verb) {
        let status = job.status();
        // Before it is asked: the gate may close in the very next step.
        if matches!(verb, Verb::Complete | Verb::Cancel(Force::Soft)) && !self.heard().gate_asked {
            self.heard().gate_asked = true;
            self.bench.waits.gate_begins();
        }
        let accepted = job.ask(verb);
        self.bench.world.trace(|| format!("operator: {verb:?} in {status:?}: {accepted:?}"));
        if accepted.is_err() {
            return;
        }
        let ready = matches!(status, JobStatus::Ready | JobStatus::Standby);
        let mut heard = self.heard();
        match verb {
            Verb::Cancel(Force::Soft) if ready => heard.wanted = Some(End::Copy),
            Verb::Cancel(_) => heard.cancelled = true,
            Verb::Complete => heard.wanted = Some(End::Complete),
            Verb::Dismiss => heard.dismissed = true,
            Verb::Resume => heard.resumed = true,
            // The way back is not counted: writes that are under way still go to both sides.
            Verb::Change(CopyMode::WriteBlocking) => {
                heard.doubles = true;
                self.bench.waits.doubling_begins(self.known.deadline);
            }
            Verb::Finalize => heard.finalized = true,
            _ => {}
        }
    }

    /// Hears an event.
    pub(crate) fn hear(&self, job: &Job, event: &JobEvent) {
        self.bench.world.trace(|| format!("job says {event:?}"));
        match event {
            JobEvent::Status(status) => {
                self.hear_status(*status);
                if self.known.impulse.is_some_and(|(at, _)| at == *status) && !self.heard().impulse_done {
                    self.heard().impulse_done = true;
                    let verb = self.known.impulse.map(|(_, verb)| verb);
                    verb.into_iter().for_each(|verb| self.ask(job, verb));
                }
            }
            JobEvent::Ready => {
                let again = std::mem::replace(&mut self.heard().ready, true);
                if again || self.heard().status != Some(JobStatus::Ready) {
                    self.fail("READY was said twice, or in another status");
                }
            }
            // Says nothing of what the job does but that guests do not wait.
            JobEvent::Degraded(_) => {}
            JobEvent::Pending => {
                if self.heard().status != Some(JobStatus::Pending) {
                    self.fail("PENDING was said in another status");
                }
            }
            JobEvent::Error { operation, action, errno, .. } => self.hear_error(*operation, *action, *errno),
            JobEvent::Completed(_) | JobEvent::Cancelled => {
                self.bench.disks[self.known.target].storage.may_become_other(false);
                self.hear_end(job, event);
            }
        }
    }

    fn hear_status(&self, status: JobStatus) {
        let mut heard = self.heard();
        let before = heard.status.replace(status);
        let allowed = match before {
            None => status == JobStatus::Created,
            Some(before) => may_become(before, status),
        };
        let ended = heard.end.is_some();
        let asked = self.bench.disks[self.known.target].storage.requests();
        let quiet_at = heard.quiet_at.take();
        if matches!(status, JobStatus::Paused | JobStatus::Standby) {
            heard.quiet_at = Some(asked);
        }
        let moved = quiet_at.is_some_and(|before| before != asked) && !heard.doubles;
        drop(heard);
        if moved {
            self.fail("it wrote to the target while it was paused");
        }
        if !allowed {
            self.fail(&format!("{status:?} was announced after {before:?}"));
        }
        if ended != matches!(status, JobStatus::Concluded | JobStatus::Null) {
            self.fail(&format!("{status:?} was announced, end said: {ended}"));
        }
    }

    fn hear_error(&self, operation: Operation, action: ErrorAction, errno: Option<i32>) {
        let policy = match operation {
            Operation::Read => self.known.on_source_error,
            Operation::Write => self.known.on_target_error,
        };
        let meant = policy.action(errno == Some(crate::faults::ENOSPC));
        // What had begun before a resume does not stop it again.
        let is_late = meant == ErrorAction::Stop && action == ErrorAction::Ignore && self.heard().resumed;
        if meant != action && !is_late {
            self.fail(&format!("{action:?} is not what {policy:?} means for {errno:?}"));
        }
        self.bench.seen().errors += 1;
        if action == ErrorAction::Stop && self.heard().status == Some(JobStatus::Pending) {
            self.heard().finalized = false;
        }
        self.heard().reported |= action == ErrorAction::Report;
    }

    fn hear_end(&self, job: &Job, event: &JobEvent) {
        let (cancelled, wanted, reported, ready, again) = {
            let mut heard = self.heard();
            let again = heard.end.replace(event.clone()).is_some();
            let ready = heard.ready && (heard.finalized || self.known.auto_finalize);
            (heard.cancelled, heard.wanted, heard.reported, ready, again)
        };
        let (source, target) = (&self.bench.disks[self.known.source], &self.bench.disks[self.known.target]);
        let sizes_differ = source.node.size() != target.node.size();
        let may_pivot = ready && wanted == Some(End::Complete) && !reported;
        let refused = JobEvent::Completed(Some(REFUSAL.to_owned()));
        let fits = match event {
            JobEvent::Completed(None) => {
                let is_refused = self.known.is_refused && wanted == Some(End::Complete);
                ready && wanted.is_some() && !cancelled && !reported && !is_refused
            }
            _ if *event == refused => may_pivot && !cancelled && self.known.is_refused,
            JobEvent::Completed(Some(_)) => reported || sizes_differ,
            _ => cancelled,
        };
        if again || !fits {
            self.fail(&format!(
                "{event:?} does not fit: cancelled {cancelled}, wanted {wanted:?}, reported {reported}, \
                 ready and finalized {ready}, said before {again}"
            ));
        }
        {
            let mut seen = self.bench.seen();
            let count = match (event, wanted) {
                (JobEvent::Completed(None), Some(End::Complete)) => &mut seen.pivots,
                (JobEvent::Completed(None), _) => &mut seen.copies,
                (JobEvent::Completed(Some(_)), _) if *event == refused => &mut seen.refused,
                (JobEvent::Completed(Some(_)), _) => &mut seen.failed,
                _ => &mut seen.cancelled,
            };
            *count += 1;
        }
        if *event == JobEvent::Completed(None) {
            self.check_copy(wanted == Some(End::Complete));
            let pause = job.figures().pause.filter(|pause| self.bench.is_quick && *pause > QUICK);
            if let Some(pause) = pause {
                self.fail(&format!("the gate was closed for {pause:?}, and nothing took long"));
            }
        }
        let ended_well = *event == JobEvent::Completed(None);
        let disks = (self.known.source, self.known.target);
        Named::job_ended(&self.bench, self.known.sync, disks, ended_well, wanted == Some(End::Complete));
        self.check_left(*event == JobEvent::Completed(None) && wanted == Some(End::Complete));
        if std::mem::replace(&mut self.heard().gate_asked, false) {
            self.bench.waits.gate_ends();
        }
        self.bench.waits.doubling_ends();
    }

    /// The consistent end: the target holds, durably, what the source holds.
    fn check_copy(&self, pivoted: bool) {
        let bench = &self.bench;
        let (source, target) = (&bench.disks[self.known.source], &bench.disks[self.known.target]);
        let inside = (source.node.in_flight(), source.storage.in_flight(), target.storage.in_flight());
        if inside != (0, 0, 0) {
            self.fail(&format!("at the end there were in flight: {inside:?}"));
            return;
        }
        let from = source.storage.visible();
        let durable = target.storage.durable();
        let to = target.storage.visible();
        if let Err(wrong) = bench.oracle().check_image(&from) {
            self.fail(&format!("at the end the source was wrong already: {wrong}"));
        }
        let ranges = match self.known.sync {
            SyncMode::Full | SyncMode::Top | SyncMode::Bitmap => BTreeMap::from([(0, source.node.size())]),
            SyncMode::None => bench.oracle().written_since(self.known.since),
        };
        for (what, image) in [("shows", &to), ("has durably", &durable)] {
            if let Some(at) = Medium::difference(&from, image, &ranges) {
                let index = usize_from(at);
                let (is, should) = (image[index], from[index]);
                self.fail(&format!(
                    "at the end the target {what} {is:#04x} at {at:#x}, the source {should:#04x}"
                ));
            }
        }
        match pivoted {
            true if self.known.stands => self.stand(from),
            true => bench.moved(self.known.target, to),
            false => {}
        }
    }

    /// The target shows what the source does, through what it does not hold.
    fn stand(&self, image: Vec<u8>) {
        let bench = &self.bench;
        let (source, target) = (&bench.disks[self.known.source], &bench.disks[self.known.target]);
        // Guests' flushes go to the target alone from here on. What was touched since the job began it holds itself.
        let mut below = source.storage.durable();
        for range in bench.oracle().touched_since(self.known.since) {
            let bytes = usize_from(range.offset())..usize_from(range.end());
            below[bytes.clone()].copy_from_slice(&image[bytes]);
        }
        if source.storage.flush_failures() == 0 && below != image {
            self.fail("what the target stands on is not durable");
        }
        target.storage.hold(image.clone());
        bench.seen().stood += 1;
        bench.moved(self.known.target, image);
    }

    /// Nothing of the job is left on the nodes.
    fn check_left(&self, pivoted: bool) {
        let bench = &self.bench;
        let (source, target) = (&bench.disks[self.known.source], &bench.disks[self.known.target]);
        let is_export = |role: &Role| matches!(role, Role::Export { .. });
        let source_roles = bench.graph.roles(&source.node);
        let target_roles = bench.graph.roles(&target.node);
        if !source_roles.iter().chain(&target_roles).all(is_export) {
            self.fail(&format!("places are left: {source_roles:?}, {target_roles:?}"));
        }
        if source_roles.is_empty() != pivoted || target_roles.is_empty() == pivoted {
            self.fail(&format!("exports are at the wrong node: {source_roles:?}, {target_roles:?}"));
        }
        if source.node.watchers() + target.node.watchers() > 0 {
            self.fail("a node is still being watched");
        }
        if target.storage.in_flight() > 0 {
            self.fail("requests to the target are still on their way");
        }
    }
}
