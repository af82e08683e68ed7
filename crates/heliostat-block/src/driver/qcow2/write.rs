//! Writing: prepare a mapping, write the data, commit the mapping.
//!
//! A write to clusters that are this image's alone goes in place. Others get new host clusters first: the guest
//! range is entered among the allocations in flight, data and what has to be copied around it is written without any
//! lock, then the mapping is changed in memory. So it becomes visible only when the data is there, and durable (see
//! [`super::commit`]) only after it.

use std::io;

use bytes::Bytes;
use futures_util::future::join_all;

use super::allocate::{Allocation, Step};
use super::entry::{Cluster, Standard};
use super::read::Source;
use super::state::Attempt;
use super::{Landing, Qcow2, Visit};
use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;
use crate::storage::{Durability, IoFuture, ZeroSpace};

/// Parts of one request that are written side by side.
const STEPS_AT_ONCE: usize = 16;

/// Gaps of this many bytes and less are filled from memory, together with the data, in one write.
const FILLED_FROM_MEMORY: u64 = 256 << 10;

/// An allocation in flight. Dropped, it is over: what was not finished is lost space, until a check gives it back.
pub(crate) struct InFlight<'a> {
    driver: &'a Qcow2,
    allocation: Allocation,
    /// Its data is being written, and may land also when this is dropped.
    may_land: bool,
}

impl InFlight<'_> {
    /// Where its clusters will be, in the file of the guest's data.
    pub(crate) fn host(&self) -> ByteRange {
        let Allocation { clusters, host, .. } = self.allocation;
        ByteRange::from_bounds(host, host + clusters.len())
    }

    /// Whether they had no host clusters before.
    pub(crate) fn is_new(&self) -> bool {
        matches!(self.allocation.old, Cluster::Standard(Standard { host: None, .. }))
    }

    /// Whether they read as zeroes and were never written.
    pub(crate) fn is_fresh(&self) -> bool {
        self.allocation.run.is_some_and(|run| run.fresh)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut state = self.driver.lock();
        if self.may_land && self.allocation.run.is_none() {
            state.haunt(self.allocation.host);
        }
        state.allocations.leave(self.allocation.clusters);
    }
}

