//! Write-zeroes and discard: changes of the mapping, without data wherever the format can say it.
//!
//! What reads as zero already is left alone. Space that is given back is used anew only when the mapping without it
//! is durable and nobody reads it any more (see [`super::commit`]).

use std::io;

use super::Qcow2;
use super::entry::{Cluster, Standard};
use super::read::{Source, segments_of};
use super::state::{Attempt, State};
use crate::buffer::Buffer;
use crate::convert::usize_from;
use crate::range::ByteRange;
use crate::storage::{Durability, IoFuture, ZeroSpace};

/// Clusters that are changed at once, while the lock is held: some tens of microseconds.
const CLUSTERS_AT_ONCE: u64 = 512;

/// Zeroes that are written as data, in pieces of so many bytes.
const ZEROES_LEN: u64 = 1 << 20;

/// What becomes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// It reads as zero.
    Zero(ZeroSpace),
    /// It is not needed. It reads as zero where the image can say so.
    Discard,
}

impl State {
    /// Changes the mapping of the first clusters of `range`, which is aligned to units of allocation; says how far.
    fn change(&mut self, range: ByteRange, change: Change, backing: u64) -> Attempt<u64> {
        let mut at = range.offset();
        for _ in 0..CLUSTERS_AT_ONCE {
            if at >= range.end() {
                break;
            }
            match self.change_cluster(ByteRange::from_bounds(at, range.end()), change, backing) {
                Ok(end) => at = end,
                // What is done is done; the rest comes with the next call.
                Err(obstacle) if at == range.offset() => return Err(obstacle),
                Err(_) => break,
            }
        }
        Ok(at.min(range.end()))
    }

