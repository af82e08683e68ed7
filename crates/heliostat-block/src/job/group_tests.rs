//! Mirrors that end together.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;

use super::mirror::{Mirror, MirrorOptions};
use super::mirror_step::tests::READY;
use super::mirror_step::{Gate, Others, Step, View};
use super::test_disk::{Bench, Disk, SECTOR};
use super::{Force, Group, Job, JobEvent, JobOptions, JobStatus, OnError, Verb, VerbError};
use crate::storage::Durability;

const SECTORS: usize = 8;

/// What jobs have said, by the number of the job.
type Said = Arc<Mutex<Vec<(usize, JobEvent)>>>;

/// Mirrors of disks that hold their number, from 1 on, to disks of zeroes.
struct Disks {
    benches: Vec<Bench>,
    targets: Vec<Arc<Disk>>,
    jobs: Vec<Arc<Job>>,
    said: Said,
}

/// A group of `count` mirrors; `hears` is told of what the jobs say.
fn group(
    count: u8,
    options: JobOptions,
    hears: impl Fn(usize, &Job, &JobEvent) + Send + Sync + 'static,
) -> (Disks, Vec<Mirror>) {
    let targets: Vec<_> = (0..count).map(|_| Disk::of(vec![0; SECTORS * SECTOR])).collect();
    let sources = (1..=count).map(|byte| Disk::of(vec![byte; SECTORS * SECTOR]));
    let mut benches = Vec::<Bench>::new();
    for (source, target) in sources.zip(&targets) {
        let target = Arc::clone(target);
        benches.push(match benches.first() {
            Some(first) => first.beside(source, target),
            None => Bench::new(source, target),
        });
    }
    let (group, said, hears) = (Group::new(benches.len()), Said::default(), Arc::new(hears));
    let (mut jobs, mut mirrors) = (Vec::new(), Vec::new());
    for (number, bench) in benches.iter().enumerate() {
        let (said, hears) = (Arc::clone(&said), Arc::clone(&hears));
        let observer = Arc::new(move |job: &Job, event: &JobEvent| {
            said.lock().unwrap().push((number, event.clone()));
            hears(number, job, event);
        });
        let job = Job::start(format!("job{number}"), options, observer);
        let member = group.join(&job);
        let copying =
            MirrorOptions { granularity: 512, on_target_error: OnError::Ignore, ..MirrorOptions::default() };
        let (job, mirror) = bench.mirror_of(job, copying);
        jobs.push(job);

        mirrors.push(mirror.with_group(member));
    }
    (Disks { benches, targets, jobs, said }, mirrors)
}

impl Disks {
    fn run(&self, mirrors: Vec<Mirror>, beside: impl FnMut()) {
        self.benches[0].run(join_all(mirrors.into_iter().map(Mirror::run)), beside);
    }

    fn ends(&self) -> Vec<JobEvent> {
        let is_end = |event: &JobEvent| matches!(event, JobEvent::Completed(_) | JobEvent::Cancelled);
        let said = self.said.lock().unwrap();
        said.iter().filter(|(_, event)| is_end(event)).map(|(_, event)| event.clone()).collect()
    }

    fn statuses(&self) -> Vec<JobStatus> {
        self.jobs.iter().map(|job| job.status()).collect()
    }

    /// Whether guests stand on the target.
    fn have_moved(&self) -> Vec<bool> {
        self.benches.iter().map(|bench| Arc::ptr_eq(&bench.export.node(), &bench.target)).collect()
    }

    /// Writes the first sector; says no where the gate is closed.
    fn write(&self, disk: usize, byte: u8) -> bool {
        let Some(tracked) = self.benches[disk].export.enter().now_or_never() else { return false };
        let data = Bytes::from(vec![byte; SECTOR]);
        tracked.write(0, data, Durability::Cached).now_or_never().is_some_and(|written| written.is_ok())
    }
}

fn completes(_: usize, job: &Job, event: &JobEvent) {
    if *event == JobEvent::Ready && job.id() == "job0" {
        job.ask(Verb::Complete).unwrap();
    }
}

