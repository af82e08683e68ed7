//! `object-add`, `object-del`, `qom-get`, `qom-set`: throttle groups and their limits.

use std::sync::Arc;

use heliostat_block::name::is_wellformed_id;
use heliostat_block::throttle::{Counted, Limits, ThrottleGroup};
use serde_json::{Map, Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::{Class, Refusal};
use super::super::schema::filters::LIMITS;
use super::super::schema::{Kind, Member, Need, Origin, Record};
use crate::daemon::{Daemon, DaemonError};

pub(super) fn add(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let id = arguments.required_text("id");
    if !is_wellformed_id(id) {
        return Err(Refusal::new("Parameter 'id' expects an identifier"));
    }
    let mut limits = Limits::default();
    for (key, property) in properties() {
        let name = format!("x-{key}");
        let Some(number) = arguments.int(&name) else { continue };
        let number = u64::try_from(number).map_err(|_| Refusal::new("Property values cannot be negative"))?;
        if matches!(property, Property::Seconds(_)) && u32::try_from(number).is_err() {
            return Err(Refusal::new(format!("{name} value must be in therange [0, 4294967295]")));
        }
        property.set(&mut limits, number);
    }
    if let Some(given) = arguments.object("limits") {
        change(&mut limits, given)?;
    }
    daemon.add_throttle_group(id, limits)?;
    Ok(json!({}))
}

pub(super) fn delete(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    daemon.remove_throttle_group(arguments.required_text("id"))?;
    Ok(json!({}))
}

pub(super) fn get(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let limits = find(daemon, arguments)?.limits();
    let property = arguments.required_text("property");
    match property {
        "type" => Ok(json!("throttle-group")),
        "limits" => {
            let all = LIMITS_ORDER.iter().filter_map(|key| Some((key, Property::named(key)?)));
            let all = all.map(|(key, property)| ((*key).to_owned(), json!(property.get(&limits))));
            Ok(Value::Object(all.collect()))
        }
        _ => {
            let found = property.strip_prefix("x-").and_then(Property::named);
            found.map(|found| json!(found.get(&limits))).ok_or_else(|| no_property(property))
        }
    }
}

pub(super) fn set(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let group = find(daemon, arguments)?;
    let property = arguments.required_text("property");
    if property == "limits" {
        let mut limits = group.limits();
        let mut given = Map::new();
        given.extend(arguments.value("value").map(|value| ("limits".to_owned(), value.clone())));
        let given = Arguments::check(&given, &ALONE)?;
        if let Some(given) = given.object("limits") {
            change(&mut limits, given)?;
        }
        group.set_limits(limits).map_err(DaemonError::from)?;
        return Ok(json!({}));
    }
    Err(match property.strip_prefix("x-").and_then(Property::named) {
        Some(_) => Refusal::new("Property cannot be set after initialization"),
        None if property == "type" => {
            Refusal::new(format!("Property 'throttle-group.{property}' is not writable"))
        }
        None => no_property(property),
    })
}

/// The order in which QEMU shows limits.
const LIMITS_ORDER: [&str; 19] = [
    "bps-read-max-length",
    "iops-read-max-length",
    "bps-read-max",
    "bps-total",
    "iops-total-max-length",
    "iops-total",
    "iops-write-max",
    "bps-write",
    "bps-total-max",
    "bps-write-max",
    "iops-size",
    "iops-read",
    "iops-write-max-length",
    "iops-write",
    "bps-total-max-length",
    "iops-read-max",
    "bps-read",
    "bps-write-max-length",
    "iops-total-max",
];

/// Limits as `qom-set` is given them.
static ALONE: Record = Record {
    members: &[Member {
        name: "limits",
        kind: Kind::Object(&LIMITS),
        need: Need::Required,
        origin: Origin::Qemu,
        about: "the limits",
    }],
    cases: None,
};

fn find(daemon: &Daemon, arguments: Arguments<'_>) -> Result<Arc<ThrottleGroup>, Refusal> {
    let path = arguments.required_text("path");
    let id = path.strip_prefix("/objects/").unwrap_or(path);
    let not_found = || Refusal::of(Class::DeviceNotFound, format!("Device '{path}' not found"));
    daemon.throttle_group(id).ok_or_else(not_found)
}

fn no_property(name: &str) -> Refusal {
    Refusal::new(format!("Property 'throttle-group.{name}' not found"))
}

/// Changes the limits that are given.
fn change(limits: &mut Limits, given: Arguments<'_>) -> Result<(), Refusal> {
    for (key, property) in properties() {
        let Some(number) = given.int(&key) else { continue };
        // What is negative is far beyond what is allowed, and is refused as that.
        let number = number.cast_unsigned();
        if matches!(property, Property::Seconds(_)) && u32::try_from(number).is_err() {
            return Err(Refusal::new(format!("{key} value must be in the range [0, 4294967295]")));
        }
        property.set(limits, number);
    }
    Ok(())
}

/// One number of the limits.
#[derive(Clone, Copy)]
enum Property {
    Rate(Counted),
    BurstRate(Counted),
    Seconds(Counted),
    RequestSize,
}

impl Property {
    fn named(name: &str) -> Option<Self> {
        properties().find(|(key, _)| key == name).map(|(_, property)| property)
    }

    fn get(self, limits: &Limits) -> u64 {
        match self {
            Self::Rate(counted) => limits.get(counted).rate,
            Self::BurstRate(counted) => limits.get(counted).burst_rate,
            Self::Seconds(counted) => limits.get(counted).burst_seconds,
            Self::RequestSize => limits.request_size,
        }
    }

    fn set(self, limits: &mut Limits, number: u64) {
        match self {
            Self::Rate(counted) => limits.get_mut(counted).rate = number,
            Self::BurstRate(counted) => limits.get_mut(counted).burst_rate = number,
            Self::Seconds(counted) => limits.get_mut(counted).burst_seconds = number,
            Self::RequestSize => limits.request_size = number,
        }
    }
}

/// All numbers, with QEMU's names.
fn properties() -> impl Iterator<Item = (String, Property)> {
    let of_one = |counted: Counted| {
        let name = match counted {
            Counted::BytesTotal => "bps-total",
            Counted::BytesRead => "bps-read",
            Counted::BytesWrite => "bps-write",
            Counted::RequestsTotal => "iops-total",
            Counted::RequestsRead => "iops-read",
            Counted::RequestsWrite => "iops-write",
        };
        [
            (name.to_owned(), Property::Rate(counted)),
            (format!("{name}-max"), Property::BurstRate(counted)),
            (format!("{name}-max-length"), Property::Seconds(counted)),
        ]
    };
    let size = ("iops-size".to_owned(), Property::RequestSize);
    Counted::ALL.into_iter().flat_map(of_one).chain(std::iter::once(size))
}
