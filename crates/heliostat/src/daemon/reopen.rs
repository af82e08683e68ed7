//! Changing what a node was told when it was opened, while it is in use: whether it may be written, what becomes of
//! discards and zeroes, what it stands on, whose limits it keeps, whether its file is used past the page cache.
//!
//! All nodes of one order are checked first, then drained, then changed: all or none. Called by operators.

use std::collections::BTreeSet;
use std::sync::Arc;

use heliostat_block::graph::Role;
use heliostat_block::name::NodeName;
use heliostat_block::node::{DetectZeroes, Discard, Node};
use heliostat_block::throttle::ThrottleGroup;
use heliostat_block::tracked::Drained;
use heliostat_host::file::{FileStorage, Way};
use heliostat_host::open::Cache;
use heliostat_host::runtime;

use super::flusher::Wanted;
use super::flushing::{Bounds, undrained, until};
use super::{
    BackingSpec, Child, Daemon, DaemonError, DriverSpec, NbdClientSpec, NbdEntry, NbdServerAt, NodeEntry,
    NodeSpec,
};

/// What becomes of one node.
struct Change {
    node: Arc<Node>,
    spec: NodeSpec,
    backing: Below,
    /// Another node for a filter to pass its requests on to.
    file: Option<Arc<Node>>,
    group: Option<Arc<ThrottleGroup>>,
    /// Another way for the requests to its file.
    way: Option<(Arc<FileStorage>, Way)>,
}

/// What a node is to stand on.
enum Below {
    AsItIs,
    Nothing,
    Node(Arc<Node>),
}

