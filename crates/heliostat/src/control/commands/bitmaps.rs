//! `block-dirty-bitmap-*`, alone and as actions of a transaction.

use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use crate::daemon::{BitmapAction, BitmapSpec, Daemon};

/// Carries out the command of that name, if it is one of these.
pub(super) fn run(
    daemon: &Daemon,
    command: &str,
    arguments: Arguments<'_>,
) -> Option<Result<Value, Refusal>> {
    let action = action(command, arguments)?;
    Some(daemon.change_bitmaps(&[action]).map(|()| json!({})).map_err(Refusal::from))
}

/// What the command of that name asks for, if it is one of these.
pub(super) fn action(command: &str, arguments: Arguments<'_>) -> Option<BitmapAction> {
    let text = |name| arguments.text(name).unwrap_or_default().to_owned();
    let (node, name) = (text("node"), text("name"));
    Some(match command {
        "block-dirty-bitmap-add" => BitmapAction::Add(BitmapSpec {
            node,
            name,
            granularity: arguments.uint32("granularity"),
            persistent: arguments.flag("persistent") == Some(true),
            disabled: arguments.flag("disabled") == Some(true),
        }),
        "block-dirty-bitmap-remove" => BitmapAction::Remove(node, name),
        "block-dirty-bitmap-clear" => BitmapAction::Clear(node, name),
        "block-dirty-bitmap-enable" => BitmapAction::Enable(node, name),
        "block-dirty-bitmap-disable" => BitmapAction::Disable(node, name),
        "block-dirty-bitmap-merge" => {
            let named = arguments.named("bitmaps").into_iter();
            let from = named.map(|(of, name)| (of.unwrap_or(&node).to_owned(), name.to_owned())).collect();
            BitmapAction::Merge(node, text("target"), from)
        }
        _ => return None,
    })
}
