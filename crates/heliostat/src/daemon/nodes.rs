//! The nodes of a daemon as an operator made them: opened, listed, removed.
//!
//! A node whose child it made shares the child's storage: there is one open file, one lock, one path for the
//! bytes. The child is a node too, so that it can be named and seen, and has a place that keeps it.

use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};

use heliostat_block::driver::null::{NullStorage, ReadsZero};
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::graph::{Place, Role};
use heliostat_block::name::NodeName;
use heliostat_block::node::{DetectZeroes, Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Storage;
use heliostat_host::runtime;

use super::open::{is_device, open_file};
use super::{Daemon, DaemonError};

/// The most nodes in one daemon. Each holds an open file; a host gives a process 1,024 of them by default.
const NODES_MAX: usize = 512;

/// The most nodes on top of each other in one order: more than any chain that makes sense, far less than what
/// would exhaust a stack.
const DEPTH_MAX: usize = 32;

/// The largest disk: whole sectors, as many as the host's file offsets can count.
const SIZE_MAX: u64 = (1 << 63) - 512;

/// What a node is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its name. A child may go without.
    pub name: Option<String>,
    /// How it keeps its bytes, and where.
    pub driver: DriverSpec,
    /// Writes are refused.
    pub read_only: bool,
    /// Opened for reading only where the host allows no writing.
    pub auto_read_only: bool,
    /// What becomes of space that is no longer needed.
    pub discard: Discard,
    /// What becomes of written data that is all zero.
    pub detect_zeroes: DetectZeroes,
    /// How the host's page cache is used.
    pub cache: CacheUse,
}

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheUse {
    /// It is passed by.
    pub direct: bool,
    /// Flushes do nothing.
    pub no_flush: bool,
}

/// How a node keeps its bytes, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverSpec {
    /// In a regular file.
    File(FileSpec),
    /// In a block device.
    HostDevice(FileSpec),
    /// In a window of another node's bytes.
    Raw {
        /// The node below.
        file: Child,
        /// Where the window starts, in bytes.
        offset: u64,
        /// How long it is in bytes; to the end where nothing is said.
        size: Option<u64>,
    },
    /// Nowhere.
    NullCo {
        /// How long it is in bytes.
        size: u64,
        /// Whether it says that it reads as zero.
        read_zeroes: bool,
    },
}

/// A file or a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSpec {
    /// Where.
    pub path: PathBuf,
    /// What other programs may do with it meanwhile.
    pub sharing: Sharing,
}

/// What other programs may do with a file meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Read it. A writer of ours keeps other writers out, where the file system has locks.
    #[default]
    Locked,
    /// Anything: no locks are taken or looked at.
    Anything,
}

/// A node below another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Child {
    /// One that is there.
    Named(String),
    /// One that is made for it, and goes with it.
    New(Box<NodeSpec>),
}

impl NodeSpec {
    /// A node named `name` in the file or block device at `path`, with nothing else said.
    #[must_use]
    pub fn file(name: &str, path: impl Into<PathBuf>) -> Self {
        let file = FileSpec { path: path.into(), sharing: Sharing::default() };
        let driver =
            if is_device(&file.path) { DriverSpec::HostDevice(file) } else { DriverSpec::File(file) };
        Self::new(Some(name.to_owned()), driver)
    }

    /// A node with nothing said but its driver.
    #[must_use]
    pub const fn new(name: Option<String>, driver: DriverSpec) -> Self {
        Self {
            name,
            driver,
            read_only: false,
            auto_read_only: false,
            discard: Discard::ZeroesOnly,
            detect_zeroes: DetectZeroes::Off,
            cache: CacheUse { direct: false, no_flush: false },
        }
    }

    const fn options(&self) -> NodeOptions {
        NodeOptions { read_only: self.read_only, discard: self.discard, detect_zeroes: self.detect_zeroes }
    }
}

/// A node as an operator made it.
#[derive(Clone)]
pub struct NodeEntry {
    /// The node.
    pub node: Arc<Node>,
    /// QEMU's name of its driver.
    pub driver: &'static str,
    /// The file at the bottom; empty where there is none.
    pub path: PathBuf,
    /// The name of the node below.
    pub child: Option<NodeName>,
    /// How the page cache is used.
    pub cache: CacheUse,
}

/// The nodes, oldest first.
#[derive(Default)]
pub(super) struct Nodes {
    list: Vec<Record>,
}

struct Record {
    entry: NodeEntry,
    storage: Arc<dyn Storage>,
    /// Where in the storage the node starts.
    start: u64,
    /// Keeps the child.
    _child: Option<Arc<Place>>,
    /// Made by an operator, who removes it; else made for the node above, with which it goes.
    is_owned: bool,
}

/// What is needed of a node to put another on top of it.
struct Below {
    storage: Arc<dyn Storage>,
    start: u64,
    entry: NodeEntry,
}

