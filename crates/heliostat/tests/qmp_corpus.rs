//! The committed corpus of the QMP fuzz target, replayed.

#[path = "../../../fuzz/harness/qmp.rs"]
mod harness;

use std::path::Path;

#[test]
fn the_corpus_of_control_messages_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/qmp_line");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        harness::line(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 8, "{count} files");
}
