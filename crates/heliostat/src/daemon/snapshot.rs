//! Snapshots: a new overlay takes a node's place under its exports, and stands on it from then on.
//!
//! Everything that can take long (making the file, opening it, flushing) comes before the gate closes. While it is
//! closed, the node is flushed once more, so that what was acknowledged to clients is durable in the layer that they
//! leave: from then on they flush the overlay only. Called by operators.

use std::path::PathBuf;
use std::sync::Arc;

use heliostat_block::error::BlockError;
use heliostat_block::graph::Role;
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_host::runtime;

use super::conflict::conflict;
use super::drive_mirror::{Made, New, check_creatable, file_spec, image_of, layer};
use super::gate::CHAIN_MAX;
use super::nodes::Named;
use super::{Beneath, Daemon, DaemonError, Export, NodeEntry, TargetMode};

/// A snapshot that makes, or opens, its overlay.
#[derive(Clone, Debug)]
pub struct SnapshotSpec {
    /// The export of the node; `None` where the node is named.
    pub device: Option<String>,
    /// The node.
    pub node_name: Option<String>,
    /// The overlay's file.
    pub file: PathBuf,
    /// The overlay's node; needed where the node is named.
    pub overlay_name: Option<String>,
    /// The overlay's format.
    pub format: String,
    /// Whether it is made.
    pub mode: TargetMode,
}

