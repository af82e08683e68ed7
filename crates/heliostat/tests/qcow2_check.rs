//! `heliostat check` beside `qemu-img check`, over images that are damaged byte by byte: equal verdicts, equal counts,
//! and each accepts what the other has put right.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qcow2;

use std::path::Path;

use common::{folder, heliostat, tool};
use qcow2::Afterwards::{Left, Sound, SoundAfterLong};
use qcow2::{Afterwards, COMPRESSED, COPIED, Image, compare, our_check, qemu, qemu_check};

type Case = (&'static str, fn(&mut Image), Afterwards);

const WRITES: [&str; 5] =
    ["write 0 1M", "write 2M 64k", "write 10M 128k", "write -c 20M 64k", "write -z 30M 64k"];

const L1_LOST: Afterwards = Left("without its active L1 table everything would be given up");
const NOT_OPENED: Afterwards = Left("neither program opens such a header");

fn has_tools() -> bool {
    tool("qemu-img").is_some() && tool("qemu-io").is_some()
}

fn compare_all(folder: &Path, base: &Image, cases: &[Case]) {
    for (name, damage, afterwards) in cases {
        compare(folder, name, &base.damaged(damage), *afterwards);
    }
}

#[test]
fn wrong_counts_and_flags_are_counted_and_put_right_alike() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &WRITES);
    let cases: [Case; 14] = [
        ("nothing", |_| {}, Sound),
        ("leaked beyond the end", |image| image.set_count(60, 1), Sound),
        ("leaked table", |image| image.set_count(3, 2), Sound),
        ("count too high", |image| image.set_count(6, 2), Sound),
        ("count too low", |image| image.set_count(6, 0), Sound),
        ("count too low, and a leak", |image| (image.set_count(6, 0), image.set_count(3, 2)).0, Sound),
        ("COPIED missing in L2", |image| image.change_l2(1, |entry| entry & !COPIED), Sound),
        ("COPIED missing in L1", |image| image.set_l1(image.l2()), Sound),
        ("L2 table not counted", |image| image.set_count(4, 0), Sound),
        ("L2 table counted twice", |image| image.set_count(4, 2), Sound),
        ("header not counted", |image| image.set_count(0, 0), Sound),
        ("refcount table not counted", |image| image.set_count(1, 0), Sound),
        ("refcount block not counted", |image| image.set_count(2, 0), Sound),
        (
            "shared without COPIED",
            |image| {
                image.set_count(6, 2);
                image.change_l2(1, |entry| entry & !COPIED);
            },
            Sound,
        ),
    ];
    compare_all(folder.path(), &base, &cases);
}

#[test]
fn l2_entries_that_make_no_sense_are_counted_alike_and_given_up() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &WRITES);
    // qemu-img leaves many of these as they are, and the image corrupt. Whoever asks for "all" wants an image that can
    // be used: what an entry stood for that leads nowhere reads as zero, and the report says so.
    let cases: [Case; 20] = [
        ("compressed with COPIED", |image| image.change_l2(320, |entry| entry | COPIED), Sound),
        ("unaligned", |image| image.change_l2(1, |entry| entry | 0x200), Sound),
        ("unaligned zero cluster", |image| image.set_l2(480, 0x5_0201), Sound),
        ("zero cluster in another's place", |image| image.set_l2(480, 0x5_0001), Sound),
        ("zero cluster with COPIED only", |image| image.set_l2(480, COPIED | 1), Sound),
        ("COPIED only", |image| image.set_l2(479, COPIED), Sound),
        ("low reserved bit", |image| image.change_l2(1, |entry| entry | 2), Sound),
        ("high reserved bit", |image| image.change_l2(1, |entry| entry | 1 << 58), Sound),
        ("reserved bit of nothing", |image| image.set_l2(479, 4), Sound),
        ("reserved bit and COPIED", |image| image.set_l2(1, COPIED | 2), Sound),
        ("just outside", |image| image.set_l2(1, 0x19_0000 | COPIED), Sound),
        ("outside", |image| image.set_l2(1, 0x80_0000 | COPIED), Sound),
        ("far outside", |image| image.set_l2(1, 0x00ff_ffff_ffff_0000 | COPIED), Sound),
        ("two to one", |image| image.change_l2(1, |_| 0x7_0000 | COPIED), Sound),
        ("to the refcount table", |image| image.set_l2(1, image.refcount_table() | COPIED), Sound),
        ("to the refcount block", |image| image.set_l2(1, image.block() | COPIED), Sound),
        ("to its own table", |image| image.set_l2(1, image.l2() | COPIED), Sound),
        ("compressed outside", |image| image.set_l2(320, COMPRESSED | 1 << 40), Sound),
        ("compressed at the very end", |image| image.set_l2(320, COMPRESSED | ((1 << 54) - 1)), Sound),
        ("compressed on data", |image| image.set_l2(320, COMPRESSED | 0x6_0000), Sound),
    ];
    compare_all(folder.path(), &base, &cases);
}

