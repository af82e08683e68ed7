//! `cargo xtask bench`: ours beside its peers, in one run, in turns, medians, ratios.
//!
//! One number alone says more about the machine than about the program, so every row measures its contenders
//! one after the other, round after round. What is copied is compared afterwards, outside the measured time:
//! a fast copy that is wrong is no figure.

mod contender;
mod fio;
mod machine;
mod report;
mod rows;
mod scene;

// The control client and the running of daemons are the end to end tests' own: one code drives ours and
// `qemu-storage-daemon` in both places.
#[path = "../../../crates/heliostat/tests/common/process.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod daemon;
#[path = "../../../crates/heliostat/tests/common/qmp.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod qmp;
#[path = "../../../crates/heliostat/tests/common/wait.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod wait;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use self::report::Results;
use self::rows::Row;
use self::scene::Scene;
use crate::process;

/// What to measure.
#[derive(Args)]
pub struct Options {
    /// Rows to measure; all of them when none is named. `list` prints them.
    rows: Vec<String>,
    /// Rounds; the figures are medians over them.
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// One round with disks of an eighth of the size: to see that a row works, not to quote.
    #[arg(long)]
    quick: bool,
    /// Only the peers, to know a machine; ours is not built.
    #[arg(long)]
    peers_only: bool,
}

/// Measures; says whether every row could be measured. A goal that is missed is no failure of the benchmark.
///
/// # Errors
/// When ours does not build, or a row's name is unknown, or nothing can be written.
pub fn run(options: &Options) -> Result<bool> {
    if options.rows.iter().any(|name| name == "list") {
        for row in rows::all() {
            println!("{:<16} {}", row.name, row.work);
        }
        return Ok(true);
    }
    let chosen = choose(&options.rows)?;
    ensure!(options.runs > 0, "no rounds, no figures");
    if !options.peers_only {
        build_ours()?;
    }
    let runs = if options.quick { 1 } else { options.runs };
    let scene = Scene::new(options.quick)?;
    let mut results = Results::new(machine::facts(), runs, options.quick);
    for row in &chosen {
        measure(row, &scene, runs, options.peers_only, &mut results);
        scene.tidy_up();
        report::print_row(row, &mut results);
    }
    let file = results.write()?;
    println!("written to {}", file.display());
    Ok(results.is_whole())
}

fn choose(names: &[String]) -> Result<Vec<Row>> {
    let all = rows::all();
    if let Some(unknown) = names.iter().find(|name| all.iter().all(|row| row.name != **name)) {
        let known: Vec<_> = all.iter().map(|row| row.name).collect();
        bail!("no row `{unknown}`; there are: {}", known.join(", "));
    }
    Ok(all.into_iter().filter(|row| names.is_empty() || names.iter().any(|name| name == row.name)).collect())
}

fn build_ours() -> Result<()> {
    let mut build = process::cargo(&["build", "--quiet", "--release", "--package", "heliostat"]);
    ensure!(process::run(&mut build).context("building ours")?.success, "ours does not build");
    Ok(())
}

/// All rounds of a row: in each, every contender once. One that fails says why and is out of the row.
fn measure(row: &Row, scene: &Scene, runs: u32, peers_only: bool, results: &mut Results) {
    println!("\n== {}: {}", row.name, row.work);
    for round in 1..=runs {
        for &contender in row.contenders {
            let left_out = peers_only && contender.is_ours();
            if left_out || results.has_failed(row.name, contender) {
                continue;
            }
            match (row.measure)(scene, contender) {
                Ok(sample) => {
                    println!("round {round}: {:<22} {sample}", contender.name());
                    results.add(row.name, contender, &sample);
                }
                Err(error) => {
                    println!("round {round}: {:<22} {error:#}", contender.name());
                    results.fail(row.name, contender, &format!("{error:#}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_row_is_refused_with_the_known_ones() {
        let error = choose(&["no-such-row".to_owned()]).err().expect("it is unknown");
        assert!(error.to_string().contains("mirror-tmpfs"), "{error}");
        assert_eq!(choose(&[]).unwrap().len(), rows::all().len());
    }
}
