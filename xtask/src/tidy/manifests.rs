//! The rules for `Cargo.toml` files: who may depend on what, and that each dependency has its reason.

use super::{File, Finding};

/// What the core may depend on (DESIGN: crates): nothing here knows files, sockets, threads, time or chance.
const CORE_MAY_USE: &[&str] = &[
    "async-lock",
    "bytes",
    "event-listener",
    "futures-util",
    "libdeflater",
    "loom",
    "thiserror",
    "zerocopy",
    "zstd",
];
/// What the core's tests may use besides.
const CORE_TESTS_MAY_USE: &[&str] = &["criterion", "proptest"];

/// Crates that must not ship: others may use them in tests only.
const DEVELOPMENT_ONLY: &[&str] = &["heliostat-sim", "xtask"];

/// A dependency as a manifest names it.
struct Dependency<'a> {
    name: &'a str,
    line: usize,
    section: &'a str,
    has_reason: bool,
}

pub fn check(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    for dependency in dependencies(&file.text) {
        let mut refuse = |message: String| findings.push(Finding::new(&file.path, dependency.line, message));
        let name = dependency.name;
        let for_tests = dependency.section.contains("dev-dependencies");
        if !dependency.has_reason && !is_ours(name) {
            refuse(format!("`{name}` has no line of reason above it (STYLE.md rule 21)"));
        }
        if name.starts_with("compio") && file.path != "crates/heliostat-host/Cargo.toml" {
            refuse(format!("`{name}`: only heliostat-host names compio"));
        }
        if name == "tokio" && file.path != "crates/heliostat/Cargo.toml" {
            refuse("`tokio`: only the control plane of the program uses it".to_owned());
        }
        if file.path == "crates/heliostat-block/Cargo.toml" {
            let allowed = CORE_MAY_USE.contains(&name) || (for_tests && CORE_TESTS_MAY_USE.contains(&name));
            if !allowed {
                refuse(format!("`{name}`: the core must not know the host; see the list in xtask/src/tidy"));
            }
        }
        if DEVELOPMENT_ONLY.contains(&name) && !for_tests {
            refuse(format!("`{name}` must not ship"));
        }
    }
    findings.extend(planted_bugs(file));
    // A workspace of its own (the fuzzer's) has nobody to take them from.
    let is_member = file.text.contains("[package]") && !file.text.lines().any(|line| line == "[workspace]");
    if is_member && !inherits_lints(&file.text) {
        findings.push(Finding::new(
            &file.path,
            1,
            "a crate takes the workspace's lints: `[lints] workspace = true`",
        ));
    }
    findings
}

/// Bugs are planted by tests only: the feature may be named where it is declared, and by dependencies of tests.
fn planted_bugs(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut section = "";
    for (index, line) in file.text.lines().map(str::trim).enumerate() {
        if line.starts_with('[') && line.ends_with(']') {
            section = line;
        }
        let declared = section == "[features]" && line == "planted-bugs = []";
        let named = line.contains("planted-bugs") && !line.starts_with('#');
        if named && !declared && !section.contains("dev-dependencies") {
            findings.push(Finding::new(&file.path, index + 1, "`planted-bugs` is for tests only"));
        }
    }
    findings
}

fn is_ours(name: &str) -> bool {
    name == "heliostat" || name.starts_with("heliostat-") || name == "xtask"
}

fn inherits_lints(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    lines.any(|line| line == "[lints]") && lines.next().is_some_and(|line| line == "workspace = true")
}

/// The direct dependencies of a manifest, in the three forms that cargo has for them.
fn dependencies(text: &str) -> Vec<Dependency<'_>> {
    let mut found = Vec::new();
    let mut section = "";
    let mut above = "";
    // Inside a list or table that goes on over lines, nothing is a name.
    let mut depth = 0_i32;
    for (index, line) in text.lines().map(str::trim).enumerate() {
        let has_reason = above.starts_with('#') && above.trim_start_matches('#').trim().len() > 3;
        above = line;
        if line.starts_with('#') {
            continue;
        }
        let is_header = depth == 0 && line.starts_with('[');
        let name = if is_header {
            section = line.trim_matches(['[', ']']);
            section.split_once("dependencies.").map(|(_, name)| name)
        } else if depth == 0 && section.ends_with("dependencies") {
            line.split_once('=').and_then(|(key, _)| key.trim().split('.').next())
        } else {
            None
        };
        if let Some(name) = name {
            found.push(Dependency { name: name.trim_matches('"'), line: index + 1, section, has_reason });
        }
        if !is_header {
            depth += line.chars().map(nesting).sum::<i32>();
        }
    }
    found
}

