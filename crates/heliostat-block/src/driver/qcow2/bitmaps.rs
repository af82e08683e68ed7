//! Persistent dirty bitmaps: read when an image is opened to be written, kept up to date by the node, written when
//! the image is closed.
//!
//! While the image is open its directory says "in use" of each of them, so that after a crash nobody believes what it
//! says. What cannot be used is kept as it is.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;

use super::Qcow2;
use super::bitmap_directory::{AUTO, BitmapEntry, Bits, IN_USE, decode_directory, encode_directory, runs};
use super::commit::Tables;
use super::error::FormatError;
use super::file::ImageFile;
use super::header::{BitmapsExtension, Header, Table, autoclear};
use super::header_change::name_bitmaps;
use super::layout::Layout;
use super::refcount::Run;
use super::state::{read_numbers, write_numbers};
use crate::convert::{u64_from, usize_from};
use crate::dirty_bitmap::DirtyBitmap;
use crate::named_bitmap::NamedBitmap;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// The most memory that all bitmaps of an image may take: an image must not decide how much we have.
const MEMORY_MAX: u64 = 256 << 20;

/// A persistent dirty bitmap of an open image.
#[derive(Clone)]
pub struct StoredBitmap {
    /// As the directory names it.
    pub entry: BitmapEntry,
    /// Its bits; `None` where they cannot be used: they were not saved, or are of a kind that is not known.
    pub bits: Option<Arc<DirtyBitmap>>,
    /// Its table, as it stands in the image.
    table: Vec<u64>,
    /// It goes when the image is closed.
    is_removed: bool,
}

impl StoredBitmap {
    /// One that is in no image yet.
    fn new(bitmap: &NamedBitmap) -> Self {
        let granularity_bits = u8::try_from(bitmap.granularity.trailing_zeros()).unwrap_or(u8::MAX);
        let entry = BitmapEntry {
            name: bitmap.raw_name().to_vec(),
            table: Table { offset: 0, len: 0 },
            flags: 0,
            granularity_bits,
            extra: Vec::new(),
        };
        Self { entry, bits: None, table: Vec::new(), is_removed: false }
    }

    /// Says whether it follows every write.
    #[must_use]
    pub const fn is_enabled(&self) -> bool {
        self.entry.flags & AUTO != 0
    }

    /// Where its table and its bits are.
    pub(super) fn places(&self, layout: Layout) -> Vec<(ByteRange, &'static str)> {
        let range = self.entry.table_range();
        let data =
            self.clusters(layout).map(|start| ByteRange::from_bounds(start, start + layout.cluster_size()));
        let data = data.map(|range| (range, "data of a bitmap"));
        std::iter::once((range, "table of a bitmap")).chain(data).collect()
    }

    /// Where the clusters of its bits begin.
    fn clusters(&self, layout: Layout) -> impl Iterator<Item = u64> {
        self.table.iter().filter_map(move |entry| match Bits::decode(*entry, layout) {
            Some(Bits::At(offset)) => Some(offset),
            _ => None,
        })
    }
}

impl Header {
    /// Reads the bitmap directory; empty where there is none that can be believed.
    ///
    /// # Errors
    /// [`FormatError`], by what is wrong.
    pub async fn read_bitmap_directory(&self, file: &ImageFile) -> Result<Vec<BitmapEntry>, FormatError> {
        let Some(bitmaps) = self.bitmaps.filter(|_| self.autoclear & autoclear::BITMAPS != 0) else {
            return Ok(Vec::new());
        };
        let bytes = file.read(bitmaps.directory()?).await?;
        decode_directory(&bytes, bitmaps.count, self.layout)
    }
}

/// Reads the bitmaps of an image that is only read. Those that cannot be had are left out: the disk can be read all the
/// same.
pub(super) async fn look_at(file: &ImageFile, header: &Header) -> Vec<StoredBitmap> {
    let entries = header.read_bitmap_directory(file).await.unwrap_or_default();
    let mut bitmaps = Vec::new();
    if check_memory(&entries, header.size).is_ok() {
        for entry in entries {
            bitmaps.extend(load(file, header, entry).await);
        }
    }
    bitmaps
}

