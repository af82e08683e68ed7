//! `heliostat info IMAGE`: what an image is, and what it takes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use heliostat_block::error::BlockError;
use heliostat_block::map::{Content, Mapping};
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_host::open::{Access, Cache, Locking, OpenOptions};
use heliostat_host::runtime::block_on;
use serde_json::{Value, json};

use super::disk::{Disk, Kind, Trust, look_at};
use super::image::{self, Format};
use super::output::{self, Form, Outcome};
use super::remote::{Certificates, is_export};
use super::units;
use crate::control::{Depth, image_info};
use crate::daemon::{BackingSpec, DriverSpec, NodeEntry, NodeSpec, Sharing};

/// The name of the one node that is named.
const NODE: &str = "image";

/// Looking for holes stops after this: an image with millions of them is no reason to wait.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// Shows what an image is: size, what it takes of its host, how much of it is data, who uses it
#[derive(Args, Debug)]
pub struct Inspect {
    /// The image: a file, a block device, or the address of an NBD export
    image: PathBuf,
    /// Show what it stands on, too, down to the lowest image
    #[arg(long)]
    backing_chain: bool,
    #[command(flatten)]
    trust: Trust,
    #[command(flatten)]
    certificates: Certificates,
}

/// What there is to say of an image.
struct Facts {
    path: PathBuf,
    is_device: bool,
    in_use_by: Option<String>,
    node: Arc<Node>,
    /// What QEMU says of it.
    info: Value,
    layout: Layout,
}

/// How an image is laid out.
#[derive(Default)]
struct Layout {
    data: u64,
    data_extents: u64,
    data_end: Option<u64>,
    /// Whether all of it was looked at.
    complete: bool,
}

impl Inspect {
    /// Looks, and shows.
    ///
    /// # Errors
    /// When the image cannot be opened or read.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let disk = self.open()?;
        let nodes = disk.daemon.nodes();
        let find = |name: &str| nodes.iter().find(|entry| entry.node.name().as_str() == name);
        let top = find(disk.node.name().as_str());
        let below = |entry: &&NodeEntry| entry.backing.as_ref().and_then(|name| find(name.as_str()));
        let chain = std::iter::successors(top, below);
        let facts = chain.map(|entry| Facts::of(&nodes, entry)).collect::<Result<Vec<_>>>();
        let mut facts = facts?;
        // Of what it stands on the name was the image's choice: that is not opened again to ask who uses it.
        if let Some(top) = facts.first_mut() {
            let options = OpenOptions {
                access: Access::ReadOnly,
                cache: Cache::Page,
                locking: Locking::Off,
                ..OpenOptions::default()
            };
            // Who else uses an export is its server's to know.
            let file =
                (!is_export(&self.image)).then(|| image::open_as(&self.image, &options)).transpose()?;
            let writer = file.map(|file| file.writer()).transpose()?.flatten();
            top.in_use_by = writer.map(|user| user.to_string());
        }
        match (form, &facts[..]) {
            (Form::Json, [only]) if !self.backing_chain => output::json(&only.to_json())?,
            (Form::Json, all) => output::json(&all.iter().map(Facts::to_json).collect())?,
            (Form::Text, all) => {
                output::result(&all.iter().map(Facts::to_text).collect::<Vec<_>>().join("\n"))?;
            }
        }
        Ok(Outcome::Done)
    }

    /// Opens it, and nothing that it stands on unless that is wanted. Who writes it does not keep us from looking,
    /// and we keep nobody from writing it: no lock is taken, not even for a moment, as somebody may be starting to use
    /// it in that moment.
    fn open(&self) -> Result<Disk> {
        let path = &self.image;
        let at = self.certificates.at(path);
        // What is shown of other files is what their headers say: nothing that a guest could want to read.
        let kind = match look_at(at)? {
            Format::Raw => Kind::Raw,
            Format::Qcow2 => Kind::Qcow2,
        };
        let like = NodeSpec { read_only: true, ..NodeSpec::file(NODE, path) };
        let mut spec = kind.node(NODE, at, Sharing::Anything, &like);
        if let (DriverSpec::Qcow2(image), false) = (&mut spec.driver, self.backing_chain) {
            image.backing = BackingSpec::Nothing;
        }
        Disk::open_as(at, kind, &spec, &self.trust)
    }
}

