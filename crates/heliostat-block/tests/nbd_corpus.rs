//! Replays the committed corpus of the NBD fuzz targets.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

use std::path::Path;

#[path = "../../../fuzz/harness/nbd_client.rs"]
mod client;
#[path = "../../../fuzz/harness/nbd.rs"]
mod server;

/// Runs `target` on each file of the corpus; there must be some.
fn replay(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut count = 0;
    for entry in corpus.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let bytes = read(&path);
        println!("{}", path.display());
        target(&bytes);
        // The same bytes one by one.
        target(&[&[1], bytes.get(1..).unwrap_or_default()].concat());
        count += 1;
    }
    assert!(count > 5, "the corpus {name} is missing");
}

#[expect(clippy::disallowed_methods, reason = "the corpus is in files; the code under test sees bytes")]
fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn the_corpus_of_handshakes_holds() {
    replay("nbd_handshake", server::handshake);
}

#[test]
fn the_corpus_of_requests_holds() {
    replay("nbd_request", server::request);
}

#[test]
fn the_corpus_of_a_servers_handshakes_holds() {
    replay("nbd_client_handshake", client::handshake);
}

#[test]
fn the_corpus_of_a_servers_answers_holds() {
    replay("nbd_client_reply", client::reply);
}
