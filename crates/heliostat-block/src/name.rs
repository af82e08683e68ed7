//! [`NodeName`]: what an operator calls a node, and which ids are well-formed.

use std::sync::Arc;

use crate::limits::NODE_NAME_MAX;

/// A node's name: a letter, then letters, digits, `-`, `.` and `_`; at most 31 characters, as in QEMU.
/// Names that the program makes itself start with `#`, so that they cannot meet an operator's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Arc<str>);

/// Why a name is refused. The texts are QEMU's (QMP.md 1.11).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// Has a character that it may not have there.
    #[error("Invalid node-name: '{0}'")]
    Malformed(String),
    /// Has more than 31 characters.
    #[error("Node name too long")]
    TooLong,
}

/// Says whether `id` is well-formed as QEMU's ids are: a letter, then letters, digits, `-`, `.` and `_`.
#[must_use]
pub fn is_wellformed_id(id: &str) -> bool {
    let mut bytes = id.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

impl NodeName {
    /// Takes a name from an operator.
    ///
    /// # Errors
    /// [`InvalidName`] when it is malformed or too long.
    pub fn new(name: &str) -> Result<Self, InvalidName> {
        if !is_wellformed_id(name) {
            return Err(InvalidName::Malformed(name.to_owned()));
        }
        if name.len() > NODE_NAME_MAX {
            return Err(InvalidName::TooLong);
        }
        Ok(Self(name.into()))
    }

    /// Makes the name of a node that nobody named.
    #[must_use]
    pub fn generated(number: u64) -> Self {
        Self(format!("#block{number:03}").into())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for NodeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rules_of_ids() {
        for good in ["a", "disk0", "d-1.x_Y", &"n".repeat(31)] {
            assert_eq!(NodeName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "1a", "-a", "#a", "a b", "ä"] {
            assert_eq!(NodeName::new(bad), Err(InvalidName::Malformed(bad.to_owned())));
        }
        assert_eq!(NodeName::new(&"n".repeat(32)), Err(InvalidName::TooLong));
    }

    #[test]
    fn generated_names_cannot_meet_an_operators() {
        assert!(NodeName::new(NodeName::generated(7).as_str()).is_err());
    }
}
