//! Prints what single steps of this crate cost on this machine. To be run by hand, in release mode:
//! `cargo run --release -p heliostat-host --example figures -- [DIRECTORY] [MIB]`. For comparisons with other
//! programs there is `cargo xtask bench`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program to run by hand")]

use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use heliostat_block::buffer::{Buffer, BufferPool};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Storage};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, Cache, Existing, OpenOptions};
use heliostat_host::runtime::{block_on, spawn_local, yield_now};
use heliostat_host::socket::Socket;

const MIB: u64 = 1 << 20;
const STEPS: u32 = 200_000;
const ROUNDS: u32 = 5;

/// Processor time of this process so far, in seconds: what does not depend on who else is running.
fn busy_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = |n: usize| fields[n].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

/// When a measurement began, in time and in processor time.
struct Start(Instant, f64);

impl Start {
    fn now() -> Self {
        Self(Instant::now(), busy_seconds())
    }

    fn report(&self, what: &str, count: u32) {
        let each = self.0.elapsed() / count;
        let busy = (busy_seconds() - self.1) / f64::from(count) * 1e6;
        let rate = 1.0 / each.as_secs_f64();
        println!("{what:<44} {each:>10.2?} each, {busy:>7.2} us of processors, {rate:>9.0} a second");
    }
}

async fn small_requests(storage: &FileStorage, what: &str, steps: u32, depth: usize) {
    let blocks = storage.size() / 4096;
    let offset = |n: u32| u64::from(n).wrapping_mul(7919) % blocks * 4096;
    let data = Bytes::from_owner(Buffer::zeroed(4096));
    let began = Start::now();
    stream::iter(0..steps)
        .map(|n| storage.write(offset(n), data.clone(), Durability::Cached))
        .buffer_unordered(depth)
        .for_each(|result| async move { result.unwrap() })
        .await;
    began.report(&format!("{what}: 4 KiB write, depth {depth}"), steps);
    let pool = BufferPool::new(4096, 64);
    let began = Start::now();
    stream::iter(0..steps)
        .map(|n| storage.read(offset(n), pool.take(4096)))
        .buffer_unordered(depth)
        .for_each(|result| async move { drop(result.unwrap()) })
        .await;
    began.report(&format!("{what}: 4 KiB read, depth {depth}"), steps);
}

/// Copies all of `source`, and returns how long that took and how much processor time it cost, in seconds.
async fn copy(source: &FileStorage, target: &FileStorage, len: u64, depth: usize) -> (f64, f64) {
    let pool = BufferPool::new(usize::try_from(len).unwrap(), 16);
    let pool = &pool;
    let busy = busy_seconds();
    let began = Instant::now();
    stream::iter(ByteRange::from_bounds(0, source.size()).pieces(len))
        .map(|piece| async move {
            let buffer = pool.take(usize::try_from(piece.len()).unwrap());
            let buffer = source.read(piece.offset(), buffer).await.unwrap();
            target.write(piece.offset(), buffer.freeze(), Durability::Cached).await.unwrap();
        })
        .buffer_unordered(depth)
        .for_each(|()| async {})
        .await;
    (began.elapsed().as_secs_f64(), busy_seconds() - busy)
}

/// What the same costs `cp`.
fn cp(source: &Path, target: &Path) -> f64 {
    let began = Instant::now();
    let mut command = std::process::Command::new("cp");
    command.args(["--reflink=never", "--sparse=never"]).args([source, target]).status().unwrap();
    began.elapsed().as_secs_f64()
}

/// The best of several rounds each, since other programs disturb some.
async fn copies(storage: &FileStorage, target: &Path) {
    const KINDS: [(u64, usize); 8] =
        [(1024, 1), (1024, 2), (1024, 4), (1024, 8), (512, 4), (256, 1), (256, 4), (128, 1)];
    let mut best = [(f64::INFINITY, f64::INFINITY); KINDS.len()];
    let mut best_cp = f64::INFINITY;
    for _ in 0..ROUNDS {
        for (kind, best) in KINDS.iter().zip(&mut best) {
            let (len, depth) = *kind;
            let size = storage.size();
            let copied =
                FileStorage::create(target, size, Existing::Replace, &OpenOptions::default()).unwrap();
            let (seconds, busy) = copy(storage, &copied, len << 10, depth).await;
            *best = (best.0.min(seconds), best.1.min(busy));
        }
        std::fs::remove_file(target).unwrap();
        best_cp = best_cp.min(cp(storage.path(), target));
        std::fs::remove_file(target).unwrap();
    }
    for ((len, depth), (seconds, busy)) in KINDS.iter().zip(best) {
        println!("copy in pieces of {len:>4} KiB, depth {depth}: {seconds:.3} s, {busy:.2} s of processors");
    }
    println!("cp: {best_cp:.3} s");
}

async fn receive(socket: &Socket, busy: bool) {
    let mut buffer = [0; 64];
    while socket.recv_now(&mut buffer).is_err() {
        if busy { yield_now().await } else { socket.readable().await.unwrap() }
    }
}

async fn ping_pong(busy: bool) {
    let (one, other) = Socket::pair().unwrap();
    let count = 20_000;
    spawn_local(async move {
        for _ in 0..count {
            receive(&other, busy).await;
            other.send_now(&[std::io::IoSlice::new(b"x")]).unwrap();
        }
    });
    let began = Start::now();
    for _ in 0..count {
        one.send_now(&[std::io::IoSlice::new(b"x")]).unwrap();
        receive(&one, busy).await;
    }
    began.report(if busy { "round trip, looking busily" } else { "round trip, by the ring" }, count);
}

async fn run(directory: &Path, mib: u64) {
    let began = Start::now();
    for _ in 0..STEPS {
        yield_now().await;
    }
    began.report("look at the ring without sleeping", STEPS);
    ping_pong(true).await;
    ping_pong(false).await;

    let (source, target) = (directory.join("figures-source"), directory.join("figures-target"));
    let storage =
        FileStorage::create(&source, mib * MIB, Existing::Replace, &OpenOptions::default()).unwrap();
    let chunk = Buffer::copy_of(&vec![7; 1 << 20]).freeze();
    for piece in ByteRange::from_bounds(0, mib * MIB).pieces(MIB) {
        storage.write(piece.offset(), chunk.clone(), Durability::Cached).await.unwrap();
    }
    small_requests(&storage, "page cache", STEPS, 1).await;
    storage.flush().await.unwrap();
    copies(&storage, &target).await;
    drop(storage);
    let options = OpenOptions { cache: Cache::Direct, access: Access::ReadWrite, ..OpenOptions::default() };
    let storage = Rc::new(FileStorage::open(&source, &options).unwrap());
    if storage.is_direct() {
        small_requests(&storage, "direct", 5_000, 1).await;
        small_requests(&storage, "direct", 40_000, 32).await;
    }
    let _ = std::fs::remove_file(&source);
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap_or_else(|| "/dev/shm".to_owned());
    let mib = arguments.next().map_or(2048, |text| text.parse().unwrap());
    block_on(run(Path::new(&directory), mib)).unwrap();
}
