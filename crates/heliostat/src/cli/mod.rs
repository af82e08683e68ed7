//! The command line: arguments in, exit status out. One file a verb.
//!
//! Verbs drive a [`crate::daemon::Daemon`] of their own, or another process's through its control socket; image
//! bytes are touched through nodes only. Called by `main.rs`.

mod activation;
mod address;
mod check;
mod compare;
mod completions;
mod control;
mod create;
pub mod demo;
mod disk;
mod ending;
mod image;
mod info;
mod job;
mod map;
mod mirror;
mod offer;
mod output;
mod progress;
mod remote;
mod resize;
mod serve;
mod session;
mod storage_daemon;
mod target;
mod tls;
mod units;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit};

use output::{Form, Outcome, say};

/// Fronts a live disk for a guest, mirrors it elsewhere while it is in use, and moves the guest over
#[derive(Debug, Parser)]
#[command(name = "heliostat", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Try `heliostat demo` first: it needs nothing and changes nothing.")]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Print results as JSON, with exact numbers
    #[arg(long, global = true, display_order = 900)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Demo(demo::Demo),
    Serve(serve::Serve),
    Mirror(mirror::Mirror),
    Job(job::Job),
    Create(create::Create),
    Resize(resize::Resize),
    Info(info::Inspect),
    Map(map::Map),
    Check(check::Check),
    Compare(compare::Compare),
    Completions(completions::Completions),
    StorageDaemon(StorageDaemon),
}

/// Takes the options of qemu-storage-daemon, and does what they say
///
/// Try `heliostat storage-daemon --help`.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
struct StorageDaemon {
    /// The options, in their order
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

impl Verb {
    fn run(&self, form: Form) -> Result<Outcome> {
        match self {
            Self::Demo(demo) => demo.run(form),
            Self::Serve(serve) => serve.run(form),
            Self::Mirror(mirror) => mirror.run(form),
            Self::Job(job) => job.run(form),
            Self::Create(create) => create.run(form),
            Self::Resize(resize) => resize.run(form),
            Self::Info(info) => info.run(form),
            Self::Map(map) => map.run(form),
            Self::Check(check) => check.run(form),
            Self::Compare(compare) => compare.run(form),
            Self::Completions(completions) => completions.run(),
            Self::StorageDaemon(StorageDaemon { options }) => {
                let before = ["storage-daemon".to_owned()];
                let code = storage_daemon::main("heliostat storage-daemon", &before, options);
                Ok(if code == ExitCode::SUCCESS { Outcome::Done } else { Outcome::Status(1) })
            }
        }
    }

    /// What the program exits with when it could not do what was asked.
    const fn trouble(&self) -> u8 {
        match self {
            // 1 says that the images differ.
            Self::Compare(_) => 2,
            _ => 1,
        }
    }
}

/// The most open files that the program asks for; 4,096 nodes and 256 jobs take less.
const DESCRIPTORS_WANTED: u64 = 65_536;

/// Takes as many open files as the host allows. A mirror takes half a dozen of them, and the limit that processes start
/// with is low for the sake of programs that use `select`, which is not one of ours.
fn take_descriptors() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(DESCRIPTORS_WANTED, |hard| hard.min(DESCRIPTORS_WANTED));
    if limit.current.is_some_and(|soft| soft < wanted) {
        // Refused, it goes on with what there is.
        let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit });
    }
}

/// Runs the program: reads its arguments, does what they say, explains what went wrong.
#[must_use]
pub fn main() -> ExitCode {
    take_descriptors();
    let mut arguments = std::env::args();
    let name = arguments.next().unwrap_or_default();
    if Path::new(&name).file_name().is_some_and(|name| name == storage_daemon::QEMU_NAME) {
        let arguments: Vec<_> = arguments.collect();
        return storage_daemon::main(storage_daemon::QEMU_NAME, &["storage-daemon".to_owned()], &arguments);
    }
    let cli = Cli::parse();
    let form = if cli.json { Form::Json } else { Form::Text };
    match cli.verb.run(form) {
        Ok(outcome) => ExitCode::from(outcome.status()),
        Err(error) => {
            say(format_args!("heliostat: {error:#}"));
            ExitCode::from(cli.verb.trouble())
        }
    }
}
