//! `heliostat resize`, judged by QEMU's tools; and images that were not closed in order, which are put right by whoever
//! opens them to write.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::qcow2::{assert_same, assert_sound, qemu_img, qemu_io, try_qemu_img};
use common::{folder, heliostat, tool};
use serde_json::Value;

fn resize(folder: &Path, image: &str, arguments: &[&str]) -> Result<Value, String> {
    let path = folder.join(image);
    let output = heliostat([&["resize", "--json", path.to_str().unwrap()], arguments].concat());
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout).unwrap());
    }
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    Err(String::from_utf8(output.stderr).unwrap())
}

fn size(folder: &Path, image: &str) -> u64 {
    let said: Value = serde_json::from_str(&qemu_img(folder, &["info", "--output=json", image])).unwrap();
    said["virtual-size"].as_u64().unwrap()
}

/// Makes an image of 1 MiB with data in it and an equal one for `qemu-img`; says whether there is one.
fn twins(folder: &Path, format: &str, options: &str) -> bool {
    if try_qemu_img(folder, &["--version"]).is_none() {
        return false;
    }
    for name in ["ours", "theirs"] {
        let options: &[&str] = if options.is_empty() { &[] } else { &["-o", options] };
        qemu_img(folder, &[&["create", "-q", "-f", format], options, &[name, "1M"]].concat());
        let program = tool("qemu-io").unwrap();
        let mut write = Command::new(program);
        write.args(["-f", format, "-c", "write -P 7 100k 800k"]).arg(folder.join(name));
        assert!(write.output().unwrap().status.success());
    }
    true
}

#[test]
fn disks_become_what_qemu_img_makes_of_them() {
    for (format, options) in
        [("raw", ""), ("qcow2", ""), ("qcow2", "compat=0.10,cluster_size=512"), ("qcow2", "extended_l2=on")]
    {
        let folder = folder();
        if !twins(folder.path(), format, options) {
            return;
        }
        for (change, shrinks) in [
            ("3M", false),
            ("+512", false),
            ("-1M", true),
            ("320K", true),
            ("100M", false),
            ("512", true),
            ("64K", false),
        ] {
            let shrink: &[&str] = if shrinks { &["--shrink"] } else { &[] };
            let before = size(folder.path(), "ours");
            let said =
                resize(folder.path(), "ours", &[&["--format", format], shrink, &[change]].concat()).unwrap();
            qemu_img(folder.path(), &[&["resize", "-q", "-f", format], shrink, &["theirs", change]].concat());
            assert_eq!(
                size(folder.path(), "ours"),
                size(folder.path(), "theirs"),
                "{format} {options} {change}"
            );
            assert_eq!(said["old-virtual-size"], before);
            assert_eq!(said["virtual-size"], size(folder.path(), "ours"));
            assert_same(folder.path(), ("ours", format), ("theirs", format));
            if format == "qcow2" {
                assert_sound(folder.path(), "ours");
            }
        }
    }
}

/// `qemu-img` lets what stood behind the old end show again.
#[test]
fn what_was_cut_off_in_the_middle_of_a_cluster_does_not_come_back() {
    for (format, options) in [("raw", ""), ("qcow2", ""), ("qcow2", "extended_l2=on")] {
        let folder = folder();
        if !twins(folder.path(), format, options) {
            return;
        }
        resize(folder.path(), "ours", &["--format", format, "--shrink", "300K"]).unwrap();
        resize(folder.path(), "ours", &["--format", format, "1M"]).unwrap();
        fs::rename(folder.path().join("theirs"), folder.path().join("expected")).unwrap();
        let mut clear = Command::new(tool("qemu-io").unwrap());
        clear.args(["-f", format, "-c", "write -z 300k 724k"]).arg(folder.path().join("expected"));
        assert!(clear.output().unwrap().status.success());
        assert_same(folder.path(), ("ours", format), ("expected", format));
    }
}

#[test]
fn space_is_set_aside_as_asked_for() {
    for (format, how) in
        [("qcow2", "metadata"), ("qcow2", "falloc"), ("qcow2", "full"), ("raw", "falloc"), ("raw", "full")]
    {
        let folder = folder();
        if !twins(folder.path(), format, "") {
            return;
        }
        resize(folder.path(), "ours", &["--format", format, "--preallocation", how, "+4M"]).unwrap();
        let qemu = format!("--preallocation={how}");
        qemu_img(folder.path(), &["resize", "-q", "-f", format, &qemu, "theirs", "+4M"]);
        assert_same(folder.path(), ("ours", format), ("theirs", format));
        if format == "qcow2" {
            assert_sound(folder.path(), "ours");
            let allocated = |image: &str| {
                let map: Value =
                    serde_json::from_str(&qemu_img(folder.path(), &["map", "--output=json", image])).unwrap();
                let with_place =
                    map.as_array().unwrap().iter().filter(|extent| extent.get("offset").is_some());
                with_place.map(|extent| extent["length"].as_u64().unwrap()).sum::<u64>()
            };
            assert_eq!(allocated("ours"), allocated("theirs"), "{how}");
        } else {
            let space =
                std::os::unix::fs::MetadataExt::blocks(&fs::metadata(folder.path().join("ours")).unwrap());
            assert!(space * 512 >= 4 << 20, "{how}: {space}");
        }
    }
}

