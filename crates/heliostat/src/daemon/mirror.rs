//! Starting a mirror: everything is checked before anything is attached, everything is attached before the
//! job is announced, and the job is announced before it does anything.

use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;

use heliostat_block::graph::{GraphError, Place, Role};
use heliostat_block::job::group::{Group, Member};
use heliostat_block::job::mirror::Mirror;
use heliostat_block::job::options::MirrorOptions;
use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{
    Bitmaps, ByBitmap, CopyMode, Job, JobEvent, JobOptions, JobStatus, Observer, OnError,
};
use heliostat_block::limits::{BUF_SIZE_DEFAULT, GRANULARITY_DEFAULT, GRANULARITY_MAX, GRANULARITY_MIN};
use heliostat_block::name::{NodeName, is_wellformed_id};
use heliostat_block::named_bitmap::{Change, change};
use heliostat_block::node::{DetectZeroes, Node};
use heliostat_host::runtime::{Thread, give_way};

use super::conflict::conflict;
use super::events::Happening;
use super::jobs::JobKind;
use super::mirror_bitmap::unstorable;
use super::{Beneath, BitmapUse, Daemon, DaemonError, Export, JobEntry};

/// What a mirror is to be (MIRROR.md section 2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorSpec {
    /// The job's id.
    pub job_id: String,
    /// The node to mirror.
    pub source: String,
    /// The node to mirror it to.
    pub target: String,
    /// The node whose place the target takes: the source, or one to which it passes its requests on.
    pub replaces: Option<String>,
    /// A name that is kept free for QEMU's clients: there is no filter node here.
    pub filter_node_name: Option<String>,
    /// What the first pass copies.
    pub sync: SyncMode,
    /// What the target stands on when it has taken the source's place.
    pub beneath: Beneath,
    /// The name of a sync mode that is known and not there yet; refused at the moment at which QEMU does.
    pub sync_not_there: Option<&'static str>,
    /// What it has to do with a bitmap of the source.
    pub bitmap: BitmapUse,
    /// Bytes a second; 0 is no limit. Negative is refused as QEMU refuses it.
    pub speed: i64,
    /// Bytes a dirty bit; `None` or 0 is the default.
    pub granularity: Option<u32>,
    /// Bytes of copies in flight; `None` or 0 is the default. Negative is refused as QEMU refuses it.
    pub buf_size: Option<i64>,
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
    /// How long a client's write waits for the target.
    pub target_deadline: Duration,
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
            beneath: Beneath::AsItIs,
            sync_not_there: None,
            bitmap: BitmapUse::default(),
            speed: 0,
            granularity: None,
            buf_size: None,
            on_source_error: options.on_source_error,
            on_target_error: options.on_target_error,
            copy_mode: job.copy_mode,
            unmap: options.unmap,
            target_is_zero: options.target_is_zero,
            detect_zeroes: options.detect_zeroes,
            target_deadline: options.target_deadline,
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

    fn options(&self, granularity: u32, target: &Node) -> MirrorOptions {
        let buf_size = self.buf_size.and_then(|bytes| u64::try_from(bytes).ok());
        MirrorOptions {
            sync: self.sync,
            granularity,
            buf_size: buf_size.filter(|bytes| *bytes > 0).unwrap_or(BUF_SIZE_DEFAULT),
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
            unmap: self.unmap,
            target_is_zero: self.target_is_zero,
            detect_zeroes: self.detect_zeroes || target.options().detect_zeroes == DetectZeroes::Unmap,
            target_deadline: self.target_deadline,
            ..MirrorOptions::default()
        }
    }
}

/// The most granules of a mirror's bitmap: 256 MiB of them, of which a mirror may have three. At the default
/// granularity that is a disk of 128 TiB.
const GRANULES_MAX: u64 = 1 << 31;

/// The finest granularity that a target's clusters make the default: as QEMU has it.
const GRANULARITY_DEFAULT_MIN: u32 = 4 << 10;

/// What the job's thread is given when everything is ready.
struct Start {
    job: Arc<Job>,
    source: Arc<Place>,
    target: Arc<Place>,
    options: MirrorOptions,
    bitmaps: Bitmaps,
    by_bitmap: Option<ByBitmap>,
    beneath: Beneath,
    member: Option<Member>,
    replaced: Vec<Arc<Node>>,
}

