//! [`name_bitmaps`]: lets the header of an image name other bitmaps, or none.
//!
//! A medium writes a sector wholly or not at all, and anything else in any part. So only bytes that change are
//! written, no write reaches over the end of a sector, each is durable before the next, and between any two of them the
//! header can be read: extensions and names that stay are not moved. Not so where the last bitmaps go and an extension
//! that nobody knows stands behind theirs: it moves, and where that is over a sector's end a crash in between leaves a
//! header that cannot be read. Never changes another field. Called when an
//! image is closed, and by a repair.

use super::error::FormatError;
use super::extension::{self, extensions, put_extension};
use super::file::ImageFile;
use super::header::{Header, SECTOR, autoclear};
use super::open::AUTOCLEAR_WORD;
use crate::convert::{u64_from, usize_from};

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
/// Those of the file; [`FormatError::Invalid`] when there is no room in the first cluster.
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
    let new = match edited(old, header, |_| true).or_else(|| edited(old, header, is_needed)) {
        Some(new) => new,
        // The backing file's name moves. One sector holds all of it, but for bitmaps that come where clusters are below 4 KiB
        // and names long: a crash could leave half of that.
        None => {
            let short = header.encode_short()?;
            let rest = old.get(short.len()..).unwrap_or_default();
            [&short[..], rest].concat()
        }
    };
    let mut old = old.to_vec();
    old.resize(new.len(), 0);
    let mut changes = Vec::new();
    if differing(&old, &new).count() > 1 && header.layout.version >= 3 {
        // Nobody believes the bitmaps while what names them is on its way.
        let word = usize_from(AUTOCLEAR_WORD);
        let unsaid = (header.autoclear & !autoclear::BITMAPS).to_be_bytes();
        if old[word..word + 8] != unsaid {
            old[word..word + 8].copy_from_slice(&unsaid);
            changes.push(Change { at: word, bytes: unsaid.to_vec() });
        }
    }
    // From the back: what is behind the end of the extensions, or where the names of features were, means nothing before
    // that has moved; and the first sector says that the bitmaps can be believed.
    let mut sectors: Vec<Change> = differing(&old, &new).collect();
    sectors.reverse();
    changes.append(&mut sectors);
    Ok(changes)
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

/// Says whether somebody needs an extension.
const fn is_needed(kind: u32) -> bool {
    kind != extension::FEATURE_NAMES
}

/// The first cluster with the bitmaps of `header`, and with what it has else and `keeps` says; nothing in front of the
/// extensions or behind them moves. `None` where that has no room.
fn edited(old: &[u8], header: &Header, keeps: impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    let room = Header::extensions_room(old);
    let mut own = header.bitmaps.map(|bitmaps| bitmaps.encode());
    let mut bytes = Vec::new();
    for found in extensions(old.get(room.clone())?) {
        let found = found.ok()?;
        let data = if found.kind == extension::BITMAPS { own.take() } else { Some(found.data) };
        if let Some(data) = data.filter(|_| keeps(found.kind)) {
            put_extension(&mut bytes, found.kind, &data);
        }
    }
    if let Some(data) = own {
        put_extension(&mut bytes, extension::BITMAPS, &data);
    }
    put_extension(&mut bytes, extension::END, &[]);
    let mut new = old.to_vec();
    new.get_mut(room)?.get_mut(..bytes.len())?.copy_from_slice(&bytes);
    if header.layout.version >= 3 {
        let word = usize_from(AUTOCLEAR_WORD);
        new.get_mut(word..word + 8)?.copy_from_slice(&header.autoclear.to_be_bytes());
    }
    Some(new)
}

#[cfg(test)]
mod tests {
    use super::super::header::{BitmapsExtension, Extension, Table};
    use super::super::layout::Layout;
    use super::*;

    const CLUSTER: usize = 4096;

    fn bitmaps(count: u32) -> Option<BitmapsExtension> {
        let size = u64::from(count);
        Some(BitmapsExtension { count, directory_size: 32 * size, directory_offset: 0x7000 * size })
    }

