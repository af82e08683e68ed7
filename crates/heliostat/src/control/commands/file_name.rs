//! What the name of a target means: the one place where a file's name becomes a node that is to be made.
//!
//! Names as QEMU has them: a path; or a word, a colon, and what that word's protocol makes of the rest. Opens nothing.
//! Called by `mirror`.

use std::path::PathBuf;

use heliostat_block::graph::Claims;
use serde_json::{Map, Value};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::super::schema::NODE;
use super::nodes::{Inherited, NULL_SIZE_DEFAULT, node_spec};
use crate::daemon::{Child, DriverSpec, FaultLimits, FaultSpec, NodeSpec, Sharing, TargetName, nbd_name};

/// What `name` means for a node that takes over `above`. One that cannot be used is refused later, by who knows what
/// comes before.
pub(super) fn target_name(name: &str, above: Inherited) -> TargetName {
    let Some((word, rest)) = protocol(name) else { return TargetName::Path(PathBuf::from(name)) };
    let unusable = |why: String| TargetName::Unusable(word.to_owned(), why);
    match word {
        "file" => TargetName::Path(PathBuf::from(rest)),
        "json" => match definition(rest, above) {
            Ok(spec) => TargetName::Definition(Box::new(spec)),
            Err(refusal) => unusable(refusal.text().to_owned()),
        },
        "null-co" => {
            let driver = DriverSpec::NullCo { size: NULL_SIZE_DEFAULT, read_zeroes: false };
            TargetName::Protocol("null-co", Box::new(NodeSpec::new(None, driver)))
        }
        "blkdebug" => match rest.split_once(':') {
            Some((config, image)) => TargetName::Protocol("blkdebug", Box::new(fault_node(config, image))),
            None => unusable("Could not parse blkdebug file name".to_owned()),
        },
        // QEMU's commands know no name that says TLS; credentials are said in a definition.
        "nbd" | "nbd+unix" | "nbd+tcp" => match nbd_name(word, rest) {
            Ok(named) => {
                let driver = DriverSpec::Nbd(Box::new(named.spec));
                TargetName::Protocol("nbd", Box::new(NodeSpec::new(None, driver)))
            }
            Err(why) => unusable(why),
        },
        _ => unusable(format!("Unknown protocol '{word}'")),
    }
}

/// A file through which faults are injected by the rules of another.
fn fault_node(config: &str, image: &str) -> NodeSpec {
    let below = NodeSpec::new(None, DriverSpec::at(PathBuf::from(image), Sharing::Locked));
    let faults = FaultSpec {
        claims: Claims::default(),
        image: Child::New(Box::new(below)),
        config: Some(config).filter(|config| !config.is_empty()).map(PathBuf::from),
        limits: FaultLimits::default(),
        errors: Vec::new(),
        states: Vec::new(),
    };
    NodeSpec::new(None, DriverSpec::Faults(Box::new(faults)))
}

/// The word before the first colon, if no slash comes before that; and what follows it.
fn protocol(name: &str) -> Option<(&str, &str)> {
    let (word, rest) = name.split_once(':')?;
    (!word.contains('/')).then_some((word, rest))
}

fn definition(text: &str, above: Inherited) -> Result<NodeSpec, Refusal> {
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let reason = if error.is_eof() { "premature EOI" } else { "invalid" };
        Refusal::new(format!("Could not parse the JSON options: JSON parse error, {reason}"))
    })?;
    let Value::Object(flat) = value else { return Err(Refusal::new("Invalid JSON object given")) };
    let object = nested(flat);
    Arguments::check(&object, &NODE).map_err(|refusal| {
        match object.get("driver").and_then(Value::as_str) {
            Some(driver) if refusal.is_about("driver") => Refusal::new(format!("Unknown driver '{driver}'")),
            _ => refusal,
        }
    })?;
    node_spec(Arguments::check(&object, &NODE)?, above)
}

/// Makes objects of members whose names have dots, as QEMU does: `file.driver` is the member `driver` of `file`.
fn nested(flat: Map<String, Value>) -> Map<String, Value> {
    let mut object = Map::new();
    for (name, value) in flat {
        let value = match value {
            Value::Object(inner) => Value::Object(nested(inner)),
            other => other,
        };
        put(&mut object, &name, value);
    }
    object
}

fn put(object: &mut Map<String, Value>, name: &str, value: Value) {
    let split = name.split_once('.').filter(|(first, rest)| !first.is_empty() && !rest.is_empty());
    let Some((first, rest)) = split else {
        match (object.get_mut(name), value) {
            // Said in both ways: what is nested already stays beside it.
            (Some(Value::Object(there)), Value::Object(more)) => there.extend(more),
            (_, value) => {
                object.insert(name.to_owned(), value);
            }
        }
        return;
    };
    let inner = object.entry(first).or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(inner) = inner {
        put(inner, rest, value);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_slash_before_the_colon_makes_a_path_of_a_name() {
        for (name, expected) in [
            ("a", None),
            ("./a:b", None),
            ("/tmp/a:b", None),
            ("file:a:b", Some(("file", "a:b"))),
            ("json:{}", Some(("json", "{}"))),
            ("nbd://host", Some(("nbd", "//host"))),
        ] {
            assert_eq!(protocol(name), expected, "{name}");
        }
    }

    #[test]
    fn a_definition_may_be_nested_or_have_dots() {
        for text in [
            json!({ "driver": "raw", "file": { "driver": "file", "filename": "x" } }),
            json!({ "driver": "raw", "file.driver": "file", "file.filename": "x" }),
            json!({ "driver": "raw", "file": { "driver": "file" }, "file.filename": "x" }),
        ] {
            let spec = definition(&text.to_string(), Inherited::default()).unwrap();
            let DriverSpec::Raw { file: Child::New(below), .. } = spec.driver else { panic!("{text}") };
            assert!(matches!(&below.driver, DriverSpec::File(file) if file.path.as_os_str() == "x"));
        }
    }

    #[test]
    fn what_cannot_be_understood_is_refused_in_qemus_words() {
        let text = |name: &str| match target_name(name, Inherited::default()) {
            TargetName::Unusable(_, why) => why,
            other => panic!("{name}: {other:?}"),
        };
        for (name, expected) in [
            ("json:{", "Could not parse the JSON options: JSON parse error, premature EOI"),
            ("json:[]", "Invalid JSON object given"),
            ("json:{\"driver\":\"zz\"}", "Unknown driver 'zz'"),
            ("zork:x", "Unknown protocol 'zork'"),
        ] {
            assert_eq!(text(name), expected);
        }
    }
}
