//! A guest of a daemon's export: `qemu-io`, and what it is told.

use std::process::Command;

use super::Peer;

/// What a guest of the export `n` is told, but for times; and whether it was content.
pub fn is_told(peer: &Peer, requests: &[&str]) -> String {
    let uri = format!("nbd+unix:///n?socket={}/nbd", peer.folder().display());
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]);
    for request in requests {
        command.args(["-c", request]);
    }
    let output = command.arg(uri).output().expect("the test has looked for it");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = said.lines().filter(|line| !line.ends_with("ops/sec)")).collect();
    format!("{} {}", lines.join("|"), output.status.success())
}
