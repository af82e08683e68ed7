//! Steps that many conversations have.

use serde_json::{Value, json};

use super::transcript::Step::{self, Do};

/// Bytes of a disk.
pub const SIZE: usize = 1 << 20;

pub fn file(node: &str, image: &str) -> Step {
    Do("blockdev-add", json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{image}") }))
}

pub fn add(options: Value) -> Step {
    Do("blockdev-add", options)
}

pub fn look() -> Step {
    Do("query-block-jobs", json!({}))
}

/// A mirror of `s` to `t` named `j`, with some arguments changed.
pub fn mirror(changes: Value) -> Step {
    let arguments = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" });
    Do("blockdev-mirror", changed(arguments, changes))
}

pub fn of_job(command: &'static str, key: &str) -> Step {
    Do(command, json!({ key: "j" }))
}

pub fn list_nodes() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

pub fn delete(node: &str) -> Step {
    Do("blockdev-del", json!({ "node-name": node }))
}

/// An object with some of its members changed.
pub fn changed(mut object: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    object
}
