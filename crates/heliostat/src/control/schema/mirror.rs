//! What mirrors, snapshots and changes of open nodes take.

use super::{COPY_MODE, Kind, Member, NODE, ON_ERROR, Record, later, optional, ours, record, required};

// What both kinds of mirror take.
const JOB_ID: Member =
    optional("job-id", Kind::Text, "the job's id; default: the export's, where the source is named by one");
const DEVICE: Member =
    required("device", Kind::Text, "the source: the name of a node, or the id of an export of it");
const REPLACES: Member =
    optional("replaces", Kind::Text, "the node whose place the target takes; only the source");
const SYNC: Member = required(
    "sync",
    Kind::Word(&["top", "full", "none", "incremental", "bitmap"]),
    "what the first pass copies; incremental and bitmap need a bitmap, which is ours",
);
const SPEED: Member = optional("speed", Kind::Int, "bytes a second; default 0: no limit");
const GRANULARITY: Member = optional(
    "granularity",
    Kind::Uint32,
    "bytes a dirty bit; a power of two, 512 B to 64 MiB; default: the target's clusters, from 4 to 64 KiB",
);
const BUF_SIZE: Member = optional("buf-size", Kind::Int, "bytes of copies in flight; default 16 MiB");
const ON_SOURCE_ERROR: Member =
    optional("on-source-error", ON_ERROR, "what to do when the source cannot be read; default report");
const ON_TARGET_ERROR: Member =
    optional("on-target-error", ON_ERROR, "what to do when the target cannot be written; default report");
const UNMAP: &str = "zeroes may become holes on the target; default true";
const HOW_TO_COPY: Member =
    optional("copy-mode", COPY_MODE, "what happens to clients' writes meanwhile; default background");
const AUTO_FINALIZE: Member =
    optional("auto-finalize", Kind::Flag, "end when it may, without `job-finalize`; default true");
const AUTO_DISMISS: Member = optional(
    "auto-dismiss",
    Kind::Flag,
    "be forgotten when it has ended, without `job-dismiss`; default true",
);
const BITMAP: Member =
    ours("bitmap", Kind::Text, "a dirty bitmap of the source: what to copy, or what to keep up to date");
const BITMAP_MODE: Member = ours(
    "bitmap-mode",
    Kind::Word(&["on-success", "never", "always"]),
    "when the bitmap takes note of what was copied",
);

pub(super) const TARGET_DEADLINE: Member = ours(
    "target-deadline-ms",
    Kind::Uint32,
    "how long a client's write waits for the target, in write-blocking mode; after that the job is degraded; default 1000",
);

/// Whether a file is made.
const MODE: Kind = Kind::Word(&["existing", "absolute-paths"]);

pub(super) static DRIVE_MIRROR: Record = record(&[
    JOB_ID,
    DEVICE,
    required(
        "target",
        Kind::Text,
        "the target: a path, `file:PATH`, `null-co://`, or `json:` and what `blockdev-add` takes",
    ),
    optional(
        "format",
        Kind::Text,
        "the target's format; default: the source's, or, of an existing one, what it looks like",
    ),
    optional("node-name", Kind::Text, "the name of the target's node"),
    REPLACES,
    SYNC,
    optional(
        "mode",
        MODE,
        "existing: use what is there; absolute-paths: make it, whatever is there, on what the source stands on \
         (top) or on the source (none); default absolute-paths",
    ),
    SPEED,
    GRANULARITY,
    BUF_SIZE,
    ON_SOURCE_ERROR,
    ON_TARGET_ERROR,
    optional("unmap", Kind::Flag, UNMAP),
    HOW_TO_COPY,
    AUTO_FINALIZE,
    AUTO_DISMISS,
    BITMAP,
    BITMAP_MODE,
    TARGET_DEADLINE,
]);

pub(super) static MIRROR: Record = record(&[
    JOB_ID,
    DEVICE,
    required("target", Kind::Text, "the target: a node's name"),
    REPLACES,
    SYNC,
    SPEED,
    GRANULARITY,
    BUF_SIZE,
    ON_SOURCE_ERROR,
    ON_TARGET_ERROR,
    optional("filter-node-name", Kind::Text, "a name to keep free; there is no filter node"),
    HOW_TO_COPY,
    AUTO_FINALIZE,
    AUTO_DISMISS,
    later("target-is-zero", Kind::Flag, "the target is known to read as zero; default false"),
    ours("unmap", Kind::Flag, UNMAP),
    BITMAP,
    BITMAP_MODE,
    TARGET_DEADLINE,
]);

pub(super) static SNAPSHOT: Record = record(&[
    required("node", Kind::Text, "the node that clients leave"),
    required("overlay", Kind::Text, "the node that they go to: an image that stands on nothing"),
]);

pub(super) static SNAPSHOT_SYNC: Record = record(&[
    optional("device", Kind::Text, "the id of an export of the node"),
    optional("node-name", Kind::Text, "the node"),
    required("snapshot-file", Kind::Text, "the overlay's path"),
    optional("snapshot-node-name", Kind::Text, "the name of the overlay's node; needed with `node-name`"),
    optional("format", Kind::Text, "the overlay's format; default qcow2"),
    optional(
        "mode",
        MODE,
        "existing: use what is there; absolute-paths: make it, whatever is there; default absolute-paths",
    ),
]);

pub(super) static REOPEN: Record = record(&[required(
    "options",
    Kind::List(&Kind::Object(&NODE)),
    "the nodes, as `blockdev-add` takes them; what is not said goes back to its default, all change or none; a file \
     and how it is opened stay",
)]);
