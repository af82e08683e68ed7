//! Every single request that a change makes of the storage fails once; every single poll of it is the last once.
//!
//! After each: what lies on the medium is sound but for leaks, whoever waited goes on, the change can be made again.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heliostat_block::convert::u64_from;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroSpace};

use super::bench::{Bench, Storages};
use super::build::build;
use super::format::Files;
use super::guest::{Client, Request, new_size};
use super::life::{close, read_all};
use super::record::{Backing, Record, Seen};
use super::shape::{DataFile, Shape};
use super::{Settings, backing, profile};
use crate::faults::{EIO, ENOSPC, Profile};
use crate::random::{Random, mix};
use crate::storage::{Quirks, SimStorage};
use crate::world::{Executor, Running, World};

/// The most times that one change is tried: more than any takes.
const TRIES_MAX: u64 = 2000;

/// What is to happen to a change.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// The request of this number that it makes of the storage fails.
    Fails(u64, i32),
    /// It is dropped after so many polls.
    Dropped(u64),
}

/// An image, what was done to it before, and the change that is looked at.
struct Case {
    files: Files,
    backing: Option<Backing>,
    profile: Profile,
    /// The requests of the external data file are what fails.
    fails_data: bool,
    quirks: Quirks,
    before: Vec<Request>,
    change: Vec<Request>,
    /// What somebody else wants meanwhile.
    beside: Request,
    seed: u64,
}

/// Draws an image and a change, and lets each request to the storage fail that it makes.
///
/// # Errors
/// What went wrong first.
pub fn fail_each(seed: u64) -> Result<Seen, String> {
    crate::caught(|| {
        let mut random = Random::new(mix(seed ^ 0xfa11));
        let errno = random.pick(&[EIO, ENOSPC]);
        let case = draw(seed, false, &mut random)?;
        try_all(|number| case.run(Fate::Fails(number, errno)))
    })
}

/// Draws an image and a change, and drops it at each poll.
///
/// # Errors
/// What went wrong first.
pub fn drop_each(seed: u64) -> Result<Seen, String> {
    crate::caught(|| {
        let mut random = Random::new(mix(seed ^ 0xd202));
        let case = draw(seed, true, &mut random)?;
        try_all(|number| case.run(Fate::Dropped(number + 1)))
    })
}

fn try_all(mut run: impl FnMut(u64) -> Result<(bool, Seen), String>) -> Result<Seen, String> {
    let mut seen = Seen::default();
    for number in 0..TRIES_MAX {
        let (happened, more) = run(number).map_err(|wrong| format!("at number {number}: {wrong}"))?;
        seen.add(&more);
        if !happened {
            return Ok(seen);
        }
    }
    Err(format!("it makes more than {TRIES_MAX} requests"))
}

fn draw(seed: u64, drops: bool, random: &mut Random) -> Result<Case, String> {
    let shape = Shape { leaked: 0, ..Shape::draw(random) };
    let shape = Shape { size: shape.size.min(40 << shape.cluster_bits), ..shape };
    let settings =
        Settings { delay_max: Duration::from_micros(50), step_cost: Duration::ZERO, faulty: false, drops };
    let may_have_backing = shape.data_file != Some(DataFile::Raw);
    let has_backing = random.chance(400) && may_have_backing;
    let backing = has_backing.then(|| backing(shape.size, random)).transpose()?;
    let files = build(&shape, random);
    let size_max = Some((u64_from(files.image.len()) + 8 * shape.size + (4 << 20)) & !4095);
    let before = (0..random.below(12)).map(|_| request(&shape, random)).collect();
    let can_resize = shape.bitmaps == 0 && (shape.version > 2 || !shape.snapshot);
    let mut change = vec![match random.chance(200) && can_resize && !drops {
        true => new_size(shape.size, shape.snapshot, random),
        false => request(&shape, random),
    }];
    if random.chance(600) {
        change.push(Request::Flush);
    }
    let beside = request(&shape, random);
    Ok(Case {
        files,
        backing,
        fails_data: shape.data_file.is_some() && random.chance(500),
        profile: Profile { writeback: 0, ..profile(&settings, random) },
        quirks: Quirks {
            fails: None,
            size_max,
            may_be_dropped: drops,
            keeps_sectors: true,
            keeps_after_flush: random.chance(700),
        },
        before,
        change,
        beside,
        seed,
    })
}

