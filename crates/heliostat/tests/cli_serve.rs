//! `heliostat serve`: where it listens, who may connect, what it refuses, and how it ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

use heliostat_block::nbd::ReplyStyle;
use serde_json::Value;

use common::{HELIOSTAT, folder, heliostat, tool, wait};

/// A server that has said where it listens.
struct Server {
    child: Child,
    /// What it announced.
    offer: Value,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(arguments, &mut Command::new(HELIOSTAT))
    }

    fn start_in(arguments: &[&str], command: &mut Command) -> Self {
        command.arg("serve").args(arguments).arg("--json").stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut said = String::new();
            child.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
            panic!("it did not start: {said}");
        }
        Self { child, offer: serde_json::from_str(&line).unwrap() }
    }

    fn uri(&self) -> &str {
        self.offer["nbd"].as_str().unwrap()
    }

    fn signal(&self, name: &str) {
        let kill = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.child.id())]).status();
        assert!(kill.unwrap().success());
    }

    fn end(mut self) -> (ExitStatus, String) {
        let status = wait::until("the server's end", wait::LIMIT, || self.child.try_wait().unwrap()).unwrap();
        let mut said = String::new();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        (status, said)
    }

    fn stop(self) {
        self.signal("TERM");
        let (status, said) = self.end();
        assert!(status.success(), "{status}: {said}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn disk(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(b"the disk's own data", 0).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs commands of `qemu-io` against an export; answers whether all went well.
fn qemu_io(program: &Path, uri: &str, commands: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(["-f", "raw"]);
    for text in commands {
        command.args(["-c", text]);
    }
    // It says what failed on standard output.
    let output = command.arg(uri).output().unwrap();
    output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed")
}

fn refused(arguments: &[&str], why: &str) {
    let output = heliostat(["serve"].iter().chain(arguments));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("heliostat: ") && said.contains(why), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn what_a_client_writes_is_on_the_disk_when_the_server_has_ended() {
    let Some(program) = tool("qemu-io") else { return };
    let folder = folder();
    let (disk, socket) = (disk(folder.path(), "disk"), folder.path().join("nbd"));
    for signal in ["TERM", "INT"] {
        let server = Server::start(&[text(&disk), "--nbd", text(&socket), "--name", "my disk"]);
        assert_eq!(server.uri(), format!("nbd+unix:///my%20disk?socket={}", socket.display()));
        assert_eq!(server.offer["size"], 4 << 20);
        // The default export is the only one.
        let nameless = format!("nbd+unix:///?socket={}", socket.display());
        for uri in [server.uri(), &nameless] {
            assert!(qemu_io(&program, uri, &["write -P 0xab 1M 64k", "read -P 0xab 1M 64k", "flush"]));
        }
        server.signal(signal);
        let (status, said) = server.end();
        assert_eq!(status.code(), Some(0), "{said}");
        assert!(!socket.exists(), "the socket goes with its server");
        let mut bytes = vec![0; 65536];
        File::open(&disk).unwrap().read_exact_at(&mut bytes, 1 << 20).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0xab));
    }
}

#[test]
fn whoever_connects_as_soon_as_it_listens_finds_the_disk() {
    let folder = folder();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("nbd"));
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    for _ in 0..5 {
        let mut command = Command::new(HELIOSTAT);
        command.arg("serve").arg(&disk).arg("--nbd").arg(&socket).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        // A server that ends itself leaves no socket, so this is the new one's.
        let server = Server { child, offer: Value::Null };
        let stream = wait::for_socket(&socket).unwrap();
        let mut guest = nbd::Guest::new(stream, "disk", ReplyStyle::Simple).unwrap();
        assert_eq!(guest.read(0, 1), [0]);
        drop(guest);
        server.signal("TERM");
        let mut server = server;
        wait::until("its end", wait::LIMIT, || server.child.try_wait().unwrap()).unwrap();
    }
}

#[test]
fn a_tcp_port_is_on_this_host_and_may_be_chosen_by_it() {
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let folder = folder();
    let disk = disk(folder.path(), "disk");
    let server = Server::start(&[text(&disk), "--nbd", ":0"]);
    assert!(server.uri().starts_with("nbd://127.0.0.1:"), "{}", server.uri());
    let size = Command::new(nbdinfo).arg("--size").arg(server.uri()).output().unwrap();
    assert_eq!(String::from_utf8(size.stdout).unwrap().trim(), (4 << 20).to_string());
    server.stop();
}

#[test]
fn other_hosts_must_be_let_in() {
    let folder = folder();
    let disk = disk(folder.path(), "disk");
    refused(&[text(&disk), "--nbd", "0.0.0.0:0"], "--allow-remote");
    Server::start(&[text(&disk), "--nbd", "0.0.0.0:0", "--allow-remote"]).stop();
}

