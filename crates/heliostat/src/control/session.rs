//! [`Session`]: what a client's messages mean: envelope, negotiation, commands.
//!
//! Texts are QEMU's (QMP.md 1.11). Knows no socket.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::refusal::{Class, Refusal};
use super::splitter::Piece;
use super::{commands, json, schema};
use crate::daemon::Daemon;

/// How far a client has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Negotiated {
    /// Commands are taken, events are sent.
    done: bool,
    /// The client may say `exec-oob`.
    oob: bool,
}

/// One client's side of the conversation.
pub(super) struct Session {
    daemon: Arc<Daemon>,
    negotiated: Negotiated,
}

/// What is to be done with a message.
pub(super) enum Order {
    /// Nothing but to refuse it.
    Refuse { id: Option<Value>, refusal: Refusal },
    /// To carry out a command.
    CarryOut { id: Option<Value>, name: String, arguments: Map<String, Value> },
}

impl Order {
    /// Says whether it makes things happen, other than looking at them.
    pub(super) fn is_change(&self) -> bool {
        matches!(self, Self::CarryOut { name, .. } if !name.starts_with("query-"))
    }
}

/// The first thing that a client is sent.
#[must_use]
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": commands::version(), "capabilities": ["oob"] } })
}

impl Session {
    pub(super) fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon, negotiated: Negotiated::default() }
    }

    /// Says whether the client gets events.
    pub(super) const fn wants_events(&self) -> bool {
        self.negotiated.done
    }

    /// Reads a message.
    pub(super) fn read(&self, piece: Piece) -> Order {
        let refuse = |refusal| Order::Refuse { id: None, refusal };
        let text = match piece {
            Piece::Message(text) => text,
            Piece::Fault(fault) => return refuse(Refusal::new(fault.to_string())),
        };
        match json::parse(&text) {
            Ok(Value::Object(envelope)) => self.open(envelope),
            Ok(_) => refuse(Refusal::new("QMP input must be a JSON object")),
            Err(error) => refuse(Refusal::new(error.to_string())),
        }
    }

    fn open(&self, mut envelope: Map<String, Value>) -> Order {
        let id = envelope.get("id").cloned();
        match self.contents(&mut envelope) {
            Ok((name, arguments)) => Order::CarryOut { id, name, arguments },
            Err(refusal) => Order::Refuse { id, refusal },
        }
    }

    fn contents(&self, envelope: &mut Map<String, Value>) -> Result<(String, Map<String, Value>), Refusal> {
        let mut command = None;
        let mut is_said_twice = false;
        for (key, value) in envelope.iter() {
            let must_be = |what| Refusal::new(format!("QMP input member '{key}' must be {what}"));
            match (key.as_str(), value) {
                ("id", _) | ("arguments", Value::Object(_)) => {}
                ("execute", Value::String(name)) => {
                    is_said_twice |= command.replace((name.clone(), false)).is_some();
                }
                ("exec-oob", Value::String(name)) if self.negotiated.oob => {
                    is_said_twice |= command.replace((name.clone(), true)).is_some();
                }
                ("execute", _) => return Err(must_be("a string")),
                ("exec-oob", _) if self.negotiated.oob => return Err(must_be("a string")),
                ("arguments", _) => return Err(must_be("an object")),
                _ => return Err(Refusal::new(format!("QMP input member '{key}' is unexpected"))),
            }
        }
        if is_said_twice {
            return Err(Refusal::new("QMP input member 'execute' clashes with 'exec-oob'"));
        }
        let (name, is_oob) = command.ok_or_else(|| Refusal::new("QMP input lacks member 'execute'"))?;
        if is_oob && schema::find(&name).is_some() {
            return Err(Refusal::new(format!("The command {name} does not support OOB")));
        }
        let arguments = match envelope.get_mut("arguments").map(Value::take) {
            Some(Value::Object(arguments)) => arguments,
            _ => Map::new(),
        };
        Ok((name, arguments))
    }

    /// Does what a message says. Blocks as long as that takes. Answers the reply.
    pub(super) fn obey(&mut self, order: Order) -> Value {
        let (id, result) = match order {
            Order::Refuse { id, refusal } => (id, Err(refusal)),
            Order::CarryOut { id, name, arguments } => (id, self.carry_out(&name, &arguments)),
        };
        let mut reply = Map::new();
        match result {
            Ok(value) => {
                reply.insert("return".to_owned(), value);
                reply.extend(id.map(|id| ("id".to_owned(), id)));
            }
            Err(refusal) => {
                reply.extend(id.map(|id| ("id".to_owned(), id)));
                reply.insert("error".to_owned(), refusal.to_json());
            }
        }
        Value::Object(reply)
    }

    fn carry_out(&mut self, name: &str, arguments: &Map<String, Value>) -> Result<Value, Refusal> {
        match (self.negotiated.done, name == "qmp_capabilities") {
            (false, true) => self.negotiate(arguments),
            (false, false) => Err(Refusal::of(
                Class::CommandNotFound,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            (true, true) => Err(Refusal::of(
                Class::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            )),
            (true, false) => commands::run(&self.daemon, name, arguments),
        }
    }

    fn negotiate(&mut self, arguments: &Map<String, Value>) -> Result<Value, Refusal> {
        let command = schema::find("qmp_capabilities").expect("the schema has it");
        let arguments = Arguments::check(arguments, command.takes)?;
        // The schema knows one word for it.
        self.negotiated = Negotiated { done: true, oob: arguments.first_of("enable").is_some() };
        Ok(json!({}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::splitter::Splitter;

    fn replies(input: &str) -> Vec<Value> {
        let mut session = Session::new(Daemon::new());
        let (mut splitter, mut rest) = (Splitter::default(), input.as_bytes());
        let mut replies = Vec::new();
        while let Some(piece) = splitter.next(&mut rest) {
            let order = session.read(piece);
            replies.push(session.obey(order));
        }
        replies
    }

    fn refused(text: &str) -> Value {
        json!({ "error": { "class": "GenericError", "desc": text } })
    }

    #[test]
    fn an_envelope_that_is_wrong_is_refused_in_qemus_words() {
        let table = [
            ("[]", "QMP input must be a JSON object"),
            ("{}", "QMP input lacks member 'execute'"),
            ("{'exec':'quit'}", "QMP input member 'exec' is unexpected"),
            ("{'execute':5}", "QMP input member 'execute' must be a string"),
            ("{'execute':'quit','arguments':null}", "QMP input member 'arguments' must be an object"),
            ("{'execute':'quit','execute':'quit'}", "JSON parse error, duplicate key"),
            ("{'exec-oob':'query-jobs'}", "QMP input member 'exec-oob' is unexpected"),
        ];
        for (input, text) in table {
            assert_eq!(replies(input), [refused(text)], "{input}");
        }
    }

    #[test]
    fn an_id_comes_back_with_the_reply_whatever_it_is() {
        let input = "{'execute':'qmp_capabilities','id':{'a':[1,null]}} {'execute':'query-jobs','id':null}";
        assert_eq!(
            replies(input),
            [json!({ "return": {}, "id": { "a": [1, null] } }), json!({ "return": [], "id": null })]
        );
    }

    #[test]
    fn commands_are_taken_after_the_negotiation_and_it_is_done_once() {
        let class = |reply: &Value| reply["error"]["class"].clone();
        let all = replies(
            "{'execute':'query-jobs'} {'execute':'qmp_capabilities','arguments':{'enable':['oob']}} \
             {'execute':'qmp_capabilities'} {'exec-oob':'query-jobs'} {'execute':'zork'}",
        );
        assert_eq!(class(&all[0]), "CommandNotFound");
        assert_eq!(all[1], json!({ "return": {} }));
        assert_eq!(class(&all[2]), "CommandNotFound");
        assert_eq!(all[3], refused("The command query-jobs does not support OOB"));
        assert_eq!(class(&all[4]), "CommandNotFound");
    }
}
