//! Clusters that were set aside and that nobody has written yet: the file has holes there, so they read as zeroes.
//!
//! An image that was made with `preallocation=metadata` says of all of its disk that it is data. Who copies it, or
//! asks what it holds, wants to know better. But to ask the file about each cluster costs a system call or two, so it is
//! only asked where the file takes less space than the image counts: as QEMU does, and by its measure, so that both say
//! the same of an image.

use std::io;

use super::file::ImageFile;
use super::read::{Segment, Source};
use super::state::State;
use super::{Obstacle, Qcow2, Visit};
use crate::convert::{u64_from, usize_from};
use crate::map::{Content, Mapping};
use crate::range::ByteRange;
use crate::storage::{Extent, ExtentStatus};

/// The most extents in one answer.
const EXTENTS_MAX: usize = 1024;

/// Bits of an entry of the refcount table: where the block is.
const BLOCK_MASK: u64 = !0x1ff;

impl Qcow2 {
    /// Says whether the file is asked about clusters. Found out once.
    pub(super) async fn is_hollow(&self) -> io::Result<bool> {
        if let Some(known) = self.hollow.get() {
            return Ok(*known);
        }
        let found = self.takes_less_than_it_counts().await?;
        Ok(*self.hollow.get_or_init(|| found))
    }

    async fn takes_less_than_it_counts(&self) -> io::Result<bool> {
        let layout = self.layout;
        let Some(taken) = self.file.storage().allocated_size() else { return Ok(false) };
        let taken = layout.cluster_index(taken);
        // QEMU's measure: a tenth less, and two clusters at least.
        let mut missing = (taken.saturating_mul(10) / 9).max(taken + 2);
        let clusters = layout.clusters_for(self.file.size());
        let blocks = self.lock().refcount_table.clone();
        let per_block = layout.refcount_block_entries();
        for (first, block) in (0..clusters).step_by(usize_from(per_block)).zip(blocks) {
            let count = per_block.min(clusters - first);
            if missing > clusters - first {
                break;
            }
            let block = block & BLOCK_MASK;
            if block == 0 || layout.in_cluster(block) != 0 {
                continue;
            }
            let range = ByteRange::from_bounds(block, block.saturating_add(layout.cluster_size()));
            let bytes = self.file.read(range).await?;
            let counted = (0..count).filter(|index| layout.refcount(&bytes, *index) > 0).count();
            missing = missing.saturating_sub(u64_from(counted));
            if missing == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How `range` is laid out in this image and in its file, as far as it answers in one go.
    pub(super) async fn extents_with_holes(&self, range: ByteRange) -> io::Result<Vec<Extent>> {
        let (segments, _visit) = self.segments_of_start(range).await?;
        let mut found: Vec<Extent> = Vec::new();
        for Segment { range, source } in segments {
            let Source::Host(host) = source else {
                let status = match source {
                    Source::Zero => ExtentStatus::Zero,
                    Source::Backing => ExtentStatus::Hole,
                    Source::Host(_) | Source::Compressed(_) => ExtentStatus::Data,
                };
                append(&mut found, Extent { range, status });
                continue;
            };
            for extent in self.holes_of(range, host).await? {
                append(&mut found, extent);
            }
            if found.len() >= EXTENTS_MAX {
                break;
            }
        }
        Ok(found)
    }

    /// Where the bytes of the start of `range` are. What it saw is not used anew before the visit ends.
    async fn segments_of_start(&self, range: ByteRange) -> io::Result<(Vec<Segment>, Visit<'_>)> {
        loop {
            let (planned, epoch) = {
                let mut state = self.lock();
                (state.plan_segments(range), state.epochs.enter())
            };
            let visit = Visit { driver: self, epoch };
            let (segments, obstacle) = planned;
            if !segments.is_empty() || range.is_empty() {
                return Ok((segments, visit));
            }
            drop(visit);
            if let Some(obstacle) = obstacle {
                self.overcome(obstacle).await?;
            }
        }
    }

    /// What the file has of a range of the disk that stands at `host`: data, or nothing yet.
    async fn holes_of(&self, range: ByteRange, host: u64) -> io::Result<Vec<Extent>> {
        let data: &ImageFile = self.data();
        let end = host + range.len();
        let guest = |at: u64| range.offset() + (at - host);
        let mut found = Vec::new();
        let mut at = host;
        while at < end {
            let inside = ByteRange::from_bounds(at, end.min(data.size()).max(at));
            let extents = if inside.is_empty() {
                vec![Extent { range: ByteRange::from_bounds(at, end), status: ExtentStatus::Hole }]
            } else {
                data.storage().extents(inside).await?
            };
            let from = at;
            for Extent { range, status } in extents {
                let status = if status.may_hold_data() { ExtentStatus::Data } else { ExtentStatus::Zero };
                at = range.end().min(end);
                let range = ByteRange::from_bounds(guest(range.offset()), guest(at));
                append(&mut found, Extent { range, status });
            }
            if at == from || found.len() >= EXTENTS_MAX {
                break;
            }
        }
        // What was not asked about may hold anything.
        append(
            &mut found,
            Extent { range: ByteRange::from_bounds(guest(at), range.end()), status: ExtentStatus::Data },
        );
        Ok(found)
    }

    /// Splits what `mapping` says of data by what the file has there.
    pub(super) async fn hollow_mappings(&self, mapping: Mapping) -> io::Result<Vec<Mapping>> {
        let Some(host) = mapping.offset.filter(|_| mapping.content == Content::Data) else {
            return Ok(vec![mapping]);
        };
        let extents = self.holes_of(mapping.range, host).await?;
        let split = extents.into_iter().map(|Extent { range, status }| Mapping {
            range,
            content: if status == ExtentStatus::Data { Content::Data } else { Content::Hollow },
            offset: Some(host + (range.offset() - mapping.range.offset())),
            ..mapping
        });
        Ok(split.collect())
    }
}

impl State {
    /// Where the first bytes of `range` are, and what stands in the way of more.
    fn plan_segments(&mut self, range: ByteRange) -> (Vec<Segment>, Option<Obstacle>) {
        let mut segments = Vec::new();
        let mut at = range.offset();
        for _ in 0..super::extents::LOOKS_MAX {
            if at >= range.end() || segments.len() >= EXTENTS_MAX {
                break;
            }
            match self.look(ByteRange::from_bounds(at, range.end()), &mut segments) {
                Ok(end) => at = end,
                Err(obstacle) => return (segments, Some(obstacle)),
            }
        }
        (segments, None)
    }
}

/// Appends an extent, as part of the last one where the two are one.
pub(super) fn append(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        _ if next.range.is_empty() => {}
        Some(last) if last.status == next.status && last.range.end() == next.range.offset() => {
            last.range = ByteRange::from_bounds(last.range.offset(), next.range.end());
        }
        _ => extents.push(next),
    }
}
