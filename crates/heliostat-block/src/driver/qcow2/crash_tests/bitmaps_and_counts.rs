//! What a power cut leaves of a repair on opening, and of a close that writes bitmaps.

use super::*;

/// Where the one block of reference counts is, and the tables, in an image that was just made in clusters of 4 KiB.
const TABLE: usize = 1 << 12;
const BLOCK: usize = 2 << 12;
const L1: usize = 3 << 12;

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// An image that was not closed, with data in it and right counts.
fn not_closed() -> Files {
    let options = CreateOptions { size: 256 << 10, cluster_bits: 12, ..CreateOptions::default() };
    let opened = make(&options, None).open().unwrap();
    for cluster in 0..20 {
        opened.write(cluster << 13, 4096, u8::try_from(cluster + 1).unwrap());
    }
    now(opened.image.close()).unwrap();
    let mut files = opened.files();
    files.bytes[0][79] |= 1;
    files
}

#[test]
fn a_repair_on_opening_that_is_cut_off_anywhere_loses_nothing_and_is_made_up_for() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 7] = [
        ("nothing is wrong", |_| ()),
        ("counts are behind", |bytes| bytes[BLOCK + 12..BLOCK + 20].fill(0)),
        ("counts are too high", |bytes| bytes[BLOCK + 13] = 7),
        ("nothing is counted", |bytes| bytes[BLOCK..L1].fill(0)),
        ("there is no block", |bytes| put(bytes, TABLE, 0)),
        ("the block is nowhere", |bytes| put(bytes, TABLE, 3 << 50)),
        ("a flag is missing", |bytes| bytes[L1] &= 0x7f),
    ];
    for (name, damage) in damages {
        let mut files = not_closed();
        let before = Files { bytes: files.bytes.clone(), below: None }.open().unwrap().content();
        damage(&mut files.bytes[0]);
        let opened = files.open().unwrap();
        assert!(opened.content() == before, "{name}");
        let journal = lock(&opened.journal).clone();
        assert!(!journal.is_empty(), "the dirty bit goes");
        files.crashes(&journal, |left, moment| {
            let what = format!("{name}, a crash before request {moment} of {}", journal.len());
            if left.bytes[0][79] & 1 == 0 {
                is_sound(left, &what);
            }
            let again = left.open().unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(again.content() == before, "{what}");
            let after = again.files();
            assert_eq!(after.bytes[0][79] & 1, 0, "{what}");
            is_sound(&after, &what);
        });
    }
}

#[test]
fn an_image_whose_counts_stand_where_its_tables_do_is_not_repaired_on_opening() {
    let to_table = |bytes: &mut Vec<u8>| put(bytes, L1, u64_from(TABLE) | entry::COPIED);
    let to_block = |bytes: &mut Vec<u8>| put(bytes, L1, u64_from(BLOCK) | entry::COPIED);
    let block_at_l1 = |bytes: &mut Vec<u8>| put(bytes, TABLE, u64_from(L1));
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 3] = [to_table, to_block, block_at_l1];
    for damage in damages {
        let mut files = not_closed();
        damage(&mut files.bytes[0]);
        let journal = Journal::default();
        let memory = memory(0, files.bytes[0].clone(), &journal);
        let refused = now(Qcow2::open(memory, OpenOptions::default()));
        assert!(matches!(refused, Err(FormatError::Invalid(_))));
        assert!(lock(&journal).is_empty(), "nothing has been written");
    }
}

/// An image with a dirty bitmap, and the same opened.
fn with_bitmap() -> (Files, Opened) {
    let mut files =
        make(&CreateOptions { size: 64 << 10, cluster_bits: 12, ..CreateOptions::default() }, None);
    let bytes = &mut files.bytes[0];
    let header = Header::decode(bytes).unwrap();
    // Behind what is there: the directory, and a table that names no bits. Both are counted.
    let directory = u64_from(bytes.len());
    let layout = header.layout;
    let entry = bitmap_directory::BitmapEntry {
        name: b"b".to_vec(),
        table: header::Table { offset: directory + layout.cluster_size(), len: 1 },
        flags: bitmap_directory::AUTO,
        granularity_bits: 12,
        extra: Vec::new(),
    };
    let entry = bitmap_directory::encode_directory(&[entry]);
    bytes.extend_from_slice(&entry);
    bytes.resize(usize_from(directory + 2 * layout.cluster_size()), 0);
    for cluster in [directory, directory + layout.cluster_size()] {
        bytes[BLOCK + usize_from(layout.cluster_index(cluster)) * 2 + 1] = 1;
    }
    let bitmaps = header::BitmapsExtension {
        count: 1,
        directory_size: u64_from(entry.len()),
        directory_offset: directory,
    };
    let autoclear = header::autoclear::BITMAPS;
    let new = Header { bitmaps: Some(bitmaps), autoclear, ..header }.encode().unwrap();
    bytes[..new.len()].copy_from_slice(&new);
    is_sound(&files, "made");
    let opened = files.open().unwrap();
    (files, opened)
}

