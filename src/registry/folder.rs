//! The models of a directory. It may be on a slow file system: everything here blocks.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use sd_models::FileVersion;

use crate::source::is_checkpoint;

/// The models of a directory by name: its directories, and its single files without extension. If
/// two have one name, the directory is used, else the last file in alphabetical order: .safetensors
/// rather than .ckpt.
pub(super) fn models(folder: &Path) -> BTreeMap<String, PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let (mut models, mut files) = (Vec::new(), Vec::new());
    for path in entries.map(|entry| entry.path()) {
        if path.join("model_index.json").is_file() {
            models.push((path.file_name().map(OsStr::to_owned), path));
        } else if is_checkpoint(&path) {
            files.push((path.file_stem().map(OsStr::to_owned), path));
        }
    }
    files.sort();
    let named = |(name, path): (Option<OsString>, PathBuf)| Some((name?.into_string().ok()?, path));
    files.into_iter().chain(models).filter_map(named).collect()
}

/// The version of each file of a model; `None` of one that is gone.
pub(super) type Version = Vec<(PathBuf, Option<FileVersion>)>;

/// The version of a model's files: of the file, or of the directory and those in it.
pub(super) fn version(model: &Path) -> Version {
    let children = |path: &Path| path.read_dir().into_iter().flatten().flatten();
    let mut paths = vec![model.to_owned()];
    for child in children(model).map(|entry| entry.path()) {
        paths.extend(children(&child).map(|entry| entry.path()));
        paths.push(child);
    }
    paths.sort();
    let versions = paths.into_iter().map(|path| {
        let version = path.metadata().ok().map(|data| FileVersion::of(&data));
        (path, version)
    });
    versions.collect()
}
