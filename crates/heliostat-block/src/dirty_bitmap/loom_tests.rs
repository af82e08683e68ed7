//! The promises in the head of `dirty_bitmap.rs`, each in all interleavings that loom knows.
//!
//! Run by `RUSTFLAGS="--cfg loom" cargo test -p heliostat-block --release loom_`. Words have two bits here:
//! granules 0 and 1 share a leaf, 0 to 3 a word of the first summary. A scan begins in the leaf where it is
//! told to, so what is to be found by the summaries lies elsewhere.
//!
//! Tried out: a mark that does not acquire or release, a shortcut by one relaxed load or past its fence, a clear
//! without its fence, a prune in another order or that looks by a load, summaries in another order or left
//! early, each way to count wrongly: some model fails for each. No model can fail for these, because the
//! argument in the head of `dirty_bitmap.rs` does without them; they are kept as the plain way to write it:
//!
//! - acquire and release of the `fetch_and` in `take`, and the order of the load before it: the fence behind
//!   them acquires, and a later mark's change continues the chain whatever stands between.
//! - the order of both changes of a summary in `prune`: what releases them is the look at the word below.
//! - release of the `fetch_or` in `mark_summaries`: as a change it carries on what the scan's look released.
//! - the order of a scan's and a merge's loads: they promise nothing of marks that have not returned, and for
//!   those that have, that order is there already. What is then read from the disk is ordered by `clear`.

use std::collections::BTreeSet;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread::{self, JoinHandle};

use super::*;

const GRANULE: u64 = 512;

fn bitmap_of(granules: u64) -> Arc<DirtyBitmap> {
    Arc::new(DirtyBitmap::new(granules * GRANULE, 512).unwrap())
}

fn granule(index: u64) -> ByteRange {
    ByteRange::from_bounds(index * GRANULE, (index + 1) * GRANULE)
}

/// A bitmap of 6 granules in which granule 4 was marked and cleared: clean, but summaries of both levels say
/// otherwise. A scan then takes away the lower one. Granule 4 is where a scan from 0 must go by both.
fn stale_bitmap(scans: u32) -> Arc<DirtyBitmap> {
    let bitmap = bitmap_of(6);
    bitmap.mark(granule(4));
    bitmap.clear(granule(4));
    for _ in 0..scans {
        assert_eq!(bitmap.next_dirty(0, GRANULE), None);
    }
    bitmap
}

fn spawn<T: 'static>(
    bitmap: &Arc<DirtyBitmap>,
    work: impl FnOnce(&DirtyBitmap) -> T + 'static,
) -> JoinHandle<T> {
    let bitmap = Arc::clone(bitmap);
    thread::spawn(move || work(&bitmap))
}

/// Checks what is too large for all interleavings, three threads or three levels: those with up to three
/// forced switches between threads, or `LOOM_MAX_PREEMPTIONS`.
fn large_model(work: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(3));
    model.check(work);
}

/// What must hold when nothing runs: summaries, scan, count and bits say the same.
fn assert_dirty(bitmap: &DirtyBitmap, expected: &[u64]) {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(run) = bitmap.next_dirty(from, GRANULE) {
        found.push(run.offset() / GRANULE);
        from = run.end();
    }
    assert_eq!(found, expected);
    assert_eq!(bitmap.dirty_bytes(), u64_from(expected.len()) * GRANULE);
    assert_eq!(bitmap.is_clean(), expected.is_empty());
    for index in expected {
        assert!(bitmap.is_dirty(granule(*index)));
    }
    for pair in bitmap.levels.windows(2) {
        for (index, word) in pair[0].iter().enumerate() {
            let above = pair[1][index / WORD_BITS].load(Ordering::Relaxed) >> (index % WORD_BITS) & 1;
            assert!(above == 1 || word.load(Ordering::Relaxed) == 0, "a word that no summary knows of");
        }
    }
}

/// The bytes of one granule of a disk: 1 once the guest's write is there. Unordered in itself, as memory that
/// a system call or a device writes.
#[derive(Clone)]
struct Disk(Arc<AtomicU64>);

impl Disk {
    fn new() -> Self {
        Self(Arc::new(AtomicU64::new(0)))
    }

    fn write(&self) {
        self.0.store(1, Ordering::Relaxed);
    }

    fn is_written(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 1
    }
}

/// One write of granule 0 beside one copy of `copied`.
fn write_beside_copy(bitmap: &Arc<DirtyBitmap>, copied: ByteRange) {
    let disk = Disk::new();
    let written = disk.clone();
    let writer = spawn(bitmap, move |bitmap| {
        written.write();
        bitmap.mark(granule(0));
    });
    bitmap.clear(copied);
    let seen = disk.is_written();
    writer.join().unwrap();
    assert!(seen || bitmap.is_dirty(granule(0)), "the copy missed the write, and the granule is clean");
    assert_eq!(bitmap.next_dirty(0, GRANULE).is_some(), bitmap.is_dirty(granule(0)));
}

