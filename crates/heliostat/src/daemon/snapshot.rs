//! Snapshots: new overlays take nodes' places under their exports, and stand on them from then on: of several disks at
//! one moment.
//!
//! What is asked is planned first, each as what those before it would leave; so all is refused or nothing is. Everything
//! that can take long (making files, opening them, flushing) comes before the gates close. While they are closed, the
//! nodes are flushed once more, so that what was acknowledged to clients is durable in the layers that they leave: from
//! then on they flush the overlays only. Called by `transaction`, of which a command for one snapshot is one.

mod moment;

use std::path::PathBuf;
use std::sync::Arc;

use heliostat_block::graph::Role;
use heliostat_block::name::NodeName;
use heliostat_block::node::Node;

use super::conflict::conflict;
use super::drive_mirror::file_spec;
use super::gate::CHAIN_MAX;
use super::new_file::Made;
use super::nodes::Named;
use super::overlay_file::{check_room, check_unopened, is_same_file, locked, overlay_file};
use super::{Action, CompletionMode, Daemon, DaemonError, DriverSpec, Export, TargetMode};

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

/// What planning does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// It looks, and makes no file.
    Check,
    /// It makes what is needed.
    Make,
}

/// Snapshots that are to be taken at one moment, in their order. Dropped, what was made for them goes.
#[derive(Default)]
pub(super) struct Snapshots {
    list: Vec<Planned>,
    /// Files that were made.
    made: Vec<Made>,
    /// Names of nodes that there will be.
    promised: Vec<String>,
    /// Names that mirrors of the same transaction keep free.
    kept_free: Vec<String>,
    /// Files that are made, or will be.
    files: Vec<PathBuf>,
}

struct Planned {
    node: Arc<Node>,
    /// The overlay's.
    name: NodeName,
    /// `None` where it is only looked whether it could be made.
    overlay: Option<Arc<Node>>,
    named: Named,
}

impl Daemon {
    /// Puts the node `overlay` in the place of `node`, on top of it.
    ///
    /// # Errors
    /// `NodeNotFound`; `NodeBusy`, `NodeIsBacking`, `NodeIsChild` by who uses `node`; `Snapshot` by what is wrong with
    /// the overlay; `PermissionConflict`; `Unflushed`, `UnendedFlush`, `Undrained`. Nothing has changed then.
    pub fn snapshot(&self, node: &str, overlay: &str) -> Result<(), DaemonError> {
        self.transaction(
            &[Action::Snapshot { node: node.to_owned(), overlay: overlay.to_owned() }],
            CompletionMode::Individual,
        )
    }

    /// Makes or opens an overlay, and puts it in the place of a node, on top of it.
    ///
    /// # Errors
    /// As [`Daemon::snapshot`]; `NoDeviceNorNode`, `Create`, `Open`. With `Unflushed`, `UnendedFlush` and `Undrained`, which
    /// only show when the overlay is there, what was on a block device that it was made on is lost. A file is as it was.
    pub fn snapshot_to_file(&self, spec: &SnapshotSpec) -> Result<(), DaemonError> {
        self.transaction(&[Action::SnapshotToFile(spec.clone())], CompletionMode::Individual)
    }
}

impl Snapshots {
    pub(super) const fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The files that were made: gone when that is dropped.
    pub(super) fn take_made(&mut self) -> Vec<Made> {
        std::mem::take(&mut self.made)
    }

    /// Says whether a node of that name will be there, and is not yet.
    pub(super) fn promises(&self, name: &str) -> bool {
        self.promised.iter().any(|promised| promised == name)
    }

    /// Takes note of a name that no node is to have from then on.
    ///
    /// # Errors
    /// `NodeExists`.
    pub(super) fn keep_free(&mut self, name: Option<&str>) -> Result<(), DaemonError> {
        let Some(name) = name else { return Ok(()) };
        if self.promises(name) || self.is_kept_free(name) {
            return Err(DaemonError::NodeExists(name.to_owned()));
        }
        self.kept_free.push(name.to_owned());
        Ok(())
    }

    fn is_kept_free(&self, name: &str) -> bool {
        self.kept_free.iter().any(|kept| kept == name)
    }

