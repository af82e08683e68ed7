//! The NBD storage against servers that fail, stall, die in the middle, or talk nonsense.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "nbd/server.rs"]
mod server;

use std::cell::Cell;
use std::future::Future;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{DRIVERS, pattern};
use futures_util::future::join_all;
use heliostat_block::buffer::Buffer;
use heliostat_block::nbd::link::LinkState;
use heliostat_block::storage::{Durability, Storage};
use heliostat_host::nbd::{NbdOptions, NbdStorage, OpenConnection, ServerAddress};
use heliostat_host::runtime::{Driver, block_on_with};
use server::{PATIENCE, Server, options};

const MIB: u64 = 1 << 20;

fn run<F: Future>(driver: Driver, future: F) -> F::Output {
    block_on_with(driver, future).unwrap()
}

async fn read(storage: &NbdStorage, offset: u64, len: usize) -> Bytes {
    storage.read(offset, Buffer::zeroed(len)).await.unwrap().freeze()
}

#[test]
fn a_server_killed_again_and_again_costs_no_answer_and_no_data() {
    for driver in DRIVERS {
        let directory = common::disk_directory();
        let [file, socket] = ["disk", "socket"].map(|name| directory.path().join(name));
        std::fs::File::create(&file).unwrap().set_len(16 * MIB).unwrap();
        let server = Cell::new(Some(Server::qemu(&socket, &file, &[])));
        let options = NbdOptions { reconnect_delay: PATIENCE, ..options(&socket) };
        let storage = NbdStorage::open_with(driver, options).unwrap();
        let data = pattern(9, 16 * MIB, 0);
        let answered = Cell::new(0);
        let piece = |n: u64| {
            let start = usize::try_from(n * 65536).unwrap();
            data.slice(start..start + 65536)
        };
        run(driver, async {
            let writes = (0..256).map(async |n| {
                storage.write(n * 65536, piece(n), Durability::Cached).await.unwrap();
                answered.set(answered.get() + 1);
                // In the middle of the others.
                if [40, 120, 200].contains(&answered.get()) {
                    drop(server.take().map(Server::kill));
                    server.set(Some(Server::qemu(&socket, &file, &[])));
                }
            });
            join_all(writes).await;
            for n in 0..256 {
                assert!(read(&storage, n * 65536, 65536).await == piece(n), "piece {n}");
            }
        });
        let status = storage.status();
        assert!(status.reconnects >= 3 && status.losses >= 3, "{status:?}");
    }
}

#[test]
fn errors_of_the_server_keep_their_meaning() {
    let directory = common::disk_directory();
    let socket = directory.path().join("socket");
    for (error, kind, number) in [
        ("ENOSPC", std::io::ErrorKind::StorageFull, libc::ENOSPC),
        ("EIO", std::io::ErrorKind::Other, libc::EIO),
        ("EPERM", std::io::ErrorKind::PermissionDenied, libc::EPERM),
    ] {
        let arguments =
            ["--filter=error", "memory", "1M", &format!("error={error}"), "error-pwrite-rate=100%"];
        let server = Server::nbdkit(&socket, &arguments);
        let storage = server.open(Driver::Auto);
        let data = Bytes::from_static(&[1; 512]);
        let failed = run(Driver::Auto, storage.write(0, data, Durability::Cached)).unwrap_err();
        assert!(failed.kind() == kind || failed.raw_os_error() == Some(number), "{error}: {failed:?}");
        assert_eq!(run(Driver::Auto, read(&storage, 0, 512)), vec![0; 512]);
        assert_eq!(storage.status().state, LinkState::Up, "an error is no reason to part");
    }
}

#[test]
fn requests_to_a_slow_server_are_under_way_together() {
    for driver in DRIVERS {
        let directory = common::disk_directory();
        let arguments = ["--filter=delay", "memory", "1M", "rdelay=200ms"];
        let server = Server::nbdkit(&directory.path().join("socket"), &arguments);
        let storage = server.open(driver);
        let began = Instant::now();
        run(driver, join_all((0..12).map(|n| read(&storage, n * 512, 512))));
        assert!(began.elapsed() < Duration::from_millis(12 * 200), "{:?}", began.elapsed());
    }
}

#[test]
fn a_dropped_request_disturbs_no_other() {
    for driver in DRIVERS {
        let directory = common::disk_directory();
        let arguments = ["--filter=delay", "memory", "1M", "rdelay=50ms"];
        let server = Server::nbdkit(&directory.path().join("socket"), &arguments);
        let storage = server.open(driver);
        run(driver, async {
            for _ in 0..20 {
                let mut dropped = Box::pin(storage.read(0, Buffer::zeroed(65536)));
                assert!(futures_util::poll!(dropped.as_mut()).is_pending());
                drop(dropped);
            }
            assert_eq!(read(&storage, 512, 512).await, vec![0; 512]);
        });
    }
}

#[test]
fn a_connection_that_others_made_serves_until_it_is_lost() {
    let directory = common::disk_directory();
    let socket = directory.path().join("socket");
    let server = Server::nbdkit(&socket, &["memory", "1M"]);
    drop(server.open(Driver::Auto));
    let connection = OpenConnection::new(UnixStream::connect(&socket).unwrap().into());
    let options = NbdOptions::new(ServerAddress::Connected(connection), String::new());
    let storage = NbdStorage::open(options).unwrap();
    assert_eq!(run(Driver::Auto, read(&storage, 0, 512)), vec![0; 512]);
    server.kill();
    let error = run(Driver::Auto, storage.read(0, Buffer::zeroed(512))).unwrap_err();
    assert!(error.to_string().contains("the NBD server is not reached"), "{error}");
}

/// A server that says `greeting` to each client and reads what it says for ever.
fn nonsense(socket: &std::path::Path, greeting: Vec<u8>) -> mpsc::Receiver<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let (said, is_said) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // Who has heard enough is gone.
            let _ = stream.write_all(&greeting);
            let _ = said.send(());
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    is_said
}

#[test]
fn what_is_no_nbd_server_is_refused_with_the_reason() {
    let directory = common::disk_directory();
    let say = |name: &str, greeting: &[u8]| {
        let socket = directory.path().join(name);
        let said = nonsense(&socket, greeting.to_vec());
        let once = NbdOptions { open_timeout: Duration::ZERO, ..options(&socket) };
        let error = NbdStorage::open(once).unwrap_err().to_string();
        said.recv().unwrap();
        error
    };
    let error = say("ssh", b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n");
    assert!(error.contains("expected magic"), "{error}");
    let long =
        [b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\0\0\0\x01\xff\xff\xff\xff"
            .to_vec()];
    let error = say("long", &long.concat());
    assert!(error.contains("overlong"), "{error}");
}
