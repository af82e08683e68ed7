//! [`Wish`]: a qcow2 image of any kind, drawn from a seed; [`Scene`]: that image, made by QEMU's tools or by ours, with
//! something in it, and what a guest must see.
#![allow(dead_code, clippy::unwrap_used, reason = "helpers of tests")]

pub mod map;
pub mod scene;

use heliostat_block::convert::{u64_from, usize_from};

/// Numbers that follow from a seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize_from(self.below(u64_from(of.len())))]
    }
}

/// Who makes an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    Ours,
    Qemu,
}

/// What is below an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Below {
    pub format: &'static str,
    pub size: u64,
    pub cluster_bits: u32,
    pub extended_l2: bool,
}

/// An external data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFile {
    No,
    Plain,
    Raw,
}

/// An image of some kind.
#[derive(Clone, Debug)]
pub struct Wish {
    pub seed: u64,
    pub maker: Maker,
    pub size: u64,
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_bits: u64,
    pub extended_l2: bool,
    pub lazy_refcounts: bool,
    pub zstd: bool,
    /// Some clusters are compressed.
    pub compressed: bool,
    pub data_file: DataFile,
    pub preallocation: &'static str,
    pub snapshot: bool,
    pub bitmaps: bool,
    /// What it stands on, the lowest first.
    pub chain: Vec<Below>,
}

/// All cluster sizes.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
pub const REFCOUNT_BITS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];
pub const PREALLOCATIONS: [&str; 4] = ["off", "metadata", "falloc", "full"];

impl Wish {
    /// The image of that seed. Neighbouring seeds go through all cluster sizes, made by both.
    pub fn draw(seed: u64) -> Self {
        let mut random = Random(seed);
        let random = &mut random;
        let size =
            (1 + random.below(8)) * (1 << 20) + if random.chance(50) { 512 * random.below(300) } else { 0 };
        let version = if random.chance(25) { 2 } else { 3 };
        let mut wish = Self {
            seed,
            maker: if seed.is_multiple_of(2) { Maker::Ours } else { Maker::Qemu },
            size,
            version,
            cluster_bits: 9 + u32::try_from(seed / 2 % 13).unwrap(),
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            zstd: false,
            compressed: random.chance(40),
            data_file: DataFile::No,
            preallocation: "off",
            snapshot: random.chance(25),
            bitmaps: false,
            chain: Vec::new(),
        };
        if random.chance(45) {
            wish.chain = (0..1 + random.below(2)).map(|depth| below(random, size, depth)).collect();
        }
        if version == 3 {
            wish.draw_of_version_3(random);
        }
        let may_preallocate = wish.chain.is_empty() || wish.extended_l2;
        if may_preallocate && random.chance(35) {
            wish.preallocation = random.pick(&PREALLOCATIONS[1..]);
        }
        // What cannot be had together.
        wish.compressed &= wish.data_file == DataFile::No && wish.preallocation == "off";
        // Compressed clusters share clusters, and a snapshot doubles that.
        let counts_enough = if wish.compressed { 16 } else { 2 };
        wish.snapshot &= wish.data_file == DataFile::No && wish.refcount_bits >= counts_enough;
        wish
    }

    fn draw_of_version_3(&mut self, random: &mut Random) {
        self.refcount_bits = random.pick(&REFCOUNT_BITS);
        self.extended_l2 = self.cluster_bits >= 14 && random.chance(50);
        self.lazy_refcounts = random.chance(25);
        self.zstd = random.chance(50);
        self.bitmaps = random.chance(25);
        if random.chance(25) {
            let may_be_raw = self.chain.is_empty() && random.chance(50);
            self.data_file = if may_be_raw { DataFile::Raw } else { DataFile::Plain };
        }
    }

    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// What of the list of options it has; each is to be met by images of both makers.
    pub fn features(&self) -> Vec<String> {
        let flags = [
            ("lazy refcounts", self.lazy_refcounts),
            ("extended L2", self.extended_l2),
            ("compressed with deflate", self.compressed && !self.zstd),
            ("compressed with zstd", self.compressed && self.zstd),
            ("external data file", self.data_file == DataFile::Plain),
            ("raw external data file", self.data_file == DataFile::Raw),
            ("snapshot", self.snapshot),
            ("bitmaps", self.bitmaps),
            ("resized with preallocation", self.may_grow()),
            ("resized with bitmaps", self.may_grow() && self.bitmaps),
            ("resized with a backing file", self.may_grow() && !self.chain.is_empty()),
            ("resized with an external data file", self.may_grow() && self.data_file != DataFile::No),
            ("chain of three", self.chain.len() == 2),
        ];
        let mut all = vec![
            format!("cluster size {}", self.cluster_size()),
            format!("version {}", self.version),
            format!("preallocation {}", self.preallocation),
            format!("refcount bits {}", self.refcount_bits),
        ];
        all.extend(flags.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name.to_owned()));
        if let Some(below) = self.chain.last() {
            let length = if below.size < self.size { "shorter" } else { "longer" };
            all.push(format!("{length} {} below", below.format));
        }
        all
    }

    /// Whether its disk may be made longer.
    pub const fn may_grow(&self) -> bool {
        !self.snapshot || self.version >= 3
    }

    /// Whether its disk may be made shorter.
    pub const fn may_shrink(&self) -> bool {
        !self.snapshot
    }

    /// As `qemu-img create` takes it.
    pub fn options(&self) -> String {
        let mut options = format!(
            "cluster_size={},compat={}",
            self.cluster_size(),
            if self.version == 2 { "0.10" } else { "1.1" }
        );
        let on = |is_on: bool, text: &str| if is_on { format!(",{text}") } else { String::new() };
        options += &on(self.version == 3, &format!("refcount_bits={}", self.refcount_bits));
        options += &on(self.extended_l2, "extended_l2=on");
        options += &on(self.lazy_refcounts, "lazy_refcounts=on");
        options += &on(self.zstd, "compression_type=zstd");
        options += &on(self.data_file == DataFile::Raw, "data_file_raw=on");
        options + &on(self.preallocation != "off", &format!("preallocation={}", self.preallocation))
    }
}

fn below(random: &mut Random, size: u64, depth: u64) -> Below {
    // Only the lowest may be raw.
    let format = if depth == 0 { random.pick(&["raw", "qcow2"]) } else { "qcow2" };
    let cluster_bits = random.pick(&[9, 12, 14, 16, 16, 18]);
    let extended_l2 = cluster_bits >= 14 && random.chance(40);
    Below { format, size: (size / 2 + random.below(size)) & !511, cluster_bits, extended_l2 }
}
