//! What the objects of TLS take: credentials, and who is let in.

use super::{Kind, Member, Record, optional, ours, record, required};

pub(super) const X509: &[Member] = &[
    optional(
        "verify-peer",
        Kind::Flag,
        "whether the other side must show a certificate that is verified; default true",
    ),
    optional("dir", Kind::Text, "the folder with ca-cert.pem, ca-crl.pem, server-cert.pem and so on"),
    optional("endpoint", Kind::Word(&["client", "server"]), "which side it is for; default client"),
    optional("priority", Kind::Text, "not supported: it is GnuTLS's"),
    optional("sanity-check", Kind::Flag, "accepted, of no effect: certificates are always checked"),
    optional("passwordid", Kind::Text, "not supported: keys must not be encrypted"),
];

pub(super) const SIMPLE: &[Member] =
    &[required("identity", Kind::Text, "the distinguished name that is let in: C=GB,O=Example,CN=client")];

static RULE: Kind = Kind::Object(&RULE_MEMBERS);
static RULE_MEMBERS: Record = record(&[
    required("match", Kind::Text, "a distinguished name, or a pattern for some"),
    required("policy", Kind::Word(&["deny", "allow"]), "what becomes of those it fits"),
    optional("format", Kind::Word(&["exact", "glob"]), "how it is compared; default exact"),
]);

const POLICY: Member =
    optional("policy", Kind::Word(&["deny", "allow"]), "what holds where no rule fits; default deny");
const RULES: Member = optional("rules", Kind::List(&RULE), "the first that fits decides");

pub(super) const LIST: &[Member] = &[POLICY, RULES];

/// Who is let in as `qom-set` is given it.
pub static AUTHZ: Record =
    record(&[POLICY, RULES, optional("identity", Kind::Text, "the distinguished name that is let in")]);

pub(super) const CLIENTS: Member = ours(
    "tls-clients",
    Kind::List(&Kind::Text),
    "whom it is for, and it is not there for others: distinguished names (C=GB,O=Example,CN=client) and \
     fingerprints (sha256: and 64 digits) of their certificates; default: everybody",
);
