//! `heliostat completions SHELL`: what a shell needs to complete our arguments.

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::output::{self, Outcome};

/// Prints completions for a shell, to be sourced or put where it looks for them
#[derive(Args, Debug)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    /// Prints them.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn run(&self) -> Result<Outcome> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "heliostat", &mut script);
        output::result(&String::from_utf8(script).context("the script is not text")?)?;
        Ok(Outcome::Done)
    }
}
