//! What the loop of a mirror does, where a seed of the simulator once showed that it did not.

mod losses;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::FutureExt;

use super::copy::Route;
use super::mirror::MirrorOptions;
use super::sample::compare;
use super::scan::SyncMode;
use super::test_disk::{Bench, Disk, SECTOR, Ticking};
use super::{CopyMode, End, ErrorAction, Force, Job, JobEvent, JobOptions, JobStatus, OnError, Verb};
use crate::buffer::Buffer;
use crate::clock::Clock;
use crate::convert::u64_from;
use crate::driver::throttle::Throttle;
use crate::driver::{Driver, Filter};
use crate::graph::Spot;
use crate::name::NodeName;
use crate::node::{Node, NodeOptions};
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ExtentStatus};
use crate::throttle::{Counted, Limits, ThrottleGroup};

const SECTORS: usize = 8;

fn disk(byte: u8) -> Arc<Disk> {
    Disk::of(vec![byte; SECTORS * SECTOR])
}

fn options() -> MirrorOptions {
    let (on_source_error, on_target_error) = (OnError::Ignore, OnError::Ignore);
    MirrorOptions { granularity: 512, on_source_error, on_target_error, ..MirrorOptions::default() }
}

/// Mirrors to the end; the job completes when it is ready. Says what it said last but its statuses.
fn complete(bench: &Bench, options: MirrorOptions, mut beside: impl FnMut()) -> JobEvent {
    let end = Arc::<Mutex<Option<JobEvent>>>::default();
    let heard = Arc::clone(&end);
    let (_job, mirror) = bench.mirror(options, move |job, event| match event {
        JobEvent::Ready => job.ask(Verb::Complete).unwrap(),
        JobEvent::Completed(_) | JobEvent::Cancelled => *heard.lock().unwrap() = Some(event.clone()),
        _ => {}
    });
    bench.run(mirror.run(), &mut beside);
    end.lock().unwrap().take().expect("an end was said")
}

// ---------------------------------------------------------------------- verbs and the end (seed 89)

/// Mirrors to the end; a cancel is said in the very moment in which `at` is announced.
fn cancelled_at(at: JobStatus) {
    let (source, target) = (disk(1), disk(0));
    let bench = Bench::new(source, target);
    let said = Arc::<Mutex<Vec<JobEvent>>>::default();
    let heard = Arc::clone(&said);
    let (_job, mirror) = bench.mirror(options(), move |job, event| {
        heard.lock().unwrap().push(event.clone());
        match event {
            JobEvent::Ready => job.ask(Verb::Complete).unwrap(),
            JobEvent::Status(status) if *status == at => job.ask(Verb::Cancel(Force::Hard)).unwrap(),
            _ => {}
        }
    });
    bench.run(mirror.run(), || ());
    let said = said.lock().unwrap();
    assert!(said.contains(&JobEvent::Cancelled), "{at:?}: {said:?}");
    assert!(!said.iter().any(|event| matches!(event, JobEvent::Completed(_))), "{at:?}: {said:?}");
    assert!(Arc::ptr_eq(&bench.export.node(), &bench.source), "{at:?}: guests stay where they are");
}

#[test]
fn a_cancel_that_is_accepted_in_the_last_moment_is_the_end() {
    cancelled_at(JobStatus::Waiting);
    cancelled_at(JobStatus::Pending);
}

fn ready_job() -> Arc<Job> {
    let job = Job::start("job0".to_owned(), JobOptions::default(), Arc::new(|_: &Job, _: &JobEvent| ()));
    job.become_status(JobStatus::Ready);
    job
}

#[test]
fn an_end_is_not_begun_against_a_verb_that_was_accepted_meanwhile() {
    for verb in [Verb::Pause, Verb::Cancel(Force::Hard)] {
        let job = ready_job();
        job.ask(Verb::Complete).unwrap();
        job.ask(verb).unwrap();
        assert!(!job.leave_ready(End::Complete), "{verb:?}");
        assert_eq!(job.status(), JobStatus::Ready, "{verb:?}");
    }
    let job = ready_job();
    job.ask(Verb::Cancel(Force::Soft)).unwrap();
    assert!(!job.leave_ready(End::Complete), "another end is wanted");
    assert!(job.leave_ready(End::Copy));
}

