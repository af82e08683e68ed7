//! Starting a mirror: everything is checked before anything is attached, everything is attached before the
//! job is announced, and the job is announced before it does anything.

use std::sync::{Arc, mpsc};

use heliostat_block::dirty_bitmap::DirtyBitmap;
use heliostat_block::graph::{GraphError, Place, Role};
use heliostat_block::job::mirror::Mirror;
use heliostat_block::job::options::MirrorOptions;
use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{CopyMode, Job, JobEvent, JobOptions, JobStatus, OnError};
use heliostat_block::limits::{BUF_SIZE_DEFAULT, GRANULARITY_DEFAULT, GRANULARITY_MAX, GRANULARITY_MIN};
use heliostat_block::name::{NodeName, is_wellformed_id};
use heliostat_block::node::{DetectZeroes, Node};
use heliostat_host::runtime::Thread;

use super::events::Happening;
use super::{Daemon, DaemonError, JobEntry};

/// What a mirror is to be (MIRROR.md section 2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorSpec {
    /// The job's id.
    pub job_id: String,
    /// The node to mirror.
    pub source: String,
    /// The node to mirror it to.
    pub target: String,
    /// The node whose place the target takes; only the source itself.
    pub replaces: Option<String>,
    /// A name that is kept free for QEMU's clients: there is no filter node here.
    pub filter_node_name: Option<String>,
    /// What the first pass copies.
    pub sync: SyncMode,
    /// Bytes a second; 0 is no limit. Negative is refused as QEMU refuses it.
    pub speed: i64,
    /// Bytes a dirty bit; `None` or 0 is the default.
    pub granularity: Option<u32>,
    /// Bytes of copies in flight; `None` or 0 is the default.
    pub buf_size: Option<u64>,
    /// What to do when the source cannot be read.
    pub on_source_error: OnError,
    /// What to do when the target cannot be written.
    pub on_target_error: OnError,
    /// What happens to clients' writes meanwhile.
    pub copy_mode: CopyMode,
    /// Zeroes may become holes on the target.
    pub unmap: bool,
    /// The target is known to read as zero all over.
    pub target_is_zero: bool,
    /// Data that is all zero becomes a hole, or is written as zeroes, on the target.
    pub detect_zeroes: bool,
    /// Whether it ends by itself when it may.
    pub auto_finalize: bool,
    /// Whether it is forgotten by itself when it has ended.
    pub auto_dismiss: bool,
}

impl MirrorSpec {
    /// A full mirror of `source` to `target` with nothing else said.
    #[must_use]
    pub fn new(job_id: &str, source: &str, target: &str) -> Self {
        let options = MirrorOptions::default();
        let job = JobOptions::default();
        Self {
            job_id: job_id.to_owned(),
            source: source.to_owned(),
            target: target.to_owned(),
            replaces: None,
            filter_node_name: None,
            sync: options.sync,
            speed: 0,
            granularity: None,
            buf_size: None,
            on_source_error: options.on_source_error,
            on_target_error: options.on_target_error,
            copy_mode: job.copy_mode,
            unmap: options.unmap,
            target_is_zero: options.target_is_zero,
            detect_zeroes: options.detect_zeroes,
            auto_finalize: job.auto_finalize,
            auto_dismiss: job.auto_dismiss,
        }
    }

    fn job_options(&self) -> JobOptions {
        JobOptions {
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            speed: u64::try_from(self.speed).unwrap_or(0),
            copy_mode: self.copy_mode,
        }
    }

    fn options(&self, target: &Node) -> MirrorOptions {
        let granularity = self.granularity.filter(|bytes| *bytes > 0).unwrap_or(GRANULARITY_DEFAULT);
        MirrorOptions {
            sync: self.sync,
            granularity,
            buf_size: self.buf_size.filter(|bytes| *bytes > 0).unwrap_or(BUF_SIZE_DEFAULT),
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
            unmap: self.unmap,
            target_is_zero: self.target_is_zero,
            detect_zeroes: self.detect_zeroes || target.options().detect_zeroes == DetectZeroes::Unmap,
            ..MirrorOptions::default()
        }
    }
}

/// What the job's thread is given when everything is ready.
struct Start {
    job: Arc<Job>,
    source: Arc<Place>,
    target: Arc<Place>,
    options: MirrorOptions,
}

/// How a job's thread is given its work, how it says that it hears the source's writes, and the thread.
type JobThread = (mpsc::Sender<Start>, mpsc::Receiver<()>, Thread<()>);

impl Daemon {
    /// Starts a mirror. When it returns, the job has said that it was created and is running.
    ///
    /// # Errors
    /// [`DaemonError`] for each argument that cannot be used, in the order in which QEMU says them.
    pub fn start_mirror(&self, spec: &MirrorSpec) -> Result<Arc<Job>, DaemonError> {
        let _change = self.begin_change()?;
        check_granularity(spec.granularity)?;
        let source = self.node(&spec.source)?;
        let target = self.node(&spec.target)?;
        self.check_source(&source)?;
        self.check_target(&source, &target)?;
        self.check_names(spec, &source)?;
        if !is_wellformed_id(&spec.job_id) {
            return Err(DaemonError::JobId(spec.job_id.clone()));
        }
        self.check_new_job(&spec.job_id)?;
        let options = spec.options(&target);
        // The job makes its own; this one shows that there is memory for it.
        DirtyBitmap::new(source.size(), options.granularity).map_err(DaemonError::NoBitmap)?;
        let attached = self.attach(spec, &source, &target);
        let (source_place, target_place) = attached.inspect_err(|_| self.say_stillborn(&spec.job_id))?;
        let (sender, listening, thread) = self.make_thread(&spec.job_id)?;
        let job = Job::start(spec.job_id.clone(), spec.job_options(), self.job_observer());
        let entry = JobEntry {
            job: Arc::clone(&job),
            source: source.name().to_string(),
            target: target.name().to_string(),
        };
        self.keep_job(entry, thread);
        let start = Start { job: Arc::clone(&job), source: source_place, target: target_place, options };
        sender.send(start).expect("the job's thread waits for this");
        // From here on every write is heard: with `sync: none` the reply promises no less.
        listening.recv().expect("the job's thread says this before anything else");
        Ok(job)
    }

