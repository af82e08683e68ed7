//! [`Medium`]: the bytes of a simulated storage, as they are read and as a crash would leave them.
//!
//! Bytes are durable by the sector. What was written since the last good flush is in the cache, and at a crash
//! any part of it may be there or not. A failed flush loses part of the cache for good: reads may still show
//! it, no later flush brings it back, and only writing it again does. A new length is in the cache, too: a crash
//! leaves it or the one that was durable, as file systems with a journal do. It has no notion of time.

use std::collections::{BTreeMap, BTreeSet};

use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Extent, ExtentStatus};

use crate::random::Random;

const SECTOR: u64 = 512;

/// What is put into a range.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    Data(bytes::Bytes),
    Zeroes(ExtentStatus),
}

/// The bytes of a storage.
pub(crate) struct Medium {
    visible: Vec<u8>,
    /// At least as long as `visible`; longer where a crash may bring back what was cut off.
    durable: Vec<u8>,
    /// The length that a crash leaves, unless it leaves the visible one.
    durable_len: usize,
    status: Vec<ExtentStatus>,
    /// Counts what landed on each sector.
    version: Vec<u64>,
    /// The version that is durable.
    durable_version: Vec<u64>,
    /// Sectors that a crash may lose, and a flush makes durable.
    cached: BTreeSet<usize>,
    /// Sectors that a failed flush has lost: a flush does nothing for them.
    lost: BTreeSet<usize>,
}

/// What was in the cache when a flush began.
pub(crate) struct FlushStart(Vec<(usize, u64, Vec<u8>)>);

