//! Making images as a job, `blockdev-create`: what is asked for is checked before the job touches anything, and a job
//! that fails says why until it is dismissed.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use heliostat_block::driver::Preallocation;
use heliostat_block::driver::qcow2::create::{self, CreateOptions};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::header::Header;
use heliostat_block::graph::{Place, Role};
use heliostat_block::job::{Job, JobEvent, JobOptions, Observer, errand};
use heliostat_block::name::is_wellformed_id;
use heliostat_block::node::Node;
use heliostat_block::node_storage::NodeStorage;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Storage, ZeroSpace};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Existing, Locking, OpenOptions};
use heliostat_host::runtime::Thread;

use super::events::Happening;
use super::jobs::JobKind;
use super::open::open_file;
use super::{Child, Daemon, DaemonError, DriverSpec, JobEntry, NodeSpec};

/// What image is to be made, and where.
#[derive(Clone, Debug)]
pub enum ImageSpec {
    /// A file that holds nothing yet. What is there goes.
    File {
        /// Where.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// What is done about its space.
        preallocation: Preallocation,
    },
    /// A qcow2 image in a node that is there.
    Qcow2 {
        /// The node.
        file: Child,
        /// The node for its data, where that is to be outside.
        data_file: Option<Child>,
        /// What image. Of the data file the name is put in here.
        options: Box<CreateOptions>,
    },
}

/// What holds the image: its bytes, and the right to write them.
struct Held {
    storage: Arc<dyn Storage>,
    /// The node, where it is one, and our use of it.
    node: Option<(Arc<Node>, Arc<Place>)>,
}

/// What the job does.
enum Work {
    File { path: PathBuf, size: u64, preallocation: Preallocation },
    Qcow2 { file: Held, data_file: Option<Held>, options: Box<CreateOptions> },
}

impl Daemon {
    /// Starts a job that makes an image. When it returns, the job has said that it was created and is running; what
    /// cannot be had is the job's error.
    ///
    /// # Errors
    /// `JobId`, `JobExists`, `TooMany`, `Thread`.
    pub fn start_create(&self, id: &str, spec: &ImageSpec) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        if !is_wellformed_id(id) {
            return Err(DaemonError::JobId(id.to_owned()));
        }
        self.check_new_job(id)?;
        let (sender, receiver) = std::sync::mpsc::channel::<(Arc<Job>, Result<Work, String>)>();
        let body = move || async move {
            // Blocks the thread, which has nothing else to do.
            let Ok((job, work)) = receiver.recv() else { return };
            errand::run(&job, async { work?.carry_out().await }).await;
        };
        let thread = Thread::spawn(&format!("create-{id}"), body)
            .map_err(|error| DaemonError::Thread { job: id.to_owned(), error })?;
        let options = JobOptions { auto_dismiss: false, ..JobOptions::default() };
        let job = Job::start(id.to_owned(), options, self.statuses_observer());
        let entry = JobEntry {
            job: Arc::clone(&job),
            kind: JobKind::Create,
            source: String::new(),
            target: String::new(),
            filter_node_name: None,
            opens_at_end: None,
        };
        self.keep_job(entry, thread);
        let work = self.plan(id, spec).map_err(|error| text(&error));
        sender.send((job, work)).expect("the job's thread waits for this");
        Ok(())
    }

    /// Says of jobs what is said of jobs that are no block jobs: how they come along.
    fn statuses_observer(&self) -> Observer {
        let events = Arc::clone(&self.events);
        Arc::new(move |job, event| {
            if matches!(event, JobEvent::Status(_)) {
                let (id, event) = (job.id().to_owned(), event.clone());
                events.say(Happening::Job { id, event, offset: 0, len: 0, pause: None, speed: 0 });
            }
        })
    }

    /// Checks all that can be checked, and takes hold of what will be written. Nothing has been touched then.
    fn plan(&self, id: &str, spec: &ImageSpec) -> Result<Work, DaemonError> {
        match spec {
            ImageSpec::File { preallocation: Preallocation::Metadata, .. } => {
                Err(DaemonError::Create("Unsupported preallocation mode: metadata".to_owned()))
            }
            ImageSpec::File { size, .. } if i64::try_from(*size).is_err() => {
                Err(DaemonError::Create("Could not resize file: Invalid argument".to_owned()))
            }
            ImageSpec::File { path, size, preallocation } => {
                Ok(Work::File { path: path.clone(), size: *size, preallocation: *preallocation })
            }
            ImageSpec::Qcow2 { file, data_file, options } => {
                let mut options = options.clone();
                let found = self.find(file)?;
                let found_data = data_file.as_ref().map(|child| self.find(child)).transpose()?;
                options.data_file = found_data.as_ref().map(|data| data.path.as_os_str().as_bytes().to_vec());
                if !options.size.is_multiple_of(512) {
                    return Err(DaemonError::Create("Image size must be a multiple of 512 bytes".to_owned()));
                }
                options.check()?;
                let file = self.hold(id, found)?;
                let data_file = found_data.map(|data| self.hold(id, data)).transpose()?;
                Ok(Work::Qcow2 { file, data_file, options })
            }
        }
    }

    /// What a child's bytes are. A node that is made for this only is a file that nobody else sees.
    fn find(&self, child: &Child) -> Result<Found, DaemonError> {
        let name = match child {
            Child::Named(name) => name,
            Child::New(spec) => return open_new(spec),
        };
        let nodes = self.nodes();
        let entry = nodes.iter().find(|entry| entry.node.name().as_str() == name);
        let entry = entry.ok_or_else(|| DaemonError::NodeNotFound(name.clone()))?;
        let storage = entry.storage.clone().filter(|storage| {
            entry.node.image().is_none() && !entry.is_window && entry.node.size() == storage.size()
        });
        let storage = storage.unwrap_or_else(|| NodeStorage::new(Arc::clone(&entry.node)));
        Ok(Found { storage, path: entry.path.clone(), node: Some(Arc::clone(&entry.node)) })
    }

    /// Keeps everybody else from the node, as a mirror does with its target.
    fn hold(&self, id: &str, found: Found) -> Result<Held, DaemonError> {
        let Found { storage, node, .. } = found;
        let Some(node) = node else { return Ok(Held { storage, node: None }) };
        if node.options().read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        if let Some(role) = self.graph.roles(&node).first() {
            return Err(conflict(&node, role));
        }
        let role = Role::MirrorTarget { job: id.to_owned() };
        let place = self.graph.attach(&node, role);
        let place = place.map_err(|_| DaemonError::NodeInUse(node.name().clone()))?;
        Ok(Held { storage, node: Some((node, place)) })
    }
}

