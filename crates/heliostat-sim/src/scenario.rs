//! A run: what a seed stands for, carried out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heliostat_block::clock::Clock;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::graph::{Graph, Role};
use heliostat_block::job::mirror::MirrorOptions;
use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{CopyMode, Force, JobOptions, JobStatus, OnError, Verb};
use heliostat_block::limits::GUEST_QUIET;
use heliostat_block::name::NodeName;
use heliostat_block::node::{DetectZeroes, Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;

use crate::bench::{Bench, Disk, Seen};
use crate::faults::Profile;
use crate::guest::{Breaks, Guest, Workload};
use crate::lanes::LaneTasks;
use crate::named::{Named, draw_wishes};
use crate::operator::{Errand, Goal, Operator};
use crate::random::Random;
use crate::storage::{Cut, SimStorage};
use crate::world::{Executor, Running, SimClock, World};

const NAMES: [&str; 3] = ["disk0", "disk1", "disk2"];

/// The settings of one run that several parts look at.
struct Settings {
    size: u64,
    granularity: u32,
    /// The scale of everything that takes time.
    delay_max: Duration,
    faults_until: Duration,
    step_cost: Duration,
    /// This run has faults.
    faulty: bool,
    /// This run has lanes.
    lanes: Option<LaneSettings>,
    /// Hints to write back that fail, per mille.
    writeback_errors: u64,
}

impl Settings {
    /// What belongs to lanes and to hints is drawn `apart`, so that the rest of a run is what it was before
    /// there were any.
    fn draw(random: &mut Random, apart: &mut Random) -> Self {
        let granularity = random.pick(&[512, 512, 1024, 4096, 4096, 16 << 10, 64 << 10]);
        let granules = random.pick(&[1, 2, 3, 5, 8, 20, 40]);
        let tail = if random.chance(500) { 0 } else { random.below(u64::from(granularity)) };
        let size = (granules * u64::from(granularity) + tail).min(512 << 10);
        let delay_max = Duration::from_micros(random.pick(&[50, 500, 5_000, 50_000]));
        let step_cost = Duration::from_nanos(random.pick(&[0, 0, 1_000, 20_000]));
        let faulty = random.chance(700);
        Self {
            size,
            granularity,
            delay_max,
            faults_until: delay_max * 400 + Duration::from_secs(2),
            step_cost,
            faulty,
            lanes: apart.chance(500).then(|| LaneSettings::draw(delay_max, apart)),
            writeback_errors: if faulty { apart.pick(&[0, 0, 20, 200]) } else { 0 },
        }
    }
}

/// What a run with lanes draws besides.
struct LaneSettings {
    count: u64,
    /// Copies go to lanes only between storages that have no blocks.
    without_blocks: bool,
    /// Copies go to lanes only while guests are quiet.
    breaks: Option<Breaks>,
    closes_after: Option<Duration>,
}

impl LaneSettings {
    fn draw(delay_max: Duration, random: &mut Random) -> Self {
        let breaks = random.chance(300).then(|| {
            let len = GUEST_QUIET + delay_max * random.pick(&[1, 10, 60]);
            Breaks { len, every: len + delay_max * random.pick(&[5, 20, 100]) }
        });
        Self {
            count: random.pick(&[1, 1, 2, 3]),
            without_blocks: random.chance(800),
            breaks,
            closes_after: random.chance(100).then(|| random.time(delay_max * 200)),
        }
    }
}

/// Whether targets stay where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Targets {
    /// They do.
    Stay,
    /// Each is cut off now and then, and may lose what was not flushed.
    CutOff,
}

/// Carries out what `seed` stands for.
///
/// # Errors
/// What went wrong first.
pub(crate) fn run(seed: u64, targets: Targets, tracing: bool) -> Result<Seen, String> {
    let mut apart = Random::new(!seed).fork();
    let running = Running { world: World::new(tracing), executor: Executor::new(apart.fork()) };
    run_in(&running, targets, Random::new(seed), apart)
}

