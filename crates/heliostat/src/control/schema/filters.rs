//! What nodes that pass requests on take, and the objects that they need.

use heliostat_block::debug_event::DebugEvent;

use super::{Cases, Kind, Member, Record, optional, record, required, tls};

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

pub(super) const PREALLOCATE: &[Member] = &[
    required("file", Kind::NodeRef, "the node below"),
    optional("prealloc-align", Kind::Int, "the file's length becomes a multiple of this; default 1 MiB"),
    optional("prealloc-size", Kind::Int, "bytes of room behind what is written; default 128 MiB"),
];

/// The limits of a throttle group.
pub static LIMITS: Record = record(LIMIT_MEMBERS);

/// The limits, each with what stands before its name; and what comes first.
macro_rules! limits {
    ($prefix:literal $(, $first:expr)?) => {
        limits!(
            @each $prefix, [$($first,)?],
            "iops-total" is "requests both ways",
            "iops-read" is "requests read",
            "iops-write" is "requests written",
            "bps-total" is "bytes both ways",
            "bps-read" is "bytes read",
            "bps-write" is "bytes written",
        )
    };
    (@each $prefix:literal, [$($first:expr,)?], $($name:literal is $what:literal,)*) => {
        &[
            $($first,)?
            $(
                optional(
                    concat!($prefix, $name),
                    Kind::Int,
                    concat!($what, " a second; default 0: no limit"),
                ),
                optional(
                    concat!($prefix, $name, "-max"),
                    Kind::Int,
                    concat!($what, " a second while a burst lasts; default 0: no bursts"),
                ),
                optional(
                    concat!($prefix, $name, "-max-length"),
                    Kind::Int,
                    concat!("how many seconds a burst of ", $what, " may last; default 1"),
                ),
            )*
            optional(
                concat!($prefix, "iops-size"),
                Kind::Int,
                "a longer request counts as several, one for each of this many bytes; default 0: never",
            ),
        ]
    };
}

const LIMIT_MEMBERS: &[Member] = limits!("");

const THROTTLE_GROUP: &[Member] = limits!("x-", optional("limits", Kind::Object(&LIMITS), "the limits"));

/// What `object-add` takes.
pub static OBJECT: Record = Record {
    members: &[
        required(
            "qom-type",
            Kind::Word(&["authz-list", "authz-simple", "throttle-group", "tls-creds-x509"]),
            "what kind of object",
        ),
        required("id", Kind::Text, "its id"),
    ],
    cases: Some(Cases {
        tag: "qom-type",
        by_word: &[
            ("authz-list", tls::LIST),
            ("authz-simple", tls::SIMPLE),
            ("throttle-group", THROTTLE_GROUP),
            ("tls-creds-x509", tls::X509),
        ],
    }),
};

/// The path of an object.
const AT: Member = required("path", Kind::Text, "the object: its id, or /objects/ and its id");

/// What `qom-list` takes.
pub static PATH: Record =
    record(&[required("path", Kind::Text, "the object: its id, /objects/ and its id, /objects, or /")]);

/// What `qom-get` takes.
pub static PROPERTY: Record = record(&[AT, required("property", Kind::Text, "the property's name")]);

/// What `qom-set` takes.
pub static NEW_PROPERTY: Record = record(&[
    AT,
    required("property", Kind::Text, "the property's name; only limits, identity, policy, rules"),
    required("value", Kind::Any, "its new value"),
]);

/// What `human-monitor-command` takes.
pub static HUMAN: Record = record(&[
    required("command-line", Kind::Text, "the command"),
    optional("cpu-index", Kind::Int, "accepted, of no effect"),
]);