#[test]
fn l1_entries_that_make_no_sense_are_counted_alike_and_given_up() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &WRITES);
    let cases: [Case; 14] = [
        ("to the header", |image| image.set_l1(COPIED), Sound),
        ("to the refcount table", |image| image.set_l1(image.refcount_table() | COPIED), Sound),
        ("to the refcount block", |image| image.set_l1(image.block() | COPIED), Sound),
        ("to itself", |image| image.set_l1(image.l1() | COPIED), Sound),
        ("unaligned", |image| image.set_l1(image.l2() | COPIED | 0x200), Sound),
        ("low reserved bit", |image| image.set_l1(image.l2() | COPIED | 2), Sound),
        ("high reserved bit", |image| image.set_l1(image.l2() | COPIED | 1 << 60), Sound),
        ("outside", |image| image.set_l1(0x80_0000 | COPIED), Sound),
        ("just outside", |image| image.set_l1(0x19_0000 | COPIED), Sound),
        ("far outside", |image| image.set_l1(1 << 50 | COPIED), Sound),
        ("table outside", |image| image.put64(40, 0x800_0000), L1_LOST),
        ("table in the header", |image| image.put64(40, 0), L1_LOST),
        ("table longer than needed", |image| image.put32(36, 1000), Sound),
        ("table over everything", |image| image.put32(36, 20_000), L1_LOST),
    ];
    compare_all(folder.path(), &base, &cases);
}

#[test]
fn broken_reference_counts_are_counted_alike_and_made_anew() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &WRITES);
    let cases: [Case; 17] = [
        ("block unaligned", |image| image.set_block(0, image.block() | 0x200), Sound),
        ("block with reserved bit", |image| image.set_block(0, image.block() | 1), Sound),
        ("block outside", |image| image.set_block(0, 0x80_0000), Sound),
        ("block far outside", |image| image.set_block(0, 1 << 50), Sound),
        ("block is the table", |image| image.set_block(0, image.refcount_table()), Sound),
        ("block is the L1 table", |image| image.set_block(0, image.l1()), Sound),
        ("no block", |image| image.set_block(0, 0), Sound),
        ("one block twice", |image| image.set_block(1, image.block()), Sound),
        ("second block outside", |image| image.set_block(1, 0x80_0000), Sound),
        ("second block just outside", |image| image.set_block(1, 0x19_0000), Sound),
        ("second block unaligned", |image| image.set_block(1, 0x80_0200), Sound),
        ("second block in the last cluster", |image| image.set_block(1, 0x18_0000), Sound),
        ("no table", |image| image.put32(56, 0), Sound),
        ("table outside", |image| image.put64(48, 0x80_0000), Sound),
        ("table in the header", |image| image.put64(48, 0), Sound),
        ("table reaches into the block", |image| image.put32(56, 2), SoundAfterLong),
        ("table over everything", |image| image.put32(56, 100), SoundAfterLong),
    ];
    compare_all(folder.path(), &base, &cases);
}