/// What a mirror is to be made of, when all arguments have been checked.
pub(super) struct Launch<'a> {
    pub(super) spec: &'a MirrorSpec,
    pub(super) source: Arc<Node>,
    pub(super) target: Arc<Node>,
    pub(super) prepared: Prepared,
    pub(super) observer: Observer,
}

/// What checking the arguments has brought.
pub(super) struct Prepared {
    granularity: u32,
    bitmaps: Bitmaps,
    by_bitmap: Option<ByBitmap>,
    /// The nodes below the source down to the one to be replaced, where that is not the source.
    replaced: Vec<Arc<Node>>,
}

/// A mirror that has all it needs.
pub(super) struct Ready {
    spec: MirrorSpec,
    /// The source and the target.
    nodes: (Arc<Node>, Arc<Node>),
    prepared: Prepared,
    observer: Observer,
    /// Theirs.
    places: (Arc<Place>, Arc<Place>),
    options: MirrorOptions,
    thread: JobThread,
}

impl Ready {
    /// The job's id.
    pub(super) fn id(&self) -> &str {
        &self.spec.job_id
    }

    /// Whether it ends by itself when it may.
    pub(super) const fn auto_finalize(&self) -> bool {
        self.spec.auto_finalize
    }

    pub(super) const fn set_auto_finalize(&mut self, auto_finalize: bool) {
        self.spec.auto_finalize = auto_finalize;
    }
}

/// What is known of a target, which may not be there yet.
pub(super) struct Prospect<'a> {
    pub(super) node: Option<&'a Arc<Node>>,
    pub(super) clusters: Clusters,
}

impl<'a> Prospect<'a> {
    pub(super) fn of(node: &'a Arc<Node>) -> Self {
        Self { node: Some(node), clusters: Clusters::of(node) }
    }
}

/// How a job's thread is given its work, how it says that it hears the source's writes, and the thread.
type JobThread = (mpsc::Sender<Start>, mpsc::Receiver<()>, Thread<()>);

impl Daemon {
    /// Starts a mirror. When it returns, the job has said that it was created and is running.
    ///
    /// # Errors
    /// [`DaemonError`] for each argument that cannot be used, in the order in which QEMU says them.
    pub fn start_mirror(&self, spec: &MirrorSpec) -> Result<Arc<Job>, DaemonError> {
        self.start_mirror_heard_by(spec, self.job_observer())
    }

    fn start_mirror_heard_by(&self, spec: &MirrorSpec, observer: Observer) -> Result<Arc<Job>, DaemonError> {
        let _change = self.begin_change()?;
        let source = self.source_of(&spec.source)?;
        self.check_source(&source)?;
        let target = self.node(&spec.target)?;
        let prepared = self.prepare(spec, &source, &Prospect::of(&target))?;
        self.launch(Launch { spec, source, target, prepared, observer })
    }

    /// The node that is meant where an operator may name an export of it, too.
    ///
    /// # Errors
    /// `NodeNotFound`.
    pub fn source_of(&self, device: &str) -> Result<Arc<Node>, DaemonError> {
        self.node(device).or_else(|error| {
            let exports = self.exports();
            exports.iter().find(|export| export.id == device).map(Export::node).ok_or(error)
        })
    }

    /// Checks all arguments but those that are looked at when the job is there, in the order in which QEMU does.
    /// Nothing has changed then.
    pub(super) fn prepare(
        &self,
        spec: &MirrorSpec,
        source: &Arc<Node>,
        target: &Prospect<'_>,
    ) -> Result<Prepared, DaemonError> {
        let granularity = granularity(spec.granularity, source.size(), &target.clusters)?;
        if let Some(target) = target.node {
            self.check_target(target)?;
        }
        let replaced = self.check_replaces(spec, source)?;
        check_options(spec)?;
        let by_bitmap = self.check_bitmap_use(spec, source)?;
        if target.node.is_some_and(|target| self.are_same_bytes(source, target)) {
            return Err(DaemonError::MirrorIntoItself);
        }
        self.check_filter_name(spec)?;
        if !is_wellformed_id(&spec.job_id) {
            return Err(DaemonError::JobId(spec.job_id.clone()));
        }
        self.check_new_job(&spec.job_id)?;
        // Before the job is announced: what has no memory is refused, and does not fail in the middle.
        let bitmaps = Bitmaps::new(source, granularity)
            .map_err(|error| DaemonError::Bitmaps { job: spec.job_id.clone(), error })?;
        Ok(Prepared { granularity, bitmaps, by_bitmap, replaced })
    }

