//! [`Refusal`]: why a command is refused, as a client sees it.

use heliostat_block::job::VerbError;
use serde_json::{Value, json};

use crate::daemon::DaemonError;

/// The classes of errors that a client may tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Any but the others.
    Generic,
    /// There is no such command, or not now.
    CommandNotFound,
    /// There is no such job.
    DeviceNotActive,
    /// There is no such object.
    DeviceNotFound,
}

/// Why a command is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    class: Class,
    text: String,
}

impl Refusal {
    /// Makes one of the class that most are of.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self::of(Class::Generic, text)
    }

    /// Makes one.
    #[must_use]
    pub fn of(class: Class, text: impl Into<String>) -> Self {
        Self { class, text: text.into() }
    }

    /// A job's refusal of `verb`, in QEMU's words (QMP.md 1.11).
    #[must_use]
    pub fn of_verb(error: &VerbError, job: &str, verb: &str, status: &str) -> Self {
        Self::new(match error {
            VerbError::Status(_) => {
                format!("Job '{job}' in state '{status}' cannot accept command verb '{verb}'")
            }
            VerbError::CurrentlyPaused => {
                format!("The block job for device '{job}' is currently paused")
            }
            VerbError::CannotComplete => format!("The active block job '{job}' cannot be completed"),
            VerbError::AlreadyPaused | VerbError::NotPaused => error.to_string(),
            VerbError::Other { job: other, error } => {
                let status = match **error {
                    VerbError::Status(status) => status.name(),
                    _ => status,
                };
                let other = Self::of_verb(error, other, verb, status);
                format!("Job '{job}' ends together with others: {}", other.text)
            }
        })
    }

    /// What it says.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Says whether it is about the argument `name`.
    #[must_use]
    pub fn is_about(&self, name: &str) -> bool {
        self.text.starts_with(&format!("Parameter '{name}' "))
    }

    /// The member `error` of a reply.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let class = match self.class {
            Class::Generic => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
            Class::DeviceNotFound => "DeviceNotFound",
        };
        json!({ "class": class, "desc": self.text })
    }
}

impl From<DaemonError> for Refusal {
    fn from(error: DaemonError) -> Self {
        Self::new(error.to_string())
    }
}
