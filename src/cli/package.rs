//! `sd-server package`: packages a model for SageMaker, as `model.tar.gz` or as a directory for an
//! uncompressed S3 prefix. Contains only the files that the server reads, without symlinks, and is
//! reproducible byte for byte.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use flate2::write::DeflateEncoder;
use flate2::{Compression, Crc};
use indicatif::ProgressBar;
use rayon::prelude::*;
use sd_models::Source;

use crate::source::{self, ModelConfig, ModelLocation};

/// Configuration of `package`.
#[derive(Debug, clap::Args)]
pub(crate) struct Package {
    /// Output path. Default: model.tar.gz, or model for a directory
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Layout: a tarball works everywhere; a directory starts faster, but not for batch transform,
    /// serverless and multi-model endpoints
    #[arg(long, default_value = "tarball")]
    layout: Layout,
    /// Upload the result with the aws command: s3://bucket/model.tar.gz, or s3://bucket/prefix/
    #[arg(long, value_parser = s3_url)]
    upload: Option<String>,
}

fn s3_url(text: &str) -> Result<String, &'static str> {
    text.starts_with("s3://").then(|| text.to_owned()).ok_or("must start with s3://")
}

/// The layouts of a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Layout {
    /// One model.tar.gz, supported by all endpoints and transform jobs.
    Tarball,
    /// Uncompressed files: nothing to unpack when an endpoint starts.
    Directory,
}

impl Package {
    /// Checks the output path against the layout.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Some(output) = &self.output else { return Ok(()) };
        let name = output.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let tarball = name.ends_with(".tar.gz") || name.ends_with(".tgz");
        match self.layout {
            Layout::Tarball if !tarball => {
                Err(format!("--output {} must end in .tar.gz or .tgz", output.display()))
            }
            Layout::Directory if tarball => Err(format!(
                "--output {} is the name of a tarball; with --layout directory name a directory",
                output.display()
            )),
            _ => Ok(()),
        }
    }

    /// Creates the package and returns its path.
    pub(crate) fn run(self, model: ModelConfig) -> Result<PathBuf> {
        let parts = model.parts();
        let is_built_in = matches!(model.location, ModelLocation::Demo | ModelLocation::DemoLcm);
        ensure!(
            !is_built_in,
            "the built-in model needs no package: the binary has all its files, its ControlNet too"
        );
        let Source::Directory(root) = source::locate(model)?.source else {
            bail!("only a model in Diffusers format can be packaged");
        };
        let files = source::files_to_fetch(&listing(&root)?, parts)
            .with_context(|| format!("cannot package {}", root.display()))?;
        let bar = bar(&root, &files)?;
        let (write, default): (fn(&_, &_, &_, &_) -> _, _) = match self.layout {
            Layout::Tarball => (tarball, "model.tar.gz"),
            Layout::Directory => (directory, "model"),
        };
        let output = self.output.unwrap_or_else(|| default.into());
        write(&root, &files, &output, &bar)
            .with_context(|| format!("cannot write {}", output.display()))?;
        bar.finish_and_clear();
        if let Some(url) = self.upload {
            upload(&output, self.layout, &url)?;
        }
        Ok(output)
    }
}

