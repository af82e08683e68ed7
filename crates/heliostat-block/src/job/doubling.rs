//! [`Doubling`]: what a source node knows of its mirror. It marks plain writes dirty, and in write-blocking
//! mode hands the target's half of each write to the job.
//!
//! The halves are written by the job, on its thread, so that one that never ends is the job's, not the
//! guest's: a guest waits at most until the deadline (MIRROR.md section 4, rules 3 and 4). It never touches
//! a node itself. Called by `node` on guests' threads and by `mirror` on the job's.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use event_listener::{Event, EventListener};
use futures_util::future::{Either, select};

use super::range_table::{Kind, RangeTable, Ticket, Turn};
use crate::clock::Clock;
use crate::dirty_bitmap::DirtyBitmap;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;
use crate::storage::ZeroSpace;

/// What a doubled write puts into its range.
#[derive(Clone, Debug)]
pub(crate) enum Payload {
    /// These bytes, which the client cannot change any more.
    Data(Bytes),
    /// Zeroes.
    Zeroes(ZeroSpace),
}

/// The target's half of a doubled write, for the job to carry out. Must be given back with
/// [`Doubling::half_ended`]. Never a durable write: that would be told the error of an older one, which is the
/// flush's to tell.
#[derive(Debug)]
#[must_use]
pub(crate) struct TargetHalf {
    pub(crate) range: ByteRange,
    pub(crate) payload: Payload,
    ticket: Ticket,
    fate: Arc<Fate>,
}

/// How the target's half went; told once.
#[derive(Debug, Default)]
struct Fate {
    /// Set before `told`.
    written: AtomicBool,
    told: AtomicBool,
    changed: Event,
}

/// A doubled write under way, seen from the guest's side. A debt: [`Doubled::finish`] must be called when the
/// source's half has ended.
#[must_use]
pub(crate) struct Doubled {
    doubling: Arc<Doubling>,
    ticket: Ticket,
    range: ByteRange,
    fate: Arc<Fate>,
    finished: bool,
}

/// What stands between a source node and its mirror.
pub(crate) struct Doubling {
    bitmap: DirtyBitmap,
    /// Held while bits are cleared, so that entering C and clearing is one step. Under it only the bitmap's own
    /// lock of a look at it is taken.
    table: Mutex<Table>,
    write_blocking: AtomicBool,
    /// What is written to the target must be whole granules: for one whose backing is not there, which fills the rest
    /// of a cluster with zeroes where something else would show later.
    whole_granules: AtomicBool,
    /// The job sleeps and wants to hear of the next mark; of one only, so that a busy guest pays for one wake.
    wants_marks: AtomicBool,
    /// The job sleeps and wants to hear of the next half.
    wants_halves: AtomicBool,
    wake: Event,
    /// Something has left the table.
    left: Event,
    /// In nanoseconds.
    deadline: AtomicU64,
    clock: Arc<dyn Clock>,
    doubled_bytes: AtomicU64,
}

#[derive(Default)]
struct Table {
    ranges: RangeTable,
    /// Halves that the job has not taken up; bounded by the permits of the clients that wait for them, since
    /// none is added while one has lost its client.
    halves: VecDeque<TargetHalf>,
    closed: bool,
}