fn run_in(
    running: &Running,
    targets: Targets,
    mut random: Random,
    mut apart: Random,
) -> Result<Seen, String> {
    let Running { world, executor } = running;
    let settings = Settings::draw(&mut random, &mut apart);
    let graph = Arc::new(Graph::default());
    let mut disks = Vec::new();
    for (number, name) in NAMES.iter().enumerate() {
        disks.push(disk(number, name, &settings, world, &mut random)?);
    }
    for disk in &disks {
        graph.add(Arc::clone(&disk.node)).map_err(|error| error.to_string())?;
    }
    let is_quick = settings.delay_max <= Duration::from_micros(50)
        && settings.step_cost <= Duration::from_micros(1)
        && disks.iter().all(|disk| disk.storage.profile().hangs == 0);
    let bench = Bench::new(Arc::clone(world), graph, disks, is_quick);
    start_guests(&bench, executor, &settings, &mut random)?;
    start_drainer(&bench, executor, &settings, &mut random);
    watch_for_crashes(&bench, executor, &settings, &mut random);
    let mut errands: Vec<_> =
        (0..random.pick(&[1, 1, 1, 2, 3])).map(|_| errand(&settings, &mut random)).collect();
    for errand in errands.iter_mut().filter(|_| settings.lanes.is_some()) {
        errand.hush = apart.chance(700).then(|| apart.time(settings.delay_max * 60));
    }
    if apart.chance(400) {
        Named::begin(&bench, apart.pick(&[512, 4096, 64 << 10, 1 << 20]));
        draw_wishes(&mut errands, &mut apart);
    }
    for errand in &mut errands {
        errand.is_refused = apart.chance(150);
        errand.stands = apart.chance(150);
        if errand.stands {
            errand.mirror.sync = SyncMode::None;
        }
    }
    if targets == Targets::CutOff {
        cut_targets_off(&bench, &settings, &mut apart);
    }
    let operator = Operator {
        bench: Arc::clone(&bench),
        executor: executor.clone(),
        random: random.fork(),
        errands,
        lanes: settings.lanes.as_ref().map(|lanes| LaneTasks::new(lanes.count, lanes.closes_after)),
        faults_until: settings.faults_until,
    };
    executor.spawn("operator", operator.run());
    let steps = executor.run(world, &mut random.fork(), settings.step_cost);
    let result = match world.failure() {
        Some(failure) => Err(failure),
        None => check_after(&bench),
    };
    world.trace(|| format!("{steps} steps, {} requests", bench.requests.load(Ordering::SeqCst)));
    let on_lanes = bench.disks.iter().map(|disk| disk.storage.requests_of_lanes()).sum();
    let requests = bench.requests.load(Ordering::SeqCst);
    result.map(|()| Seen { requests, on_lanes, ..*bench.seen() })
}

fn check_after(bench: &Bench) -> Result<(), String> {
    Named::check(bench);
    if let Some(failure) = bench.world.failure() {
        return Err(failure);
    }
    for disk in &bench.disks {
        let left = (disk.node.in_flight(), disk.storage.in_flight());
        if left != (0, 0) {
            return Err(format!("{}: in flight when all is over: {left:?}", disk.node.name()));
        }
    }
    let current = &bench.disks[bench.current()].storage;
    bench.oracle().check_image(&current.visible()).map_err(|wrong| format!("at the very end: {wrong}"))?;
    bench.oracle().check_crash(&current.crash()).map_err(|wrong| format!("a crash at the very end: {wrong}"))
}

// -------------------------------------------------------------------------- disks

fn disk(
    number: usize,
    name: &'static str,
    settings: &Settings,
    world: &Arc<World>,
    random: &mut Random,
) -> Result<Disk, String> {
    let mut profile = profile(settings, random);
    if number == 0 && random.chance(300) {
        profile = Profile { hangs: 0, ..profile };
    }
    if settings.lanes.as_ref().is_some_and(|lanes| lanes.without_blocks) {
        profile.block_size = 1;
    }
    // One in fifty targets has another size: such a job must fail.
    let size = if number == 2 && random.chance(20) { settings.size + 512 } else { settings.size };
    let bytes = contents(size, random);
    let storage = SimStorage::new(name, bytes, profile, Arc::clone(world), random.fork());
    let options = NodeOptions {
        read_only: false,
        discard: random.pick(&[Discard::Unmap, Discard::Unmap, Discard::ZeroesOnly, Discard::Ignore]),
        detect_zeroes: random.pick(&[
            DetectZeroes::Off,
            DetectZeroes::Off,
            DetectZeroes::On,
            DetectZeroes::Unmap,
        ]),
    };
    let raw = Raw::whole(Arc::<SimStorage>::clone(&storage));
    let name = NodeName::new(name).map_err(|error| error.to_string())?;
    let clock: Arc<dyn Clock> = Arc::new(SimClock(Arc::clone(world)));
    Ok(Disk { node: Node::new(name, Driver::Raw(raw), options, clock), storage })
}

