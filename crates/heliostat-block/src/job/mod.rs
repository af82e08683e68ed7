//! [`Job`]: long-running work on nodes, as an operator sees and steers it.
//!
//! Statuses, verbs and which goes with which stand in `status`, as tables. A job's work is elsewhere
//! (`mirror`); it reads its [`Orders`] here and says here what it has become. Nothing here does I/O.

pub(crate) mod attempt;
pub mod bitmaps;
pub(crate) mod copy;
pub mod doubling;
pub mod figures;
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
pub mod scan;
pub(crate) mod source_gate;
pub mod status;
#[cfg(test)]
pub(crate) mod test_disk;
pub(crate) mod underway;
pub(crate) mod unflushed;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::{Event, EventListener};

pub use bitmaps::Bitmaps;
pub use figures::Figures;
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

/// Hears what jobs say. Called on the job's thread, in order, without a lock; must not block.
pub type Observer = Arc<dyn Fn(&Job, &JobEvent) + Send + Sync>;

/// An operator's handle on a job, and the job's own notice board.
pub struct Job {
    id: String,
    options: JobOptions,
    observer: Observer,
    /// Held for a look or a change, never while the observer is called.
    state: Mutex<State>,
    changed: Event,
}

struct State {
    status: JobStatus,
    orders: Orders,
    io_status: IoStatus,
    error: Option<String>,
    figures: Figures,
    /// The last step of the end has begun: no verb can change it.
    committed: bool,
    /// `BLOCK_JOB_COMPLETED` or `_CANCELLED` has been said.
    ended: bool,
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
        };
        let state = State {
            status: JobStatus::Created,
            orders,
            io_status: IoStatus::Ok,
            error: None,
            figures: Figures::default(),
            committed: false,
            ended: false,
        };
        let job = Arc::new(Self { id, options, observer, state: Mutex::new(state), changed: Event::new() });
        job.say(&JobEvent::Status(JobStatus::Created));
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

    /// Waits until orders or status change.
    #[must_use]
    pub fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    /// Asks something of the job. Returns when it is accepted, not when it is done.
    ///
    /// # Errors
    /// [`VerbError`] when the status or an earlier verb does not allow it; nothing has changed then.
    pub fn ask(&self, verb: Verb) -> Result<(), VerbError> {
        let dismissed = {
            let mut state = self.state();
            state.accept(verb)?;
            verb == Verb::Dismiss
        };
        if dismissed {
            self.become_status(JobStatus::Null);
        }
        self.changed.notify(usize::MAX);
        Ok(())
    }

    // ------------------------------------------------------------------ the job's own side

    /// Takes on a status and says so; nothing when it has it already.
    pub(crate) fn become_status(&self, status: JobStatus) {
        {
            let mut state = self.state();
            if state.status == status {
                return;
            }
            assert!(may_become(state.status, status), "no way from {:?} to {status:?}", state.status);
            state.status = status;
        }
        self.changed.notify(usize::MAX);
        self.say(&JobEvent::Status(status));
    }

    /// Leaves READY for the end `end`, unless another verb was accepted since the job looked: then nothing
    /// changes, and it should look again. From here on only a cancel is taken.
    pub(crate) fn leave_ready(&self, end: End) -> bool {
        {
            let mut state = self.state();
            let orders = &state.orders;
            if orders.paused || orders.cancelled || orders.end != Some(end) {
                return false;
            }
            assert!(may_become(state.status, JobStatus::Waiting), "no end from {:?}", state.status);
            state.status = JobStatus::Waiting;
        }
        self.changed.notify(usize::MAX);
        self.say(&JobEvent::Status(JobStatus::Waiting));
        self.become_status(JobStatus::Pending);
        true
    }

    /// Takes no verb any more, so that what was accepted is kept: says no if a cancel came first.
    pub(crate) fn commit(&self) -> bool {
        let mut state = self.state();
        state.committed = !state.orders.cancelled;
        state.committed
    }

    pub(crate) fn say(&self, event: &JobEvent) {
        (self.observer)(self, event);
    }

    pub(crate) fn tell_figures(&self, figures: Figures) {
        self.state().figures = figures;
    }

    /// Holds the job because of an error; the first error's status stays.
    pub(crate) fn stop_for_error(&self, no_space: bool) {
        let mut state = self.state();
        state.orders.paused = true;
        if state.io_status == IoStatus::Ok {
            state.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
        }
    }

    /// Takes back a `finalize` that failed.
    pub(crate) fn withdraw_finalize(&self) {
        let mut state = self.state();
        state.orders.finalize = self.options.auto_finalize;
    }

    /// Says the end, with the last figures, and concludes.
    pub(crate) fn conclude(&self, event: JobEvent) {
        {
            let mut state = self.state();
            state.ended = true;
            state.error = match &event {
                JobEvent::Completed(error) => error.clone(),
                _ => Some("Operation canceled".to_owned()),
            };
        }
        self.say(&event);
        self.become_status(JobStatus::Concluded);
        if self.options.auto_dismiss {
            self.become_status(JobStatus::Null);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn accept(&mut self, verb: Verb) -> Result<(), VerbError> {
        // "Not paused" is said before "not now" (QMP.md 1.3).
        if verb == Verb::Resume && !self.orders.paused {
            return Err(VerbError::NotPaused);
        }
        let too_late = self.committed && self.status != JobStatus::Concluded;
        if too_late || !allows(self.status, verb) {
            return Err(VerbError::Status(self.status));
        }
        let ready = matches!(self.status, JobStatus::Ready | JobStatus::Standby);
        match verb {
            Verb::Pause if self.orders.paused => return Err(VerbError::AlreadyPaused),
            Verb::Pause => self.orders.paused = true,
            Verb::Resume => {
                self.orders.paused = false;
                self.io_status = IoStatus::Ok;
            }
            Verb::SetSpeed(speed) => self.orders.speed = speed,
            Verb::Complete if self.orders.end == Some(End::Copy) => return Err(VerbError::CannotComplete),
            Verb::Complete => self.orders.end = Some(End::Complete),
            Verb::Cancel(Force::Soft) if self.orders.paused => return Err(VerbError::CurrentlyPaused),
            Verb::Cancel(Force::Soft) if ready => self.orders.end = Some(End::Copy),
            Verb::Cancel(_) => {
                self.orders.cancelled = true;
                self.orders.paused = false;
            }
            Verb::Finalize => self.orders.finalize = true,
            Verb::Dismiss => {}
            Verb::Change(copy_mode) => self.orders.copy_mode = copy_mode,
        }
        Ok(())
    }
}