    /// A header whose names and unknown extension have so many bytes.
    fn header([backing, data, further]: [usize; 3], bitmaps: Option<BitmapsExtension>) -> Header {
        let name = |len: usize| (len > 0).then(|| vec![b'x'; len]);
        let unknown = |data| Extension { kind: 0x1234_5678, data };
        Header {
            layout: Layout { cluster_bits: 12, refcount_order: 4, extended_l2: false, version: 3 },
            size: 1 << 20,
            l1: Table { offset: 0x3000, len: 1 },
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
        bytes.resize(CLUSTER, 0xee);
        bytes
    }

    /// What is left when the writing stops before each change, and at last.
    fn stages(old: &[u8], new: &Header) -> Vec<Vec<u8>> {
        let mut stages = vec![old.to_vec()];
        for Change { at, bytes } in changes(old, new).unwrap() {
            assert_eq!(at / SECTOR, (at + bytes.len() - 1) / SECTOR, "one sector");
            let mut next = stages.last().unwrap().clone();
            next[at..at + bytes.len()].copy_from_slice(&bytes);
            stages.push(next);
        }
        stages
    }

    fn is_a_header_at_any_time(
        lens: [usize; 3],
        old: Option<BitmapsExtension>,
        new: Option<BitmapsExtension>,
    ) {
        let bytes = cluster(&header(lens, old));
        let wanted = header(lens, new);
        let stages = stages(&bytes, &wanted);
        for (number, stage) in stages.iter().enumerate() {
            let what = format!("{lens:?}: {old:?} becomes {new:?}, stopped after {number} writes");
            let read = Header::decode(stage).unwrap_or_else(|error| panic!("{what}: {error}"));
            let is_believed = read.autoclear == autoclear::BITMAPS;
            assert!(!is_believed || read.bitmaps == old || read.bitmaps == new, "{what}: {:?}", read.bitmaps);
            assert!(!is_believed || read.bitmaps.is_some(), "{what}: the bit needs its extension");
            let rest = Header { bitmaps: new, autoclear: wanted.autoclear, ..read };
            assert_eq!(rest, wanted, "{what}");
        }
        assert_eq!(Header::decode(stages.last().unwrap()).unwrap(), wanted);
    }

    /// Old bitmaps and new ones.
    fn pairs() -> impl Iterator<Item = [Option<BitmapsExtension>; 2]> {
        let some = [None, bitmaps(1), bitmaps(2)];
        some.into_iter().flat_map(move |old| some.map(|new| [old, new]))
    }

    #[test]
    fn a_change_of_the_bitmaps_that_stops_at_any_sector_leaves_a_header() {
        // The extension is wherever it may be: also across the end of a sector.
        for len in (0..600).step_by(8) {
            for [old, new] in pairs() {
                is_a_header_at_any_time([len.min(1000), 0, 0], old, new);
                is_a_header_at_any_time([900, len, 0], old, new);
            }
        }
    }

    #[test]
    fn what_follows_the_bitmaps_stays_whole_where_it_need_not_move() {
        for len in (0..600).step_by(8) {
            is_a_header_at_any_time([900, len, 40], bitmaps(1), bitmaps(2));
            is_a_header_at_any_time([900, len, 40], None, bitmaps(2));
        }
    }

    #[test]
    fn a_header_that_fits_one_sector_without_the_names_of_features_changes_in_one_write() {
        for [old, new] in pairs().filter(|[old, new]| old != new) {
            // There is no room before the name: all of it moves.
            let stages = stages(&cluster(&header([200, 0, 0], old)), &header([200, 0, 0], new));
            assert_eq!(stages.len(), if old.is_some() && new.is_none() { 3 } else { 2 }, "{old:?} {new:?}");
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
        let stages = stages(&bytes, &Header { bitmaps: None, ..old.clone() });
        let read = Header::decode(stages.last().unwrap()).unwrap();
        assert_eq!(read.bitmaps, None);
        assert_eq!(stages.last().unwrap()[88..], bytes[88..]);
    }
}
