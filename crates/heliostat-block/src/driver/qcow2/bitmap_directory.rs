//! [`BitmapEntry`]: a persistent dirty bitmap, as the bitmap directory names it.
//!
//! Pure. Follows the qcow2 specification, sections "Bitmap directory" and "Bitmap table".

use std::collections::BTreeSet;

use super::entry::OFFSET_MASK;
use super::error::FormatError;
use super::header::{BitmapsExtension, Table};
use super::layout::Layout;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;

/// The bitmap was not saved, and may say anything.
pub const IN_USE: u32 = 1;
/// The bitmap follows every write.
pub const AUTO: u32 = 2;
/// Extra data that is not known may be left as it is, and the bitmap used.
pub const EXTRA_COMPATIBLE: u32 = 4;

/// A table's entry: the bits that it stands for are all set.
const ALL_ONES: u64 = 1;

/// A dirty tracking bitmap, the only kind there is.
const DIRTY_TRACKING: u8 = 1;

/// QEMU's limits.
const COUNT_MAX: u32 = 65_535;
const DIRECTORY_SIZE_MAX: u64 = 65_535 * 1024;
const NAME_MAX: usize = 1023;
const TABLE_LEN_MAX: u32 = 0x800_0000;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// The fixed part of an entry.
const FIXED_LEN: usize = 24;

/// A persistent dirty bitmap, as the directory names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Its name.
    pub name: Vec<u8>,
    /// Where its table is; `len` counts entries.
    pub table: Table,
    /// [`IN_USE`], [`AUTO`], [`EXTRA_COMPATIBLE`].
    pub flags: u32,
    /// Bytes of the disk for each bit, as a power of two.
    pub granularity_bits: u8,
    /// What is not known of it, as it stands.
    pub extra: Vec<u8>,
}

impl BitmapEntry {
    /// Says whether its bits mean what they say, and may be changed.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.flags & IN_USE == 0 && self.extra.is_empty()
    }

    /// Bytes of the disk for each bit.
    #[must_use]
    pub const fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Clusters that its bits take, for a disk of `size` bytes.
    #[must_use]
    pub const fn clusters(&self, size: u64, layout: Layout) -> u64 {
        layout.clusters_for(size.div_ceil(self.granularity()).div_ceil(8))
    }

    /// Where its table stands.
    pub(super) fn table_range(&self) -> ByteRange {
        let Table { offset, len } = self.table;
        ByteRange::from_bounds(offset, offset + u64::from(len) * 8)
    }

    /// What says that its table cannot be read.
    pub(super) fn unreadable_table(&self) -> FormatError {
        let name = String::from_utf8_lossy(&self.name);
        FormatError::header(format!(
            "Could not read bitmap_table table from image for bitmap '{name}': Invalid argument"
        ))
    }

    fn len(&self) -> usize {
        (FIXED_LEN + self.extra.len() + self.name.len()).next_multiple_of(8)
    }
}

/// What an entry of a bitmap's table says of the bits that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    /// None is set.
    Zeroes,
    /// All are set.
    Ones,
    /// They are in the cluster that begins here.
    At(u64),
}

impl Bits {
    /// Reads an entry; `None` where it makes no sense.
    pub(super) const fn decode(entry: u64, layout: Layout) -> Option<Self> {
        match (entry & OFFSET_MASK, entry & !OFFSET_MASK) {
            (0, 0) => Some(Self::Zeroes),
            (0, ALL_ONES) => Some(Self::Ones),
            (offset, 0) if layout.in_cluster(offset) == 0 => Some(Self::At(offset)),
            _ => None,
        }
    }
}

impl BitmapsExtension {
    /// Where the directory stands.
    ///
    /// # Errors
    /// [`FormatError::Header`] when it is beyond the limits.
    pub fn directory(&self) -> Result<ByteRange, FormatError> {
        let Self { count, directory_offset: start, directory_size: len } = *self;
        if count > COUNT_MAX {
            return Err(FormatError::header(format!(
                "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {COUNT_MAX}"
            )));
        }
        if len > DIRECTORY_SIZE_MAX {
            return Err(FormatError::header(format!(
                "bitmaps_ext: bitmap directory size ({len}) exceeds the maximum supported size ({DIRECTORY_SIZE_MAX})"
            )));
        }
        Ok(ByteRange::from_bounds(start, start.saturating_add(len)))
    }
}

/// Reads a directory of `count` entries.
///
/// # Errors
/// [`FormatError::Header`], in QEMU's words, when it contradicts itself or is beyond the limits.
pub fn decode_directory(bytes: &[u8], count: u32, layout: Layout) -> Result<Vec<BitmapEntry>, FormatError> {
    let mut entries: Vec<BitmapEntry> = Vec::new();
    let mut names = BTreeSet::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        if u64_from(entries.len()) >= u64::from(count) {
            return Err(FormatError::header("More bitmaps found than specified in header extension"));
        }
        let entry = decode_entry(rest, layout)?;
        if !names.insert(entry.name.clone()) {
            let name = String::from_utf8_lossy(&entry.name);
            return Err(FormatError::header(format!("Bitmap already exists: {name}")));
        }
        rest = rest.get(entry.len()..).ok_or_else(|| FormatError::header("Broken bitmap directory"))?;
        entries.push(entry);
    }
    if u64_from(entries.len()) < u64::from(count) {
        return Err(FormatError::header("Less bitmaps found than specified in header extension"));
    }
    Ok(entries)
}

