//! The objects of TLS as commands have them: `tls-creds-x509`, `authz-simple`, `authz-list`. Called by the commands
//! for objects.

use std::path::PathBuf;
use std::sync::Arc;

use heliostat_host::tls::{CredentialsSettings, Endpoint, PeerCheck};
use serde_json::{Map, Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::super::schema::tls::AUTHZ;
use crate::authz::{Authz, Match, Rule, Verdict};
use crate::daemon::{Daemon, Object};

/// Makes the object of that kind.
pub(super) fn add(
    daemon: &Arc<Daemon>,
    kind: &str,
    id: &str,
    arguments: Arguments<'_>,
) -> Result<(), Refusal> {
    match kind {
        "tls-creds-x509" => daemon.add_credentials(id, credentials(arguments)?)?,
        "authz-simple" => daemon.add_authz(id, simple(arguments.required_text("identity")))?,
        _ => daemon.add_authz(id, Authz::List { policy: policy(arguments), rules: rules(arguments) })?,
    }
    Ok(())
}

fn credentials(arguments: Arguments<'_>) -> Result<CredentialsSettings, Refusal> {
    if arguments.has("priority") {
        return Err(Refusal::new(
            "'priority' is GnuTLS's, which heliostat does not use: leave it out, and TLS 1.2 and 1.3 are spoken, with \
             ciphers that are held to be secure",
        ));
    }
    if let Some(id) = arguments.text("passwordid") {
        return Err(Refusal::new(format!(
            "No secret with id '{id}': heliostat has none, store the key decrypted"
        )));
    }
    let dir = arguments.text("dir").ok_or_else(|| Refusal::new("Missing 'dir' property value"))?;
    Ok(CredentialsSettings {
        dir: PathBuf::from(dir),
        endpoint: match arguments.text("endpoint") {
            Some("server") => Endpoint::Server,
            _ => Endpoint::Client,
        },
        peers: match arguments.flag("verify-peer") {
            Some(false) => PeerCheck::None,
            _ => PeerCheck::Required,
        },
    })
}

fn simple(identity: &str) -> Authz {
    Authz::Simple { identity: identity.to_owned() }
}

fn verdict(word: Option<&str>) -> Verdict {
    if word == Some("allow") { Verdict::Allow } else { Verdict::Deny }
}

fn policy(arguments: Arguments<'_>) -> Verdict {
    verdict(arguments.text("policy"))
}

fn rules(arguments: Arguments<'_>) -> Vec<Rule> {
    let rules = arguments.objects("rules").map(|rule| Rule {
        pattern: rule.required_text("match").to_owned(),
        format: rule.text("format").map(|word| if word == "glob" { Match::Glob } else { Match::Exact }),
        verdict: verdict(Some(rule.required_text("policy"))),
    });
    rules.collect()
}

/// QEMU's name of its type.
pub(super) fn kind(object: &Object) -> &'static str {
    match object {
        Object::Credentials(_) => "tls-creds-x509",
        Object::Authz(authz) => match **authz {
            Authz::Simple { .. } => "authz-simple",
            Authz::List { .. } => "authz-list",
        },
    }
}

/// The same, as a container lists it.
pub(super) fn child(object: &Object) -> &'static str {
    match kind(object) {
        "tls-creds-x509" => "child<tls-creds-x509>",
        "authz-simple" => "child<authz-simple>",
        _ => "child<authz-list>",
    }
}

/// Its properties but `type`, in QEMU's order, each with QEMU's name of what it may be. Of the last one QEMU knows
/// nothing.
pub(super) fn properties(object: &Object) -> &'static [(&'static str, &'static str)] {
    match kind(object) {
        "tls-creds-x509" => &[
            ("endpoint", "QCryptoTLSCredsEndpoint"),
            ("dir", "string"),
            ("verify-peer", "bool"),
            ("priority", "string"),
            ("sanity-check", "bool"),
            ("passwordid", "string"),
            ("x-trouble", "string"),
        ],
        "authz-simple" => &[("identity", "string")],
        _ => &[("policy", "QAuthZListPolicy"), ("rules", "QAuthZListRule")],
    }
}

/// What a property is. `None` where there is none of that name.
pub(super) fn get(object: &Object, property: &str) -> Option<Value> {
    let word = |verdict: Verdict| if verdict == Verdict::Allow { "allow" } else { "deny" };
    match object {
        Object::Credentials(credentials) => {
            let settings = credentials.settings();
            Some(match property {
                "endpoint" if settings.endpoint == Endpoint::Server => json!("server"),
                "endpoint" => json!("client"),
                "dir" => json!(settings.dir.to_string_lossy()),
                "verify-peer" => json!(settings.peers == PeerCheck::Required),
                "sanity-check" => json!(true),
                "priority" | "passwordid" => json!(""),
                "x-trouble" => json!(credentials.trouble().unwrap_or_default()),
                _ => return None,
            })
        }
        Object::Authz(authz) => match (&**authz, property) {
            (Authz::Simple { identity }, "identity") => Some(json!(identity)),
            (Authz::List { policy, .. }, "policy") => Some(json!(word(*policy))),
            (Authz::List { rules, .. }, "rules") => {
                let shown = rules.iter().map(|rule| {
                    let mut shown = Map::new();
                    if let Some(format) = rule.format {
                        let word = if format == Match::Glob { "glob" } else { "exact" };
                        shown.insert("format".to_owned(), json!(word));
                    }
                    shown.insert("policy".to_owned(), json!(word(rule.verdict)));
                    shown.insert("match".to_owned(), json!(rule.pattern));
                    Value::Object(shown)
                });
                Some(shown.collect())
            }
            _ => None,
        },
    }
}

/// Changes who is let in. `None` for a property that cannot be changed.
pub(super) fn set(
    daemon: &Daemon,
    id: &str,
    object: &Object,
    property: &str,
    value: Option<&Value>,
) -> Option<Result<(), Refusal>> {
    let Object::Authz(authz) = object else { return None };
    let mut given = Map::new();
    given.extend(value.map(|value| (property.to_owned(), value.clone())));
    let change = || {
        let given = Arguments::check(&given, &AUTHZ)?;
        let changed = match (&**authz, property) {
            (Authz::List { rules, .. }, "policy") => {
                Authz::List { policy: policy(given), rules: rules.clone() }
            }
            (Authz::List { policy, .. }, _) => Authz::List { policy: *policy, rules: rules(given) },
            (Authz::Simple { .. }, _) => simple(given.text("identity").unwrap_or_default()),
        };
        Ok(daemon.change_authz(id, changed)?)
    };
    let has = properties(object).iter().any(|(name, _)| *name == property);
    has.then(change)
}