/// The files of a model directory, two levels deep as in Diffusers format, sorted.
fn listing(root: &Path) -> Result<Vec<String>> {
    let (mut files, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        let cannot_read = || format!("cannot read {}", folder.display());
        for entry in folder.read_dir().with_context(cannot_read)? {
            let path = entry.with_context(cannot_read)?.path();
            // Metadata of the link's target: the hub's cache consists of links.
            let found = fs::metadata(&path).with_context(cannot_read)?;
            if found.is_file() {
                files.extend(path.strip_prefix(root)?.to_str().map(String::from));
            } else if found.is_dir() && folder == root {
                folders.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn bar(root: &Path, files: &[String]) -> Result<ProgressBar> {
    let mut length = 0;
    for file in files {
        let path = root.join(file);
        let metadata = fs::metadata(&path);
        length += metadata.with_context(|| format!("cannot read {}", path.display()))?.len();
    }
    Ok(source::byte_bar(length))
}

/// Writes to a temporary file next to the target and renames it, so the target is never incomplete.
fn tarball(root: &Path, files: &[String], target: &Path, bar: &ProgressBar) -> Result<()> {
    let part = part(target);
    let archive = || -> Result<()> {
        let gzip = Gzip::new(BufWriter::new(File::create(&part)?))?;
        let mut tar = tar::Builder::new(gzip);
        for name in files {
            bar.set_message(name.clone());
            let file = File::open(root.join(name))?;
            // Independent of this machine: no owner, no time, readable by all.
            let mut header = tar::Header::new_gnu();
            header.set_size(file.metadata()?.len());
            header.set_mode(0o644);
            header.set_mtime(0);
            tar.append_data(&mut header, name, bar.wrap_read(file))?;
        }
        Ok(tar.into_inner()?.finish()?)
    };
    let made = archive().and_then(|()| Ok(fs::rename(&part, target)?));
    if made.is_err() {
        // The disk may be full: an incomplete file must not remain.
        let _ = fs::remove_file(&part);
    }
    made
}

/// Writes to a temporary directory and renames it, as for a tarball; inside the target if that
/// exists, since it may be another file system.
fn directory(root: &Path, files: &[String], target: &Path, bar: &ProgressBar) -> Result<()> {
    let there = target.is_dir();
    let part = if there { target.join(PART) } else { part(target) };
    let others = |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.path() != part);
    ensure!(!there || !target.read_dir()?.any(others), "the directory is not empty");
    let made = copied(root, files, &part, bar).and_then(|()| {
        if !there {
            return Ok(fs::rename(&part, target)?);
        }
        for entry in part.read_dir()? {
            let entry = entry?;
            fs::rename(entry.path(), target.join(entry.file_name()))?;
        }
        Ok(fs::remove_dir(&part)?)
    });
    if made.is_err() {
        let _ = fs::remove_dir_all(&part);
    }
    made
}

fn copied(root: &Path, files: &[String], target: &Path, bar: &ProgressBar) -> Result<()> {
    // Remains of a killed run.
    if target.exists() {
        fs::remove_dir_all(target)?;
    }
    for name in files {
        bar.set_message(name.clone());
        let path = target.join(name);
        fs::create_dir_all(path.parent().unwrap_or(target))?;
        let mut from = bar.wrap_read(File::open(root.join(name))?);
        io::copy(&mut from, &mut File::create(path)?)?;
    }
    Ok(())
}

/// Suffix of incomplete files.
const PART: &str = ".part";

fn part(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(PART);
    target.with_file_name(name)
}

/// Uploads with the `aws` command: it resumes parts, supports all credentials, and deployment needs
/// it anyway. Amazon's crates would be most of this binary.
fn upload(path: &Path, layout: Layout, url: &str) -> Result<()> {
    let mut aws = Command::new("aws");
    aws.args(["s3", "cp", "--only-show-errors"]);
    if layout == Layout::Directory {
        aws.arg("--recursive");
    }
    let status = aws.arg(path).arg(url).status().context(
        "cannot run the aws command, which uploads; it is installed with `pip install awscli`",
    )?;
    ensure!(status.success(), "`aws s3 cp` to {url} failed, {status}");
    Ok(())
}

/// Size of the blocks that are compressed in parallel, in bytes.
const BLOCK: usize = 1 << 20;
/// Number of blocks that are compressed at once.
const TOGETHER: usize = 32;

/// gzip (RFC 1952) with one member, whose blocks are compressed in parallel. They have a fixed
/// size, so the output is the same on every machine. Weights hardly compress: more than the fastest
/// level costs time and saves nothing.
struct Gzip<W> {
    out: W,
    pending: Vec<u8>,
    crc: Crc,
}

impl<W: Write> Gzip<W> {
    fn new(mut out: W) -> io::Result<Self> {
        // Header: deflate, no name, no time, fastest level, unknown system.
        out.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255])?;
        Ok(Self { out, pending: Vec::with_capacity(TOGETHER * BLOCK), crc: Crc::new() })
    }

    fn compress(&mut self) -> io::Result<()> {
        let blocks: Vec<_> = self.pending.par_chunks(BLOCK).map(deflate).collect();
        self.pending.clear();
        for block in blocks {
            let (bytes, crc) = block?;
            self.out.write_all(&bytes)?;
            self.crc.combine(&crc);
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.compress()?;
        // The empty last block.
        let mut out = DeflateEncoder::new(self.out, Compression::fast()).finish()?;
        out.write_all(&self.crc.sum().to_le_bytes())?;
        out.write_all(&self.crc.amount().to_le_bytes())?;
        out.flush()
    }
}

impl<W: Write> Write for Gzip<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = TOGETHER * BLOCK - self.pending.len();
        let taken = bytes.len().min(room);
        self.pending.extend_from_slice(&bytes[..taken]);
        if taken == room {
            self.compress()?;
        }
        Ok(taken)
    }

    /// Only whole blocks are compressed before the end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Compresses a block to byte-aligned deflate data, and computes its checksum.
fn deflate(block: &[u8]) -> io::Result<(Vec<u8>, Crc)> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(block)?;
    // A sync flush, which ends at a byte.
    encoder.flush()?;
    let mut crc = Crc::new();
    crc.update(block);
    Ok((std::mem::take(encoder.get_mut()), crc))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn blocks_make_one_gzip_member() {
        let mut noise = 1_u32;
        let mut byte = |k: usize| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if k.is_multiple_of(3) { 7 } else { (noise >> 24) as u8 }
        };
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, TOGETHER * BLOCK + 12_345] {
            let data: Vec<u8> = (0..length).map(&mut byte).collect();
            let mut packed = Vec::new();
            let mut gzip = Gzip::new(&mut packed).expect("memory");
            // Writes of any size give the same output.
            for piece in data.chunks(700_001) {
                gzip.write_all(piece).expect("memory");
            }
            gzip.finish().expect("memory");
            let mut unpacked = Vec::new();
            let mut reader = flate2::read::GzDecoder::new(&packed[..]);
            reader.read_to_end(&mut unpacked).expect("gzip");
            assert!(unpacked == data, "{length}");
            let mut again = Vec::new();
            let mut gzip = Gzip::new(&mut again).expect("memory");
            gzip.write_all(&data).expect("memory");
            gzip.finish().expect("memory");
            assert!(packed == again, "{length}");
        }
    }
}
