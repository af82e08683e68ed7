//! The options of `qemu-storage-daemon`, taken off the command line one after the other, as `getopt_long` does it.
//!
//! Knows their names and which of them have a value; what a value means is not looked at.

use super::Refused;

/// An option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Help,
    Version,
    Blockdev,
    Chardev,
    Daemonize,
    Export,
    Monitor,
    NbdServer,
    Object,
    Pidfile,
    Trace,
    /// Ours: let images open files in this directory.
    AllowPath,
    /// Ours: guess formats of backing files.
    ProbeBacking,
    /// Ours: who may give orders.
    ControlAllow,
    /// Ours, and said by ourselves: this is the process that goes into the background.
    InBackground,
}

/// How an option is written, and whether it has a value.
const LONG: [(&str, Name, bool); 15] = [
    ("help", Name::Help, false),
    ("version", Name::Version, false),
    ("blockdev", Name::Blockdev, true),
    ("chardev", Name::Chardev, true),
    ("daemonize", Name::Daemonize, false),
    ("export", Name::Export, true),
    ("monitor", Name::Monitor, true),
    ("nbd-server", Name::NbdServer, true),
    ("object", Name::Object, true),
    ("pidfile", Name::Pidfile, true),
    ("trace", Name::Trace, true),
    ("allow-path", Name::AllowPath, true),
    ("probe-backing", Name::ProbeBacking, false),
    ("control-allow", Name::ControlAllow, true),
    (IN_BACKGROUND, Name::InBackground, false),
];

/// What [`Name::InBackground`] is written as, without its dashes.
pub(super) const IN_BACKGROUND: &str = "heliostat-in-background";

const SHORT: [(char, Name, bool); 3] =
    [('h', Name::Help, false), ('V', Name::Version, false), ('T', Name::Trace, true)];

/// An option as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    /// Which.
    pub name: Name,
    /// Its value; empty where it has none.
    pub value: String,
    /// As it was written, for errors.
    pub written: String,
}

/// Reads all options.
///
/// # Errors
/// [`Refused`] for the first that is none.
pub(super) fn read(arguments: &[String]) -> Result<Vec<Given>, Refused> {
    let mut given = Vec::new();
    let mut rest = arguments.iter();
    let mut is_over = false;
    while let Some(argument) = rest.next() {
        let (name, value, has_value, shown) = match argument.as_str() {
            "--" if !is_over => {
                is_over = true;
                continue;
            }
            text if !is_over && text.starts_with("--") => {
                let (text, value) = match text.split_once('=') {
                    Some((text, value)) => (text, Some(value.to_owned())),
                    None => (text, None),
                };
                let (name, has_value) = long(&text[2..], argument)?;
                (name, value, has_value, format!("option '--{}'", written_of(name)))
            }
            text if !is_over && text.starts_with('-') && text.len() > 1 => {
                let letter = text.chars().nth(1).unwrap_or_default();
                let found = SHORT.iter().find(|(short, ..)| *short == letter);
                let (_, name, has_value) =
                    found.ok_or_else(|| Refused(format!("invalid option -- '{letter}'")))?;
                let value = text.get(1 + letter.len_utf8()..).filter(|value| !value.is_empty());
                (
                    *name,
                    value.map(str::to_owned),
                    *has_value,
                    format!("option requires an argument -- '{letter}'"),
                )
            }
            text => return Err(Refused(format!("{text}: Unexpected argument"))),
        };
        let mut written = argument.clone();
        let value = match (has_value, value) {
            (true, Some(value)) => value,
            (true, None) => {
                let missing = || {
                    let is_long = shown.starts_with("option '");
                    Refused(if is_long { format!("{shown} requires an argument") } else { shown.clone() })
                };
                let value = rest.next().ok_or_else(missing)?;
                written = format!("{argument} {value}");
                value.clone()
            }
            (false, Some(_)) if argument.starts_with("--") => {
                return Err(Refused(format!("{shown} doesn't allow an argument")));
            }
            (false, _) => String::new(),
        };
        given.push(Given { name, value, written });
    }
    Ok(given)
}

fn written_of(name: Name) -> &'static str {
    LONG.iter().find(|(_, known, _)| *known == name).map_or("", |(written, ..)| written)
}

/// The option of that name, or the only one that begins so.
fn long(text: &str, argument: &str) -> Result<(Name, bool), Refused> {
    if let Some((_, name, has_value)) = LONG.iter().find(|(written, ..)| *written == text) {
        return Ok((*name, *has_value));
    }
    let mut beginning = LONG.iter().filter(|(written, ..)| written.starts_with(text));
    match (beginning.next(), beginning.next()) {
        (Some((_, name, has_value)), None) => Ok((*name, *has_value)),
        (Some(_), Some(_)) => Err(Refused(format!("option '{argument}' is ambiguous"))),
        (None, _) => Err(Refused(format!("unrecognized option '--{text}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(arguments: &[&str]) -> Vec<String> {
        arguments.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn options_are_taken_in_their_order_however_they_are_written() {
        let given =
            read(&texts(&["--block", "a=b", "--export=c", "-T", "x", "-Ty", "--pidfile", "--daemonize"]));
        let given: Vec<_> =
            given.unwrap().into_iter().map(|given| (given.name, given.value, given.written)).collect();
        let row = |name, value: &str, written: &str| (name, value.to_owned(), written.to_owned());
        assert_eq!(
            given,
            [
                row(Name::Blockdev, "a=b", "--block a=b"),
                row(Name::Export, "c", "--export=c"),
                row(Name::Trace, "x", "-T x"),
                row(Name::Trace, "y", "-Ty"),
                row(Name::Pidfile, "--daemonize", "--pidfile --daemonize"),
            ]
        );
    }

    #[test]
    fn what_is_no_option_is_refused_in_the_usual_words() {
        for (arguments, text) in [
            (&["--zork"][..], "unrecognized option '--zork'"),
            (&["--blockdev"], "option '--blockdev' requires an argument"),
            (&["-T"], "option requires an argument -- 'T'"),
            (&["-x"], "invalid option -- 'x'"),
            (&["extra"], "extra: Unexpected argument"),
            (&["--", "--help"], "--help: Unexpected argument"),
            (&["--help=x"], "option '--help' doesn't allow an argument"),
        ] {
            assert_eq!(read(&texts(arguments)), Err(Refused(text.to_owned())));
        }
    }
}
