//! [`Blocks`]: requests of any alignment over something that takes whole blocks only.
//!
//! An unaligned read reads the blocks around it. An unaligned write reads the blocks at its two ends, puts them
//! around the data and writes the whole; nobody else may write those blocks meanwhile, so every write holds its
//! blocks. Knows no nodes and no clients, and makes no errors of its own. Called by [`crate::node`] over its
//! driver, and by drivers that keep metadata in a storage.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join;

use crate::buffer::Buffer;
use crate::clock::LocalFuture;
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::range::ByteRange;
use crate::range_lock::{RangeGuard, RangeLock};
use crate::storage::{Durability, IoFuture, Storage, ZeroEffort, ZeroSpace};

/// What may lie below: it takes whole blocks, but for a request that ends at its end.
pub(crate) trait Below {
    /// The unit of requests, a power of two; 1 where any will do. Never changes.
    fn block_size(&self) -> u32;

    /// Where its last block ends, at this moment.
    fn end(&self) -> u64;

    /// See [`Storage::read`].
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer>;

    /// See [`Storage::write`].
    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()>;

    /// See [`Storage::write_zeroes`].
    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()>;

    /// See [`Storage::discard`].
    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()>;

    /// See [`Storage::raise`]; for what happens here, on its behalf.
    fn raise(&self, event: DebugEvent) -> Option<LocalFuture<'static, ()>> {
        let _ = event;
        None
    }
}

impl Below for Arc<dyn Storage> {
    fn block_size(&self) -> u32 {
        self.traits().block_size
    }

    fn end(&self) -> u64 {
        self.size()
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        (**self).read(offset, buffer)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        (**self).write(offset, data, durability)
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        (**self).write_zeroes(range, space, effort, durability)
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        (**self).discard(range)
    }
}

/// Requests of any alignment, within the bounds of what lies below; the caller sees to the bounds.
///
/// # Cancel safety
/// A future of any of its calls must not be dropped once polled: part of the request may be done then, and the
/// rest is not.
pub(crate) struct Blocks<B> {
    below: B,
    unit: u64,
    /// Blocks that are being written, where there are blocks.
    held: RangeLock,
}

impl<B: Below> Blocks<B> {
    /// Over `below`, all of whose writes must then come this way.
    pub(crate) fn new(below: B) -> Self {
        Self { unit: u64::from(below.block_size()), below, held: RangeLock::default() }
    }

    /// What lies below, for all that has no alignment.
    pub(crate) const fn below(&self) -> &B {
        &self.below
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// As [`Storage::read`].
    pub(crate) async fn read(&self, offset: u64, mut buffer: Buffer) -> io::Result<Buffer> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
        if range.is_empty() {
            return Ok(buffer);
        }
        // A short last block must not become longer between here and below.
        let _held = if self.widen(range).is_aligned(self.unit) { None } else { self.hold(range).await };
        let blocks = self.widen(range);
        if blocks == range {
            return self.below.read(offset, buffer).await;
        }
        let whole = self.read_whole(blocks).await?;
        let start = usize_from(range.offset() - blocks.offset());
        let len = buffer.len();
        buffer.copy_from_slice(&whole[start..start + len]);
        Ok(buffer)
    }

