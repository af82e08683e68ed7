//! What the bitmap promises, against a plain set of granules, and from many threads.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU32;

use proptest::prelude::*;

use super::*;

fn bitmap(size: u64, granularity: u32) -> DirtyBitmap {
    DirtyBitmap::new(size, granularity).unwrap()
}

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

#[test]
fn a_granularity_that_is_no_power_of_two_or_out_of_bounds_is_refused() {
    for granularity in [0, 1, 256, 513, 65_537, 3 << 30, u32::MAX] {
        let refusal = DirtyBitmap::new(1 << 20, granularity).unwrap_err();
        assert_eq!(refusal, InvalidGranularity::NotAllowed(granularity));
    }
    for shift in 9..=26 {
        assert_eq!(bitmap(1 << 30, 1 << shift).granularity(), 1 << shift);
    }
}

#[test]
fn more_bits_than_memory_are_refused_without_a_panic() {
    let refusal = DirtyBitmap::new(u64::MAX, 512).unwrap_err();
    assert_eq!(refusal, InvalidGranularity::TooFine { granularity: 512, size: u64::MAX });
}

#[test]
fn a_disk_without_a_byte_is_always_clean() {
    let empty = bitmap(0, 512);
    empty.mark_all();
    empty.mark(range(0, 1));
    empty.clear(range(0, u64::MAX));
    empty.merge(&bitmap(0, 4096));
    assert!(empty.is_clean());
    assert!(!empty.is_dirty(range(0, u64::MAX)));
    assert_eq!((empty.dirty_bytes(), empty.next_dirty(0, u64::MAX)), (0, None));
}

#[test]
fn what_lies_beyond_the_size_is_ignored() {
    let small = bitmap(10_000, 4096);
    small.mark(range(10_000, 4096));
    small.mark(range(u64::MAX, 0));
    assert!(small.is_clean());
    small.mark(range(9999, u64::MAX - 9999));
    assert_eq!(small.next_dirty(0, u64::MAX), Some(range(8192, 1808)));
    assert_eq!(small.dirty_bytes(), 1808);
    assert_eq!(small.next_dirty(10_000, u64::MAX), None);
    assert_eq!(small.next_dirty(u64::MAX, u64::MAX), None);
}

#[test]
fn an_empty_range_touches_nothing() {
    let disk = bitmap(1 << 20, 4096);
    disk.mark(range(4096, 0));
    assert!(disk.is_clean());
    disk.mark_all();
    assert_eq!(disk.take(range(5000, 0)), 0);
    assert!(!disk.is_dirty(range(4096, 0)));
    assert_eq!(disk.dirty_bytes(), 1 << 20);
}

#[test]
fn a_run_is_cut_at_the_length_asked_for_but_not_below_a_granule() {
    let disk = bitmap(1 << 20, 4096);
    disk.mark(range(4096, 8 * 4096));
    assert_eq!(disk.next_dirty(0, 10_000), Some(range(4096, 8192)));
    assert_eq!(disk.next_dirty(8192 + 5, 1), Some(range(8192, 4096)));
    assert_eq!(disk.next_dirty(8192 + 5, 0), Some(range(8192, 4096)));
    assert_eq!(disk.next_dirty(8192 + 5, u64::MAX), Some(range(8192, 7 * 4096)));
}

#[test]
fn one_dirty_granule_at_the_end_of_64_tib_is_found_and_then_gone() {
    let size = 64 << 40;
    let disk = bitmap(size, 64 << 10);
    assert_eq!(disk.next_dirty(0, u64::MAX), None);
    disk.mark(range(size - 1, 1));
    let last = range(size - 65_536, 65_536);
    assert_eq!(disk.next_dirty(0, u64::MAX), Some(last));
    assert_eq!(disk.take(range(0, size)), 65_536);
    assert!(disk.is_clean());
    assert_eq!(disk.next_dirty(0, u64::MAX), None);
}

#[test]
fn summaries_add_a_few_per_cent_to_the_leaves() {
    let disk = bitmap(64 << 40, 64 << 10);
    let bytes: Vec<usize> = disk.levels.iter().map(|level| level.capacity() * 8).collect();
    assert_eq!(bytes[0], 128 << 20);
    assert!(bytes.iter().sum::<usize>() < bytes[0] * 102 / 100, "{bytes:?}");
}

