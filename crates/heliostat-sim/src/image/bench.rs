//! [`Bench`]: what the parts of one life of an image share, from its opening to its closing or a crash.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

use heliostat_block::clock::Clock;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::qcow2::{OpenOptions, Qcow2};
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::storage::Storage;

use super::format::Files;
use super::record::{Backing, Record, Seen};
use crate::oracle::Oracle;
use crate::storage::{Quirks, SimStorage};
use crate::world::{SimClock, World};

/// A storage for the image, one for the guests' data where that is elsewhere, and one for what is below.
#[derive(Clone)]
pub(crate) struct Storages {
    pub(crate) image: Arc<SimStorage>,
    pub(crate) data: Option<Arc<SimStorage>>,
    pub(crate) backing: Option<Arc<SimStorage>>,
}

impl Storages {
    fn own(&self) -> impl Iterator<Item = &Arc<SimStorage>> {
        std::iter::once(&self.image).chain(&self.data)
    }

    fn files(&self, what: impl Fn(&SimStorage) -> Vec<u8>) -> Files {
        Files { image: what(&self.image), data: self.data.as_ref().map(|data| what(data)) }
    }

    /// What is read now.
    pub(crate) fn visible(&self) -> Files {
        self.files(SimStorage::visible)
    }

    /// What a power cut at this moment would leave: of each file what it may, whatever is left of the other.
    pub(crate) fn crash(&self) -> Files {
        self.files(SimStorage::crash)
    }

    /// From now on the image's files behave so.
    pub(crate) fn set_quirks(&self, quirks: Quirks) {
        self.own().for_each(|storage| storage.set_quirks(quirks));
    }

    /// Errors that they have given so far.
    pub(crate) fn errors(&self) -> u64 {
        self.own().chain(&self.backing).map(|storage| storage.errors()).sum()
    }

    /// Flushes of the image's files that have failed so far.
    pub(crate) fn flush_failures(&self) -> u64 {
        self.own().map(|storage| storage.flush_failures()).sum()
    }

    /// Requests that have begun and not ended.
    pub(crate) fn in_flight(&self) -> u64 {
        self.own().map(|storage| storage.in_flight()).sum()
    }
}

/// What the parts of one life share.
pub(crate) struct Bench {
    pub(crate) world: Arc<World>,
    pub(crate) clock: Arc<SimClock>,
    pub(crate) storages: Storages,
    pub(crate) node: Arc<Node>,
    pub(crate) record: Arc<Record>,
    /// A flush that fails has lost nothing.
    pub(crate) keeps_after_flush: bool,
    pub(crate) guests: AtomicU64,
    /// A request was dropped: a commit may have been given up for good.
    pub(crate) has_dropped: AtomicBool,
    /// A resize has failed, perhaps while it wrote the header.
    pub(crate) has_failed_resize: AtomicBool,
    /// Beginnings and ends of resizes.
    pub(crate) resizes: AtomicU64,
}

pub(crate) fn node(
    name: &str,
    driver: Driver,
    read_only: bool,
    clock: &Arc<SimClock>,
) -> Result<Arc<Node>, String> {
    let name = NodeName::new(name).map_err(|error| error.to_string())?;
    let options = NodeOptions { read_only, discard: Discard::Unmap, ..NodeOptions::default() };
    let clock: Arc<dyn Clock> = Arc::<SimClock>::clone(clock);
    Ok(Node::new(name, driver, options, clock))
}

impl Bench {
    /// Opens the image. Tries until no fault of the storage stands in the way.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub(crate) async fn open(
        world: Arc<World>,
        storages: Storages,
        (record, backing): (Arc<Record>, Option<Backing>),
        cache: Option<u64>,
        keeps_after_flush: bool,
    ) -> Result<Arc<Self>, String> {
        let clock = Arc::new(SimClock(Arc::clone(&world)));
        let as_storage =
            |storage: &Arc<SimStorage>| -> Arc<dyn Storage> { Arc::<SimStorage>::clone(storage) };
        let opened = loop {
            let before = storages.errors();
            let options = OpenOptions {
                read_only: false,
                backing: below_node(&storages, backing.as_ref(), &clock).await?,
                data_file: storages.data.as_ref().map(as_storage),
                cache,
            };
            match Qcow2::open(as_storage(&storages.image), options).await {
                Ok(opened) => break opened,
                Err(_) if storages.errors() != before => {
                    record.may_lose_bitmaps.store(true, Ordering::SeqCst);
                }
                Err(error) => return Err(format!("it cannot be opened: {error}")),
            }
        };
        record.opened(&storages.visible()).map_err(|wrong| format!("opened, it is wrong: {wrong}"))?;
        Ok(Arc::new(Self {
            node: node("image", Driver::Qcow2(opened), false, &clock)?,
            clock,
            world,
            storages,
            record,
            keeps_after_flush,
            guests: AtomicU64::new(0),
            has_dropped: AtomicBool::new(false),
            has_failed_resize: AtomicBool::new(false),
            resizes: AtomicU64::new(0),
        }))
    }

    pub(crate) fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.record.oracle()
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.record.seen()
    }

    /// Errors that the storages have given so far.
    pub(crate) fn errors(&self) -> u64 {
        self.storages.errors()
    }

    /// Tells the oracle how many flushes have failed: before it hears that anything is durable.
    pub(crate) fn tell_failures(&self) {
        if !self.keeps_after_flush {
            self.oracle().flushes_failed(self.storages.flush_failures());
        }
    }

    /// Whether the driver may refuse to write tables from now on: a commit was dropped, a flush has failed, or the
    /// header could not be written.
    pub(crate) fn may_be_adrift(&self) -> bool {
        self.has_dropped.load(Ordering::SeqCst)
            || self.has_failed_resize.load(Ordering::SeqCst)
            || self.storages.flush_failures() > 0
    }

    pub(crate) fn guest_ends(&self) {
        self.guests.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn below_node(
    storages: &Storages,
    backing: Option<&Backing>,
    clock: &Arc<SimClock>,
) -> Result<Option<Arc<Node>>, String> {
    let (Some(storage), Some(backing)) = (&storages.backing, backing) else { return Ok(None) };
    let as_storage = || Arc::<SimStorage>::clone(storage);
    if !backing.is_image {
        return node("below", Driver::Raw(Raw::whole(as_storage())), true, clock).map(Some);
    }
    loop {
        let errors = storage.errors();
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        match Qcow2::open(as_storage(), options).await {
            Ok(image) => {
                let below = node("below", Driver::Qcow2(image), true, clock)?;
                debug_assert_eq!(usize_from(below.size()), backing.content.len());
                return Ok(Some(below));
            }
            Err(_) if storage.errors() != errors => {}
            Err(error) => return Err(format!("what is below cannot be opened: {error}")),
        }
    }
}
