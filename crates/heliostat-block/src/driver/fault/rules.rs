//! [`Rules`]: which requests fail, and which are held up, decided from what has happened.
//!
//! A state machine without I/O. An event makes the rules for it active; an active rule lets requests fail until
//! another event makes others active. Called by [`super::FaultInjector`] under its lock.

use std::sync::Arc;

use event_listener::Event;

use crate::debug_event::DebugEvent;
use crate::range::ByteRange;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoType {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It makes zeroes.
    WriteZeroes,
    /// It discards.
    Discard,
    /// It makes durable.
    Flush,
    /// It asks how a range is laid out.
    BlockStatus,
}

impl IoType {
    /// All of them, in QEMU's order.
    pub const ALL: [Self; 6] =
        [Self::Read, Self::Write, Self::WriteZeroes, Self::Discard, Self::Flush, Self::BlockStatus];

    /// QEMU's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write-zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::BlockStatus => "block-status",
        }
    }
}

/// Whether a rule goes on after the first request that it has let fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// It does not.
    Once,
    /// It does.
    Always,
}

/// What fails (`inject-error`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// What makes the rule active.
    pub event: DebugEvent,
    /// In which state; `None` in all.
    pub state: Option<i64>,
    /// Which requests; `None` all but [`IoType::BlockStatus`].
    pub io: Option<IoType>,
    /// With which error number; 0 lets them pass.
    pub errno: i32,
    /// Only those that touch the byte at this offset.
    pub offset: Option<u64>,
    /// How often.
    pub times: Times,
    /// They fail at once; else after the thread's other tasks have had their turn.
    pub immediately: bool,
}

/// What changes the state (`set-state`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetState {
    /// When.
    pub event: DebugEvent,
    /// In which state; `None` in all.
    pub state: Option<i64>,
    /// To which.
    pub new_state: i64,
}

/// A request that is held up.
struct Suspended {
    tag: String,
    resumed: Arc<Resumed>,
}

/// How a request that is held up hears that it may go on.
#[derive(Default)]
pub(super) struct Resumed {
    pub(super) event: Event,
    pub(super) is_over: std::sync::atomic::AtomicBool,
}

/// A rule that an event made active.
struct Active {
    id: usize,
    rule: InjectError,
}

/// What fails and what is held up.
pub(super) struct Rules {
    state: i64,
    /// A number for each, by which an active one is recognised.
    errors: Vec<(usize, InjectError)>,
    states: Vec<SetState>,
    /// Breakpoints; each holds up one request.
    breaks: Vec<(DebugEvent, String)>,
    are_breaks_over: bool,
    active: Vec<Active>,
    suspended: Vec<Suspended>,
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) errno: i32,
    pub(super) immediately: bool,
}

impl Rules {
    pub(super) fn new(errors: Vec<InjectError>, states: Vec<SetState>) -> Self {
        Self {
            state: 1,
            errors: errors.into_iter().enumerate().collect(),
            states,
            breaks: Vec::new(),
            are_breaks_over: false,
            active: Vec::new(),
            suspended: Vec::new(),
        }
    }

    /// Something has happened. Answers what the request is held up by.
    pub(super) fn happens(&mut self, event: DebugEvent) -> Vec<Arc<Resumed>> {
        let holds = |state: Option<i64>| state.is_none_or(|state| state == self.state);
        let active: Vec<_> = self
            .errors
            .iter()
            .filter(|(_, rule)| rule.event == event && holds(rule.state))
            .map(|(id, rule)| Active { id: *id, rule: rule.clone() })
            .collect();
        // The first that was given has the last word.
        let next = self.states.iter().find(|rule| rule.event == event && holds(rule.state));
        let next = next.map_or(self.state, |rule| rule.new_state);
        if !active.is_empty() {
            self.active = active;
        }
        let mut held_up = Vec::new();
        for (_, tag) in self.breaks.extract_if(.., |(at, _)| *at == event) {
            let resumed = Arc::new(Resumed::default());
            self.suspended.push(Suspended { tag, resumed: Arc::clone(&resumed) });
            held_up.push(resumed);
        }
        self.state = next;
        held_up
    }

    /// Says whether a request fails. `range` is empty for a flush.
    pub(super) fn check(&mut self, io: IoType, range: ByteRange) -> Option<Failure> {
        let touches = |offset: u64| (range.offset()..range.end()).contains(&offset);
        let concerns = |rule: &InjectError| {
            rule.offset.is_none_or(touches)
                && rule.io.map_or(io != IoType::BlockStatus, |wanted| wanted == io)
        };
        let at = self.active.iter().position(|active| concerns(&active.rule))?;
        let Active { id, rule } = self.active.get(at)?;
        let (id, failure) = (*id, Failure { errno: rule.errno, immediately: rule.immediately });
        if rule.errno == 0 {
            return None;
        }
        if rule.times == Times::Once {
            self.active.remove(at);
            self.errors.retain(|(other, _)| *other != id);
        }
        Some(failure)
    }

    pub(super) fn add_break(&mut self, event: DebugEvent, tag: &str) {
        if !self.are_breaks_over {
            self.breaks.push((event, tag.to_owned()));
        }
    }

