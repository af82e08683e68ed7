//! `heliostat mirror SOURCE TARGET`: copies a disk, live if clients are served meanwhile, and ends as asked.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{CopyMode, Job, OnError};
use heliostat_host::open::{Access, Locking, OpenOptions};
use heliostat_host::runtime::block_on;

use serde_json::{Value, json};

use super::disk::{Backing, FormatName, Kind, Trust, backing_of, explain, size_of};
use super::ending;
use super::image::{self, Format, Image};
use super::offer::{NODE, Offer, Offered};
use super::output::{self, Form, Outcome, say};
use super::progress::Wanted;
use super::remote::{At, Certificates};
use super::serve::{How, notify};
use super::session::{AtReady, Ended, Session};
use super::target::{Needs, Permission, Plan, Target};
use super::units;
use crate::daemon::{BackingSpec, Beneath, Child, Daemon, DriverSpec, MirrorSpec, NbdAddress, Subscription};

/// The id of the one job.
const JOB: &str = "mirror";
/// The node of the target.
const TARGET_NODE: &str = "target";

/// Mirrors a disk onto another, while it is in use if an address for clients is given
///
/// The target is made if it is missing: sparse, of the same size. Without --nbd this is a copier that keeps
/// holes. With it, clients use the disk meanwhile; on completion they go on, on the target, and are served until
/// Ctrl-C or SIGTERM.
#[derive(Args, Debug)]
pub struct Mirror {
    /// The disk to mirror: a file, a block device, or an export of an NBD server (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH)
    source: PathBuf,
    /// What it is mirrored to; an export must be there, and lose what it holds
    target: PathBuf,
    /// What the target is to be; by default what the source is. One that is there is taken for what it looks like
    #[arg(long, value_enum, value_name = "FORMAT")]
    target_format: Option<FormatName>,
    /// What the first pass copies: everything, what the source's top image holds, or nothing but what clients write from now on
    #[arg(long, value_enum, default_value_t = Sync::Full)]
    sync: Sync,
    /// Copy at most so many bytes a second: 64M, 1.5G; 0 is no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = units::parse_size)]
    speed: u64,
    /// When the target is in step: let it take the source's place, leave it as a copy, or stay in step until told
    #[arg(long, value_enum, default_value_t = OnReady::Complete)]
    on_ready: OnReady,
    /// What happens to clients' writes: copied later, or written to both sides before they are answered
    #[arg(long, value_enum, default_value_t = Mode::Background)]
    copy_mode: Mode,
    /// Bytes that one write makes dirty at least: a power of two, 512 to 64M
    #[arg(long, value_name = "BYTES", value_parser = units::parse_size)]
    granularity: Option<u64>,
    /// What to do when the target cannot be written
    #[arg(long, value_enum, default_value_t = ErrorPolicy::Report)]
    on_target_error: ErrorPolicy,
    /// What to do when the source cannot be read
    #[arg(long, value_enum, default_value_t = ErrorPolicy::Report)]
    on_source_error: ErrorPolicy,
    /// Use the target as it is there; fail if it is not
    #[arg(long, conflicts_with = "force")]
    existing: bool,
    /// Replace the contents of a target that is there
    #[arg(long)]
    force: bool,
    /// Keep a target that was made for this, even if it is incomplete
    #[arg(long)]
    keep_partial: bool,
    /// End when the mirror has ended, even if clients are served
    #[arg(long)]
    exit: bool,
    /// Show no progress
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    offer: Offer,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    trust: Trust,
    #[command(flatten)]
    certificates: Certificates,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sync {
    /// Everything that is there
    Full,
    /// Only what the top image of the source holds; the target stands on what that stands on
    Top,
    /// Only what is written from now on
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnReady {
    /// The target takes the source's place under every client
    Complete,
    /// The target stays behind as a consistent copy; clients stay on the source
    Cancel,
    /// It is kept in step until the control socket or a signal says otherwise
    Wait,
}

impl From<OnReady> for AtReady {
    fn from(on_ready: OnReady) -> Self {
        match on_ready {
            OnReady::Complete => Self::Complete,
            OnReady::Cancel => Self::Copy,
            OnReady::Wait => Self::Wait,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Copied later
    Background,
    /// Written to both sides
    WriteBlocking,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ErrorPolicy {
    /// The mirror fails
    Report,
    /// It is tried again after a while
    Ignore,
    /// The mirror pauses until it is resumed
    Stop,
    /// It pauses when space runs out, and fails for anything else
    Enospc,
}

impl From<ErrorPolicy> for OnError {
    fn from(policy: ErrorPolicy) -> Self {
        match policy {
            ErrorPolicy::Report => Self::Report,
            ErrorPolicy::Ignore => Self::Ignore,
            ErrorPolicy::Stop => Self::Stop,
            ErrorPolicy::Enospc => Self::Enospc,
        }
    }
}

impl Mirror {
    /// Mirrors, and ends as asked.
    ///
    /// # Errors
    /// When something stands in the way before it has begun, or the end itself fails.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let addresses = self.offer.resolve()?;
        if self.on_ready == OnReady::Wait && !self.offer.is_reachable() {
            bail!("nobody could change the source while it waits; add --nbd ADDRESS or --control SOCKET");
        }
        let granularity = self.granularity()?;
        let (source, kind) = self.look_at_source()?;
        let cache = self.how.host_cache();
        let needs = Needs {
            source: &self.source,
            size: size_of(self.source(), kind)?,
            kind,
            format: self.target_format,
            backing: self.backing(kind)?,
        };
        let plan = Plan::new(needs, self.target(), self.permission(), cache)?;
        if self.sync == Sync::None && self.on_ready == OnReady::Complete && !plan.has_the_rest() {
            bail!(
                "--sync none copies nothing that is there already, so the target would lack it; add --target-format \
                 qcow2 for a target that stands on the source, --existing for one that has it, or --on-ready wait or \
                 cancel to collect what is written from now on"
            );
        }
        // Kept open, the source lets nobody else write meanwhile; clients of ours do so only when they are served.
        let source = (!self.offer.has_clients()).then_some(source);
        let signals = ending::signals()?;
        let daemon = self.trust.daemon()?;
        let started = self.start(&daemon, addresses, granularity, kind, plan);
        let (offered, events, job, target) = started.inspect_err(|_| {
            // A client may have found the socket already. The error that is told is the first one.
            let _ = daemon.shutdown();
        })?;
        let started = Instant::now();
        let session = Session {
            daemon,
            events,
            signals,
            job,
            started,
            at_ready: self.on_ready.into(),
            wanted: if self.quiet { Wanted::No } else { Wanted::Yes },
            control: self.offer.control().map(Path::to_owned),
            signal: None,
            quit: false,
        };
        self.carry_through(session, source, target, offered, form)
    }

    /// Opens the source before the target is made: what is wrong with it is known before anything has happened.
    fn start(
        &self,
        daemon: &Arc<Daemon>,
        addresses: Vec<NbdAddress>,
        granularity: Option<u32>,
        kind: Kind,
        plan: Plan,
    ) -> Result<(Offered, Subscription, Arc<Job>, Target)> {
        let source = self.how.node(NODE, self.source(), kind, !self.offer.has_clients());
        self.source().lend(daemon)?;
        self.target().lend(daemon)?;
        daemon.add_node(&source).map_err(|error| explain(&self.source, kind, error))?;
        let mut target = plan.make(self.how.host_cache())?;
        if self.keep_partial {
            target.keep();
        }
        self.add_target(daemon, &target)?;
        let mut offered = self.offer.open(daemon, addresses, true)?;
        let events = daemon.subscribe();
        let job = daemon.start_mirror(&self.spec(granularity, &target)?)?;
        offered.take_orders(daemon)?;
        self.announce(&offered);
        Ok((offered, events, job, target))
    }

    fn source(&self) -> At<'_> {
        self.certificates.at(&self.source)
    }

    fn target(&self) -> At<'_> {
        self.certificates.at(&self.target)
    }

    fn permission(&self) -> Permission {
        match (self.existing, self.force) {
            (true, _) => Permission::Existing,
            (_, true) => Permission::Replace,
            _ => Permission::Create,
        }
    }

    fn granularity(&self) -> Result<Option<u32>> {
        let Some(bytes) = self.granularity else { return Ok(None) };
        let allowed = 512..=64 << 20;
        match u32::try_from(bytes) {
            Ok(granularity) if bytes.is_power_of_two() && allowed.contains(&bytes) => Ok(Some(granularity)),
            _ => bail!("--granularity {bytes}: it must be a power of two from 512 to 64M"),
        }
    }

    fn look_at_source(&self) -> Result<(Image, Kind)> {
        let (access, locking) = match self.offer.has_clients() {
            true => (Access::ReadWrite, Locking::Auto),
            false => (Access::ReadOnly, Locking::Still),
        };
        let cache = self.how.host_cache();
        let image = image::open_any(
            self.source(),
            &OpenOptions { access, cache, locking, ..OpenOptions::default() },
        )?;
        let found = block_on(image.format()).context("cannot start the I/O engine")??;
        Ok((image, self.how.kind(&self.source, found)))
    }

    /// What a new target stands on: what the source does, where only the source's top image is copied; the source,
    /// where nothing is.
    fn backing(&self, kind: Kind) -> Result<Option<Backing>> {
        if self.sync == Sync::Full || (self.sync == Sync::None && !self.makes_an_image(kind)) {
            return Ok(None);
        }
        if self.sync == Sync::None {
            let name = std::fs::canonicalize(&self.source)
                .with_context(|| format!("cannot find {}", self.source.display()))?;
            let format = if kind.format() == Format::Qcow2 { "qcow2" } else { "raw" };
            return Ok(Some(Backing { name, format: format.to_owned() }));
        }
        let backing = match kind.format() {
            Format::Qcow2 => backing_of(self.source())?,
            Format::Raw => None,
        };
        if backing.is_none() {
            bail!(
                "--sync top: {} stands on no other image, so there is no top; leave --sync out",
                self.source.display()
            );
        }
        Ok(backing)
    }

    fn makes_an_image(&self, kind: Kind) -> bool {
        self.target_format.map_or(kind.format() == Format::Qcow2, |format| format == FormatName::Qcow2)
    }

    fn add_target(&self, daemon: &Arc<Daemon>, target: &Target) -> Result<()> {
        let mut spec = self.how.node(TARGET_NODE, self.target(), target.kind(), false);
        if let (DriverSpec::Qcow2(image), true) = (&mut spec.driver, target.shares_backing()) {
            if self.sync == Sync::None {
                // Put there when clients are on the target.
                image.backing = BackingSpec::Nothing;
                daemon.add_node(&spec).map_err(|error| explain(&self.target, target.kind(), error))?;
                return Ok(());
            }
            let nodes = daemon.nodes();
            let source = nodes.iter().find(|entry| entry.node.name().as_str() == NODE);
            let below = source.and_then(|entry| entry.backing.as_ref());
            let given = below.map(|name| BackingSpec::Given(Child::Named(name.to_string())));
            image.backing = given.unwrap_or(BackingSpec::Nothing);
        }
        daemon.add_node(&spec).map_err(|error| explain(&self.target, target.kind(), error))?;
        Ok(())
    }

    fn spec(&self, granularity: Option<u32>, target: &Target) -> Result<MirrorSpec> {
        Ok(MirrorSpec {
            sync: match self.sync {
                Sync::Full => SyncMode::Full,
                Sync::Top => SyncMode::Top,
                Sync::None => SyncMode::None,
            },
            copy_mode: match self.copy_mode {
                Mode::Background => CopyMode::Background,
                Mode::WriteBlocking => CopyMode::WriteBlocking,
            },
            speed: i64::try_from(self.speed).context("--speed")?,
            granularity,
            on_source_error: self.on_source_error.into(),
            on_target_error: self.on_target_error.into(),
            target_is_zero: target.reads_zero(),
            beneath: match (self.sync, target.shares_backing()) {
                (Sync::None, true) => Beneath::Source,
                _ => Beneath::AsItIs,
            },
            ..MirrorSpec::new(JOB, NODE, TARGET_NODE)
        })
    }

    fn announce(&self, offered: &Offered) {
        if self.quiet {
            return;
        }
        for line in offered.words() {
            say(line);
        }
    }

    /// Follows the job to its end, then does what is left to do.
    fn carry_through(
        &self,
        mut session: Session,
        source: Option<Image>,
        mut target: Target,
        offered: Offered,
        form: Form,
    ) -> Result<Outcome> {
        notify(&[sd_notify::NotifyState::Ready]);
        let (mut ended, took) = session.follow();
        if let Some(text) = source.as_ref().and_then(|source| grown(&self.source, source)) {
            ended = Ended::Failed(text);
        }
        let succeeded = matches!(ended, Ended::Completed | Ended::Copied);
        if succeeded {
            target.keep();
        }
        // A result that cannot be written is no reason to cut clients off.
        let told = self.tell(&session, &ended, took, form);
        let serves_on = self.offer.has_clients() && !self.exit && session.signal.is_none() && !session.quit;
        if serves_on {
            say(self.words_of_serving(&ended, &offered));
            ending::wait(&session.daemon, &mut session.signals)?;
        }
        notify(&[sd_notify::NotifyState::Stopping]);
        let outcome = ending::end(&session.daemon, &mut session.signals);
        offered.close();
        let outcome = outcome?;
        if !succeeded {
            target.give_up();
        }
        told?;
        Ok(match (outcome, session.signal) {
            (Outcome::Done, Some(signal)) if ended == Ended::Cancelled => Outcome::Interrupted(signal),
            (Outcome::Done, _) if !succeeded => Outcome::No,
            (outcome, _) => outcome,
        })
    }

    fn words_of_serving(&self, ended: &Ended, offered: &Offered) -> String {
        let uri = offered.uri().unwrap_or_default();
        match ended {
            Ended::Completed => format!(
                "heliostat: clients are on {} now and are served at {uri} until Ctrl-C",
                self.target.display()
            ),
            _ => format!(
                "heliostat: clients stay on {} and are served at {uri} until Ctrl-C",
                self.source.display()
            ),
        }
    }

    fn tell(&self, session: &Session, ended: &Ended, took: Duration, form: Form) -> Result<()> {
        match ended {
            Ended::Failed(error) => say(format_args!("heliostat: the mirror failed: {error}")),
            Ended::Cancelled => say("heliostat: the mirror was cancelled"),
            Ended::Completed | Ended::Copied => {}
        }
        match form {
            Form::Json => output::json(&self.to_json(session, ended, took)),
            Form::Text => match self.words(session, ended, took) {
                Some(words) => output::result(&words),
                None => Ok(()),
            },
        }
    }

    fn words(&self, session: &Session, ended: &Ended, took: Duration) -> Option<String> {
        let (source, target) = (self.source.display(), self.target.display());
        let figures = session.job.figures();
        let done = format!("{} copied in {}", units::size(figures.data_copied), units::latency(took));
        match ended {
            Ended::Completed if self.offer.has_clients() => {
                let pause = figures.pause.map_or_else(String::new, |pause| {
                    format!("; clients waited {} for it", units::latency(pause))
                });
                Some(format!("{target} has taken the place of {source}: {done}{pause}"))
            }
            Ended::Completed | Ended::Copied => Some(format!("{target} is a copy of {source}: {done}")),
            Ended::Cancelled | Ended::Failed(_) => None,
        }
    }

    fn to_json(&self, session: &Session, ended: &Ended, took: Duration) -> Value {
        let figures = session.job.figures();
        let (word, error) = match ended {
            Ended::Completed => ("completed", None),
            Ended::Copied => ("copied", None),
            Ended::Failed(error) => ("failed", Some(error)),
            Ended::Cancelled => ("cancelled", None),
        };
        let target = session.daemon.node(TARGET_NODE).ok();
        json!({
            "source": self.source.to_string_lossy(),
            "target": self.target.to_string_lossy(),
            "size": target.as_ref().map(|node| node.size()),
            "target-actual-size": target.as_ref().and_then(|node| node.allocated_size()),
            "ended": word,
            "error": error,
            "seconds": took.as_secs_f64(),
            "data-copied": figures.data_copied,
            "zeroes-skipped": figures.zeroes_skipped,
            "pause-us": figures.pause.map(micros),
        })
    }
}

/// A time as programs get it.
#[must_use]
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Says so, when a source that nobody should have changed has another length by now.
fn grown(path: &Path, image: &Image) -> Option<String> {
    let now = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?.len();
    let then = image.node.size();
    (now != then).then(|| {
        format!(
            "{} had {} bytes when the copy began and has {} now: another program is writing to it; end that, \
             and copy again",
            path.display(),
            units::count(then),
            units::count(now)
        )
    })
}