#[test]
fn a_scan_takes_away_the_summaries_of_what_was_cleared() {
    let disk = bitmap(64 * 64 * 64 * 512, 512);
    disk.mark_all();
    disk.clear(range(0, disk.size()));
    // Each scan leaves at most the path to where it ended for the next one, and that shorter by a level.
    for _ in &disk.levels {
        assert_eq!(disk.next_dirty(0, u64::MAX), None);
    }
    for level in &disk.levels {
        assert!(level.iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }
}

#[test]
fn a_copier_beside_two_writers_ends_with_what_they_wrote_last() {
    const GRANULES: usize = 5000;
    let disk: Vec<AtomicU32> = (0..GRANULES).map(|_| AtomicU32::new(0)).collect();
    let mut copy = vec![0; GRANULES];
    let marks = bitmap(u64_from(GRANULES) * 512, 512);
    let writers_left = AtomicU32::new(2);
    let writer = |seed: u64| {
        let mut state = seed;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Half of the writes go to a few granules, so that marks, clears and scans meet.
            let granule = usize_from(state >> 33) % (GRANULES * 2);
            let target = if granule < GRANULES { granule } else { granule % 70 };
            disk[target].fetch_add(1, Ordering::Relaxed);
            marks.mark(range(u64_from(target) * 512, 1));
        }
        writers_left.fetch_sub(1, Ordering::Release);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| writer(1));
        scope.spawn(|| writer(3));
        let mut from = 0;
        loop {
            let over = writers_left.load(Ordering::Acquire) == 0;
            match marks.next_dirty(from, 8 * 512) {
                Some(run) => {
                    marks.clear(run);
                    for granule in run.pieces(512).map(|piece| usize_from(piece.offset() / 512)) {
                        copy[granule] = disk[granule].load(Ordering::Relaxed);
                    }
                    from = run.end();
                }
                None if from == 0 && over => break,
                None => from = 0,
            }
        }
    });
    assert!(marks.is_clean());
    let written: Vec<u32> = disk.into_iter().map(AtomicU32::into_inner).collect();
    assert!(copy == written, "the copy misses a write");
}

/// What a bitmap should say: the numbers of the dirty granules, in the plainest form.
struct Model {
    size: u64,
    granularity: u64,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn touched(&self, range: ByteRange) -> std::ops::Range<u64> {
        let end = range.end().min(self.size);
        if range.offset() >= end {
            0..0
        } else {
            range.offset() / self.granularity..end.div_ceil(self.granularity)
        }
    }

    fn bytes(&self, granule: u64) -> ByteRange {
        let start = granule * self.granularity;
        ByteRange::from_bounds(start, (start + self.granularity).min(self.size))
    }

    fn dirty_bytes(&self) -> u64 {
        let whole = u64_from(self.dirty.len()) * self.granularity;
        let last = self.dirty.last().map(|granule| self.bytes(*granule).len());
        whole - last.map_or(0, |len| self.granularity - len)
    }

    fn mark(&mut self, range: ByteRange) {
        self.dirty.extend(self.touched(range));
    }

    fn take(&mut self, range: ByteRange) -> u64 {
        let before = self.dirty_bytes();
        let touched = self.touched(range);
        let mut rest = self.dirty.split_off(&touched.start);
        self.dirty.append(&mut rest.split_off(&touched.end));
        before - self.dirty_bytes()
    }