fn request(shape: &Shape, random: &mut Random) -> Request {
    let cluster = 1_u64 << shape.cluster_bits;
    let offset = random.below(shape.size);
    let offset = if random.chance(500) { offset & !(cluster - 1) } else { offset };
    let len = random.pick(&[random.clone().between(1, cluster), cluster, 3 * cluster]);
    let range = ByteRange::from_bounds(offset, (offset + len).min(shape.size));
    let fua = if random.chance(300) { Durability::Fua } else { Durability::Cached };
    let space = if random.chance(500) { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
    match random.below(10) {
        0..=5 => Request::Write(range, fua),
        6 => Request::Zero(range, space, fua),
        7 => Request::Discard(range),
        _ => Request::Flush,
    }
}

impl Case {
    /// Says whether the fate came about.
    fn run(&self, fate: Fate) -> Result<(bool, Seen), String> {
        let mut random = Random::new(self.seed);
        let running = Running { world: World::new(false), executor: Executor::new(random.fork()) };
        let Running { world, executor } = &running;
        let mut make = |name, bytes: &[u8], quirks| {
            let (profile, world) = (self.profile.clone(), Arc::clone(world));
            let storage = SimStorage::new(name, bytes.to_vec(), profile, world, random.fork());
            storage.set_quirks(quirks);
            storage
        };
        let below = Quirks { may_be_dropped: self.quirks.may_be_dropped, ..Quirks::default() };
        let storages = Storages {
            image: make("image", &self.files.image, self.quirks),
            data: self.files.data.as_ref().map(|data| make("data", data, self.quirks)),
            backing: self.backing.as_ref().map(|backing| make("below", &backing.bytes, below)),
        };
        let record = Arc::new(Record::new(&self.files, self.backing.clone(), false)?);
        let ended = Rc::new(RefCell::new(None));
        let work = Work {
            before: self.before.clone(),
            change: self.change.clone(),
            beside: self.beside,
            quirks: self.quirks,
            backing: self.backing.clone(),
            fate,
            fails_data: self.fails_data,
            executor: executor.clone(),
        };
        let (telling, world_of_work) = (Rc::clone(&ended), Arc::clone(world));
        executor.spawn("case", async move {
            let done = work.carry_out(&world_of_work, storages, record).await;
            match done {
                Ok(done) => *telling.borrow_mut() = Some(done),
                Err(wrong) => world_of_work.fail(wrong),
            }
        });
        executor.run(world, &mut random, Duration::ZERO);
        let failure = world.failure();
        let done = ended.borrow_mut().take();
        match (failure, done) {
            (Some(failure), _) => {
                Err(format!("{failure}\n  before {:?}\n  change {:?}", self.before, self.change))
            }
            (None, Some(done)) => Ok(done),
            (None, None) => Err("it came to no end".into()),
        }
    }
}

/// A case that is being carried out.
struct Work {
    before: Vec<Request>,
    change: Vec<Request>,
    beside: Request,
    quirks: Quirks,
    backing: Option<Backing>,
    fate: Fate,
    fails_data: bool,
    executor: Executor,
}

impl Work {
    async fn carry_out(
        self,
        world: &Arc<World>,
        storages: Storages,
        record: Arc<Record>,
    ) -> Result<(bool, Seen), String> {
        let failing = storages.data.as_ref().filter(|_| self.fails_data).unwrap_or(&storages.image);
        let failing = Arc::clone(failing);
        let keeps = self.quirks.keeps_after_flush;
        let known = (Arc::clone(&record), self.backing.clone());
        let bench = Bench::open(Arc::clone(world), storages.clone(), known, Some(0), keeps).await?;
        let client = Client { bench: Arc::clone(&bench), name: "client".into() };
        for request in &self.before {
            client.ask_for(*request, None).await;
        }
        let polls = match self.fate {
            Fate::Fails(number, errno) => {
                failing.set_quirks(Quirks { fails: Some((number, errno)), ..self.quirks });
                None
            }
            Fate::Dropped(polls) => {
                self.start_beside(&bench);
                Some(polls)
            }
        };
        let mut dropped = false;
        for request in &self.change {
            // The last of them is what is dropped.
            let is_last = Some(request) == self.change.last();
            dropped = client.ask_for(*request, polls.filter(|_| is_last)).await.is_none();
        }
        let happened = dropped || (matches!(self.fate, Fate::Fails(..)) && !failing.has_fault_left());
        storages.set_quirks(self.quirks);
        while bench.guests.load(Ordering::SeqCst) > 0 {
            bench.clock.sleep(Duration::from_micros(50)).await;
        }
        record.judge_crash(&storages.crash()).map_err(|wrong| format!("a crash leaves: {wrong}"))?;
        self.go_on(&client).await?;
        Ok((happened, *bench.seen()))
    }

    fn start_beside(&self, bench: &Arc<Bench>) {
        bench.guests.store(1, Ordering::SeqCst);
        let client = Client { bench: Arc::clone(bench), name: "neighbour".into() };
        let beside = self.beside;
        self.executor.spawn("neighbour", async move {
            client.ask_for(beside, None).await;
            client.bench.guest_ends();
        });
    }

    /// Everything works again, and the image can be closed, unless the driver no longer knows what the medium holds.
    async fn go_on(&self, client: &Client) -> Result<(), String> {
        let bench = &client.bench;
        let may_refuse = bench.may_be_adrift();
        for request in self.change.iter().chain([&Request::Flush]).chain(&self.before) {
            if request.end() > bench.node.size() {
                // It was made shorter.
                continue;
            }
            if client.ask_for(*request, None).await == Some(false) && !may_refuse {
                return Err(format!("{request:?} fails when no fault is there any more"));
            }
        }
        read_all(bench).await;
        let left = bench.storages.crash();
        bench.record.judge_crash(&left).map_err(|wrong| format!("later, a crash leaves: {wrong}"))?;
        if close(bench).await {
            // What was dropped may still be on its way.
            while bench.storages.in_flight() > 0 {
                bench.clock.sleep(Duration::from_micros(50)).await;
            }
            let files = bench.storages.visible();
            bench.record.judge_closed(&files).map_err(|wrong| format!("closed, it is wrong: {wrong}"))?;
        }
        Ok(())
    }
}
