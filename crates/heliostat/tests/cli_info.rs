//! `heliostat info`: what an image is, exact for programs, short for people.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use common::{folder, heliostat, tool};

fn info(path: &std::path::Path) -> Value {
    let output = heliostat(["info".as_ref(), path.as_os_str(), "--json".as_ref()]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn sizes_are_exact_and_holes_are_told_from_data() {
    let folder = folder();
    let path = folder.path().join("disk");
    let file = File::create(&path).unwrap();
    file.set_len((1 << 30) + 1).unwrap();
    file.write_all_at(&[7; 65536], 1 << 20).unwrap();
    file.write_all_at(&[7; 65536], 1 << 25).unwrap();
    let info = info(&path);
    assert_eq!(info["virtual-size"], (1 << 30) + 1);
    assert_eq!(info["data-bytes"], 131_072);
    assert_eq!(info["data-extents"], 2);
    assert_eq!(info["layout-complete"], true);
    assert_eq!(info["actual-size"], 131_072);
    assert_eq!((&info["format"], &info["kind"]), (&json!("raw"), &json!("file")));
    assert_eq!(info["in-use-by"], Value::Null);
}

#[test]
fn people_read_a_few_lines() {
    let folder = folder();
    let path = folder.path().join("disk");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(&[7; 65536], 1 << 20).unwrap();
    let output = heliostat(["info".as_ref(), path.as_os_str()]);
    let text = String::from_utf8(output.stdout).unwrap().replace(path.to_str().unwrap(), "DISK");
    insta::assert_snapshot!(text, @r"
    image         DISK
    kind          raw, file
    virtual size  1 GiB (1,073,741,824 bytes)
    on the host   64 KiB (65,536 bytes)
    data          64 KiB in 1 place; the rest is holes
    ");
}

#[test]
fn a_qcow2_image_is_recognised() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let folder = folder();
    let path = folder.path().join("disk.qcow2");
    let made = Command::new(qemu_img).args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1G").status();
    assert!(made.unwrap().success());
    assert_eq!(info(&path)["format"], "qcow2");
}

#[test]
fn an_image_in_use_is_shown_with_its_user() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    let folder = folder();
    let path = folder.path().join("disk");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let mut command = Command::new(qemu_io);
    command.args(["-f", "raw"]).arg(&path).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut writer = command.spawn().unwrap();
    // It has the image open when it answers its first command.
    writer.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
    let mut line = String::new();
    BufReader::new(writer.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let in_use = info(&path)["in-use-by"].as_str().unwrap_or("nobody").to_owned();
    drop(writer.stdin.take());
    writer.wait().unwrap();
    assert!(in_use.contains("qemu-io") && in_use.contains(&writer.id().to_string()), "{in_use}");
}

#[test]
fn looking_at_an_image_asks_for_no_lock() {
    let Some(python) = tool("python3") else { return };
    let folder = folder();
    let path = folder.path().join("disk");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    // The byte that says "nobody else may write", held so that asking for it fails. Held shared, as QEMU's tools
    // and ours do it, it keeps no reader from looking and no other from asking.
    let hold = "import fcntl, sys; file = open(sys.argv[1], 'r+b'); \
                fcntl.lockf(file, fcntl.LOCK_EX, 1, 201); print('held', flush=True); sys.stdin.read()";
    let mut command = Command::new(python);
    command.args(["-c", hold]).arg(&path).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    assert_eq!(info(&path)["in-use-by"], Value::Null);
    drop(holder.stdin.take());
    assert!(holder.wait().unwrap().success());
}

#[test]
fn an_empty_image_is_an_image() {
    let folder = folder();
    let path = folder.path().join("disk");
    File::create(&path).unwrap();
    let info = info(&path);
    assert_eq!((&info["virtual-size"], &info["data-bytes"]), (&json!(0), &json!(0)));
}