impl Daemon {
    /// Changes the nodes that `specs` name to what they say. What is not said goes back to its default.
    ///
    /// # Errors
    /// `ReopenNameMissing`, `NodeNameNotFound`; `Fixed` for what cannot be changed; `BackingMissing`, `HasWriters`,
    /// `OpenedReadOnly`, `DetectZeroes`, `NodeBusy`, `NodeInUse`, `Unflushed`, `UnendedFlush`, `Undrained`. Nothing has
    /// changed then.
    pub fn reopen_nodes(&self, specs: &[NodeSpec]) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        let entries = self.nodes();
        let changes = specs.iter().map(|spec| self.plan_change(spec, &entries));
        let changes = changes.collect::<Result<Vec<_>, _>>()?;
        self.check_acyclic(&changes)?;
        self.check_files(&changes)?;
        let done = runtime::block_on(self.change_within(Bounds::default(), changes));
        let done = done.map_err(DaemonError::Engine)?;
        // What it stood on may have been made for it.
        self.drop_orphans();
        done
    }

    async fn change_within(&self, bounds: Bounds, changes: Vec<Change>) -> Result<(), DaemonError> {
        let clock = self.clock().as_ref();
        let nodes = self.to_be_quiet(&changes);
        let flusher = self.flushers.start()?;
        let written = nodes.iter().filter(|node| !node.options().read_only);
        let written = written.map(|node| Wanted::Beside(Arc::clone(node))).collect();
        let flushed = until(clock, clock.now() + bounds.beside_clients, flusher.flush(written)).await;
        let unended = || DaemonError::UnendedFlush { nodes: flusher.unended(), limit: bounds.beside_clients };
        flushed.ok_or_else(unended)?.map_err(DaemonError::Unflushed)?;
        let drain = async {
            let mut drained = Vec::new();
            for node in &nodes {
                drained.push(node.drain().await);
            }
            drained
        };
        // The gates open again where this ends early.
        let drained = until(clock, clock.now() + bounds.gates, drain).await;
        let drained = drained.ok_or_else(|| undrained(&nodes, bounds.gates))?;
        let moves: Vec<_> = changes.iter().filter_map(Change::moves).collect();
        self.change_backings(&moves).map_err(|node| DaemonError::NodeInUse(node.name().clone()))?;
        for change in changes {
            let is_it = |drained: &&Drained| Arc::ptr_eq(drained.node(), &change.node);
            if let (Some(file), Some(drained)) = (&change.file, drained.iter().find(is_it)) {
                self.change_child(drained, file);
            }
            if let Some((file, way)) = change.way {
                file.take(way);
            }
            if let (Some(group), Some(throttle)) = (&change.group, change.node.throttle()) {
                throttle.change_group(Arc::clone(group));
            }
            if let (DriverSpec::Preallocate { ahead, .. }, Some(filter)) =
                (&change.spec.driver, change.node.preallocate())
            {
                filter.change(*ahead);
            }
            change.node.set_options(change.spec.options());
            self.keep_said(&change.node, &change.spec);
        }
        Ok(())
    }

    /// The nodes that nobody may use meanwhile: those that change, and, where requests to a file go another way, all
    /// that may go to the file past its node. What is in flight above must find the gates below open
    /// (docs/decisions/0015), so the upper ones come first; over the lower of two nodes are the upper one and all that
    /// is over that.
    fn to_be_quiet(&self, changes: &[Change]) -> Vec<Arc<Node>> {
        let mut nodes: Vec<_> = changes.iter().map(|change| Arc::clone(&change.node)).collect();
        for change in changes.iter().filter(|change| change.way.is_some()) {
            let above = self.above(&change.node, &[]);
            let above = above.iter().filter_map(|name| self.graph.node(name.as_str()).ok());
            nodes.extend(above);
        }
        nodes.sort_by_cached_key(|node| (self.above(node, &[]).len(), node.name().clone()));
        nodes.dedup_by(|one, other| Arc::ptr_eq(one, other));
        nodes
    }

    fn plan_change(&self, spec: &NodeSpec, entries: &[NodeEntry]) -> Result<Change, DaemonError> {
        let name = spec.name.as_ref().ok_or(DaemonError::ReopenNameMissing)?;
        let entry = entries.iter().find(|entry| entry.node.name().as_str() == name);
        let entry = entry.ok_or_else(|| DaemonError::NodeNameNotFound(name.clone()))?;
        let node = Arc::clone(&entry.node);
        check_fixed(spec, entry)?;
        let group = self.plan_group(spec)?;
        let file = self.plan_file(spec, entry)?;
        if spec.detect_zeroes == DetectZeroes::Unmap && spec.discard != Discard::Unmap {
            return Err(DaemonError::DetectZeroes);
        }
        let backing = match &spec.driver {
            DriverSpec::Qcow2(image) => self.plan_backing(&image.backing, entry)?,
            _ => Below::AsItIs,
        };
        if spec.read_only && self.has_writers(&node, entries) {
            return Err(DaemonError::HasWriters(node.name().clone()));
        }
        // An overlay relies on what it stands on.
        let is_below = self.graph.roles(&node).iter().any(|role| matches!(role, Role::Backing { .. }));
        if !spec.read_only && !spec.auto_read_only && node.options().read_only && is_below {
            return Err(DaemonError::NodeInUse(node.name().clone()));
        }
        // What only read beside others does not write beside them.
        if !spec.read_only && node.options().read_only {
            self.check_alone(node.name())?;
        }
        if !spec.read_only && !spec.auto_read_only && node.traits().read_only {
            return Err(DaemonError::OpenedReadOnly(node.name().clone()));
        }
        let way = match &entry.file {
            Some(storage) if spec.cache.direct != entry.cache.direct => {
                let cache = if spec.cache.direct { Cache::Direct } else { Cache::Page };
                Some((Arc::clone(storage), storage.prepare(cache)?))
            }
            _ => None,
        };
        Ok(Change { node, spec: spec.clone(), backing, file, group, way })
    }

    /// Says whether anybody may write to the node as it is used now.
    fn has_writers(&self, node: &Arc<Node>, entries: &[NodeEntry]) -> bool {
        self.graph.roles(node).iter().any(|role| match role {
            Role::Export { writable, .. } => *writable,
            Role::MirrorTarget { .. } => true,
            Role::Child { of, .. } => {
                let above = entries.iter().find(|entry| entry.node.name() == of);
                above.is_some_and(|above| !above.node.options().read_only)
            }
            Role::MirrorSource { .. } | Role::Backing { .. } => false,
        })
    }

    fn plan_group(&self, spec: &NodeSpec) -> Result<Option<Arc<ThrottleGroup>>, DaemonError> {
        let DriverSpec::Throttle { group, .. } = &spec.driver else { return Ok(None) };
        let missing = || DaemonError::Filter(format!("Throttle group '{group}' does not exist"));
        self.throttle_group(group).map(Some).ok_or_else(missing)
    }

    /// Checks what can be said of the node that a filter is to stand on before the others of the same order are known.
    fn plan_file(&self, spec: &NodeSpec, entry: &NodeEntry) -> Result<Option<Arc<Node>>, DaemonError> {
        let DriverSpec::Throttle { file: Child::Named(name), .. } = &spec.driver else { return Ok(None) };
        let below = self
            .graph
            .node(name)
            .map_err(|_| DaemonError::NoDeviceNorNode { device: String::new(), node: name.clone() })?;
        let stays = entry.child.as_ref().is_some_and(|child| child.as_str() == name);
        let becomes_writable = !spec.read_only && (!stays || entry.node.options().read_only);
        if below.options().read_only && becomes_writable {
            return Err(DaemonError::TargetReadOnly);
        }
        if stays {
            return Ok(None);
        }
        for role in self.graph.roles(&entry.node) {
            let minds = match role {
                // What they copy, or read past the gate, would change without a mark.
                Role::MirrorSource { .. } | Role::MirrorTarget { .. } | Role::Backing { .. } => true,
                Role::Child { .. } => self.is_mirrored_above(&entry.node),
                Role::Export { .. } => false,
            };
            if minds {
                return Err(DaemonError::NodeBusy(entry.node.name().clone()));
            }
        }
        let (size, other) = (entry.node.size(), below.size());
        if size != other {
            let text = format!("'{}' has {size} bytes and '{name}' has {other}", entry.node.name());
            return Err(DaemonError::Filter(format!("{text}: who uses a node relies on its size")));
        }
        Ok(Some(below))
    }

    /// Checks that nobody else is on the nodes that filters are to stand on, but who reads there, or leaves.
    fn check_files(&self, changes: &[Change]) -> Result<(), DaemonError> {
        let leaves =
            |of: &NodeName| changes.iter().any(|other| other.node.name() == of && other.file.is_some());
        let becomes_written =
            |of: &NodeName| changes.iter().any(|other| other.node.name() == of && !other.spec.read_only);
        for change in changes {
            let Some(file) = &change.file else { continue };
            let comes_below = |other: &Change| {
                matches!(&other.backing, Below::Node(below) if Arc::ptr_eq(below, file))
                    && !change.spec.read_only
            };
            let is_free = self.graph.roles(file).iter().all(|role| match role {
                Role::Export { writable, .. } => !writable,
                Role::Child { of, .. } => {
                    leaves(of) || (change.spec.read_only && !self.is_written(of) && !becomes_written(of))
                }
                Role::MirrorSource { .. } | Role::MirrorTarget { .. } | Role::Backing { .. } => false,
            });
            let comes_too = |other: &&Change| {
                !Arc::ptr_eq(&other.node, &change.node)
                    && other.file.as_ref().is_some_and(|other| Arc::ptr_eq(other, file))
                    && !(other.spec.read_only && change.spec.read_only)
            };
            if !is_free || changes.iter().any(|other| comes_too(&other) || comes_below(other)) {
                return Err(DaemonError::NodeInUse(file.name().clone()));
            }
        }
        Ok(())
    }

    fn plan_backing(&self, wanted: &BackingSpec, entry: &NodeEntry) -> Result<Below, DaemonError> {
        let name = || entry.node.name().clone();
        let names_one = || entry.node.image().is_some_and(|image| image.header().backing_file.is_some());
        let wanted =
            match wanted {
                BackingSpec::FromImage if entry.backing.is_some() || names_one() => {
                    return Err(DaemonError::BackingMissing(name()));
                }
                BackingSpec::FromImage | BackingSpec::Nothing => None,
                BackingSpec::Given(Child::New(_)) => return Err(DaemonError::Fixed("backing.driver")),
                BackingSpec::Given(Child::Named(below)) => Some(self.graph.node(below).map_err(|_| {
                    DaemonError::NoDeviceNorNode { device: String::new(), node: below.clone() }
                })?),
            };
        if wanted.as_ref().map(|below| below.name()) == entry.backing.as_ref() {
            return Ok(Below::AsItIs);
        }
        let gains_what_it_names = wanted.is_some() && entry.node.lacks_backing();
        for role in self.graph.roles(&entry.node) {
            let minds = match role {
                // What a mirror copies would change without a mark.
                Role::MirrorSource { .. } => true,
                // What a target does not hold has been taken for what shows there now, but where that was missing.
                Role::MirrorTarget { .. } => !gains_what_it_names,
                // Whoever reads through it passes no gate here, and may be copied.
                Role::Backing { .. } => true,
                Role::Child { .. } => self.is_mirrored_above(&entry.node),
                Role::Export { .. } => false,
            };
            if minds {
                return Err(DaemonError::NodeBusy(name()));
            }
        }
        Ok(wanted.map_or(Below::Nothing, Below::Node))
    }

    /// Refuses changes after which a node would stand on itself.
    fn check_acyclic(&self, changes: &[Change]) -> Result<(), DaemonError> {
        let mut moves: Vec<_> = changes.iter().filter_map(Change::moves).collect();
        let files =
            changes.iter().filter_map(|change| Some((Arc::clone(&change.node), change.file.clone()?)));
        moves.extend(files.map(|(node, file)| (node, Some(file))));
        for change in changes {
            let Some(file) = &change.file else { continue };
            let node = &change.node;
            if Arc::ptr_eq(node, file) || self.above(node, &moves).contains(file.name()) {
                let (file, name) = (file.name(), node.name());
                let text = format!("Making '{file}' a file child of '{name}' would create a cycle");
                return Err(DaemonError::Snapshot(text));
            }
        }
        for (node, below) in &moves {
            let Some(below) = below else { continue };
            if Arc::ptr_eq(node, below) || self.above(node, &moves).contains(below.name()) {
                let name = node.name();
                let text = format!("Making '{name}' a backing child of '{name}' would create a cycle");
                return Err(DaemonError::Snapshot(text));
            }
        }
        Ok(())
    }

    /// The nodes whose bytes go through `node`, or that stand on it: now, and after `moves`.
    fn above(&self, node: &Arc<Node>, moves: &[(Arc<Node>, Option<Arc<Node>>)]) -> BTreeSet<NodeName> {
        let mut above = BTreeSet::new();
        let mut left = vec![node.name().clone()];
        while let Some(name) = left.pop() {
            let roles =
                self.graph.node(name.as_str()).map(|node| self.graph.roles(&node)).unwrap_or_default();
            let now = roles.into_iter().filter_map(|role| match role {
                Role::Child { of, .. } | Role::Backing { of } => Some(of),
                _ => None,
            });
            let then = moves.iter().filter(|(_, below)| below.as_ref().is_some_and(|b| *b.name() == name));
            for upper in now.chain(then.map(|(node, _)| node.name().clone())) {
                if above.insert(upper.clone()) {
                    left.push(upper);
                }
            }
        }
        above
    }

    /// Says whether a mirror uses a node above `node`.
    fn is_mirrored_above(&self, node: &Arc<Node>) -> bool {
        self.above(node, &[]).iter().filter_map(|name| self.graph.node(name.as_str()).ok()).any(|node| {
            let roles = self.graph.roles(&node);
            roles.iter().any(|role| matches!(role, Role::MirrorSource { .. } | Role::MirrorTarget { .. }))
        })
    }
}

