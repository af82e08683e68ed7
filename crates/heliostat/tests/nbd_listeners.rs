//! An NBD server at several addresses, and on sockets that somebody else has bound.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use heliostat::front::nbd::{Door, NbdServer, ServerSettings};
use heliostat_block::nbd::ReplyStyle;
use heliostat_host::socket::Address;

use common::{HELIOSTAT, folder, tool, wait};
use nbd::Guest;

const SIZE: u64 = 1 << 20;

/// A program that was started with a socket as its standard input, and is killed when the test ends.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> std::io::Result<Self> {
        Ok(Self(command.stdout(Stdio::null()).spawn()?))
    }

    /// Ends it in order.
    fn stop(mut self) -> std::io::Result<ExitStatus> {
        let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", self.0.id())]).status()?;
        assert!(kill.success());
        self.0.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn disk(folder: &Path) -> String {
    let disk = folder.join("disk");
    File::create(&disk).unwrap().set_len(SIZE).unwrap();
    disk.to_str().unwrap().to_owned()
}

fn guest(socket: &Path) -> Guest {
    Guest::new(wait::for_socket(socket).unwrap(), "disk", ReplyStyle::Structured).unwrap()
}

/// Runs `command` with `socket` as its descriptor 3, as a service manager does it.
fn activated(command: &mut Command, names: &str, socket: impl Into<OwnedFd>) -> Command {
    // The shell becomes the program, so that its number is the program's.
    let script =
        format!("LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES={names} exec \"$0\" \"$@\" 3<&0 </dev/null");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).arg(command.get_program()).args(command.get_args());
    shell.stdin(Stdio::from(socket.into()));
    shell
}

#[test]
fn a_server_listens_at_several_addresses_and_counts_all_their_clients() {
    let folder = folder();
    let disk = disk(folder.path());
    let [one, other] = ["one", "other"].map(|name| folder.path().join(name));
    let mut command = Command::new(HELIOSTAT);
    command.args(["serve", &disk, "--nbd-connections", "2", "--nbd"]).arg(&one).arg("--nbd").arg(&other);
    let daemon = Running::start(&mut command).unwrap();
    let (mut first, mut second) = (guest(&one), guest(&other));
    first.write(0, b"through one");
    assert_eq!(second.read(0, 11), b"through one");
    // A third waits until one has left, whichever way it came.
    let third = std::thread::spawn(move || guest(&one).read(0, 11));
    assert_eq!(second.read(0, 11), b"through one");
    drop(second);
    assert_eq!(third.join().unwrap(), b"through one");
    drop(first);
    assert!(daemon.stop().unwrap().success());
    assert!(!other.exists(), "the sockets' files go with the server");
}

#[test]
fn where_one_address_cannot_be_had_none_is_listened_at() {
    let folder = folder();
    let [free, taken] = ["free", "taken"].map(|name| folder.path().join(name));
    let _held = UnixListener::bind(&taken).unwrap();
    let doors = [free.clone(), taken].map(|path| Door::Bind(Address::Unix(path)));
    assert!(NbdServer::start_at(&doors, ServerSettings::default()).is_err());
    assert!(!free.exists());
}

#[test]
fn sockets_that_a_service_manager_has_bound_are_served() {
    let folder = folder();
    let disk = disk(folder.path());
    for address in ["fd:3", "fd:guests", "fd:all"] {
        let path = folder.path().join(address);
        let socket = UnixListener::bind(&path).unwrap();
        // Comes before the server is there, and is served all the same.
        let early = UnixStream::connect(&path).unwrap();
        let mut command =
            activated(Command::new(HELIOSTAT).args(["serve", &disk, "--nbd", address]), "guests", socket);
        let daemon = Running::start(&mut command).unwrap();
        let mut early = Guest::new(early, "disk", ReplyStyle::Structured).unwrap();
        assert_eq!(early.read(0, 4), [0; 4]);
        drop(early);
        assert!(daemon.stop().unwrap().success());
        assert!(path.exists(), "its file is another's");
    }
}

#[test]
fn sockets_that_are_of_no_use_are_refused() {
    let folder = folder();
    let disk = disk(folder.path());
    let said = |command: &mut Command| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let serve = |address: &str| said(Command::new(HELIOSTAT).args(["serve", &disk, "--nbd", address]));
    assert!(serve("fd:99").contains("File descriptor '99' is not a socket"));
    assert!(serve("fd:1").contains("is not a socket"));
    assert!(serve("fd:guests").contains("no socket was passed on"));
    assert!(serve("fd:all").contains("no socket was passed on"));
    // Bound to all of this host's addresses: as any other such address, it must be asked for.
    let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
    let mut command =
        activated(Command::new(HELIOSTAT).args(["serve", &disk, "--nbd", "fd:3"]), "x", everywhere);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("--allow-remote"), "{text}");
}

#[test]
fn the_storage_daemon_takes_descriptors_in_qemus_words() {
    let Some(qemu) = tool("qemu-storage-daemon") else { return };
    let folder = folder();
    for wrong in ["99", "abc", "-1", ""] {
        let said = |program: &mut Command| {
            let option = format!("addr.type=fd,addr.str={wrong}");
            let output = program.args(["--nbd-server", &option]).stdin(Stdio::null()).output().unwrap();
            assert!(!output.status.success());
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            text.split_once(": ").unwrap().1.trim().to_owned()
        };
        assert_eq!(
            said(Command::new(HELIOSTAT).arg("storage-daemon")),
            said(&mut Command::new(&qemu)),
            "{wrong}"
        );
    }
    let path = folder.path().join("socket");
    let socket = UnixListener::bind(&path).unwrap();
    let file = format!("driver=file,node-name=disk,filename={}", disk(folder.path()));
    let mut command = Command::new(HELIOSTAT);
    command.args(["storage-daemon", "--blockdev", &file, "--nbd-server", "addr.type=fd,addr.str=3"]);
    command.args(["--export", "nbd,id=e,node-name=disk,name=disk"]);
    let daemon = Running::start(&mut activated(&mut command, "x", socket)).unwrap();
    assert_eq!(guest(&path).read(0, 4), [0; 4]);
    daemon.stop().unwrap();
}
