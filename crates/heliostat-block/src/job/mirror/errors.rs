//! What a mirror does about an error: as the policy of that side says (QMP.md 1.8). Silence is no error; see `degraded`.

use super::Mirror;
use crate::error::{BlockError, ErrorKind};
use crate::job::group::Member;
use crate::job::{ErrorAction, Hold, JobEvent, JobStatus, Operation};

impl Mirror {
    /// Does what the policy says about an error of work that was begun in `stint`. The range is dirty again already.
    pub(super) fn meet_error(&mut self, stint: u64, operation: Operation, error: &BlockError) {
        if self.job.status() == JobStatus::Aborting {
            return;
        }
        let policy = match operation {
            Operation::Read => self.options.on_source_error,
            Operation::Write => self.options.on_target_error,
        };
        let no_space = error.kind() == ErrorKind::NoSpace;
        let mut action = policy.action(no_space);
        self.member.iter().for_each(Member::step_back);
        match action {
            ErrorAction::Report => {
                self.failure.get_or_insert_with(|| error.to_string());
            }
            ErrorAction::Stop => match self.job.stop_for_error(no_space, stint) {
                Hold::Held => {}
                // It stays pending and can be finalized again.
                Hold::IsPending => self.rest.begin(self.clock.now()),
                Hold::WasResumed => action = ErrorAction::Ignore,
            },
            ErrorAction::Ignore => {}
        }
        if action == ErrorAction::Ignore {
            self.tally.error_ignored();
            self.rest.begin(self.clock.now());
        }
        // Last: who hears of it may ask for the figures, resume or finalize at once.
        self.tell_figures(true);
        self.job.say(JobEvent::Error {
            operation,
            action,
            node: error.node().to_owned(),
            range: error.range(),
            errno: error.errno(),
        });
    }
}
