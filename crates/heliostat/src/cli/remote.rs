//! Exports of NBD servers where a verb takes a disk: their addresses, and how one is looked at.
//!
//! A name that begins as `nbd:`, `nbd://` or `nbd+unix://` is one; a slash before the colon makes a path of it, as
//! elsewhere. Opens for reading only, and says what to do where that fails.

use std::path::Path;
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

use crate::daemon::{Child, DriverSpec, NbdClientSpec, NodeSpec, Sharing, is_nbd, nbd_name};

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

/// The export that `path` is the address of. `None` where it is a path.
///
/// # Errors
/// When it looks like an address and is none that can be used.
pub fn export(path: &Path) -> Result<Option<NbdClientSpec>> {
    let text = path.to_string_lossy();
    let Some((word, rest)) = text.split_once(':').filter(|(word, _)| is_nbd(word)) else { return Ok(None) };
    let (spec, is_private) = nbd_name(word, rest).map_err(|error| {
        anyhow!(
            "{text}: {error}; write nbd://HOST/EXPORT, nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH, \
             or ./{text} for a file of that name"
        )
    })?;
    if is_private {
        bail!(
            "{text}: the command line has no TLS towards a server in this version; start `heliostat serve --control \
             SOCKET`, and give it tls-creds-x509 and a node with tls-creds"
        );
    }
    Ok(Some(spec))
}

/// Whether `path` is the address of an export.
#[must_use]
pub fn is_export(path: &Path) -> bool {
    path.to_string_lossy().split_once(':').is_some_and(|(word, _)| is_nbd(word))
}

/// What holds the bytes of the disk at `path`.
#[must_use]
pub fn driver(path: &Path, sharing: Sharing) -> DriverSpec {
    match export(path) {
        Ok(Some(spec)) => DriverSpec::Nbd(Box::new(spec)),
        // What cannot be used was refused when it was looked at.
        Ok(None) | Err(_) => DriverSpec::at(path.to_owned(), sharing),
    }
}

/// Connects, to read. `None` where `path` is no address.
///
/// # Errors
/// When the server, or the export, cannot be had.
pub fn open(path: &Path) -> Result<Option<Arc<dyn Storage>>> {
    let Some(spec) = export(path)? else { return Ok(None) };
    let options = spec.reading().map_err(|error| anyhow!("{}: {error}", path.display()))?;
    let storage = NbdStorage::open(options);
    let storage = storage.with_context(|| {
        format!("cannot open {}: start the server, or see what it offers with nbdinfo --list", path.display())
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