#[test]
fn an_image_cut_short_or_marked_is_judged_alike() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &WRITES);
    let cases: [Case; 14] = [
        ("cut in the data", |image| image.bytes.truncate(0x10_0000), Sound),
        ("cut before the L2 table", |image| image.bytes.truncate(0x4_0000), Sound),
        ("cut inside a table", |image| image.bytes.truncate(0x2_8000), Sound),
        ("cut before all tables", |image| image.bytes.truncate(0x1_0000), L1_LOST),
        ("cut by a byte", |image| image.bytes.truncate(image.bytes.len() - 1), Sound),
        ("longer than needed", |image| image.bytes.resize(0x100_0000, 0), Sound),
        ("dirty", |image| image.put64(72, 1), Sound),
        ("corrupt", |image| image.put64(72, 2), Sound),
        ("dirty, with a leak", |image| (image.put64(72, 1), image.set_count(3, 2)).0, Sound),
        ("dirty and corrupt, with low counts", |image| (image.put64(72, 3), image.set_count(6, 0)).0, Sound),
        ("of an odd size", |image| image.put64(24, 100), Sound),
        ("of a size without tables", |image| image.put64(24, 1 << 40), NOT_OPENED),
        ("snapshots nowhere", |image| (image.put32(60, 1), image.put64(64, 0x800_0000)).0, Sound),
        ("snapshots in the header", |image| image.put32(60, 1), Sound),
    ];
    compare_all(folder.path(), &base, &cases);
}

#[test]
fn marks_are_taken_off_an_image_that_is_sound() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &WRITES);
    let path = folder.path().join("marked.qcow2");
    for marks in [1, 2, 3] {
        base.damaged(|image| image.put64(72, marks)).save(&path);
        assert!(our_check(&path, &["--repair", "leaks"]).is_clean());
        assert_eq!(Image { bytes: std::fs::read(&path).unwrap() }.u64(72), 0, "marks {marks}");
        qemu("qemu-io", &["-c", "write 0 64k", "marked.qcow2"], folder.path());
    }
    // One that stays corrupt keeps its mark.
    base.damaged(|image| (image.put64(72, 2), image.put64(40, 0x800_0000)).0).save(&path);
    assert_eq!(our_check(&path, &["--repair", "all"]).status, Some(2));
    assert_eq!(Image { bytes: std::fs::read(&path).unwrap() }.u64(72), 2);
}

#[test]
fn damaged_snapshots_are_counted_alike_and_given_up() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let commands = ["write 0 256k", "snapshot one", "write 64k 64k", "snapshot two-longer", "write 128k 64k"];
    let base = Image::make(folder.path(), "", "64M", &commands);
    let cases: [Case; 19] = [
        ("nothing", |_| {}, Sound),
        ("L1 table outside", |image| image.put64(image.snapshots(), 0x800_0000), Sound),
        ("L1 table unaligned", |image| image.put64(image.snapshots(), 0x9_0200), Sound),
        ("L1 table in the header", |image| image.put64(image.snapshots(), 0), Sound),
        ("L1 table too long", |image| image.put32(image.snapshots() + 8, 5_000_000), Sound),
        ("L1 table empty", |image| image.put32(image.snapshots() + 8, 0), Sound),
        ("L1 entry gone", |image| image.put64(image.u64(image.snapshots()), 0), Sound),
        ("L1 entry broken", |image| image.put64(image.u64(image.snapshots()), 0x7777_7777_7777_7777), Sound),
        (
            "L1 entry with COPIED",
            |image| {
                let at = image.u64(image.snapshots());
                image.put64(at, image.u64(at) | COPIED);
            },
            Sound,
        ),
        ("too much extra data", |image| image.put32(image.snapshots() + 36, 2000), Sound),
        ("too little extra data", |image| image.put32(image.snapshots() + 36, 8), Sound),
        ("names without end", |image| image.put32(image.snapshots() + 12, u32::MAX), Sound),
        ("one too many", |image| image.put32(60, 3), Sound),
        ("one too few", |image| image.put32(60, 1), Sound),
        ("none", |image| image.put32(60, 0), Sound),
        ("more than there may be", |image| image.put32(60, 65_537), NOT_OPENED),
        ("table in the header", |image| image.put64(64, 0), Sound),
        ("table far outside", |image| image.put64(64, 1 << 60), Sound),
        ("table is the L1 table", |image| image.put64(64, image.l1()), Sound),
    ];
    compare_all(folder.path(), &base, &cases);
    // Shared clusters are not owned, whatever their entries say.
    compare_all(
        folder.path(),
        &base,
        &[("COPIED on shared", |image| image.change_l2(0, |entry| entry | COPIED), Sound)],
    );
}