impl Daemon {
    /// Puts the node `overlay` in the place of `node`, on top of it.
    ///
    /// # Errors
    /// `NodeNotFound`; `NodeBusy`, `NodeIsBacking`, `NodeIsChild` by who uses `node`; `Snapshot` by what is wrong with
    /// the overlay; `PermissionConflict`; `Unflushed`. Nothing has changed then.
    pub fn snapshot(&self, node: &str, overlay: &str) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        let node = self.node(node)?;
        let overlay = self.node(overlay)?;
        self.check_source_of_snapshot(&node)?;
        self.check_overlay(&node, &overlay)?;
        self.stack(&node, &overlay, Named::ByOperator)
    }

    /// Makes or opens an overlay, and puts it in the place of a node, on top of it.
    ///
    /// # Errors
    /// As [`Daemon::snapshot`]; `NoDeviceNorNode`, `Create`, `Open`.
    pub fn snapshot_to_file(&self, spec: &SnapshotSpec) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        let node = self.node_of_snapshot(spec)?;
        if spec.node_name.is_some() && spec.overlay_name.is_none() {
            return Err(DaemonError::Snapshot("New overlay node-name missing".to_owned()));
        }
        if spec.overlay_name.as_ref().is_some_and(|name| self.graph.node(name).is_ok()) {
            return Err(DaemonError::Snapshot("New overlay node-name already in use".to_owned()));
        }
        self.check_source_of_snapshot(&node)?;
        let entries = self.nodes();
        let entry = entries.iter().find(|entry| Arc::ptr_eq(&entry.node, &node));
        let entry = entry.ok_or_else(|| DaemonError::NodeNotFound(node.name().to_string()))?;
        let there = self.make_overlay_file(spec, entry)?;
        let named = match spec.mode {
            TargetMode::AbsolutePaths => Named::ByImage,
            TargetMode::Existing => Named::ByOperator,
        };
        let wanted = there.layer.wanted();
        let made = match spec.mode {
            TargetMode::AbsolutePaths => Made::new(&there, entry)?,
            TargetMode::Existing => Made::nothing(),
        };
        let below = file_spec(&spec.file, entry);
        let stacked = self.make_target(&below, spec.overlay_name.clone(), wanted).and_then(|overlay| {
            self.check_overlay(&node, &overlay)?;
            self.stack(&node, &overlay, named)
        });
        if stacked.is_ok() {
            made.keep();
        }
        // Without an export nobody uses the overlay; it goes, and the file stays, as in QEMU.
        self.drop_orphans();
        stacked
    }

    fn node_of_snapshot(&self, spec: &SnapshotSpec) -> Result<Arc<Node>, DaemonError> {
        let by_export = spec
            .device
            .as_ref()
            .and_then(|device| self.exports().iter().find(|export| &export.id == device).map(Export::node));
        let by_name = spec.node_name.as_ref().and_then(|name| self.graph.node(name).ok());
        by_export.or(by_name).ok_or_else(|| DaemonError::NoDeviceNorNode {
            device: spec.device.clone().unwrap_or_default(),
            node: spec.node_name.clone().unwrap_or_default(),
        })
    }

    /// Checks what can be known of the overlay before anything is made.
    fn make_overlay_file(&self, spec: &SnapshotSpec, node: &NodeEntry) -> Result<New, DaemonError> {
        let Some(layer) = layer(&spec.format) else {
            return Err(match spec.mode {
                TargetMode::AbsolutePaths => {
                    DaemonError::Create(format!("Unknown file format '{}'", spec.format))
                }
                TargetMode::Existing => DaemonError::UnknownDriver(spec.format.clone()),
            });
        };
        let mut new = New { path: spec.file.clone(), layer, beneath: Beneath::Source, image: None };
        if spec.mode == TargetMode::Existing {
            return Ok(new);
        }
        if !layer.is_image() {
            let text = format!("Backing file not supported for file format '{}'", spec.format);
            return Err(DaemonError::Create(text));
        }
        let is_same = std::fs::canonicalize(&spec.file)
            .is_ok_and(|file| std::fs::canonicalize(&node.path).is_ok_and(|path| path == file));
        if is_same {
            let text = "Error: Trying to create an image with the same filename as the backing file";
            return Err(DaemonError::Create(text.to_owned()));
        }
        new.image = Some(image_of(node, Some(node))?);
        check_creatable(&spec.file, node, &self.files_in_use())?;
        if let Some(name) = &spec.overlay_name {
            NodeName::new(name)?;
        }
        Ok(new)
    }

    fn check_source_of_snapshot(&self, node: &Arc<Node>) -> Result<(), DaemonError> {
        for role in self.graph.roles(node) {
            let name = node.name().clone();
            match role {
                Role::MirrorSource { .. } | Role::MirrorTarget { .. } => {
                    return Err(DaemonError::NodeBusy(name));
                }
                Role::Backing { of } => return Err(DaemonError::NodeIsBacking { node: name, of }),
                // What is above would go on past the overlay.
                Role::Child { .. } => return Err(DaemonError::NodeIsChild(name)),
                Role::Export { .. } => {}
            }
        }
        Ok(())
    }

    fn check_overlay(&self, node: &Arc<Node>, overlay: &Arc<Node>) -> Result<(), DaemonError> {
        let refused = |text: String| Err(DaemonError::Snapshot(text));
        let roles = self.graph.roles(overlay);
        let target = roles.iter().find(|role| matches!(role, Role::MirrorTarget { .. }));
        if let Some(role) = target
            && !self.graph.roles(node).is_empty()
        {
            return Err(conflict(overlay.name().clone(), role, true));
        }
        // A mirror only writes its target: nobody sees yet what that reads as, so it may be given what it stands on.
        if !roles.is_empty() && target.is_none() {
            return refused("The overlay is already in use".to_owned());
        }
        if Arc::ptr_eq(node, overlay) {
            let name = node.name();
            return refused(format!("Making '{name}' a backing child of '{name}' would create a cycle"));
        }
        if overlay.image().is_none() {
            return refused("The overlay does not support backing images".to_owned());
        }
        if overlay.backing().is_some() {
            return refused("The overlay already has a backing image".to_owned());
        }
        if target.is_some() && !overlay.lacks_backing() {
            // What it does not hold has been taken for zeroes.
            let text =
                "The mirror's target names no backing file in its header, so it cannot be given one now";
            return refused(text.to_owned());
        }
        let images = std::iter::successors(Some(Arc::clone(node)), |layer| layer.backing()).count();
        if images >= CHAIN_MAX {
            return refused(format!("{images} images stand on each other already, which is the most"));
        }
        let has_writers =
            self.graph.roles(node).iter().any(|role| matches!(role, Role::Export { writable: true, .. }));
        if has_writers && overlay.options().read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        if overlay.size() < node.size() {
            return refused(format!(
                "The overlay has {} bytes, and clients know of {}: it must not be smaller",
                overlay.size(),
                node.size()
            ));
        }
        Ok(())
    }

    /// The node, and those through which its bytes go.
    fn layers(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let entries = self.nodes();
        let entry = |name: &NodeName| entries.iter().find(|entry| entry.node.name() == name);
        let lower = |above: &&NodeEntry| entry(above.child.as_ref()?);
        std::iter::successors(entry(node.name()), lower).map(|entry| Arc::clone(&entry.node)).collect()
    }

    /// Does it, at a moment at which nothing is in flight.
    fn stack(&self, node: &Arc<Node>, overlay: &Arc<Node>, named: Named) -> Result<(), DaemonError> {
        let unflushed = |error: BlockError| DaemonError::Unflushed(error);
        let work = async {
            if !node.options().read_only {
                // The long one, beside clients.
                node.enter().await.flush().await.map_err(unflushed)?;
            }
            let drained = node.drain().await;
            // What a mirror is writing to it ends with what it began with.
            let _overlay = overlay.drain().await;
            if !node.options().read_only {
                drained.flush().await.map_err(unflushed)?;
            }
            self.put_on_top(&drained, overlay, node, named)
                .map_err(|_| DaemonError::NodeInUse(node.name().clone()))?;
            // Nobody writes it, nor what holds it and nothing else, from here on.
            let layers = self.layers(node);
            let alone = layers
                .iter()
                .enumerate()
                .take_while(|(depth, layer)| *depth == 0 || self.graph.roles(layer).len() <= 1);
            for (_, layer) in alone {
                layer.set_options(NodeOptions { read_only: true, ..layer.options() });
            }
            Ok(())
        };
        runtime::block_on(work).map_err(DaemonError::Engine)?
    }
}
