//! [`Tracked`]: the right to have one request in flight on a node, and the requests themselves as a client
//! makes them. [`Drained`]: a closed gate with nothing behind it.
//!
//! Both end when dropped. They decide nothing; what happens to a request stands in `node`.

use std::cell::Cell;
use std::sync::Arc;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::clock::Moment;
use crate::convert::u64_from;
use crate::error::BlockError;
use crate::node::Node;
use crate::range::ByteRange;
use crate::span::Span;
use crate::statistics::{Ended, Kind, Outcome};
use crate::storage::{Durability, Extent, ZeroEffort, ZeroSpace};
use crate::throttle::Hurry;

/// The right to have one request in flight on a node; leaves it when dropped.
///
/// # Cancel safety
/// None of its calls may be dropped once polled: a request that entered runs to its end (ARCHITECTURE.md,
/// invariant 2). The task that awaits it must be one that nobody drops.
#[must_use]
pub struct Tracked {
    node: Arc<Node>,
    /// Where its latency counts.
    whose: Whose,
    arrived: Moment,
    /// When its last request ended, and what that was.
    ended: Cell<Option<(Moment, Ended)>>,
}

/// Who made a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// A client, whose waiting counts.
    Guest,
    /// A job.
    Job,
}

/// A closed gate with nothing behind it; opens when dropped.
#[must_use]
pub struct Drained {
    node: Arc<Node>,
    /// No limit holds up what is below meanwhile.
    _hurry: Hurry,
}

impl Tracked {
    /// For a request that has passed the gate.
    pub(crate) const fn new(node: Arc<Node>, whose: Whose, arrived: Moment) -> Self {
        Self { node, whose, arrived, ended: Cell::new(None) }
    }

    /// The node that was entered.
    #[must_use]
    pub const fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Leaves at once, uncounted: the place that was meant has another node by now.
    pub(crate) fn turn_back(mut self) {
        self.whose = Whose::Job;
    }

    /// The last request that it made, once that has ended. Asking for extents is none.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.ended.get().map(|(_, ended)| ended)
    }

    fn count<T>(&self, kind: Kind, range: Option<ByteRange>, result: &Result<T, BlockError>) {
        let now = self.node.clock().now();
        let began = self.ended.get().map_or(self.arrived, |(before, _)| before);
        let ended = Ended { kind, range, took: now.since(began), outcome: Outcome::of(result) };
        self.node.statistics().add(ended);
        self.ended.set(Some((now, ended)));
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// `InvalidRequest` outside the node, else what the storage says.
    pub async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer, BlockError> {
        let range = ByteRange::new(offset, u64_from(buffer.len())).ok();
        let read = self.node.read_blocks(offset, buffer).await;
        self.count(Kind::Read, range, &read);
        read
    }

    /// Where `range` can be sent from, in the place of [`Tracked::read`]. The request is in flight until that is done:
    /// whoever sends it keeps this as long. `None` where it must be read.
    #[must_use]
    pub fn span(&self, range: ByteRange) -> Option<Span> {
        let span = self.node.span(range)?;
        self.count(Kind::Read, Some(range), &Ok(()));
        Some(span)
    }

    /// Writes `data` at `offset`. When it returns, every bitmap knows.
    ///
    /// # Errors
    /// `InvalidRequest` outside the node, `ReadOnly`, else what the storage says. A mirror's target that
    /// fails is not an error here.
    pub async fn write(&self, offset: u64, data: Bytes, durability: Durability) -> Result<(), BlockError> {
        let range = ByteRange::new(offset, u64_from(data.len())).ok();
        let written = self.node.write(offset, data, durability).await;
        self.count(Kind::Write, range, &written);
        written
    }

    /// Writes what lies in `span` at `offset`, as [`Tracked::write`] would. Only where the node takes spans.
    pub(crate) async fn write_span(&self, offset: u64, span: Span) -> Result<(), BlockError> {
        let range = ByteRange::new(offset, u64_from(span.len())).ok();
        let written = self.node.write_span(offset, span).await;
        self.count(Kind::Write, range, &written);
        written
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
        let written = self.node.write_zeroes(range, space, effort, durability).await;
        self.count(Kind::Write, Some(range), &written);
        written
    }

    /// Says that the contents of `range` are no longer needed.
    ///
    /// # Errors
    /// As [`Tracked::write`].
    pub async fn discard(&self, range: ByteRange) -> Result<(), BlockError> {
        let discarded = self.node.discard(range).await;
        self.count(Kind::Discard, Some(range), &discarded);
        discarded
    }

    /// Makes every write that has ended durable.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn flush(&self) -> Result<(), BlockError> {
        let flushed = self.node.flush().await;
        self.count(Kind::Flush, None, &flushed);
        flushed
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
        if self.whose == Whose::Guest {
            let now = self.ended.get().map_or_else(|| self.node.clock().now(), |(now, _)| now);
            self.node.latencies().record(now.since(self.arrived), now);
        }
        self.node.leave();
    }
}

impl Drained {
    /// For a gate that the caller has closed; quiet when the caller has waited for that.
    pub(crate) const fn of_closed(node: Arc<Node>, hurry: Hurry) -> Self {
        Self { node, _hurry: hurry }
    }

    /// The node behind the gate.
    #[must_use]
    pub const fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// For a gate that was closed a moment ago.
    pub(crate) async fn wait_quiet(&self) {
        self.node.wait_quiet().await;
    }

    /// The right to have a request in flight behind the closed gate, which is for its holder to give: a flush of what was
    /// written before. It is in flight until it has ended, also when the gate opens before that; the next drain waits
    /// for it. Nobody may take the gate for quiet meanwhile.
    pub fn enter(&self) -> Tracked {
        self.node.enter_closed();
        Tracked::new(Arc::clone(&self.node), Whose::Job, self.node.clock().now())
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.node.open_gate();
    }
}
