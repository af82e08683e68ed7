//! [`name_bitmaps`]: lets the header of an image name other bitmaps, or none.
//!
//! A medium writes a sector wholly or not at all, and anything else in any part. So only bytes that change are
//! written, no write reaches over the end of a sector, each is durable before the next, and between any two of them the
//! header can be read. What makes that possible: no extension moves. Bitmaps that go leave an extension of the same
//! length that means nothing, [`extension::VACANT`], if another one stands behind it; bitmaps that come take such a
//! place, or the room behind the extensions, or a part of the names of features, which nobody needs. Where there is
//! nothing of that the backing file's name moves away: it is copied, then the header points to the copy, then the room
//! is used. Never changes another field. Called when an image is closed, and by a repair.

use super::error::FormatError;
use super::extension::{self, Slot, put_extension, slots};
use super::file::ImageFile;
use super::header::{Header, SECTOR, autoclear};
use super::open::AUTOCLEAR_WORD;
use crate::convert::{u64_from, usize_from};

/// An extension's type and length, and its end.
const HEAD: usize = 8;
/// The data of the bitmaps' extension.
const DATA: usize = 24;
/// Where the header says where the backing file's name begins.
const NAME_OFFSET: usize = 8;
/// Where the header says how long that name is.
const NAME_LEN: usize = 16;

/// Bytes of the header that change; they are in one sector.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    at: usize,
    bytes: Vec<u8>,
}

/// Lets the header of the image in `file` name the bitmaps of `header`, which differs from what is there by these and
/// their autoclear bit alone. What it names must be durable. So is the header when this returns.
///
/// # Errors
/// Those of the file; [`FormatError::Invalid`] when there is no room in the first cluster, or none that a name of a
/// backing file longer than a sector could move to. Then nothing has been written.
///
/// # Cancel safety
/// As a crash: what it leaves is a header. Bitmaps that it names are those of before or of `header`.
pub(super) async fn name_bitmaps(file: &ImageFile, header: &Header) -> Result<(), FormatError> {
    let old = Header::first_cluster(file).await?;
    for Change { at, bytes } in changes(&old, header)? {
        file.write(u64_from(at), bytes.into()).await?;
        file.flush().await?;
    }
    Ok(())
}

/// What has to be written, in that order.
fn changes(old: &[u8], header: &Header) -> Result<Vec<Change>, FormatError> {
    let mut old = old.to_vec();
    old.resize(usize_from(header.layout.cluster_size()), 0);
    let has_bit = header.layout.version >= 3;
    let mut steps = match header.bitmaps {
        None => vec![without_bitmaps(&old)],
        Some(bitmaps) => with_bitmaps(&old, &bitmaps.encode())?,
    };
    if let Some(last) = steps.last_mut().filter(|_| has_bit) {
        put_autoclear(last, header.autoclear);
    }
    if has_bit && differences(&old, &steps).len() > 1 {
        // Nobody believes the bitmaps while what names them is on its way.
        let unsaid = header.autoclear & !autoclear::BITMAPS;
        let before_last = steps.len() - 1;
        steps[..before_last].iter_mut().for_each(|step| put_autoclear(step, unsaid));
        let mut first = old.clone();
        put_autoclear(&mut first, unsaid);
        steps.insert(0, first);
    }
    Ok(differences(&old, &steps))
}

fn put_autoclear(cluster: &mut [u8], bits: u64) {
    let word = usize_from(AUTOCLEAR_WORD);
    cluster[word..word + 8].copy_from_slice(&bits.to_be_bytes());
}

/// What leads from `old` through each of `steps`.
fn differences(old: &[u8], steps: &[Vec<u8>]) -> Vec<Change> {
    let mut found = Vec::new();
    let mut before = old;
    for step in steps {
        // From the back: what is behind the end of the extensions, or in one that nobody reads, means nothing before what
        // stands in front of it; and the first sector says that the bitmaps can be believed.
        let mut sectors: Vec<Change> = differing(before, step).collect();
        sectors.reverse();
        found.append(&mut sectors);
        before = step;
    }
    found
}

