//! Nodes in qcow2 images, and what those stand on: given by the operator, or named by the image, one below the other.
//!
//! Follows a name only through the gate. Everything that can be checked comes before the image itself is opened,
//! because opening it for writing may write to it. Called by `nodes` when a node is made.

use std::sync::Arc;

use heliostat_block::driver::Driver;
use heliostat_block::driver::qcow2::bitmap_directory::BitmapEntry;
use heliostat_block::driver::qcow2::error::Corruption;
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::header::Header;
use heliostat_block::driver::qcow2::snapshot::Snapshot;
use heliostat_block::driver::qcow2::{OpenOptions, Qcow2};
use heliostat_block::graph::{Place, Role};
use heliostat_block::name::NodeName;
use heliostat_block::node::{DetectZeroes, Discard};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Storage;
use heliostat_host::runtime;

use super::super::events::Happening;
use super::super::gate::{CHAIN_MAX, Format, GateError, Namer, Purpose, tree_of};
use super::super::open;
use super::super::{Daemon, DaemonError};
use super::{
    BackingSpec, Below, Child, DriverSpec, Making, NodeEntry, NodeSpec, Qcow2Spec, Sharing, TableCache,
};

impl Daemon {
    /// Opens an image and what it stands on. `above` is the image that named this one, if one did.
    pub(super) fn make_image(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        image: &Qcow2Spec,
        making: Making,
        above: Option<Namer>,
    ) -> Result<Below, DaemonError> {
        let file = self.child(&image.file, making)?;
        // Listed before its data file and what it stands on, as in QEMU.
        let at = self.lock_nodes().list.len();
        let is_read_only_below = file.entry.node.options().read_only;
        if is_read_only_below && !spec.read_only && !spec.auto_read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        let storage = file.storage();
        let (header, snapshots, bitmaps) = read(&storage)?;
        check_tables(&image.cache, image.lazy_refcounts, &header)?;
        let by = namer(&file, above);
        check_guess(image, &header, &by)?;
        let everything = ByteRange::from_bounds(0, u64::MAX);
        self.check_heard(&file, true, spec.read_only)?;
        let mut places = vec![self.attach_image(&file, &name, spec.read_only)?];
        let data = self.data_file(spec, image, &header, &by, making)?;
        if let Some(data) = &data {
            self.check_heard(data, true, spec.read_only)?;
            places.push(self.attach_child(data, &name, everything, spec.read_only)?);
        }
        let backing = self.backing(spec, image, &header, &by, making);
        let backing = backing.map_err(|error| DaemonError::Backing(Box::new(error)))?;
        if let Some(backing) = &backing {
            places.push(self.attach_backing(backing, &name)?);
        }
        let read_only = spec.read_only || is_read_only_below;
        let options = OpenOptions {
            read_only,
            backing: backing.as_ref().map(|backing| Arc::clone(&backing.entry.node)),
            data_file: data.as_ref().map(Below::storage),
            cache: image.cache.budget(),
        };
        let opened = runtime::block_on(Qcow2::open(storage, options)).map_err(DaemonError::Engine)??;
        self.tell_of_corruption(&opened, &name, read_only);
        let node = self.node_of(name, Driver::Qcow2(opened), spec);
        let path = file.entry.path.clone();
        let entry = NodeEntry {
            storage: file.entry.storage.clone(),
            child: Some(file.entry.node.name().clone()),
            backing: backing.map(|backing| backing.entry.node.name().clone()),
            backing_is_given: image.backing != BackingSpec::FromImage,
            snapshots,
            bitmaps,
            ..NodeEntry::new(node, "qcow2", path, spec.cache)
        };
        self.keep_at(at, Below { entry, start: file.start, identity: file.identity }, places, making)
    }

    /// Says so when a request finds that the image contradicts itself.
    fn tell_of_corruption(&self, image: &Qcow2, node: &NodeName, read_only: bool) {
        let (events, node) = (Arc::clone(&self.events), node.to_string());
        image.on_corruption(move |corruption| {
            let (text, range) = match corruption {
                Corruption::Overlap { range, table } => {
                    (format!("Preventing invalid write on metadata (overlaps with {table})"), Some(*range))
                }
                other => (other.to_string(), None),
            };
            events.say(Happening::ImageCorrupt { node: node.clone(), text, range, is_fatal: !read_only });
        });
    }

