//! `heliostat mirror` without clients: a copier that keeps holes, refuses what would lose data, and leaves
//! nothing half done.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use common::{HELIOSTAT, folder, folder_on_disk, heliostat, start_heliostat, tool, wait};

/// Makes a sparse image of `size` bytes with recognisable data in a few places.
fn image(folder: &Path, name: &str, size: u64) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for place in 0..4 {
        let offset = size / 4 * place;
        let len = (size - offset).min(100_000 + place * 4096);
        let bytes: Vec<u8> = (0..len).map(|n| u8::try_from((n * 31 + place * 7) % 251).unwrap()).collect();
        file.write_all_at(&bytes, offset).unwrap();
    }
    path
}

fn mirror(source: &Path, target: &Path, flags: &[&str]) -> Output {
    let paths = [source.as_os_str(), target.as_os_str()];
    heliostat(["mirror".as_ref()].into_iter().chain(paths).chain(flags.iter().map(AsRef::as_ref)))
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn refused(output: &Output, why: &str) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let said = said(output);
    assert!(said.starts_with("heliostat: ") && said.contains(why), "{said}");
}

fn same(a: &Path, b: &Path) -> bool {
    std::fs::read(a).unwrap() == std::fs::read(b).unwrap()
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn the_target_is_made_equals_the_source_and_stays_sparse() {
    for place in [folder(), folder_on_disk()] {
        let source = image(place.path(), "source", 64 << 20);
        for flags in [&["--quiet"][..], &["--cache", "direct"], &["--copy-mode", "write-blocking"]] {
            let target = place.path().join("target");
            let output = mirror(&source, &target, flags);
            assert!(output.status.success(), "{output:?}");
            assert!(same(&source, &target));
            assert!(allocated(&target) <= allocated(&source) + 65536, "{}", allocated(&target));
            std::fs::remove_file(&target).unwrap();
        }
    }
}

#[test]
fn qemu_img_finds_no_difference() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let folder = folder();
    let source = image(folder.path(), "source", (256 << 20) + 512);
    let target = folder.path().join("target");
    assert!(mirror(&source, &target, &[]).status.success());
    let mut command = Command::new(qemu_img);
    command.args(["compare", "-s", "-f", "raw", "-F", "raw"]).args([source, target]);
    assert!(command.stdout(Stdio::null()).status().unwrap().success());
}

#[test]
fn images_of_any_length_are_copied_whole() {
    let folder = folder();
    for size in [0, 1, 511, 512, 4097, 65537, 1_000_003] {
        let (source, target) = (image(folder.path(), "source", size), folder.path().join("target"));
        let output = mirror(&source, &target, &["--quiet"]);
        assert!(output.status.success(), "{size}: {output:?}");
        assert!(same(&source, &target), "{size}");
        std::fs::remove_file(&target).unwrap();
    }
}

