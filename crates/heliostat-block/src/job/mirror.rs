//! [`Mirror`]: makes a target equal a source that is being written to, keeps it so, and ends as told.
//!
//! This is the loop that acts: it looks ([`View`]), lets `mirror_step` decide, and carries the step out. It
//! runs on a thread of its own, beside the guests'; it never holds a guest up but behind the gate at the end,
//! and never answers for the target. Started by the control plane, which made its [`Job`].

mod degraded;
mod end;
mod errors;
mod trust;

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use event_listener::EventListener;
use futures_util::FutureExt;

use super::attempt::Attempt;
use super::bitmaps::Bitmaps;
use super::by_bitmap::ByBitmap;
use super::copy::{Copied, CopyError, Route};
use super::doubling::{Copying, Doubling};
use super::figures::{Standing, Tally};
use super::group::Member;
use super::lanes::Lanes;
use super::mirror_step::{Others, Scan, Step, View, next_step};
use super::rate::{Pace, Rest};
use super::sample::CopiedPlaces;
use super::scan::SyncMode;
use super::source_gate::SourceGate;
use super::underway::{Done, Ended, Underway};
use super::unflushed::{Begun, Unflushed};
use super::{CopyMode, End, Job, JobEvent, JobStatus, Operation};
use crate::clock::{Clock, Moment};
use crate::graph::{Graph, Place};
use crate::limits::{COPY_LEN_MAX, FLUSH_REMOTE_EVERY, GATHER, HALVES_PER_TURN, LEFT_ALWAYS, TICK};
use crate::throttle::Hurry;

use self::degraded::Answers;
pub use self::end::Succession;
pub use super::options::MirrorOptions;

/// A running mirror.
pub struct Mirror {
    job: Arc<Job>,
    graph: Arc<Graph>,
    /// Held so that the graph knows.
    _places: [Arc<Place>; 2],
    route: Arc<Route>,
    doubling: Arc<Doubling>,
    unflushed: Unflushed,
    /// What the target's count of losses was when it was last looked at.
    losses: u64,
    doubt: trust::Doubt,
    copied: CopiedPlaces,
    options: MirrorOptions,
    clock: Arc<dyn Clock>,
    underway: Underway,
    scan: Scan,
    scanned_to: u64,
    /// The look ahead that is on its way believes what is believed no more.
    scans_in_vain: bool,
    /// Where the next copy looks first.
    cursor: u64,
    /// Everything that the scan has marked has been copied once; what is left is the guests' doing.
    first_pass_over: bool,
    /// There was nothing that could be copied when it last looked; until something changes.
    blocked: bool,
    gate: SourceGate,
    attempt: Attempt,
    pace: Pace,
    rest: Rest,
    gather_until: Option<Moment>,
    failure: Option<String>,
    tally: Tally,
    /// Taken when it is called.
    succession: Option<Succession>,
    by_bitmap: Option<ByBitmap>,
    /// It has given up, and its target's limits hold nothing up.
    hurry: Hurry,
    member: Option<Member>,
    answers: Answers,
}

impl Mirror {
    /// Makes a mirror of `source` to `target`, whose places the caller has attached in `graph`, and lets the
    /// source's writes be heard from now on. `bitmaps` are those of `source` and of the granularity in `options`.
    #[must_use]
    pub fn new(
        job: Arc<Job>,
        graph: Arc<Graph>,
        source: Arc<Place>,
        target: Arc<Place>,
        options: MirrorOptions,
        bitmaps: Bitmaps,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (source_node, target_node) = (source.node(), target.node());
        let Bitmaps { dirty, unflushed } = bitmaps;
        let doubling = Doubling::new(dirty, options.target_deadline, Arc::clone(&clock));
        doubling.set_write_blocking(job.options().copy_mode == CopyMode::WriteBlocking);
        doubling.set_whole_granules(target_node.lacks_backing());
        let now = clock.now();
        let tally = Tally::new(now, source_node.latencies());
        source_node.attach_doubling(Arc::clone(&doubling));
        let route = Arc::new(Route::new(source_node, target_node, &options));
        Self {
            underway: Underway::new(Arc::clone(&job), Arc::clone(&route)),
            losses: route.target.losses(),
            doubt: trust::Doubt::default(),
            copied: CopiedPlaces::default(),
            route,
            job,
            graph,
            _places: [source, target],
            unflushed: Unflushed::new(unflushed),
            doubling,
            scan: if options.sync.scans() { Scan::Ahead } else { Scan::Over },
            options,
            scanned_to: 0,
            scans_in_vain: false,
            cursor: 0,
            first_pass_over: options.sync == SyncMode::None,
            blocked: false,
            gate: SourceGate::open(),
            attempt: Attempt::at_ready(now),
            pace: Pace::default(),
            rest: Rest::default(),
            gather_until: None,
            failure: None,
            tally,
            clock,
            succession: None,
            by_bitmap: None,
            hurry: Hurry::default(),
            member: None,
            answers: Answers::from(now),
        }
    }

