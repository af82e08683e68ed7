//! What goes to standard output, and what to standard error.
//!
//! Results go to standard output, in one of two [`Form`]s; everything that is said on the way goes to standard
//! error. A reader that has gone away is not an error.

use std::fmt;
use std::io::{self, Write};

use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, presets};

/// For whom results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Text,
    /// For programs: one JSON value, numbers exact.
    Json,
}

/// How a verb that ran to its end came out: the status that the program exits with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As asked.
    Done,
    /// Not as asked, and that is the answer: images differ, a proof does not hold, a job failed.
    No,
    /// An answer that has a status of its own.
    Status(u8),
    /// A person or the service manager ended it, with the signal of this number.
    Interrupted(u8),
}

impl Outcome {
    /// The exit status, as shells know it.
    #[must_use]
    pub const fn status(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::No => 1,
            Self::Status(status) => status,
            Self::Interrupted(signal) => 128 + signal,
        }
    }
}

/// Writes a result to standard output, and a line's end.
///
/// # Errors
/// When it cannot be written, a full disk for instance; not when nobody reads it any more.
pub fn result(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.trim_end().as_bytes()).and_then(|()| stdout.write_all(b"\n"));
    match written.and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

/// Writes a JSON value to standard output, on lines of its own.
///
/// # Errors
/// As [`result`].
pub fn json(value: &serde_json::Value) -> Result<()> {
    result(&format!("{value:#}"))
}

/// Writes a JSON value to standard output, on one line.
///
/// # Errors
/// As [`result`].
pub fn json_line(value: &serde_json::Value) -> Result<()> {
    result(&value.to_string())
}

/// Says something on standard error. Where nobody listens, nobody is told.
pub fn say(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A table without lines, its columns as wide as they need.
#[must_use]
pub fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(heads);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// A table's text without the blanks at the ends of its lines.
#[must_use]
pub fn lines_of(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}
