//! `heliostat demo`: a disk that moves while it is being written to, and the proof that nothing was lost.
//!
//! Everything is the real thing: the daemon, its NBD server, the mirror. Only the guest is made up, and it is an
//! ordinary NBD client that knows nothing else. The proof is made after the daemon is gone, from the guest's
//! record and the bytes of both files.

mod findings;
mod guest;
mod load;
mod pattern;
mod proof;
mod random;
mod record;
mod report;
mod stage;
mod summary;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args;
use heliostat_block::clock::{Clock, Moment};
use heliostat_block::convert::u64_from;
use heliostat_host::clock::RealClock;
use heliostat_host::signal::Signals;

use self::guest::{Guest, Habits};
use self::pattern::{BLOCK, Pattern};
use self::record::{PivotWindow, Record};
use self::stage::{Mirrored, Proved, Stage};
use self::summary::{Facts, Times};
use super::ending;
use super::output::{self, Form, Outcome, say};
use super::progress::Wanted;
use super::units;

/// The smallest disk that shows anything: some places with data, some holes, room for a guest.
const SIZE_MIN: u64 = 16 << 20;
/// The largest: the record keeps 32 bytes for each block, and reading it twice should take seconds.
const SIZE_MAX: u64 = 64 << 30;

/// How long the guest runs alone before the mirror starts, so that there is a "before" to compare with, and how
/// long it goes on after the pivot.
const PHASE: Duration = Duration::from_secs(2);

/// Requests of the guest a second, and in flight: a machine that is busy but not desperate.
const PER_SECOND: u32 = 2000;
const DEPTH: usize = 16;

/// Shows what this program does, on a disk of its own, and proves that it worked
///
/// Makes a disk with data in a temporary folder, lets a built-in guest write to it over NBD, mirrors it
/// meanwhile, moves the guest over, and then compares every block with the guest's own record. Takes about a
/// quarter of a minute, needs nothing, leaves nothing. Exit status 0 only if everything held.
#[derive(Args, Clone, Debug)]
pub struct Demo {
    /// The disk's size; three eighths of it hold data
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = units::parse_size)]
    size: u64,
    /// About how long the copying takes; 0 is as fast as it goes
    #[arg(long, value_name = "SECONDS", default_value_t = 6)]
    seconds: u32,
    /// Keep the disks, and say where they are
    #[arg(long)]
    keep: bool,
    /// Make the folder for the disks in this one, not in the system's temporary folder
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Fix what is written, and where
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Show no progress
    #[arg(long, short)]
    quiet: bool,
    /// How long the guest runs before the mirror and after it.
    #[arg(skip = PHASE)]
    phase: Duration,
}

/// What may be done to the disks between the end of the daemon and the proof. A test plants damage there, to see
/// that the proof is one.
pub type Tamper<'a> = &'a dyn Fn(Disks<'_>);

/// Where the disks are.
#[derive(Clone, Copy, Debug)]
pub struct Disks<'a> {
    /// The one that the guest began on.
    pub source: &'a Path,
    /// The one that it ended on.
    pub target: &'a Path,
}

/// Somebody pressed Ctrl-C; carries the signal's number.
#[derive(Debug)]
struct Interrupted(u8);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

impl Demo {
    /// A demo of this size that copies as fast as it goes and says little; for tests.
    #[must_use]
    pub fn quick(size: u64, folder: &Path) -> Self {
        let phase = Duration::from_millis(300);
        Self {
            size,
            seconds: 0,
            keep: false,
            folder: Some(folder.to_owned()),
            seed: None,
            quiet: true,
            phase,
        }
    }

    /// Runs it.
    ///
    /// # Errors
    /// When it could not be carried through. What was carried through and did not hold is [`Outcome::No`].
    pub fn run(&self, form: Form) -> Result<Outcome> {
        match self.run_tampered(form, &|_| ()) {
            Err(error) => match error.downcast_ref::<Interrupted>() {
                Some(Interrupted(signal)) => {
                    let end = if self.keep { "" } else { "; the demo's folder is removed" };
                    say(format_args!("heliostat: interrupted{end}"));
                    Ok(Outcome::Interrupted(*signal))
                }
                None => Err(error),
            },
            Ok(facts) => {
                match form {
                    Form::Json => output::json(&facts.to_json())?,
                    Form::Text => output::result(&facts.to_text())?,
                }
                Ok(if facts.holds() { Outcome::Done } else { Outcome::No })
            }
        }
    }

    /// Runs it and says whether everything held, after `tamper` has had its way with the disks.
    ///
    /// # Errors
    /// When it could not be carried through.
    pub fn held_after(&self, tamper: Tamper<'_>) -> Result<bool> {
        Ok(self.run_tampered(Form::Json, tamper)?.holds())
    }

    fn run_tampered(&self, form: Form, tamper: Tamper<'_>) -> Result<Facts> {
        let size = self.size.next_multiple_of(BLOCK);
        if !(SIZE_MIN..=SIZE_MAX).contains(&size) {
            bail!("--size {}: it may be {} to {}", self.size, units::size(SIZE_MIN), units::size(SIZE_MAX));
        }
        let mut signals = ending::signals()?;
        let folder = self.make_folder()?;
        let seed = self.seed.unwrap_or_else(seed_of_now);
        let run = Run { demo: self, form, size, seed, folder: folder.path(), clock: RealClock::new() };
        let facts = run.carry_through(&mut signals, tamper);
        if self.keep {
            let kept = folder.keep();
            say(format_args!("heliostat: the disks are kept in {}", kept.display()));
        }
        facts
    }

    fn make_folder(&self) -> Result<tempfile::TempDir> {
        let place = self.folder.clone().unwrap_or_else(std::env::temp_dir);
        let folder = tempfile::Builder::new().prefix("heliostat-demo-").tempdir_in(&place);
        folder.with_context(|| {
            format!("cannot make a folder in {}; --folder names another place", place.display())
        })
    }
}