    /// Lets `succession` do what is to be done at the pivot, instead of only moving exports to the target.
    #[must_use]
    pub fn with_succession(mut self, succession: Succession) -> Self {
        self.succession = Some(succession);
        self
    }

    /// Lets it send copies to `lanes` while no guest wants the other cores.
    #[must_use]
    pub fn with_lanes(mut self, lanes: Arc<Lanes>) -> Self {
        self.underway.use_lanes(lanes);
        self
    }

    /// Runs until the job has ended, and says so.
    ///
    /// # Cancel safety
    /// Must not be dropped: the target's halves of guests' writes would be of unknown fate.
    pub async fn run(self) {
        let job = Arc::clone(&self.job);
        let late = end::Late::of(&self);
        job.conclude(self.run_to_end().await);
        late.clear().await;
    }

    /// Runs until nothing is held any more, and answers what is to be said with [`Job::conclude`]: whoever hears that
    /// may delete the nodes and open their files.
    ///
    /// # Cancel safety
    /// As [`Mirror::run`].
    pub async fn run_to_end(mut self) -> JobEvent {
        if self.route.source.size() != self.route.target.size() {
            self.failure = Some("Source and target image have different sizes".to_owned());
        }
        loop {
            // Taken before anything is looked at, so that no change between the look and the wait is missed.
            let heard = [self.job.listen(), self.doubling.listen_left(), self.underway.listen()];
            self.look_at_answers();
            self.give_up_again();
            self.take_orders();
            self.reap().await;
            self.start_halves().await;
            self.heed_losses();
            self.settle_doubt().await;
            let view = self.view();
            let step = next_step(view);
            self.tell_figures(step.is_said());
            match self.member.as_ref().map_or(step, |member| member.meet(step, view)) {
                Step::Wait => self.wait(heard, false).await,
                Step::WaitForMarks => self.wait(heard, true).await,
                Step::EndAborted => return self.end_aborted(),
                Step::Pivot if self.may_end(End::Complete) => match self.pivot() {
                    Ok(()) => return self.end(),
                    Err(failure) => {
                        self.member = None;
                        self.failure = Some(failure);
                    }
                },
                Step::EndWithCopy if self.may_end(End::Copy) => return self.end(),
                step => self.carry_out(step).await,
            }
        }
    }

    // ------------------------------------------------------------------ look

    fn take_orders(&mut self) {
        let orders = self.job.orders();
        let now = self.clock.now();
        self.pace.set_speed(orders.speed, now);
        self.attempt.aim(orders.end.is_some(), now);
        // A target that has just failed is left alone for a while, by guests' writes too; for ever, where that was the
        // end of the job, which may be held still.
        let is_left_alone = self.failure.is_some() || self.rest.until(now).is_some();
        // One that does not answer is not waited for by each guest's write in turn.
        let doubles =
            orders.copy_mode == CopyMode::WriteBlocking && !is_left_alone && !self.answers.is_degraded();
        self.doubling.set_write_blocking(doubles);
        if let Some(deadline) = orders.target_deadline {
            self.doubling.set_deadline(deadline);
        }
    }

