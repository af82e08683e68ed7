//! `key=value,key.key=value` and JSON, as values of options: read into what a QMP command would have been given.
//!
//! On a command line everything is text. What a text stands for, the schema says: a number, `on` or `off`, a list by
//! keys that count. What fits nothing stays text, and is refused where the arguments are checked.

use serde_json::{Map, Value};

use super::Refused;
use crate::control::json;
use crate::control::schema::{Kind, Member, NODE, Record};
use crate::control::splitter::{Piece, Splitter};

/// Reads the value of an option. `implied` is the key of a first value that has none.
///
/// # Errors
/// [`Refused`] in QEMU's words.
pub(super) fn read(text: &str, implied: &str, record: &Record) -> Result<Map<String, Value>, Refused> {
    if text.starts_with('{') {
        return json_object(text);
    }
    let pairs = pairs(text, implied)?;
    let mut object = Map::new();
    for (key, value) in pairs {
        let parts: Vec<_> = key.split('.').collect();
        let is_name = |part: &&str| {
            !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_'))
        };
        if !parts.iter().all(is_name) {
            return Err(Refused(format!("Invalid parameter '{key}'")));
        }
        put(&mut object, &parts, value, "")?;
    }
    Ok(typed_record(with_lists(object), record))
}

fn json_object(text: &str) -> Result<Map<String, Value>, Refused> {
    let (mut splitter, mut rest) = (Splitter::default(), text.as_bytes());
    let message = match splitter.next(&mut rest) {
        None => return Err(Refused("JSON parse error, premature EOI".to_owned())),
        Some(Piece::Fault(fault)) => return Err(Refused(fault.to_string())),
        Some(Piece::Message(message)) => message,
    };
    if !rest.trim_ascii().is_empty() {
        return Err(Refused("Expecting at most one JSON value".to_owned()));
    }
    match json::parse(&message) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Refused("Expecting a JSON object".to_owned())),
        Err(error) => Err(Refused(error.to_string())),
    }
}

/// Keys with their values; a doubled comma is part of a value.
pub(super) fn pairs(text: &str, implied: &str) -> Result<Vec<(String, String)>, Refused> {
    if matches!(text, "help" | "?") {
        return Err(Refused("Help is not available for this option".to_owned()));
    }
    let mut pairs = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let has_value = rest[end..].starts_with('=');
        let is_implied = pairs.is_empty() && !has_value && end > 0 && !implied.is_empty();
        let key = if is_implied { implied } else { &rest[..end] };
        if key.is_empty() {
            return Err(Refused("Invalid parameter ''".to_owned()));
        }
        if !has_value && !is_implied {
            return Err(Refused(format!("Expected '=' after parameter '{key}'")));
        }
        if !is_implied {
            rest = &rest[end + 1..];
        }
        let mut value = String::new();
        loop {
            let end = rest.find(',').unwrap_or(rest.len());
            value.push_str(&rest[..end]);
            rest = rest.get(end + 1..).unwrap_or_default();
            let Some(after) = rest.strip_prefix(',') else { break };
            value.push(',');
            rest = after;
        }
        pairs.push((key.to_owned(), value));
    }
    Ok(pairs)
}

/// Puts a value where its key says. One that comes again replaces the first.
fn put(object: &mut Map<String, Value>, parts: &[&str], value: String, path: &str) -> Result<(), Refused> {
    let inconsistent = |part: &str| Refused(format!("Parameters '{path}{part}.*' used inconsistently"));
    match parts {
        [] => Ok(()),
        [last] => {
            if object.get(*last).is_some_and(Value::is_object) {
                return Err(inconsistent(last));
            }
            object.insert((*last).to_owned(), Value::String(value));
            Ok(())
        }
        [first, below @ ..] => {
            let entry = object.entry((*first).to_owned()).or_insert_with(|| Value::Object(Map::new()));
            let inner = entry.as_object_mut().ok_or_else(|| inconsistent(first))?;
            put(inner, below, value, &format!("{path}{first}."))
        }
    }
}

/// An object whose keys count from 0 on is a list.
fn with_lists(object: Map<String, Value>) -> Map<String, Value> {
    let nested = |value: Value| match value {
        Value::Object(inner) => {
            let inner = with_lists(inner);
            let counted: Option<Vec<_>> =
                (0..inner.len()).map(|at| inner.get(&at.to_string()).cloned()).collect();
            match counted {
                Some(list) if !list.is_empty() => Value::Array(list),
                _ => Value::Object(inner),
            }
        }
        other => other,
    };
    object.into_iter().map(|(key, value)| (key, nested(value))).collect()
}

