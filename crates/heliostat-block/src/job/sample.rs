//! A sample of what should be equal on both sides: which granules, and whether they are.
//!
//! A target that was cut off and is back may be another one, or an older one: an empty disk in its place, a snapshot
//! that somebody went back to. What it shows of granules that are known to be copied tells, as far as a sample can.
//! Decides nothing; called by `mirror`.

use std::collections::VecDeque;

use super::Operation;
use super::copy::{CopyError, Route};
use crate::buffer::Buffer;
use crate::convert::usize_from;
use crate::dirty_bitmap::DirtyBitmap;
use crate::limits::{SAMPLE_KEPT, SAMPLE_LEN_MAX, SAMPLE_RECENT, SAMPLE_SPREAD};
use crate::range::ByteRange;

/// Places that were copied, or got a guest's write beside the source: the first [`SAMPLE_LEN_MAX`] bytes of each.
pub(crate) struct CopiedPlaces {
    /// The last ones.
    last: VecDeque<ByteRange>,
    /// One of each so many of those that got data, from the first on.
    kept: Vec<ByteRange>,
    keeps_every: u64,
    with_data: u64,
}

/// Where both sides are known to be equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Wherever it is clean: everything was to be copied.
    Clean,
    /// Where it is clean and was copied by this job: the rest is the business of whoever made the target.
    Copied,
}

/// What can be compared.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Comparable {
    /// These places.
    Places(Vec<ByteRange>),
    /// Nothing at this moment, though not everything will be copied again.
    NotNow,
    /// Nothing: everything will be copied again.
    Nothing,
}

impl Default for CopiedPlaces {
    fn default() -> Self {
        Self { last: VecDeque::new(), kept: Vec::new(), keeps_every: 1, with_data: 0 }
    }
}

impl CopiedPlaces {
    /// Remembers a copy that has ended well; `has_data`: it was not all zeroes.
    pub(crate) fn copied(&mut self, range: ByteRange, has_data: bool) {
        if self.last.len() == SAMPLE_RECENT {
            self.last.pop_front();
        }
        let place = range.pieces(SAMPLE_LEN_MAX).next().unwrap_or(range);
        self.last.push_back(place);
        if !has_data {
            return;
        }
        if self.with_data.is_multiple_of(self.keeps_every) {
            self.kept.push(place);
        }
        self.with_data += 1;
        if self.kept.len() == SAMPLE_KEPT {
            let mut keeps = false;
            self.kept.retain(|_| {
                keeps = !keeps;
                keeps
            });
            self.keeps_every *= 2;
        }
    }

    /// Where to look, below `end`: at clean places that lie as evenly as may be, if all of those are `known`, at some that
    /// got data, and at those copied last. Only where `is_still` says that nothing is on its way.
    pub(crate) fn comparable(
        &self,
        dirty: &DirtyBitmap,
        end: u64,
        known: Known,
        is_still: impl Fn(ByteRange) -> bool,
    ) -> Comparable {
        let end = end.min(dirty.size());
        let copied = self.kept.iter().chain(&self.last);
        let copied = copied.filter_map(|place| place.intersection(ByteRange::from_bounds(0, end)));
        let mut places = match known {
            Known::Clean => spread(dirty, end),
            Known::Copied => copied.clone().collect(),
        };
        if places.is_empty() {
            return Comparable::Nothing;
        }
        if known == Known::Clean {
            places.extend(copied);
        }
        places.sort_unstable();
        places.dedup();
        places.retain(|place| is_still(*place));
        if places.is_empty() { Comparable::NotNow } else { Comparable::Places(places) }
    }
}

/// Clean places below `end` that lie as evenly as may be.
fn spread(dirty: &DirtyBitmap, end: u64) -> Vec<ByteRange> {
    let granularity = u64::from(dirty.granularity());
    let len = granularity.min(SAMPLE_LEN_MAX);
    let granules = end.div_ceil(granularity);
    let count = granules.min(SAMPLE_SPREAD);
    // The product needs more than 64 bits on the largest disks; a step does not.
    let bound =
        |n: u64| (granules / count * n + granules % count * n / count).saturating_mul(granularity).min(end);
    let starts = (0..count).filter_map(|n| first_clean(dirty, bound(n), bound(n + 1)));
    starts.map(|start| ByteRange::from_bounds(start, end.min(start.saturating_add(len)))).collect()
}

/// The first granule that is clean, of those that start from `from` to `end`.
fn first_clean(dirty: &DirtyBitmap, from: u64, end: u64) -> Option<u64> {
    let mut at = from;
    while at < end {
        match dirty.next_dirty(at, end - at) {
            Some(run) if run.offset() <= at => at = run.end(),
            _ => return Some(at),
        }
    }
    None
}

