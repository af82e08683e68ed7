//! [`AtTarget`]: what a mirror's target has been asked for and has not answered: only then is it silent.
//!
//! Counts, and decides nothing: how long is too long is `mirror`'s to say. Called by whatever asks the target, on any
//! thread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Requests that are at the target.
#[derive(Debug, Default)]
pub(crate) struct AtTarget {
    asked: AtomicU64,
    answered: AtomicU64,
}

/// A request that is at the target as long as this lives.
pub(crate) struct Asked<'a>(&'a AtTarget);

/// How many there were of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    asked: u64,
    answered: u64,
}

impl AtTarget {
    /// A request goes to the target now.
    pub(crate) fn ask(&self) -> Asked<'_> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Asked(self)
    }

    /// Waits for what the target is asked for.
    ///
    /// # Cancel safety
    /// That of `work`.
    pub(crate) async fn carry_out<T>(&self, work: impl Future<Output = T>) -> T {
        let _asked = self.ask();
        work.await
    }

    /// What it has been asked for, and has answered.
    pub(crate) fn count(&self) -> Count {
        // In this order: never more are answered than asked.
        let answered = self.answered.load(Ordering::SeqCst);
        Count { asked: self.asked.load(Ordering::SeqCst), answered }
    }
}

impl Count {
    /// Whether the target owes no answer, or has given one since `before`, or owed none then.
    pub(crate) const fn is_answered_since(self, before: Self) -> bool {
        self.asked == self.answered || self.answered != before.answered || before.asked == before.answered
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.answered.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_was_asked_and_has_not_answered_is_silent() {
        let at_target = AtTarget::default();
        let before = at_target.count();
        assert!(at_target.count().is_answered_since(before), "nothing was asked");
        let first = at_target.ask();
        assert!(at_target.count().is_answered_since(before), "it was asked just now");
        let before = at_target.count();
        assert!(!at_target.count().is_answered_since(before));
        let _second = at_target.ask();
        assert!(!at_target.count().is_answered_since(before));
        drop(first);
        assert!(at_target.count().is_answered_since(before));
        assert!(!at_target.count().is_answered_since(at_target.count()));
    }
}
