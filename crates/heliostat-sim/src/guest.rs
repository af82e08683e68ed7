//! Guests: tasks that read, write, zero, discard, flush and ask for extents, at once and on the same bytes.
//!
//! Each tells the oracle what it asks and what it is told. None of them knows of a mirror; a request that was
//! answered too late, or with an error that its disk did not give, is a fault.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::error::{BlockError, ErrorKind};
use heliostat_block::graph::Place;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};
use heliostat_block::tracked::Tracked;

use crate::bench::{Bench, QUICK};
use crate::oracle::{Put, WriteId};
use crate::random::Random;

/// What guests do. Chances are per mille.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    /// Requests of one task, at most.
    pub(crate) requests: u64,
    /// Requests of one task after guests were told to come to an end.
    pub(crate) last_requests: u64,
    /// Tasks at once.
    pub(crate) at_once: u64,
    pub(crate) think: Duration,
    pub(crate) len_max: u64,
    /// What offsets and lengths are multiples of.
    pub(crate) unit: u64,
    /// Where many requests go, so that they meet, and how many.
    pub(crate) hot: ByteRange,
    pub(crate) hot_share: u64,
    /// Of reads, flushes, looks at extents, discards and zeroing; the rest are writes. Some kinds are left out
    /// of some runs: a discard now and then keeps everything around it from ever being in step.
    pub(crate) shares: [u64; 5],
    /// What a step of the executor may cost.
    pub(crate) step_cost: Duration,
    pub(crate) breaks: Option<Breaks>,
}

/// Times at which no guest makes a request: at the start, and again and again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Breaks {
    pub(crate) every: Duration,
    pub(crate) len: Duration,
}

impl Breaks {
    /// What is left of a break at `now`; zero between two.
    fn left(self, now: Duration) -> Duration {
        let into = now.as_nanos() % self.every.as_nanos();
        let into = Duration::from_nanos(u64::try_from(into).unwrap_or(u64::MAX));
        self.len.saturating_sub(into)
    }
}

/// One task of a guest.
pub(crate) struct Guest {
    pub(crate) bench: Arc<Bench>,
    pub(crate) place: Arc<Place>,
    pub(crate) workload: Workload,
    pub(crate) random: Random,
    pub(crate) name: String,
}

impl Guest {
    pub(crate) async fn run(mut self) {
        let mut left = self.workload.requests;
        let mut told = false;
        while left > 0 && self.bench.world.failure().is_none() {
            if !told && self.bench.last_orders.load(Ordering::SeqCst) {
                told = true;
                left = left.min(self.workload.last_requests);
            }
            let think = self.random.time(self.workload.think);
            self.bench.clock.sleep(think).await;
            if let Some(breaks) = self.workload.breaks {
                let left = breaks.left(self.bench.world.time());
                self.bench.clock.sleep(left).await;
            }
            let hushed = self.bench.hushed();
            self.bench.clock.sleep(hushed).await;
            self.request().await;
            left = left.saturating_sub(1);
        }
        self.bench.guests.fetch_sub(1, Ordering::SeqCst);
    }

    fn range(&mut self) -> ByteRange {
        let workload = &self.workload;
        let size = self.place.node().size();
        let around = if self.random.chance(workload.hot_share) {
            workload.hot
        } else {
            ByteRange::from_bounds(0, size)
        };
        let unit = workload.unit;
        let offset = around.offset() + self.random.below(around.len().max(1));
        let offset = (offset / unit * unit).min(size);
        let len = match self.random.below(8) {
            0 => self.random.between(1, workload.len_max),
            1 => workload.len_max,
            _ => self.random.between(1, (workload.len_max / 4).max(1)),
        };
        let end = (offset + len.next_multiple_of(unit)).min(size);
        ByteRange::from_bounds(offset, end)
    }

