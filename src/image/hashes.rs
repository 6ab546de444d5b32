//! Short hashes of LoRA files, as used by model sites and written by AUTOMATIC1111 into the
//! generation parameters.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use ring::digest::{Context, SHA256};
use sd_models::{AssetDir, Spec};
use serde::Deserialize;

/// Maximum length of the header of a safetensors file, as in the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Number of hexadecimal digits.
const SHORT: usize = 12;

/// Cache of the hashes, each computed once per file version.
#[derive(Debug, Clone, Default)]
pub struct Hashes {
    known: Arc<Mutex<HashMap<PathBuf, (Version, String)>>>,
}

/// Modification time and length of a file.
type Version = (Option<SystemTime>, u64);

impl Hashes {
    /// The LoRAs of an image as in AUTOMATIC1111, `name: hash, name: hash`; missing files are
    /// omitted. Blocks: reads whole files, once.
    pub fn of(&self, spec: &Spec, folder: &AssetDir) -> String {
        let named = spec.text().map(|(_, named)| named).unwrap_or_default();
        let mut names: Vec<_> = spec.loras.iter().chain(&named).map(|(name, _)| name).collect();
        names.sort();
        names.dedup();
        if names.is_empty() {
            return String::new();
        }
        let files = folder.list();
        let hashes = names.into_iter().filter_map(|name| {
            let (_, path) = files.iter().find(|(known, _)| known == name)?;
            let name = name.replace([':', ',', '"', '\n'], "");
            Some(format!("{name}: {}", self.get(path, &files)?))
        });
        hashes.collect::<Vec<_>>().join(", ")
    }

    /// The hash of one of these files; entries of other files are removed.
    fn get(&self, path: &Path, files: &[(String, PathBuf)]) -> Option<String> {
        let version = |data: Metadata| (data.modified().ok(), data.len());
        let version = version(path.metadata().ok()?);
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, hash)) = known().get(path)
            && *of == version
        {
            return Some(hash.clone());
        }
        // Without the lock: a large file on a slow disk takes long.
        let hash = short(path).ok()?;
        let mut known = known();
        known.retain(|known, _| files.iter().any(|(_, path)| path == known));
        known.insert(path.to_owned(), (version, hash.clone()));
        Some(hash)
    }
}

/// Reference: AUTOMATIC1111's `NetworkOnDisk`: the hash written by kohya's trainer, else SHA-256 of
/// the tensors, without the header, which tools change.
fn short(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("safetensors")) {
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        let mut header = Vec::new();
        file.by_ref().take(length.min(MAX_HEADER_BYTES)).read_to_end(&mut header)?;
        if let Some(hash) = written(&header) {
            return Ok(hash);
        }
        file.seek(SeekFrom::Start(length.saturating_add(8)))?;
    }
    let (mut sum, mut part) = (Context::new(&SHA256), vec![0; 1 << 20]);
    loop {
        match file.read(&mut part)? {
            0 => break,
            length => sum.update(&part[..length]),
        }
    }
    let sum = sum.finish();
    Ok(sum.as_ref()[..SHORT / 2].iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The hash in a safetensors header.
fn written(header: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__")]
        metadata: HashMap<String, String>,
    }
    let Header { mut metadata } = serde_json::from_slice(header).ok()?;
    let hash = metadata.remove("sshs_model_hash")?;
    let hex = hash.len() >= SHORT && hash.bytes().all(|digit| digit.is_ascii_hexdigit());
    hex.then(|| hash[..SHORT].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_the_trainer_is_used_first() {
        let header = |hash: &str| format!(r#"{{"__metadata__":{{"sshs_model_hash":"{hash}"}}}}"#);
        assert_eq!(written(header("0123456789abcdef").as_bytes()), Some("0123456789ab".into()));
        for other in ["0123", "no hash at all", "0123456789é"] {
            assert_eq!(written(header(other).as_bytes()), None, "{other}");
        }
        assert_eq!(written(b"{}"), None);
    }

    #[test]
    fn a_file_that_has_changed_has_another_hash() {
        let folder = tempfile::tempdir().expect("a directory");
        let (path, hashes) = (folder.path().join("a.pt"), Hashes::default());
        std::fs::write(&path, "abc").expect("a file");
        let files = [("a".to_owned(), path.clone())];
        // The first of NIST's examples.
        assert_eq!(hashes.get(&path, &files).as_deref(), Some("ba7816bf8f01"));
        std::fs::write(&path, "").expect("a file");
        assert_eq!(hashes.get(&path, &files).as_deref(), Some("e3b0c44298fc"));
        std::fs::remove_file(&path).expect("it is there");
        assert_eq!(hashes.get(&path, &files), None);
    }
}
