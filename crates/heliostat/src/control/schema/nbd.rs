//! What a node in an export of an NBD server takes.

use super::{Cases, Kind, Member, Record, exports, optional, ours, required};

const DESCRIPTOR: &[Member] =
    &[required("str", Kind::Text, "the number of a connected socket that the process was started with")];

/// Where a server is: its members stand beside its type.
static SERVER: Record = Record {
    members: &[required("type", Kind::Word(&["inet", "unix", "vsock", "fd"]), "what kind of address")],
    cases: Some(Cases {
        tag: "type",
        by_word: &[
            ("inet", exports::INET_MEMBERS),
            ("unix", exports::UNIX_MEMBERS),
            ("vsock", exports::VSOCK_MEMBERS),
            ("fd", DESCRIPTOR),
        ],
    }),
};

pub(super) const CLIENT: &[Member] = &[
    required("server", Kind::Object(&SERVER), "where the server is"),
    optional("export", Kind::Text, "the export's name; default: the server's default export"),
    optional("tls-creds", Kind::Text, "a client's TLS credentials; the connections are private then"),
    optional(
        "tls-hostname",
        Kind::Text,
        "the name that the server's certificate must be for; default: the server's address",
    ),
    optional(
        "x-dirty-bitmap",
        Kind::Text,
        "a metadata context that is asked for instead of base:allocation, such as qemu:dirty-bitmap:NAME; the node \
         shows what it says instead of what is allocated",
    ),
    optional(
        "reconnect-delay",
        Kind::Uint32,
        "seconds that requests wait for a server that was lost, before they fail; attempts go on; default 0",
    ),
    optional("open-timeout", Kind::Uint32, "seconds of attempts for the first connection; default 0: one"),
    ours("bitmap", Kind::Text, "the same as x-dirty-bitmap, for a bitmap's name alone"),
];
