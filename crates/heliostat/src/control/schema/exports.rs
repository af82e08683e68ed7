//! What NBD servers and exports are made of.

use super::{Cases, Kind, Member, Record, bitmaps, optional, record, required, tls};

static UNIX: Record = record(&[
    required("path", Kind::Text, "the socket's path"),
    optional("abstract", Kind::Flag, "only false"),
    optional("tight", Kind::Flag, "accepted, of no effect"),
]);

static INET: Record = record(&[
    required("host", Kind::Text, "a name or an address of this host"),
    required("port", Kind::Text, "a port's number or name; 0 lets the host choose"),
    optional("numeric", Kind::Flag, "accepted, of no effect"),
    optional("to", Kind::Int, "not supported"),
    optional("ipv4", Kind::Flag, "whether IPv4 addresses may be used"),
    optional("ipv6", Kind::Flag, "whether IPv6 addresses may be used"),
    optional("keep-alive", Kind::Flag, "accepted, always on"),
    optional("mptcp", Kind::Flag, "only false"),
]);

static DESCRIPTOR: Record =
    record(&[required("str", Kind::Text, "a descriptor's number, on the command line only")]);
static VSOCK: Record =
    record(&[required("cid", Kind::Text, "not supported"), required("port", Kind::Text, "not supported")]);

// What the command and the option take alike.
pub(super) const TLS_CREDS: Member =
    optional("tls-creds", Kind::Text, "a server's TLS credentials; clients must use TLS then");
pub(super) const TLS_AUTHZ: Member = optional(
    "tls-authz",
    Kind::Text,
    "the object that says which certificates are let in; only with tls-creds",
);
pub(super) const MAX_CONNECTIONS: Member =
    optional("max-connections", Kind::Uint32, "connections at once; default 100; 0: no bound");

/// Where an NBD server listens.
pub(super) static SOCKET_ADDRESS: Record = Record {
    members: &[required("type", Kind::Word(&["inet", "unix", "vsock", "fd"]), "what kind of address")],
    cases: Some(Cases {
        tag: "type",
        by_word: &[
            ("inet", &[required("data", Kind::Object(&INET), "the address")]),
            ("unix", &[required("data", Kind::Object(&UNIX), "the address")]),
            ("vsock", &[required("data", Kind::Object(&VSOCK), "not supported")]),
            ("fd", &[required("data", Kind::Object(&DESCRIPTOR), "on the command line only")]),
        ],
    }),
};

const NBD_EXPORT: &[Member] = &[
    optional("name", Kind::Text, "what clients ask for; default: the node's name"),
    optional("description", Kind::Text, "a text for clients"),
    optional(
        "bitmaps",
        Kind::List(&bitmaps::NAMED),
        "dirty bitmaps that clients may ask for: names of ones in the node's chain, or with their nodes",
    ),
    optional(
        "allocation-depth",
        Kind::Flag,
        "whether clients may ask in which layer a range is; default false",
    ),
    tls::CLIENTS,
];

/// What `block-export-add` takes.
pub(super) static EXPORT: Record = Record {
    members: &[
        required("type", Kind::Word(&["nbd"]), "the front end"),
        required("id", Kind::Text, "the export's id"),
        optional("fixed-iothread", Kind::Flag, "only false"),
        optional("iothread", Kind::Text, "not supported"),
        required("node-name", Kind::Text, "the node to offer"),
        optional("writable", Kind::Flag, "whether clients may write; default false"),
        optional("writethrough", Kind::Flag, "only false"),
        optional("allow-inactive", Kind::Flag, "accepted, of no effect"),
    ],
    cases: Some(Cases { tag: "type", by_word: &[("nbd", NBD_EXPORT)] }),
};

/// What `nbd-server-add` takes.
pub(super) static NAMED: Record = Record {
    members: &[
        optional("name", Kind::Text, "the export's name and id; default: the device"),
        optional("description", Kind::Text, "a text for clients"),
        required("device", Kind::Text, "the node to offer"),
        optional("writable", Kind::Flag, "whether clients may write, if the node can be; default false"),
        optional("bitmap", Kind::Text, "a dirty bitmap of the node's chain that clients may ask for"),
    ],
    cases: None,
};

pub(super) const UNIX_MEMBERS: &[Member] = UNIX.members;
pub(super) const INET_MEMBERS: &[Member] = INET.members;
pub(super) const VSOCK_MEMBERS: &[Member] = VSOCK.members;
const DESCRIPTOR_MEMBERS: &[Member] = DESCRIPTOR.members;

/// An address as options have it: its members stand beside its type.
static FLAT_ADDRESS: Record = Record {
    members: &[required("type", Kind::Word(&["inet", "unix", "vsock", "fd"]), "what kind of address")],
    cases: Some(Cases {
        tag: "type",
        by_word: &[
            ("inet", INET_MEMBERS),
            ("unix", UNIX_MEMBERS),
            ("vsock", VSOCK_MEMBERS),
            ("fd", DESCRIPTOR_MEMBERS),
        ],
    }),
};

/// What the option `--nbd-server` takes.
pub static NBD_SERVER_OPTIONS: Record = record(&[
    optional("handshake-max-seconds", Kind::Uint32, "how long a client may take to choose its export"),
    TLS_CREDS,
    TLS_AUTHZ,
    MAX_CONNECTIONS,
    required("addr", Kind::Object(&FLAT_ADDRESS), "where it listens"),
]);
