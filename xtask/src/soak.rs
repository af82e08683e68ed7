//! `cargo xtask soak`: the searches that take hours and so are no part of `cargo xtask test`.

use anyhow::{Result, ensure};
use clap::{Args, Subcommand};

use crate::process;
use crate::workspace;

/// What to search, and for how long.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    search: Search,
}

#[derive(Subcommand)]
enum Search {
    /// Runs the simulator over many seeds. Its last arguments go to it unchanged.
    Sim {
        /// How many seeds.
        #[arg(long, default_value_t = 1_000_000)]
        seeds: u64,
        /// More arguments for the simulator.
        #[arg(last = true)]
        more: Vec<String>,
    },
    /// Runs the simulator of qcow2 images over many seeds. Its last arguments go to it unchanged.
    Image {
        /// How many seeds.
        #[arg(long, default_value_t = 1_000_000)]
        seeds: u64,
        /// More arguments for the simulator.
        #[arg(last = true)]
        more: Vec<String>,
    },
    /// Fuzzes targets one after the other; needs `cargo-fuzz` and a nightly toolchain.
    Fuzz {
        /// The targets; all of them when none is named.
        targets: Vec<String>,
        /// Minutes for each target.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
    },
}

/// Runs it; says whether nothing was found.
///
/// # Errors
/// When a tool is missing.
pub fn run(options: &Options) -> Result<bool> {
    match &options.search {
        Search::Sim { seeds, more } => sim(*seeds, &[], more),
        Search::Image { seeds, more } => sim(*seeds, &["--image"], more),
        Search::Fuzz { targets, minutes } => fuzz(targets, *minutes),
    }
}

fn sim(seeds: u64, what: &[&str], more: &[String]) -> Result<bool> {
    let mut command =
        process::cargo(&["run", "--quiet", "--profile", "sim", "--package", "heliostat-sim", "--"]);
    command.args(["--seeds", &seeds.to_string()]).args(what).args(more);
    Ok(process::run(&mut command)?.success)
}

fn fuzz(targets: &[String], minutes: u64) -> Result<bool> {
    ensure!(
        process::succeeds(&mut process::cargo(&["fuzz", "--version"])),
        "cargo-fuzz is missing: cargo install cargo-fuzz, rustup toolchain install nightly"
    );
    let targets = if targets.is_empty() { all_targets()? } else { targets.to_vec() };
    let time = format!("-max_total_time={}", minutes * 60);
    let mut clean = true;
    for target in &targets {
        println!("fuzzing {target} for {minutes} min");
        // Not the cargo that runs this: `+nightly` is understood by rustup's only.
        let mut command = process::command("cargo", &["+nightly", "fuzz", "run", target, "--", &time]);
        command.env_remove("RUSTUP_TOOLCHAIN");
        clean &= process::run(&mut command)?.success;
    }
    Ok(clean)
}

fn all_targets() -> Result<Vec<String>> {
    let mut targets = Vec::new();
    for entry in std::fs::read_dir(workspace::root().join("fuzz/fuzz_targets"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        targets.extend(name.strip_suffix(".rs").map(str::to_owned));
    }
    targets.sort();
    Ok(targets)
}
