//! Several changes, all or none.
//!
//! Every action is checked in its order against what those before it would leave; what it needs (memory, threads,
//! places at nodes, files) is had then. Where a file takes the place of another, all is gone through without making any
//! first, so that nothing is lost when it is refused. Only when all have passed is anything done: bitmaps change and
//! snapshots are taken at one moment over all nodes, which happens or does not; then mirrors start, which cannot fail.

use heliostat_block::job::Group;

use super::bitmaps::Plan;
use super::mirror::{Launch, Prospect, Ready};
use super::new_file::Made;
use super::snapshot::{Pass, SnapshotSpec, Snapshots};
use super::{BitmapAction, Daemon, DaemonError, MirrorSpec, TargetMode};

/// One change of a transaction.
#[derive(Clone, Debug)]
pub enum Action {
    /// Of a dirty bitmap.
    Bitmap(BitmapAction),
    /// A node takes the place of another, on top of it.
    Snapshot {
        /// The node that clients leave.
        node: String,
        /// The one that they go to.
        overlay: String,
    },
    /// The same, with a node that is made or opened.
    SnapshotToFile(SnapshotSpec),
    /// A mirror starts.
    Mirror(Box<MirrorSpec>),
    /// All is refused.
    Abort,
}

/// How the jobs of a transaction end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionMode {
    /// Each for itself.
    #[default]
    Individual,
    /// At one moment, all or none (MIRROR.md section 7, groups). They end by themselves only where each of them may.
    Grouped,
}

/// What there would be.
#[derive(Default)]
struct Plans {
    bitmaps: Plan,
    snapshots: Snapshots,
    mirrors: Vec<Ready>,
}

/// Why there is no transaction. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransactionError {
    /// It was asked for.
    #[error("Transaction aborted using Abort action")]
    Abort,
    /// The action cannot end together with others.
    #[error("Action '{0}' does not support transaction property completion-mode = grouped")]
    Grouped(String),
}

impl Daemon {
    /// Does all of `actions`, or nothing.
    ///
    /// # Errors
    /// Of the first action that cannot be done.
    pub fn transaction(&self, actions: &[Action], mode: CompletionMode) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        if actions.iter().any(Action::replaces_file) {
            let mut plans = Plans::default();
            let checked = self.plan_all(actions, Pass::Check, &mut plans);
            drop(plans);
            self.drop_orphans();
            checked?;
        }
        let mut plans = Plans::default();
        let done =
            self.plan_all(actions, Pass::Make, &mut plans).and_then(|()| self.change_at_once(&mut plans));
        let made = plans.snapshots.take_made();
        match &done {
            Ok(()) => {
                made.into_iter().for_each(Made::keep);
                self.go_all(std::mem::take(&mut plans.mirrors), mode);
                // Without an export nobody uses an overlay that was made; it goes, and the file stays, as in QEMU.
                self.drop_orphans();
            }
            Err(_) => {
                drop(plans);
                self.drop_orphans();
                // Now that nobody has them open.
                drop(made);
            }
        }
        done
    }

    fn plan_all(&self, actions: &[Action], pass: Pass, plans: &mut Plans) -> Result<(), DaemonError> {
        let mut all_seen = true;
        for action in actions {
            let names = action.nodes(self, &plans.snapshots);
            if names.iter().any(|name| plans.snapshots.promises(name)) {
                // It is looked at when the other is there.
                all_seen = false;
                if let Action::SnapshotToFile(spec) = action {
                    plans.snapshots.defer(spec)?;
                }
                continue;
            }
            self.plan_one(action, pass, plans)?;
        }
        if all_seen { Ok(()) } else { plans.snapshots.check_new_files() }
    }

    fn plan_one(&self, action: &Action, pass: Pass, plans: &mut Plans) -> Result<(), DaemonError> {
        match action {
            Action::Bitmap(action) => plans.bitmaps.add(self, action),
            Action::Snapshot { node, overlay } => plans.snapshots.add(self, node, overlay),
            Action::SnapshotToFile(spec) => plans.snapshots.add_file(self, spec, pass),
            Action::Mirror(spec) => {
                self.check_room_for_jobs(plans.mirrors.len())?;
                let ready = self.ready_mirror(spec, plans)?;
                if plans.mirrors.iter().any(|other| other.id() == ready.id()) {
                    return Err(DaemonError::JobExists(spec.job_id.clone()));
                }
                plans.mirrors.push(ready);
                Ok(())
            }
            Action::Abort => Err(TransactionError::Abort.into()),
        }
    }

    /// Changes bitmaps and takes snapshots, at one moment.
    fn change_at_once(&self, plans: &mut Plans) -> Result<(), DaemonError> {
        if !plans.snapshots.is_empty() {
            return plans.snapshots.take(self, plans.bitmaps.changes());
        }
        plans.bitmaps.carry_out();
        Ok(())
    }

    fn go_all(&self, mirrors: Vec<Ready>, mode: CompletionMode) {
        let group = (mode == CompletionMode::Grouped).then(|| Group::new(mirrors.len()));
        let auto_finalize = mirrors.iter().all(Ready::auto_finalize);
        for mut ready in mirrors {
            if group.is_some() {
                ready.set_auto_finalize(auto_finalize);
            }
            let _job = self.go(ready, group.as_ref());
        }
    }

    /// Checks all that a mirror needs and has it ready to start.
    fn ready_mirror(&self, spec: &MirrorSpec, plans: &mut Plans) -> Result<Ready, DaemonError> {
        let spec = &MirrorSpec { source: plans.snapshots.meant(self, &spec.source), ..spec.clone() };
        let source = self.source_of(&spec.source)?;
        if plans.snapshots.is_left(&source) {
            return Err(DaemonError::NotRoot);
        }
        self.check_source(&source)?;
        let target = self.node(&spec.target)?;
        plans.snapshots.check_target(self, &target)?;
        let prepared = self.prepare(spec, &source, &Prospect::of(&target))?;
        plans.snapshots.keep_free(spec.filter_node_name.as_deref())?;
        if let Some(name) = &spec.bitmap.name {
            plans.bitmaps.hold(self, &source, name)?;
        }
        self.ready(Launch { spec, source, target, prepared, observer: self.job_observer() })
    }
}

impl Action {
    /// Says whether it makes a file where one is.
    fn replaces_file(&self) -> bool {
        matches!(self, Self::SnapshotToFile(spec)
            if spec.mode == TargetMode::AbsolutePaths && spec.file.symlink_metadata().is_ok())
    }

    /// The nodes that it names, after `snapshots`.
    fn nodes(&self, daemon: &Daemon, snapshots: &Snapshots) -> Vec<String> {
        let meant = |device: &String| snapshots.meant(daemon, device);
        match self {
            Self::Bitmap(action) => action.nodes().into_iter().map(str::to_owned).collect(),
            Self::Snapshot { node, overlay } => vec![node.clone(), overlay.clone()],
            Self::SnapshotToFile(spec) => {
                spec.device.iter().map(meant).chain(spec.node_name.clone()).collect()
            }
            Self::Mirror(spec) => vec![meant(&spec.source), spec.target.clone()],
            Self::Abort => Vec::new(),
        }
    }
}