/// Reads the bitmaps of an image that will be written, and says in the image that they are in use.
pub(super) async fn take(file: &ImageFile, header: &Header) -> Result<Vec<StoredBitmap>, FormatError> {
    let entries = header.read_bitmap_directory(file).await?;
    check_memory(&entries, header.size)?;
    let mut bitmaps = Vec::new();
    for entry in entries {
        let mut bitmap = load(file, header, entry).await?;
        if bitmap.bits.is_none() && bitmap.entry.flags & AUTO != 0 {
            // It does not hear of our writes, so it says from now on that it is not to be believed.
            bitmap.entry.flags |= IN_USE;
        }
        bitmaps.push(bitmap);
    }
    let is_in_use = |bitmap: &StoredBitmap| bitmap.bits.is_some() && !is_planted(Bug::BitmapsBelieved);
    if let Some(extension) = header.bitmaps.filter(|_| !bitmaps.is_empty()) {
        let marked = bitmaps.iter().map(|bitmap| BitmapEntry {
            flags: bitmap.entry.flags | if is_in_use(bitmap) { IN_USE } else { 0 },
            ..bitmap.entry.clone()
        });
        let marked: Vec<_> = marked.collect();
        file.write(extension.directory_offset, Bytes::from(encode_directory(&marked))).await?;
        file.flush().await?;
    }
    Ok(bitmaps)
}

/// Refuses bitmaps that would take too much memory for a disk of `size` bytes.
fn check_memory<'a>(
    entries: impl IntoIterator<Item = &'a BitmapEntry>,
    size: u64,
) -> Result<(), FormatError> {
    let needed = entries.into_iter().map(|entry| size.div_ceil(entry.granularity()) / 8);
    if needed.fold(0, u64::saturating_add) <= MEMORY_MAX {
        return Ok(());
    }
    Err(FormatError::Unsupported(format!(
        "the image's dirty bitmaps take more than {} MiB of memory; remove some with `qemu-img bitmap --remove`",
        MEMORY_MAX >> 20
    )))
}

async fn load(file: &ImageFile, header: &Header, entry: BitmapEntry) -> Result<StoredBitmap, FormatError> {
    let layout = header.layout;
    let granularity = u32::try_from(entry.granularity()).unwrap_or(u32::MAX);
    let Ok(bits) = DirtyBitmap::new(header.size, granularity) else {
        // Coarser than what we have: it is kept, and not used.
        return Ok(StoredBitmap { entry, bits: None, table: Vec::new(), is_removed: false });
    };
    if !entry.is_usable() {
        return Ok(StoredBitmap { entry, bits: None, table: Vec::new(), is_removed: false });
    }
    if u64::from(entry.table.len) != entry.clusters(header.size, layout) {
        return Err(entry.unreadable_table());
    }
    let table = read_numbers(&file.read(entry.table_range()).await?);
    let each = layout.cluster_size() * 8 * entry.granularity();
    for (index, number) in (0_u64..).zip(&table) {
        let start = (index * each).min(header.size);
        let part = ByteRange::from_bounds(start, start.saturating_add(each).min(header.size));
        match Bits::decode(*number, layout).ok_or_else(|| entry.unreadable_table())? {
            Bits::Zeroes => {}
            Bits::Ones => bits.mark(part),
            Bits::At(cluster) => {
                let bytes =
                    file.read(ByteRange::from_bounds(cluster, cluster + layout.cluster_size())).await?;
                for (first, count) in runs(&bytes) {
                    let from = start.saturating_add(first * entry.granularity());
                    let to = from.saturating_add(count * entry.granularity());
                    bits.mark(ByteRange::from_bounds(from.min(part.end()), to.min(part.end())));
                }
            }
        }
    }
    Ok(StoredBitmap { entry, bits: Some(Arc::new(bits)), table, is_removed: false })
}

impl Qcow2 {
    /// Its persistent dirty bitmaps, in the order of the directory.
    #[must_use]
    pub fn bitmaps(&self) -> Vec<StoredBitmap> {
        let mut bitmaps = self.all_bitmaps();
        bitmaps.retain(|bitmap| !bitmap.is_removed);
        bitmaps
    }

