//! [`Slices`]: pieces of L2 tables and refcount blocks in memory.
//!
//! Bounded by a budget of bytes, but never refuses: what is changed and not yet durable stays, and so does what
//! somebody is about to use, even beyond the budget; so an operation can always go on, and the next commit makes
//! room. Pure: loading and writing are done by [`super::commit`] and [`super::Qcow2`].

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::layout::Layout;
use crate::convert::usize_from;
use crate::range::ByteRange;

/// Bytes in a slice, where clusters are not smaller. A page: what the medium writes at once anyway.
const SLICE_SIZE_MAX: u64 = 4096;

/// The least number of slices: each operation in flight may need a few.
const COUNT_MIN: usize = 64;

/// The most slices of a new table that are kept: all of them, with the usual clusters.
const NEW_TABLE_SLICES: usize = 16;

/// Which kind of table a slice is a piece of. The two are written back at different moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Maps guest clusters.
    L2,
    /// Counts references to host clusters.
    Refcounts,
}

/// Pieces of tables, by their place in the image file.
pub(crate) struct Slices {
    slice_size: u64,
    count_max: usize,
    slices: BTreeMap<u64, Slice>,
    /// Who is looked at next for eviction.
    clock: VecDeque<u64>,
    dirty: usize,
}

struct Slice {
    bytes: Vec<u8>,
    kind: Kind,
    /// Changed since it was last taken for writing.
    dirty: bool,
    /// Written, but not known to be durable.
    undurable: bool,
    /// Looked at since the clock passed.
    used: bool,
    /// Who wants it to stay.
    pins: u32,
}

impl Slices {
    /// An empty cache of at most `budget` bytes.
    pub(crate) fn new(layout: Layout, budget: u64) -> Self {
        let slice_size = layout.cluster_size().min(SLICE_SIZE_MAX);
        let count = usize::try_from(budget / slice_size).unwrap_or(usize::MAX);
        Self {
            slice_size,
            count_max: count.max(COUNT_MIN),
            slices: BTreeMap::new(),
            clock: VecDeque::new(),
            dirty: 0,
        }
    }

    /// Bytes in a slice.
    pub(crate) const fn slice_size(&self) -> u64 {
        self.slice_size
    }

    /// Where the slice begins in which `offset` of the image file lies.
    pub(crate) const fn start_of(&self, offset: u64) -> u64 {
        offset & !(self.slice_size - 1)
    }

    /// The slice that begins at `start`, if it is here.
    pub(crate) fn get(&mut self, start: u64) -> Option<&[u8]> {
        let slice = self.slices.get_mut(&start)?;
        slice.used = true;
        Some(&slice.bytes)
    }

    /// The slice that begins at `start`, to be changed.
    pub(crate) fn get_mut(&mut self, start: u64) -> Option<&mut [u8]> {
        let slice = self.slices.get_mut(&start)?;
        slice.used = true;
        self.dirty += usize::from(!slice.dirty);
        slice.dirty = true;
        Some(&mut slice.bytes)
    }

    /// Says whether the slice is here.
    pub(crate) fn contains(&self, start: u64) -> bool {
        self.slices.contains_key(&start)
    }

    /// Takes in a slice as it stands in the image, and lets go of others. Does nothing where it is here already.
    pub(crate) fn insert(&mut self, start: u64, kind: Kind, bytes: Vec<u8>) {
        if self.contains(start) {
            return;
        }
        self.make_room();
        let slice = Slice { bytes, kind, dirty: false, undurable: false, used: true, pins: 0 };
        self.slices.insert(start, slice);
        self.clock.push_back(start);
    }

    /// Takes in the slices of a new table that is all zero in the file, too, if they are few.
    pub(crate) fn insert_zeroes(&mut self, table: ByteRange, kind: Kind) {
        let starts = (table.offset()..table.end()).step_by(usize_from(self.slice_size));
        for start in starts.take(NEW_TABLE_SLICES) {
            self.forget(start);
            self.insert(start, kind, vec![0; usize_from(self.slice_size)]);
        }
    }

    /// Takes in a slice that is all zero and has to be written.
    pub(crate) fn insert_new(&mut self, start: u64, kind: Kind) {
        let zeroes = vec![0; usize_from(self.slice_size)];
        self.insert_changed(start, kind, zeroes);
    }

    /// Takes in a slice that has to be written, in the place of one that may be here.
    pub(crate) fn insert_changed(&mut self, start: u64, kind: Kind, bytes: Vec<u8>) {
        self.forget(start);
        self.insert(start, kind, bytes);
        self.get_mut(start);
    }

    /// Lets go of a slice whose table is no more.
    pub(crate) fn forget(&mut self, start: u64) {
        if let Some(slice) = self.slices.remove(&start) {
            self.dirty -= usize::from(slice.dirty);
        }
    }