/// The bytes that differ, sector by sector.
fn differing(old: &[u8], new: &[u8]) -> impl Iterator<Item = Change> {
    let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
    sectors.filter_map(|(number, (old, new))| {
        let differs = |(one, other): (&u8, &u8)| one != other;
        let first = old.iter().zip(new).position(differs)?;
        let last = old.iter().zip(new).rposition(differs)?;
        Some(Change { at: number * SECTOR + first, bytes: new[first..=last].to_vec() })
    })
}

/// The first cluster without bitmaps.
fn without_bitmaps(old: &[u8]) -> Vec<u8> {
    let (slots, _) = slots(old, Header::extensions_room(old));
    let mut new = old.to_vec();
    for (number, slot) in slots.iter().enumerate().filter(|(_, slot)| slot.kind == extension::BITMAPS) {
        let is_last = number + 1 == slots.len();
        if is_last {
            new[slot.at..slot.at + HEAD].fill(0);
        } else {
            new[slot.at..slot.at + 4].copy_from_slice(&extension::VACANT.to_be_bytes());
        }
    }
    new
}

/// The first cluster with bitmaps for which `data` stands, and what leads to it.
fn with_bitmaps(old: &[u8], data: &[u8]) -> Result<Vec<Vec<u8>>, FormatError> {
    let room = Header::extensions_room(old);
    let (slots, end) = slots(old, room.clone());
    let is = |kind| move |slot: &&Slot| slot.kind == kind && has_room(slot);
    // Of several the last one counts.
    let own = slots.iter().rev().find(is(extension::BITMAPS));
    let own = own.or_else(|| slots.iter().find(is(extension::VACANT)));
    if let Some(slot) = own {
        return Ok(vec![in_slot(old, slot, data)]);
    }
    if end + HEAD + DATA + HEAD <= room.end {
        return Ok(vec![behind(old, end, data)]);
    }
    if let Some(slot) = slots.iter().find(is(extension::FEATURE_NAMES)) {
        return Ok(vec![in_slot(old, slot, data)]);
    }
    beside_moved_name(old, end, data)
}

/// Says whether the bitmaps can take the place of an extension: what they leave of it must be one too.
const fn has_room(slot: &Slot) -> bool {
    slot.len == DATA || slot.len >= DATA + HEAD
}

/// The bitmaps in the place of another extension. What they leave of it is vacant.
fn in_slot(old: &[u8], slot: &Slot, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_extension(&mut bytes, extension::BITMAPS, data);
    if let Some(left) = (slot.len - DATA).checked_sub(HEAD) {
        bytes.extend_from_slice(&extension::VACANT.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(left).unwrap_or(u32::MAX).to_be_bytes());
    }
    let mut new = old.to_vec();
    new[slot.at..slot.at + bytes.len()].copy_from_slice(&bytes);
    new
}

/// The bitmaps behind the last extension, which ends at `end`.
fn behind(old: &[u8], end: usize, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_extension(&mut bytes, extension::BITMAPS, data);
    put_extension(&mut bytes, extension::END, &[]);
    let mut new = old.to_vec();
    new[end..end + bytes.len()].copy_from_slice(&bytes);
    new
}

/// The bitmaps behind the last extension, which ends at `end`, where the backing file's name is in the way.
fn beside_moved_name(old: &[u8], end: usize, data: &[u8]) -> Result<Vec<Vec<u8>>, FormatError> {
    let no_room = || {
        FormatError::Invalid(
            "the header has no room for bitmaps; use larger clusters or a shorter backing file name".into(),
        )
    };
    let name = Header::backing_name_place(old).ok_or_else(no_room)?;
    let moved = |to: usize| {
        let mut new = old.to_vec();
        new.get_mut(to..to + name.len())?.copy_from_slice(old.get(name.clone())?);
        Some(new)
    };
    let point_to = |cluster: &mut [u8], to: usize| {
        cluster[NAME_OFFSET..NAME_LEN].copy_from_slice(&u64_from(to).to_be_bytes());
    };
    let free = end + HEAD + DATA + HEAD;
    if free + name.len() <= SECTOR {
        let mut new = behind(&moved(free).ok_or_else(no_room)?, end, data);
        point_to(&mut new, free);
        return Ok(vec![new]);
    }
    // The old name must stay until nobody reads it: the copy is not put over it.
    let to = free.max(name.end);
    let mut copied = moved(to).ok_or_else(no_room)?;
    // In the first sector, which is the last to be written.
    point_to(&mut copied, to);
    let last = behind(&copied, end, data);
    Ok(vec![copied, last])
}

