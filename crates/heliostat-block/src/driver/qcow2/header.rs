//! [`Header`]: the first cluster of an image, read, checked against its limits, and written again.
//!
//! Pure. Follows the qcow2 specification, sections "Header" to "Bitmaps extension". Whatever it does not know and
//! may leave alone, it keeps: fields beyond the known ones, and extensions. Refuses, with QEMU's texts, what it must
//! not touch.

use std::ops::Range;

use super::error::FormatError;
use super::extension::{
    self, Fields, bitmaps, extensions, feature_name_table, feature_names, name_features, put_extension,
};
pub use super::extension::{BitmapsExtension, Extension};
use super::layout::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Layout};
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;

/// Bytes that tell whether a file is an image and how long its clusters are.
pub const HEADER_START: usize = 72;

const MAGIC: u32 = 0x5146_49fb;
const VERSION_3_LEN: usize = 104;
/// The length that we write: with the compression type.
const WRITTEN_LEN: usize = 112;
const COMPRESSION_TYPE: usize = 104;
/// What a medium writes wholly or not at all.
pub(super) const SECTOR: usize = 512;

/// QEMU's limits, which keep tables that a header announces out of reach of an attacker.
const L1_SIZE_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_SIZE_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u32 = 65_536;
const BACKING_NAME_MAX: u32 = 1023;

/// Incompatible features.
pub mod incompatible {
    /// Reference counts may be wrong.
    pub const DIRTY: u64 = 1;
    /// Anything may be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest clusters are in another file.
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    /// Compressed clusters are not compressed with deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub(super) const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;
}

/// Compatible features.
pub mod compatible {
    /// Reference counts may be brought up to date later.
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Autoclear features.
pub mod autoclear {
    /// The bitmaps are consistent.
    pub const BITMAPS: u64 = 1;
    /// The external data file alone is a raw image.
    pub const RAW_EXTERNAL_DATA: u64 = 1 << 1;
    pub(crate) const KNOWN: u64 = BITMAPS | RAW_EXTERNAL_DATA;
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Deflate without a zlib header (RFC 1951).
    #[default]
    Deflate,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// A table: where it begins, and how many entries or clusters it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Where, in the image file.
    pub offset: u64,
    /// Entries of the L1 table and the snapshot table; clusters of the refcount table.
    pub len: u32,
}

/// The first cluster of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Cluster size, width of reference counts, subclusters, version.
    pub layout: Layout,
    /// The virtual size in bytes.
    pub size: u64,
    /// The active L1 table; `len` counts entries.
    pub l1: Table,
    /// The refcount table; `len` counts clusters.
    pub refcount_table: Table,
    /// The snapshot table; `len` counts snapshots.
    pub snapshots: Table,
    /// See [`incompatible`].
    pub incompatible: u64,
    /// See [`compatible`]; unknown ones are kept.
    pub compatible: u64,
    /// See [`autoclear`].
    pub autoclear: u64,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The name of the backing file, as it stands in the image.
    pub backing_file: Option<Vec<u8>>,
    /// The name of the backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// The name of the external data file.
    pub data_file: Option<Vec<u8>>,
    /// The bitmaps extension. Consistent only with [`autoclear::BITMAPS`].
    pub bitmaps: Option<BitmapsExtension>,
    /// Fields after the known ones, as they stand.
    pub further_fields: Vec<u8>,
    /// Extensions that are not known, as they stand.
    pub further_extensions: Vec<Extension>,
}

