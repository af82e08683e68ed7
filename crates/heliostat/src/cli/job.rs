//! `heliostat job …`: the jobs of a running daemon, seen and steered through its control socket.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use heliostat_block::job::JobStatus;
use heliostat_block::job::progress::{Rates, TimeLeft};
use serde_json::{Value, json};

use super::control::Control;
use super::ending;
use super::offer::socket_path;
use super::output::{self, Form, Outcome, lines_of, say, table};
use super::progress::{Look, Meter, Wanted, status_named};
use super::units;

/// How often a watched job is asked for its figures.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Shows and steers the jobs of a running daemon
#[derive(Args, Debug)]
pub struct Job {
    /// The daemon's control socket
    #[arg(long, value_name = "SOCKET", global = true, value_parser = socket_path, env = "HELIOSTAT_CONTROL")]
    control: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Lists the jobs, newest first
    List,
    /// Shows everything about one job
    Show(Which),
    /// Stops copying for a while
    Pause(Which),
    /// Goes on
    Resume(Which),
    /// Limits the copying
    #[command(allow_missing_positional = true)]
    SetSpeed {
        #[command(flatten)]
        which: Which,
        /// Bytes a second: 64M, 1.5G; 0 is no limit
        #[arg(value_parser = units::parse_size, required = true)]
        speed: u64,
    },
    /// Lets the target take the source's place; the job must be ready
    Complete(Which),
    /// Ends the job: in READY with a consistent copy, before that at once
    Cancel {
        #[command(flatten)]
        which: Which,
        /// End at once, even in READY; the target promises nothing then
        #[arg(long)]
        force: bool,
    },
    /// Ends a job that waits for this
    Finalize(Which),
    /// Forgets a job that has ended
    Dismiss(Which),
    /// Shows a job's progress until it has ended; exit status 0 if it succeeded
    Watch {
        #[command(flatten)]
        which: Which,
        /// Stop watching when it is ready
        #[arg(long)]
        until_ready: bool,
        /// Show no progress
        #[arg(long, short)]
        quiet: bool,
    },
}

/// Which job is meant.
#[derive(Args, Debug)]
struct Which {
    /// The job; may be left out where there is only one
    #[arg(value_name = "ID")]
    id: Option<String>,
}

impl Job {
    /// Does it.
    ///
    /// # Errors
    /// When there is no daemon, or it refuses.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let Some(socket) = &self.control else {
            bail!("which daemon? add --control SOCKET, or set HELIOSTAT_CONTROL");
        };
        let mut control = Control::connect(socket)?;
        let control = &mut control;
        match &self.verb {
            Verb::List => list(control, form),
            Verb::Show(which) => show(control, which, form),
            Verb::Pause(which) => order(control, which, "block-job-pause", json!({}), form),
            Verb::Resume(which) => order(control, which, "block-job-resume", json!({}), form),
            Verb::SetSpeed { which, speed } => {
                order(control, which, "block-job-set-speed", json!({ "speed": speed }), form)
            }
            Verb::Complete(which) => order(control, which, "block-job-complete", json!({}), form),
            Verb::Cancel { which, force } => {
                order(control, which, "block-job-cancel", json!({ "force": force }), form)
            }
            Verb::Finalize(which) => order(control, which, "job-finalize", json!({}), form),
            Verb::Dismiss(which) => order(control, which, "job-dismiss", json!({}), form),
            Verb::Watch { which, until_ready, quiet } => {
                let wanted = if *quiet { Wanted::No } else { Wanted::Yes };
                watch(control, which, *until_ready, wanted, form)
            }
        }
    }
}

/// A job as the daemon describes it.
struct Row {
    id: String,
    look: Look,
    error: Option<String>,
    /// Everything that the daemon said.
    all: Value,
}

