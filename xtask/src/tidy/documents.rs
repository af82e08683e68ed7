//! The rules for every text file: no notes to self, nothing of one person's machine, links that lead somewhere.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Source, words};
use super::{File, Finding};

/// The only registry: whoever clones the project gets the same crates from the same place.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Notes to self; an open point is an issue, not a word in a file.
const NOTES: &[&str] = &["TODO", "FIXME", "XXX"];

/// Folders of somebody's machine. Written in two parts so that this file does not hold them.
const MACHINE_FOLDERS: &[(&str, &str)] = &[("/home", "/"), ("/root", "/"), ("/work", "/"), ("/Users", "/")];

pub fn check(file: &File) -> Vec<Finding> {
    let mut findings = notes(file);
    findings.extend(machine_paths(file));
    findings.extend(registries(file));
    findings
}

fn notes(file: &File) -> Vec<Finding> {
    let source = Source::new(&file.path, &file.text);
    let is_rust = file.path.ends_with(".rs");
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        // In Rust a note stands in a comment or is code; a test's text may well hold the word.
        let looked_at = if is_rust {
            format!("{} {}", source.code[index], source.comments[index])
        } else {
            line.to_owned()
        };
        let found = words(&looked_at).find(|word| NOTES.contains(word));
        findings.extend(
            found.map(|word| {
                Finding::new(&file.path, index + 1, format!("`{word}`: do it, or write an issue"))
            }),
        );
    }
    findings
}

fn machine_paths(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for (first, second) in MACHINE_FOLDERS {
            let folder = format!("{first}{second}");
            let starts_a_path = |(at, _): (usize, &str)| {
                let before = line[..at].chars().next_back();
                !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '}' | ')' | '/'))
            };
            if line.match_indices(&folder).any(starts_a_path) {
                let message = format!("`{folder}…` is a place on one machine");
                findings.push(Finding::new(&file.path, index + 1, message));
            }
        }
    }
    findings
}

fn registries(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    let is_lock = file.path.ends_with("Cargo.lock");
    let is_cargo = file.path.ends_with("Cargo.toml") || file.path.contains(".cargo/config");
    for (index, line) in file.text.lines().enumerate() {
        let line = line.trim();
        let foreign_source = is_lock
            && line.strip_prefix("source = ").is_some_and(|source| source.trim_matches('"') != REGISTRY);
        let setting =
            line.starts_with("[source.") || line.starts_with("[registries") || line.starts_with("[registry");
        let mut keys = line.split(['{', ',']).filter_map(|part| Some(part.split_once('=')?.0.trim()));
        let named = !line.starts_with('#') && keys.any(|key| matches!(key, "registry" | "registry-index"));
        if foreign_source || (is_cargo && (setting || named)) {
            findings.push(Finding::new(
                &file.path,
                index + 1,
                "crates come from crates.io, under its own name",
            ));
        }
    }
    findings
}

/// Checks that each relative link of each Markdown file leads to a file, or a folder, and a heading in it; and
/// that the documents which comments name are there.
pub fn check_links(files: &[File]) -> Vec<Finding> {
    let mut places: BTreeSet<String> = BTreeSet::new();
    let mut headings: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for file in files {
        places.extend(with_folders(&file.path));
        if file.path.ends_with(".md") {
            headings.insert(&file.path, prose(&file.text).filter_map(|(_, line)| anchor(line)).collect());
        }
    }
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
        findings.extend(dangling_names(file, &headings));
    }
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (number, link) in links(&file.text) {
            let (target, heading) = link.split_once('#').unwrap_or((link, ""));
            let place = if target.is_empty() { file.path.clone() } else { resolve(&file.path, target) };
            let heading_found = match headings.get(place.as_str()) {
                Some(known) => heading.is_empty() || known.contains(heading),
                None => true,
            };
            if !places.contains(&place) || !heading_found {
                findings.push(Finding::new(&file.path, number, format!("link `{link}` leads nowhere")));
            }
        }
    }
    findings
}

/// Comments in code that send the reader to a document (`MIRROR.md section 4`) that is not there.
fn dangling_names(file: &File, documents: &BTreeMap<&str, BTreeSet<String>>) -> Vec<Finding> {
    let source = Source::new(&file.path, &file.text);
    let is_there = |name: &str| documents.keys().any(|path| path.rsplit('/').next() == Some(name));
    let mut findings = Vec::new();
    for (index, comment) in source.comments.iter().enumerate() {
        let named = comment.split(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/')));
        for name in named.map(|name| name.trim_end_matches('.')).filter(|name| name.ends_with(".md")) {
            // A path is another project's document.
            if !name.contains('/') && !is_there(name) {
                let message = format!("`{name}` is no document of this project");
                findings.push(Finding::new(&file.path, index + 1, message));
            }
        }
    }
    findings
}

/// The path and the folders above it.
fn with_folders(path: &str) -> impl Iterator<Item = String> {
    path.match_indices('/').map(|(at, _)| path[..at].to_owned()).chain([path.to_owned(), String::new()])
}

/// The lines of a Markdown text outside fenced code, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            return None;
        }
        (!fenced).then_some((index + 1, line))
    })
}

