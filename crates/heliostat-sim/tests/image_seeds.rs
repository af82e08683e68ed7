//! Every seed of an image that failed once passes, and a seed does the same in every run.

use heliostat_sim::Trace;
use heliostat_sim::image::run;

#[test]
fn every_seed_of_an_image_that_failed_once_passes() {
    for line in include_str!("image_seeds.txt").lines().filter(|line| !line.starts_with('#')) {
        let seed = line.split_whitespace().next().expect("a line starts with a seed");
        let seed = seed.parse().expect("a seed is a number");
        if let Err(what) = run(seed, Trace::Off) {
            panic!("seed {line}: {what}");
        }
    }
}

#[test]
fn the_first_seeds_of_images_pass() {
    for seed in 0..200 {
        if let Err(what) = run(seed, Trace::Off) {
            panic!("seed {seed}: {what}");
        }
    }
}

#[test]
fn a_seed_of_an_image_does_the_same_every_time() {
    for seed in 0..20 {
        assert_eq!(run(seed, Trace::Off), run(seed, Trace::Off), "seed {seed}");
    }
}