    /// Writes all of `data` at `offset`. Of the bytes around it none changes, not even for others that write them
    /// at the same time.
    ///
    /// # Errors
    /// As [`Storage::write`], or as [`Storage::read`] with nothing written.
    pub(crate) async fn write(&self, offset: u64, data: Bytes, durability: Durability) -> io::Result<()> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(data.len()));
        if range.is_empty() {
            return Ok(());
        }
        if self.unit == 1 {
            return self.below.write(offset, data, durability).await;
        }
        // Where some writes read, change and write back whole blocks, every write must hold its blocks.
        let _held = self.hold(range).await;
        let blocks = self.widen(range);
        if blocks == range {
            return self.below.write(offset, data, durability).await;
        }
        let whole = self.surround(range, blocks, &data).await?;
        self.below.write(blocks.offset(), whole.freeze(), durability).await
    }

    /// Makes `range` read as zeroes; whole blocks in it as [`Storage::write_zeroes`] does, the rest by writing.
    ///
    /// # Errors
    /// As [`Storage::write_zeroes`] and [`Blocks::write`]. With [`ZeroEffort::FastOnly`], `Unsupported` means that
    /// nothing has changed.
    pub(crate) async fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let held = self.hold(range).await;
        let middle = self.shrink(range);
        let mut edges = [range, ByteRange::from_bounds(0, 0)];
        if !middle.is_empty() {
            self.below.write_zeroes(middle, space, effort, durability).await?;
            edges = [
                ByteRange::from_bounds(range.offset(), middle.offset()),
                ByteRange::from_bounds(middle.end(), range.end()),
            ];
        }
        drop(held);
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            let zeroes = Buffer::zeroed(usize_from(edge.len())).freeze();
            self.write(edge.offset(), zeroes, durability).await?;
        }
        Ok(())
    }

    /// Gives up the contents of the whole blocks in `range`; of the others none changes.
    ///
    /// # Errors
    /// As [`Storage::discard`].
    pub(crate) async fn discard(&self, range: ByteRange) -> io::Result<()> {
        let _held = self.hold(range).await;
        let whole = self.shrink(range);
        if whole.is_empty() { Ok(()) } else { self.below.discard(whole).await }
    }

    /// The blocks that `range` touches.
    fn widen(&self, range: ByteRange) -> ByteRange {
        range.widen(self.unit, self.below.end())
    }

    /// The blocks that lie in `range` whole; the last one below may be short.
    pub(crate) fn shrink(&self, range: ByteRange) -> ByteRange {
        let start = range.offset().checked_next_multiple_of(self.unit).unwrap_or(u64::MAX);
        let is_last = range.end() == self.below.end();
        let end = if is_last { range.end() } else { range.end() & !(self.unit - 1) };
        ByteRange::from_bounds(start, end)
    }

    /// Waits for the blocks of `range`. While they are held the end below moves neither into them nor out of them.
    async fn hold(&self, range: ByteRange) -> Option<RangeGuard<'_>> {
        match self.unit {
            1 => None,
            _ => Some(self.held.lock(self.widen(range)).await),
        }
    }

    /// Makes `blocks` of `data`, which is to stand at `range`, and of what stands around it now.
    async fn surround(&self, range: ByteRange, blocks: ByteRange, data: &[u8]) -> io::Result<Buffer> {
        let at = |range: ByteRange| {
            let start = usize_from(range.offset() - blocks.offset());
            start..start + usize_from(range.len())
        };
        let edges = edges(range, blocks, self.unit);
        let (head, tail) = (range.offset() > blocks.offset(), range.end() < blocks.end());
        self.pass(head, DebugEvent::PwritevRmwHead).await;
        self.pass(tail, DebugEvent::PwritevRmwTail).await;
        let mut whole = if edges[0] == blocks {
            // Small writes end here: one read, into the memory that is written.
            self.read_whole(blocks).await?
        } else {
            let mut whole = Buffer::zeroed(usize_from(blocks.len()));
            // Both are awaited, also when one fails: no request on its way is dropped.
            let (first, last) = join(self.read_whole(edges[0]), self.read_whole(edges[1])).await;
            whole[at(edges[0])].copy_from_slice(&first?);
            whole[at(edges[1])].copy_from_slice(&last?);
            whole
        };
        whole[at(range)].copy_from_slice(data);
        self.pass(head, DebugEvent::PwritevRmwAfterHead).await;
        self.pass(tail, DebugEvent::PwritevRmwAfterTail).await;
        Ok(whole)
    }

    async fn pass(&self, happens: bool, event: DebugEvent) {
        if happens && let Some(held_up) = self.below.raise(event) {
            held_up.await;
        }
    }

    async fn read_whole(&self, blocks: ByteRange) -> io::Result<Buffer> {
        let buffer = Buffer::zeroed(usize_from(blocks.len()));
        if blocks.is_empty() { Ok(buffer) } else { self.below.read(blocks.offset(), buffer).await }
    }
}

impl Blocks<Arc<dyn Storage>> {
    /// Makes the storage `size` bytes long, while nobody writes its last blocks, old or new.
    ///
    /// # Errors
    /// As [`Storage::set_size`].
    pub(crate) async fn set_size(&self, size: u64) -> io::Result<()> {
        let last = size.min(self.below.end()) & !(self.unit - 1);
        let _held = self.held.lock(ByteRange::from_bounds(last, u64::MAX)).await;
        self.below.set_size(size).await
    }
}

/// The blocks at the two ends of `blocks` that `range` covers only a part of, where `blocks` are the ones that
/// `range` touches. Where they are one or neighbours, the first is both; what there is none of is empty.
fn edges(range: ByteRange, blocks: ByteRange, unit: u64) -> [ByteRange; 2] {
    let none = ByteRange::from_bounds(blocks.offset(), blocks.offset());
    let first = (blocks.offset() < range.offset())
        .then(|| ByteRange::from_bounds(blocks.offset(), blocks.end().min(blocks.offset() + unit)));
    let last =
        (range.end() < blocks.end()).then(|| ByteRange::from_bounds(range.end() & !(unit - 1), blocks.end()));
    match (first, last) {
        // The same, or neighbours: one read is less work than two.
        (Some(first), Some(last)) if last.offset() <= first.end() => [blocks, none],
        (Some(first), last) => [first, last.unwrap_or(none)],
        (None, last) => [last.unwrap_or(none), none],
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