#[test]
fn loom_a_copy_of_a_clean_granule_sees_the_write_or_leaves_it_dirty() {
    loom::model(|| write_beside_copy(&bitmap_of(2), granule(0)));
}

#[test]
fn loom_a_copy_of_a_dirty_granule_sees_the_write_or_leaves_it_dirty() {
    loom::model(|| {
        let bitmap = bitmap_of(2);
        bitmap.mark(granule(0));
        write_beside_copy(&bitmap, granule(0));
    });
}

#[test]
fn loom_a_copy_of_a_long_dirty_range_sees_the_write_or_leaves_it_dirty() {
    loom::model(|| {
        let bitmap = bitmap_of(6);
        bitmap.mark(granule(0));
        write_beside_copy(&bitmap, ByteRange::from_bounds(0, 6 * GRANULE));
    });
}

#[test]
fn loom_a_copy_that_finds_the_granule_cleared_by_another_sees_the_write_or_leaves_it_dirty() {
    large_model(|| {
        let bitmap = bitmap_of(2);
        bitmap.mark(granule(0));
        let disk = Disk::new();
        let written = disk.clone();
        let writer = spawn(&bitmap, move |bitmap| {
            written.write();
            bitmap.mark(granule(0));
        });
        let other = spawn(&bitmap, |bitmap| bitmap.clear(granule(0)));
        let taken = bitmap.take(granule(0));
        let seen = disk.is_written();
        writer.join().unwrap();
        other.join().unwrap();
        // What this copier takes itself, the other one may take again later, and then must read again.
        assert!(taken > 0 || seen || bitmap.is_dirty(granule(0)));
    });
}

#[test]
fn loom_a_copy_beside_two_writes_of_one_granule_misses_neither() {
    large_model(|| {
        let bitmap = bitmap_of(2);
        let disks = [Disk::new(), Disk::new()];
        let writers = disks.clone().map(|disk| {
            spawn(&bitmap, move |bitmap| {
                disk.write();
                bitmap.mark(granule(0));
            })
        });
        bitmap.clear(granule(0));
        let seen = disks.iter().all(Disk::is_written);
        for writer in writers {
            writer.join().unwrap();
        }
        assert!(seen || bitmap.is_dirty(granule(0)));
    });
}

#[test]
fn loom_clearing_a_granule_leaves_its_neighbour_in_the_word() {
    loom::model(|| {
        let bitmap = bitmap_of(2);
        bitmap.mark(granule(1));
        let writer = spawn(&bitmap, |bitmap| bitmap.mark(granule(0)));
        bitmap.clear(granule(1));
        writer.join().unwrap();
        assert_dirty(&bitmap, &[0]);
    });
}

#[test]
fn loom_a_granule_marked_and_cleared_at_once_is_counted_as_what_it_is() {
    large_model(|| {
        let bitmap = bitmap_of(2);
        let writers = [0, 1].map(|_| spawn(&bitmap, |bitmap| bitmap.mark(granule(0))));
        let taken = bitmap.take(granule(0));
        assert!(taken == 0 || taken == GRANULE);
        for writer in writers {
            writer.join().unwrap();
        }
        assert_dirty(&bitmap, if bitmap.is_dirty(granule(0)) { &[0] } else { &[] });
    });
}

#[test]
fn loom_a_granule_is_taken_once() {
    loom::model(|| {
        let bitmap = bitmap_of(2);
        bitmap.mark_all();
        let other = spawn(&bitmap, |bitmap| bitmap.take(granule(0)));
        let taken = bitmap.take(granule(0)) + other.join().unwrap();
        assert_eq!(taken, GRANULE);
        assert_dirty(&bitmap, &[1]);
    });
}

#[test]
fn loom_two_marks_are_both_found_whether_they_share_words_or_not() {
    for other in [0, 2, 4, 5] {
        large_model(move || {
            let bitmap = bitmap_of(6);
            let writer = spawn(&bitmap, move |bitmap| bitmap.mark(granule(other)));
            bitmap.mark(granule(4));
            writer.join().unwrap();
            let expected = BTreeSet::from([4, other]);
            assert_dirty(&bitmap, &Vec::from_iter(expected));
        });
    }
}

#[test]
fn loom_a_mark_beside_a_scan_that_clears_its_summaries_is_found_afterwards() {
    for (marked, scans) in [(4, 0), (4, 1), (5, 0), (5, 1), (2, 0)] {
        large_model(move || {
            let bitmap = stale_bitmap(scans);
            let writer = spawn(&bitmap, move |bitmap| bitmap.mark(granule(marked)));
            let found = bitmap.next_dirty(0, GRANULE);
            assert!(found.is_none_or(|run| run == granule(marked)));
            writer.join().unwrap();
            assert_dirty(&bitmap, &[marked]);
        });
    }
}

