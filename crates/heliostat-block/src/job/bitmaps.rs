//! [`Bitmaps`]: the memory in which a mirror remembers what it has to copy and to flush.
//!
//! All that grows with the disk, and all of it had before there is a job: a job that has been announced must
//! not fail for want of memory in the middle. Made by the control plane, given to `mirror`.

use crate::dirty_bitmap::DirtyBitmap;
use crate::error::InvalidGranularity;
use crate::node::Node;

/// The bitmaps of one mirror.
#[derive(Debug)]
pub struct Bitmaps {
    pub(crate) dirty: DirtyBitmap,
    /// Written since the last flush began, and before it.
    pub(crate) unflushed: [DirtyBitmap; 2],
}

impl Bitmaps {
    /// Makes those for a mirror of `source` with `granularity` bytes a bit.
    ///
    /// # Errors
    /// As [`DirtyBitmap::new`]: the granularity is not allowed, or there is no memory for so many bits.
    pub fn new(source: &Node, granularity: u32) -> Result<Self, InvalidGranularity> {
        let fresh = || DirtyBitmap::new(source.size(), granularity);
        Ok(Self { dirty: fresh()?, unflushed: [fresh()?, fresh()?] })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::test_disk::{Ticking, node_of};
    use super::*;
    use crate::driver::null::{NullStorage, ReadsZero};

    #[test]
    fn a_disk_for_whose_bits_there_is_no_memory_is_refused() {
        let storage = NullStorage::new(u64::MAX, ReadsZero::Promised);
        let node = node_of("disk0", Arc::new(storage), &Arc::new(Ticking::default()));
        let refusal = Bitmaps::new(&node, 512).expect_err("4 PiB of bits");
        assert_eq!(refusal, InvalidGranularity::TooFine { granularity: 512, size: u64::MAX });
        assert!(refusal.to_string().contains("no memory"), "{refusal}");
    }
}
