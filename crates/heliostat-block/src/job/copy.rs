//! [`Route`]: what brings bytes to the target. A copy takes a dirty range whose bits are already cleared.
//!
//! Whether it is data, zero or hole is decided from what is seen now, after the clear; never from anything
//! asked before (MIRROR.md section 4, rule 2). Marks nothing, limits nothing; its caller does. Called by
//! `mirror`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Operation;
use super::at_target::AtTarget;
use super::doubling::{Payload, TargetHalf};
use super::options::MirrorOptions;
use super::scan::{Belief, SyncMode};
use crate::buffer::BufferPool;
use crate::clock::{Moment, yield_once};
use crate::convert::usize_from;
use crate::error::{BlockError, ErrorKind};
use crate::limits::{COPIES_IN_FLIGHT_MAX, COPY_LEN_MAX, GUEST_QUIET};
use crate::node::Node;
use crate::planted;
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ExtentStatus, ZeroEffort, ZeroSpace};
use crate::throttle::{Hurry, Patience};

/// The piece in which page-cached bytes are moved: it stays in a core's cache between read and write.
const CACHED_PIECE: u64 = 256 << 10;

/// What every copy of a mirror shares.
pub(crate) struct Route {
    pub(crate) source: Arc<Node>,
    pub(crate) target: Arc<Node>,
    pub(crate) buffers: BufferPool,
    /// Data that is all zero is not written as data.
    pub(crate) detect_zeroes: bool,
    /// What zeroing may do with the target's space.
    pub(crate) zero_space: ZeroSpace,
    /// Whether the target is believed when it says that a range reads as zero. Not after a failed flush: its
    /// cache may show what its medium has lost.
    pub(crate) trust_target: AtomicBool,
    /// What the first pass copies.
    pub(crate) sync: SyncMode,
    /// What the target does not hold it will show from the source.
    pub(crate) stands_on_source: bool,
    /// Over when nobody wants the copies any more: those under way end after the piece that they are at.
    pub(crate) patience: Arc<Patience>,
    /// What the target has been asked for and has not answered.
    pub(crate) at_target: AtTarget,
}

/// How a range was brought over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Bytes written as data.
    pub(crate) data: u64,
    /// Bytes made zero.
    pub(crate) zeroed: u64,
    /// Bytes that were zero on both sides already.
    pub(crate) skipped: u64,
}

/// Which side failed, and how.
pub(crate) type CopyError = (Operation, BlockError);

impl Route {
    /// The way from one node to the other, as `options` have it.
    pub(crate) fn new(source: Arc<Node>, target: Arc<Node>, options: &MirrorOptions) -> Self {
        let piece = COPY_LEN_MAX.max(u64::from(options.granularity));
        Self {
            source,
            target,
            buffers: BufferPool::new(usize_from(piece), COPIES_IN_FLIGHT_MAX),
            detect_zeroes: options.detect_zeroes,
            zero_space: if options.unmap { ZeroSpace::MayUnmap } else { ZeroSpace::Keep },
            trust_target: AtomicBool::new(true),
            sync: options.sync,
            stands_on_source: options.stands_on_source,
            patience: Arc::default(),
            at_target: AtTarget::default(),
        }
    }

    /// Lets copies end as soon as they can: what they read of the source waits for no limits any more, beside guests whose
    /// requests do; and the target takes what it has been given at once, whatever its limits, as long as the value lives.
    /// A target that does not answer is not waited for.
    pub(crate) fn give_up(&self) -> Hurry {
        self.patience.end();
        self.target.give_up();
        self.target.hurry()
    }

    /// Whether the next piece of a copy is wanted.
    pub(crate) fn go_on(&self, piece: ByteRange) -> Result<(), CopyError> {
        self.is_wanted(Some(piece)).map_err(|error| (Operation::Write, error))
    }

    /// Whether anything is wanted of the target still.
    fn is_wanted(&self, range: Option<ByteRange>) -> Result<(), BlockError> {
        if self.patience.is_over() {
            return Err(BlockError::new(ErrorKind::Closed, self.target.name().as_str(), range));
        }
        Ok(())
    }

    /// Makes durable what the target shows.
    pub(crate) async fn flush(&self) -> Result<(), BlockError> {
        if self.stands_on_source && !planted::is_planted(planted::Bug::StandsOnUnflushed) {
            // Not by the gate: it is closed at the end.
            self.source.flush().await?;
        }
        self.is_wanted(None)?;
        let tracked = self.target.enter().await;
        self.at_target.carry_out(tracked.flush()).await
    }

    /// Whether copying is work for a core rather than for a disk.
    pub(crate) fn is_cached(&self) -> bool {
        let cached = |node: &Node| node.traits().block_size == 1 && !node.traits().remote;
        cached(&self.source) && cached(&self.target)
    }

    /// Whether no guest wants the other cores at this moment.
    pub(crate) fn guests_are_quiet(&self, now: Moment) -> bool {
        self.source.latencies().are_quiet(now, GUEST_QUIET)
    }

    /// What the first pass may believe of the target.
    pub(crate) fn belief(&self, target_is_zero: bool) -> Belief {
        match (self.trust_target.load(Ordering::Relaxed), target_is_zero) {
            (false, _) => Belief::Nothing,
            (true, true) if self.target.backing().is_none() && !self.target.lacks_backing() => {
                Belief::AllZero
            }
            // Through what a target does not hold, something else shows.
            (true, _) => Belief::WhatItSays,
        }
    }

    /// Says whether an extent of the target is known to read as zero, now and when all of its chain is open.
    /// `lacked` is what [`Route::lacks_backing`] said before the target was asked: it may have been given one since.
    pub(crate) fn reads_zero(&self, extent: &Extent, lacked: bool) -> bool {
        match extent.status {
            ExtentStatus::Data | ExtentStatus::Absent => false,
            ExtentStatus::Zero => true,
            ExtentStatus::Hole => !lacked && !self.lacks_backing(),
        }
    }

