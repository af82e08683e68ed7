//! Image locks beside QEMU's own tools: each side sees the other's.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{LoopDevice, disk_directory, run, skipped};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, Existing, Locking, OpenError, OpenOptions};

fn has_qemu_io() -> bool {
    match run("qemu-io", &["--version"]) {
        Ok(_) => true,
        Err(error) => {
            skipped(&format!("qemu-io is not installed: {error}"));
            false
        }
    }
}

fn qemu_io(path: &Path, more: &[&str]) -> Result<String, String> {
    let mut arguments = vec!["-f", "raw", "-c", "read 0 512"];
    arguments.extend_from_slice(more);
    arguments.push(path.to_str().unwrap());
    run("qemu-io", &arguments)
}

/// A program of QEMU's that has an image open until this is dropped.
struct Open(Child);

impl Open {
    /// Waits until it has, which it shows by answering.
    fn new(path: &Path, more: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(more)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
        Self(child)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_only(locking: Locking) -> OpenOptions {
    OpenOptions { access: Access::ReadOnly, locking, ..OpenOptions::default() }
}

fn refused(path: &Path, options: &OpenOptions) -> (String, String) {
    match FileStorage::open(path, options) {
        Err(OpenError::Locked { conflict, holder, .. }) => {
            (conflict.to_string(), holder.expect("it runs beside us").name)
        }
        other => panic!("{other:?}"),
    }
}

fn check_our_writer(path: &Path) {
    let writing = FileStorage::open(path, &OpenOptions::default()).unwrap();
    let error = qemu_io(path, &[]).unwrap_err();
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
    qemu_io(path, &["-r"]).unwrap();
    let path_text = path.to_str().unwrap();
    let error = run("qemu-img", &["convert", "-f", "raw", "-O", "raw", path_text, "/dev/null"]).unwrap_err();
    assert!(error.contains("Failed to get shared \"write\" lock"), "{error}");
    run("qemu-img", &["info", "-U", path_text]).unwrap();
    drop(writing);
    qemu_io(path, &[]).unwrap();
}

fn check_their_writer(path: &Path) {
    let _writing = Open::new(path, &[]);
    let expected = ("Failed to get shared \"write\" lock".to_owned(), "qemu-io".to_owned());
    assert_eq!(refused(path, &OpenOptions::default()), expected);
    assert_eq!(refused(path, &read_only(Locking::Still)), expected);
    FileStorage::open(path, &read_only(Locking::Auto)).unwrap();
    FileStorage::open(path, &OpenOptions { locking: Locking::Shared, ..OpenOptions::default() }).unwrap();
}

#[test]
fn our_writer_keeps_theirs_out() {
    if !has_qemu_io() {
        return;
    }
    let directory = disk_directory();
    let path = directory.path().join("disk");
    drop(FileStorage::create(&path, 1 << 20, Existing::Refuse, &OpenOptions::default()).unwrap());
    check_our_writer(&path);
}

#[test]
fn their_writer_keeps_ours_out() {
    if !has_qemu_io() {
        return;
    }
    let directory = disk_directory();
    let path = directory.path().join("disk");
    drop(FileStorage::create(&path, 1 << 20, Existing::Refuse, &OpenOptions::default()).unwrap());
    check_their_writer(&path);
}

#[test]
fn readers_on_both_sides_do_not_disturb_each_other() {
    if !has_qemu_io() {
        return;
    }
    let directory = disk_directory();
    let path = directory.path().join("disk");
    drop(FileStorage::create(&path, 1 << 20, Existing::Refuse, &OpenOptions::default()).unwrap());
    let ours = FileStorage::open(&path, &read_only(Locking::Auto)).unwrap();
    qemu_io(&path, &["-r"]).unwrap();
    qemu_io(&path, &[]).unwrap();
    drop(ours);
    let _theirs = Open::new(&path, &["-r"]);
    FileStorage::open(&path, &read_only(Locking::Still)).unwrap();
    FileStorage::open(&path, &OpenOptions::default()).unwrap();
}

#[test]
fn who_reads_a_still_image_keeps_their_writer_out() {
    if !has_qemu_io() {
        return;
    }
    let directory = disk_directory();
    let path = directory.path().join("disk");
    drop(FileStorage::create(&path, 1 << 20, Existing::Refuse, &OpenOptions::default()).unwrap());
    let _still = FileStorage::open(&path, &read_only(Locking::Still)).unwrap();
    let error = qemu_io(&path, &[]).unwrap_err();
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
}

#[test]
fn block_devices_are_locked_the_same_way() {
    if !has_qemu_io() {
        return;
    }
    let directory = disk_directory();
    let Some(device) = LoopDevice::new(directory.path(), 1 << 20, 512) else { return };
    check_our_writer(&device.path);
    check_their_writer(&device.path);
}
