//! [`Layout`]: where in an image what stands, as a matter of arithmetic. Fixed when an image is made.
//!
//! Pure. Follows the qcow2 specification, sections "Host cluster management", "Cluster mapping" and "Extended
//! L2 Entries".

use crate::convert::usize_from;
use crate::range::ByteRange;

/// The smallest cluster, as a power of two.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// The largest cluster, as a power of two; QEMU's limit too.
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Subclusters in a cluster of an image with extended L2 entries.
const SUBCLUSTERS: u32 = 32;

/// The arithmetic of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes in a cluster, as a power of two, from [`CLUSTER_BITS_MIN`] to [`CLUSTER_BITS_MAX`].
    pub cluster_bits: u32,
    /// Bits in a reference count, as a power of two, up to 6.
    pub refcount_order: u32,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// 2 or 3.
    pub version: u32,
}

impl Layout {
    /// Bytes in a cluster.
    #[must_use]
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// The number of the cluster in which `offset` lies.
    #[must_use]
    pub const fn cluster_index(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// The start of the cluster in which `offset` lies.
    #[must_use]
    pub const fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// How far `offset` is from the start of its cluster.
    #[must_use]
    pub const fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Clusters that `bytes` need.
    #[must_use]
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Subclusters in a cluster: 1 where there are none.
    #[must_use]
    pub const fn subclusters(self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// Bytes in the unit of allocation: a subcluster, or a cluster where there are none.
    #[must_use]
    pub const fn unit(self) -> u64 {
        if self.extended_l2 { self.cluster_size() / 32 } else { self.cluster_size() }
    }

    /// A bit for each subcluster.
    #[must_use]
    pub const fn all_subclusters(self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// A bit for each subcluster that shares a byte with `range`, which counts from the cluster's start and lies
    /// inside the cluster.
    #[must_use]
    pub fn subclusters_of(self, range: ByteRange) -> u32 {
        if range.is_empty() {
            return 0;
        }
        let unit = self.unit();
        let (first, last) = (range.offset() / unit, (range.end() - 1) / unit);
        let upto = |bit: u64| u32::MAX >> (31 - u32::try_from(bit.min(31)).unwrap_or(31));
        upto(last) & !(upto(first) >> 1)
    }

    /// Bytes in an L2 entry.
    #[must_use]
    pub const fn l2_entry_size(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in an L2 table, which is one cluster.
    #[must_use]
    pub const fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Bytes of the virtual disk that one L2 table maps.
    #[must_use]
    pub const fn l2_coverage(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Which L1 entry maps `offset` of the virtual disk.
    #[must_use]
    pub const fn l1_index(self, offset: u64) -> u64 {
        offset / self.l2_coverage()
    }

    /// Which entry of its L2 table maps `offset` of the virtual disk.
    #[must_use]
    pub const fn l2_index(self, offset: u64) -> u64 {
        (offset >> self.cluster_bits) % self.l2_entries()
    }

    /// L1 entries that a virtual disk of `size` bytes needs.
    #[must_use]
    pub const fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Bits in a reference count.
    #[must_use]
    pub const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest reference count.
    #[must_use]
    pub const fn refcount_max(self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Reference counts in a refcount block, which is one cluster.
    #[must_use]
    pub const fn refcount_block_entries(self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// Which entry of the refcount table counts the cluster number `cluster`.
    #[must_use]
    pub const fn refcount_table_index(self, cluster: u64) -> u64 {
        cluster >> self.refcount_block_entries().trailing_zeros()
    }

    /// Which entry of its refcount block counts the cluster number `cluster`.
    #[must_use]
    pub const fn refcount_block_index(self, cluster: u64) -> u64 {
        cluster & (self.refcount_block_entries() - 1)
    }

    /// Reads the reference count number `index` of `block`, which may be a piece of a refcount block that starts
    /// at a whole byte. `index` must lie inside.
    #[must_use]
    pub fn refcount(self, block: &[u8], index: u64) -> u64 {
        let bits = u64::from(self.refcount_bits());
        if bits == 16 {
            // Nearly all images have these.
            let start = usize_from(index) * 2;
            return u64::from(u16::from_be_bytes([block[start], block[start + 1]]));
        }
        if bits < 8 {
            let byte = block[usize_from(index * bits / 8)];
            return (u64::from(byte) >> (index * bits % 8)) & self.refcount_max();
        }
        let width = usize_from(bits / 8);
        let start = usize_from(index) * width;
        block[start..start + width].iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
    }

    /// Changes the reference count number `index` of `block`; see [`Layout::refcount`]. `count` must not be
    /// larger than [`Layout::refcount_max`].
    pub fn set_refcount(self, block: &mut [u8], index: u64, count: u64) {
        debug_assert!(count <= self.refcount_max());
        let bits = u64::from(self.refcount_bits());
        if bits < 8 {
            let byte = &mut block[usize_from(index * bits / 8)];
            let shift = index * bits % 8;
            let mask = u8::try_from(self.refcount_max() << shift).unwrap_or(u8::MAX);
            let value = u8::try_from(count << shift).unwrap_or(u8::MAX);
            *byte = (*byte & !mask) | (value & mask);
            return;
        }
        let width = usize_from(bits / 8);
        let start = usize_from(index) * width;
        block[start..start + width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(refcount_order: u32, extended_l2: bool) -> Layout {
        Layout { cluster_bits: 16, refcount_order, extended_l2, version: 3 }
    }

    #[test]
    fn an_offset_is_found_through_both_tables() {
        let plain = layout(4, false);
        assert_eq!(plain.l2_coverage(), 512 << 20);
        assert_eq!((plain.l1_index(513 << 20), plain.l2_index(513 << 20)), (1, 16));
        let extended = layout(4, true);
        assert_eq!((extended.l2_entries(), extended.l2_coverage(), extended.unit()), (4096, 256 << 20, 2048));
    }

    #[test]
    fn a_range_names_every_subcluster_that_it_touches() {
        let range = |offset, len| ByteRange::new(offset, len).unwrap();
        let extended = layout(4, true);
        assert_eq!(extended.subclusters_of(range(0, 1)), 1);
        assert_eq!(extended.subclusters_of(range(2047, 2)), 0b11);
        assert_eq!(extended.subclusters_of(range(63 << 10, 1024)), 1 << 31);
        assert_eq!(extended.subclusters_of(range(0, 64 << 10)), u32::MAX);
        assert_eq!(extended.subclusters_of(range(5, 0)), 0);
        assert_eq!(layout(4, false).subclusters_of(range(0, 64 << 10)), 1);
    }

    #[test]
    fn reference_counts_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let layout = layout(order, false);
            let mut block = vec![0xff_u8; 64];
            let entries = (64 * 8) >> order;
            for index in 0..entries {
                layout.set_refcount(&mut block, index, index & layout.refcount_max());
            }
            for index in 0..entries {
                assert_eq!(layout.refcount(&block, index), index & layout.refcount_max(), "order {order}");
            }
        }
        // The least significant bits of a byte come first.
        let mut block = [0_u8; 1];
        layout(0, false).set_refcount(&mut block, 1, 1);
        assert_eq!(block, [2]);
        let mut block = [0_u8; 2];
        layout(4, false).set_refcount(&mut block, 0, 1);
        assert_eq!(block, [0, 1]);
    }
}