fn nesting(c: char) -> i32 {
    match c {
        '[' | '{' => 1,
        ']' | '}' => -1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: &str = "crates/heliostat-block/Cargo.toml";
    const HOST: &str = "crates/heliostat-host/Cargo.toml";
    const PROGRAM: &str = "crates/heliostat/Cargo.toml";

    fn findings(path: &str, body: &str) -> Vec<String> {
        let text = format!("[package]\nname = \"x\"\n\n[lints]\nworkspace = true\n\n{body}\n");
        let file = File { path: path.to_owned(), text };
        check(&file).into_iter().map(|found| found.message).collect()
    }

    fn refused(path: &str, body: &str, because: &str) {
        let found = findings(path, body);
        assert!(found.len() == 1 && found[0].contains(because), "{body:?} gave {found:?}");
    }

    #[test]
    fn a_dependency_without_a_reason_is_refused_in_each_of_its_forms() {
        for body in [
            "[dependencies]\nlibc = \"0.2\"",
            "[dependencies]\n# reason of another\na = \"1\"\nlibc = { version = \"0.2\" }",
            "[dependencies]\nlibc.workspace = true",
            "[dependencies.libc]\nversion = \"0.2\"",
            "[target.'cfg(unix)'.dependencies]\nlibc = \"0.2\"",
            "[dev-dependencies]\n#\nlibc = \"0.2\"",
        ] {
            refused(HOST, body, "`libc` has no line of reason");
        }
    }

    #[test]
    fn a_reason_above_is_enough_and_our_own_crates_need_none() {
        let body = "[dependencies]\nheliostat-block = { workspace = true }\n# System calls.\nlibc = { version = \"0.2\", features = [\n  \"a\",\n] }";
        assert_eq!(findings(HOST, body), Vec::<String>::new());
    }

    #[test]
    fn a_core_that_depends_on_the_host_is_refused() {
        for name in ["tempfile", "rustix", "libc", "rand", "heliostat-host", "polling"] {
            refused(BLOCK, &format!("[dependencies]\n# A reason.\n{name} = \"1\""), "must not know the host");
        }
        refused(BLOCK, "[dependencies]\n# A reason.\nproptest = \"1\"", "must not know the host");
        assert!(findings(BLOCK, "[dev-dependencies]\n# A reason.\nproptest = \"1\"").is_empty());
    }

    #[test]
    fn a_runtime_in_the_wrong_crate_is_refused() {
        refused(PROGRAM, "[dependencies]\n# A reason.\ncompio = \"0.19\"", "compio");
        refused("Cargo.toml", "[workspace.dependencies]\n# A reason.\ncompio = \"0.19\"", "compio");
        refused(HOST, "[dependencies]\n# A reason.\ntokio = \"1\"", "control plane");
        assert!(findings(PROGRAM, "[dependencies]\n# A reason.\ntokio = \"1\"").is_empty());
    }

    #[test]
    fn what_must_not_ship_is_refused_as_a_dependency() {
        refused(PROGRAM, "[dependencies]\nheliostat-sim = { path = \"x\" }", "must not ship");
        assert!(findings(PROGRAM, "[dev-dependencies]\nheliostat-sim = { path = \"x\" }").is_empty());
    }

    #[test]
    fn planted_bugs_outside_tests_are_refused() {
        let uses = "heliostat-block = { workspace = true, features = [\"planted-bugs\"] }";
        refused(PROGRAM, &format!("[dependencies]\n{uses}"), "for tests only");
        refused(BLOCK, "[features]\ndefault = [\"planted-bugs\"]\nplanted-bugs = []", "for tests only");
        assert!(findings(PROGRAM, &format!("[dev-dependencies]\n{uses}")).is_empty());
        assert!(findings(BLOCK, "[features]\nplanted-bugs = []").is_empty());
    }

    #[test]
    fn a_crate_without_the_lints_is_refused() {
        let file = File { path: HOST.to_owned(), text: "[package]\nname = \"x\"\n".to_owned() };
        assert!(check(&file)[0].message.contains("lints"));
        let text = "[package]\nname = \"x\"\n\n[workspace]\n".to_owned();
        assert!(check(&File { path: "fuzz/Cargo.toml".to_owned(), text }).is_empty());
    }
}