#[test]
fn when_the_last_step_has_begun_no_verb_is_accepted() {
    let job = ready_job();
    job.ask(Verb::Complete).unwrap();
    assert!(job.leave_ready(End::Complete) && job.commit());
    assert!(job.ask(Verb::Cancel(Force::Hard)).is_err());
    let job = ready_job();
    job.ask(Verb::Complete).unwrap();
    assert!(job.leave_ready(End::Complete));
    job.ask(Verb::Cancel(Force::Hard)).unwrap();
    assert!(!job.commit(), "the cancel came first");
}

/// A bench whose target has a limit that lets a byte pass a second, and has passed more than that already.
fn onto_a_limit(target: &Arc<Disk>) -> Bench {
    let mut bench = Bench::new(disk(1), Arc::clone(target));
    let clock: Arc<dyn Clock> = Arc::<Ticking>::clone(&bench.clock);
    let mut limits = Limits::default();
    limits.get_mut(Counted::BytesWrite).rate = 1;
    let group = ThrottleGroup::new(limits, Arc::clone(&clock)).unwrap();
    let throttle =
        Driver::Filter(Filter::Throttle(Throttle::new(Spot::of(Arc::clone(&bench.target)), group)));
    bench.target =
        Node::new(NodeName::new("limit").unwrap(), throttle, NodeOptions::default(), Arc::clone(&clock));
    bench.graph.add(Arc::clone(&bench.target)).unwrap();
    let tracked = bench.target.enter().now_or_never().expect("the gate is open");
    tracked
        .write(0, Bytes::from(vec![0; SECTOR]), Durability::Cached)
        .now_or_never()
        .expect("at once")
        .unwrap();
    bench
}

#[test]
fn a_forced_cancel_waits_for_the_targets_disk_but_not_for_its_limit() {
    let target = disk(0);
    let bench = onto_a_limit(&target);
    let (job, mirror) = bench.mirror(options(), |_, _| ());
    target.hold_writes();
    let (mut steps, mut was_held) = (0, false);
    bench.run(mirror.run(), || {
        steps += 1;
        match (steps, target.held()) {
            (100, _) => {
                assert_eq!((job.status(), target.held()), (JobStatus::Running, 0), "the limit holds it up");
                job.ask(Verb::Cancel(Force::Hard)).unwrap();
            }
            // What has reached the disk ends there, first.
            (150, 1) => {
                assert_eq!(job.status(), JobStatus::Aborting);
                was_held = true;
                target.release();
            }
            _ => {}
        }
    });
    assert!(was_held && steps < 200, "{steps} ms");
    assert_eq!(job.status(), JobStatus::Null);
}

/// From a disk whose limit has been reached: a read would wait for minutes.
fn from_a_limit(target: &Arc<Disk>) -> Bench {
    let mut bench = Bench::new(disk(1), Arc::clone(target));
    let clock: Arc<dyn Clock> = Arc::<Ticking>::clone(&bench.clock);
    let mut limits = Limits::default();
    limits.get_mut(Counted::BytesRead).rate = 1;
    let group = ThrottleGroup::new(limits, Arc::clone(&clock)).unwrap();
    let throttle =
        Driver::Filter(Filter::Throttle(Throttle::new(Spot::of(Arc::clone(&bench.source)), group)));
    bench.source =
        Node::new(NodeName::new("limit").unwrap(), throttle, NodeOptions::default(), Arc::clone(&clock));
    bench.graph.add(Arc::clone(&bench.source)).unwrap();
    let tracked = bench.source.enter().now_or_never().expect("the gate is open");
    let read = tracked.read(0, Buffer::zeroed(SECTOR)).now_or_never();
    assert!(read.expect("at once").is_ok());
    bench
}

