//! `cargo xtask test`: installs what is missing, then runs every check and test, in order, and sums them up.
//!
//! Never stops at a failing step, so that the sum is over everything. A step is a row of [`steps`].

mod tally;
mod tools;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use self::tally::Tally;
use crate::{process, tidy, workspace};

/// Seeds that the simulator runs in the full test: the number that issue and documents promise as evidence.
const SEEDS: u64 = 10_000;
/// Seeds at the desk: enough to see a blunder, few enough to stay under the minute.
const SEEDS_QUICK: u64 = 200;

/// How much to run.
#[derive(Args)]
pub struct Options {
    /// Only what fits in a minute at the desk: format, clippy, tidy, unit tests, a few seeds. Installs nothing.
    #[arg(long)]
    quick: bool,
}

struct Step {
    name: &'static str,
    run: Box<dyn FnOnce() -> Tally>,
}

/// Runs it all; says whether nothing failed. The last line printed is `N passed, N failed, N skipped`.
///
/// # Errors
/// When the workspace cannot be read at all. A step that cannot be started has failed, and the rest still run.
pub fn run(options: &Options) -> Result<bool> {
    let started = Instant::now();
    if !options.quick {
        tools::install_missing();
    }
    let skips = SkipLog::start()?;
    let mut rows = Vec::new();
    for step in steps(options, skips.path()) {
        println!("\n== {}", step.name);
        let from = Instant::now();
        let tally = skips.apply((step.run)());
        rows.push((step.name, tally, from.elapsed()));
    }
    println!("\n== summary");
    let mut total = Tally::default();
    for (name, tally, took) in rows {
        println!("{name:<24} {:>7.1} s   {tally}", took.as_secs_f64());
        total += tally;
    }
    for reason in skips.reasons() {
        println!("{}: {reason}", if in_ci() { "skipped, which fails here" } else { "skipped" });
    }
    println!("{:<24} {:>7.1} s", "all", started.elapsed().as_secs_f64());
    println!("{total}");
    Ok(total.failed == 0)
}

fn steps(options: &Options, skip_log: &Path) -> Vec<Step> {
    let tests = |arguments: &[&str], profile: Option<&str>| {
        let mut command = runner(arguments, profile);
        command.env("HELIOSTAT_SKIP_LOG", skip_log).env("HELIOSTAT_PYTHON", tools::python());
        command
    };
    let seeds = if options.quick { SEEDS_QUICK } else { SEEDS };
    let mut steps = vec![
        whole("format", process::cargo(&["fmt", "--all", "--check"])),
        whole("clippy", process::cargo(&CLIPPY)),
        Step { name: "tidy", run: Box::new(check_style) },
        counted("unit and model tests", tests(&UNIT, None)),
    ];
    if !options.quick {
        steps.extend([
            counted("documentation examples", process::cargo(&DOC)),
            counted("loom models", loom()),
            counted("simulator tests", tests(&["--package", "heliostat-sim"], Some("sim"))),
        ]);
    }
    steps.push(whole("simulation", simulation(seeds, &[])));
    steps.push(whole("simulation of lost connections", simulation(seeds / 5, &["--cuts"])));
    steps.push(whole("simulation of images", simulation(seeds / 5, &["--image"])));
    steps.push(whole("simulation of groups", simulation(seeds / 10, &["--group"])));
    if !options.quick {
        steps.push(counted("end to end", tests(&INTEGRATION, None)));
    }
    steps
}

/// A step that is one test.
fn whole(name: &'static str, mut command: Command) -> Step {
    let run = move || match process::run(&mut command) {
        Ok(finished) => Tally::step(finished.success),
        Err(error) => not_started(&error),
    };
    Step { name, run: Box::new(run) }
}

/// A step that prints how many tests ran.
fn counted(name: &'static str, mut command: Command) -> Step {
    let run = move || match process::run(&mut command) {
        Ok(finished) => Tally::from_output(&finished.output, finished.success),
        Err(error) => not_started(&error),
    };
    Step { name, run: Box::new(run) }
}

