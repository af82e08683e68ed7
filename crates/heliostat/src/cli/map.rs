//! `heliostat map IMAGE`: where the bytes of a disk are: in which layer, and where in its file.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use heliostat_block::driver::qcow2::header::Header;
use heliostat_block::map::{Content, Mapping};
use heliostat_block::range::ByteRange;
use heliostat_host::runtime::block_on;
use serde_json::{Value, json};

use super::disk::{Disk, FormatName, Look, Trust};
use super::output::{self, Form, Outcome};
use super::remote::Certificates;
use crate::daemon::{NodeEntry, Sharing, resolved};

/// Shows where the bytes of a disk are: in which image of its chain, and where in that file
///
/// The list has what `qemu-img map` has; --json gives all of it, without only what holds data.
#[derive(Args, Debug)]
pub struct Map {
    /// The image: a file, a block device, or the address of an NBD export
    image: PathBuf,
    /// What the image is. Needed only for one that looks like another format, or names other files and is not called .qcow2
    #[arg(long, value_enum)]
    format: Option<FormatName>,
    /// Look even while another program writes to it; the answer may then mean nothing
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    trust: Trust,
    #[command(flatten)]
    certificates: Certificates,
}

impl Map {
    /// Looks, and shows.
    ///
    /// # Errors
    /// When the image cannot be opened or read.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let sharing = if self.force_share { Sharing::Anything } else { Sharing::Still };
        let look = Look { format: self.format, trust: &self.trust, direct: false, sharing };
        let disk = Disk::open(self.certificates.at(&self.image), &look)?;
        let mappings = block_on(all_of(&disk)).context("cannot start the I/O engine")??;
        match form {
            Form::Json => output::json(&mappings.iter().map(to_json).collect())?,
            Form::Text => output::result(&table(&mappings, &files(&disk)))?,
        }
        Ok(Outcome::Done)
    }
}

async fn all_of(disk: &Disk) -> Result<Vec<Mapping>> {
    let size = disk.node.size();
    let mut all: Vec<Mapping> = Vec::new();
    let mut from = 0;
    while from < size {
        let some = disk.node.map(ByteRange::from_bounds(from, size)).await?;
        from = some.last().map_or(size, |last| last.range.end());
        for mapping in some {
            mapping.append_to(&mut all);
        }
    }
    Ok(all)
}

fn to_json(mapping: &Mapping) -> Value {
    let is_data = matches!(mapping.content, Content::Data | Content::Hollow | Content::Compressed);
    let mut value = json!({
        "start": mapping.range.offset(),
        "length": mapping.range.len(),
        "depth": mapping.depth,
        "present": mapping.content != Content::Hole,
        "zero": matches!(mapping.content, Content::Hollow | Content::Zero | Content::Hole),
        "data": is_data,
        "compressed": mapping.content == Content::Compressed,
    });
    if let Some(offset) = mapping.offset {
        value["offset"] = json!(offset);
    }
    value
}

/// The files that hold the data of each layer, the top first.
fn files(disk: &Disk) -> Vec<String> {
    let nodes = disk.daemon.nodes();
    let find = |name: &str| nodes.iter().find(|entry| entry.node.name().as_str() == name);
    let top = find(disk.node.name().as_str());
    let below = |entry: &&NodeEntry| entry.backing.as_ref().and_then(|name| find(name.as_str()));
    std::iter::successors(top, below).map(|entry| file_of(entry, &entry.path)).collect()
}

fn file_of(entry: &NodeEntry, path: &Path) -> String {
    let header = entry.node.image().map(|image| image.header());
    let data = header.filter(Header::has_external_data).and_then(|header| header.data_file);
    match data {
        Some(name) => resolved(&name, path),
        None => path.to_string_lossy().into_owned(),
    }
}

fn table(mappings: &[Mapping], files: &[String]) -> String {
    let mut lines = vec![format!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")];
    for mapping in mappings {
        let place = match (mapping.content, mapping.offset) {
            (Content::Data, Some(offset)) => hex(offset),
            (Content::Data | Content::Compressed, _) => "compressed".to_owned(),
            (Content::Hollow | Content::Zero | Content::Hole | Content::Absent, _) => continue,
        };
        let file = files.get(mapping.depth).map_or("", String::as_str);
        let (start, len) = (hex(mapping.range.offset()), hex(mapping.range.len()));
        lines.push(format!("{start:<16}{len:<16}{place:<16}{file}"));
    }
    lines.join("\n")
}

/// As C prints it, which `qemu-img` does.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