    /// Puts an image on top of the node that holds it. It changes the length, which leaves room for nobody else.
    fn attach_image(&self, file: &Below, of: &NodeName, read_only: bool) -> Result<Arc<Place>, DaemonError> {
        let everything = ByteRange::from_bounds(0, u64::MAX);
        self.attach_child(file, of, everything, read_only).map_err(|error| {
            let node = file.entry.node.name();
            let roles = self.graph.roles(&file.entry.node);
            let other = roles.iter().find_map(|role| match role {
                Role::Child { of, .. } => Some(of),
                _ => None,
            });
            let Some(other) = other else { return error };
            DaemonError::PermissionConflict {
                node: node.clone(),
                permissions: "write, resize",
                user: format!("node '{other}' (uses node '{node}' as 'file' child)"),
                other: format!("node '{of}' (uses node '{node}' as 'file' child)"),
            }
        })
    }

    pub(super) fn attach_backing(&self, backing: &Below, of: &NodeName) -> Result<Arc<Place>, DaemonError> {
        let node = &backing.entry.node;
        let attached = self.graph.attach(node, Role::Backing { of: of.clone() });
        attached.map_err(|_| DaemonError::NodeInUse(node.name().clone()))
    }

    fn data_file(
        &self,
        spec: &NodeSpec,
        image: &Qcow2Spec,
        header: &Header,
        by: &Namer,
        making: Making,
    ) -> Result<Option<Below>, DaemonError> {
        if let Some(child) = &image.data_file {
            let data = self.child(child, making)?;
            if data.entry.node.options().read_only && !spec.read_only {
                return Err(DaemonError::TargetReadOnly);
            }
            return Ok(Some(data));
        }
        let Some(name) = header.data_file.as_ref().filter(|_| header.has_external_data()) else {
            return Ok(None);
        };
        let admitted = self.gate.admit(name, Purpose::Data, by)?;
        let others = if spec.read_only { Sharing::Still } else { Sharing::Locked };
        let below = NodeSpec { discard: Discard::Unmap, ..unnamed(spec, spec.read_only) };
        let file = admitted.file.open(&open::options(&below, sharing(image, others)))?;
        self.make_file(self.graph.generate_name(), &below, making.below(), file, &admitted.path).map(Some)
    }

    fn backing(
        &self,
        spec: &NodeSpec,
        image: &Qcow2Spec,
        header: &Header,
        by: &Namer,
        making: Making,
    ) -> Result<Option<Below>, DaemonError> {
        let found = match (&image.backing, &header.backing_file) {
            (BackingSpec::Nothing, _) | (BackingSpec::FromImage, None) => return Ok(None),
            (BackingSpec::Given(child), _) => self.child(child, making)?,
            (BackingSpec::FromImage, Some(name)) => {
                let format = self.gate.format(header.backing_format.as_deref(), name, by)?;
                self.named_backing(spec, image, name, format, by, making)?
            }
        };
        self.check_chain(&found, by)?;
        Ok(Some(found))
    }

    /// Opens the file on which the image `by` stands by its own account.
    pub(super) fn named_backing(
        &self,
        spec: &NodeSpec,
        image: &Qcow2Spec,
        name: &[u8],
        format: Option<Format>,
        by: &Namer,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let admitted = self.gate.admit(name, Purpose::Backing, by)?;
        let below = unnamed(spec, true);
        // Whoever changed it would change what the guest sees above.
        let others = sharing(image, Sharing::Still);
        let file = admitted.file.open(&open::options(&below, others))?;
        let making = Making { is_owned: false, ..making };
        self.check_new(&below, making)?;
        let file = self.make_file(self.graph.generate_name(), &below, making, file, &admitted.path)?;
        let format = match format {
            Some(format) => format,
            None => probe(&file)?,
        };
        let child = Child::Named(file.entry.node.name().to_string());
        match format {
            Format::Raw => {
                let driver = DriverSpec::Raw { file: child, offset: None, size: None, is_guess: false };
                self.make_node(&NodeSpec { driver, ..below }, making)
            }
            Format::Qcow2 => {
                let name = self.check_new(&below, making)?;
                let lower = Qcow2Spec { sharing: others, ..Qcow2Spec::new(child) };
                self.make_image(name, &below, &lower, making, Some(by.clone()))
            }
        }
    }

    /// Nobody stands on himself: not by way of a node that was given, either.
    pub(super) fn check_chain(&self, backing: &Below, by: &Namer) -> Result<(), DaemonError> {
        let mut at = Some(backing.clone());
        let mut count = by.trail.len();
        while let Some(layer) = at {
            count += 1;
            let path = layer.entry.path.clone();
            if count > CHAIN_MAX {
                return Err(GateError::TooDeep { path }.into());
            }
            if layer.identity.is_some_and(|identity| by.trail.contains(&identity)) {
                return Err(GateError::Loop { path }.into());
            }
            at = match &layer.entry.backing {
                Some(name) => Some(self.below(name.as_str())?),
                None => None,
            };
        }
        Ok(())
    }
}

