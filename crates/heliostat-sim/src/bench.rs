//! [`Bench`]: everything that the parts of one run share: time, nodes with their storages, the oracle.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use heliostat_block::graph::Graph;
use heliostat_block::node::Node;

use crate::named::Named;
use crate::oracle::Oracle;
use crate::storage::SimStorage;
use crate::world::{SimClock, World};

/// A node and what is below it.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) node: Arc<Node>,
    pub(crate) storage: Arc<SimStorage>,
}

/// What the parts of a run share.
pub(crate) struct Bench {
    pub(crate) world: Arc<World>,
    pub(crate) clock: Arc<SimClock>,
    pub(crate) graph: Arc<Graph>,
    pub(crate) disks: Vec<Disk>,
    oracle: Mutex<Oracle>,
    /// The disk that guests use.
    current: AtomicUsize,
    /// Changes whenever a guest may begin to wait for something else than its disk, or stop.
    pub(crate) waits: Waits,
    /// Guests' tasks that are not over.
    pub(crate) guests: AtomicU64,
    /// Guests should come to their end.
    pub(crate) last_orders: AtomicBool,
    pub(crate) requests: AtomicU64,
    pub(crate) named: Named,
    /// Until when guests make no request.
    hushed_until: Mutex<Duration>,
    /// Nothing in this run takes long, so whoever waits for long has missed a wake-up and was saved by a timer.
    pub(crate) is_quick: bool,
    seen: Mutex<Seen>,
}

/// What a run, or many, came across: a search that never saw a pivot says little of pivots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Guests' requests.
    pub requests: u64,
    /// Jobs after which guests were on the target.
    pub pivots: u64,
    /// Jobs that left a consistent copy.
    pub copies: u64,
    /// Jobs that were cancelled.
    pub cancelled: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Pivots after which the target stood on the source.
    pub stood: u64,
    /// Jobs that failed because their pivot was refused.
    pub refused: u64,
    /// Errors that jobs met.
    pub errors: u64,
    /// Requests that lanes made to storages.
    pub on_lanes: u64,
    /// Times that a target was cut off from its medium.
    pub cuts: u64,
    /// Times that a target came back as another one, or an older one.
    pub others: u64,
}

impl Seen {
    /// Adds what another run saw.
    pub const fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.pivots += other.pivots;
        self.copies += other.copies;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        self.refused += other.refused;
        self.stood += other.stood;
        self.errors += other.errors;
        self.on_lanes += other.on_lanes;
        self.cuts += other.cuts;
        self.others += other.others;
    }
}

/// In a quick run nothing takes so long; a mirror's own timer, which would hide a missed wake-up, is longer.
pub(crate) const QUICK: Duration = Duration::from_millis(45);

/// What a guest may have to wait for. For the promise that it waits for nothing else.
#[derive(Default)]
pub(crate) struct Waits {
    changes: AtomicU64,
    /// Somebody may close the gate.
    gates: AtomicU64,
    /// Writes go to both sides.
    doubling: AtomicBool,
    deadline: Mutex<Duration>,
}

impl Bench {
    pub(crate) fn new(world: Arc<World>, graph: Arc<Graph>, disks: Vec<Disk>, is_quick: bool) -> Arc<Self> {
        let oracle = Mutex::new(Oracle::new(disks[0].storage.visible()));
        disks[0].storage.forgets_no_more();
        Arc::new(Self {
            clock: Arc::new(SimClock(Arc::clone(&world))),
            world,
            graph,
            disks,
            oracle,
            current: AtomicUsize::new(0),
            waits: Waits::default(),
            guests: AtomicU64::new(0),
            last_orders: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            named: Named::default(),
            hushed_until: Mutex::default(),
            is_quick,
            seen: Mutex::default(),
        })
    }

    pub(crate) fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been come across so far.
    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on guests make no request for `time`.
    pub(crate) fn hush(&self, time: Duration) {
        *self.hushed_until() = self.world.time() + time;
    }

    /// How long guests shall make no request.
    pub(crate) fn hushed(&self) -> Duration {
        self.hushed_until().saturating_sub(self.world.time())
    }

    fn hushed_until(&self) -> MutexGuard<'_, Duration> {
        self.hushed_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the disk that guests use.
    pub(crate) fn current(&self) -> usize {
        self.current.load(Ordering::SeqCst)
    }

    /// Guests use another disk from now on, which holds `image`.
    pub(crate) fn moved(&self, to: usize, image: Vec<u8>) {
        self.disks[self.current()].storage.may_forget();
        self.disks[to].storage.forgets_no_more();
        self.current.store(to, Ordering::SeqCst);
        let mut oracle = self.oracle();
        oracle.settle(image);
        oracle.flushes_failed(self.disks[to].storage.flush_failures());
    }

    pub(crate) fn disk_of(&self, node: &Arc<Node>) -> &Disk {
        self.disks.iter().find(|disk| Arc::ptr_eq(&disk.node, node)).expect("there are no other nodes")
    }
}

impl Waits {
    /// The present number of changes, and the longest that `at_once` requests at once may take that all want
    /// the same blocks and need `step` for each thing they do; `None` where that cannot be said.
    pub(crate) fn longest(&self, at_once: u64, step: Duration) -> (u64, Option<Duration>) {
        let changes = self.changes.load(Ordering::SeqCst);
        if self.gates.load(Ordering::SeqCst) > 0 {
            return (changes, None);
        }
        let mut each = step * 6;
        if self.doubling.load(Ordering::SeqCst) {
            each += *self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        }
        let times = u32::try_from(at_once + 2).unwrap_or(u32::MAX);
        (changes, Some(each * times))
    }

    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    fn change(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Somebody may close the gate from now on.
    pub(crate) fn gate_begins(&self) {
        self.gates.fetch_add(1, Ordering::SeqCst);
        self.change();
    }

    pub(crate) fn gate_ends(&self) {
        self.gates.fetch_sub(1, Ordering::SeqCst);
        self.change();
    }

    /// Writes may go to both sides from now on.
    pub(crate) fn doubling_begins(&self, deadline: Duration) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
        self.doubling.store(true, Ordering::SeqCst);
        self.change();
    }

    pub(crate) fn doubling_ends(&self) {
        self.doubling.store(false, Ordering::SeqCst);
        self.change();
    }
}
