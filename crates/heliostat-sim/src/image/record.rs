//! [`Record`]: what is known of an image from before it is opened to after it is closed, and what it may hold.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bitmaps::Found;
use super::format::{Files, Image};
use super::judge::check;
use crate::oracle::Oracle;

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
    /// Images that were not closed before, and were repaired when they were opened.
    pub repaired: u64,
    /// Disks that were made longer or shorter.
    pub resized: u64,
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
        self.repaired += other.repaired;
        self.resized += other.resized;
        self.errors += other.errors;
        self.dropped += other.dropped;
        self.leaks += other.leaks;
    }
}

/// What is known of an image.
pub(crate) struct Record {
    /// What snapshots read as: it never changes.
    snapshots: Vec<Vec<u8>>,
    backing: Option<Backing>,
    bitmaps: Vec<Found>,
    /// It was not closed before.
    pub(crate) was_dirty: bool,
    /// Opening it has failed once, after it had said that its bitmaps are in use, perhaps.
    pub(crate) may_lose_bitmaps: AtomicBool,
    is_opened: AtomicBool,
    /// Clusters that the image had lost when it was opened.
    leaks_before: AtomicU64,
    oracle: Mutex<Oracle>,
    seen: Mutex<Seen>,
    /// Whether somebody wants the images that are judged.
    keeps: AtomicBool,
    kept: Mutex<Vec<(Vec<u8>, u64)>>,
}

impl Record {
    /// Looks at an image that nobody has opened yet.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn new(files: &Files, backing: Option<Backing>, keeps: bool) -> Result<Self, String> {
        let image = Image::new(files)?;
        let below = backing.as_ref().map_or(&[][..], |backing| &backing.content);
        let content = image.content(below)?;
        let snapshots = image.snapshots.iter().map(|snapshot| image.content_of(*snapshot, below));
        let leaks = check(&image)?;
        Ok(Self {
            snapshots: snapshots.collect::<Result<_, _>>()?,
            bitmaps: image.found_bitmaps(),
            was_dirty: image.dirty,
            may_lose_bitmaps: AtomicBool::new(false),
            is_opened: AtomicBool::new(false),
            leaks_before: AtomicU64::new(leaks),
            oracle: Mutex::new(Oracle::new(content)),
            seen: Mutex::default(),
            keeps: AtomicBool::new(keeps),
            kept: Mutex::default(),
            backing,
        })
    }

    /// Takes note of the image as it is when it has been opened: whatever was repaired has been.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn opened(&self, files: &Files) -> Result<(), String> {
        let image = Image::new(files)?;
        if image.dirty {
            return Err("it is open, and its counts may be wrong".into());
        }
        self.leaks_before.store(check(&image)?, Ordering::SeqCst);
        self.is_opened.store(true, Ordering::SeqCst);
        self.seen().repaired += u64::from(self.was_dirty);
        Ok(())
    }

    /// Says whether it is open: whatever was to be repaired has been.
    pub(crate) fn is_opened(&self) -> bool {
        self.is_opened.load(Ordering::SeqCst)
    }

    pub(crate) fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether closing it writes bitmaps.
    pub(crate) fn has_bitmaps(&self) -> bool {
        !self.bitmaps.is_empty()
    }

    /// Whether the disk can be made longer: bitmaps that were lost are in the way.
    pub(crate) fn can_resize(&self) -> bool {
        self.bitmaps.iter().all(Found::is_believed) && !self.may_lose_bitmaps.load(Ordering::SeqCst)
    }

    /// Whether the disk cannot be made shorter: snapshots need all of it.
    pub(crate) fn grows_only(&self) -> bool {
        !self.snapshots.is_empty()
    }

    /// Clusters that the image had lost when it was opened.
    pub(crate) fn leaks_before(&self) -> u64 {
        self.leaks_before.load(Ordering::SeqCst)
    }

    /// The images that crashes would have left, and how many clusters each had lost.
    pub(crate) fn kept(&self) -> MutexGuard<'_, Vec<(Vec<u8>, u64)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Judges what a crash at some moment has left.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn judge_crash(&self, files: &Files) -> Result<u64, String> {
        let image = Image::new(files)?;
        let leaks = self.judge(&image, false)?;
        if self.keeps.load(Ordering::SeqCst) && !image.dirty && !image.is_external() {
            self.kept().push((files.image.clone(), leaks));
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
    pub(crate) fn judge_closed(&self, files: &Files) -> Result<u64, String> {
        let image = Image::new(files)?;
        if image.dirty {
            return Err("its counts may be wrong".into());
        }
        let leaks = self.judge(&image, true)?;
        let mut seen = self.seen();
        seen.closed += 1;
        seen.leaks += leaks;
        Ok(leaks)
    }

    /// Judges all of it; says how many clusters it has lost.
    fn judge(&self, image: &Image<'_>, closed: bool) -> Result<u64, String> {
        if image.dirty && !self.was_dirty {
            return Err("it says that its counts may be wrong".into());
        }
        let leaks = check(image)?;
        let below = self.backing.as_ref().map_or(&[][..], |backing| &backing.content);
        for (snapshot, then) in image.snapshots.iter().zip(&self.snapshots) {
            let now = image.content_of(*snapshot, below)?;
            if let Some(at) = now.iter().zip(then).position(|(now, then)| now != then) {
                return Err(format!("the snapshot has changed at {at:#x}"));
            }
        }
        let content = image.content(below)?;
        let oracle = self.oracle();
        let judge = |content: &[u8]| match closed {
            true => oracle.check_image(content),
            false => oracle.check_crash_of_image(content),
        };
        judge(&content)?;
        if let Some(alone) = image.raw_content() {
            judge(&alone).map_err(|wrong| format!("the data file alone: {wrong}"))?;
        }
        let (writes, size_min): (Vec<_>, _) = (oracle.writes().collect(), oracle.size_min());
        drop(oracle);
        let keeps_bitmaps = closed && !self.may_lose_bitmaps.load(Ordering::SeqCst);
        image.check_bitmaps(&self.bitmaps, (&writes, size_min), keeps_bitmaps)?;
        Ok(leaks)
    }
}
