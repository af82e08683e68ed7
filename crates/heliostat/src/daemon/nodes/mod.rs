//! The nodes of a daemon as an operator made them: opened, listed, removed.
//!
//! What images need beyond that stands in [`qcow2`].
//!
//! A node whose child it made shares the child's storage: there is one open file, one lock, one path for the
//! bytes. The child is a node too, so that it can be named and seen, and has a place that keeps it.

mod below;
mod entry;
mod fault_config;
mod filters;
mod nbd;
mod nbd_name;
mod qcow2;
mod siblings;
mod spec;
mod target;

use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{Either, select};
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::graph::{Claims, Place, Role};
use heliostat_block::name::NodeName;
use heliostat_block::node::{DetectZeroes, Discard, Node};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Storage;
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::pinned::Identity;
use heliostat_host::runtime;

use below::window;

use super::open::open_file;
use super::{Daemon, DaemonError};

pub use entry::NodeEntry;
pub use fault_config::errno;
pub use filters::{FaultLimits, FaultSpec, FilterEntry, NullSpec};
pub use nbd::{NbdClientSpec, NbdEntry, NbdServerAt};
pub use nbd_name::{NamedExport, is_nbd, parse as nbd_name};
pub use spec::{
    BackingSpec, CacheUse, Child, DriverSpec, FileSpec, NodeSpec, Qcow2Spec, Sharing, TableCache,
};
pub use target::Beneath;
pub(super) use target::{Named, Wanted};

/// The most nodes in one daemon: a mirror of an image to another takes four, and there may be
/// [`heliostat_block::limits::JOBS_MAX`] of those; and chains. What there are descriptors for is the host's to say.
pub(super) const NODES_MAX: usize = 4096;

/// How long a server may take to make everything durable at the end, or to take what an image leaves in order: as
/// long as other flushes may that somebody waits for.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// The most nodes on top of each other in one order: more than any chain that makes sense, far less than what
/// would exhaust a stack.
const DEPTH_MAX: usize = 32;

/// The largest disk: whole sectors, as many as the host's file offsets can count.
const SIZE_MAX: u64 = (1 << 63) - 512;

/// The nodes, oldest first.
#[derive(Default)]
pub(super) struct Nodes {
    list: Vec<Record>,
}

struct Record {
    below: Below,
    /// Keep the nodes below.
    places: Vec<Arc<Place>>,
    /// Made by an operator, who removes it; else made for the node above, with which it goes.
    is_owned: bool,
}

/// What is needed of a node to put another on top of it.
#[derive(Clone)]
struct Below {
    entry: NodeEntry,
    /// Where in its storage the node starts.
    start: u64,
    /// Which file its storage is.
    identity: Option<Identity>,
}

/// What is known on the way down, while nodes are made.
#[derive(Clone, Copy)]
struct Making {
    /// How many more may be made below.
    depth: usize,
    is_owned: bool,
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
        let made = self.make_node(spec, Making { depth: DEPTH_MAX, is_owned: true });
        if made.is_err() {
            // What was made below it goes. Nothing was written to it.
            let _ = self.drop_unused_from(there);
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
        // Who takes a disk away does not wait for a server that may never come back.
        if node.out_of_reach().is_some() {
            node.give_up();
        }
        // As closing a file does: an error has nobody to go to, the operator was told at each flush.
        let _ = flush(std::slice::from_ref(&node));
        if let Some(record) = self.forget(name) {
            let _ = record.close();
        }
        self.drop_orphans();
        Ok(())
    }