fn profile(settings: &Settings, random: &mut Random) -> Profile {
    let faulty = settings.faulty && random.chance(600);
    let mut some = |of: &[u64]| if faulty { random.pick(of) } else { 0 };
    let (hangs, read_errors, write_errors) =
        (some(&[0, 0, 20, 100]), some(&[0, 0, 10, 50]), some(&[0, 10, 50, 200]));
    let (flush_errors, extents_errors) = (some(&[0, 100, 400]), some(&[0, 0, 50]));
    let slow = random.pick(&[1, 1, 4]);
    Profile {
        block_size: random.pick(&[1, 1, 512, 4096]),
        inline: random.pick(&[0, 0, 0, 300, 950]),
        delay_max: settings.delay_max / slow,
        pieces_max: random.pick(&[1, 2, 4]),
        hangs,
        hang_max: settings.delay_max * 50 + Duration::from_millis(random.pick(&[1, 2_500])),
        read_errors,
        write_errors,
        flush_errors,
        extents_errors,
        faults_until: settings.faults_until,
        knows_holes: random.chance(800),
        can_discard: random.chance(800),
        can_zero_fast: random.chance(800),
        cached: random.chance(900),
        writeback: random.pick(&[0, 50, 500]),
        writeback_errors: settings.writeback_errors,
        forgets: random.chance(500),
    }
}

/// What a disk holds at first: nothing, or runs of data and holes.
fn contents(size: u64, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; usize_from(size)];
    if random.chance(250) {
        return bytes;
    }
    let mut at = 0;
    while at < bytes.len() {
        let run = usize_from(random.pick(&[512, 512, 1024, 4096, 8192, 64 << 10]));
        let end = (at + run).min(bytes.len());
        if random.chance(500) {
            bytes[at..end].iter_mut().for_each(|byte| *byte = random.next().to_le_bytes()[0]);
        }
        at = end;
    }
    bytes
}

// -------------------------------------------------------------------------- guests

fn start_guests(
    bench: &Arc<Bench>,
    executor: &Executor,
    settings: &Settings,
    random: &mut Random,
) -> Result<(), String> {
    let len_max =
        random.pick(&[512, 2048, u64::from(settings.granularity), 3 * u64::from(settings.granularity)]);
    let at_once = random.pick(&[1, 3, 6, 6]);
    let hot_len = random.pick(&[512, 4096, settings.size]).min(settings.size);
    let hot = random.below(settings.size - hot_len + 1);
    let workload = Workload {
        requests: random.pick(&[0, 10, 60, 200, 200, 200, 200]),
        last_requests: random.below(10),
        at_once,
        think: settings.delay_max * random.pick(&[0, 0, 1, 5]),
        len_max: len_max.min(settings.size),
        unit: random.pick(&[1, 512, 512, 4096]),
        hot: ByteRange::from_bounds(hot, hot + hot_len),
        hot_share: random.pick(&[0, 300, 700, 950]),
        shares: [
            random.pick(&[0, 100, 300]),
            random.pick(&[0, 60]),
            random.pick(&[0, 40]),
            random.pick(&[0, 0, 70]),
            random.pick(&[0, 130]),
        ],
        step_cost: settings.step_cost,
        breaks: settings.lanes.as_ref().and_then(|lanes| lanes.breaks),
    };
    let exports = random.pick(&[1, 1, 2]);
    let mut places = Vec::new();
    for number in 0..exports {
        let role = Role::Export { id: format!("export{number}"), writable: true };
        let place = bench.graph.attach(&bench.disks[0].node, role).map_err(|error| error.to_string())?;
        places.push(place);
    }
    for number in 0..at_once {
        let place = Arc::clone(&places[usize_from(number) % places.len()]);
        let name = format!("guest{number}");
        let (bench, workload, random) = (Arc::clone(bench), workload.clone(), random.fork());
        bench.guests.fetch_add(1, Ordering::SeqCst);
        executor.spawn(name.clone(), Guest { bench, place, workload, random, name }.run());
    }
    // Exports stay until the run is over, also when no guest is left.
    let world = Arc::clone(&bench.world);
    let hold = Duration::from_secs(3000);
    world.at(hold, move || drop(places));
    Ok(())
}

/// Somebody else who now and then wants the guests' disk to be quiet.
fn start_drainer(bench: &Arc<Bench>, executor: &Executor, settings: &Settings, random: &mut Random) {
    let times = random.pick(&[0, 0, 1, 3]);
    let (bench, gap, mut random) = (Arc::clone(bench), settings.delay_max * 50, random.fork());
    executor.spawn("drainer", async move {
        for _ in 0..times {
            bench.clock.sleep(random.even_time(gap)).await;
            bench.waits.gate_begins();
            let node = Arc::clone(&bench.disks[bench.current()].node);
            let drained = node.drain().await;
            if node.in_flight() > 0 {
                bench.world.fail("a drained node has requests in flight");
            }
            bench.clock.sleep(random.time(gap / 10)).await;
            drop(drained);
            bench.waits.gate_ends();
        }
    });
}

