//! What needs no other program to be judged: limits, the order of writes, a repair that stops anywhere.

use std::sync::Arc;

use super::super::create::{CreateOptions, Preallocation, create};
use super::super::entry::COPIED;
use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::test_memory::{Memory, run};
use super::references::References;
use super::*;
use crate::convert::u64_from;

/// An image of 1 MiB in clusters of 4 KiB, all of them mapped: refcount table, block, L1 and L2 table in the clusters
/// 1 to 4, data from cluster 5 on.
fn image() -> Vec<u8> {
    image_of(3)
}

fn image_of(version: u32) -> Vec<u8> {
    let memory = Memory::of(Vec::new());
    let options = CreateOptions {
        size: 1 << 20,
        cluster_bits: 12,
        version,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    run(create(&ImageFile::new(memory.clone()), None, &options)).unwrap();
    memory.content()
}

const L1: usize = 3 << 12;
const L2: usize = 4 << 12;
const BLOCK: usize = 2 << 12;

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn check_bytes(bytes: Vec<u8>, options: CheckOptions<'_>) -> Result<CheckReport, FormatError> {
    run(check(&ImageFile::new(Memory::of(bytes)), options))
}

#[test]
fn a_new_image_is_sound() {
    let report = check_bytes(image(), CheckOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.total_clusters, report.allocated_clusters, report.fragmented_clusters), (256, 256, 0));
    assert_eq!(report.image_end_offset, u64_from(image().len()));
}

#[test]
fn a_table_that_is_named_a_million_times_is_read_once() {
    let mut bytes = image();
    // An L1 table of a million entries, all of them the same L2 table.
    let entries = 1 << 20;
    let at = bytes.len();
    bytes.extend((0..entries).flat_map(|_| (u64_from(L2) | COPIED).to_be_bytes()));
    bytes[36..40].copy_from_slice(&u32::try_from(entries).unwrap().to_be_bytes());
    put(&mut bytes, 40, u64_from(at));
    let report = check_bytes(bytes, CheckOptions::default()).unwrap();
    assert_eq!(report.allocated_clusters, 256 * u64_from(entries));
    assert_eq!(report.exit_status(), 2);
    assert!(report.findings.len() <= 200 && report.findings_left_out > 0);
}

#[test]
fn memory_follows_what_is_in_use_and_has_a_limit() {
    let layout = crate::driver::qcow2::layout::Layout {
        cluster_bits: 9,
        refcount_order: 4,
        extended_l2: false,
        version: 3,
    };
    let mut references = References::new(layout, 1 << 60, 1 << 20);
    references.add(1 << 59, 512, 3).unwrap();
    references.add(1 << 20, 512, 1).unwrap();
    assert_eq!((references.get((1 << 59) / 512), references.get(5)), (3, 0));
    assert_eq!(references.end(), (1 << 59) / 512 + 1);
    // References that are far from each other cost a piece each.
    let full = (0..1000_u64).find_map(|index| references.add(index << 40, 512, 1).err());
    assert!(full.unwrap().to_string().contains("would take more than 1 MiB of memory"));
}

#[test]
fn a_count_that_is_at_its_largest_overflows_and_stays() {
    let layout = crate::driver::qcow2::layout::Layout {
        cluster_bits: 16,
        refcount_order: 1,
        extended_l2: false,
        version: 3,
    };
    let mut references = References::new(layout, 1 << 20, 1 << 20);
    assert_eq!(references.add(0, 1 << 16, 2).unwrap().overflows, 0);
    assert_eq!(references.add(0, 1 << 16, 3).unwrap().overflows, 2);
    assert_eq!(references.add(0, 1 << 16, 1).unwrap().overflows, 1);
    assert_eq!((references.get(0), references.uses(0)), (3, 6));
    assert!(references.add(1 << 21, 1, 1).unwrap().is_outside);
}

type Damage = fn(&mut Vec<u8>);

const DAMAGES: [Damage; 7] = [
    // A leak; a count too low; an entry that leads nowhere; no block; a block elsewhere; a block where none can be; two
    // entries that lead to one cluster.
    |bytes| bytes[BLOCK + 7] = 2,
    |bytes| bytes[BLOCK + 21] = 0,
    |bytes| put(bytes, L2 + 16, (9 << 40) | COPIED),
    |bytes| put(bytes, 1 << 12, 0),
    |bytes| put(bytes, 1 << 12, u64_from(L1)),
    |bytes| put(bytes, (1 << 12) + 8, 0x8_0200),
    |bytes| put(bytes, L2 + 8, (5 << 12) | COPIED),
];

