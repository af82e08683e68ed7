//! Makes images byte by byte: of every kind that the format knows, with what others may have left in them.
//!
//! Snapshots that share tables and clusters, compressed clusters that share host clusters, zero clusters with and
//! without space, subclusters of all kinds in one cluster, free clusters between used ones, and clusters that are
//! counted and not used.

use heliostat_block::convert::{u64_from, usize_from};

use super::format::{COMPRESSED, COPIED, ZERO, pack};
use crate::random::Random;

/// What an image is like.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
    pub(crate) extended: bool,
    pub(crate) size: u64,
    /// How many guest clusters have something, per mille.
    pub(crate) filled: u64,
    /// How many of these are compressed, per mille.
    pub(crate) compressed: u64,
    pub(crate) snapshot: bool,
    /// Bytes in clusters that are counted and not used, before everything else.
    pub(crate) leaked: u64,
    /// Clusters behind the file's end that are counted.
    pub(crate) leaked_behind: u64,
}

impl Shape {
    pub(crate) fn draw(random: &mut Random) -> Self {
        let extended = random.chance(250);
        let cluster_bits = match extended {
            true => random.pick(&[14, 15, 16]),
            false => random.pick(&[9, 9, 9, 10, 11, 12, 12, 14, 16]),
        };
        let version = if !extended && random.chance(200) { 2 } else { 3 };
        let refcount_order = if version == 2 { 4 } else { random.pick(&[0, 1, 2, 3, 4, 4, 5, 6, 6]) };
        let cluster = 1_u64 << cluster_bits;
        let clusters = match cluster_bits {
            // So many tables that not all fit into the smallest cache.
            9 if random.chance(200) => 4000,
            9..=11 => random.pick(&[3, 20, 70, 200, 500]),
            12 => random.pick(&[3, 20, 70, 600]),
            _ => random.pick(&[1, 3, 9, 20]),
        };
        let tail = if random.chance(300) { 512 * random.below(cluster / 512) } else { 0 };
        // Almost as much as the smallest refcount table can count.
        let is_leaky = cluster_bits == 9 && refcount_order == 6 && random.chance(500);
        Self {
            version,
            cluster_bits,
            refcount_order,
            extended,
            size: clusters * cluster + tail,
            filled: random.pick(&[0, 0, 100, 500, 900]),
            compressed: if refcount_order >= 3 { random.pick(&[0, 0, 200]) } else { 0 },
            snapshot: refcount_order >= 1 && random.chance(400),
            leaked: if is_leaky { 2000 << 10 } else { 0 },
            leaked_behind: if is_leaky || random.chance(50) { random.below(20) } else { 0 },
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn entries(&self) -> u64 {
        self.cluster() / if self.extended { 16 } else { 8 }
    }

    fn tables(&self) -> u64 {
        self.size.div_ceil(self.entries() * self.cluster())
    }

    fn guest_clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster())
    }
}

/// What one guest cluster is: its descriptor without the flag `COPIED`, and its bitmap.
#[derive(Clone, Copy, Default)]
struct Mapped {
    descriptor: u64,
    bitmap: u64,
    /// Its host cluster is no other's.
    owned: bool,
}

struct Builder<'a> {
    shape: &'a Shape,
    random: &'a mut Random,
    bytes: Vec<u8>,
    counts: Vec<u64>,
    /// Where the next compressed cluster may begin, and where that room ends.
    packing: (u64, u64),
}

/// The bytes of an image of that shape.
pub(crate) fn build(shape: &Shape, random: &mut Random) -> Vec<u8> {
    let mut builder = Builder { shape, random, bytes: Vec::new(), counts: Vec::new(), packing: (0, 0) };
    builder.take(1);
    builder.leak();
    let l1 = builder.take_bytes(shape.tables() * 8);
    let snapshot = builder.tables(l1);
    let blocks = builder.refcounts();
    builder.header(l1, blocks, snapshot);
    builder.bytes
}

