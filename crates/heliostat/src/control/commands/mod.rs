//! The commands: each reads its checked arguments, asks the daemon, and makes the reply.
//!
//! Nothing is decided here that the command line would have to decide again; that is the daemon's. Called by a
//! client's thread, which may block.

mod bitmaps;
mod create;
mod describe;
mod exports;
mod file_name;
mod filters;
mod human;
mod jobs;
mod mirror;
mod nbd;
mod nodes;
mod objects;
mod resize;
#[cfg(test)]
mod schema_tests;
mod snapshot;
mod tls;
mod transaction;

use std::sync::Arc;

use serde_json::{Map, Value, json};

pub use describe::{Depth, image_info};

use super::arguments::Arguments;
use super::refusal::{Class, Refusal};
use super::schema::{self, COMMANDS};
use crate::daemon::Daemon;

/// The QEMU whose commands these are (major, minor, micro): the one that they were compared with.
const QEMU: [u32; 3] = [10, 0, 2];

/// The version of the QEMU as which we behave.
#[must_use]
pub fn qemu_version() -> String {
    QEMU.map(|part| part.to_string()).join(".")
}

/// Who we are and as whom we behave.
#[must_use]
pub fn version() -> Value {
    let [major, minor, micro] = QEMU;
    let package = concat!("heliostat ", env!("CARGO_PKG_VERSION"));
    json!({ "qemu": { "micro": micro, "minor": minor, "major": major }, "package": package })
}

/// Checks the arguments of a command and carries it out.
///
/// # Errors
/// [`Refusal`]; nothing has changed then.
pub fn run(daemon: &Arc<Daemon>, name: &str, arguments: &Map<String, Value>) -> Result<Value, Refusal> {
    let command = schema::find(name).ok_or_else(|| not_found(name))?;
    let arguments = Arguments::check(arguments, command.takes)?;
    match name {
        "query-version" => Ok(version()),
        "query-commands" => Ok(COMMANDS.iter().map(|command| json!({ "name": command.name })).collect()),
        "query-qmp-schema" => Ok(schema::schema()),
        "query-block" => Ok(json!([])),
        "query-blockstats" => Ok(describe::statistics::query(daemon, arguments)),
        "x-debug-query-block-graph" => Ok(describe::graph::query(daemon)),
        "quit" => {
            daemon.ask_to_quit();
            Ok(json!({}))
        }
        "blockdev-add" => nodes::add(daemon, arguments),
        "blockdev-del" => nodes::delete(daemon, arguments),
        "block_resize" => resize::resize(daemon, arguments),
        "query-named-block-nodes" => Ok(describe::nodes(daemon, arguments)),
        "nbd-server-start" => exports::start_server(daemon, arguments),
        "nbd-server-stop" => exports::stop_server(daemon),
        "nbd-server-add" => exports::add_named(daemon, arguments),
        "nbd-server-remove" => exports::delete_named(daemon, arguments),
        "block-export-add" => exports::add(daemon, arguments),
        "block-export-del" => exports::delete(daemon, arguments),
        "query-block-exports" => Ok(exports::query(daemon)),
        "blockdev-create" => create::start(daemon, arguments),
        "blockdev-mirror" => mirror::start(daemon, arguments),
        "blockdev-reopen" => nodes::reopen(daemon, arguments),
        "transaction" => transaction::run(daemon, arguments),
        "blockdev-snapshot" => snapshot::take(daemon, arguments),
        "blockdev-snapshot-sync" => snapshot::take_to_file(daemon, arguments),
        "drive-mirror" => mirror::start_drive(daemon, arguments),
        "query-block-jobs" => Ok(jobs::query_block_jobs(daemon)),
        "query-jobs" => Ok(jobs::query_jobs(daemon)),
        "object-add" => objects::add(daemon, arguments),
        "object-del" => objects::delete(daemon, arguments),
        "qom-list" => objects::list(daemon, arguments),
        "qom-get" => objects::get(daemon, arguments),
        "qom-set" => objects::set(daemon, arguments),
        "human-monitor-command" => Ok(human::run(daemon, arguments)),
        _ => bitmaps::run(daemon, name, arguments)
            .or_else(|| jobs::ask(daemon, name, arguments))
            .unwrap_or_else(|| Err(not_found(name))),
    }
}

fn not_found(name: &str) -> Refusal {
    Refusal::of(Class::CommandNotFound, format!("The command {name} has not been found"))
}

/// A value that a client may give in QEMU and that is not there yet.
fn not_there(what: &str) -> Refusal {
    Refusal::new(format!("Parameter '{what}' is not supported"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_of_the_schema_is_carried_out_by_somebody() {
        let daemon = Daemon::new();
        // Negotiated on the connection, before anything gets here.
        for command in COMMANDS.iter().filter(|command| command.name != "qmp_capabilities") {
            let needs_nothing =
                command.takes.members.iter().all(|member| member.need == schema::Need::Optional);
            let mut arguments = Map::new();
            if !needs_nothing {
                for name in ["device", "id", "node-name"] {
                    if command.takes.members.iter().any(|member| member.name == name) {
                        arguments.insert(name.to_owned(), json!("nobody"));
                    }
                }
            }
            if command.name == "block-job-change" {
                arguments.insert("type".to_owned(), json!("backup"));
            }
            if command.name == "block-job-set-speed" {
                arguments.insert("speed".to_owned(), json!(0));
            }
            if let Err(refusal) = run(&daemon, command.name, &arguments) {
                let class = refusal.to_json()["class"].clone();
                assert_ne!(class, json!("CommandNotFound"), "{}", command.name);
            }
        }
    }
}