#[cfg(test)]
mod tests {
    use super::super::header::{BitmapsExtension, Extension, Table};
    use super::super::layout::Layout;
    use super::*;

    fn bitmaps(count: u32) -> Option<BitmapsExtension> {
        let size = u64::from(count);
        Some(BitmapsExtension { count, directory_size: 32 * size, directory_offset: 0x7000 * size })
    }

    const UNKNOWN: u32 = 0x1234_5678;

    /// A header in clusters of 4 KiB whose names and unknown extension have so many bytes.
    fn header([backing, data, further]: [usize; 3], bitmaps: Option<BitmapsExtension>) -> Header {
        let name = |len: usize| (len > 0).then(|| (b'a'..=b'z').cycle().take(len).collect::<Vec<u8>>());
        let unknown = |data| Extension { kind: UNKNOWN, data };
        Header {
            layout: Layout { cluster_bits: 12, refcount_order: 4, extended_l2: false, version: 3 },
            size: 1 << 16,
            l1: Table { offset: 0x3000, len: 4 },
            refcount_table: Table { offset: 0x1000, len: 1 },
            snapshots: Table::default(),
            incompatible: if data > 0 { super::super::header::incompatible::EXTERNAL_DATA } else { 0 },
            compatible: 0,
            autoclear: if bitmaps.is_some() { autoclear::BITMAPS } else { 0 },
            compression: super::super::header::Compression::Deflate,
            backing_file: name(backing),
            backing_format: name(backing).map(|_| b"qcow2".to_vec()),
            data_file: name(data),
            bitmaps,
            further_fields: Vec::new(),
            further_extensions: name(further).map(unknown).into_iter().collect(),
        }
    }

    fn cluster(header: &Header) -> Vec<u8> {
        let mut bytes = header.encode().unwrap();
        bytes.resize(usize_from(header.layout.cluster_size()), 0xee);
        bytes
    }

    /// What is left when the writing stops before each change, and at last.
    fn stages(old: &[u8], new: &Header) -> Result<Vec<Vec<u8>>, FormatError> {
        let mut stages = vec![old.to_vec()];
        for Change { at, bytes } in changes(old, new)? {
            assert_eq!(at / SECTOR, (at + bytes.len() - 1) / SECTOR, "one sector");
            let mut next = stages.last().unwrap().clone();
            next[at..at + bytes.len()].copy_from_slice(&bytes);
            stages.push(next);
        }
        Ok(stages)
    }

    /// Tries all crashes while the bitmaps of `old` become those of `wanted`; `None` where that is refused. Returns what
    /// is there at last.
    fn is_a_header_at_any_time(old: &[u8], wanted: &Header) -> Option<Vec<u8>> {
        let before = Header::decode(old).unwrap();
        let stages = stages(old, wanted).ok()?;
        for (number, stage) in stages.iter().enumerate() {
            let what = format!("{before:?} becomes {wanted:?}, stopped after {number} writes");
            let read = Header::decode(stage).unwrap_or_else(|error| panic!("{what}: {error}"));
            let is_believed = read.autoclear == autoclear::BITMAPS;
            let is_one = read.bitmaps == before.bitmaps || read.bitmaps == wanted.bitmaps;
            assert!(!is_believed || is_one, "{what}: {:?}", read.bitmaps);
            assert!(!is_believed || read.bitmaps.is_some(), "{what}: the bit needs its extension");
            let rest = Header { bitmaps: wanted.bitmaps, autoclear: wanted.autoclear, ..read };
            assert_eq!(rest, *wanted, "{what}");
        }
        let last = stages.last().unwrap().clone();
        assert_eq!(Header::decode(&last).unwrap(), *wanted);
        Some(last)
    }

