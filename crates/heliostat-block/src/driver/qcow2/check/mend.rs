//! [`tables`]: gives up what leads nowhere, so that what is left makes sense.
//!
//! Goes further than `qemu-img check -r all`, which leaves entries alone that lead out of the file or into the middle
//! of a cluster, and with them an image that stays corrupt. What such an entry stood for is lost already: it reads as
//! zero from then on, and the report says so. Nothing that can still be read is given up.

use std::collections::BTreeMap;

use super::super::entry::{COPIED, OFFSET_MASK, RawEntry, ZERO};
use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::header::{Header, Table, autoclear};
use super::super::header_change::name_bitmaps;
use super::super::layout::Layout;
use super::super::state::{read_numbers, write_numbers};
use super::counts::cluster_at;
use super::names::{self, SnapshotTable};
use super::walk::{Examination, L1_RESERVED, L2_RESERVED, Named, Uses, entries, l1_problem, named};
use crate::convert::u64_from;
use crate::range::ByteRange;

/// Where the header says how many snapshots there are, and where.
const SNAPSHOTS_FIELDS: u64 = 60;

/// What has been given up, in words, up to a limit.
pub(super) struct Notes {
    pub(super) texts: Vec<String>,
    pub(super) left_out: u64,
    max: usize,
}

impl Notes {
    pub(super) const fn new(max: usize) -> Self {
        Self { texts: Vec::new(), left_out: 0, max }
    }

    pub(super) fn push(&mut self, text: impl FnOnce() -> String) {
        if self.texts.len() < self.max {
            self.texts.push(text());
        } else {
            self.left_out += 1;
        }
    }
}

/// Puts right what keeps an image from being examined at all. Returns whether anything was.
pub(super) async fn names(file: &ImageFile, notes: &mut Notes) -> Result<bool, FormatError> {
    let header = Header::read_to_check(file).await?;
    let snapshots = SnapshotTable::read(file, &header).await?;
    if header.snapshots.len == 0 && header.snapshots.offset != 0 {
        notes.push(|| "the header says where a snapshot table is, though there is none".to_owned());
        point_to_snapshots(file, 0, 0).await?;
        return Ok(true);
    }
    if let Some(broken) = &snapshots.broken {
        let (lost, kept) = (u64::from(header.snapshots.len), snapshots.entries.len());
        notes.push(|| format!("{broken}: {} snapshots are given up", lost - u64_from(kept)));
        let offset = if kept > 0 { header.snapshots.offset } else { 0 };
        point_to_snapshots(file, kept, offset).await?;
        return Ok(true);
    }
    if let Err(error) = names::bitmaps(file, &header).await {
        notes.push(|| format!("the persistent bitmaps are given up: {error}"));
        drop_bitmaps(file, header).await?;
        return Ok(true);
    }
    Ok(false)
}

/// Takes the bitmaps out of the header. What they took is free then.
pub(super) async fn drop_bitmaps(file: &ImageFile, mut header: Header) -> Result<(), FormatError> {
    header.bitmaps = None;
    header.autoclear &= !autoclear::BITMAPS;
    name_bitmaps(file, &header).await
}

/// Says in the header how many snapshots there are, and where.
async fn point_to_snapshots(file: &ImageFile, count: usize, offset: u64) -> Result<(), FormatError> {
    let mut fields = u32::try_from(count).unwrap_or(0).to_be_bytes().to_vec();
    fields.extend_from_slice(&offset.to_be_bytes());
    file.write(SNAPSHOTS_FIELDS, fields.into()).await?;
    Ok(file.flush().await?)
}

/// Writes the snapshot table anew, behind all that is in use, and then says in the header where it is.
async fn write_snapshots(
    file: &ImageFile,
    examination: &Examination,
    table: &SnapshotTable,
) -> Result<(), FormatError> {
    let layout = examination.header.layout;
    let bytes = table.encode(&examination.header);
    if bytes.is_empty() {
        return point_to_snapshots(file, 0, 0).await;
    }
    let offset = examination.free_from(file) << layout.cluster_bits;
    let end = offset + (layout.clusters_for(u64_from(bytes.len())) << layout.cluster_bits);
    if file.size() < end {
        file.set_size(end).await?;
    }
    file.write(offset, bytes.into()).await?;
    file.flush().await?;
    point_to_snapshots(file, table.entries.len(), offset).await
}

