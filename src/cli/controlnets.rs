//! The ControlNets of `generate`: the k-th value of each option is the k-th net's, and nets without
//! one have the default.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::args::GenerateArgs;
use super::environment::{read_file, usage};

/// The ControlNets of a command line.
pub(super) struct Nets {
    /// Those that are files or directories.
    pub(super) files: Vec<PathBuf>,
    /// The fields of the request, without the pictures.
    pub(super) fields: Vec<Value>,
    /// The files of the pictures.
    pub(super) pictures: Vec<Vec<u8>>,
}

impl GenerateArgs {
    /// Its ControlNets.
    pub(super) fn nets(&self) -> Result<Nets, clap::Error> {
        let count = self.controlnet.len();
        if self.control_image.len() != count {
            let pictures = self.control_image.len();
            return Err(usage(format!(
                "--control-image: each --controlnet needs one, there are {count} nets and \
                 {pictures} pictures"
            )));
        }
        for (option, values) in [
            ("--control-scale", self.control_scale.len()),
            ("--control-start", self.control_start.len()),
            ("--control-end", self.control_end.len()),
            ("--control-preprocessor", self.control_preprocessor.len()),
        ] {
            if values > count {
                return Err(usage(format!(
                    "{option}: is given {values} times, --controlnet {count} times; each value is of one net"
                )));
            }
        }
        let mut files: Vec<PathBuf> = Vec::new();
        let mut fields = Vec::new();
        for (k, typed) in self.controlnet.iter().enumerate() {
            let (file, name) = net(typed, self.model.controlnets_dir.is_some())?;
            // A file is selected by its name, which must be unique.
            let other = |known: &&PathBuf| {
                file.as_ref().is_some_and(|f| f != *known && name_of(known) == Some(name.clone()))
            };
            if let Some(other) = files.iter().find(other) {
                let other = other.display();
                return Err(usage(format!("--controlnet: {other} is also named {name}")));
            }
            files.extend(file);
            fields.push(json!({
                "model": name,
                // In place of the picture, which is added later.
                "image": "",
                "scale": self.control_scale.get(k),
                "start": self.control_start.get(k),
                "end": self.control_end.get(k),
                "preprocessor": self.control_preprocessor.get(k),
                "guess_mode": self.guess_mode > 0,
            }));
        }
        let pictures = self.control_image.iter().map(|file| read_file(file));
        Ok(Nets { files, fields, pictures: pictures.collect::<Result<_, _>>()? })
    }
}

/// The file or directory that was typed, and the name of the net.
fn net(typed: &Path, has_directory: bool) -> Result<(Option<PathBuf>, String), clap::Error> {
    if typed.is_file() || typed.join("config.json").is_file() {
        // That of the current directory is in its full path.
        let path = match typed.file_name() {
            Some(_) => typed.to_owned(),
            None => typed.canonicalize().unwrap_or_else(|_| typed.to_owned()),
        };
        if let Some(name) = name_of(&path) {
            return Ok((Some(path), name));
        }
    }
    let name = typed.to_string_lossy();
    if has_directory && !typed.exists() && !name.contains('/') {
        return Ok((None, name.into_owned()));
    }
    let or_name = if has_directory { " nor a name in --controlnets-dir" } else { "" };
    Err(usage(format!(
        "--controlnet {name}: neither a file, nor a directory with config.json{or_name}"
    )))
}

/// As requests name it: the file's stem, or the directory's whole name.
fn name_of(path: &Path) -> Option<String> {
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    Some(name?.to_str()?.to_owned())
}
