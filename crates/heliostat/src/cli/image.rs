//! Images that a verb of the command line opens itself, to look at them: always through a node that refuses
//! writes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use heliostat_block::buffer::Buffer;
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_block::storage::Storage;
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::lock::User;
use heliostat_host::open::{Access, Cache, Locking, OpenError, OpenOptions};

use super::remote::{self, At};

/// An image that is open, to be read.
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// Its bytes.
    pub node: Arc<Node>,
    /// The file; an export has none that could be looked at.
    storage: Option<Arc<FileStorage>>,
    /// Whether the page cache is passed by.
    pub is_direct: bool,
}

/// Opens an image for reading, while nobody else may write, or they may.
///
/// # Errors
/// [`OpenError`], which says what to do.
pub fn open(path: &Path, cache: Cache, locking: Locking) -> Result<Image, OpenError> {
    open_as(path, &OpenOptions { access: Access::ReadOnly, cache, locking, ..OpenOptions::default() })
}

/// Opens an image as somebody else is about to, so that what stands in the way is known before anything
/// happens.
///
/// # Errors
/// [`OpenError`], which says what to do.
pub fn open_as(path: &Path, options: &OpenOptions) -> Result<Image, OpenError> {
    let storage = Arc::new(FileStorage::open(path, options)?);
    let is_direct = storage.is_direct();
    let node = Node::new(
        NodeName::generated(0),
        Driver::Raw(Raw::whole(storage.clone())),
        NodeOptions { read_only: true, ..NodeOptions::default() },
        Arc::new(RealClock::new()),
    );
    Ok(Image { path: path.to_owned(), node, storage: Some(storage), is_direct })
}

/// As [`open_as`], also for the address of an export, whose server lets in whom it likes.
///
/// # Errors
/// When it cannot be opened; the text says what to do.
pub fn open_any(at: At<'_>, options: &OpenOptions) -> Result<Image> {
    match remote::open(at)? {
        Some(storage) => {
            let node = remote::node(storage);
            Ok(Image { path: at.path.to_owned(), node, storage: None, is_direct: false })
        }
        None => Ok(open_as(at.path, options)?),
    }
}

/// Opens the bytes of an image for reading, without locks.
///
/// # Errors
/// When it cannot be opened; the text says what to do.
pub fn open_storage(at: At<'_>) -> Result<Arc<dyn Storage>> {
    if let Some(storage) = remote::open(at)? {
        return Ok(storage);
    }
    let options = OpenOptions { access: Access::ReadOnly, locking: Locking::Off, ..OpenOptions::default() };
    Ok(Arc::new(FileStorage::open(at.path, &options)?))
}

/// How an image says that it keeps its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// It says nothing.
    Raw,
    /// It begins as a qcow2 image.
    Qcow2,
}

/// The first bytes of every qcow2 image (docs/interop/qcow2: "QFI\xfb").
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

impl Image {
    /// Says who else has it open to write it, or so that nobody else may read it. Takes no lock.
    ///
    /// # Errors
    /// The host's.
    pub fn writer(&self) -> Result<Option<User>> {
        let Some(storage) = &self.storage else { return Ok(None) };
        let writer = storage.writer();
        writer.with_context(|| format!("cannot look at the locks of {}", self.path.display()))
    }

    /// Finds out what the image says that it is.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn format(&self) -> Result<Format> {
        if self.node.size() < 4 {
            return Ok(Format::Raw);
        }
        let read = self.node.enter().await.read(0, Buffer::zeroed(4)).await;
        let head = read.with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(if head[..] == QCOW2_MAGIC { Format::Qcow2 } else { Format::Raw })
    }
}
