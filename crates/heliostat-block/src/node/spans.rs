//! Bytes that pass a node without being read or looked at: see [`Span`].

use super::{DetectZeroes, Node};
use crate::convert::u64_from;
use crate::error::BlockError;
use crate::range::ByteRange;
use crate::span::Span;

impl Node {
    /// Where `range` can be sent from without being read. See [`crate::storage::Storage::span`].
    pub(crate) fn span(&self, range: ByteRange) -> Option<Span> {
        let range = self.inside(range.offset(), range.len()).ok()?;
        self.driver().span(range)
    }

    /// Whether [`Node::write_span`] may be called for `range`: nothing has to look at what is written there.
    pub(crate) fn takes_span(&self, range: ByteRange) -> bool {
        self.traits.block_size == 1
            && self.options().detect_zeroes == DetectZeroes::Off
            && self.driver().takes_span(range)
    }

    /// As [`Node::write`] of what lies in `span`; never doubled. See [`crate::storage::Storage::write_span`].
    pub(crate) async fn write_span(&self, offset: u64, span: Span) -> Result<(), BlockError> {
        let range = self.writable(offset, u64_from(span.len()))?;
        self.mark_early(range);
        let written = self.driver().write_span(offset, span).await;
        self.mark(range, None, written.is_ok()).await;
        written.map_err(|error| self.failure(range, error))
    }
}
