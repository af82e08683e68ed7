//! Exports of NBD servers where a verb takes a disk: their addresses, and how one is looked at.
//!
//! A name that begins as `nbd:`, `nbd://` or `nbd+unix://` is one, and with `nbds` one that is reached by TLS; a slash
//! before the colon makes a path of it, as elsewhere. Opens for reading only, and says what to do where that fails.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_block::storage::Storage;
use heliostat_host::clock::RealClock;
use heliostat_host::nbd::NbdStorage;
use heliostat_host::tls::{Credentials, CredentialsSettings, Endpoint, PeerCheck};

use crate::daemon::{
    Child, Daemon, DriverSpec, NamedExport, NbdClientSpec, NodeSpec, Sharing, is_nbd, nbd_name,
};

/// How an NBD server is dealt with that holds a disk; the arguments that `serve` and `mirror` share.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Disks of NBD servers")]
pub struct Patience {
    /// So many seconds requests wait for an NBD server that was lost, before they fail; attempts go on
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    reconnect_delay: u32,
}

impl Patience {
    /// Makes the nodes of `spec` that are in exports so patient.
    pub fn lend(self, spec: &mut NodeSpec) {
        let child = match &mut spec.driver {
            DriverSpec::Nbd(nbd) => {
                nbd.reconnect_delay = Duration::from_secs(u64::from(self.reconnect_delay));
                return;
            }
            DriverSpec::Raw { file, .. } => file,
            DriverSpec::Qcow2(image) => &mut image.file,
            _ => return,
        };
        if let Child::New(below) = child {
            self.lend(below);
        }
    }
}

/// How servers behind `nbds` addresses are known; the arguments that all verbs share which take addresses.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Disks of NBD servers")]
pub struct Certificates {
    /// For nbds:// addresses: believe servers whose certificate ca-cert.pem of this folder has signed, and show them client-cert.pem (with client-key.pem), where it is there. An address may say its own: nbds://HOST/EXPORT?tls-certificates=FOLDER
    #[arg(long, value_name = "FOLDER")]
    tls_certificates: Option<PathBuf>,
    /// What a server's certificate must be for, if not for the host of the address; of a Unix socket, that is localhost
    #[arg(long, value_name = "HOST")]
    tls_hostname: Option<String>,
}

/// Where a disk is, as it was typed, and with what its server is known.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// A path, or an address.
    pub path: &'a Path,
    certificates: &'a Certificates,
}

impl At<'_> {
    /// Makes the certificates of an address known to `daemon`, whose nodes speak of them by an id. Does nothing where
    /// there are none.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn lend(self, daemon: &Daemon) -> Result<()> {
        match export(self)? {
            Some(Export { private: Some((id, settings)), .. }) if daemon.object(&id).is_none() => daemon
                .add_credentials(&id, settings)
                .with_context(|| format!("the certificates for {}", self.path.display())),
            _ => Ok(()),
        }
    }
}

/// An export, as its address and the arguments say it.
#[derive(Debug)]
struct Export {
    spec: NbdClientSpec,
    /// The certificates that it is reached with, and their id.
    private: Option<(String, CredentialsSettings)>,
}

impl Certificates {
    /// A disk that is reached with these.
    #[must_use]
    pub const fn at<'a>(&'a self, path: &'a Path) -> At<'a> {
        At { path, certificates: self }
    }

    /// Completes what the address says.
    fn complete(&self, text: &str, named: NamedExport) -> Result<Export> {
        let NamedExport { mut spec, is_private, certificates } = named;
        if !is_private {
            if self.tls_certificates.is_some() && text.starts_with("nbd://") {
                let private = text.replacen("nbd", "nbds", 1);
                bail!("{text} is reached without TLS, though --tls-certificates is given; write {private}");
            }
            return Ok(Export { spec, private: None });
        }
        let Some(dir) = certificates.or_else(|| self.tls_certificates.clone()) else {
            bail!(
                "{text}: whom to believe is not said; add --tls-certificates FOLDER, where the folder has ca-cert.pem \
                 and, for servers that want them, client-cert.pem and client-key.pem"
            );
        };
        let id = format!("certificates of {}", dir.display());
        spec.tls_hostname = spec.tls_hostname.or_else(|| self.tls_hostname.clone());
        spec.credentials = Some(id.clone());
        let settings = CredentialsSettings { dir, endpoint: Endpoint::Client, peers: PeerCheck::Required };
        Ok(Export { spec, private: Some((id, settings)) })
    }
}

/// The export that it is the address of. `None` where it is a path.
fn export(at: At<'_>) -> Result<Option<Export>> {
    let text = at.path.to_string_lossy();
    let Some((word, rest)) = text.split_once(':').filter(|(word, _)| is_nbd(word)) else { return Ok(None) };
    let named = nbd_name(word, rest).map_err(|error| {
        anyhow!(
            "{text}: {error}; write nbd://HOST/EXPORT, nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH, \
             with nbds for TLS, or ./{text} for a file of that name"
        )
    })?;
    at.certificates.complete(&text, named).map(Some)
}

/// Whether `path` is the address of an export.
#[must_use]
pub fn is_export(path: &Path) -> bool {
    path.to_string_lossy().split_once(':').is_some_and(|(word, _)| is_nbd(word))
}

/// What holds the bytes of the disk. Certificates must have been lent to the daemon that opens it.
#[must_use]
pub fn driver(at: At<'_>, sharing: Sharing) -> DriverSpec {
    match export(at) {
        Ok(Some(export)) => DriverSpec::Nbd(Box::new(export.spec)),
        // What cannot be used was refused when it was looked at.
        Ok(None) | Err(_) => DriverSpec::at(at.path.to_owned(), sharing),
    }
}

/// Connects, to read. `None` where it is no address.
///
/// # Errors
/// When the server, or the export, cannot be had.
pub fn open(at: At<'_>) -> Result<Option<Arc<dyn Storage>>> {
    let Some(Export { spec, private }) = export(at)? else { return Ok(None) };
    let path = at.path.display();
    let credentials = private.map(|(_, settings)| Credentials::load(settings)).transpose();
    let credentials = credentials.with_context(|| format!("the certificates for {path}"))?;
    let is_private = credentials.is_some();
    let options = spec.reading(credentials).map_err(|error| anyhow!("{path}: {error}"))?;
    let storage = NbdStorage::open(options);
    let storage = storage.with_context(|| match is_private {
        false => format!(
            "cannot open {path}: start the server, see what it offers with nbdinfo --list, or write nbds where it \
             wants TLS"
        ),
        true => format!(
            "cannot open {path}: start the server, see that it is one of those that --tls-certificates and \
             --tls-hostname are for, and that it knows our certificate"
        ),
    })?;
    Ok(Some(Arc::new(storage)))
}

/// A node over `storage`, to be read.
#[must_use]
pub fn node(storage: Arc<dyn Storage>) -> Arc<Node> {
    Node::new(
        NodeName::generated(0),
        Driver::Raw(Raw::whole(storage)),
        NodeOptions { read_only: true, ..NodeOptions::default() },
        Arc::new(RealClock::new()),
    )
}
