//! `heliostat check IMAGE`: whether a qcow2 image's tables and reference counts agree, and their repair.
//!
//! Counts and exit status are those of `qemu-img check`: 0 clean, 2 corruptions, 3 leaks, 1 could not be checked.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use heliostat_block::driver::qcow2::check::{self, CheckOptions, CheckReport, FindingKind, Progress, Repair};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::storage::Storage;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, Locking, OpenOptions};
use heliostat_host::runtime::block_on;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::output::{self, Form, Outcome, say};
use super::remote::{self, Certificates};
use super::{progress, units};

/// A check that is done before this shows no progress.
const QUIET_MAX: Duration = Duration::from_secs(1);
/// The pause between lines of progress where there is no terminal.
const LINE_PAUSE: Duration = Duration::from_secs(10);

/// Says whether a qcow2 image is sound; exit status 0 when it is, 2 when it is corrupt, 3 when it only has leaks, 1
/// when that cannot be told
#[derive(Args, Debug)]
pub struct Check {
    /// The image: a file or a block device that nobody else uses
    image: PathBuf,
    /// What to put right: clusters that are counted but not used, or everything; what an entry stood for that leads
    /// nowhere reads as zero afterwards
    #[arg(short, long, value_enum)]
    repair: Option<What>,
    /// Check even while another program writes to it; the answer may then mean nothing
    #[arg(short = 'U', long, conflicts_with = "repair")]
    force_share: bool,
    #[command(flatten)]
    certificates: Certificates,
}

/// What is put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Clusters that are counted but not used
    Leaks,
    /// Everything
    All,
}

impl Check {
    /// Checks, repairs where that is asked for, and says.
    ///
    /// # Errors
    /// When the image cannot be opened, looked at, or written.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let (access, locking, repair) = match self.repair {
            None if self.force_share => (Access::ReadOnly, Locking::Off, Repair::No),
            None => (Access::ReadOnly, Locking::Still, Repair::No),
            Some(What::Leaks) => (Access::ReadWrite, Locking::Auto, Repair::Leaks),
            Some(What::All) => (Access::ReadWrite, Locking::Auto, Repair::All),
        };
        let file =
            ImageFile::new(self.storage(&OpenOptions { access, locking, ..OpenOptions::default() })?);
        let meter = RefCell::new(Meter::start(&self.image.display().to_string()));
        let show = |progress: Progress| meter.borrow_mut().show(progress);
        let options = CheckOptions { repair, progress: Some(&show), ..CheckOptions::default() };
        let report = block_on(check::check(&file, options))
            .context("cannot start the I/O engine")?
            .with_context(|| format!("cannot check {}", self.image.display()))?;
        drop(meter);
        match form {
            Form::Json => output::json(&self.to_json(&report))?,
            Form::Text => output::result(&self.to_text(&report))?,
        }
        Ok(Outcome::Status(report.exit_status()))
    }

    fn storage(&self, options: &OpenOptions) -> Result<Arc<dyn Storage>> {
        match remote::open(self.certificates.at(&self.image))? {
            Some(_) if self.repair.is_some() => {
                bail!(
                    "{} is an export, which is only looked at; repair it where its file is",
                    self.image.display()
                )
            }
            Some(storage) => Ok(storage),
            None => Ok(Arc::new(FileStorage::open(&self.image, options)?)),
        }
    }

    fn to_json(&self, report: &CheckReport) -> Value {
        let findings =
            report.findings.iter().map(|finding| json!({ "kind": name(finding.kind), "text": finding.text }));
        json!({
            "filename": self.image.to_string_lossy(),
            "format": "qcow2",
            "check-errors": report.check_errors,
            "corruptions": report.corruptions,
            "leaks": report.leaks,
            "corruptions-fixed": report.corruptions_fixed,
            "leaks-fixed": report.leaks_fixed,
            "image-end-offset": report.image_end_offset,
            "total-clusters": report.total_clusters,
            "allocated-clusters": report.allocated_clusters,
            "fragmented-clusters": report.fragmented_clusters,
            "compressed-clusters": report.compressed_clusters,
            "findings": findings.collect::<Vec<_>>(),
            "findings-left-out": report.findings_left_out,
        })
    }

    fn to_text(&self, report: &CheckReport) -> String {
        let mut lines: Vec<String> = report
            .findings
            .iter()
            .map(|finding| format!("{}: {}", name(finding.kind), finding.text))
            .collect();
        if report.findings_left_out > 0 {
            lines.push(format!("… and {} more", units::count(report.findings_left_out)));
        }
        let fixed = report.corruptions_fixed + report.leaks_fixed;
        if fixed > 0 {
            lines.push(format!(
                "Put right: {} corruptions, {} leaked clusters.",
                units::count(report.corruptions_fixed),
                units::count(report.leaks_fixed)
            ));
        }
        if report.corruptions > 0 {
            let what = units::count(report.corruptions);
            lines.push(format!("{what} corruptions: data is lost, or will be when the image is written."));
        }
        if report.leaks > 0 {
            let what = units::count(report.leaks);
            lines.push(format!("{what} clusters are leaked: space is lost, no data."));
        }
        if report.check_errors > 0 {
            lines.push(format!("{} places could not be checked.", units::count(report.check_errors)));
        }
        if report.is_clean() {
            lines.push("The image is sound.".to_owned());
        }
        lines.push(format!(
            "{} of {} clusters in use, {} of them fragmented, {} compressed; the image ends at {} ({} bytes).",
            units::count(report.allocated_clusters),
            units::count(report.total_clusters),
            units::count(report.fragmented_clusters),
            units::count(report.compressed_clusters),
            units::size(report.image_end_offset),
            units::count(report.image_end_offset)
        ));
        lines.join("\n")
    }
}

const fn name(kind: FindingKind) -> &'static str {
    match kind {
        FindingKind::Corruption => "corruption",
        FindingKind::Leak => "leak",
        FindingKind::CheckError => "not checked",
        FindingKind::Repaired => "put right",
    }
}

/// Shows how far a check is, once it takes long.
struct Meter {
    name: String,
    due: Instant,
    bar: Option<ProgressBar>,
}

impl Meter {
    fn start(name: &str) -> Self {
        Self { name: name.to_owned(), due: Instant::now() + QUIET_MAX, bar: None }
    }

    fn show(&mut self, progress: Progress) {
        let percent = progress.done * 100 / progress.total.max(1);
        if let Some(bar) = &self.bar {
            bar.set_position(percent);
            return;
        }
        if Instant::now() < self.due {
            return;
        }
        if std::io::stderr().is_terminal() {
            self.bar = Some(progress::bar("check"));
        } else {
            say(format_args!("heliostat: {}: {percent} % of the tables checked", self.name));
            self.due = Instant::now() + LINE_PAUSE;
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
