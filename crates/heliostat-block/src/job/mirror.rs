//! [`Mirror`]: makes a target equal a source that is being written to, keeps it so, and ends as told.
//!
//! This is the loop that acts: it looks ([`View`]), lets `mirror_step` decide, and carries the step out. It
//! runs on a thread of its own, beside the guests'; it never holds a guest up but behind the gate at the end,
//! and never answers for the target. Started by the control plane, which made its [`Job`].

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::copy::{Copied, CopyError, Route};
use super::doubling::{Copying, Doubling, Payload, TargetHalf};
use super::mirror_step::{Gate, Scan, Step, View, next_step};
use super::progress::{Counted, Progress, TimeLeft};
use super::rate::Pace;
use super::scan::{Scanned, SyncMode, scan};
use super::unflushed::Unflushed;
use super::{CopyMode, End, ErrorAction, Figures, Job, JobEvent, JobStatus, OnError, Operation};
use crate::buffer::BufferPool;
use crate::clock::{Clock, LocalFuture, Moment};
use crate::convert::usize_from;
use crate::dirty_bitmap::DirtyBitmap;
use crate::error::{BlockError, ErrorKind};
use crate::graph::{Graph, Place};
use crate::latency::LatencySnapshot;
use crate::limits::{
    BUF_SIZE_DEFAULT, COPIES_IN_FLIGHT_MAX, COPY_LEN_MAX, GATHER, GRANULARITY_DEFAULT, PAUSE_BUDGET_FIRST,
    PAUSE_BUDGET_LAST, REST_FIRST, REST_LAST, TARGET_DEADLINE_DEFAULT, TICK,
};
use crate::node::Drained;
use crate::storage::ZeroSpace;

/// A mirror's arguments (MIRROR.md section 2), checked by the control plane.
#[derive(Clone, Copy, Debug)]
pub struct MirrorOptions {
    /// What the first pass copies.
    pub sync: SyncMode,
    /// Bytes a dirty bit; a power of two, 512 B to 64 MiB.
    pub granularity: u32,
    /// Bytes of copies in flight; rounded up to the granularity.
    pub buf_size: u64,
    /// What to do when the source cannot be read.
    pub on_source_error: OnError,
    /// What to do when the target cannot be written or flushed.
    pub on_target_error: OnError,
    /// Zeroes may become holes on the target.
    pub unmap: bool,
    /// The target is known to read as zero all over.
    pub target_is_zero: bool,
    /// Data that is all zero is not written as data.
    pub detect_zeroes: bool,
    /// How long a guest waits for the target's half of its write.
    pub target_deadline: Duration,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        Self {
            sync: SyncMode::Full,
            granularity: GRANULARITY_DEFAULT,
            buf_size: BUF_SIZE_DEFAULT,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            unmap: true,
            target_is_zero: false,
            detect_zeroes: false,
            target_deadline: TARGET_DEADLINE_DEFAULT,
        }
    }
}

/// Something that the mirror had under way has ended.
enum Done {
    Copied(Copying, Result<Copied, CopyError>),
    Half(TargetHalf, Result<(), BlockError>),
    Flushed(Result<(), BlockError>),
    Scanned(Result<Scanned, BlockError>),
}

