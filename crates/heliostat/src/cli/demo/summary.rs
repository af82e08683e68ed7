//! [`Facts`]: what a demo has shown, told to people and to programs.

use std::path::PathBuf;
use std::time::Duration;

use heliostat_block::clock::Moment;
use serde_json::{Value, json};

use super::findings::Findings;
use super::proof::Proof;
use super::record::{Counts, PivotWindow};
use super::report::{Latency, Report};
use super::stage::Taken;
use crate::cli::mirror::micros;
use crate::cli::output::{lines_of, table};
use crate::cli::units;

/// When things happened.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// The demo began.
    pub began: Moment,
    /// The guest began.
    pub alone: Moment,
    /// The mirror began.
    pub mirrored: Moment,
    /// The target was in step.
    pub ready: Moment,
    /// The pivot.
    pub window: PivotWindow,
    /// The guest was told to stop.
    pub stopped: Moment,
    /// The proof was made.
    pub ended: Moment,
}

/// What a demo has shown.
#[derive(Debug)]
pub struct Facts {
    /// Where the disks were.
    pub folder: PathBuf,
    /// The disks' size.
    pub size: u64,
    /// What fixed the guest's choices.
    pub seed: u64,
    /// The guest's account.
    pub report: Report,
    /// How many of its requests changed something, and when.
    pub counts: Counts,
    /// When things happened.
    pub times: Times,
    /// How long the daemon held the guest.
    pub pause: Option<Duration>,
    /// Bytes that were copied as data.
    pub data_copied: u64,
    /// What the disks took of their host at the end.
    pub taken: Taken,
    /// What reading both disks has shown.
    pub proof: Proof,
    /// How they were read.
    pub read_back: &'static str,
}

/// Something that was to be shown.
struct Claim {
    holds: bool,
    text: String,
    /// What speaks against it.
    against: Vec<String>,
}

