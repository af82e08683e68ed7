//! Verbs that look at qcow2 images, beside `qemu-img`; and what is done with a disk whose format nobody has said.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use common::qcow2::{assert_same, assert_sound, name_backing, qemu_img, qemu_io};
use common::{folder, heliostat, tool};

/// A chain with something of everything in it: `base.raw`, `mid.qcow2`, `top.qcow2`.
fn chain(folder: &Path) {
    qemu_img(folder, &["create", "-q", "-f", "raw", "base.raw", "4M"]);
    let status = std::process::Command::new(tool("qemu-io").unwrap())
        .current_dir(folder)
        .args(["-f", "raw", "-c", "write -P 1 1M 64k", "base.raw"])
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success());
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2", "6M"]);
    qemu_io(folder, "mid.qcow2", &["write -P 2 2M 64k", "write -z 1M 32k", "write -z -u 3M 128k"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "8M"]);
    let steps = [
        "write -P 3 4M 64k",
        "write -c -P 4 5M 64k",
        "write -P 5 6M 128k",
        "write -z 6M 64k",
        "discard 2M 64k",
    ];
    qemu_io(folder, "top.qcow2", &steps);
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = std::process::Command::new(common::HELIOSTAT);
    command.current_dir(folder).args(arguments).stdin(std::process::Stdio::null());
    command.output().unwrap()
}

fn json(folder: &Path, arguments: &[&str]) -> Value {
    let output = run(folder, &[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

fn qemu_json(folder: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&qemu_img(folder, arguments)).unwrap()
}

/// Images of each kind that `map` and `info` meet.
fn kinds(folder: &Path) -> Vec<&'static str> {
    chain(folder);
    let options = [
        ("old.qcow2", "compat=0.10,cluster_size=4k"),
        ("extended.qcow2", "extended_l2=on,compression_type=zstd,refcount_bits=8"),
        ("external.qcow2", "data_file=data.raw"),
        ("lazy.qcow2", "lazy_refcounts=on"),
    ];
    for (name, options) in options {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", options, name, "5M"]);
        // Whole clusters: where a file has holes in them, qemu-img looks into the file for some images only.
        qemu_io(folder, name, &["write 64k 64k", "write 1M 320k", "write -z 1088k 64k", "write 4992k 64k"]);
    }
    qemu_img(
        folder,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "-o",
            "compat=0.10",
            "old-top.qcow2",
            "8M",
        ],
    );
    qemu_img(folder, &["snapshot", "-c", "first", "lazy.qcow2"]);
    qemu_img(folder, &["bitmap", "--add", "lazy.qcow2", "one"]);
    qemu_img(folder, &["bitmap", "--add", "--disable", "-g", "128k", "lazy.qcow2", "two"]);
    let names = ["base.raw", "mid.qcow2", "top.qcow2", "old-top.qcow2"];
    names.into_iter().chain(options.map(|(name, _)| name)).collect()
}

#[test]
fn map_says_what_qemu_img_says() {
    if tool("qemu-img").is_none() {
        return;
    }
    let folder = folder();
    for image in kinds(folder.path()) {
        let format = if image == "base.raw" { "raw" } else { "qcow2" };
        let theirs = qemu_json(folder.path(), &["map", "--output=json", "-f", format, image]);
        assert_eq!(json(folder.path(), &["map", image]), theirs, "{image}");
    }
    let table = text(&run(folder.path(), &["map", "mid.qcow2"]));
    assert_eq!(table, qemu_img(folder.path(), &["map", "mid.qcow2"]), "for people, too");
    let table = text(&run(folder.path(), &["map", "external.qcow2"]));
    assert!(table.contains("data.raw"), "{table}");
}

/// Takes away what ours has beyond theirs, and what depends on the moment.
fn common_part(ours: &Value, theirs: &Value) -> (Value, Value) {
    let (mut ours, mut theirs) = (ours.clone(), theirs.clone());
    let map = theirs.as_object_mut().unwrap();
    for key in ["children", "actual-size"] {
        map.remove(key);
    }
    ours.as_object_mut().unwrap().retain(|key, _| map.contains_key(key));
    (ours, theirs)
}

