//! [`Unflushed`]: what was written to the target since its last good flush.
//!
//! A flush that fails may have lost all of it, and a second flush that succeeds does not bring it back; so
//! all of it is dirty again (MIRROR.md section 4, rule 5). So it is when the target says that it may have lost
//! something. Called by `mirror`.

use super::mirror_step::TargetFlush;
use crate::dirty_bitmap::DirtyBitmap;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// Ranges that a crash of the target could lose.
pub(crate) struct Unflushed {
    /// Written since the last flush began.
    written: DirtyBitmap,
    /// Written before the flush that is on its way; clean when none is.
    flushing: DirtyBitmap,
    is_flushing: bool,
    failures: u64,
    succeeded: bool,
}

/// The moment at which a write to the target began, told in flushes that had failed by then, and losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Begun(u64);

impl Unflushed {
    /// Makes one from two clean bitmaps of the same size and granularity as the job's own.
    pub(crate) fn new([written, flushing]: [DirtyBitmap; 2]) -> Self {
        Self { written, flushing, is_flushing: false, failures: 0, succeeded: false }
    }

    /// Says that a write begins; see [`Unflushed::is_lost`].
    pub(crate) const fn write_begins(&self) -> Begun {
        Begun(self.failures)
    }

    /// Whether a flush has failed, or the target has lost something, while a write was on its way: what had landed of it then may be gone.
    pub(crate) fn is_lost(&self, begun: Begun) -> bool {
        begun.0 != self.failures && !is_planted(Bug::FlushForgetsCopies)
    }

    /// Whether a flush has ever succeeded. Until then even what was there before the job may be lost.
    pub(crate) const fn has_succeeded(&self) -> bool {
        self.succeeded
    }

    /// Remembers a write to the target that has ended.
    pub(crate) fn wrote(&self, range: ByteRange) {
        self.written.mark(range);
    }

    /// A flush begins: what was written until now is what it covers.
    pub(crate) fn flush_begins(&mut self) {
        debug_assert!(!self.is_flushing, "one flush at a time");
        self.is_flushing = true;
        std::mem::swap(&mut self.written, &mut self.flushing);
    }

    /// The flush has succeeded.
    pub(crate) fn flush_succeeded(&mut self) {
        self.is_flushing = false;
        wipe(&self.flushing);
        self.succeeded = true;
    }

    /// The flush has failed: everything since the last good one goes into `dirty`. What was written beside
    /// the failed flush too, because its error may have been told to this one.
    pub(crate) fn flush_failed(&mut self, dirty: &DirtyBitmap) {
        self.is_flushing = false;
        if is_planted(Bug::FlushTriedAgain) {
            self.written.merge(&self.flushing);
            wipe(&self.flushing);
            return;
        }
        self.lose(dirty);
    }

    /// What was written since the last good flush may be gone, what is being written too: it goes into `dirty`. A flush
    /// on its way goes on.
    pub(crate) fn lose(&mut self, dirty: &DirtyBitmap) {
        self.failures += 1;
        for lost in [&self.flushing, &self.written] {
            dirty.merge(lost);
            wipe(lost);
        }
    }

    /// Bytes that the next flush covers.
    pub(crate) fn bytes(&self) -> u64 {
        self.written.dirty_bytes()
    }

    pub(crate) fn state(&self) -> TargetFlush {
        match (self.is_flushing, self.written.is_clean()) {
            (true, _) => TargetFlush::Running,
            (false, false) => TargetFlush::Needed,
            (false, true) => TargetFlush::Good,
        }
    }
}

/// Makes it clean; costs what was dirty, not what it could hold.
fn wipe(bitmap: &DirtyBitmap) {
    bitmap.clear(ByteRange::from_bounds(0, bitmap.size()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap() -> DirtyBitmap {
        DirtyBitmap::new(8192, 512).unwrap()
    }

    #[test]
    fn a_failed_flush_makes_everything_since_the_last_good_one_dirty() {
        let range = |offset| ByteRange::new(offset, 512).unwrap();
        let dirty = bitmap();
        let mut unflushed = Unflushed::new([bitmap(), bitmap()]);
        unflushed.wrote(range(0));
        unflushed.flush_begins();
        unflushed.flush_succeeded();
        assert_eq!(unflushed.state(), TargetFlush::Good);
        unflushed.wrote(range(1024));
        assert_eq!(unflushed.state(), TargetFlush::Needed);
        unflushed.flush_begins();
        assert_eq!(unflushed.state(), TargetFlush::Running);
        unflushed.wrote(range(2048));
        unflushed.flush_failed(&dirty);
        assert!(!dirty.is_dirty(range(0)), "durable");
        assert!(dirty.is_dirty(range(1024)) && dirty.is_dirty(range(2048)));
        assert!(unflushed.has_succeeded());
        assert_eq!(unflushed.state(), TargetFlush::Good, "nothing is trusted, so nothing is to be flushed");
        let dirty = bitmap();
        unflushed.flush_begins();
        unflushed.flush_failed(&dirty);
        assert!(dirty.is_clean(), "what one failed flush has lost is not lost by the next one again");
    }

    #[test]
    fn a_loss_beside_a_flush_makes_what_that_covers_dirty_although_it_succeeds() {
        let range = |offset| ByteRange::new(offset, 512).unwrap();
        let dirty = bitmap();
        let mut unflushed = Unflushed::new([bitmap(), bitmap()]);
        unflushed.wrote(range(0));
        unflushed.flush_begins();
        unflushed.wrote(range(512));
        let begun = unflushed.write_begins();
        unflushed.lose(&dirty);
        unflushed.flush_succeeded();
        assert!(dirty.is_dirty(range(0)) && dirty.is_dirty(range(512)));
        assert!(unflushed.is_lost(begun));
    }

    #[test]
    fn a_write_on_its_way_is_lost_by_a_flush_that_fails() {
        let mut unflushed = Unflushed::new([bitmap(), bitmap()]);
        let begun = unflushed.write_begins();
        unflushed.flush_begins();
        unflushed.flush_failed(&bitmap());
        assert!(unflushed.is_lost(begun));
        assert!(!unflushed.is_lost(unflushed.write_begins()));
    }
}
