//! One life of an image: it is opened, guests use it, and it is closed in order or the power fails.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::range::ByteRange;

use super::Kept;
use super::bench::{Bench, Storages};
use super::format::Files;
use super::guest::{Client, Guest, Resizer, Workload};
use super::record::{Backing, Record, Seen};
use crate::faults::Profile;
use crate::random::Random;
use crate::storage::{Quirks, SimStorage};
use crate::world::{Executor, Running, SimClock, World};

/// What a whole disk is read in.
const PIECE: u64 = 64 << 10;

/// How often closing an image is tried: faults end before.
const TRIES_MAX: u64 = 10_000;

/// What one life is like.
pub(crate) struct Life {
    pub(crate) files: Files,
    pub(crate) backing: Option<Backing>,
    pub(crate) profile: Profile,
    pub(crate) quirks: Quirks,
    pub(crate) cache: Option<u64>,
    pub(crate) workload: Workload,
    pub(crate) guests: u64,
    /// How often the disk is made longer or shorter, and how long after each other.
    pub(crate) resizes: u64,
    pub(crate) resize_gap: Duration,
    /// When the power fails, if it does.
    pub(crate) cut_at: Option<Duration>,
    /// How many images that a crash would leave are looked at, and how long after each other.
    pub(crate) looks: u64,
    pub(crate) look_gap: Duration,
    /// They are looked at until the image has been opened, not longer.
    pub(crate) looks_at_repair: bool,
    pub(crate) step_cost: Duration,
    pub(crate) tracing: bool,
}

/// How a life ended: what the next begins with.
pub(crate) struct Ended {
    pub(crate) files: Files,
    pub(crate) seen: Seen,
}

/// What is found out while everything runs.
#[derive(Default)]
struct Outcome {
    /// The power has failed, and left this.
    left: Option<Files>,
    closed: bool,
    has_dropped: bool,
}

impl Life {
    /// Lives it.
    ///
    /// # Errors
    /// What went wrong first.
    pub(crate) fn live(self, random: &mut Random, kept: &mut Kept) -> Result<Ended, String> {
        let running = Running { world: World::new(self.tracing), executor: Executor::new(random.fork()) };
        let Running { world, executor } = &running;
        let record = Arc::new(Record::new(&self.files, self.backing.clone(), kept.is_some())?);
        let outcome = Rc::new(RefCell::new(Outcome::default()));
        let storages = self.storages(world, random);
        let mut steps = random.fork();
        let step_cost = self.step_cost;
        if let Some(at) = self.cut_at {
            let (outcome, world, storages) = (Rc::clone(&outcome), Arc::clone(world), storages.clone());
            executor.spawn("power", async move {
                SimClock(Arc::clone(&world)).sleep(at).await;
                world.trace(|| "the power fails".into());
                outcome.borrow_mut().left = Some(storages.crash());
                world.end();
            });
        }
        let looks = Looks {
            times: self.looks,
            gap: self.look_gap,
            at_repair: self.looks_at_repair,
            world: Arc::clone(world),
            storages: storages.clone(),
            record: Arc::clone(&record),
        };
        executor.spawn("looks", looks.look(random.fork()));
        let parts = (Arc::clone(world), storages.clone(), Arc::clone(&record));
        executor.spawn("life", self.main(parts, executor.clone(), random.fork(), Rc::clone(&outcome)));
        executor.run(world, &mut steps, step_cost);
        if let Some(kept) = kept {
            kept.append(&mut record.kept());
        }
        match world.failure() {
            Some(failure) => Err(failure),
            None => judge(&outcome.take(), &record, &storages),
        }
    }

    fn storages(&self, world: &Arc<World>, random: &mut Random) -> Storages {
        let mut make = |name, bytes: Vec<u8>, quirks| {
            let (profile, world) = (self.profile.clone(), Arc::clone(world));
            let storage = SimStorage::new(name, bytes, profile, world, random.fork());
            storage.set_quirks(quirks);
            storage
        };
        // Whoever opens a file anew does not hear of a flush that has failed before.
        let opening = Quirks { keeps_after_flush: true, ..self.quirks };
        let below = Quirks { may_be_dropped: self.quirks.may_be_dropped, ..Quirks::default() };
        Storages {
            image: make("image", self.files.image.clone(), opening),
            data: self.files.data.clone().map(|data| make("data", data, opening)),
            backing: self.backing.as_ref().map(|backing| make("below", backing.bytes.to_vec(), below)),
        }
    }

