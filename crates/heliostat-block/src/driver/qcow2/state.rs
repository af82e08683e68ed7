//! [`State`]: the tables of an open image, in memory. Every change of a mapping or a reference count happens here,
//! at once, under one short lock; what has to be read first is asked for with an [`Obstacle`], and tried again.
//!
//! No I/O. What is changed reaches the file through [`super::commit`], in the order that a crash needs.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use event_listener::EventListener;

use super::commit::Commits;
use super::entry::{Cluster, L1Entry, RawEntry, Standard};
use super::error::Corruption;
use super::header::Header;
use super::in_flight::{Allocations, Epochs};
use super::layout::Layout;
use super::slices::{Kind, Slices};
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// Why something cannot be done under the lock, and what has to happen first.
#[derive(Debug)]
pub(crate) enum Obstacle {
    /// A slice has to be loaded.
    Load(u64, Kind),
    /// Somebody else's change has to end.
    Wait(EventListener),
    /// The L1 entry of this number needs an L2 table of its own.
    NeedsTable(u64),
    /// The image file has to reach so far.
    NeedsLength(u64),
    /// It cannot be done.
    Fail(io::Error),
}

/// What came of trying something under the lock. Whoever meets an obstacle has changed nothing.
pub(crate) type Attempt<T> = Result<T, Obstacle>;

impl From<Corruption> for Obstacle {
    fn from(corruption: Corruption) -> Self {
        Self::Fail(corruption.into())
    }
}

/// Host clusters that nothing in memory names any more, but perhaps something on the medium, or somebody reading.
#[derive(Debug)]
pub(crate) struct Limbo {
    /// The clusters, by number: each stands for one reference.
    pub(crate) clusters: Vec<u64>,
    /// Whether their space is to be given back.
    pub(crate) discard: bool,
}

/// The tables of an open image.
pub(crate) struct State {
    pub(crate) header: Header,
    pub(crate) layout: Layout,
    /// The active L1 table.
    pub(crate) l1: Vec<L1Entry>,
    /// L1 entries that are changed and not written.
    pub(crate) l1_dirty: BTreeSet<u64>,
    /// The refcount table: where each block is, or 0.
    pub(crate) refcount_table: Vec<u64>,
    /// Entries of the refcount table that are changed and not written.
    pub(crate) refcount_table_dirty: BTreeSet<u64>,
    /// Where the refcount table was, when it has moved and the header does not say so yet.
    pub(crate) refcount_table_moved: bool,
    pub(crate) slices: Slices,
    pub(crate) allocations: Allocations,
    pub(crate) epochs: Epochs,
    /// References that are dropped once the next commit is durable.
    pub(crate) limbo: Vec<Limbo>,
    /// No cluster before this is free, by number.
    pub(crate) free_hint: u64,
    /// From this cluster on nothing was ever written, and the file reads as zeroes.
    pub(crate) fresh_from: u64,
    /// The end of what is in use, by clusters: where the file may be cut.
    pub(crate) used_end: u64,
    /// The image file is known to be so long.
    pub(crate) file_end: u64,
    /// What must not be written by anybody but its owner: clusters of tables, by number.
    pub(crate) tables: BTreeMap<u64, &'static str>,
    /// What the bitmaps take that are written anew when the image is closed.
    pub(crate) bitmap_places: Vec<ByteRange>,
    pub(crate) commits: Commits,
    /// Whether what is written has been widened to the file's blocks.
    pub(crate) has_blocks: bool,
    /// Host clusters in which a write may land that was dropped before its end. Empty as long as nobody drops one.
    pub(crate) haunted: BTreeMap<u64, u64>,
    /// What was found wrong; from then on nothing is written.
    pub(crate) corrupt: Option<Corruption>,
    /// What happened under the lock and is to be raised without it; a few at most, taken after each step.
    pub(crate) raised: Vec<DebugEvent>,
}

impl State {
    pub(crate) fn is_external(&self) -> bool {
        self.header.has_external_data()
    }

    /// The slice that begins at `start`, or that it has to be loaded.
    pub(crate) fn slice(&mut self, start: u64, kind: Kind) -> Attempt<&[u8]> {
        self.slices.get(start).ok_or(Obstacle::Load(start, kind))
    }

