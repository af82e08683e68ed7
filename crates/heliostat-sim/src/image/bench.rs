//! [`Bench`]: what the parts of one life of an image share, from its opening to its closing or a crash.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heliostat_block::clock::Clock;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::qcow2::{OpenOptions, Qcow2};
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::storage::Storage;

use super::format::Image;
use super::judge::check;
use crate::oracle::Oracle;
use crate::storage::SimStorage;
use crate::world::{SimClock, World};

/// What is below an image: its storage, whether that holds an image itself, and what it reads as.
#[derive(Clone)]
pub(crate) struct Backing {
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) is_image: bool,
    pub(crate) content: Arc<Vec<u8>>,
}

/// What a run, or many, came across.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Guests' requests.
    pub requests: u64,
    /// Images that a crash would have left, each judged.
    pub crashes: u64,
    /// Crashes after which the image was opened again and written on.
    pub reopened: u64,
    /// Images that were closed in order, each judged.
    pub closed: u64,
    /// Errors that guests were told of.
    pub errors: u64,
    /// Requests that were dropped before their end.
    pub dropped: u64,
    /// Clusters that were counted and not used, in all images that were judged.
    pub leaks: u64,
}

impl Seen {
    /// Adds what another run saw.
    pub const fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.crashes += other.crashes;
        self.reopened += other.reopened;
        self.closed += other.closed;
        self.errors += other.errors;
        self.dropped += other.dropped;
        self.leaks += other.leaks;
    }
}

/// What the parts of one life share.
pub(crate) struct Bench {
    pub(crate) world: Arc<World>,
    pub(crate) clock: Arc<SimClock>,
    pub(crate) storage: Arc<SimStorage>,
    pub(crate) node: Arc<Node>,
    /// What snapshots read as: it never changes.
    pub(crate) snapshots: Vec<Vec<u8>>,
    pub(crate) backing: Option<Backing>,
    backing_storage: Option<Arc<SimStorage>>,
    /// A flush that fails has lost nothing.
    pub(crate) keeps_after_flush: bool,
    pub(crate) guests: AtomicU64,
    /// A request was dropped: a commit may have been given up for good.
    pub(crate) has_dropped: AtomicBool,
    /// Clusters that the image had lost when it was opened.
    leaks_before: u64,
    oracle: Mutex<Oracle>,
    seen: Mutex<Seen>,
    /// Whether somebody wants the images that are judged.
    pub(crate) keep: AtomicBool,
    kept: Mutex<Vec<(Vec<u8>, u64)>>,
}

/// A storage for the image, and one for what is below it.
pub(crate) struct Storages {
    pub(crate) image: Arc<SimStorage>,
    pub(crate) backing: Option<Arc<SimStorage>>,
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
        backing: Option<Backing>,
        cache: Option<u64>,
        keeps_after_flush: bool,
    ) -> Result<Arc<Self>, String> {
        let clock = Arc::new(SimClock(Arc::clone(&world)));
        let bytes = storages.image.visible();
        let image = Image::new(&bytes)?;
        let below = backing.as_ref().map_or(&[][..], |backing| &backing.content);
        let content = image.content(image.l1, below)?;
        let snapshots =
            image.snapshots.iter().map(|l1| image.content(*l1, below)).collect::<Result<_, _>>()?;
        let leaks_before = check(&image)?;
        let errors = || {
            let below = storages.backing.as_ref().map_or(0, |storage| storage.errors());
            storages.image.errors() + below
        };
        let opened = loop {
            let before = errors();
            let options = OpenOptions {
                read_only: false,
                backing: below_node(&storages, backing.as_ref(), &clock).await?,
                data_file: None,
                cache,
            };
            let storage: Arc<dyn Storage> = Arc::<SimStorage>::clone(&storages.image);
            match Qcow2::open(storage, options).await {
                Ok(opened) => break opened,
                Err(_) if errors() != before => {}
                Err(error) => return Err(format!("it cannot be opened: {error}")),
            }
        };
        Ok(Arc::new(Self {
            node: node("image", Driver::Qcow2(opened), false, &clock)?,
            clock,
            world,
            storage: storages.image,
            snapshots,
            backing,
            backing_storage: storages.backing,
            keeps_after_flush,
            guests: AtomicU64::new(0),
            has_dropped: AtomicBool::new(false),
            leaks_before,
            oracle: Mutex::new(Oracle::new(content)),
            seen: Mutex::default(),
            keep: AtomicBool::new(false),
            kept: Mutex::default(),
        }))
    }

    pub(crate) fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clusters that the image had lost when it was opened.
    pub(crate) const fn leaks_before(&self) -> u64 {
        self.leaks_before
    }

    /// The images that crashes would have left, and how many clusters each had lost.
    pub(crate) fn kept(&self) -> MutexGuard<'_, Vec<(Vec<u8>, u64)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Errors that the storages have given so far.
    pub(crate) fn errors(&self) -> u64 {
        self.storage.errors() + self.backing_storage.as_ref().map_or(0, |storage| storage.errors())
    }

    /// Tells the oracle how many flushes have failed: before it hears that anything is durable.
    pub(crate) fn tell_failures(&self) {
        if !self.keeps_after_flush {
            self.oracle().flushes_failed(self.storage.flush_failures());
        }
    }

    /// Whether the driver may refuse to write tables from now on: a commit was dropped, or a flush has failed.
    pub(crate) fn may_be_adrift(&self) -> bool {
        self.has_dropped.load(Ordering::SeqCst) || self.storage.flush_failures() > 0
    }

    /// Judges what a crash at some moment has left.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn judge_crash(&self, bytes: &[u8]) -> Result<u64, String> {
        let (content, leaks) = self.judge(bytes)?;
        self.oracle().check_crash_of_image(&content)?;
        if self.keep.load(Ordering::SeqCst) {
            self.kept().push((bytes.to_vec(), leaks));
        }
        let mut seen = self.seen();
        seen.crashes += 1;
        seen.leaks += leaks;
        Ok(leaks)
    }

    /// Judges an image that is not being written.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn judge_closed(&self, bytes: &[u8]) -> Result<u64, String> {
        let (content, leaks) = self.judge(bytes)?;
        self.oracle().check_image(&content)?;
        let mut seen = self.seen();
        seen.closed += 1;
        seen.leaks += leaks;
        Ok(leaks)
    }

    /// What a guest would see in it, and how many clusters it has lost.
    fn judge(&self, bytes: &[u8]) -> Result<(Vec<u8>, u64), String> {
        let image = Image::new(bytes)?;
        let leaks = check(&image)?;
        let below = self.backing.as_ref().map_or(&[][..], |backing| &backing.content);
        for (l1, snapshot) in image.snapshots.iter().zip(&self.snapshots) {
            let now = image.content(*l1, below)?;
            if let Some(at) = now.iter().zip(snapshot).position(|(now, then)| now != then) {
                return Err(format!("the snapshot has changed at {at:#x}"));
            }
        }
        Ok((image.content(image.l1, below)?, leaks))
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
