//! What is between a node's writes and its medium: what is written back early, and what may have been lost on the way.
//! For mirrors.

use super::Node;
use crate::range::ByteRange;

impl Node {
    /// How often something that was written may have been lost; see [`crate::storage::Storage::losses`].
    pub(crate) fn losses(&self) -> u64 {
        self.blocks.below().losses()
    }

    /// Starts writing `range` back and drops it from the host's cache; see
    /// [`crate::storage::Storage::start_writeback`].
    pub(crate) fn start_writeback(&self, range: ByteRange) {
        self.blocks.below().start_writeback(range);
    }
}
