//! Judging an image as it lies on a medium: is it sound, but for leaks?
//!
//! Counts every reference by walking the tables, as `qemu-img check` does, and compares with what the image says.

use heliostat_block::convert::{u64_from, usize_from};

use super::format::{Entry, Image, L1, OFFSET, number};

/// What refers to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Table(&'static str),
    L2,
    Data,
    Compressed,
}

/// References to the clusters of an image.
struct Walk<'a> {
    image: &'a Image<'a>,
    counts: Vec<u64>,
    uses: Vec<Option<Use>>,
    /// References of the active tables to what they must have alone.
    active: Vec<bool>,
}

/// Checks everything but contents; says how many clusters are counted more often than they are used.
///
/// # Errors
/// The first thing that is wrong.
pub(crate) fn check(image: &Image<'_>) -> Result<u64, String> {
    if image.corrupt {
        return Err("it is marked corrupt".into());
    }
    if image.dirty {
        // Its counts mean nothing.
        return Ok(0);
    }
    let clusters = image.bytes.len().div_ceil(usize_from(image.cluster_size()));
    let mut walk =
        Walk { image, counts: vec![0; clusters], uses: vec![None; clusters], active: vec![false; clusters] };
    walk.tables()?;
    walk.mapping(image.l1, true)?;
    for snapshot in &image.snapshots {
        walk.mapping(snapshot.l1, false)?;
    }
    walk.compare()
}

impl Walk<'_> {
    fn add(&mut self, start: u64, end: u64, as_what: Use) -> Result<(), String> {
        if start >= end {
            return Ok(());
        }
        let size = self.image.cluster_size();
        for cluster in start / size..=(end - 1) / size {
            let index = usize_from(cluster);
            if index >= self.counts.len() {
                return Err(format!("{as_what:?} at {:#x} is behind the file's end", cluster * size));
            }
            let other = self.uses[index].replace(as_what);
            let is_shared = other == Some(as_what) && !matches!(as_what, Use::Table(_));
            if other.is_some() && !is_shared {
                return Err(format!("{as_what:?} and {other:?} are both at {:#x}", cluster * size));
            }
            self.counts[index] += 1;
        }
        Ok(())
    }

    fn tables(&mut self) -> Result<(), String> {
        let image = self.image;
        let size = image.cluster_size();
        self.add(0, 1, Use::Table("header"))?;
        self.add(image.l1.offset, image.l1.offset + image.l1.len * 8, Use::Table("L1"))?;
        let end = image.refcount_table + image.refcount_table_clusters * size;
        self.add(image.refcount_table, end, Use::Table("refcount table"))?;
        for at in (image.refcount_table..end).step_by(8) {
            let block = number(image.bytes, at, 8);
            if !block.is_multiple_of(size) {
                return Err(format!("the refcount block {block:#x} is not aligned"));
            }
            if block != 0 {
                self.add(block, block + size, Use::Table("refcount block"))?;
            }
        }
        let table = image.snapshot_table;
        self.add(table, table + image.snapshot_table_len, Use::Table("snapshot table"))?;
        for snapshot in &image.snapshots {
            let L1 { offset, len } = snapshot.l1;
            self.add(offset, offset + len * 8, Use::Table("snapshot's L1"))?;
        }
        if let Some((offset, len, _)) = image.bitmap_directory {
            self.add(offset, offset + len, Use::Table("bitmap directory"))?;
        }
        for bitmap in image.bitmaps() {
            let (offset, len) = bitmap.table;
            self.add(offset, offset + len * 8, Use::Table("bitmap table"))?;
            for cluster in image.clusters_of(&bitmap) {
                self.add(cluster, cluster + size, Use::Table("bitmap"))?;
            }
        }
        Ok(())
    }

    fn mapping(&mut self, l1: L1, active: bool) -> Result<(), String> {
        let image = self.image;
        let size = image.cluster_size();
        for index in 0..l1.len {
            let entry = number(image.bytes, l1.offset + index * 8, 8);
            let table = entry & OFFSET;
            if !table.is_multiple_of(size) {
                return Err(format!("the L1 entry {entry:#x} is not aligned"));
            }
            if table == 0 {
                continue;
            }
            self.add(table, table + size, Use::L2)?;
            if active {
                self.alone(table, entry >> 63 != 0, "L2 table")?;
            }
            let first = index * image.entries();
            for index in 0..image.entries() {
                let guest = (first + index) * size;
                self.entry(image.entry(table, index)?, active, guest)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry, active: bool, guest: u64) -> Result<(), String> {
        match entry {
            Entry::Plain { host: Some(host), copied, .. } if self.image.is_external() => {
                // It is where the guest has it, and nobody counts it.
                let is_right = copied && host == guest;
                if is_right {
                    Ok(())
                } else {
                    Err(format!("guest cluster {guest:#x} is at {host:#x}, {copied}"))
                }
            }
            Entry::Compressed { start, end } => self.add(start, end, Use::Compressed),
            Entry::Plain { host: Some(host), copied, .. } => {
                self.add(host, host + self.image.cluster_size(), Use::Data)?;
                if active { self.alone(host, copied, "data cluster") } else { Ok(()) }
            }
            Entry::Plain { host: None, .. } => Ok(()),
        }
    }

    /// The active tables name a cluster once, and say whether it is theirs alone.
    fn alone(&mut self, host: u64, copied: bool, what: &str) -> Result<(), String> {
        let cluster = host / self.image.cluster_size();
        if std::mem::replace(&mut self.active[usize_from(cluster)], true) {
            return Err(format!("the {what} at {host:#x} is named twice"));
        }
        let count = self.image.refcount(cluster);
        if copied != (count == 1) {
            return Err(format!("the {what} at {host:#x} is counted {count} times, its entry says {copied}"));
        }
        Ok(())
    }

    fn compare(&self) -> Result<u64, String> {
        let mut leaks = 0;
        for (cluster, count) in (0..).zip(&self.counts) {
            let counted = self.image.refcount(cluster);
            if counted < *count {
                let (at, used) = (cluster * self.image.cluster_size(), self.uses[usize_from(cluster)]);
                return Err(format!("{used:?} at {at:#x} is counted {counted} times and used {count} times"));
            }
            leaks += u64::from(counted > *count);
        }
        // What is counted behind the end is a leak, too; there is not much of it.
        let end = u64_from(self.counts.len());
        leaks += u64_from((end..end + 64).filter(|cluster| self.image.refcount(*cluster) > 0).count());
        Ok(leaks)
    }
}
