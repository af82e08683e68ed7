//! Opening an image: its header, its tables, and what has to be put right before it may be written.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use bytes::Bytes;

use super::bitmaps as stored;
use super::check;
use super::commit::Commits;
use super::entry::L1Entry;
use super::error::{Corruption, FormatError};
use super::file::ImageFile;
use super::header::{HEADER_START, Header, autoclear, incompatible};
use super::in_flight::{Allocations, Epochs};
use super::slices::Slices;
use super::snapshot::{Snapshot, decode_table};
use super::state::{State, read_numbers};
use super::{Backing, Qcow2, StoredBitmap};
use crate::buffer::Buffer;
use crate::node::Node;
use crate::range::ByteRange;
use crate::range_lock::RangeLock;
use crate::storage::Storage;

/// The most memory that is spent on tables, unless more is asked for.
pub const CACHE_MAX: u64 = 32 << 20;

/// Where the header keeps its features.
pub(crate) const INCOMPATIBLE_WORD: u64 = 72;
pub(super) const AUTOCLEAR_WORD: u64 = 88;

/// What the snapshot table is read in.
const SNAPSHOT_PIECE: u64 = 64 << 10;

/// How an image is opened.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// It will not be written.
    pub read_only: bool,
    /// What is below it; none where the image names none.
    pub backing: Option<Arc<Node>>,
    /// Its external data file, where it has one.
    pub data_file: Option<Arc<dyn Storage>>,
    /// Bytes of memory for its tables; where nothing is said, what the image needs, up to [`CACHE_MAX`].
    pub cache: Option<u64>,
}

impl Header {
    /// Reads the header of the image in `file`.
    ///
    /// # Errors
    /// [`FormatError`], by what is wrong.
    pub async fn read(file: &ImageFile) -> Result<Self, FormatError> {
        Self::decode(&Self::first_cluster(file).await?)
    }

    /// Reads the header of an image that is to be checked, and perhaps put right.
    pub(super) async fn read_to_check(file: &ImageFile) -> Result<Self, FormatError> {
        Self::decode_to_check(&Self::first_cluster(file).await?)
    }

    pub(super) async fn first_cluster(file: &ImageFile) -> Result<Buffer, FormatError> {
        let there = |len: u64| ByteRange::from_bounds(0, len.min(file.size()));
        let start = file.read(there(crate::convert::u64_from(HEADER_START))).await?;
        Ok(file.read(there(Self::cluster_size(&start)?)).await?)
    }

    /// Reads the snapshot table.
    ///
    /// # Errors
    /// [`FormatError`], by what is wrong.
    pub async fn read_snapshots(&self, file: &ImageFile) -> Result<Vec<Snapshot>, FormatError> {
        Ok(self.read_snapshot_table(file).await?.0)
    }

    async fn read_snapshot_table(&self, file: &ImageFile) -> Result<(Vec<Snapshot>, usize), FormatError> {
        if self.snapshots.len == 0 {
            return Ok((Vec::new(), 0));
        }
        let mut len = SNAPSHOT_PIECE;
        loop {
            let offset = self.snapshots.offset;
            let bytes = file.read(ByteRange::from_bounds(offset, offset.saturating_add(len))).await?;
            if let Some(table) = decode_table(&bytes, self.snapshots.len, self.layout)? {
                return Ok(table);
            }
            len *= 4;
        }
    }
}

impl Qcow2 {
    /// Opens the image in `storage`.
    ///
    /// # Errors
    /// [`FormatError`], by what is wrong. Nothing has been written then, but for the reference counts of an image
    /// that was not closed in order and is opened to be written.
    pub async fn open(storage: Arc<dyn Storage>, options: OpenOptions) -> Result<Arc<Self>, FormatError> {
        let file = ImageFile::new(storage);
        let mut header = Header::read(&file).await?;
        let layout = header.layout;
        let read_only = options.read_only || file.storage().traits().read_only;
        check_openable(&header, read_only, options.data_file.is_some())?;
        let (snapshots, snapshots_len) = header.read_snapshot_table(&file).await?;
        let bitmaps = if read_only {
            stored::look_at(&file, &header).await
        } else {
            prepare_for_writing(&file, &mut header).await?
        };
        let l1 = read_numbers(&file.read(header.l1_range()).await?).into_iter().map(L1Entry).collect();
        let refcount_table = read_numbers(&file.read(header.refcount_table_range()).await?);
        let size = file.size();
        let mut state = State {
            slices: Slices::new(layout, options.cache.unwrap_or_else(|| cache_for(&header))),
            layout,
            l1,
            l1_dirty: BTreeSet::new(),
            refcount_table,
            refcount_table_dirty: BTreeSet::new(),
            refcount_table_moved: false,
            allocations: Allocations::default(),
            epochs: Epochs::default(),
            limbo: Vec::new(),
            free_hint: 0,
            fresh_from: layout.clusters_for(size),
            used_end: layout.clusters_for(size),
            file_end: size,
            tables: BTreeMap::new(),
            bitmap_places: Vec::new(),
            commits: Commits::default(),
            has_blocks: options.data_file.as_ref().unwrap_or(file.storage()).traits().block_size > 1,
            haunted: BTreeMap::new(),
            corrupt: None,
            raised: Vec::new(),
            header,
        };
        if !read_only {
            // Found now, it is said when something is to be written: reading goes on as long as it can.
            state.corrupt = state.find_tables(&snapshots, snapshots_len, &bitmaps).err();
        }
        Ok(Arc::new(Self {
            layout,
            read_only,
            compression: state.header.compression,
            is_data_file_raw: state.header.is_data_file_raw(),
            size: AtomicU64::new(state.header.size),
            file,
            data_file: options.data_file.map(ImageFile::new),
            backing: RwLock::new(Backing {
                is_missing: options.backing.is_none() && state.header.backing_file.is_some(),
                node: options.backing,
            }),
            bitmaps: Mutex::new(bitmaps),
            hollow: OnceLock::new(),
            state: Mutex::new(state),
            loading: RangeLock::default(),
            linking: RangeLock::default(),
            turn: RangeLock::default(),
            herald: OnceLock::new(),
            is_told: AtomicBool::new(false),
        }))
    }
}