/// Gives up what leads nowhere: snapshots, bitmaps, L1 and L2 entries. Durable when it returns.
pub(super) async fn tables(
    file: &ImageFile,
    examination: &Examination,
    notes: &mut Notes,
) -> Result<(), FormatError> {
    let header = &examination.header;
    let mut mender = Mender { file, examination, layout: header.layout, notes };
    let snapshots = mender.snapshots().await?;
    if examination.bitmaps_are_broken {
        mender.notes.push(|| "the persistent bitmaps are given up: they lead out of the file".to_owned());
        drop_bitmaps(file, Header::read_to_check(file).await?).await?;
    }
    let mut l1_tables: Vec<Table> = snapshots.entries.iter().map(|entry| entry.l1).collect();
    l1_tables.sort_unstable_by_key(|table| (table.offset, table.len));
    l1_tables.dedup();
    l1_tables.insert(0, header.l1);
    let kept = mender.l1_tables(&l1_tables).await?;
    for (offset, uses) in kept {
        mender.l2_table(offset, uses).await?;
    }
    Ok(file.flush().await?)
}

/// Where an L1 table stands.
fn l1_range(table: Table) -> ByteRange {
    ByteRange::from_bounds(table.offset, table.offset.saturating_add(u64::from(table.len) * 8))
}

struct Mender<'a> {
    file: &'a ImageFile,
    examination: &'a Examination,
    layout: Layout,
    notes: &'a mut Notes,
}

