//! [`Extension`]: what stands between a header's fields and the end of the first cluster. [`Fields`]: numbers in the
//! first cluster.
//!
//! Pure. Follows the qcow2 specification, sections "Header extensions", "Feature name table" and "Bitmaps extension".

use std::ops::Range;

use super::error::FormatError;
use super::layout::Layout;
use crate::convert::usize_from;

pub(super) const END: u32 = 0;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const BITMAPS: u32 = 0x2385_2875;
pub(super) const ENCRYPTION: u32 = 0x0537_be77;
pub(super) const EXTERNAL_DATA_FILE: u32 = 0x4441_5441;
/// Our own type, which the specification lets readers ignore that do not know it: room between other extensions in
/// which there is nothing. What stands in it means nothing.
pub(super) const VACANT: u32 = u32::from_be_bytes(*b"hsVA");

/// Where the persistent dirty bitmaps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many there are.
    pub count: u32,
    /// Where their directory begins, in the image file.
    pub directory_offset: u64,
    /// Bytes in the directory.
    pub directory_size: u64,
}

/// An extension that is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// A cursor over big-endian numbers. Missing bytes read as zero; lengths are checked by the caller.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let found = self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
        found.unwrap_or([0; N])
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }
}

pub(super) fn bitmaps(data: &[u8], layout: Layout) -> Result<BitmapsExtension, FormatError> {
    if data.len() != 24 {
        return Err(FormatError::header("bitmaps_ext: Invalid extension length"));
    }
    let fields = Fields(data);
    let found = BitmapsExtension {
        count: fields.u32(0),
        directory_size: fields.u64(8),
        directory_offset: fields.u64(16),
    };
    if fields.u32(4) != 0 {
        return Err(FormatError::header("bitmaps_ext: Reserved field is not zero"));
    }
    if found.count == 0 {
        return Err(FormatError::header("found bitmaps extension with zero bitmaps"));
    }
    if layout.in_cluster(found.directory_offset) != 0 || found.directory_offset >> 56 != 0 {
        return Err(FormatError::header("bitmaps_ext: invalid bitmap directory offset"));
    }
    Ok(found)
}

impl BitmapsExtension {
    pub(super) fn encode(self) -> Vec<u8> {
        let count = u64::from(self.count) << 32;
        [count, self.directory_size, self.directory_offset].into_iter().flat_map(u64::to_be_bytes).collect()
    }
}

/// Writes an extension behind `bytes`.
pub(super) fn put_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// The place of an extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) kind: u32,
    /// Where its type stands, in the first cluster.
    pub(super) at: usize,
    /// Bytes of its data.
    pub(super) len: usize,
}

/// The places of the extensions in the part `room` of `cluster`, and where the last one ends.
pub(super) fn slots(cluster: &[u8], room: Range<usize>) -> (Vec<Slot>, usize) {
    let mut at = room.start;
    let mut found = Vec::new();
    for Extension { kind, data } in extensions(cluster.get(room).unwrap_or_default()).map_while(Result::ok) {
        found.push(Slot { kind, at, len: data.len() });
        at += 8 + data.len().next_multiple_of(8);
    }
    (found, at)
}

/// The extensions in `room`, to the one that says that it is the last.
pub(super) fn extensions(room: &[u8]) -> impl Iterator<Item = Result<Extension, FormatError>> {
    let mut at = 0;
    let mut has_ended = false;
    std::iter::from_fn(move || {
        if has_ended || at + 8 > room.len() {
            return None;
        }
        let fields = Fields(room);
        let (kind, len) = (fields.u32(at), usize_from(u64::from(fields.u32(at + 4))));
        at += 8;
        if kind == END {
            has_ended = true;
            return None;
        }
        let Some(data) = room.get(at..at.saturating_add(len)) else {
            has_ended = true;
            return Some(Err(FormatError::header("Header extension too large")));
        };
        at += len.next_multiple_of(8);
        Some(Ok(Extension { kind, data: data.to_vec() }))
    })
}

/// What the image itself calls its incompatible features: bit and name.
pub(super) fn feature_names(room: &[u8]) -> Vec<(u8, String)> {
    let table = extensions(room).map_while(Result::ok).find(|found| found.kind == FEATURE_NAMES);
    let entries = table.iter().flat_map(|table| table.data.chunks_exact(48));
    let name = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    entries.filter(|entry| entry[0] == 0).map(|entry| (entry[1], name(&entry[2..]))).collect()
}

pub(super) fn name_features(bits: u64, names: &[(u8, String)]) -> String {
    let mut left = bits;
    let mut said = Vec::new();
    for (bit, name) in names {
        let mask = 1_u64.checked_shl(u32::from(*bit)).unwrap_or(0);
        if left & mask != 0 {
            left &= !mask;
            said.push(name.clone());
        }
    }
    if left != 0 {
        said.push(format!("Unknown incompatible feature: {left:x}"));
    }
    said.join(", ")
}

/// The names of the features that this program knows.
pub(super) fn feature_name_table() -> Vec<u8> {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut table = Vec::with_capacity(NAMES.len() * 48);
    for (kind, bit, name) in NAMES {
        table.extend_from_slice(&[kind, bit]);
        table.extend_from_slice(name.as_bytes());
        table.resize(table.len().next_multiple_of(48), 0);
    }
    table
}
