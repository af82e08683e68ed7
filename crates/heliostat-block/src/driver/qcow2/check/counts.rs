//! [`RefcountTable`]: the reference counts as they stand in the image, and their comparison with what is used.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;

use bytes::Bytes;
use futures_util::StreamExt;

use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::header::Header;
use super::super::layout::Layout;
use super::super::state::read_numbers;
use super::CheckReport;
use super::ahead;
use super::references::References;
use crate::buffer::is_zero;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;

/// Bits 9 to 63 of an entry: where the block is.
const OFFSET_MASK: u64 = !0x1ff;
/// Bytes of blocks that are kept for single counts.
const KEPT_BYTES: u64 = 8 << 20;

/// What an entry of the refcount table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// Nothing: all its counts are zero.
    Absent,
    /// Where it stands.
    At(u64),
    /// Where no block can stand.
    Broken,
}

/// The reference counts as they stand.
pub(super) struct RefcountTable {
    pub(super) layout: Layout,
    /// The entries as they stand.
    pub(super) entries: Vec<u64>,
    /// Whether every entry leads to a block that is nothing else: the counts can be changed in place.
    pub(super) is_sound: bool,
    /// Blocks read for single counts, with the number of the turn in which they were used last.
    kept: BTreeMap<u64, (Bytes, u64)>,
    turn: u64,
    /// The block that was asked last, by its number: what follows is mostly in it too.
    last: Option<(u64, Bytes)>,
}

/// A count cannot be read.
pub(super) struct Unreadable;

impl RefcountTable {
    pub(super) async fn read(file: &ImageFile, header: &Header) -> Result<Self, FormatError> {
        let entries = read_numbers(&file.read(header.refcount_table_range()).await?);
        Ok(Self {
            layout: header.layout,
            entries,
            is_sound: true,
            kept: BTreeMap::new(),
            turn: 0,
            last: None,
        })
    }

    /// Where the block of that number is. Reserved bits are looked over: the offset beside them is all there is.
    pub(super) fn block(&self, index: u64) -> Block {
        let entry = self.entries.get(usize_from(index)).copied().unwrap_or(0);
        match entry & OFFSET_MASK {
            0 => Block::Absent,
            offset if self.layout.in_cluster(offset) != 0 || offset >> 63 != 0 => Block::Broken,
            offset => Block::At(offset),
        }
    }

    /// The count of one cluster, where it stands in the block that was asked last.
    pub(super) fn count_now(&self, cluster: u64) -> Option<u64> {
        let layout = self.layout;
        let (index, bytes) = self.last.as_ref()?;
        (*index == layout.refcount_table_index(cluster))
            .then(|| layout.refcount(bytes, layout.refcount_block_index(cluster)))
    }

    /// The count of one cluster, by way of the blocks that are kept.
    pub(super) async fn count(
        &mut self,
        file: &ImageFile,
        cluster: u64,
    ) -> Result<Result<u64, Unreadable>, FormatError> {
        let layout = self.layout;
        let number = layout.refcount_table_index(cluster);
        let offset = match self.block(number) {
            Block::Absent => return Ok(Ok(0)),
            Block::Broken => return Ok(Err(Unreadable)),
            Block::At(offset) if offset >= file.size() => return Ok(Ok(0)),
            Block::At(offset) => offset,
        };
        let index = layout.refcount_block_index(cluster);
        self.turn += 1;
        if let Some((bytes, used)) = self.kept.get_mut(&offset) {
            *used = self.turn;
            self.last = Some((number, bytes.clone()));
            return Ok(Ok(layout.refcount(bytes, index)));
        }
        let bytes = file.read(cluster_at(offset, layout)).await?.freeze();
        let count = layout.refcount(&bytes, index);
        if u64_from(self.kept.len()) * layout.cluster_size() >= KEPT_BYTES.max(4 * layout.cluster_size()) {
            let oldest = self.kept.iter().min_by_key(|(_, (_, used))| *used).map(|(offset, _)| *offset);
            oldest.map(|oldest| self.kept.remove(&oldest));
        }
        self.last = Some((number, bytes.clone()));
        self.kept.insert(offset, (bytes, self.turn));
        Ok(Ok(count))
    }