impl Doubling {
    /// Makes one in background mode.
    pub(crate) fn new(bitmap: DirtyBitmap, deadline: Duration, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            bitmap,
            table: Mutex::default(),
            write_blocking: AtomicBool::new(false),
            whole_granules: AtomicBool::new(false),
            wants_marks: AtomicBool::new(false),
            wants_halves: AtomicBool::new(false),
            wake: Event::new(),
            left: Event::new(),
            deadline: AtomicU64::new(nanoseconds(deadline)),
            clock,
            doubled_bytes: AtomicU64::new(0),
        })
    }

    /// How long guests wait for the target's half of their writes.
    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_nanos(self.deadline.load(Ordering::Relaxed))
    }

    /// Changes that, for writes that begin later.
    pub(crate) fn set_deadline(&self, deadline: Duration) {
        self.deadline.store(nanoseconds(deadline), Ordering::Relaxed);
    }

    pub(crate) const fn bitmap(&self) -> &DirtyBitmap {
        &self.bitmap
    }

    /// Bytes that doubled writes have brought to the target.
    pub(crate) fn doubled_bytes(&self) -> u64 {
        self.doubled_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn set_write_blocking(&self, write_blocking: bool) {
        self.write_blocking.store(write_blocking, Ordering::SeqCst);
    }

    /// Doubles only writes of whole granules from now on.
    pub(crate) fn set_whole_granules(&self, whole: bool) {
        self.whole_granules.store(whole, Ordering::SeqCst);
    }

    fn may_double(&self, range: ByteRange) -> bool {
        let granule = u64::from(self.bitmap.granularity());
        let is_edge = |at: u64| at.is_multiple_of(granule) || at == self.bitmap.size();
        !self.whole_granules.load(Ordering::SeqCst) || (is_edge(range.offset()) && is_edge(range.end()))
    }

    pub(crate) fn is_write_blocking(&self) -> bool {
        self.write_blocking.load(Ordering::SeqCst)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ------------------------------------------------------------------ the guest's side

    /// Marks what a plain write has changed. Called after the write has ended, before the client hears of it.
    pub(crate) fn mark(&self, range: ByteRange) {
        self.bitmap.mark(range);
        self.rouse(&self.wants_marks);
    }

    fn rouse(&self, wanted: &AtomicBool) {
        // With the job's "want, then look": one of the two sees the other.
        fence(Ordering::SeqCst);
        if wanted.load(Ordering::SeqCst) && wanted.swap(false, Ordering::SeqCst) {
            self.wake.notify(usize::MAX);
        }
    }

    /// Enters a write that is about to begin, waits for its turn and hands the target's half to the job.
    /// `None`: it is a plain write.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it has left the table again.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        range: ByteRange,
        payload: impl FnOnce() -> Payload,
    ) -> Option<Doubled> {
        if !self.is_write_blocking() || range.is_empty() || !self.may_double(range) {
            return None;
        }
        let mut waiting = self.enter(range)?;
        loop {
            let left = self.left.listen();
            let turn = self.table().ranges.turn(waiting.ticket);
            match turn {
                Turn::Go => break,
                Turn::BePlain => return None,
                Turn::Wait => left.await,
            }
        }
        waiting.has_turn = true;
        let ticket = waiting.ticket;
        let fate = Arc::new(Fate::default());
        self.hand_over(TargetHalf { range, payload: payload(), ticket, fate: Arc::clone(&fate) });
        Some(Doubled { doubling: Arc::clone(self), ticket, range, fate, finished: false })
    }

    fn enter(&self, range: ByteRange) -> Option<Waiting<'_>> {
        let mut table = self.table();
        if table.closed {
            return None;
        }
        let ticket = table.ranges.enter_doubled(range)?;
        drop(table);
        Some(Waiting { doubling: self, ticket, has_turn: false })
    }

    fn hand_over(&self, half: TargetHalf) {
        let mut table = self.table();
        if table.closed {
            drop(table);
            self.half_ended(half, false);
            return;
        }
        table.halves.push_back(half);
        drop(table);
        self.rouse(&self.wants_halves);
    }

    // ------------------------------------------------------------------ the job's side

    /// Takes up the next half; the job carries it out whatever else it does.
    pub(crate) fn next_half(&self) -> Option<TargetHalf> {
        self.table().halves.pop_front()
    }

    /// The target's half has surely ended. What the guest no longer waited for, or what failed, is dirty.
    pub(crate) fn half_ended(&self, half: TargetHalf, written: bool) {
        let mut table = self.table();
        if is_planted(Bug::LateWriteForgotten) && !table.ranges.contains(half.ticket) {
            return;
        }
        let failed = !written && !is_planted(Bug::FailedHalfNotMarked);
        if failed || table.ranges.kind(half.ticket) == Kind::Unknown {
            self.bitmap.mark(half.range);
        }
        let gone = table.ranges.part_ended(half.ticket);
        drop(table);
        if written {
            self.doubled_bytes.fetch_add(half.range.len(), Ordering::Relaxed);
        }
        half.fate.tell(written);
        if gone {
            self.left.notify(usize::MAX);
        }
    }

    /// Finds the next dirty range at or after `from` that overlaps nothing on its way, enters it as a copy and
    /// clears its bits, in one step. At most `max_len` bytes. `None` when there is none up to the end.
    pub(crate) fn begin_copy(&self, from: u64, max_len: u64) -> Option<Copying> {
        let granularity = u64::from(self.bitmap.granularity());
        let mut table = self.table();
        let mut from = from;
        loop {
            let dirty = self.bitmap.next_dirty(from, max_len)?;
            from = match table.ranges.free_part(dirty) {
                Ok(part) => {
                    let end =
                        if part.end() == dirty.end() { part.end() } else { part.end() & !(granularity - 1) };
                    let whole_granules = ByteRange::from_bounds(dirty.offset(), end);
                    if !whole_granules.is_empty() {
                        let ticket = table.ranges.enter_copy(whole_granules);
                        if !is_planted(Bug::ClearAfterRead) {
                            self.bitmap.clear(whole_granules);
                        }
                        return Some(Copying { ticket, range: whole_granules });
                    }
                    dirty.offset() + granularity
                }
                Err(resume) => resume.next_multiple_of(granularity),
            };
        }
    }

    /// A copy has ended; a failed one is dirty again.
    pub(crate) fn end_copy(&self, copying: Copying, copied: bool) {
        let mut table = self.table();
        if is_planted(Bug::ClearAfterRead) {
            self.bitmap.clear(copying.range);
        }
        if !copied {
            self.bitmap.mark(copying.range);
        }
        table.ranges.remove(copying.ticket);
        drop(table);
        self.left.notify(usize::MAX);
    }

    /// Whether `range` is neither dirty nor on its way, so that both sides should be equal there.
    pub(crate) fn is_still(&self, range: ByteRange) -> bool {
        let table = self.table();
        table.ranges.free_part(range) == Ok(range) && !self.bitmap.is_dirty(range)
    }

    /// Copies in flight, in bytes.
    pub(crate) fn copying_bytes(&self) -> u64 {
        self.table().ranges.copying_bytes()
    }

    /// What is left: dirty or on its way.
    pub(crate) fn left_bytes(&self) -> u64 {
        self.bitmap.dirty_bytes() + self.copying_bytes()
    }

    /// Doubled writes that stand in the table.
    pub(crate) fn doubled_in_flight(&self) -> usize {
        self.table().ranges.count(Kind::Doubled)
    }

    /// Target writes of unknown fate that stand in the table.
    pub(crate) fn unknown_in_flight(&self) -> usize {
        self.table().ranges.count(Kind::Unknown)
    }

    /// Takes no more doubled writes; those whose half the job has not taken up become plain.
    pub(crate) fn close(&self) {
        let mut table = self.table();
        table.closed = true;
        let halves = std::mem::take(&mut table.halves);
        drop(table);
        for half in halves {
            self.half_ended(half, false);
        }
    }

    /// Hears when something leaves the table, so that what was blocked may be free.
    pub(crate) fn listen_left(&self) -> EventListener {
        self.left.listen()
    }

    /// Waits until a half is there, or, if `marks` says so, a mark.
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind.
    pub(crate) async fn wait_for_work(&self, marks: bool) {
        let wake = self.wake.listen();
        self.wants_halves.store(true, Ordering::SeqCst);
        self.wants_marks.store(marks, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let marked = marks && !self.bitmap.is_clean();
        if !marked && self.table().halves.is_empty() {
            wake.await;
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A copy that stands in the table. Must be given back with [`Doubling::end_copy`].
#[derive(Debug)]
#[must_use]
pub(crate) struct Copying {
    ticket: Ticket,
    range: ByteRange,
}

impl Copying {
    pub(crate) const fn range(&self) -> ByteRange {
        self.range
    }
}

/// A doubled write that waits for its turn; leaves when dropped before it has come.
struct Waiting<'a> {
    doubling: &'a Doubling,
    ticket: Ticket,
    has_turn: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.has_turn {
            self.doubling.table().ranges.remove(self.ticket);
            self.doubling.left.notify(usize::MAX);
        }
    }
}

impl Fate {
    fn tell(&self, written: bool) {
        self.written.store(written, Ordering::SeqCst);
        self.told.store(true, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }

    async fn wait_told(&self) {
        while !self.told.load(Ordering::SeqCst) {
            let changed = self.changed.listen();
            if !self.told.load(Ordering::SeqCst) {
                changed.await;
            }
        }
    }
}

impl Doubled {
    pub(crate) const fn doubling(&self) -> &Arc<Doubling> {
        &self.doubling
    }

    /// The source's half has ended: waits for the target's, at most until the deadline, and leaves. When it
    /// returns, the range is either on both sides or dirty.
    ///
    /// # Cancel safety
    /// Dropped, the range is dirty and the target's half of unknown fate.
    pub(crate) async fn finish(mut self, source_written: bool) {
        self.wait_for_target().await;
        self.finished = true;
        if !source_written && !is_planted(Bug::FailedWriteNotMarked) {
            self.doubling.mark(self.range);
        }
        if !self.fate.told.load(Ordering::SeqCst) {
            self.lose_sight();
            return;
        }
        let gone = self.doubling.table().ranges.part_ended(self.ticket);
        if gone {
            self.doubling.left.notify(usize::MAX);
        }
    }

    async fn wait_for_target(&self) {
        if self.fate.told.load(Ordering::SeqCst) {
            return;
        }
        let deadline = self.doubling.clock.now() + self.doubling.deadline();
        let told = pin!(self.fate.wait_told());
        match select(told, self.doubling.clock.sleep_until(deadline)).await {
            Either::Left(_) | Either::Right(_) => {}
        }
    }

    fn lose_sight(&self) {
        self.doubling.mark(self.range);
        if is_planted(Bug::LateWriteForgotten) {
            self.doubling.table().ranges.remove(self.ticket);
        } else {
            self.doubling.table().ranges.lose_sight(self.ticket);
        }
        self.doubling.left.notify(usize::MAX);
    }
}

impl Drop for Doubled {
    fn drop(&mut self) {
        if !self.finished {
            self.lose_sight();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::clock::{LocalFuture, Moment};

    /// A clock whose deadlines have passed, or never come.
    struct Standing {
        deadlines_pass: bool,
    }

    impl Clock for Standing {
        fn now(&self) -> Moment {
            Moment::START
        }

        fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
            if self.deadlines_pass {
                Box::pin(std::future::ready(()))
            } else {
                Box::pin(std::future::pending())
            }
        }
    }

    fn doubling(deadlines_pass: bool) -> Arc<Doubling> {
        let bitmap = DirtyBitmap::new(4096, 512).unwrap();
        let doubling = Doubling::new(bitmap, Duration::ZERO, Arc::new(Standing { deadlines_pass }));
        doubling.set_write_blocking(true);
        doubling
    }

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    fn begin(doubling: &Arc<Doubling>, range: ByteRange) -> impl Future<Output = Option<Doubled>> {
        doubling.begin(range, || Payload::Zeroes(ZeroSpace::Keep))
    }

    #[test]
    fn where_whole_granules_are_wanted_other_writes_are_plain() {
        let doubling = doubling(false);
        doubling.set_whole_granules(true);
        for (offset, len, is_doubled) in
            [(0, 512, true), (512, 1024, true), (0, 100, false), (512, 700, false), (100, 412, false)]
        {
            let begun = begin(&doubling, range(offset, len)).now_or_never().flatten();
            assert_eq!(begun.is_some(), is_doubled, "{offset}+{len}");
            if let Some(doubled) = begun {
                let half = doubling.next_half().unwrap();
                doubling.half_ended(half, true);
                doubled.finish(true).now_or_never().unwrap();
            }
        }
    }

    #[test]
    fn a_dropped_wait_for_a_turn_has_left_the_table() {
        for polls in 0..3 {
            let doubling = doubling(false);
            let first = begin(&doubling, range(0, 10)).now_or_never().flatten().unwrap();
            let mut waits = Box::pin(begin(&doubling, range(5, 10)));
            for _ in 0..polls {
                assert!(waits.as_mut().now_or_never().is_none());
            }
            drop(waits);
            assert_eq!(doubling.doubled_in_flight(), 1);
            assert!(doubling.next_half().is_some_and(|half| {
                doubling.half_ended(half, true);
                doubling.next_half().is_none()
            }));
            assert!(first.finish(true).now_or_never().is_some());
            assert_eq!(doubling.doubled_in_flight(), 0);
            assert!(doubling.bitmap().is_clean(), "both sides have it");
        }
    }

    #[test]
    fn who_waits_behind_one_that_was_dropped_gets_its_turn() {
        let doubling = doubling(false);
        let first = begin(&doubling, range(0, 10)).now_or_never().flatten().unwrap();
        let mut second = Box::pin(begin(&doubling, range(5, 10)));
        let mut third = Box::pin(begin(&doubling, range(12, 10)));
        assert!(second.as_mut().now_or_never().is_none() && third.as_mut().now_or_never().is_none());
        drop(second);
        assert!(third.now_or_never().flatten().is_some());
        drop(first);
    }

    #[test]
    fn a_doubled_write_that_is_dropped_is_dirty_and_its_half_of_unknown_fate() {
        let doubling = doubling(false);
        let doubled = begin(&doubling, range(0, 10)).now_or_never().flatten().unwrap();
        let mut finishing = Box::pin(doubled.finish(true));
        assert!(finishing.as_mut().now_or_never().is_none(), "waits for the target");
        drop(finishing);
        assert!(doubling.bitmap().is_dirty(range(0, 512)));
        assert!(doubling.begin_copy(0, 4096).is_none(), "nothing is written beside it");
        let half = doubling.next_half().unwrap();
        doubling.half_ended(half, true);
        let copying = doubling.begin_copy(0, 4096).expect("afterwards it is copied");
        doubling.end_copy(copying, true);
        assert_eq!(doubling.unknown_in_flight(), 0);
    }

    #[test]
    fn past_the_deadline_the_guest_is_answered_and_the_range_is_dirty() {
        let doubling = doubling(true);
        let doubled = begin(&doubling, range(0, 10)).now_or_never().flatten().unwrap();
        assert!(doubled.finish(true).now_or_never().is_some());
        assert_eq!(doubling.unknown_in_flight(), 1, "the half is still out");
        assert!(
            begin(&doubling, range(5, 10)).now_or_never().flatten().is_none(),
            "beside it: a plain write"
        );
        doubling.close();
        assert_eq!(doubling.unknown_in_flight(), 0);
        assert!(doubling.bitmap().is_dirty(range(0, 10)));
    }
}
