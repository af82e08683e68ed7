//! The operator: starts mirrors one after the other, says verbs at random moments, and sees each job to its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heliostat_block::clock::Clock;
use heliostat_block::graph::{NamedBitmaps, Onto, Role};
use heliostat_block::job::mirror::{Mirror, MirrorOptions, Succession};
use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{Bitmaps, CopyMode, Force, Job, JobOptions, JobStatus, Verb};
use heliostat_block::limits::GUEST_QUIET;

use crate::bench::Bench;
use crate::lanes::LaneTasks;
use crate::named::{Named, Wish};
use crate::random::Random;
use crate::watch::{Known, REFUSAL, Watch};
use crate::world::Executor;

/// How a job is to end, when it has been played with for long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    Complete,
    Copy,
    Cancel,
}

/// One job.
#[derive(Clone, Debug)]
pub(crate) struct Errand {
    pub(crate) target: usize,
    pub(crate) job: JobOptions,
    pub(crate) mirror: MirrorOptions,
    pub(crate) impulse: Option<(JobStatus, Verb)>,
    pub(crate) before: Duration,
    /// How many verbs are said at random, and the longest time between two.
    pub(crate) verbs: u64,
    pub(crate) verb_gap: Duration,
    /// How long a job that is ready is left alone.
    pub(crate) linger: Duration,
    /// The longest time between two looks at a job that is to end.
    pub(crate) patience: Duration,
    pub(crate) goal: Goal,
    /// The end is asked only when nothing is left to copy.
    pub(crate) patient: bool,
    /// Guests are quiet when it starts, and for so long after.
    pub(crate) hush: Option<Duration>,
    /// What it has to do with the bitmap, where there is one.
    pub(crate) wish: Option<Wish>,
    /// After the pivot the target stands on the source, where nothing else is settled.
    pub(crate) stands: bool,
    /// The pivot is refused, as where something else minds.
    pub(crate) is_refused: bool,
}

/// Starts jobs and sees to them.
pub(crate) struct Operator {
    pub(crate) bench: Arc<Bench>,
    pub(crate) executor: Executor,
    pub(crate) random: Random,
    pub(crate) errands: Vec<Errand>,
    pub(crate) lanes: Option<LaneTasks>,
    /// When nothing fails any more.
    pub(crate) faults_until: Duration,
}

/// From the moment on at which nothing fails, nothing hangs and no guest writes, a job ends within this time:
/// the longest rest after errors several times over.
const END_WITHIN: Duration = Duration::from_secs(40);

impl Operator {
    pub(crate) async fn run(mut self) {
        for (number, errand) in std::mem::take(&mut self.errands).into_iter().enumerate() {
            self.bench.clock.sleep(errand.before).await;
            if let Some(hush) = errand.hush {
                self.bench.hush(GUEST_QUIET + hush);
                self.bench.clock.sleep(GUEST_QUIET).await;
            }
            self.see_to(number, errand).await;
        }
        self.bench.last_orders.store(true, Ordering::SeqCst);
        if let Some(lanes) = &self.lanes {
            lanes.end();
        }
    }

    async fn see_to(&mut self, number: usize, mut errand: Errand) {
        let source = self.bench.current();
        // The disk that guests have come to use cannot be the target; the one they left can.
        let target = if errand.target == source { 0 } else { errand.target };
        let blank = |bytes: Vec<u8>| bytes.iter().all(|byte| *byte == 0);
        let storage = &self.bench.disks[target].storage;
        errand.mirror.target_is_zero &= blank(storage.durable()) && blank(storage.visible());
        let id = format!("job{number}");
        let roles = (Role::MirrorSource { job: id.clone() }, Role::MirrorTarget { job: id.clone() });
        let graph = &self.bench.graph;
        let (source_node, target_node) = (&self.bench.disks[source].node, &self.bench.disks[target].node);
        let places = (graph.attach(source_node, roles.0), graph.attach(target_node, roles.1));
        let (Ok(at_source), Ok(at_target)) = places else {
            self.bench.world.fail("the graph refuses a mirror of nodes that nobody mirrors");
            return;
        };
        let bitmaps = match Bitmaps::new(source_node, errand.mirror.granularity) {
            Ok(bitmaps) => bitmaps,
            Err(refusal) => {
                self.bench.world.fail(format!("no mirror of a disk as small as this: {refusal}"));
                return;
            }
        };
        let by_bitmap = Named::for_job(&self.bench, target, &mut errand);
        errand.mirror.stands_on_source = errand.stands && errand.mirror.sync == SyncMode::None;
        let known = Known {
            source,
            target,
            sync: errand.mirror.sync,
            on_source_error: errand.mirror.on_source_error,
            on_target_error: errand.mirror.on_target_error,
            since: self.bench.oracle().now(),
            deadline: errand.mirror.target_deadline,
            auto_finalize: errand.job.auto_finalize,
            doubles: errand.job.copy_mode == CopyMode::WriteBlocking,
            impulse: errand.impulse,
            stands: errand.mirror.stands_on_source,
            is_refused: errand.is_refused,
        };
        self.bench.world.trace(|| format!("operator: mirror {known:?} {:?} {:?}", errand.job, errand.mirror));
        if errand.job.copy_mode == CopyMode::WriteBlocking {
            self.bench.waits.doubling_begins(errand.mirror.target_deadline);
        }
        let copies_all = errand.mirror.sync == SyncMode::Full && by_bitmap.is_none();
        self.bench.disks[target].storage.may_become_other(copies_all);
        let watch = Watch::new(Arc::clone(&self.bench), known);
        let hears = Arc::clone(&watch);
        let job = Job::start(id, errand.job, Arc::new(move |job, event| hears.hear(job, event)));
        let clock: Arc<dyn Clock> = Arc::<crate::world::SimClock>::clone(&self.bench.clock);
        let graph = Arc::clone(&self.bench.graph);
        let mut mirror =
            Mirror::new(Arc::clone(&job), graph, at_source, at_target, errand.mirror, bitmaps, clock);
        if let Some(by_bitmap) = by_bitmap {
            mirror = mirror.with_bitmap(by_bitmap);
        }
        if errand.mirror.stands_on_source {
            mirror = mirror.with_succession(stand_on_source(&self.bench));
        }
        if errand.is_refused {
            mirror = mirror.with_succession(Box::new(|_, _| Err(REFUSAL.to_owned())));
        }
        if let Some(lanes) = &mut self.lanes {
            mirror = mirror.with_lanes(lanes.lanes(&self.bench.world, &self.executor));
        }
        self.executor.spawn("mirror", mirror.run());
        self.play(&job, &watch, &errand).await;
        self.finish(&job, &watch, &errand).await;
    }

