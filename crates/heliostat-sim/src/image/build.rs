//! Makes images byte by byte: of every kind that the format knows, with what others may have left in them.
//!
//! Snapshots that share tables and clusters, compressed clusters that share host clusters, zero clusters with and
//! without space, subclusters of all kinds in one cluster, free clusters between used ones, and clusters that are
//! counted and not used; dirty bitmaps; data in another file; images that were not closed, whose counts are wrong.

use heliostat_block::convert::{u64_from, usize_from};

use super::bitmaps::{AUTO, IN_USE};
use super::format::{
    BITMAPS, COMPRESSED, COMPRESSION, COPIED, DIRTY, EXTENDED_L2, EXTERNAL_DATA, Files, RAW_DATA, ZERO, pack,
    pack_zstd,
};
use super::shape::{DataFile, Shape};
use crate::random::Random;

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
    /// The external data file.
    data: Vec<u8>,
    /// The guest cluster that is made up next.
    guest: u64,
}

/// The files of an image of that shape.
pub(crate) fn build(shape: &Shape, random: &mut Random) -> Files {
    let data = shape.data_file.map_or(0, |_| usize_from(shape.size));
    let mut builder = Builder {
        shape,
        random,
        bytes: Vec::new(),
        counts: Vec::new(),
        packing: (0, 0),
        data: vec![0; data],
        guest: 0,
    };
    builder.take(1);
    builder.leak();
    let l1 = builder.take_bytes(shape.tables() * 8);
    let snapshot = builder.tables(l1);
    let bitmaps = builder.bitmaps();
    let blocks = builder.refcounts();
    builder.header(l1, blocks, snapshot);
    builder.extensions(bitmaps);
    Files { image: builder.bytes, data: shape.data_file.map(|_| builder.data) }
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
        let guest = self.guest;
        self.guest += self.shape.cluster();
        if let Some(file) = self.shape.data_file {
            return self.external(guest, file);
        }
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

    /// A guest cluster whose data is in the external data file, if it has any.
    fn external(&mut self, guest: u64, file: DataFile) -> Mapped {
        let is_filled = self.random.chance(self.shape.filled);
        let mapped = match file {
            // As it is made: all of it is mapped, so that both sides show the same whatever a crash leaves.
            DataFile::Raw => Mapped { descriptor: guest, bitmap: 0xffff_ffff, owned: true },
            DataFile::Plain if !is_filled => Mapped::default(),
            DataFile::Plain if self.shape.extended => {
                let data = self.random.next() & 0xffff_ffff;
                let zero = self.random.next() & 0xffff_ffff & !data;
                Mapped { descriptor: guest, bitmap: data | zero << 32, owned: true }
            }
            DataFile::Plain if self.random.chance(200) => Mapped { descriptor: ZERO, ..Mapped::default() },
            DataFile::Plain => Mapped { descriptor: guest, bitmap: 0, owned: true },
        };
        // What is not mapped may be anything, where the image alone says what the disk holds.
        if is_filled || file == DataFile::Plain {
            let end = usize_from((guest + self.shape.cluster()).min(self.shape.size));
            for word in self.data[usize_from(guest)..end].chunks_mut(8) {
                word.copy_from_slice(&self.random.next().to_le_bytes());
            }
        }
        mapped
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
        let packed = if self.shape.zstd { pack_zstd(&content) } else { pack(&content) };
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

    /// Makes the bitmaps. Returns where their directory is, and how long.
    fn bitmaps(&mut self) -> Option<(u64, u64)> {
        let mut directory = Vec::new();
        for number in 0..self.shape.bitmaps {
            let granularity_bits = self.random.pick(&[9_u8, 12, 16]);
            let granules = self.shape.size.div_ceil(1 << granularity_bits);
            let entries = granules.div_ceil(8).div_ceil(self.shape.cluster());
            let table = self.take_bytes(entries * 8);
            for index in 0..entries {
                let entry = match self.random.below(3) {
                    0 => 0,
                    1 => 1,
                    _ => {
                        let bits = self.take(1);
                        self.noise(bits, self.shape.cluster());
                        bits
                    }
                };
                self.put(table + index * 8, &entry.to_be_bytes());
            }
            let auto = if self.random.chance(800) { AUTO } else { 0 };
            let flags = auto | if self.random.chance(100) { IN_USE } else { 0 };
            directory.extend(table.to_be_bytes());
            directory.extend(&entries.to_be_bytes()[4..]);
            directory.extend(&flags.to_be_bytes()[4..]);
            directory.extend([1, granularity_bits, 0, 4, 0, 0, 0, 0]);
            directory.extend([b'b', b'i', b't', if number == 0 { b'0' } else { b'1' }, 0, 0, 0, 0]);
        }
        if directory.is_empty() {
            return None;
        }
        let at = self.take_bytes(u64_from(directory.len()));
        self.put(at, &directory);
        Some((at, u64_from(directory.len())))
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
        if self.shape.dirty {
            self.spoil_counts();
        }
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

    /// As whoever brings counts up to date later has left them, and worse.
    fn spoil_counts(&mut self) {
        let share = self.random.pick(&[0, 50, 500, 1000]);
        let most = self.shape.refcount_max().min(3);
        for count in &mut self.counts {
            if self.random.chance(share) {
                *count = if self.random.chance(700) { 0 } else { self.random.between(0, most) };
            }
        }
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
            let bit = |is_set: bool, bit: u64| if is_set { bit } else { 0 };
            let features = bit(self.shape.extended, EXTENDED_L2)
                | bit(self.shape.dirty, DIRTY)
                | bit(self.shape.zstd, COMPRESSION)
                | bit(self.shape.data_file.is_some(), EXTERNAL_DATA);
            let autoclear =
                bit(self.shape.bitmaps > 0, 1) | bit(self.shape.data_file == Some(DataFile::Raw), RAW_DATA);
            self.put(72, &features.to_be_bytes());
            self.put(80, &u64::from(self.shape.lazy).to_be_bytes());
            self.put(88, &autoclear.to_be_bytes());
            self.put(96, &self.shape.refcount_order.to_be_bytes());
            self.put(100, &short(112));
            self.put(104, &[u8::from(self.shape.zstd)]);
        }
    }

    /// Header extensions: where the bitmaps are, and how the data file is called.
    fn extensions(&mut self, bitmaps: Option<(u64, u64)>) {
        let mut extensions = Vec::new();
        let mut put = |kind: u64, data: &[u8]| {
            extensions.extend(&kind.to_be_bytes()[4..]);
            extensions.extend(&u64_from(data.len()).to_be_bytes()[4..]);
            extensions.extend(data);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        };
        if self.shape.data_file.is_some() {
            put(0x4441_5441, b"data");
        }
        if let Some((at, len)) = bitmaps {
            let count = self.shape.bitmaps << 32;
            put(BITMAPS, &[count.to_be_bytes(), len.to_be_bytes(), at.to_be_bytes()].concat());
        }
        if !extensions.is_empty() {
            self.put(112, &extensions);
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
            let files = build(&shape, &mut random);
            let image = Image::new(&files).unwrap();
            if shape.dirty {
                continue;
            }
            let leaks = check(&image).unwrap_or_else(|wrong| panic!("seed {seed}: {shape:?}: {wrong}"));
            let planned = shape.leaked >> shape.cluster_bits;
            assert!((planned..=planned + shape.leaked_behind).contains(&leaks), "seed {seed}: {shape:?}");
            let content = image.content(&[7; 1000]).unwrap();
            assert_eq!(u64_from(content.len()), shape.size);
            assert!(image.raw_content().is_none_or(|alone| alone == content), "seed {seed}: {shape:?}");
        }
    }
}
