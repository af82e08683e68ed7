//! A disk that a verb opens: of which format it is and who says so, what it may open besides, and the node for it.
//!
//! A format is certain when the operator says it, or when the file's name and its start agree. Else the start alone
//! says it, which on a raw disk is the guest's to write: then the disk is used as what it looks like, but opens no
//! other file, and one that looks raw is kept from ever looking like an image. Opens nodes by way of a daemon only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::header::Header;
use heliostat_block::node::{DetectZeroes, Discard, Node};
use heliostat_host::open::{Access, Cache, Locking, OpenOptions};
use heliostat_host::runtime::block_on;

use super::image::{self, Format, Image};
use super::remote::{self, At};
use crate::daemon::{
    CacheUse, Child, Daemon, DaemonError, DriverSpec, Gate, NodeSpec, Probing, Qcow2Spec, Sharing, resolved,
};

/// The name of the one node that is opened to be read.
const NODE: &str = "image";

/// A format as an operator says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatName {
    /// The image's bytes are the disk's bytes
    Raw,
    /// A qcow2 image
    Qcow2,
}

/// What images may open; the arguments that several verbs share.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "What images may open")]
pub struct Trust {
    /// Let images open backing and data files in this directory, beside those in their own; may be given again
    #[arg(long, value_name = "DIRECTORY")]
    allow_path: Vec<PathBuf>,
    /// Guess the format of a backing file where the image does not say it
    #[arg(long)]
    probe_backing: bool,
}

/// Of which format a disk is, and who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Raw, says the operator.
    Raw,
    /// It looks raw.
    LooksRaw,
    /// qcow2, says the operator, or so do its name and its start.
    Qcow2,
    /// It looks like qcow2.
    LooksQcow2,
}

impl Trust {
    /// A daemon whose images open so much.
    ///
    /// # Errors
    /// When an allowed directory is not there.
    pub fn daemon(&self) -> Result<Arc<Daemon>> {
        let probing = if self.probe_backing { Probing::Allowed } else { Probing::Refused };
        let gate = Gate::new(&self.allow_path, probing).map_err(|(path, error)| {
            anyhow!("--allow-path {}: there is no such directory: {error}", path.display())
        })?;
        Ok(Daemon::with_gate(gate))
    }
}

impl Kind {
    /// Decides, given what the operator says and what the disk begins with.
    #[must_use]
    pub fn of(path: &Path, said: Option<FormatName>, found: Format) -> Self {
        let is_named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
        match (said, found) {
            (Some(FormatName::Raw), _) => Self::Raw,
            (Some(FormatName::Qcow2), _) => Self::Qcow2,
            (None, Format::Raw) => Self::LooksRaw,
            (None, Format::Qcow2) if is_named => Self::Qcow2,
            (None, Format::Qcow2) => Self::LooksQcow2,
        }
    }

    /// The format, whoever says so.
    #[must_use]
    pub const fn format(self) -> Format {
        match self {
            Self::Raw | Self::LooksRaw => Format::Raw,
            Self::Qcow2 | Self::LooksQcow2 => Format::Qcow2,
        }
    }

    /// A node named `name` for the disk that is there, otherwise as `like` says.
    #[must_use]
    pub fn node(self, name: &str, at: At<'_>, sharing: Sharing, like: &NodeSpec) -> NodeSpec {
        let file = NodeSpec {
            name: None,
            driver: remote::driver(at, sharing),
            // What the node above lets through, this one need not filter again.
            discard: Discard::Unmap,
            detect_zeroes: DetectZeroes::Off,
            ..like.clone()
        };
        let child = |file| Child::New(Box::new(file));
        let driver = match self {
            Self::Raw => file.driver,
            Self::LooksRaw => DriverSpec::Raw { file: child(file), offset: None, size: None, is_guess: true },
            Self::Qcow2 | Self::LooksQcow2 => DriverSpec::Qcow2(Box::new(Qcow2Spec {
                is_guess: self == Self::LooksQcow2,
                sharing,
                ..Qcow2Spec::new(child(file))
            })),
        };
        NodeSpec { name: Some(name.to_owned()), driver, ..like.clone() }
    }
}

/// A disk that is open to be read.
pub struct Disk {
    /// Its node.
    pub node: Arc<Node>,
    /// Keeps it.
    pub daemon: Arc<Daemon>,
}

/// How a disk is opened to be read.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// The format, where the operator says it.
    pub format: Option<FormatName>,
    /// What it may open.
    pub trust: &'a Trust,
    /// Whether the page cache is passed by.
    pub direct: bool,
    /// What others may do meanwhile.
    pub sharing: Sharing,
}