    /// That nothing has been found wrong.
    pub(crate) fn check_sound(&self) -> Attempt<()> {
        match &self.corrupt {
            Some(corruption) => Err(corruption.clone().into()),
            None => Ok(()),
        }
    }

    // ------------------------------------------------------------------ mapping

    /// The L1 entry for `offset` of the virtual disk.
    pub(crate) fn l1_entry(&self, offset: u64) -> L1Entry {
        self.l1.get(usize_from(self.layout.l1_index(offset))).copied().unwrap_or_default()
    }

    /// What is known of the guest cluster at `guest`.
    pub(crate) fn cluster(&mut self, guest: u64) -> Attempt<Cluster> {
        let layout = self.layout;
        let Some(table) = self.l1_entry(guest).table(layout)? else {
            return Ok(Cluster::Standard(Standard::default()));
        };
        let external = self.is_external();
        let entry = self.raw_entry(table, layout.l2_index(guest))?;
        let cluster = Cluster::decode(entry, layout, external)?;
        match cluster {
            // In an external data file everything is where the guest has it.
            Cluster::Standard(Standard { host: Some(offset), .. })
                if external && offset != layout.cluster_start(guest) =>
            {
                Err(Corruption::Misplaced { what: "L2", entry: entry.descriptor, offset }.into())
            }
            cluster => Ok(cluster),
        }
    }

    fn raw_entry(&mut self, table: u64, index: u64) -> Attempt<RawEntry> {
        let layout = self.layout;
        let offset = table + index * layout.l2_entry_size();
        let start = self.slices.start_of(offset);
        let slice = self.slice(start, Kind::L2)?;
        let at = usize_from(offset - start);
        Ok(read_entry(&slice[at..], layout))
    }

    /// Changes what is known of the guest cluster at `guest`. Its L2 table must be there and nobody else's.
    pub(crate) fn set_cluster(&mut self, guest: u64, entry: RawEntry) -> Attempt<()> {
        let layout = self.layout;
        let l1 = self.l1_entry(guest);
        let table = match l1.table(layout)? {
            Some(table) if l1.is_copied() => table,
            _ => return Err(Obstacle::NeedsTable(layout.l1_index(guest))),
        };
        let offset = table + layout.l2_index(guest) * layout.l2_entry_size();
        let start = self.slices.start_of(offset);
        self.slice(start, Kind::L2)?;
        let at = usize_from(offset - start);
        if let Some(slice) = self.slices.get_mut(start) {
            slice[at..at + 8].copy_from_slice(&entry.descriptor.to_be_bytes());
            if layout.extended_l2 {
                slice[at + 8..at + 16].copy_from_slice(&entry.subclusters.to_be_bytes());
            }
        }
        Ok(())
    }

    /// That the L2 table for `guest` is there, nobody else's, and its entry for `guest` in memory.
    pub(crate) fn check_table(&mut self, guest: u64) -> Attempt<()> {
        let layout = self.layout;
        let l1 = self.l1_entry(guest);
        match l1.table(layout)? {
            Some(table) if l1.is_copied() => {
                self.check_counted(ByteRange::from_bounds(table, table + layout.cluster_size()))?;
                let start = self.slices.start_of(table + layout.l2_index(guest) * layout.l2_entry_size());
                self.slice(start, Kind::L2).map(|_| ())
            }
            _ => Err(Obstacle::NeedsTable(layout.l1_index(guest))),
        }
    }

    /// Where the slice ends, in guest offsets, that maps `guest`: what one look can see.
    pub(crate) fn slice_end(&self, guest: u64) -> u64 {
        let layout = self.layout;
        let entries = self.slices.slice_size() / layout.l2_entry_size();
        let coverage = entries << layout.cluster_bits;
        (guest / coverage + 1).saturating_mul(coverage)
    }

    /// What the new L2 table at `table` says, to be written.
    pub(crate) fn put_table(&mut self, table: u64, content: &[u8]) {
        let size = self.slices.slice_size();
        for (number, bytes) in (0..).zip(content.chunks(usize_from(size))) {
            self.slices.insert_changed(table + number * size, Kind::L2, bytes.to_vec());
        }
    }

