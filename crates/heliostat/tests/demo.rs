//! `heliostat demo`, end to end: it holds, it finds what is planted, it cleans up.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use common::{HELIOSTAT, folder, folder_on_disk, heliostat, start_heliostat, tool, wait};
use heliostat::cli::demo::{Demo, Disks};

const SIZE: u64 = 48 << 20;

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().next().is_none()
}

#[test]
fn everything_holds_and_nothing_is_left() {
    let folder = folder();
    let place = folder.path().to_str().unwrap();
    let output = heliostat(["demo", "--json", "--size", "64M", "--seconds", "1", "--folder", place]);
    let facts: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert!(output.status.success(), "{facts:#}");
    assert_eq!(facts["held"], true);
    assert_eq!(facts["size"], 64 << 20);
    let guest = &facts["guest"];
    for count in ["reads", "flushes", "changes-before-pivot", "changes-after-pivot"] {
        assert!(guest[count].as_u64().unwrap() > 0, "{count}: {facts:#}");
    }
    let (source, target) = (&facts["mirror"]["source-actual-size"], &facts["mirror"]["target-actual-size"]);
    let (source, target) = (source.as_u64().unwrap(), target.as_u64().unwrap());
    assert!(target < source * 5 / 4 && source < 48 << 20, "holes stay holes: {facts:#}");
    assert!(facts["mirror"]["pause-us"].as_u64().is_some());
    assert!(is_empty(folder.path()));
}

#[test]
fn people_get_a_story_and_the_disks_if_they_want_them() {
    let folder = folder_on_disk();
    let place = folder.path().to_str().unwrap();
    let output =
        heliostat(["demo", "--keep", "--size", "32M", "--seconds", "0", "--folder", place, "--seed", "1"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("Everything held.") && !text.contains("FAILED"), "{text}");
    let kept = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(std::fs::metadata(kept.join("target.raw")).unwrap().len(), 32 << 20);
    assert!(!kept.join("nbd.sock").exists());
}

fn holds_after(tamper: impl Fn(Disks<'_>)) -> bool {
    let folder = folder();
    Demo::quick(SIZE, folder.path()).held_after(&tamper).unwrap()
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_demo_whose_disks_are_left_alone_holds() {
    assert!(holds_after(|_| ()));
}

#[test]
fn one_flipped_bit_on_the_target_fails_the_proof() {
    assert!(!holds_after(|disks| flip(disks.target, SIZE / 2 + 5)));
}

#[test]
fn one_flipped_bit_in_a_hole_of_the_target_fails_the_proof() {
    assert!(!holds_after(|disks| flip(disks.target, SIZE - 1)));
}

#[test]
fn a_target_that_is_the_source_at_the_pivot_fails_the_proof() {
    assert!(
        !holds_after(|disks| {
            std::fs::copy(disks.source, disks.target).unwrap();
        }),
        "what was written after the pivot is missing"
    );
}

#[test]
fn a_source_that_was_written_to_after_the_pivot_fails_the_proof() {
    assert!(!holds_after(|disks| {
        std::fs::copy(disks.target, disks.source).unwrap();
    }));
}

#[test]
fn ctrl_c_ends_it_and_cleans_up() {
    let folder = folder();
    let place = folder.path().to_str().unwrap();
    let demo = start_heliostat(["demo", "--size", "64M", "--seconds", "60", "--folder", place]);
    wait::until("the target to be written", wait::LIMIT, || {
        let inside = std::fs::read_dir(folder.path()).ok()?.next()?.ok()?.path();
        std::fs::metadata(inside.join("target.raw"))
            .is_ok_and(|target| std::os::unix::fs::MetadataExt::blocks(&target) > 0)
            .then_some(())
    })
    .unwrap();
    demo.signal("INT").unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(130));
    assert!(is_empty(folder.path()));
}

#[test]
fn a_size_or_a_place_that_cannot_be_is_refused() {
    for (arguments, why) in [
        (["--size", "1M"], "--size"),
        (["--size", "1000T"], "--size"),
        (["--folder", "/no/such/place"], "--folder names another place"),
    ] {
        let output = heliostat(["demo"].into_iter().chain(arguments));
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_disk_without_space_is_said_and_nothing_is_left() {
    let Some(unshare) = tool("unshare") else { return };
    let folder = folder();
    let script =
        "mount -t tmpfs -o size=2m none \"$0\" || exit 99; \"$@\"; status=$?; ls -A \"$0\"; exit $status";
    let mut command = Command::new(unshare);
    command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(folder.path());
    command.args([HELIOSTAT, "demo", "--size", "64M", "--folder"]).arg(folder.path());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    if output.status.code() == Some(99) || said.contains("unshare") {
        return common::skip("this machine gives no mount of our own");
    }
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--size takes a smaller one") && said.contains("no space"), "{said}");
    assert!(output.stdout.is_empty(), "the folder is removed");
}
