//! [`Job`]: long-running work on nodes, as an operator sees and steers it.
//!
//! Statuses, verbs and which goes with which stand in `status`, as tables. A job's work is elsewhere
//! (`mirror`); it reads its [`Orders`] here and says here what it has become. Nothing here does I/O.

pub(crate) mod at_target;
pub(crate) mod attempt;
pub mod bitmaps;
pub mod by_bitmap;
pub(crate) mod copy;
pub mod doubling;
pub mod errand;
pub mod figures;
pub mod group;
#[cfg(test)]
mod group_tests;
pub mod lanes;
pub mod mirror;
pub(crate) mod mirror_step;
#[cfg(test)]
mod mirror_tests;
#[cfg(test)]
mod model_tests;
pub mod options;
pub mod progress;
pub(crate) mod range_table;
pub(crate) mod rate;
#[cfg(test)]
mod replace_tests;
pub(crate) mod sample;
pub mod scan;
pub(crate) mod source_gate;
pub mod status;
#[cfg(test)]
pub(crate) mod test_disk;
pub(crate) mod underway;
pub(crate) mod unflushed;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use event_listener::{Event, EventListener};

pub use bitmaps::Bitmaps;
pub use by_bitmap::{BitmapMode, ByBitmap};
pub use figures::Figures;
pub use group::Group;
pub use status::{
    CopyMode, End, ErrorAction, Force, IoStatus, JobEvent, JobStatus, OnError, Operation, Verb, VerbError,
    allows, may_become,
};

/// What the operator wants at this moment. The job looks at it before each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orders {
    /// Hold.
    pub paused: bool,
    /// Stop at once.
    pub cancelled: bool,
    /// End, and how.
    pub end: Option<End>,
    /// `finalize` was said, or need not be.
    pub finalize: bool,
    /// Bytes a second; 0 is no limit.
    pub speed: u64,
    /// The copy mode.
    pub copy_mode: CopyMode,
    /// How long guests wait for the target's half of their writes, where that was changed.
    pub target_deadline: Option<Duration>,
    /// How often it was resumed.
    pub stint: u64,
}

/// What has become of the wish to hold a job because of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// It is held.
    Held,
    /// It cannot be: it is pending and takes no `resume`. Its `finalize` is taken back.
    IsPending,
    /// It is not: somebody has resumed it since the work was begun that failed, and need not do so twice.
    WasResumed,
}

/// Settings that do not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobOptions {
    /// Whether it ends by itself when it may.
    pub auto_finalize: bool,
    /// Whether it is forgotten by itself when it has ended.
    pub auto_dismiss: bool,
    /// The first limit, in bytes a second; 0 is none.
    pub speed: u64,
    /// The first copy mode.
    pub copy_mode: CopyMode,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self { auto_finalize: true, auto_dismiss: true, speed: 0, copy_mode: CopyMode::Background }
    }
}

/// Hears what jobs say. Called in the order in which it happened, by one thread at a time, without a lock; must
/// not block. The thread is the job's own, or that of an operator who dismisses it.
pub type Observer = Arc<dyn Fn(&Job, &JobEvent) + Send + Sync>;

/// An operator's handle on a job, and the job's own notice board.
pub struct Job {
    id: String,
    options: JobOptions,
    observer: Observer,
    group: OnceLock<Arc<Group>>,
    /// Held for a look or a change, never while the observer is called.
    state: Mutex<State>,
    changed: Event,
}

struct State {
    status: JobStatus,
    orders: Orders,
    io_status: IoStatus,
    error: Option<String>,
    /// What is to be its error if it ends as cancelled.
    failure: Option<String>,
    figures: Figures,
    /// The last step of the end has begun: no verb can change it.
    committed: bool,
    /// `BLOCK_JOB_COMPLETED` or `_CANCELLED` is being said, or has been.
    ended: bool,
    /// What has happened and has not been said: put in together with the change, so that its order is theirs.
    /// A handful at most, as a status follows another.
    unsaid: VecDeque<JobEvent>,
    /// Somebody is calling the observer, and will go on until `unsaid` is empty.
    is_speaking: bool,
}