#[test]
fn loom_a_mark_that_has_returned_is_found_beside_another_mark() {
    // The other mark may have set the leaf, or a summary, and not yet what is above.
    for other in [4, 5] {
        large_model(move || {
            let bitmap = bitmap_of(6);
            let writer = spawn(&bitmap, move |bitmap| bitmap.mark(granule(other)));
            bitmap.mark(granule(4));
            assert_eq!(bitmap.next_dirty(0, GRANULE), Some(granule(4)));
            assert!(bitmap.is_dirty(ByteRange::from_bounds(0, 6 * GRANULE)));
            writer.join().unwrap();
        });
    }
}

#[test]
fn loom_a_mark_that_has_returned_is_found_beside_another_scan() {
    for scans in [0, 1] {
        large_model(move || {
            let bitmap = stale_bitmap(scans);
            let scanner = spawn(&bitmap, |bitmap| bitmap.next_dirty(0, GRANULE));
            bitmap.mark(granule(4));
            assert_eq!(bitmap.next_dirty(0, GRANULE), Some(granule(4)));
            scanner.join().unwrap();
            assert_dirty(&bitmap, &[4]);
        });
    }
}

#[test]
fn loom_a_mark_that_has_returned_is_found_beside_another_mark_and_a_scan() {
    for scans in [0, 1] {
        large_model(move || {
            let bitmap = stale_bitmap(scans);
            let writer = spawn(&bitmap, |bitmap| bitmap.mark(granule(5)));
            let scanner = spawn(&bitmap, |bitmap| bitmap.next_dirty(0, GRANULE));
            bitmap.mark(granule(5));
            assert_eq!(bitmap.next_dirty(0, GRANULE), Some(granule(5)));
            writer.join().unwrap();
            scanner.join().unwrap();
            assert_dirty(&bitmap, &[5]);
        });
    }
}

#[test]
fn loom_a_mark_that_has_returned_is_found_beside_a_clear_of_its_neighbour_and_a_scan() {
    large_model(|| {
        let bitmap = bitmap_of(6);
        bitmap.mark(granule(5));
        let copier = spawn(&bitmap, |bitmap| bitmap.clear(granule(5)));
        let scanner = spawn(&bitmap, |bitmap| bitmap.next_dirty(0, GRANULE));
        bitmap.mark(granule(4));
        assert_eq!(bitmap.next_dirty(0, GRANULE), Some(granule(4)));
        assert!(!bitmap.is_clean());
        copier.join().unwrap();
        scanner.join().unwrap();
        assert_dirty(&bitmap, &[4]);
    });
}

#[test]
fn loom_a_mark_that_has_returned_is_found_where_the_granule_was_cleared_and_marked_anew_meanwhile() {
    large_model(|| {
        let bitmap = bitmap_of(6);
        bitmap.mark(granule(4));
        let cleared = Arc::new(AtomicU64::new(0));
        let flag = Arc::clone(&cleared);
        let other = spawn(&bitmap, move |bitmap| {
            bitmap.clear(granule(4));
            flag.store(1, Ordering::Relaxed);
            let found = bitmap.next_dirty(0, GRANULE);
            bitmap.mark(granule(4));
            found
        });
        if cleared.load(Ordering::Relaxed) == 1 {
            bitmap.mark(granule(4));
            assert_eq!(bitmap.next_dirty(0, GRANULE), Some(granule(4)));
        }
        other.join().unwrap();
        assert_dirty(&bitmap, &[4]);
    });
}

#[test]
fn loom_a_bitmap_is_never_clean_after_a_mark_has_returned() {
    large_model(|| {
        let bitmap = bitmap_of(2);
        let writer = spawn(&bitmap, |bitmap| bitmap.mark(granule(1)));
        let copier = spawn(&bitmap, |bitmap| bitmap.clear(granule(1)));
        bitmap.mark(granule(0));
        assert!(!bitmap.is_clean());
        assert!(bitmap.dirty_bytes() >= GRANULE);
        writer.join().unwrap();
        copier.join().unwrap();
        assert_dirty(&bitmap, if bitmap.is_dirty(granule(1)) { &[0, 1] } else { &[0] });
    });
}

#[test]
fn loom_what_was_marked_before_is_merged_beside_a_mark() {
    loom::model(|| {
        let (source, target) = (bitmap_of(4), bitmap_of(4));
        source.mark(granule(3));
        let writer = spawn(&source, |source| source.mark(granule(2)));
        target.merge(&source);
        writer.join().unwrap();
        assert!(target.is_dirty(granule(3)));
        assert_dirty(&target, if target.is_dirty(granule(2)) { &[2, 3] } else { &[3] });
    });
}
