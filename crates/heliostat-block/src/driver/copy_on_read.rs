//! [`CopyOnRead`]: keeps what is read from below the child in the child (`copy-on-read` in QMP).
//!
//! What a read finds in none but lower layers is written to the child, whole clusters at a time, so that the next
//! read finds it there. A guest's read never fails because of that write. No write comes between the read of old
//! bytes and their copy: both hold the range.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::graph::Spot;
use crate::node::Node;
use crate::node_storage::NodeStorage;
use crate::range::ByteRange;
use crate::range_lock::RangeLock;
use crate::storage::{
    Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace, pass,
};
use crate::throttle::Hurry;

/// What is copied at once: as much as a copy of a mirror.
const COPY_LEN: u64 = 1 << 20;

/// The unit of copying where the child has no clusters.
const UNIT_DEFAULT: u64 = 64 << 10;

/// Keeps what is read.
pub struct CopyOnRead {
    below: NodeStorage,
    /// The lowest layer from which is copied; `None` for all.
    bottom: Option<Arc<Node>>,
    /// Ranges that are being copied or written.
    held: RangeLock,
}

impl CopyOnRead {
    /// Makes one over whatever node is at `child`, which copies what is in one of the layers from the child's backing node down to
    /// `bottom`; in any where that is `None`.
    #[must_use]
    pub fn new(child: Arc<Spot>, bottom: Option<Arc<Node>>) -> Self {
        Self { below: NodeStorage::of_layer(child), bottom, held: RangeLock::default() }
    }

    pub(super) const fn below(&self) -> &NodeStorage {
        &self.below
    }

    fn child(&self) -> Arc<Node> {
        self.below.node()
    }

    fn widen(&self, range: ByteRange) -> ByteRange {
        range.widen(self.child().cluster_size().unwrap_or(UNIT_DEFAULT), self.below.size())
    }

    /// The first part of `range` that is to be copied, if any is.
    async fn missing(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        let Some(backing) = self.child().backing() else { return Ok(None) };
        let end = range.end().min(backing.size());
        let mut at = range.offset();
        while at < end {
            for extent in self.below.extents(ByteRange::from_bounds(at, end)).await? {
                at = extent.range.end();
                if extent.status != ExtentStatus::Hole {
                    continue;
                }
                if let Some(found) = self.found_below(&backing, extent.range).await? {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }

    /// The first part of `range` that one of the layers from `top` down to the bottom holds.
    async fn found_below(&self, top: &Arc<Node>, range: ByteRange) -> io::Result<Option<ByteRange>> {
        let Some(bottom) = &self.bottom else { return Ok(Some(range)) };
        let mut at = range.offset();
        while at < range.end() {
            // A step ends where any layer's answer does.
            let mut step = ByteRange::from_bounds(at, range.end());
            let mut layer = Some(Arc::clone(top));
            let mut is_found = false;
            while let Some(node) = layer {
                if step.offset() < node.size() {
                    step = ByteRange::from_bounds(step.offset(), step.end().min(node.size()));
                    if let Some(extent) = node.extents_of_layer(step).await?.first() {
                        step = extent.range;
                        is_found |= extent.status != ExtentStatus::Hole;
                    }
                }
                layer = if Arc::ptr_eq(&node, bottom) { None } else { node.backing() };
            }
            if is_found {
                return Ok(Some(step));
            }
            at = step.end();
        }
        Ok(None)
    }

    /// Copies what `range` lacks. The caller holds all clusters of it.
    async fn fill(&self, range: ByteRange) -> io::Result<()> {
        let mut rest = range;
        while let Some(missing) = self.missing(rest).await? {
            for piece in missing.pieces(COPY_LEN) {
                let data = self.below.read(piece.offset(), Buffer::zeroed(usize_from(piece.len()))).await?;
                pass(&self.below, DebugEvent::CorWrite).await;
                let (effort, durability) = (ZeroEffort::Any, Durability::Cached);
                if data.is_zero() {
                    self.below.write_zeroes(piece, ZeroSpace::MayUnmap, effort, durability).await?;
                } else {
                    self.below.write(piece.offset(), data.freeze(), durability).await?;
                }
            }
            rest = ByteRange::from_bounds(missing.end(), rest.end());
        }
        Ok(())
    }
}

impl Storage for CopyOnRead {
    fn traits(&self) -> Traits {
        self.below.traits()
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.below.set_size(size)
    }

    fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        self.below.expect_writes(end)
    }

    fn allocated_size(&self) -> Option<u64> {
        self.below.allocated_size()
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        IoFuture::pending(async move {
            let range = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
            if let Ok(Some(_)) = self.missing(range).await {
                let clusters = self.widen(range);
                let _held = self.held.lock(clusters).await;
                // The copy is for the next time; this time the bytes are read wherever they are.
                let _ = self.fill(clusters).await;
            }
            self.below.read(offset, buffer).await
        })
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            let range = ByteRange::from_bounds(offset, offset + u64_from(data.len()));
            let _held = self.held.lock(range).await;
            self.below.write(offset, data, durability).await
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            let _held = self.held.lock(range).await;
            self.below.write_zeroes(range, space, effort, durability).await
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            let _held = self.held.lock(range).await;
            self.below.discard(range).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.below.flush()
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        self.below.extents(range)
    }

    fn losses(&self) -> u64 {
        self.below.losses()
    }

    fn start_writeback(&self, range: ByteRange) {
        self.below.start_writeback(range);
    }

    fn hurry(&self, hurry: &mut Hurry) {
        self.below.hurry(hurry);
    }

    fn give_up(&self) {
        self.below.give_up();
    }

    fn out_of_reach(&self) -> Option<String> {
        self.below.out_of_reach()
    }
}