/// A part of a write that is ready to be carried out.
pub(crate) enum Part<'a> {
    InPlace { range: ByteRange, host: u64, visit: Visit<'a> },
    Allocate(InFlight<'a>),
}

impl Qcow2 {
    pub(crate) fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(data.len()));
        if let Some((host, visit)) = self.try_in_place(range, durability) {
            if let Some(held_up) = self.storage().raise(DebugEvent::WriteAio) {
                return IoFuture::pending(async move {
                    let landing = Landing(Some(visit));
                    held_up.await;
                    let written = self.data().write_now(host, data, durability).await;
                    landing.end();
                    written
                });
            }
            return match self.data().write_now(host, data, durability) {
                ready @ IoFuture::Ready(_) => ready,
                IoFuture::Pending(writing) => IoFuture::pending(async move {
                    let landing = Landing(Some(visit));
                    let written = writing.await;
                    landing.end();
                    written
                }),
            };
        }
        IoFuture::pending(self.write_in_parts(range, data, durability))
    }

    /// Where all of a write goes in place, if it does, and is durable when its data is where that is asked for.
    fn try_in_place(&self, range: ByteRange, durability: Durability) -> Option<(u64, Visit<'_>)> {
        let mut state = self.lock();
        if range.is_empty() || (durability == Durability::Fua && state.is_changed()) {
            return None;
        }
        let layout = self.layout;
        let guest = layout.cluster_start(range.offset());
        let first = ByteRange::from_bounds(guest, guest + layout.cluster_size());
        state.check_sound().and_then(|()| state.check_free(first)).ok()?;
        let cluster = state.cluster(guest).ok()?;
        let host = state.host_in_place(cluster, range.intersection(first)?)?;
        match state.plan_in_place(range, host) {
            Ok(Step::InPlace { range: all, host }) if all == range => {
                Some((host, Visit { driver: self, epoch: state.epochs.enter() }))
            }
            _ => None,
        }
    }

    async fn write_in_parts(&self, range: ByteRange, data: Bytes, durability: Durability) -> io::Result<()> {
        self.make_room().await?;
        let failed = self.failed_flushes();
        let mut rest = range;
        while !rest.is_empty() {
            let mut parts = Vec::new();
            while !rest.is_empty() && parts.len() < STEPS_AT_ONCE {
                match self.next_part(rest) {
                    Ok(part) => {
                        rest = ByteRange::from_bounds(part.range().end(), rest.end());
                        parts.push(part);
                    }
                    // Whoever waits must hold nothing: others may wait for it.
                    Err(obstacle) if parts.is_empty() => self.overcome(obstacle).await?,
                    Err(_) => break,
                }
            }
            let written = join_all(parts.into_iter().map(|part| {
                let from = usize_from(part.range().offset() - range.offset());
                let data = data.slice(from..from + usize_from(part.range().len()));
                self.write_part(part, data)
            }));
            written.await.into_iter().collect::<io::Result<()>>()?;
        }
        match durability {
            Durability::Cached => Ok(()),
            Durability::Fua if is_planted(Bug::FuaWithoutMapping) => self.data().flush().await,
            Durability::Fua => self.flush_after(failed).await,
        }
    }

    pub(crate) fn next_part(&self, range: ByteRange) -> Attempt<Part<'_>> {
        let mut state = self.lock();
        Ok(match state.plan_write(range, self.backing_size())? {
            Step::InPlace { range, host } => {
                let visit = Visit { driver: self, epoch: state.epochs.enter() };
                Part::InPlace { range, host, visit }
            }
            Step::Allocate(allocation) => {
                Part::Allocate(InFlight { driver: self, allocation, may_land: false })
            }
        })
    }

    async fn write_part(&self, part: Part<'_>, data: Bytes) -> io::Result<()> {
        let mut in_flight = match part {
            Part::InPlace { host, visit, .. } => {
                let landing = Landing(Some(visit));
                self.raise(DebugEvent::WriteAio).await;
                let written = self.data().write_now(host, data, Durability::Cached).await;
                landing.end();
                return written;
            }
            Part::Allocate(in_flight) => in_flight,
        };
        if in_flight.allocation.run.is_some() {
            self.raise(DebugEvent::ClusterAlloc).await;
            // QEMU says so whenever it counts a cluster, whether or not that takes a new block.
            self.raise(DebugEvent::RefblockAlloc).await;
            self.raise_what_happened().await;
        }
        in_flight.may_land = true;
        if is_planted(Bug::MappingBeforeData) {
            self.finish_part(&in_flight).await?;
            return self.write_allocated(&in_flight.allocation, data).await;
        }
        let finished = match self.write_allocated(&in_flight.allocation, data).await {
            Ok(()) => self.finish_part(&in_flight).await,
            Err(error) => Err(error),
        };
        if let (Err(_), Some(run)) = (&finished, in_flight.allocation.run) {
            // Where even that fails, the space is lost until a check gives it back.
            let _ = self.attempt(|state| state.abandon(run)).await;
        }
        in_flight.may_land = false;
        finished
    }

    /// The data is there: changes the mapping.
    pub(crate) async fn finish_part(&self, in_flight: &InFlight<'_>) -> io::Result<()> {
        self.attempt(|state| state.finish_write(&in_flight.allocation)).await
    }

    /// Writes the data, and around it what becomes data with it.
    async fn write_allocated(&self, allocation: &Allocation, data: Bytes) -> io::Result<()> {
        let Allocation { clusters, write, hull, host, gaps, .. } = allocation;
        let file = self.data();
        let at = |guest: u64| host + (guest - clusters.offset());
        let is_zero = gaps.iter().all(|gap| gap.source == Source::Zero);
        {
            let mut state = self.lock();
            state.forget_old_losses(self.losses());
            state.note_copy(allocation);
        }
        if !allocation.writes_around() {
            file.grow_to(at(clusters.end())).await?;
            self.raise(DebugEvent::WriteAio).await;
            return file.write_now(at(write.offset()), data, Durability::Cached).await;
        }
        let gap_len: u64 = gaps.iter().map(|gap| gap.range.len()).sum();
        if is_zero && gap_len > FILLED_FROM_MEMORY {
            self.raise(DebugEvent::ClusterAllocSpace).await;
            for gap in gaps {
                let range = ByteRange::from_bounds(at(gap.range.offset()), at(gap.range.end()));
                file.write_zeroes(range, ZeroSpace::Keep).await?;
            }
            self.raise(DebugEvent::WriteAio).await;
            return file.write(at(write.offset()), data).await;
        }
        let mut whole = Buffer::zeroed(usize_from(hull.len()));
        let place = |range: ByteRange| {
            usize_from(range.offset() - hull.offset())..usize_from(range.end() - hull.offset())
        };
        let (head, tail): (Vec<_>, Vec<_>) =
            gaps.iter().copied().partition(|gap| gap.range.end() <= write.offset());
        for gap in [head, tail].iter().filter(|gap| !gap.is_empty()) {
            let range = ByteRange::from_bounds(
                gap.first().map_or(0, |first| first.range.offset()),
                gap.last().map_or(0, |last| last.range.end()),
            );
            if gap.iter().any(|gap| gap.source != Source::Zero) {
                self.raise(DebugEvent::CowRead).await;
            }
            let old = self.read_segments(gap, Buffer::zeroed(usize_from(range.len()))).await?;
            whole[place(range)].copy_from_slice(&old);
        }
        whole[place(*write)].copy_from_slice(&data);
        self.raise(DebugEvent::WriteAio).await;
        self.raise(DebugEvent::CowWrite).await;
        file.write(at(hull.offset()), whole.freeze()).await
    }
}

impl Part<'_> {
    pub(crate) fn range(&self) -> ByteRange {
        match self {
            Self::InPlace { range, .. } => *range,
            Self::Allocate(in_flight) => in_flight.allocation.write,
        }
    }
}
