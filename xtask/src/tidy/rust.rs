//! The rules for Rust files. Each takes a [`Source`] and gives findings; [`check`] is the list of them.

use super::Finding;
use super::source::{Source, has_word, words};

/// STYLE.md rule 1: the length at which a file has a second noun in it.
const FILE_LINES_MAX: usize = 500;

/// The one crate that may use `unsafe` and name the runtime of the data plane (DESIGN: crates).
const HOST: &str = "crates/heliostat-host/";
const CORE: &str = "crates/heliostat-block/";

/// Where tokio may be named: the control plane, and what starts its thread.
const TOKIO_PLACES: &[&str] =
    &["crates/heliostat/src/control/", "crates/heliostat/src/daemon", "crates/heliostat/src/main.rs"];

/// Where a test may wait a little between two looks: the module whose waits all have deadlines.
const POLLING_PLACES: &[&str] = &["crates/heliostat/tests/common/wait.rs"];

/// GLOSSARY.md, form of names: endings that hide a missing noun.
const EMPTY_NOUNS: &[&str] =
    &["Manager", "Handler", "Helper", "Util", "Utils", "Impl", "Inner", "Ctx", "Data", "Info"];

/// Where a protocol's own words stay: QEMU's schema has types such as `BlockJobInfo`.
const SCHEMA: &str = "crates/heliostat/src/control/";

/// What the core must not know (DESIGN: crates); clippy bans single functions, this bans the modules.
const HOST_MODULES: &[&str] =
    &["std::fs", "std::net", "std::os", "std::process", "std::thread", "std::env", "SystemTime", "Instant"];

pub fn check(source: &Source) -> Vec<Finding> {
    let rules: [fn(&Source) -> Vec<Finding>; 10] = [
        starts_with_what_it_owns,
        is_short_enough,
        roots_forbid_unsafe,
        unsafe_has_its_place_and_reason,
        only_the_host_names_compio,
        only_control_names_tokio,
        core_knows_nothing_of_the_host,
        tests_do_not_sleep,
        tests_are_not_ignored,
        types_are_nouns,
    ];
    rules.iter().flat_map(|rule| rule(source)).collect()
}

/// Findings for every line of code that `breaks` the rule.
fn lines_that(source: &Source, message: &str, breaks: impl Fn(usize, &str) -> bool) -> Vec<Finding> {
    let broken = source.numbered().filter(|&(number, line)| breaks(number, line));
    broken.map(|(number, _)| Finding::new(source.path, number, message)).collect()
}

fn starts_with_what_it_owns(source: &Source) -> Vec<Finding> {
    let starts = source.comments.first().is_some_and(|line| line.starts_with("//!"));
    if starts {
        Vec::new()
    } else {
        vec![Finding::new(source.path, 1, "a file starts with `//!`: what it owns")]
    }
}

fn is_short_enough(source: &Source) -> Vec<Finding> {
    let lines = source.tests_start;
    if lines <= FILE_LINES_MAX {
        return Vec::new();
    }
    let message = format!("{lines} lines before its tests, at most {FILE_LINES_MAX}: which noun hides here?");
    vec![Finding::new(source.path, FILE_LINES_MAX + 1, message)]
}

/// Every crate but the host is without `unsafe`, and says so where the compiler reads it.
fn roots_forbid_unsafe(source: &Source) -> Vec<Finding> {
    let is_root = source.path.ends_with("src/lib.rs")
        || source.path.ends_with("src/main.rs")
        || source.path.contains("/src/bin/");
    let forbids = source.code.iter().any(|line| line.trim() == "#![forbid(unsafe_code)]");
    if !is_root || forbids || source.path.starts_with(HOST) {
        return Vec::new();
    }
    vec![Finding::new(source.path, 1, "a crate root outside heliostat-host has `#![forbid(unsafe_code)]`")]
}

fn unsafe_has_its_place_and_reason(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, _) in source.numbered().filter(|(_, line)| has_word(line, "unsafe")) {
        if !source.path.starts_with(HOST) {
            findings.push(Finding::new(source.path, number, "`unsafe` lives in heliostat-host"));
        } else if !has_safety_comment(source, number - 1) {
            findings.push(Finding::new(source.path, number, "`unsafe` without `// SAFETY:` above it"));
        }
    }
    findings
}

