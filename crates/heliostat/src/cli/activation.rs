//! Sockets that a service manager has bound and passed on: `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`, as
//! `sd_listen_fds(3)` reads them.
//!
//! Reads the environment it is given; opens nothing.

/// The number of the first of them.
const FIRST: i32 = 3;

/// More than any unit has; a number that is larger is a mistake.
const SOCKETS_MAX: i32 = 1024;

/// A socket that was passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Its descriptor's number.
    pub number: i32,
    /// Its name; `unknown` where nothing was said.
    pub name: String,
}

/// The sockets that were passed to the process `pid`, of whose environment `variable` tells.
pub fn sockets(pid: u32, variable: impl Fn(&str) -> Option<String>) -> Vec<Passed> {
    // Whoever starts others may leave its own variables to them.
    if variable("LISTEN_PID").and_then(|pid| pid.parse().ok()) != Some(pid) {
        return Vec::new();
    }
    let count: i32 = variable("LISTEN_FDS").and_then(|count| count.parse().ok()).unwrap_or(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    (FIRST..FIRST + count.clamp(0, SOCKETS_MAX))
        .map(|number| Passed { number, name: names.next().unwrap_or("unknown").to_owned() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(variables: &[(&str, &str)]) -> Vec<(i32, String)> {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        sockets(42, variable).into_iter().map(|passed| (passed.number, passed.name)).collect()
    }

    #[test]
    fn sockets_are_taken_only_by_whom_they_were_passed_to() {
        let named = |number, name: &str| (number, name.to_owned());
        assert_eq!(passed(&[]), []);
        assert_eq!(passed(&[("LISTEN_FDS", "2")]), []);
        assert_eq!(passed(&[("LISTEN_PID", "41"), ("LISTEN_FDS", "2")]), []);
        let pid = ("LISTEN_PID", "42");
        assert_eq!(passed(&[pid, ("LISTEN_FDS", "1")]), [named(3, "unknown")]);
        let names = ("LISTEN_FDNAMES", "nbd:spare");
        assert_eq!(passed(&[pid, ("LISTEN_FDS", "2"), names]), [named(3, "nbd"), named(4, "spare")]);
        for wrong in ["", "x", "-1", "99999999999"] {
            assert_eq!(passed(&[pid, ("LISTEN_FDS", wrong)]), []);
        }
        assert_eq!(passed(&[pid, ("LISTEN_FDS", "2000000000")]).len(), 1024);
    }
}
