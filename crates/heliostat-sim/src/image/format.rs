//! [`Image`]: an image as its bytes say, read anew each time: the header, the tables, what a guest would see.
//!
//! Knows nothing of the driver that it judges and shares no code with it. Follows the qcow2 specification.

use heliostat_block::convert::{u64_from, usize_from};

pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
pub(crate) const ZERO: u64 = 1;
pub(crate) const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
pub(crate) const EXTERNAL_DATA: u64 = 4;
pub(crate) const COMPRESSION: u64 = 8;
pub(crate) const EXTENDED_L2: u64 = 16;
/// Autoclear: the external data file alone is a raw image.
pub(crate) const RAW_DATA: u64 = 2;
/// The header extension that says where the bitmap directory is.
pub(crate) const BITMAPS: u64 = 0x2385_2875;
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an L1 table is: where it begins and how many entries it has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L1 {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// The files of an image: where its tables are, and where its guests' data is if that is another.
#[derive(Clone, Debug, Default)]
pub(crate) struct Files {
    pub(crate) image: Vec<u8>,
    pub(crate) data: Option<Vec<u8>>,
}

/// A snapshot: its L1 table, and how long the disk was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) l1: L1,
    pub(crate) size: u64,
}

/// The bytes of an image, and what its header says.
pub(crate) struct Image<'a> {
    pub(crate) bytes: &'a [u8],
    /// The external data file.
    data: Option<&'a [u8]>,
    pub(crate) data_is_raw: bool,
    /// Its counts may be wrong.
    pub(crate) dirty: bool,
    zstd: bool,
    pub(crate) version: u64,
    pub(crate) cluster_bits: u64,
    pub(crate) refcount_bits: u64,
    pub(crate) extended: bool,
    pub(crate) corrupt: bool,
    pub(crate) size: u64,
    pub(crate) l1: L1,
    pub(crate) refcount_table: u64,
    pub(crate) refcount_table_clusters: u64,
    pub(crate) snapshot_table: u64,
    pub(crate) snapshot_table_len: u64,
    pub(crate) snapshots: Vec<Snapshot>,
    /// Where the bitmap directory is, how long, and how many bitmaps it names.
    pub(crate) bitmap_directory: Option<(u64, u64, u64)>,
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Masks of subclusters with data and with zeroes; bit 0 stands for all of a cluster that has none.
    Plain { host: Option<u64>, copied: bool, data: u32, zero: u32 },
    /// Where its data begins, and where its last sector ends.
    Compressed { start: u64, end: u64 },
}

/// The big-endian number of `len` bytes at `at`; what is not there is zero.
pub(crate) fn number(bytes: &[u8], at: u64, len: usize) -> u64 {
    let at = usize_from(at);
    (at..at + len).fold(0, |number, at| number << 8 | u64::from(bytes.get(at).copied().unwrap_or(0)))
}

