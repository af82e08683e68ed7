//! Whether a mirror is degraded: its target does not answer, or cannot be reached. Guests' writes are then only
//! remembered (MIRROR.md, "the guest is never a hostage"), until the target is back and nearly in step.
//!
//! Looked at by the loop before it does anything else. Errors are no silence: the policies decide about those.

use super::Mirror;
use crate::clock::Moment;
use crate::job::JobEvent;
use crate::job::at_target::Count;
use crate::job::figures::Degradation;
use crate::limits::LEFT_ALWAYS;

/// How the target has answered.
pub(super) struct Answers {
    /// When it was last seen that the target had answered something, or owed no answer.
    last: Moment,
    /// What it had been asked for then, and had answered.
    count: Count,
    /// Since when, and why, the job is degraded.
    degraded: Option<(Moment, String)>,
}

impl Answers {
    pub(super) fn from(now: Moment) -> Self {
        Self { last: now, count: Count::default(), degraded: None }
    }

    pub(super) const fn is_degraded(&self) -> bool {
        self.degraded.is_some()
    }

    /// As it is told.
    pub(super) fn degradation(&self, now: Moment) -> Option<Degradation> {
        let (since, reason) = self.degraded.as_ref()?;
        Some(Degradation { reason: reason.clone(), lasted: now.since(*since) })
    }
}

impl Mirror {
    /// Becomes degraded, or sound again, and says so.
    pub(super) fn look_at_answers(&mut self) {
        let now = self.clock.now();
        let count = self.route.at_target.count();
        // What waits for the source, or for a limit of its, is not the target's doing.
        if count.is_answered_since(self.answers.count) {
            self.answers.last = now;
        }
        self.answers.count = count;
        let why = self.why_degraded(now);
        let was = self.answers.is_degraded();
        match why {
            Some(reason) if !was => self.answers.degraded = Some((now, reason)),
            Some(reason) => {
                if let Some((_, known)) = &mut self.answers.degraded {
                    *known = reason;
                }
            }
            // With much left to copy it would only be late again.
            None if was && self.is_nearly_in_step() => self.answers.degraded = None,
            None => {}
        }
        if was != self.answers.is_degraded() {
            self.tell_figures(true);
            let reason = self.answers.degraded.as_ref().map(|(_, reason)| reason.clone());
            self.job.say(JobEvent::Degraded(reason));
        }
    }

    fn why_degraded(&self, now: Moment) -> Option<String> {
        let deadline = self.doubling.deadline();
        let is_silent = self.route.target.traits().remote && now.since(self.answers.last) >= deadline;
        let is_late = is_silent || self.doubling.unknown_in_flight() > 0;
        let silence = || format!("the target has not answered within {} ms", deadline.as_millis());
        self.route.target.out_of_reach().or_else(|| is_late.then(silence))
    }

    fn is_nearly_in_step(&self) -> bool {
        let budget = self.tally.pause_budget(std::time::Duration::ZERO).max(LEFT_ALWAYS);
        !self.first_pass_over || self.doubling.left_bytes() <= budget
    }
}