    /// Says whether `parts`, all in one cluster, are known to read as zero. What is below does so from `below_end` on.
    fn is_zero(&mut self, parts: &[ByteRange], below_end: u64) -> Attempt<bool> {
        let layout = self.layout;
        for part in parts.iter().copied() {
            let guest = layout.cluster_start(part.offset());
            let whole = ByteRange::from_bounds(guest, guest + layout.cluster_size());
            self.check_free(whole)?;
            let segments = segments_of(self.cluster(guest)?, layout, part);
            let is_zero = |at: u64, source: Source| match source {
                Source::Zero => true,
                Source::Backing => at >= below_end,
                Source::Host(_) | Source::Compressed(_) => false,
            };
            if !whole.contains(part) || !segments.iter().all(|part| is_zero(part.range.offset(), part.source))
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Changes the mapping of the cluster in which `range` begins; says how far it is dealt with.
    fn change_cluster(&mut self, range: ByteRange, change: Change, backing: u64) -> Attempt<u64> {
        self.check_sound()?;
        let layout = self.layout;
        let guest = layout.cluster_start(range.offset());
        let cluster = ByteRange::from_bounds(guest, guest + layout.cluster_size());
        let part = cluster.intersection(range).unwrap_or(cluster);
        let is_below = guest < backing;
        if !is_below && self.l1_entry(guest).table(layout)?.is_none() {
            // Nothing here, nothing below: a table for it would say no more.
            return Ok((layout.l1_index(guest) + 1).saturating_mul(layout.l2_coverage()).min(range.end()));
        }
        self.check_free(cluster)?;
        let old = self.cluster(guest)?;
        if let Some(new) = changed(old, part, change, self, is_below) {
            self.check_table(guest)?;
            self.set_cluster(guest, new.encode(layout))?;
            let keeps_host = matches!(old, Cluster::Standard(standard) if standard.host == new.host);
            if !keeps_host {
                self.drop_cluster(old, true);
            }
        }
        Ok(cluster.end().min(range.end()))
    }
}

/// What an entry says afterwards; `None` where it says the right thing already.
fn changed(old: Cluster, part: ByteRange, change: Change, state: &State, is_below: bool) -> Option<Standard> {
    let layout = state.layout;
    let within = layout.in_cluster(part.offset());
    let bits = layout.subclusters_of(ByteRange::from_bounds(within, within + part.len()));
    let is_whole = bits == layout.all_subclusters();
    let nothing = if layout.version < 3 { Standard::default() } else { Standard::zero(layout) };
    let standard = match old {
        Cluster::Compressed(_) => return is_whole.then_some(nothing),
        Cluster::Standard(standard) => standard,
    };
    // It has nothing that could be given back, and reads as zero.
    let is_nothing = standard.is_unallocated() || change == Change::Discard;
    if is_nothing && standard.host.is_none() && !is_below {
        return None;
    }
    let keeps = change == Change::Zero(ZeroSpace::Keep);
    let new = if is_whole && !keeps {
        nothing
    } else {
        Standard { data: standard.data & !bits, zero: standard.zero | bits, ..standard }
    };
    (new != standard).then_some(new)
}

impl Qcow2 {
    pub(crate) fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            self.make_room().await?;
            let failed = self.failed_flushes();
            self.zero(range, space).await?;
            match durability {
                Durability::Cached => Ok(()),
                Durability::Fua => self.flush_after(failed).await,
            }
        })
    }

    pub(crate) async fn zero(&self, range: ByteRange, space: ZeroSpace) -> io::Result<()> {
        if self.layout.version < 3 || self.is_data_file_raw {
            self.zero_without_entries(range, space).await
        } else {
            self.zero_with_entries(range, space).await
        }
    }

    pub(crate) fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            self.make_room().await?;
            let whole = self.whole_units(range, self.layout.cluster_size());
            if whole.is_empty() || (self.layout.version < 3 && self.below_end() > 0) {
                // Version 2 cannot say "zero": what is below would come back.
                return Ok(());
            }
            if let Some(data) = &self.data_file {
                if self.is_data_file_raw {
                    return data.write_zeroes(whole, ZeroSpace::MayUnmap).await;
                }
                self.change(whole, Change::Discard).await?;
                data.discard(whole).await;
                return Ok(());
            }
            self.change(whole, Change::Discard).await
        })
    }

    /// The units of allocation inside `range`; the disk's last may be short.
    fn whole_units(&self, range: ByteRange, unit: u64) -> ByteRange {
        let start = range.offset().next_multiple_of(unit);
        let end = if range.end() >= self.size() {
            range.end().next_multiple_of(unit)
        } else {
            range.end() & !(unit - 1)
        };
        ByteRange::from_bounds(start, end)
    }

    async fn change(&self, range: ByteRange, change: Change) -> io::Result<()> {
        let mut at = range.offset();
        while at < range.end() {
            let rest = ByteRange::from_bounds(at, range.end());
            at = self.attempt(|state| state.change(rest, change, self.below_end())).await?;
            if self.lock().slices.wants_commit() {
                self.make_room().await?;
            }
        }
        Ok(())
    }

    async fn zero_with_entries(&self, range: ByteRange, space: ZeroSpace) -> io::Result<()> {
        let middle = self.whole_units(range, self.layout.unit());
        if middle.offset() >= range.end() {
            return self.zero_part(range, space).await;
        }
        let head = ByteRange::from_bounds(range.offset(), middle.offset());
        let tail = ByteRange::from_bounds(middle.end(), range.end());
        // In this order, as QEMU does: a compressed cluster is none any more when part of it has been written.
        self.zero_part(head, space).await?;
        if !middle.is_empty() {
            self.zero_units(middle, space).await?;
        }
        self.zero_part(tail, space).await
    }

    /// Zeroes whole units of allocation.
    async fn zero_units(&self, middle: ByteRange, space: ZeroSpace) -> io::Result<()> {
        // Part of a compressed cluster cannot be zero by itself.
        let clusters = self.whole_units(middle, self.layout.cluster_size());
        let edges = if clusters.is_empty() {
            let at = self.layout.cluster_start(middle.end() - 1).max(middle.offset());
            [ByteRange::from_bounds(middle.offset(), at), ByteRange::from_bounds(at, middle.end())]
        } else {
            [
                ByteRange::from_bounds(middle.offset(), clusters.offset()),
                ByteRange::from_bounds(clusters.end(), middle.end()),
            ]
        };
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            let guest = self.layout.cluster_start(edge.offset());
            match self.attempt(|state| state.cluster(guest)).await? {
                Cluster::Compressed(_) => self.write_as_zeroes(edge).await?,
                Cluster::Standard(_) => self.change(edge, Change::Zero(space)).await?,
            }
        }
        self.change(clusters, Change::Zero(space)).await
    }

    /// Zeroes a part of a unit of allocation: all of the unit, where the rest of it is zero already.
    async fn zero_part(&self, range: ByteRange, space: ZeroSpace) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let unit = range.widen(self.layout.unit(), u64::MAX);
        let end = unit.end().min(self.size());
        let rest = [
            ByteRange::from_bounds(unit.offset(), range.offset()),
            ByteRange::from_bounds(range.end(), end.max(range.end())),
        ];
        let rest: Vec<ByteRange> = rest.into_iter().filter(|part| !part.is_empty()).collect();
        let is_zero_below = self.is_zero_below(&rest).await?;
        let below_end = if is_zero_below { 0 } else { self.below_end() };
        let change = Change::Zero(space);
        // What the rest is now is what it is when the entry changes: a write to it in between would be lost.
        let is_done = self
            .attempt(|state| {
                let is_zero = state.is_zero(&rest, below_end)?;
                if is_zero {
                    state.change_cluster(unit, change, self.below_end())?;
                }
                Ok(is_zero)
            })
            .await?;
        if is_done || self.reads_zero(range).await? {
            return Ok(());
        }
        self.write_as_zeroes(range).await
    }

    /// Says whether what is below this image reads as zero in all of `parts`.
    async fn is_zero_below(&self, parts: &[ByteRange]) -> io::Result<bool> {
        for part in parts {
            let Some(below) = part.intersection(ByteRange::from_bounds(0, self.below_end())) else {
                continue;
            };
            let Some(backing) = self.backing() else { return Ok(false) };
            let extents = backing.extents_below(below).await.map_err(io::Error::from)?;
            let is_all = extents.last().is_some_and(|last| last.range.end() >= below.end());
            if !is_all || extents.iter().any(|extent| extent.status.may_hold_data()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Says whether the image knows that `range`, which lies in one cluster, reads as zero.
    async fn reads_zero(&self, range: ByteRange) -> io::Result<bool> {
        let below_end = self.below_end();
        self.attempt(|state| state.is_zero(&[range], below_end)).await
    }

    async fn write_as_zeroes(&self, range: ByteRange) -> io::Result<()> {
        for piece in range.pieces(ZEROES_LEN) {
            let zeroes = Buffer::zeroed(usize_from(piece.len())).freeze();
            self.write(piece.offset(), zeroes, Durability::Cached).await?;
        }
        Ok(())
    }

    /// Zeroes where entries cannot say so: version 2, or an external data file that must be a raw image by itself.
    async fn zero_without_entries(&self, range: ByteRange, space: ZeroSpace) -> io::Result<()> {
        let layout = self.layout;
        let may_unmap = space == ZeroSpace::MayUnmap && self.below_end() == 0 && self.data_file.is_none();
        let mut at = range.offset();
        while at < range.end() {
            let cluster = ByteRange::from_bounds(
                layout.cluster_start(at),
                layout.cluster_start(at) + layout.cluster_size(),
            );
            let end = cluster.end().min(range.end());
            let part = ByteRange::from_bounds(at, end);
            let is_whole = part.offset() == cluster.offset() && (end == cluster.end() || end == self.size());
            at = end;
            if self.reads_zero(part).await? {
                continue;
            }
            if is_whole && may_unmap {
                self.change(cluster, Change::Discard).await?;
            } else {
                self.write_as_zeroes(part).await?;
                if let (Some(data), true) = (&self.data_file, space == ZeroSpace::MayUnmap) {
                    // The mapping says "data" now, and a hole in the data file reads as zero.
                    data.write_zeroes(part, space).await?;
                }
            }
        }
        Ok(())
    }
}
