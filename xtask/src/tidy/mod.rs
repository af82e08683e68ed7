//! `cargo xtask tidy`: the rules of STYLE.md and GLOSSARY.md that neither the compiler nor clippy checks.
//!
//! A rule is a pure function from a file to findings; each has a test that shows it a violation. Reads the
//! project's files, changes nothing.

mod documents;
mod manifests;
mod rust;
mod source;

use std::fmt;

use anyhow::{Context, Result};

use self::source::Source;
use crate::workspace;

/// A place where a rule is broken. Prints as `path:line: what`.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    path: String,
    /// From 1 on.
    line: usize,
    message: String,
}

impl Finding {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}

/// A text file of the project, its path relative to the root.
pub struct File {
    path: String,
    text: String,
}

/// Checks every file of the project, prints what it finds, and says whether that was nothing.
///
/// # Errors
/// When the project's files cannot be listed or read.
pub fn run() -> Result<bool> {
    let files = read_files()?;
    let mut findings = check(&files);
    findings.sort_by(|a, b| (&a.path, a.line, &a.message).cmp(&(&b.path, b.line, &b.message)));
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} findings in {} files", findings.len(), files.len());
    Ok(findings.is_empty())
}

fn read_files() -> Result<Vec<File>> {
    let mut files = Vec::new();
    for path in workspace::files()? {
        let bytes =
            std::fs::read(workspace::root().join(&path)).with_context(|| format!("reading {path}"))?;
        // What is not text (a fuzz corpus, an image) has no style.
        if let Ok(text) = String::from_utf8(bytes)
            && !text.contains('\0')
        {
            files.push(File { path, text });
        }
    }
    Ok(files)
}

fn check(files: &[File]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files {
        findings.extend(documents::check(file));
        if file.path.ends_with(".rs") {
            findings.extend(rust::check(&Source::new(&file.path, &file.text)));
        } else if file.path.ends_with("Cargo.toml") {
            findings.extend(manifests::check(file));
        }
    }
    findings.extend(documents::check_links(files));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_names_its_place_so_that_an_editor_can_jump_to_it() {
        assert_eq!(Finding::new("src/a.rs", 7, "too long").to_string(), "src/a.rs:7: too long");
    }
}