impl Change {
    /// What it is to stand on that it does not now.
    fn moves(&self) -> Option<(Arc<Node>, Option<Arc<Node>>)> {
        match &self.backing {
            Below::AsItIs => None,
            Below::Nothing => Some((Arc::clone(&self.node), None)),
            Below::Node(below) => Some((Arc::clone(&self.node), Some(Arc::clone(below)))),
        }
    }
}

/// Refuses what would need another file, or the same in another way.
fn check_fixed(spec: &NodeSpec, entry: &NodeEntry) -> Result<(), DaemonError> {
    let check_child = |child: &Child| match child {
        Child::Named(name) if entry.child.as_ref().is_some_and(|child| child.as_str() == name) => Ok(()),
        Child::Named(_) => Err(DaemonError::Fixed("file")),
        Child::New(_) => Err(DaemonError::Fixed("file.driver")),
    };
    let check = |is_same: bool, option| if is_same { Ok(()) } else { Err(DaemonError::Fixed(option)) };
    match (&spec.driver, entry.driver) {
        (DriverSpec::File(file), "file") | (DriverSpec::HostDevice(file), "host_device") => {
            check(file.path == entry.path, "filename")?;
        }
        (DriverSpec::Nbd(nbd), "nbd") => check_nbd(nbd, entry)?,
        (DriverSpec::Raw { file, offset, size, .. }, "raw") => {
            check_child(file)?;
            check(offset.unwrap_or(0) == entry.window_start, "offset")?;
            let said = entry.is_fixed.then(|| entry.node.size());
            check(*size == said, "size")?;
        }
        (DriverSpec::Qcow2(image), "qcow2") => check_child(&image.file)?,
        (DriverSpec::Faults(faults), "blkdebug") => check_child(&faults.image).map_err(|_| {
            DaemonError::Fixed(match &faults.image {
                Child::Named(_) => "image",
                Child::New(spec) if matches!(spec.driver, DriverSpec::File(_)) => "image.filename",
                Child::New(_) => "image.driver",
            })
        })?,
        (DriverSpec::CopyOnRead { .. }, "copy-on-read") => {
            let name = entry.node.name();
            let text =
                format!("Block format 'copy-on-read' used by node '{name}' does not support reopening files");
            return Err(DaemonError::Filter(text));
        }
        (DriverSpec::Throttle { file: Child::New(_), .. }, "throttle") => {
            return Err(DaemonError::Fixed("file.driver"));
        }
        (DriverSpec::Throttle { .. }, "throttle") => {}
        (DriverSpec::Preallocate { file, .. }, "preallocate") => check_child(file)?,
        _ => return Err(DaemonError::Fixed("driver")),
    }
    Ok(())
}