    /// From now on nothing is held up.
    pub(super) fn end_breaks(&mut self) {
        self.are_breaks_over = true;
        self.breaks.clear();
    }

    pub(super) fn breaks(&self) -> usize {
        self.breaks.len() + self.suspended.len()
    }

    /// Takes a breakpoint back. Answers whether there was one.
    pub(super) fn remove_break(&mut self, tag: &str) -> bool {
        let before = self.breaks.len();
        self.breaks.retain(|(_, other)| other != tag);
        self.breaks.len() < before
    }

    pub(super) fn is_suspended(&self, tag: &str) -> bool {
        self.suspended.iter().any(|suspended| suspended.tag == tag)
    }

    /// Whether somebody who waits for a request to be held up by `tag` has waited long enough.
    pub(super) fn ends_wait(&self, tag: &str) -> bool {
        self.are_breaks_over || self.is_suspended(tag)
    }

    /// Takes requests that are held up by `tag`: the latest, or all; with no tag, all there are.
    pub(super) fn take_suspended(&mut self, tag: Option<&str>, all: bool) -> Vec<Arc<Resumed>> {
        let is_meant = |suspended: &Suspended| tag.is_none_or(|tag| suspended.tag == tag);
        if all {
            let taken = self.suspended.extract_if(.., |suspended| is_meant(suspended));
            return taken.map(|suspended| suspended.resumed).collect();
        }
        let at = self.suspended.iter().rposition(is_meant);
        at.map(|at| self.suspended.remove(at).resumed).into_iter().collect()
    }

    /// A request that was held up is gone.
    pub(super) fn forget(&mut self, resumed: &Arc<Resumed>) {
        self.suspended.retain(|suspended| !Arc::ptr_eq(&suspended.resumed, resumed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(event: DebugEvent, errno: i32) -> InjectError {
        let (state, io, offset) = (None, None, None);
        InjectError { event, state, io, errno, offset, times: Times::Always, immediately: false }
    }

    fn errno(rules: &mut Rules, io: IoType) -> Option<i32> {
        rules.check(io, ByteRange::from_bounds(0, 512)).map(|failure| failure.errno)
    }

    #[test]
    fn an_event_makes_its_rules_active_until_another_one_does() {
        let (read, write) = (DebugEvent::ReadAio, DebugEvent::WriteAio);
        let mut rules = Rules::new(vec![error(read, 5), error(write, 28)], Vec::new());
        assert_eq!(errno(&mut rules, IoType::Read), None);
        rules.happens(read);
        rules.happens(DebugEvent::L2Load);
        assert_eq!(errno(&mut rules, IoType::Write), Some(5), "whatever the request does");
        assert_eq!(errno(&mut rules, IoType::BlockStatus), None, "unless it must be asked for");
        rules.happens(write);
        assert_eq!(errno(&mut rules, IoType::Read), Some(28));
    }

    #[test]
    fn once_is_once() {
        let read = DebugEvent::ReadAio;
        let mut rules = Rules::new(vec![InjectError { times: Times::Once, ..error(read, 5) }], Vec::new());
        rules.happens(read);
        assert_eq!(errno(&mut rules, IoType::Read), Some(5));
        rules.happens(read);
        assert_eq!(errno(&mut rules, IoType::Read), None);
    }

    #[test]
    fn a_rule_is_for_a_kind_of_request_and_for_a_place() {
        let read = DebugEvent::ReadAio;
        let rule = InjectError { io: Some(IoType::Write), offset: Some(512), ..error(read, 5) };
        let mut rules = Rules::new(vec![rule], Vec::new());
        rules.happens(read);
        let mut fails = |io, from, to| rules.check(io, ByteRange::from_bounds(from, to)).is_some();
        assert!(fails(IoType::Write, 512, 513) && fails(IoType::Write, 0, 4096));
        assert!(!fails(IoType::Write, 0, 512) && !fails(IoType::Write, 513, 1024));
        assert!(!fails(IoType::Read, 0, 4096) && !fails(IoType::Flush, 0, 0));
    }

    #[test]
    fn rules_hold_in_the_state_in_which_the_event_finds_them() {
        let read = DebugEvent::ReadAio;
        let set = |state, new_state| SetState { event: read, state: Some(state), new_state };
        let rule = InjectError { state: Some(3), ..error(read, 5) };
        let mut rules = Rules::new(vec![rule], vec![set(1, 2), set(2, 3), set(3, 4)]);
        for expected in [None, None, Some(5)] {
            rules.happens(read);
            assert_eq!(errno(&mut rules, IoType::Read), expected);
        }
    }

    #[test]
    fn a_breakpoint_holds_up_one_request() {
        let write = DebugEvent::WriteAio;
        let mut rules = Rules::new(Vec::new(), Vec::new());
        rules.add_break(write, "A");
        assert!(rules.happens(DebugEvent::ReadAio).is_empty());
        assert_eq!(rules.happens(write).len(), 1);
        assert!(rules.is_suspended("A") && rules.happens(write).is_empty());
        assert!(!rules.remove_break("A"), "it is used up");
        assert_eq!(rules.take_suspended(Some("A"), false).len(), 1);
        assert!(rules.take_suspended(Some("A"), false).is_empty());
    }
}
