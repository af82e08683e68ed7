//! The plan of an image, and what a crash leaves of one that is being made.

use super::super::check::{CheckOptions, check};
use super::super::test_memory::{Memory, run};
use super::super::{OpenOptions, Qcow2};
use super::*;

#[test]
fn the_counts_count_themselves() {
    for cluster_bits in [9, 12, 16, 21] {
        for refcount_order in [0, 3, 4, 6] {
            for size in [0, 1, 5 << 20, 1 << 30] {
                let preallocation = Preallocation::Metadata;
                let options =
                    CreateOptions { size, cluster_bits, refcount_order, preallocation, ..Default::default() };
                let plan = options.plan().unwrap();
                let layout = plan.layout;
                assert!(plan.blocks * layout.refcount_block_entries() >= plan.clusters(), "{plan:?}");
                assert!(plan.table_clusters << cluster_bits >= plan.blocks * 8, "{plan:?}");
                assert!((plan.blocks - 1) * layout.refcount_block_entries() < plan.clusters(), "{plan:?}");
            }
        }
    }
}

#[test]
fn an_image_that_is_not_finished_is_none() {
    let options =
        CreateOptions { size: 1 << 20, preallocation: Preallocation::Metadata, ..Default::default() };
    // What was there before is an image too, and must not be taken for the new one.
    let old = Memory::of(Vec::new());
    run(create(&ImageFile::new(old.clone()), None, &CreateOptions { size: 9 << 20, ..Default::default() }))
        .unwrap();
    for before in [Vec::new(), old.content()] {
        for writes in 0.. {
            let memory = Memory::until(writes, before.clone());
            let ended = run(create(&ImageFile::new(memory.clone()), None, &options)).is_ok();
            let report =
                run(check(&ImageFile::new(Memory::until(0, memory.content())), CheckOptions::default()));
            if ended {
                assert!(report.unwrap().is_clean());
                break;
            }
            let is_untouched = memory.content() == before && !before.is_empty();
            assert!(is_untouched || report.is_err(), "{writes} writes: {report:?}");
        }
    }
}

#[test]
fn a_refusal_comes_before_the_first_write() {
    let memory = Memory::of(vec![7; 100]);
    let cases = [
        CreateOptions { cluster_bits: 22, ..Default::default() },
        CreateOptions { version: 4, ..Default::default() },
        CreateOptions { size: u64::MAX, ..Default::default() },
        CreateOptions { data_file: Some(b"data".to_vec()), ..Default::default() },
        CreateOptions { backing_file: Some(vec![b'x'; 1024]), ..Default::default() },
    ];
    for options in cases {
        assert!(run(create(&ImageFile::new(memory.clone()), None, &options)).is_err(), "{options:?}");
        assert_eq!(memory.content(), vec![7; 100]);
    }
}

#[test]
fn a_data_file_for_an_image_that_has_none_is_refused() {
    let image = Memory::of(Vec::new());
    let options = CreateOptions { size: 1 << 20, ..Default::default() };
    run(create(&ImageFile::new(image.clone()), None, &options)).unwrap();
    let options = OpenOptions { data_file: Some(Memory::of(Vec::new())), ..Default::default() };
    let refused = run(Qcow2::open(image, options)).err().map(|error| error.to_string());
    assert_eq!(refused.as_deref(), Some("'data-file' can only be set for images with an external data file"));
}