    /// The name of the node that `device`, a node's name or an export's id, would mean.
    pub(super) fn meant(&self, daemon: &Daemon, device: &str) -> String {
        let exports = daemon.exports();
        match exports.iter().find(|export| export.id == device) {
            Some(export) if daemon.node(device).is_err() => self.top(&export.node()).to_string(),
            _ => device.to_owned(),
        }
    }

    /// The name of the node at which the exports of `node` would be.
    fn top(&self, node: &Arc<Node>) -> NodeName {
        let mut top = node.name();
        while let Some(above) = self.list.iter().find(|planned| planned.node.name() == top) {
            top = &above.name;
        }
        top.clone()
    }

    /// Says whether `node` would have another on top of it.
    pub(super) fn is_left(&self, node: &Arc<Node>) -> bool {
        self.list.iter().any(|planned| Arc::ptr_eq(&planned.node, node))
    }

    /// Refuses a mirror's target that takes part.
    pub(super) fn check_target(&self, daemon: &Daemon, target: &Arc<Node>) -> Result<(), DaemonError> {
        if !self.is_left(target) && self.below(target).is_none() {
            return Ok(());
        }
        let name = target.name().clone();
        Err(match self.roles(daemon, target).first() {
            Some(role) => conflict(name, role, false),
            None => DaemonError::NodeInUse(name),
        })
    }

    /// What a planned overlay would stand on.
    fn below(&self, overlay: &Arc<Node>) -> Option<&Arc<Node>> {
        self.list.iter().find(|planned| planned.name == *overlay.name()).map(|planned| &planned.node)
    }

    /// Who would use `node`.
    fn roles(&self, daemon: &Daemon, node: &Arc<Node>) -> Vec<Role> {
        let moves = |role: &Role| matches!(role, Role::Export { .. });
        let mut roles = daemon.graph.roles(node);
        let mut lower = self.below(node);
        while let Some(node) = lower {
            roles.extend(daemon.graph.roles(node).into_iter().filter(moves));
            lower = self.below(node);
        }
        if let Some(planned) = self.list.iter().find(|planned| Arc::ptr_eq(&planned.node, node)) {
            roles.retain(|role| !moves(role));
            roles.push(Role::Backing { of: planned.name.clone() });
        }
        roles
    }

    /// The node and what it would stand on.
    fn chain(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let lower = |layer: &Arc<Node>| self.below(layer).cloned().or_else(|| layer.backing());
        std::iter::successors(Some(Arc::clone(node)), lower).collect()
    }

    /// Plans a snapshot onto a node that is there.
    ///
    /// # Errors
    /// As [`Daemon::snapshot`].
    pub(super) fn add(&mut self, daemon: &Daemon, node: &str, overlay: &str) -> Result<(), DaemonError> {
        let node = daemon.node(node)?;
        self.check_node(daemon, &node)?;
        let overlay = daemon.node(overlay)?;
        self.check_overlay(daemon, &node, &overlay)?;
        self.plan(node, overlay, Named::ByOperator);
        Ok(())
    }

    /// Plans a snapshot whose overlay is made or opened.
    ///
    /// # Errors
    /// As [`Daemon::snapshot_to_file`].
    pub(super) fn add_file(
        &mut self,
        daemon: &Daemon,
        spec: &SnapshotSpec,
        pass: Pass,
    ) -> Result<(), DaemonError> {
        let node = self.node_of(daemon, spec)?;
        if spec.node_name.is_some() && spec.overlay_name.is_none() {
            return Err(DaemonError::Snapshot("New overlay node-name missing".to_owned()));
        }
        let is_taken =
            |name: &String| daemon.is_taken(name) || self.promises(name) || self.is_kept_free(name);
        if spec.overlay_name.as_ref().is_some_and(is_taken) {
            return Err(DaemonError::Snapshot("New overlay node-name already in use".to_owned()));
        }
        self.check_node(daemon, &node)?;
        self.check_depth(&node)?;
        let entries = daemon.nodes();
        let entry = entries.iter().find(|entry| Arc::ptr_eq(&entry.node, &node));
        let entry = entry.ok_or_else(|| DaemonError::NodeNotFound(node.name().to_string()))?;
        self.note_file(spec)?;
        let there = overlay_file(daemon, spec, entry)?;
        let images = self.list.iter().filter(|planned| planned.overlay.is_none()).count();
        check_room(daemon, there.layer, images)?;
        let named = match spec.mode {
            TargetMode::AbsolutePaths => Named::ByImage,
            TargetMode::Existing => Named::ByOperator,
        };
        let mut below = file_spec(&spec.file, entry);
        if spec.mode == TargetMode::AbsolutePaths {
            if pass == Pass::Check {
                let name = match &spec.overlay_name {
                    Some(name) => NodeName::new(name)?,
                    None => daemon.graph.generate_name(),
                };
                self.promised.push(name.to_string());
                self.list.push(Planned { node, name, overlay: None, named });
                return Ok(());
            }
            let made = Made::beside(&there, entry)?;
            if let DriverSpec::File(file) = &mut below.driver {
                file.now_at = Some(made.now_at().to_owned());
            }
            self.made.push(made);
        }
        let overlay = daemon.make_target(&below, spec.overlay_name.clone(), there.layer.wanted())?;
        if pass == Pass::Check {
            check_unopened(daemon, &self.files)?;
        }
        self.check_overlay(daemon, &node, &overlay)?;
        self.plan(node, overlay, named);
        Ok(())
    }

