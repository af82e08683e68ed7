//! What nodes that pass requests on take, and the objects that they need.

use heliostat_block::debug_event::DebugEvent;

use super::{Cases, Kind, Member, Record, optional, record, required};

const EVENT: Kind = Kind::Word(DebugEvent::NAMES);
const PERMISSIONS: Kind = Kind::List(&Kind::Word(&["consistent-read", "write", "write-unchanged", "resize"]));

static INJECT_ERROR: Kind = Kind::Object(&INJECT_ERROR_MEMBERS);
static INJECT_ERROR_MEMBERS: Record = record(&[
    required("event", EVENT, "what makes the rule active"),
    optional("state", Kind::Int, "only in this state; default 0: in all"),
    optional(
        "iotype",
        Kind::Word(&["read", "write", "write-zeroes", "discard", "flush", "block-status"]),
        "which requests fail; default: all but block-status",
    ),
    optional("errno", Kind::Int, "with which error number; default 5 (EIO)"),
    optional("sector", Kind::Int, "only those that touch this sector; default -1: all"),
    optional("once", Kind::Flag, "only the first; default false"),
    optional("immediately", Kind::Flag, "fail at once, before other requests have their turn; default false"),
]);

static SET_STATE: Kind = Kind::Object(&SET_STATE_MEMBERS);
static SET_STATE_MEMBERS: Record = record(&[
    required("event", EVENT, "when"),
    optional("state", Kind::Int, "only in this state; default 0: in all"),
    required("new_state", Kind::Int, "the state from then on; the first one is 1"),
]);

pub(super) static BLKDEBUG: &[Member] = &[
    required("image", Kind::NodeRef, "the node below"),
    optional("config", Kind::Text, "a file with more rules"),
    optional("align", Kind::Int, "what requests must be multiples of, a power of two"),
    optional("max-transfer", Kind::Int, "the most that is read or written at once"),
    optional("opt-write-zero", Kind::Int, "what zeroing is a multiple of; the rest is written as data"),
    optional("max-write-zero", Kind::Int, "the most that is zeroed at once"),
    optional("opt-discard", Kind::Int, "what discards are a multiple of; the rest is not discarded"),
    optional("max-discard", Kind::Int, "the most that is discarded at once"),
    optional("inject-error", Kind::List(&INJECT_ERROR), "requests that fail"),
    optional("set-state", Kind::List(&SET_STATE), "what changes the state"),
    optional("take-child-perms", PERMISSIONS, "what it asks for below; resize leaves no room for readers"),
    optional("unshare-child-perms", PERMISSIONS, "what others may not; consistent-read keeps readers out"),
];

pub(super) const THROTTLE: &[Member] = &[
    required("throttle-group", Kind::Text, "the id of the group whose limits they are"),
    required("file", Kind::NodeRef, "the node below"),
];

pub(super) const COPY_ON_READ: &[Member] = &[
    required("file", Kind::NodeRef, "the node below"),
    optional("bottom", Kind::Text, "the lowest layer from which is copied; default: all"),
];

/// The limits of a throttle group.
pub static LIMITS: Record = record(LIMIT_MEMBERS);

const LIMIT_MEMBERS: &[Member] = &[
    optional("iops-total", Kind::Int, "requests both ways a second; default 0: no limit"),
    optional(
        "iops-total-max",
        Kind::Int,
        "requests both ways a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "iops-total-max-length",
        Kind::Int,
        "how many seconds a burst of requests both ways may last; default 1",
    ),
    optional("iops-read", Kind::Int, "requests read a second; default 0: no limit"),
    optional("iops-read-max", Kind::Int, "requests read a second while a burst lasts; default 0: no bursts"),
    optional(
        "iops-read-max-length",
        Kind::Int,
        "how many seconds a burst of requests read may last; default 1",
    ),
    optional("iops-write", Kind::Int, "requests written a second; default 0: no limit"),
    optional(
        "iops-write-max",
        Kind::Int,
        "requests written a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "iops-write-max-length",
        Kind::Int,
        "how many seconds a burst of requests written may last; default 1",
    ),
    optional("bps-total", Kind::Int, "bytes both ways a second; default 0: no limit"),
    optional(
        "bps-total-max",
        Kind::Int,
        "bytes both ways a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "bps-total-max-length",
        Kind::Int,
        "how many seconds a burst of bytes both ways may last; default 1",
    ),
    optional("bps-read", Kind::Int, "bytes read a second; default 0: no limit"),
    optional("bps-read-max", Kind::Int, "bytes read a second while a burst lasts; default 0: no bursts"),
    optional("bps-read-max-length", Kind::Int, "how many seconds a burst of bytes read may last; default 1"),
    optional("bps-write", Kind::Int, "bytes written a second; default 0: no limit"),
    optional("bps-write-max", Kind::Int, "bytes written a second while a burst lasts; default 0: no bursts"),
    optional(
        "bps-write-max-length",
        Kind::Int,
        "how many seconds a burst of bytes written may last; default 1",
    ),
    optional(
        "iops-size",
        Kind::Int,
        "a longer request counts as several, one for each of this many bytes; default 0: never",
    ),
];

