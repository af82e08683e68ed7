//! Runs of mirrors that end together: several disks, guests that write them in turn, targets that delay, fail and
//! hang, and an operator who says verbs to any of the jobs at random moments.
//!
//! The oracle knows in which order each guest wrote. What the copies hold must be what a power cut of all disks at one
//! moment would have left: where a write is there, all that the same guest wrote before it is there, on every disk.
//! And all jobs end well, or none does.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use heliostat_block::clock::Clock;
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::graph::{Graph, Place, Role};
use heliostat_block::job::mirror::{Mirror, MirrorOptions};
use heliostat_block::job::{
    Bitmaps, CopyMode, Force, Group, Job, JobEvent, JobOptions, JobStatus, OnError, Verb,
};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_block::storage::Durability;

use crate::Trace;
use crate::faults::Profile;
use crate::random::{self, Random};
use crate::storage::SimStorage;
use crate::world::{Executor, Running, SimClock, World};

const SOURCES: [&str; 3] = ["disk0", "disk1", "disk2"];
const TARGETS: [&str; 3] = ["copy0", "copy1", "copy2"];

/// What a guest writes at once, and where its numbers are: each guest has a sector of its own on each disk.
const SECTOR: usize = 512;
const GUESTS_MAX: u64 = 4;

/// From the moment on at which nothing fails, all jobs end within this time.
const END_WITHIN: Duration = Duration::from_secs(60);

/// What runs came across.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Guests' writes.
    pub writes: u64,
    /// Runs in which all guests moved to the targets.
    pub pivots: u64,
    /// Runs that left copies of one moment behind.
    pub copies: u64,
    /// Runs in which no job ended well.
    pub aborted: u64,
}

impl Seen {
    /// Adds what another run saw.
    pub const fn add(&mut self, other: &Self) {
        self.writes += other.writes;
        self.pivots += other.pivots;
        self.copies += other.copies;
        self.aborted += other.aborted;
    }
}

/// Carries out what `seed` stands for. A panic in the core is a failure like any other.
///
/// # Errors
/// What went wrong first, in words.
pub fn run(seed: u64, trace: Trace) -> Result<Seen, String> {
    crate::caught(|| {
        let mut random = Random::new(random::mix(!seed));
        let world = World::new(trace == Trace::On);
        let running = Running { world, executor: Executor::new(random.fork()) };
        run_in(&running, random)
    })
}

struct Disk {
    source: Arc<Node>,
    target: Arc<Node>,
    source_storage: Arc<SimStorage>,
    target_storage: Arc<SimStorage>,
    export: Arc<Place>,
    graph: Arc<Graph>,
}

/// What a guest has written: to which disk, each number in its turn, from 1 on.
#[derive(Default)]
struct Diary {
    disks: Vec<usize>,
    /// All but the last have been answered, or all.
    answered: usize,
}

/// Everything that the parts of a run share.
struct Bench {
    world: Arc<World>,
    clock: Arc<SimClock>,
    disks: Vec<Disk>,
    diaries: RefCell<Vec<Diary>>,
    jobs: RefCell<Vec<Arc<Job>>>,
    /// How jobs have ended.
    ends: Arc<Mutex<Vec<JobEvent>>>,
    faults_until: Duration,
}

