//! Who may use what, by the certificate that was shown: QEMU's `authz-simple` and `authz-list`, and our own lists of
//! an export's clients.
//!
//! Decides from a name and a fingerprint that TLS has verified; knows no connection. Called by the NBD front end for
//! each connection, made by the control plane.

use std::fmt;
use std::str::FromStr;

use heliostat_host::tls::Peer;

/// A rule of who is let in, by distinguished name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authz {
    /// One identity.
    Simple {
        /// The distinguished name as [`Peer::name`] has it.
        identity: String,
    },
    /// The first rule that fits decides.
    List {
        /// What holds where no rule fits.
        policy: Verdict,
        /// In order.
        rules: Vec<Rule>,
    },
}

/// What becomes of somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Turned away.
    Deny,
    /// Let in.
    Allow,
}

/// A rule of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What the name is compared with.
    pub pattern: String,
    /// How. `None` is as [`Match::Exact`], and was not said.
    pub format: Option<Match>,
    /// What becomes of those it fits.
    pub verdict: Verdict,
}

/// How a name is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// All of it.
    Exact,
    /// `*` stands for any text, `?` for one character.
    Glob,
}

impl Authz {
    /// Says whether whoever has this name is let in.
    #[must_use]
    pub fn admits(&self, name: &str) -> bool {
        match self {
            Self::Simple { identity } => identity == name,
            Self::List { policy, rules } => {
                let rule = rules.iter().find(|rule| rule.fits(name));
                rule.map_or(*policy, |rule| rule.verdict) == Verdict::Allow
            }
        }
    }
}

impl Rule {
    fn fits(&self, name: &str) -> bool {
        match self.format.unwrap_or(Match::Exact) {
            Match::Exact => self.pattern == name,
            Match::Glob => glob(&self.pattern, name),
        }
    }
}

/// Goes back to the last `*` only, which is enough, so that no pattern takes long.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<_>, Vec<_>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut seen) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at + 1, seen));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == text[seen] => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((after, taken)) = star else { return false };
                star = Some((after, taken + 1));
                (at, seen) = (after, taken + 1);
            }
        }
    }
    pattern[at..].iter().all(|rest| *rest == '*')
}

/// One client that an export is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client {
    /// Whoever has this distinguished name, as [`Peer::name`] has it.
    Name(String),
    /// Whoever has the certificate with this SHA-256.
    Fingerprint([u8; 32]),
}

/// What stands before a fingerprint.
const FINGERPRINT: &str = "sha256:";

impl FromStr for Client {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(digits) = text.strip_prefix(FINGERPRINT) else {
            return match text.contains('=') {
                true => Ok(Self::Name(text.to_owned())),
                false => Err(format!(
                    "'{text}' is neither a distinguished name such as CN=client,O=Example nor {FINGERPRINT} and 64 digits"
                )),
            };
        };
        let wrong = || {
            format!(
                "'{text}' is no fingerprint: {FINGERPRINT} and 64 hexadecimal digits, colons between or not"
            )
        };
        let digits: String = digits.chars().filter(|digit| *digit != ':').collect();
        if digits.len() != 64 || !digits.chars().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut fingerprint = [0; 32];
        for (index, byte) in fingerprint.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self::Fingerprint(fingerprint))
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Fingerprint(bytes) => {
                f.write_str(FINGERPRINT)?;
                bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// Says whether a peer is one of these clients. Nobody is who has shown no certificate.
#[must_use]
pub fn is_among(clients: &[Client], peer: Option<&Peer>) -> bool {
    let Some(peer) = peer else { return false };
    clients.iter().any(|client| match client {
        Client::Name(name) => *name == peer.name,
        Client::Fingerprint(fingerprint) => *fingerprint == peer.fingerprint,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pattern: &str, format: Option<Match>, verdict: Verdict) -> Rule {
        Rule { pattern: pattern.to_owned(), format, verdict }
    }

    #[test]
    fn a_pattern_fits_what_its_stars_and_marks_stand_for() {
        for (pattern, text, fits) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("*", "anything", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("CN=*,O=x", "CN=a,b,O=x", true),
            ("CN=*,O=x", "CN=a,O=y", false),
            ("*ab*ab", "abab", true),
            ("*ab*ab", "ababa", false),
            ("a*b*c", "a-b-b-c", true),
            ("[ab]", "a", false),
            ("é?", "éa", true),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern:?} against {text:?}");
        }
        let long = "a".repeat(20_000);
        assert!(!glob(&"*a".repeat(30), &format!("{long}b")));
    }

    #[test]
    fn the_first_rule_that_fits_decides_and_else_the_policy() {
        let rules = vec![
            rule("CN=bad*", Some(Match::Glob), Verdict::Deny),
            rule("CN=b*", Some(Match::Glob), Verdict::Allow),
            rule("CN=*", None, Verdict::Allow),
        ];
        let list = |policy| Authz::List { policy, rules: rules.clone() };
        for (name, under_deny, under_allow) in [
            ("CN=bad", false, false),
            ("CN=badly", false, false),
            ("CN=bus", true, true),
            ("CN=*", true, true),
            ("CN=c", false, true),
            ("", false, true),
        ] {
            assert_eq!(list(Verdict::Deny).admits(name), under_deny, "{name}");
            assert_eq!(list(Verdict::Allow).admits(name), under_allow, "{name}");
        }
        let simple = Authz::Simple { identity: "CN=a*".to_owned() };
        assert!(simple.admits("CN=a*") && !simple.admits("CN=ab") && !simple.admits(""));
    }

    #[test]
    fn a_client_is_a_name_or_a_fingerprint() {
        let peer = Peer { name: "CN=a,O=b".to_owned(), fingerprint: [0xab; 32] };
        let fingerprint = format!("sha256:{}", "AB".repeat(32));
        let spaced = format!("sha256:{}", ["aB"; 32].join(":"));
        for (text, is_it) in
            [("CN=a,O=b", true), ("CN=a", false), ("O=b,CN=a", false), (&fingerprint, true), (&spaced, true)]
        {
            let client: Client = text.parse().unwrap();
            assert_eq!(is_among(&[client], Some(&peer)), is_it, "{text}");
        }
        let other = [fingerprint.replacen("AB", "AC", 1).parse().unwrap()];
        assert!(!is_among(&other, Some(&peer)));
        assert!(!is_among(&[Client::Name(String::new())], None), "no certificate, no client");
        let client: Client = fingerprint.parse().unwrap();
        assert_eq!(client.to_string(), fingerprint.to_lowercase());
    }

    #[test]
    fn what_is_neither_is_refused() {
        for text in ["", "client", "sha256:", "sha256:12", "sha256:zz", &format!("sha256:{}", "é".repeat(32))]
        {
            assert!(text.parse::<Client>().is_err(), "{text}");
        }
        assert!(format!("sha256:{}", "+1".repeat(32)).parse::<Client>().is_err());
    }
}
