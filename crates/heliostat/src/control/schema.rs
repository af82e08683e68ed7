//! What commands take, as tables: the reference from which arguments are checked and documents are made.
//!
//! Names, order and defaults are QEMU's; what is marked [`Origin::Ours`] is not known to it. The order matters:
//! the first argument that is wrong, in this order, is the one that the client hears of.

mod bitmaps;
mod create;
mod exports;
pub mod filters;
mod introspect;
mod mirror;
mod nbd;
mod qcow2;
mod returns;
pub mod tls;

use qcow2::QCOW2;

pub use exports::NBD_SERVER_OPTIONS;
pub use introspect::schema;
pub use returns::{EVENTS, EventType};

/// A command.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// What it takes.
    pub takes: &'static Record,
    /// What it answers.
    pub returns: &'static Kind,
}

/// An object with known members.
#[derive(Debug)]
pub struct Record {
    /// The members that it always has.
    pub members: &'static [Member],
    /// Further ones, by the word in one of those.
    pub cases: Option<Cases>,
}

/// Members that an object has by the word in one of its others.
#[derive(Debug)]
pub struct Cases {
    /// The member with the word.
    pub tag: &'static str,
    /// The members for each word; a word without an entry has none.
    pub by_word: &'static [(&'static str, &'static [Member])],
}

/// A member of an object.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// What it may be.
    pub kind: Kind,
    /// Whether it may be missing.
    pub need: Need,
    /// Who has it.
    pub origin: Origin,
    /// What it means.
    pub about: &'static str,
}

/// Whether a member may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It may not.
    Required,
    /// It may.
    Optional,
}

/// Who has a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// QEMU has it too.
    Qemu,
    /// QEMU has it in a version later than the one that we say we are.
    QemuLater,
    /// Only we have it.
    Ours,
}

