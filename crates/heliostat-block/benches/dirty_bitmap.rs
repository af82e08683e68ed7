//! What the dirty bitmap costs: a guest's write pays for `mark`, a copier for the scans.
//!
//! `cargo bench -p heliostat-block --bench dirty_bitmap`. Prints the memory of a 64 TiB bitmap first.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use heliostat_block::dirty_bitmap::DirtyBitmap;
use heliostat_block::range::ByteRange;

const GRANULARITY: u32 = 64 << 10;
const GRANULE: u64 = 64 << 10;
const TIB: u64 = 1 << 40;

fn bitmap(size: u64) -> DirtyBitmap {
    DirtyBitmap::new(size, GRANULARITY).expect("the granularity is allowed, and memory is there")
}

/// The `len` bytes at `offset`.
fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::from_bounds(offset, offset + len)
}

/// The next of a row of numbers that look random.
fn step(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    *state >> 20
}

fn marks(c: &mut Criterion) {
    let disk = bitmap(64 * TIB);
    disk.mark(range(0, 4096));
    c.bench_function("mark 4 KiB, dirty already", |b| b.iter(|| disk.mark(black_box(range(0, 4096)))));

    let near = bitmap(64 * TIB);
    // Neighbouring granules of which each is dirty for the first time: one word in 64 is new.
    let mut offset = 0;
    c.bench_function("mark 4 KiB, clean, in order", |b| {
        b.iter(|| {
            near.mark(black_box(range(offset, 4096)));
            offset = (offset + GRANULE) % (64 * TIB);
        });
    });

    let small = bitmap(TIB);
    let mut state = 1;
    c.bench_function("mark and clear 4 KiB, at random over 1 TiB", |b| {
        b.iter(|| {
            let write = range((step(&mut state) % TIB) & !4095, 4096);
            small.mark(black_box(write));
            small.clear(write);
        });
    });

    let far = bitmap(TIB);
    c.bench_function("mark 1 TiB", |b| {
        b.iter_batched(|| far.clear(range(0, TIB)), |()| far.mark_all(), BatchSize::PerIteration);
    });
}

/// Marks of clean granules from two threads, which share nothing but the count and the upper summaries.
fn marks_by_two(c: &mut Criterion) {
    c.bench_function("mark 4 KiB, clean, in order, two threads", |b| {
        b.iter_custom(|rounds| {
            let disk = bitmap(64 * TIB);
            let clock = criterion::measurement::WallTime;
            let start = criterion::measurement::Measurement::start(&clock);
            std::thread::scope(|scope| {
                for half in [0, 32 * TIB] {
                    let disk = &disk;
                    scope.spawn(move || {
                        for granule in 0..rounds {
                            disk.mark(range(half + granule * GRANULE % (32 * TIB), 4096));
                        }
                    });
                }
            });
            criterion::measurement::Measurement::end(&clock, start)
        });
    });
}

fn scans(c: &mut Criterion) {
    c.bench_function("new and drop, 64 TiB", |b| b.iter(|| bitmap(black_box(64 * TIB))));

    let disk = bitmap(64 * TIB);
    c.bench_function("next_dirty, 64 TiB, nothing dirty", |b| b.iter(|| disk.next_dirty(0, u64::MAX)));

    disk.mark(range(64 * TIB - 1, 1));
    c.bench_function("next_dirty, 64 TiB, the last granule dirty", |b| {
        b.iter(|| disk.next_dirty(0, u64::MAX))
    });

    let alternating = bitmap(TIB);
    for offset in (0..TIB).step_by(128 << 10) {
        alternating.mark(range(offset, 1));
    }
    let mut slow = c.benchmark_group("scan");
    slow.sample_size(10);
    slow.bench_function("1 TiB, every other granule dirty (8 Mi runs)", |b| {
        b.iter(|| {
            let (mut from, mut runs) = (0, 0_u64);
            while let Some(run) = alternating.next_dirty(from, 1 << 20) {
                from = run.end();
                runs += 1;
            }
            runs
        });
    });
    slow.bench_function("merge 1 TiB, every other granule dirty", |b| {
        let target = bitmap(TIB);
        b.iter(|| target.merge(&alternating));
    });
}

/// What the process has in memory, in KiB; 0 where the system does not say.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[expect(clippy::print_stderr, reason = "a benchmark's figures are for the terminal")]
fn memory(_: &mut Criterion) {
    let before = resident_kib();
    let say = |what: &str| {
        eprintln!("64 TiB bitmap, {what}: {} KiB resident", resident_kib().saturating_sub(before))
    };
    let disk = bitmap(64 * TIB);
    say("new");
    let mut state = 1;
    for _ in 0..1000 {
        disk.mark(range((step(&mut state) % (64 * TIB)) & !4095, 4096));
    }
    say("after 1000 marks at random");
    for offset in (0..TIB).step_by(1 << 16) {
        disk.mark(range(offset, 4096));
    }
    say("after marks of every granule of the first TiB");
    disk.mark_all();
    say("all dirty");
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = memory, marks, marks_by_two, scans
}
criterion_main!(benches);
