//! Carrying requests out: between a front end, which has parsed them, and the node.
//!
//! A request holds a [`Permit`] while it is in flight, so that a client cannot make the server hold more than
//! its share; it is answered once. It must not be dropped once it was polled: what entered a node runs to its
//! end (ARCHITECTURE.md, invariant 2). Called by the front ends.

pub mod sparse;
pub mod status;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use heliostat_block::buffer::{Buffer, BufferPool};
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::error::BlockError;
use heliostat_block::graph::Place;
use heliostat_block::nbd::Errno;
use heliostat_block::nbd::reply::{Part, Reply};
use heliostat_block::nbd::request::{Command, Fragments, Request};
use heliostat_block::range::ByteRange;
use heliostat_block::statistics::Statistics;
use heliostat_block::storage::Durability;
use heliostat_block::tracked::Tracked;

use sparse::{Scout, Step};
use status::Contexts;

/// What one client may have in flight. Clones count together; they stay on their thread.
#[derive(Clone, Debug)]
pub struct Permits(Rc<Left>);

#[derive(Debug)]
struct Left {
    requests: Cell<usize>,
    bytes: Cell<u64>,
    /// What there was at first.
    of: (usize, u64),
}

/// The right to have one request in flight; given back when dropped.
#[derive(Debug)]
#[must_use = "a request without its permit is not counted"]
pub struct Permit {
    left: Rc<Left>,
    bytes: u64,
}

impl Permits {
    /// Makes permits for so many requests, with so many bytes of data in all.
    #[must_use]
    pub fn new(requests: usize, bytes: u64) -> Self {
        Self(Rc::new(Left { requests: Cell::new(requests), bytes: Cell::new(bytes), of: (requests, bytes) }))
    }

    /// How many bytes one more request may hold; `None` when there may be no more request.
    #[must_use]
    pub fn room(&self) -> Option<u64> {
        (self.0.requests.get() > 0).then(|| self.0.bytes.get())
    }

    /// How many requests are in flight, and how many bytes they hold.
    #[must_use]
    pub fn held(&self) -> (usize, u64) {
        let (requests, bytes) = self.0.of;
        (requests - self.0.requests.get(), bytes - self.0.bytes.get())
    }

    /// Takes the permit for one request that holds so many bytes: no more than [`Permits::room`] said.
    pub fn take(&self, bytes: u64) -> Permit {
        let requests = self.0.requests.get();
        debug_assert!(requests > 0 && bytes <= self.0.bytes.get(), "taken without room");
        let bytes = bytes.min(self.0.bytes.get());
        self.0.requests.set(requests.saturating_sub(1));
        self.0.bytes.set(self.0.bytes.get() - bytes);
        Permit { left: Rc::clone(&self.0), bytes }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.left.requests.set(self.left.requests.get() + 1);
        self.left.bytes.set(self.left.bytes.get() + self.bytes);
    }
}

/// Memory to read into and to receive into, kept for the next request. Clones share it.
#[derive(Clone)]
pub struct Buffers {
    small: BufferPool,
    medium: BufferPool,
    large: BufferPool,
}

/// The lengths of the three kinds of buffers: what guests' file systems read mostly, one receive, and the
/// largest requests of `qemu-img`. What is longer still is made for its request alone.
const SMALL_LEN: usize = 16 << 10;
const MEDIUM_LEN: usize = 256 << 10;
const LARGE_LEN: usize = 2 << 20;

impl Buffers {
    /// Makes an empty store, which grows with use and keeps at most 13 MiB.
    #[must_use]
    pub fn new() -> Self {
        Self {
            small: BufferPool::new(SMALL_LEN, 64),
            medium: BufferPool::new(MEDIUM_LEN, 16),
            large: BufferPool::new(LARGE_LEN, 4),
        }
    }

    /// Takes a buffer of `len` bytes with unknown contents.
    #[must_use]
    pub fn take(&self, len: usize) -> Buffer {
        let kinds = [(SMALL_LEN, &self.small), (MEDIUM_LEN, &self.medium)];
        let pool =
            kinds.into_iter().find(|(longest, _)| len <= *longest).map_or(&self.large, |(_, pool)| pool);
        pool.take(len)
    }

    /// The pool for payloads that are received into a buffer of their own.
    #[must_use]
    pub fn for_payloads(&self) -> BufferPool {
        self.large.clone()
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new()
    }
}

/// Where clients' requests go, and where they are counted. What was counted stays when another node takes the place.
pub struct Seat {
    /// Where they go.
    pub place: Arc<Place>,
    /// What was counted.
    pub statistics: Statistics,
    /// What clients may ask of its ranges.
    pub contexts: Contexts,
    /// What is known of its holes.
    scout: Scout,
}

impl Seat {
    /// A seat at `place` with nothing counted yet.
    #[must_use]
    pub fn new(place: Arc<Place>) -> Arc<Self> {
        Self::with_contexts(place, Contexts::default())
    }

