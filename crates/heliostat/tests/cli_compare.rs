//! `heliostat compare`: same, different and trouble, in agreement with `qemu-img compare`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use common::{folder, heliostat, tool};

/// Makes a sparse image with these bytes at these places.
fn image(folder: &Path, name: &str, size: u64, data: &[(u64, &[u8])]) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in data {
        file.write_all_at(bytes, *offset).unwrap();
    }
    path
}

fn compare(a: &Path, b: &Path, flags: &[&str]) -> Output {
    let paths = [a.as_os_str(), b.as_os_str()];
    heliostat(["compare".as_ref()].into_iter().chain(paths).chain(flags.iter().map(AsRef::as_ref)))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_hole_equals_zeroes() {
    let folder = folder();
    let zeroes = vec![0; 1 << 20];
    let sparse = image(folder.path(), "sparse", 8 << 20, &[(5 << 20, b"data")]);
    let full = image(folder.path(), "full", 8 << 20, &[(0, &zeroes), (3 << 20, &zeroes), (5 << 20, b"data")]);
    let output = compare(&sparse, &full, &["--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(json(&output)["identical"], true);
}

#[test]
fn the_first_difference_is_found_to_the_byte() {
    let folder = folder();
    for at in [0, 4095, (1 << 20) - 1, 1 << 20, (5 << 20) + 77, (8 << 20) - 1] {
        let a = image(folder.path(), "a", 8 << 20, &[(2 << 20, b"same")]);
        let b = image(folder.path(), "b", 8 << 20, &[(2 << 20, b"same"), (at, b"x")]);
        for (one, other) in [(&a, &b), (&b, &a)] {
            let output = compare(one, other, &["--json"]);
            assert_eq!(output.status.code(), Some(1), "at {at}");
            assert_eq!(json(&output)["first-difference"], at);
        }
        let text = String::from_utf8(compare(&a, &b, &[]).stdout).unwrap();
        assert!(text.contains(&format!("byte {at} ({at:#x})")), "{text}");
    }
}

#[test]
fn a_longer_image_is_the_same_only_if_zeroes_follow() {
    let folder = folder();
    let short = image(folder.path(), "short", 1 << 20, &[(0, b"x")]);
    let long = image(folder.path(), "long", (1 << 20) + 5, &[(0, b"x")]);
    assert_eq!(compare(&short, &long, &[]).status.code(), Some(0));
    let strict = compare(&short, &long, &["--strict"]);
    assert_eq!(strict.status.code(), Some(1));
    assert!(String::from_utf8(strict.stdout).unwrap().contains("differ in size"));
    let other = image(folder.path(), "other", (1 << 20) + 5, &[(0, b"x"), ((1 << 20) + 4, b"y")]);
    assert_eq!(json(&compare(&other, &short, &["--json"]))["first-difference"], (1 << 20) + 4);
}

#[test]
fn qemu_img_agrees() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let folder = folder();
    let zeroes = vec![0; 300_000];
    let images = [
        image(folder.path(), "1", 1 << 20, &[(65536, b"abc")]),
        image(folder.path(), "2", 1 << 20, &[(65536, b"abc"), (600_000, &zeroes)]),
        image(folder.path(), "3", 1 << 20, &[(65536, b"abd")]),
        image(folder.path(), "4", (1 << 20) + 512, &[(65536, b"abc")]),
        image(folder.path(), "5", 1 << 20, &[]),
    ];
    for a in &images {
        for b in &images {
            let mut command = Command::new(&qemu_img);
            let theirs = command.args(["compare", "-f", "raw", "-F", "raw"]).args([a, b]).output().unwrap();
            let theirs = theirs.status.code();
            assert_eq!(compare(a, b, &[]).status.code(), theirs, "{} {}", a.display(), b.display());
        }
    }
}

#[test]
fn a_terabyte_of_holes_takes_no_time() {
    let folder = folder();
    let a = image(folder.path(), "a", 1 << 40, &[(1 << 39, b"x")]);
    let b = image(folder.path(), "b", 1 << 40, &[(1 << 39, b"x")]);
    let output = compare(&a, &b, &["--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(json(&output)["bytes-read"].as_u64().unwrap() <= 1 << 20, "{:?}", json(&output));
}

#[test]
fn empty_images_are_the_same() {
    let folder = folder();
    let (a, b) = (image(folder.path(), "a", 0, &[]), image(folder.path(), "b", 0, &[]));
    assert_eq!(compare(&a, &b, &[]).status.code(), Some(0));
}

#[test]
fn what_cannot_be_compared_is_trouble_and_not_a_difference() {
    let folder = folder();
    let image = image(folder.path(), "a", 4096, &[]);
    for other in ["missing", "."] {
        let output = compare(&image, &folder.path().join(other), &[]);
        assert_eq!(output.status.code(), Some(2), "{other}");
        assert!(output.stdout.is_empty());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.starts_with("heliostat: cannot "), "{text}");
    }
}
