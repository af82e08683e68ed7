//! [`RangeLock`]: the right to a range of bytes, granted in the order in which it was asked for.
//!
//! Used where a request must read, change and write back whole blocks: nobody else may write them meanwhile.

use std::sync::{Mutex, MutexGuard, PoisonError};

use event_listener::Event;

use crate::range::ByteRange;

/// Ranges that are held or waited for. An entry holds its range when no earlier one overlaps it, so nobody
/// can be overtaken for ever.
#[derive(Debug, Default)]
pub(crate) struct RangeLock {
    /// In the order of arrival. As long as requests are in flight, which permits bound.
    entries: Mutex<Entries>,
    released: Event,
}

#[derive(Debug, Default)]
struct Entries {
    queue: Vec<(u64, ByteRange)>,
    next_id: u64,
}

/// Holds a range, or waits for it; lets go when dropped.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl RangeLock {
    /// Waits for `range` and holds it.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it gives up its place.
    pub(crate) async fn lock(&self, range: ByteRange) -> RangeGuard<'_> {
        let guard = self.arrive(range);
        while !self.is_granted(guard.id, range) {
            let released = self.released.listen();
            if !self.is_granted(guard.id, range) {
                released.await;
            }
        }
        guard
    }

    fn arrive(&self, range: ByteRange) -> RangeGuard<'_> {
        let mut entries = self.entries();
        let id = entries.next_id;
        entries.next_id += 1;
        entries.queue.push((id, range));
        RangeGuard { lock: self, id }
    }

    fn is_granted(&self, id: u64, range: ByteRange) -> bool {
        let entries = self.entries();
        entries.queue.iter().take_while(|(other, _)| *other != id).all(|(_, held)| !held.overlaps(range))
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.entries().queue.retain(|(id, _)| *id != self.id);
        self.lock.released.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn overlapping_ranges_take_turns_in_order() {
        let lock = RangeLock::default();
        let range = |offset, len| ByteRange::new(offset, len).unwrap();
        let first = lock.lock(range(0, 8)).now_or_never().unwrap();
        let mut second = pin!(lock.lock(range(4, 8)));
        assert!(second.as_mut().now_or_never().is_none());
        let mut third = pin!(lock.lock(range(10, 4)));
        assert!(third.as_mut().now_or_never().is_none(), "behind the second, which waits");
        assert!(lock.lock(range(20, 4)).now_or_never().is_some());
        drop(first);
        let second = second.now_or_never().unwrap();
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        assert!(third.now_or_never().is_some());
    }

    #[test]
    fn a_dropped_waiter_gives_up_its_place() {
        let lock = RangeLock::default();
        let range = ByteRange::new(0, 8).unwrap();
        let first = lock.lock(range).now_or_never().unwrap();
        assert!(lock.lock(range).now_or_never().is_none());
        drop(first);
        assert!(lock.lock(range).now_or_never().is_some());
    }
}