    /// Starts what has been prepared.
    pub(super) fn launch(&self, launch: Launch<'_>) -> Result<Arc<Job>, DaemonError> {
        Ok(self.go(self.ready(launch)?, None))
    }

    /// Has all that a prepared mirror needs to start. Dropped, nothing of it is left.
    pub(super) fn ready(&self, launch: Launch<'_>) -> Result<Ready, DaemonError> {
        let Launch { spec, source, target, prepared, observer } = launch;
        let attached = self.attach(spec, &source, &target);
        let places = attached.inspect_err(|_| self.say_stillborn(&spec.job_id))?;
        let options = spec.options(prepared.granularity, &target);
        let options = MirrorOptions { stands_on_source: spec.beneath == Beneath::Source, ..options };
        let thread = self.make_thread(&spec.job_id)?;
        Ok(Ready { spec: spec.clone(), nodes: (source, target), prepared, observer, places, options, thread })
    }

    /// Starts what is ready, as one of `group`.
    pub(super) fn go(&self, ready: Ready, group: Option<&Arc<Group>>) -> Arc<Job> {
        let Ready { spec, nodes: (source, target), prepared, observer, places, options, thread } = ready;
        let (sender, listening, thread) = thread;
        let beneath = spec.beneath;
        let job = Job::start(spec.job_id.clone(), spec.job_options(), observer);
        let member = group.map(|group| group.join(&job));
        let entry = JobEntry {
            job: Arc::clone(&job),
            kind: JobKind::Mirror,
            source: source.name().to_string(),
            target: target.name().to_string(),
            filter_node_name: spec.filter_node_name,
            opens_at_end: (beneath == Beneath::FromHeader).then(|| Arc::downgrade(&target)),
        };
        self.keep_job(entry, thread);
        if let Some(bitmap) = &prepared.by_bitmap {
            change(&[(source, Change::Busy(bitmap.name().to_owned(), true))]);
        }
        let start = Start {
            job: Arc::clone(&job),
            source: places.0,
            target: places.1,
            options,
            bitmaps: prepared.bitmaps,
            by_bitmap: prepared.by_bitmap,
            beneath,
            member,
            replaced: prepared.replaced,
        };
        sender.send(start).expect("the job's thread waits for this");
        // From here on every write is heard: with `sync: none` the reply promises no less.
        listening.recv().expect("the job's thread says this before anything else");
        job
    }

    /// Makes the thread before the job, because a job that has been announced must run.
    fn make_thread(&self, id: &str) -> Result<JobThread, DaemonError> {
        let (sender, receiver) = mpsc::channel::<Start>();
        let (listens, listening) = mpsc::channel();
        let lanes = self.lanes.lanes();
        let (graph, clock) = (Arc::clone(&self.graph), Arc::clone(&self.clock));
        let daemon = Weak::clone(&self.myself);
        let body = move || async move {
            // Blocks the thread, which has nothing else to do. Ends without a job where one was refused.
            let Ok(start) = receiver.recv() else { return };
            let Start { job, source, target, options, bitmaps, by_bitmap, beneath, member, replaced } = start;
            give_way();
            let told = Arc::clone(&job);
            let mirror = Mirror::new(job, graph, source, target, options, bitmaps, clock);
            let mirror = mirror.with_lanes(lanes).with_replaced(replaced);
            let heir = Weak::clone(&daemon);
            let mirror = mirror.with_succession(Box::new(move |drained, target| {
                let daemon = heir.upgrade().ok_or("the daemon is gone")?;
                let unstored = unstorable(drained.node(), target);
                daemon.succeed(drained, target, beneath)?;
                daemon.say_unstored(unstored, target);
                Ok(())
            }));
            let mirror = match by_bitmap {
                Some(by_bitmap) => mirror.with_bitmap(by_bitmap),
                None => mirror,
            };
            let mirror = match member {
                Some(member) => mirror.with_group(member),
                None => mirror,
            };
            // Nobody left to hear it is no reason not to run.
            let _ = listens.send(());
            let end = mirror.run_to_end().await;
            // Whoever hears of the end may open the files that were the job's.
            if let Some(daemon) = daemon.upgrade() {
                daemon.let_go().await;
            }
            told.conclude(end);
        };
        let thread = Thread::spawn(&format!("mirror-{id}"), body)
            .map_err(|error| DaemonError::Thread { job: id.to_owned(), error })?;
        Ok((sender, listening, thread))
    }

