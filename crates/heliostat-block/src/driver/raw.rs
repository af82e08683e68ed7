//! [`Raw`]: a node whose bytes stand one to one in a storage, or in a window of one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};

/// A window of a storage.
pub struct Raw {
    storage: Arc<dyn Storage>,
    start: u64,
    /// Changed by a resize only.
    len: AtomicU64,
    /// Whether it is all of the storage, and ends where that does.
    is_whole: bool,
}

/// Why a window does not fit.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// It reaches beyond the storage.
    #[error("the window {window} reaches beyond the {size} bytes that are there")]
    Outside {
        /// What was asked for.
        window: ByteRange,
        /// What there is.
        size: u64,
    },
    /// It starts or ends inside a block, so that requests at its edge could not be aligned.
    #[error("the window {window} does not start and end at multiples of the block size {block_size}")]
    Unaligned {
        /// What was asked for.
        window: ByteRange,
        /// What it must be a multiple of.
        block_size: u32,
    },
}

impl Raw {
    /// All of `storage`.
    #[must_use]
    pub fn whole(storage: Arc<dyn Storage>) -> Self {
        Self { start: 0, len: AtomicU64::new(storage.size()), is_whole: true, storage }
    }

    /// The part of `storage` that starts at `offset` and has `size` bytes, or reaches to the end.
    ///
    /// # Errors
    /// [`WindowError`] when there is no such part, or it cannot be used on this storage.
    pub fn window(storage: Arc<dyn Storage>, offset: u64, size: Option<u64>) -> Result<Self, WindowError> {
        let there = storage.size();
        let len = size.unwrap_or_else(|| there.saturating_sub(offset));
        let outside =
            || WindowError::Outside { window: ByteRange::from_bounds(offset, u64::MAX), size: there };
        let window = ByteRange::new(offset, len).map_err(|_| outside())?;
        if window.end() > there {
            return Err(WindowError::Outside { window, size: there });
        }
        let block_size = storage.traits().block_size;
        let aligned = |edge: u64| edge.is_multiple_of(u64::from(block_size)) || edge == there;
        if !aligned(window.offset()) || !aligned(window.end()) {
            return Err(WindowError::Unaligned { window, block_size });
        }
        let is_whole = window.offset() == 0 && window.end() == there;
        Ok(Self { start: window.offset(), len: AtomicU64::new(window.len()), is_whole, storage })
    }

    fn shifted(&self, range: ByteRange) -> ByteRange {
        ByteRange::from_bounds(self.start + range.offset(), self.start + range.end())
    }

    pub(crate) fn traits(&self) -> Traits {
        self.storage.traits()
    }

    pub(crate) fn size(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Where the last block of the storage ends: behind the window if the storage has become longer.
    pub(crate) fn end(&self) -> u64 {
        self.storage.size().saturating_sub(self.start)
    }

    /// Makes the storage `size` bytes long, and the window with it.
    ///
    /// # Errors
    /// As [`Storage::set_size`]; `Unsupported` where it shows a part only.
    pub(crate) async fn resize(&self, size: u64) -> io::Result<()> {
        if !self.is_whole {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.storage.set_size(size).await?;
        self.len.store(size, Ordering::Release);
        Ok(())
    }

    pub(crate) fn allocated_size(&self) -> Option<u64> {
        self.storage.allocated_size()
    }

    pub(crate) fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        self.storage.read(self.start + offset, buffer)
    }

    pub(crate) fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        self.storage.write(self.start + offset, data, durability)
    }

    pub(crate) fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        self.storage.write_zeroes(self.shifted(range), space, effort, durability)
    }

    pub(crate) fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        self.storage.discard(self.shifted(range))
    }

    pub(crate) fn flush(&self) -> IoFuture<'_, ()> {
        self.storage.flush()
    }

    pub(crate) fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        let start = self.start;
        if start == 0 {
            return self.storage.extents(range);
        }
        let shifted = self.shifted(range);
        IoFuture::pending(async move {
            let mut extents = self.storage.extents(shifted).await?;
            for extent in &mut extents {
                extent.range =
                    ByteRange::from_bounds(extent.range.offset() - start, extent.range.end() - start);
            }
            Ok(extents)
        })
    }

    pub(crate) fn start_writeback(&self, range: ByteRange) {
        self.storage.start_writeback(self.shifted(range));
    }
}
