//! Requests of any alignment over a storage in memory that refuses unaligned ones, beside a plain vector of bytes.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use futures_util::future::join_all;
use futures_util::task::noop_waker_ref;
use proptest::prelude::*;

use super::*;
use crate::clock::yield_once;
use crate::storage::{Extent, ExtentStatus, Traits};

/// A storage in memory. Every request takes a few turns and is carried out in two halves, so that those which run
/// at once get between each other.
struct Memory {
    block_size: u32,
    bytes: Mutex<Vec<u8>>,
    bytes_read: AtomicU64,
    reads: AtomicU64,
    /// Says how many turns the next request takes.
    turns: AtomicU64,
}

impl Memory {
    fn new(block_size: u32, bytes: Vec<u8>) -> Arc<Self> {
        let (bytes_read, reads, turns) = Default::default();
        Arc::new(Self { block_size, bytes: Mutex::new(bytes), bytes_read, reads, turns })
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    fn refuse_unaligned(&self, range: ByteRange) -> io::Result<()> {
        let (unit, size) = (u64::from(self.block_size), self.size());
        let is_whole = range.offset().is_multiple_of(unit)
            && (range.end().is_multiple_of(unit) || range.end() == size)
            && range.end() <= size;
        if is_whole {
            Ok(())
        } else {
            Err(io::Error::other(format!("{range} is not whole blocks of {unit}")))
        }
    }

    /// Carries out `piece` on both halves of `range`, some turns apart.
    async fn carry_out(
        &self,
        range: ByteRange,
        mut piece: impl FnMut(&mut [u8], std::ops::Range<usize>),
    ) -> io::Result<()> {
        self.refuse_unaligned(range)?;
        let middle = range.offset() + range.len() / 2;
        for half in
            [ByteRange::from_bounds(range.offset(), middle), ByteRange::from_bounds(middle, range.end())]
        {
            let turns = self.turns.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 62;
            for _ in 0..turns {
                yield_once().await;
            }
            let start = usize_from(half.offset() - range.offset());
            let place = usize_from(half.offset())..usize_from(half.end());
            let within = start..start + place.len();
            piece(&mut self.bytes()[place], within);
        }
        Ok(())
    }
}

impl Storage for Memory {
    fn traits(&self) -> Traits {
        Traits {
            block_size: self.block_size,
            preferred_size: 4096,
            read_only: false,
            can_discard: true,
            can_zero_fast: true,
            can_resize: true,
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        u64_from(self.bytes().len())
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            yield_once().await;
            self.bytes().resize(usize_from(size), 0);
            Ok(())
        })
    }

    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
        self.bytes_read.fetch_add(range.len(), Ordering::Relaxed);
        self.reads.fetch_add(1, Ordering::Relaxed);
        IoFuture::pending(async move {
            self.carry_out(range, |bytes, within| buffer[within].copy_from_slice(bytes)).await?;
            Ok(buffer)
        })
    }

    fn write(&self, offset: u64, data: Bytes, _: Durability) -> IoFuture<'_, ()> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(data.len()));
        IoFuture::pending(async move {
            self.carry_out(range, |bytes, within| bytes.copy_from_slice(&data[within])).await
        })
    }

    fn write_zeroes(&self, range: ByteRange, _: ZeroSpace, _: ZeroEffort, _: Durability) -> IoFuture<'_, ()> {
        IoFuture::pending(self.carry_out(range, |bytes, _| bytes.fill(0)))
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::pending(self.carry_out(range, |bytes, _| bytes.fill(DISCARDED)))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        IoFuture::ready(Ok(()))
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        IoFuture::ready(Ok(vec![Extent { range, status: ExtentStatus::Data }]))
    }
}

/// How what was discarded reads here.
const DISCARDED: u8 = 0xdd;

/// Polls until it ends. Whoever waits here waits for nothing but turns.
fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut cx = std::task::Context::from_waker(noop_waker_ref());
    for _ in 0..1_000_000 {
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return output;
        }
    }
    panic!("it waits for ever");
}

fn over(memory: &Arc<Memory>) -> Blocks<Arc<dyn Storage>> {
    let storage: Arc<dyn Storage> = memory.clone();
    Blocks::new(storage)
}