/// An image with two bitmaps, and where the directory of the bitmaps, the first bitmap's table, and the extension are.
fn with_bitmaps(folder: &Path) -> (Image, [u64; 3]) {
    Image::make(folder, "", "64M", &["write 0 256k"]);
    for (name, granularity) in [("b0", "64k"), ("b1", "128k")] {
        qemu("qemu-img", &["bitmap", "--add", "-g", granularity, "made.qcow2", name], folder);
        qemu("qemu-io", &["-c", "write 1M 64k", "made.qcow2"], folder);
    }
    let image = Image { bytes: std::fs::read(folder.join("made.qcow2")).unwrap() };
    let extension = image.extension(0x2385_2875);
    let directory = image.u64(extension + 24);
    let table = image.u64(directory);
    (image, [directory, table, extension])
}

#[test]
fn damaged_bitmaps_are_counted_alike_and_given_up() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let (base, [directory, table, extension]) = with_bitmaps(folder.path());
    let put64 = |at: u64, value: u64| base.damaged(|image| image.put64(at, value));
    let put32 = |at: u64, value: u32| base.damaged(|image| image.put32(at, value));
    let put = |at: u64, value: u8| base.damaged(|image| image.put(at, &[value]));
    let in_use_and_long = base.damaged(|image| {
        image.put32(directory + 12, 3);
        image.put32(directory + 8, 2);
    });
    let cases = [
        ("nothing", base.clone(), Sound),
        ("directory outside", put64(extension + 24, 0x800_0000), Sound),
        ("directory unaligned", put64(extension + 24, directory | 0x200), NOT_OPENED),
        ("directory too long", put64(extension + 16, 1 << 40), Sound),
        ("directory too short", put64(extension + 16, 8), Sound),
        ("too many", put32(extension + 8, 5), Sound),
        ("too few", put32(extension + 8, 1), Sound),
        ("more than there may be", put32(extension + 8, 70_000), Sound),
        ("table outside", put64(directory, 0x800_0000), Sound),
        ("table unaligned", put64(directory, table | 0x200), Sound),
        ("table too long", put32(directory + 8, 0x7000_0000), Sound),
        ("table of the wrong length", put32(directory + 8, 2), Sound),
        ("flags", put32(directory + 12, 0x10), Sound),
        ("type", put(directory + 16, 2), Sound),
        ("granularity", put(directory + 17, 40), Sound),
        ("extra data", put32(directory + 20, 8), Sound),
        ("data outside", put64(table, 0x800_0000), Sound),
        ("data unaligned", put64(table, 0x7_0200), Sound),
        ("data with reserved bit", put64(table, base.u64(table) | 2), Sound),
        ("data elsewhere", put64(table, 0x3_0000), Sound),
        ("ones", put64(table, 1), Sound),
        ("ones with reserved bit", put64(table, 3), Sound),
        ("two of one name", put(directory + 32 + 25, b'0'), Sound),
        ("in use", put32(directory + 12, 3), Sound),
        ("in use, table of the wrong length", in_use_and_long, Sound),
        ("out of date", put64(88, 0), Sound),
    ];
    for (name, image, afterwards) in cases {
        compare(folder.path(), name, &image, afterwards);
    }
}

