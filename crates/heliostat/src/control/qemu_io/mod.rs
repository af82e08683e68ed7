//! The commands of `qemu-io` on a node: requests by hand, and breakpoints of a fault injector below.
//!
//! Answers what `qemu-io` prints. What it prints when an `aio_` command has ended is answered by the next `aio_flush`.
//! Called by `human-monitor-command`; touches no bytes but through [`Daemon::poke`].

mod options;
mod report;

use std::sync::Arc;
use std::time::Duration;

use heliostat_block::debug_event::DebugEvent;
use heliostat_block::driver::fault::FaultInjector;
use heliostat_block::error::{BlockError, ErrorKind};
use heliostat_block::limits::NBD_PAYLOAD_MAX;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};
use heliostat_host::runtime;

use self::options::{Options, number};
use self::report::{Done, dump, report, size};
use crate::daemon::{Daemon, DaemonError, Poke, Poked, strerror};

/// What is written where nothing is said, as in `qemu-io`.
const PATTERN: u8 = 0xcd;

/// The most bytes that are read or written at once, as with a client: an operator pokes, and the memory is the
/// daemon's.
const LEN_MAX: u32 = NBD_PAYLOAD_MAX;

/// The most bytes that are printed: the text is five times as long.
const DUMP_MAX: usize = 1 << 20;

/// The longest sleep, in milliseconds: a minute.
const SLEEP_MAX: u64 = 60_000;

/// A command.
struct Command {
    name: &'static str,
    /// The fewest and the most arguments.
    arguments: (usize, usize),
    /// The letters of its options; a colon after one that takes a value.
    options: &'static str,
    usage: &'static str,
    what: What,
}

/// What a command does.
#[derive(Clone, Copy)]
enum What {
    Read(When),
    Write(When),
    Discard,
    Flush,
    AioFlush,
    Length,
    Break,
    WaitBreak,
    Resume,
    RemoveBreak,
    Sleep,
}

/// Whether somebody waits for a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Now,
    Later,
}

const ANY: usize = usize::MAX;

const READ: &str =
    "[-abCqrv] [-P pattern [-s off] [-l len]] off len -- reads a number of bytes at a specified offset";
const WRITE: &str =
    "[-bcCfnqruz] [-P pattern | -s source_file] off len -- writes a number of bytes at a specified offset";

static COMMANDS: &[Command] = &[
    Command {
        name: "read",
        arguments: (2, ANY),
        options: "abCl:pP:qrs:v",
        usage: READ,
        what: What::Read(When::Now),
    },
    Command {
        name: "write",
        arguments: (2, ANY),
        options: "bcCfnpP:qrs:uz",
        usage: WRITE,
        what: What::Write(When::Now),
    },
    Command {
        name: "aio_read",
        arguments: (2, ANY),
        options: "CP:iqrv",
        usage: "[-Ciqrv] [-P pattern] off len [len..] -- asynchronously reads a number of bytes",
        what: What::Read(When::Later),
    },
    Command {
        name: "aio_write",
        arguments: (2, ANY),
        options: "CfiP:qruz",
        usage: "[-Cfiqruz] [-P pattern] off len [len..] -- asynchronously writes a number of bytes",
        what: What::Write(When::Later),
    },
    Command {
        name: "discard",
        arguments: (2, ANY),
        options: "Cq",
        usage: "[-Cq] off len -- discards a number of bytes at a specified offset",
        what: What::Discard,
    },
    Command { name: "flush", arguments: (0, 0), options: "", usage: "", what: What::Flush },
    Command { name: "aio_flush", arguments: (0, 0), options: "", usage: "", what: What::AioFlush },
    Command { name: "length", arguments: (0, 0), options: "", usage: "", what: What::Length },
    Command { name: "break", arguments: (2, 2), options: "", usage: "", what: What::Break },
    Command { name: "wait_break", arguments: (1, 1), options: "", usage: "", what: What::WaitBreak },
    Command { name: "resume", arguments: (1, 1), options: "", usage: "", what: What::Resume },
    Command { name: "remove_break", arguments: (1, 1), options: "", usage: "", what: What::RemoveBreak },
    Command { name: "sleep", arguments: (1, 1), options: "", usage: "", what: What::Sleep },
];

