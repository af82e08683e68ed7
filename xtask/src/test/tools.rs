//! The tools that the tests use as oracles and peers: which are missing, and how Debian and Ubuntu bring them.
//!
//! Takes what is installed as it is and removes nothing. What cannot be installed is said; the tests that need
//! it then skip, saying so themselves.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{process, workspace};

/// A program, and the packages that may hold it, the likeliest first.
struct Tool {
    program: &'static str,
    packages: &'static [&'static str],
}

const TOOLS: &[Tool] = &[
    Tool { program: "git", packages: &["git"] },
    Tool { program: "qemu-img", packages: &["qemu-utils"] },
    Tool { program: "qemu-io", packages: &["qemu-utils"] },
    Tool { program: "qemu-nbd", packages: &["qemu-utils"] },
    // In qemu-utils since Debian 13, beside the system emulators before.
    Tool { program: "qemu-storage-daemon", packages: &["qemu-utils", "qemu-system-common"] },
    Tool { program: "nbdinfo", packages: &["libnbd-bin"] },
    Tool { program: "nbdcopy", packages: &["libnbd-bin"] },
    Tool { program: "nbdsh", packages: &["python3-libnbd"] },
    Tool { program: "nbdkit", packages: &["nbdkit"] },
    Tool { program: "fio", packages: &["fio"] },
    Tool { program: "openssl", packages: &["openssl"] },
    Tool { program: "python3", packages: &["python3"] },
];

/// The control client that the tests drive the daemon with.
const PYTHON_PACKAGE: &str = "qemu.qmp";

/// The interpreter that has [`PYTHON_PACKAGE`], whether or not it is there yet.
pub fn python() -> PathBuf {
    workspace::target().join("python/bin/python")
}

/// Installs what is missing as far as this machine allows, and says what it does.
pub fn install_missing() {
    println!("== tools");
    let is_here = |program: &str| find(program).is_some();
    for attempt in 0..2 {
        let packages = packages_for(attempt, is_here);
        if !packages.is_empty() {
            install(&packages);
        }
    }
    if !process::succeeds(&mut process::cargo(&["fmt", "--version"])) {
        rustup_add("rustfmt");
    }
    if !process::succeeds(&mut process::cargo(&["clippy", "--version"])) {
        rustup_add("clippy");
    }
    prepare_python();
    let missing: Vec<_> = TOOLS.iter().map(|tool| tool.program).filter(|program| !is_here(program)).collect();
    if missing.is_empty() {
        println!("all tools are here");
    } else {
        println!("still missing: {}; tests that need them are skipped", missing.join(", "));
    }
}

/// The packages to ask for in this attempt: the next candidate of each program that is not here.
fn packages_for(attempt: usize, is_here: impl Fn(&str) -> bool) -> BTreeSet<&'static str> {
    let missing = TOOLS.iter().filter(|tool| !is_here(tool.program));
    missing.filter_map(|tool| tool.packages.get(attempt).copied()).collect()
}

fn install(packages: &BTreeSet<&str>) {
    let list: Vec<&str> = packages.iter().copied().collect();
    if find("apt-get").is_none() {
        println!("no apt-get here; by hand, if you want them: {}", list.join(" "));
        return;
    }
    println!("installing with apt: {}", list.join(" "));
    // --no-remove: a newer qemu from elsewhere must not be thrown out for the distribution's.
    let options = ["install", "--yes", "--no-remove", "--no-install-recommends"];
    let done = run_apt(&["update"]) && run_apt(&[&options[..], &list[..]].concat());
    if !done && list.len() > 1 {
        // One that cannot be had must not keep the others out.
        for package in list {
            run_apt(&[&options[..], &[package]].concat());
        }
    }
}

fn run_apt(arguments: &[&str]) -> bool {
    let mut command = as_root("apt-get");
    command.args(arguments);
    match process::run(&mut command) {
        Ok(finished) => finished.success,
        Err(error) => {
            println!("{error:#}");
            false
        }
    }
}

/// A command that runs as root: directly, or through sudo, which may ask only where somebody can answer.
fn as_root(program: &str) -> Command {
    let noninteractive = "DEBIAN_FRONTEND=noninteractive";
    if is_root() {
        return process::command("env", &[noninteractive, program]);
    }
    let ask: &[&str] = if std::io::stdin().is_terminal() { &[] } else { &["--non-interactive"] };
    let mut command = process::command("sudo", ask);
    command.args(["env", noninteractive, program]).stdin(Stdio::inherit());
    command
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|id| id.stdout.trim_ascii() == b"0")
}

fn rustup_add(component: &str) {
    println!("installing with rustup: {component}");
    if let Err(error) = process::run(&mut process::command("rustup", &["component", "add", component])) {
        println!("{error:#}");
    }
}

/// A virtual environment of our own: the distribution's Python does not let others install into it.
fn prepare_python() {
    let python = python();
    let has_package = || process::succeeds(Command::new(&python).args(["-c", "import qemu.qmp"]));
    if has_package() || find("python3").is_none() {
        return;
    }
    println!("installing with pip into target/python: {PYTHON_PACKAGE}");
    let folder = workspace::target().join("python");
    let make = || process::run(process::command("python3", &["-m", "venv"]).arg("--clear").arg(&folder));
    if !make().is_ok_and(|made| made.success) {
        install(&BTreeSet::from(["python3-venv"]));
        let _ = make();
    }
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", PYTHON_PACKAGE]).stdin(Stdio::null());
    if !process::run(&mut pip).is_ok_and(|installed| installed.success) {
        println!("{PYTHON_PACKAGE} could not be installed; tests that need it are skipped");
    }
}

/// Where `program` is: in the path, or where distributions keep what only root used to run.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_packages_of_missing_programs_are_asked_for() {
        assert!(packages_for(0, |_| true).is_empty());
        let without_fio = |program: &str| program != "fio";
        assert_eq!(packages_for(0, without_fio), BTreeSet::from(["fio"]));
        assert!(packages_for(1, without_fio).is_empty(), "there is no second candidate");
    }

    #[test]
    fn a_program_that_its_first_package_did_not_bring_is_looked_for_in_the_second() {
        let only_the_daemon_is_missing = |program: &str| program != "qemu-storage-daemon";
        assert_eq!(packages_for(0, only_the_daemon_is_missing), BTreeSet::from(["qemu-utils"]));
        assert_eq!(packages_for(1, only_the_daemon_is_missing), BTreeSet::from(["qemu-system-common"]));
    }

    #[test]
    fn what_is_in_the_path_is_found() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }
}
