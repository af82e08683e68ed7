//! [`Peers`]: who may give orders: users and groups of this host, as the kernel says who is at the other end.
//!
//! Names are looked up once, in the host's files of users and groups; users from elsewhere (a directory service) are
//! given by number. Knows no command.

use std::collections::BTreeSet;
use std::fs;
use std::str::FromStr;

use super::stream::Stream;

/// A user or a group, as it is written: `user:NAME`, `group:NAME`, or a number for the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A user's number.
    User(u32),
    /// A group's number, and the numbers of the users whom the host's file counts to it.
    Group(u32, BTreeSet<u32>),
}

/// Who may give orders, beside whoever runs the daemon and the host's administrator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers(Vec<Peer>);

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::read(text, &file("/etc/passwd"), &file("/etc/group"))
    }
}

fn file(path: &str) -> String {
    // Without it there are numbers.
    fs::read_to_string(path).unwrap_or_default()
}

/// The fields of the line of that name in one of the host's files.
fn line<'a>(file: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let mut lines = file.lines().map(|line| line.split(':').collect::<Vec<_>>());
    lines.find(|fields| fields.len() > 3 && fields[0] == name)
}

impl Peer {
    fn read(text: &str, users: &str, groups: &str) -> Result<Self, String> {
        let number = |file: &str, name: &str| {
            name.parse().ok().or_else(|| line(file, name)?.get(2)?.parse::<u32>().ok())
        };
        let unknown = |what: &str, name: &str| format!("there is no {what} {name} on this host");
        match text.split_once(':') {
            Some(("user", name)) => number(users, name).map(Self::User).ok_or_else(|| unknown("user", name)),
            Some(("group", name)) => {
                let group = number(groups, name).ok_or_else(|| unknown("group", name))?;
                let is_it = |fields: &Vec<&str>| fields.get(2).is_some_and(|id| *id == group.to_string());
                let fields = groups.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(is_it);
                let names = fields.and_then(|fields| fields.get(3).copied()).unwrap_or_default();
                let members = names.split(',').filter_map(|name| number(users, name)).collect();
                Ok(Self::Group(group, members))
            }
            _ => Err("write user:NAME or group:NAME".to_owned()),
        }
    }

    fn is(&self, user: u32, group: u32) -> bool {
        match self {
            Self::User(allowed) => *allowed == user,
            Self::Group(allowed, members) => *allowed == group || members.contains(&user),
        }
    }
}

impl Peers {
    /// Nobody but whoever runs the daemon, and the administrator.
    #[must_use]
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// These, too.
    #[must_use]
    pub const fn new(peers: Vec<Peer>) -> Self {
        Self(peers)
    }

    /// Says whether there is nobody else.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks who is at the other end.
    ///
    /// # Errors
    /// What to tell whoever may not.
    pub(super) fn check(&self, stream: &Stream) -> Result<(), String> {
        let Stream::Unix(stream) = stream else { return Ok(()) };
        if self.is_none() {
            // The file's mode decides.
            return Ok(());
        }
        let peer = rustix::net::sockopt::socket_peercred(stream)
            .map_err(|error| format!("the host does not say who you are: {error}"))?;
        let own = rustix::process::geteuid();
        let (user, group) = (peer.uid.as_raw(), peer.gid.as_raw());
        let may = peer.uid.is_root() || peer.uid == own || self.0.iter().any(|peer| peer.is(user, group));
        if may { Ok(()) } else { Err(format!("the user {user} may not give orders here")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/:/bin/sh\nben:x:1001:100::/:/bin/sh\n";
    const GROUPS: &str = "root:x:0:\nusers:x:100:\ndisk:x:6:ann,zoe\n";

    fn read(text: &str) -> Result<Peer, String> {
        Peer::read(text, USERS, GROUPS)
    }

    #[test]
    fn names_and_numbers_are_found() {
        assert_eq!(read("user:ann"), Ok(Peer::User(1000)));
        assert_eq!(read("user:4711"), Ok(Peer::User(4711)));
        assert_eq!(read("group:disk"), Ok(Peer::Group(6, BTreeSet::from([1000]))));
        assert_eq!(read("group:6"), Ok(Peer::Group(6, BTreeSet::from([1000]))));
        for wrong in ["user:nobody-here", "group:ann", "ann", "user:", "users:ann", ""] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_group_is_of_whom_it_is_the_first_group_or_the_list_names() {
        let disk = read("group:disk").unwrap();
        assert!(disk.is(1000, 1000) && disk.is(4711, 6));
        assert!(!disk.is(1001, 100));
        let users = read("group:users").unwrap();
        assert!(users.is(1001, 100) && !users.is(1000, 1000));
    }
}
