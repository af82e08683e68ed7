//! What was measured: samples, medians, ratios; as a table for people and as JSON for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::contender::Contender;
use super::fio::now_ms;
use super::rows::Row;
use crate::workspace;

/// What a number counts. Its unit stands in its name.
pub type Figure = &'static str;

/// What one contender did in one round.
#[derive(Default)]
pub struct Sample(Vec<(Figure, f64)>);

impl Sample {
    pub fn with(mut self, figure: Figure, value: f64) -> Self {
        self.0.push((figure, value));
        self
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (figure, value)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{figure} {}", short(*value))?;
        }
        Ok(())
    }
}

/// A number that the project has promised: how ours stands to something measured beside it.
pub struct Goal {
    /// As in the table of promises.
    pub text: &'static str,
    /// `None` where one of the sides was not measured.
    pub outcome: Option<Outcome>,
}

pub struct Outcome {
    /// What the goal speaks of: a ratio, or a figure of ours.
    pub value: f64,
    pub reached: bool,
}

impl Goal {
    /// A goal that wants `value` to be at least `bound`.
    pub fn at_least(text: &'static str, value: Option<f64>, bound: f64) -> Self {
        Self { text, outcome: value.map(|value| Outcome { value, reached: value >= bound }) }
    }

    /// A goal that wants `value` to be at most `bound`.
    pub fn at_most(text: &'static str, value: Option<f64>, bound: f64) -> Self {
        Self { text, outcome: value.map(|value| Outcome { value, reached: value <= bound }) }
    }
}

/// The medians of one row.
pub struct Medians(BTreeMap<(Contender, Figure), f64>);

impl Medians {
    pub fn get(&self, contender: Contender, figure: Figure) -> Option<f64> {
        self.0.get(&(contender, figure)).copied()
    }

    /// Ours divided by another's.
    pub fn ours_over(&self, other: Contender, figure: Figure) -> Option<f64> {
        Some(self.get(Contender::Ours, figure)? / self.get(other, figure)?)
    }
}

type Samples = BTreeMap<(&'static str, Contender, Figure), Vec<f64>>;

/// Everything that was measured in one run.
pub struct Results {
    machine: Value,
    runs: u32,
    quick: bool,
    samples: Samples,
    /// The figures of each row, as they were first given.
    order: Vec<(&'static str, Figure)>,
    failures: BTreeMap<(&'static str, Contender), String>,
    goals: Vec<Value>,
}

impl Results {
    pub fn new(machine: Value, runs: u32, quick: bool) -> Self {
        let (samples, failures) = (Samples::new(), BTreeMap::new());
        Self { machine, runs, quick, samples, order: Vec::new(), failures, goals: Vec::new() }
    }

    pub fn add(&mut self, row: &'static str, contender: Contender, sample: &Sample) {
        for (figure, value) in &sample.0 {
            if !self.order.contains(&(row, figure)) {
                self.order.push((row, figure));
            }
            self.samples.entry((row, contender, figure)).or_default().push(*value);
        }
    }

    pub fn fail(&mut self, row: &'static str, contender: Contender, why: &str) {
        self.failures.insert((row, contender), why.to_owned());
    }

    pub fn has_failed(&self, row: &'static str, contender: Contender) -> bool {
        self.failures.contains_key(&(row, contender))
    }

    pub fn is_whole(&self) -> bool {
        self.failures.is_empty()
    }

    fn medians(&self, row: &str) -> Medians {
        let of_row = self.samples.iter().filter(|((name, ..), _)| *name == row);
        Medians(
            of_row.map(|((_, contender, figure), values)| ((*contender, *figure), median(values))).collect(),
        )
    }

    /// Writes it as JSON below the target directory; returns the file.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self) -> Result<PathBuf> {
        let figures: Vec<Value> = self.samples.iter().map(|((row, contender, figure), values)| {
            json!({ "row": row, "contender": contender.name(), "figure": figure, "median": median(values), "samples": values })
        }).collect();
        let failures: Vec<Value> = self
            .failures
            .iter()
            .map(|((row, contender), why)| json!({ "row": row, "contender": contender.name(), "why": why }))
            .collect();
        let all = json!({
            "machine": self.machine,
            "rounds": self.runs,
            "quick": self.quick,
            "figures": figures,
            "failures": failures,
            "goals": self.goals,
        });
        let folder = workspace::target().join("bench");
        std::fs::create_dir_all(&folder)?;
        let file = folder.join(format!("{}.json", now_ms() / 1000));
        std::fs::write(&file, format!("{all:#}\n")).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }
}

/// Prints a row's medians and what became of its goals, and keeps the latter for the JSON.
pub fn print_row(row: &Row, results: &mut Results) {
    let medians = results.medians(row.name);
    let of_row = results.order.iter().filter(|(name, _)| *name == row.name);
    let figures: Vec<Figure> = of_row.map(|(_, figure)| *figure).collect();
    let table = table(row.contenders, &figures, &medians);
    println!("{table}");
    for goal in (row.goals)(&medians) {
        let (verdict, value) = match &goal.outcome {
            Some(outcome) if outcome.reached => ("reached", short(outcome.value)),
            Some(outcome) => ("missed", short(outcome.value)),
            None => ("not measured", "-".to_owned()),
        };
        println!("{verdict:<13} {value:>8}   {}", goal.text);
        let value = goal.outcome.map(|outcome| outcome.value);
        results.goals.push(json!({ "row": row.name, "goal": goal.text, "value": value, "verdict": verdict }));
    }
}

/// A line for each contender, or for each figure where these are too many for a line.
fn table(contenders: &[Contender], figures: &[Figure], medians: &Medians) -> Table {
    const ACROSS_MAX: usize = 8;
    let cell = |contender: Contender, figure| medians.get(contender, figure).map_or("-".to_owned(), short);
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    if figures.len() <= ACROSS_MAX {
        table.set_header([&["median"][..], figures].concat());
        for &contender in contenders {
            let cells = figures.iter().map(|figure| cell(contender, figure));
            table.add_row([contender.name().to_owned()].into_iter().chain(cells));
        }
    } else {
        let names = contenders.iter().map(|contender| contender.name());
        table.set_header(["median"].into_iter().chain(names));
        for figure in figures {
            let cells = contenders.iter().map(|&contender| cell(contender, figure));
            table.add_row([(*figure).to_owned()].into_iter().chain(cells));
        }
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

/// Three digits that count, no more: nothing here is steadier than that.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).to_string(), "2");
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).to_string(), "2.5");
    }

    #[test]
    fn a_goal_is_reached_missed_or_not_measured() {
        assert!(Goal::at_least("", Some(2.0), 2.0).outcome.is_some_and(|outcome| outcome.reached));
        assert!(Goal::at_most("", Some(2.1), 2.0).outcome.is_some_and(|outcome| !outcome.reached));
        assert!(Goal::at_most("", None, 2.0).outcome.is_none());
    }

    #[test]
    fn ratios_need_both_sides() {
        let mut results = Results::new(Value::Null, 1, false);
        results.add("row", Contender::Ours, &Sample::default().with("s", 1.0));
        assert!(results.medians("row").ours_over(Contender::Cp, "s").is_none());
        results.add("row", Contender::Cp, &Sample::default().with("s", 4.0));
        assert_eq!(results.medians("row").ours_over(Contender::Cp, "s").map(short), Some("0.250".to_owned()));
        assert!(results.medians("another").get(Contender::Cp, "s").is_none());
    }
}
