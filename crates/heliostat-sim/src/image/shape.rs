//! [`Shape`]: what an image is like, before anything is written of it.

use crate::random::Random;

/// Where guests' data is, if not in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataFile {
    Plain,
    /// Alone it is a raw image of the disk.
    Raw,
}

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
    /// With Zstandard.
    pub(crate) zstd: bool,
    pub(crate) snapshot: bool,
    /// Bytes in clusters that are counted and not used, before everything else.
    pub(crate) leaked: u64,
    /// Clusters behind the file's end that are counted.
    pub(crate) leaked_behind: u64,
    pub(crate) data_file: Option<DataFile>,
    /// It was not closed, and its counts are wrong.
    pub(crate) dirty: bool,
    /// Its counts may be brought up to date later.
    pub(crate) lazy: bool,
    /// Persistent dirty bitmaps.
    pub(crate) bitmaps: u64,
}

impl Shape {
    pub(crate) fn draw(random: &mut Random) -> Self {
        let extended = random.chance(250);
        let cluster_bits = match extended {
            _ if random.chance(4) => 21,
            _ if random.chance(40) => random.pick(&[17, 17, 18]),
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
            17 => random.pick(&[1, 2, 4]),
            18.. => random.pick(&[1, 2]),
            _ => random.pick(&[1, 3, 9, 20]),
        };
        let tail = if random.chance(300) { 512 * random.below(cluster / 512) } else { 0 };
        // Almost as much as the smallest refcount table can count.
        let is_leaky = cluster_bits == 9 && refcount_order == 6 && random.chance(500);
        let data_file = (version == 3 && random.chance(200))
            .then(|| if random.chance(500) { DataFile::Raw } else { DataFile::Plain });
        let compressed = if refcount_order >= 3 { random.pick(&[0, 0, 200]) } else { 0 };
        let snapshot = refcount_order >= 1 && random.chance(400);
        Self {
            version,
            cluster_bits,
            refcount_order,
            extended,
            size: clusters * cluster + tail,
            filled: random.pick(&[0, 0, 100, 500, 900]),
            compressed: if data_file.is_some() { 0 } else { compressed },
            zstd: version == 3 && random.chance(300),
            snapshot: snapshot && data_file.is_none(),
            leaked: if is_leaky { 2000 << 10 } else { 0 },
            leaked_behind: if is_leaky || random.chance(50) { random.below(20) } else { 0 },
            data_file,
            dirty: version == 3 && random.chance(150),
            lazy: version == 3 && random.chance(200),
            bitmaps: if version == 3 && random.chance(250) { random.between(1, 2) } else { 0 },
        }
    }

    /// The same for what lies below an image: one file, and nothing that is kept up to date.
    pub(crate) fn below(self) -> Self {
        Self { snapshot: false, leaked: 0, data_file: None, bitmaps: 0, ..self }
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn entries(&self) -> u64 {
        self.cluster() / if self.extended { 16 } else { 8 }
    }

    pub(crate) fn tables(&self) -> u64 {
        self.size.div_ceil(self.entries() * self.cluster())
    }

    pub(crate) fn guest_clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster())
    }

    pub(crate) fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - (1_u32 << self.refcount_order))
    }
}