    fn view(&mut self) -> View {
        let now = self.clock.now();
        // What is in doubt counts as not copied.
        let (clean, trusts) = (self.doubling.bitmap().is_clean(), !self.doubt.is_open());
        let (left, tried) = (self.doubling.left_bytes(), self.attempt.tried(now));
        let budget = self.tally.pause_budget(tried).max(LEFT_ALWAYS);
        let flush_budget = self.tally.flush_budget(tried).max(LEFT_ALWAYS);
        let orders = self.job.orders();
        let gathering = self.gather_until.is_some_and(|until| until > now) && orders.end.is_none();
        let room = self.underway.copies() == 0
            || (self.underway.copies() < self.underway.depth(self.route.guests_are_quiet(now))
                && self.doubling.copying_bytes() < self.options.buf_size);
        View {
            status: self.job.status(),
            orders,
            failed: self.failure.is_some(),
            scan: if self.doubt.is_looking() { Scan::Running } else { self.scan },
            copyable: !clean && room && !self.blocked && !gathering,
            pace_allows: self.pace.wait_until(now).is_none(),
            clean: clean && trusts,
            nearly_clean: trusts && (left == 0 || (self.first_pass_over && left <= budget)),
            copies: self.underway.copies(),
            doubled: self.doubling.doubled_in_flight(),
            unknown: self.doubling.unknown_in_flight(),
            flush: self.unflushed.state(),
            flushed: self.attempt.is_flushed() && self.unflushed.bytes() <= flush_budget,
            flush_due: self.route.target.traits().remote && self.unflushed.bytes() >= FLUSH_REMOTE_EVERY,
            gate: self.gate.view(),
            closed_below: self.gate.is_closed_below(),
            held_too_long: self.gate.held_until().is_some_and(|until| until <= now),
            resting: self.rest.until(now).is_some(),
            others: self.member.as_ref().map_or(Others::Here, |member| member.others(self.gate.view())),
        }
    }

    // ------------------------------------------------------------------ act

    async fn carry_out(&mut self, step: Step) {
        match step {
            Step::Scan => {
                self.scan = Scan::Running;
                let done = self.underway.scan(self.scanned_to, self.options.target_is_zero).await;
                self.take_in(done);
            }
            Step::Copy => self.start_copy().await,
            Step::Flush => {
                self.tally.flush_begins(self.clock.now(), self.unflushed.bytes());
                self.unflushed.flush_begins();
                self.attempt.flush_begins();
                let done = self.underway.flush().await;
                self.take_in(done);
            }
            Step::BecomeReady => self.job.become_ready(),
            Step::BecomePaused => self.job.become_status(match self.job.status() {
                JobStatus::Running => JobStatus::Paused,
                JobStatus::Ready => JobStatus::Standby,
                status => status,
            }),
            Step::Continue => {
                self.rest = Rest::default();
                self.attempt.restart(self.clock.now());
                self.tally.phase_begins();
                self.job.become_status(match self.job.status() {
                    JobStatus::Standby => JobStatus::Ready,
                    _ => JobStatus::Running,
                });
            }
            Step::BecomePending => {
                if self.job.orders().end.is_some_and(|end| self.job.leave_ready(end)) {
                    self.job.say(JobEvent::Pending);
                }
            }
            Step::CloseGate => {
                let source = Arc::clone(&self.route.source);
                self.gate.close(source, self.clock.now()).await;
            }
            Step::CloseBelow => self.close_below().await,
            Step::OpenGate => self.open_gate(),
            Step::Abort => self.abort(),
            // The loop's own; an end that a verb stood in the way of is decided anew.
            Step::Wait | Step::WaitForMarks | Step::Pivot | Step::EndWithCopy | Step::EndAborted => {}
        }
    }

    async fn start_halves(&mut self) {
        for _ in 0..HALVES_PER_TURN {
            let Some(half) = self.doubling.next_half() else { return };
            self.pace.spend_unasked(half.range.len(), self.clock.now());
            let done = self.underway.half(self.unflushed.write_begins(), half).await;
            self.take_in(done);
        }
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
        self.tally.copy_begins(now);
        let elsewhere = self.route.guests_are_quiet(now);
        let done = self.underway.copy(self.unflushed.write_begins(), copying, elsewhere).await;
        self.take_in(done);
    }

    // ------------------------------------------------------------------ take in

    fn take_in(&mut self, ended: Option<Ended>) {
        let Some(Ended { stint, done }) = ended else { return };
        self.blocked = false;
        // Before anything that has ended counts as done.
        self.heed_losses();
        match done {
            Done::Copied(begun, copying, copied) => self.take_in_copy(stint, begun, copying, copied),
            Done::Half(begun, half, written) => {
                self.unflushed.wrote(half.range);
                let is_there = written.is_ok() && !self.unflushed.is_lost(begun);
                if is_there {
                    self.copied.copied(half.range, true);
                }
                self.doubling.half_ended(half, is_there);
                if let Err(error) = written {
                    self.meet_error(stint, Operation::Write, &error);
                }
            }
            Done::Flushed(Ok(())) => {
                self.tally.flush_ends(self.clock.now());
                self.unflushed.flush_succeeded();
                self.attempt.flush_ended(true);
            }
            Done::Flushed(Err(error)) => self.take_in_failed_flush(stint, &error),
            Done::Scanned(Ok(scanned)) => self.take_in_scan(&scanned),
            Done::Sampled(sampled) => self.take_in_sample(stint, sampled),
            Done::Scanned(Err(error)) => {
                self.scan = Scan::Ahead;
                self.meet_error(stint, Operation::Read, &error);
            }
        }
    }