/// The source's gate in the job's hands.
enum Held {
    Open,
    Closing(LocalFuture<'static, Drained>),
    Closed(Drained),
}

/// Counts of what was done.
#[derive(Default)]
struct Totals {
    done: u64,
    data: u64,
    zeroes_skipped: u64,
    errors_ignored: u64,
}

/// What the target takes while it is given all it can take: bytes over the time in which copies were in flight.
#[derive(Default)]
struct Capacity {
    busy_since: Option<(Moment, u64)>,
    bytes_per_second: Option<u64>,
}

/// A running mirror.
pub struct Mirror {
    job: Arc<Job>,
    graph: Arc<Graph>,
    /// Held so that the graph knows; let go before the end is said, so that who hears it may delete the nodes.
    places: Vec<Arc<Place>>,
    route: Arc<Route>,
    doubling: Arc<Doubling>,
    unflushed: Unflushed,
    options: MirrorOptions,
    clock: Arc<dyn Clock>,
    work: FuturesUnordered<LocalFuture<'static, Done>>,
    copies: usize,
    halves: usize,
    scan: Scan,
    scanned_to: u64,
    /// Where the next copy looks first.
    cursor: u64,
    /// Everything that the scan has marked has been copied once; what is left is the guests' doing.
    first_pass_over: bool,
    /// There was nothing that could be copied when it last looked; until something changes.
    blocked: bool,
    held: Held,
    gate_closed_at: Moment,
    flushing_for_end: bool,
    flushed_once: bool,
    flushed_for_end: bool,
    pace: Pace,
    capacity: Capacity,
    /// Since when it has been trying to get READY, or to end.
    trying_since: Moment,
    resting_until: Option<Moment>,
    rest: Duration,
    gather_until: Option<Moment>,
    failure: Option<String>,
    totals: Totals,
    progress: Progress,
    figures: Figures,
    told_at: Option<Moment>,
    latency_window: (Moment, LatencySnapshot),
}

impl Mirror {
    /// Makes a mirror of `source` to `target`, whose places the caller has attached in `graph`, and lets the
    /// source's writes be heard from now on.
    #[must_use]
    pub fn new(
        job: Arc<Job>,
        graph: Arc<Graph>,
        source: Arc<Place>,
        target: Arc<Place>,
        options: MirrorOptions,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (source_node, target_node) = (source.node(), target.node());
        let size = source_node.size();
        let bitmap =
            DirtyBitmap::new(size, options.granularity).expect("the caller has checked the granularity");
        let write_blocking = job.options().copy_mode == CopyMode::WriteBlocking;
        let doubling = Doubling::new(bitmap, write_blocking, options.target_deadline, Arc::clone(&clock));
        let now = clock.now();
        let before = source_node.latencies().snapshot();
        let figures = Figures { guest_p99_before: before.quantile(990), ..Figures::default() };
        let piece = COPY_LEN_MAX.max(u64::from(options.granularity));
        source_node.attach_doubling(Arc::clone(&doubling));
        Self {
            route: Arc::new(Route {
                source: source_node,
                target: target_node,
                buffers: BufferPool::new(usize_from(piece), COPIES_IN_FLIGHT_MAX),
                detect_zeroes: options.detect_zeroes,
                zero_space: if options.unmap { ZeroSpace::MayUnmap } else { ZeroSpace::Keep },
                trust_target: AtomicBool::new(true),
            }),
            job,
            graph,
            places: vec![source, target],
            unflushed: Unflushed::new(size, options.granularity),
            doubling,
            scan: if options.sync == SyncMode::None { Scan::Over } else { Scan::Ahead },
            options,
            work: FuturesUnordered::new(),
            copies: 0,
            halves: 0,
            scanned_to: 0,
            cursor: 0,
            first_pass_over: options.sync == SyncMode::None,
            blocked: false,
            held: Held::Open,
            gate_closed_at: now,
            flushing_for_end: false,
            flushed_once: false,
            flushed_for_end: false,
            pace: Pace::default(),
            capacity: Capacity::default(),
            trying_since: now,
            resting_until: None,
            rest: REST_FIRST,
            gather_until: None,
            failure: None,
            totals: Totals::default(),
            progress: Progress::default(),
            figures,
            told_at: None,
            latency_window: (now, before),
            clock,
        }
    }

    /// Runs until the job has ended.
    ///
    /// # Cancel safety
    /// Must not be dropped: the target's halves of guests' writes would be of unknown fate.
    pub async fn run(mut self) {
        if self.route.source.size() != self.route.target.size() {
            self.failure = Some("Source and target image have different sizes".to_owned());
        }
        loop {
            // Taken before anything is looked at, so that no change between the look and the wait is missed.
            let changed = self.job.listen();
            self.take_orders();
            self.start_halves().await;
            self.tell_figures(false);
            match next_step(self.view()) {
                Step::Wait => self.wait(changed, false).await,
                Step::WaitForMarks => self.wait(changed, true).await,
                Step::EndAborted => return self.end_aborted(),
                Step::Pivot => return self.end(End::Complete),
                Step::EndWithCopy => return self.end(End::Copy),
                step => self.carry_out(step).await,
            }
        }
    }

