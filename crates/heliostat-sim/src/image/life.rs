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
use super::bench::{Backing, Bench, Seen, Storages};
use super::guest::{Client, Guest, Workload};
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
    pub(crate) bytes: Vec<u8>,
    pub(crate) backing: Option<Backing>,
    pub(crate) profile: Profile,
    pub(crate) quirks: Quirks,
    pub(crate) cache: Option<u64>,
    pub(crate) workload: Workload,
    pub(crate) guests: u64,
    /// When the power fails, if it does.
    pub(crate) cut_at: Option<Duration>,
    /// How many images that a crash would leave are looked at, and how long after each other.
    pub(crate) looks: u64,
    pub(crate) look_gap: Duration,
    pub(crate) step_cost: Duration,
    pub(crate) tracing: bool,
    /// Whether somebody wants the images that are judged.
    pub(crate) keep: bool,
}

/// How a life ended: what the next begins with.
pub(crate) struct Ended {
    pub(crate) bytes: Vec<u8>,
    pub(crate) seen: Seen,
}

/// What is found out while everything runs.
#[derive(Default)]
struct Outcome {
    bench: Option<Arc<Bench>>,
    /// What the power cut has left.
    left: Option<Vec<u8>>,
    closed: bool,
}

impl Life {
    /// Lives it.
    ///
    /// # Errors
    /// What went wrong first.
    pub(crate) fn live(mut self, random: &mut Random, kept: &mut Kept) -> Result<Ended, String> {
        self.keep = kept.is_some();
        let running = Running { world: World::new(self.tracing), executor: Executor::new(random.fork()) };
        let Running { world, executor } = &running;
        let outcome = Rc::new(RefCell::new(Outcome::default()));
        let storages = self.storages(world, random);
        let image = Arc::clone(&storages.image);
        let mut steps = random.fork();
        let step_cost = self.step_cost;
        if let Some(at) = self.cut_at {
            let (outcome, world, image) = (Rc::clone(&outcome), Arc::clone(world), Arc::clone(&image));
            executor.spawn("power", async move {
                SimClock(Arc::clone(&world)).sleep(at).await;
                world.trace(|| "the power fails".into());
                outcome.borrow_mut().left = Some(image.crash());
                world.end();
            });
        }
        let main =
            self.main(Arc::clone(world), executor.clone(), storages, random.fork(), Rc::clone(&outcome));
        executor.spawn("life", main);
        executor.run(world, &mut steps, step_cost);
        let failure = world.failure();
        if let (Some(bench), Some(kept)) = (&outcome.borrow().bench, kept) {
            kept.append(&mut bench.kept());
        }
        let ended = match failure {
            Some(failure) => Err(failure),
            None => judge(&outcome.borrow(), &image),
        };
        // It holds the world.
        outcome.borrow_mut().bench = None;
        ended
    }

    fn storages(&self, world: &Arc<World>, random: &mut Random) -> Storages {
        let make = |name, bytes: Vec<u8>, random: &mut Random| {
            SimStorage::new(name, bytes, self.profile.clone(), Arc::clone(world), random.fork())
        };
        let image = make("image", self.bytes.clone(), random);
        image.set_quirks(self.quirks);
        let backing = self.backing.as_ref().map(|backing| make("below", backing.bytes.to_vec(), random));
        if let Some(backing) = &backing {
            backing.set_quirks(Quirks { may_be_dropped: self.quirks.may_be_dropped, ..Quirks::default() });
        }
        Storages { image, backing }
    }

    async fn main(
        self,
        world: Arc<World>,
        executor: Executor,
        storages: Storages,
        mut random: Random,
        outcome: Rc<RefCell<Outcome>>,
    ) {
        let keeps = self.quirks.keeps_after_flush;
        let opened = Bench::open(Arc::clone(&world), storages, self.backing.clone(), self.cache, keeps).await;
        let bench = match opened {
            Ok(bench) => bench,
            Err(wrong) => return world.fail(wrong),
        };
        bench.keep.store(self.keep, Ordering::SeqCst);
        outcome.borrow_mut().bench = Some(Arc::clone(&bench));
        read_all(&bench).await;
        bench.guests.store(self.guests, Ordering::SeqCst);
        for number in 0..self.guests {
            let name = format!("guest{number}");
            let (bench, workload, random) = (Arc::clone(&bench), self.workload.clone(), random.fork());
            let client = Client { bench, name: name.clone() };
            executor.spawn(name, Guest { client, workload, random }.run());
        }
        executor.spawn("looks", look(Arc::clone(&bench), self.looks, self.look_gap, random.fork()));
        while bench.guests.load(Ordering::SeqCst) > 0 {
            bench.clock.sleep(self.profile.delay_max).await;
        }
        read_all(&bench).await;
        outcome.borrow_mut().closed = close(&bench).await;
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
async fn look(bench: Arc<Bench>, times: u64, gap: Duration, mut random: Random) {
    for _ in 0..times {
        bench.clock.sleep(random.time(gap)).await;
        if let Err(wrong) = bench.judge_crash(&bench.storage.crash()) {
            bench.world.fail(format!("a crash leaves: {wrong}"));
        }
    }
}

/// Closes the image. Says whether it came to that.
pub(crate) async fn close(bench: &Arc<Bench>) -> bool {
    for _ in 0..TRIES_MAX {
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
            Err(error) => {
                bench.world.fail(format!("it cannot be closed: {error}"));
                return false;
            }
        }
    }
    bench.world.fail("it cannot be closed, ever");
    false
}

fn judge(outcome: &Outcome, image: &SimStorage) -> Result<Ended, String> {
    let Some(bench) = &outcome.bench else {
        // The power failed before it was open.
        let bytes = outcome.left.clone().unwrap_or_else(|| image.visible());
        return Ok(Ended { bytes, seen: Seen::default() });
    };
    if outcome.closed && outcome.left.is_none() {
        let bytes = image.visible();
        let leaks = bench.judge_closed(&bytes).map_err(|wrong| format!("closed, it is wrong: {wrong}"))?;
        let before = bench.leaks_before();
        let is_quiet = image.errors() == 0 && !bench.has_dropped.load(Ordering::SeqCst);
        if is_quiet && leaks > before {
            return Err(format!("closed after a life without faults, it has {leaks} leaks, not {before}"));
        }
        bench
            .judge_crash(&image.crash())
            .map_err(|wrong| format!("after a close, a crash leaves: {wrong}"))?;
        let seen = *bench.seen();
        return Ok(Ended { bytes, seen });
    }
    let bytes = outcome.left.clone().unwrap_or_else(|| image.crash());
    bench.judge_crash(&bytes).map_err(|wrong| format!("the crash left: {wrong}"))?;
    let seen = Seen { reopened: 1, ..*bench.seen() };
    Ok(Ended { bytes, seen })
}
