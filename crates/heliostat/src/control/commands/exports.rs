//! `nbd-server-start`, `nbd-server-stop`, `nbd-server-add`, `nbd-server-remove`, `block-export-add`, `block-export-del`, `query-block-exports`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::not_there;
use crate::authz::Client;
use crate::daemon::{Daemon, ExportSpec, NbdAddress, NbdSpec, NbdTls, Removal};
use crate::front::nbd::{CONNECTIONS_DEFAULT, TlsPolicy};
use crate::serve::status::Depth;

/// As good as no bound, where a client asks for none.
const NO_BOUND: Duration = Duration::from_secs(1 << 40);

pub(super) fn start_server(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let authz = arguments.text("tls-authz").map(str::to_owned);
    let tls = arguments.text("tls-creds").map(|id| NbdTls {
        credentials: id.to_owned(),
        authz: authz.clone(),
        policy: TlsPolicy::Required,
    });
    if tls.is_none() && authz.is_some() {
        // QEMU takes it and lets everybody in.
        return Err(Refusal::new("'tls-authz' lets nobody in or out without 'tls-creds': give both"));
    }
    let address = arguments.object("addr").ok_or_else(|| not_there("addr"))?;
    let handshake_time = arguments.uint32("handshake-max-seconds").map(|seconds| match seconds {
        0 => NO_BOUND,
        _ => Duration::from_secs(u64::from(seconds)),
    });
    let connections_default = u32::try_from(CONNECTIONS_DEFAULT).unwrap_or(u32::MAX);
    let spec = NbdSpec {
        addresses: vec![socket_address(daemon, address)?],
        max_connections: arguments.uint32("max-connections").unwrap_or(connections_default),
        handshake_time,
        tls,
        memory_max: None,
    };
    daemon.start_nbd_server(&spec)?;
    Ok(json!({}))
}

pub(super) fn stop_server(daemon: &Arc<Daemon>) -> Result<Value, Refusal> {
    daemon.stop_nbd_server()?;
    Ok(json!({}))
}

fn socket_address(daemon: &Daemon, address: Arguments<'_>) -> Result<NbdAddress, Refusal> {
    let data = address.object("data").ok_or_else(|| not_there("addr"))?;
    match address.required_text("type") {
        "unix" if data.flag("abstract") == Some(true) => Err(not_there("addr.data.abstract")),
        "unix" => Ok(NbdAddress::Unix(PathBuf::from(data.required_text("path")))),
        "inet" => inet_address(data).map(NbdAddress::Tcp),
        // Only those that the command line names.
        "fd" => match daemon.take_descriptor(data.required_text("str")) {
            Some(number) => Ok(NbdAddress::Inherited(number)),
            None => Err(Refusal::new("only QEMU supports file descriptor passing")),
        },
        _ => Err(Refusal::new("vsock addresses are not supported")),
    }
}

fn inet_address(data: Arguments<'_>) -> Result<SocketAddr, Refusal> {
    for name in ["to", "mptcp"] {
        if data.has(name) && data.flag(name) != Some(false) {
            return Err(not_there(&format!("addr.data.{name}")));
        }
    }
    let (host, port) = (data.required_text("host"), data.required_text("port"));
    let failed = |why: &str| Refusal::new(format!("address resolution failed for {host}:{port}: {why}"));
    // Names of ports are not looked up.
    let number = port.parse::<u16>().map_err(|_| failed("Servname not supported for ai_socktype"))?;
    let wanted = |address: &SocketAddr| {
        let (asked, other) = if address.is_ipv4() { ("ipv4", "ipv6") } else { ("ipv6", "ipv4") };
        match (data.flag(asked), data.flag(other)) {
            (Some(asked), _) => asked,
            (None, other) => other != Some(true),
        }
    };
    let found = match host {
        "" => vec![
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, number)),
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, number)),
        ],
        _ => match (host, number).to_socket_addrs() {
            Ok(addresses) => addresses.collect(),
            Err(_) => return Err(failed("Name or service not known")),
        },
    };
    found.into_iter().find(wanted).ok_or_else(|| failed("Address family for hostname not supported"))
}

pub(super) fn add(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    if let Some(thread) = arguments.text("iothread") {
        return Err(Refusal::new(format!("iothread \"{thread}\" not found")));
    }
    for name in ["fixed-iothread", "writethrough"] {
        if arguments.flag(name) == Some(true) {
            return Err(not_there(name));
        }
    }
    let spec = ExportSpec {
        id: arguments.required_text("id").to_owned(),
        node: arguments.required_text("node-name").to_owned(),
        name: arguments.text("name").map(str::to_owned),
        description: arguments.text("description").map(str::to_owned),
        writable: arguments.flag("writable").unwrap_or(false),
        clients: tls_clients(arguments)?,
        depth: match arguments.flag("allocation-depth") {
            Some(true) => Depth::Told,
            _ => Depth::Untold,
        },
        bitmaps: arguments
            .named("bitmaps")
            .into_iter()
            .map(|(node, name)| (node.map(str::to_owned), name.to_owned()))
            .collect(),
    };
    daemon.add_export(&spec)?;
    Ok(json!({}))
}

/// The older `nbd-server-add`: the export's id is its name, and what cannot be written is offered to be read.
pub(super) fn add_named(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let device = arguments.required_text("device");
    let node = daemon.node(device)?;
    let name = arguments.text("name").unwrap_or(device);
    let spec = ExportSpec {
        id: name.to_owned(),
        node: device.to_owned(),
        name: Some(name.to_owned()),
        description: arguments.text("description").map(str::to_owned),
        writable: arguments.flag("writable").unwrap_or(false) && !node.options().read_only,
        clients: None,
        depth: Depth::Untold,
        bitmaps: arguments.text("bitmap").map(|name| (None, name.to_owned())).into_iter().collect(),
    };
    daemon.add_export(&spec)?;
    Ok(json!({}))
}

/// Whom an export is for.
fn tls_clients(arguments: Arguments<'_>) -> Result<Option<Vec<Client>>, Refusal> {
    if !arguments.has("tls-clients") {
        return Ok(None);
    }
    let clients = arguments.named("tls-clients").into_iter().map(|(_, text)| text.parse());
    let clients: Result<Vec<_>, String> = clients.collect();
    clients.map(Some).map_err(|text| Refusal::new(format!("Parameter 'tls-clients': {text}")))
}

pub(super) fn delete(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    remove(daemon, arguments.required_text("id"), arguments)
}

/// The older `nbd-server-remove`, by what is a name to it and an id to us.
pub(super) fn delete_named(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    remove(daemon, arguments.required_text("name"), arguments)
}

fn remove(daemon: &Arc<Daemon>, id: &str, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let removal = match arguments.text("mode") {
        Some("hard") => Removal::Hard,
        _ => Removal::Safe,
    };
    daemon.remove_export(id, removal)?;
    Ok(json!({}))
}

pub(super) fn query(daemon: &Arc<Daemon>) -> Value {
    let exports = daemon.exports();
    let described = exports.iter().map(|export| {
        json!({
            "node-name": export.node().name().as_str(),
            "shutting-down": export.is_leaving,
            "type": "nbd",
            "id": export.id,
            "name": export.name,
        })
    });
    described.collect()
}
