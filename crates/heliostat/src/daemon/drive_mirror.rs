//! Mirrors whose target is a file's name: what that is to become is decided and checked first, then it is made or
//! opened, then the mirror starts on it.
//!
//! No file is made or loses anything before every argument has passed. What was opened or made for a mirror that does
//! not start goes again.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use heliostat_block::driver::qcow2::create::CreateOptions;
use heliostat_block::job::Job;
use heliostat_block::job::scan::SyncMode;
use heliostat_block::name::NodeName;
use heliostat_block::node::Discard;
use heliostat_host::file::FileStorage;
use heliostat_host::open::OpenOptions;
use heliostat_host::pinned::Identity;
use rustix::io::Errno;

use super::error::strerror;
use super::gate::Format;
use super::mirror::{Clusters, Launch, Prospect};
use super::mirror_bitmap::BitmapUseError;
use super::new_file::Made;
use super::nodes::Wanted;
use super::open::{is_device, options};
use super::{Beneath, Daemon, DaemonError, DriverSpec, MirrorSpec, NodeEntry, NodeSpec, Sharing, is_nbd};

/// A mirror to a target by name.
#[derive(Clone, Debug)]
pub struct DriveMirrorSpec {
    /// All the rest. Its target says nothing.
    pub mirror: MirrorSpec,
    /// The target.
    pub target: TargetName,
    /// QEMU's name of the target's format; the source's where nothing is said of a new one, what it looks like where
    /// nothing is said of one that is there.
    pub format: Option<String>,
    /// The name of the target's node.
    pub node_name: Option<String>,
    /// Whether it is made.
    pub mode: TargetMode,
}

/// What a target's name means.
#[derive(Clone, Debug)]
pub enum TargetName {
    /// A file or a block device.
    Path(PathBuf),
    /// Something else that holds bytes; by which word it was named.
    Protocol(&'static str, Box<NodeSpec>),
    /// A node as it is to be, with nothing on top of it unless a format is said.
    Definition(Box<NodeSpec>),
    /// Nothing that can be used; by which word it was named, and why not, which is said when its turn comes.
    Unusable(String, String),
}

/// Whether a target is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetMode {
    /// It is, whatever is there. Where it stands on something, that is named in full.
    #[default]
    AbsolutePaths,
    /// It is there, and used as it is.
    Existing,
}

/// The cluster of a new image.
const CLUSTER: u32 = 64 << 10;

/// A format, as QEMU's names have it: with nothing on top of the file, or with something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    None,
    Format(Format),
}

impl Layer {
    pub(super) const fn wanted(self) -> Wanted {
        match self {
            Self::None => Wanted::AsBelow,
            Self::Format(format) => Wanted::Said(format),
        }
    }

    /// How many nodes it takes, that of the file among them.
    pub(super) const fn nodes(self) -> usize {
        match self {
            Self::None => 1,
            Self::Format(_) => 2,
        }
    }

    pub(super) const fn is_image(self) -> bool {
        matches!(self, Self::Format(Format::Qcow2))
    }
}

/// A target that is to be made.
pub(super) struct New {
    pub(super) path: PathBuf,
    pub(super) layer: Layer,
    pub(super) beneath: Beneath,
    pub(super) image: Option<CreateOptions>,
}

impl Daemon {
    /// Starts a mirror to a target that is made, or opened, for it. When it returns, the job has said that it was
    /// created and is running.
    ///
    /// # Errors
    /// [`DaemonError`] for each argument that cannot be used, in the order in which QEMU says them.
    pub fn start_drive_mirror(&self, spec: &DriveMirrorSpec) -> Result<Arc<Job>, DaemonError> {
        let _change = self.begin_change()?;
        let source = self.source_of(&spec.mirror.source)?;
        self.check_source(&source)?;
        let entries = self.nodes();
        let entry = entries.iter().find(|entry| Arc::ptr_eq(&entry.node, &source));
        let entry = entry.ok_or_else(|| DaemonError::NodeNotFound(spec.mirror.source.clone()))?;
        if spec.mirror.replaces.is_some() && spec.node_name.is_none() {
            return Err(DaemonError::ReplacesWithoutName);
        }
        match spec.mode {
            TargetMode::AbsolutePaths => match export_of(spec, entry) {
                Some(below) => self.mirror_to_export(spec, entry, below),
                None => self.mirror_to_new(spec, entry, &entries),
            },
            TargetMode::Existing => self.mirror_to_existing(spec, entry),
        }
    }