#[test]
fn extended_entries_that_contradict_themselves_are_counted_alike() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let writes = ["write 0 256k", "write 1M 8k", "write -c 2M 64k", "write -z 3M 64k", "write -z 4M 4k"];
    let base = Image::make(folder.path(), "extended_l2=on", "64M", &writes);
    let cases: [Case; 12] = [
        ("nothing", |_| {}, Sound),
        ("data and zero", |image| image.put64(image.l2_at(1) + 8, 0x1_ffff_ffff), Sound),
        ("data nowhere", |image| image.put64(image.l2_at(48) + 8, 1), Sound),
        ("data and zero nowhere", |image| image.put64(image.l2_at(48) + 8, 0x1_0000_0001), Sound),
        ("zero bit of other images", |image| image.change_l2(1, |entry| entry | 1), Sound),
        ("compressed with subclusters", |image| image.put64(image.l2_at(32) + 8, 5), Sound),
        ("a place without data", |image| image.put64(image.l2_at(1) + 8, 0), Sound),
        (
            "a place without data or COPIED",
            |image| {
                image.put64(image.l2_at(1) + 8, 0);
                image.change_l2(1, |entry| entry & !COPIED);
            },
            Sound,
        ),
        (
            "an unaligned place",
            |image| {
                image.put64(image.l2_at(1) + 8, 0);
                image.change_l2(1, |entry| entry | 0x200);
            },
            Sound,
        ),
        (
            "an unaligned place of zeroes",
            |image| {
                image.put64(image.l2_at(1) + 8, 0xffff_ffff_0000_0000);
                image.change_l2(1, |entry| entry | 0x200);
            },
            Sound,
        ),
        ("unaligned data", |image| image.change_l2(1, |entry| entry | 0x200), Sound),
        ("reserved bit", |image| image.change_l2(1, |entry| entry | 2), Sound),
    ];
    compare_all(folder.path(), &base, &cases);
}

#[test]
fn entries_for_an_external_data_file_are_counted_alike() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let name = folder.path().join("data.raw");
    let writes = ["write 0 256k", "write 1M 64k"];
    let cases: [Case; 9] = [
        ("nothing", |_| {}, Sound),
        ("COPIED missing", |image| image.change_l2(1, |entry| entry & !COPIED), Sound),
        ("another place", |image| image.set_l2(1, 0x5_0000 | COPIED), Sound),
        ("unaligned", |image| image.set_l2(1, 0x5_0200 | COPIED), Sound),
        ("compressed", |image| image.set_l2(1, 0x5_0000 | COMPRESSED), Sound),
        ("the start", |image| image.set_l2(1, COPIED), Sound),
        ("zeroes", |image| image.set_l2(1, 1), Sound),
        ("far away", |image| image.set_l2(1, 1 << 50 | COPIED), Sound),
        ("a leak", |image| image.set_count(2, 2), Sound),
    ];
    for raw in ["", ",data_file_raw=on"] {
        let options = format!("data_file={}{raw}", name.display());
        compare_all(folder.path(), &Image::make(folder.path(), &options, "64M", &writes), &cases);
    }
}

#[test]
fn every_version_cluster_size_and_width_is_checked_alike() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let cases: [Case; 3] = [
        ("not counted", |image| image.set_count(image.cluster_of(1), 0), Sound),
        ("outside", |image| image.change_l2(1, |entry| (entry & COPIED) | 1 << 41), Sound),
        ("no block", |image| image.set_block(0, 0), Sound),
    ];
    let mut options: Vec<String> = [512, 4096, 65_536, 2 << 20]
        .into_iter()
        .flat_map(|size| ["0.10", "1.1"].map(|compat| format!("cluster_size={size},compat={compat}")))
        .collect();
    options.extend([1, 2, 4, 8, 32, 64].map(|bits| format!("refcount_bits={bits}")));
    options.extend([1, 64].map(|bits| format!("refcount_bits={bits},cluster_size=512")));
    for options in options {
        let base = Image::make(folder.path(), &options, "16M", &["write 0 5M", "write 7M 1M"]);
        for (name, damage, afterwards) in &cases {
            compare(folder.path(), &format!("{name}, {options}"), &base.damaged(damage), *afterwards);
        }
    }
    let empty = Image::make(folder.path(), "", "0", &[]);
    compare(folder.path(), "a disk of no bytes", &empty, Sound);
    // A count of one bit cannot say two.
    let narrow = Image::make(folder.path(), "refcount_bits=1", "64M", &["write 0 256k"]);
    let shared = narrow.damaged(|image| image.set_l2(1, image.u64(image.l2_at(2))));
    compare(
        folder.path(),
        "shared",
        &shared,
        Left("a count of one bit cannot say two, and the data has one place"),
    );
}