const THROTTLE_GROUP: &[Member] = &[
    optional("limits", Kind::Object(&LIMITS), "the limits"),
    optional("x-iops-total", Kind::Int, "requests both ways a second; default 0: no limit"),
    optional(
        "x-iops-total-max",
        Kind::Int,
        "requests both ways a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "x-iops-total-max-length",
        Kind::Int,
        "how many seconds a burst of requests both ways may last; default 1",
    ),
    optional("x-iops-read", Kind::Int, "requests read a second; default 0: no limit"),
    optional(
        "x-iops-read-max",
        Kind::Int,
        "requests read a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "x-iops-read-max-length",
        Kind::Int,
        "how many seconds a burst of requests read may last; default 1",
    ),
    optional("x-iops-write", Kind::Int, "requests written a second; default 0: no limit"),
    optional(
        "x-iops-write-max",
        Kind::Int,
        "requests written a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "x-iops-write-max-length",
        Kind::Int,
        "how many seconds a burst of requests written may last; default 1",
    ),
    optional("x-bps-total", Kind::Int, "bytes both ways a second; default 0: no limit"),
    optional(
        "x-bps-total-max",
        Kind::Int,
        "bytes both ways a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "x-bps-total-max-length",
        Kind::Int,
        "how many seconds a burst of bytes both ways may last; default 1",
    ),
    optional("x-bps-read", Kind::Int, "bytes read a second; default 0: no limit"),
    optional("x-bps-read-max", Kind::Int, "bytes read a second while a burst lasts; default 0: no bursts"),
    optional(
        "x-bps-read-max-length",
        Kind::Int,
        "how many seconds a burst of bytes read may last; default 1",
    ),
    optional("x-bps-write", Kind::Int, "bytes written a second; default 0: no limit"),
    optional(
        "x-bps-write-max",
        Kind::Int,
        "bytes written a second while a burst lasts; default 0: no bursts",
    ),
    optional(
        "x-bps-write-max-length",
        Kind::Int,
        "how many seconds a burst of bytes written may last; default 1",
    ),
    optional(
        "x-iops-size",
        Kind::Int,
        "a longer request counts as several, one for each of this many bytes; default 0: never",
    ),
];

/// What `object-add` takes.
pub static OBJECT: Record = Record {
    members: &[
        required("qom-type", Kind::Word(&["throttle-group"]), "what kind of object"),
        required("id", Kind::Text, "its id"),
    ],
    cases: Some(Cases { tag: "qom-type", by_word: &[("throttle-group", THROTTLE_GROUP)] }),
};

/// What `qom-get` takes.
pub static PROPERTY: Record = record(&[
    required("path", Kind::Text, "the object: its id, or /objects/ and its id"),
    required("property", Kind::Text, "the property's name"),
]);

/// What `qom-set` takes.
pub static NEW_PROPERTY: Record = record(&[
    required("path", Kind::Text, "the object: its id, or /objects/ and its id"),
    required("property", Kind::Text, "the property's name; only limits"),
    required("value", Kind::Any, "its new value"),
]);

/// What `human-monitor-command` takes.
pub static HUMAN: Record = record(&[
    required("command-line", Kind::Text, "the command"),
    optional("cpu-index", Kind::Int, "accepted, of no effect"),
]);
