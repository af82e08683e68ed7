//! As `qmp_differential.rs`, for the objects of TLS and the NBD server that uses them.

mod common;
mod qmp;

use common::certificates::Authority;
use qmp::transcript::Step::{self, Differs, Do};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

/// With a server's and a client's certificates in the folder.
fn compare(script: &Script) {
    compare_on(script, |peer| {
        let authority = Authority::new("ca");
        authority.issue_into(peer.folder(), "server", "localhost", common::certificates::When::Now);
        authority.issue_into(peer.folder(), "client", "friend", common::certificates::When::Now);
        let broken = peer.folder().join("broken");
        std::fs::create_dir_all(&broken).expect("a folder of the test's");
        for name in ["ca-cert.pem", "server-cert.pem"] {
            std::fs::copy(peer.folder().join(name), broken.join(name)).expect("a file of the test's");
        }
        peer.image("a", 1 << 20);
    });
}

fn object(kind: &str, more: Value) -> Value {
    let mut all = json!({ "qom-type": kind, "id": "o" });
    for (key, value) in more.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    all
}

fn add(kind: &str, more: Value) -> Step {
    Do("object-add", object(kind, more))
}

fn x509(more: Value) -> Step {
    add("tls-creds-x509", more)
}

fn delete(id: &str) -> Step {
    Do("object-del", json!({ "id": id }))
}

fn get(property: &str) -> Step {
    Do("qom-get", json!({ "path": "o", "property": property }))
}

#[test]
fn credentials_are_taken_and_refused_alike() {
    let files = "ours says what the file is for, too";
    let gnutls = "GnuTLS's priorities are not ours";
    let trouble = "ours says whether changed files could be used";
    let server = json!({ "dir": "DIR", "endpoint": "server" });
    let missing = |dir: &str, endpoint: &str| {
        let of = object("tls-creds-x509", json!({ "dir": dir, "endpoint": endpoint }));
        Differs("object-add", of, files)
    };
    let mut script = vec![
        x509(json!({})),
        x509(json!({ "endpoint": "zork", "dir": "DIR" })),
        x509(json!({ "endpoint": 5 })),
        x509(json!({ "dir": 5 })),
        x509(json!({ "dir": "DIR", "verify-peer": "yes" })),
        x509(json!({ "dir": "DIR", "sanity-check": 1 })),
        x509(json!({ "dir": "DIR", "zork": 1 })),
        missing("/nonexistent", "server"),
        missing("DIR/broken", "server"),
        Differs(
            "object-add",
            object("tls-creds-x509", json!({ "dir": "DIR", "priority": "NORMAL" })),
            gnutls,
        ),
        Differs("object-del", json!({ "id": "o" }), gnutls),
        x509(server.clone()),
        x509(server),
        add("authz-simple", json!({ "identity": "x" })),
        add("throttle-group", json!({})),
        Differs("qom-list", json!({ "path": "o" }), trouble),
    ];
    for property in
        ["type", "endpoint", "dir", "verify-peer", "priority", "sanity-check", "passwordid", "zork"]
    {
        script.push(get(property));
    }
    script.extend([
        Do("qom-list", json!({ "path": "/objects" })),
        Do("qom-set", json!({ "path": "o", "property": "zork", "value": 1 })),
        delete("o"),
        delete("o"),
        x509(json!({ "dir": "DIR" })),
        get("endpoint"),
        delete("o"),
        x509(json!({ "dir": "DIR", "endpoint": "server", "verify-peer": false })),
        get("verify-peer"),
    ]);
    compare(&script);
}

#[test]
fn rules_of_who_is_let_in_are_taken_shown_and_changed_alike() {
    let set = |property: &str, value: Value| {
        Do("qom-set", json!({ "path": "o", "property": property, "value": value }))
    };
    let rule = json!({ "match": "CN=*", "policy": "allow", "format": "glob" });
    compare(&vec![
        add("authz-simple", json!({})),
        add("authz-simple", json!({ "identity": 5 })),
        add("authz-simple", json!({ "identity": "CN=a" })),
        Do("qom-list", json!({ "path": "o" })),
        Do("qom-list", json!({ "path": "/objects" })),
        get("identity"),
        set("identity", json!("CN=b")),
        get("identity"),
        delete("o"),
        add("authz-list", json!({ "policy": "zork" })),
        add("authz-list", json!({ "rules": [{ "match": "CN=*" }] })),
        add("authz-list", json!({ "rules": [{ "policy": "allow" }] })),
        add("authz-list", json!({ "rules": [{ "match": "a", "policy": "allow", "format": "zork" }] })),
        add("authz-list", json!({})),
        get("policy"),
        get("rules"),
        delete("o"),
        add(
            "authz-list",
            json!({ "policy": "allow", "rules": [rule, { "match": "CN=a", "policy": "deny" }] }),
        ),
        Do("qom-list", json!({ "path": "o" })),
        get("policy"),
        get("rules"),
        set("policy", json!("deny")),
        get("policy"),
        get("rules"),
        set("rules", json!([{ "match": "CN=c", "policy": "allow", "format": "exact" }])),
        get("rules"),
        get("policy"),
        delete("o"),
    ]);
}

#[test]
fn a_server_takes_credentials_and_refuses_other_things_alike() {
    let start = |more: Value| {
        let mut all = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
        for (key, value) in more.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        all
    };
    let stop = || Do("nbd-server-stop", json!({}));
    let named = |id: &str, kind: &str, more: Value| {
        let mut all = object(kind, more);
        all["id"] = json!(id);
        Do("object-add", all)
    };
    compare(&vec![
        named("s", "tls-creds-x509", json!({ "dir": "DIR", "endpoint": "server" })),
        named("c", "tls-creds-x509", json!({ "dir": "DIR", "endpoint": "client" })),
        named("a", "authz-simple", json!({ "identity": "CN=a" })),
        Do("nbd-server-start", start(json!({ "tls-creds": "none" }))),
        Do("nbd-server-start", start(json!({ "tls-creds": "a" }))),
        Do("nbd-server-start", start(json!({ "tls-creds": "c" }))),
        Differs(
            "nbd-server-start",
            start(json!({ "tls-authz": "a" })),
            "without TLS nobody can be told from others",
        ),
        Differs("nbd-server-stop", json!({}), "it was not started"),
        Do("nbd-server-start", start(json!({ "tls-creds": "s" }))),
        Do("object-del", json!({ "id": "s" })),
        stop(),
        named("s", "tls-creds-x509", json!({ "dir": "DIR", "endpoint": "server" })),
        Do("nbd-server-start", start(json!({ "tls-creds": "s", "tls-authz": "none" }))),
        stop(),
    ]);
}