#[test]
fn a_read_only_export_takes_no_writes() {
    let Some(program) = tool("qemu-io") else { return };
    let folder = folder();
    let (disk, socket) = (disk(folder.path(), "disk"), folder.path().join("nbd"));
    let before = std::fs::read(&disk).unwrap();
    let server = Server::start(&[text(&disk), "--nbd", text(&socket), "--read-only"]);
    assert_eq!(server.offer["read-only"], true);
    assert!(
        qemu_io(&program, server.uri(), &["read 0 1M"]) || {
            // It asks for write access unless told otherwise.
            let read =
                Command::new(&program).args(["-r", "-f", "raw", "-c", "read 0 1M", server.uri()]).status();
            read.unwrap().success()
        }
    );
    assert!(!qemu_io(&program, server.uri(), &["write 0 4k"]));
    server.stop();
    assert!(std::fs::read(&disk).unwrap() == before);
}

#[test]
fn one_image_has_one_writer() {
    let Some(program) = tool("qemu-io") else { return };
    let folder = folder();
    let (disk, socket) = (disk(folder.path(), "disk"), folder.path().join("nbd"));
    let server = Server::start(&[text(&disk), "--nbd", text(&socket)]);
    refused(&[text(&disk), "--nbd", text(&folder.path().join("other"))], "lock");
    assert!(!folder.path().join("other").exists());
    assert!(!qemu_io(&program, text(&disk), &["read 0 4k"]), "QEMU's tools see the lock");
    server.stop();
    assert!(qemu_io(&program, text(&disk), &["read 0 4k"]));
}

#[test]
fn a_live_socket_is_left_alone_and_a_stale_one_is_replaced() {
    let folder = folder();
    let (disk, other) = (disk(folder.path(), "disk"), disk(folder.path(), "other"));
    let socket = folder.path().join("nbd");
    let mut first = Server::start(&[text(&disk), "--nbd", text(&socket)]);
    refused(&[text(&other), "--nbd", text(&socket)], "listens there");
    UnixStream::connect(&socket).unwrap();
    // A crash leaves its socket behind.
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(socket.exists());
    // The kernel lets go of what a killed process had on its ring a moment after the process has ended.
    wait::until("the socket to be stale", wait::LIMIT, || {
        UnixStream::connect(&socket).is_err().then_some(())
    })
    .unwrap();
    Server::start(&[text(&other), "--nbd", text(&socket)]).stop();
    std::fs::write(&socket, "precious").unwrap();
    refused(&[text(&other), "--nbd", text(&socket)], "not a socket");
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
}

#[test]
fn what_is_no_disk_is_refused() {
    let folder = folder();
    let socket = folder.path().join("nbd");
    refused(&[text(&folder.path().join("missing")), "--nbd", text(&socket)], "there is no such file");
    refused(&[text(folder.path()), "--nbd", text(&socket)], "it is a directory");
    refused(&["/dev/null", "--nbd", text(&socket)], "it is a character device");
    let qcow2 = folder.path().join("qcow2");
    std::fs::write(&qcow2, b"QFI\xfb and so on, and on").unwrap();
    refused(&[text(&qcow2), "--nbd", text(&socket)], "--format raw");
    Server::start(&[text(&qcow2), "--nbd", text(&socket), "--format", "raw"]).stop();
    let empty = folder.path().join("empty");
    File::create(&empty).unwrap();
    Server::start(&[text(&empty), "--nbd", text(&socket)]).stop();
}

/// A command that runs the program as somebody who owns nothing. `None`, having said so, where we may not.
fn as_nobody(folder: &Path) -> Option<Command> {
    let setpriv = tool("setpriv")?;
    std::fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(setpriv);
    command.args(["--reuid", "65534", "--clear-groups", HELIOSTAT]);
    let works = Command::new(command.get_program()).args(command.get_args()).arg("--version").output();
    if works.is_ok_and(|output| output.status.success()) {
        return Some(command);
    }
    common::skip("only root can try what others may not do");
    None
}

