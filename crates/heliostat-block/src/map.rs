//! [`Mapping`]: where bytes of a node are: in which layer, and where in its file.
//!
//! What `heliostat map` shows. Each driver says it of its layer; here the layers are put together.

use crate::driver::Driver;
use crate::error::BlockError;
use crate::node::Node;
use crate::range::ByteRange;
use crate::storage::{Extent, ExtentStatus};

/// The most mappings in one answer that is put together of several layers' ones.
const MAPPINGS_MAX: usize = 1024;

/// What is in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes.
    Data,
    /// Bytes that nobody has written yet: zeroes, in space that was set aside for them.
    Hollow,
    /// Bytes, compressed.
    Compressed,
    /// Zeroes, of which this layer knows.
    Zero,
    /// Nothing, in any layer: zeroes.
    Hole,
    /// Whatever a read finds, see [`ExtentStatus::Absent`].
    Absent,
}

/// Where a range of a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The range.
    pub range: ByteRange,
    /// The layer that says so: 0 is the node itself, 1 what it stands on. For a hole the lowest that was asked.
    pub depth: usize,
    /// What is there.
    pub content: Content,
    /// Where it is in the layer's file, where it has a place there. That may be so without content, too.
    pub offset: Option<u64>,
}

impl Mapping {
    /// The byte behind it in its file.
    fn offset_end(&self) -> Option<u64> {
        self.offset.map(|offset| offset + self.range.len())
    }

    /// Appends it to a list that it follows, as part of the last one where the two are one.
    pub fn append_to(self, list: &mut Vec<Self>) {
        if self.range.is_empty() {
            return;
        }
        if let Some(last) = list.last_mut()
            && last.range.end() == self.range.offset()
            && (last.depth, last.content) == (self.depth, self.content)
            && last.offset_end() == self.offset
        {
            last.range = ByteRange::from_bounds(last.range.offset(), self.range.end());
            return;
        }
        list.push(self);
    }
}

impl Node {
    /// Where the bytes of `range` are, through all layers: from its start on, as far as it answers in one go. For
    /// who looks at an image; passes no gate, and says nothing about a range that is being written.
    ///
    /// # Errors
    /// What a layer says.
    pub async fn map(&self, range: ByteRange) -> Result<Vec<Mapping>, BlockError> {
        let Some(range) = range.intersection(self.range()) else { return Ok(Vec::new()) };
        let layer = self.map_of_layer(range).await?;
        let Some(backing) = self.backing() else { return Ok(layer) };
        let mut merged = Vec::new();
        for mapping in layer {
            if mapping.content != Content::Hole {
                mapping.append_to(&mut merged);
                continue;
            }
            let end = mapping.range.end().min(backing.size());
            let mut at = mapping.range.offset();
            while at < end {
                if merged.len() >= MAPPINGS_MAX {
                    return Ok(merged);
                }
                for below in Box::pin(backing.map(ByteRange::from_bounds(at, end))).await? {
                    at = below.range.end();
                    Mapping { depth: below.depth + 1, ..below }.append_to(&mut merged);
                }
            }
            let range = ByteRange::from_bounds(at, mapping.range.end());
            let offset = mapping.offset.map(|offset| offset + (at - mapping.range.offset()));
            Mapping { range, offset, ..mapping }.append_to(&mut merged);
        }
        Ok(merged)
    }

    async fn map_of_layer(&self, range: ByteRange) -> Result<Vec<Mapping>, BlockError> {
        let raw = match self.driver() {
            Driver::Qcow2(image) => {
                return image
                    .map(range)
                    .await
                    .map_err(|error| BlockError::from_io(self.name().as_str(), Some(range), error));
            }
            Driver::Filter(filter) => return Box::pin(filter.child().map_of_layer(range)).await,
            Driver::Raw(raw) => raw,
        };
        let mut found = Vec::new();
        for Extent { range, status } in self.extents_of_layer(range).await? {
            // A hole of a file has its place in it.
            let content = match status {
                ExtentStatus::Data => Content::Data,
                ExtentStatus::Zero | ExtentStatus::Hole => Content::Zero,
                ExtentStatus::Absent => Content::Absent,
            };
            let offset = Some(raw.start() + range.offset());
            Mapping { range, depth: 0, content, offset }.append_to(&mut found);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_only_where_they_are_neighbours_in_the_file_too() {
        let mapping = |start: u64, offset: Option<u64>, content| Mapping {
            range: ByteRange::from_bounds(start, start + 8),
            depth: 0,
            content,
            offset,
        };
        let mut list = Vec::new();
        for (start, offset, content) in [
            (0, Some(100), Content::Data),
            (8, Some(108), Content::Data),
            (16, Some(200), Content::Data),
            (24, None, Content::Hole),
            (32, None, Content::Hole),
            (40, None, Content::Zero),
        ] {
            mapping(start, offset, content).append_to(&mut list);
        }
        let ranges: Vec<_> =
            list.iter().map(|mapping| (mapping.range.offset(), mapping.range.end())).collect();
        assert_eq!(ranges, [(0, 16), (16, 24), (24, 40), (40, 48)]);
    }
}