impl Disk {
    /// Opens a disk, with all that it stands on.
    ///
    /// # Errors
    /// When it cannot be opened; the text says what to do.
    pub fn open(at: At<'_>, look: &Look<'_>) -> Result<Self> {
        let path = at.path;
        let kind = Kind::of(path, look.format, look_at(at)?);
        let cache = CacheUse { direct: look.direct, no_flush: false };
        let like = NodeSpec { read_only: true, cache, ..NodeSpec::file(NODE, path) };
        Self::open_as(at, kind, &kind.node(NODE, at, look.sharing, &like), look.trust)
    }

    /// Opens `spec`, which is for the disk that is there.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open_as(at: At<'_>, kind: Kind, spec: &NodeSpec, trust: &Trust) -> Result<Self> {
        let daemon = trust.daemon()?;
        at.lend(&daemon)?;
        let node = daemon.add_node(spec).map_err(|error| explain(at.path, kind, error))?;
        Ok(Self { node, daemon })
    }
}

/// The virtual size of a disk. Looks at nothing that it stands on, and takes no lock.
///
/// # Errors
/// When it cannot be opened, or is not of that kind.
pub fn size_of(at: At<'_>, kind: Kind) -> Result<u64> {
    if kind.format() == Format::Raw {
        return Ok(looked_at(at)?.node.size());
    }
    let storage = image::open_storage(at)?;
    let header = block_on(Header::read(&ImageFile::new(storage))).context("cannot start the I/O engine")?;
    Ok(header.with_context(|| format!("cannot open {}", at.path.display()))?.size)
}

/// What an image stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The file, so named that the name holds anywhere.
    pub name: PathBuf,
    /// Its format, as the image says it.
    pub format: String,
}

/// What an image says that it stands on.
///
/// # Errors
/// When it cannot be read, or does not say all of it.
pub fn backing_of(at: At<'_>) -> Result<Option<Backing>> {
    let path = at.path;
    let storage = image::open_storage(at)?;
    let header = block_on(Header::read(&ImageFile::new(storage))).context("cannot start the I/O engine")?;
    let header = header.with_context(|| format!("cannot open {}", path.display()))?;
    let Some(name) = header.backing_file else { return Ok(None) };
    let format = header.backing_format.unwrap_or_default();
    let name = PathBuf::from(resolved(&name, path));
    let name = std::fs::canonicalize(&name).with_context(|| format!("cannot find {}", name.display()))?;
    Ok(Some(Backing { name, format: String::from_utf8_lossy(&format).into_owned() }))
}

/// The bytes of a disk. Takes no lock.
fn looked_at(at: At<'_>) -> Result<Image> {
    let (access, locking) = (Access::ReadOnly, Locking::Off);
    image::open_any(at, &OpenOptions { access, cache: Cache::Page, locking, ..OpenOptions::default() })
}

/// What a disk begins with. Takes no lock.
///
/// # Errors
/// When it cannot be opened or read.
pub fn look_at(at: At<'_>) -> Result<Format> {
    let image = looked_at(at)?;
    block_on(image.format()).context("cannot start the I/O engine")?
}

/// Why a disk cannot be opened, for a person: QEMU's texts are for QEMU's clients.
pub fn explain(path: &Path, kind: Kind, error: DaemonError) -> anyhow::Error {
    match error {
        DaemonError::Format(error) if kind == Kind::LooksQcow2 => anyhow!(
            "{} looks like a qcow2 image and is none that can be used: {error}; if it is a raw disk, add --format raw",
            path.display()
        ),
        DaemonError::Open { source, .. } => source.into(),
        error @ DaemonError::Guess { .. } => error.into(),
        error => anyhow::Error::from(error).context(format!("cannot open {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_operator_says_or_names_is_certain() {
        let kind = |path: &str, said, found| Kind::of(Path::new(path), said, found);
        let table = [
            (kind("a.qcow2", None, Format::Qcow2), Kind::Qcow2),
            (kind("a.QCOW2", None, Format::Qcow2), Kind::Qcow2),
            (kind("a.img", None, Format::Qcow2), Kind::LooksQcow2),
            (kind("qcow2", None, Format::Qcow2), Kind::LooksQcow2),
            (kind("a.qcow2", None, Format::Raw), Kind::LooksRaw),
            (kind("a.img", Some(FormatName::Qcow2), Format::Qcow2), Kind::Qcow2),
            (kind("a.qcow2", Some(FormatName::Raw), Format::Qcow2), Kind::Raw),
        ];
        for (kind, expected) in table {
            assert_eq!(kind, expected);
        }
    }
}