    /// The nodes, newest first, a node before the one below it.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeEntry> {
        self.lock_nodes().list.iter().rev().map(|record| record.below.entry.clone()).collect()
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
            Some(Role::Backing { of }) => {
                return Err(DaemonError::NodeIsBacking { node: name(), of: of.clone() });
            }
            Some(_) => return Err(DaemonError::NodeInUse(name())),
            None => {}
        }
        if !self.lock_nodes().find(node.name().as_str()).is_some_and(|record| record.is_owned) {
            return Err(DaemonError::NodeNotOwned(name()));
        }
        if roles.is_empty() { Ok(()) } else { Err(DaemonError::NodeIsChild(name())) }
    }

    fn make_node(&self, spec: &NodeSpec, making: Making) -> Result<Below, DaemonError> {
        let name = self.check_new(spec, making)?;
        match &spec.driver {
            DriverSpec::File(file) => {
                self.make_file(name, spec, making, open_file(file, spec, "file")?, &file.path)
            }
            DriverSpec::HostDevice(file) => {
                self.make_file(name, spec, making, open_file(file, spec, "host_device")?, &file.path)
            }
            DriverSpec::Nbd(nbd) => self.make_nbd(name, spec, nbd, making),
            DriverSpec::NullCo { size, read_zeroes } => {
                let (driver, latency) = ("null-co", Duration::ZERO);
                let null = NullSpec { driver, size: Some(*size), read_zeroes: *read_zeroes, latency };
                self.make_null(name, spec, &null, making)
            }
            DriverSpec::Null(null) => self.make_null(name, spec, null, making),
            DriverSpec::Faults(faults) => self.make_faults(name, spec, faults, making),
            DriverSpec::Throttle { group, file } => self.make_throttle(name, spec, group, file, making),
            DriverSpec::CopyOnRead { file, bottom } => {
                self.make_copy_on_read(name, spec, file, bottom.as_deref(), making)
            }
            DriverSpec::Preallocate { file, ahead } => self.make_ahead(name, spec, file, *ahead, making),
            DriverSpec::Raw { file, offset, size, is_guess } => {
                let below = self.child(file, making)?;
                let window_start = offset.unwrap_or(0);
                let (start, raw) = window(&below, window_start, *size)?;
                let shown = ByteRange::from_bounds(start, start + raw.size());
                self.check_heard(&below, false, spec.read_only)?;
                let place = self.attach_child(&below, &name, shown, spec.read_only)?;
                let raw = if *is_guess { raw.guarded() } else { raw };
                // It writes past the node below, which would not refuse.
                let read_only = spec.read_only || below.entry.node.options().read_only;
                let node = self.node_of(name, Driver::Raw(raw), &NodeSpec { read_only, ..spec.clone() });
                let path = below.entry.path.clone();
                let entry = NodeEntry {
                    storage: Some(below.shared()),
                    child: Some(below.entry.node.name().clone()),
                    is_fixed: size.is_some(),
                    is_bounded: size.is_some() || below.entry.is_bounded,
                    is_window: start > 0,
                    window_start,
                    offset_is_said: offset.is_some(),
                    ..NodeEntry::new(node, "raw", path, spec.cache)
                };
                self.keep(Below { entry, start, identity: below.identity }, vec![place], making)
            }
            DriverSpec::Qcow2(image) => self.make_image(name, spec, image, making, None),
        }
    }

    /// Checks what can be known of a new node without looking below it. Answers its name.
    fn check_new(&self, spec: &NodeSpec, making: Making) -> Result<NodeName, DaemonError> {
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
        if making.depth == 0 || self.lock_nodes().list.len() >= NODES_MAX {
            return Err(DaemonError::TooMany { what: "nodes", limit: NODES_MAX });
        }
        Ok(name)
    }

    fn make_file(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        making: Making,
        file: FileStorage,
        path: &Path,
    ) -> Result<Below, DaemonError> {
        let identity = file.identity().ok();
        let driver = if file.is_device() { "host_device" } else { "file" };
        let file = Arc::new(file);
        let storage: Arc<dyn Storage> = Arc::<FileStorage>::clone(&file);
        let node = self.node_of(name, Driver::Raw(Raw::whole(Arc::clone(&storage))), spec);
        let entry = NodeEntry::new(node, driver, path.to_owned(), spec.cache);
        let entry = NodeEntry { storage: Some(storage), file: Some(file), ..entry };
        self.keep(Below { entry, start: 0, identity }, Vec::new(), making)
    }

    fn node_of(&self, name: NodeName, driver: Driver, spec: &NodeSpec) -> Arc<Node> {
        Node::new(name, driver, spec.options(), Arc::clone(&self.clock))
    }

    fn child(&self, child: &Child, making: Making) -> Result<Below, DaemonError> {
        match child {
            Child::Named(name) => self.below(name),
            Child::New(spec) => self.make_node(spec, making.below()),
        }
    }

    fn below(&self, name: &str) -> Result<Below, DaemonError> {
        let nodes = self.lock_nodes();
        let record = nodes.find(name).ok_or_else(|| DaemonError::NodeNotFound(name.to_owned()))?;
        Ok(record.below.clone())
    }

    /// Puts `of`, which shows the part `shown` of its storage, on top of `child`.
    ///
    /// What a node above another writes passes the lower one by, and the other way round. So no two nodes may
    /// see each other's bytes where one of them may be written: a bitmap on the one would miss the other's writes.
    fn attach_child(
        &self,
        child: &Below,
        of: &NodeName,
        shown: ByteRange,
        read_only: bool,
    ) -> Result<Arc<Place>, DaemonError> {
        self.attach_claiming(child, of, shown, read_only, Claims::default())
    }

    fn attach_claiming(
        &self,
        child: &Below,
        of: &NodeName,
        shown: ByteRange,
        read_only: bool,
        claims: Claims,
    ) -> Result<Arc<Place>, DaemonError> {
        let child = &child.entry.node;
        let in_use = || DaemonError::NodeInUse(child.name().clone());
        let is_bystander =
            |role: &Role| matches!(role, Role::Child { .. } | Role::Export { writable: false, .. });
        if !self.graph.roles(child).iter().all(is_bystander) {
            return Err(in_use());
        }
        if self.overlaps_sibling(child, of, shown, read_only) || self.has_unlisted_user(child) {
            return Err(in_use());
        }
        let role = Role::Child { of: of.clone(), claims };
        self.graph
            .attach(child, role)
            .map_err(|_| super::conflict::claimed(child.name(), of, claims).unwrap_or_else(in_use))
    }

    fn keep(&self, below: Below, places: Vec<Arc<Place>>, making: Making) -> Result<Below, DaemonError> {
        let at = self.lock_nodes().list.len();
        self.keep_at(at, below, places, making)
    }

    /// Keeps a node as if it had come when there were `at` of them.
    fn keep_at(
        &self,
        at: usize,
        below: Below,
        places: Vec<Arc<Place>>,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let node = &below.entry.node;
        self.graph.add(Arc::clone(node)).map_err(|_| DaemonError::NodeExists(node.name().to_string()))?;
        let record = Record { below: below.clone(), places, is_owned: making.is_owned };
        self.lock_nodes().list.insert(at, record);
        Ok(below)
    }
    /// Takes a node out; closing its file is the caller's, without a lock.
    fn forget(&self, name: &str) -> Option<Record> {
        self.graph.remove(name).ok()?;
        let mut nodes = self.lock_nodes();
        let index = nodes.list.iter().position(|record| record.below.entry.node.name().as_str() == name)?;
        Some(nodes.list.remove(index))
    }

    /// Closes the nodes that came last and that nobody uses: all but the first `count`.
    fn drop_unused_from(&self, count: usize) -> Result<(), String> {
        self.drop_each(|daemon, list| {
            let newest_first = list.iter().skip(count).rev();
            newest_first.map(Record::node).find(|node| daemon.graph.roles(node).is_empty()).cloned()
        })
    }

    /// Removes nodes that were made for others and that nobody uses any more.
    pub(super) fn drop_orphans(&self) {
        // As in `remove_node`.
        let _ = self.drop_each(|daemon, list| {
            let made_for_others = list.iter().filter(|record| !record.is_owned);
            made_for_others.map(Record::node).find(|node| daemon.graph.roles(node).is_empty()).cloned()
        });
    }

    /// The same, for who is not in the middle of a change.
    pub(super) fn drop_orphans_alone(&self) {
        let _change = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        self.drop_orphans();
    }

    /// Says whether two nodes show the same bytes of one file, wherever that was found twice. One that writes what the
    /// other reads would be its own source.
    pub(super) fn are_same_bytes(&self, a: &Arc<Node>, b: &Arc<Node>) -> bool {
        let of = |node: &Arc<Node>| self.below(node.name().as_str()).ok();
        Arc::ptr_eq(a, b)
            || of(a).zip(of(b)).is_some_and(|(a, b)| {
                a.identity.is_some() && a.identity == b.identity && a.shown().overlaps(b.shown())
            })
    }

    /// The files that nodes are in.
    pub(super) fn files_in_use(&self) -> Vec<Identity> {
        self.lock_nodes().list.iter().filter_map(|record| record.below.identity).collect()
    }

    /// Closes every node that nobody uses.
    pub(super) fn close_nodes(&self) -> Result<(), String> {
        self.drop_unused_from(0)
    }

    /// Removes nodes one by one, as long as `next` finds one. The first error is told; the others are closed all the
    /// same.
    fn drop_each(&self, next: impl Fn(&Self, &[Record]) -> Option<Arc<Node>>) -> Result<(), String> {
        let mut closed = Ok(());
        loop {
            let found = next(self, &self.lock_nodes().list);
            match found.and_then(|node| self.forget(node.name().as_str())) {
                Some(record) => closed = closed.and(record.close()),
                None => return closed,
            }
        }
    }

    fn lock_nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nodes {
    fn find(&self, name: &str) -> Option<&Record> {
        self.list.iter().find(|record| record.below.entry.node.name().as_str() == name)
    }
}

