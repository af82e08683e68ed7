//! [`Arguments`]: what a command was given, checked against its [`Record`] and then read without further ado.
//!
//! Checks in the record's order and refuses in QEMU's words. Knows no command.

use serde_json::{Map, Value};

use super::refusal::Refusal;
use super::schema::{Cases, Kind, Member, NODE, Need, Record};

/// The members of an object that has been checked.
///
/// A member that may be missing reads as `None`; reading one that the record does not have, or as another
/// kind, is our own mistake and reads as `None` too.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a>(&'a Map<String, Value>);

impl<'a> Arguments<'a> {
    /// Checks an object.
    ///
    /// # Errors
    /// [`Refusal`] for the first member, in the record's order, that is missing or wrong; then for the first
    /// that is unknown.
    pub fn check(object: &'a Map<String, Value>, record: &Record) -> Result<Self, Refusal> {
        check_record(object, record, "")?;
        Ok(Self(object))
    }

    /// A text or a word.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name)?.as_str()
    }

    /// A text or a word that the record requires.
    ///
    /// # Panics
    /// When the record does not require it.
    #[must_use]
    pub fn required_text(&self, name: &str) -> &'a str {
        self.text(name).expect("the record requires it, so it has been checked")
    }

    /// `true` or `false`.
    #[must_use]
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool()
    }

    /// A whole number with a sign.
    #[must_use]
    pub fn int(&self, name: &str) -> Option<i64> {
        self.0.get(name)?.as_i64()
    }

    /// A whole number of 32 bits without a sign.
    #[must_use]
    pub fn uint32(&self, name: &str) -> Option<u32> {
        u32::try_from(self.0.get(name)?.as_u64()?).ok()
    }

    /// A whole number of 64 bits without a sign; of a negative one its two's complement, as in QEMU.
    #[must_use]
    pub fn uint64(&self, name: &str) -> Option<u64> {
        let value = self.0.get(name)?;
        value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned))
    }

    /// An object.
    #[must_use]
    pub fn object(&self, name: &str) -> Option<Self> {
        self.0.get(name)?.as_object().map(Self)
    }

    /// The objects of a list; none where it is not there.
    pub fn objects(&self, name: &str) -> impl Iterator<Item = Self> + use<'a> {
        let list = self.0.get(name).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_object).map(Self)
    }

    /// A value of any kind.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name)
    }

    /// The first text of a list; of an object there, its name.
    #[must_use]
    pub fn first_of(&self, name: &str) -> Option<&'a str> {
        let first = self.0.get(name)?.as_array()?.first()?;
        first.as_str().or_else(|| first.get("name")?.as_str())
    }

    /// A list of names, each alone or as `name` beside a `node`: that node, and the name.
    #[must_use]
    pub fn named(&self, name: &str) -> Vec<(Option<&'a str>, &'a str)> {
        let list = self.0.get(name).and_then(Value::as_array).into_iter().flatten();
        let named = list.filter_map(|named| match named.as_str() {
            Some(name) => Some((None, name)),
            None => Some((named.get("node").and_then(Value::as_str), named.get("name")?.as_str()?)),
        });
        named.collect()
    }

    /// Says whether it was given at all.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

fn check_record(object: &Map<String, Value>, record: &Record, path: &str) -> Result<(), Refusal> {
    let case = check_members(object, record.members, path)
        .map(|()| record.cases.as_ref().map_or(&[][..], |cases| case_of(object, cases)))?;
    check_members(object, case, path)?;
    let is_known = |name: &str| record.members.iter().chain(case).any(|member| member.name == name);
    match object.keys().find(|name| !is_known(name)) {
        Some(unknown) => Err(Refusal::new(format!("Parameter '{path}{unknown}' is unexpected"))),
        None => Ok(()),
    }
}

fn case_of(object: &Map<String, Value>, cases: &Cases) -> &'static [Member] {
    let word = object.get(cases.tag).and_then(Value::as_str);
    let found = cases.by_word.iter().find(|(case, _)| Some(*case) == word);
    found.map_or(&[], |(_, members)| members)
}

fn check_members(object: &Map<String, Value>, members: &[Member], path: &str) -> Result<(), Refusal> {
    for member in members {
        match object.get(member.name) {
            Some(value) => check_kind(value, &member.kind, member.name, path)?,
            None if member.need == Need::Required => {
                return Err(Refusal::new(format!("Parameter '{path}{}' is missing", member.name)));
            }
            None => {}
        }
    }
    Ok(())
}