#[test]
fn info_says_what_qemu_img_says_of_an_image_and_of_its_chain() {
    if tool("qemu-img").is_none() {
        return;
    }
    let folder = folder();
    for image in kinds(folder.path()) {
        let theirs = qemu_json(folder.path(), &["info", "--output=json", image]);
        let (ours, theirs) = common_part(&json(folder.path(), &["info", image]), &theirs);
        assert_eq!(ours, theirs, "{image}");
    }
    let theirs = qemu_json(folder.path(), &["info", "--output=json", "--backing-chain", "top.qcow2"]);
    let ours = json(folder.path(), &["info", "--backing-chain", "top.qcow2"]);
    let (ours, theirs) = (ours.as_array().unwrap(), theirs.as_array().unwrap());
    assert_eq!(ours.len(), 3);
    for (ours, theirs) in ours.iter().zip(theirs) {
        let (ours, theirs) = common_part(ours, theirs);
        assert_eq!(ours, theirs);
    }
}

#[test]
fn info_shows_people_what_an_image_stands_on() {
    if tool("qemu-img").is_none() {
        return;
    }
    let folder = folder();
    kinds(folder.path());
    let shown = text(&run(folder.path(), &["info", "--backing-chain", "top.qcow2"]));
    for line in [
        "stands on     mid.qcow2 (qcow2)",
        "stands on     base.raw (raw)",
        "clusters      64 KiB",
        "kind          raw, file",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    let shown = text(&run(folder.path(), &["info", "lazy.qcow2"]));
    for line in ["snapshot      1 first", "bitmap        one, 64 KiB a bit [auto]", "lazy-refcounts true"] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
}

#[test]
fn disks_are_compared_whatever_their_images_formats() {
    if tool("qemu-img").is_none() {
        return;
    }
    let folder = folder();
    chain(folder.path());
    qemu_img(folder.path(), &["convert", "-O", "raw", "top.qcow2", "flat.raw"]);
    let same = |arguments: &[&str]| run(folder.path(), &[&["compare"], arguments].concat()).status.code();
    assert_eq!(same(&["top.qcow2", "flat.raw"]), Some(0));
    assert_eq!(same(&["top.qcow2", "mid.qcow2"]), Some(1));
    assert_eq!(same(&["top.qcow2", "top.qcow2", "--format-a", "raw", "--format-b", "raw"]), Some(0));
    assert_eq!(
        same(&["top.qcow2", "flat.raw", "--format-a", "raw"]),
        Some(1),
        "its bytes are not the disk's"
    );
    assert_eq!(same(&["flat.raw", "top.qcow2", "--format-a", "qcow2"]), Some(2), "it is no image");
}

#[test]
fn a_disk_that_only_looks_like_an_image_opens_no_other_file() {
    if tool("qemu-img").is_none() {
        return;
    }
    let folder = folder();
    fs::write(folder.path().join("secret"), [7; 1 << 20]).unwrap();
    // What a guest can write onto its raw disk.
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "disk", "1M"]);
    name_backing(&folder.path().join("disk"), "secret", Some("raw"));
    fs::copy(folder.path().join("disk"), folder.path().join("disk.qcow2")).unwrap();
    for verb in [
        &["compare", "disk", "secret"][..],
        &["map", "disk"],
        &["serve", "disk", "--nbd", "unix:s"],
        &["mirror", "disk", "t"],
    ] {
        let output = run(folder.path(), verb);
        let said = text(&output);
        assert!(
            !output.status.success() && said.contains("--format qcow2") && said.contains("--format raw"),
            "{verb:?}: {said}"
        );
    }
    assert_eq!(run(folder.path(), &["map", "disk", "--format", "raw"]).status.code(), Some(0));
    // What the operator says, or calls an image, is one.
    let equal = |arguments: &[&str]| run(folder.path(), &[&["compare"], arguments].concat()).status.code();
    assert_eq!(equal(&["disk", "secret", "--format-a", "qcow2"]), Some(0));
    assert_eq!(equal(&["disk.qcow2", "secret"]), Some(0));
}

#[test]
fn a_format_that_is_not_there_is_a_usage_error() {
    assert_eq!(heliostat(["map", "--format", "vmdk", "x"]).status.code(), Some(2));
}

