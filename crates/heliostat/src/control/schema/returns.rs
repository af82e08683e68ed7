//! What queries answer and events say. Nothing is checked with these: `query-qmp-schema` shows them, and a test holds
//! answers against them.

use super::{Cases, Kind, Member, Need, Origin, Record, optional, ours, record, required};

const fn int(name: &'static str) -> Member {
    required(name, Kind::Int, "")
}

const fn text(name: &'static str) -> Member {
    required(name, Kind::Text, "")
}

const fn flag(name: &'static str) -> Member {
    required(name, Kind::Flag, "")
}

const fn ours_always(name: &'static str, kind: Kind, about: &'static str) -> Member {
    Member { name, kind, need: Need::Required, origin: Origin::Ours, about }
}

const JOB_TYPE: Kind = super::JOB_TYPE;
const IO_STATUS: Kind = Kind::Word(&["ok", "failed", "nospace"]);
const JOB_STATUS: Kind = Kind::Word(&[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]);

static QEMU_VERSION: Record = record(&[int("major"), int("minor"), int("micro")]);

/// `query-version`.
pub(super) static VERSION: Kind =
    Kind::Object(&record(&[required("qemu", Kind::Object(&QEMU_VERSION), ""), text("package")]));

/// `query-commands`.
pub(super) static COMMAND_NAMES: Kind = Kind::List(&Kind::Object(&record(&[text("name")])));

/// `qom-list`.
pub(super) static PROPERTIES: Kind = Kind::List(&Kind::Object(&record(&[
    text("name"),
    text("type"),
    optional("description", Kind::Text, ""),
    optional("default-value", Kind::Any, ""),
])));

static CACHE: Record = record(&[flag("writeback"), flag("direct"), flag("no-flush")]);

static SNAPSHOT: Record = record(&[
    text("id"),
    text("name"),
    int("vm-state-size"),
    int("date-sec"),
    int("date-nsec"),
    int("vm-clock-sec"),
    int("vm-clock-nsec"),
    optional("icount", Kind::Int, ""),
]);

static STORED_BITMAP: Record = record(&[
    text("name"),
    int("granularity"),
    required("flags", Kind::List(&Kind::Word(&["in-use", "auto"])), ""),
]);

static QCOW2: Record = record(&[
    text("compat"),
    optional("data-file", Kind::Text, ""),
    optional("data-file-raw", Kind::Flag, ""),
    optional("extended-l2", Kind::Flag, ""),
    optional("lazy-refcounts", Kind::Flag, ""),
    optional("corrupt", Kind::Flag, ""),
    int("refcount-bits"),
    optional("bitmaps", Kind::List(&Kind::Object(&STORED_BITMAP)), ""),
    required("compression-type", Kind::Word(&["zlib", "zstd"]), ""),
]);

static FILE: Record = record(&[optional("extent-size-hint", Kind::Int, "")]);

static FORMAT_SPECIFIC: Record = Record {
    members: &[required("type", Kind::Word(&["qcow2", "file"]), "")],
    cases: Some(Cases {
        tag: "type",
        by_word: &[
            ("qcow2", &[required("data", Kind::Object(&QCOW2), "")]),
            ("file", &[required("data", Kind::Object(&FILE), "")]),
        ],
    }),
};

static IMAGE: Record = record(&[
    text("filename"),
    text("format"),
    optional("dirty-flag", Kind::Flag, ""),
    optional("actual-size", Kind::Int, ""),
    int("virtual-size"),
    optional("cluster-size", Kind::Int, ""),
    optional("backing-filename", Kind::Text, ""),
    optional("full-backing-filename", Kind::Text, ""),
    optional("backing-filename-format", Kind::Text, ""),
    optional("snapshots", Kind::List(&Kind::Object(&SNAPSHOT)), ""),
    optional("format-specific", Kind::Object(&FORMAT_SPECIFIC), ""),
    optional("backing-image", Kind::Object(&IMAGE), ""),
]);

static BITMAP: Record = record(&[
    optional("name", Kind::Text, ""),
    int("count"),
    int("granularity"),
    flag("recording"),
    flag("busy"),
    flag("persistent"),
    optional("inconsistent", Kind::Flag, ""),
]);

