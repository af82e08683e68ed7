//! [`Node`]: a disk, or one layer of one; and the one checkpoint that every request passes.
//!
//! What happens to a write (bounds, in flight, driver, bitmaps, doubling) stands in [`Node::write`], in
//! order, on one screen. A node never cancels a request that entered, never answers for a target, and never
//! knows which front end asked. Called by exports through a [`crate::graph::Place`], and by jobs.

mod cache;
mod kind;
mod reach;
mod resize;
mod spans;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::blocks::Blocks;
use crate::buffer::{Buffer, is_zero};
use crate::clock::{Clock, Moment};
use crate::convert::u64_from;
use crate::driver::Driver;
use crate::error::{BlockError, ErrorKind};
use crate::in_flight::InFlight;
use crate::job::doubling::{Doubled, Doubling, Payload};
use crate::latency::Latencies;
use crate::name::NodeName;
use crate::named_bitmap::{NamedBitmap, Watchers};
use crate::node_options::OptionsCell;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;
use crate::statistics::Statistics;
use crate::storage::{Durability, Extent, ExtentStatus, Traits, ZeroEffort, ZeroSpace};
use crate::throttle::Hurry;
use crate::tracked::{Drained, Tracked, Whose};

pub use crate::node_options::{DetectZeroes, Discard, NodeOptions};

/// A disk, or one layer of one. Used from any thread.
pub struct Node {
    name: NodeName,
    /// The driver, which takes whole blocks.
    blocks: Blocks<Driver>,
    options: OptionsCell,
    /// Copied once: what clients negotiated must not change under them.
    traits: Traits,
    /// Changed by a resize only, while nothing is in flight.
    size: AtomicU64,
    in_flight: InFlight,
    /// Changed when a bitmap or a mirror comes or goes; read for an instant by each write.
    watchers: Watchers,
    latencies: Latencies,
    statistics: Statistics,
    clock: Arc<dyn Clock>,
}

impl Node {
    /// Makes a node.
    #[must_use]
    pub fn new(name: NodeName, driver: Driver, options: NodeOptions, clock: Arc<dyn Clock>) -> Arc<Self> {
        let traits = driver.traits();
        let watchers = Watchers::with(driver.bitmaps());
        Arc::new(Self {
            name,
            size: AtomicU64::new(driver.size()),
            blocks: Blocks::new(driver),
            options: OptionsCell::new(NodeOptions {
                read_only: options.read_only || traits.read_only,
                ..options
            }),
            traits,
            in_flight: InFlight::default(),
            watchers,
            latencies: Latencies::default(),
            statistics: Statistics::default(),
            clock,
        })
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &NodeName {
        &self.name
    }

    /// The virtual size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// All of it.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        ByteRange::from_bounds(0, self.size())
    }

    /// What its storage can do. Requests of any alignment are served all the same.
    #[must_use]
    pub const fn traits(&self) -> Traits {
        self.traits
    }

    /// How it was asked to behave.
    #[must_use]
    pub fn options(&self) -> NodeOptions {
        self.options.load()
    }

    /// Lets it behave otherwise from the next request on. What it is on cannot be written to is not changed by this.
    /// The caller sees to it that nothing is in flight, where that matters to anybody.
    pub fn set_options(&self, options: NodeOptions) {
        let read_only = options.read_only || self.traits.read_only;
        self.options.store(NodeOptions { read_only, ..options });
    }

    /// Bytes spent on the host, where that can be known.
    #[must_use]
    pub fn allocated_size(&self) -> Option<u64> {
        self.blocks.below().allocated_size()
    }

    /// How long guests' requests took, from their arrival to their end, waits at the gate included.
    #[must_use]
    pub const fn latencies(&self) -> &Latencies {
        &self.latencies
    }

    /// What was counted of clients' and jobs' requests. What a mirror reads of its source behind the gate is its own.
    #[must_use]
    pub const fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// How it keeps its bytes.
    pub(crate) const fn driver(&self) -> &Driver {
        self.blocks.below()
    }

    /// The node below, which holds what this one does not.
    #[must_use]
    pub fn backing(&self) -> Option<Arc<Self>> {
        self.blocks.below().backing()
    }

    /// Puts another node, or none, below the image that it is in: what this one does not hold reads as that shows it
    /// from now on. The caller sees to it that nothing is in flight here, by its gate or, for a mirror's target, by
    /// having nothing on its way. Nothing for what is in no image.
    pub fn set_backing(&self, backing: Option<Arc<Self>>) {
        if let Some(image) = self.image() {
            image.set_backing(backing);
        }
    }