    /// Takes note of a snapshot of a node that is made by one before it, and can only be looked at then.
    ///
    /// # Errors
    /// `Create` where two make one file.
    pub(super) fn defer(&mut self, spec: &SnapshotSpec) -> Result<(), DaemonError> {
        self.note_file(spec)?;
        self.promised.extend(spec.overlay_name.clone());
        Ok(())
    }

    /// Refuses to make anything in the place of a file that is there, when not all could be looked at.
    ///
    /// # Errors
    /// `Snapshot`.
    pub(super) fn check_new_files(&self) -> Result<(), DaemonError> {
        match self.files.iter().find(|file| file.symlink_metadata().is_ok()) {
            None => Ok(()),
            Some(file) => Err(DaemonError::Snapshot(format!(
                "'{}' is there already, and would be lost before all actions can be checked, as some name nodes that \
                 this transaction makes; make the overlay first, and use mode=existing",
                file.display()
            ))),
        }
    }

    /// Takes note of a file that is to be made, and refuses one that is somebody else's by then.
    fn note_file(&mut self, spec: &SnapshotSpec) -> Result<(), DaemonError> {
        if self.files.iter().any(|other| is_same_file(other, &spec.file)) {
            return Err(locked());
        }
        if spec.mode == TargetMode::AbsolutePaths {
            self.files.push(spec.file.clone());
        }
        Ok(())
    }

    fn plan(&mut self, node: Arc<Node>, overlay: Arc<Node>, named: Named) {
        let name = overlay.name().clone();
        self.list.push(Planned { node, name, overlay: Some(overlay), named });
    }

    fn node_of(&self, daemon: &Daemon, spec: &SnapshotSpec) -> Result<Arc<Node>, DaemonError> {
        let by_export = spec
            .device
            .as_ref()
            .and_then(|device| daemon.exports().iter().find(|export| &export.id == device).map(Export::node))
            .and_then(|node| daemon.graph.node(self.top(&node).as_str()).ok());
        let by_name = spec.node_name.as_ref().and_then(|name| daemon.graph.node(name).ok());
        by_export.or(by_name).ok_or_else(|| DaemonError::NoDeviceNorNode {
            device: spec.device.clone().unwrap_or_default(),
            node: spec.node_name.clone().unwrap_or_default(),
        })
    }