#[test]
fn what_permissions_forbid_is_said_with_what_would_help() {
    let folder = folder();
    let Some(mut command) = as_nobody(folder.path()) else { return };
    let disk = disk(folder.path(), "disk");
    let said = |mode: u32, arguments: &[&str]| {
        std::fs::set_permissions(&disk, Permissions::from_mode(mode)).unwrap();
        let mut whole = Command::new(command.get_program());
        whole.args(command.get_args()).args(arguments).arg(&disk);
        let output = whole.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let text = said(0o400, &["info"]);
    assert!(text.contains("may not read") && text.contains("check the permissions"), "{text}");
    let text = said(0o444, &["serve", "--nbd", ":0"]);
    assert!(text.contains("may not write") && text.contains("--read-only"), "{text}");
    let server = Server::start_in(&[self::text(&disk), "--nbd", ":0", "--read-only"], &mut command);
    server.stop();
}

#[test]
fn a_server_that_nobody_could_reach_is_not_started() {
    let folder = folder();
    let disk = disk(folder.path(), "disk");
    refused(&[text(&disk)], "--nbd");
    refused(&[], "--nbd");
    refused(&["--nbd", ":0"], "needs a disk");
}

#[test]
fn bad_addresses_are_usage_errors() {
    let folder = folder();
    let disk = disk(folder.path(), "disk");
    for address in ["10809", "host:port", "unix:", "::1:10809", ""] {
        let output = heliostat(["serve", text(&disk), "--nbd", address]);
        assert_eq!(output.status.code(), Some(2), "{address}");
    }
    let long = "x".repeat(200);
    refused(&[text(&disk), "--nbd", text(&folder.path().join(long))], "too long");
    refused(&[text(&disk), "--nbd", text(&folder.path().join("no/such/place"))], "No such file");
    refused(&[text(&disk), "--nbd", "no.such.host.invalid:1"], "cannot find the host");
}

#[test]
fn the_service_manager_is_told_when_it_begins_and_when_it_ends() {
    let folder = folder();
    let (disk, notify) = (disk(folder.path(), "disk"), folder.path().join("notify"));
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(wait::LIMIT)).unwrap();
    let mut command = Command::new(HELIOSTAT);
    let server = Server::start_in(&[text(&disk), "--nbd", ":0"], command.env("NOTIFY_SOCKET", &notify));
    let message = || {
        let mut buffer = [0; 256];
        let len = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    assert!(message().contains("READY=1"));
    server.stop();
    assert!(message().contains("STOPPING=1"));
}

/// Connects, and asks for so much without ever reading a whole answer that the server cannot get rid of them.
fn client_that_never_reads(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    // Fixed newstyle, no zeroes; EXPORT_NAME of the default export.
    let mut hello = 3_u32.to_be_bytes().to_vec();
    hello.extend(0x4948_4156_454f_5054_u64.to_be_bytes());
    hello.extend(1_u32.to_be_bytes());
    hello.extend(0_u32.to_be_bytes());
    stream.write_all(&hello).unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    for cookie in 0..64_u64 {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0, 0, 0]);
        request.extend(cookie.to_be_bytes());
        request.extend(0_u64.to_be_bytes());
        request.extend((1_u32 << 20).to_be_bytes());
        stream.write_all(&request).unwrap();
    }
    // The start of the first answer: the server is at it, and its megabyte does not fit into the socket.
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    stream
}

/// Reads lines until one holds `wanted`.
fn read_until(lines: &mut BufReader<ChildStderr>, wanted: &str) {
    let mut all = String::new();
    while !all.contains(wanted) {
        assert!(lines.read_line(&mut all).unwrap() > 0, "it ended without saying {wanted:?}: {all}");
    }
}

#[test]
fn a_second_signal_asks_what_it_waits_for_and_a_third_one_ends_it() {
    let folder = folder();
    let (disk, socket) = (disk(folder.path(), "disk"), folder.path().join("nbd"));
    let mut server = Server::start(&[text(&disk), "--nbd", text(&socket)]);
    let mut lines = BufReader::new(server.child.stderr.take().unwrap());
    let _client = client_that_never_reads(&socket);
    server.signal("INT");
    read_until(&mut lines, "ending");
    server.signal("INT");
    read_until(&mut lines, "waiting for");
    server.signal("INT");
    let status = wait::until("the end", wait::LIMIT, || server.child.try_wait().unwrap()).unwrap();
    assert_eq!(status.code(), Some(130));
}

#[test]
fn a_signal_that_was_ignored_when_it_was_started_stays_ignored() {
    let folder = folder();
    let (disk, socket) = (disk(folder.path(), "disk"), folder.path().join("nbd"));
    let arguments = [text(&disk), "--nbd", text(&socket)];
    // As `nohup` and a script's background do it.
    for (ignored, other) in [("HUP", "INT"), ("INT", "HUP")] {
        let mut command = Command::new("sh");
        let restart = format!("trap '' {ignored}; exec \"$0\" \"$@\"");
        let server = Server::start_in(&arguments, command.args(["-c", &restart, HELIOSTAT]));
        server.signal(ignored);
        let mut greeting = [0; 8];
        UnixStream::connect(&socket).unwrap().read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGIC", "it serves all the same");
        assert!(ignores(server.child.id(), ignored));
        server.signal(other);
        let (status, said) = server.end();
        assert_eq!(status.code(), Some(0), "{said}");
    }
}

/// Whether a process ignores a signal, as the kernel tells it.
fn ignores(process: u32, name: &str) -> bool {
    let number = ["HUP", "INT"].iter().position(|known| *known == name).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    u64::from_str_radix(mask, 16).unwrap() & (1 << number) != 0
}

#[test]
fn people_are_told_how_to_connect() {
    let folder = folder();
    let (disk, socket) = (disk(folder.path(), "disk"), folder.path().join("nbd"));
    let mut command = Command::new(HELIOSTAT);
    command.args(["serve", text(&disk), "--nbd", text(&socket), "--read-only"]);
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("Ctrl-C") {
        assert!(lines.read_line(&mut said).unwrap() > 0, "{said}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let said = said.replace(text(folder.path()), "FOLDER");
    insta::assert_snapshot!(said, @r"
    heliostat: serving FOLDER/disk, 4 MiB, read-only
      NBD      nbd+unix:///disk?socket=FOLDER/nbd
      try      nbdinfo 'nbd+unix:///disk?socket=FOLDER/nbd'
      or       qemu-system-x86_64 … -drive 'file=nbd+unix:///disk?socket=FOLDER/nbd,format=raw,if=virtio'
      Ctrl-C ends it in order
    ");
}