#[derive(Clone, Debug)]
enum Request {
    Read(ByteRange),
    Write(ByteRange, u8),
    Zero(ByteRange),
    Discard(ByteRange),
    /// Only makes it longer.
    Grow(u64),
}

impl Request {
    /// What it puts where.
    const fn change(&self) -> Option<(ByteRange, u8)> {
        match self {
            Self::Write(range, byte) => Some((*range, *byte)),
            Self::Zero(range) => Some((*range, 0)),
            Self::Discard(range) => Some((*range, DISCARDED)),
            Self::Read(_) | Self::Grow(_) => None,
        }
    }
}

fn request(size: u64) -> impl Strategy<Value = Request> {
    let len = prop_oneof![0..700_u64, 0..size];
    let range = (0..size, len).prop_map(move |(at, len)| ByteRange::from_bounds(at, (at + len).min(size)));
    prop_oneof![
        3 => range.clone().prop_map(Request::Read),
        6 => (range.clone(), 1..200_u8).prop_map(|(range, byte)| Request::Write(range, byte)),
        2 => range.clone().prop_map(Request::Zero),
        1 => range.prop_map(Request::Discard),
        1 => (0..5000_u64).prop_map(Request::Grow),
    ]
}

/// Requests that run at once, and then the next ones.
fn batches(size: u64) -> impl Strategy<Value = Vec<Vec<Request>>> {
    proptest::collection::vec(proptest::collection::vec(request(size), 1..8), 1..12)
}

async fn carry_out(blocks: &Blocks<Arc<dyn Storage>>, request: &Request) -> Option<Buffer> {
    match request {
        Request::Read(range) => {
            let buffer = Buffer::copy_of(&vec![0xee; usize_from(range.len())]);
            return Some(blocks.read(range.offset(), buffer).await.unwrap());
        }
        Request::Write(range, byte) => {
            let data = Bytes::from(vec![*byte; usize_from(range.len())]);
            blocks.write(range.offset(), data, Durability::Cached).await.unwrap();
        }
        Request::Zero(range) => {
            let (space, effort) = (ZeroSpace::MayUnmap, ZeroEffort::Any);
            blocks.write_zeroes(*range, space, effort, Durability::Cached).await.unwrap();
        }
        Request::Discard(range) => blocks.discard(*range).await.unwrap(),
        Request::Grow(by) => blocks.set_size(blocks.below().size() + by).await.unwrap(),
    }
    None
}

/// Checks bytes that were read from `start` on while `batch` ran, or after it.
fn check_bytes(batch: &[Request], start: u64, old: &[u8], now: &[u8], has_ended: bool) {
    let changes: Vec<_> = batch.iter().filter_map(|request| Some((request.change()?, request))).collect();
    let all = ByteRange::from_bounds(start, start + u64_from(now.len()));
    let mut cuts: Vec<_> = changes.iter().flat_map(|((range, _), _)| [range.offset(), range.end()]).collect();
    cuts.extend([all.offset(), all.end()]);
    cuts.sort_unstable();
    // Within a piece all bytes are covered by the same requests.
    for piece in cuts.windows(2).filter_map(|cut| ByteRange::from_bounds(cut[0], cut[1]).intersection(all)) {
        let covering: Vec<_> = changes.iter().filter(|((range, _), _)| range.contains(piece)).collect();
        let surely = covering.iter().any(|(_, request)| !matches!(request, Request::Discard(_)));
        let place = usize_from(piece.offset() - start)..usize_from(piece.end() - start);
        for (byte, old) in now[place.clone()].iter().zip(&old[place]) {
            let is_old = byte == old && !(has_ended && surely);
            let is_new = covering.iter().any(|((_, new), _)| byte == new);
            assert!(is_old || is_new, "{byte} in {piece}, where {old} was and {covering:?} ran");
        }
    }
}

fn check(block_size: u32, size: u64, batches: &[Vec<Request>]) {
    let mut model: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let memory = Memory::new(block_size, model.clone());
    let blocks = over(&memory);
    for batch in batches {
        let answers = run(join_all(batch.iter().map(|request| carry_out(&blocks, request))));
        for (request, answer) in batch.iter().zip(answers) {
            if let (Request::Read(range), Some(answer)) = (request, answer) {
                let place = usize_from(range.offset())..usize_from(range.end());
                check_bytes(batch, range.offset(), &model[place], &answer, false);
            }
        }
        let now = memory.bytes().clone();
        model.resize(now.len(), 0);
        check_bytes(batch, 0, &model, &now, true);
        model = now;
    }
}