    /// Says verbs, whatever comes of it.
    async fn play(&mut self, job: &Job, watch: &Watch, errand: &Errand) {
        for _ in 0..errand.verbs {
            let gap = self.random.time(errand.verb_gap);
            self.bench.clock.sleep(gap).await;
            if watch.is_gone() {
                return;
            }
            watch.look(job);
            let verb = self.verb(job.status());
            watch.ask(job, verb);
        }
    }

    fn verb(&mut self, status: JobStatus) -> Verb {
        match self.random.below(100) {
            0..15 => Verb::Pause,
            15..35 => Verb::Resume,
            35..45 => Verb::SetSpeed(self.random.pick(&[0, 1, 4096, 1 << 20])),
            45..60 => Verb::Change(self.random.pick(&[CopyMode::Background, CopyMode::WriteBlocking])),
            60..80 => Verb::Complete,
            80..85 => Verb::Cancel(Force::Soft),
            85..87 => Verb::Cancel(Force::Hard),
            87..90 => Verb::Dismiss,
            _ if status == JobStatus::Pending || self.random.chance(300) => Verb::Finalize,
            _ => Verb::Resume,
        }
    }

    /// Brings the job to its end.
    async fn finish(&mut self, job: &Job, watch: &Watch, errand: &Errand) {
        let mut quiet_since = None;
        let mut linger = Some(errand.linger);
        while !watch.is_gone() && self.bench.world.failure().is_none() {
            watch.look(job);
            let now = self.bench.world.time();
            let quiet = now >= self.faults_until && self.bench.guests.load(Ordering::SeqCst) == 0;
            if quiet && now.saturating_sub(*quiet_since.get_or_insert(now)) > END_WITHIN {
                let state = (job.status(), job.orders(), job.figures());
                self.bench.world.fail(format!("job: does not come to its end: {state:?}"));
                return;
            }
            if job.status() == JobStatus::Ready
                && let Some(linger) = linger.take()
            {
                self.bench.clock.sleep(linger).await;
            }
            let verb = match job.status() {
                JobStatus::Running | JobStatus::Ready if job.orders().speed > 0 => Some(Verb::SetSpeed(0)),
                JobStatus::Paused | JobStatus::Standby => Some(Verb::Resume),
                JobStatus::Running if errand.goal == Goal::Cancel => Some(Verb::Cancel(Force::Soft)),
                JobStatus::Ready if errand.patient && job.figures().dirty > 0 => None,
                JobStatus::Ready => Some(match errand.goal {
                    _ if job.orders().end.is_some() => Verb::Resume,
                    Goal::Complete => Verb::Complete,
                    Goal::Copy => Verb::Cancel(Force::Soft),
                    Goal::Cancel => Verb::Cancel(Force::Hard),
                }),
                // Its limit cannot be changed any more, and may be for hours.
                JobStatus::Pending if job.orders().speed > 0 && self.is_long(quiet_since) => {
                    Some(Verb::Cancel(Force::Hard))
                }
                JobStatus::Pending => Some(Verb::Finalize),
                JobStatus::Concluded => Some(Verb::Dismiss),
                _ => None,
            };
            if let Some(verb) = verb {
                watch.ask(job, verb);
            }
            let gap = self.random.even_time(errand.patience);
            self.bench.clock.sleep(gap).await;
        }
    }

    fn is_long(&self, since: Option<Duration>) -> bool {
        since.is_some_and(|since| self.bench.world.time().saturating_sub(since) > END_WITHIN / 2)
    }
}

/// Moves guests to a target that stands on their old disk. No driver here has layers: what shows through is put into the
/// target when the end is heard, see [`Watch`].
fn stand_on_source(bench: &Arc<Bench>) -> Succession {
    let bench = Arc::clone(bench);
    Box::new(move |drained, target| {
        // Nobody stands there for long: the old disk may be a target again.
        let onto = Onto { drained, target, below: drained.node(), bitmaps: NamedBitmaps::Follow };
        let place = bench.graph.pivot_all_onto(&[onto], &[]);
        place.map(drop).map_err(|error| error.to_string())
    })
}
