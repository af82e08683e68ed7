//! [`Stage`]: the demo's disks and the daemon that serves and mirrors them.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::BytesMut;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use heliostat_block::clock::{Clock, Moment};
use heliostat_block::convert::usize_from;
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::job::{JobEvent, Verb};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::storage::Durability;
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Cache, Existing, Locking, OpenError, OpenOptions};
use heliostat_host::runtime::block_on;
use heliostat_host::signal::Signals;
use heliostat_host::socket::Address;

use super::guest::Guest;
use super::pattern::{BLOCK, Pattern};
use super::proof::{Proof, prove as compare};
use super::record::{PivotWindow, Record};
use super::{Disks, check, interrupted};
use crate::cli::ending;
use crate::cli::image::{self, Image};
use crate::cli::progress::{Look, Meter, Wanted};
use crate::daemon::{Daemon, ExportSpec, Happening, MirrorSpec, NbdAddress, NbdSpec, NodeSpec};
use crate::serve::status::Depth;

/// The export's name.
pub const EXPORT: &str = "disk";

const SOURCE: &str = "source";
const TARGET: &str = "target";
const JOB: &str = "demo";

/// Places with data on the disk; between them are holes.
const PLACES: u64 = 24;
/// Of a place and the hole behind it, so many eighths are data.
const EIGHTHS: u64 = 3;

/// Written at once while the disk is made.
const PIECE_BLOCKS: u64 = 256;
const PIECES_IN_FLIGHT: usize = 4;

/// A mirror that takes so long will not come to its end; one in a demo should take a tenth of it.
const PATIENCE: Duration = Duration::from_secs(120);

/// The blocks that hold data at the start.
#[must_use]
pub fn initial_data(blocks: u64) -> Vec<Range<u64>> {
    let step = blocks / PLACES;
    (0..PLACES).map(|place| place * step..place * step + step * EIGHTHS / 8).collect()
}

/// Where the disk is that the guest begins on.
#[must_use]
pub fn source_path(folder: &Path) -> PathBuf {
    folder.join("source.raw")
}

/// Where it is mirrored to.
#[must_use]
pub fn target_path(folder: &Path) -> PathBuf {
    folder.join("target.raw")
}

/// What both disks take of their host, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The source.
    pub source: u64,
    /// The target.
    pub target: u64,
}

/// How the mirror went.
#[derive(Clone, Copy, Debug)]
pub struct Mirrored {
    /// When the target was in step.
    pub ready: Moment,
    /// When the mirror was told to complete.
    pub asked: Moment,
    /// When it said that it has.
    pub done: Moment,
    /// How long the daemon held the guest at the gate, by its own measure.
    pub pause: Option<Duration>,
    /// Bytes that were copied as data.
    pub data_copied: u64,
}

/// Both disks, and the daemon that has them open.
pub struct Stage {
    folder: PathBuf,
    daemon: Arc<Daemon>,
    address: Address,
}

impl Stage {
    /// Makes the disks, and a daemon that offers the source.
    ///
    /// # Errors
    /// The host's, no space above all; an interruption.
    pub fn build(
        folder: &Path,
        size: u64,
        pattern: Pattern,
        initial: &[Range<u64>],
        signals: &mut Signals,
    ) -> Result<Self> {
        let options = OpenOptions::default();
        let storage = FileStorage::create(&source_path(folder), size, Existing::Refuse, &options)?;
        block_on(write_initial(storage, pattern, initial, signals))
            .context("cannot start the I/O engine")??;
        drop(FileStorage::create(&target_path(folder), size, Existing::Refuse, &options)?);

        let daemon = Daemon::new();
        let node = |name, path| NodeSpec { discard: Discard::Unmap, ..NodeSpec::file(name, path) };
        daemon.add_node(&node(SOURCE, source_path(folder)))?;
        daemon.add_node(&node(TARGET, target_path(folder)))?;
        let socket = NbdAddress::Unix(folder.join("nbd.sock"));
        let address = Address::Unix(folder.join("nbd.sock"));
        let server = NbdSpec {
            addresses: vec![socket],
            max_connections: 0,
            handshake_time: None,
            memory_max: None,
            tls: None,
        };
        let export = ExportSpec {
            depth: Depth::Untold,
            bitmaps: Vec::new(),
            id: EXPORT.to_owned(),
            node: SOURCE.to_owned(),
            name: Some(EXPORT.to_owned()),
            description: Some("the demo's disk".to_owned()),
            writable: true,
            clients: None,
        };
        daemon.serve(&server, &export)?;
        Ok(Self { folder: folder.to_owned(), daemon, address })
    }

    /// Where the guest finds its disk.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// What the disks take now.
    #[must_use]
    pub fn taken(&self) -> Taken {
        let taken = |path| std::fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
        Taken { source: taken(source_path(&self.folder)), target: taken(target_path(&self.folder)) }
    }