/// Reads the entry with which `bytes` begins.
fn decode_entry(bytes: &[u8], layout: Layout) -> Result<BitmapEntry, FormatError> {
    let broken = || FormatError::header("Broken bitmap directory");
    let fixed: &[u8; FIXED_LEN] = bytes.first_chunk().ok_or_else(broken)?;
    let number =
        |at: usize, len: usize| fixed[at..at + len].iter().fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
    let short = |at: usize| u32::try_from(number(at, 4)).unwrap_or(u32::MAX);
    let (name_len, extra_len) = (usize_from(number(18, 2)), usize_from(number(20, 4)));
    let start = FIXED_LEN.saturating_add(extra_len);
    let body = bytes.get(..start.saturating_add(name_len)).ok_or_else(broken)?;
    let entry = BitmapEntry {
        name: body[start..].to_vec(),
        table: Table { offset: number(0, 8), len: short(8) },
        flags: short(12),
        granularity_bits: fixed[17],
        extra: body[FIXED_LEN..start].to_vec(),
    };
    let Table { offset, len } = entry.table;
    let is_sound = (1..=NAME_MAX).contains(&name_len)
        && (1..=TABLE_LEN_MAX).contains(&len)
        && offset != 0
        && offset >> 56 == 0
        && layout.in_cluster(offset) == 0
        && fixed[16] == DIRTY_TRACKING
        && entry.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) == 0
        && GRANULARITY_BITS.contains(&entry.granularity_bits);
    if is_sound {
        return Ok(entry);
    }
    let name = String::from_utf8_lossy(&entry.name);
    Err(FormatError::header(format!("Bitmap '{name}' doesn't satisfy the constraints")))
}

/// Writes a directory.
#[must_use]
pub fn encode_directory<'a>(entries: impl IntoIterator<Item = &'a BitmapEntry>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        let end = bytes.len() + entry.len();
        bytes.extend_from_slice(&entry.table.offset.to_be_bytes());
        bytes.extend_from_slice(&entry.table.len.to_be_bytes());
        bytes.extend_from_slice(&entry.flags.to_be_bytes());
        bytes.extend_from_slice(&[DIRTY_TRACKING, entry.granularity_bits]);
        bytes.extend_from_slice(&u16::try_from(entry.name.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(entry.extra.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend_from_slice(&entry.extra);
        bytes.extend_from_slice(&entry.name);
        bytes.resize(end, 0);
    }
    bytes
}

/// The runs of set bits in a piece of a bitmap: first and length, in bits.
pub(super) fn runs(bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let bit = |at: u64| bytes.get(usize_from(at / 8)).is_some_and(|byte| byte >> (at % 8) & 1 == 1);
    let end = u64_from(bytes.len()) * 8;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < end && !bit(at) {
            // Whole bytes of nothing are passed at once.
            at += if at.is_multiple_of(8) && bytes[usize_from(at / 8)] == 0 { 8 } else { 1 };
        }
        let first = at;
        while at < end && bit(at) {
            at += if at.is_multiple_of(8) && bytes[usize_from(at / 8)] == 0xff { 8 } else { 1 };
        }
        (at > first).then_some((first, at - first))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { cluster_bits: 16, refcount_order: 4, extended_l2: false, version: 3 };

    fn entry(name: &str) -> BitmapEntry {
        BitmapEntry {
            name: name.into(),
            table: Table { offset: 0x5_0000, len: 1 },
            flags: AUTO,
            granularity_bits: 16,
            extra: Vec::new(),
        }
    }

    #[test]
    fn what_is_encoded_is_decoded_alike() {
        let strange =
            BitmapEntry { extra: vec![1, 2, 3], flags: IN_USE | EXTRA_COMPATIBLE, ..entry("other") };
        let entries = vec![entry("one"), strange];
        let bytes = encode_directory(&entries);
        assert_eq!(decode_directory(&bytes, 2, LAYOUT).unwrap(), entries);
        assert!(entries[0].is_usable() && !entries[1].is_usable());
    }

    #[test]
    fn damaged_directories_are_refused() {
        let bytes = encode_directory(&[entry("one")]);
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                let _ = decode_directory(&bytes, 1, LAYOUT);
                assert!(decode_directory(&bytes[..at], 1, LAYOUT).is_err());
            }
        }
        assert!(decode_directory(&bytes, 2, LAYOUT).is_err());
        assert!(decode_directory(&encode_directory(&[entry("a"), entry("a")]), 2, LAYOUT).is_err());
        assert!(decode_directory(&encode_directory(&[entry("")]), 1, LAYOUT).is_err());
    }

    #[test]
    fn entries_of_a_table_that_make_no_sense_are_seen() {
        let decode = |entry| Bits::decode(entry, LAYOUT);
        assert_eq!(decode(0), Some(Bits::Zeroes));
        assert_eq!(decode(1), Some(Bits::Ones));
        assert_eq!(decode(0x5_0000), Some(Bits::At(0x5_0000)));
        for strange in [2, 3, 1 << 56, 0x5_0001, 0x5_0200, 1 << 63 | 0x5_0000] {
            assert_eq!(decode(strange), None, "{strange:#x}");
        }
    }

    #[test]
    fn runs_are_found_across_bytes() {
        let found: Vec<_> = runs(&[0, 0b1100_0000, 0xff, 0b1, 0, 0b10]).collect();
        assert_eq!(found, [(14, 11), (41, 1)]);
        assert_eq!(runs(&[0; 4]).next(), None);
    }
}