impl Facts {
    fn of(nodes: &[NodeEntry], entry: &NodeEntry) -> Result<Self> {
        let mut info = image_info(nodes, entry, Depth::Flat);
        info["filename"] = json!(entry.path.to_string_lossy());
        // Of a file it is raw that it says, as QEMU's tools do.
        let is_raw = entry.node.image().is_none();
        if is_raw {
            info["format"] = json!("raw");
            info["virtual-size"] = json!(entry.node.size());
        }
        let node = Arc::clone(&entry.node);
        let layout = block_on(look(&node)).context("cannot start the I/O engine")?;
        let layout = layout.with_context(|| format!("cannot look at {}", entry.path.display()))?;
        let child =
            entry.child.as_ref().and_then(|name| nodes.iter().find(|other| other.node.name() == name));
        let is_device = child.unwrap_or(entry).driver == "host_device";
        Ok(Self { path: entry.path.clone(), is_device, in_use_by: None, node, info, layout })
    }
}

/// Looks for data in the image itself, whatever is below it.
async fn look(node: &Arc<Node>) -> Result<Layout, BlockError> {
    let started = Instant::now();
    let mut layout = Layout::default();
    let mut from = 0;
    let size = node.size();
    while from < size && started.elapsed() < LOOK_MAX {
        let mappings = node.map(ByteRange::from_bounds(from, size)).await?;
        let is_data = |mapping: &&Mapping| {
            mapping.depth == 0 && matches!(mapping.content, Content::Data | Content::Compressed)
        };
        for mapping in mappings.iter().filter(is_data) {
            let follows = layout.data_end == Some(mapping.range.offset());
            layout.data += mapping.range.len();
            layout.data_extents += u64::from(!follows);
            layout.data_end = Some(mapping.range.end());
        }
        from = mappings.last().map_or(size, |last| last.range.end());
    }
    layout.complete = from >= size;
    Ok(layout)
}

impl Facts {
    fn kind(&self) -> &'static str {
        match self.is_device {
            true => "block device",
            false if is_export(&self.path) => "export of an NBD server",
            false => "file",
        }
    }

    fn to_json(&self) -> Value {
        let traits = self.node.traits();
        let mut value = self.info.clone();
        let ours = json!({
            "kind": self.kind(),
            "data-bytes": self.layout.data,
            "data-extents": self.layout.data_extents,
            "layout-complete": self.layout.complete,
            "block-size": traits.block_size,
            "can-discard": traits.can_discard,
            "can-zero-fast": traits.can_zero_fast,
            "in-use-by": self.in_use_by,
        });
        for (key, fact) in ours.as_object().into_iter().flatten() {
            value[key] = fact.clone();
        }
        value
    }

    fn to_text(&self) -> String {
        let exact = |bytes: u64| format!("{} ({} bytes)", units::size(bytes), units::count(bytes));
        let so_far = if self.layout.complete { "" } else { ", counted so far" };
        let mut lines = vec![
            ("image", self.path.display().to_string()),
            ("kind", format!("{}, {}", self.info["format"].as_str().unwrap_or_default(), self.kind())),
            ("virtual size", exact(self.node.size())),
            ("on the host", self.node.allocated_size().map_or_else(|| "unknown".to_owned(), exact)),
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
        lines.extend(self.of_the_image());
        lines.iter().map(|(name, value)| format!("{name:<14}{value}\n")).collect()
    }

    /// What an image says of itself.
    fn of_the_image(&self) -> Vec<(&'static str, String)> {
        let mut lines = Vec::new();
        let text = |key: &str| self.info[key].as_str();
        if let Some(size) = self.info["cluster-size"].as_u64() {
            lines.push(("clusters", units::size(size)));
        }
        if let Some(backing) = text("backing-filename") {
            let full = text("full-backing-filename").filter(|full| *full != backing);
            let place = full.map_or_else(String::new, |full| format!(", which is {full}"));
            let format = text("backing-filename-format").unwrap_or("of no said format");
            lines.push(("stands on", format!("{backing} ({format}){place}")));
        }
        let data = &self.info["format-specific"]["data"];
        let words: Vec<_> = data
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(_, value)| !value.is_array())
            .map(|(key, value)| match value {
                Value::String(text) => format!("{key} {text}"),
                other => format!("{key} {other}"),
            })
            .collect();
        if !words.is_empty() {
            lines.push(("qcow2", words.join(", ")));
        }
        for snapshot in self.info["snapshots"].as_array().into_iter().flatten() {
            let [id, name] = ["id", "name"].map(|key| snapshot[key].as_str().unwrap_or_default());
            lines.push(("snapshot", format!("{id} {name}")));
        }
        for bitmap in data["bitmaps"].as_array().into_iter().flatten() {
            let flags: Vec<_> =
                bitmap["flags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let granularity = bitmap["granularity"].as_u64().map_or_else(String::new, units::size);
            let name = bitmap["name"].as_str().unwrap_or_default();
            lines.push(("bitmap", format!("{name}, {granularity} a bit [{}]", flags.join(", "))));
        }
        lines
    }
}
