//! [`Load`]: what the demo's guest asks next, and which of its blocks are in use meanwhile.
//!
//! A mix as a busy machine makes it: mostly small writes, most of them to a small hot part of the disk, the
//! rest anywhere, holes included; reads that are checked; some zeroes and trims; a flush now and then. Pure:
//! the seed fixes every choice.

use std::ops::Range;

use heliostat_block::convert::{u64_from, usize_from};

use super::random::Random;

/// What the guest asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Write these blocks.
    Write(Range<u64>),
    /// Read these blocks and compare them with the record.
    Read(Range<u64>),
    /// Make these blocks zero.
    Zero(Range<u64>),
    /// These blocks are no longer needed.
    Trim(Range<u64>),
    /// Make everything durable that was acknowledged.
    Flush,
}

/// The part of the disk that gets most requests: one block in so many.
const HOT_ONE_IN: u64 = 32;

/// Tries to find blocks that nobody uses at the moment. A few requests are in flight among many thousand
/// blocks, so one or two are enough; the bound is for tiny disks.
const TRIES: usize = 16;

/// A guest's choices.
#[derive(Debug)]
pub struct Load {
    random: Random,
    /// Blocks that a request in flight touches.
    in_use: Vec<bool>,
}

impl Load {
    /// A load on a disk of `blocks` blocks (at least one).
    #[must_use]
    pub fn new(seed: u64, blocks: u64) -> Self {
        Self { random: Random::new(seed), in_use: vec![false; usize_from(blocks.max(1))] }
    }

    /// Chooses the next request and keeps its blocks until they are released. A flush, where no blocks are free.
    pub fn next(&mut self) -> Wanted {
        let dice = self.random.below(100);
        let (blocks_max, make): (u64, fn(Range<u64>) -> Wanted) = match dice {
            0..70 => (self.write_len(), Wanted::Write),
            70..91 => (8, Wanted::Read),
            91..95 => (64, Wanted::Zero),
            95..98 => (64, Wanted::Trim),
            _ => return Wanted::Flush,
        };
        for _ in 0..TRIES {
            let blocks = self.place(blocks_max);
            if self.keep(&blocks) {
                return make(blocks);
            }
        }
        Wanted::Flush
    }

    /// How long a write is at most: mostly one block, as databases write, now and then up to 64 KiB.
    const fn write_len(&mut self) -> u64 {
        if self.random.percent(70) { 1 } else { 16 }
    }

    fn place(&mut self, len_max: u64) -> Range<u64> {
        let blocks = u64_from(self.in_use.len());
        let span = if self.random.percent(80) { (blocks / HOT_ONE_IN).max(1) } else { blocks };
        // The hot part lies in the middle, so that the first pass of a mirror comes by it while it is hot.
        let start = (blocks - span) / 2 + self.random.below(span);
        let len = 1 + self.random.below(len_max);
        start..(start + len).min(blocks)
    }

    fn keep(&mut self, blocks: &Range<u64>) -> bool {
        let wanted = &mut self.in_use[usize_from(blocks.start)..usize_from(blocks.end)];
        if wanted.iter().any(|used| *used) {
            return false;
        }
        wanted.fill(true);
        true
    }

    /// Lets go of the blocks of a request that has been answered.
    pub fn release(&mut self, blocks: &Range<u64>) {
        self.in_use[usize_from(blocks.start)..usize_from(blocks.end)].fill(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks_of(wanted: &Wanted) -> Option<Range<u64>> {
        match wanted {
            Wanted::Write(blocks) | Wanted::Read(blocks) | Wanted::Zero(blocks) | Wanted::Trim(blocks) => {
                Some(blocks.clone())
            }
            Wanted::Flush => None,
        }
    }

    #[test]
    fn requests_in_flight_never_share_a_block() {
        let mut load = Load::new(5, 300);
        let mut kept: Vec<Range<u64>> = Vec::new();
        for round in 0..20_000_usize {
            if let Some(blocks) = blocks_of(&load.next()) {
                assert!(!blocks.is_empty() && blocks.end <= 300);
                assert!(kept.iter().all(|other| other.end <= blocks.start || blocks.end <= other.start));
                kept.push(blocks);
            }
            if kept.len() > 8 {
                let index = round % kept.len();
                load.release(&kept.swap_remove(index));
            }
        }
    }

    #[test]
    fn every_kind_of_request_comes_and_the_hot_part_gets_most() {
        let mut load = Load::new(1, 100_000);
        let mut hot = 0;
        let mut kinds = [0; 5];
        for _ in 0..10_000 {
            let wanted = load.next();
            kinds[match &wanted {
                Wanted::Write(_) => 0,
                Wanted::Read(_) => 1,
                Wanted::Zero(_) => 2,
                Wanted::Trim(_) => 3,
                Wanted::Flush => 4,
            }] += 1;
            if let Some(blocks) = blocks_of(&wanted) {
                load.release(&blocks);
                hot += u64::from((48_000..52_000).contains(&blocks.start));
            }
        }
        assert!(kinds.iter().all(|count| *count > 50), "{kinds:?}");
        assert!(hot > 7_000, "{hot}");
    }

    #[test]
    fn a_disk_of_one_block_is_no_trouble() {
        let mut load = Load::new(1, 1);
        for _ in 0..100 {
            load.next();
        }
    }
}
