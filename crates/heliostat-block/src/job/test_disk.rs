//! A mirror between two disks in memory, driven by hand: for tests of what the loop that acts does.
//!
//! The disks answer at once, but for writes that a test holds up. Time passes only while somebody waits.

use std::collections::BTreeSet;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use event_listener::Event;

use super::bitmaps::Bitmaps;
use super::mirror::{Mirror, MirrorOptions};
use super::{Job, JobEvent, JobOptions};
use crate::buffer::Buffer;
use crate::clock::{Clock, LocalFuture, Moment};
use crate::convert::{u64_from, usize_from};
use crate::driver::{Driver, Raw};
use crate::graph::{Graph, Place, Role};
use crate::name::NodeName;
use crate::node::{Node, NodeOptions};
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};
use crate::throttle::while_wanted;

pub(crate) const SECTOR: usize = 512;

/// A clock that a test moves on.
#[derive(Default)]
pub(crate) struct Ticking(Arc<Mutex<Duration>>);

impl Ticking {
    fn time(&self) -> MutexGuard<'_, Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for Ticking {
    fn now(&self) -> Moment {
        Moment::from_start(*self.time())
    }

    fn sleep_until(&self, deadline: Moment) -> LocalFuture<'static, ()> {
        let clock = Self(Arc::clone(&self.0));
        Box::pin(std::future::poll_fn(move |_| match clock.now() >= deadline {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }))
    }
}

/// What a disk says of the layout of a range.
pub(crate) type Says = fn(ByteRange) -> Vec<Extent>;

/// A disk in memory.
pub(crate) struct Disk {
    state: Mutex<State>,
    released: Event,
}

struct State {
    shown: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors that a flush makes durable, and a failed one loses.
    cached: BTreeSet<usize>,
    flushes_to_fail: u32,
    losses: u64,
    /// Flushes that find it cut off, and succeed when it is back.
    flushes_to_lose: u32,
    flushes: u32,
    holds_writes: bool,
    /// Writes that a test holds up.
    held: usize,
    /// So many of those find no space when they are let go.
    failing: usize,
    /// Reads wait as long as a test wants.
    holds_reads: bool,
    /// It is given up when it has been told so as often as this.
    give_ups_until: Option<u32>,
    is_remote: bool,
    /// What it says of its layout, where a test wants to say it.
    says: Option<Says>,
    /// What is read of it is what that one shows.
    reads_as: Option<Arc<Disk>>,
}

impl State {
    fn lose(&mut self) {
        for sector in std::mem::take(&mut self.cached) {
            let bytes = sector * SECTOR..((sector + 1) * SECTOR).min(self.shown.len());
            self.shown[bytes.clone()].copy_from_slice(&self.durable[bytes]);
        }
        self.losses += 1;
    }
}