impl Row {
    fn of(value: Value) -> Self {
        let number = |name: &str| value[name].as_u64();
        let time = |name: &str| number(name).map(Duration::from_micros);
        let status = value["status"].as_str().and_then(status_named).unwrap_or(JobStatus::Created);
        let time_left = match (number("seconds-left"), value["no-estimate"].as_str()) {
            (Some(seconds), _) => TimeLeft::Seconds(seconds),
            (None, Some("not-converging")) => TimeLeft::NotConverging,
            (None, Some("paused")) => TimeLeft::Paused,
            (None, _) => TimeLeft::NoRateYet,
        };
        Self {
            id: value["device"].as_str().unwrap_or_default().to_owned(),
            look: Look {
                status,
                offset: number("offset").unwrap_or(0),
                len: number("len").unwrap_or(0),
                unscanned: number("unscanned").unwrap_or(0),
                rates: Rates {
                    copy: number("copy-rate").unwrap_or(0),
                    dirty: number("dirty-rate").unwrap_or(0),
                },
                time_left,
                guest_p99_before: time("guest-p99-us-before"),
                guest_p99_now: time("guest-p99-us-now"),
                pause: time("last-pause-us"),
            },
            error: value["error"].as_str().map(str::to_owned),
            all: value,
        }
    }
}

fn jobs(control: &mut Control) -> Result<Vec<Row>> {
    match control.execute("query-block-jobs", json!({}))? {
        Value::Array(jobs) => Ok(jobs.into_iter().map(Row::of).collect()),
        other => bail!("the daemon answered {other} when asked for its jobs"),
    }
}

/// The job that is meant.
fn find(control: &mut Control, which: &Which) -> Result<Row> {
    let mut jobs = jobs(control)?;
    let names = jobs.iter().map(|job| job.id.clone()).collect::<Vec<_>>().join(", ");
    match &which.id {
        Some(id) => match jobs.into_iter().find(|job| job.id == *id) {
            Some(job) => Ok(job),
            None if names.is_empty() => bail!("there is no job {id}: there is none at all"),
            None => bail!("there is no job {id}; there is {names}"),
        },
        None if jobs.len() == 1 => Ok(jobs.remove(0)),
        None if jobs.is_empty() => bail!("there is no job"),
        None => bail!("which job? there is {names}"),
    }
}

fn list(control: &mut Control, form: Form) -> Result<Outcome> {
    let jobs = jobs(control)?;
    match form {
        Form::Json => output::json(&Value::Array(jobs.into_iter().map(|job| job.all).collect()))?,
        Form::Text if jobs.is_empty() => say("There is no job."),
        Form::Text => output::result(&rows(&jobs))?,
    }
    Ok(Outcome::Done)
}

fn rows(jobs: &[Row]) -> String {
    let mut table = table(&["JOB", "STATUS", "DONE", "LEFT", "COPIED", "DIRTIED", "TO GO"]);
    for job in jobs {
        let look = &job.look;
        table.add_row([
            job.id.clone(),
            look.status.name().to_owned(),
            format!("{} %", look.percent()),
            units::size(look.left()),
            units::rate(look.rates.copy),
            units::rate(look.rates.dirty),
            match look.time_left {
                TimeLeft::Seconds(seconds) => units::span(seconds),
                TimeLeft::NoRateYet => "unknown".to_owned(),
                TimeLeft::NotConverging => "no end in sight".to_owned(),
                TimeLeft::Paused => "paused".to_owned(),
            },
        ]);
    }
    lines_of(&table)
}

fn show(control: &mut Control, which: &Which, form: Form) -> Result<Outcome> {
    let job = find(control, which)?;
    match form {
        Form::Json => output::json(&job.all)?,
        Form::Text => {
            let Value::Object(fields) = &job.all else { bail!("the daemon describes a job as {}", job.all) };
            let width = fields.keys().map(String::len).max().unwrap_or(0) + 2;
            let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let lines = fields.iter().map(|(name, value)| format!("{name:<width$}{}\n", plain(value)));
            output::result(&lines.collect::<String>())?;
        }
    }
    Ok(Outcome::Done)
}

/// Asks something of a job. Says so when the daemon has taken it on; it may not be done yet then.
fn order(
    control: &mut Control,
    which: &Which,
    command: &str,
    mut arguments: Value,
    form: Form,
) -> Result<Outcome> {
    let id = match &which.id {
        Some(id) => id.clone(),
        None => find(control, which)?.id,
    };
    let name = if command.starts_with("block-job") { "device" } else { "id" };
    arguments[name] = json!(id);
    control.execute(command, arguments)?;
    match form {
        Form::Json => output::json_line(&json!({ "job": id, "command": command, "accepted": true }))?,
        Form::Text => say(format_args!("{id}: accepted")),
    }
    Ok(Outcome::Done)
}

/// How a watched job ended.
struct End {
    word: &'static str,
    error: Option<String>,
    look: Option<Look>,
}

