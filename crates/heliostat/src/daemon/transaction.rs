//! Several changes, all or none.
//!
//! Every action is checked in its order against what those before it would leave; what it needs (memory, threads,
//! places at nodes) is had then. Only when all have passed is anything done, and nothing of that can fail: bitmaps
//! change at one moment over all nodes, then mirrors start.

use heliostat_block::job::Group;

use super::bitmaps::Plan;
use super::mirror::{Launch, Prospect, Ready};
use super::{BitmapAction, Daemon, DaemonError, MirrorSpec};

/// One change of a transaction.
#[derive(Clone, Debug)]
pub enum Action {
    /// Of a dirty bitmap.
    Bitmap(BitmapAction),
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
        let mut plan = Plan::default();
        let mut mirrors: Vec<Ready> = Vec::new();
        for action in actions {
            match action {
                Action::Bitmap(action) => plan.add(self, action)?,
                Action::Mirror(spec) => {
                    self.check_room_for_jobs(mirrors.len())?;
                    let ready = self.ready_mirror(spec, &mut plan)?;
                    if mirrors.iter().any(|other| other.id() == ready.id()) {
                        return Err(DaemonError::JobExists(spec.job_id.clone()));
                    }
                    mirrors.push(ready);
                }
                Action::Abort => return Err(TransactionError::Abort.into()),
            }
        }
        plan.carry_out();
        self.go_all(mirrors, mode);
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
    fn ready_mirror(&self, spec: &MirrorSpec, plan: &mut Plan) -> Result<Ready, DaemonError> {
        let source = self.source_of(&spec.source)?;
        self.check_source(&source)?;
        let target = self.node(&spec.target)?;
        let prepared = self.prepare(spec, &source, &Prospect::of(&target))?;
        if let Some(name) = &spec.bitmap.name {
            plan.hold(self, &source, name)?;
        }
        self.ready(Launch { spec, source, target, prepared, observer: self.job_observer() })
    }
}
