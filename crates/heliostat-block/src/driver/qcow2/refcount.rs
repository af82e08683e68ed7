//! Reference counts and the search for free clusters: the part of [`State`] that owns the host clusters.
//!
//! A refcount block that is missing is made at the first free cluster of what it will count, so it counts itself.

use std::io;

use super::error::Corruption;
use super::slices::Kind;
use super::state::{Attempt, Obstacle, State};
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::range::ByteRange;

/// Host offsets have 56 bits.
const HOST_END: u64 = 1 << 56;
/// QEMU's limit for a refcount table.
const TABLE_SIZE_MAX: u64 = 8 << 20;

/// Clusters that follow each other, given to somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first, by number.
    pub(crate) first: u64,
    /// How many.
    pub(crate) count: u64,
    /// Whether they have never been written, and read as zeroes.
    pub(crate) fresh: bool,
}

impl State {
    /// How often the cluster of that number is referenced.
    pub(crate) fn refcount(&mut self, cluster: u64) -> Attempt<u64> {
        let layout = self.layout;
        let Some((start, index)) = self.refcount_slice(cluster) else { return Ok(0) };
        let slice = self.slice(start, Kind::Refcounts)?;
        Ok(layout.refcount(slice, index))
    }

    /// Where refcount blocks can be.
    ///
    /// # Errors
    /// [`Corruption::Misplaced`] for the first that is elsewhere.
    pub(crate) fn check_refcount_table(&self) -> Result<(), Corruption> {
        let is_misplaced = |block: &&u64| self.layout.in_cluster(**block) != 0 || **block >> 56 != 0;
        match self.refcount_table.iter().find(is_misplaced) {
            Some(&entry) => Err(Corruption::Misplaced { what: "refcount table", entry, offset: entry }),
            None => Ok(()),
        }
    }

    /// The slice that counts a cluster, and which count of it; `None` where there is no block.
    fn refcount_slice(&self, cluster: u64) -> Option<(u64, u64)> {
        let layout = self.layout;
        let block = *self.refcount_table.get(usize_from(layout.refcount_table_index(cluster)))?;
        if block == 0 {
            return None;
        }
        let counts = (self.slices.slice_size() * 8) >> layout.refcount_order;
        let index = layout.refcount_block_index(cluster);
        Some((block + index / counts * self.slices.slice_size(), index % counts))
    }

    /// Changes how often a cluster is referenced. Its block must be there.
    pub(crate) fn set_refcount(&mut self, cluster: u64, count: u64) -> Attempt<()> {
        let layout = self.layout;
        let Some((start, index)) = self.refcount_slice(cluster) else {
            let offset = cluster << layout.cluster_bits;
            return Err(Corruption::Refcount { offset, count: 0 }.into());
        };
        self.slice(start, Kind::Refcounts)?;
        if let Some(slice) = self.slices.get_mut(start) {
            layout.set_refcount(slice, index, count);
        }
        Ok(())
    }

    /// Ends one reference to a cluster.
    pub(crate) fn drop_reference(&mut self, cluster: u64) -> Attempt<()> {
        let count = self.refcount(cluster)?;
        if count == 0 {
            let offset = cluster << self.layout.cluster_bits;
            return Err(Corruption::Refcount { offset, count }.into());
        }
        self.set_refcount(cluster, count - 1)?;
        if count == 1 {
            self.free_hint = self.free_hint.min(cluster);
        }
        Ok(())
    }

    /// Takes at least one and at most `count` free clusters that follow each other.
    ///
    /// No obstacle leaves anything taken; what has been learnt of free clusters is kept.
    pub(crate) fn allocate(&mut self, count: u64) -> Attempt<Run> {
        self.check_sound()?;
        loop {
            let first = self.next_free(self.free_hint)?;
            self.free_hint = first;
            if (first + 1) << self.layout.cluster_bits > HOST_END {
                return Err(no_space("the image has reached its largest size"));
            }
            if self.refcount_slice(first).is_none() {
                self.make_refcount_block(first, first)?;
                continue;
            }
            let run = self.run_from(first, count)?;
            self.take(run)?;
            self.free_hint = run.first + run.count;
            return Ok(run);
        }
    }