/// Refuses what is marked as corrupt and to be written, and a data file that is missing or not the image's.
fn check_openable(header: &Header, read_only: bool, has_data_file: bool) -> Result<(), FormatError> {
    if header.incompatible & incompatible::CORRUPT != 0 && !read_only {
        return Err(FormatError::MarkedCorrupt);
    }
    if header.has_external_data() && !has_data_file {
        return Err(FormatError::Invalid("'data-file' is required for this image".into()));
    }
    if !header.has_external_data() && has_data_file {
        let text = "'data-file' can only be set for images with an external data file";
        return Err(FormatError::Invalid(text.into()));
    }
    Ok(())
}

/// Brings an image that will be written into a state in which that is allowed. Returns its bitmaps.
async fn prepare_for_writing(
    file: &ImageFile,
    header: &mut Header,
) -> Result<Vec<StoredBitmap>, FormatError> {
    if header.incompatible & incompatible::DIRTY != 0 {
        // It was not closed in order, and its counts may be behind. It says so until they are right again.
        check::repair_dirty(file).await?;
        *header = Header::read(file).await?;
    }
    // What we do not keep up to date must not look as if we did.
    let kept = header.autoclear & autoclear::KNOWN;
    if kept != header.autoclear {
        header.autoclear = kept;
        file.write(AUTOCLEAR_WORD, Bytes::copy_from_slice(&kept.to_be_bytes())).await?;
        file.flush().await?;
    }
    stored::take(file, header).await
}

/// Bytes that all tables of an image take, within the limit.
fn cache_for(header: &Header) -> u64 {
    let layout = header.layout;
    let clusters = layout.clusters_for(header.size);
    let maps = clusters.saturating_mul(layout.l2_entry_size());
    let counts = clusters.saturating_mul(u64::from(layout.refcount_bits())) / 8;
    // Each table may be begun and not full.
    maps.saturating_add(counts).saturating_mul(2).clamp(1 << 20, CACHE_MAX)
}

impl State {
    /// Takes note of where tables are.
    ///
    /// # Errors
    /// [`Corruption::Overlap`] when two are in one place.
    fn find_tables(
        &mut self,
        snapshots: &[Snapshot],
        snapshots_len: usize,
        bitmaps: &[StoredBitmap],
    ) -> Result<(), Corruption> {
        let layout = self.layout;
        self.bitmap_places = stored::places(bitmaps, &self.header);
        self.check_refcount_table()?;
        let mut places = vec![
            (ByteRange::from_bounds(0, layout.cluster_size()), "image header"),
            (self.header.l1_range(), "active L1 table"),
            (self.header.refcount_table_range(), "refcount table"),
        ];
        let table = self.header.snapshots.offset;
        places.push((
            ByteRange::from_bounds(table, table + crate::convert::u64_from(snapshots_len)),
            "snapshot table",
        ));
        for snapshot in snapshots {
            let start = snapshot.l1.offset;
            let range = ByteRange::from_bounds(start, start + u64::from(snapshot.l1.len) * 8);
            places.push((range, "L1 table of a snapshot"));
        }
        if let Some(extension) = self.header.bitmaps.filter(|_| !bitmaps.is_empty()) {
            let start = extension.directory_offset;
            let range = ByteRange::from_bounds(start, start + extension.directory_size);
            places.push((range, "bitmap directory"));
        }
        places.extend(bitmaps.iter().flat_map(|bitmap| bitmap.places(layout)));
        for entry in &self.l1 {
            if let Some(table) = entry.table(layout)? {
                places
                    .push((ByteRange::from_bounds(table, table + layout.cluster_size()), "active L2 table"));
            }
        }
        for block in self.refcount_table.iter().filter(|block| **block != 0) {
            places.push((ByteRange::from_bounds(*block, block + layout.cluster_size()), "refcount block"));
        }
        for (range, table) in places {
            self.check_overlap(range)?;
            self.protect(range, table);
        }
        Ok(())
    }
}

impl From<FormatError> for io::Error {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Io(error) => error,
            other => Self::new(io::ErrorKind::InvalidData, other),
        }
    }
}
