//! [`CreateOptions`], [`create`]: an empty image, made so that a crash leaves either no image or a good one.
//!
//! What cannot be had is refused, with QEMU's texts, before a byte is written. The header is written last, after a
//! flush: until then the file is not taken for an image. Called by the command line and by `blockdev-create`.

use bytes::Bytes;

use super::entry::{COPIED, L1Entry};
use super::error::FormatError;
use super::file::ImageFile;
use super::header::{Compression, HEADER_START, Header, Table, autoclear, compatible, incompatible};
use super::layout::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Layout};
pub use super::resize::Preallocation;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;
use crate::storage::ZeroSpace;

/// The unit of virtual sizes: what is asked for is rounded up to it, as QEMU does.
const SECTOR: u64 = 512;
/// The smallest cluster that has subclusters.
const EXTENDED_L2_CLUSTER_BITS_MIN: u32 = 14;
/// QEMU's limits: nobody opens an image with longer tables.
const L1_ENTRIES_MAX: u64 = (32 << 20) / 8;
const REFCOUNT_TABLE_SIZE_MAX: u64 = 8 << 20;
/// Tables are written in pieces of this length, so that memory does not grow with the image.
const PIECE: u64 = 1 << 20;
/// The width that every version 2 image has.
const REFCOUNT_ORDER_DEFAULT: u32 = 4;

/// What image to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The virtual size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// Bytes in a cluster, as a power of two.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// Bits in a reference count, as a power of two.
    pub refcount_order: u32,
    /// The name of the backing file, as it is to stand in the image.
    pub backing_file: Option<Vec<u8>>,
    /// The name of the backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// How much is there from the start.
    pub preallocation: Preallocation,
    /// Whether reference counts may be brought up to date later.
    pub lazy_refcounts: bool,
    /// How compressed clusters are to be compressed.
    pub compression: Compression,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// The name of the external data file, as it is to stand in the image.
    pub data_file: Option<Vec<u8>>,
    /// Whether the external data file alone is to be a raw image at any time.
    pub data_file_raw: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_bits: 16,
            version: 3,
            refcount_order: REFCOUNT_ORDER_DEFAULT,
            backing_file: None,
            backing_format: None,
            preallocation: Preallocation::Off,
            lazy_refcounts: false,
            compression: Compression::Deflate,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
        }
    }
}

/// Where everything goes, in clusters: the header, the refcount table, the refcount blocks, the L1 table, the L2
/// tables, the guest's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    layout: Layout,
    /// The virtual size.
    size: u64,
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
    l1_clusters: u64,
    /// None where nothing is preallocated.
    l2_tables: u64,
    /// Guest clusters that have a place from the start.
    guest_clusters: u64,
    /// None where they are in the external data file.
    data_clusters: u64,
}

fn invalid<T>(text: &str) -> Result<T, FormatError> {
    Err(FormatError::Invalid(text.to_owned()))
}

fn too_large<T>() -> Result<T, FormatError> {
    invalid("The image size is too large for file format 'qcow2' (try using a larger cluster size)")
}

impl CreateOptions {
    /// Says whether such an image can be made. Looks at no file.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] with what is wrong, in QEMU's words.
    pub fn check(&self) -> Result<(), FormatError> {
        self.check_version()?;
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&self.cluster_bits) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if self.refcount_order > 6 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.extended_l2 && self.cluster_bits < EXTENDED_L2_CLUSTER_BITS_MIN {
            return invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return invalid("Backing format cannot be used without backing file");
        }
        if self.backing_file.as_ref().is_some_and(Vec::is_empty) {
            return invalid("Expected backing file name, got empty string");
        }
        if self.data_file_raw && self.data_file.is_none() {
            return invalid("data-file-raw requires data-file");
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return invalid("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            );
        }
        let plan = self.plan()?;
        self.header(plan)?.encode()?;
        Ok(())
    }