    /// Takes exactly `count` free clusters that follow each other, wherever there are so many.
    pub(crate) fn allocate_all(&mut self, count: u64) -> Attempt<Run> {
        self.check_sound()?;
        let mut from = self.free_hint;
        loop {
            let first = self.next_free(from)?;
            if (first + count) << self.layout.cluster_bits > HOST_END {
                return Err(no_space("the image has reached its largest size"));
            }
            // A block that is made inside the run would interrupt it: make it at the run's start, and look again.
            let missing = (first..first + count).find(|cluster| self.refcount_slice(*cluster).is_none());
            if let Some(cluster) = missing {
                let at = if self.refcount_slice(first).is_none() { cluster } else { first };
                self.make_refcount_block(cluster, at)?;
                continue;
            }
            let run = self.run_from(first, count)?;
            if run.count == count {
                self.take(run)?;
                return Ok(run);
            }
            from = first + run.count;
        }
    }

    /// The free clusters that follow each other from `first` on, as far as there are blocks that count them.
    fn run_from(&mut self, first: u64, count: u64) -> Attempt<Run> {
        let mut found = 1;
        while found < count
            && self.refcount_slice(first + found).is_some()
            && self.refcount(first + found)? == 0
        {
            found += 1;
        }
        Ok(Run { first, count: found, fresh: first >= self.fresh_from })
    }

    fn take(&mut self, run: Run) -> Attempt<()> {
        self.check_overlap(self.clusters(run.first, run.count))?;
        for cluster in run.first..run.first + run.count {
            self.set_refcount(cluster, 1)?;
        }
        self.fresh_from = self.fresh_from.max(run.first + run.count);
        self.used_end = self.used_end.max(run.first + run.count);
        Ok(())
    }

    /// The first free cluster from `from` on. What was looked at from the hint on is not looked at again.
    fn next_free(&mut self, from: u64) -> Attempt<u64> {
        let layout = self.layout;
        let counts = (self.slices.slice_size() * 8) >> layout.refcount_order;
        let is_hint = from == self.free_hint;
        let mut cluster = from;
        while let Some((start, index)) = self.refcount_slice(cluster) {
            let slice = self.slice(start, Kind::Refcounts)?;
            let free = (index..counts).find(|index| layout.refcount(slice, *index) == 0);
            if let Some(free) = free {
                return Ok(cluster + free - index);
            }
            cluster += counts - index;
            if is_hint {
                self.free_hint = cluster;
            }
        }
        Ok(cluster)
    }

    /// Makes the block that counts `cluster`, in the free cluster `at`.
    fn make_refcount_block(&mut self, cluster: u64, at: u64) -> Attempt<()> {
        let layout = self.layout;
        let index = layout.refcount_table_index(cluster);
        if index >= u64_from(self.refcount_table.len()) {
            return self.grow_refcount_table(index);
        }
        self.check_overlap(self.clusters(at, 1))?;
        self.check_length(self.clusters(at, 1).end())?;
        if at != cluster {
            // Counted by a block that is there: this can meet an obstacle, so it comes first.
            self.set_refcount(at, 1)?;
        }
        self.put_refcount_block(index, at);
        if at == cluster {
            self.set_refcount(at, 1)?;
        }
        self.fresh_from = self.fresh_from.max(at + 1);
        self.used_end = self.used_end.max(at + 1);
        Ok(())
    }

    /// Puts an empty block into the table, in the cluster `at`.
    fn put_refcount_block(&mut self, index: u64, at: u64) {
        let block = self.clusters(at, 1);
        self.raised.push(DebugEvent::RefblockAllocWrite);
        for slice in (block.offset()..block.end()).step_by(usize_from(self.slices.slice_size())) {
            self.slices.insert_new(slice, Kind::Refcounts);
        }
        if let Some(entry) = self.refcount_table.get_mut(usize_from(index)) {
            *entry = block.offset();
        }
        self.refcount_table_dirty.insert(index);
        self.tables.insert(at, "refcount block");
    }