impl Daemon {
    /// Opens a node and all that has to be made below it.
    ///
    /// # Errors
    /// [`DaemonError`] by what is wrong with a name, a file or a window.
    pub fn add_node(&self, spec: &NodeSpec) -> Result<Arc<Node>, DaemonError> {
        let _change = self.begin_change()?;
        if spec.name.is_none() {
            return Err(DaemonError::NodeNameMissing);
        }
        let there = self.lock_nodes().list.len();
        let made = self.make_node(spec, DEPTH_MAX, true);
        if made.is_err() {
            // What was made below it goes, newest first.
            self.drop_newest_until(there);
        }
        Ok(made?.entry.node)
    }

    /// Removes a node that nobody uses, after a flush, and what was made below it.
    ///
    /// # Errors
    /// `NodeNameNotFound`, `NodeInUse`, `NodeBusy`, `NodeNotOwned`.
    pub fn remove_node(&self, name: &str) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        let node = self.graph.node(name).map_err(|_| DaemonError::NodeNameNotFound(name.to_owned()))?;
        self.check_removable(&node)?;
        // As closing a file does: an error has nobody to go to, the operator was told at each flush.
        let _ = flush(std::slice::from_ref(&node));
        drop(self.forget(name));
        self.drop_orphans();
        Ok(())
    }

    /// The nodes, newest first, a node before the one below it.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeEntry> {
        self.lock_nodes().list.iter().rev().map(|record| record.entry.clone()).collect()
    }

    /// The node of that name.
    ///
    /// # Errors
    /// `NodeNotFound`.
    pub fn node(&self, name: &str) -> Result<Arc<Node>, DaemonError> {
        self.graph.node(name).map_err(|_| DaemonError::NodeNotFound(name.to_owned()))
    }

    fn check_removable(&self, node: &Arc<Node>) -> Result<(), DaemonError> {
        let roles = self.graph.roles(node);
        let name = || node.name().clone();
        // QEMU names the user that came last, but for nodes above, of which it speaks only without others.
        match roles.iter().rev().find(|role| !matches!(role, Role::Child { .. })) {
            Some(Role::MirrorSource { .. }) => return Err(DaemonError::NodeBusy(name())),
            Some(_) => return Err(DaemonError::NodeInUse(name())),
            None => {}
        }
        if !self.lock_nodes().find(node.name().as_str()).is_some_and(|record| record.is_owned) {
            return Err(DaemonError::NodeNotOwned(name()));
        }
        if roles.is_empty() { Ok(()) } else { Err(DaemonError::NodeIsChild(name())) }
    }

    fn make_node(&self, spec: &NodeSpec, depth: usize, is_owned: bool) -> Result<Below, DaemonError> {
        if spec.detect_zeroes == DetectZeroes::Unmap && spec.discard != Discard::Unmap {
            return Err(DaemonError::DetectZeroes);
        }
        let name = match &spec.name {
            Some(name) => NodeName::new(name)?,
            None => self.graph.generate_name(),
        };
        if self.graph.node(name.as_str()).is_ok() || self.is_filter_name(name.as_str()) {
            return Err(DaemonError::NodeExists(name.to_string()));
        }
        if depth == 0 || self.lock_nodes().list.len() >= NODES_MAX {
            return Err(DaemonError::TooMany { what: "nodes", limit: NODES_MAX });
        }
        let mut child = None;
        let (storage, driver, path) = match &spec.driver {
            DriverSpec::File(file) => (open_file(file, spec, "file")?, "file", file.path.clone()),
            DriverSpec::HostDevice(file) => {
                (open_file(file, spec, "host_device")?, "host_device", file.path.clone())
            }
            DriverSpec::NullCo { size, .. } if *size > SIZE_MAX => return Err(DaemonError::SizeTooLarge),
            DriverSpec::NullCo { size, read_zeroes } => {
                let reads_zero = if *read_zeroes { ReadsZero::Promised } else { ReadsZero::Unsaid };
                let storage: Arc<dyn Storage> = Arc::new(NullStorage::new(*size, reads_zero));
                (storage, "null-co", PathBuf::from("null-co://"))
            }
            DriverSpec::Raw { file, .. } => {
                let below = match file {
                    Child::Named(name) => self.below(name)?,
                    Child::New(spec) => self.make_node(spec, depth - 1, false)?,
                };
                let path = below.entry.path.clone();
                let storage = Arc::clone(&below.storage);
                child = Some(below);
                (storage, "raw", path)
            }
        };
        let (start, raw) = match (&spec.driver, &child) {
            (DriverSpec::Raw { offset, size, .. }, Some(below)) => window(below, *offset, *size)?,
            _ => (0, Raw::whole(Arc::clone(&storage))),
        };
        let node = Node::new(name, Driver::Raw(raw), spec.options(), Arc::clone(&self.clock));
        let place = match &child {
            Some(below) => Some(self.attach_child(&below.entry.node, &node, start)?),
            None => None,
        };
        let child = child.map(|below| below.entry.node.name().clone());
        let entry = NodeEntry { node, driver, path, child, cache: spec.cache };
        let below = Below { storage: Arc::clone(&storage), start, entry: entry.clone() };
        self.keep(Record { entry, storage, start, _child: place, is_owned })?;
        Ok(below)
    }

    fn below(&self, name: &str) -> Result<Below, DaemonError> {
        let nodes = self.lock_nodes();
        let record = nodes.find(name).ok_or_else(|| DaemonError::NodeNotFound(name.to_owned()))?;
        let storage = Arc::clone(&record.storage);
        Ok(Below { storage, start: record.start, entry: record.entry.clone() })
    }

    /// Puts `of`, which shows the part of its storage that begins at `start`, on top of `child`.
    ///
    /// What a node above another writes passes the lower one by, and the other way round. So no two nodes may
    /// see each other's bytes where one of them may be written: a bitmap on the one would miss the other's writes.
    fn attach_child(&self, child: &Arc<Node>, of: &Arc<Node>, start: u64) -> Result<Arc<Place>, DaemonError> {
        let in_use = || DaemonError::NodeInUse(child.name().clone());
        let is_bystander =
            |role: &Role| matches!(role, Role::Child { .. } | Role::Export { writable: false, .. });
        if !self.graph.roles(child).iter().all(is_bystander) {
            return Err(in_use());
        }
        let shown = ByteRange::from_bounds(start, start + of.size());
        let overlaps = self.lock_nodes().list.iter().any(|other| {
            let is_sibling = other.entry.child.as_ref() == Some(child.name());
            let is_read_only = other.entry.node.options().read_only && of.options().read_only;
            is_sibling && !is_read_only && other.shown().overlaps(shown)
        });
        if overlaps {
            return Err(in_use());
        }
        let role = Role::Child { of: of.name().clone() };
        self.graph.attach(child, role).map_err(|_| in_use())
    }

    fn keep(&self, record: Record) -> Result<(), DaemonError> {
        let node = &record.entry.node;
        self.graph.add(Arc::clone(node)).map_err(|_| DaemonError::NodeExists(node.name().to_string()))?;
        self.lock_nodes().list.push(record);
        Ok(())
    }

    /// Takes a node out; closing its file is the caller's, without a lock.
    fn forget(&self, name: &str) -> Option<Record> {
        self.graph.remove(name).ok()?;
        let mut nodes = self.lock_nodes();
        let index = nodes.list.iter().position(|record| record.entry.node.name().as_str() == name)?;
        Some(nodes.list.remove(index))
    }

    fn drop_newest_until(&self, count: usize) {
        loop {
            let newest = self.lock_nodes().list.get(count..).and_then(<[Record]>::last).map(Record::name);
            match newest.and_then(|name| self.forget(name.as_str())) {
                Some(record) => drop(record),
                None => return,
            }
        }
    }

    /// Removes nodes that were made for others and that nobody uses any more.
    pub(super) fn drop_orphans(&self) {
        loop {
            let orphan = self.lock_nodes().list.iter().find_map(|record| {
                let unused = !record.is_owned && self.graph.roles(&record.entry.node).is_empty();
                unused.then(|| record.name())
            });
            match orphan.and_then(|name| self.forget(name.as_str())) {
                Some(record) => drop(record),
                None => return,
            }
        }
    }

    /// Closes every node that nobody uses.
    pub(super) fn close_nodes(&self) {
        self.drop_newest_until(0);
    }

    fn lock_nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nodes {
    fn find(&self, name: &str) -> Option<&Record> {
        self.list.iter().find(|record| record.entry.node.name().as_str() == name)
    }
}