fn run_in(running: &Running, mut random: Random) -> Result<Seen, String> {
    let Running { world, executor } = running;
    let delay_max = Duration::from_micros(random.pick(&[50, 500, 5_000]));
    let faults_until = delay_max * 400 + Duration::from_secs(2);
    let granularity = random.pick(&[512, 4096]);
    let count = usize_from(random.between(2, 3));
    let size = u64::from(granularity) * random.pick(&[4, 8, 40]);
    let size = size.max(GUESTS_MAX * u64_from(SECTOR));
    let mut disks = Vec::new();
    for number in 0..count {
        disks.push(disk(number, size, delay_max, faults_until, world, &mut random)?);
    }
    let guests = random.between(1, GUESTS_MAX);
    let bench = Rc::new(Bench {
        world: Arc::clone(world),
        clock: Arc::new(SimClock(Arc::clone(world))),
        disks,
        diaries: RefCell::new((0..guests).map(|_| Diary::default()).collect()),
        jobs: RefCell::default(),
        ends: Arc::default(),
        faults_until,
    });
    for guest in 0..usize_from(guests) {
        let pause = delay_max * random.pick(&[0, 1, 5]);
        executor.spawn(format!("guest{guest}"), write(Rc::clone(&bench), guest, pause, random.fork()));
    }
    start(&bench, executor, granularity, &mut random)?;
    executor.spawn_beside("operator", operate(Rc::clone(&bench), delay_max, random.fork()));
    let step_cost = Duration::from_nanos(random.pick(&[0, 1_000, 20_000]));
    let _steps = executor.run(world, &mut random.fork(), step_cost);
    match world.failure() {
        Some(failure) => Err(failure),
        None => check(&bench),
    }
}

fn disk(
    number: usize,
    size: u64,
    delay_max: Duration,
    faults_until: Duration,
    world: &Arc<World>,
    random: &mut Random,
) -> Result<Disk, String> {
    let graph = Arc::<Graph>::default();
    let mut node = |name: &'static str, is_source: bool| {
        let profile = profile(is_source, delay_max, faults_until, random);
        let byte = if is_source { 0xa5 } else { 0 };
        let mut bytes = vec![byte; usize_from(size)];
        // No number yet.
        bytes[..usize_from(GUESTS_MAX) * SECTOR].fill(0);
        let storage = SimStorage::new(name, bytes, profile, Arc::clone(world), random.fork());
        let clock: Arc<dyn Clock> = Arc::new(SimClock(Arc::clone(world)));
        let name = NodeName::new(name).map_err(|error| error.to_string())?;
        let raw = Raw::whole(Arc::<SimStorage>::clone(&storage));
        let node = Node::new(name, Driver::Raw(raw), NodeOptions::default(), clock);
        graph.add(Arc::clone(&node)).map_err(|error| error.to_string())?;
        Ok::<_, String>((node, storage))
    };
    let (source, source_storage) = node(SOURCES[number], true)?;
    let (target, target_storage) = node(TARGETS[number], false)?;
    let role = Role::Export { id: "export".to_owned(), writable: true };
    let export = graph.attach(&source, role).map_err(|error| error.to_string())?;
    Ok(Disk { source, target, source_storage, target_storage, export, graph })
}

/// Targets may be slow, fail and hang; sources do not, so that what guests have written is known.
fn profile(is_source: bool, delay_max: Duration, faults_until: Duration, random: &mut Random) -> Profile {
    let faulty = !is_source && random.chance(500);
    let mut some = |of: &[u64]| if faulty { random.pick(of) } else { 0 };
    let (hangs, write_errors, flush_errors) =
        (some(&[0, 20, 100]), some(&[0, 10, 100]), some(&[0, 100, 400]));
    Profile {
        block_size: random.pick(&[1, 512]),
        inline: random.pick(&[0, 300, 950]),
        delay_max: delay_max * if is_source { 1 } else { random.pick(&[1, 8, 30]) },
        pieces_max: 2,
        hangs,
        hang_max: delay_max * 50 + Duration::from_millis(random.pick(&[1, 1_000])),
        read_errors: 0,
        write_errors,
        flush_errors,
        extents_errors: 0,
        faults_until,
        knows_holes: true,
        can_discard: true,
        can_zero_fast: true,
        cached: true,
        writeback: random.pick(&[0, 500]),
        writeback_errors: 0,
        forgets: faulty,
    }
}