    /// Gives the refcount table room for the entry `index`, in another place: behind all that is in use, after the
    /// blocks that are needed to count it there. All in memory: a commit writes it.
    fn grow_refcount_table(&mut self, index: u64) -> Attempt<()> {
        self.raised.push(DebugEvent::ReftableGrow);
        let layout = self.layout;
        let base = self.uncounted_from(self.used_end)?;
        let old = self.header.refcount_table_range();
        let had = u64_from(self.refcount_table.len());
        let (mut blocks, mut clusters) = (0, 1);
        let missing = loop {
            let last = layout.refcount_table_index(base + blocks + clusters - 1);
            let entries = (index + 1).max(last + 1).max(had * 3 / 2);
            let missing: Vec<_> = (layout.refcount_table_index(base)..=last)
                .filter(|index| self.refcount_table.get(usize_from(*index)).is_none_or(|block| *block == 0))
                .collect();
            let needed = (u64_from(missing.len()), layout.clusters_for(entries * 8));
            if needed == (blocks, clusters) {
                break missing;
            }
            (blocks, clusters) = needed;
            if clusters << layout.cluster_bits > TABLE_SIZE_MAX {
                return Err(no_space("the image has reached its largest size"));
            }
        };
        let run = base..base + blocks + clusters;
        self.check_overlap(self.clusters(base, blocks + clusters))?;
        self.check_length(self.clusters(base, blocks + clusters).end())?;
        for cluster in run.clone() {
            // Every obstacle comes before the first change.
            if self.refcount(cluster)? != 0 {
                let offset = cluster << layout.cluster_bits;
                return Err(Corruption::Refcount { offset, count: 1 }.into());
            }
            if self.refcount_slice(cluster).is_some() {
                // Changed, it stays in memory until all of this is done.
                self.set_refcount(cluster, 0)?;
            }
        }
        self.refcount_table.resize(usize_from((clusters << layout.cluster_bits) / 8), 0);
        for (index, at) in missing.into_iter().zip(base..) {
            self.put_refcount_block(index, at);
        }
        for cluster in run.clone() {
            self.set_refcount(cluster, 1)?;
        }
        let first_old = layout.cluster_index(old.offset());
        self.drop_later(first_old..first_old + layout.clusters_for(old.len()), false);
        self.unprotect(old);
        self.header.refcount_table.offset = (base + blocks) << layout.cluster_bits;
        self.header.refcount_table.len = u32::try_from(clusters).unwrap_or(u32::MAX);
        self.protect(self.header.refcount_table_range(), "refcount table");
        self.refcount_table_moved = true;
        self.fresh_from = self.fresh_from.max(run.end);
        self.used_end = run.end;
        Ok(())
    }

    /// The first cluster from `from` on behind which nothing is counted. A crash may leave counts of clusters that
    /// the file did not become long enough for.
    fn uncounted_from(&mut self, from: u64) -> Attempt<u64> {
        let entries = self.layout.refcount_block_entries();
        let blocks = u64_from(self.refcount_table.len());
        let (mut last, mut cluster) = (from, from);
        while cluster < blocks * entries {
            if self.refcount_slice(cluster).is_none() {
                cluster = (cluster / entries + 1) * entries;
                continue;
            }
            if self.refcount(cluster)? != 0 {
                last = cluster + 1;
            }
            cluster += 1;
        }
        Ok(last)
    }

    /// Where so many clusters are, in the image file.
    pub(crate) fn clusters(&self, first: u64, count: u64) -> ByteRange {
        let bits = self.layout.cluster_bits;
        ByteRange::from_bounds(first << bits, (first + count) << bits)
    }
}

fn no_space(text: &str) -> Obstacle {
    Obstacle::Fail(io::Error::new(io::ErrorKind::StorageFull, text.to_owned()))
}