    fn mirror_to_existing(
        &self,
        spec: &DriveMirrorSpec,
        source: &NodeEntry,
    ) -> Result<Arc<Job>, DaemonError> {
        let layer = spec.format.as_deref().map(|name| match layer(name) {
            Some(layer) => Ok(layer),
            None => Err(DaemonError::UnknownDriver(name.to_owned())),
        });
        let (below, unsaid) = match &spec.target {
            TargetName::Path(path) => (file_spec(path, source), self.unsaid(source)),
            TargetName::Protocol(_, below) => ((**below).clone(), self.unsaid(source)),
            TargetName::Definition(node) => ((**node).clone(), Wanted::AsBelow),
            TargetName::Unusable(_, why) => return Err(DaemonError::Create(why.clone())),
        };
        let wanted = match layer.transpose()? {
            // A definition that has the format already is not put into another.
            Some(layer) if is_of(&below.driver, layer) => Wanted::AsBelow,
            Some(layer) => layer.wanted(),
            None => unsaid,
        };
        let target = self.make_target(&below, spec.node_name.clone(), wanted)?;
        let started = (|| {
            let prepared = self.prepare(&spec.mirror, &source.node, &Prospect::of(&target))?;
            let beneath = if target.image().is_some() { Beneath::FromHeader } else { Beneath::AsItIs };
            self.launch(Launch {
                spec: &MirrorSpec { beneath, ..spec.mirror.clone() },
                source: Arc::clone(&source.node),
                target,
                prepared,
                observer: self.job_observer(),
            })
        })();
        if started.is_err() {
            self.drop_orphans();
        }
        started
    }

    /// An export cannot be made, so one that is there is used: as QEMU has it, but only as raw bytes.
    fn mirror_to_export(
        &self,
        spec: &DriveMirrorSpec,
        source: &NodeEntry,
        below: &NodeSpec,
    ) -> Result<Arc<Job>, DaemonError> {
        let target = self.make_target(below, spec.node_name.clone(), Wanted::Said(Format::Raw));
        let target = target.map_err(|error| DaemonError::Create(no_export(&error.to_string())))?;
        let started = (|| {
            if target.size() < source.node.size() {
                return Err(DaemonError::Nbd("Cannot grow NBD nodes".to_owned()));
            }
            let prepared = self.prepare(&spec.mirror, &source.node, &Prospect::of(&target))?;
            self.launch(Launch {
                spec: &MirrorSpec { sync: whole_of(spec.mirror.sync), ..spec.mirror.clone() },
                source: Arc::clone(&source.node),
                target: Arc::clone(&target),
                prepared,
                observer: self.job_observer(),
            })
        })();
        drop(target);
        if started.is_err() {
            self.drop_orphans();
        }
        started
    }

    /// What a target is taken for when nothing is said. A file of bytes that is mirrored as such goes to another one,
    /// whatever that looks like, as in QEMU.
    fn unsaid(&self, source: &NodeEntry) -> Wanted {
        match layer(source.driver) {
            Some(Layer::None) => Wanted::AsBelow,
            None if is_over_nothing(source.driver) || source.driver == "blkdebug" => Wanted::AsBelow,
            Some(Layer::Format(_)) | None => Wanted::Guessed,
        }
    }

