//! The two tables whose entries have names: snapshots and persistent bitmaps. Read as far as a damaged image allows,
//! so that what they lead to can be counted, and what is broken dropped.

use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::header::{BitmapsExtension, Header, Table, autoclear};
use super::super::layout::Layout;
use super::super::state::read_numbers;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;

/// QEMU's limits.
const SNAPSHOTS_SIZE_MAX: u64 = 64 << 20;
const EXTRA_MAX: u64 = 1024;
const BITMAPS_MAX: u32 = 65_535;
const DIRECTORY_SIZE_MAX: u64 = 65_535 * 1024;
const BITMAP_NAME_MAX: usize = 1023;
const BITMAP_TABLE_ENTRIES_MAX: u64 = 0x800_0000;
/// The fixed part of a snapshot's entry.
const SNAPSHOT_LEN: u64 = 40;
/// What version 3 asks of an entry: the long size of the machine's state, and the size of the disk.
const EXTRA_MIN: usize = 16;
/// The fixed part of a bitmap's entry.
const BITMAP_LEN: usize = 24;
/// Bits of a bitmap's entry in a table: where its data is.
const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// A bitmap was not saved; its contents say nothing.
const IN_USE: u32 = 1;
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

/// A persistent bitmap: where its table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    pub(super) table: ByteRange,
}

impl Bitmap {
    /// Where its data is: the clusters that it names.
    pub(super) async fn clusters(&self, file: &ImageFile) -> Result<Vec<u64>, FormatError> {
        if self.table.offset() >= file.size() {
            return Ok(Vec::new());
        }
        let entries = read_numbers(&file.read(self.table).await?);
        Ok(entries
            .into_iter()
            .map(|entry| entry & BITMAP_OFFSET_MASK)
            .filter(|offset| *offset != 0)
            .collect())
    }
}

/// The bitmaps of an image, unless they are out of date: then nothing of them is in use.
///
/// # Errors
/// [`FormatError::Header`] when they cannot be read; QEMU does not open such an image.
pub(super) async fn bitmaps(
    file: &ImageFile,
    header: &Header,
) -> Result<Option<(BitmapsExtension, Vec<Bitmap>)>, FormatError> {
    let Some(extension) = header.bitmaps.filter(|_| header.autoclear & autoclear::BITMAPS != 0) else {
        return Ok(None);
    };
    if extension.count > BITMAPS_MAX {
        let text = "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of 65535";
        return Err(FormatError::Header(text.replace("{count}", &extension.count.to_string())));
    }
    if extension.directory_size > DIRECTORY_SIZE_MAX {
        return Err(FormatError::Header(format!(
            "bitmaps_ext: bitmap directory size ({}) exceeds the maximum supported size ({DIRECTORY_SIZE_MAX})",
            extension.directory_size
        )));
    }
    let start = extension.directory_offset;
    let directory = file.read(ByteRange::from_bounds(start, start + extension.directory_size)).await?;
    let mut found = Vec::new();
    let mut at = 0;
    while at < directory.len() {
        if u64_from(found.len()) >= u64::from(extension.count) {
            return Err(FormatError::header("More bitmaps found than specified in header extension"));
        }
        let (bitmap, is_in_use, len) = bitmap(&directory[at..], header)?;
        if !is_in_use {
            check_bitmap_table(file, bitmap, header.layout).await?;
        }
        found.push(bitmap);
        at += len;
    }
    if u64_from(found.len()) != u64::from(extension.count) {
        return Err(FormatError::header("Less bitmaps found than specified in header extension"));
    }
    Ok(Some((extension, found)))
}

/// Reads the entry of the directory with which `bytes` begins. Returns it, whether its contents are void, and its
/// length.
fn bitmap(bytes: &[u8], header: &Header) -> Result<(Bitmap, bool, usize), FormatError> {
    let broken = || FormatError::header("Broken bitmap directory");
    let fixed = bytes.get(..BITMAP_LEN).ok_or_else(broken)?;
    let number =
        |at: usize, len: usize| fixed[at..at + len].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
    let (offset, entries, flags) = (number(0, 8), number(8, 4), u32::try_from(number(12, 4)).unwrap_or(0));
    let (kind, granularity_bits) = (number(16, 1), number(17, 1));
    let (name_len, extra_len) = (usize_from(number(18, 2)), usize_from(number(20, 4)));
    let len = BITMAP_LEN.saturating_add(extra_len).saturating_add(name_len).next_multiple_of(8);
    let entry = bytes.get(..len).ok_or_else(broken)?;
    if extra_len != 0 {
        return Err(FormatError::header("Bitmap extra data is not supported"));
    }
    let name = String::from_utf8_lossy(&entry[BITMAP_LEN..BITMAP_LEN + name_len]);
    let is_in_use = flags & IN_USE != 0;
    let table_max = entries <= BITMAP_TABLE_ENTRIES_MAX && offset >> 56 == 0;
    let is_sound = name_len > 0
        && name_len <= BITMAP_NAME_MAX
        && entries > 0
        && table_max
        && offset != 0
        && header.layout.in_cluster(offset) == 0
        && flags & !7 == 0
        && kind == 1
        && (9..=31).contains(&granularity_bits);
    if !is_sound {
        return Err(FormatError::Header(format!("Bitmap '{name}' doesn't satisfy the constraints")));
    }
    let bits = header.size.div_ceil(1 << granularity_bits);
    if !is_in_use && header.layout.clusters_for(bits.div_ceil(8)) != entries {
        return Err(unreadable_table(&name));
    }
    let table = ByteRange::from_bounds(offset, offset + entries * 8);
    Ok((Bitmap { table }, is_in_use, len))
}

async fn check_bitmap_table(file: &ImageFile, bitmap: Bitmap, layout: Layout) -> Result<(), FormatError> {
    if bitmap.table.offset() >= file.size() {
        return Ok(());
    }
    for entry in read_numbers(&file.read(bitmap.table).await?) {
        let offset = entry & BITMAP_OFFSET_MASK;
        let reserved = if offset == 0 { !(BITMAP_OFFSET_MASK | 1) } else { !BITMAP_OFFSET_MASK };
        if entry & reserved != 0 || layout.in_cluster(offset) != 0 {
            return Err(unreadable_table(""));
        }
    }
    Ok(())
}

fn unreadable_table(name: &str) -> FormatError {
    FormatError::Header(format!(
        "Could not read bitmap_table table from image for bitmap '{name}': Invalid argument"
    ))
}
