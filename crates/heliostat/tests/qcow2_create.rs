//! `heliostat create` beside `qemu-img create`: the same images, by what QEMU's tools say of them, and the same refusals.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qcow2;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use common::{folder, heliostat, tool};
use qcow2::{our_check, qemu, qemu_check};
use serde_json::Value;

fn has_tools() -> bool {
    tool("qemu-img").is_some() && tool("qemu-io").is_some()
}

/// Creates with `qemu-img`, in `folder`.
fn theirs(folder: &Path, name: &str, size: &str, options: &str) -> Output {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).current_dir(folder);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    command.args([name, size]).output().unwrap()
}

/// Creates with ours.
fn ours(folder: &Path, name: &str, size: &str, options: &str, more: &[&str]) -> Output {
    let path = folder.join(name);
    let mut arguments = vec!["create", path.to_str().unwrap(), size];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend(more);
    heliostat(arguments)
}

/// What `qemu-img info` says, without what differs between any two files.
fn info(path: &Path) -> Value {
    let output = Command::new("qemu-img").args(["info", "--output=json"]).arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let fields = info.as_object_mut().unwrap();
    for key in ["children", "filename", "full-backing-filename", "actual-size"] {
        fields.remove(key);
    }
    info
}

/// Compares both images of one set of options, and uses ours.
fn compare(folder: &Path, size: &str, options: &str, backing: bool) {
    let what = format!("{size} {options} {backing}");
    let backed = if options.is_empty() { String::new() } else { format!("{options},") };
    let backed = format!("{backed}backing_file=base.raw,backing_fmt=raw");
    let made = theirs(folder, "theirs.qcow2", size, if backing { &backed } else { options });
    assert!(made.status.success(), "{what}: {made:?}");
    let expected = info(&folder.join("theirs.qcow2"));
    let more = if backing { &["--backing", "base.raw", "-F", "raw", "--force"][..] } else { &["--force"] };
    let made = ours(folder, "ours.qcow2", size, options, more);
    assert!(made.status.success(), "{what}: {made:?}");
    let path = folder.join("ours.qcow2");
    assert_eq!(info(&path), expected, "{what}");
    let verdict = qemu_check(&path, &[]);
    assert!(verdict.is_clean(), "{what}: {verdict:?}");
    assert_eq!(our_check(&path, &[]), verdict, "{what}");
    qemu("qemu-img", &["compare", "-q", "theirs.qcow2", "ours.qcow2"], folder);
    qemu("qemu-io", &["-c", "write -P 5 0 200k", "-c", "read -P 5 0 200k", "ours.qcow2"], folder);
    let verdict = qemu_check(&path, &[]);
    assert!(verdict.is_clean(), "{what}, written to: {verdict:?}");
}

#[test]
fn images_are_what_qemu_img_makes_of_the_same_options() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    qemu("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "3M"], folder.path());
    for bits in ["512", "4k", "64k", "2M"] {
        for further in [
            "compat=0.10",
            "compat=1.1",
            "preallocation=metadata",
            "preallocation=falloc",
            "preallocation=full",
        ] {
            compare(folder.path(), "5M", &format!("cluster_size={bits},{further}"), false);
        }
    }
    for bits in ["1", "2", "4", "8", "16", "32", "64"] {
        compare(folder.path(), "10M", &format!("refcount_bits={bits}"), false);
        compare(
            folder.path(),
            "3M",
            &format!("refcount_bits={bits},cluster_size=512,preallocation=metadata"),
            false,
        );
    }
    for options in [
        "lazy_refcounts=on",
        "compression_type=zstd",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,preallocation=metadata",
        "lazy_refcounts=on,compression_type=zstd,extended_l2=on,refcount_bits=8",
    ] {
        compare(folder.path(), "10M", options, false);
    }
    for options in
        ["", "compat=0.10", "cluster_size=512", "extended_l2=on", "extended_l2=on,preallocation=metadata"]
    {
        compare(folder.path(), "10M", options, true);
    }
}

#[test]
fn external_data_files_are_laid_out_as_qemu_img_does() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    for options in [
        "",
        ",data_file_raw=on",
        ",preallocation=metadata",
        ",preallocation=full",
        ",data_file_raw=on,extended_l2=on",
    ] {
        let data = folder.path().join("data.raw");
        compare(folder.path(), "10M", &format!("data_file={}{options}", data.display()), false);
    }
    // A data file that is raw reads the same alone, before and after a write.
    let alone = format!("data_file={},data_file_raw=on", folder.path().join("alone").display());
    assert!(ours(folder.path(), "raw.qcow2", "1M", &alone, &[]).status.success());
    qemu("qemu-io", &["-c", "write -P 5 128k 64k", "raw.qcow2"], folder.path());
    qemu("qemu-img", &["compare", "-q", "-F", "raw", "raw.qcow2", "alone"], folder.path());
}

