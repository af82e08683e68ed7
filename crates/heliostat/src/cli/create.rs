//! `heliostat create IMAGE SIZE`: an empty image.
//!
//! Names and meanings of options are those of `qemu-img create`. What is there already stays, unless `--force`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use heliostat_block::driver::qcow2::create::{CreateOptions, Preallocation, create};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::header::{Compression, Header};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Storage, ZeroSpace};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, Existing, Locking, OpenOptions};
use heliostat_host::runtime::block_on;
use serde_json::json;

use super::output::{self, Form, Outcome};
use super::units;

/// Makes an empty image
#[derive(Args, Debug)]
pub struct Create {
    /// Where to make it
    image: PathBuf,
    /// Its virtual size, as in 64M or 1.5G; with a backing file, that file's size unless said otherwise
    #[arg(value_parser = units::parse_size)]
    size: Option<u64>,
    /// How it keeps its bytes
    #[arg(short, long, value_enum, default_value = "qcow2")]
    format: Format,
    /// The image below: what is not written here is read from there; relative to the new image's directory
    #[arg(short, long, value_name = "FILE")]
    backing: Option<PathBuf>,
    /// The backing file's format
    #[arg(short = 'F', long, value_name = "FORMAT", value_enum, requires = "backing")]
    backing_format: Option<Format>,
    /// Bytes in a cluster, a power of two from 512 to 2M
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    cluster_size: Option<u64>,
    /// Further options, as qemu-img has them: cluster_size, compat, compression_type, data_file, data_file_raw,
    /// extended_l2, lazy_refcounts, preallocation, refcount_bits
    #[arg(short, value_name = "KEY=VALUE,...", value_delimiter = ',')]
    options: Vec<String>,
    /// Replace what is there
    #[arg(long)]
    force: bool,
}

/// How an image keeps its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Grows as it is written
    Qcow2,
    /// One to one
    Raw,
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl Create {
    /// Makes it, and says what was made.
    ///
    /// # Errors
    /// When such an image cannot be had, something is there, or the host refuses. Nothing is left behind then that
    /// was not there before.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let options = self.plan().with_context(|| format!("cannot create {}", self.image.display()))?;
        options.check().with_context(|| format!("cannot create {}", self.image.display()))?;
        let mut made = Made::default();
        made.make(self, &options)?;
        made.keep();
        let size = options.size.next_multiple_of(if self.format == Format::Raw { 1 } else { 512 });
        match form {
            Form::Json => output::json(&json!({
                "filename": self.image.to_string_lossy(),
                "format": self.format.name(),
                "virtual-size": size,
            }))?,
            Form::Text => output::result(&format!(
                "{}: {}, {} ({} bytes)",
                self.image.display(),
                self.format.name(),
                units::size(size),
                units::count(size)
            ))?,
        }
        Ok(Outcome::Done)
    }

    fn plan(&self) -> Result<CreateOptions> {
        let mut options = CreateOptions::default();
        if let Some(size) = self.cluster_size {
            options.cluster_bits = bits(size, "Cluster size must be a power of two between 512 and 2048k")?;
        }
        for option in &self.options {
            let Some((key, value)) = option.split_once('=') else {
                bail!("option {option} has no value; write it as key=value");
            };
            set(&mut options, key, value)?;
            if self.format == Format::Raw && key != "preallocation" {
                bail!("a raw image has no option {key}");
            }
        }
        if self.format == Format::Raw {
            if self.backing.is_some() || self.cluster_size.is_some() {
                bail!("a raw image has neither a backing file nor clusters; --format qcow2 has both");
            }
            if options.preallocation == Preallocation::Metadata {
                bail!("Parameter 'preallocation' does not accept value 'metadata'");
            }
        }
        self.plan_backing(&mut options)?;
        if let Some(size) = self.size {
            options.size = size;
        } else if self.backing.is_none() {
            bail!("its size is missing; only with --backing it is known");
        }
        Ok(options)
    }

    /// Looks at the backing file: a name that leads nowhere is found now, not when the image is needed.
    fn plan_backing(&self, options: &mut CreateOptions) -> Result<()> {
        let Some(backing) = &self.backing else { return Ok(()) };
        let Some(format) = self.backing_format else {
            bail!("Backing file specified without backing format; add --backing-format raw or qcow2");
        };
        options.backing_file = Some(backing.as_os_str().as_bytes().to_vec());
        options.backing_format = Some(format.name().as_bytes().to_vec());
        if backing.as_os_str().is_empty() {
            return Ok(());
        }
        let path = beside(&self.image, backing);
        let access =
            OpenOptions { access: Access::ReadOnly, locking: Locking::Auto, ..OpenOptions::default() };
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, &access)?);
        options.size = match format {
            Format::Raw => storage.size(),
            Format::Qcow2 => {
                block_on(Header::read(&ImageFile::new(storage)))
                    .context("cannot start the I/O engine")?
                    .with_context(|| format!("cannot use {} as a backing file", path.display()))?
                    .size
            }
        };
        Ok(())
    }
}

/// A backing file's name is meant from the image's directory.
fn beside(image: &Path, name: &Path) -> PathBuf {
    image.parent().map_or_else(|| name.to_owned(), |folder| folder.join(name))
}