impl Medium {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let sectors = bytes.len().div_ceil(usize_from(SECTOR));
        let mut medium = Self {
            durable: bytes.clone(),
            durable_len: bytes.len(),
            visible: bytes,
            status: vec![ExtentStatus::Hole; sectors],
            version: vec![0; sectors],
            durable_version: vec![0; sectors],
            cached: BTreeSet::new(),
            lost: BTreeSet::new(),
        };
        for sector in 0..sectors {
            if medium.visible[medium.bytes_of(sector)].iter().any(|byte| *byte != 0) {
                medium.status[sector] = ExtentStatus::Data;
            }
        }
        medium
    }

    pub(crate) fn visible(&self) -> &[u8] {
        &self.visible
    }

    pub(crate) fn durable(&self) -> &[u8] {
        &self.durable[..self.durable_len]
    }

    pub(crate) fn size(&self) -> u64 {
        u64_from(self.visible.len())
    }

    /// Cuts or lengthens what is read. No request that reaches beyond the new end may be under way.
    pub(crate) fn set_size(&mut self, size: u64) {
        let (old, new) = (self.visible.len(), usize_from(size));
        if new > old {
            // Lengths become durable in order: when this one is, what an earlier one cut off is gone.
            self.durable_len = self.durable_len.min(old);
            self.durable.truncate(old);
            self.durable.resize(new, 0);
        }
        self.visible.resize(new, 0);
        let sectors = new.div_ceil(usize_from(SECTOR));
        self.status.resize(sectors, ExtentStatus::Hole);
        // The versions of sectors that are gone stay: a flush that began before must not bring back what they held.
        let known = self.version.len().max(sectors);
        self.version.resize(known, 0);
        self.durable_version.resize(known, 0);
        let edge = old.min(new) / usize_from(SECTOR);
        if self.cached.contains(&edge) && edge < sectors {
            self.persist_sector(edge);
        }
        for sector in edge..known {
            self.version[sector] += 1;
            self.durable_version[sector] = self.version[sector];
        }
        self.cached.retain(|sector| *sector < sectors);
        self.lost.retain(|sector| *sector < sectors);
    }

    fn bytes_of(&self, sector: usize) -> std::ops::Range<usize> {
        let start = sector * usize_from(SECTOR);
        start..(start + usize_from(SECTOR)).min(self.visible.len())
    }

    fn sectors_of(range: ByteRange) -> std::ops::Range<usize> {
        if range.is_empty() {
            return 0..0;
        }
        usize_from(range.offset() / SECTOR)..usize_from(range.end().div_ceil(SECTOR))
    }

    pub(crate) fn read(&self, range: ByteRange, into: &mut [u8]) {
        into.copy_from_slice(&self.visible[usize_from(range.offset())..usize_from(range.end())]);
    }

    /// Part of a write lands: `range` of a write that began at `start`.
    pub(crate) fn land(&mut self, range: ByteRange, start: u64, content: &Content) {
        let bytes = usize_from(range.offset())..usize_from(range.end());
        match content {
            Content::Data(data) => {
                let from = usize_from(range.offset() - start);
                self.visible[bytes].copy_from_slice(&data[from..from + usize_from(range.len())]);
            }
            Content::Zeroes(_) => self.visible[bytes].fill(0),
        }
        for sector in Self::sectors_of(range) {
            self.version[sector] += 1;
            self.lost.remove(&sector);
            self.cached.insert(sector);
            let whole = self.bytes_of(sector);
            let is_whole = range.offset() <= u64_from(whole.start) && u64_from(whole.end) <= range.end();
            match content {
                Content::Zeroes(status) if is_whole => self.status[sector] = *status,
                Content::Zeroes(_) => {}
                Content::Data(_) => self.status[sector] = ExtentStatus::Data,
            }
        }
    }

    /// Makes the sectors of `range` durable as they are.
    pub(crate) fn persist(&mut self, range: ByteRange) {
        for sector in Self::sectors_of(range) {
            self.persist_sector(sector);
        }
    }

    fn persist_sector(&mut self, sector: usize) {
        let bytes = self.bytes_of(sector);
        self.durable[bytes.clone()].copy_from_slice(&self.visible[bytes]);
        self.durable_version[sector] = self.version[sector];
        if self.bytes_of(sector).end > self.durable_len {
            // What cannot be read is not durable.
            self.durable_len = self.visible.len();
        }
        self.cached.remove(&sector);
        self.lost.remove(&sector);
    }

    /// The host writes some of its cache back by itself.
    pub(crate) fn write_back(&mut self, per_mille: u64, random: &mut Random) {
        let some: Vec<_> = self.cached.iter().copied().filter(|_| random.chance(per_mille)).collect();
        some.into_iter().for_each(|sector| self.persist_sector(sector));
    }

    /// What of `range` is in the cache becomes durable.
    pub(crate) fn persist_cached(&mut self, range: ByteRange) {
        for sector in
            Self::sectors_of(range).filter(|sector| self.cached.contains(sector)).collect::<Vec<_>>()
        {
            self.persist_sector(sector);
        }
    }

    /// What of `range` is in the cache is lost, as by a failed flush. Says whether there was any.
    pub(crate) fn lose(&mut self, range: ByteRange) -> bool {
        let mut any = false;
        for sector in Self::sectors_of(range) {
            if self.cached.remove(&sector) {
                self.lost.insert(sector);
                any = true;
            }
        }
        any
    }

    /// Another one is in its place, durably, with `bytes`, of the same length. What is on its way lands there.
    pub(crate) fn become_other(&mut self, bytes: Vec<u8>) {
        let other = Self::new(bytes);
        let known = self.version.len();
        for sector in 0..known {
            self.version[sector] += 1;
            self.durable_version[sector] = self.version[sector];
        }
        self.visible = other.visible;
        self.durable = other.durable;
        self.durable_len = other.durable_len;
        self.status = other.status;
        self.cached.clear();
        self.lost.clear();
    }

    pub(crate) fn flush_begins(&self) -> FlushStart {
        let content =
            |sector: &usize| (*sector, self.version[*sector], self.visible[self.bytes_of(*sector)].to_vec());
        FlushStart(self.cached.iter().map(content).collect())
    }

    /// A flush succeeds: what was in the cache when it began is durable; what came since may be.
    pub(crate) fn flush_succeeds(&mut self, start: FlushStart, random: &mut Random) {
        for (sector, version, content) in start.0 {
            if !self.cached.contains(&sector) {
                continue;
            }
            if version == self.version[sector] || random.chance(500) {
                self.persist_sector(sector);
            } else if version > self.durable_version[sector] {
                let bytes = self.bytes_of(sector);
                self.durable[bytes].copy_from_slice(&content);
                self.durable_version[sector] = version;
            }
        }
        self.durable_len = self.visible.len();
    }

    /// A flush fails: of all that is in the cache, some is durable, some stays, some is lost.
    pub(crate) fn flush_fails(&mut self, random: &mut Random) {
        for sector in self.cached.clone() {
            match random.below(4) {
                0 => self.persist_sector(sector),
                1 => {}
                _ => {
                    self.cached.remove(&sector);
                    self.lost.insert(sector);
                }
            }
        }
    }

    /// Forgets some of what a failed flush has lost: reads show what the medium has.
    pub(crate) fn forget(&mut self, per_mille: u64, random: &mut Random) {
        for sector in self.lost.clone() {
            if random.chance(per_mille) {
                let bytes = self.bytes_of(sector);
                self.visible[bytes.clone()].copy_from_slice(&self.durable[bytes]);
                self.status[sector] = ExtentStatus::Data;
                self.lost.remove(&sector);
                self.version[sector] += 1;
            }
        }
    }

    /// What a crash at this moment leaves.
    pub(crate) fn crash(&self, random: &mut Random) -> Vec<u8> {
        let mut left = self.durable.clone();
        for sector in &self.cached {
            if random.chance(500) {
                let bytes = self.bytes_of(*sector);
                left[bytes.clone()].copy_from_slice(&self.visible[bytes]);
            }
        }
        let is_old = self.durable_len != self.visible.len() && random.chance(500);
        left.truncate(if is_old { self.durable_len } else { self.visible.len() });
        left
    }

    pub(crate) fn allocated(&self) -> u64 {
        u64_from(self.status.iter().filter(|status| **status != ExtentStatus::Hole).count()) * SECTOR
    }

    /// The extents of `range`: at most `count`.
    pub(crate) fn extents(&self, range: ByteRange, count: u64) -> Vec<Extent> {
        let mut found: Vec<Extent> = Vec::new();
        for sector in Self::sectors_of(range) {
            let bytes = self.bytes_of(sector);
            let part = ByteRange::from_bounds(u64_from(bytes.start), u64_from(bytes.end));
            let Some(part) = part.intersection(range) else { continue };
            let status = self.status[sector];
            let full = u64_from(found.len()) >= count;
            match found.last_mut() {
                Some(last) if last.status == status => {
                    last.range = ByteRange::from_bounds(last.range.offset(), part.end());
                }
                _ if full => break,
                _ => found.push(Extent { range: part, status }),
            }
        }
        found
    }

    /// Where two images differ first, in `ranges`.
    pub(crate) fn difference(one: &[u8], other: &[u8], ranges: &BTreeMap<u64, u64>) -> Option<u64> {
        ranges.iter().find_map(|(start, end)| {
            let bytes = usize_from(*start)..usize_from(*end);
            let pairs = one[bytes.clone()].iter().zip(&other[bytes]);
            pairs.enumerate().find(|(_, (a, b))| a != b).map(|(at, _)| start + u64_from(at))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start, end)
    }

    fn write(medium: &mut Medium, range: ByteRange, byte: u8) {
        let data = bytes::Bytes::from(vec![byte; usize_from(range.len())]);
        medium.land(range, range.offset(), &Content::Data(data));
    }

    /// What a hundred crashes leave: the lengths, and whether any left one of `bytes` behind `from`.
    fn crashes(medium: &Medium, from: usize, byte: u8) -> (BTreeSet<usize>, bool) {
        let left: Vec<_> = (0..100).map(|seed| medium.crash(&mut Random::new(seed))).collect();
        let found = left.iter().any(|left| left.iter().skip(from).any(|found| *found == byte));
        (left.iter().map(Vec::len).collect(), found)
    }

    #[test]
    fn a_new_length_is_durable_after_a_flush_and_either_until_then() {
        for (old, new) in [(4096, 10_000), (10_000, 4096)] {
            let mut medium = Medium::new(vec![1; old]);
            medium.set_size(u64_from(new));
            assert_eq!((medium.visible().len(), medium.durable().len()), (new, old));
            assert_eq!(crashes(&medium, 0, 9), ([old, new].into(), false));
            let start = medium.flush_begins();
            medium.flush_succeeds(start, &mut Random::new(1));
            assert_eq!(medium.durable(), medium.visible());
            assert_eq!(crashes(&medium, 0, 9), ([new].into(), false));
        }
    }

    #[test]
    fn what_was_cut_off_does_not_return_when_it_grows_again() {
        let mut medium = Medium::new(vec![9; 4096]);
        write(&mut medium, range(1024, 4096), 9);
        let early_flush = medium.flush_begins();
        medium.set_size(1000);
        medium.set_size(4096);
        assert!(medium.visible()[1000..].iter().all(|byte| *byte == 0));
        medium.flush_succeeds(early_flush, &mut Random::new(1));
        assert_eq!(crashes(&medium, 1000, 9), ([4096].into(), false));
        let found = medium.extents(range(0, 4096), 9);
        assert_eq!(found.last().unwrap().status, ExtentStatus::Hole);
    }

    #[test]
    fn a_durable_write_behind_the_durable_end_makes_the_length_durable() {
        let mut medium = Medium::new(vec![1; 512]);
        medium.set_size(8192);
        write(&mut medium, range(4096, 4608), 7);
        medium.persist(range(4096, 4608));
        assert_eq!(medium.durable().len(), 8192);
        assert_eq!(crashes(&medium, 0, 7), ([8192].into(), true));
    }
}