impl Mender<'_> {
    fn is_outside(&self, offset: u64, len: u64) -> bool {
        self.examination.references.is_outside(offset, len)
    }

    /// Says whether no snapshot's L1 table can be there: outside, or where the active disk has its tables. Where the two
    /// contradict each other it is the active disk that is kept.
    fn is_taken(&self, range: ByteRange) -> bool {
        let Examination { header, l2_tables, .. } = self.examination;
        let clusters = range.widen(self.layout.cluster_size(), u64::MAX);
        let mut active = l2_tables
            .range(clusters.offset()..clusters.end().max(clusters.offset()))
            .filter(|(at, uses)| uses.active > 0 && self.layout.in_cluster(**at) == 0);
        range.offset() < self.layout.cluster_size()
            || self.is_outside(range.offset(), range.len())
            || clusters.overlaps(header.l1_range())
            || active.next().is_some()
    }

    /// Gives up snapshots without an L1 table, and completes the rest. Returns what is left.
    async fn snapshots(&mut self) -> Result<SnapshotTable, FormatError> {
        let Examination { header, snapshots, .. } = self.examination;
        let mut left = snapshots.clone();
        left.entries.retain(|entry| {
            l1_problem(entry.l1, self.layout).is_none() && !self.is_taken(l1_range(entry.l1))
        });
        let lost = snapshots.entries.len() - left.entries.len();
        let is_outside = self.is_outside(header.snapshots.offset, snapshots.len) && snapshots.len > 0;
        if lost > 0 || is_outside || left.entries.iter().any(|entry| entry.is_incomplete) {
            if lost > 0 {
                self.notes.push(|| format!("{lost} snapshots without a table are given up"));
            }
            write_snapshots(self.file, self.examination, &left).await?;
        }
        Ok(left)
    }

    /// Mends the L1 tables. Returns the L2 tables that they still name.
    async fn l1_tables(&mut self, tables: &[Table]) -> Result<BTreeMap<u64, Uses>, FormatError> {
        let mut kept = self.examination.l2_tables.clone();
        // Where the header or the active L1 table is, no L2 table can be.
        let header = ByteRange::from_bounds(0, self.layout.cluster_size());
        let taken = [header, self.examination.header.l1_range()];
        let mut lost = Vec::new();
        for (offset, uses) in &kept {
            let range = cluster_at(*offset, self.layout);
            let is_taken = taken.iter().any(|taken| taken.overlaps(range));
            if is_taken
                || self.layout.in_cluster(*offset) != 0
                || self.is_something_else(*offset, *uses).await?
            {
                lost.push(*offset);
            }
        }
        for offset in lost {
            kept.remove(&offset);
        }
        for table in tables {
            self.l1_table(*table, &kept).await?;
        }
        Ok(kept)
    }

    /// Says whether what an L1 entry names is no L2 table: its cluster is used for something else, a guest's data say,
    /// and makes no sense as a table. It is not to be mended as one.
    async fn is_something_else(&self, offset: u64, uses: Uses) -> Result<bool, FormatError> {
        if self.examination.references.uses(self.layout.cluster_index(offset)) == uses.all {
            return Ok(false);
        }
        let words = read_numbers(&self.file.read(cluster_at(offset, self.layout)).await?);
        Ok(entries(&words, self.layout).any(|entry| self.mended(entry, 0).is_some()))
    }

    async fn l1_table(&mut self, table: Table, kept: &BTreeMap<u64, Uses>) -> Result<(), FormatError> {
        let range = l1_range(table);
        if self.is_outside(range.offset(), range.len()) || table.offset < self.layout.cluster_size() {
            return Ok(());
        }
        let old = read_numbers(&self.file.read(range).await?);
        let mut new = old.clone();
        for (index, entry) in new.iter_mut().enumerate() {
            let offset = *entry & OFFSET_MASK;
            if offset == 0 {
                // It says nothing, whatever its flags.
                *entry = 0;
                continue;
            }
            let is_beyond =
                offset >= self.file.size() && !self.is_outside(offset, self.layout.cluster_size());
            if kept.contains_key(&offset) || (is_beyond && self.layout.in_cluster(offset) == 0) {
                *entry &= !L1_RESERVED;
                continue;
            }
            let start = u64_from(index) * self.layout.l2_coverage();
            self.notes.push(|| {
                format!(
                    "{} bytes of the disk from {start:#x} are lost: L1 entry {entry:#x} leads to no table",
                    self.layout.l2_coverage()
                )
            });
            *entry = 0;
        }
        if new != old {
            self.file.write(range.offset(), write_numbers(new).into()).await?;
        }
        Ok(())
    }

    async fn l2_table(&mut self, offset: u64, uses: Uses) -> Result<(), FormatError> {
        let mut words = read_numbers(&self.file.read(cluster_at(offset, self.layout)).await?);
        let first = uses.index * self.layout.l2_coverage();
        let step = if self.layout.extended_l2 { 2 } else { 1 };
        let mut is_changed = false;
        for index in 0..words.len() / step {
            let guest = first + (u64_from(index) << self.layout.cluster_bits);
            let entry = RawEntry {
                descriptor: words[index * step],
                subclusters: if step == 2 { words[index * step + 1] } else { 0 },
            };
            let Some((mended, loses)) = self.mended(entry, guest) else { continue };
            if loses {
                self.notes.push(|| {
                    format!(
                        "the cluster at {guest:#x} of the disk is lost: L2 entry {:#x} leads to no data",
                        entry.descriptor
                    )
                });
            }
            words[index * step] = mended.descriptor;
            if step == 2 {
                words[index * step + 1] = mended.subclusters;
            }
            is_changed = true;
        }
        if is_changed {
            self.file.write(offset, write_numbers(words).into()).await?;
        }
        Ok(())
    }

    /// What an entry must be instead, and whether data is lost; `None` where it is sound. `guest`: what it maps.
    fn mended(&self, entry: RawEntry, guest: u64) -> Option<(RawEntry, bool)> {
        let layout = self.layout;
        let external = self.examination.header.has_external_data();
        let mut new = entry;
        let mut loses = false;
        let (data, zero) = (entry.subclusters & u64::from(u32::MAX), entry.subclusters >> 32);
        let names = named(entry, layout, external);
        if !matches!(names, Named::Compressed(..)) {
            new.descriptor &= !L2_RESERVED;
        }
        match names {
            Named::Nothing => {
                if layout.extended_l2 && data != 0 {
                    (new.subclusters, loses) = ((data | zero) << 32, true);
                }
            }
            Named::Compressed(offset, len) => {
                if external || self.is_outside(offset, len) {
                    (new, loses) =
                        (self.lost(RawEntry { subclusters: u64::from(u32::MAX), ..entry }, guest), true);
                } else {
                    new = RawEntry { descriptor: entry.descriptor & !COPIED, subclusters: 0 };
                }
            }
            Named::Data(offset) | Named::Place(offset) => {
                let leads_nowhere = layout.in_cluster(offset) != 0
                    || (!external && self.is_outside(offset, layout.cluster_size()));
                if leads_nowhere && matches!(names, Named::Data(_)) {
                    (new, loses) = (self.lost(entry, guest), true);
                } else if leads_nowhere {
                    new.descriptor = if layout.extended_l2 { 0 } else { ZERO };
                } else if layout.extended_l2 {
                    new.subclusters = data | (zero & !data) << 32;
                }
            }
        }
        (new != entry).then_some((new, loses))
    }

    /// What stands for data that cannot be found: zeroes, where the version has a word for them. In an external
    /// data file it can be found: it is where the guest sees it.
    fn lost(&self, entry: RawEntry, guest: u64) -> RawEntry {
        let layout = self.layout;
        if self.examination.header.has_external_data() {
            let subclusters = if layout.extended_l2 { entry.subclusters & u64::from(u32::MAX) } else { 0 };
            return RawEntry { descriptor: guest | COPIED, subclusters };
        }
        if layout.extended_l2 {
            let (data, zero) = (entry.subclusters & u64::from(u32::MAX), entry.subclusters >> 32);
            return RawEntry { descriptor: 0, subclusters: (data | zero) << 32 };
        }
        RawEntry { descriptor: if layout.version >= 3 { ZERO } else { 0 }, subclusters: 0 }
    }
}
