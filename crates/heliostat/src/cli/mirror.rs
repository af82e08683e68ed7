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
use heliostat_host::socket::Address;
use serde_json::{Value, json};

use super::ending;
use super::image::{self, Image};
use super::offer::{NODE, Offer, Offered};
use super::output::{self, Form, Outcome, say};
use super::progress::Wanted;
use super::serve::{How, notify};
use super::session::{AtReady, Ended, Session};
use super::target::{Permission, Plan, Target};
use super::units;
use crate::daemon::{Daemon, MirrorSpec, NodeSpec, Subscription};

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
    /// The disk to mirror: a file or a block device
    source: PathBuf,
    /// What it is mirrored to
    target: PathBuf,
    /// What the first pass copies: everything, or nothing but what clients write from now on
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sync {
    /// Everything that is there
    Full,
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
        let address = self.offer.resolve()?;
        if self.on_ready == OnReady::Wait && !self.offer.is_reachable() {
            bail!("nobody could change the source while it waits; add --nbd ADDRESS or --control SOCKET");
        }
        if self.sync == Sync::None && self.on_ready == OnReady::Complete && !self.existing {
            bail!(
                "--sync none copies nothing that is there already, so the target would lack it; add --existing for a \
                 target that has it, or --on-ready wait or cancel to collect what is written from now on"
            );
        }
        let granularity = self.granularity()?;
        let source = self.look_at_source()?;
        let size = source.node.size();
        let cache = self.how.host_cache();
        let plan = Plan::new(&self.source, &self.target, size, self.permission(), cache)?;
        // Kept open, the source lets nobody else write meanwhile; clients of ours do so only when they are served.
        let source = (!self.offer.has_clients()).then_some(source);
        let signals = ending::signals()?;
        let mut target = plan.make(cache)?;
        if self.keep_partial {
            target.keep();
        }
        let daemon = Daemon::new();
        let started = self.start(&daemon, address, granularity, &target);
        let (offered, events, job) = started.inspect_err(|_| {
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

    fn start(
        &self,
        daemon: &Arc<Daemon>,
        address: Option<Address>,
        granularity: Option<u32>,
        target: &Target,
    ) -> Result<(Offered, Subscription, Arc<Job>)> {
        let mut offered = self.add_disks(daemon, address)?;
        let events = daemon.subscribe();
        let job = daemon.start_mirror(&self.spec(granularity, target)?)?;
        offered.take_orders(daemon)?;
        self.announce(&offered);
        Ok((offered, events, job))
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

    fn look_at_source(&self) -> Result<Image> {
        let (access, locking) = match self.offer.has_clients() {
            true => (Access::ReadWrite, Locking::Auto),
            false => (Access::ReadOnly, Locking::Still),
        };
        let cache = self.how.host_cache();
        let image =
            image::open_as(&self.source, &OpenOptions { access, cache, locking, ..OpenOptions::default() })?;
        // A copy of an image is a copy in any format; only clients would misread it.
        if self.offer.has_clients() {
            block_on(self.how.check_format(&image)).context("cannot start the I/O engine")??;
        }
        Ok(image)
    }

    fn add_disks(&self, daemon: &Arc<Daemon>, address: Option<Address>) -> Result<Offered> {
        let live = self.offer.has_clients();
        let source = self.how.apply(NodeSpec::file(NODE, &self.source));
        daemon.add_node(&NodeSpec { read_only: !live, ..source })?;
        daemon.add_node(&self.how.apply(NodeSpec::file(TARGET_NODE, &self.target)))?;
        self.offer.open(daemon, address, true)
    }

    fn spec(&self, granularity: Option<u32>, target: &Target) -> Result<MirrorSpec> {
        Ok(MirrorSpec {
            sync: match self.sync {
                Sync::Full => SyncMode::Full,
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
