//! A mirror whose target is reached inside TLS: both sides show their certificates.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use serde_json::json;

use common::certificates::Authority;
use nbd_target::{Mode, Stage};

#[test]
fn a_target_is_reached_inside_tls_and_only_by_whom_the_server_knows() {
    let Some(mut stage) = Stage::new() else { return };
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let folder = format!("--tls-certificates={}", authority.server().display());
    stage.start_target(&["--tls=require", "--tls-verify-peer", &folder, "file", "DIR/copy"]);
    let server = json!({ "type": "unix", "path": stage.path("target") });
    let node = |id: Option<&str>| {
        let mut node = json!({ "driver": "nbd", "node-name": "target", "server": server.clone() });
        if let Some(id) = id {
            node["tls-creds"] = json!(id);
            node["tls-hostname"] = json!("localhost");
        }
        node
    };
    for (id, folder) in [("known", authority.client("me")), ("stranger", other.client("me"))] {
        let object = json!({ "qom-type": "tls-creds-x509", "id": id, "dir": folder, "endpoint": "client" });
        stage.execute("object-add", object);
    }
    for refused in [None, Some("stranger"), Some("nobody")] {
        assert!(stage.qmp.execute("blockdev-add", node(refused)).is_err(), "{refused:?}");
    }
    stage.execute("blockdev-add", node(Some("known")));
    stage.mirror(Mode::WriteBlocking, &json!({}));
    stage.ready();
    let guest = stage.guest();
    guest.stop();
    stage.ends_with_a_copy();
}
