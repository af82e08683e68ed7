//! What a node is to be, as an operator says it. Values only.

use std::path::PathBuf;

use heliostat_block::driver::preallocate::Ahead;
use heliostat_block::node::{DetectZeroes, Discard, NodeOptions};

use super::super::open::is_device;
use super::filters::{FaultSpec, NullSpec};
use super::nbd::NbdClientSpec;

/// What a node is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its name. A child may go without.
    pub name: Option<String>,
    /// How it keeps its bytes, and where.
    pub driver: DriverSpec,
    /// Writes are refused.
    pub read_only: bool,
    /// Opened for reading only where the host allows no writing.
    pub auto_read_only: bool,
    /// What becomes of space that is no longer needed.
    pub discard: Discard,
    /// What becomes of written data that is all zero.
    pub detect_zeroes: DetectZeroes,
    /// How the host's page cache is used.
    pub cache: CacheUse,
}

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheUse {
    /// It is passed by.
    pub direct: bool,
    /// Flushes do nothing.
    pub no_flush: bool,
}

/// How a node keeps its bytes, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverSpec {
    /// In a regular file.
    File(FileSpec),
    /// In a block device.
    HostDevice(FileSpec),
    /// In an export of an NBD server.
    Nbd(Box<NbdClientSpec>),
    /// In a window of another node's bytes.
    Raw {
        /// The node below.
        file: Child,
        /// Where the window starts, in bytes; at the beginning where nothing is said.
        offset: Option<u64>,
        /// How long it is in bytes; to the end where nothing is said.
        size: Option<u64>,
        /// The operator did not say that it is raw; it looked so.
        is_guess: bool,
    },
    /// In a qcow2 image.
    Qcow2(Box<Qcow2Spec>),
    /// Nowhere.
    NullCo {
        /// How long it is in bytes.
        size: u64,
        /// Whether it says that it reads as zero.
        read_zeroes: bool,
    },
    /// Nowhere, with more said.
    Null(NullSpec),
    /// In another node, with requests that fail or are held up.
    Faults(Box<FaultSpec>),
    /// In another node, with limits.
    Throttle {
        /// The id of the group whose limits they are.
        group: String,
        /// The node below.
        file: Child,
    },
    /// In another node, with what is read from below it.
    CopyOnRead {
        /// The node below.
        file: Child,
        /// The lowest layer from which is copied.
        bottom: Option<String>,
    },
    /// In another node, in which room is made ahead of writes.
    Preallocate {
        /// The node below.
        file: Child,
        /// How much room.
        ahead: Ahead,
    },
}

/// A qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Spec {
    /// The node that holds the image.
    pub file: Child,
    /// What it stands on.
    pub backing: BackingSpec,
    /// The node that holds its data; where nothing is said, the file that the image names.
    pub data_file: Option<Child>,
    /// Memory for tables.
    pub cache: TableCache,
    /// Reference counts may be brought up to date late.
    pub lazy_refcounts: bool,
    /// What others may do meanwhile with the files that it names.
    pub sharing: Sharing,
    /// It was not said to be qcow2 by anybody who is to be trusted: it may not open other files.
    pub is_guess: bool,
}

/// What an image stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingSpec {
    /// The file that the image names, if it names one.
    FromImage,
    /// Nothing, whatever the image names.
    Nothing,
    /// This node.
    Given(Child),
}

/// Memory for the tables of an image, as QEMU's arguments have it: what all take, what the mapping takes, what
/// counting takes; and the piece in which the mapping is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCache {
    /// All of it, in bytes.
    pub total: Option<u64>,
    /// For the mapping.
    pub maps: Option<u64>,
    /// For reference counts.
    pub counts: Option<u64>,
    /// The piece; we choose it ourselves.
    pub piece: Option<u64>,
}

/// A file or a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSpec {
    /// Where.
    pub path: PathBuf,
    /// Where it is until it gets its place; `None` where it has that.
    pub now_at: Option<PathBuf>,
    /// What other programs may do with it meanwhile.
    pub sharing: Sharing,
}

/// What other programs may do with a file meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Read it. A writer of ours keeps other writers out, where the file system has locks.
    #[default]
    Locked,
    /// Only read it, even though we only read, too.
    Still,
    /// Anything: no locks are taken or looked at.
    Anything,
}

/// A node below another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Child {
    /// One that is there.
    Named(String),
    /// One that is made for it, and goes with it.
    New(Box<NodeSpec>),
}

impl Qcow2Spec {
    /// An image in `file` with nothing else said.
    #[must_use]
    pub const fn new(file: Child) -> Self {
        Self {
            file,
            backing: BackingSpec::FromImage,
            data_file: None,
            cache: TableCache { total: None, maps: None, counts: None, piece: None },
            lazy_refcounts: false,
            sharing: Sharing::Locked,
            is_guess: false,
        }
    }
}

impl NodeSpec {
    /// A node named `name` in the file or block device at `path`, with nothing else said.
    #[must_use]
    pub fn file(name: &str, path: impl Into<PathBuf>) -> Self {
        Self::new(Some(name.to_owned()), DriverSpec::at(path.into(), Sharing::default()))
    }

    /// A node with nothing said but its driver.
    #[must_use]
    pub const fn new(name: Option<String>, driver: DriverSpec) -> Self {
        Self {
            name,
            driver,
            read_only: false,
            auto_read_only: false,
            discard: Discard::ZeroesOnly,
            detect_zeroes: DetectZeroes::Off,
            cache: CacheUse { direct: false, no_flush: false },
        }
    }

    /// How the node is to behave.
    pub(in super::super) const fn options(&self) -> NodeOptions {
        NodeOptions { read_only: self.read_only, discard: self.discard, detect_zeroes: self.detect_zeroes }
    }
}

impl DriverSpec {
    /// The bytes of the file or block device at `path`.
    #[must_use]
    pub fn at(path: PathBuf, sharing: Sharing) -> Self {
        let file = FileSpec { path, now_at: None, sharing };
        if is_device(&file.path) { Self::HostDevice(file) } else { Self::File(file) }
    }
}
