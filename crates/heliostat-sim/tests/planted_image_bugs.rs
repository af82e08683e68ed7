//! The simulator of images finds what it is for: each rule of the qcow2 driver, broken on purpose, fails within a
//! few hundred seeds.

#![expect(clippy::print_stdout, reason = "says which seed found it")]

use heliostat_block::planted::{Bug, plant};
use heliostat_sim::Trace;
use heliostat_sim::image::run;

/// How many seeds may be needed.
const SEEDS: u64 = 600;

fn is_found(bug: Bug) {
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..SEEDS).find_map(|seed| {
        plant(Some(bug));
        run(seed, Trace::Off).err().map(|what| (seed, what))
    });
    plant(None);
    let _ = std::panic::take_hook();
    let (seed, what) = found.expect("no seed finds it");
    println!("{bug:?} is found by seed {seed}: {what}");
    run(seed, Trace::Off).expect("the same seed passes without the bug");
}

#[test]
fn a_mapping_that_is_visible_before_its_data_is_found() {
    is_found(Bug::MappingBeforeData);
}

#[test]
fn tables_that_are_written_beside_their_counts_are_found() {
    is_found(Bug::TablesBeforeCounts);
}

#[test]
fn links_that_are_written_beside_their_tables_are_found() {
    is_found(Bug::LinksBeforeTables);
}

#[test]
fn a_freed_cluster_that_is_used_anew_before_the_commit_is_found() {
    is_found(Bug::FreedBeforeCommit);
}

#[test]
fn a_freed_cluster_that_is_used_anew_while_it_is_read_is_found() {
    is_found(Bug::FreedBesideRead);
}

#[test]
fn two_writers_into_one_unallocated_cluster_are_found() {
    is_found(Bug::AllocationsForgotten);
}

#[test]
fn a_copy_over_data_that_is_written_in_place_meanwhile_is_found() {
    is_found(Bug::CopyOverData);
}

#[test]
fn a_durable_write_without_a_durable_mapping_is_found() {
    is_found(Bug::FuaWithoutMapping);
}

#[test]
fn a_failed_commit_whose_tables_are_forgotten_is_found() {
    is_found(Bug::FailedCommitForgotten);
}

#[test]
fn a_write_in_place_into_a_snapshots_cluster_is_found() {
    is_found(Bug::SharedInPlace);
}

#[test]
fn a_size_in_the_header_before_what_is_gained_reads_as_zero_is_found() {
    is_found(Bug::SizeBeforeZeroes);
}

#[test]
fn an_image_that_is_called_clean_before_its_counts_are_right_is_found() {
    is_found(Bug::CleanBeforeCounts);
}

#[test]
fn a_bitmap_that_is_believed_after_a_crash_is_found() {
    is_found(Bug::BitmapsBelieved);
}

#[test]
fn a_mapping_that_is_durable_before_the_data_file_is_found() {
    is_found(Bug::MappingBeforeDataFile);
}