/// What others may do with a file below an image: anything, where that holds for the image.
const fn sharing(image: &Qcow2Spec, otherwise: Sharing) -> Sharing {
    match image.sharing {
        Sharing::Anything => Sharing::Anything,
        Sharing::Locked | Sharing::Still => otherwise,
    }
}

/// A node that is made because an image names it.
fn unnamed(above: &NodeSpec, read_only: bool) -> NodeSpec {
    NodeSpec {
        name: None,
        read_only,
        auto_read_only: false,
        discard: Discard::ZeroesOnly,
        detect_zeroes: DetectZeroes::Off,
        ..above.clone()
    }
}

pub(super) fn namer(file: &Below, above: Option<Namer>) -> Namer {
    let path = file.entry.path.clone();
    let mut trail = above.as_ref().map_or_else(Vec::new, |above| above.trail.clone());
    trail.extend(file.identity);
    let tree = match above {
        Some(above) => above.tree,
        None => tree_of(&path),
    };
    Namer { path, tree, trail }
}

/// What an image says of itself.
type Read = (Header, Vec<Snapshot>, Vec<BitmapEntry>);

fn read(storage: &Arc<dyn Storage>) -> Result<Read, DaemonError> {
    let file = ImageFile::new(Arc::clone(storage));
    let reading = async {
        let header = Header::read(&file).await?;
        let snapshots = header.read_snapshots(&file).await?;
        // What cannot be believed is not shown; opening the image says why.
        let bitmaps = header.read_bitmap_directory(&file).await.unwrap_or_default();
        Ok((header, snapshots, bitmaps))
    };
    runtime::block_on(reading).map_err(DaemonError::Engine)?
}

/// Guesses, for an operator who has allowed that.
pub(super) fn probe(file: &Below) -> Result<Format, DaemonError> {
    let storage = file.storage();
    let file = ImageFile::new(storage);
    let start = runtime::block_on(file.read(ByteRange::from_bounds(0, 4))).map_err(DaemonError::Engine)?;
    let start = start.map_err(|error| DaemonError::Format(error.into()))?;
    Ok(if start[..] == *b"QFI\xfb" { Format::Qcow2 } else { Format::Raw })
}

/// An image that may be a guest's invention opens no other file.
fn check_guess(image: &Qcow2Spec, header: &Header, by: &Namer) -> Result<(), DaemonError> {
    let names_backing = header.backing_file.as_ref().filter(|_| image.backing == BackingSpec::FromImage);
    let names_data = header.data_file.as_ref().filter(|_| image.data_file.is_none());
    match names_backing.or(names_data) {
        Some(name) if image.is_guess => Err(DaemonError::Guess {
            path: by.path.clone(),
            name: String::from_utf8_lossy(name).into_owned(),
        }),
        _ => Ok(()),
    }
}

impl TableCache {
    /// Bytes for all tables. We divide them up as they are needed.
    fn budget(&self) -> Option<u64> {
        let budget =
            self.total.or_else(|| self.maps.map(|maps| maps.saturating_add(self.counts.unwrap_or(0))));
        budget.map(|bytes| bytes.max(TABLES_MIN))
    }
}

/// The least memory for tables with which work goes on at a fair pace.
const TABLES_MIN: u64 = 256 << 10;

/// Refuses what QEMU refuses, in its words.
fn check_tables(cache: &TableCache, lazy: bool, header: &Header) -> Result<(), DaemonError> {
    let refused = |text: &str| Err(DaemonError::Tables(text.to_owned()));
    if let Some(total) = cache.total {
        if cache.maps.is_some() && cache.counts.is_some() {
            return refused(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            );
        }
        if cache.maps.is_some_and(|bytes| bytes > total) {
            return refused("l2-cache-size may not exceed cache-size");
        }
        if cache.counts.is_some_and(|bytes| bytes > total) {
            return refused("refcount-cache-size may not exceed cache-size");
        }
    }
    let cluster = header.layout.cluster_size();
    if let Some(piece) = cache.piece
        && !(piece.is_power_of_two() && (512..=cluster).contains(&piece))
    {
        return Err(DaemonError::Tables(format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
        )));
    }
    if lazy && header.layout.version < 3 {
        return refused("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level");
    }
    Ok(())
}
