//! `query-qmp-schema`: the tables as QEMU's introspection shows them.
//!
//! Types have numbers for names, as in QEMU: a client goes from a command or an event to them, and relies on no name.
//! What only we have carries the feature `heliostat`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::returns::EVENTS;
use super::{COMMANDS, Kind, Member, NODE, Need, Origin, Record};

/// What marks a member that QEMU does not have.
const FEATURE: &str = "heliostat";

/// The schema, in an order in which everything is there once.
#[must_use]
pub fn schema() -> Value {
    let mut types = Types::default();
    for event in EVENTS {
        let says = types.object(event.says);
        types.list.push(json!({ "name": event.name, "meta-type": "event", "arg-type": says }));
    }
    for command in COMMANDS {
        let takes = types.object(command.takes);
        let returns = types.kind(command.returns);
        types.list.push(json!({
            "name": command.name, "ret-type": returns, "meta-type": "command", "arg-type": takes,
        }));
    }
    Value::Array(types.list)
}

/// What makes two types the same one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Builtin(&'static str),
    Words(Vec<&'static str>),
    List(String),
    /// An object or a case of one, by where it stands.
    At(usize),
    Choice(Vec<String>),
}

#[derive(Default)]
struct Types {
    names: BTreeMap<Key, String>,
    count: usize,
    list: Vec<Value>,
}

impl Types {
    /// The name of a type, if it has one already; else a new one for it, and `None`.
    fn known(&mut self, key: Key) -> Result<String, String> {
        if let Some(name) = self.names.get(&key) {
            return Ok(name.clone());
        }
        let name = match &key {
            Key::Builtin(name) => (*name).to_owned(),
            Key::List(of) => format!("[{of}]"),
            _ => {
                self.count += 1;
                (self.count - 1).to_string()
            }
        };
        self.names.insert(key, name.clone());
        Err(name)
    }

    fn builtin(&mut self, name: &'static str, json_type: &str) -> String {
        self.known(Key::Builtin(name)).unwrap_or_else(|name| {
            self.list.push(json!({ "name": name, "json-type": json_type, "meta-type": "builtin" }));
            name
        })
    }

    fn kind(&mut self, kind: &'static Kind) -> String {
        match kind {
            Kind::Text => self.builtin("str", "string"),
            Kind::Flag => self.builtin("bool", "boolean"),
            Kind::Int | Kind::Uint32 | Kind::Uint64 => self.builtin("int", "int"),
            Kind::Any => self.builtin("any", "value"),
            Kind::Word(words) => self.words(words),
            Kind::List(of) => {
                let of = self.kind(of);
                self.known(Key::List(of.clone())).unwrap_or_else(|name| {
                    self.list.push(json!({ "name": name, "element-type": of, "meta-type": "array" }));
                    name
                })
            }
            Kind::Object(record) => self.object(record),
            Kind::NodeRef => {
                let members = [self.object(&NODE), self.builtin("str", "string")];
                self.choice(members.to_vec())
            }
            Kind::NodeRefOrNull => {
                let members =
                    [self.object(&NODE), self.builtin("str", "string"), self.builtin("null", "null")];
                self.choice(members.to_vec())
            }
            Kind::TextOrObject(record, _) => {
                let members = [self.builtin("str", "string"), self.object(record)];
                self.choice(members.to_vec())
            }
            Kind::WordOrObject(words, record, _) => {
                let members = [self.object(record), self.words(words)];
                self.choice(members.to_vec())
            }
        }
    }

    fn words(&mut self, words: &'static [&'static str]) -> String {
        self.known(Key::Words(words.to_vec())).unwrap_or_else(|name| {
            let members: Vec<_> = words.iter().map(|word| json!({ "name": word })).collect();
            self.list.push(json!({ "name": name, "members": members, "meta-type": "enum", "values": words }));
            name
        })
    }

    fn choice(&mut self, members: Vec<String>) -> String {
        self.known(Key::Choice(members.clone())).unwrap_or_else(|name| {
            let members: Vec<_> = members.iter().map(|member| json!({ "type": member })).collect();
            self.list.push(json!({ "name": name, "members": members, "meta-type": "alternate" }));
            name
        })
    }

    fn object(&mut self, record: &'static Record) -> String {
        if record.members.is_empty() {
            return self.members(&[]);
        }
        let name = match self.known(Key::At(std::ptr::from_ref(record).addr())) {
            Ok(name) => return name,
            // It has its name before its members have theirs: it may be one of them.
            Err(name) => name,
        };
        let members: Vec<_> = record.members.iter().map(|member| self.member(member)).collect();
        let mut object = json!({ "name": name, "members": members, "meta-type": "object" });
        if let Some(cases) = &record.cases {
            let tag = record.members.iter().find(|member| member.name == cases.tag);
            let Some(Member { kind: Kind::Word(words), .. }) = tag else {
                unreachable!("a case is told by a word");
            };
            let variants: Vec<_> = words
                .iter()
                .map(|word| {
                    let found = cases.by_word.iter().find(|(case, _)| case == word);
                    let members = found.map_or(&[][..], |(_, members)| members);
                    json!({ "case": word, "type": self.members(members) })
                })
                .collect();
            object["tag"] = json!(cases.tag);
            object["variants"] = json!(variants);
        }
        self.list.push(object);
        name
    }

    /// An object with these members and no cases.
    fn members(&mut self, members: &'static [Member]) -> String {
        let at = if members.is_empty() { 0 } else { members.as_ptr().addr() };
        let name = match self.known(Key::At(at)) {
            Ok(name) => return name,
            Err(name) => name,
        };
        let members: Vec<_> = members.iter().map(|member| self.member(member)).collect();
        self.list.push(json!({ "name": name, "members": members, "meta-type": "object" }));
        name
    }

    fn member(&mut self, member: &'static Member) -> Value {
        let mut described = json!({ "name": member.name });
        if member.need == Need::Optional {
            described["default"] = Value::Null;
        }
        described["type"] = json!(self.kind(&member.kind));
        if member.origin == Origin::Ours {
            described["features"] = json!([FEATURE]);
        }
        described
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_type_that_is_named_is_there_once() {
        let schema = schema();
        let entries = schema.as_array().unwrap();
        let names: Vec<_> = entries.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        let known: BTreeSet<_> = names.iter().copied().collect();
        assert_eq!(names.len(), known.len(), "each has one name");
        let mut named = Vec::new();
        for entry in entries {
            named.extend(["arg-type", "ret-type", "element-type"].iter().filter_map(|key| entry.get(key)));
            for list in ["members", "variants"] {
                let list = entry[list].as_array().into_iter().flatten();
                named.extend(list.filter_map(|member| member.get("type")));
            }
        }
        for name in named {
            assert!(known.contains(name.as_str().unwrap()), "{name}");
        }
    }
}