#[test]
fn one_is_asked_and_all_complete() {
    let (disks, mirrors) = group(3, JobOptions::default(), completes);
    disks.run(mirrors, || ());
    assert_eq!(
        disks.ends(),
        [JobEvent::Completed(None), JobEvent::Completed(None), JobEvent::Completed(None)]
    );
    assert_eq!(disks.have_moved(), [true; 3]);
    for (target, byte) in disks.targets.iter().zip(1..) {
        assert_eq!(target.durable(), vec![byte; SECTORS * SECTOR]);
    }
}

#[test]
fn none_is_ready_before_all_are() {
    let (disks, mirrors) = group(2, JobOptions::default(), completes);
    disks.targets[1].hold_writes();
    let mut steps = 0;
    disks.run(mirrors, || {
        steps += 1;
        if steps < 500 {
            assert_eq!(disks.statuses(), [JobStatus::Running; 2]);
            assert!(disks.jobs[0].ask(Verb::Complete).is_err());
        } else {
            disks.targets[1].release();
        }
    });
    assert_eq!(disks.have_moved(), [true; 2]);
}

#[test]
fn no_disk_has_what_was_written_after_what_another_lacks() {
    let softly = |_: usize, job: &Job, event: &JobEvent| {
        if *event == JobEvent::Ready && job.id() == "job1" {
            job.ask(Verb::Cancel(Force::Soft)).unwrap();
        }
    };
    let (disks, mirrors) = group(2, JobOptions::default(), softly);
    // A guest writes each number to the one disk and then to the other. The copies are left behind; that of the second
    // disk cannot be for a while.
    let (mut number, mut next, mut is_late) = (100, 0, false);
    disks.run(mirrors, || {
        if disks.jobs[1].orders().end.is_some() && !is_late {
            disks.targets[1].fail_flushes(3);
            is_late = true;
        }
        if disks.write(next, number) {
            next = 1 - next;
            number = if next == 0 { number % 200 + 1 } else { number };
        }
    });
    assert_eq!(disks.ends(), [JobEvent::Completed(None), JobEvent::Completed(None)]);
    assert_eq!(disks.have_moved(), [false; 2]);
    let (first, second) = (disks.targets[0].durable()[0], disks.targets[1].durable()[0]);
    assert!(first == second || first == second % 200 + 1, "{first}, {second}");
}

#[test]
fn a_gate_is_not_held_for_one_that_takes_its_time() {
    let (disks, mirrors) = group(2, JobOptions::default(), |_, _, _| ());
    let (mut was_asked, mut longest, mut held, mut steps) = (false, 0, 0, 0);
    disks.run(mirrors, || {
        if disks.statuses() == [JobStatus::Ready; 2] && !was_asked {
            assert!(disks.write(1, 77));
            disks.targets[1].hold_writes();
            disks.jobs[0].ask(Verb::Complete).unwrap();
            was_asked = true;
        }
        steps += usize::from(was_asked);
        held = if disks.write(0, 78) { 0 } else { held + 1 };
        longest = longest.max(held);
        if steps == 650 {
            assert_eq!(disks.statuses(), [JobStatus::Ready; 2]);
            disks.targets[1].release();
        }
    });
    // Each time they are held for twice as long.
    assert!(longest < 450, "guests of the other disk waited for {longest} ms");
    assert_eq!(disks.have_moved(), [true; 2]);
}

#[test]
fn one_that_fails_or_is_cancelled_takes_the_others_with_it() {
    for at in [JobStatus::Running, JobStatus::Ready, JobStatus::Waiting, JobStatus::Pending] {
        let (disks, mirrors) = group(3, JobOptions::default(), move |number, job, event| {
            completes(number, job, event);
            if *event == JobEvent::Status(at) && number == 1 {
                // At the last moment it may be too late, for all of them.
                let _ = job.ask(Verb::Cancel(Force::Hard));
            }
        });
        disks.run(mirrors, || ());
        let ends = disks.ends();
        assert!(ends.iter().all(|end| *end == ends[0]), "{at:?}: {ends:?}");
        assert_eq!(disks.have_moved(), [ends[0] == JobEvent::Completed(None); 3], "{at:?}");
        if matches!(at, JobStatus::Running | JobStatus::Ready) {
            assert_eq!(ends[0], JobEvent::Cancelled, "{at:?}");
        }
    }
}

