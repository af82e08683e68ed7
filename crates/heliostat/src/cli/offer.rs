//! [`Offer`]: where a disk is offered to clients and to operators; the arguments that `serve` and `mirror` share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use heliostat_host::socket::Address;
use serde_json::{Value, json};

use super::address::{Endpoint, Reach, Scheme, nbd_uri};
use super::tls::Tls;
use super::units;
use crate::control::{ControlServer, ControlSettings, Peer, Peers};
use crate::daemon::{Daemon, DaemonError, ExportSpec, NbdAddress, NbdSpec};
use crate::serve::status::Depth;

/// The name of the node that clients see, and of the export unless another was given.
pub const NODE: &str = "disk";

/// Where a disk is offered.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Who may use it")]
pub struct Offer {
    /// Offer the disk to NBD clients at unix:PATH, a path with a slash, HOST:PORT or :PORT; may be given again. On
    /// sockets that a service manager has bound: fd:NUMBER, fd:NAME or fd:all
    #[arg(long, value_name = "ADDRESS")]
    nbd: Vec<Endpoint>,
    /// Take QMP commands on this Unix socket (`heliostat job` speaks to it)
    #[arg(long, value_name = "SOCKET", value_parser = socket_path)]
    control: Option<PathBuf>,
    /// Let this user or group give orders there, beside whoever runs this; may be given again
    #[arg(long, value_name = "user:NAME|group:NAME", requires = "control")]
    control_allow: Vec<Peer>,
    /// The name that NBD clients ask for; they get it for the empty name too
    #[arg(long, value_name = "EXPORT", default_value = NODE)]
    name: String,
    /// Serve at most so many NBD connections at once; others wait. 0: no bound
    #[arg(long, value_name = "COUNT", default_value_t = 0, requires = "nbd")]
    nbd_connections: u32,
    /// Let all NBD connections together hold at most so much memory for requests and for answers that are not read
    /// yet; default 512M
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, requires = "nbd")]
    nbd_memory: Option<u64>,
    /// Let NBD clients ask which ranges this bitmap of the image marks, as qemu:dirty-bitmap:NAME; may be given again
    #[arg(long, value_name = "NAME", requires = "nbd")]
    nbd_bitmap: Vec<String>,
    /// Let NBD clients ask in which image of the chain a range is, as qemu:allocation-depth
    #[arg(long, requires = "nbd")]
    nbd_allocation_depth: bool,
    /// Let other hosts reach a TCP address without TLS, or with --tls-any-client. NBD asks nobody for a password
    #[arg(long)]
    allow_remote: bool,
    #[command(flatten)]
    tls: Tls,
}

/// Reads the path of a socket, with or without `unix:`.
///
/// # Errors
/// A sentence, when there is no path.
pub fn socket_path(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:").unwrap_or(text) {
        "" => Err("the path of the socket is missing".to_owned()),
        path => Ok(PathBuf::from(path)),
    }
}

/// Where a disk is being offered. Clients are the daemon's; operators are served until this is closed or dropped.
pub struct Offered {
    nbd: Vec<Address>,
    control: Option<PathBuf>,
    peers: Peers,
    export: String,
    has_tls: bool,
    server: Option<ControlServer>,
}

impl Offer {
    /// Says whether clients are served.
    #[must_use]
    pub const fn has_clients(&self) -> bool {
        !self.nbd.is_empty()
    }

    /// Where operators are to connect.
    #[must_use]
    pub fn control(&self) -> Option<&Path> {
        self.control.as_deref()
    }

    /// Says whether it can be reached at all.
    #[must_use]
    pub const fn is_reachable(&self) -> bool {
        self.has_clients() || self.control.is_some()
    }

    /// Checks the addresses without touching anything.
    ///
    /// # Errors
    /// When nothing can listen there, or it must be asked for.
    pub fn resolve(&self) -> Result<Vec<NbdAddress>> {
        let reach = if self.allow_remote || self.tls.keeps_strangers_out() {
            Reach::Anybody
        } else {
            Reach::Loopback
        };
        let mut addresses = Vec::new();
        for endpoint in &self.nbd {
            addresses.extend(endpoint.resolve(reach).context("--nbd")?);
        }
        Ok(addresses)
    }