/// Repairs, stops after each number of writes, and looks at what is left.
fn stop_anywhere(bytes: &[u8], judge: impl Fn(&[u8], &CheckReport, &CheckReport) -> bool) {
    let before = check_bytes(bytes.to_vec(), CheckOptions::default()).unwrap();
    assert!(!before.is_clean());
    let all = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    for writes in 0.. {
        let memory = Memory::until(writes, bytes.to_vec());
        let ended = run(check(&ImageFile::new(memory.clone()), all)).is_ok();
        let left = check_bytes(memory.content(), CheckOptions::default()).unwrap();
        assert!(judge(&memory.content(), &before, &left), "{writes} writes: {before:?} became {left:?}");
        let after = check_bytes(memory.content(), all).unwrap();
        assert!(after.is_clean(), "{writes} writes, then all: {after:?}");
        if ended {
            assert!(left.is_clean());
            return;
        }
    }
}

#[test]
fn a_repair_that_stops_anywhere_leaves_no_worse_image_and_the_next_one_ends_it() {
    for damage in DAMAGES {
        let mut bytes = image();
        damage(&mut bytes);
        stop_anywhere(&bytes, |bytes, before, left| {
            // Whoever opens it in between repairs counts and flags first, because it says that they may be wrong.
            let is_marked = bytes[79] & 1 != 0;
            left.structural <= before.structural && (left.corruptions <= before.corruptions || is_marked)
        });
    }
    // Version 2 has no such mark. The last damage is left out: between the count of a shared cluster and the flags of
    // both its entries there are two contradictions for one.
    for damage in &DAMAGES[..6] {
        let mut bytes = image_of(2);
        damage(&mut bytes);
        stop_anywhere(&bytes, |_, before, left| left.corruptions <= before.corruptions);
    }
}

#[test]
fn counts_of_an_image_that_was_not_closed_are_repaired_and_nothing_else_is() {
    let mut bytes = image();
    bytes[79] = 1;
    bytes[BLOCK + 21] = 0;
    bytes[BLOCK + 23] = 5;
    let memory = Memory::of(bytes.clone());
    let report = run(repair_dirty(&ImageFile::new(memory.clone()))).unwrap();
    assert!(report.is_clean());
    assert_eq!(memory.content()[79], 0);
    assert!(check_bytes(memory.content(), CheckOptions::default()).unwrap().is_clean());
    // Where a block cannot be used, all counts are made anew.
    let mut without_block = bytes.clone();
    put(&mut without_block, 1 << 12, 3 << 50);
    let memory = Memory::of(without_block);
    assert!(run(repair_dirty(&ImageFile::new(memory.clone()))).unwrap().is_clean());
    // An entry that leads nowhere is for the operator to decide.
    put(&mut bytes, L2 + 16, (9 << 40) | COPIED);
    let memory = Memory::of(bytes.clone());
    assert!(matches!(run(repair_dirty(&ImageFile::new(memory.clone()))), Err(FormatError::Invalid(_))));
    assert_eq!(memory.content(), bytes);
}

#[test]
fn what_cannot_grow_is_made_and_repaired_within_its_length() {
    let memory = Arc::new(Memory { can_resize: false, ..Memory::new(vec![7; 4 << 20]) });
    let options = CreateOptions { size: 1 << 20, cluster_bits: 12, ..CreateOptions::default() };
    run(create(&ImageFile::new(memory.clone()), None, &options)).unwrap();
    let mut bytes = memory.content();
    assert!(check_bytes(bytes.clone(), CheckOptions::default()).unwrap().is_clean());
    put(&mut bytes, 1 << 12, 3 << 50);
    let memory = Arc::new(Memory { can_resize: false, ..Memory::new(bytes) });
    let all = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    assert!(run(check(&ImageFile::new(memory.clone()), all)).unwrap().is_clean());
    assert_eq!(memory.content().len(), 4 << 20);
}

#[test]
fn giving_back_leaks_touches_nothing_where_tables_contradict_each_other() {
    let mut bytes = image();
    bytes[BLOCK + 7] = 2;
    put(&mut bytes, L2 + 16, (9 << 40) | COPIED);
    let memory = Memory::of(bytes.clone());
    let leaks = CheckOptions { repair: Repair::Leaks, ..CheckOptions::default() };
    let report = run(check(&ImageFile::new(memory.clone()), leaks)).unwrap();
    assert_eq!((report.leaks, memory.content() == bytes), (2, true));
    assert!(report.findings.iter().any(|finding| finding.text.starts_with("nothing is given back")));
}

#[test]
fn any_bytes_are_answered() {
    let good = image();
    let all = CheckOptions { repair: Repair::All, findings_max: 4, memory_max: 64 << 20, progress: None };
    // Every byte of the tables that the image has, and of the header.
    let places = (0..120).chain((1 << 12)..(1 << 12) + 16).chain(BLOCK..BLOCK + 16);
    for at in places.chain(L1..L1 + 16).chain(L2..L2 + 32) {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let _ = check_bytes(bytes.clone(), all);
            bytes.truncate(at.max(80));
            let _ = check_bytes(bytes, CheckOptions::default());
        }
    }
}