#[test]
fn what_was_not_touched_by_a_repair_reads_as_before() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &["write -P 7 0 1M", "write -P 8 10M 1M"]);
    let path = folder.path().join("repaired.qcow2");
    base.damaged(|image| {
        image.set_l2(1, 0x8000_0000 | COPIED);
        image.set_block(0, 0x80_0000);
    })
    .save(&path);
    assert!(our_check(&path, &["--repair", "all"]).is_clean());
    for read in ["read -P 7 0 64k", "read -P 0 64k 64k", "read -P 7 128k 896k", "read -P 8 10M 1M"] {
        qemu("qemu-io", &["-c", read, "repaired.qcow2"], folder.path());
    }
    qemu("qemu-io", &["-c", "write -P 9 0 8M", "repaired.qcow2"], folder.path());
    assert!(qemu_check(&path, &[]).is_clean());
}

#[test]
fn a_repair_prefers_the_active_disk_to_a_snapshot_that_claims_its_clusters() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let commands =
        ["write -P 7 0 256k", "snapshot one", "write -P 8 64k 64k", "snapshot two", "write -P 9 1M 64k"];
    let base = Image::make(folder.path(), "", "64M", &commands);
    let path = folder.path().join("repaired.qcow2");
    let damages: [fn(&mut Image); 4] = [
        // The snapshot's L1 table reaches over the whole file; it is the active one; it leads into a guest's data.
        |image| image.put32(image.snapshots() + 8, 100_000),
        |image| image.put64(image.snapshots(), image.l1()),
        |image| image.put64(image.u64(image.snapshots()), image.cluster_of(0) * 65_536),
        |image| image.put64(image.u64(image.snapshots()), image.cluster_of(16) * 65_536),
    ];
    for damage in damages {
        base.damaged(damage).save(&path);
        our_check(&path, &["--repair", "all"]);
        assert!(qemu_check(&path, &[]).is_clean());
        for read in ["read -P 7 0 64k", "read -P 8 64k 64k", "read -P 7 128k 128k", "read -P 9 1M 64k"] {
            qemu("qemu-io", &["-c", read, "repaired.qcow2"], folder.path());
        }
    }
}

#[test]
fn a_file_that_is_no_image_or_in_use_is_not_checked() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let path = folder.path().join("disk");
    std::fs::write(&path, [7; 4096]).unwrap();
    let output = heliostat(["check", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("Image is not in qcow2 format"), "{said}");
    assert_eq!(heliostat(["check", "/nowhere/at/all"]).status.code(), Some(1));
}

#[test]
fn people_read_what_is_wrong_and_what_was_put_right() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    let base = Image::make(folder.path(), "", "64M", &["write 0 1M"]);
    let path = folder.path().join("disk.qcow2");
    base.damaged(|image| {
        image.set_count(3, 2);
        image.set_l2(1, 0x8000_0000 | COPIED);
    })
    .save(&path);
    let said = |arguments: &[&str]| {
        let all = ["check", path.to_str().unwrap()].into_iter().chain(arguments.iter().copied());
        String::from_utf8(heliostat(all).stdout).unwrap()
    };
    insta::assert_snapshot!("check_found", said(&[]));
    insta::assert_snapshot!("check_put_right", said(&["--repair", "all"]));
    insta::assert_snapshot!("check_sound", said(&[]));
}
