//! [`Cluster`]: what an L2 entry says of a guest cluster. [`L1Entry`]: what an L1 entry says of an L2 table.
//!
//! Pure. Follows the qcow2 specification, sections "Cluster mapping" and "Extended L2 Entries". Images with and
//! without subclusters look alike here: without, the one bit of a mask stands for the whole cluster.

use super::error::Corruption;
use super::layout::Layout;

/// Bits 9 to 55: a host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Reference count is exactly one: may be written in place.
pub const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zero (version 3, without subclusters).
pub const ZERO: u64 = 1;

/// An L2 entry as it stands in the image: `subclusters` is 0 where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawEntry {
    /// The cluster's descriptor.
    pub descriptor: u64,
    /// The allocation bitmap of an extended entry.
    pub subclusters: u64,
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Not compressed, perhaps not allocated.
    Standard(Standard),
    /// Compressed.
    Compressed(Compressed),
}

/// A cluster that is not compressed. A subcluster that is neither in `data` nor in `zero` is unallocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standard {
    /// Where its host cluster begins, in the image file or the external data file.
    pub host: Option<u64>,
    /// Whether its host cluster's reference count is exactly one.
    pub copied: bool,
    /// Subclusters whose data is in the host cluster.
    pub data: u32,
    /// Subclusters that read as zero.
    pub zero: u32,
}

/// A compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Where its data begins, in the image file.
    pub offset: u64,
    /// How far its data may reach: to the end of its last sector of 512 bytes.
    pub len: u64,
}

impl Compressed {
    /// The host clusters in which it lies, by number: the first and the last.
    #[must_use]
    pub const fn host_clusters(self, layout: Layout) -> (u64, u64) {
        (layout.cluster_index(self.offset), layout.cluster_index(self.offset + self.len - 1))
    }
}

impl Standard {
    /// Says whether nothing is known of it in this image.
    #[must_use]
    pub const fn is_unallocated(self) -> bool {
        self.data == 0 && self.zero == 0
    }

    /// All of it zero, without a host cluster.
    #[must_use]
    pub const fn zero(layout: Layout) -> Self {
        Self { host: None, copied: false, data: 0, zero: layout.all_subclusters() }
    }

    /// All of it data, in the host cluster at `host`, which is nobody else's.
    #[must_use]
    pub const fn data(host: u64, layout: Layout) -> Self {
        Self { host: Some(host), copied: true, data: layout.all_subclusters(), zero: 0 }
    }

    /// The entry that says this.
    #[must_use]
    pub fn encode(self, layout: Layout) -> RawEntry {
        let copied = if self.copied { COPIED } else { 0 };
        let descriptor = self.host.map_or(0, |host| host | copied);
        if layout.extended_l2 {
            let subclusters = u64::from(self.data) | u64::from(self.zero) << 32;
            return RawEntry { descriptor, subclusters };
        }
        let zero = if self.zero == 0 { 0 } else { ZERO };
        RawEntry { descriptor: descriptor | zero, subclusters: 0 }
    }
}

impl Cluster {
    /// Reads an entry. `external`: guest clusters are in an external data file, in which a host cluster may
    /// begin at 0.
    ///
    /// # Errors
    /// [`Corruption`] when the entry points to where no cluster can begin, or says two things at once.
    pub fn decode(entry: RawEntry, layout: Layout, external: bool) -> Result<Self, Corruption> {
        let RawEntry { descriptor, subclusters } = entry;
        let contradiction = Corruption::Contradiction { what: "L2", entry: descriptor };
        if descriptor & COMPRESSED != 0 {
            if external {
                return Err(contradiction);
            }
            return Ok(Self::Compressed(compressed(descriptor, layout)));
        }
        let offset = descriptor & OFFSET_MASK;
        if layout.in_cluster(offset) != 0 {
            return Err(Corruption::Misplaced { what: "L2", entry: descriptor, offset });
        }
        let copied = descriptor & COPIED != 0;
        let host = (offset != 0 || (external && copied)).then_some(offset);
        let (data, zero) = if layout.extended_l2 {
            let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(u32::MAX);
            (half(subclusters), half(subclusters >> 32))
        } else if layout.version >= 3 && descriptor & ZERO != 0 {
            (0, 1)
        } else {
            (u32::from(host.is_some()), 0)
        };
        if data & zero != 0 || (data != 0 && host.is_none()) {
            return Err(contradiction);
        }
        Ok(Self::Standard(Standard { host, copied: copied && host.is_some(), data, zero }))
    }
}

