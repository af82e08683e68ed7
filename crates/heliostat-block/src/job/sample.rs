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
use crate::limits::{SAMPLE_LEN_MAX, SAMPLE_RECENT, SAMPLE_SPREAD};
use crate::range::ByteRange;

/// The places copied last.
#[derive(Default)]
pub(crate) struct Recent(VecDeque<u64>);

impl Recent {
    /// Remembers a copy that has ended well.
    pub(crate) fn copied(&mut self, range: ByteRange) {
        if self.0.len() == SAMPLE_RECENT {
            self.0.pop_front();
        }
        self.0.push_back(range.offset());
    }

    /// Where to look on a disk of `size` bytes, below `end`: at places that lie evenly, and at those copied last.
    pub(crate) fn places(&self, size: u64, granularity: u32, end: u64) -> Vec<ByteRange> {
        let granularity = u64::from(granularity);
        let granules = size.div_ceil(granularity);
        let count = granules.min(SAMPLE_SPREAD);
        let even = (0..count).map(|n| {
            // The product needs more than 64 bits on the largest disks; a step does not.
            (granules / count * n + granules % count * n / count) * granularity
        });
        let mut starts: Vec<_> = even.chain(self.0.iter().copied()).filter(|start| *start < end).collect();
        starts.sort_unstable();
        starts.dedup();
        let len = granularity.min(SAMPLE_LEN_MAX);
        starts.into_iter().map(|start| ByteRange::from_bounds(start, size.min(start + len))).collect()
    }
}

/// Says which of `places` differ.
///
/// # Errors
/// What a side says when it cannot be read.
pub(crate) async fn compare(route: &Route, places: Vec<ByteRange>) -> Result<Vec<ByteRange>, CopyError> {
    let mut differing = Vec::new();
    for place in places {
        let room = || Buffer::zeroed(usize_from(place.len()));
        let source = route.source.read_blocks(place.offset(), room()).await;
        let source = source.map_err(|error| (Operation::Read, error))?;
        let target = route.target.read_blocks(place.offset(), room()).await;
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

    #[test]
    fn places_lie_evenly_and_where_was_copied_last() {
        let mut recent = Recent::default();
        for n in 0..100 {
            recent.copied(ByteRange::from_bounds(n * 512, (n + 1) * 512));
        }
        let size = 1 << 40;
        let places = recent.places(size, 512, size);
        assert_eq!(
            u64::try_from(places.len()).unwrap(),
            SAMPLE_SPREAD + u64::try_from(SAMPLE_RECENT).unwrap()
        );
        assert!(places.windows(2).all(|pair| pair[0].end() <= pair[1].offset()));
        assert!(places.iter().any(|place| place.offset() == 99 * 512), "the last one");
        assert!(places.last().unwrap().offset() > size / 64 * 62);
        let half = recent.places(size, 512, size / 2);
        assert!(half.iter().all(|place| place.offset() < size / 2));
        let small = Recent::default().places(1000, 512, 1000);
        assert_eq!(small, [ByteRange::from_bounds(0, 512), ByteRange::from_bounds(512, 1000)]);
        assert!(Recent::default().places(0, 512, 0).is_empty());
        let huge = Recent::default().places(u64::MAX, 512, u64::MAX);
        assert_eq!(huge.last().unwrap().len(), 512);
    }
}
