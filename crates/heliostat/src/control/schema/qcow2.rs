//! What a node in a qcow2 image takes. Part of [`super::NODE`].

use super::*;

const OVERLAPS: Kind = Kind::Word(&["none", "constant", "cached", "all"]);
static OVERLAP_FLAGS: Record = record(&[
    optional("template", OVERLAPS, "accepted, all are always checked"),
    optional("main-header", Kind::Flag, "accepted, always checked"),
    optional("active-l1", Kind::Flag, "accepted, always checked"),
    optional("active-l2", Kind::Flag, "accepted, always checked"),
    optional("refcount-table", Kind::Flag, "accepted, always checked"),
    optional("refcount-block", Kind::Flag, "accepted, always checked"),
    optional("snapshot-table", Kind::Flag, "accepted, always checked"),
    optional("inactive-l1", Kind::Flag, "accepted, always checked"),
    optional("inactive-l2", Kind::Flag, "accepted, of no effect"),
    optional("bitmap-directory", Kind::Flag, "accepted, of no effect"),
]);

const KEY: &[Member] = &[optional("key-secret", Kind::Text, "not supported")];
static ENCRYPTION: Record = Record {
    members: &[required("format", Kind::Word(&["aes", "luks"]), "not supported")],
    cases: Some(Cases { tag: "format", by_word: &[("aes", KEY), ("luks", KEY)] }),
};

pub(super) const QCOW2: &[Member] = &[
    required("file", Kind::NodeRef, "the node that holds the image"),
    optional(
        "backing",
        Kind::NodeRefOrNull,
        "what the image stands on; null: nothing; default: the file that it names, if the gate for such names allows \
         that",
    ),
    optional("lazy-refcounts", Kind::Flag, "accepted, of no effect: reference counts are always up to date"),
    optional("pass-discard-request", Kind::Flag, "accepted; follows `discard`"),
    optional("pass-discard-snapshot", Kind::Flag, "accepted, of no effect"),
    optional("pass-discard-other", Kind::Flag, "accepted; always on"),
    optional("discard-no-unref", Kind::Flag, "accepted, of no effect"),
    optional(
        "overlap-check",
        Kind::WordOrObject(&["none", "constant", "cached", "all"], &OVERLAP_FLAGS, "Qcow2OverlapChecks"),
        "accepted; what is cheap to know is always checked",
    ),
    optional(
        "cache-size",
        Kind::Int,
        "memory for all tables in bytes; default: what the image needs, to 32 MiB",
    ),
    optional("l2-cache-size", Kind::Int, "memory for the mapping; counts towards the whole"),
    optional("l2-cache-entry-size", Kind::Int, "accepted; we choose ourselves"),
    optional("refcount-cache-size", Kind::Int, "memory for reference counts; counts towards the whole"),
    optional("cache-clean-interval", Kind::Int, "accepted, of no effect"),
    optional("encrypt", Kind::Object(&ENCRYPTION), "not supported"),
    optional(
        "data-file",
        Kind::NodeRef,
        "the node that holds the data; default: the file that the image names",
    ),
];