/// The relative links of a Markdown text. What stands in backquotes is no link.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        for (index, part) in line.split('`').enumerate() {
            // The part after a link's text in backquotes starts with the address: `[`name`](address)`.
            if index % 2 == 1 {
                continue;
            }
            for (at, _) in part.match_indices("](") {
                let address = part[at + 2..].split([')', ' ']).next().unwrap_or_default();
                if !address.is_empty() && !address.contains("://") && !address.starts_with("mailto:") {
                    found.push((number, address));
                }
            }
        }
    }
    found
}

/// The name by which a heading is linked: lower case, spaces as hyphens, punctuation gone.
fn anchor(line: &str) -> Option<String> {
    let heading = line.strip_prefix('#')?.trim_start_matches('#').strip_prefix(' ')?.trim();
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    Some(kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect())
}

/// Where `target` leads from the file `from`, relative to the root.
fn resolve(from: &str, target: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.trim_end_matches('/').split('/') {
        match part {
            "." | "" => {}
            ".." => {
                parts.pop();
            }
            name => parts.push(name),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File { path: path.to_owned(), text: text.to_owned() }
    }

    fn messages(path: &str, text: &str) -> Vec<String> {
        check(&file(path, text)).into_iter().map(|found| found.message).collect()
    }

    #[test]
    fn a_note_to_self_is_refused() {
        for note in ["TODO", "FIXME", "XXX"] {
            assert!(messages("a.rs", &format!("// {note}: later"))[0].contains("write an issue"));
            assert!(messages("README.md", &format!("{note} later"))[0].contains("write an issue"));
        }
        assert!(messages("a.rs", "let text = \"TODO\"; todo_list();").is_empty(), "a text is not a note");
    }

    #[test]
    fn a_path_of_one_machine_is_refused() {
        for folder in [["/ho", "me/"], ["/ro", "ot/"], ["/wo", "rk/"]] {
            let folder = folder.concat();
            for text in [format!("see {folder}me/x"), format!("\"{folder}x\""), format!("cd {folder}")] {
                assert!(messages("a.md", &text)[0].contains("on one machine"), "{text}");
            }
            assert!(messages("a.md", &format!("https://example.org{folder}")).is_empty());
        }
    }

    #[test]
    fn a_registry_of_ones_own_is_refused() {
        let lock = "source = \"registry+https://crates.example/index\"";
        assert!(messages("Cargo.lock", lock)[0].contains("crates.io"));
        assert!(messages("Cargo.lock", &format!("source = \"{REGISTRY}\"")).is_empty());
        assert!(messages(".cargo/config.toml", "[source.crates-io]")[0].contains("crates.io"));
        assert!(
            messages("a/Cargo.toml", "x = { version = \"1\", registry = \"mine\" }")[0].contains("crates.io")
        );
    }

    #[test]
    fn a_link_that_leads_nowhere_is_refused() {
        let files = [
            file("docs/a.md", "[up](../README.md) [gone](b.md) [folder](./) [web](https://example.org/x)"),
            file(
                "README.md",
                "[a](docs/a.md#no-such) [b](docs/) [c](#the-two-commands)\n\n## The two commands\n",
            ),
        ];
        let found: Vec<_> = check_links(&files).into_iter().map(|found| found.message).collect();
        assert_eq!(found, ["link `b.md` leads nowhere", "link `docs/a.md#no-such` leads nowhere"]);
    }

    #[test]
    fn a_comment_that_names_a_missing_document_is_refused() {
        let code = "// See GONE.md, section 1; HERE.md; NBD's doc/proto.md.\nlet text = \"OTHER.md\";\n";
        let files = [file("a.rs", code), file("docs/HERE.md", "")];
        let found: Vec<_> = check_links(&files).into_iter().map(|found| found.message).collect();
        assert_eq!(found, ["`GONE.md` is no document of this project"]);
    }

    #[test]
    fn what_is_code_is_no_link() {
        let files = [file("a.md", "`[x](gone.md)`\n```\n[x](gone.md)\n```\n[`x`](gone.md)\n")];
        let lines: Vec<_> = check_links(&files).into_iter().map(|found| found.line).collect();
        assert_eq!(lines, [5]);
    }
}
