//! The file with rules for a fault injector, as QEMU's `blkdebug` reads it (`docs/devel/testing/blkdebug.rst`).
//!
//! Groups in brackets, each a rule; in them lines of a key and a value in quotes. Parses and opens the one file that the
//! operator has named; refuses in QEMU's words.

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use heliostat_block::convert::u64_from;
use heliostat_block::debug_event::DebugEvent;
use heliostat_block::driver::fault::{InjectError, IoType, SetState, Times};
use rustix::fs::OFlags;

use super::super::DaemonError;
use super::super::error::strerror;

/// The most bytes of such a file: thousands of rules.
const LEN_MAX: u64 = 1 << 20;

/// Rules of both kinds.
type Rules = (Vec<InjectError>, Vec<SetState>);

/// A rule as it stands in the file.
#[derive(Debug)]
struct Group {
    is_error: bool,
    entries: Vec<(String, String)>,
}

/// Reads the file at `path`.
pub(super) fn read(path: &Path) -> Result<Rules, DaemonError> {
    let unreadable = |error: std::io::Error| {
        let text = rustix::io::Errno::from_io_error(&error).map_or_else(|| error.to_string(), strerror);
        DaemonError::Filter(format!("Could not read blkdebug config file: {text}"))
    };
    let text = contents(path).map_err(unreadable)?;
    parse(&String::from_utf8_lossy(&text)).map_err(DaemonError::Filter)
}

/// What is in the file. Others wait meanwhile, so it is one that neither waits for anybody nor goes on for ever.
fn contents(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = std::fs::File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(rustix::io::Errno::INVAL.into());
    }
    let mut text = Vec::new();
    file.take(LEN_MAX + 1).read_to_end(&mut text)?;
    if u64_from(text.len()) > LEN_MAX {
        return Err(rustix::io::Errno::FBIG.into());
    }
    Ok(text)
}

fn parse(text: &str) -> Result<Rules, String> {
    let mut groups: Vec<Group> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[') {
            let name = name.split([']', ' ']).next().unwrap_or_default();
            let is_error = match name {
                "inject-error" => true,
                "set-state" => false,
                _ => return Err(format!("There is no option group '{name}'")),
            };
            groups.push(Group { is_error, entries: Vec::new() });
            continue;
        }
        let group = groups.last_mut().ok_or("no group defined")?;
        let (key, value) = entry(line);
        if !group.knows(key) {
            return Err(format!("Invalid parameter '{key}'"));
        }
        group.entries.push((key.to_owned(), value.to_owned()));
    }
    let (mut errors, mut states) = (Vec::new(), Vec::new());
    for group in groups {
        match group.is_error {
            true => errors.push(group.error()?),
            false => states.push(group.state()?),
        }
    }
    Ok((errors, states))
}

/// A key and its value; without a value where the line does not have the form that is asked for.
fn entry(line: &str) -> (&str, &str) {
    let (key, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let quoted =
        rest.trim_start().strip_prefix('=').map(str::trim_start).and_then(|rest| rest.strip_prefix('"'));
    (key, quoted.map_or("", |rest| rest.split('"').next().unwrap_or_default()))
}

impl Group {
    fn knows(&self, key: &str) -> bool {
        match self.is_error {
            true => ["event", "state", "iotype", "errno", "sector", "once", "immediately"].contains(&key),
            false => ["event", "state", "new_state"].contains(&key),
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        let found = self.entries.iter().rev().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    fn number(&self, key: &str) -> Result<Option<i64>, String> {
        let Some(text) = self.text(key) else { return Ok(None) };
        let number = text.parse().map_err(|_| format!("Parameter '{key}' expects a number"));
        number.map(Some)
    }

    fn flag(&self, key: &str) -> Result<bool, String> {
        match self.text(key) {
            None | Some("off" | "no" | "false" | "n") => Ok(false),
            Some("on" | "yes" | "true" | "y") => Ok(true),
            Some(_) => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
        }
    }

    fn event(&self) -> Result<DebugEvent, String> {
        let name = self.text("event").ok_or("Missing event name for rule")?;
        DebugEvent::of_name(name).ok_or_else(|| format!("invalid parameter value: {name}"))
    }

    fn in_state(&self) -> Result<Option<i64>, String> {
        Ok(self.number("state")?.filter(|state| *state != 0))
    }

    fn error(&self) -> Result<InjectError, String> {
        let io = self.text("iotype").map(|name| {
            let found = IoType::ALL.into_iter().find(|io| io.name() == name);
            found.ok_or_else(|| format!("invalid parameter value: {name}"))
        });
        let sector = self.number("sector")?.and_then(|sector| u64::try_from(sector).ok());
        Ok(InjectError {
            event: self.event()?,
            state: self.in_state()?,
            io: io.transpose()?,
            errno: errno(self.number("errno")?),
            offset: sector.map(|sector| sector.saturating_mul(512)),
            times: if self.flag("once")? { Times::Once } else { Times::Always },
            immediately: self.flag("immediately")?,
        })
    }

    fn state(&self) -> Result<SetState, String> {
        let new_state = self.number("new_state")?.unwrap_or(0);
        Ok(SetState { event: self.event()?, state: self.in_state()?, new_state })
    }
}

/// An error number as an operator says it; EIO where nothing is said.
#[must_use]
pub fn errno(number: Option<i64>) -> i32 {
    let eio = rustix::io::Errno::IO.raw_os_error();
    number.map_or(eio, |number| i32::try_from(number).unwrap_or(eio))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        let text = "# a comment\n\n[inject-error]\nevent = \"write_aio\"\nstate = \"2\"\nerrno = \"28\"\n\
                    sector = \"8\"\nonce = \"on\"\niotype = \"write\"\n[set-state]\nevent = \"flush_to_disk\"\n\
                    state = \"1\"\nnew_state = \"2\"\n";
        let (errors, states) = parse(text).unwrap();
        assert_eq!(
            errors,
            [InjectError {
                event: DebugEvent::WriteAio,
                state: Some(2),
                io: Some(IoType::Write),
                errno: 28,
                offset: Some(4096),
                times: Times::Once,
                immediately: false,
            }]
        );
        assert_eq!(states, [SetState { event: DebugEvent::FlushToDisk, state: Some(1), new_state: 2 }]);
    }

    #[test]
    fn what_is_no_file_of_rules_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let (pipe, long) = (folder.path().join("pipe"), folder.path().join("long"));
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        std::fs::File::create(&long).unwrap().set_len(LEN_MAX + 1).unwrap();
        for (path, expected) in [
            (&*pipe, "Invalid argument"),
            (Path::new("/dev/zero"), "Invalid argument"),
            (&long, "File too large"),
        ] {
            let error = read(path).unwrap_err().to_string();
            assert_eq!(error, format!("Could not read blkdebug config file: {expected}"));
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_qemus_words() {
        let table = [
            ("[inject-error]\nevent = \"zork\"\n", "invalid parameter value: zork"),
            ("[zork]\n", "There is no option group 'zork'"),
            ("[inject-error]\nerrno = \"5\"\n", "Missing event name for rule"),
            ("garbage\n", "no group defined"),
            ("[inject-error]\nevent = \"read_aio\"\nerrno=\"5\"\n", "Invalid parameter 'errno=\"5\"'"),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text).unwrap_err(), expected);
        }
    }
}