impl Disk {
    pub(crate) fn of(bytes: Vec<u8>) -> Arc<Self> {
        let state = State {
            durable: bytes.clone(),
            shown: bytes,
            cached: BTreeSet::new(),
            flushes_to_fail: 0,
            losses: 0,
            flushes_to_lose: 0,
            flushes: 0,
            holds_writes: false,
            held: 0,
            failing: 0,
            holds_reads: false,
            give_ups_until: None,
            is_remote: false,
            says: None,
            reads_as: None,
        };
        Arc::new(Self { state: Mutex::new(state), released: Event::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is read of it.
    pub(crate) fn shown(&self) -> Vec<u8> {
        self.state().shown.clone()
    }

    /// What a crash would leave of it.
    pub(crate) fn durable(&self) -> Vec<u8> {
        self.state().durable.clone()
    }

    /// All of it shows `byte`, and none of that is durable.
    pub(crate) fn fill_cache(&self, byte: u8) {
        let mut state = self.state();
        state.shown.fill(byte);
        state.cached = (0..state.shown.len() / SECTOR).collect();
    }

    /// The next `count` flushes fail, and lose what they were to make durable.
    pub(crate) fn fail_flushes(&self, count: u32) {
        self.state().flushes_to_fail = count;
    }

    /// It is back with other contents, and says by its count that something may have been lost.
    pub(crate) fn become_other(&self, byte: u8) {
        let mut state = self.state();
        state.shown.fill(byte);
        state.durable.fill(byte);
        state.cached.clear();
        state.losses += 1;
    }

    /// It loses what was not flushed, and says by its count that it may have.
    pub(crate) fn lose(&self) {
        self.state().lose();
    }

    /// So it does at each of the next `count` flushes, which succeed.
    pub(crate) fn lose_at_flushes(&self, count: u32) {
        self.state().flushes_to_lose = count;
    }

    /// Who reads it sees `other`: to compare the two tells nothing.
    pub(crate) fn reads_as(&self, other: &Arc<Self>) {
        self.state().reads_as = Some(Arc::clone(other));
    }

    /// Its extents are what `says` says.
    pub(crate) fn says(&self, says: Says) {
        self.state().says = Some(says);
    }

    /// How often it has been flushed.
    pub(crate) fn flushes(&self) -> u32 {
        self.state().flushes
    }

    /// Whether a flush is still to fail.
    pub(crate) fn will_fail(&self) -> bool {
        self.state().flushes_to_fail > 0
    }

    /// Of writes that come from now on the first sector lands at once, the rest not before [`Disk::release`].
    pub(crate) fn hold_writes(&self) {
        self.state().holds_writes = true;
    }

    /// How many writes are held up.
    pub(crate) fn held(&self) -> usize {
        self.state().held
    }

    pub(crate) fn release(&self) {
        self.state().holds_writes = false;
        self.released.notify(usize::MAX);
    }

    /// Those that are held up have found no space; what comes from now on is held up still.
    pub(crate) fn fail_held(&self) {
        let mut state = self.state();
        state.failing = state.held;
        drop(state);
        self.released.notify(usize::MAX);
    }

    /// Reads that come from now on wait, until that is said to be over; as a server's, only as long as they are wanted.
    pub(crate) fn hold_reads(&self, holds: bool) {
        self.state().holds_reads = holds;
        self.released.notify(usize::MAX);
    }

    /// Of requests that are held those end that were there before it was given up for the `count`th time.
    pub(crate) fn let_go_at_give_up(&self, count: u32) {
        self.state().give_ups_until = Some(count);
    }

    /// It is on another host.
    pub(crate) fn be_remote(&self) {
        self.state().is_remote = true;
    }

    fn put(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let start = usize_from(offset);
        state.shown[start..start + data.len()].copy_from_slice(data);
        state.cached.extend(start / SECTOR..(start + data.len()).div_ceil(SECTOR));
    }

    fn fails(&self) -> bool {
        let mut state = self.state();
        let fails = state.failing > 0;
        state.failing -= usize::from(fails);
        fails
    }

    fn lets_go(&self) -> bool {
        let state = self.state();
        !state.holds_writes || state.failing > 0
    }

    async fn released(&self) {
        loop {
            let released = self.released.listen();
            if self.lets_go() {
                return;
            }
            released.await;
        }
    }
}

impl Storage for Disk {
    fn traits(&self) -> Traits {
        Traits {
            block_size: 1,
            preferred_size: 4096,
            read_only: false,
            can_discard: true,
            can_zero_fast: true,
            can_resize: false,
            remote: self.state().is_remote,
        }
    }

    fn size(&self) -> u64 {
        u64_from(self.state().shown.len())
    }

    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        let other = self.state().reads_as.clone();
        if let Some(other) = other {
            let (start, len) = (usize_from(offset), buffer.len());
            buffer.copy_from_slice(&other.shown()[start..start + len]);
            return IoFuture::ready(Ok(buffer));
        }
        let start = usize_from(offset);
        let len = buffer.len();
        if !self.state().holds_reads {
            buffer.copy_from_slice(&self.state().shown[start..start + len]);
            return IoFuture::ready(Ok(buffer));
        }
        IoFuture::pending(async move {
            let is_wanted = while_wanted(async {
                loop {
                    let released = self.released.listen();
                    if !self.state().holds_reads {
                        break;
                    }
                    released.await;
                }
            });
            is_wanted.await.ok_or(io::ErrorKind::Interrupted)?;
            buffer.copy_from_slice(&self.state().shown[start..start + len]);
            Ok(buffer)
        })
    }

    fn give_up(&self) {
        let mut state = self.state();
        let Some(count) = &mut state.give_ups_until else { return };
        *count = count.saturating_sub(1);
        if *count == 0 {
            state.holds_writes = false;
            drop(state);
            self.released.notify(usize::MAX);
        }
    }

    fn write(&self, offset: u64, data: Bytes, _: Durability) -> IoFuture<'_, ()> {
        if !self.state().holds_writes {
            self.put(offset, &data);
            return IoFuture::ready(Ok(()));
        }
        IoFuture::pending(async move {
            let (first, rest) = data.split_at(SECTOR.min(data.len()));
            self.put(offset, first);
            self.state().held += 1;
            self.released().await;
            self.state().held -= 1;
            if self.fails() {
                return Err(io::Error::from_raw_os_error(28));
            }
            self.put(offset + u64_from(first.len()), rest);
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        _: ZeroSpace,
        _: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        self.write(range.offset(), Bytes::from(vec![0; usize_from(range.len())]), durability)
    }

    fn discard(&self, _: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::ready(Ok(()))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        let mut state = self.state();
        if state.flushes_to_lose > 0 {
            state.flushes_to_lose -= 1;
            state.lose();
        }
        let cached = std::mem::take(&mut state.cached);
        state.flushes += 1;
        if state.flushes_to_fail > 0 {
            state.flushes_to_fail -= 1;
            return IoFuture::ready(Err(io::Error::from_raw_os_error(5)));
        }
        for sector in cached {
            let bytes = sector * SECTOR..((sector + 1) * SECTOR).min(state.shown.len());
            let State { shown, durable, .. } = &mut *state;
            durable[bytes.clone()].copy_from_slice(&shown[bytes]);
        }
        IoFuture::ready(Ok(()))
    }

    fn losses(&self) -> u64 {
        self.state().losses
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        let state = self.state();
        if let Some(says) = state.says {
            return IoFuture::ready(Ok(says(range)));
        }
        let is_zero = |byte: u64| state.shown[usize_from(byte)] == 0;
        let first = is_zero(range.offset());
        let end = (range.offset()..range.end()).find(|byte| is_zero(*byte) != first).unwrap_or(range.end());
        let status = if first { ExtentStatus::Hole } else { ExtentStatus::Data };
        let range = ByteRange::from_bounds(range.offset(), end);
        IoFuture::ready(Ok(vec![Extent { range, status }]))
    }
}

/// A node of `storage`.
pub(crate) fn node_of(name: &str, storage: Arc<dyn Storage>, clock: &Arc<Ticking>) -> Arc<Node> {
    let clock: Arc<dyn Clock> = Arc::<Ticking>::clone(clock);
    let driver = Driver::Raw(Raw::whole(storage));
    Node::new(NodeName::new(name).unwrap(), driver, NodeOptions::default(), clock)
}

/// Two disks, their nodes, and an export of the source.
pub(crate) struct Bench {
    pub(crate) clock: Arc<Ticking>,
    pub(crate) graph: Arc<Graph>,
    pub(crate) source: Arc<Node>,
    pub(crate) target: Arc<Node>,
    pub(crate) export: Arc<Place>,
}

impl Bench {
    pub(crate) fn new(source: Arc<Disk>, target: Arc<Disk>) -> Self {
        Self::at(Arc::default(), source, target)
    }

    /// One whose time is that of this one.
    pub(crate) fn beside(&self, source: Arc<Disk>, target: Arc<Disk>) -> Self {
        Self::at(Arc::clone(&self.clock), source, target)
    }

    fn at(clock: Arc<Ticking>, source: Arc<Disk>, target: Arc<Disk>) -> Self {
        let graph = Arc::<Graph>::default();
        let (source, target) = (node_of("disk0", source, &clock), node_of("disk1", target, &clock));
        graph.add(Arc::clone(&source)).unwrap();
        graph.add(Arc::clone(&target)).unwrap();
        let export = Role::Export { id: "export".to_owned(), writable: true };
        let export = graph.attach(&source, export).unwrap();
        Self { clock, graph, source, target, export }
    }

    /// Starts a job whose events `observer` hears, and makes its mirror.
    pub(crate) fn mirror(
        &self,
        options: MirrorOptions,
        observer: impl Fn(&Job, &JobEvent) + Send + Sync + 'static,
    ) -> (Arc<Job>, Mirror) {
        self.mirror_of(Job::start("job0".to_owned(), JobOptions::default(), Arc::new(observer)), options)
    }

    /// Makes the mirror of a job that has started.
    pub(crate) fn mirror_of(&self, job: Arc<Job>, options: MirrorOptions) -> (Arc<Job>, Mirror) {
        let role = Role::MirrorSource { job: "job0".to_owned() };
        let source = self.graph.attach(&self.source, role).unwrap();
        let role = Role::MirrorTarget { job: "job0".to_owned() };
        let target = self.graph.attach(&self.target, role).unwrap();
        let bitmaps = Bitmaps::new(&self.source, options.granularity).unwrap();
        let (graph, clock) = (Arc::clone(&self.graph), Arc::<Ticking>::clone(&self.clock));
        let mirror = Mirror::new(Arc::clone(&job), graph, source, target, options, bitmaps, clock);
        (job, mirror)
    }

    /// Runs `work` to its end, with `beside` before each step; a millisecond passes with each.
    pub(crate) fn run<T>(&self, work: impl Future<Output = T>, mut beside: impl FnMut()) -> T {
        let mut work = pin!(work);
        for _ in 0..100_000 {
            beside();
            if let Poll::Ready(value) = work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return value;
            }
            *self.clock.time() += Duration::from_millis(1);
        }
        panic!("it does not come to its end");
    }
}