    async fn request(&mut self) {
        self.bench.requests.fetch_add(1, Ordering::SeqCst);
        let range = self.range();
        let fua = if self.random.chance(150) { Durability::Fua } else { Durability::Cached };
        let mut sum = 0;
        let [reads, flushes, looks, discards, zeroes] = self.workload.shares.map(|share| {
            sum += share;
            sum
        });
        let draw = self.random.below(1000);
        let arrived = self.bench.world.time();
        let source = &self.bench.disks[self.bench.current()].storage;
        // Steps of the executor take time, too; so many may come between two of this task.
        let step = source.profile().delay_max + self.workload.step_cost * 200;
        let (changes, longest) = self.bench.waits.longest(self.workload.at_once, step);
        let longest = longest.filter(|_| source.profile().hangs == 0);
        let longest = longest.map(|longest| if self.bench.is_quick { longest.min(QUICK) } else { longest });
        let tracked = self.place.enter().await;
        let storage = Arc::clone(&self.bench.disk_of(tracked.node()).storage);
        let errors = storage.errors();
        self.bench
            .world
            .trace(|| format!("{} at {}: {draw} {range} {fua:?}", self.name, tracked.node().name()));
        let answer = match draw {
            _ if draw < reads => self.read(&tracked, range).await,
            _ if draw < flushes => self.flush(&tracked).await,
            _ if draw < looks => self.extents(&tracked, range).await,
            _ if draw < discards => self.discard(&tracked, range).await,
            _ if draw < zeroes => self.zero(&tracked, range, fua).await,
            _ => self.write(&tracked, range, fua).await,
        };
        drop(tracked);
        self.bench.world.trace(|| format!("{} is told {:?}", self.name, answer.as_ref().err()));
        if let Err(error) = answer
            && errors == storage.errors()
        {
            self.fail(&format!("was told of an error that its disk did not give: {error}"));
        }
        let took = self.bench.world.time() - arrived;
        if let Some(longest) = longest
            && changes == self.bench.waits.changes()
            && took > longest
        {
            self.fail(&format!("waited {took:?} for {range}; its disk alone takes {longest:?} at most"));
        }
    }

    fn fail(&self, what: &str) {
        self.bench.world.fail(format!("{} {what}", self.name));
    }

    async fn read(&mut self, tracked: &Tracked, range: ByteRange) -> Result<(), BlockError> {
        let id = self.bench.oracle().begin_read(range);
        let read = tracked.read(range.offset(), Buffer::zeroed(usize_from(range.len()))).await;
        let seen = read.as_ref().ok().map(|buffer| (range, &buffer[..]));
        if let Err(wrong) = self.bench.oracle().end_read(&id, seen) {
            self.fail(&format!("read: {wrong}"));
        }
        read.map(|_| ())
    }

    async fn extents(&mut self, tracked: &Tracked, range: ByteRange) -> Result<(), BlockError> {
        let id = self.bench.oracle().begin_read(range);
        let answer = tracked.extents(range).await;
        let zeroes: Vec<_> = answer
            .iter()
            .flatten()
            .filter(|extent| !extent.status.may_hold_data())
            .map(|extent| extent.range)
            .collect();
        if let Err(wrong) = self.bench.oracle().end_extents(&id, &zeroes) {
            self.fail(&format!("extents: {wrong}"));
        }
        answer.map(|_| ())
    }

    async fn write(
        &mut self,
        tracked: &Tracked,
        range: ByteRange,
        fua: Durability,
    ) -> Result<(), BlockError> {
        let put = if self.random.chance(100) { Put::Zeroes } else { Put::Pattern };
        let (id, data) = {
            let mut oracle = self.bench.oracle();
            let id = oracle.begin_write(range, put);
            (id, oracle.data(id))
        };
        let written = tracked.write(range.offset(), data.into(), fua).await;
        self.written(id, written.is_ok(), fua);
        written
    }

    async fn zero(&mut self, tracked: &Tracked, range: ByteRange, fua: Durability) -> Result<(), BlockError> {
        let space = if self.random.chance(700) { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
        let effort = if self.random.chance(200) { ZeroEffort::FastOnly } else { ZeroEffort::Any };
        let id = self.bench.oracle().begin_write(range, Put::Zeroes);
        let zeroed = tracked.write_zeroes(range, space, effort, fua).await;
        self.written(id, zeroed.is_ok(), fua);
        match zeroed {
            Err(error) if error.kind() == ErrorKind::Unsupported && effort == ZeroEffort::FastOnly => Ok(()),
            other => other,
        }
    }

    async fn discard(&mut self, tracked: &Tracked, range: ByteRange) -> Result<(), BlockError> {
        let id = self.bench.oracle().begin_write(range, Put::Discard);
        let discarded = tracked.discard(range).await;
        self.written(id, discarded.is_ok(), Durability::Cached);
        discarded
    }

    fn written(&self, id: WriteId, good: bool, fua: Durability) {
        self.bench.oracle().end_write(id, good, fua == Durability::Fua);
    }

    async fn flush(&mut self, tracked: &Tracked) -> Result<(), BlockError> {
        let storage = &self.bench.disk_of(tracked.node()).storage;
        let failures = storage.flush_failures();
        self.bench.oracle().flushes_failed(failures);
        let id = self.bench.oracle().begin_flush();
        let flushed = tracked.flush().await;
        // Of two flushes at once a host may tell only one that data was lost.
        let good = flushed.is_ok() && failures == storage.flush_failures();
        let mut oracle = self.bench.oracle();
        oracle.flushes_failed(storage.flush_failures());
        oracle.end_flush(&id, good);
        flushed
    }
}
