//! `heliostat serve`: a disk on NBD until somebody ends it, or an empty daemon that is told over QMP what to do.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use heliostat_block::node::{DetectZeroes, Discard};
use heliostat_host::open::{Access, Attempt, Cache, OpenError, OpenOptions};
use heliostat_host::runtime::block_on;
use serde_json::json;

use super::disk::{FormatName, Kind, Trust, explain};
use super::ending;
use super::image::{self, Format};
use super::offer::{NODE, Offer, Offered};
use super::output::{self, Form, Outcome, say};
use super::remote::{At, Certificates, Patience};
use super::units;
use crate::daemon::{CacheUse, Daemon, NodeSpec, Sharing};

/// Offers a disk to NBD clients; without a disk, starts a daemon that is configured over its control socket
///
/// SIGTERM and Ctrl-C let the requests in flight end, make everything durable, and exit with status 0.
#[derive(Args, Debug)]
pub struct Serve {
    /// The disk: a file, a block device, or an export of an NBD server (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH)
    disk: Option<PathBuf>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    offer: Offer,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    trust: Trust,
    #[command(flatten)]
    certificates: Certificates,
}

/// How a disk is kept; the arguments that `serve` and `mirror` share.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "How its bytes are kept")]
pub struct How {
    /// Whether the host's page cache is used
    #[arg(long, value_enum, default_value_t = CacheMode::Page)]
    cache: CacheMode,
    /// What clients' discards do: nothing, or give space back
    #[arg(long, value_enum, default_value_t = DiscardMode::Unmap)]
    discard: DiscardMode,
    /// What becomes of written data that is all zero: nothing special, the cheapest zeroes, or a hole
    #[arg(long, value_enum, default_value_t = ZeroesMode::Off)]
    detect_zeroes: ZeroesMode,
    /// What the image is. Needed only for one that looks like another format, or names other files and is not called .qcow2
    #[arg(long, value_enum)]
    format: Option<FormatName>,
    #[command(flatten)]
    patience: Patience,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CacheMode {
    /// Through the host's page cache
    Page,
    /// Past it (O_DIRECT)
    Direct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DiscardMode {
    /// They do nothing
    Ignore,
    /// They give space back
    Unmap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ZeroesMode {
    /// Written as they come
    Off,
    /// Zeroed by the cheapest way that keeps the space
    On,
    /// Made a hole
    Unmap,
}

impl How {
    /// Of which format the disk at `path` is, which begins as `found` says.
    #[must_use]
    pub fn kind(self, path: &Path, found: Format) -> Kind {
        Kind::of(path, self.format, found)
    }

    /// The node for the disk that is there.
    #[must_use]
    pub fn node(self, name: &str, at: At<'_>, kind: Kind, read_only: bool) -> NodeSpec {
        let like = NodeSpec { read_only, ..self.like(name, at.path) };
        let mut node = kind.node(name, at, Sharing::default(), &like);
        self.patience.lend(&mut node);
        node
    }

    /// What was asked for, whatever the format.
    fn like(self, name: &str, path: &Path) -> NodeSpec {
        let discard = match self.discard {
            DiscardMode::Ignore => Discard::Ignore,
            DiscardMode::Unmap => Discard::Unmap,
        };
        let detect_zeroes = match self.detect_zeroes {
            ZeroesMode::Off => DetectZeroes::Off,
            ZeroesMode::On => DetectZeroes::On,
            ZeroesMode::Unmap => DetectZeroes::Unmap,
        };
        let cache = CacheUse { direct: matches!(self.cache, CacheMode::Direct), no_flush: false };
        NodeSpec { discard, detect_zeroes, cache, ..NodeSpec::file(name, path) }
    }

    /// How an image is opened to be looked at.
    #[must_use]
    pub const fn host_cache(self) -> Cache {
        match self.cache {
            CacheMode::Page => Cache::Page,
            CacheMode::Direct => Cache::Direct,
        }
    }
}

impl Serve {
    /// Serves until the end is asked for.
    ///
    /// # Errors
    /// When the disk cannot be opened, an address cannot be had, or the last flush fails.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let addresses = self.offer.resolve()?;
        if !self.offer.is_reachable() {
            bail!(
                "nobody could reach it; add --nbd ADDRESS for clients, --control SOCKET for operators, or both"
            );
        }
        if self.disk.is_none() && !addresses.is_empty() {
            bail!("--nbd needs a disk; without one, start the NBD server over the control socket");
        }
        let mut signals = ending::signals()?;
        let daemon = self.trust.daemon()?;
        let disk = self.add_disk(&daemon)?;
        let mut offered = self.offer.open(&daemon, addresses, !self.read_only)?;
        offered.take_orders(&daemon)?;
        self.announce(&offered, disk, form)?;
        notify(&[sd_notify::NotifyState::Ready]);
        let cause = ending::wait(&daemon, &mut signals)?;
        notify(&[sd_notify::NotifyState::Stopping]);
        if matches!(cause, ending::Cause::Signal(_)) {
            say("heliostat: ending: requests in flight end first, then everything is made durable");
        }
        let outcome = ending::end(&daemon, &mut signals);
        offered.close();
        outcome
    }

    /// Opens the disk. Answers its size.
    fn add_disk(&self, daemon: &Arc<Daemon>) -> Result<Option<u64>> {
        let Some(path) = &self.disk else { return Ok(None) };
        let at = self.certificates.at(path);
        // Looked at first: its errors say what to do, and nothing has been started yet.
        let access = if self.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let options = OpenOptions { access, cache: self.how.host_cache(), ..OpenOptions::default() };
        let image = image::open_any(at, &options).map_err(|error| match error.downcast_ref() {
            Some(OpenError::Denied { attempt: Attempt::Write, .. } | OpenError::ReadOnly { .. }) => {
                anyhow!("{error}, or add --read-only")
            }
            _ => error,
        })?;
        let found = block_on(image.format()).context("cannot start the I/O engine")??;
        drop(image);
        let kind = self.how.kind(path, found);
        let spec = self.how.node(NODE, at, kind, self.read_only);
        at.lend(daemon)?;
        let node = daemon.add_node(&spec).map_err(|error| explain(path, kind, error))?;
        Ok(Some(node.size()))
    }

    fn announce(&self, offered: &Offered, size: Option<u64>, form: Form) -> Result<()> {
        if form == Form::Json {
            let mut value = offered.to_json();
            value["disk"] = json!(self.disk.as_ref().map(|path| path.to_string_lossy()));
            value["size"] = json!(size);
            value["read-only"] = json!(self.read_only);
            return output::json_line(&value);
        }
        match (&self.disk, size) {
            (Some(path), Some(size)) => say(format_args!(
                "heliostat: serving {}, {}{}",
                path.display(),
                units::size(size),
                if self.read_only { ", read-only" } else { "" }
            )),
            _ => say("heliostat: waiting for orders"),
        }
        for line in offered.words() {
            say(line);
        }
        say("  Ctrl-C ends it in order");
        Ok(())
    }
}

/// Tells the service manager, if there is one.
pub fn notify(states: &[sd_notify::NotifyState<'_>]) {
    // It runs on all the same where nobody listens.
    let _ = sd_notify::notify(states);
}
