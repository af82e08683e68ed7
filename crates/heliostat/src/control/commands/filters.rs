//! What `blockdev-add` says of nodes that pass requests on, and of nodes over nothing; and how they are named.

use std::path::PathBuf;
use std::time::Duration;

use heliostat_block::debug_event::DebugEvent;
use heliostat_block::driver::fault::{InjectError, IoType, SetState, Times};
use heliostat_block::driver::preallocate::Ahead;
use heliostat_block::graph::Claims;
use serde_json::json;

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::nodes::{Inherited, bytes, child, file_is_missing};
use crate::daemon::{DriverSpec, FaultLimits, FaultSpec, FilterEntry, NullSpec, errno};

pub(super) fn null(arguments: Arguments<'_>, driver: &'static str) -> Result<DriverSpec, Refusal> {
    let nanoseconds = arguments.uint64("latency-ns").unwrap_or(0);
    Ok(DriverSpec::Null(NullSpec {
        driver,
        size: bytes(arguments, "size")?,
        read_zeroes: arguments.flag("read-zeroes").unwrap_or(false),
        latency: Duration::from_nanos(nanoseconds),
    }))
}

pub(super) fn throttle(arguments: Arguments<'_>, below: Inherited) -> Result<DriverSpec, Refusal> {
    let file = child(arguments, "file", below)?.ok_or_else(file_is_missing)?;
    Ok(DriverSpec::Throttle { group: arguments.required_text("throttle-group").to_owned(), file })
}

pub(super) fn copy_on_read(arguments: Arguments<'_>, below: Inherited) -> Result<DriverSpec, Refusal> {
    let file = child(arguments, "file", below)?.ok_or_else(file_is_missing)?;
    Ok(DriverSpec::CopyOnRead { file, bottom: arguments.text("bottom").map(str::to_owned) })
}

pub(super) fn preallocate(arguments: Arguments<'_>, below: Inherited) -> Result<DriverSpec, Refusal> {
    let file = child(arguments, "file", below)?.ok_or_else(file_is_missing)?;
    let ahead = Ahead {
        align: bytes(arguments, "prealloc-align")?.unwrap_or(1 << 20),
        size: bytes(arguments, "prealloc-size")?.unwrap_or(128 << 20),
    };
    if !ahead.align.is_multiple_of(512) {
        let text = "prealloc-align parameter of preallocate filter is not aligned to 512";
        return Err(Refusal::new(text));
    }
    Ok(DriverSpec::Preallocate { file, ahead })
}

pub(super) fn faults(arguments: Arguments<'_>, below: Inherited) -> Result<DriverSpec, Refusal> {
    let image = child(arguments, "image", below)?;
    let image = image.ok_or_else(|| Refusal::new("Parameter 'image' is missing"))?;
    let bytes = |name| bytes(arguments, name).map(Option::unwrap_or_default);
    let limits = FaultLimits {
        align: bytes("align")?,
        transfer_max: bytes("max-transfer")?,
        zero_unit: bytes("opt-write-zero")?,
        zero_max: bytes("max-write-zero")?,
        discard_unit: bytes("opt-discard")?,
        discard_max: bytes("max-discard")?,
    };
    let permissions = ["take-child-perms", "unshare-child-perms"].map(|name| (name, words(arguments, name)));
    if let Some((name, _)) = permissions.iter().find(|(_, words)| words.as_ref().is_some_and(Vec::is_empty)) {
        return Err(Refusal::new(format!("Block protocol 'blkdebug' doesn't support the option '{name}'")));
    }
    let [takes, unshares] = permissions.map(|(_, words)| words.unwrap_or_default());
    let claims =
        Claims { reads_alone: unshares.contains(&"consistent-read"), resizes: takes.contains(&"resize") };
    Ok(DriverSpec::Faults(Box::new(FaultSpec {
        claims,
        image,
        config: arguments.text("config").map(PathBuf::from),
        limits,
        errors: arguments.objects("inject-error").map(inject_error).collect(),
        states: arguments.objects("set-state").map(set_state).collect(),
    })))
}

fn words<'a>(arguments: Arguments<'a>, name: &str) -> Option<Vec<&'a str>> {
    let list = arguments.value(name)?.as_array()?;
    Some(list.iter().filter_map(|word| word.as_str()).collect())
}

fn inject_error(rule: Arguments<'_>) -> InjectError {
    let io = rule.text("iotype");
    let sector = rule.int("sector").and_then(|sector| u64::try_from(sector).ok());
    InjectError {
        event: event(rule),
        state: state(rule),
        io: IoType::ALL.into_iter().find(|known| Some(known.name()) == io),
        errno: errno(rule.int("errno")),
        offset: sector.map(|sector| sector.saturating_mul(512)),
        times: if rule.flag("once") == Some(true) { Times::Once } else { Times::Always },
        immediately: rule.flag("immediately").unwrap_or(false),
    }
}

fn set_state(rule: Arguments<'_>) -> SetState {
    SetState { event: event(rule), state: state(rule), new_state: rule.int("new_state").unwrap_or(0) }
}

fn event(rule: Arguments<'_>) -> DebugEvent {
    DebugEvent::of_name(rule.required_text("event")).expect("the schema has the same names")
}

fn state(rule: Arguments<'_>) -> Option<i64> {
    rule.int("state").filter(|state| *state != 0)
}

/// Whether a path alone does not say what the filter is.
pub(super) const fn needs_definition(filter: &FilterEntry) -> bool {
    match filter {
        FilterEntry::Faults { has_options, .. } => *has_options,
        FilterEntry::Throttle { .. } | FilterEntry::CopyOnRead | FilterEntry::Preallocate => true,
    }
}

/// QEMU's name for a filter over `path`, where that says all.
pub(super) fn name(filter: &FilterEntry, path: &str) -> String {
    match filter {
        FilterEntry::Faults { config, .. } => format!("blkdebug:{}:{path}", config.display()),
        FilterEntry::Throttle { .. } | FilterEntry::CopyOnRead | FilterEntry::Preallocate => path.to_owned(),
    }
}

/// What would make the same filter over `child`, with its keys in QEMU's order; its rules and limits are left out.
pub(super) fn definition(filter: &FilterEntry, child: &str) -> String {
    match filter {
        FilterEntry::Faults { .. } => format!("{{\"image\": {child}, \"driver\": \"blkdebug\"}}"),
        FilterEntry::Throttle { group } => {
            format!("{{\"throttle-group\": {}, \"driver\": \"throttle\", \"file\": {child}}}", json!(group))
        }
        FilterEntry::CopyOnRead => format!("{{\"driver\": \"copy-on-read\", \"file\": {child}}}"),
        FilterEntry::Preallocate => format!("{{\"driver\": \"preallocate\", \"file\": {child}}}"),
    }
}
