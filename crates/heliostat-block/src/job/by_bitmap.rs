//! [`ByBitmap`]: a mirror's use of a named bitmap of its source: what it copies at first by it, and what the bitmap says
//! afterwards.
//!
//! The bitmap goes on recording while the job runs, so that nothing is lost whatever becomes of it. What it says "since"
//! is the moment at which the copy is complete: the closed gate at the end. There, and before the pivot, other bits take
//! its place. A job that ends otherwise leaves it, and adds what a failed copy may have damaged beside its granules;
//! with [`BitmapMode::Always`] the bitmap has what is not surely on the target. Called by `mirror`.

use std::sync::Arc;

use crate::dirty_bitmap::DirtyBitmap;
use crate::error::InvalidGranularity;
use crate::named_bitmap::{Change, change};
use crate::node::Node;
use crate::planted::{Bug, is_planted};

/// When a bitmap takes note of what was copied by it, as QEMU's backup has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// When the job ends well.
    OnSuccess,
    /// Never.
    Never,
    /// However it ends.
    Always,
}

/// A named bitmap in the hands of a mirror. It must be busy for as long.
pub struct ByBitmap {
    name: String,
    mode: BitmapMode,
    /// What takes the place of its bits; had before there is a job, so that there is memory for it at the end.
    fresh: Option<Arc<DirtyBitmap>>,
}

impl ByBitmap {
    /// Makes one for the bitmap `name` of `source`.
    ///
    /// # Errors
    /// As [`DirtyBitmap::new`].
    pub fn new(
        source: &Node,
        name: String,
        granularity: u32,
        mode: BitmapMode,
    ) -> Result<Self, InvalidGranularity> {
        Ok(Self { name, mode, fresh: Some(Arc::new(DirtyBitmap::new(source.size(), granularity)?)) })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes dirty what it has. The job must hear of the source's writes already.
    pub(super) fn add_to(&self, source: &Node, dirty: &DirtyBitmap) {
        if let Some(bits) = self.bits(source) {
            dirty.merge(&bits);
        }
    }

    fn bits(&self, source: &Node) -> Option<Arc<DirtyBitmap>> {
        source.named_bitmap(&self.name)?.bits
    }

    /// The copy is complete, behind the closed gate. Answers what there was.
    pub(super) fn succeed(&mut self, source: &Arc<Node>) -> Option<Arc<DirtyBitmap>> {
        let old = self.bits(source);
        if self.mode != BitmapMode::Never {
            self.put_fresh(source);
        }
        self.release(source);
        old
    }

    /// The job will not end well. Called while it still hears of the source's writes.
    pub(super) fn abort(&mut self, source: &Arc<Node>) {
        let forgets = is_planted(Bug::BitmapClearedOnFailure) && self.mode == BitmapMode::OnSuccess;
        if self.mode == BitmapMode::Always || forgets {
            self.put_fresh(source);
        }
    }

    /// The job has ended otherwise, and `left` is what may not be on the target.
    pub(super) fn fail(&mut self, source: &Arc<Node>, left: &DirtyBitmap, by_bitmap: bool) {
        let is_due = self.mode == BitmapMode::Always || by_bitmap;
        let forgets = is_planted(Bug::BitmapForgetsRest) || is_planted(Bug::BitmapClearedOnFailure);
        if let Some(bits) = self.bits(source).filter(|_| is_due && !forgets) {
            bits.merge(left);
        }
        self.release(source);
    }

    /// What [`ByBitmap::succeed`] has done was too early: what there was is dirty again.
    pub(super) fn take_back(&self, source: &Node, old: &DirtyBitmap) {
        if let Some(bits) = self.bits(source) {
            bits.merge(old);
        }
    }

    fn put_fresh(&mut self, source: &Arc<Node>) {
        if let Some(fresh) = self.fresh.take() {
            change(&[(Arc::clone(source), Change::Clear(self.name.clone(), fresh))]);
        }
    }

    fn release(&self, source: &Arc<Node>) {
        change(&[(Arc::clone(source), Change::Busy(self.name.clone(), false))]);
    }
}