impl Header {
    /// The cluster size of the image that begins with `start`, of which [`Header::decode`] needs so much.
    ///
    /// # Errors
    /// [`FormatError`] when this is no image, or none that can be read.
    pub fn cluster_size(start: &[u8]) -> Result<u64, FormatError> {
        let fields = Fields(start);
        if fields.u32(0) != MAGIC {
            return Err(FormatError::NotQcow2);
        }
        let version = fields.u32(4);
        if !matches!(version, 2 | 3) {
            return Err(FormatError::Unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let bits = fields.u32(20);
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            return Err(FormatError::header(format!("Unsupported cluster size: 2^{bits}")));
        }
        if start.len() < HEADER_START {
            return Err(FormatError::header("qcow2 header too short"));
        }
        Ok(1 << bits)
    }

    /// Reads the first cluster, or what there is of it.
    ///
    /// # Errors
    /// [`FormatError`] with what is wrong or not known.
    pub fn decode(cluster: &[u8]) -> Result<Self, FormatError> {
        let header = Self::decode_to_check(cluster)?;
        if header.refcount_table.len == 0 {
            return Err(FormatError::header("Image does not contain a reference count table"));
        }
        Ok(header)
    }

    /// As [`Header::decode`], and takes what a repair can put right: no reference counts at all.
    ///
    /// # Errors
    /// [`FormatError`] with what is wrong or not known.
    pub(super) fn decode_to_check(cluster: &[u8]) -> Result<Self, FormatError> {
        let cluster_size = Self::cluster_size(cluster)?;
        let cluster = &cluster[..cluster.len().min(usize_from(cluster_size))];
        let fields = Fields(cluster);
        let version = fields.u32(4);
        let len = if version == 2 { HEADER_START } else { usize_from(u64::from(fields.u32(100))) };
        if version >= 3 && len < VERSION_3_LEN {
            return Err(FormatError::header("qcow2 header too short"));
        }
        if u64_from(len) > cluster_size {
            return Err(FormatError::header("qcow2 header exceeds cluster size"));
        }
        // What is beyond the announced length is no field.
        let fields = Fields(&cluster[..len.min(cluster.len())]);
        let at_3 = |value: u64| if version >= 3 { value } else { 0 };
        let incompatible = at_3(fields.u64(72));
        let refcount_order = if version >= 3 { fields.u32(96) } else { 4 };
        let mut header = Self {
            layout: Layout {
                cluster_bits: fields.u32(20),
                refcount_order,
                extended_l2: incompatible & incompatible::EXTENDED_L2 != 0,
                version,
            },
            size: fields.u64(24),
            l1: Table { offset: fields.u64(40), len: fields.u32(36) },
            refcount_table: Table { offset: fields.u64(48), len: fields.u32(56) },
            snapshots: Table { offset: fields.u64(64), len: fields.u32(60) },
            incompatible,
            compatible: at_3(fields.u64(80)),
            autoclear: at_3(fields.u64(88)),
            compression: Compression::Deflate,
            backing_file: None,
            backing_format: None,
            data_file: None,
            bitmaps: None,
            further_fields: fields.0.get(WRITTEN_LEN..).unwrap_or_default().to_vec(),
            further_extensions: Vec::new(),
        };
        let (backing_offset, backing_len) = (fields.u64(8), fields.u32(16));
        let room_end = header.check_backing(backing_offset, backing_len)?;
        header.check_features(&fields, cluster, len)?;
        header.compression = compression(incompatible, fields.bytes::<1>(COMPRESSION_TYPE)[0])?;
        match fields.u32(32) {
            0 => {}
            1 => return Err(unsupported("Encrypted images (AES) are not supported")),
            2 => return Err(unsupported("Encrypted images (LUKS) are not supported")),
            other => return Err(unsupported(&format!("Unsupported encryption method {other}"))),
        }
        header.check_tables()?;
        let room = cluster.get(len..cluster.len().min(room_end)).unwrap_or_default();
        header.read_extensions(room)?;
        if backing_offset != 0 && backing_len > 0 {
            let start = usize_from(backing_offset);
            let name = cluster.get(start..start + usize_from(u64::from(backing_len)));
            header.backing_file =
                Some(name.ok_or_else(|| FormatError::header("Invalid backing file offset"))?.to_vec());
        }
        header.check_data_file()?;
        Ok(header)
    }

    /// The room for extensions in a header's first cluster.
    pub(super) fn extensions_room(cluster: &[u8]) -> Range<usize> {
        let fields = Fields(cluster);
        let start = if fields.u32(4) == 2 { HEADER_START } else { usize_from(u64::from(fields.u32(100))) };
        let end = match fields.u64(8) {
            0 => cluster.len(),
            name => cluster.len().min(usize_from(name)),
        };
        start..end.max(start)
    }

    /// Where the backing file's name stands in a header's first cluster.
    pub(super) fn backing_name_place(cluster: &[u8]) -> Option<Range<usize>> {
        let fields = Fields(cluster);
        let (start, len) = (usize_from(fields.u64(8)), usize_from(u64::from(fields.u32(16))));
        (start != 0).then(|| start..start.saturating_add(len))
    }

    /// Where the room for extensions ends.
    fn check_backing(&self, offset: u64, len: u32) -> Result<usize, FormatError> {
        let cluster_size = self.layout.cluster_size();
        if offset > cluster_size {
            return Err(FormatError::header("Invalid backing file offset"));
        }
        if offset != 0 && len > BACKING_NAME_MAX.min(u32::try_from(cluster_size - offset).unwrap_or(0)) {
            return Err(FormatError::header("Backing file name too long"));
        }
        Ok(usize_from(if offset == 0 { cluster_size } else { offset }))
    }

    fn check_features(&self, fields: &Fields<'_>, cluster: &[u8], len: usize) -> Result<(), FormatError> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let names = feature_names(cluster.get(len..).unwrap_or_default());
            return Err(unsupported(&format!(
                "Unsupported qcow2 feature(s): {}",
                name_features(unknown, &names)
            )));
        }
        if self.layout.refcount_order > 6 {
            return Err(FormatError::header("Reference count entry width too large; may not exceed 64 bits"));
        }
        if self.layout.extended_l2 && self.layout.unit() < 512 {
            return Err(FormatError::header(format!("Unsupported subcluster size: {}", self.layout.unit())));
        }
        // Must hold before anything is made of the offsets below.
        debug_assert_eq!(fields.u32(0), MAGIC);
        Ok(())
    }

