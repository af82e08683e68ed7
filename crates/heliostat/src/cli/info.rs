//! `heliostat info IMAGE`: what an image is, and what it takes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::ExtentStatus;
use heliostat_host::open::{Cache, Locking};
use heliostat_host::runtime::block_on;
use serde_json::{Value, json};

use super::image::{self, Format, Image};
use super::output::{self, Form, Outcome};
use super::units;

/// Looking for holes stops after this: an image with millions of them is no reason to wait.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// Shows what an image is: size, what it takes of its host, how much of it is data, who uses it
#[derive(Args, Debug)]
pub struct Inspect {
    /// The image: a file or a block device
    image: PathBuf,
}

/// What there is to say of an image.
struct Facts {
    image: Image,
    format: Format,
    in_use_by: Option<String>,
    layout: Layout,
}

/// How an image is laid out.
#[derive(Default)]
struct Layout {
    data: u64,
    data_extents: u64,
    /// Whether all of it was looked at.
    complete: bool,
}

impl Inspect {
    /// Looks, and shows.
    ///
    /// # Errors
    /// When the image cannot be opened or read.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        // Who writes it does not keep us from looking, and we keep nobody from writing it: no lock is taken, not
        // even for a moment, as somebody may be starting to use it in that moment.
        let image = image::open(&self.image, Cache::Page, Locking::Off)?;
        let in_use_by = image.writer()?.map(|user| user.to_string());
        let facts = block_on(async {
            let format = image.format().await?;
            let layout = look(&image).await?;
            Ok::<_, anyhow::Error>(Facts { image, format, in_use_by, layout })
        })
        .context("cannot start the I/O engine")??;
        match form {
            Form::Json => output::json(&facts.to_json())?,
            Form::Text => output::result(&facts.to_text())?,
        }
        Ok(Outcome::Done)
    }
}

async fn look(image: &Image) -> Result<Layout> {
    let started = Instant::now();
    let mut layout = Layout::default();
    let mut from = 0;
    let size = image.node.size();
    while from < size && started.elapsed() < LOOK_MAX {
        let rest = ByteRange::from_bounds(from, size);
        let extents = image.node.enter().await.extents(rest).await;
        let extents = extents.with_context(|| format!("cannot look at {}", image.path.display()))?;
        for extent in extents.iter().filter(|extent| extent.status == ExtentStatus::Data) {
            layout.data += extent.range.len();
            layout.data_extents += 1;
        }
        from = extents.last().map_or(size, |last| last.range.end());
    }
    layout.complete = from >= size;
    Ok(layout)
}

impl Facts {
    fn kind(&self) -> &'static str {
        if self.image.is_device { "block device" } else { "file" }
    }

    fn to_json(&self) -> Value {
        let traits = self.image.node.traits();
        json!({
            "filename": self.image.path.to_string_lossy(),
            "kind": self.kind(),
            "format": self.format.name(),
            "virtual-size": self.image.node.size(),
            "actual-size": self.image.node.allocated_size(),
            "data-bytes": self.layout.data,
            "data-extents": self.layout.data_extents,
            "layout-complete": self.layout.complete,
            "block-size": traits.block_size,
            "can-discard": traits.can_discard,
            "can-zero-fast": traits.can_zero_fast,
            "in-use-by": self.in_use_by,
        })
    }

    fn to_text(&self) -> String {
        let exact = |bytes: u64| format!("{} ({} bytes)", units::size(bytes), units::count(bytes));
        let so_far = if self.layout.complete { "" } else { ", counted so far" };
        let mut lines = vec![
            ("image", self.image.path.display().to_string()),
            ("kind", format!("{}, {}", self.format.name(), self.kind())),
            ("virtual size", exact(self.image.node.size())),
            ("on the host", self.image.node.allocated_size().map_or_else(|| "unknown".to_owned(), exact)),
            (
                "data",
                format!(
                    "{} in {} {}{so_far}; the rest is holes",
                    units::size(self.layout.data),
                    units::count(self.layout.data_extents),
                    if self.layout.data_extents == 1 { "place" } else { "places" }
                ),
            ),
        ];
        if let Some(holder) = &self.in_use_by {
            lines.push(("in use by", holder.clone()));
        }
        if self.format == Format::Qcow2 {
            lines.push(("note", "sizes are those of the qcow2 file, not of the disk inside".to_owned()));
        }
        lines.iter().map(|(name, value)| format!("{name:<14}{value}\n")).collect()
    }
}