fn check_style() -> Tally {
    match tidy::run() {
        Ok(clean) => Tally::step(clean),
        Err(error) => not_started(&error),
    }
}

fn not_started(error: &anyhow::Error) -> Tally {
    println!("{error:#}");
    Tally::step(false)
}

const CLIPPY: [&str; 7] = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
const UNIT: [&str; 5] = ["--workspace", "--exclude", "heliostat-sim", "--lib", "--bins"];
const DOC: [&str; 5] = ["test", "--quiet", "--workspace", "--doc", "--no-fail-fast"];
// The simulator's own tests are slow without optimisation; they have a step with their profile.
const INTEGRATION: [&str; 5] = ["--workspace", "--exclude", "heliostat-sim", "--test", "*"];

/// The test runner: nextest where it is installed, because it stops what hangs, else cargo's own.
fn runner(arguments: &[&str], profile: Option<&str>) -> Command {
    if process::succeeds(&mut process::cargo(&["nextest", "--version"])) {
        let mut command = heeding_signals(process::cargo(&["nextest", "run", "--no-fail-fast"]));
        command.args(["--no-tests", "pass"]);
        command.args(["--status-level", "slow", "--final-status-level", "fail"]);
        if let Some(profile) = profile {
            command.args(["--cargo-profile", profile]);
        }
        command.args(arguments);
        command
    } else {
        let mut command = heeding_signals(process::cargo(&["test", "--quiet", "--no-fail-fast"]));
        if let Some(profile) = profile {
            command.args(["--profile", profile]);
        }
        command.args(arguments);
        command
    }
}

/// The same, started with no signal ignored. Where this runs in a script's background or under `nohup` some are,
/// and the programs that tests start would take that over and not end when they are asked to.
fn heeding_signals(command: Command) -> Command {
    let reset = "--default-signal=HUP,INT,TERM";
    if !process::succeeds(&mut process::command("env", &[reset, "true"])) {
        return command;
    }
    let mut heeding = process::command("env", &[reset]);
    heeding.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        heeding.env(name, value.unwrap_or_default());
    }
    heeding
}

/// Loom replaces the atomics of the whole crate, so its build has a directory of its own.
fn loom() -> Command {
    let mut command = process::cargo(&["test", "--quiet", "--package", "heliostat-block", "--release"]);
    command.args(["--lib", "--no-fail-fast", "--target-dir"]).arg(workspace::target().join("loom"));
    command.arg("loom_").env("RUSTFLAGS", "--cfg loom").env("CARGO_PROFILE_RELEASE_LTO", "off");
    command
}

fn simulation(seeds: u64, more: &[&str]) -> Command {
    let mut command =
        process::cargo(&["run", "--quiet", "--profile", "sim", "--package", "heliostat-sim", "--"]);
    command.args(["--seeds", &seeds.to_string()]).args(more);
    command
}

/// Where a test that cannot run here says why: it passes for its runner, but is not counted as passed.
struct SkipLog {
    path: PathBuf,
    seen: std::cell::Cell<u64>,
}

impl SkipLog {
    fn start() -> Result<Self> {
        let target = workspace::target();
        std::fs::create_dir_all(&target).with_context(|| format!("creating {}", target.display()))?;
        let path = target.join("skipped.log");
        std::fs::write(&path, "").with_context(|| format!("writing {}", path.display()))?;
        Ok(Self { path, seen: std::cell::Cell::new(0) })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn reasons(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Moves the tests that skipped since the last call from `passed` to where they belong.
    fn apply(&self, tally: Tally) -> Tally {
        let all = u64::try_from(self.reasons().len()).expect("u64 holds every usize");
        let new = all - self.seen.replace(all);
        tally.with_skipped(new, in_ci())
    }
}

/// Says whether this is continuous integration, where a test that cannot run is a failure.
fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}
