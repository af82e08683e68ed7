//! [`Group`]: mirrors of several disks that become ready together, and end at one moment over all of them or not at
//! all.
//!
//! Each of its mirrors runs on a thread of its own and decides for itself (`mirror_step`). At four points it waits
//! until the others are where it is: before READY, before PENDING, before the source's gate is closed, and behind
//! it. Whoever comes last goes on for all. So there is a moment at which all gates are closed and all targets hold
//! what was acknowledged; at that moment all are bound to end well, and none can be cancelled any more. Where one
//! cannot, it opens its gate, the others open theirs, and they try again. One that fails or is cancelled before takes
//! the others with it. Called by `mirror`, and by [`Job::ask`] for verbs that are for all.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::mirror_step::{Gate, Others, Step, View, next_step};
use super::{Force, Job, JobEvent, JobStatus, Verb, VerbError};
use crate::planted::{Bug, is_planted};

/// Where one waits for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    Ready,
    Pending,
    /// Before its gate is closed.
    Gate,
    /// Behind it, with nothing left to do.
    End,
}

impl Point {
    const fn before(step: Step) -> Option<Self> {
        match step {
            Step::BecomeReady => Some(Self::Ready),
            Step::BecomePending => Some(Self::Pending),
            Step::CloseGate => Some(Self::Gate),
            Step::Pivot | Step::EndWithCopy => Some(Self::End),
            _ => None,
        }
    }
}

/// Jobs that end together.
pub struct Group {
    size: usize,
    /// Held for a look or a change, never while an observer is called. Lock order: this, then the jobs' states, as
    /// they stand here.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    jobs: Vec<Weak<Job>>,
    /// Where each of them waits.
    at: Vec<Option<Point>>,
    /// All are to close their gates.
    is_closing: bool,
    /// All end, as they were told.
    is_decided: bool,
    has_failed: bool,
}

/// One of a group, in the hands of its mirror.
pub struct Member {
    group: Arc<Group>,
    index: usize,
}

impl Group {
    /// A group of `size` jobs, which all have to join it before any of them becomes ready.
    #[must_use]
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self { size, state: Mutex::default() })
    }

    /// Takes in a job that has just started, once. Not more than its size may come.
    pub fn join(self: &Arc<Self>, job: &Arc<Job>) -> Member {
        job.belong_to(self);
        let mut state = self.state();
        assert!(state.jobs.len() < self.size, "the group is full");
        state.jobs.push(Arc::downgrade(job));
        state.at.push(None);
        let index = state.jobs.len() - 1;
        let has_failed = state.has_failed;
        drop(state);
        if has_failed {
            let _ = job.ask(Verb::Cancel(Force::Hard));
        }
        Member { group: Arc::clone(self), index }
    }

    /// The jobs of it that are there.
    #[must_use]
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.state().jobs.iter().filter_map(Weak::upgrade).collect()
    }

    /// Asks the same of all, or of none.
    ///
    /// # Errors
    /// What `asked` says; else [`VerbError::Other`] for the first that refuses.
    pub(super) fn ask(&self, asked: &Job, verb: Verb) -> Result<(), VerbError> {
        let jobs = self.jobs();
        {
            let mut states: Vec<_> = jobs.iter().map(|job| job.state()).collect();
            let is_asked = |job: &Job| std::ptr::eq(job, asked);
            let mut answers: Vec<_> =
                jobs.iter().zip(&states).map(|(job, state)| (job, state.check(verb))).collect();
            // What the one says that was asked comes first.
            answers.sort_by_key(|(job, _)| !is_asked(job));
            for (job, answer) in answers {
                answer.map_err(|error| match is_asked(job) {
                    true => error,
                    false => VerbError::Other { job: job.id().to_owned(), error: Box::new(error) },
                })?;
            }
            states.iter_mut().for_each(|state| state.take(verb));
        }
        jobs.iter().for_each(|job| job.tell());
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn are_all_at(&self, point: Point, size: usize) -> bool {
        self.jobs.len() == size && self.at.iter().all(|at| *at == Some(point))
    }

    /// Goes on for all, who are at `point`, with the `step` of the last; says whether it could.
    fn go_on(&mut self, point: Point, step: Step, jobs: &[Arc<Job>]) -> bool {
        let mut states: Vec<_> = jobs.iter().map(|job| job.state()).collect();
        match point {
            Point::Ready => {
                if states.iter().any(|state| state.orders.paused || state.orders.cancelled) {
                    return false;
                }
                states.iter_mut().for_each(|state| state.become_ready());
            }
            Point::Gate => self.is_closing = true,
            Point::Pending => {
                if !states.iter().all(|state| state.may_leave_ready()) {
                    return false;
                }
                for state in &mut states {
                    state.leave_ready();
                    state.unsaid.push_back(JobEvent::Pending);
                }
            }
            Point::End => {
                let may_end = |state: &super::State| {
                    let ends_so = state.orders.end.is_some_and(|end| end.step() == step);
                    ends_so
                        && match state.status {
                            JobStatus::Pending => !state.orders.cancelled,
                            _ => state.may_leave_ready(),
                        }
                };
                if !(self.is_closing && states.iter().all(|state| may_end(state))) {
                    return false;
                }
                for state in &mut states {
                    if state.status == JobStatus::Ready {
                        state.leave_ready();
                    }
                    state.committed = true;
                }
                self.is_decided = true;
            }
        }
        self.at.fill(None);
        true
    }
}

