//! [`Context`]: one kind of thing that an export can say of its ranges; [`Described`]: what it says.
//!
//! Names and wildcards of contexts are read here, and what the core knows of a range is put into their flags.
//! Keeps nothing, asks nobody. Called by the handshake, by the replies, and by whoever answers a block status.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::request::ExtentsWanted;
use super::wire::{BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP, STATE_DIRTY, state};
use crate::dirty_bitmap::DirtyBitmap;
use crate::map::{Content, Mapping};
use crate::range::ByteRange;
use crate::storage::{Extent, ExtentStatus};

/// What a client may ask of the ranges of an export.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Context {
    /// `base:allocation`: holes and zeroes.
    Allocation,
    /// `qemu:allocation-depth`: in which layer a range is.
    Depth,
    /// `qemu:dirty-bitmap:NAME`: whether a range is dirty in the bitmap of that name.
    Bitmap(String),
}

impl Context {
    /// What it is called on the wire.
    #[must_use]
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::Allocation => BASE_ALLOCATION.into(),
            Self::Depth => QEMU_ALLOCATION_DEPTH.into(),
            Self::Bitmap(name) => format!("{QEMU_DIRTY_BITMAP}{name}").into(),
        }
    }

    /// The queries of a listing that mean it together with others.
    const fn wildcards(&self) -> &'static [&'static str] {
        match self {
            Self::Allocation => &["base:"],
            Self::Depth => &["qemu:"],
            Self::Bitmap(_) => &["qemu:", QEMU_DIRTY_BITMAP],
        }
    }

    /// Says whether one of `queries` selects it.
    #[must_use]
    pub fn is_selected(&self, queries: &BTreeSet<String>) -> bool {
        queries.contains(&*self.name())
    }

    /// Says whether a listing for `queries` has it; one without queries has all.
    #[must_use]
    pub fn is_listed(&self, queries: &BTreeSet<String>) -> bool {
        let means = |wildcard: &&str| queries.contains(*wildcard);
        queries.is_empty() || self.is_selected(queries) || self.wildcards().iter().any(means)
    }

    /// The id of the context that stands at `index` of an offer's list. Not 0, which listings have.
    #[must_use]
    pub fn id_at(index: usize) -> u32 {
        u32::try_from(index + 1).unwrap_or(u32::MAX)
    }

    /// Where in its offer's list the context with this id stands.
    #[must_use]
    pub fn index_of(id: u32) -> Option<usize> {
        usize::try_from(id.checked_sub(1)?).ok()
    }
}

/// A range and the flags that a context has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described {
    /// Where.
    pub range: ByteRange,
    /// The flags, as the context defines them.
    pub flags: u32,
}

impl Described {
    /// What `base:allocation` says of an extent.
    #[must_use]
    pub const fn allocation(extent: Extent) -> Self {
        let flags = match extent.status {
            ExtentStatus::Data => 0,
            ExtentStatus::Zero => state::ZERO,
            ExtentStatus::Hole => state::HOLE | state::ZERO,
            ExtentStatus::Absent => state::HOLE,
        };
        Self { range: extent.range, flags }
    }

    /// What `qemu:allocation-depth` says of `mappings`: 0 where no layer has anything, 1 for the export's own, and
    /// so on. `ends` are the sizes of the layers below that, from the top on: as with QEMU, what lies beyond the
    /// end of one and is nowhere above it counts as that layer's.
    #[must_use]
    pub fn depths(mappings: &[Mapping], ends: &[u64]) -> Vec<Self> {
        let mut list = Vec::new();
        for mapping in mappings {
            if mapping.content != Content::Hole {
                let flags = u32::try_from(mapping.depth + 1).unwrap_or(u32::MAX);
                list.push(Self { range: mapping.range, flags });
                continue;
            }
            let mut at = mapping.range.offset();
            while at < mapping.range.end() {
                let layer = ends.iter().position(|end| *end <= at);
                let above = &ends[..layer.unwrap_or(ends.len())];
                let next = above.iter().copied().min().unwrap_or(u64::MAX).min(mapping.range.end());
                let flags = layer.map_or(0, |layer| u32::try_from(layer + 2).unwrap_or(u32::MAX));
                list.push(Self { range: ByteRange::from_bounds(at, next), flags });
                at = next;
            }
        }
        list
    }

    /// What `qemu:dirty-bitmap:` says of `range`, in at most `max` pieces (but at least one). Without bits,
    /// which is so for a bitmap that was lost, all counts as dirty.
    #[must_use]
    pub fn dirty(range: ByteRange, bits: Option<&DirtyBitmap>, max: usize) -> Vec<Self> {
        let piece = |start: u64, end: u64, flags| Self { range: ByteRange::from_bounds(start, end), flags };
        let Some(bits) = bits else { return vec![piece(range.offset(), range.end(), STATE_DIRTY)] };
        let mut list = Vec::new();
        let mut at = range.offset();
        while at < range.end() && list.len() < max.max(1) {
            let run = bits.next_dirty(at, range.end() - at).filter(|run| run.offset() < range.end());
            let Some(run) = run else {
                list.push(piece(at, range.end(), 0));
                break;
            };
            if run.offset() > at {
                list.push(piece(at, run.offset(), 0));
            }
            let end = run.end().min(range.end());
            // A run never ends where it is asked from, but the loop must not depend on that.
            if end <= at {
                break;
            }
            list.push(piece(run.offset().max(at), end, STATE_DIRTY));
            at = end;
        }
        list
    }
}