impl Record {
    const fn node(&self) -> &Arc<Node> {
        &self.below.entry.node
    }

    /// The nodes through which its bytes go, and what it sees of each. An image's data file is such a node, too.
    fn children(&self) -> impl Iterator<Item = (Arc<Node>, ByteRange)> {
        let places = self.places.iter().filter(|place| matches!(place.role(), Role::Child { .. }));
        places.map(|place| {
            let child = place.node();
            let is_file = self.below.entry.child.as_ref() == Some(child.name());
            let seen = if is_file { self.below.shown() } else { ByteRange::from_bounds(0, u64::MAX) };
            (child, seen)
        })
    }

    /// Leaves its image in order. What is below it is let go of afterwards.
    fn close(self) -> Result<(), String> {
        let node = Arc::clone(self.node());
        if node.image().is_none() && node.preallocate().is_none() {
            return Ok(());
        }
        let close = async { patiently(&node, &RealClock::new(), node.close()).await };
        runtime::block_on(close).map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }
}

impl Making {
    /// What is known for a node that is made for another.
    const fn below(self) -> Self {
        Self { depth: self.depth - 1, is_owned: false }
    }
}

/// Makes durable what has been written to `nodes`.
///
/// # Errors
/// The first; the others are flushed all the same.
pub(super) fn flush(nodes: &[Arc<Node>]) -> Result<(), String> {
    let work = async {
        let mut failed = Ok(());
        let clock = RealClock::new();
        for node in nodes.iter().filter(|node| !node.options().read_only) {
            let flushed = async { node.enter().await.flush().await };
            if let Err(error) = patiently(node, &clock, flushed).await {
                failed = failed.and(Err(error.to_string()));
            }
        }
        failed
    };
    runtime::block_on(work).unwrap_or_else(|error| Err(error.to_string()))
}

/// Does the last work on a node. Where that waits for a server that does not answer, it is given up after a while, and
/// ends with an error then.
async fn patiently<T>(node: &Node, clock: &RealClock, work: impl Future<Output = T>) -> T {
    match select(pin!(work), clock.sleep(ANSWER_MAX)).await {
        Either::Left((done, _)) => done,
        Either::Right(((), work)) => {
            node.give_up();
            work.await
        }
    }
}

#[cfg(test)]
mod tests;