fn compressed(descriptor: u64, layout: Layout) -> Compressed {
    let offset_bits = 62 - (layout.cluster_bits - 8);
    // Bits beyond 55 must be 0 where the field is that wide.
    let offset = descriptor & ((1 << offset_bits.min(56)) - 1);
    let sectors = (descriptor & (COMPRESSED - 1)) >> offset_bits;
    let end = (offset & !511) + (sectors + 1) * 512;
    Compressed { offset, len: end - offset }
}

/// An L1 entry as it stands in the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// Points to the L2 table at `offset`, which is nobody else's.
    #[must_use]
    pub const fn owned(offset: u64) -> Self {
        Self(offset | COPIED)
    }

    /// Where the L2 table begins; `None` where there is none.
    ///
    /// # Errors
    /// [`Corruption::Misplaced`] when no cluster can begin there.
    pub fn table(self, layout: Layout) -> Result<Option<u64>, Corruption> {
        let offset = self.0 & OFFSET_MASK;
        if layout.in_cluster(offset) != 0 {
            return Err(Corruption::Misplaced { what: "L1", entry: self.0, offset });
        }
        Ok((offset != 0).then_some(offset))
    }

    /// Whether the L2 table's reference count is exactly one.
    #[must_use]
    pub const fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Layout = Layout { cluster_bits: 16, refcount_order: 4, extended_l2: false, version: 3 };
    const EXTENDED: Layout = Layout { extended_l2: true, ..PLAIN };

    fn decode(descriptor: u64, subclusters: u64, layout: Layout) -> Result<Cluster, Corruption> {
        Cluster::decode(RawEntry { descriptor, subclusters }, layout, false)
    }

    #[test]
    fn what_is_encoded_is_decoded_alike() {
        let entries = [
            (PLAIN, Standard::default()),
            (PLAIN, Standard::zero(PLAIN)),
            (PLAIN, Standard::data(0x50000, PLAIN)),
            (PLAIN, Standard { host: Some(0x50000), copied: true, data: 0, zero: 1 }),
            (EXTENDED, Standard::zero(EXTENDED)),
            (EXTENDED, Standard { host: Some(0x50000), copied: true, data: 0xff, zero: 0xff00 }),
            (EXTENDED, Standard { host: Some(0x50000), copied: false, data: 0, zero: 0 }),
        ];
        for (layout, standard) in entries {
            let raw = standard.encode(layout);
            assert_eq!(Cluster::decode(raw, layout, false), Ok(Cluster::Standard(standard)));
        }
    }

    #[test]
    fn version_2_has_no_zero_clusters() {
        let layout = Layout { version: 2, ..PLAIN };
        let Ok(Cluster::Standard(standard)) = decode(COPIED | 0x50001, 0, layout) else { panic!() };
        assert_eq!((standard.data, standard.zero), (1, 0));
    }

    #[test]
    fn offset_zero_is_a_host_cluster_only_in_an_external_data_file() {
        let raw = RawEntry { descriptor: COPIED, subclusters: 0 };
        let external = Cluster::decode(raw, PLAIN, true);
        assert_eq!(external, Ok(Cluster::Standard(Standard::data(0, PLAIN))));
        assert_eq!(Cluster::decode(raw, PLAIN, false), Ok(Cluster::Standard(Standard::default())));
    }

    #[test]
    fn entries_that_make_no_sense_are_corruptions() {
        assert!(matches!(decode(0x50200, 0, PLAIN), Err(Corruption::Misplaced { .. })));
        assert!(matches!(decode(0x50000, 0x1_0000_0001, EXTENDED), Err(Corruption::Contradiction { .. })));
        assert!(matches!(decode(0, 1, EXTENDED), Err(Corruption::Contradiction { .. })));
        let compressed = RawEntry { descriptor: COMPRESSED | 0x50000, subclusters: 0 };
        assert!(matches!(Cluster::decode(compressed, PLAIN, true), Err(Corruption::Contradiction { .. })));
        assert!(matches!(L1Entry(0x50200).table(PLAIN), Err(Corruption::Misplaced { .. })));
    }

    #[test]
    fn a_compressed_cluster_reaches_to_the_end_of_its_last_sector() {
        // 64 KiB clusters: 54 bits of offset, then the count of further sectors.
        let descriptor = COMPRESSED | 3 << 54 | 0x5_0123;
        let Ok(Cluster::Compressed(compressed)) = decode(descriptor, 0, PLAIN) else { panic!() };
        assert_eq!(compressed, Compressed { offset: 0x5_0123, len: 4 * 512 - 0x123 });
        assert_eq!(compressed.host_clusters(PLAIN), (5, 5));
        let across = Compressed { offset: 0x5_ff00, len: 0x300 };
        assert_eq!(across.host_clusters(PLAIN), (5, 6));
    }
}