    /// The same from a header as it is written to another.
    fn changes_safely(old: &Header, new: &Header) -> Option<Vec<u8>> {
        is_a_header_at_any_time(&cluster(old), new)
    }

    /// Old bitmaps and new ones.
    fn pairs() -> impl Iterator<Item = [Option<BitmapsExtension>; 2]> {
        let some = [None, bitmaps(1), bitmaps(2)];
        some.into_iter().flat_map(move |old| some.map(|new| [old, new]))
    }

    #[test]
    fn a_change_of_the_bitmaps_that_stops_at_any_sector_leaves_a_header() {
        // The extension is wherever it may be: also across the end of a sector, and with another one behind it.
        for len in (0..600).step_by(8) {
            for [old, new] in pairs() {
                for lens in [[len, 0, 0], [900, len, 0], [900, len, 40], [0, len, 500]] {
                    changes_safely(&header(lens, old), &header(lens, new)).unwrap();
                }
            }
        }
    }

    #[test]
    fn bitmaps_that_come_and_go_and_come_again_find_the_place_that_they_left() {
        for len in (0..600).step_by(8) {
            for further in [0, 40] {
                let lens = [900, len, further];
                let [none, some] = [None, bitmaps(1)].map(|bitmaps| header(lens, bitmaps));
                let mut before = cluster(&none);
                let mut seen = Vec::new();
                for wanted in [&some, &none, &some, &none, &some] {
                    before = is_a_header_at_any_time(&before, wanted).unwrap();
                    seen.push(before.clone());
                }
                assert!(seen[0] == seen[2] && seen[2] == seen[4], "{lens:?}");
            }
        }
    }

    #[test]
    fn what_somebody_else_put_beside_the_place_that_bitmaps_left_stays() {
        // Another program keeps what it does not know and lets its own bitmaps stand in front of it.
        let old = header([0, 0, 40], bitmaps(1));
        let bytes = changes_safely(&old, &header([0, 0, 40], None)).unwrap();
        let mut theirs = bytes[..112].to_vec();
        put_extension(&mut theirs, extension::BITMAPS, &bitmaps(2).unwrap().encode());
        let their_len = theirs.len() - 112;
        theirs.extend_from_slice(&bytes[112..bytes.len() - their_len]);
        put_autoclear(&mut theirs, autoclear::BITMAPS);
        for wanted in [bitmaps(3), None] {
            let after = is_a_header_at_any_time(&theirs, &header([0, 0, 40], wanted)).unwrap();
            let vacant = |slot: &Slot| slot.kind == extension::VACANT;
            let (slots, _) = slots(&after, Header::extensions_room(&after));
            let count = slots.iter().filter(|slot| vacant(slot)).count();
            assert_eq!(count, 1 + usize::from(wanted.is_none()), "{slots:?}");
        }
    }

    #[test]
    fn a_vacant_place_is_taken_only_where_what_is_left_of_it_is_an_extension() {
        for len in 0..80 {
            let vacant = Extension { kind: extension::VACANT, data: vec![7; len] };
            let mut old = header([0, 0, 40], None);
            old.further_extensions.insert(0, vacant);
            let bytes = is_a_header_at_any_time(&cluster(&old), &header([0, 0, 40], bitmaps(1))).unwrap();
            let (slots, _) = slots(&bytes, Header::extensions_room(&bytes));
            let first = slots.iter().position(|slot| slot.kind == extension::BITMAPS);
            let unknown = slots.iter().position(|slot| slot.kind == UNKNOWN);
            assert_eq!(first < unknown, len == 24 || len >= 32, "{len}: {slots:?}");
        }
    }

    /// A header with small clusters.
    fn small(cluster_bits: u32, lens: [usize; 3], bitmaps: Option<BitmapsExtension>) -> Header {
        let mut header = header(lens, bitmaps);
        header.layout.cluster_bits = cluster_bits;
        header.size = 1 << 10;
        header
    }

