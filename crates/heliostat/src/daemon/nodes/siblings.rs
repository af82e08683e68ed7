//! Who stands on the same node: whether two see the same bytes, and whether a bitmap hears of what they write.
//!
//! Only looks; refuses, and changes nothing. Called where a node is put on another, becomes writable, or gets a bitmap.

use std::sync::Arc;

use heliostat_block::graph::Role;
use heliostat_block::name::NodeName;
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;

use super::super::{Daemon, DaemonError};
use super::{Below, Nodes, Record};

impl Daemon {
    /// Whether a node other than `of` sees bytes of `child` in its part `shown`, and one of the two may be written.
    pub(super) fn overlaps_sibling(
        &self,
        child: &Arc<Node>,
        of: &NodeName,
        shown: ByteRange,
        read_only: bool,
    ) -> bool {
        let nodes = self.lock_nodes();
        nodes.list.iter().filter(|other| other.node().name() != of).any(|other| {
            (!read_only || nodes.is_written(other))
                && other.children().any(|(at, seen)| Arc::ptr_eq(&at, child) && seen.overlaps(shown))
        })
    }

    /// Checks that `name` may be written: nobody else sees what it does, no bitmap misses it, and no node that an
    /// operator holds to reading is written past.
    pub(in crate::daemon) fn check_alone(&self, name: &NodeName) -> Result<(), DaemonError> {
        if self.is_held_to_reading(name) {
            return Err(DaemonError::OpenedReadOnly(name.clone()));
        }
        let children: Vec<_> =
            self.lock_nodes().find(name.as_str()).into_iter().flat_map(Record::children).collect();
        if let Ok(above) = self.below(name.as_str())
            && above.entry.filter.is_none()
        {
            let by_image = above.entry.node.image().is_some();
            for (child, _) in &children {
                let below = self.below(child.name().as_str())?;
                self.check_heard(&below, by_image, false)?;
                // It is written past, so what is below that is written to as well.
                if below.is_passed_by(by_image) && child.options().read_only {
                    self.check_alone(child.name())?;
                }
            }
        }
        match children.iter().find(|(child, seen)| self.overlaps_sibling(child, name, *seen, false)) {
            Some((child, _)) => Err(DaemonError::NodeInUse(child.name().clone())),
            None => Ok(()),
        }
    }

    /// Whether anything that stands on the node `name` may write its bytes, through it or past it.
    pub(in crate::daemon) fn is_written(&self, name: &NodeName) -> bool {
        let nodes = self.lock_nodes();
        nodes.find(name.as_str()).is_some_and(|record| nodes.is_written(record))
    }

    /// Says whether `name` is a window of a node that an operator made and that is only read. What was made for the
    /// window follows it.
    fn is_held_to_reading(&self, name: &NodeName) -> bool {
        let nodes = self.lock_nodes();
        let raw = nodes.find(name.as_str()).filter(|record| record.below.entry.driver == "raw");
        let child = raw.and_then(|record| nodes.find(record.below.entry.child.as_ref()?.as_str()));
        child.is_some_and(|child| child.is_owned && child.node().options().read_only)
    }

    /// Checks that no bitmap on `below` would miss what is written to its storage from above.
    pub(super) fn check_heard(
        &self,
        below: &Below,
        by_image: bool,
        read_only: bool,
    ) -> Result<(), DaemonError> {
        let is_heard =
            read_only || !below.is_passed_by(by_image) || below.entry.node.named_bitmaps().is_empty();
        if is_heard { Ok(()) } else { Err(DaemonError::NodeInUse(below.entry.node.name().clone())) }
    }

    /// Checks that a bitmap on `node` would hear of what is written to its storage from above.
    pub(in crate::daemon) fn check_hears(&self, node: &Arc<Node>) -> Result<(), DaemonError> {
        let nodes = self.lock_nodes();
        let Some(record) = nodes.find(node.name().as_str()) else { return Ok(()) };
        let passes_by = |other: &Record| {
            let by_image = other.node().image().is_some();
            other.below.entry.filter.is_none()
                && record.below.is_passed_by(by_image)
                && other.children().any(|(child, _)| Arc::ptr_eq(&child, node))
        };
        if nodes.list.iter().any(passes_by) {
            return Err(DaemonError::NodeInUse(node.name().clone()));
        }
        Ok(())
    }

    /// Whether a node that is still being made stands on `child`: an image, which may use it once only.
    pub(super) fn has_unlisted_user(&self, child: &Arc<Node>) -> bool {
        let nodes = self.lock_nodes();
        self.graph.roles(child).iter().any(|role| match role {
            Role::Child { of, .. } => nodes.find(of.as_str()).is_none(),
            _ => false,
        })
    }
}

impl Nodes {
    /// Whether anything that stands on `record` may write its bytes: through it, or past it.
    fn is_written(&self, record: &Record) -> bool {
        !record.node().options().read_only
            || self.list.iter().any(|above| {
                above.below.entry.filter.is_none()
                    && record.below.is_passed_by(above.node().image().is_some())
                    && above.children().any(|(child, _)| Arc::ptr_eq(&child, record.node()))
                    && self.is_written(above)
            })
    }
}
