//! What `blockdev-create` takes.

use super::{Cases, Kind, Member, Record, optional, record, required};

const PREALLOCATION: Kind = Kind::Word(&["off", "metadata", "falloc", "full"]);

const FILE: &[Member] = &[
    required("filename", Kind::Text, "the path; what is there is replaced"),
    required("size", Kind::Uint64, "how long it is in bytes"),
    optional("preallocation", PREALLOCATION, "what is done about its space; not metadata; default off"),
    optional("nocow", Kind::Flag, "accepted, of no effect"),
    optional("extent-size-hint", Kind::Uint64, "accepted, of no effect"),
];

const QCOW2: &[Member] = &[
    required("file", Kind::NodeRef, "the node that is to hold the image"),
    optional("data-file", Kind::NodeRef, "the node that is to hold its data; default: the image"),
    optional("data-file-raw", Kind::Flag, "the data file is a raw disk at any time; default false"),
    optional("extended-l2", Kind::Flag, "clusters have subclusters; default false"),
    required("size", Kind::Uint64, "the disk's size in bytes"),
    optional("version", Kind::Word(&["v2", "v3"]), "default v3"),
    optional("backing-file", Kind::Text, "the name of what it stands on"),
    optional("backing-fmt", Kind::Word(&["raw", "qcow2"]), "the format of that"),
    optional("encrypt", Kind::Object(&ENCRYPTION), "not supported"),
    optional("cluster-size", Kind::Uint64, "bytes in a cluster; default 65536"),
    optional("preallocation", PREALLOCATION, "how much is there from the start; default off"),
    optional("lazy-refcounts", Kind::Flag, "reference counts may be brought up to date late; default false"),
    optional("refcount-bits", Kind::Int, "bits in a reference count; default 16"),
    optional("compression-type", Kind::Word(&["zlib", "zstd"]), "default zlib"),
];

const DIGEST: Kind = Kind::Word(&["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"]);

const LUKS: &[Member] = &[
    optional("key-secret", Kind::Text, "not supported"),
    optional(
        "cipher-alg",
        Kind::Word(&[
            "aes-128",
            "aes-192",
            "aes-256",
            "des",
            "3des",
            "cast5-128",
            "serpent-128",
            "serpent-192",
            "serpent-256",
            "twofish-128",
            "twofish-192",
            "twofish-256",
            "sm4",
        ]),
        "not supported",
    ),
    optional("cipher-mode", Kind::Word(&["ecb", "cbc", "xts", "ctr"]), "not supported"),
    optional("ivgen-alg", Kind::Word(&["plain", "plain64", "essiv"]), "not supported"),
    optional("ivgen-hash-alg", DIGEST, "not supported"),
    optional("hash-alg", DIGEST, "not supported"),
    optional("iter-time", Kind::Int, "not supported"),
];

static ENCRYPTION: Record = Record {
    members: &[required("format", Kind::Word(&["qcow", "luks"]), "not supported")],
    cases: Some(Cases {
        tag: "format",
        by_word: &[("qcow", &[optional("key-secret", Kind::Text, "not supported")]), ("luks", LUKS)],
    }),
};

static OPTIONS: Record = Record {
    members: &[required(
        "driver",
        Kind::Word(&["file", "qcow2", "raw", "null-co", "host_device"]),
        "the format; only file and qcow2",
    )],
    cases: Some(Cases { tag: "driver", by_word: &[("file", FILE), ("qcow2", QCOW2)] }),
};

/// What `blockdev-create` takes.
pub static CREATE: Record = record(&[
    required("job-id", Kind::Text, "the job's id"),
    required("options", Kind::Object(&OPTIONS), "what is to be made"),
]);
