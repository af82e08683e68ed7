//! `transaction`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::{bitmaps, mirror, snapshot};
use crate::daemon::{Action, CompletionMode, Daemon, DaemonError, TransactionError};

pub(super) fn run(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let properties = arguments.object("properties");
    let is_grouped =
        properties.is_some_and(|properties| properties.text("completion-mode") == Some("grouped"));
    let mut actions = Vec::new();
    for item in arguments.objects("actions") {
        let (word, data) = (item.required_text("type"), item.object("data"));
        let action = match (word, data) {
            ("abort", _) => Some(Action::Abort),
            ("blockdev-mirror", Some(data)) => Some(Action::Mirror(Box::new(mirror::of(daemon, data)))),
            (_, Some(data)) => {
                bitmaps::action(word, data).map(Action::Bitmap).or_else(|| snapshot::action(word, data))
            }
            (_, None) => None,
        };
        let refused = || DaemonError::from(TransactionError::Grouped(word.to_owned()));
        if is_grouped && !matches!(word, "abort" | "blockdev-mirror") {
            return Err(refused().into());
        }
        // The schema has no other word.
        actions.extend(action);
    }
    let mode = if is_grouped { CompletionMode::Grouped } else { CompletionMode::Individual };
    daemon.transaction(&actions, mode)?;
    Ok(json!({}))
}