/// Says which of `places` differ.
///
/// # Errors
/// What a side says when it cannot be read.
pub(crate) async fn compare(route: &Route, places: Vec<ByteRange>) -> Result<Vec<ByteRange>, CopyError> {
    let mut differing = Vec::new();
    for place in places {
        route.go_on(place)?;
        let room = || Buffer::zeroed(usize_from(place.len()));
        let source = route.patience.lend(route.source.read_blocks(place.offset(), room())).await;
        let source = source.map_err(|error| (Operation::Read, error))?;
        route.go_on(place)?;
        let target = route.at_target.carry_out(route.target.read_blocks(place.offset(), room())).await;
        let target = target.map_err(|error| (Operation::Write, error))?;
        if source[..] != target[..] {
            differing.push(place);
        }
    }
    Ok(differing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_of(copied: &CopiedPlaces, dirty: &DirtyBitmap, end: u64) -> Vec<ByteRange> {
        match copied.comparable(dirty, end, Known::Clean, |_| true) {
            Comparable::Places(places) => places,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn places_lie_evenly_and_where_was_copied_last() {
        let mut copied = CopiedPlaces::default();
        for n in 0..100 {
            copied.copied(ByteRange::from_bounds(n * 512, (n + 1) * 512), false);
        }
        let size = 1 << 32;
        let dirty = DirtyBitmap::new(size, 512).unwrap();
        let places = all_of(&copied, &dirty, size);
        assert_eq!(
            u64::try_from(places.len()).unwrap(),
            SAMPLE_SPREAD + u64::try_from(SAMPLE_RECENT).unwrap()
        );
        assert!(places.windows(2).all(|pair| pair[0].end() <= pair[1].offset()));
        assert!(places.iter().any(|place| place.offset() == 99 * 512), "the last one");
        assert!(places.last().unwrap().offset() > size / 64 * 62);
        let half = all_of(&copied, &dirty, size / 2);
        assert!(half.iter().all(|place| place.offset() < size / 2));
        let small = DirtyBitmap::new(1000, 512).unwrap();
        let small = all_of(&CopiedPlaces::default(), &small, 1000);
        assert_eq!(small, [ByteRange::from_bounds(0, 512), ByteRange::from_bounds(512, 1000)]);
        let none = CopiedPlaces::default().comparable(&dirty, 0, Known::Clean, |_| true);
        assert_eq!(none, Comparable::Nothing);
    }

    #[test]
    fn of_what_is_dirty_its_clean_neighbour_is_compared() {
        let dirty = DirtyBitmap::new(1 << 20, 512).unwrap();
        for n in 0..64 {
            dirty.mark(ByteRange::from_bounds(n << 14, (n << 14) + 1024));
        }
        let places = all_of(&CopiedPlaces::default(), &dirty, 1 << 20);
        assert_eq!(places.len(), 64);
        assert!(places.iter().all(|place| place.offset() % (1 << 14) == 1024));
        dirty.mark_all();
        let none = |_| panic!("nothing is clean");
        assert_eq!(
            CopiedPlaces::default().comparable(&dirty, 1 << 20, Known::Clean, none),
            Comparable::Nothing
        );
        dirty.clear(ByteRange::from_bounds(512, 1024));
        assert_eq!(
            CopiedPlaces::default().comparable(&dirty, 1 << 20, Known::Clean, |_| false),
            Comparable::NotNow
        );
        assert_eq!(all_of(&CopiedPlaces::default(), &dirty, 1 << 20), [ByteRange::from_bounds(512, 1024)]);
    }

    #[test]
    fn of_a_small_part_that_was_copied_many_places_are_compared() {
        let mut copied = CopiedPlaces::default();
        for n in 0..10_000 {
            copied.copied(ByteRange::from_bounds(n << 12, (n + 1) << 12), true);
        }
        let dirty = DirtyBitmap::new(1 << 40, 1 << 16).unwrap();
        dirty.mark(ByteRange::from_bounds(40_960_000, 1 << 40));
        let places = all_of(&copied, &dirty, 1 << 40);
        assert!(places.len() >= SAMPLE_KEPT / 2, "{}", places.len());
    }

    #[test]
    fn where_only_what_was_copied_is_known_nothing_else_is_compared() {
        let dirty = DirtyBitmap::new(1 << 20, 1 << 16).unwrap();
        let mut copied = CopiedPlaces::default();
        let comparable = |copied: &CopiedPlaces| copied.comparable(&dirty, 1 << 20, Known::Copied, |_| true);
        assert_eq!(comparable(&copied), Comparable::Nothing, "nothing was copied");
        let [long, part] =
            [(1 << 16, 3 << 16), (700, 4000)].map(|(from, to)| ByteRange::from_bounds(from, to));
        copied.copied(long, true);
        // A guest's write is known to be there; the rest of its granule is not.
        copied.copied(part, true);
        let first = ByteRange::from_bounds(1 << 16, 2 << 16);
        assert_eq!(comparable(&copied), Comparable::Places(vec![part, first]));
    }
}