/// Refuses another server, another export, or the same reached in another way.
fn check_nbd(wanted: &NbdClientSpec, entry: &NodeEntry) -> Result<(), DaemonError> {
    let Some(NbdEntry { spec: now, .. }) = &entry.nbd else { return Ok(()) };
    let server = match (&wanted.server, &now.server) {
        (wanted, now) if wanted == now => None,
        (NbdServerAt::Unix(_), NbdServerAt::Unix(_)) => Some("server.path"),
        (NbdServerAt::Inet { host, .. }, NbdServerAt::Inet { host: now, .. }) if host != now => {
            Some("server.host")
        }
        (NbdServerAt::Inet { .. }, NbdServerAt::Inet { .. }) => Some("server.port"),
        (NbdServerAt::Descriptor(_), NbdServerAt::Descriptor(_)) => Some("server.str"),
        _ => Some("server.type"),
    };
    let others = [
        (wanted.export == now.export, "export"),
        (wanted.credentials == now.credentials, "tls-creds"),
        (wanted.tls_hostname == now.tls_hostname, "tls-hostname"),
        (wanted.bitmap == now.bitmap, "x-dirty-bitmap"),
        (wanted.reconnect_delay == now.reconnect_delay, "reconnect-delay"),
        (wanted.open_timeout == now.open_timeout, "open-timeout"),
    ];
    let other = others.iter().find(|(is_same, _)| !is_same).map(|(_, option)| *option);
    server.or(other).map_or(Ok(()), |option| Err(DaemonError::Fixed(option)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    use futures_util::FutureExt;
    use heliostat_block::storage::Durability;

    use super::super::CacheUse;
    use super::*;

    #[test]
    fn what_is_above_closes_its_gate_first_whatever_was_made_first() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = Daemon::new();
        for name in ["low", "other"] {
            std::fs::File::create(folder.path().join(name)).unwrap().set_len(1 << 20).unwrap();
            daemon.add_node(&NodeSpec::file(name, folder.path().join(name))).unwrap();
        }
        let raw = |name: &str, below: &str| {
            let file = Child::Named(below.to_owned());
            let driver = DriverSpec::Raw { file, offset: None, size: None, is_guess: false };
            NodeSpec::new(Some(name.to_owned()), driver)
        };
        daemon.add_node(&raw("mid", "low")).unwrap();
        daemon.add_node(&raw("top", "mid")).unwrap();
        let change = |name: &str| {
            let node = daemon.node(name).unwrap();
            Change {
                node,
                spec: raw(name, "low"),
                backing: Below::AsItIs,
                file: None,
                group: None,
                way: None,
            }
        };
        for names in [["low", "mid", "top"], ["mid", "top", "low"], ["top", "low", "mid"]] {
            let nodes = daemon.to_be_quiet(&names.map(change));
            let names: Vec<_> = nodes.iter().map(|node| node.name().to_string()).collect();
            assert_eq!(names, ["top", "mid", "low"]);
        }
    }

    /// A file, and a raw node over it.
    fn with_window(folder: &std::path::Path) -> (Arc<Daemon>, NodeSpec) {
        let daemon = Daemon::new();
        let path = folder.join("disk");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let file = NodeSpec::file("file", path);
        daemon.add_node(&file).unwrap();
        let below = Child::Named("file".to_owned());
        let driver = DriverSpec::Raw { file: below, offset: None, size: None, is_guess: false };
        daemon.add_node(&NodeSpec::new(Some("top".to_owned()), driver)).unwrap();
        (daemon, file)
    }

    fn direct(file: &NodeSpec, direct: bool) -> NodeSpec {
        NodeSpec { cache: CacheUse { direct, ..CacheUse::default() }, ..file.clone() }
    }

    #[test]
    fn a_node_that_does_not_come_to_rest_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let (daemon, file) = with_window(folder.path());
        let (top, node) = (daemon.node("top").unwrap(), daemon.node("file").unwrap());
        let change = |gates| {
            let spec = NodeSpec { detect_zeroes: DetectZeroes::On, ..file.clone() };
            let change = |node: &Arc<Node>| Change {
                node: Arc::clone(node),
                spec: spec.clone(),
                backing: Below::AsItIs,
                file: None,
                group: None,
                way: None,
            };
            let bounds = Bounds { gates, ..Bounds::default() };
            runtime::block_on(daemon.change_within(bounds, vec![change(&top), change(&node)])).unwrap()
        };
        let request = node.enter().now_or_never().expect("the gate is open");
        let refused = change(Duration::from_millis(20)).unwrap_err();
        assert!(matches!(&refused, DaemonError::Undrained { nodes, .. } if nodes == "'file'"), "{refused}");
        for node in [&top, &node] {
            assert!(node.enter().now_or_never().is_some(), "the gates are open again");
            assert_eq!(node.options().detect_zeroes, DetectZeroes::Off, "nothing has changed");
        }
        drop(request);
        change(Duration::from_secs(20)).unwrap();
        assert_eq!(node.options().detect_zeroes, DetectZeroes::On);
    }

    #[test]
    fn who_goes_to_a_file_past_its_node_is_quiet_while_that_goes_another_way() {
        let folder = tempfile::tempdir().unwrap();
        let (daemon, file) = with_window(folder.path());
        let quiet = |spec: NodeSpec| {
            let change = daemon.plan_change(&spec, &daemon.nodes()).unwrap();
            let nodes = daemon.to_be_quiet(&[change]);
            nodes.iter().map(|node| node.name().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(quiet(direct(&file, true)), ["top", "file"]);
        assert_eq!(quiet(direct(&file, false)), ["file"]);
    }

    #[test]
    fn guests_that_write_while_the_page_cache_comes_and_goes_lose_nothing() {
        const RECORD: usize = 700;
        const RECORDS: usize = 1400;
        let folder = tempfile::tempdir().unwrap();
        let (daemon, file) = with_window(folder.path());
        let storage = daemon.nodes().into_iter().find_map(|entry| entry.file).unwrap();
        let (is_over, written) = (AtomicBool::new(false), AtomicU64::new(0));
        let byte = |record: usize, round: usize| u8::try_from((record + round) % 251 + 1).unwrap();
        let rounds = std::thread::scope(|scope| {
            // Neighbours share sectors.
            let guests = [0, 1].map(|guest| {
                let (daemon, is_over, written) = (&daemon, &is_over, &written);
                scope.spawn(move || {
                    let node = daemon.node("top").unwrap();
                    let write = async {
                        let mut round = 0;
                        while !is_over.load(Ordering::Relaxed) {
                            round += 1;
                            for record in (guest..RECORDS).step_by(2) {
                                let data = vec![byte(record, round); RECORD].into();
                                let at = heliostat_block::convert::u64_from(record * RECORD);
                                node.enter().await.write(at, data, Durability::Cached).await.unwrap();
                                written.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        round
                    };
                    runtime::block_on(write).unwrap()
                })
            });
            for step in 0..20 {
                daemon.reopen_nodes(&[direct(&file, step % 2 == 0)]).unwrap();
                let entry = daemon.nodes().into_iter().find(|entry| entry.file.is_some()).unwrap();
                assert_eq!(entry.cache.direct, step % 2 == 0);
                let seen = written.load(Ordering::Relaxed);
                while written.load(Ordering::Relaxed) < seen + 100 {
                    std::thread::yield_now();
                }
            }
            is_over.store(true, Ordering::Relaxed);
            guests.map(|guest| guest.join().unwrap())
        });
        assert!(!storage.is_direct());
        daemon.shutdown().unwrap();
        let bytes = std::fs::read(folder.path().join("disk")).unwrap();
        for (record, found) in bytes.chunks(RECORD).take(RECORDS).enumerate() {
            assert!(found.iter().all(|found| *found == byte(record, rounds[record % 2])), "record {record}");
        }
    }

    fn throttle(name: &str, below: &str) -> NodeSpec {
        let file = Child::Named(below.to_owned());
        NodeSpec::new(Some(name.to_owned()), DriverSpec::Throttle { group: "g".to_owned(), file })
    }

    /// Files `q1` and `q2`, with throttles `t1` and `t2` over them.
    fn with_throttles(folder: &std::path::Path) -> Arc<Daemon> {
        let daemon = Daemon::new();
        daemon.add_throttle_group("g", heliostat_block::throttle::Limits::default()).unwrap();
        for number in [1, 2] {
            let path = folder.join(format!("q{number}"));
            std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
            daemon.add_node(&NodeSpec::file(&format!("q{number}"), path)).unwrap();
            daemon.add_node(&throttle(&format!("t{number}"), &format!("q{number}"))).unwrap();
        }
        daemon
    }

    #[test]
    fn two_that_would_stand_on_each_other_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_throttles(folder.path());
        let refused = daemon.reopen_nodes(&[throttle("t1", "t2"), throttle("t2", "t1")]).unwrap_err();
        assert!(refused.to_string().contains("would create a cycle"), "{refused}");
    }

    #[test]
    fn what_is_above_knows_the_file_that_it_has_come_to() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_throttles(folder.path());
        let file = Child::Named("t1".to_owned());
        let raw = DriverSpec::Raw { file, offset: None, size: None, is_guess: false };
        daemon.add_node(&NodeSpec::new(Some("above".to_owned()), raw)).unwrap();
        daemon.reopen_nodes(&[throttle("t1", "q2"), throttle("t2", "q1")]).unwrap();
        let entries = daemon.nodes();
        let path = |name: &str| {
            entries.iter().find(|entry| entry.node.name().as_str() == name).unwrap().path.clone()
        };
        // An overlay of it would name another disk in its header.
        assert_eq!(path("above"), folder.path().join("q2"));
        assert_eq!(path("t2"), folder.path().join("q1"));
    }

    #[test]
    fn no_writer_comes_beside_a_reader_that_the_same_order_makes() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = with_throttles(folder.path());
        let reader = |read_only| {
            let file = Child::Named("q2".to_owned());
            let raw = DriverSpec::Raw { file, offset: None, size: None, is_guess: false };
            NodeSpec { read_only, ..NodeSpec::new(Some("reader".to_owned()), raw) }
        };
        daemon.remove_node("t2").unwrap();
        daemon.add_node(&reader(true)).unwrap();
        let mover = NodeSpec { read_only: true, ..throttle("t1", "q2") };
        let refused = daemon.reopen_nodes(&[mover.clone(), reader(false)]);
        assert!(matches!(refused, Err(DaemonError::NodeInUse(_))), "{refused:?}");
        daemon.reopen_nodes(&[mover]).unwrap();
    }
}
