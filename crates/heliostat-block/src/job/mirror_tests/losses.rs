//! What the loop of a mirror does when its target may have lost something.

use super::*;

#[test]
fn what_the_target_lost_before_a_flush_is_copied_again() {
    for at in 0..40 {
        let (source, target) = (disk(7), disk(0xff));
        // A sample, which would find it out as well, shows nothing.
        target.reads_as(&source);
        let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
        let mut steps = 0;
        let end = complete(&bench, options(), || {
            if steps == at {
                target.lose();
            }
            steps += 1;
        });
        assert_eq!(end, JobEvent::Completed(None), "lost before step {at}");
        assert_eq!(target.durable(), source.shown(), "lost before step {at}");
    }
}

#[test]
fn what_the_target_lost_beside_a_flush_that_succeeds_is_copied_again() {
    for count in 1..4 {
        let (source, target) = (disk(7), disk(0));
        target.lose_at_flushes(count);
        target.reads_as(&source);
        let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
        assert_eq!(complete(&bench, options(), || ()), JobEvent::Completed(None));
        assert_eq!(target.durable(), source.shown(), "{count} flushes");
    }
}

#[test]
fn zeroes_that_the_target_only_showed_are_written_when_it_lost_them() {
    for at in 0..40 {
        let (source, target) = (disk(0), disk(0xff));
        target.fill_cache(0);
        let bench = Bench::new(source, Arc::clone(&target));
        let mut steps = 0;
        let end = complete(&bench, options(), || {
            if steps == at {
                target.lose();
            }
            steps += 1;
        });
        assert_eq!(end, JobEvent::Completed(None));
        assert!(target.durable().iter().all(|byte| *byte == 0), "lost before step {at}");
    }
}

#[test]
fn a_copy_of_which_a_part_had_landed_at_a_loss_is_copied_again() {
    let (source, target) = (disk(1), disk(0));
    target.reads_as(&source);
    let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
    let (job, mirror) = bench.mirror(options(), |_, _| ());
    let (mut lost, mut held) = (false, false);
    bench.run(mirror.run(), || match (job.status(), held) {
        (JobStatus::Ready, false) => {
            target.hold_writes();
            let tracked = bench.export.enter().now_or_never().expect("the gate is open");
            let data = Bytes::from(vec![2; 4 * SECTOR]);
            tracked.write(0, data, Durability::Cached).now_or_never().expect("at once").unwrap();
            held = true;
        }
        (JobStatus::Ready, true) if target.held() > 0 && !lost => {
            target.lose();
            job.ask(Verb::Complete).unwrap();
            lost = true;
            target.release();
        }
        _ => {}
    });
    assert_eq!(job.status(), JobStatus::Null);
    assert_eq!(target.durable(), source.shown());
}

#[test]
fn a_target_that_is_back_empty_is_copied_to_from_the_start() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let (source, target) = (disk(7), disk(0));
        let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
        let job_options = JobOptions { copy_mode, ..JobOptions::default() };
        let job = Job::start("job0".to_owned(), job_options, Arc::new(|_: &Job, _: &JobEvent| ()));
        let (job, mirror) = bench.mirror_of(job, options());
        let mut steps = 0;
        bench.run(mirror.run(), || {
            steps += u32::from(job.status() == JobStatus::Ready);
            match (job.status(), steps) {
                (JobStatus::Ready, 5) => target.become_other(0),
                (JobStatus::Ready, 6) => job.ask(Verb::Complete).unwrap(),
                _ => {}
            }
        });
        assert_eq!(job.status(), JobStatus::Null);
        assert_eq!(target.durable(), source.shown());
    }
}

#[test]
fn a_target_that_is_back_empty_is_found_out_whatever_the_job_was_to_copy() {
    // One of which nothing is flushed before the end has nothing to compare.
    for sync in [SyncMode::Top, SyncMode::Bitmap] {
        for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
            // What the job is not to copy is there already.
            let (source, target) = (disk(7), disk(7));
            let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
            let job_options = JobOptions { copy_mode, ..JobOptions::default() };
            let job = Job::start("job0".to_owned(), job_options, Arc::new(|_: &Job, _: &JobEvent| ()));
            let (job, mirror) = bench.mirror_of(job, MirrorOptions { sync, ..options() });
            let tracked = bench.export.enter().now_or_never().expect("the gate is open");
            let data = Bytes::from_static(&[2; 2 * SECTOR]);
            let mut write =
                Some(Box::pin(async move { tracked.write(0, data, Durability::Cached).await.unwrap() }));
            let mut steps = 0;
            bench.run(mirror.run(), || {
                // It has left the source when it is dropped.
                if write.as_mut().is_some_and(|write| write.as_mut().now_or_never().is_some()) {
                    write = None;
                }
                steps += u32::from(write.is_none() && job.status() == JobStatus::Ready);
                match (job.status(), steps) {
                    (JobStatus::Ready, 100) => {
                        assert!(target.durable() == source.shown(), "{sync:?} {copy_mode:?}");
                        target.become_other(0);
                    }
                    (JobStatus::Ready, 101) => job.ask(Verb::Complete).unwrap(),
                    _ => {}
                }
            });
            assert_eq!(job.status(), JobStatus::Null);
            assert!(target.durable() == source.shown(), "{sync:?} {copy_mode:?}");
        }
    }
}

#[test]
fn a_target_that_is_back_empty_is_found_out_where_guests_write_what_lies_evenly() {
    const MANY: usize = 4096;
    let (source, target) = (Disk::of(vec![7; MANY * SECTOR]), Disk::of(vec![0; MANY * SECTOR]));
    let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
    let (job, mirror) = bench.mirror(options(), |_, _| ());
    let mut steps = 0;
    bench.run(mirror.run(), || {
        steps += u32::from(job.status() == JobStatus::Ready);
        match (job.status(), steps) {
            (JobStatus::Ready, 5) => {
                target.become_other(0);
                let tracked = bench.export.enter().now_or_never().expect("the gate is open");
                for sector in (0..MANY).step_by(MANY / 64) {
                    let data = Bytes::from(vec![2; SECTOR]);
                    let written = tracked.write(u64_from(sector * SECTOR), data, Durability::Cached);
                    written.now_or_never().expect("at once").unwrap();
                }
            }
            (JobStatus::Ready, 6) => job.ask(Verb::Complete).unwrap(),
            _ => {}
        }
    });
    assert_eq!(job.status(), JobStatus::Null);
    assert!(target.durable() == source.shown(), "some of it was not copied");
}

#[test]
fn a_target_that_is_back_with_its_data_is_not_copied_to_again() {
    let (source, target) = (disk(7), disk(0));
    let bench = Bench::new(Arc::clone(&source), Arc::clone(&target));
    let (job, mirror) = bench.mirror(options(), |_, _| ());
    let mut steps = 0;
    bench.run(mirror.run(), || {
        steps += u32::from(job.status() == JobStatus::Ready);
        match (job.status(), steps) {
            (JobStatus::Ready, 5) => {
                target.lose();
                target.hold_writes();
            }
            (JobStatus::Ready, 500) => job.ask(Verb::Complete).unwrap(),
            _ => assert_eq!(target.held(), 0),
        }
    });
    assert_eq!(job.status(), JobStatus::Null);
}

// ---------------------------------------------------------------------- who is late