    /// Makes the thread before the job, because a job that has been announced must run.
    fn make_thread(&self, id: &str) -> Result<JobThread, DaemonError> {
        let (sender, receiver) = mpsc::channel::<Start>();
        let (listens, listening) = mpsc::channel();
        let lanes = self.lanes.lanes();
        let (graph, clock) = (Arc::clone(&self.graph), Arc::clone(&self.clock));
        let body = move || async move {
            // Blocks the thread, which has nothing else to do. Ends without a job where one was refused.
            let Ok(start) = receiver.recv() else { return };
            let Start { job, source, target, options } = start;
            let mirror = Mirror::new(job, graph, source, target, options, clock).with_lanes(lanes);
            // Nobody left to hear it is no reason not to run.
            let _ = listens.send(());
            mirror.run().await;
        };
        let thread = Thread::spawn(&format!("mirror-{id}"), body)
            .map_err(|error| DaemonError::Thread { job: id.to_owned(), error })?;
        Ok((sender, listening, thread))
    }

    fn check_source(&self, source: &Arc<Node>) -> Result<(), DaemonError> {
        for role in self.graph.roles(source) {
            match role {
                Role::Child { .. } | Role::MirrorSource { .. } => return Err(DaemonError::NotRoot),
                Role::MirrorTarget { .. } => return Err(DaemonError::NodeBusy(source.name().clone())),
                Role::Export { .. } => {}
            }
        }
        Ok(())
    }

    fn check_target(&self, source: &Arc<Node>, target: &Arc<Node>) -> Result<(), DaemonError> {
        if Arc::ptr_eq(source, target) {
            return Err(DaemonError::MirrorIntoItself);
        }
        let is_a_jobs = |role: &Role| matches!(role, Role::MirrorSource { .. } | Role::MirrorTarget { .. });
        if self.graph.roles(target).iter().any(is_a_jobs) {
            return Err(DaemonError::NodeBusy(target.name().clone()));
        }
        Ok(())
    }

    fn check_names(&self, spec: &MirrorSpec, source: &Arc<Node>) -> Result<(), DaemonError> {
        if let Some(replaces) = &spec.replaces {
            let node =
                self.graph.node(replaces).map_err(|_| DaemonError::NodeNameNotFound(replaces.clone()))?;
            if !Arc::ptr_eq(&node, source) {
                return Err(DaemonError::CannotReplace {
                    replaces: node.name().clone(),
                    source_node: source.name().clone(),
                });
            }
        }
        if let Some(filter) = &spec.filter_node_name {
            let name = NodeName::new(filter)?;
            if self.graph.node(name.as_str()).is_ok() {
                return Err(DaemonError::NodeExists(name.to_string()));
            }
        }
        Ok(())
    }

    fn attach(
        &self,
        spec: &MirrorSpec,
        source: &Arc<Node>,
        target: &Arc<Node>,
    ) -> Result<(Arc<Place>, Arc<Place>), DaemonError> {
        if spec.speed < 0 {
            return Err(DaemonError::Speed);
        }
        if target.options().read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        let job = || spec.job_id.clone();
        let in_use = |error| match error {
            GraphError::InUse { node, role } => conflict(node, &role),
            GraphError::NotFound(name) | GraphError::Duplicate(name) => DaemonError::NodeNotFound(name),
        };
        let target = self.graph.attach(target, Role::MirrorTarget { job: job() }).map_err(in_use)?;
        let source = self.graph.attach(source, Role::MirrorSource { job: job() }).map_err(in_use)?;
        Ok((source, target))
    }

    /// Says what QEMU says of a job that is refused when it had been made already.
    fn say_stillborn(&self, id: &str) {
        for status in [JobStatus::Created, JobStatus::Null] {
            self.events.say(Happening::Job {
                id: id.to_owned(),
                event: JobEvent::Status(status),
                offset: 0,
                len: 0,
                speed: 0,
            });
        }
    }
}

fn check_granularity(granularity: Option<u32>) -> Result<(), DaemonError> {
    match granularity {
        None | Some(0) => Ok(()),
        Some(bytes) if !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&bytes) => {
            Err(DaemonError::GranularityRange)
        }
        Some(bytes) if !bytes.is_power_of_two() => Err(DaemonError::GranularityPower),
        Some(_) => Ok(()),
    }
}

fn conflict(node: NodeName, present: &Role) -> DaemonError {
    let user = match present {
        Role::Child { of } => format!("node '{of}'"),
        _ => "an unnamed block device".to_owned(),
    };
    DaemonError::PermissionConflict { node, user, other: "an unnamed block device".to_owned() }
}
