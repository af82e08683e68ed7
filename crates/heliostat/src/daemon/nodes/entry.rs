//! [`NodeEntry`]: what is known of a node beside itself, for who asks and for who puts another on it.
//!
//! It only keeps what the making of the node has found, and what changed since. Called by everybody in `daemon`, and by
//! `control`, which shows it.

use std::path::PathBuf;
use std::sync::Arc;

use heliostat_block::driver::qcow2::bitmap_directory::BitmapEntry;
use heliostat_block::driver::qcow2::snapshot::Snapshot;
use heliostat_block::name::NodeName;
use heliostat_block::node::Node;
use heliostat_block::storage::Storage;
use heliostat_host::file::FileStorage;

use super::nbd::NbdEntry;
use super::{CacheUse, FilterEntry};

/// A node as an operator made it.
#[derive(Clone)]
pub struct NodeEntry {
    /// The node.
    pub node: Arc<Node>,
    /// QEMU's name of its driver.
    pub driver: &'static str,
    /// The file at the bottom; empty where there is none.
    pub path: PathBuf,
    /// The storage that it stands on, alone or not.
    pub storage: Option<Arc<dyn Storage>>,
    /// The file, where it is the node of one.
    pub file: Option<Arc<FileStorage>>,
    /// The connection, where it is in an export of an NBD server.
    pub nbd: Option<NbdEntry>,
    /// The name of the node below, through which its bytes go.
    pub child: Option<NodeName>,
    /// The name of the node that holds what this one does not.
    pub backing: Option<NodeName>,
    /// The operator said what it stands on; else the image did.
    pub backing_is_given: bool,
    /// The snapshots in the image.
    pub snapshots: Vec<Snapshot>,
    /// The persistent dirty bitmaps in the image, as they were when it was opened.
    pub bitmaps: Vec<BitmapEntry>,
    /// How the page cache is used.
    pub cache: CacheUse,
    /// The operator said how long it is.
    pub is_fixed: bool,
    /// The operator said how long it is, or how long a window below it is.
    pub is_bounded: bool,
    /// It does not begin where its storage does.
    pub is_window: bool,
    /// What it is, where it passes requests on to its child.
    pub filter: Option<FilterEntry>,
    /// Where in the node below it begins, in bytes.
    pub window_start: u64,
    /// The operator said where it begins.
    pub offset_is_said: bool,
}

impl NodeEntry {
    pub(super) fn new(node: Arc<Node>, driver: &'static str, path: PathBuf, cache: CacheUse) -> Self {
        Self {
            node,
            driver,
            path,
            storage: None,
            file: None,
            nbd: None,
            child: None,
            backing: None,
            backing_is_given: false,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            cache,
            is_fixed: false,
            is_bounded: false,
            is_window: false,
            filter: None,
            window_start: 0,
            offset_is_said: false,
        }
    }
}