/// Not a multiple of either block size, so that the last block is short until something grows.
const SIZE: u64 = 20_000;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) })]

    #[test]
    fn requests_that_run_at_once_change_what_they_cover_and_nothing_else(batches in batches(SIZE)) {
        for block_size in [1, 512, 4096] {
            check(block_size, SIZE, &batches);
        }
    }
}

#[test]
fn a_long_unaligned_write_reads_its_two_edges_only() {
    let memory = Memory::new(4096, vec![7; 4 << 20]);
    let blocks = over(&memory);
    let read_by = |offset: u64, len: usize| {
        memory.bytes_read.store(0, Ordering::Relaxed);
        memory.reads.store(0, Ordering::Relaxed);
        run(blocks.write(offset, Bytes::from(vec![1; len]), Durability::Cached)).unwrap();
        (memory.reads.load(Ordering::Relaxed), memory.bytes_read.load(Ordering::Relaxed))
    };
    assert_eq!(read_by(512, 1 << 20), (2, 8192), "both edges");
    assert_eq!(read_by(4096, (1 << 20) + 512), (1, 4096), "only the end is in a block");
    assert_eq!(read_by(512, (1 << 20) - 512), (1, 4096), "only the start is in a block");
    assert_eq!(read_by(512, 512), (1, 4096), "within one block");
    assert_eq!(read_by(4000, 512), (1, 8192), "neighbours are read together");
    assert_eq!(read_by(8192, 1 << 20), (0, 0), "whole blocks");
    assert_eq!(read_by(4096 + 512, 4096 - 512), (1, 4096), "to the end of its only block");
}

#[test]
fn the_edges_of_a_write_are_read_at_once() {
    let memory = Memory::new(512, vec![7; 1 << 20]);
    let blocks = over(&memory);
    let mut write = Box::pin(blocks.write(100, Bytes::from(vec![1; 100_000]), Durability::Cached));
    let mut cx = std::task::Context::from_waker(noop_waker_ref());
    while memory.reads.load(Ordering::Relaxed) == 0 {
        assert!(write.as_mut().poll(&mut cx).is_pending());
    }
    assert_eq!(memory.reads.load(Ordering::Relaxed), 2);
    run(write).unwrap();
}

#[test]
fn a_short_last_block_is_whole_when_the_storage_has_grown() {
    for grown in [1536, 4096, 10_001] {
        let memory = Memory::new(512, vec![7; 1000]);
        let blocks = over(&memory);
        run(blocks.write(990, Bytes::from(vec![1; 10]), Durability::Cached)).unwrap();
        run(blocks.set_size(grown)).unwrap();
        run(blocks.write(995, Bytes::from(vec![2; 10]), Durability::Cached)).unwrap();
        let expected = [vec![7; 990], vec![1; 5], vec![2; 10], vec![0; usize_from(grown) - 1005]].concat();
        assert!(*memory.bytes() == expected);
        let read = run(blocks.read(999, Buffer::zeroed(2))).unwrap();
        assert_eq!(&*read, [2, 2]);
        run(blocks.set_size(600)).unwrap();
        assert_eq!(&*run(blocks.read(599, Buffer::zeroed(1))).unwrap(), [7]);
    }
}

#[test]
fn zeroing_with_no_whole_block_in_it_writes_and_discarding_does_nothing() {
    let memory = Memory::new(4096, vec![7; 16_384]);
    let blocks = over(&memory);
    let range = ByteRange::from_bounds(100, 8000);
    run(blocks.discard(range)).unwrap();
    assert!(*memory.bytes() == vec![7; 16_384]);
    run(blocks.write_zeroes(range, ZeroSpace::Keep, ZeroEffort::Any, Durability::Cached)).unwrap();
    assert!(*memory.bytes() == [vec![7; 100], vec![0; 7900], vec![7; 8384]].concat());
}