    /// The same, with `contexts` for clients to ask for.
    #[must_use]
    pub fn with_contexts(place: Arc<Place>, contexts: Contexts) -> Arc<Self> {
        Arc::new(Self { place, statistics: Statistics::default(), contexts, scout: Scout::default() })
    }

    fn count(&self, tracked: &Tracked) {
        if let Some(ended) = tracked.ended() {
            self.statistics.add(ended);
        }
    }
}

/// How many bytes a command holds while it is in flight.
#[must_use]
pub fn bytes_held(command: &Command) -> u64 {
    match command {
        Command::Read { range, .. } => range.len(),
        Command::Write { data, .. } => u64_from(data.len()),
        _ => 0,
    }
}

/// Carries a request out and answers it.
///
/// # Cancel safety
/// None: once polled it must be polled to its end.
pub async fn carry_out(seat: Arc<Seat>, buffers: Buffers, request: Request, permit: Permit) {
    let Request { command, reply } = request;
    if let Command::Cache { .. } = command {
        // A hint; the host's cache reads ahead by itself.
        return reply.done();
    }
    let tracked = seat.place.enter().await;
    match command {
        Command::Read { range, fragments } => {
            let steps = match fragments {
                Fragments::Allowed if reply.takes_parts() => steps(&seat, &tracked, range).await,
                _ => None,
            };
            match steps {
                Some(steps) => read_parts(&seat, &tracked, &buffers, &steps, reply).await,
                None if reply.takes_span()
                    && let Some(span) = tracked.span(range) =>
                {
                    seat.count(&tracked);
                    reply.span(range.offset(), span, tracked);
                }
                None => match read(&seat, &tracked, &buffers, range).await {
                    Ok(buffer) => reply.data(range.offset(), buffer),
                    Err(error) => fail(reply, &error),
                },
            }
        }
        Command::BlockStatus { range, extents, contexts } => {
            match seat.contexts.describe(&tracked, range, extents, &contexts).await {
                Ok(said) => reply.status(range, extents, &said),
                Err(error) => fail(reply, &error),
            }
        }
        command => match change(&seat, &tracked, command).await {
            Ok(()) => reply.done(),
            Err(error) => fail(reply, &error),
        },
    }
    drop(permit);
}

async fn read(
    seat: &Seat,
    tracked: &Tracked,
    buffers: &Buffers,
    range: ByteRange,
) -> Result<Buffer, BlockError> {
    let read = tracked.read(range.offset(), buffers.take(usize_from(range.len()))).await;
    seat.count(tracked);
    read
}

/// What a read is to be made of, where there are holes that it is worth to leave out.
async fn steps(seat: &Seat, tracked: &Tracked, range: ByteRange) -> Option<Vec<Step>> {
    if range.len() < sparse::LEN_MIN || !seat.scout.looks() {
        return None;
    }
    // Who cannot say it can still be read.
    let extents = tracked.extents(range).await.unwrap_or_default();
    let steps = sparse::plan(range, &extents);
    let has_holes = steps.iter().any(|step| matches!(step, Step::Hole(_)));
    seat.scout.learn(has_holes);
    has_holes.then_some(steps)
}

async fn read_parts(seat: &Seat, tracked: &Tracked, buffers: &Buffers, steps: &[Step], reply: Reply) {
    let mut parts = Vec::with_capacity(steps.len());
    for step in steps {
        match *step {
            Step::Hole(range) => parts.push(Part::Hole(range)),
            Step::Read(range) => match read(seat, tracked, buffers, range).await {
                Ok(buffer) => parts.push(Part::Data(range.offset(), buffer)),
                Err(error) => {
                    let errno = Errno::from(error.kind());
                    return reply.failed_at(parts, errno, &error.to_string(), range.offset());
                }
            },
        }
    }
    reply.parts(parts);
}

async fn change(seat: &Seat, tracked: &Tracked, command: Command) -> Result<(), BlockError> {
    let changed = match command {
        Command::Write { offset, data, durability } => tracked.write(offset, data, durability).await,
        Command::WriteZeroes { range, space, effort, durability } => {
            tracked.write_zeroes(range, space, effort, durability).await
        }
        Command::Trim { range, durability } => match tracked.discard(range).await {
            Ok(()) if durability == Durability::Fua => {
                seat.count(tracked);
                tracked.flush().await
            }
            discarded => discarded,
        },
        Command::Flush => tracked.flush().await,
        Command::Read { .. } | Command::BlockStatus { .. } | Command::Cache { .. } => return Ok(()),
    };
    seat.count(tracked);
    changed
}

fn fail(reply: Reply, error: &BlockError) {
    reply.failed(Errno::from(error.kind()), &error.to_string());
}

/// The same data in memory of their own, so that they keep no receive buffer alive.
#[must_use]
pub fn detached(data: &Bytes) -> Bytes {
    Buffer::copy_of(data).freeze()
}
