//! Nodes in an export of an NBD server: what an operator says of one, and how it is opened.
//!
//! Texts are QEMU's where it has one. Connections are the storage's. Called by `nodes` when a node is made.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use heliostat_block::driver::{Driver, Raw};
use heliostat_block::name::NodeName;
use heliostat_block::storage::Storage;
use heliostat_host::nbd::{NbdOptions, NbdStorage, OpenConnection, ServerAddress, Tls};
use heliostat_host::socket::Address;
use heliostat_host::tls::{Credentials, Endpoint};

use super::super::{Daemon, DaemonError};
use super::{Below, DriverSpec, Making, NodeEntry, NodeSpec};

/// The longest name of an export, as the protocol has it.
const EXPORT_NAME_MAX: usize = 4096;

/// The longest path of a Unix socket, as the host has it.
const UNIX_PATH_MAX: usize = 107;

/// An export of an NBD server, as an operator says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdClientSpec {
    /// Where the server is.
    pub server: NbdServerAt,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// The id of a client's TLS credentials; plain text without.
    pub credentials: Option<String>,
    /// The name that the server's certificate must be for; without, the server's address.
    pub tls_hostname: Option<String>,
    /// How long requests wait for a server that was lost, before they fail.
    pub reconnect_delay: Duration,
    /// How long to try for the first connection; zero means one attempt.
    pub open_timeout: Duration,
    /// A metadata context that is asked for instead of the allocation, such as `qemu:dirty-bitmap:NAME`.
    pub bitmap: Option<String>,
}

/// Where an NBD server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdServerAt {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host and a port, as they were typed.
    Inet {
        /// A name or an address.
        host: String,
        /// A port's number.
        port: String,
        /// What else was said of it, in QEMU's order: such a node has no other name than its definition.
        others: Vec<(&'static str, String)>,
    },
    /// A connection that this process has been given: the number of its descriptor.
    Descriptor(String),
}

/// The connection of a node to its NBD server, for who describes it.
#[derive(Clone, Debug)]
pub struct NbdEntry {
    /// What the operator said.
    pub spec: NbdClientSpec,
    /// What knows how the connection is.
    pub storage: Arc<NbdStorage>,
}

impl NbdClientSpec {
    /// That export of that server, with nothing else said.
    #[must_use]
    pub const fn new(server: NbdServerAt, export: String) -> Self {
        Self {
            server,
            export,
            credentials: None,
            tls_hostname: None,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            bitmap: None,
        }
    }

    /// How QEMU names it, where a name can say all of it.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        let export = &self.export;
        match &self.server {
            NbdServerAt::Unix(path) if export.is_empty() => {
                Some(format!("nbd+unix://?socket={}", path.display()))
            }
            NbdServerAt::Unix(path) => Some(format!("nbd+unix:///{export}?socket={}", path.display())),
            NbdServerAt::Inet { host, port, others } if others.is_empty() => {
                let slash = if export.is_empty() { "" } else { "/" };
                Some(format!("nbd://{host}:{port}{slash}{export}"))
            }
            NbdServerAt::Inet { .. } | NbdServerAt::Descriptor(_) => None,
        }
    }

    /// How it is opened to be read, privately where `credentials` are given.
    ///
    /// # Errors
    /// `Nbd`, where the address cannot be used.
    pub fn reading(&self, credentials: Option<Arc<Credentials>>) -> Result<NbdOptions, DaemonError> {
        let read_only =
            NodeSpec { read_only: true, ..NodeSpec::new(None, DriverSpec::Nbd(Box::new(self.clone()))) };
        let tls = credentials.map(|credentials| self.tls(credentials));
        Ok(NbdOptions { connections: 1, tls, ..self.options(&read_only)? })
    }

    fn tls(&self, credentials: Arc<Credentials>) -> Tls {
        Tls { credentials, host: self.tls_hostname.clone().unwrap_or_else(|| self.server.host()) }
    }

    fn options(&self, node: &NodeSpec) -> Result<NbdOptions, DaemonError> {
        if self.export.len() > EXPORT_NAME_MAX {
            return Err(DaemonError::Nbd("export name too long to send to server".to_owned()));
        }
        let address = self.server.address()?;
        Ok(NbdOptions {
            reconnect_delay: self.reconnect_delay,
            open_timeout: self.open_timeout,
            bitmap: self.bitmap.clone(),
            read_only: node.read_only,
            ..NbdOptions::new(address, self.export.clone())
        })
    }
}

