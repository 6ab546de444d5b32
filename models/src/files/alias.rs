//! The name that a LoRA's trainer gave it, `ss_output_name` in the header of its file, by which
//! prompts may name it after the file has been renamed.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use serde::Deserialize;

use super::bytes::open;
use super::version::FileVersion;

/// Maximum length of the header of a safetensors file, as in the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Number of files whose names are kept.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not zero");

type Known = LruCache<(std::path::PathBuf, FileVersion), Option<String>>;

/// The names in the headers of files, each read once per version of a file.
#[derive(Clone)]
pub struct Aliases(Arc<Mutex<Known>>);

impl Default for Aliases {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(LruCache::new(MAX_KNOWN))))
    }
}

impl std::fmt::Debug for Aliases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Aliases")
    }
}

/// A cache makes no difference.
impl PartialEq for Aliases {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Aliases {}

impl Aliases {
    /// The name in a file's header, if there is one that can be read. Blocks.
    pub(super) fn of(&self, path: &Path) -> Option<String> {
        let key = (path.to_owned(), FileVersion::of(&path.metadata().ok()?));
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(alias) = known().get(&key) {
            return alias.clone();
        }
        // Without the lock: a slow disk takes long.
        let alias = read(path).ok().flatten();
        known().put(key, alias.clone());
        alias
    }
}

fn read(path: &Path) -> io::Result<Option<String>> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__")]
        metadata: Option<HashMap<String, String>>,
    }
    if path.extension().is_none_or(|ending| !ending.eq_ignore_ascii_case("safetensors")) {
        return Ok(None);
    }
    let (mut file, mut length) = (open(path)?, [0; 8]);
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    let length = u64::from_le_bytes(length).min(MAX_HEADER_BYTES);
    file.take(length).read_to_end(&mut header)?;
    let Header { metadata } = serde_json::from_slice(&header)?;
    let name = metadata.and_then(|mut metadata| metadata.remove("ss_output_name"));
    Ok(name.filter(|name| !name.is_empty()))
}