    /// Also those that go when the image is closed.
    fn all_bitmaps(&self) -> Vec<StoredBitmap> {
        self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same as a node has them.
    pub(crate) fn named_bitmaps(&self) -> Vec<NamedBitmap> {
        let named = self.bitmaps().into_iter().map(|bitmap| NamedBitmap {
            name: String::from_utf8_lossy(&bitmap.entry.name).into_owned(),
            granularity: u32::try_from(bitmap.entry.granularity()).unwrap_or(u32::MAX),
            recording: bitmap.bits.is_some() && bitmap.is_enabled(),
            bits: bitmap.bits,
            busy: false,
            persistent: true,
            read_only: self.read_only,
            stored_as: Some(bitmap.entry.name),
        });
        named.collect()
    }

    /// Says whether the image has a place for dirty bitmaps: one of version 2 has none.
    pub(crate) const fn can_store_bitmaps(&self) -> bool {
        !self.read_only && self.layout.version >= 3
    }

    /// Takes note of which bitmaps are to be kept from now on: the persistent ones of `named`.
    pub(crate) fn keep_bitmaps(&self, named: &[NamedBitmap]) {
        if !self.can_store_bitmaps() {
            return;
        }
        let mut old = self.all_bitmaps();
        let mut kept: Vec<StoredBitmap> = Vec::new();
        for bitmap in named.iter().filter(|bitmap| bitmap.persistent) {
            let name = bitmap.raw_name();
            let found = old.iter().position(|stored| {
                let is_in_image = bitmap.stored_as.is_some() || stored.entry.table.len == 0;
                !stored.is_removed && is_in_image && stored.entry.name == name
            });
            let stored = found.map_or_else(|| StoredBitmap::new(bitmap), |at| old.remove(at));
            let auto = if bitmap.recording && bitmap.bits.is_some() { AUTO } else { 0 };
            let flags =
                if bitmap.bits.is_some() { stored.entry.flags & !AUTO | auto } else { stored.entry.flags };
            let entry = BitmapEntry { flags, ..stored.entry };
            kept.push(StoredBitmap { entry, bits: bitmap.bits.clone(), ..stored });
        }
        // As QEMU has it: what was there, then what is new, the newest first.
        let (mut new, mut kept): (Vec<_>, Vec<_>) =
            kept.into_iter().partition(|stored: &StoredBitmap| stored.entry.table.len == 0);
        new.reverse();
        kept.append(&mut new);
        kept.extend(old.into_iter().map(|stored| StoredBitmap { is_removed: true, ..stored }));
        self.set_bitmaps(kept);
    }

    /// The bitmaps of a disk of `size` bytes: bits that it gains are not set. The ones in use stay as they are.
    ///
    /// # Errors
    /// [`FormatError`] when one has bits that cannot be used, or there is no memory for them.
    pub(super) fn bitmaps_for(&self, size: u64) -> Result<Vec<StoredBitmap>, FormatError> {
        let bitmaps = self.all_bitmaps();
        check_memory(bitmaps.iter().map(|bitmap| &bitmap.entry), size)?;
        let resized = bitmaps.into_iter().map(|bitmap| {
            if bitmap.is_removed {
                return Ok(bitmap);
            }
            let unusable = || {
                let name = String::from_utf8_lossy(&bitmap.entry.name);
                FormatError::Invalid(format!("Bitmap '{name}' is inconsistent and cannot be used"))
            };
            let old = bitmap.bits.as_ref().ok_or_else(unusable)?;
            let bits = DirtyBitmap::new(size, old.granularity())
                .map_err(|error| FormatError::Unsupported(error.to_string()))?;
            bits.merge(old);
            Ok(StoredBitmap { bits: Some(Arc::new(bits)), ..bitmap })
        });
        resized.collect()
    }

    /// Uses these from now on. Nobody may mark them meanwhile.
    pub(super) fn set_bitmaps(&self, bitmaps: Vec<StoredBitmap>) {
        *self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner) = bitmaps;
    }

    /// Writes the bitmaps, in new clusters, and says that they mean what they say. Nobody may mark them meanwhile.
    pub(super) async fn store_bitmaps(&self) -> Result<(), FormatError> {
        let bitmaps = self.all_bitmaps();
        if !bitmaps.iter().any(|bitmap| bitmap.bits.is_some() || bitmap.is_removed) {
            return Ok(());
        }
        let mut taken = Vec::new();
        let header = match self.write_bitmaps(&bitmaps, &mut taken).await {
            Ok(header) => header,
            Err(error) => {
                for run in taken {
                    self.give_back(run).await;
                }
                return Err(error);
            }
        };
        let mut gone = Vec::new();
        for bitmap in bitmaps.iter().filter(|bitmap| bitmap.is_removed && bitmap.bits.is_none()) {
            // What cannot be read is lost space, until a check gives it back.
            gone.extend(self.places_of_unusable(bitmap).await.unwrap_or_default());
        }
        let written = Tables::of(self);
        name_bitmaps(&self.file, &header).await?;
        written.end();
        self.set_bitmaps(bitmaps.into_iter().filter(|bitmap| !bitmap.is_removed).collect());
        let bits = self.layout.cluster_bits;
        let range = |run: Run| ByteRange::from_bounds(run.first << bits, (run.first + run.count) << bits);
        let mut state = self.lock();
        state.header = header;
        let new: Vec<_> = taken.into_iter().map(range).collect();
        new.iter().for_each(|range| state.protect(*range, "bitmap"));
        let old = std::mem::replace(&mut state.bitmap_places, new);
        for range in old.into_iter().chain(gone) {
            state.unprotect(range);
            let first = self.layout.cluster_index(range.offset());
            state.drop_later(first..first + self.layout.clusters_for(range.len()), false);
        }
        Ok(())
    }

