//! The NBD server and clients that do not behave: none brings it down or keeps others from being served.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use heliostat::front::nbd::ServerSettings;
use heliostat_block::buffer::Buffer;
use heliostat_block::nbd::client_reply::Answered;
use heliostat_block::nbd::client_request::Ask;

use common::wait;
use nbd::{Guest, Memory, Served, rest_of};

fn request(kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let parts: [&[u8]; 6] = [
        &0x2560_9513_u32.to_be_bytes(),
        &[0, 0],
        &kind.to_be_bytes(),
        &7_u64.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ];
    parts.concat()
}

/// Another client is served, and none is left but that one.
fn is_well(served: &Served) {
    let mut guest = served.guest("disk");
    guest.write(0, b"well");
    assert_eq!(guest.read(0, 4), b"well");
    let alone = || (served.server.exports()[0].clients == 1).then_some(());
    wait::until("the end of the other connections", wait::LIMIT, alone).unwrap();
}

fn expect_closed(served: &Served, mut stream: UnixStream, bytes: &[u8]) -> Vec<u8> {
    // The server may close before it has read all of it.
    let _ = stream.write_all(bytes);
    let rest = rest_of(&mut stream);
    is_well(served);
    rest
}

#[test]
fn garbage_in_the_handshake_is_hung_up_on() {
    let (served, _) = Served::with_memory(1 << 16);
    for garbage in [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], &[0; 4096], &[0xff; 200_000]] {
        assert_eq!(expect_closed(&served, served.raw(), garbage), b"NBDMAGICIHAVEOPT\0\x03");
    }
}