    fn check_tables(&self) -> Result<(), FormatError> {
        let layout = self.layout;
        let is_placed = |table: Table, bytes: u64| {
            let end = table.offset.checked_add(bytes);
            layout.in_cluster(table.offset) == 0 && end.is_some_and(|end| end <= 1 << 63)
        };
        let refcount_bytes = u64::from(self.refcount_table.len) << layout.cluster_bits;
        if refcount_bytes > REFCOUNT_TABLE_SIZE_MAX {
            return Err(FormatError::header("Reference count table too large"));
        }
        if !is_placed(self.refcount_table, refcount_bytes) {
            return Err(FormatError::header("Reference count table offset invalid"));
        }
        if self.snapshots.len > SNAPSHOTS_MAX {
            return Err(FormatError::header("Snapshot table too large"));
        }
        if self.snapshots.len > 0 && !is_placed(self.snapshots, 0) {
            return Err(FormatError::header("Snapshot table offset invalid"));
        }
        let l1_bytes = u64::from(self.l1.len) * 8;
        if l1_bytes > L1_SIZE_MAX {
            return Err(FormatError::header("Active L1 table too large"));
        }
        if !is_placed(self.l1, l1_bytes) {
            return Err(FormatError::header("Active L1 table offset invalid"));
        }
        let needed = layout.l1_entries_for(self.size);
        if needed > L1_SIZE_MAX / 8 || self.size > 1 << 62 {
            return Err(FormatError::header("Image is too big"));
        }
        // A disk of no bytes has no table.
        if u64::from(self.l1.len) < needed {
            return Err(FormatError::header("L1 table is too small"));
        }
        Ok(())
    }

    fn check_data_file(&self) -> Result<(), FormatError> {
        let has_file = self.has_external_data();
        if self.autoclear & autoclear::RAW_EXTERNAL_DATA != 0 && !has_file {
            return Err(FormatError::header("data-file-raw requires a data file"));
        }
        Ok(())
    }

    fn read_extensions(&mut self, room: &[u8]) -> Result<(), FormatError> {
        for extension in extensions(room) {
            let Extension { kind, data } = extension?;
            match kind {
                extension::BACKING_FORMAT => self.backing_format = Some(data),
                extension::EXTERNAL_DATA_FILE => self.data_file = Some(data),
                extension::BITMAPS => self.bitmaps = Some(bitmaps(&data, self.layout)?),
                extension::ENCRYPTION => {
                    return Err(FormatError::header(
                        "CRYPTO header extension only expected with LUKS encryption method",
                    ));
                }
                // Ours name the same bits, and what is vacant is nothing.
                extension::FEATURE_NAMES | extension::VACANT => {}
                _ => self.further_extensions.push(Extension { kind, data }),
            }
        }
        Ok(())
    }

