//! `block-job-…`, `job-…`, `query-block-jobs`, `query-jobs`.

use std::sync::Arc;
use std::time::Duration;

use heliostat_block::job::progress::TimeLeft;
use heliostat_block::job::{CopyMode, Force, IoStatus, JobStatus, Verb};
use serde_json::{Map, Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::{Class, Refusal};
use super::mirror::{copy_mode, target_deadline};
use crate::daemon::{Daemon, DaemonError, JobEntry, JobKind};

/// Carries out a command on one job. `None` when it is no such command.
pub(super) fn ask(
    daemon: &Arc<Daemon>,
    name: &str,
    arguments: Arguments<'_>,
) -> Option<Result<Value, Refusal>> {
    let verb = name.strip_prefix("block-job-").or_else(|| name.strip_prefix("job-"))?;
    let id = arguments.text("device").or_else(|| arguments.text("id"))?;
    // The older family knows block jobs only.
    let is_known = |entry: &JobEntry| entry.kind == JobKind::Mirror || name.starts_with("job-");
    let Some(entry) = daemon.job(id).filter(is_known) else {
        return Some(Err(match name.strip_prefix("block-job-") {
            Some(_) => Refusal::of(Class::DeviceNotActive, format!("Block job '{id}' not found")),
            None => Refusal::new("Job not found"),
        }));
    };
    let wanted = match verb {
        "pause" => Verb::Pause,
        "resume" => Verb::Resume,
        // The newer family knows one cancel, which is the hard one.
        "cancel" if name == "job-cancel" || arguments.flag("force") == Some(true) => {
            Verb::Cancel(Force::Hard)
        }
        "cancel" => Verb::Cancel(Force::Soft),
        "complete" => Verb::Complete,
        "finalize" => Verb::Finalize,
        "dismiss" => Verb::Dismiss,
        "set-speed" => return Some(set_speed(daemon, &entry, arguments)),
        "change" => return Some(change(daemon, &entry, arguments)),
        _ => return None,
    };
    Some(order(daemon, &entry, wanted, verb))
}

fn order(daemon: &Daemon, entry: &JobEntry, verb: Verb, word: &str) -> Result<Value, Refusal> {
    let job = &entry.job;
    match daemon.ask_job(entry, verb) {
        Ok(()) => Ok(json!({})),
        Err(DaemonError::Verb(error)) => Err(Refusal::of_verb(&error, job.id(), word, job.status().name())),
        Err(error) => Err(error.into()),
    }
}

fn set_speed(daemon: &Daemon, entry: &JobEntry, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let speed = u64::try_from(arguments.int("speed").unwrap_or(0));
    let verb = Verb::SetSpeed(*speed.as_ref().unwrap_or(&0));
    // The status is looked at before the number.
    if !heliostat_block::job::allows(entry.job.status(), verb) {
        return order(daemon, entry, verb, "set-speed");
    }
    match speed {
        Ok(_) => order(daemon, entry, verb, "set-speed"),
        Err(_) => Err(Refusal::new("Parameter 'speed' expects a non-negative value")),
    }
}

fn change(daemon: &Daemon, entry: &JobEntry, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let now = entry.job.orders().copy_mode;
    // Another type than the job's is accepted, and changes nothing, as in QEMU.
    let wanted = copy_mode(arguments).unwrap_or(now);
    let changed = order(daemon, entry, Verb::Change(wanted), "change")?;
    match target_deadline(arguments) {
        Some(deadline) => order(daemon, entry, Verb::SetDeadline(deadline), "change"),
        None => Ok(changed),
    }
}

pub(super) fn query_jobs(daemon: &Arc<Daemon>) -> Value {
    daemon.jobs().iter().map(described).collect()
}

fn described(entry: &JobEntry) -> Value {
    let job = &entry.job;
    let figures = job.figures();
    let mut value = json!({
        "current-progress": figures.offset,
        "status": job.status().name(),
        "total-progress": figures.len,
        "type": entry.kind.name(),
        "id": job.id(),
    });
    if let Some(error) = job.error() {
        value["error"] = json!(error);
    }
    value
}

pub(super) fn query_block_jobs(daemon: &Arc<Daemon>) -> Value {
    daemon.jobs().iter().filter(|entry| entry.kind == JobKind::Mirror).map(described_in_full).collect()
}

/// QEMU's fields in QEMU's order, then ours.
fn described_in_full(entry: &JobEntry) -> Value {
    let job = &entry.job;
    let (figures, orders, options, status) = (job.figures(), job.orders(), job.options(), job.status());
    let is_ready = matches!(status, JobStatus::Ready | JobStatus::Standby);
    let is_paused = orders.paused || matches!(status, JobStatus::Paused | JobStatus::Standby);
    let has_ended = matches!(status, JobStatus::Concluded | JobStatus::Null);
    let is_idle = is_ready && figures.dirty == 0;
    let mut value = json!({
        "auto-finalize": options.auto_finalize,
        "io-status": match job.io_status() {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        },
        "device": job.id(),
        "auto-dismiss": options.auto_dismiss,
        "busy": figures.busy && !is_paused && !has_ended && !is_idle && status != JobStatus::Pending,
        "len": figures.len,
        "offset": figures.offset,
        "status": status.name(),
        "paused": is_paused,
        "speed": orders.speed,
        "ready": is_ready,
        "type": "mirror",
        "actively-synced": figures.actively_synced,
    });
    let map = value.as_object_mut().expect("made as an object above");
    if let Some(error) = job.error() {
        map.insert("error".to_owned(), json!(error));
    }
    add_ours(map, entry);
    value
}

fn add_ours(map: &mut Map<String, Value>, entry: &JobEntry) {
    let figures = entry.job.figures();
    let mut add = |name: &str, value: Value| {
        map.insert(name.to_owned(), value);
    };
    add("source", json!(entry.source));
    add("target", json!(entry.target));
    add("copy-mode", json!(copy_mode_word(entry.job.orders().copy_mode)));
    add("dirty-bytes", json!(figures.dirty));
    add("unscanned", json!(figures.unscanned));
    add("copy-rate", json!(figures.rates.copy));
    add("dirty-rate", json!(figures.rates.dirty));
    match figures.time_left {
        TimeLeft::Seconds(seconds) => add("seconds-left", json!(seconds)),
        TimeLeft::NoRateYet => add("no-estimate", json!("no-rate-yet")),
        TimeLeft::NotConverging => add("no-estimate", json!("not-converging")),
        TimeLeft::Paused => add("no-estimate", json!("paused")),
    }
    let times = [
        ("guest-p99-us-before", figures.guest_p99_before),
        ("guest-p99-us-now", figures.guest_p99_now),
        ("last-pause-us", figures.pause),
    ];
    for (name, time) in times {
        if let Some(time) = time {
            add(name, json!(micros(time)));
        }
    }
    if let Some(group) = entry.job.group() {
        add("group", group.jobs().iter().map(|job| job.id()).collect());
    }
    add("data-copied", json!(figures.data_copied));
    add("zeroes-skipped", json!(figures.zeroes_skipped));
    add("errors-ignored", json!(figures.errors_ignored));
    if let Some(degraded) = figures.degraded {
        let since = u64::try_from(degraded.lasted.as_millis()).unwrap_or(u64::MAX);
        add("degraded", json!({ "reason": degraded.reason, "for-ms": since }));
    }
}

const fn copy_mode_word(copy_mode: CopyMode) -> &'static str {
    match copy_mode {
        CopyMode::Background => "background",
        CopyMode::WriteBlocking => "write-blocking",
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