/// Looks on line `index` and upwards through the comments and the lines of the same statement.
fn has_safety_comment(source: &Source, index: usize) -> bool {
    let says =
        |at: usize| source.comments[at].contains("SAFETY:") || source.comments[at].contains("# Safety");
    if says(index) {
        return true;
    }
    for above in (0..index).rev() {
        if says(above) {
            return true;
        }
        let code = source.code[above].trim_end();
        let is_blank = code.is_empty() && source.comments[above].trim().is_empty();
        // An attribute ends in `]` and belongs to what follows.
        let ends_statement = code.ends_with([';', '{', '}', ',']);
        if is_blank || ends_statement {
            return false;
        }
    }
    false
}

fn only_the_host_names_compio(source: &Source) -> Vec<Finding> {
    lines_that(source, "compio is named in heliostat-host only", |_, line| {
        !source.path.starts_with(HOST) && words(line).any(|word| word.starts_with("compio"))
    })
}

fn only_control_names_tokio(source: &Source) -> Vec<Finding> {
    let allowed = TOKIO_PLACES.iter().any(|place| source.path.starts_with(place));
    lines_that(source, "tokio is for the control plane only", |_, line| !allowed && has_word(line, "tokio"))
}

fn core_knows_nothing_of_the_host(source: &Source) -> Vec<Finding> {
    let in_core = source.path.starts_with(CORE) && source.path.contains("/src/");
    let names_host = |line: &str| {
        // Whether this thread unwinds is no knowledge of the host.
        let line = &line.replace("std::thread::panicking", "");
        HOST_MODULES.iter().any(|module| match module.split_once("::") {
            Some(_) => contains_path(line, module),
            None => has_word(line, module),
        })
    };
    lines_that(source, "the core knows no files, sockets, threads or wall time", |number, line| {
        in_core && !source.in_tests(number) && names_host(line)
    })
}

