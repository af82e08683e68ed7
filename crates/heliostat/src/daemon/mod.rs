//! [`Daemon`]: the nodes, exports and jobs of one process, and everything that an operator can do to them.
//!
//! QMP and the command line both drive it, so that neither can do what the other cannot. It checks, opens,
//! attaches and starts; it never touches image bytes but to flush, and knows no wire format. Its calls block
//! the thread that makes them: they belong to control threads, not to the data plane.

mod bitmaps;
mod conflict;
mod create;
mod drive_mirror;
mod error;
mod events;
mod export_bitmaps;
mod exports;
mod flusher;
mod flushing;
mod gate;
mod jobs;
mod lanes;
mod mirror;
mod mirror_bitmap;
mod new_file;
mod nodes;
mod objects;
mod open;
mod overlay_file;
mod poke;
mod reopen;
mod resize;
mod shutdown;
mod snapshot;
mod transaction;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use heliostat_block::clock::Clock;
use heliostat_block::graph::Graph;
use heliostat_block::throttle::ThrottleGroup;
use heliostat_host::clock::RealClock;

pub use bitmaps::{BitmapAction, BitmapError, BitmapSpec};
pub use create::ImageSpec;
pub use drive_mirror::{DriveMirrorSpec, TargetMode, TargetName};
pub use error::{DaemonError, strerror};
pub use events::{Event, Happening, Subscription, Watch};
pub use exports::{Export, ExportSpec, NbdAddress, NbdSpec, NbdTls, Removal};
pub use gate::{Gate, Probing, resolved};
pub use jobs::{JobEntry, JobKind};
pub use mirror::MirrorSpec;
pub use mirror_bitmap::{BitmapUse, BitmapUseError};
pub use nodes::{
    BackingSpec, Beneath, CacheUse, Child, DriverSpec, FaultLimits, FaultSpec, FileSpec, FilterEntry,
    NamedExport, NbdClientSpec, NbdEntry, NbdServerAt, NodeEntry, NodeSpec, NullSpec, Qcow2Spec, Sharing,
    TableCache, errno, is_nbd, nbd_name,
};
pub use objects::Object;
pub use poke::{Poke, Poked};
pub use shutdown::ShutdownError;
pub use snapshot::SnapshotSpec;
pub use transaction::{Action, CompletionMode, TransactionError};

use events::Events;
use exports::Serving;
use flusher::Flushers;
use jobs::Jobs;
use lanes::LaneThreads;
use nodes::Nodes;
use objects::Objects;
use poke::Pokes;
use shutdown::Quit;

/// Throttle groups by id.
type ThrottleGroups = BTreeMap<String, Arc<ThrottleGroup>>;

/// The nodes, exports and jobs of one process. Used from any thread.
pub struct Daemon {
    graph: Arc<Graph>,
    /// What images may open.
    gate: Gate,
    clock: Arc<dyn Clock>,
    events: Arc<Events>,
    /// Held by every call that adds or removes a node, an export or a job, so that what it has checked still
    /// holds when it acts. Lock order: this before any other here.
    changes: Mutex<()>,
    /// For what runs on jobs' threads, which keep no daemon alive.
    myself: Weak<Daemon>,
    nodes: Mutex<Nodes>,
    throttle_groups: Mutex<ThrottleGroups>,
    objects: Arc<Objects>,
    pokes: Arc<Pokes>,
    jobs: Mutex<Jobs>,
    lanes: LaneThreads,
    flushers: Flushers,
    serving: Mutex<Serving>,
    /// Set when the end has begun: nothing new is taken on.
    closing: AtomicBool,
    quit: Quit,
}

