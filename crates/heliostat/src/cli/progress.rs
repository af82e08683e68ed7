//! [`Look`]: a job's figures as people see them; [`Meter`]: where they are shown while it runs.
//!
//! On a terminal one line redraws itself; elsewhere a plain line comes now and then, so that a log stays short.
//! Turning figures into words is pure.

use std::fmt;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use heliostat_block::job::progress::{Rates, TimeLeft};
use heliostat_block::job::{Job, JobStatus};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::say;
use super::units;

/// Where there is no terminal: the time until the first line, short enough to see that something happens. Each
/// pause is half as long again as the one before, so that a long job fits on a few screens.
const LINE_FIRST: Duration = Duration::from_secs(2);
/// The longest pause between two lines.
const LINE_LAST: Duration = Duration::from_secs(60);

/// A job's figures at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Its status.
    pub status: JobStatus,
    /// Bytes done.
    pub offset: u64,
    /// Bytes done and left.
    pub len: u64,
    /// Bytes of the source that have not been looked at, so that what is left is not known yet.
    pub unscanned: u64,
    /// How fast.
    pub rates: Rates,
    /// How long still, or why that cannot be said.
    pub time_left: TimeLeft,
    /// Guests' latency before the job.
    pub guest_p99_before: Option<Duration>,
    /// Guests' latency now.
    pub guest_p99_now: Option<Duration>,
    /// How long the gate was closed at the last attempt to end.
    pub pause: Option<Duration>,
}

impl Look {
    /// Looks at a job of this process.
    #[must_use]
    pub fn at(job: &Job) -> Self {
        let figures = job.figures();
        Self {
            status: job.status(),
            offset: figures.offset,
            len: figures.len,
            unscanned: figures.unscanned,
            rates: figures.rates,
            time_left: figures.time_left,
            guest_p99_before: figures.guest_p99_before,
            guest_p99_now: figures.guest_p99_now,
            pause: figures.pause,
        }
    }

    /// What is left.
    #[must_use]
    pub const fn left(&self) -> u64 {
        self.len.saturating_sub(self.offset)
    }

    /// How much of what there is to do is done, in whole hundredths; 100 only when nothing is left.
    #[must_use]
    pub fn percent(&self) -> u64 {
        if self.left() == 0 && self.unscanned == 0 {
            return 100;
        }
        let percent = u128::from(self.offset) * 100 / (u128::from(self.len) + u128::from(self.unscanned));
        u64::try_from(percent).unwrap_or(99).min(99)
    }

    /// The figures in words, without the percentage.
    #[must_use]
    pub fn words(&self) -> String {
        let mut words = vec![match self.unscanned {
            0 => format!("{} left", units::size(self.left())),
            unscanned => format!("{} left, {} to look at", units::size(self.left()), units::size(unscanned)),
        }];
        words.push(format!("{} copied", units::rate(self.rates.copy)));
        if self.rates.dirty > 0 {
            words.push(format!("{} dirtied", units::rate(self.rates.dirty)));
        }
        words.push(time_words(self.status, self.time_left));
        match (self.guest_p99_before, self.guest_p99_now) {
            (Some(before), Some(now)) => {
                words.push(format!("guest p99 {}, before {}", units::latency(now), units::latency(before)))
            }
            (None, Some(now)) => words.push(format!("guest p99 {}", units::latency(now))),
            (_, None) => {}
        }
        words.join(", ")
    }
}

fn time_words(status: JobStatus, time_left: TimeLeft) -> String {
    match (status, time_left) {
        (JobStatus::Ready | JobStatus::Standby, _) => "ready".to_owned(),
        (JobStatus::Paused, _) | (_, TimeLeft::Paused) => "paused".to_owned(),
        (JobStatus::Pending, _) => "waits for finalize".to_owned(),
        (_, TimeLeft::Seconds(seconds)) => format!("{} to go", units::span(seconds)),
        (_, TimeLeft::NoRateYet) => "time unknown yet".to_owned(),
        (_, TimeLeft::NotConverging) => {
            "no end in sight: the guest writes at least as fast as the target takes".to_owned()
        }
    }
}

/// The status of that name.
#[must_use]
pub fn status_named(name: &str) -> Option<JobStatus> {
    use JobStatus::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting};
    let all = [Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null];
    all.into_iter().find(|status| status.name() == name)
}

