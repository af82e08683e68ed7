//! `object-add`, `object-del`, `qom-list`, `qom-get`, `qom-set`: throttle groups and their limits, the objects of TLS,
//! and where they stand.

use std::sync::Arc;

use heliostat_block::name::is_wellformed_id;
use heliostat_block::throttle::{Counted, Limits, ThrottleGroup};
use serde_json::{Map, Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::{Class, Refusal};
use super::super::schema::filters::LIMITS;
use super::super::schema::{Kind, Member, Need, Origin, Record};
use super::tls;
use crate::daemon::{Daemon, DaemonError};

pub(super) fn add(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let id = arguments.required_text("id");
    if !is_wellformed_id(id) {
        return Err(Refusal::new("Parameter 'id' expects an identifier"));
    }
    let kind = arguments.required_text("qom-type");
    if kind != "throttle-group" {
        tls::add(daemon, kind, id, arguments)?;
        return Ok(json!({}));
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
    daemon.remove_object(arguments.required_text("id"))?;
    Ok(json!({}))
}

pub(super) fn list(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let path = arguments.required_text("path");
    let object = find(daemon, path).map_err(|lost| match lost {
        Lost::Ambiguous => Refusal::new(format!("Path '{path}' is ambiguous")),
        Lost::NotFound => not_found(path),
    })?;
    let properties = object.properties(daemon);
    Ok(properties.into_iter().map(|(name, kind)| json!({ "name": name, "type": kind })).collect())
}

pub(super) fn get(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let path = arguments.required_text("path");
    // QEMU tells of ambiguity only who lists.
    let object = find(daemon, path).map_err(|_| not_found(path))?;
    let property = arguments.required_text("property");
    if property == "type" {
        return Ok(json!(object.kind()));
    }
    if let Object::Tls(_, object_of_it) = &object {
        return tls::get(object_of_it, property).ok_or_else(|| object.lacks(property));
    }
    let Object::Group(group) = &object else {
        return match object.has(daemon, property) {
            true => Ok(json!(format!("{}/{property}", object.path()))),
            false => Err(object.lacks(property)),
        };
    };
    let limits = group.limits();
    if property == "limits" {
        let all = LIMITS_ORDER.iter().filter_map(|key| Some((key, Property::named(key)?)));
        let all = all.map(|(key, property)| ((*key).to_owned(), json!(property.get(&limits))));
        return Ok(Value::Object(all.collect()));
    }
    let found = property.strip_prefix("x-").and_then(Property::named);
    found.map(|found| json!(found.get(&limits))).ok_or_else(|| object.lacks(property))
}

pub(super) fn set(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let path = arguments.required_text("path");
    // QEMU tells of ambiguity only who lists.
    let object = find(daemon, path).map_err(|_| not_found(path))?;
    let property = arguments.required_text("property");
    if let (Object::Group(group), "limits") = (&object, property) {
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
    if let Object::Tls(id, object) = &object
        && let Some(done) = tls::set(daemon, id, object, property, arguments.value("value"))
    {
        return done.map(|()| json!({}));
    }
    Err(match (&object, property) {
        _ if !object.has(daemon, property) => object.lacks(property),
        (Object::Group(_) | Object::Tls(..), other) if other != "type" => {
            Refusal::new("Property cannot be set after initialization")
        }
        _ => Refusal::new(format!("Property '{}.{property}' is not writable", object.kind())),
    })
}

/// What has a path. QEMU has containers for chardevs and for its own things beside these.
enum Object {
    Root,
    Objects,
    Group(Arc<ThrottleGroup>),
    /// One of those that TLS needs, with its id.
    Tls(String, crate::daemon::Object),
}

impl Object {
    /// QEMU's name of its type.
    fn kind(&self) -> &'static str {
        match self {
            Self::Tls(_, object) => tls::kind(object),
            Self::Root | Self::Objects => "container",
            Self::Group(_) => "throttle-group",
        }
    }

    /// The path of a container, but for the root's, which is a slash alone.
    const fn path(&self) -> &'static str {
        match self {
            Self::Objects => "/objects",
            Self::Root | Self::Group(_) | Self::Tls(..) => "",
        }
    }

    /// Its properties, each with QEMU's name of what it may be.
    fn properties(&self, daemon: &Daemon) -> Vec<(String, &'static str)> {
        let own = |name: &str| match name {
            "limits" => (name.to_owned(), "ThrottleLimits"),
            _ => (format!("x-{name}"), "int"),
        };
        let mut properties = vec![("type".to_owned(), "string")];
        match self {
            Self::Root => properties.push(("objects".to_owned(), "child<container>")),
            Self::Objects => {
                let groups = daemon.throttle_groups().into_iter();
                properties.extend(groups.map(|id| (id, "child<throttle-group>")));
                let others = daemon.objects().into_iter();
                properties.extend(others.map(|(id, object)| (id, tls::child(&object))));
            }
            Self::Tls(_, object) => {
                let own = tls::properties(object).iter();
                properties.extend(own.map(|(name, kind)| ((*name).to_owned(), *kind)));
            }
            Self::Group(_) => properties.extend(PROPERTIES_ORDER.into_iter().map(own)),
        }
        properties
    }

    fn has(&self, daemon: &Daemon, property: &str) -> bool {
        self.properties(daemon).iter().any(|(name, _)| name == property)
    }

    fn lacks(&self, property: &str) -> Refusal {
        Refusal::new(format!("Property '{}.{property}' not found", self.kind()))
    }
}

/// Why a path means no object.
enum Lost {
    Ambiguous,
    NotFound,
}

/// The object that a path means: from the root on, or, without a slash at its beginning, the end of one.
fn find(daemon: &Daemon, path: &str) -> Result<Object, Lost> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    let is_absolute = path.starts_with('/');
    let group = |id: &str| {
        let group = daemon.throttle_group(id).map(Object::Group);
        group.or_else(|| daemon.object(id).map(|object| Object::Tls(id.to_owned(), object)))
    };
    let (container, group) = match parts[..] {
        [] if is_absolute => (Some(Object::Root), None),
        // The end of any path.
        [] => return Err(Lost::Ambiguous),
        ["objects"] if is_absolute => (Some(Object::Objects), None),
        ["objects"] => (Some(Object::Objects), group("objects")),
        ["objects", id] => (None, group(id)),
        [id] if !is_absolute => (None, group(id)),
        _ => (None, None),
    };
    match (container, group) {
        (Some(_), Some(_)) => Err(Lost::Ambiguous),
        (Some(found), None) | (None, Some(found)) => Ok(found),
        (None, None) => Err(Lost::NotFound),
    }
}

fn not_found(path: &str) -> Refusal {
    Refusal::of(Class::DeviceNotFound, format!("Device '{path}' not found"))
}

/// The order in which QEMU lists a throttle group's properties; all but one carry a prefix there.
const PROPERTIES_ORDER: [&str; 20] = [
    "bps-write-max-length",
    "iops-total-max-length",
    "iops-size",
    "limits",
    "bps-total",
    "iops-read-max-length",
    "bps-write",
    "iops-write-max-length",
    "bps-read-max",
    "iops-read-max",
    "bps-total-max",
    "bps-read-max-length",
    "iops-read",
    "bps-read",
    "bps-write-max",
    "iops-total-max",
    "iops-total",
    "iops-write",
    "bps-total-max-length",
    "iops-write-max",
];

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
