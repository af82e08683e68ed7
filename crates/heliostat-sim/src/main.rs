//! `sim`: runs seeds through the simulator, on all cores; says which failed, and replays one with its trace.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command line program")]

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use heliostat_sim::{Seen, Trace, group, image};

/// Runs the core against simulated storage and time, once for each seed.
#[derive(Parser)]
struct Options {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    start: u64,
    /// Run this seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// Say what happens in it.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Use a qcow2 image, and no mirror.
    #[arg(long)]
    image: bool,
    /// Mirror several disks that end together.
    #[arg(long, conflicts_with = "image")]
    group: bool,
    /// Cut targets off from their medium now and then.
    #[arg(long, conflicts_with_all = ["image", "group"])]
    cuts: bool,
    /// Stop after so many failures.
    #[arg(long, default_value_t = 20)]
    failures: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.seed.is_none() {
        // A panic is reported with its seed; the default message would be of some thread.
        std::panic::set_hook(Box::new(|_| {}));
    }
    let (start, count) = options.seed.map_or((options.start, options.seeds), |seed| (seed, 1));
    let trace = if options.trace { Trace::On } else { Trace::Off };
    let search = Search {
        next: AtomicU64::new(start),
        end: start.saturating_add(count),
        passed: AtomicU64::new(0),
        failures_max: options.failures,
        failed: Mutex::new(Vec::new()),
        seen: Mutex::default(),
        image: options.image.then(Mutex::default),
        group: options.group.then(Mutex::default),
        cuts: options.cuts,
        trace,
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| search.work());
        }
        scope.spawn(|| search.tell(count, began));
    });
    let failed = search.failed();
    let passed = search.passed.load(Ordering::Relaxed);
    for (seed, what) in &failed {
        println!("seed {seed}: {what}");
        let kind = match (options.image, options.group, options.cuts) {
            (true, ..) => " --image",
            (_, true, _) => " --group",
            (.., true) => " --cuts",
            _ => "",
        };
        println!("  again: cargo run --profile sim -p heliostat-sim --{kind} --seed {seed} --trace");
    }
    search.say();
    let skipped = count - passed - u64::try_from(failed.len()).unwrap_or(0);
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Search {
    next: AtomicU64,
    end: u64,
    passed: AtomicU64,
    failures_max: u64,
    /// In the order in which they were found.
    failed: Mutex<Vec<(u64, String)>>,
    seen: Mutex<Seen>,
    /// Where images are what is searched: what was seen of them.
    image: Option<Mutex<image::Seen>>,
    /// Where groups are.
    group: Option<Mutex<group::Seen>>,
    /// Whether targets are cut off.
    cuts: bool,
    trace: Trace,
}

impl Search {
    fn failed(&self) -> Vec<(u64, String)> {
        let mut failed = self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        failed.sort();
        failed
    }

    fn is_over(&self) -> bool {
        let failures = u64::try_from(self.failed().len()).unwrap_or(u64::MAX);
        failures >= self.failures_max || self.next.load(Ordering::Relaxed) >= self.end
    }

    fn run(&self, seed: u64) -> Result<(), String> {
        if let Some(all) = &self.image {
            let seen = image::run(seed, self.trace)?;
            all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(&seen);
        } else if let Some(all) = &self.group {
            let seen = group::run(seed, self.trace)?;
            all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(&seen);
        } else {
            let run = if self.cuts { heliostat_sim::run_with_cuts } else { heliostat_sim::run };
            let seen = run(seed, self.trace)?;
            self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(&seen);
        }
        Ok(())
    }

    /// Says what was come across.
    fn say(&self) {
        if let Some(all) = &self.image {
            let seen = *all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            println!(
                "{} guests' requests, {} dropped, {} failed; {} resizes; {} crash images, {} written on; {} repaired on \
                 opening; {} closed; {} leaks",
                seen.requests,
                seen.dropped,
                seen.errors,
                seen.resized,
                seen.crashes,
                seen.reopened,
                seen.repaired,
                seen.closed,
                seen.leaks
            );
            return;
        }
        if let Some(all) = &self.group {
            let seen = *all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            println!(
                "{} guests' writes; {} groups moved, {} copies of one moment, {} aborted",
                seen.writes, seen.pivots, seen.copies, seen.aborted
            );
            return;
        }
        let seen = *self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        println!(
            "{} guests' requests; {} pivots, {} of them onto the source, {} copies left, {} jobs cancelled, {} failed, {} refused at the pivot; {} \
             errors met; {} requests by lanes; {} cuts, {} of them to another disk",
            seen.requests,
            seen.pivots,
            seen.stood,
            seen.copies,
            seen.cancelled,
            seen.failed,
            seen.refused,
            seen.errors,
            seen.on_lanes,
            seen.cuts,
            seen.others
        );
    }

    fn work(&self) {
        while !self.is_over() {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            if seed >= self.end {
                return;
            }
            match self.run(seed) {
                Ok(()) => {
                    self.passed.fetch_add(1, Ordering::Relaxed);
                }
                Err(what) => {
                    let mut failed = self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    failed.push((seed, what));
                }
            }
        }
    }

    fn tell(&self, count: u64, began: Instant) {
        let mut told = Instant::now();
        while !self.is_over() {
            std::thread::sleep(Duration::from_millis(20));
            if told.elapsed() >= Duration::from_secs(1) {
                told = Instant::now();
                let passed = self.passed.load(Ordering::Relaxed);
                println!("{passed} of {count} passed, {:.0} s", began.elapsed().as_secs_f64());
            }
        }
    }
}
