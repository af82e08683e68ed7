//! [`Tracked`]: the right to have one request in flight on a node, and the requests themselves as a client
//! makes them. [`Drained`]: a closed gate with nothing behind it.
//!
//! Both end when dropped. They decide nothing; what happens to a request stands in `node`.

use std::sync::Arc;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::clock::Moment;
use crate::error::BlockError;
use crate::node::Node;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ZeroEffort, ZeroSpace};

/// The right to have one request in flight on a node; leaves it when dropped.
///
/// # Cancel safety
/// None of its calls may be dropped once polled: a request that entered runs to its end (ARCHITECTURE.md,
/// invariant 2). The task that awaits it must be one that nobody drops.
#[must_use]
pub struct Tracked {
    node: Arc<Node>,
    /// When the request arrived, where its latency counts as a guest's.
    arrived: Option<Moment>,
}

/// A closed gate with nothing behind it; opens when dropped.
#[must_use]
pub struct Drained {
    node: Arc<Node>,
}

impl Tracked {
    /// For a request that has passed the gate.
    pub(crate) const fn new(node: Arc<Node>, arrived: Option<Moment>) -> Self {
        Self { node, arrived }
    }

    /// The node that was entered.
    #[must_use]
    pub const fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Leaves at once, uncounted: the place that was meant has another node by now.
    pub(crate) fn turn_back(mut self) {
        self.arrived = None;
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// `InvalidRequest` outside the node, else what the storage says.
    pub async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer, BlockError> {
        self.node.read_blocks(offset, buffer).await
    }

    /// Writes `data` at `offset`. When it returns, every bitmap knows.
    ///
    /// # Errors
    /// `InvalidRequest` outside the node, `ReadOnly`, else what the storage says. A mirror's target that
    /// fails is not an error here.
    pub async fn write(&self, offset: u64, data: Bytes, durability: Durability) -> Result<(), BlockError> {
        self.node.write(offset, data, durability).await
    }

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// As [`Tracked::write`]; `Unsupported` only with [`ZeroEffort::FastOnly`].
    pub async fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> Result<(), BlockError> {
        self.node.write_zeroes(range, space, effort, durability).await
    }

    /// Says that the contents of `range` are no longer needed.
    ///
    /// # Errors
    /// As [`Tracked::write`].
    pub async fn discard(&self, range: ByteRange) -> Result<(), BlockError> {
        self.node.discard(range).await
    }

    /// Makes every write that has ended durable.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn flush(&self) -> Result<(), BlockError> {
        self.node.flush().await
    }

    /// Says how `range` is laid out; may stop early, but not before the first extent. Empty for an empty
    /// range.
    ///
    /// # Errors
    /// `InvalidRequest` outside the node, else what the storage says.
    pub async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, BlockError> {
        self.node.extents_below(range).await
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if let Some(arrived) = self.arrived {
            let now = self.node.clock().now();
            self.node.latencies().record(now.since(arrived), now);
        }
        self.node.leave();
    }
}

impl Drained {
    /// For a gate that the caller has closed; quiet when the caller has waited for that.
    pub(crate) const fn of_closed(node: Arc<Node>) -> Self {
        Self { node }
    }

    /// The node behind the gate.
    #[must_use]
    pub const fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.node.open_gate();
    }
}