fn start(
    bench: &Rc<Bench>,
    executor: &Executor,
    granularity: u32,
    random: &mut Random,
) -> Result<(), String> {
    let group = Group::new(bench.disks.len());
    let job_options = JobOptions {
        auto_finalize: random.chance(600),
        copy_mode: random.pick(&[CopyMode::Background, CopyMode::Background, CopyMode::WriteBlocking]),
        ..JobOptions::default()
    };
    let on_target_error = random.pick(&[OnError::Ignore, OnError::Ignore, OnError::Stop, OnError::Report]);
    for (number, disk) in bench.disks.iter().enumerate() {
        let id = format!("job{number}");
        let place = |node, role| disk.graph.attach(node, role).map_err(|error| error.to_string());
        let source = place(&disk.source, Role::MirrorSource { job: id.clone() })?;
        let target = place(&disk.target, Role::MirrorTarget { job: id.clone() })?;
        let bitmaps = Bitmaps::new(&disk.source, granularity).map_err(|error| error.to_string())?;
        let (ends, world) = (Arc::clone(&bench.ends), Arc::clone(&bench.world));
        let observer = Arc::new(move |job: &Job, event: &JobEvent| {
            world.trace(|| format!("{}: {event:?}", job.id()));
            if matches!(event, JobEvent::Completed(_) | JobEvent::Cancelled) {
                ends.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(event.clone());
            }
        });
        let job = Job::start(id.clone(), job_options, observer);
        let member = group.join(&job);
        let options = MirrorOptions { granularity, on_target_error, ..MirrorOptions::default() };
        let clock: Arc<dyn Clock> = Arc::<SimClock>::clone(&bench.clock);
        let graph = Arc::clone(&disk.graph);
        let mirror = Mirror::new(Arc::clone(&job), graph, source, target, options, bitmaps, clock);
        executor.spawn_beside(id, mirror.with_group(member).run());
        bench.jobs.borrow_mut().push(job);
    }
    Ok(())
}

impl Bench {
    fn are_over(&self) -> bool {
        self.jobs.borrow().iter().all(|job| !job.is_listed())
    }
}

/// Writes numbers, one after the other, each to a disk that is drawn.
async fn write(bench: Rc<Bench>, guest: usize, pause: Duration, mut random: Random) {
    // A little longer than the jobs, so that what comes after the end is seen too.
    let mut left = 20;
    for number in 1_u64.. {
        if bench.are_over() || bench.world.failure().is_some() {
            left -= 1;
        }
        if left == 0 {
            return;
        }
        // A breath now and then, so that time passes where nothing takes any.
        let breath = Duration::from_millis(u64::from(number.is_multiple_of(50)));
        bench.clock.sleep(random.time(pause) + breath).await;
        let disk = random.index(bench.disks.len());
        bench.diaries.borrow_mut()[guest].disks.push(disk);
        let data = Bytes::from(number.to_be_bytes().repeat(SECTOR / 8));
        // What fails is written again: targets still do when they have come to be used.
        loop {
            let tracked = bench.disks[disk].export.enter().await;
            let written = tracked.write(u64_from(guest * SECTOR), data.clone(), Durability::Cached).await;
            drop(tracked);
            if written.is_ok() {
                break;
            }
            bench.clock.sleep(Duration::from_millis(1)).await;
        }
        bench.diaries.borrow_mut()[guest].answered += 1;
    }
}

