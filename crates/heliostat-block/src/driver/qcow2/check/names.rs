//! The two tables whose entries have names: snapshots and persistent bitmaps. Read as far as a damaged image allows,
//! so that what they lead to can be counted, and what is broken dropped.

use super::super::bitmap_directory::{BitmapEntry, Bits, IN_USE};
use super::super::entry::OFFSET_MASK;
use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::header::{BitmapsExtension, Header, Table, autoclear};
use super::super::state::read_numbers;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;

/// QEMU's limits.
const SNAPSHOTS_SIZE_MAX: u64 = 64 << 20;
const EXTRA_MAX: u64 = 1024;
/// The fixed part of a snapshot's entry.
const SNAPSHOT_LEN: u64 = 40;
/// What version 3 asks of an entry: the long size of the machine's state, and the size of the disk.
const EXTRA_MIN: usize = 16;
/// What is read of a snapshot table at once.
const PIECE: u64 = 64 << 10;

/// An entry of the snapshot table, in pieces that are kept as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The snapshot's L1 table; `len` counts entries.
    pub(super) l1: Table,
    fixed: Vec<u8>,
    extra: Vec<u8>,
    /// Id and name.
    names: Vec<u8>,
    /// Lacks what version 3 asks for.
    pub(super) is_incomplete: bool,
}

impl Entry {
    fn encode(&self, header: &Header, bytes: &mut Vec<u8>) {
        let mut fixed = self.fixed.clone();
        let mut extra = self.extra.clone();
        if header.layout.version >= 3 && extra.len() < EXTRA_MIN {
            if extra.len() < 8 {
                extra = [&[0; 4], &fixed[32..36]].concat();
            }
            extra.truncate(8);
            extra.extend_from_slice(&header.size.to_be_bytes());
        }
        fixed[36..40].copy_from_slice(&u32::try_from(extra.len()).unwrap_or(0).to_be_bytes());
        bytes.extend_from_slice(&fixed);
        bytes.extend_from_slice(&extra);
        bytes.extend_from_slice(&self.names);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
}

/// The snapshot table, as it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SnapshotTable {
    pub(super) entries: Vec<Entry>,
    /// Its length in bytes.
    pub(super) len: u64,
    /// Why no more entries could be read; nothing is known of what follows.
    pub(super) broken: Option<String>,
}

impl SnapshotTable {
    /// Reads it. Beyond the file's end there are zeroes, so that hostile tables end too.
    pub(super) async fn read(file: &ImageFile, header: &Header) -> Result<Self, FormatError> {
        let mut table = Self::default();
        let (start, mut bytes) = (header.snapshots.offset, Vec::new());
        for index in 0..header.snapshots.len {
            let at = table.len;
            fill(file, start, &mut bytes, at + SNAPSHOT_LEN).await?;
            let fixed = slice(&bytes, at, SNAPSHOT_LEN).to_vec();
            let number = |at: usize, len: usize| {
                fixed[at..at + len].iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
            };
            let (extra, names) = (number(36, 4), number(12, 2) + number(14, 2));
            if extra > EXTRA_MAX {
                table.broken = Some(format!("Too much extra metadata in snapshot table entry {index}"));
                break;
            }
            let end = at + SNAPSHOT_LEN + extra + names;
            if end > SNAPSHOTS_SIZE_MAX {
                table.broken = Some("Snapshot table is too large".to_owned());
                break;
            }
            fill(file, start, &mut bytes, end).await?;
            let l1 = Table { offset: number(0, 8), len: u32::try_from(number(8, 4)).unwrap_or(0) };
            table.entries.push(Entry {
                l1,
                fixed,
                extra: slice(&bytes, at + SNAPSHOT_LEN, extra).to_vec(),
                names: slice(&bytes, at + SNAPSHOT_LEN + extra, names).to_vec(),
                is_incomplete: header.layout.version >= 3 && usize_from(extra) < EXTRA_MIN,
            });
            table.len = end;
            if index + 1 < header.snapshots.len {
                table.len = end.next_multiple_of(8);
            }
        }
        Ok(table)
    }

    /// The table anew, with what version 3 asks for.
    pub(super) fn encode(&self, header: &Header) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in &self.entries {
            entry.encode(header, &mut bytes);
        }
        bytes
    }
}

async fn fill(file: &ImageFile, start: u64, bytes: &mut Vec<u8>, len: u64) -> Result<(), FormatError> {
    let have = u64_from(bytes.len());
    if have < len {
        let from = start.saturating_add(have);
        let piece = ByteRange::from_bounds(from, from.saturating_add((len - have).max(PIECE)));
        bytes.extend_from_slice(&file.read(piece).await?);
        bytes.resize(bytes.len().max(usize_from(len)), 0);
    }
    Ok(())
}

fn slice(bytes: &[u8], at: u64, len: u64) -> &[u8] {
    &bytes[usize_from(at)..usize_from(at + len)]
}

/// Where the data of a bitmap is: the clusters that it names.
pub(super) async fn bitmap_clusters(file: &ImageFile, bitmap: &BitmapEntry) -> Result<Vec<u64>, FormatError> {
    let Some(table) = in_file(file, bitmap) else { return Ok(Vec::new()) };
    let entries = read_numbers(&file.read(table).await?);
    Ok(entries.into_iter().map(|entry| entry & OFFSET_MASK).filter(|offset| *offset != 0).collect())
}

/// The bitmaps of an image, unless they are out of date: then nothing of them is in use.
///
/// # Errors
/// [`FormatError::Header`] when they cannot be read; QEMU does not open such an image.
pub(super) async fn bitmaps(
    file: &ImageFile,
    header: &Header,
) -> Result<Option<(BitmapsExtension, Vec<BitmapEntry>)>, FormatError> {
    let Some(extension) = header.bitmaps.filter(|_| header.autoclear & autoclear::BITMAPS != 0) else {
        return Ok(None);
    };
    let bitmaps = header.read_bitmap_directory(file).await?;
    for bitmap in &bitmaps {
        if !bitmap.extra.is_empty() {
            return Err(FormatError::header("Bitmap extra data is not supported"));
        }
        // What one that was not saved says means nothing.
        if bitmap.flags & IN_USE == 0 {
            check_bitmap_table(file, bitmap, header).await?;
        }
    }
    Ok(Some((extension, bitmaps)))
}

/// What there is of a bitmap's table.
fn in_file(file: &ImageFile, bitmap: &BitmapEntry) -> Option<ByteRange> {
    bitmap.table_range().intersection(ByteRange::from_bounds(0, file.size()))
}

async fn check_bitmap_table(
    file: &ImageFile,
    bitmap: &BitmapEntry,
    header: &Header,
) -> Result<(), FormatError> {
    let layout = header.layout;
    if u64::from(bitmap.table.len) != bitmap.clusters(header.size, layout) {
        return Err(bitmap.unreadable_table());
    }
    let Some(table) = in_file(file, bitmap) else { return Ok(()) };
    let entries = read_numbers(&file.read(table).await?);
    let is_sound = entries.into_iter().all(|entry| Bits::decode(entry, layout).is_some());
    if is_sound { Ok(()) } else { Err(bitmap.unreadable_table()) }
}