/// The files that have been made, removed unless all went well.
#[derive(Default)]
struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    fn keep(&mut self) {
        self.paths.clear();
    }

    fn make(&mut self, create: &Create, options: &CreateOptions) -> Result<()> {
        let image = &create.image;
        let file = self.open(image, create.force)?;
        let data_file = match &options.data_file {
            // As QEMU does: unlike that of a backing file, this name is meant from the current directory.
            Some(name) => Some(self.open(Path::new(OsStr::from_bytes(name)), create.force)?),
            None => None,
        };
        let made = async {
            match create.format {
                Format::Qcow2 => create_qcow2(&file, data_file.as_ref(), options).await,
                Format::Raw => create_raw(&file, options).await,
            }
        };
        block_on(made)
            .context("cannot start the I/O engine")?
            .with_context(|| format!("cannot create {}", image.display()))
    }

    fn open(&mut self, path: &Path, force: bool) -> Result<ImageFile> {
        let options = OpenOptions { access: Access::ReadWrite, ..OpenOptions::default() };
        let there = std::fs::symlink_metadata(path);
        let is_device = std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device());
        let storage = if is_device {
            if !force {
                bail!(
                    "{} is a block device, whose contents would be lost; add --force if that is what you want",
                    path.display()
                );
            }
            FileStorage::open(path, &options)?
        } else {
            if there.is_ok() && !force {
                bail!("{} exists; add --force to replace it", path.display());
            }
            let existing = if force { Existing::Replace } else { Existing::Refuse };
            let storage = FileStorage::create(path, 0, existing, &options)?;
            if there.is_err() {
                self.paths.push(path.to_owned());
            }
            storage
        };
        Ok(ImageFile::new(Arc::new(storage)))
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            // Nothing more can be done about it; what is left is no image.
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn create_qcow2(
    file: &ImageFile,
    data_file: Option<&ImageFile>,
    options: &CreateOptions,
) -> Result<()> {
    Ok(create(file, data_file, options).await?)
}

async fn create_raw(file: &ImageFile, options: &CreateOptions) -> Result<()> {
    if let Err(error) = file.set_size(options.size).await
        && file.size() < options.size
    {
        return Err(error.into());
    }
    let all = ByteRange::from_bounds(0, options.size);
    let space =
        if options.preallocation == Preallocation::Off { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
    file.write_zeroes(all, space).await?;
    Ok(file.flush().await?)
}

fn bits(size: u64, refusal: &str) -> Result<u32> {
    if !size.is_power_of_two() {
        bail!("{refusal}");
    }
    Ok(size.ilog2())
}

fn switch(key: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => bail!("Parameter '{key}' expects 'on' or 'off'"),
    }
}

/// Sets one option by the name that `qemu-img` has for it.
fn set(options: &mut CreateOptions, key: &str, value: &str) -> Result<()> {
    let refused = |key: &str| anyhow::anyhow!("Parameter '{key}' does not accept value '{value}'");
    match key {
        "cluster_size" => {
            let size = units::parse_size(value).map_err(anyhow::Error::msg)?;
            options.cluster_bits = bits(size, "Cluster size must be a power of two between 512 and 2048k")?;
        }
        "compat" => {
            options.version = match value {
                "0.10" | "v2" => 2,
                "1.1" | "v3" => 3,
                _ => return Err(refused("version")),
            };
        }
        "compression_type" => {
            options.compression = match value {
                "zlib" => Compression::Deflate,
                "zstd" => Compression::Zstd,
                _ => return Err(refused("compression-type")),
            };
        }
        "preallocation" => {
            options.preallocation = match value {
                "off" => Preallocation::Off,
                "metadata" => Preallocation::Metadata,
                "falloc" => Preallocation::Falloc,
                "full" => Preallocation::Full,
                _ => return Err(refused("preallocation")),
            };
        }
        "refcount_bits" => {
            const REFUSAL: &str = "Refcount width must be a power of two and may not exceed 64 bits";
            options.refcount_order = bits(value.parse().ok().context(REFUSAL)?, REFUSAL)?;
        }
        "data_file" => options.data_file = Some(value.as_bytes().to_vec()),
        "data_file_raw" => options.data_file_raw = switch(key, value)?,
        "extended_l2" => options.extended_l2 = switch(key, value)?,
        "lazy_refcounts" => options.lazy_refcounts = switch(key, value)?,
        _ => bail!("Invalid parameter '{key}'"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_have_the_names_that_qemu_img_has() {
        let mut options = CreateOptions::default();
        for option in ["cluster_size=2M", "compat=1.1", "compression_type=zstd", "preallocation=falloc"] {
            let (key, value) = option.split_once('=').unwrap();
            set(&mut options, key, value).unwrap();
        }
        set(&mut options, "refcount_bits", "64").unwrap();
        set(&mut options, "extended_l2", "on").unwrap();
        assert_eq!((options.cluster_bits, options.refcount_order, options.version), (21, 6, 3));
        assert_eq!((options.compression, options.extended_l2), (Compression::Zstd, true));
        assert_eq!(options.preallocation, Preallocation::Falloc);
        for (key, value) in
            [("cluster_size", "1000"), ("refcount_bits", "3"), ("compat", "2"), ("colour", "red")]
        {
            assert!(set(&mut options, key, value).is_err(), "{key}={value}");
        }
    }

    #[test]
    fn a_backing_file_is_meant_from_the_images_directory() {
        assert_eq!(beside(Path::new("a/b.qcow2"), Path::new("c")), Path::new("a/c"));
        assert_eq!(beside(Path::new("b.qcow2"), Path::new("c")), Path::new("c"));
        assert_eq!(beside(Path::new("a/b.qcow2"), Path::new("/c")), Path::new("/c"));
    }
}
