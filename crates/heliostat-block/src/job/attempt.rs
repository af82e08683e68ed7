//! [`Attempt`]: a mirror's try at being READY, and later at ending: since when, and whether the target has been
//! flushed for it.
//!
//! The flush that takes long comes before READY is said or the gate is closed, so that nobody waits for it; one
//! that began before the attempt does not count. Called by `mirror`.

use std::time::Duration;

use crate::clock::Moment;

/// A try, at one of the two.
pub(crate) struct Attempt {
    at_end: bool,
    since: Moment,
    /// The flush on its way began in this attempt.
    flushing: bool,
    flushed: bool,
}

impl Attempt {
    /// A try at READY.
    pub(crate) const fn at_ready(now: Moment) -> Self {
        Self { at_end: false, since: now, flushing: false, flushed: false }
    }

    /// Begins anew where the aim has changed.
    pub(crate) fn aim(&mut self, at_end: bool, now: Moment) {
        if at_end != self.at_end {
            *self = Self { at_end, ..Self::at_ready(now) };
        }
    }

    /// Begins anew, at the same.
    pub(crate) const fn restart(&mut self, now: Moment) {
        *self = Self { at_end: self.at_end, ..Self::at_ready(now) };
    }

    /// It failed at the last step: the flush is due again, and the time already spent counts.
    pub(crate) const fn retry(&mut self) {
        self.flushing = false;
        self.flushed = false;
    }

    pub(crate) const fn flush_begins(&mut self) {
        self.flushing = true;
    }

    pub(crate) const fn flush_ended(&mut self, good: bool) {
        self.flushed = good && (self.flushing || self.flushed);
        self.flushing = false;
    }

    /// Whether a flush has succeeded that began in this attempt, and none failed since.
    pub(crate) const fn is_flushed(&self) -> bool {
        self.flushed
    }

    /// How long it has been going on.
    pub(crate) fn tried(&self, now: Moment) -> Duration {
        now.since(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Moment = Moment::START;

    #[test]
    fn a_flush_from_before_the_attempt_does_not_count() {
        let mut attempt = Attempt::at_ready(NOW);
        attempt.flush_begins();
        attempt.aim(true, NOW);
        attempt.flush_ended(true);
        assert!(!attempt.is_flushed());
        attempt.flush_begins();
        attempt.aim(true, NOW);
        attempt.flush_ended(true);
        assert!(attempt.is_flushed());
    }

    #[test]
    fn a_flush_that_fails_takes_back_what_an_earlier_one_gave() {
        let mut attempt = Attempt::at_ready(NOW);
        attempt.flush_begins();
        attempt.flush_ended(true);
        attempt.flush_begins();
        attempt.flush_ended(false);
        assert!(!attempt.is_flushed());
    }
}