    /// Whether guest clusters are in another file.
    #[must_use]
    pub const fn has_external_data(&self) -> bool {
        self.incompatible & incompatible::EXTERNAL_DATA != 0
    }

    /// Whether the external data file alone must be a raw image at any time.
    #[must_use]
    pub const fn is_data_file_raw(&self) -> bool {
        self.autoclear & autoclear::RAW_EXTERNAL_DATA != 0
    }

    /// The header and its extensions as they go at the image's start: no longer than a cluster.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] when names and extensions do not fit into a cluster.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let layout = self.layout;
        let mut bytes = vec![0; if layout.version == 2 { HEADER_START } else { WRITTEN_LEN }];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC.to_be_bytes());
        put(4, &layout.version.to_be_bytes());
        put(20, &layout.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &self.l1.len.to_be_bytes());
        put(40, &self.l1.offset.to_be_bytes());
        put(48, &self.refcount_table.offset.to_be_bytes());
        put(56, &self.refcount_table.len.to_be_bytes());
        put(60, &self.snapshots.len.to_be_bytes());
        put(64, &self.snapshots.offset.to_be_bytes());
        if layout.version >= 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &layout.refcount_order.to_be_bytes());
            put(COMPRESSION_TYPE, &[u8::from(self.compression == Compression::Zstd)]);
            bytes.extend_from_slice(&self.further_fields);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            bytes[100..104].copy_from_slice(&len.to_be_bytes());
        }
        self.encode_extensions(&mut bytes);
        if let Some(name) = &self.backing_file {
            let offset = u64_from(bytes.len());
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            if len > BACKING_NAME_MAX {
                return Err(FormatError::Invalid("Backing file name too long".into()));
            }
            bytes[16..20].copy_from_slice(&len.to_be_bytes());
            bytes.extend_from_slice(name);
        }
        if u64_from(bytes.len()) > layout.cluster_size() {
            return Err(FormatError::Invalid(
                "the header and its extensions do not fit into a cluster; use larger clusters or a shorter \
                 backing file name"
                    .into(),
            ));
        }
        Ok(bytes)
    }

    fn encode_extensions(&self, bytes: &mut Vec<u8>) {
        let mut put = |kind, data: &[u8]| put_extension(bytes, kind, data);
        if let Some(format) = &self.backing_format {
            put(extension::BACKING_FORMAT, format);
        }
        if let Some(file) = self.data_file.as_ref().filter(|_| self.has_external_data()) {
            put(extension::EXTERNAL_DATA_FILE, file);
        }
        // The table takes 288 bytes or more: small clusters have no room for it beside a long name.
        if self.layout.version >= 3 && self.layout.cluster_bits >= 12 {
            put(extension::FEATURE_NAMES, &feature_name_table());
        }
        if let Some(bitmaps) = &self.bitmaps {
            put(extension::BITMAPS, &bitmaps.encode());
        }
        for Extension { kind, data } in &self.further_extensions {
            put(*kind, data);
        }
        put(extension::END, &[]);
    }

    /// Where the active L1 table stands.
    #[must_use]
    pub fn l1_range(&self) -> ByteRange {
        ByteRange::from_bounds(self.l1.offset, self.l1.offset + u64::from(self.l1.len) * 8)
    }

    /// Where the refcount table stands.
    #[must_use]
    pub fn refcount_table_range(&self) -> ByteRange {
        let Table { offset, len } = self.refcount_table;
        ByteRange::from_bounds(offset, offset + (u64::from(len) << self.layout.cluster_bits))
    }
}

fn unsupported(text: &str) -> FormatError {
    FormatError::Unsupported(text.to_owned())
}

fn compression(incompatible: u64, kind: u8) -> Result<Compression, FormatError> {
    let is_marked = incompatible & incompatible::COMPRESSION != 0;
    match (kind, is_marked) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => {
            Err(FormatError::header("qcow2: Compression type incompatible feature bit must not be set"))
        }
        (1, false) => {
            Err(FormatError::header("qcow2: Compression type incompatible feature bit must be set"))
        }
        (other, _) => Err(unsupported(&format!("qcow2: unknown compression type: {other}"))),
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
