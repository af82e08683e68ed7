//! `human-monitor-command`: commands of QEMU's human monitor, by their text: `qemu-io` and `info`. One match arm for
//! each.
//!
//! The answer is the text that the monitor would show, errors included; its lines end as the monitor's do.

use std::sync::Arc;

use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::qemu_io;
use super::describe;
use crate::daemon::Daemon;

pub(super) fn run(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Value {
    let line = arguments.required_text("command-line").trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let text = match word {
        "" => String::new(),
        "qemu-io" => poke(daemon, rest.trim_start()),
        "info" => describe::human::info(daemon, rest)
            .unwrap_or_else(|| format!("unknown command: 'info {}'\n", rest.trim())),
        _ => format!("unknown command: '{word}'\n"),
    };
    json!(text.replace('\n', "\r\n"))
}

/// `qemu-io NODE "COMMAND"`.
fn poke(daemon: &Daemon, line: &str) -> String {
    let Some((node, rest)) = word(line) else {
        return "qemu-io: block device name expected\n".to_owned();
    };
    // QEMU asks with -d whether a device is meant; here there are only nodes.
    let (node, rest) = if node == "-d" { word(rest).unwrap_or((node, rest)) } else { (node, rest) };
    let Some((command, rest)) = word(rest) else { return "qemu-io: string expected\n".to_owned() };
    if !rest.is_empty() {
        return "qemu-io: extraneous characters at the end of line\n".to_owned();
    }
    qemu_io::run(daemon, &node, &command).unwrap_or_else(|error| format!("Error: {error}\n"))
}

/// The first word of `line`, in quotes or not, and what comes after it.
fn word(line: &str) -> Option<(String, &str)> {
    let line = line.trim_start();
    let mut word = String::new();
    let Some(quoted) = line.strip_prefix('"') else {
        let end = line.find(char::is_whitespace).unwrap_or(line.len());
        return (end > 0).then(|| (line[..end].to_owned(), line[end..].trim_start()));
    };
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((word, quoted[at + 1..].trim_start())),
            '\\' => word.push(characters.next()?.1),
            other => word.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_alone_or_in_quotes() {
        assert_eq!(word(r#"disk0 "write 0 4k""#), Some(("disk0".to_owned(), r#""write 0 4k""#)));
        assert_eq!(word(r#""write 0 4k"  "#), Some(("write 0 4k".to_owned(), "")));
        assert_eq!(word(r#""a \"b\" c" d"#), Some((r#"a "b" c"#.to_owned(), "d")));
        assert_eq!(word(r#""open"#), None);
        assert_eq!(word("  "), None);
    }
}