impl Job {
    /// Makes a job, and says that it is created and running.
    #[must_use]
    pub fn start(id: String, options: JobOptions, observer: Observer) -> Arc<Self> {
        let orders = Orders {
            paused: false,
            cancelled: false,
            end: None,
            finalize: options.auto_finalize,
            speed: options.speed,
            copy_mode: options.copy_mode,
            target_deadline: None,
            stint: 0,
        };
        let state = State {
            status: JobStatus::Created,
            orders,
            io_status: IoStatus::Ok,
            error: None,
            failure: None,
            figures: Figures::default(),
            committed: false,
            ended: false,
            unsaid: VecDeque::new(),
            is_speaking: false,
        };
        let (group, changed) = (OnceLock::new(), Event::new());
        let job = Arc::new(Self { id, options, observer, group, state: Mutex::new(state), changed });
        job.say(JobEvent::Status(JobStatus::Created));
        job.become_status(JobStatus::Running);
        job
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its settings.
    #[must_use]
    pub const fn options(&self) -> JobOptions {
        self.options
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> JobStatus {
        self.state().status
    }

    /// What is wanted of it.
    #[must_use]
    pub fn orders(&self) -> Orders {
        self.state().orders
    }

    /// Its figures as it last told them.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.state().figures.clone()
    }

    /// Whether an error holds it up.
    #[must_use]
    pub fn io_status(&self) -> IoStatus {
        self.state().io_status
    }

    /// Why it failed.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        self.state().error.clone()
    }

