//! [`examine`]: follows every table of an image, adds up references, and counts what is wrong.
//!
//! L1 tables are read one after the other; the L2 tables that they name are gathered first, with how often each is
//! named, and read once, in the order of the file. Counts come out as if each had been read each time.

use std::collections::BTreeMap;
use std::pin::pin;

use futures_util::StreamExt;

use super::super::bitmap_directory::BitmapEntry;
use super::super::entry::{COMPRESSED, COPIED, Cluster, OFFSET_MASK, RawEntry, ZERO};
use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::header::{BitmapsExtension, Header, Table};
use super::super::layout::Layout;
use super::super::state::read_numbers;
use super::ahead;
use super::counts::RefcountTable;
use super::names::{self, SnapshotTable};
use super::references::References;
use super::{CheckOptions, CheckReport, Progress};
use crate::convert::u64_from;
use crate::range::ByteRange;

/// Bits of an L1 entry that must be 0.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of an L2 entry of a cluster that is not compressed that must be 0. Bit 0 is looked over where it means
/// nothing, as QEMU does.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// QEMU's limit for a snapshot's L1 table.
const L1_ENTRIES_MAX: u32 = (32 << 20) / 8;
/// L2 tables that begin inside a cluster and are read all the same. They overlap, so their number says nothing of the
/// file's size; no image has one but by damage.
const UNALIGNED_MAX: u64 = 4096;
/// Bytes of memory for each L2 table that is known.
const TABLE_MEMORY: u64 = 64;

/// How often something is named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    /// By the active L1 table.
    pub(super) active: u64,
    /// By any L1 table.
    pub(super) all: u64,
    /// Which entry of an L1 table was the first to name it.
    pub(super) index: u64,
}

/// What has been found out about an image.
pub(super) struct Examination {
    pub(super) report: CheckReport,
    pub(super) header: Header,
    pub(super) references: References,
    pub(super) refcounts: RefcountTable,
    pub(super) snapshots: SnapshotTable,
    /// Every L2 table, by where it begins.
    pub(super) l2_tables: BTreeMap<u64, Uses>,
    /// Nothing is wrong but counts, COPIED flags, and where the counts are.
    pub(super) tables_are_sound: bool,
    /// Bitmaps lead to what is not in the file.
    pub(super) bitmaps_are_broken: bool,
}

impl Examination {
    /// The first cluster that nobody can want: behind the end of the file, where nothing lost lies either. What cannot
    /// grow, a block device, has only what follows the last cluster that is used or counted.
    pub(super) fn free_from(&self, file: &ImageFile) -> u64 {
        let layout = self.header.layout;
        let used = self.references.end().max(layout.cluster_index(self.report.image_end_offset));
        if file.storage().traits().can_resize { used.max(layout.clusters_for(file.size())) } else { used }
    }
}

/// What an L2 entry names, seen without trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Named {
    /// No host cluster.
    Nothing,
    /// A host cluster without data: the guest cluster reads as zero, or all of it from below.
    Place(u64),
    /// A host cluster with data.
    Data(u64),
    /// Compressed data: where, and how far it may reach.
    Compressed(u64, u64),
}

/// Says what `entry` names. `external`: in another file.
pub(super) fn named(entry: RawEntry, layout: Layout, external: bool) -> Named {
    let RawEntry { descriptor, subclusters } = entry;
    if descriptor & COMPRESSED != 0 {
        return match Cluster::decode(RawEntry { descriptor, subclusters: 0 }, layout, false) {
            Ok(Cluster::Compressed(compressed)) => Named::Compressed(compressed.offset, compressed.len),
            _ => Named::Nothing,
        };
    }
    let offset = descriptor & OFFSET_MASK;
    let has_data = if layout.extended_l2 {
        subclusters & u64::from(u32::MAX) != 0
    } else {
        layout.version < 3 || descriptor & ZERO == 0
    };
    match offset {
        0 if !(external && descriptor & COPIED != 0) => Named::Nothing,
        _ if has_data => Named::Data(offset),
        _ => Named::Place(offset),
    }
}

