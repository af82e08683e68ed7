//! The rows: which work, who does it, what is promised about it. Each file is one kind of work.

mod control;
mod copy;
mod guest;
mod mirror;
mod nbd;
mod nbd_target;
mod nbd_tls;
mod qcow2;
mod serve;

use anyhow::Result;

use super::contender::Contender;
use super::report::{Goal, Medians, Sample};
use super::scene::Scene;

/// A kind of work that several do.
pub struct Row {
    /// As on the command line.
    pub name: &'static str,
    /// For people.
    pub work: &'static str,
    /// In the order of their turns.
    pub contenders: &'static [Contender],
    /// Lets one of them do it once.
    pub measure: fn(&Scene, Contender) -> Result<Sample>,
    /// What was promised, seen against the medians.
    pub goals: fn(&Medians) -> Vec<Goal>,
}

/// Every row, in the order of the table of promises.
pub fn all() -> Vec<Row> {
    vec![
        mirror::IN_MEMORY,
        mirror::DIRECT,
        mirror::SPARSE,
        serve::RANDOM,
        nbd::COPY,
        nbd::CACHED,
        nbd::DIRECT,
        nbd::CONNECTED,
        nbd_tls::TLS,
        nbd_target::NEAR,
        nbd_target::FAR,
        nbd_target::SLOW,
        nbd_target::GONE,
        control::JOBS_AT_ONCE,
        control::COMMANDS,
        guest::QUIET,
        guest::BUSY,
        copy::FILES,
        qcow2::IN_MEMORY,
        qcow2::DIRECT,
        qcow2::ALLOCATING,
        qcow2::FULL,
        qcow2::SPARSE,
        qcow2::CHECKED,
    ]
}
