//! Guests of an image: tasks that read, write, zero, discard, flush and ask for extents, at once and on the same
//! bytes; in some runs they drop what they have asked for before it has ended.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::Preallocation;
use heliostat_block::error::BlockError;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};

use super::bench::Bench;
use crate::oracle::Put;
use crate::random::Random;

/// What guests do. Chances are per mille.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    /// Requests of one task.
    pub(crate) requests: u64,
    pub(crate) think: Duration,
    pub(crate) len_max: u64,
    /// What offsets and lengths are multiples of.
    pub(crate) unit: u64,
    /// Where many requests go, so that they meet, and how many.
    pub(crate) hot: ByteRange,
    pub(crate) hot_share: u64,
    /// Of reads, flushes, looks at extents, discards and zeroing; the rest are writes.
    pub(crate) shares: [u64; 5],
    /// Of writes and zeroing that are to be durable when they end.
    pub(crate) fua: u64,
    /// Of requests that are dropped before their end.
    pub(crate) drops: u64,
}

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read(ByteRange),
    Extents(ByteRange),
    Write(ByteRange, Durability),
    Zero(ByteRange, ZeroSpace, Durability),
    Discard(ByteRange),
    Flush,
    /// Makes the disk so long.
    Resize(u64, Preallocation),
}

impl Request {
    /// Where it reaches; nowhere where it is about no range.
    pub(crate) const fn end(self) -> u64 {
        match self {
            Self::Read(range)
            | Self::Extents(range)
            | Self::Write(range, _)
            | Self::Zero(range, ..)
            | Self::Discard(range) => range.end(),
            Self::Flush | Self::Resize(..) => 0,
        }
    }
}

/// Somebody who asks for something and tells the oracle.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) bench: Arc<Bench>,
    pub(crate) name: String,
}

/// One task of a guest.
pub(crate) struct Guest {
    pub(crate) client: Client,
    pub(crate) workload: Workload,
    pub(crate) random: Random,
}

/// A future that is dropped after so many polls. `None` where it came to that.
pub(crate) struct DropAfter<'a, T> {
    pub(crate) future: Option<Pin<Box<dyn Future<Output = T> + 'a>>>,
    pub(crate) polls: u64,
}

impl<T> Future for DropAfter<'_, T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let Some(future) = &mut self.future else { return Poll::Ready(None) };
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        self.polls = self.polls.saturating_sub(1);
        if self.polls == 0 {
            self.future = None;
            return Poll::Ready(None);
        }
        Poll::Pending
    }
}

impl Guest {
    pub(crate) async fn run(mut self) {
        for _ in 0..self.workload.requests {
            let think = self.random.time(self.workload.think);
            self.client.bench.clock.sleep(think).await;
            let request = self.request();
            let drops = self.random.chance(self.workload.drops);
            let polls = drops.then(|| self.random.between(1, 6));
            self.client.ask_for(request, polls).await;
        }
        self.client.bench.guest_ends();
    }

    fn range(&mut self) -> ByteRange {
        let workload = &self.workload;
        let size = self.client.bench.node.size();
        let around = match self.random.chance(workload.hot_share) {
            true => workload.hot,
            false => ByteRange::from_bounds(0, size),
        };
        let unit = workload.unit;
        let offset = around.offset() + self.random.below(around.len().max(1));
        let offset = (offset / unit * unit).min(size);
        let len = match self.random.below(8) {
            0 => self.random.between(1, workload.len_max),
            1 => workload.len_max,
            _ => self.random.between(1, (workload.len_max / 4).max(1)),
        };
        ByteRange::from_bounds(offset, (offset + len.next_multiple_of(unit)).min(size))
    }

    fn request(&mut self) -> Request {
        let range = self.range();
        let fua = if self.random.chance(self.workload.fua) { Durability::Fua } else { Durability::Cached };
        let space = if self.random.chance(500) { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
        let mut sum = 0;
        let [reads, flushes, looks, discards, zeroes] = self.workload.shares.map(|share| {
            sum += share;
            sum
        });
        match self.random.below(1000) {
            draw if draw < reads => Request::Read(range),
            draw if draw < flushes => Request::Flush,
            draw if draw < looks => Request::Extents(range),
            draw if draw < discards => Request::Discard(range),
            draw if draw < zeroes => Request::Zero(range, space, fua),
            _ => Request::Write(range, fua),
        }
    }
}

/// Asks, and does not wait for the answer where it takes more than so many polls.
async fn ask<T>(future: impl Future<Output = T>, polls: Option<u64>) -> Option<T> {
    match polls {
        None => Some(future.await),
        Some(polls) => DropAfter { future: Some(Box::pin(future)), polls }.await,
    }
}

impl Client {
    /// Asks for `request`; drops it after so many polls. Says what came of it: nothing where it was dropped.
    pub(crate) async fn ask_for(&self, request: Request, polls: Option<u64>) -> Option<bool> {
        let bench = &self.bench;
        bench.seen().requests += 1;
        let (errors, resizes) = (bench.errors(), bench.resizes.load(Ordering::SeqCst));
        bench.world.trace(|| format!("{}: {request:?}", self.name));
        let answer = match request {
            Request::Read(range) => self.read(range, polls).await,
            Request::Flush => self.flush(polls).await,
            Request::Extents(range) => self.extents(range, polls).await,
            Request::Resize(size, how) => Some(self.resize(size, how).await),
            _ => self.change(request, polls).await,
        };
        bench.world.trace(|| format!("{} is told {:?}", self.name, answer.as_ref().map(Result::is_ok)));
        match &answer {
            None => {
                bench.has_dropped.store(true, Ordering::SeqCst);
                bench.seen().dropped += 1;
            }
            Some(Ok(())) => {}
            // It was made shorter meanwhile.
            Some(Err(_)) if request.end() > 0 && resizes != bench.resizes.load(Ordering::SeqCst) => {}
            // There may be no other commit after one.
            Some(Err(error)) if errors == bench.errors() && !bench.may_be_adrift() => {
                self.fail(&format!("was told of an error that no storage gave: {error}"));
            }
            Some(Err(_)) => bench.seen().errors += 1,
        }
        answer.map(|answer| answer.is_ok())
    }

