//! Each request of a change of an image fails once, and each poll of it is the last once.

use heliostat_sim::image::{drop_each, fail_each};

#[test]
fn any_request_of_a_change_may_fail_and_nothing_is_lost_but_space() {
    let (mut errors, mut crashes) = (0, 0);
    for seed in 0..300 {
        let seen = fail_each(seed).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        errors += seen.errors;
        crashes += seen.crashes;
    }
    assert!(errors > 100 && crashes > 1000, "{errors} errors, {crashes} crashes");
}

#[test]
fn any_poll_of_a_change_may_be_the_last_and_nothing_is_lost_but_space() {
    let mut dropped = 0;
    for seed in 0..300 {
        let seen = drop_each(seed).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        dropped += seen.dropped;
    }
    assert!(dropped > 500, "{dropped} were dropped");
}