    fn check_node(&self, daemon: &Daemon, node: &Arc<Node>) -> Result<(), DaemonError> {
        for role in self.roles(daemon, node) {
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

    fn check_depth(&self, node: &Arc<Node>) -> Result<(), DaemonError> {
        match self.chain(node).len() {
            images if images >= CHAIN_MAX => Err(DaemonError::Snapshot(format!(
                "{images} images stand on each other already, which is the most"
            ))),
            _ => Ok(()),
        }
    }

    fn check_overlay(
        &self,
        daemon: &Daemon,
        node: &Arc<Node>,
        overlay: &Arc<Node>,
    ) -> Result<(), DaemonError> {
        let refused = |text: String| Err(DaemonError::Snapshot(text));
        let roles = self.roles(daemon, overlay);
        let users = self.roles(daemon, node);
        let is_below = self.chain(node).iter().any(|layer| Arc::ptr_eq(layer, overlay));
        let target = roles.iter().find(|role| matches!(role, Role::MirrorTarget { .. }));
        if let Some(role) = target
            && !users.is_empty()
        {
            return Err(conflict(overlay.name().clone(), role, true));
        }
        // A mirror only writes its target: nobody sees yet what that reads as, so it may be given what it stands on.
        // A layer of a chain without users fails further down, as in QEMU.
        let is_idle = is_below && users.is_empty();
        if !roles.is_empty() && target.is_none() && !is_idle {
            return refused("The overlay is already in use".to_owned());
        }
        if overlay.image().is_none() && !is_below {
            return refused("The overlay does not support backing images".to_owned());
        }
        if overlay.backing().is_some() || self.below(overlay).is_some() {
            return refused("The overlay already has a backing image".to_owned());
        }
        if is_below {
            let text = format!(
                "Making '{}' a backing child of '{}' would create a cycle",
                node.name(),
                overlay.name()
            );
            return refused(text);
        }
        if target.is_some() && !overlay.lacks_backing() {
            // What it does not hold has been taken for zeroes.
            let text =
                "The mirror's target names no backing file in its header, so it cannot be given one now";
            return refused(text.to_owned());
        }
        self.check_depth(node)?;
        let has_writers = users.iter().any(|role| matches!(role, Role::Export { writable: true, .. }));
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
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Mutex;
    use std::task::{Context, Wake, Waker};

    use futures_util::FutureExt;
    use futures_util::future::join;
    use heliostat_block::debug_event::DebugEvent;
    use heliostat_block::dirty_bitmap::DirtyBitmap;
    use heliostat_block::driver::fault::FaultInjector;
    use heliostat_block::driver::qcow2::create::{CreateOptions, create};
    use heliostat_block::driver::qcow2::file::ImageFile;
    use heliostat_block::graph::{Claims, Place};
    use heliostat_block::job::scan::SyncMode;
    use heliostat_block::job::{Force, Verb};
    use heliostat_block::named_bitmap::{Change, NamedBitmap, change};
    use heliostat_block::storage::Durability;
    use heliostat_host::file::FileStorage;
    use heliostat_host::open::{Existing, OpenOptions};
    use heliostat_host::runtime;

    use std::path::Path;

    use std::time::Duration;

    use super::super::flushing::{Bounds, GATES_MAX};
    use super::*;
    use crate::daemon::nodes::NODES_MAX;
    use crate::daemon::{
        BitmapAction, BitmapSpec, Child, DriveMirrorSpec, DriverSpec, FaultLimits, FaultSpec, MirrorSpec,
        NodeSpec, Qcow2Spec, TargetName,
    };

    /// A daemon with the images `names`, each a node.
    fn with_images(folder: &Path, names: &[&str]) -> Arc<Daemon> {
        let daemon = Daemon::new();
        for name in names {
            let path = folder.join(name);
            let storage = FileStorage::create(&path, 0, Existing::Replace, &OpenOptions::default()).unwrap();
            let options = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
            runtime::block_on(create(&ImageFile::new(Arc::new(storage)), None, &options)).unwrap().unwrap();
            let file = Child::New(Box::new(NodeSpec::new(
                None,
                DriverSpec::at(path, super::super::Sharing::Locked),
            )));
            let driver = DriverSpec::Qcow2(Box::new(Qcow2Spec::new(file)));
            daemon.add_node(&NodeSpec::new(Some((*name).to_owned()), driver)).unwrap();
        }
        daemon
    }

    #[test]
    fn a_disk_that_does_not_come_to_rest_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_images(folder.path(), &["a", "b", "oa", "ob"]);
        let mut snapshots = Snapshots::default();
        snapshots.add(&daemon, "a", "oa").unwrap();
        snapshots.add(&daemon, "b", "ob").unwrap();
        let take = |gates| {
            let bounds = Bounds { gates, ..Bounds::default() };
            runtime::block_on(snapshots.take_within(bounds, &daemon, &[], &mut [])).unwrap()
        };
        let b = daemon.node("b").unwrap();
        let request = b.enter().now_or_never().expect("the gate is open");
        let refused = take(Duration::from_millis(20)).unwrap_err();
        assert!(matches!(&refused, DaemonError::Undrained { nodes, .. } if nodes == "'b'"), "{refused}");
        for node in ["a", "b", "oa", "ob"] {
            let node = daemon.node(node).unwrap();
            assert!(node.enter().now_or_never().is_some(), "the gates are open again");
            assert!(node.backing().is_none() && !node.options().read_only);
        }
        drop(request);
        take(GATES_MAX).unwrap();
        assert!(Arc::ptr_eq(&daemon.node("ob").unwrap().backing().unwrap(), &b) && b.options().read_only);
    }

    /// A disk of a daemon, `disk`, whose flushes can be held up.
    fn with_faults(folder: &Path) -> (Arc<Daemon>, Arc<FaultInjector>) {
        let daemon = with_images(folder, &["overlay"]);
        let path = folder.join("disk");
        std::fs::write(&path, [0; 1 << 20]).unwrap();
        let file = NodeSpec::new(None, DriverSpec::at(path, crate::daemon::Sharing::Locked));
        let faults = FaultSpec {
            image: Child::New(Box::new(file)),
            config: None,
            limits: FaultLimits::default(),
            errors: Vec::new(),
            states: Vec::new(),
            claims: Claims::default(),
        };
        let file = Child::New(Box::new(NodeSpec::new(None, DriverSpec::Faults(Box::new(faults)))));
        let raw = DriverSpec::Raw { file, offset: None, size: None, is_guess: false };
        daemon.add_node(&NodeSpec::new(Some("disk".to_owned()), raw)).unwrap();
        let injector = daemon.fault_injector("disk").unwrap().unwrap();
        (daemon, injector)
    }

    /// A guest's write of 512 bytes.
    async fn write(guest: &Place, byte: u8) {
        let data = vec![byte; 512].into();
        guest.enter().await.write(0, data, Durability::Cached).await.unwrap();
    }

    #[test]
    fn guests_are_not_held_for_ever_by_a_flush_behind_closed_gates() {
        let folder = tempfile::tempdir().unwrap();
        let (daemon, injector) = with_faults(folder.path());
        let (disk, overlay) = (daemon.node("disk").unwrap(), daemon.node("overlay").unwrap());
        let role = Role::Export { id: "guest".to_owned(), writable: true };
        let guest = daemon.graph().attach(&disk, role).unwrap();
        let mut snapshots = Snapshots::default();
        snapshots.add(&daemon, "disk", "overlay").unwrap();
        let take = async |gates| {
            let bounds = Bounds { gates, ..Bounds::default() };
            snapshots.take_within(bounds, &daemon, &[], &mut []).await
        };
        runtime::block_on(async {
            let held = disk.enter().await;
            let refused = take(Duration::from_millis(300));
            let meanwhile = async {
                while let Some(entered) = disk.enter().now_or_never() {
                    drop(entered);
                    runtime::yield_now().await;
                }
                // The gate is closed, and nothing is quiet yet.
                injector.add_break(DebugEvent::FlushToDisk, "behind").unwrap();
                let mut writing = pin!(write(&guest, 7));
                assert!(writing.as_mut().now_or_never().is_none());
                drop(held);
                injector.wait_break("behind").await;
                assert!(
                    writing.as_mut().now_or_never().is_none(),
                    "what is flushed is what was written before"
                );
                writing.await;
            };
            let (refused, ()) = join(refused, meanwhile).await;
            let refused = refused.unwrap_err();
            assert!(
                matches!(&refused, DaemonError::UnendedFlush { nodes, .. } if nodes == "'disk'"),
                "{refused}"
            );
            write(&guest, 8).await;
            assert!(Arc::ptr_eq(&guest.node(), &disk) && overlay.backing().is_none());
            assert!(!disk.options().read_only && overlay.in_flight() == 0);
            assert_eq!(disk.in_flight(), 1, "the flush goes on");
            // The next one waits for it.
            let refused = take(Duration::from_millis(20)).await.unwrap_err();
            assert!(
                matches!(&refused, DaemonError::Undrained { nodes, .. } if nodes == "'disk'"),
                "{refused}"
            );
            injector.resume("behind").unwrap();
            take(GATES_MAX).await.unwrap();
            write(&guest, 9).await;
        })
        .unwrap();
        assert!(Arc::ptr_eq(&guest.node(), &overlay) && disk.in_flight() == 0);
        assert_eq!(std::fs::read(folder.path().join("disk")).unwrap()[..512], [8; 512]);
        drop(guest);
        daemon.shutdown().unwrap();
    }

    #[test]
    fn a_flush_beside_guests_is_waited_for_so_long_and_ends_by_itself() {
        let folder = tempfile::tempdir().unwrap();
        let (daemon, injector) = with_faults(folder.path());
        let disk = daemon.node("disk").unwrap();
        let mut snapshots = Snapshots::default();
        snapshots.add(&daemon, "disk", "overlay").unwrap();
        injector.add_break(DebugEvent::FlushToDisk, "beside").unwrap();
        let bounds = Bounds { beside_clients: Duration::from_millis(20), ..Bounds::default() };
        let refused =
            runtime::block_on(snapshots.take_within(bounds, &daemon, &[], &mut [])).unwrap().unwrap_err();
        let said = refused.to_string();
        assert!(
            said.contains("a flush of 'disk' has not ended") && said.contains("nothing has changed"),
            "{said}"
        );
        assert!(disk.enter().now_or_never().is_some(), "the gate is open");
        assert!(injector.is_suspended("beside"));
        // The end releases it, and waits for it.
        daemon.shutdown().unwrap();
        assert_eq!(disk.in_flight(), 0);
    }

    /// A snapshot of `node` to an image that is made.
    fn to_file(node: &str, file: &Path, overlay: &str) -> SnapshotSpec {
        SnapshotSpec {
            device: None,
            node_name: Some(node.to_owned()),
            file: file.to_owned(),
            overlay_name: Some(overlay.to_owned()),
            format: "qcow2".to_owned(),
            mode: TargetMode::AbsolutePaths,
        }
    }

    /// A mirror whose filter would have that name.
    fn mirror(source: &str, target: &str, filter: &str) -> MirrorSpec {
        MirrorSpec { filter_node_name: Some(filter.to_owned()), ..MirrorSpec::new(source, source, target) }
    }

    fn all(daemon: &Daemon, actions: &[Action]) -> Result<(), DaemonError> {
        daemon.transaction(actions, CompletionMode::Individual)
    }

    /// A file with something in it.
    fn file_in(folder: &Path) -> PathBuf {
        let file = folder.join("there");
        std::fs::write(&file, [7; 100_000]).unwrap();
        file
    }

    fn assert_whole(file: &Path) {
        assert!(std::fs::read(file).unwrap() == [7; 100_000], "it is lost");
    }

    #[test]
    fn a_file_is_whole_when_what_comes_after_the_making_of_its_overlay_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_images(folder.path(), &["a"]);
        let file = file_in(folder.path());
        let a = daemon.node("a").unwrap();
        let mut snapshots = Snapshots::default();
        snapshots.add_file(&daemon, &to_file("a", &file, "o"), Pass::Make).unwrap();
        let entries = daemon.nodes();
        assert!(entries.iter().filter(|entry| entry.path == file).count() == 2, "the overlay and its file");
        let mut made = snapshots.take_made();
        let mut take = |gates| {
            let bounds = Bounds { gates, ..Bounds::default() };
            runtime::block_on(snapshots.take_within(bounds, &daemon, &[], &mut made)).unwrap()
        };
        let request = a.enter().now_or_never().expect("the gate is open");
        let refused = take(Duration::from_millis(20)).unwrap_err();
        assert!(matches!(&refused, DaemonError::Undrained { .. }), "{refused}");
        assert_whole(&file);
        drop(request);
        take(GATES_MAX).unwrap();
        assert!(std::fs::read(&file).unwrap().starts_with(b"QFI\xfb"), "it has the name before guests come");
        made.into_iter().for_each(Made::keep);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_file_is_not_replaced_when_the_nodes_name_is_a_filters() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_images(folder.path(), &["a", "b", "c", "t", "u"]);
        let file = file_in(folder.path());
        let snapshot = || Action::SnapshotToFile(to_file("a", &file, "ov"));
        let with_it = |source: &str, target: &str| Action::Mirror(Box::new(mirror(source, target, "ov")));
        for actions in [[snapshot(), with_it("b", "t")], [with_it("b", "t"), snapshot()]] {
            all(&daemon, &actions).unwrap_err();
            assert_whole(&file);
        }
        let refused = all(&daemon, &[with_it("b", "t"), with_it("c", "u")]).unwrap_err();
        assert!(matches!(refused, DaemonError::NodeExists(_)), "{refused}");
        daemon.start_mirror(&mirror("b", "t", "ov")).unwrap();
        let refused = daemon.snapshot_to_file(&to_file("a", &file, "ov")).unwrap_err();
        assert_eq!(refused.to_string(), "New overlay node-name already in use");
        assert_whole(&file);
        let own = DriveMirrorSpec {
            mirror: mirror("c", "", "own"),
            target: TargetName::Path(file.clone()),
            format: Some("qcow2".to_owned()),
            node_name: Some("own".to_owned()),
            mode: TargetMode::AbsolutePaths,
        };
        let refused = daemon.start_drive_mirror(&own).err().unwrap();
        assert!(matches!(refused, DaemonError::NodeExists(_)), "{refused}");
        assert_whole(&file);
        daemon.shutdown().unwrap();
    }

    #[test]
    fn a_file_that_another_snapshot_opens_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_images(folder.path(), &["a", "b", "there"]);
        daemon.remove_node("there").unwrap();
        let file = folder.path().join("there");
        let before = std::fs::read(&file).unwrap();
        let opened = SnapshotSpec { mode: TargetMode::Existing, ..to_file("b", &file, "ob") };
        let made = Action::SnapshotToFile(to_file("a", &file, "oa"));
        let opened = Action::SnapshotToFile(opened);
        for actions in [[made.clone(), opened.clone()], [opened, made]] {
            all(&daemon, &actions).unwrap_err();
            assert_eq!(std::fs::read(&file).unwrap(), before);
        }
    }

