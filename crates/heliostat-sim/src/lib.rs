//! Runs the core of heliostat against simulated storage and time: the same code that serves real disks, with
//! every delay, error and order of events drawn from one number, the seed.
//!
//! A run has guests that write one disk, an operator who mirrors it elsewhere and says verbs at random moments,
//! storages that delay, reorder, tear, fail, hang and lose, and an oracle that knows what may be where. A seed
//! that fails, fails every time, and can be replayed with a trace. For tests and for the binary `sim`; never
//! shipped.

#![forbid(unsafe_code)]

mod answer;
mod bench;
mod faults;
pub mod group;
mod guest;
pub mod image;
mod lanes;
mod medium;
mod named;
mod operator;
mod oracle;
mod random;
mod scenario;
mod storage;
mod watch;
mod world;

pub use bench::Seen;

use std::panic::{AssertUnwindSafe, catch_unwind};

use scenario::Targets;

/// Whether a run tells what happens in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// Nothing.
    Off,
    /// Everything, on standard output.
    On,
}

/// Carries out what `seed` stands for. A panic in the core is a failure like any other.
///
/// # Errors
/// What went wrong first, in words.
pub fn run(seed: u64, trace: Trace) -> Result<Seen, String> {
    caught(|| scenario::run(random::mix(seed), Targets::Stay, trace == Trace::On))
}

/// The same with targets that are cut off from their medium now and then, and may lose what was not flushed, or come back
/// empty or older.
///
/// # Errors
/// As [`run`].
pub fn run_with_cuts(seed: u64, trace: Trace) -> Result<Seen, String> {
    caught(|| scenario::run(random::mix(seed), Targets::CutOff, trace == Trace::On))
}

/// Makes a panic an error.
fn caught<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
        Err(format!("panic: {text}"))
    })
}
