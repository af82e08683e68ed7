//! Every seed that failed once passes, and a seed does the same in every run.

use heliostat_sim::{Seen, Trace, group, run, run_with_cuts};

#[test]
fn every_seed_that_failed_once_passes() {
    let mut ran = 0;
    for line in include_str!("seeds.txt").lines().filter(|line| !line.starts_with('#')) {
        let seed = line.split_whitespace().next().expect("a line starts with a seed");
        let seed = seed.parse().expect("a seed is a number");
        if let Err(what) = run(seed, Trace::Off) {
            panic!("seed {line}: {what}");
        }
        ran += 1;
    }
    assert!(ran > 0, "there are no seeds");
}

#[test]
fn the_first_seeds_pass_and_come_across_what_they_are_for() {
    let mut sum = Seen::default();
    for seed in 0..100 {
        match run(seed, Trace::Off) {
            Ok(seen) => sum.add(&seen),
            Err(what) => panic!("seed {seed}: {what}"),
        }
    }
    let Seen { requests, pivots, copies, cancelled, failed, stood, refused, errors, on_lanes, .. } = sum;
    let all = [requests, pivots, copies, cancelled, failed, stood, refused, errors, on_lanes];
    assert!(all.iter().all(|count| *count > 0), "{sum:?}");
}

#[test]
fn targets_that_are_cut_off_are_copied_again() {
    let mut sum = Seen::default();
    for seed in 0..100 {
        match run_with_cuts(seed, Trace::Off) {
            Ok(seen) => sum.add(&seen),
            Err(what) => panic!("seed {seed}: {what}"),
        }
    }
    assert!([sum.pivots, sum.copies, sum.cuts, sum.others].iter().all(|count| *count > 0), "{sum:?}");
    for seed in 0..10 {
        assert_eq!(run_with_cuts(seed, Trace::Off), run_with_cuts(seed, Trace::Off), "seed {seed}");
    }
}

#[test]
fn a_seed_does_the_same_every_time() {
    for seed in 0..20 {
        assert_eq!(run(seed, Trace::Off), run(seed, Trace::Off), "seed {seed}");
    }
}

/// Seeds 392 and 983 once took more steps than a run may, for want of anything that takes time; in 1402 one woke itself
/// for ever.
#[test]
fn groups_pass_and_come_across_what_they_are_for() {
    let mut sum = group::Seen::default();
    for seed in (0..60).chain([392, 983, 1402]) {
        match group::run(seed, Trace::Off) {
            Ok(seen) => sum.add(&seen),
            Err(what) => panic!("seed {seed}: {what}"),
        }
        if seed < 10 {
            assert_eq!(group::run(seed, Trace::Off), group::run(seed, Trace::Off), "seed {seed}");
        }
    }
    let group::Seen { writes, pivots, copies, aborted } = sum;
    assert!([writes, pivots, copies, aborted].iter().all(|count| *count > 0), "{sum:?}");
}
