//! [`Raw`]: a node whose bytes stand one to one in a storage, or in a window of one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::convert::u64_from;
use crate::debug_event::DebugEvent;
use crate::range::ByteRange;
use crate::span::Span;
use crate::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};

/// A window of a storage.
pub struct Raw {
    storage: Arc<dyn Storage>,
    start: u64,
    /// Changed by a resize only.
    len: AtomicU64,
    /// Whether it ends where the storage does, and goes on doing so when that is made longer or shorter.
    is_open_ended: bool,
    /// It must never begin as an image does.
    is_guarded: bool,
}

/// What a format is recognised by, at a disk's start: qcow2's is "QFI\xfb".
const MAGICS: [&[u8]; 1] = [b"QFI\xfb"];

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
        Self {
            start: 0,
            len: AtomicU64::new(storage.size()),
            is_open_ended: true,
            is_guarded: false,
            storage,
        }
    }

    /// The same, but what would make its start look like an image is not written: for a disk that nobody said to be
    /// raw. Else a guest could write an image's header, and whoever guesses the next time would open the files that it
    /// names.
    #[must_use]
    pub fn guarded(self) -> Self {
        Self { is_guarded: true, ..self }
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
        let is_open_ended = window.offset() == 0 && window.end() == there;
        let len = AtomicU64::new(window.len());
        Ok(Self { start: window.offset(), len, is_open_ended, is_guarded: false, storage })
    }

    fn shifted(&self, range: ByteRange) -> ByteRange {
        ByteRange::from_bounds(self.start + range.offset(), self.start + range.end())
    }

    /// What it stands on.
    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    pub(crate) fn traits(&self) -> Traits {
        self.storage.traits()
    }

    /// Where in the storage it begins.
    pub(crate) const fn start(&self) -> u64 {
        self.start
    }

    /// Its length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Where the last block of the storage ends: behind the window if the storage has become longer.
    pub(crate) fn end(&self) -> u64 {
        self.storage.size().saturating_sub(self.start)
    }

    /// The same, but it ends where the storage does, whatever is made of that.
    #[must_use]
    pub fn open_ended(self) -> Self {
        Self { is_open_ended: true, ..self }
    }

    /// See [`Storage::takes_spans`]. Where a magic could stand, what is written is looked at.
    pub(crate) fn takes_span(&self, range: ByteRange) -> bool {
        let is_looked_at =
            self.is_guarded && MAGICS.iter().any(|magic| range.offset() < u64_from(magic.len()));
        !is_looked_at && self.storage.takes_spans()
    }

    /// See [`Storage::write_span`].
    pub(crate) fn write_span(&self, offset: u64, span: Span) -> IoFuture<'_, ()> {
        self.storage.write_span(self.start + offset, span)
    }

    /// See [`Storage::span`].
    pub(crate) fn span(&self, range: ByteRange) -> Option<Span> {
        self.storage.span(self.shifted(range))
    }

    /// Makes the window `size` bytes long, and the storage as long as that takes.
    ///
    /// # Errors
    /// As [`Storage::set_size`]; `Unsupported` where it does not reach to the storage's end.
    pub(crate) async fn resize(&self, size: u64) -> io::Result<()> {
        if !self.is_open_ended {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let end = self.start.checked_add(size).ok_or(io::ErrorKind::FileTooLarge)?;
        self.storage.set_size(end).await?;
        self.len.store(size, Ordering::Release);
        Ok(())
    }

    /// Takes note that the storage has become longer or shorter.
    pub(crate) fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        match self.start.checked_add(end) {
            Some(end) if self.is_open_ended => self.storage.expect_writes(end),
            _ => IoFuture::ready(Ok(())),
        }
    }

    pub(crate) fn follow_size(&self) {
        if self.is_open_ended {
            self.len.store(self.end(), Ordering::Release);
        }
    }

    pub(crate) fn allocated_size(&self) -> Option<u64> {
        self.storage.allocated_size()
    }

    pub(crate) fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        match self.storage.raise(DebugEvent::ReadAio) {
            None => self.storage.read(self.start + offset, buffer),
            Some(held_up) => IoFuture::pending(async move {
                held_up.await;
                self.storage.read(self.start + offset, buffer).await
            }),
        }
    }

    pub(crate) fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        if self.is_guarded && forges(offset, &data) {
            return IoFuture::ready(Err(io::Error::from_raw_os_error(EPERM)));
        }
        match self.storage.raise(DebugEvent::WriteAio) {
            None => self.storage.write(self.start + offset, data, durability),
            Some(held_up) => IoFuture::pending(async move {
                held_up.await;
                self.storage.write(self.start + offset, data, durability).await
            }),
        }
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
        let held_up = [DebugEvent::FlushToOs, DebugEvent::FlushToDisk].map(|event| self.storage.raise(event));
        if held_up.iter().all(Option::is_none) {
            return self.storage.flush();
        }
        IoFuture::pending(async move {
            for held_up in held_up.into_iter().flatten() {
                held_up.await;
            }
            self.storage.flush().await
        })
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

/// What QEMU's guests get for this, too: "operation not permitted" on Linux.
const EPERM: i32 = 1;

/// Says whether `data`, written at `offset`, completes the start of an image. Of writes that bring only some of those
/// bytes, the last one brings only right ones: so none that does is let through.
fn forges(offset: u64, data: &[u8]) -> bool {
    MAGICS.iter().any(|magic| {
        let Some(rest) = usize::try_from(offset).ok().and_then(|from| magic.get(from..)) else {
            return false;
        };
        let len = rest.len().min(data.len());
        len > 0 && rest[..len] == data[..len]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_would_begin_an_image_is_a_forgery() {
        let table: [(u64, &[u8], bool); 9] = [
            (0, b"QFI\xfb\0\0\0\x03", true),
            (0, b"QFI\xfb", true),
            (0, b"QF", true),
            (2, b"I\xfb and more", true),
            (0, b"QFIx and more", false),
            (1, b"QFI\xfb", false),
            (4, b"QFI\xfb", false),
            (u64::MAX - 8, b"QFI\xfb", false),
            (0, b"", false),
        ];
        for (offset, data, expected) in table {
            assert_eq!(forges(offset, data), expected, "{offset} {data:?}");
        }
    }
}