/// Says whether `line` names the path `module` itself or something in it.
fn contains_path(line: &str, module: &str) -> bool {
    line.match_indices(module).any(|(at, _)| {
        let after = line[at + module.len()..].chars().next();
        !after.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}

fn tests_do_not_sleep(source: &Source) -> Vec<Finding> {
    let may_poll = POLLING_PLACES.contains(&source.path);
    // A test of what sleeping does says so in the line above.
    let on_purpose = |number: usize| {
        number >= 2 && source.comments[number - 2].trim_start().starts_with("// Sleeps on purpose:")
    };
    lines_that(
        source,
        "a test that sleeps to be right is wrong: wait for what it waits for",
        |number, line| {
            let sleeps = line.contains("thread::sleep") || line.contains("time::sleep(");
            source.in_tests(number) && sleeps && !may_poll && !on_purpose(number)
        },
    )
}

fn tests_are_not_ignored(source: &Source) -> Vec<Finding> {
    lines_that(source, "an ignored test says nothing: mend it or take it out", |_, line| {
        line.contains("#[ignore")
    })
}

fn types_are_nouns(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in source.numbered() {
        let all: Vec<&str> = words(line).collect();
        for pair in all.windows(2) {
            let [keyword, name] = pair else { continue };
            if !matches!(*keyword, "struct" | "enum" | "trait" | "type" | "union") {
                continue;
            }
            let Some(ending) = EMPTY_NOUNS.iter().find(|ending| name.ends_with(**ending)) else { continue };
            if matches!(*ending, "Data" | "Info") && source.path.starts_with(SCHEMA) {
                continue;
            }
            let message = format!("`{name}`: `{ending}` hides a missing noun (GLOSSARY.md, form of names)");
            findings.push(Finding::new(source.path, number, message));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "crates/heliostat-block/src/node.rs";
    const FILE: &str = "crates/heliostat-host/src/file.rs";
    const SERVE: &str = "crates/heliostat/src/serve.rs";

    /// Checks a file that is in order but for `body`.
    fn findings(path: &str, body: &str) -> Vec<String> {
        let text = format!("//! What it owns.\n{body}\n");
        check(&Source::new(path, &text)).into_iter().map(|found| found.message).collect()
    }

    fn refused(path: &str, body: &str, because: &str) {
        let found = findings(path, body);
        let shown: String = body.chars().take(200).collect();
        assert!(found.len() == 1 && found[0].contains(because), "{shown:?} gave {found:?}");
    }

    fn accepted(path: &str, body: &str) {
        assert_eq!(findings(path, body), Vec::<String>::new(), "{body:?}");
    }

    #[test]
    fn a_file_without_a_head_is_refused() {
        let found = check(&Source::new(NODE, "use std::fmt;\n"));
        assert!(found[0].message.contains("starts with `//!`"));
        assert!(!check(&Source::new(NODE, "")).is_empty(), "an empty file has no head");
    }

    #[test]
    fn a_file_of_501_lines_is_refused_and_its_tests_do_not_count() {
        let code = "fn f() {}\n".repeat(498);
        accepted(NODE, &format!("{code}\n#[cfg(test)]\nmod tests {{\n{code}}}"));
        refused(NODE, &"fn f() {}\n".repeat(499), "501 lines before its tests");
        accepted("crates/heliostat/tests/long.rs", &"fn f() {}\n".repeat(900));
    }

    #[test]
    fn a_crate_root_that_allows_unsafe_is_refused() {
        for root in ["crates/heliostat-block/src/lib.rs", "crates/heliostat/src/main.rs"] {
            refused(root, "mod a;", "forbid(unsafe_code)");
            refused(root, "// #![forbid(unsafe_code)]", "forbid(unsafe_code)");
            accepted(root, "#![forbid(unsafe_code)]");
        }
        accepted("crates/heliostat-host/src/lib.rs", "mod a;");
        refused("crates/heliostat-sim/src/bin/sim.rs", "fn main() {}", "forbid(unsafe_code)");
    }

    #[test]
    fn unsafe_outside_the_host_is_refused() {
        refused(NODE, "unsafe { f() }", "lives in heliostat-host");
        accepted(NODE, "// unsafe\nlet text = \"unsafe\"; let not_unsafe_at_all = 1;");
    }

    #[test]
    fn unsafe_without_its_reason_is_refused() {
        refused(FILE, "fn f() {\n    unsafe { g() }\n}", "without `// SAFETY:`");
        refused(FILE, "// SAFETY: of another one.\nlet a = 1;\nunsafe { g() }", "without `// SAFETY:`");
        accepted(FILE, "// SAFETY: g has no rules.\n// It goes on.\nunsafe { g() }");
        accepted(FILE, "// SAFETY: g has no rules.\nlet a =\n    unsafe { g() };");
        accepted(FILE, "/// # Safety\n/// Not twice.\n#[inline]\npub unsafe fn f() {}");
    }

    #[test]
    fn the_data_runtime_outside_the_host_is_refused() {
        refused(SERVE, "use compio::fs::File;", "compio");
        refused(SERVE, "use compio_runtime::Runtime;", "compio");
        accepted(FILE, "use compio::fs::File;");
        accepted(SERVE, "// compio is not named here");
    }

    #[test]
    fn the_control_runtime_outside_the_control_plane_is_refused() {
        refused(SERVE, "tokio::spawn(f());", "control plane");
        refused(FILE, "use tokio::sync::Mutex;", "control plane");
        accepted("crates/heliostat/src/control/mod.rs", "tokio::spawn(f());");
        accepted("crates/heliostat/src/daemon.rs", "tokio::spawn(f());");
    }

    #[test]
    fn a_core_that_knows_the_host_is_refused() {
        for code in ["use std::fs::File;", "std::thread::yield_now();", "let a: Instant;", "use std::net;"] {
            refused(NODE, code, "the core knows no");
        }
        accepted(NODE, "use std::future::Future;\n#[cfg(test)]\nmod tests {\n    use std::thread;\n}");
        accepted(FILE, "use std::fs::File;");
        accepted(NODE, "debug_assert!(std::thread::panicking());");
    }

    #[test]
    fn a_test_that_sleeps_is_refused() {
        let test = "#[cfg(test)]\nmod tests {\n    fn t() { std::thread::sleep(A); }\n}";
        refused(SERVE, test, "sleeps to be right");
        refused("crates/heliostat/tests/serve.rs", "tokio_like::time::sleep(A);", "sleeps to be right");
        accepted(SERVE, "fn pause() { std::thread::sleep(A); }");
        let counted = "// Sleeps on purpose: sleeps are counted.\nstd::thread::sleep(A);";
        accepted("crates/heliostat/tests/serve.rs", counted);
        accepted("crates/heliostat/tests/common/wait.rs", "std::thread::sleep(A);");
    }

    #[test]
    fn an_ignored_test_is_refused() {
        refused(SERVE, "#[ignore = \"slow\"]", "ignored test");
        accepted(SERVE, "// #[ignore]");
    }

    #[test]
    fn a_type_named_without_a_noun_is_refused() {
        for name in ["JobManager", "Inner", "NodeImpl", "RequestCtx", "NbdHandler", "PathUtils"] {
            refused(SERVE, &format!("pub struct {name}<T>(T);"), "hides a missing noun");
        }
        refused(SERVE, "enum ImageInfo {}", "hides a missing noun");
        accepted("crates/heliostat/src/control/schema.rs", "struct BlockJobInfo;");
        accepted(SERVE, "struct Information; enum ExtentStatus { Data }");
    }
}