    /// Keeps a slice here until [`Slices::unpin`].
    pub(crate) fn pin(&mut self, start: u64) {
        if let Some(slice) = self.slices.get_mut(&start) {
            slice.pins += 1;
        }
    }

    /// Ends a [`Slices::pin`].
    pub(crate) fn unpin(&mut self, start: u64) {
        if let Some(slice) = self.slices.get_mut(&start) {
            slice.pins = slice.pins.saturating_sub(1);
        }
    }

    fn make_room(&mut self) {
        // Once around, and once more for those that had been used: then all that is left must stay.
        let mut looks = 2 * self.clock.len();
        while self.slices.len() >= self.count_max && looks > 0 {
            looks -= 1;
            let Some(start) = self.clock.pop_front() else { return };
            let Some(slice) = self.slices.get_mut(&start) else { continue };
            if slice.used || slice.dirty || slice.undurable || slice.pins > 0 {
                slice.used = false;
                self.clock.push_back(start);
            } else {
                self.slices.remove(&start);
            }
            if self.dirty >= self.slices.len() {
                return;
            }
        }
    }

    /// Slices that are changed and not written.
    pub(crate) const fn dirty(&self) -> usize {
        self.dirty
    }

    /// Says whether so much is changed that it should be written before more is.
    pub(crate) const fn wants_commit(&self) -> bool {
        self.dirty * 2 > self.count_max
    }

    /// Takes what is changed of one kind for writing, by place. Each must be given to [`Slices::written`] or
    /// [`Slices::failed`].
    pub(crate) fn take_dirty(&mut self, kind: Kind) -> Vec<(u64, Bytes)> {
        let mut taken = Vec::new();
        for (start, slice) in &mut self.slices {
            if slice.dirty && slice.kind == kind {
                slice.dirty = false;
                slice.undurable = true;
                taken.push((*start, Bytes::copy_from_slice(&slice.bytes)));
            }
        }
        self.dirty -= taken.len();
        taken
    }

    /// What was written is durable.
    pub(crate) fn durable(&mut self, starts: impl IntoIterator<Item = u64>) {
        for start in starts {
            if let Some(slice) = self.slices.get_mut(&start) {
                slice.undurable = false;
            }
        }
    }

    /// What was written may not have arrived, and has to be written again.
    pub(crate) fn failed(&mut self, starts: impl IntoIterator<Item = u64>) {
        for start in starts {
            if let Some(slice) = self.slices.get_mut(&start) {
                self.dirty += usize::from(!slice.dirty);
                slice.dirty = true;
                slice.undurable = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { cluster_bits: 16, refcount_order: 4, extended_l2: false, version: 3 };

    fn filled(count: u64) -> Slices {
        let mut slices = Slices::new(LAYOUT, 0);
        for index in 0..count {
            slices.insert(index << 12, Kind::L2, vec![0; 4096]);
        }
        slices
    }

    #[test]
    fn the_budget_holds_while_nothing_must_stay() {
        let slices = filled(1000);
        assert_eq!(slices.slices.len(), COUNT_MIN);
        assert_eq!(slices.clock.len(), COUNT_MIN);
    }

    #[test]
    fn what_is_changed_or_pinned_stays_beyond_the_budget() {
        let mut slices = filled(0);
        for index in 0..200 {
            slices.insert(index << 12, Kind::L2, vec![0; 4096]);
            if index % 2 == 0 {
                slices.get_mut(index << 12);
            } else {
                slices.pin(index << 12);
            }
        }
        assert_eq!((slices.slices.len(), slices.dirty()), (200, 100));
        assert!(slices.wants_commit());
        let taken = slices.take_dirty(Kind::L2);
        slices.insert(1 << 30, Kind::L2, vec![0; 4096]);
        assert_eq!(slices.slices.len(), 201, "what is not yet durable stays");
        slices.durable(taken.iter().map(|(start, _)| *start));
        for index in 0..200 {
            slices.unpin(index << 12);
        }
        slices.insert(1 << 31, Kind::L2, vec![0; 4096]);
        assert!(slices.slices.len() <= COUNT_MIN);
    }

    #[test]
    fn what_failed_is_taken_again_with_the_changes_since() {
        let mut slices = filled(1);
        slices.get_mut(0).unwrap()[0] = 1;
        let taken = slices.take_dirty(Kind::L2);
        assert_eq!((taken.len(), slices.dirty()), (1, 0));
        slices.get_mut(0).unwrap()[1] = 2;
        slices.failed([0]);
        assert_eq!(slices.dirty(), 1);
        assert_eq!(&slices.take_dirty(Kind::L2)[0].1[..2], [1, 2]);
        assert!(slices.take_dirty(Kind::Refcounts).is_empty());
    }
}