impl NbdServerAt {
    fn address(&self) -> Result<ServerAddress, DaemonError> {
        match self {
            Self::Unix(path) if path.as_os_str().len() > UNIX_PATH_MAX => {
                Err(DaemonError::Nbd(format!("UNIX socket path '{}' is too long", path.display())))
            }
            Self::Unix(path) => Ok(ServerAddress::Socket(Address::Unix(path.clone()))),
            Self::Inet { host, port, .. } => {
                // Names of ports are not looked up.
                let number = port.parse().map_err(|_| {
                    let why = "Servname not supported for ai_socktype";
                    DaemonError::Nbd(format!("address resolution failed for {host}:{port}: {why}"))
                })?;
                Ok(ServerAddress::Host(host.clone(), number))
            }
            Self::Descriptor(number) => {
                let refused = |why: String| DaemonError::Nbd(format!("file descriptor '{number}': {why}"));
                let number =
                    number.parse().map_err(|_| refused("only the number of one is understood".to_owned()))?;
                let connection =
                    OpenConnection::inherited(number).map_err(|error| refused(error.to_string()))?;
                Ok(ServerAddress::Connected(connection))
            }
        }
    }

    /// The name that a certificate of the server is for, where nothing else is said.
    fn host(&self) -> String {
        match self {
            Self::Inet { host, .. } => host.clone(),
            Self::Unix(_) | Self::Descriptor(_) => "localhost".to_owned(),
        }
    }
}

impl Daemon {
    /// Connects to the server, and makes a node in its export.
    pub(super) fn make_nbd(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        nbd: &NbdClientSpec,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let tls = self.client_tls(nbd)?;
        let options = NbdOptions { tls, ..nbd.options(spec)? };
        let opened = match NbdStorage::open(options.clone()) {
            Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem && spec.auto_read_only => {
                NbdStorage::open(NbdOptions { read_only: true, ..options })
            }
            opened => opened,
        };
        let nbd_storage = Arc::new(opened.map_err(|error| refused(&error))?);
        let storage: Arc<dyn Storage> = Arc::<NbdStorage>::clone(&nbd_storage);
        let read_only = spec.read_only || storage.traits().read_only;
        let spec = NodeSpec { read_only, ..spec.clone() };
        let node = self.node_of(name, Driver::Raw(Raw::whole(Arc::clone(&storage))), &spec);
        let path = nbd.name().unwrap_or_default();
        let entry = NodeEntry::new(node, "nbd", path.into(), spec.cache);
        let connection = NbdEntry { spec: nbd.clone(), storage: nbd_storage };
        let entry = NodeEntry { storage: Some(storage), nbd: Some(connection), ..entry };
        self.keep(Below { entry, start: 0, identity: None }, Vec::new(), making)
    }

    fn client_tls(&self, nbd: &NbdClientSpec) -> Result<Option<Tls>, DaemonError> {
        let Some(id) = &nbd.credentials else { return Ok(None) };
        Ok(Some(nbd.tls(self.credentials(id, Endpoint::Client)?)))
    }
}

/// Why an export cannot be had.
fn refused(error: &std::io::Error) -> DaemonError {
    DaemonError::Nbd(match error.kind() {
        std::io::ErrorKind::ReadOnlyFilesystem => "Could not open image: Permission denied".to_owned(),
        // QEMU says no more than that.
        _ if error.to_string().starts_with("requested x-dirty-bitmap") => {
            "Could not open image: Invalid argument".to_owned()
        }
        _ => error.to_string(),
    })
}