async fn operate(bench: Rc<Bench>, delay_max: Duration, mut random: Random) {
    let goal = random.pick(&[Verb::Complete, Verb::Complete, Verb::Cancel(Force::Soft)]);
    for _ in 0..random.pick(&[0, 3, 12]) {
        bench.clock.sleep(random.time(delay_max * 40)).await;
        let verb = match random.below(100) {
            0..25 => Verb::Pause,
            25..45 => Verb::Resume,
            45..55 => Verb::Change(random.pick(&[CopyMode::Background, CopyMode::WriteBlocking])),
            55..80 => goal,
            80..90 => random.pick(&[Verb::Complete, Verb::Cancel(Force::Soft)]),
            90..94 => Verb::Cancel(Force::Hard),
            _ => Verb::Finalize,
        };
        ask(&bench, verb, &mut random);
    }
    let mut honest_since = None;
    while !bench.are_over() && bench.world.failure().is_none() {
        let now = bench.world.time();
        if now > bench.faults_until && now - *honest_since.get_or_insert(now) > END_WITHIN {
            let jobs = bench.jobs.borrow();
            let states: Vec<_> = jobs.iter().map(|job| (job.status(), job.orders())).collect();
            bench.world.fail(format!("the group does not come to its end: {states:?}"));
            return;
        }
        for verb in [Verb::Resume, goal, Verb::Finalize] {
            for number in 0..bench.disks.len() {
                // Refused where it does not fit.
                let job = Arc::clone(&bench.jobs.borrow()[number]);
                let is_early = verb == goal && job.status() != JobStatus::Ready;
                let _ = if is_early { Ok(()) } else { job.ask(verb) };
            }
        }
        bench.clock.sleep(random.even_time(Duration::from_millis(100))).await;
    }
}

fn ask(bench: &Bench, verb: Verb, random: &mut Random) {
    let job = Arc::clone(&bench.jobs.borrow()[random.index(bench.disks.len())]);
    let taken = job.ask(verb);
    bench.world.trace(|| format!("operator: {}: {verb:?}: {taken:?}", job.id()));
}

// ---------------------------------------------------------------------- the oracle

fn check(bench: &Bench) -> Result<Seen, String> {
    let ends = bench.ends.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let is_well = |end: &&JobEvent| **end == JobEvent::Completed(None);
    let well = ends.iter().filter(is_well).count();
    if ends.len() != bench.disks.len() || (well != 0 && well != ends.len()) {
        return Err(format!("some ended well and some did not: {ends:?}"));
    }
    let moved = bench.disks.iter().filter(|disk| Arc::ptr_eq(&disk.export.node(), &disk.target)).count();
    if moved != 0 && (moved != bench.disks.len() || well == 0) {
        return Err(format!("{moved} of {} guests have moved: {ends:?}", bench.disks.len()));
    }
    let diaries = bench.diaries.borrow();
    for (guest, diary) in diaries.iter().enumerate() {
        let of = |storages: Vec<Vec<u8>>| storages.iter().map(|bytes| number(bytes, guest)).collect();
        let shown = |is_target: bool| {
            let storage = |disk: &Disk| match is_target {
                true => disk.target_storage.visible(),
                false => disk.source_storage.visible(),
            };
            of(bench.disks.iter().map(storage).collect())
        };
        let current: Vec<u64> = shown(moved > 0);
        let last = diary.latest(u64_from(diary.disks.len()), bench.disks.len());
        if current != last {
            return Err(format!("guest{guest} wrote {last:?}, and the disks hold {current:?}"));
        }
        if well > 0 && moved == 0 {
            let copies: [Vec<u64>; 2] =
                [shown(true), of(bench.disks.iter().map(|disk| disk.target_storage.durable()).collect())];
            for copies in copies {
                let newest = copies.iter().copied().max().unwrap_or(0);
                if copies != diary.latest(newest, bench.disks.len()) {
                    return Err(format!("guest{guest}: copies of no one moment: {copies:?}"));
                }
            }
        }
    }
    let writes = diaries.iter().map(|diary| u64_from(diary.answered)).sum();
    Ok(Seen {
        writes,
        pivots: u64::from(moved > 0),
        copies: u64::from(well > 0 && moved == 0),
        aborted: u64::from(well == 0),
    })
}

impl Diary {
    /// The last number on each disk after all writes up to the number `upto`.
    fn latest(&self, upto: u64, disks: usize) -> Vec<u64> {
        let mut latest = vec![0; disks];
        for (number, disk) in (1..=upto).zip(&self.disks) {
            latest[*disk] = number;
        }
        latest
    }
}

/// What stands in a guest's sector.
fn number(bytes: &[u8], guest: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[guest * SECTOR..guest * SECTOR + 8]);
    u64::from_be_bytes(word)
}