    /// Makes everything durable and leaves image and file in order. Nobody may use the node any more.
    ///
    /// # Errors
    /// [`BlockError`] of the host.
    pub async fn close(&self) -> Result<(), BlockError> {
        // Also what became read-only later was written before.
        if self.traits.read_only {
            return Ok(());
        }
        if let Driver::Qcow2(image) = self.driver() {
            image.keep_bitmaps(&self.named_bitmaps());
        }
        self.blocks.below().close().await.map_err(|error| self.failure_of_all(error))
    }

    /// The request has left.
    pub(crate) fn leave(&self) {
        self.in_flight.leave();
    }

    /// A request of who holds the gate closed has entered.
    pub(crate) fn enter_closed(&self) {
        self.in_flight.enter_closed();
    }

    /// Opens the gate for one holder of it.
    pub(crate) fn open_gate(&self) {
        self.in_flight.open();
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.in_flight.count()
    }

    /// Waits for the gate and enters, as a job does. Exports enter through their place.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it has not entered.
    pub async fn enter(self: &Arc<Self>) -> Tracked {
        self.in_flight.enter().await;
        Tracked::new(Arc::clone(self), Whose::Job, self.clock.now())
    }

    /// [`Node::enter`] for a guest, whose latency counts from `arrived`.
    pub(crate) async fn enter_for_guest(self: &Arc<Self>, arrived: Moment) -> Tracked {
        self.in_flight.enter().await;
        Tracked::new(Arc::clone(self), Whose::Guest, arrived)
    }

    /// The clock that the node goes by.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Closes the gate and waits until what is in flight has ended.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it opens the gate again.
    pub async fn drain(self: &Arc<Self>) -> Drained {
        let drained = self.close_gate();
        drained.wait_quiet().await;
        drained
    }

    /// Closes the gates of all `nodes`, in their order, and then waits until what is in flight has ended at each: so
    /// nobody waits for longer than the slowest takes. None of them may be on top of another: what is in flight above
    /// would wait below for ever (docs/decisions/0015).
    ///
    /// # Cancel safety
    /// Dropped before it returns, it opens the gates again.
    pub async fn drain_all(nodes: &[Arc<Self>]) -> Vec<Drained> {
        let drained: Vec<_> = nodes.iter().map(Self::close_gate).collect();
        for one in &drained {
            one.wait_quiet().await;
        }
        drained
    }

    fn close_gate(self: &Arc<Self>) -> Drained {
        self.in_flight.close();
        Drained::of_closed(Arc::clone(self), self.hurry())
    }

    /// Waits until nothing is in flight.
    pub(crate) async fn wait_quiet(&self) {
        if !is_planted(Bug::PivotWithoutDrain) {
            self.in_flight.wait_quiet().await;
        }
    }

    /// Lets no request that it has wait for a limit, as long as the value lives. What passes counts all the same.
    pub(crate) fn hurry(&self) -> Hurry {
        let mut hurry = Hurry::default();
        self.driver().hurry(&mut hurry);
        hurry
    }

    /// How many mirrors hear of its writes.
    #[must_use]
    pub fn watchers(&self) -> usize {
        usize::from(self.watchers.doubling().is_some())
    }

    /// All that hear of its writes.
    pub(crate) const fn watchers_of(&self) -> &Watchers {
        &self.watchers
    }

    /// Its named dirty bitmaps as they are at this moment, oldest first. See [`crate::named_bitmap::change`].
    #[must_use]
    pub fn named_bitmaps(&self) -> Vec<NamedBitmap> {
        self.watchers.named()
    }

    /// The one of that name.
    #[must_use]
    pub fn named_bitmap(&self, name: &str) -> Option<NamedBitmap> {
        self.named_bitmaps().into_iter().find(|bitmap| bitmap.name == name)
    }

    /// Says whether dirty bitmaps outlast it: it is in an image that is written and has a place for them.
    #[must_use]
    pub fn can_store_bitmaps(&self) -> bool {
        match self.driver() {
            Driver::Qcow2(image) => !self.options().read_only && image.can_store_bitmaps(),
            Driver::Raw(_) | Driver::Filter(_) => false,
        }
    }

    /// Lets a mirror hear of every write that ends from now on, and double those that begin from now on.
    pub(crate) fn attach_doubling(&self, doubling: Arc<Doubling>) {
        self.watchers.set_doubling(Some(doubling));
    }

    pub(crate) fn detach_doubling(&self) {
        self.watchers.set_doubling(None);
    }

    // ------------------------------------------------------------------ the checkpoint

