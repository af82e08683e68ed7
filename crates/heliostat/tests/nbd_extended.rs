//! Extended headers end to end: a client written by hand, and the tools that ask for them.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use heliostat::front::nbd::ServerSettings;
use heliostat_block::buffer::Buffer;
use heliostat_block::nbd::wire::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, OPTION_MAGIC, cmd, cmd_flag, opt, rep,
};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{
    Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace,
};
use heliostat_host::open::Cache;

use common::{folder, tool};
use nbd::Served;

const TIB: u64 = 1 << 40;

/// A client that knows nothing but bytes.
struct Bare(UnixStream);

/// A chunk: flags, type, the request's offset, payload.
type Chunk = (u16, u16, u64, Vec<u8>);

impl Bare {
    /// Asks for extended headers and `base:allocation`, and for the only export.
    fn connect(served: &Served) -> Self {
        let mut bare = Self(served.raw());
        bare.take(18);
        bare.0.write_all(&3_u32.to_be_bytes()).unwrap();
        assert_eq!(bare.option(opt::EXTENDED_HEADERS, &[]).0, rep::ACK);
        assert_eq!(bare.option(opt::STRUCTURED_REPLY, &[]).0, rep::ERR_EXT_HEADER_REQD);
        let query = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
        assert_eq!(
            bare.option(opt::SET_META_CONTEXT, query),
            (rep::META_CONTEXT, b"\0\0\0\x01base:allocation".into())
        );
        assert_eq!(bare.reply().0, rep::ACK);
        let (kind, info) = bare.option(opt::GO, &[0; 6]);
        assert_eq!((kind, &info[..2]), (rep::INFO, &[0, 0][..]));
        assert_eq!(info[10] & 0x10, 0x10, "BLOCK_STATUS_PAYLOAD");
        while bare.reply().0 != rep::ACK {}
        bare
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn word(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn long(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    fn option(&mut self, option: u32, data: &[u8]) -> (u32, Vec<u8>) {
        let len = u32::try_from(data.len()).unwrap();
        let head = [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes()].concat();
        self.0.write_all(&[&head, data].concat()).unwrap();
        self.reply()
    }

    fn reply(&mut self) -> (u32, Vec<u8>) {
        self.take(12);
        let (kind, len) = (self.word(), self.word());
        (kind, self.take(len.try_into().unwrap()))
    }

    fn ask(&mut self, kind: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Vec<Chunk> {
        let head = [
            &EXTENDED_REQUEST_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            b"mycookie",
            &offset.to_be_bytes(),
            &len.to_be_bytes(),
            payload,
        ];
        self.0.write_all(&head.concat()).unwrap();
        let mut chunks = Vec::new();
        loop {
            assert_eq!(self.word(), EXTENDED_REPLY_MAGIC);
            let word = self.word();
            assert_eq!(self.take(8), b"mycookie");
            let (offset, len) = (self.long(), self.long());
            let payload = self.take(len.try_into().unwrap());
            let (flags, kind) = (u16::try_from(word >> 16).unwrap(), u16::try_from(word & 0xffff).unwrap());
            chunks.push((flags, kind, offset, payload));
            if flags & 1 != 0 {
                return chunks;
            }
        }
    }
}

/// A disk that is longer than 32 bits can say, and takes no space.
fn vast(folder: &Path) -> Served {
    let disk = folder.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(6 * TIB).unwrap();
    Served::with_file(&disk, Cache::Page)
}

fn done(offset: u64) -> Vec<Chunk> {
    vec![(1, 0, offset, vec![])]
}

#[test]
fn requests_beyond_32_bits_are_carried_out() {
    let folder = folder();
    let served = vast(folder.path());
    let mut client = Bare::connect(&served);
    let at = 5 * TIB + 4096;
    assert_eq!(client.ask(cmd::WRITE, cmd_flag::PAYLOAD_LEN, at, 5, b"hello"), done(at));
    let read = client.ask(cmd::READ, 0, at, 5, &[]);
    assert_eq!(read, [(1, 1, at, [&at.to_be_bytes()[..], b"hello"].concat())]);

    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|word| word.to_be_bytes()).collect() };
    let page = |at: u64| at / 4096 * 4096;
    let expected = words(&[1 << 32 | 3, page(at), 3, 4096, 0, 6 * TIB - page(at) - 4096, 3]);
    assert_eq!(client.ask(cmd::BLOCK_STATUS, 0, 0, 6 * TIB, &[]), [(1, 6, 0, expected.clone())]);
    // The same, asked by a list of contexts.
    let payload = [&(6 * TIB).to_be_bytes()[..], &1_u32.to_be_bytes()].concat();
    assert_eq!(client.ask(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 0, 12, &payload), [(1, 6, 0, expected)]);

    assert_eq!(client.ask(cmd::WRITE_ZEROES, 0, TIB, 5 * TIB, &[]), done(TIB));
    let expected = words(&[1 << 32 | 1, 6 * TIB, 3]);
    assert_eq!(client.ask(cmd::BLOCK_STATUS, 0, 0, 6 * TIB, &[]), [(1, 6, 0, expected)]);
    assert_eq!(client.ask(cmd::TRIM, 0, 0, 6 * TIB, &[]), done(0));
    assert_eq!(client.ask(cmd::CACHE, 0, 0, 6 * TIB, &[]), done(0));
    assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0, &[]), done(0));
}

