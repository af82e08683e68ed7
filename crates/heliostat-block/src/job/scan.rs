//! The first pass looks at the source, and at the target, and marks what has to be copied.
//!
//! It only sets dirty bits: what is written later is decided by the copy, from what it sees after it has
//! cleared them (MIRROR.md section 3). One piece at a time, each bounded, so that it never holds anybody up.
//! Called by `mirror`.

use super::copy::Route;
use crate::error::BlockError;
use crate::planted;
use crate::range::ByteRange;
use crate::storage::ExtentStatus;

/// What the first pass copies (MIRROR.md section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// Everything.
    Full,
    /// What the active layer holds; everything, where there is no backing.
    Top,
    /// Nothing; only what is written from now on.
    None,
    /// What a named bitmap of the source has. The target holds the rest already.
    Bitmap,
}

impl SyncMode {
    /// Whether the source is looked at for what there is to copy.
    pub(crate) const fn scans(self) -> bool {
        matches!(self, Self::Full | Self::Top)
    }
}

/// What is believed of the target before anything was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Belief {
    /// It may hold anything.
    Nothing,
    /// What it says reads as zero, does.
    WhatItSays,
    /// All of it reads as zero.
    AllZero,
}

/// A piece of the source that has been looked at.
#[derive(Debug)]
pub(crate) struct Scanned {
    /// What was looked at; the next piece starts at its end.
    pub(crate) range: ByteRange,
    /// What has to be copied.
    pub(crate) dirty: Vec<ByteRange>,
}

/// Looks at the source from `from` on, as far as it answers in one go.
///
/// # Errors
/// What the source says. A target that cannot say how it is laid out is copied to in full.
pub(crate) async fn scan(route: &Route, from: u64, belief: Belief) -> Result<Scanned, BlockError> {
    let source = &route.source;
    let rest = ByteRange::from_bounds(from, source.size());
    // What the active layer does not hold the target has from its own chain.
    let is_top = route.sync == SyncMode::Top && source.backing().is_some();
    let extents = if is_top {
        route.patience.lend(source.extents_of_layer(rest)).await?
    } else {
        route.patience.lend(source.extents_below(rest)).await?
    };
    planted::remember_holes(&extents);
    let mut dirty = Vec::new();
    let mut end = from;
    for extent in extents {
        end = extent.range.end();
        match (extent.status, belief) {
            (ExtentStatus::Hole, _) if is_top => {}
            (ExtentStatus::Data | ExtentStatus::Absent, _) | (_, Belief::Nothing) => dirty.push(extent.range),
            (ExtentStatus::Zero | ExtentStatus::Hole, Belief::AllZero) => {}
            (ExtentStatus::Zero | ExtentStatus::Hole, Belief::WhatItSays) => {
                end = not_zero(route, extent.range, &mut dirty).await;
                if end < extent.range.end() {
                    break;
                }
            }
        }
    }
    if end == from {
        // A source that says nothing has to be read.
        dirty.push(rest);
        end = rest.end();
    }
    Ok(Scanned { range: ByteRange::from_bounds(from, end), dirty })
}

/// Adds the parts of `range` that are not known to read as zero on the target, as far as that answers in one go;
/// says how far.
async fn not_zero(route: &Route, range: ByteRange, dirty: &mut Vec<ByteRange>) -> u64 {
    let lacked = route.lacks_backing();
    let asked = route.at_target.carry_out(route.target.extents_below(range));
    let extents = asked.await.unwrap_or_default();
    let end = extents.last().map_or(range.offset(), |last| last.range.end());
    if end == range.offset() {
        dirty.push(range);
        return range.end();
    }
    dirty
        .extend(extents.iter().filter(|extent| !route.reads_zero(extent, lacked)).map(|extent| extent.range));
    end
}
