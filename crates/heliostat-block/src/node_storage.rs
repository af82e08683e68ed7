//! [`NodeStorage`]: a node's bytes as a storage, for a driver that stands on a node and not on a file.
//!
//! Every request enters the node as any client's does: bounds, gate, bitmaps, limits and statistics are the node's
//! own. Decides nothing. Made by whoever puts one node on another.
//!
//! A request that is in flight above waits below while the lower gate is closed. So a lower gate must never be held
//! closed by somebody who waits for an upper node to be quiet: drains go from the top down, and one of the upper
//! node alone has drained what it sent below (docs/decisions/0015).

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::clock::LocalFuture;
use crate::debug_event::DebugEvent;
use crate::driver::Preallocation;
use crate::graph::Spot;
use crate::node::Node;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};
use crate::throttle::Hurry;
use crate::tracked::Tracked;

/// Which layers [`Storage::extents`] speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layers {
    /// All: a hole is one in each of them.
    All,
    /// The node's own: a hole may show what is below.
    Top,
}

/// A node's bytes as a storage.
#[derive(Clone)]
pub struct NodeStorage {
    at: Arc<Spot>,
    layers: Layers,
    /// How many requests are in the node from here.
    inside: Arc<AtomicU64>,
}

/// A request in the node.
struct Inside<'a> {
    tracked: Tracked,
    count: &'a AtomicU64,
}

impl Deref for Inside<'_> {
    type Target = Tracked;

    fn deref(&self) -> &Tracked {
        &self.tracked
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // Before it leaves the node, which never has fewer.
        self.count.fetch_sub(1, Ordering::SeqCst);
    }
}

impl NodeStorage {
    /// The bytes of `node`, as a client sees them.
    #[must_use]
    pub fn new(node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self { at: Spot::of(node), layers: Layers::All, inside: Arc::default() })
    }

    /// The same for a filter, which shows the layers below as the node does, and goes to another node when `at` does.
    pub(crate) fn of_layer(at: Arc<Spot>) -> Self {
        Self { at, layers: Layers::Top, inside: Arc::default() }
    }

    /// The node.
    pub(crate) fn node(&self) -> Arc<Node> {
        self.at.node()
    }

    /// Enters the node.
    async fn enter(&self) -> Inside<'_> {
        let tracked = self.at.enter().await;
        self.inside.fetch_add(1, Ordering::SeqCst);
        Inside { tracked, count: &self.inside }
    }
}

impl Storage for NodeStorage {
    fn traits(&self) -> Traits {
        let node = self.node();
        let traits = node.traits();
        let can_resize = traits.can_resize || node.image().is_some();
        Traits { read_only: node.options().read_only, can_resize, ..traits }
    }

    fn size(&self) -> u64 {
        self.node().size()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            let node = self.node();
            if node.image().is_some() {
                return Ok(node.resize(size, Preallocation::Off).await?);
            }
            // The caller has seen to it that nobody is in the way, or a request that is held up above could hold
            // up all others for as long.
            let tracked = self.enter().await;
            Ok(tracked.node().resize_beside_others(size).await?)
        })
    }

    fn expect_writes(&self, end: u64) -> IoFuture<'_, ()> {
        IoFuture::pending(async move { self.enter().await.node().driver().expect_writes(end).await })
    }

    fn allocated_size(&self) -> Option<u64> {
        self.node().allocated_size()
    }

    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        IoFuture::pending(async move { Ok(self.enter().await.read(offset, buffer).await?) })
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        IoFuture::pending(async move { Ok(self.enter().await.write(offset, data, durability).await?) })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            Ok(self.enter().await.write_zeroes(range, space, effort, durability).await?)
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::pending(async move { Ok(self.enter().await.discard(range).await?) })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        // One that is only read from now on may have been written to before.
        if self.node().traits().read_only {
            return IoFuture::ready(io::Result::Ok(()));
        }
        IoFuture::pending(async move { Ok(self.enter().await.flush().await?) })
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        IoFuture::pending(async move {
            let tracked = self.enter().await;
            Ok(match self.layers {
                Layers::All => tracked.extents(range).await?,
                Layers::Top => tracked.node().extents_of_layer(range).await?,
            })
        })
    }

    fn losses(&self) -> u64 {
        self.node().losses()
    }

    fn start_writeback(&self, range: ByteRange) {
        self.node().start_writeback(range);
    }

    fn raise(&self, event: DebugEvent) -> Option<LocalFuture<'static, ()>> {
        self.node().driver().raise(event)
    }

    fn hurry(&self, hurry: &mut Hurry) {
        self.node().driver().hurry(hurry);
    }

    /// Only where all that is in flight in the node came from here: below, it cannot be told apart from what others wait
    /// for.
    fn give_up(&self) {
        let node = self.node();
        let ours = self.inside.load(Ordering::SeqCst);
        if node.in_flight() == ours {
            node.give_up();
        }
    }

    fn out_of_reach(&self) -> Option<String> {
        self.node().out_of_reach()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
