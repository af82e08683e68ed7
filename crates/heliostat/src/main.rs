//! heliostat: fronts a live disk and mirrors it while it is written to.
//!
//! Hands over to the command line; decides nothing itself.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    heliostat::cli::main()
}
