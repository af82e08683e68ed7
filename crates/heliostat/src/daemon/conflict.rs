//! What is said where one use of a node leaves no room for another: QEMU's sentences, which speak of permissions, from
//! our roles.
//!
//! Decides nothing; who may use what beside whom is the graph's to say. Called where a user is refused.

use heliostat_block::graph::{Claims, Role};
use heliostat_block::name::NodeName;

use super::DaemonError;

/// QEMU's words for a use that another use leaves no room for.
pub(super) fn conflict(node: NodeName, present: &Role, writes: bool) -> DaemonError {
    let unnamed = format!("an unnamed block device (uses node '{node}' as 'root' child)");
    let (user, user_writes) = match present {
        Role::Backing { of } => return DaemonError::NodeIsBacking { node, of: of.clone() },
        Role::Child { of, claims } => {
            if let Some(refused) = claimed(&node, of, *claims).filter(|_| !writes) {
                return refused;
            }
            (format!("node '{of}' (uses node '{node}' as 'file' child)"), true)
        }
        Role::Export { writable, .. } => (unnamed.clone(), *writable),
        Role::MirrorSource { .. } | Role::MirrorTarget { .. } => (unnamed.clone(), writes),
    };
    let permissions = if user_writes { "consistent read, write" } else { "consistent read" };
    DaemonError::PermissionConflict { node, permissions, user, other: unnamed }
}

/// QEMU's words where a fault injector asks for what leaves no room for readers of `node`.
pub(super) fn claimed(node: &NodeName, of: &NodeName, claims: Claims) -> Option<DaemonError> {
    let reader = format!("an unnamed block device (uses node '{node}' as 'root' child)");
    let injector = format!("node '{of}' (uses node '{node}' as 'image' child)");
    let (permissions, user, other) = match claims {
        Claims { reads_alone: true, .. } => ("consistent read", reader, injector),
        Claims { resizes: true, .. } => ("resize", injector, reader),
        Claims { reads_alone: false, resizes: false } => return None,
    };
    Some(DaemonError::PermissionConflict { node: node.clone(), permissions, user, other })
}