    /// Says whether queries still list it: not once its end has been said, unless it waits for `dismiss`.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        let state = self.state();
        state.status != JobStatus::Null && !(state.ended && self.options.auto_dismiss)
    }

    /// Says whether nothing is left to be said at this moment. Of a job that is not listed any more: for ever.
    #[must_use]
    pub fn has_said_all(&self) -> bool {
        let state = self.state();
        state.unsaid.is_empty() && !state.is_speaking
    }

    /// Waits until orders or status change, or all has been said.
    #[must_use]
    pub fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    /// The jobs that it ends together with, itself among them.
    #[must_use]
    pub fn group(&self) -> Option<&Arc<Group>> {
        self.group.get()
    }

    /// Asks something of the job. Returns when it is accepted, not when it is done. May be called by the observer.
    /// How a job of a group ends is asked of all of it, or of none.
    ///
    /// # Errors
    /// [`VerbError`] when the status or an earlier verb does not allow it; nothing has changed then.
    pub fn ask(&self, verb: Verb) -> Result<(), VerbError> {
        let is_for_all = matches!(verb, Verb::Complete | Verb::Cancel(Force::Soft) | Verb::Finalize);
        if let Some(group) = self.group().filter(|_| is_for_all) {
            return group.ask(self, verb);
        }
        {
            let mut state = self.state();
            state.check(verb)?;
            state.take(verb);
            if verb == Verb::Dismiss {
                state.become_status(JobStatus::Null);
            }
        }
        self.tell();
        Ok(())
    }

    // ------------------------------------------------------------------ the job's own side

    /// Takes on a status and says so; nothing when it has it already.
    pub(crate) fn become_status(&self, status: JobStatus) {
        self.state().become_status(status);
        self.tell();
    }

    /// Says READY.
    pub(crate) fn become_ready(&self) {
        self.state().become_ready();
        self.tell();
    }

    fn belong_to(&self, group: &Arc<Group>) {
        let is_first = self.group.set(Arc::clone(group)).is_ok();
        assert!(is_first, "a job is of one group");
    }

    /// Wakes everybody who waits for a change, and says what there is to say.
    fn tell(&self) {
        self.changed.notify(usize::MAX);
        self.speak();
    }

    /// Leaves READY for the end `end`, unless another verb was accepted since the job looked: then nothing
    /// changes, and it should look again. From here on only a cancel is taken.
    pub(crate) fn leave_ready(&self, end: End) -> bool {
        {
            let mut state = self.state();
            if state.orders.end != Some(end) || !state.may_leave_ready() {
                return false;
            }
            state.leave_ready();
        }
        self.tell();
        true
    }

    /// Takes no verb any more, so that what was accepted is kept: says no if a cancel came first.
    pub(crate) fn commit(&self) -> bool {
        let mut state = self.state();
        state.committed = !state.orders.cancelled;
        state.committed
    }

    pub(crate) fn say(&self, event: JobEvent) {
        self.state().unsaid.push_back(event);
        self.speak();
    }

    /// Says what has not been said. Who finds another one speaking leaves it to them: nobody waits, and nothing
    /// is said out of its order.
    fn speak(&self) {
        let mut is_mine = false;
        loop {
            let event = {
                let mut state = self.state();
                if state.is_speaking && !is_mine {
                    return;
                }
                let event = state.unsaid.pop_front();
                is_mine = event.is_some();
                state.is_speaking = is_mine;
                event
            };
            match event {
                Some(event) => (self.observer)(self, &event),
                None => break,
            }
        }
        self.changed.notify(usize::MAX);
    }

    pub(crate) fn tell_figures(&self, figures: Figures) {
        self.state().figures = figures;
    }

    /// Holds the job because of an error of work that was begun in `stint`; the first error's status stays.
    pub(crate) fn stop_for_error(&self, no_space: bool, stint: u64) -> Hold {
        let mut state = self.state();
        if state.status == JobStatus::Pending {
            state.orders.finalize = self.options.auto_finalize;
            return Hold::IsPending;
        }
        if state.orders.stint != stint {
            return Hold::WasResumed;
        }
        state.orders.paused = true;
        if state.io_status == IoStatus::Ok {
            state.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
        }
        Hold::Held
    }

    /// Has it end with the error that it had met before it was cancelled.
    pub(crate) fn keep_failure(&self, failure: String) {
        self.state().failure = Some(failure);
    }

    /// Says the end, with the last figures, and concludes. For whoever runs the job, once, when nothing of it is held
    /// any more.
    pub fn conclude(&self, event: JobEvent) {
        {
            // In one step: once it is not listed any more, all that it will ever say waits to be said.
            let mut state = self.state();
            state.ended = true;
            state.error = match &event {
                JobEvent::Completed(error) => error.clone(),
                _ => Some(state.failure.take().unwrap_or_else(|| "Operation canceled".to_owned())),
            };
            state.unsaid.push_back(event);
            state.become_status(JobStatus::Concluded);
            if self.options.auto_dismiss {
                state.become_status(JobStatus::Null);
            }
        }
        self.tell();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes on a status, to be said; nothing when it has it already.
    fn become_status(&mut self, status: JobStatus) {
        if self.status != status {
            assert!(may_become(self.status, status), "no way from {:?} to {status:?}", self.status);
            self.status = status;
            self.unsaid.push_back(JobEvent::Status(status));
        }
    }

    fn become_ready(&mut self) {
        self.become_status(JobStatus::Ready);
        self.unsaid.push_back(JobEvent::Ready);
    }

    /// Whether no verb stands in the way of the end that was asked for.
    const fn may_leave_ready(&self) -> bool {
        !self.orders.paused && !self.orders.cancelled && self.orders.end.is_some()
    }

    fn leave_ready(&mut self) {
        self.become_status(JobStatus::Waiting);
        self.become_status(JobStatus::Pending);
    }

    /// Whether it takes `verb` now.
    fn check(&self, verb: Verb) -> Result<(), VerbError> {
        // "Not paused" is said before "not now" (QMP.md 1.3).
        if verb == Verb::Resume && !self.orders.paused {
            return Err(VerbError::NotPaused);
        }
        let too_late = self.committed && self.status != JobStatus::Concluded;
        if too_late || !allows(self.status, verb) {
            return Err(VerbError::Status(self.status));
        }
        match verb {
            Verb::Pause if self.orders.paused => Err(VerbError::AlreadyPaused),
            Verb::Complete if self.orders.end == Some(End::Copy) => Err(VerbError::CannotComplete),
            Verb::Cancel(Force::Soft) if self.orders.paused => Err(VerbError::CurrentlyPaused),
            _ => Ok(()),
        }
    }

    /// Takes a verb that has been checked.
    fn take(&mut self, verb: Verb) {
        let ready = matches!(self.status, JobStatus::Ready | JobStatus::Standby);
        match verb {
            Verb::Pause => self.orders.paused = true,
            Verb::Resume => {
                self.orders.paused = false;
                self.orders.stint += 1;
                self.io_status = IoStatus::Ok;
            }
            Verb::SetSpeed(speed) => self.orders.speed = speed,
            Verb::Complete => self.orders.end = Some(End::Complete),
            Verb::Cancel(Force::Soft) if ready => self.orders.end = Some(End::Copy),
            Verb::Cancel(_) => {
                self.orders.cancelled = true;
                // Resumed, so that it can end.
                self.orders.paused = false;
                self.io_status = IoStatus::Ok;
            }
            Verb::Finalize => self.orders.finalize = true,
            Verb::Dismiss => {}
            Verb::Change(copy_mode) => self.orders.copy_mode = copy_mode,
            Verb::SetDeadline(deadline) => self.orders.target_deadline = Some(deadline),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Heard = Arc<Mutex<Vec<JobEvent>>>;

    /// A job whose events are noted after `first` has heard them.
    fn job(auto_dismiss: bool, first: impl Fn(&Job, &JobEvent) + Send + Sync + 'static) -> (Arc<Job>, Heard) {
        let heard = Heard::default();
        let notes = Arc::clone(&heard);
        let observer: Observer = Arc::new(move |job, event| {
            first(job, event);
            notes.lock().unwrap().push(event.clone());
        });
        let options = JobOptions { auto_dismiss, ..JobOptions::default() };
        (Job::start("j".to_owned(), options, observer), heard)
    }

    const CONCLUDED: JobEvent = JobEvent::Status(JobStatus::Concluded);

    /// The end of every job that is cancelled.
    const LAST_WORDS: [JobEvent; 4] = [
        JobEvent::Status(JobStatus::Aborting),
        JobEvent::Cancelled,
        CONCLUDED,
        JobEvent::Status(JobStatus::Null),
    ];

    #[test]
    fn a_job_that_is_dismissed_while_it_says_that_it_has_ended_says_so_first() {
        // Asked here it is asked at the worst moment: as it is said, and before it was heard.
        let (job, heard) = job(false, |job, event| {
            if *event == CONCLUDED {
                job.ask(Verb::Dismiss).unwrap();
            }
        });
        job.become_status(JobStatus::Aborting);
        job.conclude(JobEvent::Cancelled);
        assert_eq!(heard.lock().unwrap()[2..], LAST_WORDS);
        assert_eq!(job.ask(Verb::Dismiss), Err(VerbError::Status(JobStatus::Null)));
    }

    #[test]
    fn whoever_finds_a_job_gone_finds_its_last_words_said_or_about_to_be() {
        let (job, heard) = job(true, |job, event| {
            let is_over = matches!(event, JobEvent::Cancelled | JobEvent::Status(JobStatus::Null));
            assert!(!job.has_said_all(), "it is speaking");
            assert!(job.is_listed() != (is_over || *event == CONCLUDED), "{event:?}");
        });
        assert!(job.has_said_all());
        job.become_status(JobStatus::Aborting);
        job.conclude(JobEvent::Cancelled);
        assert_eq!(heard.lock().unwrap()[2..], LAST_WORDS);
        assert!(job.has_said_all());
    }

    #[test]
    fn the_first_error_stays_until_the_job_goes_on_or_is_cancelled() {
        let (job, _) = job(true, |_, _| ());
        for release in [Verb::Resume, Verb::Cancel(Force::Hard)] {
            let stint = job.orders().stint;
            job.stop_for_error(true, stint);
            job.stop_for_error(false, stint);
            assert_eq!((job.io_status(), job.orders().paused), (IoStatus::NoSpace, true));
            job.ask(release).unwrap();
            assert_eq!((job.io_status(), job.orders().paused), (IoStatus::Ok, false));
        }
    }
}
