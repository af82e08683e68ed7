//! How a node becomes longer or shorter, or takes note that what is below has.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Node;
use crate::driver::{Driver, Preallocation};
use crate::error::{BlockError, ErrorKind};

impl Node {
    /// Changes the virtual size: what is gained reads as zeroes, what is lost is gone. Requests wait meanwhile; those
    /// beyond the new end are refused. Clients that asked for the size before do not hear of it.
    ///
    /// # Errors
    /// [`BlockError`]: read-only, not supported by what is below, or the host's; the size is as it was then.
    pub async fn resize(self: &Arc<Self>, size: u64, preallocation: Preallocation) -> Result<(), BlockError> {
        if self.options().read_only {
            return Err(BlockError::new(ErrorKind::ReadOnly, self.name.as_str(), None));
        }
        let _drained = self.drain().await;
        let named = self.named_bitmaps();
        let bits = named.iter().filter(|bitmap| !bitmap.persistent).map(|bitmap| bitmap.resized(size));
        let bits = bits.collect::<Result<Vec<_>, _>>();
        let bits = bits.map_err(|error| self.failure_of_all(std::io::Error::other(error)))?;
        if let Driver::Qcow2(image) = self.driver() {
            image.keep_bitmaps(&named);
        }
        let resized = self.blocks.below().resize(size, preallocation).await;
        // Bitmaps that the driver keeps have changed with its size, which it may have done even where it failed.
        let kept = self.driver().bitmaps();
        let others = bits.into_iter().flatten().filter(|_| resized.is_ok());
        let kept = kept.into_iter().filter_map(|bitmap| Some((bitmap.name, bitmap.bits?)));
        let mut watching = self.watchers.write();
        others.chain(kept).for_each(|(name, bits)| watching.replace_bits(&name, bits));
        drop(watching);
        resized.map_err(|error| self.failure_of_all(error))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Takes on the size that what is below has now, when another node has changed that.
    pub async fn follow_size(self: &Arc<Self>) {
        let _drained = self.drain().await;
        if self.image().is_some() {
            return;
        }
        if let Driver::Raw(raw) = self.driver() {
            raw.follow_size();
        }
        let size = self.blocks.below().size();
        self.watchers.write().resize(size);
        self.size.store(size, Ordering::Release);
    }

    /// [`Node::resize`] without waiting for anybody, for a driver above that has seen to it that no request is in the
    /// way (see [`crate::storage::Storage::set_size`]).
    pub(crate) async fn resize_beside_others(&self, size: u64) -> Result<(), BlockError> {
        if self.options().read_only {
            return Err(BlockError::new(ErrorKind::ReadOnly, self.name.as_str(), None));
        }
        let resized = self.blocks.below().resize(size, Preallocation::Off).await;
        resized.map_err(|error| BlockError::from_io(self.name.as_str(), None, error))?;
        // Before anybody can write there; marks wait meanwhile.
        self.watchers.write().resize(size);
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