impl Record {
    fn name(&self) -> NodeName {
        self.entry.node.name().clone()
    }

    /// The part of its storage that it shows.
    fn shown(&self) -> ByteRange {
        ByteRange::from_bounds(self.start, self.start + self.entry.node.size())
    }
}

/// The part of the node below that starts at `offset`, and where that is in their common storage.
fn window(below: &Below, offset: u64, size: Option<u64>) -> Result<(u64, Raw), DaemonError> {
    let there = below.entry.node.size();
    if offset > there {
        return Err(DaemonError::OffsetOutside { offset, there });
    }
    let len = size.unwrap_or_else(|| there.saturating_sub(offset));
    if offset.checked_add(len).is_none_or(|end| end > there) {
        return Err(DaemonError::Outside { offset, size: len, there });
    }
    if size.is_some_and(|size| !size.is_multiple_of(512)) {
        return Err(DaemonError::SizeUnaligned);
    }
    let start = below.start + offset;
    Ok((start, Raw::window(Arc::clone(&below.storage), start, Some(len))?))
}

/// Makes durable what has been written to `nodes`.
///
/// # Errors
/// The first; the others are flushed all the same.
pub(super) fn flush(nodes: &[Arc<Node>]) -> Result<(), String> {
    let work = async {
        let mut failed = Ok(());
        for node in nodes.iter().filter(|node| !node.options().read_only) {
            if let Err(error) = node.enter().await.flush().await {
                failed = failed.and(Err(error.to_string()));
            }
        }
        failed
    };
    runtime::block_on(work).unwrap_or_else(|error| Err(error.to_string()))
}