/// What the wire says of `described` within `range`: lengths and flags; neighbours with the same flags are
/// one, at most `max` of them. What does not start where the one before ends, ends the list. Never empty
/// unless the range is: what nobody knows has no flags.
pub(super) fn statuses(
    range: ByteRange,
    described: &[Described],
    wanted: ExtentsWanted,
    max: usize,
) -> Vec<(u64, u32)> {
    let max = if wanted == ExtentsWanted::One { 1 } else { max.max(1) };
    let mut statuses: Vec<(u64, u32)> = Vec::new();
    let mut at = range.offset();
    for Described { range: described, flags } in described {
        let end = described.end().min(range.end());
        if described.offset() > at || end <= at {
            break;
        }
        let len = end - at;
        let is_full = statuses.len() == max;
        match statuses.last_mut() {
            Some((last, same)) if same == flags => *last += len,
            _ if is_full => break,
            _ => statuses.push((len, *flags)),
        }
        at = end;
    }
    if statuses.is_empty() && !range.is_empty() {
        statuses.push((range.len(), 0));
    }
    statuses
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queries(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn wildcards_list_and_do_not_select() {
        let all = [Context::Allocation, Context::Depth, Context::Bitmap("b".into())];
        let table: &[(&[&str], [bool; 3], [bool; 3])] = &[
            (&[], [true; 3], [false; 3]),
            (&["base:"], [true, false, false], [false; 3]),
            (&["qemu:"], [false, true, true], [false; 3]),
            (&["qemu:dirty-bitmap:"], [false, false, true], [false; 3]),
            (&["qemu:dirty-bitmap:b"], [false, false, true], [false, false, true]),
            (&["qemu:dirty-bitmap:c", "qemu:dirty-bitmap"], [false; 3], [false; 3]),
            (&["qemu:allocation-depth"], [false, true, false], [false, true, false]),
            (&["qemu:allocation-depth:"], [false; 3], [false; 3]),
            (&["base:allocation", "qemu:"], [true; 3], [true, false, false]),
            (&["x-other:thing", ""], [false; 3], [false; 3]),
        ];
        for (asked, listed, selected) in table {
            let asked = queries(asked);
            assert_eq!(all.each_ref().map(|context| context.is_listed(&asked)), *listed, "{asked:?}");
            assert_eq!(all.each_ref().map(|context| context.is_selected(&asked)), *selected, "{asked:?}");
        }
    }

    #[test]
    fn ids_are_found_again_and_0_is_none() {
        for index in [0, 1, 200] {
            assert_eq!(Context::index_of(Context::id_at(index)), Some(index));
        }
        assert_eq!(Context::index_of(0), None);
    }

    #[test]
    fn a_bitmap_is_described_within_the_range_only() {
        let bits = DirtyBitmap::new(1 << 20, 4096).unwrap();
        let range = ByteRange::from_bounds;
        bits.mark(range(8192, 16384));
        bits.mark(range(32768, 32769));
        let say = |from, to, max| -> Vec<_> {
            let list = Described::dirty(range(from, to), Some(&bits), max);
            list.iter().map(|said| (said.range.offset(), said.range.end(), said.flags)).collect()
        };
        let all = [(0, 8192, 0), (8192, 16384, 1), (16384, 32768, 0), (32768, 36864, 1), (36864, 1 << 20, 0)];
        assert_eq!(say(0, 1 << 20, 100), all);
        assert_eq!(say(0, 1 << 20, 2), all[..2]);
        assert_eq!(say(10000, 10001, 100), [(10000, 10001, 1)]);
        assert_eq!(say(100, 8192, 100), [(100, 8192, 0)]);
        assert_eq!(say(100, 8193, 100), [(100, 8192, 0), (8192, 8193, 1)]);
        let lost = Described::dirty(range(5, 10), None, 100);
        assert_eq!(lost, [Described { range: range(5, 10), flags: 1 }]);
    }

    #[test]
    fn a_hole_has_no_depth_and_the_first_layer_is_1() {
        let range = ByteRange::from_bounds(0, 1);
        let mapping = |depth, content| Mapping { range, depth, content, offset: None };
        let table = [
            (0, Content::Data, 1),
            (0, Content::Zero, 1),
            (0, Content::Hollow, 1),
            (2, Content::Compressed, 3),
            (3, Content::Hole, 0),
        ];
        for (depth, content, flags) in table {
            assert_eq!(Described::depths(&[mapping(depth, content)], &[8, 8]), [Described { range, flags }]);
        }
    }

    #[test]
    fn beyond_the_end_of_a_layer_a_hole_is_that_layers() {
        let range = ByteRange::from_bounds(10, 100);
        let hole = Mapping { range, depth: 0, content: Content::Hole, offset: None };
        let depths = |ends: &[u64]| -> Vec<_> {
            let list = Described::depths(&[hole], ends);
            list.iter().map(|said| (said.range.offset(), said.range.end(), said.flags)).collect()
        };
        assert_eq!(depths(&[]), [(10, 100, 0)]);
        assert_eq!(depths(&[100]), [(10, 100, 0)]);
        assert_eq!(depths(&[100, 50]), [(10, 50, 0), (50, 100, 3)]);
        assert_eq!(depths(&[60, 50]), [(10, 50, 0), (50, 60, 3), (60, 100, 2)]);
        assert_eq!(depths(&[10, 50]), [(10, 100, 2)]);
        assert_eq!(depths(&[50, 60]), [(10, 50, 0), (50, 100, 2)]);
    }
}