/// What was found, and is held by nobody yet.
struct Found {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    node: Option<Arc<Node>>,
}

fn open_new(spec: &NodeSpec) -> Result<Found, DaemonError> {
    let (file, driver) = match &spec.driver {
        DriverSpec::File(file) => (file, "file"),
        DriverSpec::HostDevice(file) => (file, "host_device"),
        DriverSpec::Raw { .. }
        | DriverSpec::Nbd(_)
        | DriverSpec::Qcow2(_)
        | DriverSpec::NullCo { .. }
        | DriverSpec::Null(_)
        | DriverSpec::Faults(_)
        | DriverSpec::Throttle { .. }
        | DriverSpec::CopyOnRead { .. }
        | DriverSpec::Preallocate { .. } => {
            return Err(DaemonError::Create(
                "only a file or a block device can be opened for this".to_owned(),
            ));
        }
    };
    if spec.read_only {
        return Err(DaemonError::TargetReadOnly);
    }
    let storage: Arc<dyn Storage> = Arc::new(open_file(file, spec, driver)?);
    Ok(Found { storage, path: file.path.clone(), node: None })
}

/// QEMU's words where somebody uses the node.
fn conflict(node: &Node, role: &Role) -> DaemonError {
    let node = node.name().clone();
    let unnamed = format!("an unnamed block device (uses node '{node}' as 'root' child)");
    let (permissions, other) = match role {
        Role::Backing { of } => return DaemonError::NodeIsBacking { node, of: of.clone() },
        Role::Child { of, .. } => {
            ("write, resize", format!("node '{of}' (uses node '{node}' as 'file' child)"))
        }
        Role::Export { .. } => ("resize", unnamed.clone()),
        Role::MirrorTarget { .. } => ("write, resize", unnamed.clone()),
        Role::MirrorSource { job } => {
            ("resize", format!("mirror job '{job}' (uses node '{node}' as 'source' child)"))
        }
    };
    DaemonError::PermissionConflict { node, permissions, user: unnamed, other }
}

/// What QEMU says, where it has words of its own in a job that creates.
fn text(error: &DaemonError) -> String {
    let text = error.to_string();
    if text.starts_with("The image size is too large for file format") {
        return "Could not resize image: Failed to grow the L1 table: File too large".to_owned();
    }
    text
}

impl Work {
    async fn carry_out(self) -> Result<(), String> {
        match self {
            Self::File { path, size, preallocation } => make_file(&path, size, preallocation).await,
            Self::Qcow2 { file, data_file, options } => {
                let image = ImageFile::new(Arc::clone(&file.storage));
                let data = data_file.as_ref().map(|held| ImageFile::new(Arc::clone(&held.storage)));
                let made = create::create(&image, data.as_ref(), &options).await;
                let made = made.map_err(|error| error.to_string());
                for held in [Some(&file), data_file.as_ref()].into_iter().flatten() {
                    if let Some((node, _)) = &held.node {
                        node.follow_size().await;
                    }
                }
                made?;
                // A node that keeps nothing has not kept this.
                let read = Header::read(&image).await;
                read.map(drop).map_err(|_| "Image is not in qcow2 format".to_owned())
            }
        }
    }
}

async fn make_file(path: &Path, size: u64, preallocation: Preallocation) -> Result<(), String> {
    let options = OpenOptions { locking: Locking::Auto, ..OpenOptions::default() };
    let made = FileStorage::create(path, size, Existing::Replace, &options);
    let storage = made.map_err(|error| {
        let text = DaemonError::from(error).to_string();
        text.replacen("Could not open", "Could not create", 1)
    })?;
    if preallocation != Preallocation::Off {
        let file = ImageFile::new(Arc::new(storage));
        let all = ByteRange::from_bounds(0, size);
        file.write_zeroes(all, ZeroSpace::Keep).await.map_err(|error| error.to_string())?;
        file.flush().await.map_err(|error| error.to_string())?;
    }
    Ok(())
}