/// Whether progress is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// As the place allows.
    Yes,
    /// Not at all (`--quiet`).
    No,
}

/// Shows progress on standard error.
pub struct Meter {
    place: Place,
    name: String,
}

enum Place {
    Terminal(ProgressBar),
    Lines { due: Instant, pause: Duration, words: String },
    Nowhere,
}

impl Meter {
    /// Begins to show the progress of `name`.
    #[must_use]
    pub fn start(name: &str, wanted: Wanted) -> Self {
        let place = match wanted {
            Wanted::No => Place::Nowhere,
            Wanted::Yes if std::io::stderr().is_terminal() => Place::Terminal(bar(name)),
            Wanted::Yes => {
                Place::Lines { due: Instant::now() + LINE_FIRST, pause: LINE_FIRST, words: String::new() }
            }
        };
        Self { place, name: name.to_owned() }
    }

    /// Shows the next look whatever the time: it is not the first moment of the job.
    pub fn hurry(&mut self) {
        if let Place::Lines { due, .. } = &mut self.place {
            *due = Instant::now();
        }
    }

    /// Shows where the job is now.
    pub fn show(&mut self, look: &Look) {
        match &mut self.place {
            Place::Nowhere => {}
            Place::Terminal(bar) => {
                bar.set_length(100);
                bar.set_position(look.percent());
                bar.set_message(look.words());
            }
            Place::Lines { due, pause, words } => {
                if Instant::now() < *due {
                    return;
                }
                let now = format!("{}: {} %, {}", self.name, look.percent(), look.words());
                // Hours in READY with a quiet guest are one line.
                if *words != now {
                    say(&now);
                    *words = now;
                }
                *pause = (*pause * 3 / 2).min(LINE_LAST);
                *due = Instant::now() + *pause;
            }
        }
    }

    /// Says something beside it.
    pub fn say(&self, text: impl fmt::Display) {
        match &self.place {
            Place::Terminal(bar) => bar.suspend(|| say(text)),
            Place::Lines { .. } | Place::Nowhere => say(text),
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Place::Terminal(bar) = &self.place {
            bar.finish_and_clear();
        }
    }
}

/// A line that redraws itself.
pub fn bar(name: &str) -> ProgressBar {
    let template = "{prefix} [{bar:24}] {pos:>3} % {wide_msg}";
    let style = ProgressStyle::with_template(template).expect("a constant that a test has shown to be right");
    let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(name.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look() -> Look {
        Look {
            status: JobStatus::Running,
            offset: 62 << 20,
            len: 100 << 20,
            unscanned: 0,
            rates: Rates { copy: 64 << 20, dirty: 0 },
            time_left: TimeLeft::Seconds(1),
            guest_p99_before: None,
            guest_p99_now: None,
            pause: None,
        }
    }

    #[test]
    fn figures_become_words() {
        assert_eq!(look().percent(), 62);
        assert_eq!(look().words(), "38 MiB left, 64 MiB/s copied, 1 s to go");
        let busy = Look {
            rates: Rates { copy: 64 << 20, dirty: 80 << 20 },
            time_left: TimeLeft::NotConverging,
            guest_p99_before: Some(Duration::from_micros(140)),
            guest_p99_now: Some(Duration::from_micros(2100)),
            ..look()
        };
        assert_eq!(
            busy.words(),
            "38 MiB left, 64 MiB/s copied, 80 MiB/s dirtied, no end in sight: the guest writes at least as \
             fast as the target takes, guest p99 2.10 ms, before 0.14 ms"
        );
    }

    #[test]
    fn it_is_100_percent_only_when_nothing_is_left() {
        assert_eq!(Look { offset: (100 << 20) - 1, ..look() }.percent(), 99);
        assert_eq!(Look { offset: 0, len: 0, ..look() }.percent(), 100);
        assert_eq!(Look { offset: 0, len: 0, unscanned: 1, ..look() }.percent(), 0);
        assert_eq!(Look { offset: u64::MAX - 1, len: u64::MAX, ..look() }.percent(), 99);
    }

    #[test]
    fn the_bar_can_be_drawn() {
        bar("mirror").set_message("x");
    }
}