    #[test]
    fn a_name_that_moves_away_is_whole_at_any_time_or_stays_and_the_change_is_refused() {
        for cluster_bits in 9..12 {
            let mut refused = Vec::new();
            for name in 1..=1023 {
                for further in [0, 300] {
                    let [none, some] =
                        [None, bitmaps(1)].map(|bitmaps| small(cluster_bits, [name, 0, further], bitmaps));
                    let end = none.encode().map_or(usize::MAX, |bytes| bytes.len());
                    if u64_from(end) > none.layout.cluster_size() {
                        continue;
                    }
                    let Some(after) = changes_safely(&none, &some) else {
                        assert!(end + 32 > SECTOR && u64_from(end + name) > none.layout.cluster_size());
                        refused.push((name, further));
                        continue;
                    };
                    // They go without moving it back, and come again without moving it.
                    let gone = is_a_header_at_any_time(&after, &none).unwrap();
                    assert_eq!(is_a_header_at_any_time(&gone, &some).unwrap(), after);
                }
            }
            let first = refused.iter().filter(|(_, further)| *further == 0).map(|(name, _)| *name).min();
            assert_eq!(first, [Some(345), Some(445), Some(957)][usize::try_from(cluster_bits - 9).unwrap()]);
        }
    }

    #[test]
    fn a_header_without_names_of_features_and_with_large_clusters_moves_its_name() {
        for name in 1..=1023 {
            for further in [0, 440] {
                let [none, some] = [None, bitmaps(1)].map(|bitmaps| header([name, 0, further], bitmaps));
                // As other programs write it, and those that have gone by the old rules.
                let mut old = small(11, [name, 0, further], None);
                (old.size, old.l1) = (none.size, none.l1);
                let Ok(mut bytes) = old.encode() else { continue };
                bytes.resize(4096, 0xee);
                bytes[20..24].copy_from_slice(&12_u32.to_be_bytes());
                is_a_header_at_any_time(&bytes, &some).unwrap();
            }
        }
    }

    #[test]
    fn a_header_that_changes_in_one_sector_changes_in_one_write() {
        for [old, new] in pairs().filter(|[old, new]| old != new) {
            for further in [0, 40] {
                let lens = [200, 0, further];
                let stages = stages(&cluster(&small(11, lens, old)), &small(11, lens, new)).unwrap();
                assert_eq!(stages.len(), 2, "{old:?} {new:?}");
            }
            // There is no room before the name: the names of features, which begin in the first sector, make it.
            let stages =
                stages(&cluster(&header([200, 0, 0], None)), &header([200, 0, 0], bitmaps(1))).unwrap();
            assert_eq!(stages.len(), 2);
        }
    }

    #[test]
    fn only_the_word_that_differs_is_written() {
        let moved = Some(BitmapsExtension { directory_offset: 0x9000, ..bitmaps(1).unwrap() });
        let changes = changes(&cluster(&header([0; 3], bitmaps(1))), &header([0; 3], moved)).unwrap();
        assert!(matches!(&changes[..], [Change { bytes, .. }] if bytes.len() <= 8));
    }

    #[test]
    fn version_2_has_no_bit_and_keeps_its_bytes() {
        let mut old = header([0; 3], bitmaps(1));
        old.layout.version = 2;
        let bytes = cluster(&old);
        let stages = stages(&bytes, &Header { bitmaps: None, ..old.clone() }).unwrap();
        let read = Header::decode(stages.last().unwrap()).unwrap();
        assert_eq!(read.bitmaps, None);
        assert_eq!(stages.last().unwrap()[88..], bytes[88..]);
    }

    #[test]
    fn any_header_that_can_be_read_is_changed_or_refused() {
        let good = cluster(&small(9, [100, 0, 40], bitmaps(1)));
        for at in 0..300 {
            for value in [0, 1, 17, 23, 24, 25, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let Ok(read) = Header::decode(&bytes) else { continue };
                for bitmaps in [None, bitmaps(2)] {
                    let _ = changes(&bytes, &Header { bitmaps, ..read.clone() });
                }
            }
        }
    }
}
