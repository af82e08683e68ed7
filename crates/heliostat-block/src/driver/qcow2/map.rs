//! Saying where in the file each byte of the disk is: for people and programs that look at an image, not for a mirror.

use std::io;

use super::entry::Cluster;
use super::read::{Source, segments_of};
use super::state::State;
use super::{Obstacle, Qcow2};
use crate::map::{Content, Mapping};
use crate::range::ByteRange;

/// The most mappings in one answer.
const MAPPINGS_MAX: usize = 1024;

/// The most clusters that are looked at for one answer, while the lock is held.
const LOOKS_MAX: usize = 32 << 10;

impl Qcow2 {
    /// Where the bytes of `range` are in this image, as far as it answers in one go; never empty for a range that is
    /// not.
    pub(crate) async fn map(&self, range: ByteRange) -> io::Result<Vec<Mapping>> {
        let found = loop {
            let (found, obstacle) = self.lock().plan_map(range);
            if !found.is_empty() || range.is_empty() {
                break found;
            }
            if let Some(obstacle) = obstacle {
                self.overcome(obstacle).await?;
            }
        };
        if !self.is_hollow().await? {
            return Ok(found);
        }
        let mut split = Vec::new();
        for mapping in found {
            for part in self.hollow_mappings(mapping).await? {
                part.append_to(&mut split);
            }
            if split.len() >= MAPPINGS_MAX {
                break;
            }
        }
        Ok(split)
    }
}

impl State {
    /// What is known of the start of `range`, and what stands in the way of more.
    fn plan_map(&mut self, range: ByteRange) -> (Vec<Mapping>, Option<Obstacle>) {
        let mut found = Vec::new();
        let mut at = range.offset();
        for _ in 0..LOOKS_MAX {
            if at >= range.end() || found.len() >= MAPPINGS_MAX {
                break;
            }
            match self.map_some(ByteRange::from_bounds(at, range.end()), &mut found) {
                Ok(end) => at = end,
                Err(obstacle) => return (found, Some(obstacle)),
            }
        }
        (found, None)
    }

    /// Says where the first bytes of `range` are, and how far it looked.
    fn map_some(&mut self, range: ByteRange, found: &mut Vec<Mapping>) -> Result<u64, Obstacle> {
        let layout = self.layout;
        let from = range.offset();
        if self.l1_entry(from).table(layout)?.is_none() {
            let end = ((layout.l1_index(from) + 1).saturating_mul(layout.l2_coverage())).min(range.end());
            let range = ByteRange::from_bounds(from, end);
            Mapping { range, depth: 0, content: Content::Hole, offset: None }.append_to(found);
            return Ok(end);
        }
        let cluster = self.cluster(from)?;
        let end = (layout.cluster_start(from) + layout.cluster_size()).min(range.end());
        for segment in segments_of(cluster, layout, ByteRange::from_bounds(from, end)) {
            let content = match segment.source {
                Source::Host(_) => Content::Data,
                Source::Compressed(_) => Content::Compressed,
                Source::Zero => Content::Zero,
                Source::Backing => Content::Hole,
            };
            let host = match cluster {
                Cluster::Standard(standard) => standard.host,
                Cluster::Compressed(_) => None,
            };
            let offset = host.map(|host| host + layout.in_cluster(segment.range.offset()));
            Mapping { range: segment.range, depth: 0, content, offset }.append_to(found);
        }
        Ok(end)
    }
}
