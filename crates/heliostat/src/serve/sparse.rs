//! [`Scout`]: whether to look for holes before a read; [`plan`]: what to read then.
//!
//! A hole needs not be read and not be sent. Looking for one costs a call of the system, so it is done only before
//! long reads, and seldom where there were none. Pure. Called where requests are carried out.

use std::sync::atomic::{AtomicU32, Ordering};

use heliostat_block::range::ByteRange;
use heliostat_block::storage::Extent;

/// Shorter reads cost less than the look.
pub const LEN_MIN: u64 = 64 << 10;

/// Shorter holes cost more as a part of their own than as bytes.
const HOLE_MIN: u64 = 4 << 10;

/// What the document wants parts to be multiples of.
const UNIT: u64 = 512;

/// The most parts of one read, so that its answer is not mostly headers.
const PARTS_MAX: usize = 16;

/// Reads without a look after many looks in vain: the look costs each of them a sixty-fourth then.
const PAUSE_MAX: u32 = 63;

/// What is known of an export's holes.
#[derive(Debug, Default)]
pub struct Scout {
    /// Long reads without a look from now on.
    skip: AtomicU32,
    /// The same after the last look.
    pause: AtomicU32,
}

impl Scout {
    /// Says whether to look before a long read. The counts may be off by some where several threads ask at once.
    pub fn looks(&self) -> bool {
        let skip = self.skip.load(Ordering::Relaxed);
        if skip > 0 {
            self.skip.store(skip - 1, Ordering::Relaxed);
        }
        skip == 0
    }

    /// Takes note of what a look has found.
    pub fn learn(&self, found: bool) {
        let before = self.pause.load(Ordering::Relaxed);
        let pause = if found { 0 } else { (before * 2 + 1).min(PAUSE_MAX) };
        self.pause.store(pause, Ordering::Relaxed);
        self.skip.store(pause, Ordering::Relaxed);
    }
}

/// A part of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Is to be read.
    Read(ByteRange),
    /// Is known to be zeroes.
    Hole(ByteRange),
}

/// The parts of a read of `range`, of which `extents` say what they are as far as they go: all of it, in order.
/// What is not said is read.
#[must_use]
pub fn plan(range: ByteRange, extents: &[Extent]) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut at = range.offset();
    for hole in holes(range, extents) {
        if steps.len() + 2 >= PARTS_MAX {
            break;
        }
        if hole.offset() > at {
            steps.push(Step::Read(ByteRange::from_bounds(at, hole.offset())));
        }
        steps.push(Step::Hole(hole));
        at = hole.end();
    }
    if at < range.end() {
        steps.push(Step::Read(ByteRange::from_bounds(at, range.end())));
    }
    steps
}

/// The holes of `range` that are worth it, cut to units but at its ends.
fn holes(range: ByteRange, extents: &[Extent]) -> Vec<ByteRange> {
    let mut joined: Vec<ByteRange> = Vec::new();
    let mut at = range.offset();
    for extent in extents {
        let end = extent.range.end().min(range.end());
        if extent.range.offset() > at || end <= at {
            break;
        }
        if !extent.status.may_hold_data() {
            match joined.last_mut() {
                Some(last) if last.end() == at => *last = ByteRange::from_bounds(last.offset(), end),
                _ => joined.push(ByteRange::from_bounds(at, end)),
            }
        }
        at = end;
    }
    let cut = joined.into_iter().filter_map(|hole| {
        let start = if hole.offset() == range.offset() {
            hole.offset()
        } else {
            hole.offset().checked_next_multiple_of(UNIT)?
        };
        let end = if hole.end() == range.end() { hole.end() } else { hole.end() / UNIT * UNIT };
        (end >= start + HOLE_MIN).then(|| ByteRange::from_bounds(start, end))
    });
    cut.take(PARTS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use heliostat_block::storage::ExtentStatus::{self, Absent, Data, Hole, Zero};

    const K: u64 = 1 << 10;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start, end)
    }

    fn plan_of(extents: &[(u64, u64, ExtentStatus)]) -> Vec<Step> {
        let extents: Vec<_> = extents
            .iter()
            .map(|(start, end, status)| Extent { range: range(*start, *end), status: *status })
            .collect();
        plan(range(10, 256 * K), &extents)
    }

    #[test]
    fn a_plan_covers_all_of_the_read_and_reads_what_is_not_known_to_be_zeroes() {
        let all = range(10, 256 * K);
        assert_eq!(plan_of(&[]), [Step::Read(all)]);
        assert_eq!(plan_of(&[(10, 256 * K, Data)]), [Step::Read(all)]);
        assert_eq!(plan_of(&[(10, 256 * K, Absent)]), [Step::Read(all)]);
        assert_eq!(plan_of(&[(0, 999 * K, Hole)]), [Step::Hole(all)]);
        assert_eq!(
            plan_of(&[(10, 64 * K, Hole)]),
            [Step::Hole(range(10, 64 * K)), Step::Read(range(64 * K, 256 * K))]
        );
        assert_eq!(
            plan_of(&[
                (10, 64 * K, Data),
                (64 * K, 65 * K, Hole),
                (65 * K, 128 * K, Zero),
                (128 * K, 256 * K, Data)
            ]),
            [
                Step::Read(range(10, 64 * K)),
                Step::Hole(range(64 * K, 128 * K)),
                Step::Read(range(128 * K, 256 * K))
            ],
            "neighbours are one hole"
        );
        assert_eq!(
            plan_of(&[(20, 256 * K, Hole)]),
            [Step::Read(all)],
            "what does not begin at its start is not known"
        );
    }

    #[test]
    fn short_holes_are_read_and_long_ones_cut_to_units() {
        assert_eq!(
            plan_of(&[(10, 8 * K, Data), (8 * K, 12 * K - 1, Hole), (12 * K - 1, 256 * K, Data)]).len(),
            1
        );
        assert_eq!(
            plan_of(&[(10, 8 * K + 1, Data), (8 * K + 1, 64 * K + 1, Hole), (64 * K + 1, 256 * K, Data)]),
            [
                Step::Read(range(10, 8 * K + 512)),
                Step::Hole(range(8 * K + 512, 64 * K)),
                Step::Read(range(64 * K, 256 * K))
            ]
        );
    }

    #[test]
    fn a_disk_in_pieces_has_few_parts() {
        let pieces: Vec<_> =
            (0..32).map(|i| (i * 8 * K, (i + 1) * 8 * K, if i % 2 == 0 { Hole } else { Data })).collect();
        let extents: Vec<_> =
            pieces.iter().map(|(s, e, status)| Extent { range: range(*s, *e), status: *status }).collect();
        let steps = plan(range(0, 256 * K), &extents);
        assert!(steps.len() <= PARTS_MAX, "{}", steps.len());
        let len = |step: &Step| match step {
            Step::Read(range) | Step::Hole(range) => range.len(),
        };
        assert_eq!(steps.iter().map(len).sum::<u64>(), 256 * K);
        assert!(steps.iter().any(|step| matches!(step, Step::Hole(_))));
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_hole_brings_them_back() {
        let scout = Scout::default();
        let looks = |count: u32, found: bool| {
            let mut looks = 0;
            for _ in 0..count {
                if scout.looks() {
                    looks += 1;
                    scout.learn(found);
                }
            }
            looks
        };
        assert_eq!(looks(10, true), 10);
        assert!(looks(6400, false) <= 100 + 8);
        looks(64, true);
        assert_eq!(looks(10, true), 10);
    }
}