fn seed_of_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos() & u128::from(u64::MAX)).unwrap_or(0)
}

/// One run.
struct Run<'a> {
    demo: &'a Demo,
    form: Form,
    size: u64,
    seed: u64,
    folder: &'a Path,
    clock: RealClock,
}

impl Run<'_> {
    fn say(&self, text: impl std::fmt::Display) {
        if !self.demo.quiet && self.form == Form::Text {
            say(text);
        }
    }

    fn carry_through(&self, signals: &mut Signals, tamper: Tamper<'_>) -> Result<Facts> {
        let began = self.clock.now();
        let pattern = Pattern::new(self.seed);
        let initial = stage::initial_data(self.size / BLOCK);
        self.introduce(&initial);
        let stage = Stage::build(self.folder, self.size, pattern, &initial, signals)?;
        let guest = self.start_guest(&stage, pattern, initial)?;
        let alone = self.clock.now();
        let lived = self.live(&stage, &guest, signals);
        let stopped = self.clock.now();
        let (mirrored, mirror, report) = match (lived, guest.stop()) {
            (Ok((mirrored, mirror)), Ok(report)) => (mirrored, mirror, report),
            (Err(error), _) if error.is::<Interrupted>() => return Err(error),
            // A guest that gave up is the reason for what else went wrong, not its consequence.
            (_, Err(error)) => return Err(error.into()),
            (Err(error), Ok(_)) => return Err(error),
        };
        let taken = stage.close()?;
        let disks =
            Disks { source: &stage::source_path(self.folder), target: &stage::target_path(self.folder) };
        tamper(disks);
        let window = PivotWindow { asked: mirror.asked, done: mirror.done };
        let Proved { proof, read_back } = stage::prove(disks, &report.record, window, pattern)?;
        let ended = self.clock.now();
        Ok(Facts {
            folder: self.folder.to_owned(),
            size: self.size,
            seed: self.seed,
            counts: report.record.counts(window),
            report,
            times: Times { began, alone, mirrored, ready: mirror.ready, window, stopped, ended },
            pause: mirror.pause,
            data_copied: mirror.data_copied,
            taken,
            proof,
            read_back,
        })
    }

    fn start_guest(&self, stage: &Stage, pattern: Pattern, initial: Vec<Range<u64>>) -> Result<Guest> {
        let habits = Habits {
            address: stage.address(),
            export: stage::EXPORT.to_owned(),
            seed: self.seed,
            pattern,
            depth: DEPTH,
            per_second: PER_SECOND,
        };
        let record = Record::new(self.size / BLOCK, initial);
        Guest::start(habits, record, self.clock).context("cannot start the guest")
    }

    /// What happens while the guest runs: alone, with the mirror, on the target.
    fn live(&self, stage: &Stage, guest: &Guest, signals: &mut Signals) -> Result<(Moment, Mirrored)> {
        self.watch_guest("guest alone", guest, signals)?;
        let started = self.clock.now();
        let speed = self.speed(stage.taken().source);
        let mirrored = stage.mirror(speed, guest, signals, self.wants_progress(), self.clock)?;
        let copying = units::latency(mirrored.ready.since(started));
        self.say(format_args!("  mirror: in step after {copying}, then the guest was moved over"));
        self.watch_guest("guest on the target", guest, signals)?;
        Ok((started, mirrored))
    }

    fn wants_progress(&self) -> Wanted {
        if self.demo.quiet || self.form == Form::Json { Wanted::No } else { Wanted::Yes }
    }

    fn introduce(&self, initial: &[Range<u64>]) {
        let data: u64 = initial.iter().map(|range| (range.end - range.start) * BLOCK).sum();
        self.say("A disk that moves while it is being written to.");
        self.say("");
        self.say(format_args!(
            "  disk    {}, {} of it data in {} places, the rest holes, in {}",
            units::size(self.size),
            units::size(data),
            u64_from(initial.len()),
            self.folder.display()
        ));
        self.say(format_args!(
            "  guest   {} requests a second over NBD, up to {DEPTH} in flight: writes, checked reads, zeroes, trims, flushes",
            units::count(u64::from(PER_SECOND))
        ));
        self.say("");
    }

    /// What limits the copying so that it can be watched; 0 is nothing.
    fn speed(&self, data: u64) -> u64 {
        match u64::from(self.demo.seconds) {
            0 => 0,
            seconds => (data / seconds).max(1 << 20) + GUEST_SHARE,
        }
    }

    /// Lets the guest run for a while, if nothing is wrong with it.
    fn watch_guest(&self, name: &str, guest: &Guest, signals: &mut Signals) -> Result<()> {
        let time = self.demo.phase;
        let (before, until) = (guest.answered(), self.clock.now() + time);
        while self.clock.now() < until {
            check(guest, signals)?;
            std::thread::sleep(ending::LOOK_EVERY);
        }
        let answered = units::count(guest.answered() - before);
        self.say(format_args!("  {name}: {answered} requests answered in {}", units::latency(time)));
        Ok(())
    }
}

/// What the guest dirties a second, granules counted whole; the mirror needs that much more to come to an end.
const GUEST_SHARE: u64 = 32 << 20;

/// Fails when somebody interrupts, or the guest has given up.
fn check(guest: &Guest, signals: &mut Signals) -> Result<()> {
    interrupted(signals)?;
    if guest.has_ended() {
        bail!("the guest ended too early");
    }
    Ok(())
}

fn interrupted(signals: &mut Signals) -> Result<()> {
    match signals.take() {
        Some(signal) => Err(Interrupted(ending::number(signal)).into()),
        None => Ok(()),
    }
}
