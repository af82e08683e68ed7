//! Changes of named bitmaps, and what follows where, without anything beside them.

use super::*;
use crate::driver::null::{NullStorage, ReadsZero};
use crate::job::test_disk::{Ticking, node_of};

const SIZE: u64 = 1 << 20;

fn node(name: &str) -> Arc<Node> {
    node_of(name, Arc::new(NullStorage::new(SIZE, ReadsZero::Promised)), &Arc::new(Ticking::default()))
}

fn bits(granularity: u32) -> Arc<DirtyBitmap> {
    Arc::new(DirtyBitmap::new(SIZE, granularity).expect("it is allowed"))
}

fn add(node: &Arc<Node>, name: &str, granularity: u32) {
    change(&[(Arc::clone(node), Change::Add(NamedBitmap::new(name.to_owned(), bits(granularity))))]);
}

fn write(node: &Node, offset: u64) {
    node.watchers_of().mark(ByteRange::from_bounds(offset, offset + 1), None);
}

fn dirty(node: &Node, name: &str) -> Vec<u64> {
    let bitmap = node.named_bitmap(name).expect("it is there");
    let bits = bitmap.bits.expect("it can be used");
    let (mut found, mut from) = (Vec::new(), 0);
    while let Some(granule) = bits.next_dirty(from, 1) {
        found.push(granule.offset() / u64::from(bits.granularity()));
        from = granule.end();
    }
    found
}

#[test]
fn changes_are_made_in_their_order() {
    let node = node("n");
    add(&node, "x", 4096);
    write(&node, 0);
    let on_node = |change| (Arc::clone(&node), change);
    change(&[
        on_node(Change::Add(NamedBitmap::new("y".to_owned(), bits(512)))),
        on_node(Change::Record("y".to_owned(), false)),
        on_node(Change::Merge("y".to_owned(), vec![(Arc::clone(&node), "x".to_owned())])),
        on_node(Change::Clear("x".to_owned(), bits(4096))),
        on_node(Change::Merge("x".to_owned(), vec![(Arc::clone(&node), "x".to_owned())])),
    ]);
    write(&node, 5000);
    assert_eq!(dirty(&node, "x"), [1]);
    assert_eq!(dirty(&node, "y"), (0..8).collect::<Vec<_>>());
    change(&[on_node(Change::Remove("x".to_owned())), on_node(Change::Remove("nobody".to_owned()))]);
    assert_eq!(node.named_bitmaps().len(), 1);
}

#[test]
fn bitmaps_that_follow_keep_their_marks_and_hear_of_the_targets_writes() {
    let (source, target) = (node("s"), node("t"));
    add(&source, "mine", 4096);
    add(&source, "both", 4096);
    add(&target, "both", 8192);
    add(&target, "theirs", 4096);
    let off = |node: &Arc<Node>| (Arc::clone(node), Change::Record("both".to_owned(), false));
    write(&source, 0);
    write(&target, 40_000);
    change(&[off(&target)]);
    follow(&source, &target);
    write(&target, 80_000);
    assert!(source.named_bitmaps().is_empty());
    assert_eq!(dirty(&target, "mine"), [0, 19]);
    assert_eq!(
        dirty(&target, "both"),
        [0, 4, 9],
        "in the target's granules, and recording as the source's did"
    );
    assert_eq!(dirty(&target, "theirs"), [9, 19]);
}

#[test]
fn one_that_follows_to_a_longer_disk_hears_of_all_of_it() {
    let source = node("s");
    add(&source, "x", 4096);
    write(&source, 5000);
    let long = Arc::new(NullStorage::new(2 * SIZE, ReadsZero::Promised));
    let target = node_of("t", long, &Arc::new(Ticking::default()));
    follow(&source, &target);
    let granules = SIZE / 4096;
    let expected: Vec<_> = std::iter::once(1).chain(granules..2 * granules).collect();
    assert_eq!(dirty(&target, "x"), expected, "what the target has more is not known to be anything");
    let again = target.named_bitmap("x").expect("it is there");
    change(&[(
        Arc::clone(&target),
        Change::Clear(
            "x".to_owned(),
            Arc::new(DirtyBitmap::new(2 * SIZE, again.granularity).expect("it is allowed")),
        ),
    )]);
    write(&target, SIZE + 5000);
    assert_eq!(dirty(&target, "x"), [granules + 1]);
}

#[test]
fn one_that_finds_its_name_on_a_longer_disk_gives_it_all_that_is_longer() {
    let source = node("s");
    let storage = NullStorage::new(2 * SIZE, ReadsZero::Promised);
    let target = node_of("t", Arc::new(storage), &Arc::new(Ticking::default()));
    add(&source, "x", 512 << 10);
    let bits = Arc::new(DirtyBitmap::new(2 * SIZE, 512 << 10).expect("it is allowed"));
    change(&[(Arc::clone(&target), Change::Add(NamedBitmap::new("x".to_owned(), bits)))]);
    write(&source, 0);
    follow(&source, &target);
    assert_eq!(dirty(&target, "x"), [0, 2, 3]);
    assert!(source.named_bitmap("x").is_none());
}

#[test]
fn one_hears_of_all_of_a_disk_that_another_node_made_longer() {
    let node = node("n");
    add(&node, "x", 4096);
    write(&node, 0);
    node.watchers_of().write().resize(2 * SIZE);
    write(&node, SIZE + 5000);
    assert_eq!(dirty(&node, "x"), [0, SIZE / 4096 + 1]);
}

#[test]
fn one_that_nobody_can_use_takes_no_ones_place() {
    let (source, target) = (node("s"), node("t"));
    let broken = |name: &str| NamedBitmap {
        bits: None,
        persistent: true,
        ..NamedBitmap::new(name.to_owned(), bits(512))
    };
    change(&[(Arc::clone(&source), Change::Add(broken("x")))]);
    add(&target, "x", 512);
    add(&source, "y", 512);
    write(&source, 600);
    change(&[(Arc::clone(&target), Change::Add(broken("y")))]);
    follow(&source, &target);
    assert!(dirty(&target, "x").is_empty());
    assert_eq!(dirty(&target, "y"), [1], "what can be used takes the place of what cannot");
    assert!(!target.named_bitmap("y").expect("it is there").persistent, "there is no place for it");
}