    fn check_version(&self) -> Result<(), FormatError> {
        let needs_3 = |what: &str| {
            let text = format!("{what} compatibility level 1.1 and above (use version=v3 or greater)");
            Err(FormatError::Invalid(text))
        };
        match self.version {
            3 => Ok(()),
            2 if self.lazy_refcounts => needs_3("Lazy refcounts only supported with"),
            2 if self.refcount_order != REFCOUNT_ORDER_DEFAULT => invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 \
                 or greater)",
            ),
            2 if self.data_file.is_some() => needs_3("External data files are only supported with"),
            2 if self.extended_l2 => needs_3("Extended L2 entries are only supported with"),
            2 if self.compression != Compression::Deflate => {
                needs_3("Non-zlib compression type is only supported with")
            }
            2 => Ok(()),
            other => invalid(&format!("Parameter 'version' does not accept value '{other}'")),
        }
    }

    fn layout(&self) -> Layout {
        Layout {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2,
            version: self.version,
        }
    }

    /// Whether every guest cluster has its place from the start. A data file that is a raw image holds all of the
    /// disk, so all of it is mapped.
    fn maps_all(&self) -> bool {
        self.preallocation != Preallocation::Off || self.data_file_raw
    }

    fn plan(&self) -> Result<Plan, FormatError> {
        let layout = self.layout();
        let Some(size) = self.size.checked_next_multiple_of(SECTOR) else { return too_large() };
        let l1_entries = layout.l1_entries_for(size);
        if l1_entries > L1_ENTRIES_MAX || size > 1 << 62 {
            return too_large();
        }
        let guest_clusters = if self.maps_all() { layout.clusters_for(size) } else { 0 };
        let mut plan = Plan {
            layout,
            size,
            table_clusters: 1,
            blocks: 1,
            // An L1 table has at least one entry, even where there is no disk.
            l1_entries: l1_entries.max(1),
            l1_clusters: layout.clusters_for(l1_entries.max(1) * 8),
            l2_tables: if self.maps_all() { l1_entries } else { 0 },
            guest_clusters,
            data_clusters: if self.data_file.is_some() { 0 } else { guest_clusters },
        };
        // The counts count themselves; each round adds fewer than the one before.
        loop {
            let blocks = plan.clusters().div_ceil(layout.refcount_block_entries());
            let table_clusters = layout.clusters_for(blocks * 8);
            if table_clusters << layout.cluster_bits > REFCOUNT_TABLE_SIZE_MAX {
                return too_large();
            }
            if (blocks, table_clusters) == (plan.blocks, plan.table_clusters) {
                return Ok(plan);
            }
            (plan.blocks, plan.table_clusters) = (blocks, table_clusters);
        }
    }

    fn header(&self, plan: Plan) -> Result<Header, FormatError> {
        let narrow = |number: u64| u32::try_from(number).or_else(|_| too_large());
        let bit = |is_set: bool, bit: u64| if is_set { bit } else { 0 };
        Ok(Header {
            layout: plan.layout,
            size: plan.size,
            l1: Table { offset: plan.l1(), len: narrow(plan.l1_entries)? },
            refcount_table: Table { offset: plan.offset_of(1), len: narrow(plan.table_clusters)? },
            snapshots: Table::default(),
            incompatible: bit(self.data_file.is_some(), incompatible::EXTERNAL_DATA)
                | bit(self.compression != Compression::Deflate, incompatible::COMPRESSION)
                | bit(self.extended_l2, incompatible::EXTENDED_L2),
            compatible: bit(self.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear: bit(self.data_file_raw, autoclear::RAW_EXTERNAL_DATA),
            compression: self.compression,
            backing_file: self.backing_file.clone(),
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            bitmaps: None,
            further_fields: Vec::new(),
            further_extensions: Vec::new(),
        })
    }
}

impl Plan {
    const fn clusters(self) -> u64 {
        1 + self.table_clusters + self.blocks + self.l1_clusters + self.l2_tables + self.data_clusters
    }

    const fn offset_of(self, cluster: u64) -> u64 {
        cluster << self.layout.cluster_bits
    }

    const fn first_block(self) -> u64 {
        self.offset_of(1 + self.table_clusters)
    }

    const fn l1(self) -> u64 {
        self.first_block() + self.offset_of(self.blocks)
    }

    const fn first_l2(self) -> u64 {
        self.l1() + self.offset_of(self.l1_clusters)
    }

    const fn data(self) -> u64 {
        self.first_l2() + self.offset_of(self.l2_tables)
    }

    const fn end(self) -> u64 {
        self.offset_of(self.clusters())
    }

    /// The entry of the refcount table: where the block of that number stands.
    const fn refcount_entry(self, index: u64) -> u64 {
        if index < self.blocks { self.first_block() + self.offset_of(index) } else { 0 }
    }

    const fn l1_entry(self, index: u64) -> u64 {
        if index < self.l2_tables { L1Entry::owned(self.first_l2() + self.offset_of(index)).0 } else { 0 }
    }

    /// A word of the L2 tables, which follow each other. Subclusters are left unallocated, so that a backing file
    /// is seen through them, but where the data file alone must show the same: there all of them are data.
    const fn l2_word(self, index: u64, is_external: bool, is_raw: bool) -> u64 {
        let words = self.layout.l2_entry_size() / 8;
        let cluster = index / words;
        if cluster >= self.guest_clusters {
            return 0;
        }
        if !index.is_multiple_of(words) {
            return if is_raw { 0xffff_ffff } else { 0 };
        }
        let base = if is_external { 0 } else { self.data() };
        (base + self.offset_of(cluster)) | COPIED
    }
}