#[test]
fn a_forced_cancel_does_not_wait_for_the_limit_of_the_source_for_which_guests_wait() {
    let target = disk(0);
    let bench = from_a_limit(&target);
    let (job, mirror) = bench.mirror(options(), |_, _| ());
    let guest = bench.source.enter().now_or_never().expect("the gate is open");
    let mut reading = Box::pin(guest.read(0, Buffer::zeroed(SECTOR)));
    let mut steps = 0;
    bench.run(mirror.run(), || {
        steps += 1;
        assert!(reading.as_mut().now_or_never().is_none(), "a guest waits for its limit");
        if steps == 100 {
            assert_eq!(job.status(), JobStatus::Running, "the limit holds it up");
            job.ask(Verb::Cancel(Force::Hard)).unwrap();
        }
    });
    assert!((100..200).contains(&steps), "{steps} ms");
    assert_eq!(job.status(), JobStatus::Null);
    assert!(reading.now_or_never().is_none(), "also after the end");
}

// ---------------------------------------------------------------------- flushes that fail (seeds 668, 901)

#[test]
fn zeroes_that_the_target_only_showed_are_written_when_its_first_flush_fails() {
    let (source, target) = (disk(0), disk(0xff));
    target.fill_cache(0);
    target.fail_flushes(1);
    let bench = Bench::new(source, Arc::clone(&target));
    assert_eq!(complete(&bench, options(), || ()), JobEvent::Completed(None));
    assert_eq!(target.durable(), vec![0; SECTORS * SECTOR]);
}

#[test]
fn what_was_copied_before_a_flush_that_fails_is_copied_again() {
    let (source, target) = (disk(7), disk(0));
    target.fail_flushes(2);
    let bench = Bench::new(source, Arc::clone(&target));
    assert_eq!(complete(&bench, options(), || ()), JobEvent::Completed(None));
    assert_eq!(target.durable(), vec![7; SECTORS * SECTOR]);
}

#[test]
fn a_copy_of_which_a_part_had_landed_when_a_flush_failed_is_copied_again() {
    let (source, target) = (disk(1), disk(0));
    let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
    let (job, mirror) = bench.mirror(options(), |_, _| ());
    let (mut asked, mut held) = (false, false);
    bench.run(mirror.run(), || match (job.status(), held) {
        (JobStatus::Ready, false) => {
            target.hold_writes();
            let tracked = bench.export.enter().now_or_never().expect("the gate is open");
            let data = Bytes::from(vec![2; 4 * SECTOR]);
            tracked.write(0, data, Durability::Cached).now_or_never().expect("at once").unwrap();
            held = true;
        }
        (JobStatus::Ready, true) if target.held() > 0 && !asked => {
            target.fail_flushes(1);
            job.ask(Verb::Complete).unwrap();
            asked = true;
        }
        (_, true) if asked && !target.will_fail() => target.release(),
        _ => {}
    });
    assert_eq!(job.status(), JobStatus::Null);
    assert_eq!(target.durable(), source.shown());
}

// ---------------------------------------------------------------------- losses that no error tells of

/// Whether a mirror to a distant target is degraded while `holds` holds; that is for three times the deadline.
fn is_degraded_while(holds: impl Fn(&Disk, &Disk, bool)) -> bool {
    let (source, target) = (disk(7), disk(0));
    target.be_remote();
    holds(&source, &target, true);
    let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
    let is_degraded = Arc::<Mutex<bool>>::default();
    let heard = Arc::clone(&is_degraded);
    let (_job, mirror) = bench.mirror(options(), move |job, event| match event {
        JobEvent::Ready => job.ask(Verb::Complete).unwrap(),
        JobEvent::Degraded(Some(_)) => *heard.lock().unwrap() = true,
        _ => {}
    });
    let until = bench.clock.now() + options().target_deadline * 3;
    bench.run(mirror.run(), || {
        if bench.clock.now() >= until {
            holds(&source, &target, false);
        }
    });
    assert_eq!(target.durable(), source.shown());
    *is_degraded.lock().unwrap()
}

#[test]
fn a_source_that_is_slow_makes_no_mirror_degraded() {
    assert!(!is_degraded_while(|source, _, holds| source.hold_reads(holds)));
}