/// What a value may be.
#[derive(Debug)]
pub enum Kind {
    /// Anything.
    Any,
    /// Any text.
    Text,
    /// `true` or `false`.
    Flag,
    /// A whole number of 64 bits with a sign.
    Int,
    /// A whole number of 32 bits without a sign.
    Uint32,
    /// A whole number of 64 bits without a sign.
    Uint64,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A list of these.
    List(&'static Kind),
    /// An object.
    Object(&'static Record),
    /// A node's name, or what a node is to be.
    NodeRef,
    /// The same, or `null` for none.
    NodeRefOrNull,
    /// A text, or an object; and QEMU's name of that choice.
    TextOrObject(&'static Record, &'static str),
    /// A word, or an object; and QEMU's name of that choice.
    WordOrObject(&'static [&'static str], &'static Record, &'static str),
}

const fn required(name: &'static str, kind: Kind, about: &'static str) -> Member {
    Member { name, kind, need: Need::Required, origin: Origin::Qemu, about }
}

const fn optional(name: &'static str, kind: Kind, about: &'static str) -> Member {
    Member { name, kind, need: Need::Optional, origin: Origin::Qemu, about }
}

const fn later(name: &'static str, kind: Kind, about: &'static str) -> Member {
    Member { name, kind, need: Need::Optional, origin: Origin::QemuLater, about }
}

const fn ours(name: &'static str, kind: Kind, about: &'static str) -> Member {
    Member { name, kind, need: Need::Optional, origin: Origin::Ours, about }
}

const fn record(members: &'static [Member]) -> Record {
    Record { members, cases: None }
}

static NOTHING: Record = record(&[]);
static NO_ANSWER: Kind = Kind::Object(&NOTHING);

const ON_ERROR: Kind = Kind::Word(&["report", "ignore", "enospc", "stop", "auto"]);
const COPY_MODE: Kind = Kind::Word(&["background", "write-blocking"]);
const JOB_TYPE: Kind = Kind::Word(&[
    "commit",
    "stream",
    "mirror",
    "backup",
    "create",
    "amend",
    "snapshot-load",
    "snapshot-save",
    "snapshot-delete",
]);

static CACHE: Record = record(&[
    optional("direct", Kind::Flag, "pass the host's page cache by; default false"),
    optional("no-flush", Kind::Flag, "ignore flushes: data is lost when the host crashes; default false"),
]);

const FILE: &[Member] = &[
    required("filename", Kind::Text, "the path"),
    optional("pr-manager", Kind::Text, "not supported"),
    optional(
        "locking",
        Kind::Word(&["auto", "on", "off"]),
        "keep other writers out while it is written; default auto: where the file system can",
    ),
    optional("aio", Kind::Word(&["threads", "native", "io_uring"]), "accepted; we choose ourselves"),
    optional("aio-max-batch", Kind::Int, "accepted; we choose ourselves"),
    optional("drop-cache", Kind::Flag, "accepted, of no effect"),
    optional("x-check-cache-dropped", Kind::Flag, "accepted, of no effect"),
];

const RAW: &[Member] = &[
    required("file", Kind::NodeRef, "the node below"),
    optional("offset", Kind::Int, "where in it the node starts, in bytes; default 0"),
    optional("size", Kind::Int, "how long it is in bytes; default: up to the end"),
];

const NULL: &[Member] = &[
    optional("size", Kind::Int, "how long it is in bytes; default 1 GiB"),
    optional("latency-ns", Kind::Uint64, "how long each request takes; default 0"),
    optional("read-zeroes", Kind::Flag, "say that it reads as zero; default false"),
];

/// What a node is to be.
pub static NODE: Record = Record {
    members: &[
        required(
            "driver",
            Kind::Word(&[
                "blkdebug",
                "copy-on-read",
                "file",
                "host_device",
                "nbd",
                "null-aio",
                "null-co",
                "preallocate",
                "qcow2",
                "raw",
                "throttle",
            ]),
            "how the node keeps its bytes",
        ),
        optional("node-name", Kind::Text, "its name; required but for a node below another"),
        optional(
            "discard",
            Kind::Word(&["ignore", "unmap"]),
            "what becomes of space that is no longer needed; default: clients' discards do nothing, but \
             zeroed ranges may become holes",
        ),
        optional("cache", Kind::Object(&CACHE), "how the host's page cache is used"),
        optional("active", Kind::Flag, "only true"),
        optional("read-only", Kind::Flag, "refuse writes; default false"),
        optional(
            "auto-read-only",
            Kind::Flag,
            "open for reading only where the host allows no writing; default false",
        ),
        optional("force-share", Kind::Flag, "take no locks; only for read-only nodes; default false"),
        optional(
            "detect-zeroes",
            Kind::Word(&["off", "on", "unmap"]),
            "what becomes of written data that is all zero; default off",
        ),
    ],
    cases: Some(Cases {
        tag: "driver",
        by_word: &[
            ("blkdebug", filters::BLKDEBUG),
            ("copy-on-read", filters::COPY_ON_READ),
            ("file", FILE),
            ("host_device", FILE),
            ("nbd", nbd::CLIENT),
            ("null-aio", NULL),
            ("null-co", NULL),
            ("preallocate", filters::PREALLOCATE),
            ("qcow2", QCOW2),
            ("raw", RAW),
            ("throttle", filters::THROTTLE),
        ],
    }),
};

static BY_DEVICE: Record = record(&[required("device", Kind::Text, "the job's id")]);
static BY_ID: Record = record(&[required("id", Kind::Text, "the job's id")]);

const fn command(name: &'static str, about: &'static str, takes: &'static Record) -> Command {
    Command { name, about, takes, returns: &NO_ANSWER }
}

const fn query(
    name: &'static str,
    about: &'static str,
    takes: &'static Record,
    returns: &'static Kind,
) -> Command {
    Command { name, about, takes, returns }
}

/// Every command, in the order in which `query-commands` lists them.
pub static COMMANDS: &[Command] = &[
    command(
        "qmp_capabilities",
        "Ends the greeting: from now on commands are taken and events are sent.",
        &record(&[optional("enable", Kind::List(&Kind::Word(&["oob"])), "what of the greeting to use")]),
    ),
    query("query-version", "Says which QEMU we behave as, and who we are.", &NOTHING, &returns::VERSION),
    query("query-commands", "Lists the commands.", &NOTHING, &returns::COMMAND_NAMES),
    query(
        "query-qmp-schema",
        "Says what commands take and answer, and what events say.",
        &NOTHING,
        &returns::SCHEMA,
    ),
    command("quit", "Ends the program in order: jobs are cancelled, everything is flushed.", &NOTHING),
    command("blockdev-add", "Opens a node.", &NODE),
    command("blockdev-reopen", "Changes options of open nodes.", &mirror::REOPEN),
    command(
        "blockdev-del",
        "Flushes and closes a node that nobody uses.",
        &record(&[required("node-name", Kind::Text, "the node")]),
    ),
    command(
        "block_resize",
        "Makes a node longer or shorter; clients of its exports see the new size when they connect again.",
        &record(&[
            optional("device", Kind::Text, "a device; there are none"),
            optional("node-name", Kind::Text, "the node"),
            required("size", Kind::Int, "the new size in bytes"),
        ]),
    ),
    query(
        "query-named-block-nodes",
        "Lists the nodes, newest first.",
        &record(&[optional("flat", Kind::Flag, "leave out what each stands on; default false")]),
        &returns::NODES,
    ),
    query(
        "query-block",
        "Lists devices of a guest. There are none: always empty.",
        &NOTHING,
        &returns::DEVICES,
    ),
    query(
        "query-blockstats",
        "Says what was counted of requests: for each export; with query-nodes, for each node.",
        &record(&[optional("query-nodes", Kind::Flag, "say it of each node; default false")]),
        &returns::BLOCK_STATS,
    ),
    query(
        "x-debug-query-block-graph",
        "Lists nodes and what uses them, and who may do what.",
        &NOTHING,
        &returns::GRAPH,
    ),
    command(
        "nbd-server-start",
        "Starts the NBD server.",
        &record(&[
            optional("handshake-max-seconds", Kind::Uint32, "accepted; we have our own bound"),
            exports::TLS_CREDS,
            exports::TLS_AUTHZ,
            exports::MAX_CONNECTIONS,
            required("addr", Kind::Object(&exports::SOCKET_ADDRESS), "where it listens"),
        ]),
    ),
    command("nbd-server-stop", "Stops the NBD server and removes its exports.", &NOTHING),
    command("nbd-server-add", "Offers a node to clients; older than block-export-add.", &exports::NAMED),
    command(
        "nbd-server-remove",
        "Removes an export; older than block-export-del.",
        &record(&[
            required("name", Kind::Text, "the export's id"),
            optional(
                "mode",
                Kind::Word(&["safe", "hard"]),
                "safe: only without clients; hard: disconnect them; default safe",
            ),
        ]),
    ),
    command("block-export-add", "Offers a node to clients.", &exports::EXPORT),
    command(
        "block-export-del",
        "Removes an export.",
        &record(&[
            required("id", Kind::Text, "the export's id"),
            optional(
                "mode",
                Kind::Word(&["safe", "hard"]),
                "safe: only without clients; hard: disconnect them; default safe",
            ),
        ]),
    ),
    query("query-block-exports", "Lists the exports, newest first.", &NOTHING, &returns::EXPORTS),
    command(
        "blockdev-create",
        "Makes an image, as a job that is dismissed when it has concluded.",
        &create::CREATE,
    ),
    command("blockdev-snapshot", "Puts an open overlay in a node's place, on top of it.", &mirror::SNAPSHOT),
    command("blockdev-snapshot-sync", "The same, with one that it makes or opens.", &mirror::SNAPSHOT_SYNC),
    command("blockdev-mirror", "Starts a mirror.", &mirror::MIRROR),
    command("drive-mirror", "Starts a mirror to a file that it makes or opens.", &mirror::DRIVE_MIRROR),
    command("block-job-pause", "Stops a job's copying for a while.", &BY_DEVICE),
    command("block-job-resume", "Lets a paused job go on.", &BY_DEVICE),
    command(
        "block-job-cancel",
        "Ends a job; a mirror that is ready leaves a consistent copy unless forced.",
        &record(&[
            required("device", Kind::Text, "the job's id"),
            optional("force", Kind::Flag, "end at once, the target promising nothing; default false"),
        ]),
    ),
    command("block-job-complete", "Lets a mirror's target take the source's place.", &BY_DEVICE),
    command(
        "block-job-set-speed",
        "Changes a job's limit.",
        &record(&[
            required("device", Kind::Text, "the job's id"),
            required("speed", Kind::Int, "bytes a second; 0: no limit"),
        ]),
    ),
    command("block-job-finalize", "Ends a pending job.", &BY_ID),
    command("block-job-dismiss", "Forgets a job that has ended.", &BY_ID),
    command(
        "block-job-change",
        "Changes a running mirror's copy mode.",
        &Record {
            members: &[
                required("id", Kind::Text, "the job's id"),
                required("type", JOB_TYPE, "the job's type"),
            ],
            cases: Some(Cases {
                tag: "type",
                by_word: &[(
                    "mirror",
                    &[required("copy-mode", COPY_MODE, "the new copy mode"), mirror::TARGET_DEADLINE],
                )],
            }),
        },
    ),
    command("job-pause", "As block-job-pause.", &BY_ID),
    command("job-resume", "As block-job-resume.", &BY_ID),
    command("job-cancel", "As block-job-cancel with force.", &BY_ID),
    command("job-complete", "As block-job-complete.", &BY_ID),
    command("job-finalize", "As block-job-finalize.", &BY_ID),
    command("job-dismiss", "As block-job-dismiss.", &BY_ID),
    query(
        "query-block-jobs",
        "Lists the jobs, newest first, with their figures.",
        &NOTHING,
        &returns::BLOCK_JOBS,
    ),
    query("query-jobs", "Lists the jobs, newest first.", &NOTHING, &returns::JOBS),
    command("object-add", "Makes an object.", &filters::OBJECT),
    command(
        "object-del",
        "Forgets an object that nobody uses.",
        &record(&[required("id", Kind::Text, "the object's id")]),
    ),
    query("qom-list", "Lists the properties of an object.", &filters::PATH, &returns::PROPERTIES),
    query("qom-get", "Says what a property of an object is.", &filters::PROPERTY, &Kind::Any),
    command("qom-set", "Changes a property of an object.", &filters::NEW_PROPERTY),
    query(
        "human-monitor-command",
        "Carries out a command of QEMU's human monitor and answers its text; only qemu-io.",
        &filters::HUMAN,
        &Kind::Text,
    ),
    command(
        "transaction",
        "Does several things, or none of them; bitmaps and snapshots of all disks at one moment.",
        &bitmaps::TRANSACTION,
    ),
    command("block-dirty-bitmap-add", "Makes a dirty bitmap.", &bitmaps::ADD),
    command(
        "block-dirty-bitmap-remove",
        "Removes a dirty bitmap; a persistent one from its image, when that is closed.",
        &bitmaps::NAME,
    ),
    command("block-dirty-bitmap-clear", "Forgets what a dirty bitmap has recorded.", &bitmaps::NAME),
    command("block-dirty-bitmap-enable", "Lets a dirty bitmap hear of writes.", &bitmaps::NAME),
    command("block-dirty-bitmap-disable", "Lets a dirty bitmap hear of writes no more.", &bitmaps::NAME),
    command("block-dirty-bitmap-merge", "Adds what some dirty bitmaps have to another.", &bitmaps::MERGE),
];

/// Finds a command.
#[must_use]
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}