fn check_kind(value: &Value, kind: &Kind, name: &str, path: &str) -> Result<(), Refusal> {
    let wrong = |expected: &str| {
        Err(Refusal::new(format!("Invalid parameter type for '{path}{name}', expected: {expected}")))
    };
    // QEMU does not say where a choice stands.
    let wrong_choice = |expected: &str| {
        Err(Refusal::new(format!("Invalid parameter type for '{name}', expected: {expected}")))
    };
    let expects = |what: &str| Err(Refusal::new(format!("Parameter '{path}{name}' expects {what}")));
    match (kind, value) {
        (Kind::Any, _) | (Kind::Text, Value::String(_)) | (Kind::Flag, Value::Bool(_)) => Ok(()),
        (Kind::Word(words), Value::String(word)) => check_word(word, words, name),
        (Kind::Text | Kind::Word(_), _) => wrong("string"),
        (Kind::Flag, _) => wrong("boolean"),
        (Kind::Int, _) if value.as_i64().is_some() => Ok(()),
        (Kind::Int, _) => wrong("integer"),
        // A negative number is taken for its two's complement, which is a large one.
        (Kind::Uint64, _) if value.is_u64() || value.is_i64() => Ok(()),
        (Kind::Uint32, _) if value.as_u64().is_some_and(|number| u32::try_from(number).is_ok()) => Ok(()),
        (Kind::Uint32, _) if value.is_u64() || value.is_i64() => expects("uint32_t"),
        (Kind::Uint32 | Kind::Uint64, _) => expects("uint64"),
        (Kind::List(kind), Value::Array(list)) => {
            list.iter().enumerate().try_for_each(|(index, value)| match (kind, value) {
                // QEMU has no name for an element at this point.
                (Kind::Word(words), Value::String(word)) => check_word(word, words, "null"),
                (Kind::TextOrObject(_, choice), value) if !value.is_string() && !value.is_object() => {
                    Err(Refusal::new(format!("Invalid parameter type for 'null', expected: {choice}")))
                }
                _ => check_kind(value, kind, &format!("{name}[{index}]"), path),
            })
        }
        (Kind::List(_), _) => wrong("array"),
        (Kind::Object(record), Value::Object(object)) => {
            check_record(object, record, &format!("{path}{name}."))
        }
        (Kind::Object(_), _) => wrong("object"),
        (Kind::NodeRef, Value::String(_)) => Ok(()),
        (Kind::NodeRef, Value::Object(object)) => check_record(object, &NODE, &format!("{path}{name}.")),
        (Kind::NodeRef, _) => wrong_choice("BlockdevRef"),
        (Kind::NodeRefOrNull, Value::Null) => Ok(()),
        (Kind::NodeRefOrNull, Value::String(_) | Value::Object(_)) => {
            check_kind(value, &Kind::NodeRef, name, path)
        }
        (Kind::NodeRefOrNull, _) => wrong_choice("BlockdevRefOrNull"),
        (Kind::TextOrObject(..), Value::String(_)) => Ok(()),
        (Kind::TextOrObject(record, _), Value::Object(object)) => {
            check_record(object, record, &format!("{path}{name}."))
        }
        (Kind::TextOrObject(_, choice), _) => wrong_choice(choice),
        (Kind::WordOrObject(words, ..), Value::String(word)) => check_word(word, words, name),
        (Kind::WordOrObject(_, record, _), Value::Object(object)) => {
            check_record(object, record, &format!("{path}{name}."))
        }
        (Kind::WordOrObject(.., choice), _) => wrong_choice(choice),
    }
}

fn check_word(word: &str, words: &[&str], name: &str) -> Result<(), Refusal> {
    if words.contains(&word) {
        return Ok(());
    }
    Err(Refusal::new(format!("Parameter '{name}' does not accept value '{word}'")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::control::schema;

    fn refused(command: &str, arguments: &Value) -> Option<String> {
        let record = schema::find(command).unwrap().takes;
        let refusal = Arguments::check(arguments.as_object().unwrap(), record).err()?;
        Some(refusal.to_json()["desc"].as_str().unwrap().to_owned())
    }

    #[test]
    fn the_first_wrong_argument_is_named_in_qemus_words() {
        let mirror = |key: &str, value: Value| {
            let mut all = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" });
            all[key] = value;
            refused("blockdev-mirror", &all)
        };
        let table = [
            (mirror("sync", json!("half")), "Parameter 'sync' does not accept value 'half'"),
            (mirror("sync", json!(5)), "Invalid parameter type for 'sync', expected: string"),
            (mirror("granularity", json!(-1)), "Parameter 'granularity' expects uint32_t"),
            (mirror("granularity", json!(1_u64 << 32)), "Parameter 'granularity' expects uint32_t"),
            (mirror("granularity", json!("5")), "Parameter 'granularity' expects uint64"),
            (mirror("granularity", json!(65536.0)), "Parameter 'granularity' expects uint64"),
            (mirror("speed", json!(1.5)), "Invalid parameter type for 'speed', expected: integer"),
            (mirror("speed", json!(u64::MAX)), "Invalid parameter type for 'speed', expected: integer"),
            (mirror("foo", json!(1)), "Parameter 'foo' is unexpected"),
            (refused("blockdev-mirror", &json!({ "job-id": "j" })), "Parameter 'device' is missing"),
            (
                refused("nbd-server-start", &json!({ "addr": { "type": "unix", "data": {} } })),
                "Parameter 'addr.data.path' is missing",
            ),
            (
                refused("blockdev-add", &json!({ "driver": "raw", "file": { "driver": "file" } })),
                "Parameter 'file.filename' is missing",
            ),
            (
                refused("blockdev-add", &json!({ "driver": "raw", "file": 5 })),
                "Invalid parameter type for 'file', expected: BlockdevRef",
            ),
            (
                refused("qmp_capabilities", &json!({ "enable": ["zork"] })),
                "Parameter 'null' does not accept value 'zork'",
            ),
        ];
        for (refusal, text) in table {
            assert_eq!(refusal.as_deref(), Some(text));
        }
        assert_eq!(mirror("speed", json!(7)), None);
    }
}