    // ------------------------------------------------------------------ look

    fn take_orders(&mut self) {
        let orders = self.job.orders();
        self.pace.set_speed(orders.speed, self.clock.now());
        self.doubling.set_write_blocking(orders.copy_mode == CopyMode::WriteBlocking);
    }

    fn view(&mut self) -> View {
        let now = self.clock.now();
        let passed = |until: Option<Moment>| until.is_none_or(|until| until <= now);
        let bitmap = self.doubling.bitmap();
        let clean = bitmap.is_clean();
        let left = self.left();
        let orders = self.job.orders();
        let gathering = !passed(self.gather_until) && orders.end.is_none();
        let room = self.copies == 0
            || (self.copies < COPIES_IN_FLIGHT_MAX && self.doubling.copying_bytes() < self.options.buf_size);
        View {
            status: self.job.status(),
            orders,
            failed: self.failure.is_some(),
            scan: self.scan,
            copyable: !clean && room && !self.blocked && !gathering,
            pace_allows: self.pace.wait_until(now).is_none(),
            clean,
            nearly_clean: left == 0 || (self.first_pass_over && left <= self.pause_budget(now)),
            copies: self.copies,
            doubled: self.doubling.doubled_in_flight(),
            flush: self.unflushed.state(),
            flushed_once: self.flushed_once,
            flushed_for_end: self.flushed_for_end,
            gate: match self.held {
                Held::Open => Gate::Open,
                Held::Closing(_) => Gate::Closing,
                Held::Closed(_) => Gate::Closed,
            },
            resting: !passed(self.resting_until),
        }
    }

    fn left(&self) -> u64 {
        self.doubling.bitmap().dirty_bytes() + self.doubling.copying_bytes()
    }

    /// What may be left when the gate closes: what the target takes in a few milliseconds; in more of them the
    /// longer it has been tried, so that a steady writer cannot put the end off for ever.
    fn pause_budget(&self, now: Moment) -> u64 {
        let tried = now.since(self.trying_since);
        let pause = (PAUSE_BUDGET_FIRST + tried / 16).min(PAUSE_BUDGET_LAST);
        let per_second = self.capacity.bytes_per_second.unwrap_or(COPY_LEN_MAX * 100);
        let bytes = u128::from(per_second) * pause.as_micros() / 1_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX).max(u64::from(self.options.granularity) * 2)
    }

    // ------------------------------------------------------------------ act

    async fn carry_out(&mut self, step: Step) {
        match step {
            Step::Scan => self.start_scan().await,
            Step::Copy => self.start_copy().await,
            Step::Flush => self.start_flush().await,
            Step::BecomeReady => {
                self.tell_figures(true);
                self.job.become_status(JobStatus::Ready);
                self.job.say(&JobEvent::Ready);
            }
            Step::BecomePaused => self.job.become_status(match self.job.status() {
                JobStatus::Ready => JobStatus::Standby,
                _ => JobStatus::Paused,
            }),
            Step::Continue => {
                self.resting_until = None;
                self.trying_since = self.clock.now();
                self.progress.restart();
                self.job.become_status(match self.job.status() {
                    JobStatus::Standby => JobStatus::Ready,
                    _ => JobStatus::Running,
                });
            }
            Step::BecomePending => {
                self.tell_figures(true);
                self.job.become_status(JobStatus::Waiting);
                self.job.become_status(JobStatus::Pending);
                self.job.say(&JobEvent::Pending);
            }
            Step::CloseGate => {
                self.gate_closed_at = self.clock.now();
                let source = Arc::clone(&self.route.source);
                self.held = Held::Closing(Box::pin(async move { source.drain().await }));
                // The gate closes when the drain is first polled.
                std::future::poll_fn(|cx| Poll::Ready(self.poll_drain(cx))).await;
            }
            Step::OpenGate => self.open_gate(),
            Step::Abort => {
                self.job.become_status(JobStatus::Aborting);
                self.route.source.detach_doubling();
                self.doubling.close();
            }
            Step::Wait | Step::WaitForMarks | Step::Pivot | Step::EndWithCopy | Step::EndAborted => {}
        }
    }