    pub(super) fn check_source(&self, source: &Arc<Node>) -> Result<(), DaemonError> {
        let is_root = |role: &Role| matches!(role, Role::Export { .. });
        if self.graph.roles(source).iter().all(is_root) { Ok(()) } else { Err(DaemonError::NotRoot) }
    }

    fn check_target(&self, target: &Arc<Node>) -> Result<(), DaemonError> {
        let is_a_jobs = |role: &Role| matches!(role, Role::MirrorSource { .. } | Role::MirrorTarget { .. });
        let roles = self.graph.roles(target);
        if roles.iter().any(is_a_jobs) {
            return Err(DaemonError::NodeBusy(target.name().clone()));
        }
        let overlay = roles.into_iter().find_map(|role| match role {
            Role::Backing { of } => Some(of),
            _ => None,
        });
        match overlay {
            Some(of) => Err(DaemonError::NodeIsBacking { node: target.name().clone(), of }),
            None => Ok(()),
        }
    }

    fn check_filter_name(&self, spec: &MirrorSpec) -> Result<(), DaemonError> {
        let Some(filter) = &spec.filter_node_name else { return Ok(()) };
        let name = NodeName::new(filter)?;
        if self.graph.node(name.as_str()).is_ok() || self.is_filter_name(name.as_str()) {
            return Err(DaemonError::NodeExists(name.to_string()));
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
            GraphError::InUse { node, role } => conflict(node, &role, false),
            GraphError::NotFound(name) | GraphError::Duplicate(name) => DaemonError::NodeNotFound(name),
        };
        let target = self.graph.attach(target, Role::MirrorTarget { job: job() }).map_err(in_use)?;
        let source = self.graph.attach(source, Role::MirrorSource { job: job() }).map_err(in_use)?;
        Ok((source, target))
    }

    /// Says what QEMU says of a job that is refused when it had been made already.
    pub(super) fn say_stillborn(&self, id: &str) {
        for status in [JobStatus::Created, JobStatus::Null] {
            self.events.say(Happening::Job {
                id: id.to_owned(),
                event: JobEvent::Status(status),
                offset: 0,
                len: 0,
                pause: None,
                speed: 0,
            });
        }
    }
}

fn check_options(spec: &MirrorSpec) -> Result<(), DaemonError> {
    if let Some(sync) = spec.sync_not_there {
        return Err(DaemonError::SyncMode(sync));
    }
    if spec.buf_size.is_some_and(|bytes| bytes < 0) {
        return Err(DaemonError::BufSize);
    }
    Ok(())
}

/// How a target allocates.
#[derive(Default)]
pub(super) struct Clusters {
    pub(super) size: Option<u32>,
    /// Bytes that must be written together: where a target's backing is not there, the rest of a cluster would be
    /// filled with zeroes instead of what the backing shows.
    pub(super) whole: Option<u32>,
}

impl Clusters {
    fn of(target: &Node) -> Self {
        let size = target.cluster_size().and_then(|bytes| u32::try_from(bytes).ok());
        Self { size, whole: size.filter(|_| target.lacks_backing()) }
    }
}

/// The granularity for a disk of `size` bytes, given what was asked for.
fn granularity(asked: Option<u32>, size: u64, target: &Clusters) -> Result<u32, DaemonError> {
    let granularity = granularity_alone(asked, size, target)?;
    Ok(granularity.max(target.whole.unwrap_or(0)))
}