/// Carries out `line` on the node `node`. Answers what is printed, also where the command is refused.
///
/// # Errors
/// Where the node cannot be had.
pub fn run(daemon: &Daemon, node: &str, line: &str) -> Result<String, DaemonError> {
    daemon.node(node)?;
    let words: Vec<_> = line.split_whitespace().collect();
    let Some((name, arguments)) = words.split_first() else { return Ok(String::new()) };
    let Some(command) = COMMANDS.iter().find(|command| command.name == *name) else {
        return Ok(format!("command \"{name}\" not found\n"));
    };
    if let Some(text) = command.count_is_wrong(arguments.len()) {
        return Ok(text);
    }
    let options = match Options::parse(command.options, arguments) {
        Ok(options) => options,
        Err(letter) => {
            return Ok(format!("{name}: invalid option -- '{letter}'\n{}", command.usage()));
        }
    };
    match Order::of(command, &options) {
        Ok(order) => order.carry_out(daemon, node, command),
        Err(text) => Ok(text),
    }
}

impl Command {
    fn count_is_wrong(&self, count: usize) -> Option<String> {
        let (least, most) = self.arguments;
        let expected = match most {
            _ if (least..=most).contains(&count) => return None,
            ANY => format!("at least {least}"),
            most if most == least => least.to_string(),
            most => format!("between {least} and {most}"),
        };
        Some(format!("bad argument count {count} to {}, expected {expected} arguments\n", self.name))
    }

    fn usage(&self) -> String {
        format!("{} {}\n", self.name, self.usage)
    }
}

/// A command with everything that was said.
enum Order {
    Request { poke: Poke, when: When, print: Print },
    Flush,
    AioFlush,
    Length,
    Break(DebugEvent, String),
    NoSuchEvent,
    WaitBreak(String),
    Resume(String),
    RemoveBreak(String),
    Sleep(Duration),
}

/// What is printed of a request that has ended.
struct Print {
    /// As what it is called when it fails, and when it does not.
    verb: &'static str,
    past: &'static str,
    offset: u64,
    len: u64,
    /// What is to be read, from where in it on and how much of it.
    pattern: Option<(u8, usize, usize)>,
    quiet: bool,
    compact: bool,
    dumps: bool,
}

impl Order {
    /// What the options and arguments of `command` say.
    ///
    /// # Errors
    /// What is printed where they say nothing that can be done.
    fn of(command: &Command, options: &Options<'_>) -> Result<Self, String> {
        let first = || options.arguments.first().copied().unwrap_or_default().to_owned();
        Ok(match command.what {
            What::Read(when) => read(command, options, when)?,
            What::Write(when) => write(command, options, when)?,
            What::Discard => {
                let range = range(command, options)?;
                let poke = Poke::Discard { range };
                Self::Request { poke, when: When::Now, print: print(options, "discard", "discard", range) }
            }
            What::Flush => Self::Flush,
            What::AioFlush => Self::AioFlush,
            What::Length => Self::Length,
            What::Break => match DebugEvent::of_name(&first()) {
                Some(event) => {
                    Self::Break(event, options.arguments.get(1).copied().unwrap_or_default().to_owned())
                }
                None => Self::NoSuchEvent,
            },
            What::WaitBreak => Self::WaitBreak(first()),
            What::Resume => Self::Resume(first()),
            What::RemoveBreak => Self::RemoveBreak(first()),
            What::Sleep => {
                let text = first();
                let milliseconds = text.parse().map_err(|_| format!("{text} is not a valid number\n"))?;
                Self::Sleep(Duration::from_millis(SLEEP_MAX.min(milliseconds)))
            }
        })
    }