    fn open_gate(&mut self) {
        self.held = Held::Open;
        self.flushed_for_end = false;
        self.figures.pause = Some(self.clock.now().since(self.gate_closed_at));
    }

    /// Runs `work` as far as it goes at once, and keeps it where it goes no further.
    async fn launch(&mut self, work: impl Future<Output = Done> + 'static) {
        let mut work: LocalFuture<'static, Done> = Box::pin(work);
        let first = std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
        match first {
            Poll::Ready(done) => {
                self.take_in(done);
                // What ends at once would otherwise keep the thread from everything else on it.
                yield_once().await;
            }
            Poll::Pending => self.work.push(work),
        }
    }

    async fn start_halves(&mut self) {
        while let Some(half) = self.doubling.next_half() {
            self.halves += 1;
            self.pace.spend(half.range.len(), self.clock.now());
            let target = Arc::clone(&self.route.target);
            self.launch(async move {
                let tracked = target.enter().await;
                let written = match half.payload.clone() {
                    Payload::Data(data) => tracked.write(half.range.offset(), data, half.durability).await,
                    Payload::Zeroes(space) => {
                        let effort = crate::storage::ZeroEffort::Any;
                        tracked.write_zeroes(half.range, space, effort, half.durability).await
                    }
                };
                Done::Half(half, written)
            })
            .await;
        }
    }

    async fn start_scan(&mut self) {
        self.scan = Scan::Running;
        let route = Arc::clone(&self.route);
        let (from, target_is_zero) = (self.scanned_to, self.options.target_is_zero);
        self.launch(
            async move { Done::Scanned(scan(&route.source, &route.target, from, target_is_zero).await) },
        )
        .await;
    }

    async fn start_copy(&mut self) {
        let longest = self.pace.copy_len(COPY_LEN_MAX);
        let from_cursor = self.doubling.begin_copy(self.cursor, longest);
        // The scan has set the cursor back to 0 at its end, so that reaching the end means a whole round.
        self.first_pass_over |= from_cursor.is_none() && self.scan == Scan::Over;
        let Some(copying) = from_cursor.or_else(|| self.doubling.begin_copy(0, longest)) else {
            self.blocked = true;
            return;
        };
        let now = self.clock.now();
        self.cursor = copying.range().end();
        self.pace.spend(copying.range().len(), now);
        self.copies += 1;
        self.capacity.copies_begin(now, self.totals.done);
        let route = Arc::clone(&self.route);
        self.launch(async move {
            let copied = route.copy(copying.range()).await;
            Done::Copied(copying, copied)
        })
        .await;
    }

    async fn start_flush(&mut self) {
        self.unflushed.flush_begins();
        self.flushing_for_end = self.job.orders().end.is_some();
        let target = Arc::clone(&self.route.target);
        self.launch(async move { Done::Flushed(target.enter().await.flush().await) }).await;
    }

    // ------------------------------------------------------------------ take in

    fn take_in(&mut self, done: Done) {
        self.blocked = false;
        match done {
            Done::Copied(copying, copied) => self.take_in_copy(copying, copied),
            Done::Half(half, written) => {
                self.halves -= 1;
                self.unflushed.wrote(half.range);
                self.doubling.half_ended(half, written.is_ok());
                if let Err(error) = written {
                    self.meet_error(Operation::Write, &error);
                }
            }
            Done::Flushed(Ok(())) => {
                self.unflushed.flush_succeeded();
                self.flushed_once |= self.scan == Scan::Over;
                self.flushed_for_end |= self.flushing_for_end;
            }
            Done::Flushed(Err(error)) => {
                self.unflushed.flush_failed(self.doubling.bitmap());
                self.route.trust_target.store(false, Ordering::Relaxed);
                self.flushed_once = false;
                self.flushed_for_end = false;
                self.meet_error(Operation::Write, &error);
            }
            Done::Scanned(Ok(scanned)) => {
                for range in &scanned.dirty {
                    self.doubling.bitmap().mark(*range);
                }
                self.scanned_to = scanned.range.end();
                let over = self.scanned_to >= self.route.source.size();
                self.scan = if over { Scan::Over } else { Scan::Ahead };
                if over {
                    self.cursor = 0;
                    self.trying_since = self.clock.now();
                    self.progress.restart();
                }
            }
            Done::Scanned(Err(error)) => {
                self.scan = Scan::Ahead;
                self.meet_error(Operation::Read, &error);
            }
        }
    }