#[test]
fn a_long_read_leaves_holes_out_unless_it_must_come_in_one() {
    let folder = folder();
    let served = vast(folder.path());
    let mut client = Bare::connect(&served);
    let len = 256 << 10;
    let data = vec![7; 4096];
    assert_eq!(client.ask(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 131_072, 4096, &data), done(131_072));
    let hole = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    let expected = [
        (0, 2, 0, hole(0, 131_072)),
        (0, 1, 0, [&131_072_u64.to_be_bytes()[..], &data].concat()),
        (1, 2, 0, hole(135_168, 126_976)),
    ];
    assert_eq!(client.ask(cmd::READ, 0, 0, len, &[]), expected);
    let whole = client.ask(cmd::READ, cmd_flag::DF, 0, len, &[]);
    let [(1, 1, 0, payload)] = &whole[..] else { panic!("in pieces") };
    assert_eq!(payload[8..], [vec![0; 131_072], data, vec![0; 126_976]].concat());
}

/// A disk with a hole in its first half, of which the other half cannot be read.
#[derive(Default)]
struct Torn {
    /// How far it was asked for its layout.
    looked: AtomicU64,
}

const HALF: u64 = 128 << 10;

impl Storage for Torn {
    fn traits(&self) -> Traits {
        Traits {
            block_size: 1,
            preferred_size: 4096,
            read_only: false,
            can_discard: false,
            can_zero_fast: false,
            can_resize: false,
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        2 * HALF
    }

    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, _offset: u64, _buffer: Buffer) -> IoFuture<'_, Buffer> {
        IoFuture::ready(Err(io::Error::other("torn")))
    }

    fn write(&self, _offset: u64, _data: Bytes, _durability: Durability) -> IoFuture<'_, ()> {
        IoFuture::ready(Ok(()))
    }

    fn write_zeroes(
        &self,
        _range: ByteRange,
        _space: ZeroSpace,
        _effort: ZeroEffort,
        _durability: Durability,
    ) -> IoFuture<'_, ()> {
        IoFuture::ready(Ok(()))
    }

    fn discard(&self, _range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::ready(Ok(()))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        IoFuture::ready(Ok(()))
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        self.looked.fetch_max(range.end(), Ordering::SeqCst);
        let half = |start, end, status| {
            let range = ByteRange::from_bounds(start, end).intersection(range)?;
            Some(Extent { range, status })
        };
        let halves = [half(0, HALF, ExtentStatus::Hole), half(HALF, 2 * HALF, ExtentStatus::Data)];
        IoFuture::ready(Ok(halves.into_iter().flatten().collect()))
    }
}

