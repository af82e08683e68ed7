//! [`ImageFile`]: the file in which an image or its guest data is, as the driver sees it: any alignment, and it
//! grows as it is written.
//!
//! Grows in steps, ahead of what is written: a write that makes a file longer waits for others on many file
//! systems, one inside does not. What lies beyond the last cluster in use is cut off when the image is closed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::blocks::Blocks;
use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;
use crate::range_lock::RangeLock;
use crate::storage::{Durability, IoFuture, Storage, ZeroEffort, ZeroSpace};

/// The least and the most that a file grows by at once.
const STEP_MIN: u64 = 16 << 20;
const STEP_MAX: u64 = 1 << 30;

/// A file of an image.
pub struct ImageFile {
    blocks: Blocks<Arc<dyn Storage>>,
    /// Held by whoever changes the length.
    length: RangeLock,
    size_found: AtomicU64,
    /// Where the highest write ended since it was opened.
    written_end: AtomicU64,
}

impl ImageFile {
    /// Uses all of `storage`.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self {
            size_found: AtomicU64::new(storage.size()),
            blocks: Blocks::new(storage),
            length: RangeLock::default(),
            written_end: AtomicU64::new(0),
        }
    }

    /// What it is.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        self.blocks.below()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.storage().size()
    }

    /// Where the highest write to it ended since it was opened; 0 before the first.
    pub(crate) fn written_end(&self) -> u64 {
        self.written_end.load(Ordering::Relaxed)
    }

    fn is_written_to(&self, end: u64) {
        // Looked at first: most writes are not the highest.
        if end > self.written_end() {
            self.written_end.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Reads `range`, of any alignment. Beyond the end it reads as zeroes.
    ///
    /// # Errors
    /// The storage's.
    pub async fn read(&self, range: ByteRange) -> io::Result<Buffer> {
        let size = self.size();
        if range.end() <= size {
            return self.blocks.read(range.offset(), Buffer::zeroed(usize_from(range.len()))).await;
        }
        let mut buffer = Buffer::zeroed(usize_from(range.len()));
        if range.offset() < size {
            let len = usize_from(size - range.offset());
            let inside = self.blocks.read(range.offset(), Buffer::zeroed(len)).await?;
            buffer[..len].copy_from_slice(&inside);
        }
        Ok(buffer)
    }

    /// Whether it takes requests of any alignment by itself.
    fn has_bytes(&self) -> bool {
        self.storage().traits().block_size == 1
    }

    /// Fills `buffer` from `offset` on, at once where the storage can. Beyond the end it reads as zeroes.
    pub(crate) fn read_into(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        let len = u64_from(buffer.len());
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.size());
        if is_inside && self.has_bytes() {
            return self.storage().read(offset, buffer);
        }
        IoFuture::pending(async move {
            if is_inside {
                return self.blocks.read(offset, buffer).await;
            }
            let mut buffer = buffer;
            let range = ByteRange::new(offset, len).map_err(io::Error::other)?;
            buffer.copy_from_slice(&self.read(range).await?);
            Ok(buffer)
        })
    }

    /// Writes `data` at `offset`, of any alignment. The file grows where that is needed.
    ///
    /// # Errors
    /// The storage's.
    pub async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        self.write_durably(offset, data, Durability::Cached).await
    }

    /// [`ImageFile::write`], at once where the storage can.
    pub(crate) fn write_now(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        let len = u64_from(data.len());
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.size());
        if is_inside && self.has_bytes() {
            self.is_written_to(offset + len);
            return self.storage().write(offset, data, durability);
        }
        IoFuture::pending(self.write_durably(offset, data, durability))
    }

    async fn write_durably(&self, offset: u64, data: Bytes, durability: Durability) -> io::Result<()> {
        let range = ByteRange::new(offset, u64_from(data.len())).map_err(io::Error::other)?;
        self.grow_to(range.end()).await?;
        self.is_written_to(range.end());
        self.blocks.write(offset, data, durability).await
    }

    /// Makes `range` read as zeroes. What lies beyond the end does so already.
    ///
    /// # Errors
    /// The storage's.
    pub async fn write_zeroes(&self, range: ByteRange, space: ZeroSpace) -> io::Result<()> {
        let inside = match space {
            ZeroSpace::MayUnmap => ByteRange::from_bounds(range.offset(), range.end().min(self.size())),
            ZeroSpace::Keep => {
                self.grow_to(range.end()).await?;
                range
            }
        };
        if inside.is_empty() {
            return Ok(());
        }
        self.is_written_to(inside.end());
        self.blocks.write_zeroes(inside, space, ZeroEffort::Any, Durability::Cached).await
    }

    /// Gives the space of `range` back where that can be done; it may read as anything then. A hint.
    pub(crate) async fn discard(&self, range: ByteRange) {
        let range = ByteRange::from_bounds(range.offset(), range.end().min(self.size()));
        if !range.is_empty() {
            // It is no longer in use; that its space stays taken harms nobody.
            let _ = self.blocks.discard(range).await;
        }
    }

    /// Makes durable what has been written.
    ///
    /// # Errors
    /// The storage's, see [`Storage::flush`].
    pub async fn flush(&self) -> io::Result<()> {
        self.storage().flush().await
    }

    /// Makes it at least `end` bytes long, and longer in one go where it will be written on.
    ///
    /// # Errors
    /// The storage's; no space where it cannot grow.
    pub(crate) async fn grow_to(&self, end: u64) -> io::Result<()> {
        if end <= self.size() {
            return Ok(());
        }
        let _held = self.length.lock(ByteRange::from_bounds(0, 1)).await;
        let size = self.size();
        if end <= size {
            return Ok(());
        }
        if !self.storage().traits().can_resize {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let step = (size / 4).clamp(STEP_MIN, STEP_MAX);
        let ahead = end.max(size.saturating_add(step)).next_multiple_of(STEP_MIN);
        // A hint.
        let _ = self.storage().expect_writes(ahead).await;
        match self.blocks.set_size(ahead).await {
            // Where there is no room to grow ahead, perhaps there is for what is needed.
            Err(_) => {
                let block = u64::from(self.storage().traits().block_size);
                self.blocks.set_size(end.next_multiple_of(block)).await
            }
            grown => grown,
        }
    }

    /// How long it was when it was opened, or what it has been cut to since.
    pub(crate) fn size_found(&self) -> u64 {
        self.size_found.load(Ordering::Relaxed)
    }

    /// Cuts off what lies beyond `end`, where that can be done.
    ///
    /// # Errors
    /// The storage's.
    pub(crate) async fn cut_to(&self, end: u64) -> io::Result<()> {
        self.size_found.fetch_min(end, Ordering::Relaxed);
        if end < self.size() && self.storage().traits().can_resize {
            self.set_size(end).await
        } else {
            Ok(())
        }
    }

    /// Makes it `size` bytes long.
    ///
    /// # Errors
    /// The storage's.
    pub async fn set_size(&self, size: u64) -> io::Result<()> {
        let _held = self.length.lock(ByteRange::from_bounds(0, 1)).await;
        self.blocks.set_size(size).await
    }
}