/// Makes an empty image in `file`, which must be empty or may be lost, and lays out `data_file`, which must be given
/// exactly where the options name one. Durable when it returns.
///
/// # Errors
/// [`FormatError::Invalid`] before anything is written, see [`CreateOptions::check`]; later those of the files. What
/// is left then is not taken for an image.
///
/// # Cancel safety
/// As after an error.
pub async fn create(
    file: &ImageFile,
    data_file: Option<&ImageFile>,
    options: &CreateOptions,
) -> Result<(), FormatError> {
    options.check()?;
    if data_file.is_some() != options.data_file.is_some() {
        return invalid("data-file must be opened exactly where the image names one");
    }
    let plan = options.plan()?;
    let header = options.header(plan)?.encode()?;
    // Whatever was there is no image any more before anything else of it goes.
    if file.size() > 0 {
        write_zeroes(file, 0, plan.layout.cluster_size().min(file.size())).await?;
        file.flush().await?;
    }
    set_size(file, plan.end()).await?;
    write_tables(file, plan, options).await?;
    let data = ByteRange::from_bounds(plan.data(), plan.end());
    preallocate(file, data, options.preallocation).await?;
    if let Some(data_file) = data_file {
        set_size(data_file, plan.size).await?;
        preallocate(data_file, ByteRange::from_bounds(0, plan.size), options.preallocation).await?;
        data_file.flush().await?;
    }
    file.flush().await?;
    // The magic number goes last: a header that is torn in the middle is none.
    let header = Bytes::from(header);
    let start = HEADER_START.min(header.len());
    file.write(u64_from(start), header.slice(start..)).await?;
    file.flush().await?;
    file.write(0, header.slice(..start)).await?;
    file.flush().await?;
    Ok(())
}

/// Makes a file as long as is needed; one that is longer and cannot be cut, a block device, stays as it is.
async fn set_size(file: &ImageFile, size: u64) -> Result<(), FormatError> {
    match file.set_size(size).await {
        Err(_) if file.size() >= size => Ok(()),
        result => Ok(result?),
    }
}

async fn write_zeroes(file: &ImageFile, start: u64, end: u64) -> Result<(), FormatError> {
    Ok(file.write_zeroes(ByteRange::from_bounds(start, end), ZeroSpace::MayUnmap).await?)
}

async fn write_tables(file: &ImageFile, plan: Plan, options: &CreateOptions) -> Result<(), FormatError> {
    let (is_external, is_raw) = (options.data_file.is_some(), options.data_file_raw);
    // Only what is not zero is written: a table of a huge image is a hole.
    write_zeroes(file, 0, plan.first_block()).await?;
    write_words(file, plan.offset_of(1), plan.blocks, |index| plan.refcount_entry(index)).await?;
    write_refcounts(file, plan).await?;
    write_zeroes(file, plan.l1(), plan.first_l2()).await?;
    write_words(file, plan.l1(), plan.l2_tables, |index| plan.l1_entry(index)).await?;
    let words = plan.offset_of(plan.l2_tables) / 8;
    write_words(file, plan.first_l2(), words, |index| plan.l2_word(index, is_external, is_raw)).await
}

/// Writes `count` big-endian numbers at `start`.
async fn write_words(
    file: &ImageFile,
    start: u64,
    count: u64,
    word: impl Fn(u64) -> u64,
) -> Result<(), FormatError> {
    for piece in ByteRange::from_bounds(0, count * 8).pieces(PIECE) {
        let words = piece.offset() / 8..piece.end() / 8;
        let bytes: Vec<u8> = words.flat_map(|index| word(index).to_be_bytes()).collect();
        file.write(start + piece.offset(), bytes.into()).await?;
    }
    Ok(())
}

/// Writes the refcount blocks: each cluster of the image is used once.
async fn write_refcounts(file: &ImageFile, plan: Plan) -> Result<(), FormatError> {
    let layout = plan.layout;
    let per_byte = |bytes: u64| (bytes * 8) >> layout.refcount_order;
    for piece in
        ByteRange::from_bounds(0, plan.offset_of(plan.blocks)).pieces(PIECE.max(layout.cluster_size()))
    {
        let mut bytes = vec![0; usize_from(piece.len())];
        let first = per_byte(piece.offset());
        for index in 0..per_byte(piece.len()).min(plan.clusters().saturating_sub(first)) {
            layout.set_refcount(&mut bytes, index, 1);
        }
        file.write(plan.first_block() + piece.offset(), bytes.into()).await?;
    }
    Ok(())
}

async fn preallocate(file: &ImageFile, range: ByteRange, how: Preallocation) -> Result<(), FormatError> {
    if range.is_empty() {
        return Ok(());
    }
    match how {
        Preallocation::Off | Preallocation::Metadata => {
            file.write_zeroes(range, ZeroSpace::MayUnmap).await?;
        }
        Preallocation::Falloc => file.write_zeroes(range, ZeroSpace::Keep).await?,
        Preallocation::Full => {
            let zeroes = Bytes::from(vec![0; usize_from(PIECE)]);
            for piece in range.pieces(PIECE) {
                file.write(piece.offset(), zeroes.slice(..usize_from(piece.len()))).await?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "create_tests.rs"]
mod tests;
