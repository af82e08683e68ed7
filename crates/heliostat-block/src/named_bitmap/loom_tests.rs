//! Changes at one moment, beside the mark of a write, in all interleavings.

use loom::sync::Arc as Shared;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::*;

const DISK: ByteRange = ByteRange::from_bounds(0, 512);

fn bits() -> Arc<DirtyBitmap> {
    Arc::new(DirtyBitmap::new(512, 512).unwrap())
}

fn with(names: &[&str]) -> Shared<Watchers> {
    let named = names.iter().map(|name| NamedBitmap::new((*name).to_owned(), bits()));
    Shared::new(Watchers::with(named.collect()))
}

fn is_dirty(watchers: &Watchers, name: &str) -> bool {
    watchers.read().bits(name).unwrap().is_dirty(DISK)
}

/// A guest's write to a disk of one byte: it ends, is marked, and the guest hears of it.
fn write(disk: &AtomicBool, watchers: &Watchers) {
    disk.store(true, Ordering::Relaxed);
    watchers.mark(DISK, None);
}

#[test]
fn loom_what_is_read_after_a_clear_has_the_write_or_the_write_is_marked() {
    loom::model(|| {
        let (watchers, disk) = (with(&["x"]), Shared::new(AtomicBool::new(false)));
        let guest = thread::spawn({
            let (watchers, disk) = (Shared::clone(&watchers), Shared::clone(&disk));
            move || write(&disk, &watchers)
        });
        watchers.write().apply(&Change::Clear("x".to_owned(), bits()), &[]);
        let copied = disk.load(Ordering::Relaxed);
        guest.join().unwrap();
        assert!(copied || is_dirty(&watchers, "x"));
    });
}

#[test]
fn loom_a_bitmap_that_is_switched_on_has_the_write_or_what_is_read_then_has_it() {
    loom::model(|| {
        let (watchers, disk) = (with(&["x"]), Shared::new(AtomicBool::new(false)));
        watchers.write().apply(&Change::Record("x".to_owned(), false), &[]);
        let guest = thread::spawn({
            let (watchers, disk) = (Shared::clone(&watchers), Shared::clone(&disk));
            move || write(&disk, &watchers)
        });
        watchers.write().apply(&Change::Record("x".to_owned(), true), &[]);
        let copied = disk.load(Ordering::Relaxed);
        guest.join().unwrap();
        assert!(copied || is_dirty(&watchers, "x"));
    });
}

#[test]
fn loom_a_mark_is_in_what_was_merged_or_in_what_was_cleared_and_in_one_alone() {
    loom::model(|| {
        let watchers = with(&["x", "sum"]);
        watchers.write().apply(&Change::Record("sum".to_owned(), false), &[]);
        let guest = thread::spawn({
            let watchers = Shared::clone(&watchers);
            move || watchers.mark(DISK, None)
        });
        {
            let mut held = watchers.write();
            let from = held.bits("x").unwrap();
            held.apply(&Change::Merge("sum".to_owned(), Vec::new()), &[from]);
            held.apply(&Change::Clear("x".to_owned(), bits()), &[]);
        }
        guest.join().unwrap();
        assert_ne!(is_dirty(&watchers, "x"), is_dirty(&watchers, "sum"));
    });
}

#[test]
fn loom_a_cut_over_two_nodes_has_no_write_without_the_one_that_its_guest_made_before() {
    loom::model(|| {
        let nodes = [with(&["x"]), with(&["x"])];
        let before = [&nodes[0], &nodes[1]].map(|node| node.read().bits("x").unwrap());
        let guest = thread::spawn({
            let nodes = nodes.clone();
            move || nodes.iter().for_each(|node| node.mark(DISK, None))
        });
        {
            let mut held = [nodes[0].write(), nodes[1].write()];
            held.iter_mut().for_each(|held| held.apply(&Change::Clear("x".to_owned(), bits()), &[]));
        }
        guest.join().unwrap();
        let [first, second] = before.map(|bits| bits.is_dirty(DISK));
        assert!(first || !second, "the second write is before the cut and the first is not");
    });
}