/// Looks at all of an image. Writes nothing.
///
/// # Errors
/// [`FormatError`] when it cannot be looked at, or the file cannot be read.
pub(super) async fn examine(
    file: &ImageFile,
    options: &CheckOptions<'_>,
) -> Result<Examination, FormatError> {
    let header = Header::read_to_check(file).await?;
    if header.layout.in_cluster(header.snapshots.offset) != 0 || header.snapshots.offset >> 63 != 0 {
        return Err(FormatError::header("Snapshot table offset invalid"));
    }
    let snapshots = SnapshotTable::read(file, &header).await?;
    let bitmaps = names::bitmaps(file, &header).await?;
    if let Some(broken) = &snapshots.broken {
        return Err(FormatError::Header(format!("ERROR failed to read the snapshot table: {broken}")));
    }
    let layout = header.layout;
    let references = References::new(layout, file.size(), options.memory_max);
    let refcounts = RefcountTable::read(file, &header).await?;
    let report = CheckReport {
        findings_max: options.findings_max,
        // QEMU counts sectors.
        total_clusters: layout.clusters_for(header.size & !511),
        ..CheckReport::default()
    };
    let mut walk = Walk {
        file,
        options,
        layout,
        external: header.has_external_data(),
        report,
        references,
        refcounts,
        checks_copied: true,
        is_header: false,
        l2_tables: BTreeMap::new(),
        progress: Progress::default(),
    };
    for (index, _) in snapshots.entries.iter().enumerate().filter(|(_, entry)| entry.is_incomplete) {
        walk.report.structural(1, || format!("snapshot table entry {index} is incomplete"));
    }
    walk.count(0, layout.cluster_size(), 1, "the header")?;
    walk.l1_tables(&header, &snapshots).await?;
    walk.l2_tables().await?;
    walk.count(header.snapshots.offset, snapshots.len, 1, "the snapshot table")?;
    let table = header.refcount_table_range();
    let mut tables_are_sound = walk.report.structural == 0;
    let table_is_inside = walk.count(table.offset(), table.len(), 1, "the refcount table")?;
    let before_bitmaps = walk.report.structural;
    if let Some((extension, bitmaps)) = &bitmaps {
        walk.bitmaps(*extension, bitmaps).await?;
    }
    let bitmaps_are_broken = walk.report.structural > before_bitmaps;
    tables_are_sound &= !bitmaps_are_broken;
    walk.refcounts.is_sound = table_is_inside;
    walk.refcounts.count_blocks(&mut walk.references, &mut walk.report)?;
    let mut clusters = layout.cluster_index(table.offset())..layout.cluster_index(table.end());
    walk.refcounts.is_sound &= clusters.all(|cluster| walk.references.uses(cluster) == 1);
    walk.compare().await?;
    let Walk { report, references, refcounts, l2_tables, .. } = walk;
    Ok(Examination {
        report,
        header,
        references,
        refcounts,
        snapshots,
        l2_tables,
        tables_are_sound,
        bitmaps_are_broken,
    })
}

struct Walk<'a> {
    file: &'a ImageFile,
    options: &'a CheckOptions<'a>,
    layout: Layout,
    /// Guest clusters are in another file.
    external: bool,
    report: CheckReport,
    references: References,
    refcounts: RefcountTable,
    /// Until a count cannot be read.
    checks_copied: bool,
    /// What is looked at as an L2 table is the header, whose flags nobody judges.
    is_header: bool,
    l2_tables: BTreeMap<u64, Uses>,
    progress: Progress,
}