#[test]
fn a_paused_one_holds_the_others_back_and_refuses_for_all() {
    let (disks, mirrors) = group(2, JobOptions::default(), |number, job, event| {
        if *event == JobEvent::Ready && number == 1 {
            job.ask(Verb::Pause).unwrap();
        }
    });
    let mut steps = 0;
    disks.run(mirrors, || {
        if disks.statuses() == [JobStatus::Ready, JobStatus::Standby] {
            steps += 1;
        }
        match steps {
            10 => {
                let refused = disks.jobs[0].ask(Verb::Cancel(Force::Soft)).unwrap_err();
                let error = Box::new(VerbError::CurrentlyPaused);
                assert_eq!(refused, VerbError::Other { job: "job1".to_owned(), error });
                assert_eq!(disks.jobs[0].orders().end, None, "nothing has changed");
                assert_eq!(disks.jobs[1].ask(Verb::Cancel(Force::Soft)), Err(VerbError::CurrentlyPaused));
                disks.jobs[0].ask(Verb::Complete).unwrap();
            }
            500 => {
                assert!(disks.write(0, 9) && disks.write(1, 9), "no guest waits for it");
                disks.jobs[1].ask(Verb::Resume).unwrap();
                steps += 1;
            }
            _ => {}
        }
    });
    assert_eq!(disks.have_moved(), [true; 2]);
}

#[test]
fn all_wait_in_pending_and_one_finalize_is_for_all() {
    let manual = JobOptions { auto_finalize: false, ..JobOptions::default() };
    let (disks, mirrors) = group(2, manual, completes);
    let mut steps = 0;
    disks.run(mirrors, || {
        if disks.statuses() == [JobStatus::Pending; 2] {
            steps += 1;
            assert!(steps > 100 || (disks.write(0, 5) && disks.write(1, 6)), "nobody waits");
        }
        if steps == 100 {
            disks.jobs[1].ask(Verb::Finalize).unwrap();
        }
    });
    assert!(steps >= 100);
    assert_eq!(disks.have_moved(), [true; 2]);
    assert_eq!((disks.targets[0].durable()[0], disks.targets[1].durable()[0]), (5, 6));
    let said = disks.said.lock().unwrap();
    let at = |event: &JobEvent| said.iter().position(|(_, other)| other == event).unwrap();
    let is_status = |number, status| (number, JobEvent::Status(status));
    assert!(
        said.contains(&is_status(0, JobStatus::Pending)) && said.contains(&is_status(1, JobStatus::Pending))
    );
    assert!(at(&JobEvent::Pending) > at(&JobEvent::Ready));
}

#[test]
fn one_whose_target_fails_at_the_gate_tries_again_and_so_do_the_others() {
    let (disks, mirrors) = group(2, JobOptions::default(), completes);
    let mut failures = 0;
    disks.run(mirrors, || {
        // Each flush of the end fails for a while.
        if disks.statuses().contains(&JobStatus::Ready) && failures < 5 && !disks.targets[1].will_fail() {
            disks.targets[1].fail_flushes(1);
            failures += 1;
        }
        disks.write(0, 7);
        disks.write(1, 8);
    });
    assert_eq!(disks.have_moved(), [true; 2]);
    assert_eq!((disks.targets[0].durable()[0], disks.targets[1].durable()[0]), (7, 8));
}

// ---------------------------------------------------------------------- between a look and a meeting

/// Two jobs that are ready, and have been asked for `verb`.
fn ready_pair(options: JobOptions, verb: Verb) -> [(Arc<Job>, super::group::Member); 2] {
    let group = Group::new(2);
    let pair = ["a", "b"].map(|id| {
        let job = Job::start(id.to_owned(), options, Arc::new(|_: &Job, _: &JobEvent| ()));
        job.become_ready();
        let member = group.join(&job);
        (job, member)
    });
    pair[0].0.ask(verb).unwrap();
    pair
}

/// What a mirror of `job` sees that has nothing left to do but to end.
fn sees(job: &Job, others: Others, gate: Gate) -> View {
    View { status: job.status(), orders: job.orders(), flushed: true, gate, others, ..READY }
}

