//! [`Tls`]: how a disk is offered inside TLS; the arguments that `serve` and `mirror` share.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use heliostat_host::tls::{CredentialsSettings, Endpoint, PeerCheck};

use crate::authz::Client;
use crate::daemon::{Daemon, NbdTls};
use crate::front::nbd::TlsPolicy;

/// The id of the credentials.
const ID: &str = "tls";

/// How a disk is offered inside TLS.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Who may use it")]
pub struct Tls {
    /// Speak TLS with clients, with ca-cert.pem, server-cert.pem and server-key.pem of this folder (and ca-crl.pem). Clients must show a certificate that ca-cert.pem has signed
    #[arg(long, value_name = "FOLDER", requires = "nbd")]
    tls_dir: Option<PathBuf>,
    /// Whether clients must use TLS. Those that need not can be overheard, and reach a TCP address of other hosts only with --allow-remote
    #[arg(long, value_enum, value_name = "WHETHER", requires = "tls_dir", default_value_t = Need::Required)]
    tls: Need,
    /// Let in only whoever's certificate has this distinguished name or fingerprint; may be given again
    #[arg(long, value_name = "C=GB,O=Example,CN=client|sha256:DIGITS", requires = "tls_dir")]
    tls_allow: Vec<Client>,
    /// Ask clients for no certificate: whoever can connect is let in, from other hosts only with --allow-remote
    #[arg(long, requires = "tls_dir", conflicts_with = "tls_allow")]
    tls_any_client: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Need {
    /// They must
    Required,
    /// They may
    Optional,
}

impl Tls {
    /// Whether nobody is served without TLS and a certificate.
    #[must_use]
    pub fn keeps_strangers_out(&self) -> bool {
        self.tls_dir.is_some() && self.tls == Need::Required && !self.tls_any_client
    }

    /// Whether there is TLS at all.
    #[must_use]
    pub const fn is_there(&self) -> bool {
        self.tls_dir.is_some()
    }

    /// Whom the disk is for. `None`: for everybody whom the server lets in.
    #[must_use]
    pub fn clients(&self) -> Option<Vec<Client>> {
        (!self.tls_allow.is_empty()).then(|| self.tls_allow.clone())
    }

    /// Reads the certificates.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn prepare(&self, daemon: &Daemon) -> Result<Option<NbdTls>> {
        let Some(dir) = &self.tls_dir else { return Ok(None) };
        let settings = CredentialsSettings {
            dir: dir.clone(),
            endpoint: Endpoint::Server,
            peers: if self.tls_any_client { PeerCheck::None } else { PeerCheck::Required },
        };
        daemon.add_credentials(ID, settings).context("--tls-dir")?;
        let policy = match self.tls {
            Need::Required => TlsPolicy::Required,
            Need::Optional => TlsPolicy::Optional,
        };
        Ok(Some(NbdTls { credentials: ID.to_owned(), authz: None, policy }))
    }
}
