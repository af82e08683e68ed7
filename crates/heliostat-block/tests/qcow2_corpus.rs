//! Replays the committed corpora of the qcow2 fuzz targets.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

use std::path::Path;

#[path = "../../../fuzz/harness/qcow2.rs"]
mod harness;

/// Runs `target` on each file of the corpus; there must be some.
#[expect(clippy::disallowed_methods, reason = "the corpus is in files; the code under test sees bytes")]
fn replay(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut count = 0;
    for entry in corpus.read_dir().unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        target(&std::fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count > 5, "the corpus {name} is missing");
}

#[test]
fn the_corpus_of_images_holds() {
    replay("qcow2_open", harness::open);
}

#[test]
fn the_corpus_of_operations_holds() {
    replay("qcow2_operations", harness::operations);
}

#[test]
fn the_corpus_of_repairs_holds() {
    replay("qcow2_repair", harness::repair);
}