    /// Mirrors the source, lets the target take its place when it is ready, and shows how that goes.
    ///
    /// # Errors
    /// When the mirror fails, the guest gives up, or somebody interrupts.
    pub fn mirror(
        &self,
        speed: u64,
        guest: &Guest,
        signals: &mut Signals,
        progress: Wanted,
        clock: RealClock,
    ) -> Result<Mirrored> {
        let (sender, events) = channel();
        // Times are taken where things happen, not where somebody gets round to look.
        let watch = self.daemon.watch(move |event| {
            if let Happening::Job { event, .. } = &event.what {
                // Nobody listens any more once the demo has been interrupted.
                let _ = sender.send((clock.now(), event.clone()));
            }
        });
        let spec = MirrorSpec {
            speed: i64::try_from(speed).context("the speed")?,
            target_is_zero: true,
            ..MirrorSpec::new(JOB, SOURCE, TARGET)
        };
        let job = self.daemon.start_mirror(&spec)?;
        let mut meter = Meter::start("mirror", progress);
        let mut asked = None;
        let started = clock.now();
        let done = loop {
            check(guest, signals)?;
            if clock.now().since(started) > PATIENCE {
                bail!("the mirror did not come to its end in {PATIENCE:?}");
            }
            meter.show(&Look::at(&job));
            match next(&events)? {
                Some((at, JobEvent::Ready)) => {
                    // The limit was there so that the copying can be watched; it has been.
                    let refused = |error| anyhow!("the mirror refused to complete: {error}");
                    job.ask(Verb::SetSpeed(0)).map_err(refused)?;
                    let told = clock.now();
                    job.ask(Verb::Complete).map_err(refused)?;
                    asked = Some((at, told));
                }
                Some((at, JobEvent::Completed(None))) => break at,
                Some((_, JobEvent::Completed(Some(error)))) => bail!("the mirror failed: {error}"),
                Some((_, JobEvent::Cancelled)) => bail!("the mirror was cancelled"),
                _ => {}
            }
        };
        drop(meter);
        drop(watch);
        let (ready, asked) = asked.context("the mirror completed without being asked")?;
        let figures = job.figures();
        Ok(Mirrored { ready, asked, done, pause: figures.pause, data_copied: figures.data_copied })
    }

    /// Ends the daemon: everything is flushed, both files are closed. Answers what the disks take then.
    ///
    /// # Errors
    /// When something could not be made durable.
    pub fn close(self) -> Result<Taken> {
        self.daemon.shutdown()?;
        Ok(self.taken())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Finds nothing to do after a proper end. Otherwise the files are about to be removed, so that what
        // could not be flushed makes no difference.
        let _ = self.daemon.shutdown();
    }
}

type Said = (Moment, JobEvent);

fn next(events: &Receiver<Said>) -> Result<Option<Said>> {
    use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
    match events.recv_timeout(ending::LOOK_EVERY) {
        Ok(said) => Ok(Some(said)),
        Err(Timeout) => Ok(None),
        Err(Disconnected) => bail!("the daemon says nothing any more"),
    }
}

async fn write_initial(
    storage: FileStorage,
    pattern: Pattern,
    initial: &[Range<u64>],
    signals: &mut Signals,
) -> Result<()> {
    let node = Node::new(
        NodeName::generated(0),
        Driver::Raw(Raw::whole(Arc::new(storage))),
        NodeOptions::default(),
        Arc::new(RealClock::new()),
    );
    let pieces = initial.iter().flat_map(|range| {
        let starts = range.clone().step_by(usize_from(PIECE_BLOCKS));
        starts.map(|start| start..(start + PIECE_BLOCKS).min(range.end))
    });
    let written = stream::iter(pieces)
        .map(|blocks| {
            let node = &node;
            async move {
                let mut data = BytesMut::zeroed(usize_from((blocks.end - blocks.start) * BLOCK));
                for (block, bytes) in blocks.clone().zip(data.chunks_mut(usize_from(BLOCK))) {
                    pattern.fill(block, 0, bytes);
                }
                let write = node.enter().await;
                write.write(blocks.start * BLOCK, data.freeze(), Durability::Cached).await
            }
        })
        .buffered(PIECES_IN_FLIGHT);
    let mut written = std::pin::pin!(written);
    while written.try_next().await.context("cannot make the disk; --size takes a smaller one")?.is_some() {
        interrupted(signals)?;
    }
    node.enter().await.flush().await.context("cannot make the disk durable")
}

/// A proof, and how the bytes came to it.
pub struct Proved {
    /// What was found.
    pub proof: Proof,
    /// How the disks were read.
    pub read_back: &'static str,
}

/// Opens both files again and compares them with the record.
///
/// # Errors
/// When one cannot be opened or read.
pub fn prove(disks: Disks<'_>, record: &Record, window: PivotWindow, pattern: Pattern) -> Result<Proved> {
    let source = open(disks.source)?;
    let target = open(disks.target)?;
    let proof = block_on(compare(&source.node, &target.node, record, window, pattern))
        .context("cannot start the I/O engine")?
        .context("cannot read the disks back")?;
    let read_back =
        if target.is_direct { "from the medium, past the page cache" } else { "through the page cache" };
    Ok(Proved { proof, read_back })
}

/// Opens a disk past the page cache where that is possible, so that what is compared is what a later boot of the
/// host would find.
fn open(path: &Path) -> Result<Image, OpenError> {
    match image::open(path, Cache::Direct, Locking::Still) {
        Err(OpenError::NoDirect { .. }) => image::open(path, Cache::Page, Locking::Still),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_eighths_of_the_disk_hold_data() {
        for blocks in [4096, 262_144, 262_147] {
            let initial = initial_data(blocks);
            let data: u64 = initial.iter().map(|range| range.end - range.start).sum();
            assert!(data * 8 <= blocks * 3 && data * 8 > blocks * 2, "{data} of {blocks}");
            assert!(initial.windows(2).all(|pair| pair[0].end < pair[1].start));
            assert!(initial.last().unwrap().end < blocks);
        }
    }
}
