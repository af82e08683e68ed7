//! What a figure depends on besides the program: the machine and the peers' versions.

use std::process::Command;

use serde_json::{Map, Value, json};

use super::contender::our_program;

/// The facts that stand beside the results.
pub fn facts() -> Value {
    json!({
        "processor": field("/proc/cpuinfo", "model name"),
        "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "load_before": read("/proc/loadavg"),
        "versions": versions(),
    })
}

fn versions() -> Value {
    let ours = our_program().to_string_lossy().into_owned();
    let programs = [
        ("heliostat", ours.as_str()),
        ("qemu-storage-daemon", "qemu-storage-daemon"),
        ("qemu-img", "qemu-img"),
        ("qemu-nbd", "qemu-nbd"),
        ("nbdkit", "nbdkit"),
        ("nbdcopy", "nbdcopy"),
        ("fio", "fio"),
        ("cp", "cp"),
    ];
    let all = programs.map(|(name, program)| (name.to_owned(), json!(version(program))));
    Value::Object(Map::from_iter(all))
}

/// The first line that `program --version` prints; `None` where it is missing.
fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

fn read(file: &str) -> String {
    std::fs::read_to_string(file).unwrap_or_default().trim().to_owned()
}

fn field(file: &str, name: &str) -> String {
    let text = read(file);
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
}