    fn take_in_copy(&mut self, copying: Copying, copied: Result<Copied, CopyError>) {
        let range = copying.range();
        // Also when it failed: some of it may have reached the target.
        self.unflushed.wrote(range);
        self.doubling.end_copy(copying, copied.is_ok());
        self.copies -= 1;
        match copied {
            Ok(copied) => {
                self.rest = REST_FIRST;
                self.totals.done += range.len();
                self.totals.data += copied.data;
                self.totals.zeroes_skipped += copied.zeroed + copied.skipped;
            }
            Err((operation, error)) => self.meet_error(operation, &error),
        }
        if self.copies == 0 {
            self.capacity.copies_end(self.clock.now(), self.totals.done);
        }
    }

    /// Does what the policy says about an error. The range is dirty again already.
    fn meet_error(&mut self, operation: Operation, error: &BlockError) {
        let policy = match operation {
            Operation::Read => self.options.on_source_error,
            Operation::Write => self.options.on_target_error,
        };
        let no_space = error.kind() == ErrorKind::NoSpace;
        let action = policy.action(no_space);
        self.job.say(&JobEvent::Error {
            operation,
            action,
            node: error.node().to_owned(),
            range: error.range(),
            errno: error.errno(),
        });
        match action {
            ErrorAction::Report => {
                self.failure.get_or_insert_with(|| error.to_string());
            }
            // A pending job takes no `resume`, so it is not paused: it stays pending and can be finalized again.
            ErrorAction::Stop if self.job.status() == JobStatus::Pending => {
                self.job.withdraw_finalize();
                self.take_a_rest();
            }
            ErrorAction::Stop => self.job.stop_for_error(no_space),
            ErrorAction::Ignore => {
                self.totals.errors_ignored += 1;
                self.take_a_rest();
            }
        }
    }

    /// An error that stays must not spin: each rest is twice as long as the last.
    fn take_a_rest(&mut self) {
        self.resting_until = Some(self.clock.now() + self.rest);
        self.rest = (self.rest * 2).min(REST_LAST);
    }

    // ------------------------------------------------------------------ wait

    async fn wait(&mut self, changed: event_listener::EventListener, marks: bool) {
        let now = self.clock.now();
        let clean = self.doubling.bitmap().is_clean();
        let gathering = self.gather_until.is_some_and(|until| until > now);
        let timers = [self.pace.wait_until(now), self.resting_until, self.gather_until];
        let next = timers.into_iter().flatten().filter(|at| *at > now).min();
        let until = if marks && clean { now + TICK * 10 } else { now + TICK };
        let wake_at = next.map_or(until, |at| at.min(until));

        let doubling = Arc::clone(&self.doubling);
        let marks = marks && clean && !gathering;
        let left = doubling.listen_left();
        let work_there = doubling.wait_for_work(marks);
        let outside = async {
            futures_util::future::select(pin!(work_there), pin!(left)).await;
        };
        let outside = async {
            futures_util::future::select(pin!(outside), changed).await;
        };
        self.wait_with(wake_at, outside).await;
        self.blocked = false;
        if marks && !self.doubling.bitmap().is_clean() {
            self.gather_until = Some(self.clock.now() + GATHER);
        }
    }

