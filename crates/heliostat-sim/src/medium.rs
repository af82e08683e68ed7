//! [`Medium`]: the bytes of a simulated storage, as they are read and as a crash would leave them.
//!
//! Bytes are durable by the sector. What was written since the last good flush is in the cache, and at a crash
//! any part of it may be there or not. A failed flush loses part of the cache for good: reads may still show
//! it, no later flush brings it back, and only writing it again does. It has no notion of time.

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
    durable: Vec<u8>,
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
        &self.durable
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
