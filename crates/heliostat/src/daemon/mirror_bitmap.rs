//! Mirrors that use a named bitmap of their source: whether they may, and what is told when one cannot go on being kept.
//!
//! QEMU's mirror takes no bitmap. Arguments, which of them go together, and the words are those of its backup.

use std::sync::Arc;

use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{BitmapMode, ByBitmap};
use heliostat_block::node::Node;

use super::bitmaps::{BitmapError, Plan, Use};
use super::events::Happening;
use super::{Daemon, DaemonError, MirrorSpec};

/// A mirror's use of a bitmap, as an operator asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapUse {
    /// The bitmap, one of the source.
    pub name: Option<String>,
    /// When it takes note of what was copied.
    pub mode: Option<BitmapMode>,
    /// The sync mode was called `incremental`: `bitmap`, with `on-success`.
    pub is_incremental: bool,
}

/// Arguments that do not go together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapUseError {
    /// `incremental` says when already.
    #[error("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")]
    Incremental,
    /// When, but not what.
    #[error("Cannot specify bitmap sync mode without a bitmap")]
    ModeAlone,
    /// What, but not when.
    #[error("Bitmap sync mode must be given when providing a bitmap")]
    ModeMissing,
    /// There is no such bitmap on the source.
    #[error("Bitmap '{0}' could not be found")]
    NotFound(String),
    /// Nothing was there to be copied.
    #[error("sync mode 'none' does not produce meaningful bitmap outputs")]
    Nothing,
    /// It is neither read nor changed.
    #[error("Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{0}'")]
    Unused(&'static str),
    /// A target that is made holds nothing.
    #[error("sync mode 'bitmap' needs a target that holds the rest already: mode 'existing'")]
    NewTarget,
}

impl Daemon {
    /// Checks what is asked of a bitmap, in the order in which QEMU does for a backup. Nothing has changed then.
    pub(super) fn check_bitmap_use(
        &self,
        spec: &MirrorSpec,
        source: &Arc<Node>,
    ) -> Result<Option<ByBitmap>, DaemonError> {
        let BitmapUse { name, mode, is_incremental } = &spec.bitmap;
        if *is_incremental && mode.is_some_and(|mode| mode != BitmapMode::OnSuccess) {
            return Err(BitmapUseError::Incremental.into());
        }
        let Some(name) = name else {
            return if mode.is_some() { Err(BitmapUseError::ModeAlone.into()) } else { Ok(None) };
        };
        let bitmap = source.named_bitmap(name).ok_or_else(|| BitmapUseError::NotFound(name.clone()))?;
        let implied = is_incremental.then_some(BitmapMode::OnSuccess);
        let mode = mode.or(implied).ok_or(BitmapUseError::ModeMissing)?;
        let wanted = if mode == BitmapMode::Never { Use::Look } else { Use::Change };
        Plan::default().check(self, source, name, wanted)?;
        match (spec.sync, mode) {
            (SyncMode::None, _) => return Err(BitmapUseError::Nothing.into()),
            (SyncMode::Full, BitmapMode::Never) => return Err(BitmapUseError::Unused("full").into()),
            (SyncMode::Top, BitmapMode::Never) => return Err(BitmapUseError::Unused("top").into()),
            _ => {}
        }
        let by_bitmap = ByBitmap::new(source, name.clone(), bitmap.granularity, mode);
        Ok(Some(by_bitmap.map_err(BitmapError::Memory)?))
    }

    /// Tells of bitmaps that `source` keeps in its image and that `target` has no place for: they have followed, and go
    /// with the program.
    pub(super) fn say_unstored(&self, bitmaps: Vec<String>, target: &Node) {
        for name in bitmaps {
            self.events.say(Happening::BitmapNotStored { node: target.name().to_string(), name });
        }
    }
}

/// The bitmaps that `source` keeps in its image and `target` cannot.
pub(super) fn unstorable(source: &Node, target: &Node) -> Vec<String> {
    let kept = source.named_bitmaps().into_iter().filter(|bitmap| bitmap.persistent);
    kept.filter(|_| !target.can_store_bitmaps()).map(|bitmap| bitmap.name).collect()
}