#[test]
fn a_close_that_is_tried_again_gives_nothing_back_twice() {
    let (_, opened) = with_bitmap();
    opened.write(0, 9000, 7);
    opened.image.bitmaps()[0].bits.as_ref().unwrap().mark(ByteRange::from_bounds(0, 9000));
    now(opened.image.close()).unwrap();
    now(opened.image.close()).unwrap();
    now(opened.image.close()).unwrap();
    assert_eq!(opened.image.corruption(), None);
    let left = opened.files();
    is_sound(&left, "closed three times");
    let again = left.open().unwrap();
    assert_eq!(again.image.bitmaps()[0].bits.as_ref().unwrap().dirty_bytes(), 12 << 10);
}

#[test]
fn a_bitmap_that_finds_no_room_takes_nothing_and_guests_data_is_flushed() {
    let (_, opened) = with_bitmap();
    opened.write(0, 9000, 7);
    opened.image.bitmaps()[0].bits.as_ref().unwrap().mark(ByteRange::from_bounds(0, 9000));
    let used = opened.image.lock().used_end;
    opened.files[0].size_max.store(opened.files[0].size(), Ordering::SeqCst);
    lock(&opened.journal).clear();
    for _ in 0..3 {
        assert!(now(opened.image.close()).is_err());
    }
    assert!(opened.image.lock().used_end <= used + 3, "each try takes what the one before gave back");
    assert_eq!(opened.files().open().unwrap().content()[..9000], vec![7; 9000]);
}

#[test]
fn a_bitmap_is_believed_only_when_it_says_everything() {
    let (files, opened) = with_bitmap();
    opened.write(0, 9000, 7);
    opened.image.bitmaps()[0].bits.as_ref().unwrap().mark(ByteRange::from_bounds(0, 9000));
    now(opened.image.close()).unwrap();
    let journal = lock(&opened.journal).clone();
    // The header changes by a word at a time: half of a longer change might be left.
    let is_torn = |change: &Change| matches!(change, Change::Write(at, data) if *at < 4096 && data.len() > 8);
    assert!(!journal.iter().any(|(_, change)| is_torn(change)));
    let written = journal
        .iter()
        .position(|(_, change)| matches!(change, Change::Write(_, data) if data[..] == [7; 9000]));
    let mut believed = 0;
    files.crashes(&journal, |left, moment| {
        let again = left.open().unwrap();
        is_sound(left, "after a crash");
        if let Some(bits) = &again.image.bitmaps()[0].bits {
            let is_untouched = Some(moment) <= written;
            assert!(is_untouched || bits.dirty_bytes() == 12 << 10, "a crash before request {moment}");
            believed += 1;
        }
    });
    assert!(believed > 0 && written.is_some());
}

/// The same changes, a sector at a time: what a medium may do of a longer one.
fn torn(journal: &[(usize, Change)]) -> Vec<(usize, Change)> {
    let pieces = journal.iter().flat_map(|(file, change)| {
        let pieces = match change {
            Change::Write(offset, data) => {
                let range = ByteRange::new(*offset, u64_from(data.len())).unwrap();
                let cut = |piece: ByteRange| {
                    let at = usize_from(piece.offset() - offset);
                    Change::Write(piece.offset(), data.slice(at..at + usize_from(piece.len())))
                };
                range.pieces(512).map(cut).collect()
            }
            other => vec![other.clone()],
        };
        pieces.into_iter().map(|piece| (*file, piece))
    });
    pieces.collect()
}

#[test]
fn a_repair_that_gives_up_bitmaps_leaves_a_header_at_whatever_sector_it_is_cut_off() {
    for name_len in [10, 120, 200, 300, 600, 1000] {
        let (mut files, _) = with_bitmap();
        let bytes = &mut files.bytes[0];
        // Somebody wrote the image who does not know bitmaps.
        let backing_file = Some(vec![b'x'; name_len]);
        let old = Header { autoclear: 0, backing_file, ..Header::decode(bytes).unwrap() };
        let encoded = old.encode().unwrap();
        bytes[..encoded.len()].copy_from_slice(&encoded);
        let journal = Journal::default();
        let memory = memory(0, bytes.clone(), &journal);
        let all = check::CheckOptions { repair: check::Repair::All, ..check::CheckOptions::default() };
        assert!(now(check::check(&ImageFile::new(memory), all)).unwrap().is_clean());
        let (mut with, mut without) = (0, 0);
        let journal = torn(&lock(&journal));
        files.crashes(&journal, |left, moment| {
            let what = format!("{name_len} bytes of name, cut off before {moment} of {}", journal.len());
            let header = Header::decode(&left.bytes[0]).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(header.bitmaps.is_none() || header.bitmaps == old.bitmaps, "{what}");
            *if header.bitmaps.is_none() { &mut without } else { &mut with } += 1;
            // While counts are put right the image may say that it is dirty.
            let incompatible = old.incompatible;
            assert_eq!(Header { bitmaps: old.bitmaps, incompatible, ..header }, old, "{what}");
            is_sound(left, &what);
        });
        assert!(with > 0 && without > 0);
    }
}