    async fn main(
        self,
        (world, storages, record): (Arc<World>, Storages, Arc<Record>),
        executor: Executor,
        mut random: Random,
        outcome: Rc<RefCell<Outcome>>,
    ) {
        let keeps = self.quirks.keeps_after_flush;
        let known = (record, self.backing.clone());
        let opened = Bench::open(Arc::clone(&world), storages.clone(), known, self.cache, keeps).await;
        let bench = match opened {
            Ok(bench) => bench,
            Err(wrong) => return world.fail(wrong),
        };
        storages.set_quirks(self.quirks);
        read_all(&bench).await;
        bench.guests.store(self.guests, Ordering::SeqCst);
        for number in 0..self.guests {
            let name = format!("guest{number}");
            let (bench, workload, random) = (Arc::clone(&bench), self.workload.clone(), random.fork());
            let client = Client { bench, name: name.clone() };
            executor.spawn(name, Guest { client, workload, random }.run());
        }
        if self.resizes > 0 && bench.record.can_resize() {
            bench.guests.fetch_add(1, Ordering::SeqCst);
            let client = Client { bench: Arc::clone(&bench), name: "operator".into() };
            let (times, gap) = (self.resizes, self.resize_gap);
            executor.spawn("operator", Resizer { client, times, gap, random: random.fork() }.run());
        }
        while bench.guests.load(Ordering::SeqCst) > 0 {
            bench.clock.sleep(self.profile.delay_max).await;
        }
        read_all(&bench).await;
        let closed = close(&bench).await;
        let mut outcome = outcome.borrow_mut();
        outcome.closed = closed;
        outcome.has_dropped = bench.has_dropped.load(Ordering::SeqCst);
    }
}

/// Reads all of the disk as a guest does.
pub(crate) async fn read_all(bench: &Arc<Bench>) {
    for range in ByteRange::from_bounds(0, bench.node.size()).pieces(PIECE) {
        let id = bench.oracle().begin_read(range);
        let errors = bench.errors();
        let buffer = Buffer::copy_of(&vec![0xee; usize_from(range.len())]);
        let read = bench.node.enter().await.read(range.offset(), buffer).await;
        let seen = read.as_ref().ok().map(|buffer| (range, &buffer[..]));
        let checked = bench.oracle().end_read(&id, seen);
        if let Err(wrong) = checked {
            bench.world.fail(format!("a look at the whole disk: {wrong}"));
        }
        if let Err(error) = read
            && errors == bench.errors()
            && !bench.may_be_adrift()
        {
            bench.world.fail(format!("a look at the whole disk: {error}"));
        }
    }
}

/// Looks now and then at what a crash would leave.
struct Looks {
    times: u64,
    gap: Duration,
    at_repair: bool,
    world: Arc<World>,
    storages: Storages,
    record: Arc<Record>,
}

impl Looks {
    async fn look(self, mut random: Random) {
        for _ in 0..self.times {
            SimClock(Arc::clone(&self.world)).sleep(random.time(self.gap)).await;
            if self.at_repair && self.record.is_opened() {
                return;
            }
            if let Err(wrong) = self.record.judge_crash(&self.storages.crash()) {
                self.world.fail(format!("a crash leaves: {wrong}"));
            }
        }
    }
}

/// Closes the image. Says whether it came to that.
pub(crate) async fn close(bench: &Arc<Bench>) -> bool {
    let tries = if bench.record.has_bitmaps() { TRIES_MAX / 50 } else { TRIES_MAX };
    for _ in 0..tries {
        let errors = bench.errors();
        let id = bench.oracle().begin_flush();
        match bench.node.close().await {
            Ok(()) => {
                bench.tell_failures();
                bench.oracle().end_flush(&id, true);
                return true;
            }
            Err(_) if errors != bench.errors() => {}
            // There is no other commit after one that was dropped, or a flush that has lost what was copied.
            Err(_) if bench.may_be_adrift() => return false,
            // Nor after a header that could not be written.
            Err(_) if bench.record.has_bitmaps() && bench.errors() > 0 => return false,
            Err(error) => {
                bench.world.fail(format!("it cannot be closed: {error}"));
                return false;
            }
        }
    }
    // There may be no room for bitmaps.
    if !bench.record.has_bitmaps() {
        bench.world.fail("it cannot be closed, ever");
    }
    false
}

fn judge(outcome: &Outcome, record: &Record, storages: &Storages) -> Result<Ended, String> {
    if outcome.closed && outcome.left.is_none() {
        let files = storages.visible();
        let leaks = record.judge_closed(&files).map_err(|wrong| format!("closed, it is wrong: {wrong}"))?;
        let before = record.leaks_before();
        let is_quiet = storages.errors() == 0 && !outcome.has_dropped;
        if is_quiet && leaks > before {
            return Err(format!("closed after a life without faults, it has {leaks} leaks, not {before}"));
        }
        let left = storages.crash();
        record.judge_crash(&left).map_err(|wrong| format!("after a close, a crash leaves: {wrong}"))?;
        return Ok(Ended { files, seen: *record.seen() });
    }
    let files = outcome.left.clone().unwrap_or_else(|| storages.crash());
    record.judge_crash(&files).map_err(|wrong| format!("the crash left: {wrong}"))?;
    let seen = Seen { reopened: 1, ..*record.seen() };
    Ok(Ended { files, seen })
}