impl Member {
    /// What a look at the group brings, for the mirror's [`View`].
    pub(crate) fn others(&self, gate: Gate) -> Others {
        match (self.group.state().is_closing, gate) {
            _ if is_planted(Bug::GroupEndsOneByOne) => Others::Here,
            (true, _) => Others::Called,
            (false, Gate::Open) => Others::Here,
            (false, _) => Others::Apart,
        }
    }

    /// What the mirror does next, that would do `step` if it were alone: that, where all are as far or need not be;
    /// else what can be done meanwhile.
    pub(crate) fn meet(&self, step: Step, view: View) -> Step {
        let group = &self.group;
        let mut state = group.state();
        let Some(job) = state.jobs[self.index].upgrade() else { return step };
        // No verb is taken any more then: what is wanted stays what all were decided on.
        if let (true, Some(end)) = (state.is_decided, job.orders().end) {
            return end.step();
        }
        if job.status() != view.status || job.orders() != view.orders {
            // Another has gone on for all since it looked, or a verb was taken: it looks again, and is awake for that.
            state.at[self.index] = None;
            return Step::Wait;
        }
        let point = Point::before(step);
        if is_planted(Bug::GroupEndsOneByOne) && matches!(point, Some(Point::Gate | Point::End)) {
            return step;
        }
        state.at[self.index] = point;
        if state.is_closing && point == Some(Point::Gate) {
            return step;
        }
        let stays_out = view.others == Others::Called && view.gate == Gate::Open;
        let has_opened = state.is_closing && (step == Step::OpenGate || stays_out);
        state.is_closing &= !has_opened;
        let is_last = point.is_some_and(|point| state.are_all_at(point, group.size));
        if !has_opened && !is_last {
            return meanwhile(step, view);
        }
        let jobs: Vec<_> = state.jobs.iter().filter_map(Weak::upgrade).collect();
        let has_gone_on = point.is_some_and(|point| state.go_on(point, step, &jobs));
        drop(state);
        // Nobody where nothing has changed: it would wake itself for ever.
        jobs.iter().filter(|_| has_opened || has_gone_on).for_each(|job| job.tell());
        match point {
            Some(Point::Gate | Point::End) if has_gone_on => step,
            // Its status is another one now, and the job has woken everybody who waits for that.
            Some(Point::Ready | Point::Pending) if has_gone_on => Step::Wait,
            _ => meanwhile(step, view),
        }
    }

    /// The mirror has met an error: it is not where it was.
    pub(crate) fn step_back(&self) {
        self.group.state().at[self.index] = None;
    }

    /// The mirror has opened its gate again, between two looks at its group: so do the others.
    pub(crate) fn open(&self) {
        self.group.state().is_closing = false;
        self.group.jobs().iter().for_each(|job| job.tell());
    }

    /// The mirror fails, or was cancelled: so do the others.
    pub(crate) fn fail(&self) {
        if is_planted(Bug::GroupFailsAlone) {
            return;
        }
        self.group.state().has_failed = true;
        for job in self.group.jobs() {
            // Refused only by one that is on that way already.
            let _ = job.ask(Verb::Cancel(Force::Hard));
        }
    }
}

/// What can be done while others are not as far.
fn meanwhile(step: Step, view: View) -> Step {
    match Point::before(step) {
        None => step,
        // The gate is closed, and all is done.
        Some(Point::End) => Step::Wait,
        Some(_) => next_step(View { others: Others::Apart, ..view }),
    }
}