/// Looks now and then at what a crash would leave of the guests' disk.
fn watch_for_crashes(bench: &Arc<Bench>, executor: &Executor, settings: &Settings, random: &mut Random) {
    let times = random.pick(&[0, 5, 20]);
    let (bench, gap, mut random) = (Arc::clone(bench), settings.delay_max * 20, random.fork());
    executor.spawn("crashes", async move {
        for _ in 0..times {
            bench.clock.sleep(random.time(gap)).await;
            let left = bench.disks[bench.current()].storage.crash();
            let checked = bench.oracle().check_crash(&left);
            if let Err(wrong) = checked {
                bench.world.fail(format!("a crash loses what was flushed: {wrong}"));
            }
        }
    });
}

/// Cuts each disk that no guest uses off from its medium now and then.
fn cut_targets_off(bench: &Arc<Bench>, settings: &Settings, random: &mut Random) {
    for number in 0..bench.disks.len() {
        let gap = settings.delay_max * random.pick(&[3, 20, 200]);
        let mut at = Duration::ZERO;
        for _ in 0..random.pick(&[1, 4, 40]) {
            at += random.time(gap);
            let (bench_then, mut random) = (Arc::downgrade(bench), random.fork());
            if at >= settings.faults_until {
                break;
            }
            bench.world.at(at, move || {
                let Some(bench) = bench_then.upgrade() else { return };
                let cut = bench.disks[number].storage.cut_off(&mut random);
                let mut seen = bench.seen();
                seen.cuts += u64::from(cut != Cut::Spared);
                seen.others += u64::from(cut == Cut::Other);
            });
        }
    }
}

// -------------------------------------------------------------------------- jobs

fn errand(settings: &Settings, random: &mut Random) -> Errand {
    let target = random.pick(&[1, 1, 1, 2]);
    let policies = [OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc, OnError::Auto];
    let granularity = settings.granularity;
    let mirror = MirrorOptions {
        sync: random.pick(&[SyncMode::Full, SyncMode::Full, SyncMode::Full, SyncMode::Top, SyncMode::None]),
        granularity,
        buf_size: u64::from(granularity) * random.pick(&[1, 2, 16]),
        on_source_error: if random.chance(600) { OnError::Ignore } else { random.pick(&policies) },
        on_target_error: if random.chance(600) { OnError::Ignore } else { random.pick(&policies) },
        unmap: random.chance(700),
        // Said only where it is true, which is known when the job starts.
        target_is_zero: random.chance(500),
        detect_zeroes: random.chance(300),
        stands_on_source: false,
        target_deadline: random.pick(&[
            settings.delay_max / 4,
            settings.delay_max * 3,
            Duration::from_secs(1),
            Duration::from_secs(1),
        ]),
    };
    let verbs = [
        Verb::Pause,
        Verb::Cancel(Force::Soft),
        Verb::Cancel(Force::Hard),
        Verb::Complete,
        Verb::Finalize,
        Verb::Change(CopyMode::WriteBlocking),
    ];
    let moments =
        [JobStatus::Running, JobStatus::Ready, JobStatus::Waiting, JobStatus::Pending, JobStatus::Paused];
    Errand {
        target,
        job: JobOptions {
            auto_finalize: random.chance(600),
            auto_dismiss: random.chance(700),
            speed: random.pick(&[0, 0, 0, 1 << 20, 64 << 10]),
            copy_mode: random.pick(&[CopyMode::Background, CopyMode::WriteBlocking, CopyMode::WriteBlocking]),
        },
        mirror,
        impulse: random.chance(150).then(|| (random.pick(&moments), random.pick(&verbs))),
        before: random.time(settings.delay_max * 20),
        verbs: random.pick(&[0, 0, 3, 12]),
        verb_gap: settings.delay_max * random.pick(&[2, 20])
            + Duration::from_millis(random.pick(&[0, 0, 60])),
        linger: settings.delay_max * random.pick(&[0, 50, 300]),
        patience: settings.delay_max * random.pick(&[2, 20]) + Duration::from_millis(random.pick(&[1, 100])),
        goal: random.pick(&[Goal::Complete, Goal::Complete, Goal::Complete, Goal::Copy, Goal::Cancel]),
        patient: random.chance(200),
        hush: None,
        wish: None,
        stands: false,
        is_refused: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_run_is_left_when_it_is_over() {
        for seed in 0..40 {
            let mut apart = Random::new(!seed);
            let running = Running { world: World::new(false), executor: Executor::new(apart.fork()) };
            let world = Arc::downgrade(&running.world);
            run_in(&running, Targets::Stay, Random::new(seed), apart).expect("an honest run passes");
            drop(running);
            assert!(world.upgrade().is_none(), "seed {seed}: something still holds the world");
        }
    }
}