#[test]
fn an_option_without_end_is_hung_up_on() {
    let (served, _) = Served::with_memory(1 << 16);
    let bytes = [&[0, 0, 0, 3][..], b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff", &[0; 100_000]].concat();
    expect_closed(&served, served.raw(), &bytes);
}

#[test]
fn garbage_instead_of_a_request_is_hung_up_on_after_the_answers() {
    let (served, memory) = Served::with_memory(1 << 16);
    let mut guest = served.guest("disk");
    memory.hold();
    let write = guest.send_write(0, b"before");
    memory.wait_started(1);
    guest.stream.write_all(&[0x42; 1000]).unwrap();
    memory.release();
    guest.wait(write).unwrap();
    assert_eq!(rest_of(&mut guest.stream), b"");
    is_well(&served);
}

#[test]
fn an_oversized_payload_is_refused_or_hung_up_on() {
    let (served, _) = Served::with_memory(1 << 16);
    let mut guest = served.guest("disk");
    // Can be passed over, and the connection goes on.
    guest.stream.write_all(&request(1, 0, (32 << 20) + 1)).unwrap();
    guest.stream.write_all(&vec![1; (32 << 20) + 1]).unwrap();
    let mut error = [0; 20];
    std::io::Read::read_exact(&mut guest.stream, &mut error).unwrap();
    assert_eq!(error[4..8], [0, 1, 0x80, 1], "an error chunk");
    let mut text = vec![0; usize::from(error[19])];
    std::io::Read::read_exact(&mut guest.stream, &mut text).unwrap();
    assert_eq!(text[..4], [0, 0, 0, 22]);
    assert_eq!(guest.read(0, 4), [0; 4]);
    // Cannot.
    let stream = guest.stream.try_clone().unwrap();
    drop(guest);
    expect_closed(&served, stream, &[request(1, 0, u32::MAX), vec![1; 1 << 20]].concat());
}

#[test]
fn half_a_request_and_then_silence_costs_nobody_anything() {
    let (served, memory) = Served::with_memory(1 << 20);
    let mut silent: Vec<_> = (0..8).map(|_| served.guest("disk")).collect();
    silent[0].stream.write_all(&request(1, 0, 4096)[..10]).unwrap();
    silent[1].stream.write_all(&request(1, 0, 4096)).unwrap();
    silent[2].stream.write_all(&[request(1, 0, 4096), vec![1; 4000]].concat()).unwrap();
    silent[3].stream.write_all(&[request(1, 0, 100_000), vec![1; 50_000]].concat()).unwrap();
    let mut guest = served.guest("disk");
    guest.write(9000, b"goes on");
    assert_eq!(guest.read(9000, 7), b"goes on");
    drop((guest, silent));
    is_well(&served);
    assert_eq!(memory.bytes(4, 4096), [0; 4096], "half a write is no write");
}

#[test]
fn a_handshake_has_a_time_limit_and_an_idle_guest_has_none() {
    let settings = ServerSettings { handshake_time: Duration::from_millis(50), ..ServerSettings::default() };
    let served = Served::start(settings);
    served.export("disk", served.node("disk", Memory::new(1 << 16)));
    let mut guest = served.guest("disk");
    let (mut silent, mut slow) = (served.raw(), served.raw());
    slow.write_all(&[0, 0, 0, 3, b'I', b'H']).unwrap();
    assert_eq!(rest_of(&mut silent), b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(rest_of(&mut slow), b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(guest.read(0, 1), [0]);
}

#[test]
fn a_client_that_disconnects_at_any_byte_of_a_request_harms_nobody() {
    let (served, _) = Served::with_memory(1 << 16);
    let bytes = [request(1, 0, 100), vec![1; 100], request(0, 0, 4096), request(3, 0, 0)].concat();
    for len in 0..bytes.len() {
        let mut guest = served.guest("disk");
        guest.stream.write_all(&bytes[..len]).unwrap();
    }
    is_well(&served);
}

#[test]
fn a_client_that_never_reads_is_no_longer_read_from() {
    const READ: usize = 1 << 20;
    let (served, _) = Served::with_memory(READ);
    let mut guest = served.guest("disk");
    // It must come to that.
    let (asked, output) = guest.gorge(READ);
    assert!(asked < nbd::ASKED_MAX);
    is_served_beside(&served);
    // Once it reads, everything is answered.
    guest.stream.set_nonblocking(false).unwrap();
    let mut stream = guest.stream.try_clone().unwrap();
    let rest = std::thread::spawn(move || stream.write_all(&output));
    for _ in 0..asked {
        assert!(matches!(guest.next().unwrap().outcome, Ok(Answered::Data(_))));
    }
    rest.join().unwrap().unwrap();
}

#[test]
fn answers_that_nobody_reads_are_few() {
    const READ: usize = 1 << 20;
    const READS: u64 = 40;
    /// One that waits for the client, and what the socket may take.
    const ANSWERED_MAX: u64 = 1 + 1;
    /// More than a server has threads.
    const OTHERS: u64 = 5;
    let (served, memory) = Served::with_memory(READ);
    let mut guest = served.guest("disk");
    let mut output = BytesMut::new();
    for _ in 0..READS {
        let read = Ask::Read { offset: 0, buffer: Buffer::zeroed(READ) };
        guest.conversation.ask(read, &mut output).unwrap();
    }
    // In one piece, which the server takes in at once: as far as it will.
    guest.stream.write_all(&output).unwrap();
    memory.wait_started(1);
    // One of them is served by the same thread: when it has been, the other has had its turn.
    let mut others: Vec<_> = (0..OTHERS).map(|_| served.guest("disk")).collect();
    for other in &mut others {
        other.read(0, 1);
    }
    let answered = memory.started.load(Ordering::SeqCst) - OTHERS;
    assert!(answered <= ANSWERED_MAX, "{answered} reads were answered into memory");
    for _ in 0..READS {
        assert!(matches!(guest.next().unwrap().outcome, Ok(Answered::Data(_))));
    }
}

fn is_served_beside(served: &Served) {
    let mut other = served.guest("disk");
    other.write(100, b"beside");
    assert_eq!(other.read(100, 6), b"beside");
}

#[test]
fn a_stop_does_not_wait_for_ever_for_a_client_that_never_reads() {
    let (served, _) = Served::with_memory(1 << 20);
    let mut guest = served.guest("disk");
    for _ in 0..8 {
        guest.send(Ask::Read { offset: 0, buffer: Buffer::zeroed(1 << 20) }, &[]).unwrap();
    }
    let Served { server, graph: _graph, .. } = served;
    server.stop();
    assert!(guest.conversation.in_flight() > 0);
}

#[test]
fn a_client_that_stops_sending_still_gets_its_answers() {
    let (served, memory) = Served::with_memory(1 << 20);
    let mut guest: Guest = served.guest("disk");
    memory.hold();
    let write = guest.send_write(0, b"bye");
    guest.stream.shutdown(std::net::Shutdown::Write).unwrap();
    memory.wait_started(1);
    memory.release();
    guest.wait(write).unwrap();
    assert_eq!(rest_of(&mut guest.stream), b"");
}