    fn take_in_copy(
        &mut self,
        stint: u64,
        begun: Begun,
        copying: Copying,
        copied: Result<Copied, CopyError>,
    ) {
        let range = copying.range();
        // Also when it failed: some of it may have reached the target.
        self.unflushed.wrote(range);
        self.doubling.end_copy(copying, copied.is_ok() && !self.unflushed.is_lost(begun));
        match copied {
            Ok(copied) => {
                self.rest.shorten();
                self.copied.copied(range, copied.data > 0);
                self.pace.give_back(range.len() - copied.data, self.clock.now());
                self.tally.copy_succeeded(range.len(), copied);
            }
            Err((operation, error)) => {
                // What could not be copied is no guest's doing: a whole round must go well first.
                self.first_pass_over = self.options.sync == SyncMode::None;
                self.cursor = 0;
                self.meet_error(stint, operation, &error);
            }
        }
        if self.underway.copies() == 0 {
            self.tally.copies_end(self.clock.now());
        }
    }

    // ------------------------------------------------------------------ wait

    /// Takes in what has ended, without waiting.
    async fn reap(&mut self) {
        loop {
            let done = std::future::poll_fn(|cx| {
                self.gate.poll_drained(cx);
                Poll::Ready(self.underway.poll_ended(cx))
            })
            .await;
            if done.is_none() {
                return;
            }
            self.take_in(done);
        }
    }

    /// Waits until something is worth another look, at most for a tick.
    async fn wait(&mut self, heard: [EventListener; 3], marks: bool) {
        if let Some(done) = self.underway.take_back().await {
            return self.take_in(Some(done));
        }
        let now = self.clock.now();
        let clean = self.doubling.bitmap().is_clean();
        let gathering = self.gather_until.is_some_and(|until| until > now);
        let timers =
            [self.pace.wait_until(now), self.rest.until(now), self.gather_until, self.gate.held_until()];
        let next = timers.into_iter().flatten().filter(|at| *at > now).min();
        let tick = now + if marks && clean { TICK * 10 } else { TICK };
        let mut timer = self.clock.sleep_until(next.map_or(tick, |at| at.min(tick)));

        let doubling = Arc::clone(&self.doubling);
        let marks = marks && clean && !gathering;
        let mut work_there = pin!(doubling.wait_for_work(marks));
        let mut heard = heard;
        let done = std::future::poll_fn(|cx| {
            if let Some(done) = self.underway.poll_ended(cx) {
                return Poll::Ready(Some(done));
            }
            let woken = self.gate.poll_drained(cx)
                || timer.as_mut().poll(cx).is_ready()
                || work_there.as_mut().poll(cx).is_ready()
                || heard.iter_mut().any(|listener| listener.poll_unpin(cx).is_ready());
            if woken { Poll::Ready(None) } else { Poll::Pending }
        })
        .await;
        self.blocked = false;
        self.take_in(done);
        if marks && !self.doubling.bitmap().is_clean() {
            self.gather_until = Some(self.clock.now() + GATHER);
        }
    }

    /// Tells the job's figures, when they are due or at once.
    fn tell_figures(&mut self, at_once: bool) {
        let now = self.clock.now();
        if !at_once && !self.tally.is_due(now) {
            return;
        }
        let source = &self.route.source;
        let standing = Standing {
            doubled: self.doubling.doubled_bytes(),
            left: self.doubling.left_bytes(),
            unscanned: source.size() - self.unscanned_from(),
            paused: self.job.orders().paused,
            write_blocking: self.doubling.is_write_blocking(),
            waits_for_pace: self.pace.wait_until(now).is_some(),
            degraded: self.answers.degradation(now),
        };
        let figures = self.tally.tell(now, &standing, source.latencies());
        self.job.tell_figures(figures);
    }
}