    /// Waits until something under way ends, the drain is over, `outside` says so, or it is `wake_at`.
    async fn wait_with(&mut self, wake_at: Moment, outside: impl Future<Output = ()>) {
        let mut timer = self.clock.sleep_until(wake_at);
        let mut outside = pin!(outside);
        let done = std::future::poll_fn(|cx| {
            if let Poll::Ready(Some(done)) = self.work.poll_next_unpin(cx) {
                return Poll::Ready(Some(done));
            }
            if self.poll_drain(cx)
                || timer.as_mut().poll(cx).is_ready()
                || outside.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(None);
            }
            Poll::Pending
        })
        .await;
        if let Some(done) = done {
            self.take_in(done);
        }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> bool {
        let Held::Closing(drain) = &mut self.held else { return false };
        match Pin::as_mut(drain).poll(cx) {
            Poll::Ready(drained) => {
                self.held = Held::Closed(drained);
                true
            }
            Poll::Pending => false,
        }
    }

    // ------------------------------------------------------------------ end

    fn end(mut self, end: End) {
        if self.job.status() != JobStatus::Pending {
            self.job.become_status(JobStatus::Waiting);
            self.job.become_status(JobStatus::Pending);
        }
        self.route.source.detach_doubling();
        self.doubling.close();
        if let (End::Complete, Held::Closed(drained)) = (end, &self.held) {
            self.graph.pivot(drained, &self.route.target);
        }
        self.open_gate();
        self.tell_figures(true);
        self.places.clear();
        self.job.conclude(JobEvent::Completed(None));
    }

    fn end_aborted(mut self) {
        self.tell_figures(true);
        self.places.clear();
        let event = match self.failure.take() {
            Some(failure) => JobEvent::Completed(Some(failure)),
            None => JobEvent::Cancelled,
        };
        self.job.conclude(event);
    }

    // ------------------------------------------------------------------ tell

    fn counted(&self) -> Counted {
        let done = self.totals.done + self.doubling.doubled_bytes();
        Counted { done, copied: self.totals.done, left: self.left() }
    }

    /// Tells the job's figures, now and then or at once.
    fn tell_figures(&mut self, at_once: bool) {
        let now = self.clock.now();
        let due = self.told_at.is_none_or(|told| now.since(told) >= TICK);
        if !due && !at_once {
            return;
        }
        self.told_at = Some(now);
        let counted = self.counted();
        self.progress.sample(now, counted);
        let rates = self.progress.rates(now, counted);
        let paused = self.job.orders().paused;
        self.window_latency(now);
        self.figures = Figures {
            offset: counted.done,
            len: counted.done + counted.left,
            dirty: counted.left,
            unscanned: if self.scan == Scan::Over { 0 } else { self.route.source.size() - self.scanned_to },
            rates,
            time_left: if paused { TimeLeft::Paused } else { rates.time_left(counted.left) },
            actively_synced: self.scan == Scan::Over
                && counted.left == 0
                && self.doubling.is_write_blocking(),
            busy: !paused && self.pace.wait_until(now).is_none(),
            data_copied: self.totals.data,
            zeroes_skipped: self.totals.zeroes_skipped,
            errors_ignored: self.totals.errors_ignored,
            ..self.figures.clone()
        };
        self.job.tell_figures(self.figures.clone());
    }

    fn window_latency(&mut self, now: Moment) {
        if now.since(self.latency_window.0) >= Duration::from_secs(1) {
            let snapshot = self.route.source.latencies().snapshot();
            self.figures.guest_p99_now = snapshot.since(&self.latency_window.1).quantile(990);
            self.latency_window = (now, snapshot);
        }
    }
}

impl Capacity {
    fn copies_begin(&mut self, now: Moment, done: u64) {
        self.busy_since.get_or_insert((now, done));
    }

    /// No copy is in flight any more: takes in how fast it went, the past counting for seven eighths.
    fn copies_end(&mut self, now: Moment, done: u64) {
        let Some((since, done_then)) = self.busy_since.take() else { return };
        let nanos = now.since(since).as_nanos().max(1);
        let rate = u128::from(done - done_then) * 1_000_000_000 / nanos;
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        self.bytes_per_second = Some(self.bytes_per_second.map_or(rate, |old| old - old / 8 + rate / 8));
    }
}

/// Lets the thread's other tasks and its ring have their turn.
async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
