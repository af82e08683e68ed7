//! Making a node longer or shorter while it is in use.
//!
//! Refused where somebody relies on the size: a mirror, an overlay, a node above, and, unless it becomes longer, an
//! export: its clients are told the size when they connect, and what they know of is not taken from them. QEMU refuses
//! an exported node in any case; to grow a disk there means to cut its guest off.

use std::sync::Arc;

use heliostat_block::driver::Preallocation;
use heliostat_block::error::{BlockError, ErrorKind};
use heliostat_block::graph::Role;
use heliostat_block::node::Node;
use heliostat_host::runtime;

use super::{Daemon, DaemonError, NodeEntry};

/// The largest disk that QEMU takes; its refusal names the number.
const SIZE_MAX: u64 = 9_223_372_035_781_033_984;

impl Daemon {
    /// Makes the node `name` `size` bytes long. Requests wait meanwhile, and so do other changes.
    ///
    /// # Errors
    /// `NoDeviceNorNode`, `ResizeSize`, `NodeBusy`, `NodeIsBacking`, `PermissionConflict`, `ResizeTooLarge`,
    /// `ResizeFixed`, `ResizeReadOnly`, `ResizeUnsupported`; `Resize` when the image or the host refuses. The size is
    /// as it was then.
    pub fn resize_node(
        &self,
        name: &str,
        size: i64,
        preallocation: Preallocation,
    ) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        let nodes = self.nodes();
        let entry = nodes.iter().find(|entry| entry.node.name().as_str() == name);
        let entry = entry
            .ok_or_else(|| DaemonError::NoDeviceNorNode { device: String::new(), node: name.to_owned() })?;
        let size = u64::try_from(size).map_err(|_| DaemonError::ResizeSize)?;
        self.check_resizable(&entry.node, size)?;
        if size > SIZE_MAX {
            return Err(DaemonError::ResizeTooLarge(size));
        }
        let below = lower(&nodes, entry);
        if entry.node.image().is_none() && size <= entry.node.size() {
            let exported = below.clone().find(|lower| self.is_exported(&lower.node));
            if let Some(lower) = exported {
                let user = format!("node '{name}' (uses node '{}' as 'file' child)", lower.node.name());
                return Err(conflict(&lower.node, user, root(&lower.node)));
            }
        }
        if entry.node.image().is_none() && std::iter::once(entry).chain(below.clone()).any(|it| it.is_fixed) {
            return Err(DaemonError::ResizeFixed);
        }
        if entry.node.options().read_only {
            return Err(DaemonError::ResizeReadOnly);
        }
        if entry.nbd.is_some() {
            // A smaller size QEMU takes, and goes on as before.
            let grows = size > entry.node.size();
            return if grows { Err(DaemonError::Nbd("Cannot grow NBD nodes".to_owned())) } else { Ok(()) };
        }
        let work = async {
            entry.node.resize(size, preallocation).await?;
            // They show the same file. An image's file grows by itself, and nobody looks at it but the image.
            for lower in below.filter(|_| entry.node.image().is_none()) {
                lower.node.follow_size().await;
            }
            Ok(())
        };
        runtime::block_on(work).map_err(DaemonError::Engine)?.map_err(refusal)
    }

    /// Refuses where a user of the node relies on its size, or on that it is not less than it is.
    fn check_resizable(&self, node: &Arc<Node>, size: u64) -> Result<(), DaemonError> {
        let roles = self.graph.roles(node);
        let name = || node.name().clone();
        for role in &roles {
            match role {
                Role::MirrorSource { .. } | Role::MirrorTarget { .. } => {
                    return Err(DaemonError::NodeBusy(name()));
                }
                Role::Backing { of } => {
                    return Err(DaemonError::NodeIsBacking { node: name(), of: of.clone() });
                }
                Role::Child { .. } | Role::Export { .. } => {}
            }
        }
        let is_below = roles.iter().any(|role| matches!(role, Role::Child { .. }));
        // QEMU names the user that came last.
        match roles.last() {
            Some(Role::Child { of, .. }) => {
                let above = format!("node '{of}' (uses node '{}' as 'file' child)", node.name());
                return Err(conflict(node, root(node), above));
            }
            Some(_) if is_below => return Err(conflict(node, root(node), root(node))),
            _ => {}
        }
        if size <= node.size() && self.is_exported(node) {
            return Err(conflict(node, root(node), root(node)));
        }
        Ok(())
    }

    fn is_exported(&self, node: &Arc<Node>) -> bool {
        self.graph.roles(node).iter().any(|role| matches!(role, Role::Export { .. }))
    }
}

/// QEMU's words for whoever uses a node and has no name: its command, an export.
fn root(node: &Node) -> String {
    format!("an unnamed block device (uses node '{}' as 'root' child)", node.name())
}

/// QEMU's words where `other` has not agreed.
fn conflict(node: &Node, user: String, other: String) -> DaemonError {
    DaemonError::PermissionConflict { user, other, permissions: "resize", node: node.name().clone() }
}

/// The nodes through which the bytes of `entry` go.
fn lower<'a>(nodes: &'a [NodeEntry], entry: &'a NodeEntry) -> impl Iterator<Item = &'a NodeEntry> + Clone {
    let below = |entry: &&'a NodeEntry| {
        let child = entry.child.as_ref()?;
        nodes.iter().find(|other| other.node.name() == child)
    };
    std::iter::successors(below(&entry), below)
}

fn refusal(error: BlockError) -> DaemonError {
    match error.kind() {
        ErrorKind::ReadOnly => DaemonError::ResizeReadOnly,
        ErrorKind::Unsupported => DaemonError::ResizeUnsupported,
        _ => DaemonError::Resize(error),
    }
}