    fn mirror_to_new(
        &self,
        spec: &DriveMirrorSpec,
        source: &NodeEntry,
        entries: &[NodeEntry],
    ) -> Result<Arc<Job>, DaemonError> {
        if spec.mirror.sync == SyncMode::Bitmap && spec.mirror.sync_not_there.is_none() {
            return Err(BitmapUseError::NewTarget.into());
        }
        let new = plan(spec, source, entries)?;
        check_creatable(&new.path, source, &self.files_in_use())?;
        if let Some(name) = &spec.node_name {
            let name = NodeName::new(name)?;
            if self.is_taken(name.as_str()) {
                return Err(DaemonError::NodeExists(name.to_string()));
            }
        }
        self.check_room_for_nodes(new.layer.nodes())?;
        let size = new.layer.is_image().then_some(CLUSTER);
        let whole = size.filter(|_| new.beneath != Beneath::AsItIs);
        let prospect = Prospect { node: None, clusters: Clusters { size, whole } };
        let prepared = self.prepare(&spec.mirror, &source.node, &prospect)?;
        if let Some(name) = spec.node_name.as_ref().filter(|_| spec.node_name == spec.mirror.filter_node_name)
        {
            return Err(DaemonError::NodeExists(name.clone()));
        }
        if spec.mirror.speed < 0 {
            self.say_stillborn(&spec.mirror.job_id);
            return Err(DaemonError::Speed);
        }
        let made = Made::in_place(&new, source)?;
        let below = file_spec(&new.path, source);
        let started = (|| {
            let target = self.make_target(&below, spec.node_name.clone(), new.layer.wanted())?;
            let is_zero = new.beneath == Beneath::AsItIs && (new.image.is_some() || !is_device(&new.path));
            let mirror = MirrorSpec {
                target_is_zero: is_zero,
                beneath: new.beneath,
                // What stands on nothing has no top.
                sync: if new.beneath == Beneath::AsItIs {
                    whole_of(spec.mirror.sync)
                } else {
                    spec.mirror.sync
                },
                ..spec.mirror.clone()
            };
            self.launch(Launch {
                spec: &mirror,
                source: Arc::clone(&source.node),
                target,
                prepared,
                observer: self.job_observer(),
            })
        })();
        match &started {
            Ok(_) => made.keep(),
            Err(_) => self.drop_orphans(),
        }
        started
    }
}

/// QEMU's words where an export is to be made and cannot be opened.
fn no_export(why: &str) -> String {
    format!(
        "Protocol driver 'nbd' does not support creating new images, so an existing image must be selected as the \
         target; however, opening the given target as an existing image failed: {why}"
    )
}

/// The export that is to be the target, where it is to hold raw bytes and stands on nothing.
fn export_of<'a>(spec: &'a DriveMirrorSpec, source: &NodeEntry) -> Option<&'a NodeSpec> {
    let TargetName::Protocol("nbd", below) = &spec.target else { return None };
    let format = spec.format.as_deref().unwrap_or(source.driver);
    let stands = match spec.mirror.sync {
        SyncMode::None => true,
        SyncMode::Top => source.node.backing().is_some(),
        SyncMode::Full | SyncMode::Bitmap => false,
    };
    (layer(format) == Some(Layer::Format(Format::Raw)) && !stands).then_some(below)
}

/// A sync mode without a chain.
const fn whole_of(sync: SyncMode) -> SyncMode {
    match sync {
        SyncMode::Top => SyncMode::Full,
        other => other,
    }
}

