//! [`DaemonError`]: why the daemon refuses something. The texts are QEMU's where it has one (QMP.md 1.11),
//! because they are what its clients look for.

use std::path::PathBuf;

use heliostat_block::driver::qcow2::error::FormatError;
use heliostat_block::driver::raw::WindowError;
use heliostat_block::error::{BlockError, InvalidGranularity};
use heliostat_block::job::VerbError;
use heliostat_block::name::{InvalidName, NodeName};
use heliostat_block::throttle::InvalidLimits;
use heliostat_host::open::OpenError;
use heliostat_host::tls::CredentialsError;

use super::bitmaps::BitmapError;
use super::gate::GateError;
use super::mirror_bitmap::BitmapUseError;
use super::transaction::TransactionError;
use crate::front::nbd::ExportError;

/// Why the daemon refuses something. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No such node, where an operator may also mean a device.
    #[error("Cannot find device='{0}' nor node-name='{0}'")]
    NodeNotFound(String),
    /// No such node, where only nodes are meant.
    #[error("Failed to find node with node-name='{0}'")]
    NodeNameNotFound(String),
    /// A node of that name is there.
    #[error("Duplicate nodes with node-name='{0}'")]
    NodeExists(String),
    /// The name is not one.
    #[error(transparent)]
    NodeName(#[from] InvalidName),
    /// The root node of what is added needs a name, as nobody could use it otherwise.
    #[error("'node-name' must be specified for the root node")]
    NodeNameMissing,
    /// The node has a user that keeps it.
    #[error("Node {0} is in use")]
    NodeInUse(NodeName),
    /// The node has a node above it.
    #[error("Block device {0} is in use")]
    NodeIsChild(NodeName),
    /// The node is a job's.
    #[error("Node '{0}' is busy: block device is in use by block job: mirror")]
    NodeBusy(NodeName),
    /// The node has an overlay.
    #[error("Node '{node}' is busy: node is used as backing hd of '{of}'")]
    NodeIsBacking {
        /// The node.
        node: NodeName,
        /// The overlay.
        of: NodeName,
    },
    /// A node that passes requests on is not to be had. The text is QEMU's.
    #[error("{0}")]
    Filter(String),
    /// Limits that make no sense.
    #[error(transparent)]
    ThrottleLimits(#[from] InvalidLimits),
    /// An object of that id is there.
    #[error("attempt to add duplicate property '{0}' to object (type 'container')")]
    ObjectExists(String),
    /// There is no such object.
    #[error("object '{0}' not found")]
    ObjectNotFound(String),
    /// The object has users.
    #[error("object '{0}' is in use, can not be deleted")]
    ObjectInUse(String),
    /// The image cannot be used.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// What an image stands on cannot be had.
    #[error("Could not open backing file: {0}")]
    Backing(#[source] Box<DaemonError>),
    /// An image may not open what it names.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// An image of which only itself says that it is one wants to open other files.
    #[error(
        "{} looks like a qcow2 image that stands on another file ('{name}'), but a guest could have written that onto a \
         raw disk; if it is an image, say so with --format qcow2, else with --format raw", path.display()
    )]
    Guess {
        /// The image.
        path: PathBuf,
        /// What it names.
        name: String,
    },
    /// A target of which only itself says that it is an image names another file.
    #[error(
        "{} looks like a qcow2 image that stands on another file ('{name}'); if it is one, say so with format=qcow2, \
         else with format=raw", path.display()
    )]
    TargetGuess {
        /// The target.
        path: PathBuf,
        /// What it names.
        name: String,
    },
    /// A node cannot be the overlay of another. The text is QEMU's.
    #[error("{0}")]
    Snapshot(String),
    /// What clients have written cannot be made durable before they leave it.
    #[error("cannot make durable what was written: {0}")]
    Unflushed(BlockError),
    /// Requests to the nodes, which clients are to leave, do not end.
    #[error(
        "what is in flight at {nodes} has not ended within {} s; nothing has changed, and clients go on: see what keeps \
         the disk, and try again when it answers",
        limit.as_secs()
    )]
    Undrained {
        /// The nodes.
        nodes: String,
        /// How long it was waited.
        limit: std::time::Duration,
    },
    /// What clients have written does not get durable before they are to leave it.
    #[error(
        "a flush of {nodes} has not ended within {} s, and without it what was written before could be lost; nothing \
         has changed, and clients go on: see what keeps the disk, and try again when it answers", limit.as_secs()
    )]
    UnendedFlush {
        /// The nodes.
        nodes: String,
        /// How long it was waited.
        limit: std::time::Duration,
    },
    /// An option that stays as it was when the node was opened.
    #[error("Cannot change the option '{0}'")]
    Fixed(&'static str),
    /// What an image stands on has to be said, as it would be lost otherwise.
    #[error("backing is missing for '{0}'")]
    BackingMissing(NodeName),
    /// A node of those that are to be changed has no name.
    #[error("node-name not specified")]
    ReopenNameMissing,
    /// Somebody writes to the node.
    #[error("Read-only block node '{0}' cannot support read-write users")]
    HasWriters(NodeName),
    /// It was opened for reading only, and stays so.
    #[error(
        "node '{0}' cannot be made writable: what it is in was opened for reading only; remove and add it again"
    )]
    OpenedReadOnly(NodeName),
    /// There is no such driver.
    #[error("Unknown driver '{0}'")]
    UnknownDriver(String),
    /// The target has no name by which it could be put in the place of a node that has one.
    #[error("a node-name must be provided when replacing a named node of the graph")]
    ReplacesWithoutName,
    /// An argument for tables contradicts another, or the image.
    #[error("{0}")]
    Tables(String),
    /// The host gives no way to do I/O.
    #[error("cannot start the I/O engine: {0}")]
    Engine(std::io::Error),
    /// The node was opened for another and goes with it.
    #[error("Node {0} is not owned by the monitor")]
    NodeNotOwned(NodeName),
    /// The node has a node above it, or is mirrored already.
    #[error("Need a root block node")]
    NotRoot,
    /// The file cannot be used. The text is QEMU's; the source says more, for a person.
    #[error("{text}")]
    Open {
        /// QEMU's text.
        text: String,
        /// What happened.
        source: OpenError,
    },
    /// The file is of another kind than the driver is for.
    #[error("'{driver}' driver requires '{}' to be {wanted}", path.display())]
    WrongKind {
        /// The driver.
        driver: &'static str,
        /// Where.
        path: PathBuf,
        /// What it is for, with its article.
        wanted: &'static str,
    },
    /// Locks are to be ignored for a file that is to be written.
    #[error("force-share=on can only be used with read-only images")]
    ForceShare,
    /// A disk of a size that no file could have.
    #[error("Could not refresh total sector count: File too large")]
    SizeTooLarge,
    /// Zeroes are to become holes where no holes may be made.
    #[error("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")]
    DetectZeroes,
    /// A raw node's window is larger than what is below.
    #[error(
        "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the \
         containing file ({there})"
    )]
    Outside {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        size: u64,
        /// How long the node below is.
        there: u64,
    },
    /// A raw node's window starts behind what is below.
    #[error("Offset ({offset}) cannot be greater than size of the containing file ({there})")]
    OffsetOutside {
        /// Where it starts.
        offset: u64,
        /// How long the node below is.
        there: u64,
    },
    /// A raw node's window ends in the middle of a sector.
    #[error("Specified size is not multiple of 512")]
    SizeUnaligned,
    /// A raw node's window cannot be used on its storage.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// More than a bound allows.
    #[error("there are {limit} {what} already, which is the most")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// The job's id is not one.
    #[error("Invalid job ID '{0}'")]
    JobId(String),
    /// A job of that id is there.
    #[error("Job ID '{0}' already in use")]
    JobExists(String),
    /// There is no such job.
    #[error("Job not found")]
    JobNotFound(String),
    /// The job does not take that verb now.
    #[error(transparent)]
    Verb(#[from] VerbError),
    /// The target is the source.
    #[error("Can't mirror node into itself")]
    MirrorIntoItself,
    /// The target may not be written.
    #[error("Block node is read-only")]
    TargetReadOnly,
    /// Somebody else uses the node in a way that leaves no room for this one.
    #[error(
        "Permission conflict on node '{node}': permissions '{permissions}' are both required by {user} and \
         unshared by {other}."
    )]
    PermissionConflict {
        /// The node.
        node: NodeName,
        /// What both want, or one wants and the other refuses.
        permissions: &'static str,
        /// Who wants it.
        user: String,
        /// Who refuses it.
        other: String,
    },
    /// Only the source itself can be replaced.
    #[error(
        "Cannot replace '{replaces}' by a node mirrored from '{source_node}', because it cannot be guaranteed \
         that doing so would not lead to an abrupt change of visible data"
    )]
    CannotReplace {
        /// What was to be replaced.
        replaces: NodeName,
        /// What is mirrored.
        source_node: NodeName,
    },
    /// Outside 512 B to 64 MiB.
    #[error("Parameter 'granularity' expects a value in range [512B, 64MB]")]
    GranularityRange,
    /// Not a power of two.
    #[error("Parameter 'granularity' expects a power of 2")]
    GranularityPower,
    /// Its bitmap would take too much memory.
    #[error("Parameter 'granularity': {bytes} bytes are too few for a disk of {size} bytes")]
    GranularityTooFine {
        /// The granularity.
        bytes: u32,
        /// The disk's size.
        size: u64,
    },
    /// No granularity makes a bitmap that fits in memory.
    #[error("the disk is too large to be mirrored")]
    TooLarge,
    /// A sync mode that is not there.
    #[error("Sync mode '{0}' not supported")]
    SyncMode(&'static str),
    /// A buffer size below zero.
    #[error("Invalid parameter 'buf-size'")]
    BufSize,
    /// A speed below zero.
    #[error("Parameter 'speed' expects a non-negative value")]
    Speed,
    /// An export of an NBD server cannot be had. The text is QEMU's where it has one.
    #[error("{0}")]
    Nbd(String),
    /// There is no NBD server.
    #[error("NBD server not running")]
    NbdNotRunning,
    /// There is an NBD server.
    #[error("NBD server already running")]
    NbdRunning,
    /// TLS credentials cannot be used: the files say why.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// There are no such TLS credentials.
    #[error("No TLS credentials with id '{0}'")]
    CredentialsNotFound(String),
    /// The object is of another kind.
    #[error("Object with id '{0}' is not TLS credentials")]
    NotCredentials(String),
    /// The credentials are for the other side.
    #[error("Expected TLS credentials for a {0} endpoint")]
    CredentialsEndpoint(&'static str),
    /// The host refuses the NBD server's address. The text is QEMU's.
    #[error("{text}")]
    NbdListen {
        /// QEMU's text.
        text: String,
        /// What happened.
        source: std::io::Error,
    },
    /// The NBD server refuses an export.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// Clients may write to it, and nobody may.
    #[error("Cannot export read-only node as writable")]
    ExportReadOnly,
    /// The id of an export is not one.
    #[error("Invalid block export id")]
    ExportId,
    /// There is no such node to be exported.
    #[error("Cannot find device='' nor node-name='{0}'")]
    ExportNodeNotFound(String),
    /// An export of that id is there.
    #[error("Block export id '{0}' is already in use")]
    ExportIdExists(String),
    /// There is no such export.
    #[error("Export '{0}' is not found")]
    ExportNotFound(String),
    /// An export has clients, and was to be removed only without.
    #[error("export '{0}' still in use")]
    ExportInUse(String),
    /// No such node, where a device and a node are told apart.
    #[error("Cannot find device='{device}' nor node-name='{node}'")]
    NoDeviceNorNode {
        /// The device; empty where none was said.
        device: String,
        /// The node; empty where none was said.
        node: String,
    },
    /// A size below zero.
    #[error("Parameter 'size' expects a >0 size")]
    ResizeSize,
    /// A size that no disk can have.
    #[error("offset({0}) exceeds maximum(9223372035781033984)")]
    ResizeTooLarge(u64),
    /// The operator has said how long it is.
    #[error("Cannot resize fixed-size raw disks")]
    ResizeFixed,
    /// The node may not be written.
    #[error("Image is read-only")]
    ResizeReadOnly,
    /// What is below has the size that it has.
    #[error("Image format driver does not support resize")]
    ResizeUnsupported,
    /// The image or the host refuses the new size.
    #[error("{}", .0.cause())]
    Resize(BlockError),
    /// An image that is not to be had. The text is QEMU's.
    #[error("{0}")]
    Create(String),
    /// The host gives no memory for a mirror's bitmaps.
    #[error("cannot start job '{job}': {error}")]
    Bitmaps {
        /// For which job.
        job: String,
        /// What is missing.
        error: InvalidGranularity,
    },
    /// A dirty bitmap is not to be had.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// There is no transaction.
    #[error(transparent)]
    Transaction(#[from] TransactionError),
    /// A mirror may not use a bitmap so.
    #[error(transparent)]
    BitmapUse(#[from] BitmapUseError),
    /// The host gives no thread.
    #[error("cannot start a thread for job '{job}': {error}")]
    Thread {
        /// For which job.
        job: String,
        /// What the host says.
        error: std::io::Error,
    },
    /// The daemon is ending and takes on nothing new.
    #[error("the daemon is shutting down")]
    Closing,
}

impl From<OpenError> for DaemonError {
    fn from(source: OpenError) -> Self {
        Self::Open { text: open_text(&source), source }
    }
}

/// QEMU's text for a file that cannot be used.
pub(super) fn open_text(error: &OpenError) -> String {
    match error {
        OpenError::Locked { conflict, .. } => conflict.to_string(),
        _ => {
            let reason = rustix::io::Errno::from_raw_os_error(error.errno());
            format!("Could not open '{}': {}", error.path().display(), strerror(reason))
        }
    }
}

/// The host's words for an error number, without the number that the standard library adds.
#[must_use]
pub fn strerror(errno: rustix::io::Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
