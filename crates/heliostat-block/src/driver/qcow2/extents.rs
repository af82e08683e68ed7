//! Saying how the disk is laid out, in this image alone: what is below it is the node's to ask.

use super::read::{Segment, Source};
use super::state::State;
use super::{Obstacle, Qcow2, hollow};
use crate::range::ByteRange;
use crate::storage::{Extent, ExtentStatus, IoFuture};

/// The most extents in one answer.
const EXTENTS_MAX: usize = 1024;

/// The most clusters that are looked at for one answer, while the lock is held.
pub(super) const LOOKS_MAX: usize = 32 << 10;

impl Qcow2 {
    pub(crate) fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        if self.hollow.get() != Some(&false) {
            return IoFuture::pending(async move {
                if self.is_hollow().await? {
                    self.extents_with_holes(range).await
                } else {
                    self.extents(range).await
                }
            });
        }
        let (found, obstacle) = self.lock().plan_extents(range);
        if !found.is_empty() || range.is_empty() {
            return IoFuture::ready(Ok(found));
        }
        IoFuture::pending(async move {
            let mut obstacle = obstacle;
            loop {
                if let Some(obstacle) = obstacle {
                    self.overcome(obstacle).await?;
                }
                let (found, next) = self.lock().plan_extents(range);
                if !found.is_empty() {
                    return Ok(found);
                }
                obstacle = next;
            }
        })
    }

    /// Starts writing back the data of `range`.
    pub(crate) fn start_writeback(&self, range: ByteRange) {
        let Ok(segments) = self.lock().plan_read(range) else { return };
        for Segment { range, source } in segments {
            if let Source::Host(host) = source {
                let host = ByteRange::from_bounds(host, host + range.len());
                let inside = ByteRange::from_bounds(host.offset(), host.end().min(self.data().size()));
                self.data().storage().start_writeback(inside);
            }
        }
    }
}

impl State {
    /// What is known of the start of `range`, and what stands in the way of more.
    fn plan_extents(&mut self, range: ByteRange) -> (Vec<Extent>, Option<Obstacle>) {
        let mut segments = Vec::new();
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.offset();
        for _ in 0..LOOKS_MAX {
            if at >= range.end() || extents.len() >= EXTENTS_MAX {
                break;
            }
            match self.look(ByteRange::from_bounds(at, range.end()), &mut segments) {
                Ok(end) => at = end,
                Err(obstacle) => return (extents, Some(obstacle)),
            }
            for segment in segments.drain(..) {
                append(&mut extents, segment);
            }
        }
        (extents, None)
    }
}

fn append(extents: &mut Vec<Extent>, segment: Segment) {
    let status = match segment.source {
        Source::Host(_) | Source::Compressed(_) => ExtentStatus::Data,
        Source::Zero => ExtentStatus::Zero,
        Source::Backing => ExtentStatus::Hole,
    };
    hollow::append(extents, Extent { range: segment.range, status });
}