/// Decides what a new target is to be. Looks at no file.
fn plan(spec: &DriveMirrorSpec, source: &NodeEntry, entries: &[NodeEntry]) -> Result<New, DaemonError> {
    let format = spec.format.as_deref().unwrap_or(source.driver);
    let refused = |text: String| Err(DaemonError::Create(text));
    let is_protocol =
        is_over_nothing(format) || matches!(format, "blkdebug" | "throttle" | "copy-on-read" | "preallocate");
    let layer = layer(format);
    if layer.is_none() && !is_protocol {
        return refused(format!("Unknown file format '{format}'"));
    }
    if let TargetName::Unusable(word, why) = &spec.target {
        let is_known = is_nbd(word);
        return refused(if is_known { no_export(why) } else { format!("Unknown protocol '{word}'") });
    }
    let path = match (&spec.target, layer) {
        (TargetName::Definition(_) | TargetName::Unusable(..), _) => {
            return refused("Unknown protocol 'json'".to_owned());
        }
        (_, None) => return refused(format!("Format driver '{format}' does not support image creation")),
        (TargetName::Protocol(word, _), _) => {
            return refused(format!("Protocol driver '{word}' does not support image creation"));
        }
        (TargetName::Path(path), Some(_)) => path.clone(),
    };
    let layer = layer.unwrap_or(Layer::None);
    let below = match spec.mirror.sync {
        SyncMode::None if spec.mirror.sync_not_there.is_none() => {
            // Below the filters, it stands on what it replaces there.
            let name = spec.mirror.replaces.as_deref();
            let replaced = entries.iter().find(|entry| Some(entry.node.name().as_str()) == name);
            Some((Beneath::Source, replaced.unwrap_or(source)))
        }
        SyncMode::Top => {
            let backing = source.node.backing();
            let entry = backing.and_then(|node| entries.iter().find(|entry| Arc::ptr_eq(&entry.node, &node)));
            entry.map(|entry| (Beneath::SourcesBacking, entry))
        }
        SyncMode::Full | SyncMode::None | SyncMode::Bitmap => None,
    };
    let (beneath, below) = below.map_or((Beneath::AsItIs, None), |(beneath, entry)| (beneath, Some(entry)));
    if below.is_some() && !layer.is_image() {
        return refused(format!("Backing file not supported for file format '{format}'"));
    }
    let image = layer.is_image().then(|| image_of(source, below)).transpose()?;
    Ok(New { path, layer, beneath, image })
}

pub(super) fn image_of(source: &NodeEntry, below: Option<&NodeEntry>) -> Result<CreateOptions, DaemonError> {
    let size = source.node.size();
    if !size.is_multiple_of(512) {
        let text = "The source is no multiple of 512 bytes long, which a qcow2 image is; say format=raw";
        return Err(DaemonError::Create(text.to_owned()));
    }
    let mut image = CreateOptions { size, ..CreateOptions::default() };
    if let Some(below) = below {
        let format = match layer(below.driver) {
            Some(Layer::Format(Format::Qcow2)) => "qcow2",
            Some(_) if !below.is_window && !below.is_fixed => "raw",
            // A window, or something that is in no file.
            _ => {
                let text = format!("Node '{}' has no name that an image could stand on", below.node.name());
                return Err(DaemonError::Create(text));
            }
        };
        // It means the same wherever the image goes.
        let path = std::fs::canonicalize(&below.path).unwrap_or_else(|_| below.path.clone());
        image.backing_file = Some(path.as_os_str().as_bytes().to_vec());
        image.backing_format = Some(format.as_bytes().to_vec());
    }
    image.check()?;
    Ok(image)
}

fn is_over_nothing(driver: &str) -> bool {
    driver.starts_with("null-")
}

pub(super) fn layer(name: &str) -> Option<Layer> {
    match name {
        "file" | "host_device" => Some(Layer::None),
        "raw" => Some(Layer::Format(Format::Raw)),
        "qcow2" => Some(Layer::Format(Format::Qcow2)),
        _ => None,
    }
}

const fn is_of(driver: &DriverSpec, layer: Layer) -> bool {
    matches!(
        (driver, layer),
        (DriverSpec::Qcow2(_), Layer::Format(Format::Qcow2))
            | (DriverSpec::Raw { .. }, Layer::Format(Format::Raw))
            | (DriverSpec::File(_) | DriverSpec::HostDevice(_), Layer::None)
    )
}

/// The file at `path`, used as that of the source is.
pub(super) fn file_spec(path: &Path, source: &NodeEntry) -> NodeSpec {
    let discard = match source.node.options().discard {
        Discard::Unmap => Discard::Unmap,
        Discard::Ignore | Discard::ZeroesOnly => Discard::ZeroesOnly,
    };
    let driver = DriverSpec::at(path.to_owned(), Sharing::Locked);
    NodeSpec { cache: source.cache, discard, ..NodeSpec::new(None, driver) }
}