static NODE: Record = record(&[
    text("file"),
    optional("node-name", Kind::Text, ""),
    flag("ro"),
    text("drv"),
    optional("backing_file", Kind::Text, ""),
    int("backing_file_depth"),
    flag("active"),
    flag("encrypted"),
    required("detect_zeroes", Kind::Word(&["off", "on", "unmap"]), ""),
    int("bps"),
    int("bps_rd"),
    int("bps_wr"),
    int("iops"),
    int("iops_rd"),
    int("iops_wr"),
    required("image", Kind::Object(&IMAGE), ""),
    required("cache", Kind::Object(&CACHE), ""),
    int("write_threshold"),
    optional("dirty-bitmaps", Kind::List(&Kind::Object(&BITMAP)), ""),
    ours("nbd", Kind::Object(&CONNECTION), "how the connection to its NBD server is"),
]);

static CONNECTION: Record = record(&[
    required(
        "state",
        Kind::Word(&["opening", "up", "waiting", "down", "changed", "closed"]),
        "waiting: requests wait for the server; down: they fail; changed: so, as what answers is another export",
    ),
    required("for-ms", Kind::Int, "since when, in milliseconds"),
    required("connections", Kind::Int, "in use"),
    required("reconnects", Kind::Int, "how often it came back"),
    required("losses", Kind::Int, "how often what was not flushed may have been lost"),
    optional("reason", Kind::Text, "why it is not up"),
]);

/// `query-named-block-nodes`.
pub(super) static NODES: Kind = Kind::List(&Kind::Object(&NODE));

/// `query-block`. Its list is always empty: there are no devices.
pub(super) static DEVICES: Kind = Kind::List(&Kind::Object(&record(&[
    text("device"),
    optional("qdev", Kind::Text, ""),
    text("type"),
    flag("removable"),
    flag("locked"),
    optional("inserted", Kind::Object(&NODE), ""),
    optional("tray_open", Kind::Flag, ""),
    optional("io-status", IO_STATUS, ""),
])));

/// What is counted of requests. `timed_stats` is always empty.
static COUNTS: Record = record(&[
    int("rd_bytes"),
    int("wr_bytes"),
    int("zone_append_bytes"),
    int("unmap_bytes"),
    int("rd_operations"),
    int("wr_operations"),
    int("zone_append_operations"),
    int("flush_operations"),
    int("unmap_operations"),
    int("rd_total_time_ns"),
    int("wr_total_time_ns"),
    int("zone_append_total_time_ns"),
    int("flush_total_time_ns"),
    int("unmap_total_time_ns"),
    int("wr_highest_offset"),
    int("rd_merged"),
    int("wr_merged"),
    int("zone_append_merged"),
    int("unmap_merged"),
    optional("idle_time_ns", Kind::Int, ""),
    int("failed_rd_operations"),
    int("failed_wr_operations"),
    int("failed_zone_append_operations"),
    int("failed_flush_operations"),
    int("failed_unmap_operations"),
    int("invalid_rd_operations"),
    int("invalid_wr_operations"),
    int("invalid_zone_append_operations"),
    int("invalid_flush_operations"),
    int("invalid_unmap_operations"),
    flag("account_invalid"),
    flag("account_failed"),
    required("timed_stats", Kind::List(&Kind::Object(&TIMED)), ""),
]);

static TIMED: Record = record(&[int("interval_length")]);

const DISCARDS: &[Member] = &[int("discard-nb-ok"), int("discard-nb-failed"), int("discard-bytes-ok")];

static DRIVER_SPECIFIC: Record = Record {
    members: &[required("driver", Kind::Word(&["file", "host_device"]), "")],
    cases: Some(Cases { tag: "driver", by_word: &[("file", DISCARDS), ("host_device", DISCARDS)] }),
};

static STATS: Record = record(&[
    optional("device", Kind::Text, ""),
    optional("node-name", Kind::Text, ""),
    required("stats", Kind::Object(&COUNTS), ""),
    optional("driver-specific", Kind::Object(&DRIVER_SPECIFIC), ""),
    optional("parent", Kind::Object(&STATS), ""),
    optional("backing", Kind::Object(&STATS), ""),
    ours("export", Kind::Text, "the export whose requests were counted"),
]);