fn watch(
    control: &mut Control,
    which: &Which,
    until_ready: bool,
    wanted: Wanted,
    form: Form,
) -> Result<Outcome> {
    let mut signals = ending::signals()?;
    let id = find(control, which)?.id;
    let mut meter = Meter::start(&id, wanted);
    meter.hurry();
    let mut asked = None::<Instant>;
    let mut last = None;
    let end = loop {
        if let Some(signal) = signals.take() {
            meter.say(format_args!("{id}: still running"));
            return Ok(Outcome::Interrupted(ending::number(signal)));
        }
        if asked.is_none_or(|asked| asked.elapsed() >= ASK_EVERY) {
            let found = jobs(control)?.into_iter().find(|job| job.id == id);
            asked = Some(Instant::now());
            match found {
                Some(job) if until_ready && job.look.status == JobStatus::Ready => {
                    break End { word: "ready", error: None, look: Some(job.look) };
                }
                Some(job) if job.look.status == JobStatus::Concluded => {
                    let word = if job.error.is_some() { "failed" } else { "completed" };
                    break End { word, error: job.error, look: Some(job.look) };
                }
                Some(job) => {
                    meter.show(&job.look);
                    last = Some(job.look);
                }
                // Its last event is on its way, or came before we did.
                None if last.is_none() => bail!("the job {id} has gone"),
                None => {}
            }
        }
        let Some(event) = control.event(ending::LOOK_EVERY)? else { continue };
        if event["data"]["device"] != json!(id) {
            continue;
        }
        let error = event["data"]["error"].as_str().map(str::to_owned);
        match event["event"].as_str() {
            Some("BLOCK_JOB_COMPLETED") => {
                let word = if error.is_some() { "failed" } else { "completed" };
                break End { word, error, look: last };
            }
            Some("BLOCK_JOB_CANCELLED") => break End { word: "cancelled", error: None, look: last },
            Some("BLOCK_JOB_READY") if until_ready => {
                break End { word: "ready", error: None, look: last };
            }
            _ => {}
        }
    };
    drop(meter);
    tell_end(&id, &end, form)?;
    Ok(if matches!(end.word, "completed" | "ready") { Outcome::Done } else { Outcome::No })
}

fn tell_end(id: &str, end: &End, form: Form) -> Result<()> {
    match form {
        Form::Json => output::json(&json!({
            "job": id,
            "ended": end.word,
            "error": end.error,
            "offset": end.look.as_ref().map(|look| look.offset),
            "len": end.look.as_ref().map(|look| look.len),
        })),
        Form::Text => output::result(&match &end.error {
            Some(error) => format!("{id}: {}: {error}", end.word),
            None => format!("{id}: {}", end.word),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Row {
        Row::of(json!({
            "device": "move-db", "status": "running", "offset": 3_u64 << 30, "len": 4_u64 << 30, "unscanned": 0,
            "copy-rate": 200 << 20, "dirty-rate": 12 << 20, "seconds-left": 6,
        }))
    }

    #[test]
    fn a_list_of_jobs_is_a_table() {
        let stuck = Row::of(json!({
            "device": "j2", "status": "running", "offset": 0, "len": 1000, "no-estimate": "not-converging",
        }));
        let ready = Row::of(json!({
            "device": "j3", "status": "ready", "offset": 1000, "len": 1000, "seconds-left": 0,
        }));
        let lines = rows(&[running(), stuck, ready]);
        let expected = [
            "JOB      STATUS   DONE   LEFT    COPIED     DIRTIED   TO GO",
            "move-db  running  75 %   1 GiB   200 MiB/s  12 MiB/s  6 s",
            "j2       running  0 %    1000 B  0 B/s      0 B/s     no end in sight",
            "j3       ready    100 %  0 B     0 B/s      0 B/s     0 s",
        ];
        assert_eq!(lines.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_daemon_that_says_less_is_understood() {
        // What qemu-storage-daemon says.
        let row = Row::of(json!({ "device": "j", "status": "paused", "offset": 1, "len": 4 }));
        assert_eq!((row.look.status, row.look.percent()), (JobStatus::Paused, 25));
        assert_eq!(row.look.time_left, TimeLeft::NoRateYet);
        assert_eq!(Row::of(json!({})).look.len, 0);
    }
}