    #[test]
    fn a_file_is_not_replaced_when_there_is_no_room_for_its_nodes() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_images(folder.path(), &["a", "b"]);
        let file = file_in(folder.path());
        let null = |number: usize| {
            let driver = DriverSpec::NullCo { size: 512, read_zeroes: true };
            NodeSpec::new(Some(format!("null{number}")), driver)
        };
        let room = |nodes: usize| {
            (daemon.nodes().len()..NODES_MAX - nodes)
                .for_each(|at| drop(daemon.add_node(&null(at)).unwrap()));
        };
        let is_full = |refused: DaemonError| matches!(refused, DaemonError::TooMany { what: "nodes", .. });
        room(3);
        let two = [to_file("a", &file, "oa"), to_file("b", &folder.path().join("new"), "ob")];
        assert!(is_full(all(&daemon, &two.map(Action::SnapshotToFile)).unwrap_err()));
        assert_whole(&file);
        room(1);
        assert!(is_full(daemon.snapshot_to_file(&to_file("a", &file, "oa")).unwrap_err()));
        let mirror = DriveMirrorSpec {
            mirror: MirrorSpec::new("j", "a", ""),
            target: TargetName::Path(file.clone()),
            format: None,
            node_name: None,
            mode: TargetMode::AbsolutePaths,
        };
        assert!(is_full(daemon.start_drive_mirror(&mirror).err().unwrap()));
        assert_whole(&file);
    }

    fn bitmap_of(daemon: &Daemon, name: &str, granularity: u32) -> NamedBitmap {
        let size = daemon.node("disk").unwrap().size();
        NamedBitmap::new(name.to_owned(), Arc::new(DirtyBitmap::new(size, granularity).unwrap()))
    }

    /// Looks at the bitmaps when the first guest that waits at the gate is told that it is open.
    struct AtTheGate {
        disk: Arc<Node>,
        overlay: Arc<Node>,
        seen: Mutex<Option<(bool, bool)>>,
    }

    impl Wake for AtTheGate {
        fn wake(self: Arc<Self>) {
            let old = self.disk.named_bitmap("old").unwrap();
            let is_there = self.overlay.named_bitmap("new").is_some();
            self.seen.lock().unwrap().get_or_insert((old.recording, is_there));
        }
    }

    #[test]
    fn bitmaps_change_when_what_was_in_flight_has_ended_and_before_anybody_gets_to_the_overlay() {
        let folder = tempfile::tempdir().unwrap();
        let (daemon, _) = with_faults(folder.path());
        let (disk, overlay) = (daemon.node("disk").unwrap(), daemon.node("overlay").unwrap());
        let role = Role::Export { id: "guest".to_owned(), writable: true };
        let guest = daemon.graph().attach(&disk, role).unwrap();
        change(&[(Arc::clone(&disk), Change::Add(bitmap_of(&daemon, "old", 512)))]);
        let changes = [
            (Arc::clone(&disk), Change::Record("old".to_owned(), false)),
            (Arc::clone(&overlay), Change::Add(bitmap_of(&daemon, "new", 512))),
        ];
        let mut snapshots = Snapshots::default();
        snapshots.add(&daemon, "disk", "overlay").unwrap();
        let at_the_gate = Arc::new(AtTheGate {
            disk: Arc::clone(&disk),
            overlay: Arc::clone(&overlay),
            seen: Mutex::default(),
        });
        let waker = Waker::from(Arc::clone(&at_the_gate));
        runtime::block_on(async {
            let in_flight = disk.enter().await;
            let mut waiting = pin!(write(&guest, 7));
            let meanwhile = async {
                while let Some(entered) = disk.enter().now_or_never() {
                    drop(entered);
                    runtime::yield_now().await;
                }
                assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
                in_flight.write(1024, vec![1; 512].into(), Durability::Cached).await.unwrap();
                drop(in_flight);
            };
            let mut none = [];
            let taken = snapshots.take_within(Bounds::default(), &daemon, &changes, &mut none);
            join(taken, meanwhile).await.0.unwrap();
            assert_eq!(*at_the_gate.seen.lock().unwrap(), Some((false, true)), "a guest comes too early");
            waiting.await;
        })
        .unwrap();
        let count = |node: &Node, name: &str| node.named_bitmap(name).unwrap().bits.unwrap().dirty_bytes();
        assert_eq!(count(&disk, "old"), 512, "what was in flight is before");
        assert_eq!(count(&overlay, "new"), 512, "what came to the gate is after");
        drop(guest);
        daemon.shutdown().unwrap();
    }

    #[test]
    fn bitmaps_stay_on_the_node_that_guests_leave() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_images(folder.path(), &["a", "u"]);
        let spec = BitmapSpec {
            node: "a".to_owned(),
            name: "x".to_owned(),
            granularity: None,
            persistent: true,
            disabled: false,
        };
        all(&daemon, &[Action::Bitmap(BitmapAction::Add(spec))]).unwrap();
        let a = daemon.node("a").unwrap();
        daemon.snapshot_to_file(&to_file("a", &folder.path().join("new"), "new")).unwrap();
        assert!(daemon.node("new").is_err(), "nobody uses it");
        assert!(a.named_bitmap("x").is_some());
        // A mirror's target that stands on it goes when the job is cancelled.
        let target = folder.path().join("t");
        let storage = FileStorage::create(&target, 0, Existing::Replace, &OpenOptions::default()).unwrap();
        let backing_file = Some(b"a".to_vec());
        let options = CreateOptions { size: 1 << 20, backing_file, ..CreateOptions::default() };
        runtime::block_on(create(&ImageFile::new(Arc::new(storage)), None, &options)).unwrap().unwrap();
        let events = daemon.subscribe();
        let spec = DriveMirrorSpec {
            mirror: MirrorSpec { sync: SyncMode::Top, ..MirrorSpec::new("j", "u", "") },
            target: TargetName::Path(target),
            format: Some("qcow2".to_owned()),
            node_name: Some("t".to_owned()),
            mode: TargetMode::Existing,
        };
        daemon.start_drive_mirror(&spec).unwrap();
        daemon.snapshot("a", "t").unwrap();
        assert!(Arc::ptr_eq(&daemon.node("t").unwrap().backing().unwrap(), &a));
        let job = daemon.job("j").unwrap();
        daemon.ask_job(&job, Verb::Cancel(Force::Hard)).unwrap();
        while daemon.node("t").is_ok() {
            events.next(Duration::from_secs(30)).expect("something is said until it is over");
        }
        assert!(a.named_bitmap("x").is_some());
        daemon.shutdown().unwrap();
    }
}