#[test]
fn a_verb_that_is_taken_between_a_look_and_the_meeting_is_kept_by_all() {
    let [(a, at_a), (b, at_b)] = ready_pair(JobOptions::default(), Verb::Complete);
    assert_eq!(at_a.meet(Step::CloseGate, sees(&a, Others::Here, Gate::Open)), Step::WaitForMarks);
    assert_eq!(at_b.meet(Step::CloseGate, sees(&b, Others::Here, Gate::Open)), Step::CloseGate);
    let closed = |job: &Job| sees(job, Others::Called, Gate::Closed);
    assert_eq!(at_a.meet(Step::Pivot, closed(&a)), Step::Wait);
    let old = closed(&b);
    a.ask(Verb::Cancel(Force::Soft)).unwrap();
    assert_eq!(at_b.meet(Step::Pivot, old), Step::Wait, "it looks again");
    // The other is behind its gate still, and has nothing left to do, whichever end it is.
    assert_eq!(at_b.meet(Step::EndWithCopy, closed(&b)), Step::EndWithCopy);
    assert!(a.ask(Verb::Complete).is_err() && b.ask(Verb::Cancel(Force::Hard)).is_err());
    for (step, orders) in [(Step::Pivot, old.orders), (Step::OpenGate, a.orders())] {
        let seen = View { orders, ..closed(&a) };
        assert_eq!(at_a.meet(step, seen), Step::EndWithCopy, "whatever it has seen");
    }
}

#[test]
fn a_status_that_changes_between_a_look_and_the_meeting_is_looked_at_again() {
    let manual = JobOptions { auto_finalize: false, ..JobOptions::default() };
    let [(a, at_a), (b, at_b)] = ready_pair(manual, Verb::Complete);
    let open = |job: &Job| sees(job, Others::Here, Gate::Open);
    assert_eq!(at_a.meet(Step::BecomePending, open(&a)), Step::WaitForMarks);
    a.ask(Verb::Pause).unwrap();
    let old = open(&a);
    a.ask(Verb::Resume).unwrap();
    assert_eq!(at_b.meet(Step::BecomePending, open(&b)), Step::Wait);
    assert_eq!([a.status(), b.status()], [JobStatus::Pending; 2]);
    // It would have become paused, which nobody can who is pending.
    assert_eq!(at_a.meet(Step::BecomePaused, old), Step::Wait);
}

#[test]
fn one_that_has_met_an_error_is_not_where_it_was() {
    let group = Group::new(2);
    let [(a, at_a), (b, at_b)] = ["a", "b"].map(|id| {
        let job = Job::start(id.to_owned(), JobOptions::default(), Arc::new(|_: &Job, _: &JobEvent| ()));
        let member = group.join(&job);
        (job, member)
    });
    let open = |job: &Job| sees(job, Others::Here, Gate::Open);
    assert_eq!(at_a.meet(Step::BecomeReady, open(&a)), Step::Wait);
    at_a.step_back();
    assert_eq!(at_b.meet(Step::BecomeReady, open(&b)), Step::Wait);
    assert_eq!([a.status(), b.status()], [JobStatus::Running; 2]);
    a.ask(Verb::Pause).unwrap();
    at_a.meet(Step::BecomePaused, open(&a));
    a.ask(Verb::Resume).unwrap();
    assert_eq!(at_a.meet(Step::BecomeReady, open(&a)), Step::Wait);
    assert_eq!([a.status(), b.status()], [JobStatus::Ready; 2]);
}

#[test]
fn an_error_that_would_hold_a_pending_job_takes_finalize_back() {
    let manual = JobOptions { auto_finalize: false, ..JobOptions::default() };
    let job = Job::start("a".to_owned(), manual, Arc::new(|_: &Job, _: &JobEvent| ()));
    job.become_ready();
    job.ask(Verb::Complete).unwrap();
    assert!(job.leave_ready(super::End::Complete));
    job.ask(Verb::Finalize).unwrap();
    assert_eq!(job.stop_for_error(false, 0), super::Hold::IsPending);
    assert_eq!((job.orders().paused, job.orders().finalize), (false, false));
}

#[test]
fn who_comes_last_and_cannot_go_on_does_not_wake_itself() {
    let [(a, at_a), (b, at_b)] =
        ready_pair(JobOptions { auto_finalize: false, ..JobOptions::default() }, Verb::Complete);
    let open = |job: &Job| sees(job, Others::Here, Gate::Open);
    at_a.meet(Step::BecomePending, open(&a));
    a.ask(Verb::Pause).unwrap();
    let woken = b.listen();
    assert_eq!(at_b.meet(Step::BecomePending, open(&b)), Step::WaitForMarks);
    assert!(woken.now_or_never().is_none());
}