#[test]
fn sizes_are_rounded_and_bounded_as_qemu_img_does() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    for (size, bytes) in
        [("0", 0), ("1", 512), ("513", 1024), ("1000", 1024), ("1025k", 1025 << 10), ("16T", 16_u64 << 40)]
    {
        assert!(ours(folder.path(), "disk", size, "", &["--force"]).status.success(), "{size}");
        assert_eq!(info(&folder.path().join("disk"))["virtual-size"], bytes, "{size}");
        assert!(qemu_check(&folder.path().join("disk"), &[]).is_clean(), "{size}");
    }
    // 16 TiB cost a few clusters.
    assert!(std::fs::metadata(folder.path().join("disk")).unwrap().blocks() * 512 < 1 << 20);
    for (size, options, fits) in [
        ("128G", "cluster_size=512", true),
        ("129G", "cluster_size=512", false),
        ("1T", "cluster_size=1k", false),
        ("2P", "cluster_size=64k", true),
        ("2049P", "cluster_size=2M", false),
    ] {
        let made = ours(folder.path(), "disk", size, options, &["--force"]);
        assert_eq!(made.status.success(), fits, "{size} {options}");
        assert_eq!(theirs(folder.path(), "theirs", size, options).status.success(), fits, "{size} {options}");
        assert!(!fits || qemu_check(&folder.path().join("disk"), &[]).is_clean(), "{size} {options}");
    }
}

#[test]
fn what_cannot_be_had_is_refused_in_the_words_of_qemu_img_and_leaves_nothing() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    qemu("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "3M"], folder.path());
    let path = folder.path().join("disk");
    let check = |options: &str, backing: bool| {
        let backed = format!("{options},backing_file=base.raw,backing_fmt=raw");
        let expected = theirs(folder.path(), "disk", "2M", if backing { &backed } else { options });
        let _ = std::fs::remove_file(&path);
        let more = if backing { &["--backing", "base.raw", "-F", "raw"][..] } else { &[] };
        let made = ours(folder.path(), "disk", "2M", options, more);
        assert!(!expected.status.success() && !made.status.success(), "{options}");
        let text = |output: &Output, before: &str| {
            String::from_utf8_lossy(&output.stderr).trim().strip_prefix(before).map(str::to_owned)
        };
        let before = format!("heliostat: cannot create {}: ", path.display());
        let said = text(&made, &before);
        assert!(
            said.is_some() && said == text(&expected, "qemu-img: disk: "),
            "{options}: {said:?}, {expected:?}"
        );
        assert!(!path.exists(), "{options} has left something behind");
    };
    for options in [
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,refcount_bits=1",
        "compat=0.10,extended_l2=on",
        "compat=0.10,compression_type=zstd",
        "compat=0.10,data_file=data.raw",
        "compat=2",
        "extended_l2=on,cluster_size=8k",
        "cluster_size=256",
        "cluster_size=4M",
        "cluster_size=1000",
        "cluster_size=0",
        "refcount_bits=3",
        "refcount_bits=128",
        "refcount_bits=0",
        "data_file_raw=on",
        "preallocation=foo",
        "compression_type=lzma",
    ] {
        check(options, false);
    }
    for options in ["preallocation=metadata", "preallocation=full", "data_file=data.raw,data_file_raw=on"] {
        check(options, true);
    }
}

#[test]
fn what_is_there_stays_unless_it_may_go() {
    let folder = folder();
    let path = folder.path().join("disk");
    std::fs::write(&path, "precious").unwrap();
    for format in ["raw", "qcow2"] {
        let made = ours(folder.path(), "disk", "1M", "", &["--format", format]);
        assert_eq!(made.status.code(), Some(1));
        let said = String::from_utf8(made.stderr).unwrap();
        assert!(said.contains("exists; add --force to replace it"), "{said}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
    // A data file that is there stops it too, and what has been made until then goes.
    let made = ours(folder.path(), "new", "1M", &format!("data_file={}", path.display()), &[]);
    assert_eq!(made.status.code(), Some(1));
    assert!(!folder.path().join("new").exists());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert!(ours(folder.path(), "disk", "1M", "", &["--force", "--format", "raw"]).status.success());
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; 1 << 20]);
}

#[test]
fn an_image_above_another_has_its_size_and_needs_its_format() {
    if !has_tools() {
        return;
    }
    let folder = folder();
    assert!(ours(folder.path(), "base", "3M", "", &[]).status.success());
    let image = |arguments: &[&str]| {
        let path = folder.path().join("overlay");
        let all = ["create", path.to_str().unwrap(), "--force"].into_iter().chain(arguments.iter().copied());
        heliostat(all)
    };
    assert!(image(&["-b", "base", "-F", "qcow2"]).status.success());
    let made = info(&folder.path().join("overlay"));
    assert_eq!(
        (&made["virtual-size"], &made["backing-filename"]),
        (&Value::from(3 << 20), &Value::from("base"))
    );
    for (arguments, text) in [
        (&["-b", "base"][..], "Backing file specified without backing format"),
        (&["-b", "nothing", "-F", "raw"], "there is no such file"),
        (&[], "its size is missing"),
        (&["1M", "--format", "raw", "-b", "base", "-F", "raw"], "a raw image has neither"),
        (&["1M", "-o", "colour=red"], "Invalid parameter 'colour'"),
    ] {
        let refused = image(arguments);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success() && said.contains(text), "{arguments:?}: {said}");
    }
}