    /// Adds the references to the blocks themselves, and looks at the entries.
    pub(super) fn count_blocks(
        &mut self,
        references: &mut References,
        report: &mut CheckReport,
    ) -> Result<(), FormatError> {
        let layout = self.layout;
        for (index, entry) in self.entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            let offset = entry & OFFSET_MASK;
            let problem = if entry & !OFFSET_MASK != 0 {
                Some("has reserved bits set")
            } else if layout.in_cluster(offset) != 0 {
                Some("is not cluster aligned")
            } else if layout.cluster_index(offset) >= references.clusters() {
                Some("is outside image")
            } else {
                references.add(offset, layout.cluster_size(), 1)?;
                (references.uses(layout.cluster_index(offset)) != 1)
                    .then_some("is used for something else too")
            };
            if let Some(problem) = problem {
                self.is_sound = false;
                report.structural(1, || format!("refcount table entry {index} ({entry:#x}) {problem}"));
            }
        }
        Ok(())
    }

    /// Compares every count with what is used.
    pub(super) async fn compare(
        &self,
        file: &ImageFile,
        references: &References,
        report: &mut CheckReport,
        tick: &mut impl FnMut(u64),
    ) -> Result<(), FormatError> {
        let per_block = self.layout.refcount_block_entries();
        let blocks = references.clusters().div_ceil(per_block).min(u64_from(self.entries.len()));
        let mut read = BTreeSet::new();
        let wanted = (0..blocks).filter_map(|index| {
            let start = index * per_block;
            let clusters = ByteRange::from_bounds(start, (start + per_block).min(references.clusters()));
            let has_references = references.may_have(clusters);
            let block = match self.block(index) {
                Block::At(offset) if offset < file.size() => Block::At(offset),
                Block::Broken => Block::Broken,
                _ if !has_references => return None,
                _ => Block::Absent,
            };
            // A block that many entries name is read once where nothing of what it counts is used.
            let offset = match block {
                Block::At(offset) if has_references || read.insert(offset) => Some(offset),
                _ => None,
            };
            Some((offset, (clusters, has_references, block)))
        });
        let mut stream = pin!(ahead::clusters(file, self.layout, wanted));
        let mut leaks_known = BTreeMap::new();
        let mut end = 0;
        while let Some(next) = stream.next().await {
            let (bytes, (clusters, has_references, block)) = next?;
            let Block::At(offset) = block else {
                if block == Block::Broken {
                    report.check_error(clusters.len(), || {
                        format!("the counts of clusters {clusters} cannot be read")
                    });
                } else {
                    let zeroes = vec![0; usize_from(self.layout.cluster_size())];
                    tick(1);
                    end = end.max(self.compare_block(&zeroes, clusters, references, report));
                }
                continue;
            };
            let Some(bytes) = bytes else {
                let count: u64 = leaks_known.get(&offset).copied().unwrap_or(0);
                let start = clusters.offset();
                report.leak(count, || format!("{count} clusters from {start} are counted and not used"));
                end = if count > 0 { clusters.end() } else { end };
                continue;
            };
            tick(1);
            let before = report.leaks;
            if has_references || !is_zero(&bytes) {
                end = end.max(self.compare_block(&bytes, clusters, references, report));
            }
            if !has_references {
                leaks_known.insert(offset, report.leaks - before);
            }
        }
        for (cluster, used) in references.used_from(blocks * per_block) {
            end = end.max(cluster + 1);
            report.corruption(1, || format!("cluster {cluster} is counted 0 times and used {used} times"));
        }
        report.image_end_offset = end.max(1) << self.layout.cluster_bits;
        Ok(())
    }

    /// Returns the cluster behind the last that is counted or used.
    fn compare_block(
        &self,
        bytes: &[u8],
        clusters: ByteRange,
        references: &References,
        report: &mut CheckReport,
    ) -> u64 {
        let mut end = 0;
        for ((index, cluster), used) in (0..).zip(clusters.offset()..).zip(references.of(clusters)) {
            let counted = self.layout.refcount(bytes, index);
            if counted > 0 || used > 0 {
                end = cluster + 1;
            }
            let words = || format!("cluster {cluster} is counted {counted} times and used {used} times");
            match counted.cmp(&used) {
                std::cmp::Ordering::Less => report.corruption(1, words),
                std::cmp::Ordering::Greater => report.leak(1, words),
                std::cmp::Ordering::Equal => {}
            }
        }
        end
    }
}

/// The cluster that starts at `offset`.
pub(super) const fn cluster_at(offset: u64, layout: Layout) -> ByteRange {
    ByteRange::from_bounds(offset, offset.saturating_add(layout.cluster_size()))
}
