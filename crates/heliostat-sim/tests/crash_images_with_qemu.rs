//! QEMU's own check of images that simulated crashes leave: sound, but for leaks.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

use std::io::Write;
use std::process::Command;

use heliostat_sim::image::crash_images;

/// Images that are given to it: each costs a process.
const IMAGES: usize = 300;

/// Says that this test cannot run here, to `cargo xtask test`, too.
fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
    if let Some(log) = std::env::var_os("HELIOSTAT_SKIP_LOG") {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        file.write_all(format!("crash images: {reason}\n").as_bytes()).unwrap();
    }
}

/// The exit code of `qemu-img check`, and what it printed. 0 is sound, 3 is sound but for leaks.
fn check(path: &std::path::Path) -> (Option<i32>, String) {
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn qemu_finds_nothing_but_leaks_in_what_a_crash_leaves() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return skip("qemu-img is not installed");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    let (mut checked, mut leaking) = (0, 0);
    for seed in 0.. {
        // A few of each run, so that there are many kinds.
        let images = crash_images(seed).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        for (bytes, leaks) in images.iter().step_by(1 + images.len() / 4) {
            std::fs::write(&path, bytes).unwrap();
            let (code, text) = check(&path);
            // Counts behind the file's end are leaks for us, and nothing for QEMU.
            let is_expected = code == Some(0) || (code == Some(3) && *leaks > 0);
            assert!(is_expected, "seed {seed}, {leaks} leaks: {code:?} {text}");
            checked += 1;
            leaking += usize::from(code == Some(3));
        }
        if checked >= IMAGES {
            break;
        }
    }
    assert!(leaking > 0 && leaking < checked, "{leaking} of {checked} leak");
}