#[test]
fn figures_for_programs_are_exact() {
    let folder = folder();
    let (source, target) = (image(folder.path(), "source", 16 << 20), folder.path().join("target"));
    let output = mirror(&source, &target, &["--json"]);
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(figures["ended"], "completed");
    assert_eq!(figures["error"], Value::Null);
    assert_eq!(figures["size"], 16 << 20);
    assert_eq!(figures["target-actual-size"], allocated(&target));
    assert!(figures["data-copied"].as_u64().unwrap() >= 4 * 100_000);
    assert!(figures["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_quiet_copy_says_only_the_result() {
    let folder = folder();
    let (source, target) = (image(folder.path(), "source", 1 << 20), folder.path().join("target"));
    let output = mirror(&source, &target, &["--quiet"]);
    assert_eq!(said(&output), "");
    let result = String::from_utf8(output.stdout).unwrap();
    assert!(result.contains(" is a copy of ") && result.lines().count() == 1, "{result}");
}

#[test]
fn a_target_of_another_size_is_refused_before_anything_happens() {
    let folder = folder();
    let source = image(folder.path(), "source", 8 << 20);
    for (size, word) in [(4 << 20, "smaller"), ((8 << 20) + 512, "larger")] {
        let target = image(folder.path(), "target", size);
        let before = std::fs::read(&target).unwrap();
        refused(&mirror(&source, &target, &["--existing"]), word);
        assert!(std::fs::read(&target).unwrap() == before, "it was touched");
    }
}

#[test]
fn a_target_that_holds_something_is_left_alone_unless_asked() {
    let folder = folder();
    let source = image(folder.path(), "source", 8 << 20);
    let target = folder.path().join("target");
    std::fs::write(&target, "precious").unwrap();
    refused(&mirror(&source, &target, &[]), "--existing");
    assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    assert!(mirror(&source, &target, &["--force"]).status.success());
    assert!(same(&source, &target));
    // An empty file has nothing to lose: `mktemp` makes such.
    std::fs::write(&target, "").unwrap();
    assert!(mirror(&source, &target, &[]).status.success());
    assert!(same(&source, &target));
}

#[test]
fn an_existing_target_keeps_nothing_of_its_own() {
    let folder = folder();
    let source = image(folder.path(), "source", 8 << 20);
    let target = folder.path().join("target");
    std::fs::write(&target, vec![0xff; 8 << 20]).unwrap();
    let output = mirror(&source, &target, &["--existing"]);
    assert!(output.status.success(), "{output:?}");
    assert!(same(&source, &target), "holes of the source must read as zero on the target");
}

#[test]
fn existing_insists_on_a_target() {
    let folder = folder();
    let source = image(folder.path(), "source", 1 << 20);
    let target = folder.path().join("target");
    refused(&mirror(&source, &target, &["--existing"]), "no such file");
    assert!(!target.exists());
}

#[test]
fn a_disk_is_not_mirrored_into_itself() {
    let folder = folder();
    let source = image(folder.path(), "source", 1 << 20);
    let (hard, soft) = (folder.path().join("hard"), folder.path().join("soft"));
    std::fs::hard_link(&source, &hard).unwrap();
    std::os::unix::fs::symlink(&source, &soft).unwrap();
    let before = std::fs::read(&source).unwrap();
    for target in [&source, &hard, &soft] {
        for flags in [&[][..], &["--existing"], &["--force"]] {
            refused(&mirror(&source, target, flags), "same file");
        }
    }
    assert!(std::fs::read(&source).unwrap() == before);
}

#[test]
fn what_is_no_disk_is_refused_and_no_target_is_made() {
    let folder = folder();
    let source = image(folder.path(), "source", 1 << 20);
    let target = folder.path().join("target");
    refused(&mirror(&folder.path().join("missing"), &target, &[]), "there is no such file");
    refused(&mirror(folder.path(), &target, &[]), "it is a directory");
    assert!(!target.exists());
    refused(&mirror(&source, folder.path(), &["--force"]), "it is a directory");
    refused(&mirror(&source, &folder.path().join("no/such/place"), &[]), "there is no directory");
}

#[test]
fn an_image_that_another_program_writes_to_is_not_copied() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    let folder = folder();
    let source = image(folder.path(), "source", 1 << 20);
    let target = folder.path().join("target");
    let mut command = Command::new(qemu_io);
    command.args(["-f", "raw"]).arg(&source).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut writer = command.spawn().unwrap();
    // It has the image open when it answers its first command.
    writer.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
    let mut line = String::new();
    BufReader::new(writer.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let output = mirror(&source, &target, &["--force"]);
    drop(writer.stdin.take());
    writer.wait().unwrap();
    refused(&output, "lock");
    assert!(said(&output).contains("qemu-io"), "{}", said(&output));
}

/// Starts a copy that takes minutes, and waits until it has begun.
fn slow_mirror(source: &Path, target: &Path, flags: &[&str]) -> common::process::Daemon {
    let paths = [source.as_os_str(), target.as_os_str()];
    let speed = ["--speed", "64K"].map(AsRef::as_ref);
    let flags = flags.iter().map(AsRef::as_ref);
    let daemon = start_heliostat(["mirror".as_ref()].into_iter().chain(paths).chain(speed).chain(flags));
    wait::until("the first bytes to arrive", wait::LIMIT, || {
        std::fs::metadata(target).is_ok_and(|target| target.blocks() > 0).then_some(())
    })
    .unwrap();
    daemon
}

#[test]
fn an_interrupted_copy_leaves_no_target_behind() {
    let folder = folder();
    let source = image(folder.path(), "source", 64 << 20);
    for (signal, status) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let target = folder.path().join("target");
        let daemon = slow_mirror(&source, &target, &[]);
        daemon.signal(signal).unwrap();
        assert_eq!(daemon.wait().unwrap().code(), Some(status));
        assert!(!target.exists(), "{signal}");
    }
}

#[test]
fn an_interrupted_copy_keeps_what_it_did_not_make_or_was_told_to_keep() {
    let folder = folder();
    let source = image(folder.path(), "source", 64 << 20);
    let target = folder.path().join("target");
    let daemon = slow_mirror(&source, &target, &["--keep-partial"]);
    daemon.signal("INT").unwrap();
    daemon.wait().unwrap();
    assert!(target.exists());
    File::create(&target).unwrap().set_len(64 << 20).unwrap();
    let daemon = slow_mirror(&source, &target, &["--existing"]);
    daemon.signal("INT").unwrap();
    daemon.wait().unwrap();
    assert!(target.exists());
}

#[test]
fn two_copies_do_not_write_to_one_target() {
    let folder = folder();
    let source = image(folder.path(), "source", 64 << 20);
    let target = folder.path().join("target");
    let _first = slow_mirror(&source, &target, &[]);
    refused(&mirror(&source, &target, &["--force"]), "lock");
    refused(&mirror(&source, &target, &["--existing"]), "lock");
}

#[test]
fn a_source_that_grows_or_shrinks_meanwhile_fails_the_copy() {
    let folder = folder();
    for change in [4096_i64, -4096] {
        let source = image(folder.path(), "source", 4 << 20);
        let target = folder.path().join("target");
        let mut command = Command::new(HELIOSTAT);
        command.arg("mirror").args([&source, &target]).args(["--speed", "512K"]).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        wait::until("the copy to begin", wait::LIMIT, || {
            std::fs::metadata(&target).is_ok_and(|target| target.blocks() > 0).then_some(())
        })
        .unwrap();
        let mut file = File::options().append(true).open(&source).unwrap();
        match u64::try_from(change) {
            Ok(more) => file.write_all(&vec![1; usize::try_from(more).unwrap()]).unwrap(),
            Err(_) => file.set_len((4 << 20) - change.unsigned_abs()).unwrap(),
        }
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(said(&output).contains("the mirror failed"), "{}", said(&output));
        assert!(!target.exists());
    }
}

#[test]
fn a_full_disk_fails_the_copy_and_says_so() {
    let Some(unshare) = tool("unshare") else { return };
    let folder = folder();
    let source = image(folder.path(), "source", 64 << 20);
    let place = folder.path().join("small");
    std::fs::create_dir(&place).unwrap();
    let target = place.join("target");
    // A file system of its own, which only this command sees.
    let script = "mount -t tmpfs -o size=200k none \"$1\" || exit 99; shift; \"$@\"; status=$?; \
                  ls -A \"$0\"; exit $status";
    let mut command = Command::new(unshare);
    command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(&place).arg(&place);
    command.args([HELIOSTAT, "mirror"]).args([&source, &target]);
    let output = command.output().unwrap();
    if output.status.code() == Some(99) || said(&output).contains("unshare") {
        return common::skip("this machine gives no mount of our own");
    }
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = said(&output);
    assert!(said.contains("no space at") && said.contains("is removed"), "{said}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "", "nothing is left in the target's folder");
    assert!(source.exists());
}

#[test]
fn arguments_that_make_no_sense_are_refused_with_what_to_write() {
    let folder = folder();
    let source = image(folder.path(), "source", 1 << 20);
    let target = folder.path().join("target");
    for (flags, why) in [
        (&["--granularity", "3000"][..], "power of two"),
        (&["--granularity", "128M"], "power of two"),
        (&["--on-ready", "wait"], "--nbd"),
        (&["--sync", "top"], "stands on no other image"),
        (&["--nbd", "192.0.2.1:1"], "--allow-remote"),
    ] {
        refused(&mirror(&source, &target, flags), why);
    }
    for flags in
        [&["--speed", "fast"][..], &["--nbd", "10809"], &["--existing", "--force"], &["--sync", "half"]]
    {
        let output = mirror(&source, &target, flags);
        assert_eq!(output.status.code(), Some(2), "usage: {flags:?}");
    }
    assert!(!target.exists());
}
