//! The project's own commands: `cargo xtask test`, `tidy`, `bench`, `soak`. Never shipped; holds no code of the product.
//!
//! Called by developers and by `.ci/run`. Each command is a module; this file only reads the command line.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command line tool talks on standard output")]

mod bench;
mod process;
mod soak;
mod test;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The commands of this project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs what is missing, then runs every check and test; the last line is the sum.
    Test(test::Options),
    /// Checks the rules of STYLE.md and GLOSSARY.md that the compiler and clippy do not.
    Tidy,
    /// Measures ours beside its peers in one run; prints ratios and writes them as JSON.
    Bench(bench::Options),
    /// Runs the long searches: millions of seeds, hours of fuzzing.
    Soak(soak::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Test(options) => test::run(&options),
        Command::Tidy => tidy::run(),
        Command::Bench(options) => bench::run(&options),
        Command::Soak(options) => soak::run(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
