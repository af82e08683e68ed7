//! What a node gives to one that is put on top of it: bytes in a storage that the two share, or itself as a storage.

use std::sync::Arc;

use heliostat_block::driver::Raw;
use heliostat_block::node_storage::NodeStorage;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Storage;

use super::super::DaemonError;
use super::Below;

impl Below {
    /// The part of its storage that it shows. An image grows, and so may what is below a filter.
    pub(super) fn shown(&self) -> ByteRange {
        let size = if self.shares_storage() { self.entry.node.size() } else { u64::MAX };
        ByteRange::from_bounds(self.start, self.start.saturating_add(size))
    }

    /// Whether its bytes stand one to one in a storage, which others may share.
    pub(super) fn shares_storage(&self) -> bool {
        self.entry.storage.is_some() && self.entry.node.image().is_none()
    }

    /// Whether what stands on it, an image or a window, goes to its storage and not through it: its bitmaps hear
    /// nothing of that.
    pub(super) fn is_passed_by(&self, by_image: bool) -> bool {
        self.shares_storage() && (!by_image || self.origin() == 0)
    }

    /// The storage in which its bytes begin at [`Below::origin`]: its own, or the node itself.
    pub(super) fn shared(&self) -> Arc<dyn Storage> {
        match &self.entry.storage {
            Some(storage) if self.shares_storage() => Arc::clone(storage),
            _ => NodeStorage::new(Arc::clone(&self.entry.node)),
        }
    }

    /// Where its bytes begin in [`Below::shared`].
    pub(super) fn origin(&self) -> u64 {
        if self.shares_storage() { self.start } else { 0 }
    }

    /// Its bytes as a storage of their own.
    pub(super) fn storage(&self) -> Arc<dyn Storage> {
        let shared = self.shared();
        let is_all = self.origin() == 0 && self.entry.node.size() == shared.size();
        if is_all { shared } else { NodeStorage::new(Arc::clone(&self.entry.node)) }
    }
}

/// The part of the node below that starts at `offset`, and where that is in their common storage.
pub(super) fn window(below: &Below, offset: u64, size: Option<u64>) -> Result<(u64, Raw), DaemonError> {
    let there = below.entry.node.size();
    if offset > there {
        return Err(DaemonError::OffsetOutside { offset, there });
    }
    let len = size.unwrap_or_else(|| there.saturating_sub(offset));
    if offset.checked_add(len).is_none_or(|end| end > there) {
        return Err(DaemonError::Outside { offset, size: len, there });
    }
    if size.is_some_and(|size| !size.is_multiple_of(512)) {
        return Err(DaemonError::SizeUnaligned);
    }
    let start = below.origin() + offset;
    let raw = Raw::window(below.shared(), start, Some(len))?;
    // Else what it cuts off, or adds, would be somebody else's.
    let ends_with_storage = !below.entry.is_bounded && start + raw.size() == below.shared().size();
    Ok((start, if size.is_none() && ends_with_storage { raw.open_ended() } else { raw }))
}
