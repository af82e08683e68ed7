//! [`check`]: whether an image's tables and reference counts agree, and what can be done about it.
//!
//! Counts what `qemu-img check` counts: every table is followed, every cluster's references are added up, and
//! compared with the reference counts. Works on an image that nobody else uses. Memory and time are bounded by what
//! is in the file, never by what its tables claim: a table that is named often is read once.
//!
//! [`walk`] follows the tables, [`references`] adds up, [`counts`] compares; [`mend`] and [`repair`] put right.

mod ahead;
mod counts;
mod mend;
mod names;
mod references;
mod repair;
mod walk;

use super::error::FormatError;
use super::file::ImageFile;

pub use repair::repair_dirty;

/// What is put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing; nothing is written.
    #[default]
    No,
    /// Clusters that are counted but not used are given back. Nothing that a guest could see changes.
    Leaks,
    /// Everything that can be. Entries that lead nowhere are given up: what they stood for reads as zero.
    All,
}

/// How far a check is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// L2 tables and refcount blocks looked at.
    pub done: u64,
    /// How many there are, as far as is known.
    pub total: u64,
}

/// How an image is checked.
#[derive(Clone, Copy)]
pub struct CheckOptions<'a> {
    /// What is put right.
    pub repair: Repair,
    /// How many findings are kept in words; all are counted.
    pub findings_max: usize,
    /// The most memory, in bytes, that references may take.
    pub memory_max: u64,
    /// Is told now and then.
    pub progress: Option<&'a dyn Fn(Progress)>,
}

/// Enough words to see what is wrong.
const FINDINGS_MAX: usize = 200;
/// References of 64 TiB in clusters of 64 KiB.
const MEMORY_MAX: u64 = 4 << 30;

impl Default for CheckOptions<'_> {
    fn default() -> Self {
        Self { repair: Repair::No, findings_max: FINDINGS_MAX, memory_max: MEMORY_MAX, progress: None }
    }
}

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// Data is lost, or will be when the image is written.
    Corruption,
    /// Space is lost.
    Leak,
    /// It could not be looked at.
    CheckError,
    /// It has been put right.
    Repaired,
}

/// Something that is wrong, or was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it means.
    pub kind: FindingKind,
    /// What and where.
    pub text: String,
}

/// What a check has found. After a repair: what is still so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that lose data.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// What could not be looked at.
    pub check_errors: u64,
    /// Corruptions that a repair has put right.
    pub corruptions_fixed: u64,
    /// Leaks that a repair has put right.
    pub leaks_fixed: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Guest clusters that have a host cluster.
    pub allocated_clusters: u64,
    /// Guest clusters that do not follow the one before on the host.
    pub fragmented_clusters: u64,
    /// Guest clusters that are compressed.
    pub compressed_clusters: u64,
    /// The end of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// What was found, in words, up to the limit asked for.
    pub findings: Vec<Finding>,
    /// Findings beyond that limit.
    pub findings_left_out: u64,
    findings_max: usize,
    /// Corruptions that are neither wrong counts nor wrong COPIED flags.
    structural: u64,
}

impl CheckReport {
    /// Says whether nothing is wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    /// The exit status that `qemu-img check` has for this.
    #[must_use]
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self { check_errors: 1.., .. } => 1,
            Self { corruptions: 1.., .. } => 2,
            Self { leaks: 1.., .. } => 3,
            _ => 0,
        }
    }

    fn note(&mut self, kind: FindingKind, text: impl FnOnce() -> String) {
        if self.findings.len() < self.findings_max {
            self.findings.push(Finding { kind, text: text() });
        } else {
            self.findings_left_out += 1;
        }
    }

    /// What must be read even where there is no room for all.
    fn note_first(&mut self, kind: FindingKind, text: &str) {
        self.findings.insert(0, Finding { kind, text: text.to_owned() });
    }

    /// A contradiction in tables, seen `times` times.
    fn structural(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.structural += times;
        self.corruption(times, text);
    }

    fn corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.corruptions += times;
        self.note(FindingKind::Corruption, text);
    }

    fn leak(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.leaks += times;
        self.note(FindingKind::Leak, text);
    }

    fn check_error(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.check_errors += times;
        self.note(FindingKind::CheckError, text);
    }

    fn repaired(&mut self, text: impl FnOnce() -> String) {
        self.note(FindingKind::Repaired, text);
    }
}

/// Checks an image, and puts right what `options` ask for. Nobody else may use the image meanwhile. What a repair
/// has written is durable when it returns; stopped at any moment it leaves no worse image.
///
/// # Errors
/// [`FormatError`] when the image cannot be looked at at all, or the file cannot be read or written.
///
/// # Cancel safety
/// As a crash: no worse image.
pub async fn check(file: &ImageFile, options: CheckOptions<'_>) -> Result<CheckReport, FormatError> {
    if options.repair == Repair::No {
        return Ok(walk::examine(file, &options).await?.report);
    }
    repair::run(file, &options).await
}

#[cfg(test)]
mod tests;