/// `query-blockstats`.
pub(super) static BLOCK_STATS: Kind = Kind::List(&Kind::Object(&STATS));

const PERMISSIONS: Kind = Kind::List(&Kind::Word(&["consistent-read", "write", "write-unchanged", "resize"]));

static GRAPH_NODE: Record = record(&[
    int("id"),
    required("type", Kind::Word(&["block-backend", "block-job", "block-driver"]), ""),
    text("name"),
]);

static GRAPH_EDGE: Record = record(&[
    int("parent"),
    int("child"),
    text("name"),
    required("perm", PERMISSIONS, ""),
    required("shared-perm", PERMISSIONS, ""),
]);

/// `x-debug-query-block-graph`.
pub(super) static GRAPH: Kind = Kind::Object(&record(&[
    required("nodes", Kind::List(&Kind::Object(&GRAPH_NODE)), ""),
    required("edges", Kind::List(&Kind::Object(&GRAPH_EDGE)), ""),
]));

/// `query-block-exports`.
pub(super) static EXPORTS: Kind = Kind::List(&Kind::Object(&record(&[
    text("id"),
    required("type", Kind::Word(&["nbd"]), ""),
    text("node-name"),
    flag("shutting-down"),
    ours_always("name", Kind::Text, "what clients ask for"),
])));

/// `query-jobs`.
pub(super) static JOBS: Kind = Kind::List(&Kind::Object(&record(&[
    text("id"),
    required("type", JOB_TYPE, ""),
    required("status", JOB_STATUS, ""),
    int("current-progress"),
    int("total-progress"),
    optional("error", Kind::Text, ""),
])));

static DEGRADED: Record = record(&[text("reason"), int("for-ms")]);

const MIRROR: &[Member] = &[
    flag("actively-synced"),
    ours_always("source", Kind::Text, "the node that is mirrored"),
    ours_always("target", Kind::Text, "the node that it is mirrored to"),
    ours_always("copy-mode", super::COPY_MODE, "what happens to clients' writes"),
    ours_always("dirty-bytes", Kind::Int, "bytes that may differ"),
    ours_always("unscanned", Kind::Int, "bytes that the first pass has not looked at"),
    ours_always("copy-rate", Kind::Int, "bytes copied a second"),
    ours_always("dirty-rate", Kind::Int, "bytes made dirty a second"),
    ours("seconds-left", Kind::Int, "until it is ready, at these rates"),
    ours("no-estimate", Kind::Word(&["no-rate-yet", "not-converging", "paused"]), "why that cannot be said"),
    ours("guest-p99-us-before", Kind::Int, "what 99 of 100 requests stayed within before the job"),
    ours("guest-p99-us-now", Kind::Int, "and lately"),
    ours("last-pause-us", Kind::Int, "how long guests were held at the pivot"),
    ours("group", Kind::List(&Kind::Text), "the jobs that it ends together with, itself among them"),
    ours_always("data-copied", Kind::Int, "bytes of data"),
    ours_always("zeroes-skipped", Kind::Int, "bytes of zeroes that were not copied as data"),
    ours_always("errors-ignored", Kind::Int, "errors that the policy ignored"),
    ours("degraded", Kind::Object(&DEGRADED), "that the target does not answer: guests do not wait for it"),
];

/// `query-block-jobs`.
pub(super) static BLOCK_JOBS: Kind = Kind::List(&Kind::Object(&Record {
    members: &[
        required("type", JOB_TYPE, ""),
        text("device"),
        int("len"),
        int("offset"),
        flag("busy"),
        flag("paused"),
        int("speed"),
        required("io-status", IO_STATUS, ""),
        flag("ready"),
        required("status", JOB_STATUS, ""),
        flag("auto-finalize"),
        flag("auto-dismiss"),
        optional("error", Kind::Text, ""),
    ],
    cases: Some(Cases { tag: "type", by_word: &[("mirror", MIRROR)] }),
}));

static SCHEMA_VALUE: Record = record(&[text("name"), optional("features", Kind::List(&Kind::Text), "")]);