    /// Writes all that stay and their directory, durably, into clusters that are entered in `taken`; returns the header
    /// that will name them.
    async fn write_bitmaps(
        &self,
        bitmaps: &[StoredBitmap],
        taken: &mut Vec<Run>,
    ) -> Result<Header, FormatError> {
        let failed = self.failed_flushes();
        let mut entries = Vec::new();
        for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.is_removed) {
            let table = match &bitmap.bits {
                Some(bits) => self.store_bits(bits, &bitmap.entry, taken).await?,
                None => bitmap.entry.table,
            };
            entries.push(BitmapEntry { table, ..bitmap.entry.clone() });
        }
        let mut new = None;
        if !entries.is_empty() {
            let directory = encode_directory(&entries);
            new = Some(BitmapsExtension {
                count: u32::try_from(entries.len()).unwrap_or(u32::MAX),
                directory_size: u64_from(directory.len()),
                directory_offset: self.store_new(directory, taken).await?,
            });
        }
        self.flush_after(failed).await?;
        let header = self.header();
        let flag = if new.is_some() { autoclear::BITMAPS } else { 0 };
        let autoclear = header.autoclear & !autoclear::BITMAPS | flag;
        Ok(Header { bitmaps: new, autoclear, ..header })
    }

    /// Where a bitmap stands in the image whose table nobody has looked at, because it was not saved.
    async fn places_of_unusable(&self, bitmap: &StoredBitmap) -> Result<Vec<ByteRange>, FormatError> {
        let range = bitmap.entry.table_range();
        if range.is_empty() || range.end() > self.file.size() {
            return Ok(Vec::new());
        }
        let table = read_numbers(&self.file.read(range).await?);
        // What makes no sense is left alone: it may be anybody's.
        let is_sound = table.iter().all(|entry| match Bits::decode(*entry, self.layout) {
            Some(Bits::At(start)) => start + self.layout.cluster_size() <= self.file.size(),
            other => other.is_some(),
        });
        let bitmap = StoredBitmap { table: if is_sound { table } else { Vec::new() }, ..bitmap.clone() };
        Ok(bitmap.places(self.layout).into_iter().map(|(range, _)| range).collect())
    }

    /// Writes the bits of one bitmap; says where its table is.
    async fn store_bits(
        &self,
        bits: &DirtyBitmap,
        entry: &BitmapEntry,
        taken: &mut Vec<Run>,
    ) -> Result<Table, FormatError> {
        let layout = self.layout;
        let each = layout.cluster_size() * 8 * entry.granularity();
        let mut table = Vec::new();
        for index in 0..entry.clusters(self.size(), layout) {
            let part =
                ByteRange::from_bounds(index * each, (index + 1).saturating_mul(each).min(self.size()));
            let cluster = serialize(bits, part, entry.granularity(), layout);
            table.push(match cluster {
                Some(cluster) => self.store_new(cluster, taken).await?,
                None => 0,
            });
        }
        let len = u32::try_from(table.len()).unwrap_or(u32::MAX);
        Ok(Table { offset: self.store_new(write_numbers(table), taken).await?, len })
    }

    /// Writes something into new clusters; says where.
    async fn store_new(&self, mut bytes: Vec<u8>, taken: &mut Vec<Run>) -> Result<u64, FormatError> {
        let clusters = self.layout.clusters_for(u64_from(bytes.len()));
        let run = self.attempt(|state| state.allocate_all(clusters)).await?;
        taken.push(run);
        bytes.resize(usize_from(clusters << self.layout.cluster_bits), 0);
        let offset = run.first << self.layout.cluster_bits;
        self.file.write(offset, Bytes::from(bytes)).await?;
        Ok(offset)
    }
}

/// What the bitmaps take that will be written anew: the directory, and tables and bits of those that can be used.
pub(super) fn places(bitmaps: &[StoredBitmap], header: &Header) -> Vec<ByteRange> {
    let usable: Vec<_> = bitmaps.iter().filter(|bitmap| bitmap.bits.is_some()).collect();
    let directory = header.bitmaps.filter(|_| !usable.is_empty());
    let directory = directory.and_then(|extension| extension.directory().ok());
    let own = usable.iter().flat_map(|bitmap| bitmap.places(header.layout)).map(|(range, _)| range);
    directory.into_iter().chain(own).collect()
}

/// The cluster that holds the bits of `part`; `None` where none is set.
fn serialize(bits: &DirtyBitmap, part: ByteRange, granularity: u64, layout: Layout) -> Option<Vec<u8>> {
    let mut cluster = None;
    let mut from = part.offset();
    while let Some(dirty) = bits.next_dirty(from, u64::MAX).and_then(|dirty| dirty.intersection(part)) {
        let bytes = cluster.get_or_insert_with(|| vec![0_u8; usize_from(layout.cluster_size())]);
        let first = (dirty.offset() - part.offset()) / granularity;
        let last = (dirty.end() - part.offset()).div_ceil(granularity);
        for bit in first..last {
            bytes[usize_from(bit / 8)] |= 1 << (bit % 8);
        }
        from = dirty.end();
    }
    cluster
}