impl<'a> Image<'a> {
    /// Reads header and snapshot table.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn new(files: &'a Files) -> Result<Self, String> {
        let bytes = &files.image[..];
        if bytes.get(..4) != Some(b"QFI\xfb") {
            return Err("no image".into());
        }
        let version = number(bytes, 4, 4);
        let at_3 = |at, len| if version < 3 { 0 } else { number(bytes, at, len) };
        let features = at_3(72, 8);
        let mut image = Self {
            bytes,
            data: files.data.as_deref(),
            data_is_raw: at_3(88, 8) & RAW_DATA != 0,
            dirty: features & DIRTY != 0,
            zstd: features & COMPRESSION != 0,
            version,
            cluster_bits: number(bytes, 20, 4),
            refcount_bits: if version < 3 { 16 } else { 1 << number(bytes, 96, 4) },
            extended: features & EXTENDED_L2 != 0,
            corrupt: features & CORRUPT != 0,
            size: number(bytes, 24, 8),
            l1: L1 { offset: number(bytes, 40, 8), len: number(bytes, 36, 4) },
            refcount_table: number(bytes, 48, 8),
            refcount_table_clusters: number(bytes, 56, 4),
            snapshot_table: number(bytes, 64, 8),
            snapshot_table_len: 0,
            snapshots: Vec::new(),
            bitmap_directory: None,
        };
        image.read_snapshots();
        image.read_extensions();
        if image.data.is_some() != (features & EXTERNAL_DATA != 0) {
            return Err("its data is in another file".into());
        }
        if image.zstd != (at_3(104, 1) == 1) {
            return Err("its compression contradicts itself".into());
        }
        if features & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2) != 0 {
            return Err(format!("features {features:#x} that no test has"));
        }
        Ok(image)
    }

    fn read_snapshots(&mut self) {
        let bytes = self.bytes;
        let mut at = self.snapshot_table;
        for _ in 0..number(bytes, 60, 4) {
            let l1 = L1 { offset: number(bytes, at, 8), len: number(bytes, at + 8, 4) };
            self.snapshots.push(Snapshot { l1, size: number(bytes, at + 48, 8) });
            let names = number(bytes, at + 12, 2) + number(bytes, at + 14, 2);
            at += (40 + number(bytes, at + 36, 4) + names).next_multiple_of(8);
        }
        self.snapshot_table_len = at - self.snapshot_table;
    }

    fn read_extensions(&mut self) {
        let bytes = self.bytes;
        let mut at = if self.version < 3 { 72 } else { number(bytes, 100, 4) };
        while at + 8 <= self.cluster_size() && number(bytes, at, 4) != 0 {
            if number(bytes, at, 4) == BITMAPS {
                let directory =
                    (number(bytes, at + 24, 8), number(bytes, at + 16, 8), number(bytes, at + 8, 4));
                // Without the bit, somebody has written who knows nothing of bitmaps.
                self.bitmap_directory = Some(directory).filter(|_| number(bytes, 88, 8) & 1 != 0);
            }
            at += 8 + number(bytes, at + 4, 4).next_multiple_of(8);
        }
    }

    /// Whether guests' data is in another file.
    pub(crate) const fn is_external(&self) -> bool {
        self.data.is_some()
    }

    /// The disk as the external data file alone shows it, where that is to be a raw image.
    pub(crate) fn raw_content(&self) -> Option<Vec<u8>> {
        let data = self.data.filter(|_| self.data_is_raw)?;
        let mut content = data[..data.len().min(usize_from(self.size))].to_vec();
        content.resize(usize_from(self.size), 0);
        Some(content)
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn entry_len(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    pub(crate) fn entries(&self) -> u64 {
        self.cluster_size() / self.entry_len()
    }

    /// Bytes in the smallest part of a cluster of which something is said.
    pub(crate) fn unit(&self) -> u64 {
        if self.extended { self.cluster_size() / 32 } else { self.cluster_size() }
    }

    /// How often a cluster is counted.
    pub(crate) fn refcount(&self, cluster: u64) -> u64 {
        let in_block = self.cluster_size() * 8 / self.refcount_bits;
        let index = cluster / in_block;
        if index >= self.refcount_table_clusters * self.cluster_size() / 8 {
            return 0;
        }
        let block = number(self.bytes, self.refcount_table + index * 8, 8) & OFFSET;
        if block == 0 {
            return 0;
        }
        let bit = cluster % in_block * self.refcount_bits;
        if self.refcount_bits >= 8 {
            return number(self.bytes, block + bit / 8, usize_from(self.refcount_bits / 8));
        }
        number(self.bytes, block + bit / 8, 1) >> (bit % 8) & ((1 << self.refcount_bits) - 1)
    }

    /// The entry number `index` of the L2 table at `table`.
    ///
    /// # Errors
    /// What in it contradicts itself.
    pub(crate) fn entry(&self, table: u64, index: u64) -> Result<Entry, String> {
        let at = table + index * self.entry_len();
        let entry = number(self.bytes, at, 8);
        if entry & COMPRESSED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let start = entry & ((1 << bits) - 1) & ((1 << 56) - 1);
            let sectors = ((entry & !COPIED & !COMPRESSED) >> bits) + 1;
            return Ok(Entry::Compressed { start, end: (start & !511) + sectors * 512 });
        }
        let offset = entry & OFFSET;
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(format!("the L2 entry {entry:#x} at {at:#x} is not aligned"));
        }
        let host = (offset != 0 || (self.is_external() && entry & COPIED != 0)).then_some(offset);
        let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).expect("32 bits");
        let (data, zero) = if self.extended {
            let bits = number(self.bytes, at + 8, 8);
            (half(bits), half(bits >> 32))
        } else if self.version >= 3 && entry & ZERO != 0 {
            (0, 1)
        } else {
            (u32::from(host.is_some()), 0)
        };
        if data & zero != 0 || (data != 0 && host.is_none()) {
            return Err(format!("the L2 entry {entry:#x} at {at:#x} contradicts itself"));
        }
        Ok(Entry::Plain { host, copied: entry & COPIED != 0, data, zero })
    }

    /// What a guest would see, over `backing`.
    ///
    /// # Errors
    /// What cannot be read.
    pub(crate) fn content(&self, backing: &[u8]) -> Result<Vec<u8>, String> {
        self.content_of(Snapshot { l1: self.l1, size: self.size }, backing)
    }

    /// What a guest would see, or would have seen, through an L1 table, over `backing`.
    ///
    /// # Errors
    /// What cannot be read.
    pub(crate) fn content_of(&self, disk: Snapshot, backing: &[u8]) -> Result<Vec<u8>, String> {
        let Snapshot { l1, size } = disk;
        let mut content = backing.to_vec();
        content.resize(usize_from(size), 0);
        let coverage = self.entries() * self.cluster_size();
        for guest in (0..size).step_by(usize_from(self.cluster_size())) {
            let table = number(self.bytes, l1.offset + guest / coverage * 8, 8) & OFFSET;
            if table == 0 || guest / coverage >= l1.len {
                continue;
            }
            let entry = self.entry(table, guest % coverage / self.cluster_size())?;
            let end = usize_from((guest + self.cluster_size()).min(size));
            let into = &mut content[usize_from(guest)..end];
            self.fill(entry, into).map_err(|wrong| format!("guest cluster {guest:#x}: {wrong}"))?;
        }
        Ok(content)
    }

    fn fill(&self, entry: Entry, into: &mut [u8]) -> Result<(), String> {
        match entry {
            Entry::Compressed { start, .. } => {
                let unpack = if self.zstd { unpack_zstd } else { unpack };
                let cluster = unpack(&self.bytes[usize_from(start)..], usize_from(self.cluster_size()))?;
                into.copy_from_slice(&cluster[..into.len()]);
            }
            Entry::Plain { host, data, zero, .. } => {
                for (number, part) in into.chunks_mut(usize_from(self.unit())).enumerate() {
                    if data >> number & 1 != 0 {
                        let from = usize_from(host.unwrap_or(0) + u64_from(number) * self.unit());
                        self.read_data(from, part)?;
                    } else if zero >> number & 1 != 0 {
                        part.fill(0);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Image<'_> {
    fn read_data(&self, from: usize, into: &mut [u8]) -> Result<(), String> {
        let Some(data) = self.data else {
            let found = self.bytes.get(from..from + into.len()).ok_or("behind the file's end")?;
            into.copy_from_slice(found);
            return Ok(());
        };
        // An external data file may be shorter than the disk.
        let there = data.get(from..).unwrap_or_default();
        let len = there.len().min(into.len());
        into[..len].copy_from_slice(&there[..len]);
        into[len..].fill(0);
        Ok(())
    }
}

/// Deflate has blocks that are not compressed; the images that are made here have no others.
pub(crate) fn pack(cluster: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let count = cluster.chunks(60_000).count();
    for (number, chunk) in cluster.chunks(60_000).enumerate() {
        let len = u16::try_from(chunk.len()).expect("at most 60 000");
        packed.push(u8::from(number + 1 == count));
        packed.extend(len.to_le_bytes());
        packed.extend((!len).to_le_bytes());
        packed.extend(chunk);
    }
    packed
}

fn unpack(packed: &[u8], len: usize) -> Result<Vec<u8>, String> {
    let mut cluster = Vec::new();
    let mut rest = packed;
    while cluster.len() < len {
        let [kind, low, high, _, _, data @ ..] = rest else { return Err("cut short".into()) };
        let count = usize::from(u16::from_le_bytes([*low, *high]));
        let chunk = data.get(..count).filter(|_| *kind < 2).ok_or("no packed cluster")?;
        cluster.extend(chunk);
        rest = &data[count..];
    }
    if cluster.len() == len { Ok(cluster) } else { Err("too long".into()) }
}

/// Zstandard has them too, of 128 KiB at most.
pub(crate) fn pack_zstd(cluster: &[u8]) -> Vec<u8> {
    let len = u32::try_from(cluster.len()).expect("at most 2 MiB");
    // One segment, its length in four bytes.
    let mut packed = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    packed.extend(len.to_le_bytes());
    let count = cluster.chunks(ZSTD_BLOCK).count();
    for (number, chunk) in cluster.chunks(ZSTD_BLOCK).enumerate() {
        let len = u32::try_from(chunk.len()).expect("at most 128 KiB");
        let head = len << 3 | u32::from(number + 1 == count);
        packed.extend(&head.to_le_bytes()[..3]);
        packed.extend(chunk);
    }
    packed
}

const ZSTD_BLOCK: usize = 128 << 10;

fn unpack_zstd(packed: &[u8], len: usize) -> Result<Vec<u8>, String> {
    let mut cluster = Vec::new();
    let mut rest = packed.get(9..).ok_or("cut short")?;
    while cluster.len() < len {
        let [one, two, three, data @ ..] = rest else { return Err("cut short".into()) };
        let count = usize_from(u64::from(u32::from_le_bytes([*one, *two, *three, 0]) >> 3));
        let chunk = data.get(..count).filter(|_| count > 0 && one & 6 == 0).ok_or("no packed cluster")?;
        cluster.extend(chunk);
        rest = &data[count..];
    }
    if cluster.len() == len { Ok(cluster) } else { Err("too long".into()) }
}