#[test]
fn a_mirror_makes_its_target_in_the_sources_format_unless_told_otherwise() {
    if tool("qemu-img").is_none() {
        return;
    }
    let folder = folder();
    chain(folder.path());
    let mirror = |arguments: &[&str]| {
        let output = run(folder.path(), &[&["mirror", "-q"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    };
    mirror(&["top.qcow2", "copy"]);
    assert_sound(folder.path(), "copy");
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("copy", "qcow2"));
    mirror(&["top.qcow2", "flat", "--target-format", "raw"]);
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("flat", "raw"));
    mirror(&["flat", "flat2"]);
    assert_same(folder.path(), ("flat", "raw"), ("flat2", "raw"));
    mirror(&["flat", "image", "--target-format", "qcow2"]);
    assert_sound(folder.path(), "image");
    assert_same(folder.path(), ("flat", "raw"), ("image", "qcow2"));
    // Onto one that is there.
    mirror(&["flat", "image", "--existing"]);
    assert_same(folder.path(), ("flat", "raw"), ("image", "qcow2"));
    mirror(&["top.qcow2", "bytes", "--format", "raw"]);
    assert_eq!(
        fs::read(folder.path().join("bytes")).unwrap(),
        fs::read(folder.path().join("top.qcow2")).unwrap()
    );
}

#[test]
fn the_top_alone_is_mirrored_onto_a_target_that_stands_on_the_same() {
    if tool("qemu-img").is_none() {
        return;
    }
    let folder = folder();
    chain(folder.path());
    fs::create_dir(folder.path().join("elsewhere")).unwrap();
    let output = run(folder.path(), &["mirror", "-q", "--sync", "top", "top.qcow2", "elsewhere/top.qcow2"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_sound(folder.path(), "elsewhere/top.qcow2");
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("elsewhere/top.qcow2", "qcow2"));
    let info = qemu_json(folder.path(), &["info", "--output=json", "elsewhere/top.qcow2"]);
    let below = fs::canonicalize(folder.path().join("mid.qcow2")).unwrap();
    assert_eq!(info["backing-filename"].as_str(), below.to_str());
    assert_eq!(info["backing-filename-format"], "qcow2");
    let depth_0 = |image: &str| -> u64 {
        let map = qemu_json(folder.path(), &["map", "--output=json", image]);
        let held =
            map.as_array().unwrap().iter().filter(|part| part["depth"] == 0 && part["present"] == true);
        held.map(|part| part["length"].as_u64().unwrap()).sum()
    };
    // Where nothing is below, zeroes need no place.
    assert!(depth_0("elsewhere/top.qcow2") <= depth_0("top.qcow2"));
}

#[test]
fn a_disk_that_looks_raw_is_kept_from_looking_like_an_image() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    let folder = folder();
    fs::write(folder.path().join("disk"), [0; 1 << 20]).unwrap();
    let writes = |format: &[&str]| {
        let socket = folder.path().join("s");
        let disk = folder.path().join("disk");
        let nbd = format!("unix:{}", socket.display());
        let arguments = [&["serve", disk.to_str().unwrap(), "--nbd", &nbd], format].concat();
        let mut daemon = common::start_heliostat(&arguments);
        daemon.listens(&socket).unwrap();
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        let header = folder.path().join("header");
        fs::write(&header, b"QFI\xfb\0\0\0\x03").unwrap();
        let step = format!("write -s {} 0 512", header.display());
        let output = std::process::Command::new(&qemu_io)
            .args(["-f", "raw", "-c", &step, "-c", "write 512 4k", &uri])
            .output();
        let said = text(&output.unwrap());
        assert!(daemon.stop().unwrap().success());
        said
    };
    let said = writes(&[]);
    assert!(said.contains("write failed: Operation not permitted") && said.contains("wrote 4096"), "{said}");
    let said = writes(&["--format", "raw"]);
    assert!(!said.contains("failed"), "an operator who says that it is raw means it: {said}");
}

#[test]
fn an_image_is_served_and_left_in_order() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    let folder = folder();
    chain(folder.path());
    qemu_img(folder.path(), &["convert", "-O", "raw", "top.qcow2", "flat.raw"]);
    let socket = folder.path().join("s");
    let image = folder.path().join("top.qcow2");
    let nbd = format!("unix:{}", socket.display());
    let mut daemon = common::start_heliostat(["serve", image.to_str().unwrap(), "--nbd", &nbd]);
    daemon.listens(&socket).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let output = std::process::Command::new(&qemu_io)
        .args([
            "-f",
            "raw",
            "-c",
            "read -P 3 4M 64k",
            "-c",
            "write -P 9 100k 300k",
            "-c",
            "write -z 6M 1M",
            &uri,
        ])
        .output()
        .unwrap();
    assert!(output.status.success() && !text(&output).contains("failed"), "{}", text(&output));
    assert!(daemon.stop().unwrap().success());
    let len = fs::metadata(&image).unwrap().len();
    assert!(len < 4 << 20, "what it was made longer ahead of need is cut off: {len}");
    assert_sound(folder.path(), "top.qcow2");
    let raw_io = std::process::Command::new(&qemu_io)
        .current_dir(folder.path())
        .args(["-f", "raw", "-c", "write -P 9 100k 300k", "-c", "write -z 6M 1M", "flat.raw"])
        .output();
    assert!(raw_io.unwrap().status.success());
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("flat.raw", "raw"));
}