    pub(crate) async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), BlockError> {
        let range = self.writable(offset, u64_from(data.len()))?;
        let options = self.options();
        if options.detect_zeroes != DetectZeroes::Off && is_zero(&data) {
            let space = match options.detect_zeroes {
                DetectZeroes::Unmap => ZeroSpace::MayUnmap,
                DetectZeroes::Off | DetectZeroes::On => ZeroSpace::Keep,
            };
            return self.write_zeroes(range, space, ZeroEffort::Any, durability).await;
        }
        let doubled = self.begin_doubled(range, || Payload::Data(data.clone())).await;
        let written = self.blocks.write(offset, data, durability).await;
        self.mark(range, doubled, written.is_ok()).await;
        written.map_err(|error| self.failure(range, error))
    }

    pub(crate) async fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> Result<(), BlockError> {
        let range = self.writable(range.offset(), range.len())?;
        let space = if self.options().discard == Discard::Ignore { ZeroSpace::Keep } else { space };
        if effort == ZeroEffort::FastOnly && !self.traits.can_zero_fast {
            return Err(self.refusal(ErrorKind::Unsupported, range));
        }
        let doubled = self.begin_doubled(range, || Payload::Zeroes(space)).await;
        let written = self.blocks.write_zeroes(range, space, effort, durability).await;
        self.mark(range, doubled, written.is_ok()).await;
        written.map_err(|error| self.failure(range, error))
    }

    pub(crate) async fn discard(&self, range: ByteRange) -> Result<(), BlockError> {
        let range = self.writable(range.offset(), range.len())?;
        if self.options().discard != Discard::Unmap || self.blocks.shrink(range).is_empty() {
            return Ok(());
        }
        self.mark_early(range);
        let discarded = self.blocks.discard(range).await;
        self.mark(range, None, discarded.is_ok()).await;
        discarded.map_err(|error| self.failure(range, error))
    }

    pub(crate) async fn flush(&self) -> Result<(), BlockError> {
        self.blocks
            .below()
            .flush()
            .await
            .map_err(|error| BlockError::from_io(self.name.as_str(), None, error))
    }

    /// Waits for the write's turn where a mirror wants it doubled, and hands the target's half over.
    async fn begin_doubled(&self, range: ByteRange, payload: impl FnOnce() -> Payload) -> Option<Doubled> {
        self.mark_early(range);
        let doubling = self.watchers.doubling()?;
        doubling.begin(range, payload).await
    }

    /// Does nothing, but where a test breaks the rule of [`Node::mark`].
    fn mark_early(&self, range: ByteRange) {
        if is_planted(Bug::MarkBeforeWrite) {
            self.watchers.mark(range, None);
        }
    }

    /// Marks what a write has changed, or may have changed when it failed, before the client hears of it.
    ///
    /// Looks at the watchers after the write: one that came while it ran would otherwise never hear of it.
    async fn mark(&self, range: ByteRange, doubled: Option<Doubled>, written: bool) {
        let early = is_planted(Bug::MarkBeforeWrite);
        if !early && (written || !is_planted(Bug::FailedWriteNotMarked)) {
            self.watchers.mark(range, doubled.as_ref().map(Doubled::doubling));
        }
        if let Some(doubled) = doubled {
            doubled.finish(written).await;
        }
    }

    // ------------------------------------------------------------------ behind the gate

    /// Reads `buffer.len()` bytes, whatever the storage's blocks. Passes no gate: a mirror goes on copying
    /// behind a closed one.
    pub(crate) async fn read_blocks(&self, offset: u64, buffer: Buffer) -> Result<Buffer, BlockError> {
        let range = self.inside(offset, u64_from(buffer.len()))?;
        self.blocks.read(offset, buffer).await.map_err(|error| self.failure(range, error))
    }

    /// How `range` reads, through all layers: a hole is one in each of them. As [`Node::extents_of_layer`] else.
    pub(crate) async fn extents_below(self: &Arc<Self>, range: ByteRange) -> Result<Vec<Extent>, BlockError> {
        let (layer, backing) = loop {
            let owner = self.owner();
            let found = (self.extents_of_layer(range).await?, self.backing());
            // Else a pivot below came between: a hole of the one would be looked for below the other.
            if Arc::ptr_eq(&owner, &self.owner()) {
                break found;
            }
        };
        let Some(backing) = backing else { return Ok(layer) };
        let mut merged = Vec::new();
        for extent in layer {
            if extent.status != ExtentStatus::Hole {
                append(&mut merged, extent);
                continue;
            }
            let inside =
                ByteRange::from_bounds(extent.range.offset(), extent.range.end().min(backing.size()));
            let mut at = inside.offset();
            while at < inside.end() {
                if merged.len() >= EXTENTS_MAX {
                    return Ok(merged);
                }
                let rest = ByteRange::from_bounds(at, inside.end());
                for below in Box::pin(backing.extents_below(rest)).await? {
                    at = below.range.end();
                    append(&mut merged, below);
                }
            }
            append(&mut merged, Extent { range: ByteRange::from_bounds(at, extent.range.end()), ..extent });
        }
        Ok(merged)
    }

    /// What this layer alone says of `range`; see [`crate::storage::Storage::extents`]. Never empty for a range
    /// that is not; an answer that makes no sense becomes "data". Passes no gate.
    pub(crate) async fn extents_of_layer(&self, range: ByteRange) -> Result<Vec<Extent>, BlockError> {
        let range = self.inside(range.offset(), range.len())?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let extents = self.blocks.below().extents(range).await.map_err(|error| self.failure(range, error))?;
        // An answer with a gap would let a mirror skip what was never looked at.
        let end = extents.iter().try_fold(range.offset(), |end, extent| {
            (extent.range.offset() == end && !extent.range.is_empty()).then_some(extent.range.end())
        });
        match end {
            Some(end) if end > range.offset() => Ok(extents),
            _ => Ok(vec![Extent { range, status: ExtentStatus::Data }]),
        }
    }

    // ------------------------------------------------------------------ bounds and errors

    fn inside(&self, offset: u64, len: u64) -> Result<ByteRange, BlockError> {
        match ByteRange::new(offset, len) {
            Ok(range) if range.end() <= self.size() => Ok(range),
            _ => Err(BlockError::new(ErrorKind::InvalidRequest, self.name.as_str(), None)),
        }
    }

    fn writable(&self, offset: u64, len: u64) -> Result<ByteRange, BlockError> {
        let range = self.inside(offset, len)?;
        if self.options().read_only {
            return Err(self.refusal(ErrorKind::ReadOnly, range));
        }
        Ok(range)
    }

    fn refusal(&self, kind: ErrorKind, range: ByteRange) -> BlockError {
        BlockError::new(kind, self.name.as_str(), Some(range))
    }

    fn failure_of_all(&self, error: std::io::Error) -> BlockError {
        BlockError::from_io(self.name.as_str(), None, error)
    }

    fn failure(&self, range: ByteRange, error: std::io::Error) -> BlockError {
        BlockError::from_io(self.name.as_str(), Some(range), error)
    }
}

