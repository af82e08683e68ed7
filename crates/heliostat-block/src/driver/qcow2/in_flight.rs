//! [`Allocations`]: guest clusters whose mapping somebody is about to change. [`Epochs`]: who may still use a
//! host cluster that nothing names any more.
//!
//! Allocating writes go on side by side; only those that touch the same guest cluster take turns. No lock is held
//! while data is written. Both are parts of [`super::state::State`] and protected by its lock.

use std::collections::BTreeMap;

use event_listener::{Event, EventListener};

use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// Guest ranges, of whole clusters, whose mapping is about to change. They do not overlap.
#[derive(Default)]
pub(crate) struct Allocations {
    /// End by start.
    ranges: BTreeMap<u64, u64>,
    released: Event,
}

impl Allocations {
    /// Enters a range that overlaps none that is there.
    pub(crate) fn enter(&mut self, range: ByteRange) {
        debug_assert!(self.first_in(range).is_none());
        if !is_planted(Bug::AllocationsForgotten) {
            self.ranges.insert(range.offset(), range.end());
        }
    }

    /// Takes a range out again, and wakes who waited for one.
    pub(crate) fn leave(&mut self, range: ByteRange) {
        self.ranges.remove(&range.offset());
        self.released.notify(usize::MAX);
    }

    /// The first range that overlaps `range`.
    pub(crate) fn first_in(&self, range: ByteRange) -> Option<ByteRange> {
        let before = self.ranges.range(..=range.offset()).next_back();
        let after = self.ranges.range(range.offset()..).next();
        let found = before.into_iter().chain(after);
        found.map(|(start, end)| ByteRange::from_bounds(*start, *end)).find(|found| found.overlaps(range))
    }

    /// Hears when the next range leaves.
    pub(crate) fn listen(&self) -> EventListener {
        self.released.listen()
    }
}

/// Requests by the epoch in which they looked at the mapping. A host cluster may be used anew only when every
/// request has ended that may have seen it mapped.
#[derive(Default)]
pub(crate) struct Epochs {
    current: u64,
    requests: BTreeMap<u64, u64>,
    /// How many of them will never leave.
    leaked: BTreeMap<u64, u64>,
    left: Event,
}

impl Epochs {
    /// A request begins; says in which epoch.
    pub(crate) fn enter(&mut self) -> u64 {
        *self.requests.entry(self.current).or_default() += 1;
        self.current
    }

    /// A request of that epoch has ended.
    pub(crate) fn leave(&mut self, epoch: u64) {
        if let Some(count) = self.requests.get_mut(&epoch) {
            *count -= 1;
            if *count == 0 {
                self.requests.remove(&epoch);
            }
            let left = self.requests.get(&epoch).copied().unwrap_or(0);
            if left == self.leaked.get(&epoch).copied().unwrap_or(0) {
                self.left.notify(usize::MAX);
            }
        }
    }

    /// A request of that epoch was dropped and will never leave.
    pub(crate) fn leak(&mut self, epoch: u64) {
        *self.leaked.entry(epoch).or_default() += 1;
        self.left.notify(usize::MAX);
    }

    /// Hears when requests of some epoch have ended.
    pub(crate) fn listen(&self) -> EventListener {
        self.left.listen()
    }

    /// Says whether every request has ended, or was dropped, that entered in `epoch` or before.
    pub(crate) fn has_ended(&self, epoch: u64) -> bool {
        let mut old = self.requests.range(..=epoch);
        old.all(|(epoch, count)| self.leaked.get(epoch) == Some(count))
    }

    /// Ends the current epoch; says which it was. What was unmapped before is seen by nobody who enters later.
    pub(crate) fn turn(&mut self) -> u64 {
        self.current += 1;
        self.current - 1
    }

    /// Says whether every request has ended that entered in `epoch` or before.
    pub(crate) fn has_passed(&self, epoch: u64) -> bool {
        self.requests.keys().next().is_none_or(|oldest| *oldest > epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start, end)
    }

    #[test]
    fn an_overlap_is_found_from_either_side() {
        let mut allocations = Allocations::default();
        allocations.enter(range(10, 20));
        allocations.enter(range(30, 40));
        assert_eq!(allocations.first_in(range(0, 10)), None);
        assert_eq!(allocations.first_in(range(0, 11)), Some(range(10, 20)));
        assert_eq!(allocations.first_in(range(19, 25)), Some(range(10, 20)));
        assert_eq!(allocations.first_in(range(20, 30)), None);
        assert_eq!(allocations.first_in(range(20, 35)), Some(range(30, 40)));
        allocations.leave(range(10, 20));
        assert_eq!(allocations.first_in(range(0, 30)), None);
    }

    #[test]
    fn an_epoch_has_passed_when_all_who_entered_it_or_one_before_have_left() {
        let mut epochs = Epochs::default();
        let old = epochs.enter();
        let turned = epochs.turn();
        let new = epochs.enter();
        assert!(!epochs.has_passed(turned));
        epochs.leave(old);
        assert!(epochs.has_passed(turned));
        let turned = epochs.turn();
        assert!(!epochs.has_passed(turned));
        epochs.leave(new);
        assert!(epochs.has_passed(turned));
    }

    #[test]
    fn a_request_that_was_dropped_has_ended_and_never_passes() {
        let mut epochs = Epochs::default();
        let (dropped, other) = (epochs.enter(), epochs.enter());
        let turned = epochs.turn();
        epochs.leak(dropped);
        assert!(!epochs.has_ended(turned));
        epochs.leave(other);
        assert!(epochs.has_ended(turned) && !epochs.has_passed(turned));
    }
}