fn typed_record(object: Map<String, Value>, record: &Record) -> Map<String, Value> {
    let case: &[Member] = record.cases.as_ref().map_or(&[], |cases| {
        let word = object.get(cases.tag).and_then(Value::as_str).unwrap_or_default();
        cases.by_word.iter().find(|(case, _)| *case == word).map_or(&[], |(_, members)| members)
    });
    let kind = |key: &str| record.members.iter().chain(case).find(|member| member.name == key);
    let typed = object.into_iter().map(|(key, value)| {
        let value = match kind(&key) {
            Some(member) => typed(value, &member.kind),
            None => value,
        };
        (key, value)
    });
    typed.collect()
}

fn typed(value: Value, kind: &Kind) -> Value {
    match (kind, value) {
        (Kind::Flag, Value::String(text)) => match text.as_str() {
            "on" | "yes" | "true" | "y" => Value::Bool(true),
            "off" | "no" | "false" | "n" => Value::Bool(false),
            _ => Value::String(text),
        },
        (Kind::Int | Kind::Uint32 | Kind::Uint64, Value::String(text)) => {
            number(&text).unwrap_or(Value::String(text))
        }
        (Kind::List(of), Value::Array(list)) => {
            Value::Array(list.into_iter().map(|value| typed(value, of)).collect())
        }
        (
            Kind::Object(record) | Kind::TextOrObject(record, _) | Kind::WordOrObject(_, record, _),
            Value::Object(object),
        ) => Value::Object(typed_record(object, record)),
        (Kind::NodeRef | Kind::NodeRefOrNull, Value::Object(object)) => {
            Value::Object(typed_record(object, &NODE))
        }
        (_, value) => value,
    }
}

/// A whole number: decimal, or with `0x` before it.
fn number(text: &str) -> Option<Value> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (digits, 10),
    };
    let signed = format!("{sign}{digits}");
    let small = i64::from_str_radix(&signed, radix).ok().map(Value::from);
    small.or_else(|| u64::from_str_radix(&signed, radix).ok().map(Value::from))
}

/// QEMU's words for what does not fit, where it was given as text.
pub(super) fn as_option(text: &str) -> String {
    let name = |before: &str, after: &str| text.strip_prefix(before)?.strip_suffix(after).map(str::to_owned);
    let integer = name("Invalid parameter type for '", "', expected: integer")
        .or_else(|| name("Parameter '", "' expects uint64"));
    if let Some(name) = integer {
        return format!("Parameter '{name}' expects integer");
    }
    match name("Invalid parameter type for '", "', expected: boolean") {
        Some(name) => format!("Parameter '{name}' expects 'on' or 'off'"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(text: &str) -> Result<Value, String> {
        read(text, "driver", &NODE).map(Value::Object).map_err(|Refused(text)| text)
    }

    #[test]
    fn texts_become_what_the_schema_says() {
        let table = [
            (
                "null-co,node-name=n,size=0x1000",
                json!({ "driver": "null-co", "node-name": "n", "size": 4096 }),
            ),
            (
                "driver=null-co,read-only=on,size=1M",
                json!({ "driver": "null-co", "read-only": true, "size": "1M" }),
            ),
            (
                "driver=raw,file.driver=file,file.filename=a,,b,cache.direct=off,file.filename=c,,",
                json!({
                    "driver": "raw",
                    "file": { "driver": "file", "filename": "c," },
                    "cache": { "direct": false },
                }),
            ),
            (
                "driver=qcow2,file.driver=raw,file.file.driver=null-co,file.file.size=-1",
                json!({
                    "driver": "qcow2", "file": { "driver": "raw", "file": { "driver": "null-co", "size": -1 } },
                }),
            ),
            ("{'driver':'null-co', 'size': 5}", json!({ "driver": "null-co", "size": 5 })),
            ("", json!({})),
        ];
        for (text, value) in table {
            assert_eq!(node(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_as_qemu_says_it() {
        for (text, what) in [
            ("help", "Help is not available for this option"),
            ("driver=null-co,read-only", "Expected '=' after parameter 'read-only'"),
            ("=x", "Invalid parameter ''"),
            (",driver=x", "Invalid parameter ''"),
            ("driver=raw,file=n,file.driver=x", "Parameters 'file.*' used inconsistently"),
            ("driver=raw,file.driver=x,file=n", "Parameters 'file.*' used inconsistently"),
            ("driver=raw,a..b=n", "Invalid parameter 'a..b'"),
            ("{'driver':'null-co'", "JSON parse error, premature EOI"),
            ("{'driver':'null-co'}x", "Expecting at most one JSON value"),
        ] {
            assert_eq!(node(text), Err(what.to_owned()), "{text}");
        }
    }

    #[test]
    fn lists_are_counted() {
        let record = crate::control::schema::find("block-export-add").unwrap().takes;
        let read = read("nbd,id=e,node-name=n,bitmaps.0=a,bitmaps.1.node=n,bitmaps.1.name=b", "type", record);
        let bitmaps = json!(["a", { "node": "n", "name": "b" }]);
        assert_eq!(read.unwrap()["bitmaps"], bitmaps);
    }
}
