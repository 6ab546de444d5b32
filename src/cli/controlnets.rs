//! The ControlNets and IP-Adapters of `generate`: the k-th value of each option is the k-th net's, and
//! nets without one have the default.

use std::path::{Path, PathBuf};

use sd_models::Source;
use serde_json::{Value, json};

use super::args::GenerateArgs;
use super::environment::{read_file, usage};

/// The ControlNets or the IP-Adapters of a command line.
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
        let options = [
            ("--control-scale", self.control_scale.len()),
            ("--control-start", self.control_start.len()),
            ("--control-end", self.control_end.len()),
            ("--control-preprocessor", self.control_preprocessor.len()),
        ];
        let pictures = ("--control-image", self.control_image.len());
        check_counts(("--controlnet", self.controlnet.len(), "nets"), pictures, &options)?;
        let built_in = match self.model.model.as_deref() {
            Some("demo" | "demo-lcm") => Source::Demo.controlnets(),
            _ => &[],
        };
        let mut files: Vec<PathBuf> = Vec::new();
        let mut fields = Vec::new();
        for (k, typed) in self.controlnet.iter().enumerate() {
            let (file, name) = net(typed, self.model.controlnets_dir.is_some(), built_in)?;
            check_unique("--controlnet", &files, file.as_deref(), &name)?;
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

    /// Its IP-Adapters.
    pub(super) fn adapters(&self) -> Result<Nets, clap::Error> {
        let options = [
            ("--ip-scale", self.ip_scale.len()),
            ("--ip-start", self.ip_start.len()),
            ("--ip-end", self.ip_end.len()),
        ];
        let pictures = ("--ip-image", self.ip_image.len());
        check_counts(("--ip-adapter", self.ip_adapter.len(), "adapters"), pictures, &options)?;
        let mut files: Vec<PathBuf> = Vec::new();
        let mut fields = Vec::new();
        for (k, typed) in self.ip_adapter.iter().enumerate() {
            let (file, name) = adapter(typed, self.model.ip_adapters_dir.is_some())?;
            check_unique("--ip-adapter", &files, file.as_deref(), &name)?;
            files.extend(file);
            fields.push(json!({
                "model": name,
                // In place of the picture, which is added later.
                "image": "",
                "scale": self.ip_scale.get(k),
                "start": self.ip_start.get(k),
                "end": self.ip_end.get(k),
            }));
        }
        let pictures = self.ip_image.iter().map(|file| read_file(file));
        Ok(Nets { files, fields, pictures: pictures.collect::<Result<_, _>>()? })
    }
}

/// Checks that there is a picture for each net, and no option more often than nets.
fn check_counts(
    (option, count, what): (&str, usize, &str),
    (image, pictures): (&str, usize),
    others: &[(&str, usize)],
) -> Result<(), clap::Error> {
    if pictures != count {
        return Err(usage(format!(
            "{image}: each {option} needs one, there are {count} {what} and {pictures} pictures"
        )));
    }
    match others.iter().find(|(_, values)| *values > count) {
        None => Ok(()),
        Some((other, values)) => Err(usage(format!(
            "{other}: is given {values} times, {option} {count} times; each value is of one of them"
        ))),
    }
}

/// Checks that a file, which is selected by its name, has it alone.
fn check_unique(
    option: &str,
    files: &[PathBuf],
    file: Option<&Path>,
    name: &str,
) -> Result<(), clap::Error> {
    let is_other = |known: &&PathBuf| {
        file.is_some_and(|file| file != *known && name_of(known).as_deref() == Some(name))
    };
    match files.iter().find(is_other) {
        None => Ok(()),
        Some(other) => Err(usage(format!("{option}: {} is also named {name}", other.display()))),
    }
}

/// The file that was typed, and the name of the adapter.
fn adapter(typed: &Path, has_directory: bool) -> Result<(Option<PathBuf>, String), clap::Error> {
    if let Some(name) = name_of(typed).filter(|_| typed.is_file()) {
        return Ok((Some(typed.to_owned()), name));
    }
    let name = typed.to_string_lossy();
    if has_directory && !typed.exists() && !name.contains('/') {
        return Ok((None, name.into_owned()));
    }
    let or_name = if has_directory { " nor a name in --ip-adapters-dir" } else { "" };
    Err(usage(format!("--ip-adapter {name}: not a file{or_name}")))
}

/// The file or directory that was typed, and the name of the net. `built_in` are those of the model.
fn net(
    typed: &Path,
    has_directory: bool,
    built_in: &[&str],
) -> Result<(Option<PathBuf>, String), clap::Error> {
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
    let is_built_in = built_in.iter().any(|known| known.eq_ignore_ascii_case(&name));
    if is_built_in || has_directory && !typed.exists() && !name.contains('/') {
        return Ok((None, name.into_owned()));
    }
    let or_name = if has_directory { ", nor a name in --controlnets-dir" } else { "" };
    let or_own = match built_in {
        [] => String::new(),
        names => format!(", nor one of the model's own ({})", names.join(", ")),
    };
    Err(usage(format!(
        "--controlnet {name}: neither a file, nor a directory with config.json{or_name}{or_own}"
    )))
}

/// As requests name it: the file's stem, or the directory's whole name.
fn name_of(path: &Path) -> Option<String> {
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    Some(name?.to_str()?.to_owned())
}
