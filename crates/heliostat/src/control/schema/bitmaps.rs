//! What commands on dirty bitmaps take, and `transaction`, which takes several of them.

use super::mirror::{MIRROR, SNAPSHOT, SNAPSHOT_SYNC};
use super::{Cases, Kind, Member, Record, optional, record, required};

/// A bitmap by its node and its name.
pub(super) static NAME: Record = record(&[
    required("node", Kind::Text, "the node that it hangs on"),
    required("name", Kind::Text, "its name"),
]);

/// A bitmap by its name, or also by its node.
pub(super) static NAMED: Kind = Kind::TextOrObject(&NAME, "BlockDirtyBitmapOrStr");

/// A bitmap that is to be made.
pub(super) static ADD: Record = record(&[
    required("node", Kind::Text, "the node that it is to hang on"),
    required("name", Kind::Text, "its name"),
    optional(
        "granularity",
        Kind::Uint32,
        "bytes a bit; a power of two, 512 B to 2 GiB; default: the node's clusters, from 4 to 64 KiB",
    ),
    optional("persistent", Kind::Flag, "keep it in the image; default false"),
    optional("disabled", Kind::Flag, "let it hear of no writes at first; default false"),
]);

/// A bitmap that is to have what others have.
pub(super) static MERGE: Record = record(&[
    required("node", Kind::Text, "the node that the one to change hangs on"),
    required("target", Kind::Text, "the one to change"),
    required(
        "bitmaps",
        Kind::List(&NAMED),
        "the others: names of ones on the same node, or with their nodes",
    ),
]);

const fn changes(takes: &'static Record) -> Member {
    required("data", Kind::Object(takes), "what the command of that name takes")
}

static ACTION: Record = Record {
    members: &[required(
        "type",
        Kind::Word(&[
            "abort",
            "block-dirty-bitmap-add",
            "block-dirty-bitmap-remove",
            "block-dirty-bitmap-clear",
            "block-dirty-bitmap-enable",
            "block-dirty-bitmap-disable",
            "block-dirty-bitmap-merge",
            "blockdev-snapshot",
            "blockdev-snapshot-sync",
            "blockdev-mirror",
        ]),
        "what is to be done: a command, or abort; blockdev-mirror is ours",
    )],
    cases: Some(Cases {
        tag: "type",
        by_word: &[
            ("abort", &[changes(&record(&[]))]),
            ("block-dirty-bitmap-add", &[changes(&ADD)]),
            ("block-dirty-bitmap-remove", &[changes(&NAME)]),
            ("block-dirty-bitmap-clear", &[changes(&NAME)]),
            ("block-dirty-bitmap-enable", &[changes(&NAME)]),
            ("block-dirty-bitmap-disable", &[changes(&NAME)]),
            ("block-dirty-bitmap-merge", &[changes(&MERGE)]),
            ("blockdev-snapshot", &[changes(&SNAPSHOT)]),
            ("blockdev-snapshot-sync", &[changes(&SNAPSHOT_SYNC)]),
            ("blockdev-mirror", &[changes(&MIRROR)]),
        ],
    }),
};

/// Several changes, all or none.
pub(super) static TRANSACTION: Record = record(&[
    required("actions", Kind::List(&Kind::Object(&ACTION)), "what is to be done, in this order"),
    optional(
        "properties",
        Kind::Object(&record(&[optional(
            "completion-mode",
            Kind::Word(&["individual", "grouped"]),
            "whether jobs end together, at one moment, or not at all; default individual; grouped is for mirrors",
        )])),
        "how",
    ),
]);