    /// Puts a new L2 table in the place of the one that `expected` names, or of none.
    pub(crate) fn link_table(&mut self, index: u64, table: u64) {
        if let Some(entry) = self.l1.get_mut(usize_from(index)) {
            *entry = L1Entry::owned(table);
            self.l1_dirty.insert(index);
            self.tables.insert(self.layout.cluster_index(table), "active L2 table");
        }
    }

    /// That the image file reaches to `end`. Asked for before a table is put there: a file that cannot grow must
    /// fail the request that needs more, not every commit from then on.
    pub(crate) const fn check_length(&self, end: u64) -> Attempt<()> {
        if end <= self.file_end { Ok(()) } else { Err(Obstacle::NeedsLength(end)) }
    }

    // ------------------------------------------------------------------ what must not be overwritten

    /// That no table stands where guest data is about to be written, in the image file.
    pub(crate) fn check_overlap(&self, host: ByteRange) -> Result<(), Corruption> {
        let layout = self.layout;
        if host.is_empty() {
            return Ok(());
        }
        let (first, last) = (layout.cluster_index(host.offset()), layout.cluster_index(host.end() - 1));
        match self.tables.range(first..=last).next() {
            Some((_, table)) => Err(Corruption::Overlap { range: host, table }),
            None => Ok(()),
        }
    }

    /// That guest data may be written in place at `host`, in the image file: no table stands there, and there is a
    /// refcount block that can have counted it.
    pub(crate) fn check_in_place(&self, host: ByteRange) -> Result<(), Corruption> {
        self.check_overlap(host)?;
        self.check_counted(host)
    }

    /// That there is a refcount block that can have counted what is at `host`.
    fn check_counted(&self, host: ByteRange) -> Result<(), Corruption> {
        let last = self.layout.cluster_index(host.end().saturating_sub(1));
        let index = usize_from(self.layout.refcount_table_index(last));
        match self.refcount_table.get(index) {
            Some(block) if *block != 0 => Ok(()),
            _ => Err(Corruption::Refcount { offset: host.offset(), count: 0 }),
        }
    }

    /// Says what stands in the clusters of `range`.
    pub(crate) fn protect(&mut self, range: ByteRange, table: &'static str) {
        if range.is_empty() {
            return;
        }
        let (first, last) =
            (self.layout.cluster_index(range.offset()), self.layout.cluster_index(range.end() - 1));
        for cluster in first..=last {
            self.tables.insert(cluster, table);
        }
    }

    pub(crate) fn unprotect(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let last = self.layout.cluster_index(range.end() - 1);
        for cluster in self.layout.cluster_index(range.offset())..=last {
            self.tables.remove(&cluster);
        }
    }

    /// References to `clusters` end once that is durable.
    pub(crate) fn drop_later(&mut self, clusters: impl IntoIterator<Item = u64>, discard: bool) {
        let clusters: Vec<_> = clusters.into_iter().collect();
        if is_planted(Bug::FreedBeforeCommit) {
            clusters.iter().for_each(|cluster| drop(self.drop_reference(*cluster)));
        } else if !clusters.is_empty() {
            self.limbo.push(Limbo { clusters, discard });
        }
    }

    /// Says whether anything is changed and not durable.
    pub(crate) fn is_changed(&self) -> bool {
        self.commits.is_running
            || self.slices.dirty() > 0
            || !self.l1_dirty.is_empty()
            || !self.refcount_table_dirty.is_empty()
            || self.refcount_table_moved
    }
}

/// Reads the entry at the start of `bytes`.
pub(crate) fn read_entry(bytes: &[u8], layout: Layout) -> RawEntry {
    let number = |at: usize| {
        let found = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        u64::from_be_bytes(found.unwrap_or([0; 8]))
    };
    RawEntry { descriptor: number(0), subclusters: if layout.extended_l2 { number(8) } else { 0 } }
}

/// Reads a table of numbers.
pub(crate) fn read_numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|chunk| u64::from_be_bytes(chunk.try_into().unwrap_or([0; 8]))).collect()
}

/// Writes a table of numbers.
pub(crate) fn write_numbers(numbers: impl IntoIterator<Item = u64>) -> Vec<u8> {
    numbers.into_iter().flat_map(u64::to_be_bytes).collect()
}

/// Bytes in a table of so many numbers.
pub(crate) fn numbers_len(numbers: usize) -> u64 {
    u64_from(numbers) * 8
}
