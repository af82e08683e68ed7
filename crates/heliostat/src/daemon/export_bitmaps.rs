//! Bitmaps that exports offer: found, checked, and nobody else's while they are offered.
//!
//! Called where exports are added and removed, by whoever holds the right to change things.

use std::sync::Arc;

use heliostat_block::named_bitmap::{Change, change};
use heliostat_block::node::Node;

use super::bitmaps::BitmapError;
use super::exports::{Export, ExportSpec};
use super::{Daemon, DaemonError};
use crate::serve::status::{OfferedBitmap, find_in_chain};

impl Daemon {
    /// The bitmaps that an export of `top` is to offer.
    ///
    /// # Errors
    /// That one is not there, is another's, is of no use, or changes while the export says that nothing does.
    pub(super) fn bitmaps_to_offer(
        &self,
        top: &Arc<Node>,
        spec: &ExportSpec,
    ) -> Result<Vec<OfferedBitmap>, DaemonError> {
        let mut offered = Vec::new();
        for (node, name) in &spec.bitmaps {
            let (node, bitmap) = match node {
                Some(node) => {
                    let there = self.node(node).map_err(|_| BitmapError::NodeNotFound(node.clone()))?;
                    let bitmap = there.named_bitmap(name);
                    (there, bitmap.ok_or_else(|| BitmapError::NotFound(name.clone()))?)
                }
                None => find_in_chain(top, name).ok_or_else(|| BitmapError::NotInChain(name.clone()))?,
            };
            if bitmap.busy {
                return Err(BitmapError::Busy(name.clone()).into());
            }
            if bitmap.bits.is_none() {
                return Err(BitmapError::Inconsistent(name.clone()).into());
            }
            let may_change = bitmap.recording && [top, &node].iter().all(|node| !node.options().read_only);
            if may_change && !spec.writable {
                return Err(BitmapError::Changing(name.clone()).into());
            }
            offered.push(OfferedBitmap { name: name.clone(), node: Arc::downgrade(&node) });
        }
        Ok(offered)
    }
}

/// Makes the bitmaps that `export` offers its own, or anybody's again; they may have followed a mirror meanwhile.
pub(super) fn set_busy(export: &Export, busy: bool) {
    let top = export.node();
    let found = export.seat.contexts.bitmaps().filter_map(|bitmap| bitmap.find(&top));
    let changes: Vec<_> = found.map(|(node, bitmap)| (node, Change::Busy(bitmap.name, busy))).collect();
    change(&changes);
}