fn granularity_alone(asked: Option<u32>, size: u64, target: &Clusters) -> Result<u32, DaemonError> {
    let is_too_fine = |bytes: u32| size / u64::from(bytes) > GRANULES_MAX;
    match asked {
        None | Some(0) => {
            let cluster = target.size.unwrap_or(GRANULARITY_DEFAULT);
            let least = cluster.clamp(GRANULARITY_DEFAULT_MIN, GRANULARITY_DEFAULT);
            let powers = (least.trailing_zeros()..).map(|power| 1_u32 << power);
            let mut allowed = powers.take_while(|bytes| *bytes <= GRANULARITY_MAX);
            allowed.find(|bytes| !is_too_fine(*bytes)).ok_or(DaemonError::TooLarge)
        }
        Some(bytes) if !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&bytes) => {
            Err(DaemonError::GranularityRange)
        }
        Some(bytes) if !bytes.is_power_of_two() => Err(DaemonError::GranularityPower),
        Some(bytes) if is_too_fine(bytes) => Err(DaemonError::GranularityTooFine { bytes, size }),
        Some(bytes) => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use heliostat_block::job::{ErrorAction, Force, Verb};
    use rustix::fs::{MemfdFlags, SealFlags};

    use super::*;
    use crate::daemon::{DriverSpec, NodeSpec};

    const LIMIT: Duration = Duration::from_secs(30);

    /// How often a thread gives way to another that must not do what it is watched for.
    const CHANCES: usize = 20_000;

    fn with_two_nodes() -> Arc<Daemon> {
        let daemon = Daemon::new();
        for name in ["source", "target"] {
            let driver = DriverSpec::NullCo { size: 1 << 20, read_zeroes: true };
            daemon.add_node(&NodeSpec::new(Some(name.to_owned()), driver)).unwrap();
        }
        daemon
    }

    #[test]
    fn who_dismisses_a_job_has_heard_its_last_word_when_that_is_answered() {
        let daemon = with_two_nodes();
        let spec = MirrorSpec { auto_dismiss: false, ..MirrorSpec::new("j", "source", "target") };
        let (concludes, is_concluding) = mpsc::channel();
        let concludes = Mutex::new(concludes);
        let last_word = Arc::new(Mutex::new(None));
        let hears = Arc::clone(&last_word);
        let observer: Observer = Arc::new(move |_, event| match event {
            JobEvent::Status(JobStatus::Concluded) => {
                concludes.lock().unwrap().send(()).unwrap();
                // Takes its time, while the other dismisses it.
                (0..CHANCES).for_each(|_| std::thread::yield_now());
            }
            JobEvent::Status(JobStatus::Null) => {
                *hears.lock().unwrap() = Some(std::thread::current().id());
            }
            _ => {}
        });
        let job = daemon.start_mirror_heard_by(&spec, observer).unwrap();
        job.ask(Verb::Cancel(Force::Hard)).unwrap();
        is_concluding.recv_timeout(LIMIT).unwrap();
        daemon.ask_job(&daemon.job("j").unwrap(), Verb::Dismiss).unwrap();
        assert_eq!(*last_word.lock().unwrap(), Some(std::thread::current().id()));
    }

    #[test]
    fn a_job_speaks_after_all_that_an_older_one_of_its_id_says() {
        let daemon = with_two_nodes();
        let spec = MirrorSpec::new("j", "source", "target");
        let events = daemon.subscribe();
        let newer_speaks = Arc::new(AtomicBool::new(false));
        // The older one takes its time between its end, which frees its id, and its last words.
        let (say, is_overtaken) = (daemon.job_observer(), Arc::clone(&newer_speaks));
        let slowly: Observer = Arc::new(move |job, event| {
            if *event == JobEvent::Status(JobStatus::Concluded) {
                let _ = (0..CHANCES).find(|_| {
                    std::thread::yield_now();
                    is_overtaken.load(Ordering::SeqCst)
                });
            }
            say(job, event);
        });
        let older = daemon.start_mirror_heard_by(&spec, slowly).unwrap();
        older.ask(Verb::Cancel(Force::Hard)).unwrap();
        let next = || match &events.next(LIMIT).expect("something is said").what {
            Happening::Job { event, .. } => event.clone(),
            other => panic!("nobody else says anything: {other:?}"),
        };
        while next() != JobEvent::Cancelled {}
        let say = daemon.job_observer();
        let observer: Observer = Arc::new(move |job, event| {
            newer_speaks.store(true, Ordering::SeqCst);
            say(job, event);
        });
        let _newer = daemon.start_mirror_heard_by(&spec, observer).unwrap();
        let said = [next(), next(), next()];
        assert_eq!(said, [JobStatus::Concluded, JobStatus::Null, JobStatus::Created].map(JobEvent::Status));
    }

    #[test]
    fn who_hears_that_an_error_has_stopped_a_job_can_resume_it_at_once() {
        let daemon = Daemon::new();
        let mut source = tempfile::NamedTempFile::new().unwrap();
        source.write_all(&[7; 4096]).unwrap();
        daemon.add_node(&NodeSpec::file("source", source.path())).unwrap();
        // A file in memory that takes no writes any more once it is sealed, though it was opened for them.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let target = File::from(rustix::fs::memfd_create("target", flags).unwrap());
        target.set_len(4096).unwrap();
        let path = format!("/proc/self/fd/{}", target.as_raw_fd());
        daemon.add_node(&NodeSpec::file("target", path)).unwrap();
        rustix::fs::fcntl_add_seals(&target, SealFlags::WRITE).unwrap();

        let (heard, hear) = mpsc::channel();
        let heard = Mutex::new(heard);
        let observer: Observer = Arc::new(move |job, event| {
            if let JobEvent::Error { action, errno, .. } = event {
                // Nobody listens any more when it is over.
                let _ = heard.lock().unwrap().send((*action, *errno, job.ask(Verb::Resume)));
            }
        });
        let spec = MirrorSpec { on_target_error: OnError::Stop, ..MirrorSpec::new("j", "source", "target") };
        let job = daemon.start_mirror_heard_by(&spec, observer).unwrap();
        for _ in 0..3 {
            let heard = hear.recv_timeout(LIMIT).unwrap();
            assert_eq!(heard, (ErrorAction::Stop, Some(rustix::io::Errno::PERM.raw_os_error()), Ok(())));
        }
        job.ask(Verb::Cancel(Force::Hard)).unwrap();
        daemon.shutdown().unwrap();
    }

    #[test]
    fn the_default_granularity_grows_with_the_disk_so_that_memory_does_not() {
        assert_eq!(granularity(None, 1 << 40, &Clusters::default()).unwrap(), 64 << 10);
        assert_eq!(granularity(None, 64 << 40, &Clusters::default()).unwrap(), 64 << 10);
        assert_eq!(granularity(Some(0), 1 << 50, &Clusters::default()).unwrap(), 512 << 10);
        assert!(matches!(
            granularity(Some(512), 64 << 40, &Clusters::default()),
            Err(DaemonError::GranularityTooFine { .. })
        ));
        assert!(matches!(granularity(None, 1 << 62, &Clusters::default()), Err(DaemonError::TooLarge)));
    }

    #[test]
    fn the_default_granularity_is_the_targets_cluster_within_bounds() {
        let of = |size: u32| Clusters { size: Some(size), whole: None };
        for (cluster, expected) in
            [(512, 4 << 10), (4096, 4 << 10), (16 << 10, 16 << 10), (2 << 20, 64 << 10)]
        {
            assert_eq!(granularity(None, 1 << 30, &of(cluster)).unwrap(), expected, "{cluster}");
            assert_eq!(granularity(Some(512), 1 << 30, &of(cluster)).unwrap(), 512);
        }
        let incomplete = Clusters { size: Some(2 << 20), whole: Some(2 << 20) };
        assert_eq!(granularity(None, 1 << 30, &incomplete).unwrap(), 2 << 20);
        assert_eq!(granularity(Some(512), 1 << 30, &incomplete).unwrap(), 2 << 20);
        assert!(matches!(granularity(Some(511), 1 << 30, &incomplete), Err(DaemonError::GranularityRange)));
    }
}