#[test]
fn a_target_that_is_slow_makes_a_mirror_degraded() {
    assert!(is_degraded_while(|_, target, holds| if holds {
        target.hold_writes()
    } else {
        target.release()
    }));
}

// ---------------------------------------------------------------------- a target that is given up

#[test]
fn what_comes_to_a_target_after_it_was_given_up_does_not_keep_the_job() {
    let (source, target) = (disk(7), disk(0));
    target.hold_writes();
    // The first time was before the request had come to it.
    target.let_go_at_give_up(2);
    let bench = Bench::new(source, Arc::clone(&target));
    let (job, mirror) = bench.mirror(options(), |_, _| ());
    let mut is_cancelled = false;
    bench.run(mirror.run(), || {
        if target.held() > 0 && !is_cancelled {
            is_cancelled = true;
            job.ask(Verb::Cancel(Force::Hard)).unwrap();
        }
    });
    assert_eq!(job.status(), JobStatus::Null);
}

#[test]
fn a_source_that_never_answers_does_not_keep_a_job_that_is_cancelled_by_force() {
    for held_at in [JobStatus::Running, JobStatus::Ready] {
        let (source, target) = (disk(7), disk(0));
        let bench = Bench::new(Arc::clone(&source), target);
        let (job, mirror) = bench.mirror(options(), |_, _| ());
        let mut steps = 0;
        let mut guest = None;
        bench.run(mirror.run(), || {
            if job.status() == held_at && steps == 0 {
                source.hold_reads(true);
                let tracked = bench.export.enter().now_or_never().expect("the gate is open");
                let data = Bytes::from_static(&[2; SECTOR]);
                tracked.write(0, data, Durability::Cached).now_or_never().expect("at once").unwrap();
                guest = Some(Box::pin(async move { tracked.read(0, Buffer::zeroed(SECTOR)).await }));
            }
            steps += u32::from(guest.is_some());
            if let Some(guest) = &mut guest {
                assert!(guest.as_mut().now_or_never().is_none(), "a guest's read waits on");
            }
            if steps == 100 {
                job.ask(Verb::Cancel(Force::Hard)).unwrap();
            }
        });
        assert!((100..120).contains(&steps), "{held_at:?}: {steps} ms");
        source.hold_reads(false);
        assert!(guest.unwrap().now_or_never().expect("it is answered").is_ok());
    }
}

#[test]
fn nothing_is_asked_of_a_target_that_was_given_up() {
    let (source, target) = (disk(7), disk(0));
    let bench = Bench::new(source, Arc::clone(&target));
    let (from, to) = (Arc::clone(&bench.source), Arc::clone(&bench.target));
    let route = Route::new(from, to, &options());
    let _hurry = route.give_up();
    target.hold_writes();
    target.hold_reads(true);
    let all = ByteRange::from_bounds(0, 512);
    assert!(compare(&route, vec![all]).now_or_never().expect("it waits for nothing").is_err());
    assert!(route.flush().now_or_never().expect("it waits for nothing").is_err());
    assert_eq!(target.flushes(), 0);
}

// ---------------------------------------------------------------------- errors

#[test]
fn a_job_that_was_resumed_is_not_stopped_by_what_had_begun_before() {
    let (source, target) = (disk(7), disk(0));
    let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
    let actions = Arc::<Mutex<Vec<ErrorAction>>>::default();
    let heard = Arc::clone(&actions);
    let options = MirrorOptions { on_target_error: OnError::Enospc, ..options() };
    let (job, mirror) = bench.mirror(options, move |job, event| {
        if let JobEvent::Error { action, .. } = event {
            heard.lock().unwrap().push(*action);
            // The operator has made space; what is on its way has found none yet.
            if *action == ErrorAction::Stop {
                job.ask(Verb::Resume).unwrap();
                job.ask(Verb::Complete).unwrap();
            }
        }
    });
    let (mut is_held, mut is_let_go) = (false, false);
    bench.run(mirror.run(), || match job.status() {
        JobStatus::Ready if !is_held => {
            target.hold_writes();
            for offset in [0, 4 * 512] {
                let tracked = bench.export.enter().now_or_never().expect("the gate is open");
                let write = tracked.write(offset, Bytes::from_static(&[9; 512]), Durability::Cached);
                write.now_or_never().expect("at once").unwrap();
            }
            is_held = true;
        }
        JobStatus::Ready if target.held() == 2 && !is_let_go => {
            target.fail_held();
            target.release();
            is_let_go = true;
        }
        _ => {}
    });
    assert_eq!(*actions.lock().unwrap(), [ErrorAction::Stop, ErrorAction::Ignore]);
    assert_eq!(target.shown(), source.shown());
}