impl Facts {
    /// Says whether everything that was to be shown holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.claims().iter().all(|claim| claim.holds)
    }

    fn claims(&self) -> Vec<Claim> {
        let Counts { before, during, after, failed } = self.counts;
        let (count, report, proof) = (units::count, &self.report, &self.proof);
        let mut claims = vec![
            Claim {
                holds: failed == 0 && report.errors.count == 0 && before > 0 && after > 0,
                text: format!(
                    "{} requests, every one answered without error; the guest never reconnected",
                    count(u64::try_from(report.timings.len()).unwrap_or(u64::MAX))
                ),
                against: described(&report.errors),
            },
            Claim {
                holds: report.false_reads.count == 0 && report.reads > 0,
                text: format!(
                    "{} reads on the way, each brought what had been written last",
                    count(report.reads)
                ),
                against: described(&report.false_reads),
            },
            Claim {
                holds: proof.target.count == 0,
                text: format!(
                    "all acknowledged changes are on the target: {} from before the pivot, {} across it, {} after it",
                    count(before),
                    count(during),
                    count(after)
                ),
                against: described(&proof.target),
            },
            Claim {
                holds: proof.source.count == 0,
                text: "the source is as it was at the pivot: nothing written later has reached it".to_owned(),
                against: described(&proof.source),
            },
            Claim {
                holds: proof.differing.count == 0,
                text: format!(
                    "the {} blocks that the guest has left alone since are the same on both, byte for byte",
                    count(proof.untouched)
                ),
                against: described(&proof.differing),
            },
        ];
        if self.pause.is_none() {
            let text = "the daemon measured how long the guest was held".to_owned();
            claims.push(Claim { holds: false, text, against: Vec::new() });
        }
        claims
    }

    fn phases(&self) -> [(&'static str, Latency); 3] {
        let Times { alone, mirrored, window, stopped, .. } = self.times;
        [
            ("alone", self.report.latency(alone, mirrored)),
            ("while mirrored", self.report.latency(mirrored, window.asked)),
            ("on the target", self.report.latency(window.done, stopped)),
        ]
    }

    fn longest_across(&self) -> Duration {
        self.report.longest_across(self.times.window.asked, self.times.window.done)
    }

    /// The story, for people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "Both files, read back {}, against the guest's own record, {} blocks each:\n\n",
            self.read_back,
            units::count(self.proof.blocks)
        );
        for claim in self.claims() {
            text.push_str(&format!("  {}  {}\n", if claim.holds { "holds " } else { "FAILED" }, claim.text));
            for line in &claim.against {
                text.push_str(&format!("            {line}\n"));
            }
        }
        text.push('\n');
        text.push_str(&self.latencies());
        text.push_str("\n\n");
        for (name, value) in self.figures() {
            text.push_str(&format!("  {name:<10}{value}\n"));
        }
        let took = units::latency(self.times.ended.since(self.times.began));
        text.push_str(&match self.holds() {
            true => format!("\nEverything held. It took {took}.\n"),
            false => format!(
                "\nNOT EVERYTHING HELD. Please report this, with --seed {} and what stands above.\n",
                self.seed
            ),
        });
        text
    }

    fn latencies(&self) -> String {
        let mut table = table(&["  guest", "requests", "99 % within", "longest"]);
        for (name, latency) in self.phases() {
            table.add_row([
                format!("  {name}"),
                units::count(latency.requests),
                units::latency(latency.p99),
                units::latency(latency.longest),
            ]);
        }
        lines_of(&table)
    }

    fn figures(&self) -> Vec<(&'static str, String)> {
        let copying = self.times.ready.since(self.times.mirrored);
        let pause = self.pause.map_or_else(|| "unknown".to_owned(), units::latency);
        vec![
            (
                "pivot",
                format!(
                    "held the guest for {pause}, measured in the daemon; its longest request then took {}",
                    units::latency(self.longest_across())
                ),
            ),
            ("copying", format!("{} in {}", units::size(self.data_copied), units::latency(copying))),
            (
                "space",
                format!(
                    "the target takes {}, the source {}, of {}",
                    units::size(self.taken.target),
                    units::size(self.taken.source),
                    units::size(self.size)
                ),
            ),
        ]
    }

    /// The same, for programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let phase = |latency: Latency| {
            json!({
                "requests": latency.requests,
                "p99-us": micros(latency.p99),
                "longest-us": micros(latency.longest),
            })
        };
        let [alone, mirrored, target] = self.phases().map(|(_, latency)| phase(latency));
        let findings = |findings: &Findings| json!({ "count": findings.count, "first": findings.described });
        json!({
            "held": self.holds(),
            "seed": self.seed,
            "folder": self.folder.to_string_lossy(),
            "size": self.size,
            "seconds": self.times.ended.since(self.times.began).as_secs_f64(),
            "guest": {
                "requests": self.report.timings.len(),
                "errors": self.report.errors.count,
                "reads": self.report.reads,
                "false-reads": self.report.false_reads.count,
                "flushes": self.report.flushes,
                "changes-before-pivot": self.counts.before,
                "changes-across-pivot": self.counts.during,
                "changes-after-pivot": self.counts.after,
                "alone": alone,
                "while-mirrored": mirrored,
                "on-target": target,
            },
            "mirror": {
                "seconds-to-ready": self.times.ready.since(self.times.mirrored).as_secs_f64(),
                "data-copied": self.data_copied,
                "pause-us": self.pause.map(micros),
                "longest-request-across-pivot-us": micros(self.longest_across()),
                "source-actual-size": self.taken.source,
                "target-actual-size": self.taken.target,
            },
            "proof": {
                "blocks": self.proof.blocks,
                "read-back": self.read_back,
                "wrong-on-target": findings(&self.proof.target),
                "wrong-on-source": findings(&self.proof.source),
                "untouched-blocks": self.proof.untouched,
                "differing-untouched": findings(&self.proof.differing),
            },
        })
    }
}

fn described(findings: &Findings) -> Vec<String> {
    let mut lines = findings.described.clone();
    let shown = u64::try_from(lines.len()).unwrap_or(0);
    if findings.count > shown {
        lines.push(format!("and {} more", units::count(findings.count - shown)));
    }
    lines
}