    fn fail(&self, what: &str) {
        self.bench.world.fail(format!("{} {what}", self.name));
    }

    async fn read(&self, range: ByteRange, polls: Option<u64>) -> Option<Result<(), BlockError>> {
        let bench = &self.bench;
        let id = bench.oracle().begin_read(range);
        // What was in the buffer before must not be what it holds afterwards.
        let buffer = Buffer::copy_of(&vec![0xee; usize_from(range.len())]);
        let read = ask(async { bench.node.enter().await.read(range.offset(), buffer).await }, polls).await;
        let seen = read.as_ref().and_then(|read| read.as_ref().ok()).map(|buffer| (range, &buffer[..]));
        let checked = bench.oracle().end_read(&id, seen);
        if let Err(wrong) = checked {
            self.fail(&format!("read: {wrong}"));
        }
        read.map(|read| read.map(|_| ()))
    }

    async fn extents(&self, range: ByteRange, polls: Option<u64>) -> Option<Result<(), BlockError>> {
        let bench = &self.bench;
        let id = bench.oracle().begin_read(range);
        let answer = ask(async { bench.node.enter().await.extents(range).await }, polls).await;
        let zeroes: Vec<_> = answer
            .iter()
            .flatten()
            .flatten()
            .filter(|extent| !extent.status.may_hold_data())
            .map(|extent| extent.range)
            .collect();
        let checked = bench.oracle().end_extents(&id, &zeroes);
        if let Err(wrong) = checked {
            self.fail(&format!("extents: {wrong}"));
        }
        answer.map(|answer| answer.map(|_| ()))
    }

    /// Asks for a change of what is there.
    async fn change(&self, request: Request, polls: Option<u64>) -> Option<Result<(), BlockError>> {
        let bench = &self.bench;
        let (range, put, fua) = match request {
            Request::Write(range, fua) => (range, Put::Pattern, fua),
            Request::Zero(range, _, fua) => (range, Put::Zeroes, fua),
            Request::Discard(range) => (range, Put::Discard, Durability::Cached),
            Request::Read(_) | Request::Extents(_) | Request::Flush | Request::Resize(..) => {
                return Some(Ok(()));
            }
        };
        let (id, data) = {
            let mut oracle = bench.oracle();
            let id = oracle.begin_write(range, put);
            let data = if matches!(request, Request::Write(..)) { oracle.data(id) } else { Vec::new() };
            (id, data)
        };
        let asked = async {
            let tracked = bench.node.enter().await;
            match request {
                Request::Write(..) => tracked.write(range.offset(), data.into(), fua).await,
                Request::Zero(_, space, _) => tracked.write_zeroes(range, space, ZeroEffort::Any, fua).await,
                _ => tracked.discard(range).await,
            }
        };
        let changed = ask(asked, polls).await;
        if let Some(changed) = &changed {
            bench.tell_failures();
            bench.oracle().end_write(id, changed.is_ok(), fua == Durability::Fua);
        }
        changed
    }

    async fn flush(&self, polls: Option<u64>) -> Option<Result<(), BlockError>> {
        let bench = &self.bench;
        let id = bench.oracle().begin_flush();
        let flushed = ask(async { bench.node.enter().await.flush().await }, polls).await;
        bench.tell_failures();
        bench.oracle().end_flush(&id, matches!(flushed, Some(Ok(()))));
        flushed
    }

    /// Never dropped: whoever asks for it waits for its end.
    async fn resize(&self, size: u64, how: Preallocation) -> Result<(), BlockError> {
        let bench = &self.bench;
        bench.oracle().begin_resize(size);
        bench.resizes.fetch_add(1, Ordering::SeqCst);
        let resized = bench.node.resize(size, how).await;
        bench.tell_failures();
        bench.resizes.fetch_add(1, Ordering::SeqCst);
        bench.oracle().end_resize(size, resized.is_ok());
        match resized {
            Ok(()) => bench.seen().resized += 1,
            Err(_) => bench.has_failed_resize.store(true, Ordering::SeqCst),
        }
        resized
    }
}

/// Makes the disk longer and shorter.
pub(crate) struct Resizer {
    pub(crate) client: Client,
    pub(crate) times: u64,
    pub(crate) gap: Duration,
    pub(crate) random: Random,
}

impl Resizer {
    pub(crate) async fn run(mut self) {
        for _ in 0..self.times {
            let gap = self.random.time(self.gap);
            self.client.bench.clock.sleep(gap).await;
            let request = new_size(
                self.client.bench.node.size(),
                self.client.bench.record.grows_only(),
                &mut self.random,
            );
            self.client.ask_for(request, None).await;
        }
        self.client.bench.guest_ends();
    }
}

/// A disk of `size` bytes made longer or shorter: by a little, or by much.
pub(crate) fn new_size(size: u64, grows_only: bool, random: &mut Random) -> Request {
    let by = match random.below(4) {
        0 => 512 * random.between(1, 8),
        1 => (1 << random.between(9, 18)) * random.between(1, 3),
        _ => random.below(size.min(512 << 10)),
    };
    let shorter = random.chance(500) && !grows_only;
    let size = if shorter { size.saturating_sub(by).max(512) } else { size + by.min(1 << 20) };
    let how = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    Request::Resize(size.next_multiple_of(512), if random.chance(500) { how[0] } else { random.pick(&how) })
}