impl Builder<'_> {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = usize_from(at);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Takes so many clusters at the end, and sometimes leaves some free before them.
    fn take(&mut self, count: u64) -> u64 {
        if !self.counts.is_empty() && self.random.chance(100) {
            let free = self.random.between(1, 3);
            self.grow(free, 0);
            // What lies in a free cluster is anybody's guess.
            let from = self.bytes.len() - usize_from(free * self.shape.cluster());
            let byte = self.random.next().to_le_bytes()[0];
            self.bytes[from..].fill(byte);
        }
        let start = u64_from(self.bytes.len());
        self.grow(count, 1);
        start
    }

    fn take_bytes(&mut self, bytes: u64) -> u64 {
        self.take(bytes.div_ceil(self.shape.cluster()))
    }

    fn grow(&mut self, count: u64, references: u64) {
        self.bytes.resize(self.bytes.len() + usize_from(count * self.shape.cluster()), 0);
        self.counts.resize(self.counts.len() + usize_from(count), references);
    }

    fn leak(&mut self) {
        self.grow(self.shape.leaked / self.shape.cluster(), 1);
    }

    fn count(&mut self, offset: u64) -> &mut u64 {
        &mut self.counts[usize_from(offset / self.shape.cluster())]
    }

    fn noise(&mut self, at: u64, len: u64) {
        let noise: Vec<_> = (0..len / 8).flat_map(|_| self.random.next().to_le_bytes()).collect();
        self.put(at, &noise);
    }

    /// Makes up what one guest cluster is.
    fn cluster(&mut self) -> Mapped {
        if !self.random.chance(self.shape.filled) {
            return Mapped::default();
        }
        if self.random.chance(self.shape.compressed) {
            return self.compressed();
        }
        if self.shape.extended {
            return self.extended();
        }
        let kind = if self.shape.version < 3 { 0 } else { self.random.below(5) };
        if kind == 4 {
            return Mapped { descriptor: ZERO, ..Mapped::default() };
        }
        let host = self.take(1);
        self.noise(host, self.shape.cluster());
        let zero = if kind == 3 { ZERO } else { 0 };
        Mapped { descriptor: host | zero, bitmap: 0, owned: true }
    }

    fn extended(&mut self) -> Mapped {
        let (mut data, mut zero) = (0_u64, 0_u64);
        let kind = self.random.below(5);
        for bit in 0..32 {
            match (kind, self.random.below(3)) {
                (0, _) | (1, 0) => data |= 1 << bit,
                (2, _) | (1, 1) => zero |= 1 << bit,
                _ => {}
            }
        }
        if data == 0 && self.random.chance(500) {
            return Mapped { descriptor: 0, bitmap: zero << 32, owned: false };
        }
        let host = self.take(1);
        self.noise(host, self.shape.cluster());
        Mapped { descriptor: host, bitmap: data | zero << 32, owned: true }
    }

    fn compressed(&mut self) -> Mapped {
        let cluster = self.shape.cluster();
        let content: Vec<_> = (0..cluster / 8).flat_map(|_| self.random.next().to_le_bytes()).collect();
        let packed = pack(&content);
        let len = u64_from(packed.len());
        let (mut at, mut end) = self.packing;
        if (at % 512 + len).div_ceil(512) > 1 << (self.shape.cluster_bits - 8) {
            // An entry cannot say so many sectors.
            at = at.next_multiple_of(512);
        }
        if end.saturating_sub(at) < len {
            at = self.take(4);
            end = at + 4 * cluster;
            for host in (at..end).step_by(usize_from(cluster)) {
                *self.count(host) = 0;
            }
        }
        self.packing = (at + len, end);
        self.put(at, &packed);
        let sectors = (at % 512 + len).div_ceil(512);
        let last = (at & !511) + sectors * 512 - 1;
        for host in (at / cluster..=last / cluster).map(|index| index * cluster) {
            *self.count(host) += 1;
        }
        let bits = 62 - (self.shape.cluster_bits - 8);
        Mapped { descriptor: COMPRESSED | (sectors - 1) << bits | at, bitmap: 0, owned: false }
    }

    /// All references of one mapping of an L2 table once more.
    fn refer_again(&mut self, mapped: Mapped) {
        let cluster = self.shape.cluster();
        if mapped.owned {
            *self.count(mapped.descriptor & !ZERO) += 1;
        } else if mapped.descriptor & COMPRESSED != 0 {
            let bits = 62 - (self.shape.cluster_bits - 8);
            let start = mapped.descriptor & ((1 << bits) - 1);
            let sectors = ((mapped.descriptor & !COMPRESSED) >> bits) + 1;
            for index in start / cluster..=((start & !511) + sectors * 512 - 1) / cluster {
                *self.count(index * cluster) += 1;
            }
        }
    }

    fn table(&mut self, at: u64, mapped: &[(Mapped, bool)]) {
        let entry_len = if self.shape.extended { 16 } else { 8 };
        for (index, (mapped, is_alone)) in (0..).zip(mapped) {
            let copied = if *is_alone && mapped.owned { COPIED } else { 0 };
            self.put(at + index * entry_len, &(mapped.descriptor | copied).to_be_bytes());
            if self.shape.extended {
                self.put(at + index * entry_len + 8, &mapped.bitmap.to_be_bytes());
            }
        }
    }

    /// Makes the mapping, and below it a snapshot's. Returns where the snapshot table is.
    fn tables(&mut self, l1: u64) -> Option<u64> {
        let old_l1 = self.shape.snapshot.then(|| self.take_bytes(self.shape.tables() * 8));
        for index in 0..self.shape.tables() {
            let first = index * self.shape.entries();
            let count = self.shape.entries().min(self.shape.guest_clusters() - first);
            let mapped: Vec<_> = (0..count).map(|_| self.cluster()).collect();
            let is_empty = mapped.iter().all(|mapped| mapped.descriptor == 0 && mapped.bitmap == 0);
            if is_empty && self.random.chance(800) {
                continue;
            }
            let table = self.take(1);
            let Some(old_l1) = old_l1 else {
                let mapped: Vec<_> = mapped.into_iter().map(|mapped| (mapped, true)).collect();
                self.table(table, &mapped);
                self.put(l1 + index * 8, &(table | COPIED).to_be_bytes());
                continue;
            };
            let old: Vec<_> = mapped.iter().map(|mapped| (*mapped, false)).collect();
            self.table(table, &old);
            self.put(old_l1 + index * 8, &table.to_be_bytes());
            if self.random.chance(500) {
                mapped.iter().for_each(|mapped| self.refer_again(*mapped));
                *self.count(table) += 1;
                self.put(l1 + index * 8, &table.to_be_bytes());
            } else {
                self.changed_since(l1 + index * 8, &mapped);
            }
        }
        old_l1.map(|old_l1| self.snapshot_table(old_l1))
    }

    /// A table of which some entries are as in the snapshot, and others have changed since.
    fn changed_since(&mut self, l1_entry: u64, mapped: &[Mapped]) {
        let mut entries = Vec::new();
        for old in mapped {
            if self.random.chance(500) {
                self.refer_again(*old);
                entries.push((*old, false));
            } else {
                entries.push((self.cluster(), true));
            }
        }
        let own = self.take(1);
        self.table(own, &entries);
        self.put(l1_entry, &(own | COPIED).to_be_bytes());
    }

    fn snapshot_table(&mut self, l1: u64) -> u64 {
        let mut entry = l1.to_be_bytes().to_vec();
        entry.extend(u32::try_from(self.shape.tables()).expect("a small table").to_be_bytes());
        entry.extend([0, 1, 0, 3]);
        entry.extend([0; 20]);
        entry.extend(16_u32.to_be_bytes());
        entry.extend([0; 8]);
        entry.extend(self.shape.size.to_be_bytes());
        entry.extend(b"1old");
        let table = self.take(1);
        self.put(table, &entry);
        table
    }

    /// Writes down all counts. Returns where the refcount table is, and how many clusters it has.
    fn refcounts(&mut self) -> (u64, u64) {
        let cluster = self.shape.cluster();
        let bits = 1_u64 << self.shape.refcount_order;
        let in_block = cluster * 8 / bits;
        let (mut table_clusters, mut blocks) = (1, 1);
        loop {
            let all = u64_from(self.counts.len()) + table_clusters + blocks;
            let needed = all.div_ceil(in_block);
            let table_needed = (needed * 8).div_ceil(cluster);
            if (needed, table_needed) == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = (needed, table_needed);
        }
        let table = u64_from(self.bytes.len());
        self.grow(table_clusters + blocks, 1);
        let countable = blocks * in_block - u64_from(self.counts.len());
        let behind = self.shape.leaked_behind.min(countable);
        self.counts.resize(self.counts.len() + usize_from(behind), 1);
        for block in 0..blocks {
            let at = table + (table_clusters + block) * cluster;
            self.put(table + block * 8, &at.to_be_bytes());
        }
        let first = table + table_clusters * cluster;
        for (number, count) in (0..).zip(self.counts.clone()) {
            let bit = number * bits;
            let at = usize_from(first + bit / 8);
            if bits < 8 {
                self.bytes[at] |= u8::try_from(count << (bit % 8)).expect("a small count");
            } else {
                let width = usize_from(bits / 8);
                self.bytes[at..at + width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
            }
        }
        (table, table_clusters)
    }

    fn header(&mut self, l1: u64, (table, table_clusters): (u64, u64), snapshot: Option<u64>) {
        let short = |number: u64| u32::try_from(number).expect("a small number").to_be_bytes();
        self.put(0, b"QFI\xfb");
        self.put(4, &self.shape.version.to_be_bytes());
        self.put(20, &self.shape.cluster_bits.to_be_bytes());
        self.put(24, &self.shape.size.to_be_bytes());
        self.put(36, &short(self.shape.tables()));
        self.put(40, &l1.to_be_bytes());
        self.put(48, &table.to_be_bytes());
        self.put(56, &short(table_clusters));
        if let Some(snapshot) = snapshot {
            self.put(60, &short(1));
            self.put(64, &snapshot.to_be_bytes());
        }
        if self.shape.version >= 3 {
            let features = if self.shape.extended { 16_u64 } else { 0 };
            self.put(72, &features.to_be_bytes());
            self.put(96, &self.shape.refcount_order.to_be_bytes());
            self.put(100, &short(112));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::Image;
    use super::super::judge::check;
    use super::*;

    #[test]
    fn images_of_every_kind_are_sound_and_leak_only_what_they_are_to() {
        for seed in 0..300 {
            let mut random = Random::new(seed);
            let shape = Shape::draw(&mut random);
            let bytes = build(&shape, &mut random);
            let image = Image::new(&bytes).unwrap();
            let leaks = check(&image).unwrap_or_else(|wrong| panic!("seed {seed}: {shape:?}: {wrong}"));
            let planned = shape.leaked >> shape.cluster_bits;
            assert!((planned..=planned + shape.leaked_behind).contains(&leaks), "seed {seed}: {shape:?}");
            assert_eq!(u64_from(image.content(image.l1, &[7; 1000]).unwrap().len()), shape.size);
        }
    }
}
