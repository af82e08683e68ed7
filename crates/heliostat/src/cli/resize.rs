//! `heliostat resize IMAGE SIZE`: makes a disk longer or shorter.
//!
//! Meanings are those of `qemu-img resize`. What is lost by shrinking is lost only if that was said; a disk of which
//! nobody has said that it is raw is left alone.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use heliostat_block::driver::Preallocation;
use serde_json::json;

use super::disk::{self, FormatName, Kind, Trust};
use super::image::Format;
use super::output::{self, Form, Outcome};
use super::remote::{At, Certificates, is_export};
use super::units;
use crate::daemon::{NodeSpec, Sharing};

/// The name of the node that is resized.
const NODE: &str = "image";

/// Makes a disk longer or shorter, while nobody else uses it
#[derive(Args, Debug)]
pub struct Resize {
    /// The image
    image: PathBuf,
    /// Its new virtual size, as in 64M; with + or - before it: so much more or less
    #[arg(value_parser = parse_size, allow_hyphen_values = true)]
    size: Size,
    /// Allow it to become shorter: what lies beyond the new end is lost
    #[arg(long)]
    shrink: bool,
    /// What is done about the space that it gains
    #[arg(long, value_name = "HOW", value_enum, default_value = "off")]
    preallocation: Ahead,
    /// What the image is. Needed for a raw disk, and for an image that names other files and is not called .qcow2
    #[arg(long, value_enum)]
    format: Option<FormatName>,
    #[command(flatten)]
    trust: Trust,
}

/// A size as an operator says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    Of(u64),
    More(u64),
    Less(u64),
}

/// What is done about space ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ahead {
    /// Nothing
    Off,
    /// Clusters are taken; not for raw disks
    Metadata,
    /// The host sets the space aside, too
    Falloc,
    /// It is filled with zeroes
    Full,
}

fn parse_size(text: &str) -> Result<Size, String> {
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => units::parse_size(more).map(Size::More),
        (_, Some(less)) => units::parse_size(less).map(Size::Less),
        _ => units::parse_size(text).map(Size::Of),
    }
}

impl Size {
    /// The new size of a disk that has `old` bytes.
    fn of(self, old: u64) -> Result<u64> {
        let size = match self {
            Self::Of(size) => Some(size),
            Self::More(more) => old.checked_add(more),
            Self::Less(less) => old.checked_sub(less),
        };
        size.with_context(|| {
            format!("it has {} bytes, and no disk can have so few or so many", units::count(old))
        })
    }
}

impl Resize {
    /// Resizes it, and says how long it is now.
    ///
    /// # Errors
    /// When it is in use, would become shorter without `--shrink`, or cannot have that size.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        if is_export(&self.image) {
            bail!(
                "{} is an export, whose length is its server's; resize it where its file is",
                self.image.display()
            );
        }
        let certificates = Certificates::default();
        let at = certificates.at(&self.image);
        let found = disk::look_at(at)?;
        let kind = Kind::of(&self.image, self.format, found);
        if kind == Kind::LooksRaw {
            bail!("{} looks like a raw disk; if it is one, add --format raw", self.image.display());
        }
        let (old, size) =
            self.resize(at, kind).with_context(|| format!("cannot resize {}", self.image.display()))?;
        match form {
            Form::Json => output::json(&json!({
                "filename": self.image.to_string_lossy(),
                "format": if kind.format() == Format::Raw { "raw" } else { "qcow2" },
                "old-virtual-size": old,
                "virtual-size": size,
            }))?,
            Form::Text => output::result(&format!(
                "{}: {} ({} bytes), was {}",
                self.image.display(),
                units::size(size),
                units::count(size),
                units::size(old)
            ))?,
        }
        Ok(Outcome::Done)
    }

    /// Says how long it was, and is.
    fn resize(&self, at: At<'_>, kind: Kind) -> Result<(u64, u64)> {
        if kind.format() == Format::Raw && self.preallocation == Ahead::Metadata {
            bail!("a raw disk has no metadata to preallocate; falloc and full are for raw disks, too");
        }
        let like = NodeSpec::file(NODE, &self.image);
        let daemon = self.trust.daemon()?;
        let node = daemon
            .add_node(&kind.node(NODE, at, Sharing::Locked, &like))
            .map_err(|error| disk::explain(&self.image, kind, error))?;
        let old = node.size();
        let size = self.size.of(old)?;
        if size < old && !self.shrink {
            bail!(
                "{} bytes are fewer than the {} that it has; what lies beyond would be lost; add --shrink if that is \
                 what you want",
                units::count(size),
                units::count(old)
            );
        }
        if size < old && self.preallocation != Ahead::Off {
            bail!("space can be preallocated only where a disk grows");
        }
        let ahead = match self.preallocation {
            Ahead::Off => Preallocation::Off,
            Ahead::Metadata => Preallocation::Metadata,
            Ahead::Falloc => Preallocation::Falloc,
            Ahead::Full => Preallocation::Full,
        };
        daemon.resize_node(NODE, i64::try_from(size).unwrap_or(i64::MAX), ahead)?;
        drop(node);
        daemon.shutdown().context("resized, but")?;
        Ok((old, size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_or_relative() {
        let table = [("1M", 10, 1 << 20), ("+1K", 10, 1034), ("-10", 10, 0), ("0", 10, 0)];
        for (text, old, new) in table {
            assert_eq!(parse_size(text).unwrap().of(old).unwrap(), new, "{text}");
        }
        assert!(parse_size("-11").unwrap().of(10).is_err());
        assert!(parse_size("+1").unwrap().of(u64::MAX).is_err());
        for text in ["+-1", "++1", "-", "x"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
