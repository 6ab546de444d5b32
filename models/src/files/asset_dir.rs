//! Small files that requests name (LoRAs, textual inversion embeddings): which there are, and an
//! LRU cache of their contents.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::error::{Error, Result};

/// The files of a directory and single files, by name. The name is the file's stem, so that no name
/// leads out of the directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AssetDir {
    /// Its files with one of the extensions, without those of subdirectories.
    pub directory: Option<PathBuf>,
    /// Further files, which take precedence over those of the directory.
    pub files: Vec<PathBuf>,
    /// The extensions, without their dot.
    pub endings: &'static [&'static str],
}

impl AssetDir {
    /// Names and paths, sorted by name. The directory is read at each call, since files may be
    /// added and removed.
    pub fn list(&self) -> Vec<(String, PathBuf)> {
        let entries =
            self.directory.iter().filter_map(|directory| directory.read_dir().ok()).flatten();
        let entries = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let known = |path: &PathBuf| {
            let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            self.endings.iter().any(|known| known.eq_ignore_ascii_case(ending)) && path.is_file()
        };
        let named = |path: PathBuf| Some((path.file_stem()?.to_str()?.to_owned(), path));
        let mut entries: Vec<_> = entries.filter(known).collect();
        entries.sort();
        let files = self.files.iter().cloned().chain(entries);
        let mut files: Vec<_> = files.filter_map(named).collect();
        files.sort_by(|(a, _), (b, _)| a.cmp(b));
        files.dedup_by(|later, first| later.0 == first.0);
        files
    }

    /// The file of a name. The error reads on from the field's name.
    pub fn find(&self, name: &str) -> std::result::Result<PathBuf, String> {
        let mut files = self.list();
        match files.iter().position(|(known, _)| known == name) {
            Some(place) => Ok(files.swap_remove(place).1),
            None if files.is_empty() => Err(format!("{name:?} is unknown; there are none")),
            None => {
                let names: Vec<_> = files.into_iter().map(|(name, _)| name).collect();
                Err(format!("{name:?} is unknown; there are {}", names.join(", ")))
            }
        }
    }
}

/// An LRU cache of the contents of such files, bounded by their bytes.
pub(crate) struct AssetCache<T> {
    assets: AssetDir,
    /// Bytes of all contents; a single content that is larger is kept alone.
    max_bytes: u64,
    /// Bytes and content by name.
    contents: Mutex<LruCache<String, (u64, Arc<T>)>>,
    /// Held while a file is read, so that each is read once; lookups of others do not wait.
    reading: Mutex<()>,
}

impl<T> AssetCache<T> {
    pub(crate) fn new(assets: AssetDir, max_bytes: u64) -> Self {
        let contents = Mutex::new(LruCache::unbounded());
        Self { assets, max_bytes, contents, reading: Mutex::default() }
    }

    /// The content of a file, read if it is not cached; `read` returns its bytes with it. The least
    /// recently used contents are evicted, and freed when no trajectory uses them any more.
    pub(crate) fn get(
        &self,
        field: &'static str,
        name: &str,
        read: impl FnOnce(&Path) -> Result<(T, u64)>,
    ) -> Result<Arc<T>> {
        if let Some(content) = self.cached(name) {
            return Ok(content);
        }
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = self.cached(name) {
            return Ok(content);
        }
        let path = self.assets.find(name).map_err(|reason| Error::Spec { field, reason })?;
        // A file that cannot be used is an error of the request that names it.
        let (content, bytes) = read(&path).map_err(|error| match error {
            Error::File { .. } | Error::Config { .. } | Error::Tensor { .. } => {
                Error::Spec { field, reason: error.to_string() }
            }
            other => other,
        })?;
        let content = Arc::new(content);
        let mut contents = self.lock();
        contents.put(name.to_owned(), (bytes, Arc::clone(&content)));
        let total = |contents: &LruCache<_, (u64, _)>| contents.iter().map(|(_, (n, _))| n).sum();
        while contents.len() > 1 && self.max_bytes < total(&contents) {
            contents.pop_lru();
        }
        Ok(content)
    }

    /// Whether a file is cached. Never waits for one that is being read.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.lock().contains(name)
    }

    fn cached(&self, name: &str) -> Option<Arc<T>> {
        self.lock().get(name).map(|(_, content)| Arc::clone(content))
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<String, (u64, Arc<T>)>> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_directory_and_no_others() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = vec![root.join("files/asset_dir.rs"), root.join("files/json.rs")];
        let assets = AssetDir { directory: Some(root.clone()), files, endings: &["rs"] };
        let names: Vec<_> = assets.list().into_iter().map(|(name, _)| name).collect();
        assert!(names.is_sorted() && names.contains(&"error".to_owned()));
        assert!(names.contains(&"json".to_owned()) && !names.contains(&"pickle".to_owned()));
        assert_eq!(assets.find("error"), Ok(root.join("error.rs")));
        let own = AssetDir { files: vec![root.join("ops/error.rs")], ..assets.clone() };
        assert_eq!(own.find("error"), Ok(root.join("ops/error.rs")), "files come first");
        for name in ["../Cargo", "files/ldm", "ldm", "error.rs", "", "/etc/passwd"] {
            assert!(assets.find(name).is_err_and(|reason| reason.contains("error")), "{name}");
        }
    }

    #[test]
    fn the_least_recently_used_content_is_evicted() {
        let files = ["a.x", "b.x", "c.x", "d.x"].map(PathBuf::from).to_vec();
        let cache = AssetCache::new(AssetDir { directory: None, files, endings: &[] }, 10);
        let reads = Mutex::new(String::new());
        let get = |name: &str, bytes| {
            let read = |_: &Path| {
                // A lookup meanwhile does not wait.
                assert!(!cache.has(name));
                reads.lock().expect("unpoisoned").push_str(name);
                Ok((name.to_owned(), bytes))
            };
            cache.get("loras", name, read).expect("a file")
        };
        for (name, bytes) in [("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)] {
            assert_eq!(*get(name, bytes), name);
        }
        assert_eq!(*reads.lock().expect("unpoisoned"), "abcb");
        get("d", 11);
        assert_eq!(
            cache.contents.lock().expect("unpoisoned").len(),
            1,
            "one that is too large stays"
        );
    }
}
