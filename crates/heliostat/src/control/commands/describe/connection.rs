//! What is said of a node's connection to an NBD server: its definition in QEMU's words, and how it is, in ours.

use heliostat_block::nbd::link::{LinkState, LinkStatus};
use serde_json::{Value, json};

use crate::daemon::{NbdClientSpec, NbdServerAt};

/// What would make the same node, with its keys in the order in which QEMU writes them.
pub(super) fn definition(spec: &NbdClientSpec) -> String {
    let quoted = |text: &str| Value::from(text).to_string();
    let mut members = Vec::new();
    let mut add = |name: &str, value: String| members.push(format!("\"{name}\": {value}"));
    let (kind, others) = match &spec.server {
        NbdServerAt::Unix(path) => {
            add("server.path", quoted(&path.to_string_lossy()));
            ("unix", &[][..])
        }
        NbdServerAt::Inet { host, port, others } => {
            let (before, after) = others.iter().partition::<Vec<_>, _>(|(name, _)| *name == "to");
            before.iter().for_each(|(name, value)| add(&format!("server.{name}"), value.clone()));
            add("server.port", quoted(port));
            add("server.host", quoted(host));
            after
                .iter()
                .filter(|(name, _)| *name == "numeric")
                .for_each(|(name, value)| add(&format!("server.{name}"), value.clone()));
            ("inet", others.as_slice())
        }
        NbdServerAt::Descriptor(number) => {
            add("server.str", quoted(number));
            ("fd", &[][..])
        }
    };
    add("driver", quoted("nbd"));
    if !spec.export.is_empty() {
        add("export", quoted(&spec.export));
    }
    add("server.type", quoted(kind));
    for (name, value) in others.iter().filter(|(name, _)| !matches!(*name, "to" | "numeric")) {
        add(&format!("server.{name}"), value.clone());
    }
    format!("{{{}}}", members.join(", "))
}

/// How a connection is.
pub(super) fn described(status: &LinkStatus) -> Value {
    let mut described = json!({
        "state": match status.state {
            LinkState::Opening => "opening",
            LinkState::Up => "up",
            LinkState::Waiting => "waiting",
            LinkState::Down => "down",
            LinkState::Changed => "changed",
            LinkState::Closed => "closed",
        },
        "for-ms": u64::try_from(status.lasted.as_millis()).unwrap_or(u64::MAX),
        "connections": status.connections,
        "reconnects": status.reconnects,
        "losses": status.losses,
    });
    if let Some(reason) = &status.reason {
        described["reason"] = json!(reason);
    }
    described
}