static SCHEMA_MEMBER: Record = record(&[
    text("name"),
    text("type"),
    optional("default", Kind::Any, ""),
    optional("features", Kind::List(&Kind::Text), ""),
]);

static SCHEMA_VARIANT: Record = record(&[text("case"), text("type")]);

/// `query-qmp-schema`.
pub(super) static SCHEMA: Kind = Kind::List(&Kind::Object(&Record {
    members: &[
        text("name"),
        required(
            "meta-type",
            Kind::Word(&["builtin", "enum", "array", "object", "alternate", "command", "event"]),
            "",
        ),
        optional("features", Kind::List(&Kind::Text), ""),
    ],
    cases: Some(Cases {
        tag: "meta-type",
        by_word: &[
            (
                "builtin",
                &[required(
                    "json-type",
                    Kind::Word(&["string", "number", "int", "boolean", "null", "object", "array", "value"]),
                    "",
                )],
            ),
            (
                "enum",
                &[
                    required("members", Kind::List(&Kind::Object(&SCHEMA_VALUE)), ""),
                    required("values", Kind::List(&Kind::Text), ""),
                ],
            ),
            ("array", &[text("element-type")]),
            (
                "object",
                &[
                    required("members", Kind::List(&Kind::Object(&SCHEMA_MEMBER)), ""),
                    optional("tag", Kind::Text, ""),
                    optional("variants", Kind::List(&Kind::Object(&SCHEMA_VARIANT)), ""),
                ],
            ),
            ("alternate", &[required("members", Kind::List(&Kind::Object(&record(&[text("type")]))), "")]),
            ("command", &[text("arg-type"), text("ret-type"), optional("allow-oob", Kind::Flag, "")]),
            ("event", &[text("arg-type")]),
        ],
    }),
}));

/// An event.
#[derive(Debug)]
pub struct EventType {
    /// Its name.
    pub name: &'static str,
    /// What it says.
    pub says: &'static Record,
}

static ENDED: Record =
    record(&[required("type", JOB_TYPE, ""), text("device"), int("len"), int("offset"), int("speed")]);

/// Every event.
pub static EVENTS: &[EventType] = &[
    EventType { name: "JOB_STATUS_CHANGE", says: &record(&[text("id"), required("status", JOB_STATUS, "")]) },
    EventType { name: "BLOCK_JOB_READY", says: &ENDED },
    EventType { name: "BLOCK_JOB_PENDING", says: &record(&[required("type", JOB_TYPE, ""), text("id")]) },
    EventType {
        name: "BLOCK_JOB_COMPLETED",
        says: &record(&[
            required("type", JOB_TYPE, ""),
            text("device"),
            int("len"),
            int("offset"),
            int("speed"),
            optional("error", Kind::Text, ""),
            ours("pause-us", Kind::Int, "how long guests were held at the pivot"),
        ]),
    },
    EventType { name: "BLOCK_JOB_CANCELLED", says: &ENDED },
    EventType {
        name: "BLOCK_JOB_ERROR",
        says: &record(&[
            text("device"),
            required("operation", Kind::Word(&["read", "write"]), ""),
            required("action", Kind::Word(&["ignore", "report", "stop"]), ""),
            ours_always("node-name", Kind::Text, "the node that failed"),
            ours("offset", Kind::Int, "where, in bytes"),
            ours("length", Kind::Int, "how much"),
            ours("errno", Kind::Int, "the host's number of the error"),
        ]),
    },
    EventType {
        name: "BLOCK_JOB_DEGRADED",
        says: &record(&[
            text("device"),
            flag("degraded"),
            optional("reason", Kind::Text, "why the target is thought not to answer"),
        ]),
    },
    EventType { name: "BLOCK_DIRTY_BITMAP_NOT_STORED", says: &record(&[text("node-name"), text("name")]) },
    EventType { name: "BLOCK_EXPORT_DELETED", says: &record(&[text("id")]) },
    EventType {
        name: "BLOCK_IMAGE_CORRUPTED",
        says: &record(&[
            text("device"),
            optional("node-name", Kind::Text, ""),
            text("msg"),
            optional("offset", Kind::Int, ""),
            optional("size", Kind::Int, ""),
            flag("fatal"),
        ]),
    },
];