    fn next_dirty(&self, from: u64, max_len: u64) -> Option<ByteRange> {
        let first = *self.dirty.range(from / self.granularity..).next().filter(|_| from < self.size)?;
        let len_max = (max_len / self.granularity).max(1);
        let run = (first..).take_while(|granule| granule - first < len_max && self.dirty.contains(granule));
        Some(ByteRange::from_bounds(self.bytes(first).offset(), self.bytes(run.last()?).end()))
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Mark(ByteRange),
    Take(ByteRange),
    IsDirty(ByteRange),
    NextDirty(u64, u64),
    MarkAll,
    /// With a bitmap of this granularity (as a power of two) that has these ranges marked.
    Merge(u32, Vec<ByteRange>),
}

/// A disk: its size and the power of two that is its granularity.
fn disk() -> impl Strategy<Value = (u64, u32)> {
    let granules = prop_oneof![
        3 => Just(0_u64),
        5 => 1..4_u64,
        10 => 60..200_u64,
        10 => 4090..4200_u64,
        10 => 4200..20_000_u64,
        2 => 262_100..270_000_u64,
    ];
    (granules, 9..=26_u32).prop_flat_map(|(granules, shift)| {
        let granularity = 1 << shift;
        let tail = prop_oneof![Just(0), Just(1), Just(granularity - 1), 0..granularity];
        tail.prop_map(move |tail| (granules * granularity + tail, shift))
    })
}

/// A range on or across the end of a disk, often short, sometimes empty, at times longer than many words.
fn range_on(size: u64, shift: u32) -> impl Strategy<Value = ByteRange> {
    let len = prop_oneof![
        1 => Just(0),
        4 => 1..10_u64,
        8 => 0..300_u64 << shift,
        1 => 0..=size,
        1 => Just(1 << 62),
    ];
    (offset_on(size, shift), len).prop_map(|(offset, len)| range(offset, len))
}

/// An offset on a disk or a little beyond it, often at the start or the end.
fn offset_on(size: u64, shift: u32) -> impl Strategy<Value = u64> {
    let near_end = size.saturating_sub(2 << shift)..=size + (2 << shift);
    prop_oneof![4 => 0..=size, 2 => 0..=2_u64 << shift, 2 => near_end]
}

fn operation(size: u64, shift: u32) -> impl Strategy<Value = Operation> {
    let max_len = prop_oneof![Just(0), Just(u64::MAX), 0..200_u64 << shift];
    // Not so fine that the model has millions of granules.
    let other = (shift.saturating_sub(3).max(9)..=26, prop::collection::vec(range_on(size, shift), 0..4));
    prop_oneof![
        20 => range_on(size, shift).prop_map(Operation::Mark),
        15 => range_on(size, shift).prop_map(Operation::Take),
        10 => range_on(size, shift).prop_map(Operation::IsDirty),
        20 => (offset_on(size, shift), max_len).prop_map(|(from, max_len)| Operation::NextDirty(from, max_len)),
        1 => Just(Operation::MarkAll),
        3 => other.prop_map(|(shift, ranges)| Operation::Merge(shift, ranges)),
        1 => prop::collection::vec(range_on(size, shift), 0..4)
            .prop_map(move |ranges| Operation::Merge(shift, ranges)),
    ]
}

fn run(operation: Operation, real: &DirtyBitmap, model: &mut Model) {
    match operation {
        Operation::Mark(range) => {
            real.mark(range);
            model.mark(range);
        }
        Operation::Take(range) => assert_eq!(real.take(range), model.take(range)),
        Operation::IsDirty(range) => {
            let expected = model.dirty.range(model.touched(range)).next().is_some();
            assert_eq!(real.is_dirty(range), expected);
        }
        Operation::NextDirty(from, max_len) => {
            assert_eq!(real.next_dirty(from, max_len), model.next_dirty(from, max_len));
        }
        Operation::MarkAll => {
            real.mark_all();
            model.mark(range(0, model.size));
        }
        Operation::Merge(shift, ranges) => {
            let other = bitmap(model.size, 1 << shift);
            for marked in ranges {
                other.mark(marked);
                let clipped = marked.intersection(range(0, model.size));
                // What the other's granules touch, not only what was marked.
                model.mark(clipped.map_or(range(0, 0), |bytes| bytes.widen(1 << shift, model.size)));
            }
            let before = other.dirty_bytes();
            real.merge(&other);
            assert_eq!(other.dirty_bytes(), before);
        }
    }
    assert_eq!(real.dirty_bytes(), model.dirty_bytes());
    assert_eq!(real.is_clean(), model.dirty.is_empty());
}

fn disk_and_operations() -> impl Strategy<Value = (u64, u32, Vec<Operation>)> {
    disk().prop_flat_map(|(size, shift)| {
        (Just(size), Just(shift), prop::collection::vec(operation(size, shift), 1..40))
    })
}

proptest! {
    #[test]
    fn a_bitmap_says_what_a_set_of_granules_says((size, shift, operations) in disk_and_operations()) {
        let real = bitmap(size, 1 << shift);
        let mut model = Model { size, granularity: 1 << shift, dirty: BTreeSet::new() };
        for operation in operations {
            run(operation, &real, &mut model);
        }
        // Everything is found in the end, run by run.
        let mut from = 0;
        while let Some(expected) = model.next_dirty(from, u64::MAX) {
            assert_eq!(real.next_dirty(from, u64::MAX), Some(expected));
            from = expected.end();
        }
        assert_eq!(real.next_dirty(from, u64::MAX), None);
    }
}