    /// Says whether what the target does not hold may read otherwise later.
    pub(crate) fn lacks_backing(&self) -> bool {
        self.target.lacks_backing()
    }

    /// Brings `range` over.
    pub(crate) async fn copy(&self, range: ByteRange) -> Result<Copied, CopyError> {
        let mut copied = Copied::default();
        let mut from = range.offset();
        while from < range.end() {
            let rest = ByteRange::from_bounds(from, range.end());
            self.go_on(rest)?;
            if let Some(hole) = planted::old_hole(Extent { range: rest, status: ExtentStatus::Data }) {
                self.zero(hole.range, &mut copied).await?;
                from = hole.range.end();
                continue;
            }
            let extents = self.patience.lend(self.source.extents_below(rest)).await;
            let extents = extents.map_err(|e| (Operation::Read, e))?;
            for extent in extents.iter().filter_map(|e| Some((e.range.intersection(rest)?, e.status))) {
                match extent {
                    (part, ExtentStatus::Data | ExtentStatus::Absent) => {
                        self.copy_data(part, &mut copied).await?;
                    }
                    (part, ExtentStatus::Zero | ExtentStatus::Hole) => self.zero(part, &mut copied).await?,
                }
                from = extent.0.end();
            }
            if from == rest.offset() {
                // A storage that says nothing of the range has to be read.
                self.copy_data(rest, &mut copied).await?;
                from = rest.end();
            }
        }
        self.target.start_writeback(range);
        Ok(copied)
    }

    /// Writes the target's half of a doubled write.
    pub(crate) async fn write_half(&self, half: &TargetHalf) -> Result<(), BlockError> {
        let tracked = self.target.enter().await;
        let _asked = self.at_target.ask();
        match &half.payload {
            Payload::Data(data) => tracked.write(half.range.offset(), data.clone(), Durability::Cached).await,
            Payload::Zeroes(space) => {
                let space = if self.zero_space == ZeroSpace::Keep { ZeroSpace::Keep } else { *space };
                tracked.write_zeroes(half.range, space, ZeroEffort::Any, Durability::Cached).await
            }
        }
    }

    async fn copy_data(&self, range: ByteRange, copied: &mut Copied) -> Result<(), CopyError> {
        let cached = self.source.traits().block_size == 1;
        let step = if cached { CACHED_PIECE } else { range.len() };
        for piece in range.pieces(step) {
            self.go_on(piece)?;
            if self.copy_span(piece).await? {
                copied.data += piece.len();
                continue;
            }
            let buffer = self.buffers.take(usize_from(piece.len()));
            let read = self.patience.lend(self.source.read_blocks(piece.offset(), buffer)).await;
            let buffer = read.map_err(|error| (Operation::Read, error))?;
            self.go_on(piece)?;
            if self.detect_zeroes && buffer.is_zero() {
                self.zero(piece, copied).await?;
                continue;
            }
            let tracked = self.target.enter().await;
            let write = tracked.write(piece.offset(), buffer.freeze(), Durability::Cached);
            let written = self.at_target.carry_out(write).await;
            written.map_err(|error| (Operation::Write, error))?;
            copied.data += piece.len();
            if range.len() > COPY_LEN_MAX {
                // A granule this long would hold up everything else on the thread.
                yield_once().await;
            }
        }
        Ok(())
    }

    /// Copies `piece` without reading it, where the one side lends it and the other takes that. What is sent is what lies
    /// there after the bits were cleared, as with a read; it may be sent twice. Says whether it did.
    async fn copy_span(&self, piece: ByteRange) -> Result<bool, CopyError> {
        if self.detect_zeroes || !self.target.takes_span(piece) {
            return Ok(false);
        }
        let Some(span) = self.source.span(piece) else { return Ok(false) };
        let tracked = self.target.enter().await;
        let written = self.at_target.carry_out(tracked.write_span(piece.offset(), span)).await;
        written.map_err(|error| (Operation::Write, error))?;
        Ok(true)
    }

    /// Makes `range` read as zeroes on the target, touching only what is not zero there. What the target says
    /// of itself is good here: nothing else writes this range while the copy stands in the table.
    async fn zero(&self, range: ByteRange, copied: &mut Copied) -> Result<(), CopyError> {
        let mut from = range.offset();
        while from < range.end() {
            let rest = ByteRange::from_bounds(from, range.end());
            self.go_on(rest)?;
            let lacked = self.lacks_backing();
            let part = match self.first_on_target(rest).await {
                Some(first) if self.reads_zero(&first, lacked) => {
                    copied.skipped += first.range.len();
                    from = first.range.end();
                    continue;
                }
                Some(first) => first.range,
                None => rest,
            };
            self.go_on(part)?;
            let tracked = self.target.enter().await;
            let zero = tracked.write_zeroes(part, self.zero_space, ZeroEffort::Any, Durability::Cached);
            let zeroed = self.at_target.carry_out(zero).await;
            zeroed.map_err(|error| (Operation::Write, error))?;
            copied.zeroed += part.len();
            from = part.end();
        }
        Ok(())
    }

    /// The target's first extent in `range`, where it can say and is believed.
    async fn first_on_target(&self, range: ByteRange) -> Option<Extent> {
        if !self.trust_target.load(Ordering::Relaxed) {
            return None;
        }
        let asked = self.at_target.carry_out(self.target.extents_below(range));
        let first = asked.await.ok()?.into_iter().next()?;
        Some(Extent { range: first.range.intersection(range)?, ..first })
    }
}