/// Refuses a file that could not be made, as far as that can be known before; and one that a node of ours is in, also
/// where no locks say so.
pub(super) fn check_creatable(
    path: &Path,
    source: &NodeEntry,
    in_use: &[Identity],
) -> Result<(), DaemonError> {
    let refused = |errno| {
        Err(DaemonError::Create(format!("Could not create '{}': {}", path.display(), strerror(errno))))
    };
    match std::fs::metadata(path) {
        Ok(there) if there.is_dir() => return refused(Errno::ISDIR),
        // Opened as it will be, so that its locks and its permissions are known.
        Ok(_) => {
            let options: OpenOptions = options(&file_spec(path, source), Sharing::Locked);
            let storage = FileStorage::open(path, &options).map_err(|error| creation(error.into()))?;
            if storage.identity().is_ok_and(|identity| in_use.contains(&identity)) {
                return Err(DaemonError::Create("Failed to get \"resize\" lock".to_owned()));
            }
            return Ok(());
        }
        Err(_) => {}
    }
    let parent = path.parent().unwrap_or(path);
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    match std::fs::metadata(parent) {
        Ok(parent) if parent.is_dir() && !path.as_os_str().is_empty() => Ok(()),
        Ok(parent) if !parent.is_dir() => refused(Errno::NOTDIR),
        _ => refused(Errno::NOENT),
    }
}

/// QEMU's words where a file cannot be made.
pub(super) fn creation(error: DaemonError) -> DaemonError {
    let text = error.to_string();
    let text = text.replacen("Could not open", "Could not create", 1);
    // It is made longer before it is written.
    DaemonError::Create(text.replacen("Failed to get \"write\" lock", "Failed to get \"resize\" lock", 1))
}

#[cfg(test)]
mod tests {
    use heliostat_block::driver::qcow2::create::{CreateOptions, create};
    use heliostat_block::driver::qcow2::file::ImageFile;
    use heliostat_block::job::{Force, JobEvent, Verb};
    use heliostat_host::file::FileStorage;
    use heliostat_host::open::{Access, Existing, OpenOptions};
    use heliostat_host::runtime;

    use super::*;
    use crate::daemon::events::Happening;

    /// Somebody may look at the job for longer than it lives.
    #[test]
    fn a_target_is_anybodys_when_its_job_has_said_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("target");
        let options = OpenOptions { access: Access::ReadWrite, ..OpenOptions::default() };
        let storage = FileStorage::create(&path, 0, Existing::Replace, &options).unwrap();
        let image = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
        runtime::block_on(create(&ImageFile::new(Arc::new(storage)), None, &image)).unwrap().unwrap();
        let daemon = Daemon::new();
        let null = DriverSpec::NullCo { size: 1 << 20, read_zeroes: true };
        daemon.add_node(&NodeSpec::new(Some("source".to_owned()), null)).unwrap();
        let events = daemon.subscribe();
        let spec = DriveMirrorSpec {
            mirror: MirrorSpec::new("j", "source", ""),
            target: TargetName::Path(path.clone()),
            format: Some("qcow2".to_owned()),
            node_name: None,
            mode: TargetMode::Existing,
        };
        daemon.start_drive_mirror(&spec).unwrap();
        let entry = daemon.job("j").unwrap();
        let hears = |wanted: &JobEvent| loop {
            let next = events.next(std::time::Duration::from_secs(30)).expect("something is said");
            if matches!(&next.what, Happening::Job { event, .. } if event == wanted) {
                return;
            }
        };
        hears(&JobEvent::Ready);
        assert!(FileStorage::open(&path, &options).is_err(), "it is the job's");
        daemon.ask_job(&entry, Verb::Cancel(Force::Hard)).unwrap();
        hears(&JobEvent::Cancelled);
        FileStorage::open(&path, &options).unwrap();
    }
}