    fn carry_out(self, daemon: &Daemon, node: &str, command: &Command) -> Result<String, DaemonError> {
        let said = match self {
            Self::Request { poke, when: When::Now, print } => print.text(daemon.poke(node, poke)?),
            Self::Request { poke, when: When::Later, print } => {
                daemon.poke_later(node, poke, move |poked| print.text(poked))?;
                String::new()
            }
            Self::Flush => match daemon.poke(node, Poke::Flush)?.result {
                Ok(_) => String::new(),
                Err(error) => format!("flush failed: {}\n", why(&error)),
            },
            Self::AioFlush => daemon.poked(node).concat(),
            Self::Length => format!("{}\n", size(daemon.node(node)?.size())),
            Self::Sleep(time) => {
                std::thread::sleep(time);
                String::new()
            }
            breakpoint => {
                let injector = daemon.fault_injector(node)?;
                breakpoint.at_breakpoint(injector.as_ref()).map_or_else(
                    |error| format!("{} {error}\n", command.complaint(&breakpoint)),
                    |()| String::new(),
                )
            }
        };
        Ok(said)
    }

    /// Does what it says about breakpoints.
    ///
    /// # Errors
    /// Why it cannot be done.
    fn at_breakpoint(&self, injector: Option<&Arc<FaultInjector>>) -> Result<(), String> {
        let injector = injector.ok_or("Operation not supported")?;
        match self {
            Self::Break(event, tag) => injector.add_break(*event, tag).map_err(|error| error.to_string()),
            Self::NoSuchEvent => Err("No such file or directory".to_owned()),
            Self::WaitBreak(tag) => {
                runtime::block_on(injector.wait_break(tag)).map_err(|error| error.to_string())
            }
            Self::Resume(tag) => injector.resume(tag).map_err(|error| error.to_string()),
            Self::RemoveBreak(tag) => injector.remove_break(tag).map_err(|error| error.to_string()),
            Self::Request { .. } | Self::Flush | Self::AioFlush | Self::Length | Self::Sleep(_) => Ok(()),
        }
    }
}

impl Command {
    fn complaint(&self, order: &Order) -> String {
        match (self.what, order) {
            (What::Break, _) => "Could not set breakpoint:".to_owned(),
            (What::Resume, _) => "Could not resume request:".to_owned(),
            (_, Order::RemoveBreak(tag)) => format!("Could not remove breakpoint {tag}:"),
            _ => "Could not wait:".to_owned(),
        }
    }
}

fn read(command: &Command, options: &Options<'_>, when: When) -> Result<Order, String> {
    if options.has('b') {
        return Err("read failed: Operation not supported\n".to_owned());
    }
    let range = range(command, options)?;
    let len = data_len(range)?;
    if options.has('v') && !options.has('q') && len > DUMP_MAX {
        return Err(format!("length cannot exceed {DUMP_MAX} with -v, given {len}\n"));
    }
    let (from, count) = match (options.value('s'), options.value('l')) {
        (None, None) => (0, len),
        _ if options.value('P').is_none() => return Err(command.usage()),
        (from, count) => {
            let part = |text: Option<&str>| text.map(number).transpose();
            let from = part(from)?.unwrap_or(0);
            let count = part(count)?.unwrap_or_else(|| range.len().saturating_sub(from));
            match (usize::try_from(from), usize::try_from(count)) {
                (Ok(from), Ok(count)) if from.checked_add(count).is_some_and(|end| end <= len) => {
                    (from, count)
                }
                _ => return Err("pattern verification range exceeds end of read data\n".to_owned()),
            }
        }
    };
    let (verb, past) = if when == When::Now { ("read", "read") } else { ("readv", "read") };
    let pattern = options.value('P').map(pattern).transpose()?.map(|byte| (byte, from, count));
    let print = Print { pattern, dumps: options.has('v'), ..print(options, verb, past, range) };
    Ok(Order::Request { poke: Poke::Read { offset: range.offset(), len }, when, print })
}