#[test]
fn who_wants_one_piece_gets_all_of_it_and_nothing_behind_it_is_looked_for() {
    let served = Served::start(ServerSettings::default());
    let disk = Arc::<Torn>::default();
    served.export("disk", served.node("disk", Arc::clone(&disk)));
    let mut client = Bare::connect(&served);
    let mut one = |offset: u64| {
        let chunks = client.ask(cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, offset, 2 * HALF - offset, &[]);
        let [(1, 6, _, payload)] = &chunks[..] else { panic!("{chunks:?}") };
        assert_eq!(payload[4..8], 1_u32.to_be_bytes());
        u64::from_be_bytes(payload[8..16].try_into().unwrap())
    };
    assert_eq!(one(HALF - 4096), 4096);
    assert!(disk.looked.load(Ordering::SeqCst) < 2 * HALF, "it looked at everything");
    assert_eq!(one(0), HALF);
    assert_eq!(one(HALF), HALF);
}

#[test]
fn a_read_that_fails_in_the_middle_says_where() {
    let served = Served::start(ServerSettings::default());
    served.export("disk", served.node("disk", Arc::<Torn>::default()));
    let mut client = Bare::connect(&served);
    let chunks = client.ask(cmd::READ, 0, 0, 2 * HALF, &[]);
    let [hole, (1, 0x8002, 0, failure)] = &chunks[..] else { panic!("{chunks:?}") };
    let len = u32::try_from(HALF).unwrap();
    assert_eq!(*hole, (0, 2, 0, [&0_u64.to_be_bytes()[..], &len.to_be_bytes()].concat()));
    assert_eq!(failure[..4], 5_u32.to_be_bytes());
    assert_eq!(failure[failure.len() - 8..], HALF.to_be_bytes());
    // In one piece, nothing is known of a part.
    let whole = client.ask(cmd::READ, cmd_flag::DF, 0, 2 * HALF, &[]);
    assert!(matches!(&whole[..], [(1, 0x8001, 0, _)]), "{whole:?}");
}

#[test]
fn what_is_wrong_is_answered_and_the_next_request_is_understood() {
    let folder = folder();
    let served = vast(folder.path());
    let mut client = Bare::connect(&served);
    let errno = |chunks: Vec<Chunk>| match &chunks[..] {
        [(1, 0x8001, _, payload)] => u32::from_be_bytes(payload[..4].try_into().unwrap()),
        other => panic!("no error: {other:?}"),
    };
    let flag = cmd_flag::PAYLOAD_LEN;
    assert_eq!(errno(client.ask(cmd::READ, 0, 0, 4 * TIB, &[])), 75);
    assert_eq!(errno(client.ask(cmd::READ, 0, 6 * TIB, 512, &[])), 22);
    assert_eq!(errno(client.ask(cmd::READ, flag, 0, 512, &[1; 512])), 22);
    assert_eq!(errno(client.ask(cmd::WRITE, flag, 6 * TIB, 512, &[1; 512])), 28);
    assert_eq!(errno(client.ask(cmd::BLOCK_STATUS, flag, 0, 12, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 9])), 22);
    assert_eq!(errno(client.ask(77, flag, 0, 7, &[1; 7])), 22);
    assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0, &[]), done(0));
}

#[test]
fn qemus_client_asks_for_extended_headers_and_gets_them() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    let folder = folder();
    let served = vast(folder.path());
    let mut command = Command::new(qemu_io);
    command.args(["-T", "nbd_receive_option_reply", "-d", "unmap", "-f", "raw", &served.uri("disk")]);
    for step in [
        "write -P 9 5T 64k",
        "write -z -u -n 1T 2T",
        "discard 3T 1G",
        "read -P 9 5T 64k",
        "read -P 0 3T 1M",
        "flush",
    ] {
        command.args(["-c", step]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && !said.contains("failed"), "{said}");
    assert!(said.contains("(extended headers), type 1 (ack)"), "{said}");
}

#[test]
fn nbdinfo_maps_a_disk_of_terabytes() {
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let folder = folder();
    let served = vast(folder.path());
    let output = Command::new(nbdinfo).args(["--json", "--map", &served.uri("disk")]).output().unwrap();
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let whole =
        serde_json::json!([{ "offset": 0, "length": 6 * TIB, "type": 3, "description": "hole,zero" }]);
    assert_eq!(map, whole);
}
