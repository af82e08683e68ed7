//! What commands read of their arguments, held against what the schema says that they take: both ways.
//!
//! Reading a member that the schema does not have is never an error when it happens: it is just not there. And one that
//! nobody reads is taken and ignored. So the sources are searched for the names.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::super::schema::{COMMANDS, Kind, Member, Record};

/// How members are read, up to their names.
const READERS: [&str; 12] = [
    ".text(",
    ".required_text(",
    ".flag(",
    ".int(",
    ".uint32(",
    ".uint64(",
    ".object(",
    ".objects(",
    ".value(",
    ".has(",
    ".first_of(",
    ".named(",
];

/// The sources of the commands, without their tests.
fn sources() -> String {
    fn read(folder: &Path, all: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, all);
            } else if !path.ends_with("schema_tests.rs") {
                let text = fs::read_to_string(path).unwrap();
                all.push_str(text.split("\nmod tests {").next().unwrap());
            }
        }
    }
    let mut all = String::new();
    let control = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/control");
    read(&control.join("commands"), &mut all);
    // `qmp_capabilities` is taken there.
    all.push_str(&fs::read_to_string(control.join("session.rs")).unwrap());
    all
}

fn literals(text: &str) -> BTreeSet<&str> {
    text.split('"').skip(1).step_by(2).collect()
}

/// All members that an object may have, at any depth, each once.
fn members(record: &'static Record, seen: &mut Vec<*const Record>, found: &mut Vec<&'static Member>) {
    if seen.contains(&std::ptr::from_ref(record)) {
        return;
    }
    seen.push(record);
    let cases = record.cases.iter().flat_map(|cases| cases.by_word).flat_map(|(_, members)| *members);
    for member in record.members.iter().chain(cases) {
        found.push(member);
        below(&member.kind, seen, found);
    }
}

fn below(kind: &'static Kind, seen: &mut Vec<*const Record>, found: &mut Vec<&'static Member>) {
    match kind {
        Kind::List(of) => below(of, seen, found),
        Kind::Object(record) | Kind::TextOrObject(record, _) | Kind::WordOrObject(_, record, _) => {
            members(record, seen, found);
        }
        _ => {}
    }
}

fn taken() -> Vec<&'static Member> {
    let (mut seen, mut found) = (Vec::new(), Vec::new());
    COMMANDS.iter().for_each(|command| members(command.takes, &mut seen, &mut found));
    found
}

#[test]
fn what_commands_read_is_in_the_schema() {
    let sources = sources();
    let known: BTreeSet<_> = taken().into_iter().map(|member| member.name).collect();
    let mut read = BTreeSet::new();
    for reader in READERS {
        let rests = sources.split(reader).skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"'));
        read.extend(rests.map(|rest| rest.split('"').next().unwrap()));
    }
    assert!(read.len() > 60, "only {} were found", read.len());
    let unknown: Vec<_> = read.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

#[test]
fn what_the_schema_has_is_read_or_said_to_be_of_no_effect() {
    let sources = sources();
    let is_there = |name: &str| sources.contains(&format!("\"{name}\""));
    let is_read = |member: &Member| {
        // The limits of throttle groups are put together.
        let limit = member.name.strip_prefix("x-").unwrap_or(member.name);
        let limit = limit.trim_end_matches("-length").trim_end_matches("-max");
        let is_told = matches!(member.kind, Kind::Word(words) if words.len() == 1);
        is_told || is_there(member.name) || is_there(limit)
    };
    let is_of_no_effect = |about: &str| {
        ["accepted", "not supported", "only "].iter().any(|beginning| about.starts_with(beginning))
    };
    let ignored = taken().into_iter().filter(|member| !is_read(member) && !is_of_no_effect(member.about));
    let ignored: Vec<_> = ignored.map(|member| (member.name, member.about)).collect();
    assert!(ignored.is_empty(), "{ignored:?}");
}

#[test]
fn whatever_is_carried_out_is_in_the_schema() {
    let sources = sources();
    // Words before the arrow of a match, of the shape that only names of commands have.
    let mut arms = BTreeSet::new();
    for line in sources.lines().filter(|line| line.contains("=>")) {
        arms.extend(literals(line.split("=>").next().unwrap()));
    }
    let is_command = |word: &&&str| {
        [
            "block-job-",
            "job-",
            "blockdev-",
            "query-",
            "block-dirty-",
            "block-export-",
            "nbd-server-",
            "qom-",
            "object-",
        ]
        .iter()
        .any(|beginning| word.starts_with(beginning))
    };
    let names: BTreeSet<_> = COMMANDS.iter().map(|command| command.name).collect();
    let carried_out: Vec<_> = arms.iter().filter(is_command).collect();
    assert!(carried_out.len() > 25, "only {} were found", carried_out.len());
    let unknown: Vec<_> = carried_out.into_iter().filter(|word| !names.contains(**word)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