impl Walk<'_> {
    /// Adds references to the clusters of a region. Returns whether the region is in the file.
    fn count(&mut self, offset: u64, len: u64, times: u64, what: &str) -> Result<bool, FormatError> {
        let added = self.references.add(offset, len, times)?;
        if added.is_outside {
            self.report
                .structural(times, || format!("{what} at {offset:#x}+{len:#x} is outside of the file"));
        }
        if added.overflows > 0 {
            self.report.structural(added.overflows, || {
                format!(
                    "the cluster of {what} at {offset:#x} is used more often than its reference count can say"
                )
            });
        }
        Ok(!added.is_outside)
    }

    fn tick(&mut self, done: u64) {
        self.progress.done += done;
        if let Some(progress) = self.options.progress {
            progress(self.progress);
        }
    }

    async fn bitmaps(
        &mut self,
        extension: BitmapsExtension,
        bitmaps: &[BitmapEntry],
    ) -> Result<(), FormatError> {
        self.count(extension.directory_offset, extension.directory_size, 1, "the bitmap directory")?;
        for bitmap in bitmaps {
            let table = bitmap.table_range();
            self.count(table.offset(), table.len(), 1, "a bitmap table")?;
            for offset in names::bitmap_clusters(self.file, bitmap).await? {
                self.count(offset, self.layout.cluster_size(), 1, "bitmap data")?;
            }
        }
        Ok(())
    }

    async fn l1_tables(&mut self, header: &Header, snapshots: &SnapshotTable) -> Result<(), FormatError> {
        self.l1_table(header.l1, Uses { active: 1, all: 1, index: 0 }).await?;
        // Snapshots that name the same table are looked at once.
        let mut inactive: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        for entry in &snapshots.entries {
            if let Some(problem) = l1_problem(entry.l1, self.layout) {
                self.report
                    .structural(1, || format!("a snapshot's L1 table at {:#x} {problem}", entry.l1.offset));
            } else {
                *inactive.entry((entry.l1.offset, entry.l1.len)).or_default() += 1;
            }
        }
        // Tables of sound images do not overlap, so all of them together are no longer than the file.
        let total: u64 = inactive.keys().map(|(_, len)| u64::from(*len) * 8).sum();
        if total > self.file.size().saturating_add(UNALIGNED_MAX << 20) {
            return Err(FormatError::Invalid(
                "the snapshots' L1 tables overlap too much to look at all".into(),
            ));
        }
        for ((offset, len), times) in inactive {
            self.l1_table(Table { offset, len }, Uses { active: 0, all: times, index: 0 }).await?;
        }
        Ok(())
    }

    async fn l1_table(&mut self, table: Table, uses: Uses) -> Result<(), FormatError> {
        let len = u64::from(table.len) * 8;
        self.count(table.offset, len, uses.all, "an L1 table")?;
        // What there is of it in the file counts all the same.
        if table.offset >= self.file.size() {
            return Ok(());
        }
        let range = ByteRange::from_bounds(table.offset, table.offset + len);
        for (index, entry) in read_numbers(&self.file.read(range).await?).into_iter().enumerate() {
            self.l1_entry(entry, Uses { index: u64_from(index), ..uses }).await?;
        }
        Ok(())
    }

    async fn l1_entry(&mut self, entry: u64, uses: Uses) -> Result<(), FormatError> {
        // Flags without an offset lead to the header, as QEMU sees it.
        if entry == 0 {
            return Ok(());
        }
        let offset = entry & OFFSET_MASK;
        if entry & L1_RESERVED != 0 {
            self.report.structural(uses.all, || format!("L1 entry {entry:#x} has reserved bits set"));
        }
        let is_inside = self.count(offset, self.layout.cluster_size(), uses.all, "an L2 table")?;
        if self.layout.in_cluster(offset) != 0 {
            self.report.structural(uses.all, || format!("L1 entry {entry:#x} is not cluster aligned"));
        }
        if uses.active > 0 && offset != 0 {
            self.check_copied(entry & COPIED != 0, offset, 1, "L1", entry).await?;
        }
        if is_inside && offset < self.file.size() {
            let known = self.l2_tables.entry(offset).or_default();
            if known.all == 0 {
                self.references.spend(TABLE_MEMORY)?;
                self.progress.total += 1;
                known.index = uses.index;
            }
            known.active += uses.active;
            known.all += uses.all;
        }
        Ok(())
    }

    /// Compares a COPIED flag with the reference count of the cluster at `offset`.
    async fn check_copied(
        &mut self,
        is_copied: bool,
        offset: u64,
        times: u64,
        what: &str,
        entry: u64,
    ) -> Result<(), FormatError> {
        if !self.checks_copied || self.is_header {
            return Ok(());
        }
        let cluster = self.layout.cluster_index(offset);
        let counted = match self.refcounts.count_now(cluster) {
            Some(count) => Ok(count),
            None => self.refcounts.count(self.file, cluster).await?,
        };
        match counted {
            Ok(count) if (count == 1) != is_copied => self.report.corruption(times, || {
                format!("{what} entry {entry:#x} has a wrong COPIED flag: the reference count is {count}")
            }),
            Ok(_) => {}
            Err(_) => self.checks_copied = false,
        }
        Ok(())
    }

    async fn l2_tables(&mut self) -> Result<(), FormatError> {
        let tables = std::mem::take(&mut self.l2_tables);
        self.each_l2_table(&tables).await?;
        self.l2_tables = tables;
        Ok(())
    }

    async fn each_l2_table(&mut self, tables: &BTreeMap<u64, Uses>) -> Result<(), FormatError> {
        let layout = self.layout;
        let mut unaligned = 0;
        let wanted = tables.iter().map(|(offset, uses)| {
            unaligned += u64::from(layout.in_cluster(*offset) != 0);
            let is_read = layout.in_cluster(*offset) == 0 || unaligned <= UNALIGNED_MAX;
            (is_read.then_some(*offset), (*offset, *uses))
        });
        let mut stream = pin!(ahead::clusters(self.file, layout, wanted));
        while let Some(next) = stream.next().await {
            let (table, (offset, uses)) = next?;
            let Some(table) = table else {
                self.report.check_error(1, || format!("the L2 table at {offset:#x} has not been looked at"));
                continue;
            };
            self.is_header = offset == 0;
            self.l2_table(&read_numbers(&table), uses).await?;
            self.tick(1);
        }
        Ok(())
    }

    async fn l2_table(&mut self, words: &[u64], uses: Uses) -> Result<(), FormatError> {
        let mut next = 0;
        for entry in entries(words, self.layout) {
            if entry.descriptor == 0 && entry.subclusters == 0 {
                continue;
            }
            if let Some((is_copied, offset)) = self.l2_entry(entry, uses, &mut next)? {
                self.check_copied(is_copied, offset, uses.active, "L2", entry.descriptor).await?;
            }
        }
        Ok(())
    }

    /// Counts what an entry names. Returns its COPIED flag and the place of the cluster that it speaks of, where the
    /// flag is to be judged.
    fn l2_entry(
        &mut self,
        entry: RawEntry,
        uses: Uses,
        next: &mut u64,
    ) -> Result<Option<(bool, u64)>, FormatError> {
        let RawEntry { descriptor, subclusters } = entry;
        let (layout, times) = (self.layout, uses.all);
        let names = named(entry, layout, self.external);
        if !matches!(names, Named::Compressed(..)) && descriptor & L2_RESERVED != 0 {
            self.report.structural(times, || format!("L2 entry {descriptor:#x} has reserved bits set"));
        }
        match names {
            Named::Nothing => {
                if layout.extended_l2 && subclusters & u64::from(u32::MAX) != 0 {
                    self.report.structural(times, || {
                        format!("L2 entry {descriptor:#x} has subclusters with data ({subclusters:#x}) but no cluster")
                    });
                }
            }
            Named::Compressed(offset, len) => {
                if self.compressed_problem(entry, times) {
                    return Ok(None);
                }
                self.report.compressed_clusters += uses.active;
                self.report.allocated_clusters += uses.active;
                self.report.fragmented_clusters += uses.active;
                self.count(offset, len, times, "a compressed cluster")?;
            }
            Named::Data(offset) | Named::Place(offset) => {
                if layout.extended_l2 && subclusters & subclusters >> 32 & u64::from(u32::MAX) != 0 {
                    self.report.structural(times, || {
                        format!("L2 entry {descriptor:#x} has subclusters that are both data and zero")
                    });
                }
                if layout.in_cluster(offset) != 0 {
                    self.report
                        .structural(times, || format!("L2 entry {descriptor:#x} is not cluster aligned"));
                }
                self.report.allocated_clusters += uses.active;
                if *next != 0 && *next != offset {
                    self.report.fragmented_clusters += uses.active;
                }
                *next = offset + layout.cluster_size();
                let is_copied = descriptor & COPIED != 0;
                if self.external {
                    // Clusters of another file are not counted; each is one guest cluster's.
                    if !is_copied && uses.active > 0 && self.checks_copied && !self.is_header {
                        self.report.corruption(uses.active, || {
                            format!("L2 entry {descriptor:#x} has a wrong COPIED flag")
                        });
                    }
                    return Ok(None);
                }
                self.count(offset, layout.cluster_size(), times, "a guest cluster")?;
                return Ok((uses.active > 0).then_some((is_copied, offset)));
            }
        }
        Ok(None)
    }

    /// Counts what is wrong with an entry of a compressed cluster. Returns whether it is as good as none.
    fn compressed_problem(&mut self, entry: RawEntry, times: u64) -> bool {
        let RawEntry { descriptor, subclusters } = entry;
        if self.external {
            self.report.structural(times, || {
                format!("L2 entry {descriptor:#x} is compressed, beside an external data file")
            });
            return true;
        }
        if self.layout.extended_l2 && subclusters != 0 {
            self.report.structural(times, || {
                format!("L2 entry {descriptor:#x} is compressed and has subclusters ({subclusters:#x})")
            });
            return true;
        }
        if descriptor & COPIED != 0 {
            self.report.structural(times, || {
                format!("L2 entry {descriptor:#x} is compressed and has the COPIED flag")
            });
        }
        false
    }

    async fn compare(&mut self) -> Result<(), FormatError> {
        let per_block = self.layout.refcount_block_entries();
        let known = u64_from(self.refcounts.entries.len());
        self.progress.total += self.references.clusters().div_ceil(per_block).min(known);
        let (mut progress, told) = (self.progress, self.options.progress);
        let mut tick = |done| {
            progress.done += done;
            if let Some(told) = told {
                told(progress);
            }
        };
        self.refcounts.compare(self.file, &self.references, &mut self.report, &mut tick).await
    }
}

/// Why a snapshot's L1 table cannot be one.
pub(super) fn l1_problem(l1: Table, layout: Layout) -> Option<&'static str> {
    if layout.in_cluster(l1.offset) != 0 {
        return Some("is not cluster aligned");
    }
    (l1.len > L1_ENTRIES_MAX).then_some("is too large")
}

/// The entries of an L2 table.
pub(super) fn entries(words: &[u64], layout: Layout) -> impl Iterator<Item = RawEntry> {
    let step = if layout.extended_l2 { 2 } else { 1 };
    words
        .chunks_exact(step)
        .map(|entry| RawEntry { descriptor: entry[0], subclusters: entry.get(1).copied().unwrap_or(0) })
}
