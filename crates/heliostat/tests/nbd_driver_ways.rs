//! Ways to have a node in an export of an NBD server, on the command line of `storage-daemon` and of QEMU's: each is
//! written through, and both leave the same disk behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::process::Daemon;
use common::qcow2::{assert_sound, qemu_img, qemu_io};
use common::{HELIOSTAT, folder, tool, wait};

const SIZE: u64 = 4 << 20;

/// What a guest does, as `qemu-io` says it.
const GUEST: [&str; 7] = [
    "write -P 7 64k 192k",
    "write -P 8 1000k 3000",
    "write -z 128k 64k",
    "discard 2M 128k",
    "flush",
    "read -P 7 64k 64k",
    "read -P 0 128k 64k",
];

/// A server of the file at `disk`, at the socket beside it.
fn serve(disk: &Path) -> (Daemon, PathBuf) {
    let socket = disk.with_extension("sock");
    let mut command = Command::new(tool("qemu-nbd").unwrap());
    command.args([
        "--persistent",
        "--shared",
        "0",
        "--format",
        "raw",
        "--export-name",
        "disk",
        "--discard=unmap",
    ]);
    let mut server = Daemon::start(command.arg("--socket").arg(&socket).arg(disk)).unwrap();
    server.listens(&socket).unwrap();
    (server, socket)
}

/// Has each program open the nodes that `arguments` say, in which `DIR` is its folder, and a guest use the node `top`.
/// `prepare` makes the images, of which `far` is behind a server, reached at `DIR/far.sock`. Answers both folders.
fn both(arguments: &[&str], prepare: impl Fn(&Path)) -> Option<[tempfile::TempDir; 2]> {
    let (Some(qemu), Some(qemu_io), Some(_), Some(_)) =
        (tool("qemu-storage-daemon"), tool("qemu-io"), tool("qemu-nbd"), tool("qemu-img"))
    else {
        return None;
    };
    let programs = [vec![qemu], vec![PathBuf::from(HELIOSTAT), PathBuf::from("storage-daemon")]];
    Some(programs.map(|program| {
        let folder = folder();
        let path = |name: &str| folder.path().join(name);
        prepare(folder.path());
        let (server, socket) = serve(&path("far"));
        let connection = wait::for_socket(&socket).unwrap();
        let mut command = Command::new(&program[0]);
        command.args(&program[1..]);
        command.args(arguments.iter().map(|text| text.replace("DIR", folder.path().to_str().unwrap())));
        let address = format!("addr.type=unix,addr.path={}", path("guests").display());
        command.args(["--nbd-server", &address, "--export", "nbd,id=e,node-name=top,name=d,writable=on"]);
        command.arg("--pidfile").arg(path("pid"));
        let mut daemon = Daemon::start_on(&mut command, OwnedFd::from(connection)).unwrap();
        let mut is_there = || path("pid").exists() || !daemon.is_running().unwrap();
        wait::until("the daemon", wait::LIMIT, || is_there().then_some(())).unwrap();
        assert!(daemon.is_running().unwrap(), "{}", program[0].display());
        let mut guest = Command::new(&qemu_io);
        guest.args(["-f", "raw", "--discard=unmap"]).stdin(Stdio::null());
        guest.args(GUEST.iter().flat_map(|step| ["-c", step]));
        let output =
            guest.arg(format!("nbd+unix:///d?socket={}", path("guests").display())).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !said.contains("failed"), "{}: {output:?}", program[0].display());
        assert!(daemon.stop().unwrap().success());
        server.stop().unwrap();
        folder
    }))
}

/// Both programs have left the same disk in the image `name`, whose format is `format`; it is not as it was.
fn same(folders: &[tempfile::TempDir; 2], name: &str, format: &str) {
    let [a, b] = folders.each_ref().map(|folder| folder.path().join(name).display().to_string());
    qemu_img(folders[0].path(), &["compare", "-f", format, "-F", format, &a, &b]);
    qemu_io_reads(folders[1].path(), name, format);
}

fn qemu_io_reads(folder: &Path, name: &str, format: &str) {
    let mut command = Command::new(tool("qemu-io").unwrap());
    command.args(["-r", "-f", format, "-c", "read -P 7 64k 64k", "-c", "read -P 8 1000k 3000"]);
    let output = command.arg(folder.join(name)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !said.contains("failed"), "{output:?}");
}

fn raw(folder: &Path) {
    fs::write(folder.join("far"), vec![1; usize::try_from(SIZE).unwrap()]).unwrap();
}

#[test]
fn an_address_in_dotted_keys_is_used_alike() {
    let server = "server.type=unix,server.path=DIR/far.sock,export=disk,discard=unmap";
    let node = format!("driver=nbd,node-name=top,{server}");
    let Some(folders) = both(&["--blockdev", &node], raw) else { return };
    same(&folders, "far", "raw");
}

#[test]
fn a_connection_that_the_process_was_started_with_is_used_alike() {
    let node = "driver=nbd,node-name=top,server.type=fd,server.str=0,export=disk,discard=unmap";
    let Some(folders) = both(&["--blockdev", node], raw) else { return };
    same(&folders, "far", "raw");
}

#[test]
fn an_image_whose_file_is_an_export_is_used_alike() {
    let far = "driver=nbd,node-name=far,server.type=unix,server.path=DIR/far.sock,export=disk,discard=unmap";
    let image = "driver=qcow2,node-name=top,file=far,discard=unmap";
    let prepare = |folder: &Path| {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "far", "4M"]);
        // The server does not let its file grow.
        let file = fs::OpenOptions::new().write(true).open(folder.join("far")).unwrap();
        file.set_len(SIZE * 2).unwrap();
    };
    let Some(folders) = both(&["--blockdev", far, "--blockdev", image], prepare) else { return };
    same(&folders, "far", "qcow2");
    assert_sound(folders[1].path(), "far");
}

#[test]
fn an_overlay_on_an_export_is_used_alike() {
    let far = "driver=nbd,node-name=far,server.type=unix,server.path=DIR/far.sock,export=disk,read-only=on";
    let image =
        "driver=qcow2,node-name=top,file.driver=file,file.filename=DIR/over.qcow2,backing=far,discard=unmap";
    let prepare = |folder: &Path| {
        raw(folder);
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "far", "-F", "raw", "over.qcow2"]);
        qemu_io(folder, "over.qcow2", &["write -P 3 3M 64k"]);
    };
    let Some(folders) = both(&["--blockdev", far, "--blockdev", image], prepare) else { return };
    same(&folders, "over.qcow2", "qcow2");
    assert_sound(folders[1].path(), "over.qcow2");
    let far = fs::read(folders[1].path().join("far")).unwrap();
    assert!(far.iter().all(|byte| *byte == 1), "what an overlay stands on is only read");
}