#[test]
fn a_job_that_is_resumed_by_whoever_hears_that_it_has_stopped_stops_at_the_next_error() {
    const ERRORS: usize = 3;
    let (source, target) = (disk(7), disk(0));
    let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
    let actions = Arc::<Mutex<Vec<ErrorAction>>>::default();
    let heard = Arc::clone(&actions);
    let options = MirrorOptions { on_target_error: OnError::Stop, ..options() };
    let (_job, mirror) = bench.mirror(options, move |job, event| {
        if let JobEvent::Error { action, .. } = event {
            let mut actions = heard.lock().unwrap();
            actions.push(*action);
            let is_enough = actions.len() == ERRORS;
            job.ask(if is_enough { Verb::Cancel(Force::Hard) } else { Verb::Resume }).unwrap();
        }
    });
    target.hold_writes();
    // Each write fails some time after it was begun, when the mirror has looked at its orders already.
    bench.run(mirror.run(), || target.fail_held());
    assert_eq!(*actions.lock().unwrap(), [ErrorAction::Stop; ERRORS]);
}

// ---------------------------------------------------------------------- answers that make no sense

#[test]
fn what_lies_in_a_gap_between_two_extents_is_copied() {
    let (source, target) = (disk(7), disk(0));
    source.says(|range| {
        let sector = |offset| ByteRange::from_bounds(offset, offset + 512);
        let ends = [sector(range.offset()), sector(range.end() - 512)];
        ends.map(|range| Extent { range, status: ExtentStatus::Hole }).to_vec()
    });
    let bench = Bench::new(source, Arc::clone(&target));
    assert_eq!(complete(&bench, options(), || ()), JobEvent::Completed(None));
    assert_eq!(target.shown(), vec![7; SECTORS * SECTOR]);
}

// ---------------------------------------------------------------------- what is done at the pivot

#[test]
fn a_source_that_the_target_will_stand_on_is_flushed_with_it() {
    for stands_on_source in [true, false] {
        let source = disk(1);
        let bench = Bench::new(Arc::clone(&source), disk(1));
        let options = MirrorOptions { sync: SyncMode::None, stands_on_source, ..options() };
        assert_eq!(complete(&bench, options, || ()), JobEvent::Completed(None));
        // What it held before, and what only it holds, must not be lost when the guest flushes the target only.
        assert_eq!(source.flushes() > 0, stands_on_source);
    }
}

#[test]
fn a_pivot_that_is_refused_fails_the_job_and_leaves_the_source_in_its_place() {
    let bench = Bench::new(disk(1), disk(0));
    let end = Arc::<Mutex<Option<JobEvent>>>::default();
    let heard = Arc::clone(&end);
    let (_job, mirror) = bench.mirror(options(), move |job, event| match event {
        JobEvent::Ready => job.ask(Verb::Complete).unwrap(),
        JobEvent::Completed(_) | JobEvent::Cancelled => *heard.lock().unwrap() = Some(event.clone()),
        _ => {}
    });
    let mirror = mirror.with_succession(Box::new(|_, _| Err("no longer".to_owned())));
    bench.run(mirror.run(), || ());
    assert_eq!(end.lock().unwrap().take(), Some(JobEvent::Completed(Some("no longer".to_owned()))));
    assert!(Arc::ptr_eq(&bench.export.node(), &bench.source), "guests stay where they are");
    let write = bench.source.enter().now_or_never().expect("the gate is open again");
    write.write(0, Bytes::from_static(&[9; 512]), Durability::Cached).now_or_never().unwrap().unwrap();
}