/// The most extents in one answer that is put together of several layers' ones.
const EXTENTS_MAX: usize = 1024;

fn append(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        _ if next.range.is_empty() => {}
        Some(last) if last.status == next.status && last.range.end() == next.range.offset() => {
            last.range = ByteRange::from_bounds(last.range.offset(), next.range.end());
        }
        _ => extents.push(next),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::job::test_disk::{Disk, Says, Ticking, node_of};

    fn hole(start: u64, end: u64) -> Extent {
        Extent { range: ByteRange::from_bounds(start, end), status: ExtentStatus::Hole }
    }

    /// The extents of a whole disk of 2048 bytes that says `says` of it.
    fn extents(says: Says) -> Vec<Extent> {
        let disk = Disk::of(vec![1; 2048]);
        disk.says(says);
        let node = node_of("disk0", disk, &Arc::new(Ticking::default()));
        let whole = ByteRange::from_bounds(0, 2048);
        node.extents_below(whole).now_or_never().expect("it answers at once").expect("without an error")
    }

    #[test]
    fn an_extents_answer_that_makes_no_sense_is_data() {
        let senseless: [(&str, Says); 7] = [
            ("none at all", |_| Vec::new()),
            ("a gap at the start", |_| vec![hole(512, 2048)]),
            ("a gap in the middle", |_| vec![hole(0, 512), hole(1024, 2048)]),
            ("two that overlap", |_| vec![hole(0, 1024), hole(512, 2048)]),
            ("in another order", |_| vec![hole(1024, 2048), hole(0, 1024)]),
            ("an empty one", |_| vec![hole(0, 0), hole(0, 2048)]),
            ("an empty one behind", |_| vec![hole(0, 1024), hole(1024, 1024)]),
        ];
        let data = Extent { range: ByteRange::from_bounds(0, 2048), status: ExtentStatus::Data };
        for (what, says) in senseless {
            assert_eq!(extents(says), [data], "{what}");
        }
        assert_eq!(extents(|_| vec![hole(0, 1024)]), [hole(0, 1024)], "stopping early is allowed");
    }
}