impl Daemon {
    /// Makes a daemon without nodes, whose images open nothing but what is in their own directories.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_gate(Gate::default())
    }

    /// Makes a daemon without nodes, whose images open other files through `gate`.
    #[must_use]
    pub fn with_gate(gate: Gate) -> Arc<Self> {
        Arc::new_cyclic(|myself| Self {
            myself: Weak::clone(myself),
            gate,
            graph: Arc::default(),
            clock: Arc::new(RealClock::new()),
            events: Arc::default(),
            changes: Mutex::default(),
            nodes: Mutex::default(),
            throttle_groups: Mutex::default(),
            objects: Arc::default(),
            pokes: Arc::default(),
            jobs: Mutex::default(),
            lanes: LaneThreads::default(),
            flushers: Flushers::default(),
            serving: Mutex::default(),
            closing: AtomicBool::new(false),
            quit: Quit::default(),
        })
    }

    /// The nodes and who uses them.
    #[must_use]
    pub const fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// The clock that nodes and jobs go by.
    #[must_use]
    pub const fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Calls `watcher` with everything that happens from now on, in order, on the thread on which it happens,
    /// until the value is dropped. It must not block and must not call the daemon.
    pub fn watch(&self, watcher: impl Fn(&Arc<Event>) + Send + Sync + 'static) -> Watch {
        self.events.watch(Arc::new(watcher))
    }

    /// Keeps what happens from now on until it is taken; the oldest is lost when nobody takes it.
    pub fn subscribe(&self) -> Subscription {
        self.events.subscribe()
    }

    /// Begins a change, alone.
    fn begin_change(&self) -> Result<MutexGuard<'_, ()>, DaemonError> {
        let guard = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        if self.closing.load(Ordering::Acquire) { Err(DaemonError::Closing) } else { Ok(guard) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use heliostat_block::job::{Force, JobEvent, JobStatus, Verb};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn null(name: &str, size: u64) -> NodeSpec {
        NodeSpec::new(Some(name.to_owned()), DriverSpec::NullCo { size, read_zeroes: true })
    }

    fn with_two_nodes() -> Arc<Daemon> {
        let daemon = Daemon::new();
        daemon.add_node(&null("source", 1 << 20)).unwrap();
        daemon.add_node(&null("target", 1 << 20)).unwrap();
        daemon
    }

    /// What jobs say, up to and with their last word.
    fn until_null(events: &Subscription) -> Vec<JobEvent> {
        let mut said = Vec::new();
        while said.last() != Some(&JobEvent::Status(JobStatus::Null)) {
            if let Happening::Job { event, .. } = &events.next(LIMIT).expect("the job ends").what {
                said.push(event.clone());
            }
        }
        said
    }

    #[test]
    fn a_mirror_runs_to_its_end_and_says_so_in_order() {
        let daemon = with_two_nodes();
        let events = daemon.subscribe();
        let job = daemon.start_mirror(&MirrorSpec::new("j", "source", "target")).unwrap();
        loop {
            match &events.next(LIMIT).expect("the job gets ready").what {
                Happening::Job { event: JobEvent::Ready, .. } => break,
                _ => assert_eq!(daemon.jobs().len(), 1),
            }
        }
        job.ask(Verb::Complete).unwrap();
        let status = JobEvent::Status;
        assert_eq!(
            until_null(&events),
            [
                status(JobStatus::Waiting),
                status(JobStatus::Pending),
                JobEvent::Completed(None),
                status(JobStatus::Concluded),
                status(JobStatus::Null)
            ]
        );
        assert!(daemon.jobs().is_empty());
        daemon.remove_node("source").unwrap();
        daemon.remove_node("target").unwrap();
        assert!(daemon.nodes().is_empty());
    }

    #[test]
    fn a_job_that_is_refused_leaves_nothing_attached() {
        let daemon = with_two_nodes();
        let spec = MirrorSpec { speed: -1, ..MirrorSpec::new("j", "source", "target") };
        assert!(matches!(daemon.start_mirror(&spec), Err(DaemonError::Speed)));
        daemon.remove_node("source").unwrap();
        daemon.remove_node("target").unwrap();
    }

    #[test]
    fn a_node_in_use_by_a_job_stays() {
        let daemon = with_two_nodes();
        let events = daemon.subscribe();
        let job = daemon.start_mirror(&MirrorSpec::new("j", "source", "target")).unwrap();
        assert!(matches!(daemon.remove_node("source"), Err(DaemonError::NodeBusy(_))));
        assert!(matches!(daemon.remove_node("target"), Err(DaemonError::NodeInUse(_))));
        job.ask(Verb::Cancel(Force::Hard)).unwrap();
        until_null(&events);
        daemon.remove_node("target").unwrap();
    }

    #[test]
    fn shutting_down_cancels_jobs_and_takes_on_nothing_new() {
        let daemon = with_two_nodes();
        let events = daemon.subscribe();
        daemon.start_mirror(&MirrorSpec::new("j", "source", "target")).unwrap();
        daemon.shutdown().unwrap();
        assert!(until_null(&events).contains(&JobEvent::Cancelled));
        assert!(daemon.nodes().is_empty());
        assert!(matches!(daemon.add_node(&null("late", 1)), Err(DaemonError::Closing)));
    }

    #[test]
    fn nodes_that_may_be_written_never_share_bytes() {
        let daemon = with_two_nodes();
        let raw = |name: &str, offset, size, read_only| {
            let driver = DriverSpec::Raw {
                file: Child::Named("source".to_owned()),
                offset: Some(offset),
                size: Some(size),
                is_guess: false,
            };
            NodeSpec { read_only, ..NodeSpec::new(Some(name.to_owned()), driver) }
        };
        daemon.add_node(&raw("first", 0, 4096, false)).unwrap();
        daemon.add_node(&raw("beside", 4096, 4096, false)).unwrap();
        let in_use = |spec| matches!(daemon.add_node(&spec), Err(DaemonError::NodeInUse(_)));
        assert!(in_use(raw("over", 2048, 4096, false)));
        assert!(in_use(raw("reader", 0, 512, true)));
        daemon.remove_node("first").unwrap();
        daemon.remove_node("beside").unwrap();
        let _job = daemon.start_mirror(&MirrorSpec::new("j", "source", "target")).unwrap();
        assert!(in_use(raw("late", 0, 512, false)), "its writes would pass the mirror by");
    }

    #[test]
    fn a_window_of_a_window_starts_where_the_first_one_does() {
        let daemon = Daemon::new();
        let raw = |name: &str, file, offset, size| {
            NodeSpec::new(
                Some(name.to_owned()),
                DriverSpec::Raw { file, offset: Some(offset), size, is_guess: false },
            )
        };
        let below = Child::New(Box::new(null("disk", 1 << 20)));
        let node = daemon.add_node(&raw("first", below, 65536, None)).unwrap();
        assert_eq!(node.size(), (1 << 20) - 65536);
        let second = raw("second", Child::Named("first".to_owned()), 0, Some(1 << 20));
        assert!(matches!(daemon.add_node(&second), Err(DaemonError::Outside { .. })));
        assert!(matches!(daemon.remove_node("disk"), Err(DaemonError::NodeNotOwned(_))));
        daemon.remove_node("first").unwrap();
        assert!(daemon.nodes().is_empty(), "the child goes with the node that it was made for");
    }
}