#[test]
fn what_would_lose_something_or_cannot_be_is_refused_and_changes_nothing() {
    let folder = folder();
    if !twins(folder.path(), "qcow2", "") {
        return;
    }
    let dir = folder.path();
    fs::write(dir.join("disk"), vec![7; 1 << 20]).unwrap();
    fs::rename(dir.join("ours"), dir.join("ours.qcow2")).unwrap();
    let table: [(&str, &[&str], &str); 9] = [
        ("ours.qcow2", &["512K"], "add --shrink"),
        ("ours.qcow2", &["-1"], "add --shrink"),
        ("ours.qcow2", &["-2M", "--shrink"], "it has 1,048,576 bytes"),
        ("ours.qcow2", &["1000", "--shrink"], "The new size must be a multiple of 512"),
        ("ours.qcow2", &["1000000T"], "no disk can have"),
        ("ours.qcow2", &["512K", "--shrink", "--preallocation", "full"], "only where a disk grows"),
        ("disk", &["2M"], "add --format raw"),
        ("disk", &["2M", "--format", "raw", "--preallocation", "metadata"], "no metadata"),
        ("none", &["2M"], "none"),
    ];
    for (image, arguments, text) in table {
        let refusal = resize(dir, image, arguments).unwrap_err();
        let is_said = refusal.contains(text) || (text.starts_with("no disk") && refusal.contains("too"));
        assert!(is_said, "{arguments:?}: {refusal}");
    }
    assert_eq!(fs::metadata(dir.join("disk")).unwrap().len(), 1 << 20);
    assert_eq!(size(dir, "ours.qcow2"), 1 << 20);
    assert_same(dir, ("ours.qcow2", "qcow2"), ("theirs", "qcow2"));
    assert_sound(dir, "ours.qcow2");
}

#[test]
fn a_disk_that_somebody_writes_is_not_resized() {
    let folder = folder();
    if !twins(folder.path(), "qcow2", "") {
        return;
    }
    let daemon = heliostat::daemon::Daemon::new();
    let writer =
        daemon.add_node(&heliostat::daemon::NodeSpec::file("writer", folder.path().join("ours"))).unwrap();
    let refusal = resize(folder.path(), "ours", &["2M", "--format", "qcow2"]).unwrap_err();
    assert!(refusal.contains("in use") || refusal.contains("lock"), "{refusal}");
    drop(writer);
    daemon.shutdown().unwrap();
    resize(folder.path(), "ours", &["2M", "--format", "qcow2"]).unwrap();
}

/// Lets `qemu-io` do things to an image until it is killed before it could close that.
fn write_and_die(folder: &Path, image: &str, commands: &[&str]) {
    let mut command = Command::new(tool("qemu-io").expect("it comes with qemu-img"));
    command.args(["-f", "qcow2", image]).current_dir(folder);
    for step in commands.iter().chain(&["flush", "sigraise 9"]) {
        command.args(["-c", step]);
    }
    let output = command.output().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(9), "{output:?}");
}

fn is_dirty(path: &Path) -> bool {
    fs::read(path).unwrap()[79] & 1 != 0
}

#[test]
fn an_image_that_was_not_closed_is_repaired_by_whoever_opens_it_to_write() {
    for options in
        ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512", "lazy_refcounts=on,refcount_bits=1"]
    {
        let folder = folder();
        let dir = folder.path();
        if try_qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", options, "lazy.qcow2", "1M"]).is_none() {
            return;
        }
        qemu_img(dir, &["create", "-q", "-f", "raw", "expected", "1M"]);
        let commands = ["write -P 5 0 300k", "write -P 6 700k 10k", "write -P 0 100k 64k"];
        qemu_io(dir, "expected", &commands);
        write_and_die(dir, "lazy.qcow2", &commands);
        let path = dir.join("lazy.qcow2");
        assert!(is_dirty(&path), "{options}: a killed writer leaves the bit");
        let checked = Command::new("qemu-img").args(["check", "-q"]).arg(&path).output().unwrap();
        assert!(!checked.status.success(), "{options}: counts are behind, else this shows nothing");

        // Reading repairs nothing.
        let before = fs::read(&path).unwrap();
        assert!(heliostat(["info", path.to_str().unwrap()]).status.success());
        assert!(heliostat(["map", path.to_str().unwrap()]).status.success());
        assert_eq!(fs::read(&path).unwrap(), before);

        resize(dir, "lazy.qcow2", &["2M"]).unwrap();
        assert!(!is_dirty(&path), "{options}");
        assert_sound(dir, "lazy.qcow2");
        resize(dir, "lazy.qcow2", &["1M", "--shrink"]).unwrap();
        assert_same(dir, ("lazy.qcow2", "qcow2"), ("expected", "raw"));
        qemu_io(dir, "lazy.qcow2", &["write -P 9 400k 200k"]);
        assert_sound(dir, "lazy.qcow2");
    }
}

#[test]
fn an_image_that_was_not_closed_and_contradicts_itself_is_left_as_it_is() {
    let folder = folder();
    let dir = folder.path();
    if try_qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "lazy.qcow2", "1M"])
        .is_none()
    {
        return;
    }
    write_and_die(dir, "lazy.qcow2", &["write -P 5 0 300k"]);
    let path = dir.join("lazy.qcow2");
    let mut bytes = fs::read(&path).unwrap();
    // The first L1 entry leads into the middle of a cluster.
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    bytes[l1 + 6] |= 2;
    fs::write(&path, &bytes).unwrap();
    let refusal = resize(dir, "lazy.qcow2", &["2M"]).unwrap_err();
    assert!(refusal.contains("heliostat check --repair all"), "{refusal}");
    assert_eq!(fs::read(&path).unwrap(), bytes);
}