fn write(command: &Command, options: &Options<'_>, when: When) -> Result<Order, String> {
    let ways = [options.has('z'), options.value('P').is_some(), options.value('s').is_some()];
    if ways.iter().filter(|way| **way).count() > 1 {
        return Err("Only one of -z, -P, and -s can be specified at the same time\n".to_owned());
    }
    for letter in ['n', 'u'] {
        if options.has(letter) && !options.has('z') {
            return Err(format!("-{letter} requires -z to be specified\n"));
        }
    }
    if options.has('b') || options.has('c') || options.value('s').is_some() {
        return Err("write failed: Operation not supported\n".to_owned());
    }
    let range = range(command, options)?;
    let durability = if options.has('f') { Durability::Fua } else { Durability::Cached };
    let poke = if options.has('z') {
        let space = if options.has('u') { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
        let effort = if options.has('n') { ZeroEffort::FastOnly } else { ZeroEffort::Any };
        Poke::WriteZeroes { range, space, effort, durability }
    } else {
        let byte = options.value('P').map_or(Ok(PATTERN), pattern)?;
        Poke::Write { offset: range.offset(), byte, len: data_len(range)?, durability }
    };
    let verb = if when == When::Now { "write" } else { "aio_write" };
    Ok(Order::Request { poke, when, print: print(options, verb, "wrote", range) })
}

/// What is printed, by the options that all requests have.
fn print(options: &Options<'_>, verb: &'static str, past: &'static str, range: ByteRange) -> Print {
    Print {
        verb,
        past,
        offset: range.offset(),
        len: range.len(),
        pattern: None,
        quiet: options.has('q'),
        compact: options.has('C'),
        dumps: false,
    }
}

/// The offset and the length that the arguments say.
fn range(command: &Command, options: &Options<'_>) -> Result<ByteRange, String> {
    let Some((offset, lens)) = options.arguments.split_first().filter(|(_, lens)| !lens.is_empty()) else {
        return Err(command.usage());
    };
    let offset = number(offset)?;
    let mut len: u64 = 0;
    for text in lens {
        len = len.saturating_add(number(text)?);
    }
    // Beyond what can be counted is beyond any node's end, too.
    ByteRange::new(offset, len).map_err(|_| "Parsing error: argument too large\n".to_owned())
}

fn data_len(range: ByteRange) -> Result<usize, String> {
    let len = usize::try_from(range.len()).ok().filter(|_| range.len() <= u64::from(LEN_MAX));
    len.ok_or_else(|| format!("length cannot exceed {LEN_MAX}, given {}\n", range.len()))
}

/// A byte, as `qemu-io` takes it: a number up to 255.
fn pattern(text: &str) -> Result<u8, String> {
    let found = match text.strip_prefix("0x") {
        Some(digits) => u8::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    found.ok_or_else(|| format!("{text} is not a valid pattern byte\n"))
}

impl Print {
    fn text(&self, poked: Poked) -> String {
        let read = match poked.result {
            Ok(read) => read,
            Err(error) => return format!("{} failed: {}\n", self.verb, why(&error)),
        };
        let mut text = String::new();
        if let (Some((byte, from, count)), Some(read)) = (self.pattern, &read) {
            let is_right = read[from..from + count].iter().all(|other| *other == byte);
            if !is_right {
                let at = self.offset + heliostat_block::convert::u64_from(from);
                text.push_str(&format!("Pattern verification failed at offset {at}, {count} bytes\n"));
            }
        }
        if self.quiet {
            return text;
        }
        if let (true, Some(read)) = (self.dumps, &read) {
            dump(&mut text, self.offset, read);
        }
        let done = Done { past: self.past, offset: self.offset, len: self.len, took: poked.took };
        report(&mut text, &done, self.compact);
        text
    }
}

/// Why a request failed, in the words of the host.
fn why(error: &BlockError) -> String {
    use rustix::io::Errno;

    let errno = error.errno().map_or(
        match error.kind() {
            ErrorKind::ReadOnly => Errno::PERM,
            ErrorKind::NoSpace => Errno::NOSPC,
            ErrorKind::Unsupported => Errno::OPNOTSUPP,
            ErrorKind::InvalidRequest | ErrorKind::Closed | ErrorKind::Io => Errno::IO,
        },
        Errno::from_raw_os_error,
    );
    strerror(errno)
}

#[cfg(test)]
mod tests;