    /// Listens for clients, and offers them the node [`NODE`].
    ///
    /// # Errors
    /// When an address is in use, or the host refuses it.
    pub fn open(&self, daemon: &Arc<Daemon>, addresses: Vec<NbdAddress>, writable: bool) -> Result<Offered> {
        let nbd = match addresses.is_empty() {
            true => Vec::new(),
            false => self.open_nbd(daemon, addresses, writable)?,
        };
        let peers = Peers::new(self.control_allow.clone());
        Ok(Offered {
            nbd,
            control: self.control.clone(),
            peers,
            export: self.name.clone(),
            has_tls: self.tls.is_there(),
            server: None,
        })
    }

    fn open_nbd(
        &self,
        daemon: &Arc<Daemon>,
        addresses: Vec<NbdAddress>,
        writable: bool,
    ) -> Result<Vec<Address>> {
        let spec = NbdSpec {
            addresses,
            max_connections: self.nbd_connections,
            handshake_time: None,
            tls: self.tls.prepare(daemon)?,
            memory_max: self.nbd_memory,
        };
        let export = ExportSpec {
            id: NODE.to_owned(),
            node: NODE.to_owned(),
            name: Some(self.name.clone()),
            description: None,
            writable,
            depth: if self.nbd_allocation_depth { Depth::Told } else { Depth::Untold },
            bitmaps: self.nbd_bitmap.iter().map(|name| (None, name.clone())).collect(),
            clients: self.tls.clients(),
        };
        let bound = daemon.serve(&spec, &export).map_err(|error| match error {
            // QEMU's text is for QEMU's clients; the host's says what to do.
            DaemonError::NbdListen { source, .. } => anyhow::Error::from(source).context("--nbd"),
            DaemonError::Bitmap(error) => anyhow::Error::from(error)
                .context("--nbd-bitmap: see which there are, and of what use, with heliostat info IMAGE"),
            other => other.into(),
        })?;
        Ok(bound)
    }
}

impl Offered {
    /// Takes operators' orders from now on, where that was asked for. Comes last, so that they find everything in
    /// its place.
    ///
    /// # Errors
    /// When the socket is in use, or the host refuses it.
    pub fn take_orders(&mut self, daemon: &Arc<Daemon>) -> Result<()> {
        if let Some(path) = &self.control {
            let settings = ControlSettings { peers: self.peers.clone(), ..ControlSettings::unix(path) };
            self.server = Some(ControlServer::start(settings, Arc::clone(daemon)).context("--control")?);
        }
        Ok(())
    }

    /// Serves operators no longer. Those who are connected may read what was said last.
    pub fn close(self) {
        if let Some(server) = self.server {
            server.stop();
        }
    }

    /// The URI by which clients connect: at the first address, where there are several.
    #[must_use]
    pub fn uri(&self) -> Option<String> {
        self.uris().into_iter().next()
    }

    fn uris(&self) -> Vec<String> {
        let scheme = if self.has_tls { Scheme::Tls } else { Scheme::Plain };
        self.nbd.iter().map(|address| nbd_uri(scheme, address, &self.export)).collect()
    }

    /// For programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "nbd": self.uri(),
            "nbd-address": self.nbd.first().map(ToString::to_string),
            "nbd-all": self.uris(),
            "export": self.nbd.first().map(|_| &self.export),
            "control": self.control.as_ref().map(|path| path.to_string_lossy()),
        })
    }

    /// How to connect, for people.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let mut lines = Vec::new();
        lines.extend(self.uris().iter().map(|uri| format!("  NBD      {uri}")));
        if let (Some(uri), true) = (self.uri(), self.has_tls) {
            let mark = if uri.contains('?') { '&' } else { '?' };
            lines.push(format!(
                "  try      nbdinfo '{uri}{mark}tls-certificates=FOLDER' (with the client's certificates)"
            ));
        } else if let Some(uri) = self.uri() {
            lines.push(format!("  try      nbdinfo '{uri}'"));
            lines.push(format!("  or       qemu-system-x86_64 … -drive 'file={uri},format=raw,if=virtio'"));
        }
        if let Some(control) = &self.control {
            lines.push(format!("  control  {}", control.display()));
            lines.push(format!("  try      heliostat job list --control {}", control.display()));
        }
        lines
    }
}
