//! The NBD server's promises to clients and to its operator, with clients that behave.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::io::{ErrorKind, Read};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use heliostat::front::nbd::{Doors, ExportError, ExportSettings, NbdServer, Reach, Removal, ServerSettings};
use heliostat_block::buffer::Buffer;
use heliostat_block::nbd::client_reply::Answered;
use heliostat_block::nbd::client_request::Ask;
use heliostat_block::nbd::{Access, Errno, ReplyStyle};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Durability;
use heliostat_host::socket::Address;

use common::wait;
use nbd::{Guest, Memory, Served, rest_of};

fn clients(served: &Served) -> usize {
    served.server.exports().iter().map(|export| export.clients).sum()
}

#[test]
fn what_a_client_writes_it_reads_back() {
    let (served, memory) = Served::with_memory(1 << 20);
    for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
        let mut guest = Guest::new(served.raw(), "disk", style).unwrap();
        guest.write(1000, b"hello");
        assert_eq!(guest.read(998, 9), b"\0\0hello\0\0");
        let fua = Ask::Write { range: ByteRange::new(1000, 5).unwrap(), durability: Durability::Fua };
        assert!(matches!(guest.ask(fua, &[0; 5]), Ok(Answered::Done)));
        assert!(matches!(guest.ask(Ask::Flush, &[]), Ok(Answered::Done)));
    }
    assert_eq!(memory.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn payloads_of_every_length_arrive_whole() {
    let (served, memory) = Served::with_memory(48 << 20);
    let mut guest = served.guest("disk");
    for len in [1, 511, 4096, 32_767, 32_768, 100_000, 262_144, 262_145, 3 << 20, 32 << 20] {
        let data: Vec<u8> = (0..len).map(|i| u8::try_from((i * 7 + len) % 251).unwrap()).collect();
        let offset = len / 3;
        guest.write(offset.try_into().unwrap(), &data);
        assert!(memory.bytes(offset, len) == data, "{len} bytes written");
        assert!(guest.read(offset.try_into().unwrap(), len) == data, "{len} bytes read");
    }
}

#[test]
fn many_requests_in_one_piece_are_all_answered() {
    let (served, memory) = Served::with_memory(1 << 20);
    let mut guest = served.guest("disk");
    let mut cookies = Vec::new();
    for i in 0..200_u8 {
        cookies.push(guest.send_write(u64::from(i) * 100, &[i; 100]));
    }
    cookies.into_iter().for_each(|cookie| drop(guest.wait(cookie).unwrap()));
    assert!((0..200).all(|i| memory.bytes(i * 100, 100) == [u8::try_from(i).unwrap(); 100]));
}

#[test]
fn a_slow_write_does_not_hold_up_a_read() {
    let (served, memory) = Served::with_memory(1 << 20);
    let mut guest = served.guest("disk");
    memory.hold();
    let write = guest.send_write(0, b"slow");
    memory.wait_started(1);
    assert_eq!(guest.read(0, 4), [0; 4]);
    memory.release();
    guest.wait(write).unwrap();
    assert_eq!(guest.read(0, 4), b"slow");
}

#[test]
fn several_exports_are_told_apart_and_the_marked_one_is_the_default() {
    let served = Served::start(ServerSettings::default());
    let disks = ["a", "b"].map(|name| (name, Memory::new(4096)));
    for (name, memory) in &disks {
        let node = served.node(name, Arc::clone(memory));
        let settings = ExportSettings { is_default: *name == "b", ..served.settings(name, &node) };
        served.server.add_export(settings).unwrap();
        served.guest(name).write(0, name.as_bytes());
    }
    assert_eq!(disks[0].1.bytes(0, 1), b"a");
    assert_eq!(served.guest("").read(0, 1), b"b");
    assert!(Guest::new(served.raw(), "c", ReplyStyle::Structured).is_err());
}

#[test]
fn a_read_only_export_refuses_writes() {
    let served = Served::start(ServerSettings::default());
    let node = served.node("disk", Memory::new(4096));
    let settings = ExportSettings { access: Access::ReadOnly, ..served.settings("disk", &node) };
    served.server.add_export(settings).unwrap();
    let guest = served.guest("disk");
    assert_eq!(guest.found.terms.access, Access::ReadOnly);
}

#[test]
fn an_export_in_use_is_only_removed_by_force() {
    let (served, memory) = Served::with_memory(4096);
    let mut guest = served.guest("disk");
    let in_use = served.server.remove_export("disk", Removal::Safe).map(|_| ());
    assert_eq!(in_use, Err(ExportError::InUse("disk".to_owned())));
    memory.hold();
    let write = guest.send_write(0, b"last words");
    memory.wait_started(1);
    let removed = served.server.remove_export("disk", Removal::Hard).unwrap();
    assert!(Guest::new(served.raw(), "disk", ReplyStyle::Structured).is_err(), "offered no longer");
    memory.release();
    guest.wait(write).unwrap();
    assert_eq!(memory.bytes(0, 10), b"last words");
    removed.wait();
    assert_eq!(rest_of(&mut guest.stream), b"");
    assert!(matches!(
        served.server.remove_export("disk", Removal::Safe),
        Err(ExportError::NotFound(name)) if name == "disk"
    ));
}

#[test]
fn a_name_is_taken_once_and_free_again_after_removal() {
    let (served, _) = Served::with_memory(4096);
    let node = served.graph.node("disk").unwrap();
    let again = served.server.add_export(served.settings("disk", &node));
    assert_eq!(again, Err(ExportError::Duplicate("disk".to_owned())));
    served.server.remove_export("disk", Removal::Safe).unwrap().wait();
    served.export("disk", node);
    served.guest("disk").write(0, b"x");
}

#[test]
fn a_stop_lets_requests_end_and_answers_them() {
    let (served, memory) = Served::with_memory(4096);
    let mut guest = served.guest("disk");
    memory.hold();
    let write = guest.send_write(0, b"kept");
    memory.wait_started(1);
    let socket = served.socket();
    let Served { server, graph: _graph, .. } = served;
    let (stopped, is_stopped) = mpsc::channel();
    let stopping = thread::spawn(move || {
        server.stop();
        stopped.send(()).unwrap();
    });
    wait::until("the listener's end", wait::LIMIT, || (!socket.exists()).then_some(())).unwrap();
    assert!(is_stopped.try_recv().is_err(), "it waits for the write");
    // What comes now comes too late, and the client hears why.
    let late = guest.send_write(0, b"late");
    assert_eq!(guest.wait(late).unwrap_err().errno, Errno::Shutdown);
    assert!(is_stopped.try_recv().is_err(), "it still waits for the write");
    memory.release();
    guest.wait(write).unwrap();
    assert_eq!(rest_of(&mut guest.stream), b"");
    stopping.join().unwrap();
    assert_eq!(memory.bytes(0, 4), b"kept");
}

#[test]
fn a_client_that_comes_before_the_doors_are_open_finds_what_is_offered_by_then() {
    let served = Served::start(ServerSettings { doors: Doors::Closed, ..ServerSettings::default() });
    let mut early = served.raw();
    early.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let said = early.read(&mut [0; 64]).map_err(|error| error.kind());
    assert_eq!(said, Err(ErrorKind::WouldBlock), "it was told nothing yet");
    early.set_read_timeout(Some(wait::LIMIT)).unwrap();
    served.export("disk", served.node("disk", Memory::new(4096)));
    served.server.let_in();
    let mut guest = Guest::new(early, "disk", ReplyStyle::Simple).unwrap();
    assert_eq!(guest.read(0, 1), [0]);
}

#[test]
fn a_server_that_is_stopped_with_closed_doors_hangs_up() {
    let served = Served::start(ServerSettings { doors: Doors::Closed, ..ServerSettings::default() });
    let mut early = served.raw();
    let Served { server, graph: _graph, .. } = served;
    server.stop();
    assert_eq!(rest_of(&mut early), b"");
}

#[test]
fn a_stop_hangs_up_on_who_waits_for_its_turn_to_connect() {
    let served = Served::start(ServerSettings { connections_max: 1, ..ServerSettings::default() });
    let memory = Memory::new(4096);
    served.export("disk", served.node("disk", Arc::clone(&memory)));
    let mut guest = served.guest("disk");
    memory.hold();
    let write = guest.send_write(0, b"kept");
    memory.wait_started(1);
    let mut waiting = served.raw();
    let Served { server, graph: _graph, .. } = served;
    let stopping = thread::spawn(move || server.stop());
    assert_eq!(rest_of(&mut waiting), b"", "at once, though another's request is still in flight");
    memory.release();
    guest.wait(write).unwrap();
    stopping.join().unwrap();
}

#[test]
fn a_clients_writes_outlive_its_connection() {
    let (served, memory) = Served::with_memory(1 << 20);
    let mut guest = served.guest("disk");
    memory.hold();
    for i in 0..20_u8 {
        guest.send_write(u64::from(i) * 1000, &[i + 1; 1000]);
    }
    memory.wait_started(20);
    drop(guest);
    let mut other = served.guest("disk");
    assert_eq!(other.read(0, 1), [0]);
    memory.release();
    let one_left = || (clients(&served) == 1).then_some(());
    wait::until("the end of the first connection", wait::LIMIT, one_left).unwrap();
    assert!((0..20).all(|i| memory.bytes(i * 1000, 1000) == vec![u8::try_from(i + 1).unwrap(); 1000]));
}

#[test]
fn clients_share_one_disk() {
    let (served, _) = Served::with_memory(1 << 20);
    let mut guests: Vec<_> = (0..10).map(|_| served.guest("disk")).collect();
    for (i, guest) in guests.iter_mut().enumerate() {
        guest.write(u64::try_from(i).unwrap(), &[u8::try_from(i).unwrap()]);
    }
    for guest in &mut guests {
        assert_eq!(guest.read(0, 10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }
    assert_eq!(clients(&served), 10);
}

#[test]
fn a_connection_beyond_the_bound_waits_for_its_turn() {
    let served = Served::start(ServerSettings { connections_max: 2, ..ServerSettings::default() });
    served.export("disk", served.node("disk", Memory::new(4096)));
    let (first, _second) = (served.guest("disk"), served.guest("disk"));
    let waiting = served.raw();
    let third = thread::spawn(move || {
        Guest::new(waiting, "disk", ReplyStyle::Structured).map(|mut guest| guest.read(0, 1))
    });
    assert_eq!(clients(&served), 2);
    drop(first);
    assert_eq!(third.join().unwrap().unwrap(), [0]);
}

#[test]
fn an_address_for_others_must_be_asked_for() {
    let anywhere = Address::Tcp("0.0.0.0:0".parse().unwrap());
    let refused = NbdServer::start(&anywhere, ServerSettings::default()).map(|_| ());
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    let asked = ServerSettings { reach: Reach::Anywhere, ..ServerSettings::default() };
    NbdServer::start(&anywhere, asked).unwrap().stop();
    let loopback = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let server = NbdServer::start(&loopback, ServerSettings::default()).unwrap();
    assert_ne!(server.addresses(), [loopback], "the port that was chosen");
}

#[test]
fn a_failure_of_the_disk_reaches_the_client() {
    let (served, _) = Served::with_memory(4096);
    let mut guest = served.guest("disk");
    // The client believes that the disk is larger, so the server must refuse.
    guest.found.terms.size = 1 << 20;
    guest.conversation = heliostat_block::nbd::client_reply::Conversation::new(&guest.found);
    let read = guest.ask(Ask::Read { offset: 4096, buffer: Buffer::zeroed(512) }, &[]);
    assert_eq!(read.unwrap_err().errno, Errno::Invalid);
    let range = ByteRange::new(4000, 512).unwrap();
    let failure = guest.ask(Ask::Write { range, durability: Durability::Cached }, &[1; 512]).unwrap_err();
    assert_eq!(failure.errno, Errno::NoSpace);
    assert_eq!(failure.message, "the request ends beyond the export");
    assert_eq!(guest.read(4000, 96), [0; 96], "and the connection goes on");
}
