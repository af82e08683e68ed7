//! A node in an export of an NBD server, as `blockdev-add` has it.

use std::path::PathBuf;
use std::time::Duration;

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::not_there;
use crate::daemon::{NbdClientSpec, NbdServerAt};

/// What else can be said of a host, in QEMU's order.
const OTHERS: [&str; 6] = ["to", "numeric", "keep-alive", "ipv4", "ipv6", "mptcp"];

pub(super) fn client(arguments: Arguments<'_>) -> Result<NbdClientSpec, Refusal> {
    let server = arguments.object("server").ok_or_else(|| Refusal::new("Parameter 'server' is missing"))?;
    let seconds = |name: &str| Duration::from_secs(u64::from(arguments.uint32(name).unwrap_or(0)));
    let text = |name: &str| arguments.text(name).map(str::to_owned);
    let bitmap = match (text("x-dirty-bitmap"), text("bitmap")) {
        (Some(_), Some(_)) => {
            return Err(Refusal::new("'bitmap' and 'x-dirty-bitmap' say the same; leave one out"));
        }
        (context, name) => context.or_else(|| name.map(|name| format!("qemu:dirty-bitmap:{name}"))),
    };
    Ok(NbdClientSpec {
        server: server_at(server)?,
        export: text("export").unwrap_or_default(),
        credentials: text("tls-creds"),
        tls_hostname: text("tls-hostname"),
        reconnect_delay: seconds("reconnect-delay"),
        open_timeout: seconds("open-timeout"),
        bitmap,
    })
}

fn server_at(server: Arguments<'_>) -> Result<NbdServerAt, Refusal> {
    match server.required_text("type") {
        "unix" if server.flag("abstract") == Some(true) => Err(not_there("server.abstract")),
        "unix" => Ok(NbdServerAt::Unix(PathBuf::from(server.required_text("path")))),
        "inet" => inet(server),
        "fd" => Ok(NbdServerAt::Descriptor(server.required_text("str").to_owned())),
        _ => Err(Refusal::new("vsock addresses are not supported")),
    }
}

fn inet(server: Arguments<'_>) -> Result<NbdServerAt, Refusal> {
    if server.flag("mptcp") == Some(true) {
        return Err(not_there("server.mptcp"));
    }
    let others = OTHERS.into_iter().filter_map(|name| match (name, server.int("to")) {
        ("to", number) => number.map(|number| (name, number.to_string())),
        _ => server.flag(name).map(|flag| (name, flag.to_string())),
    });
    Ok(NbdServerAt::Inet {
        host: server.required_text("host").to_owned(),
        port: server.required_text("port").to_owned(),
        others: others.collect(),
    })
}
