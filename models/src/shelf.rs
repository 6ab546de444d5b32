//! Small files that requests name (LoRAs, learned words): which there are, and those used last in
//! memory.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Where files with names are: the files of a directory and single ones. A file's name is its own
/// without the ending, so that no name leads out of the directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folder {
    /// All files in it that end in one of the endings, not those in directories below it.
    pub directory: Option<PathBuf>,
    /// Further files, which come before those of the directory.
    pub files: Vec<PathBuf>,
    /// The endings, without their dot.
    pub endings: &'static [&'static str],
}

impl Folder {
    /// Names and paths, sorted; read anew at each call, since files may come and go.
    pub fn list(&self) -> Vec<(String, PathBuf)> {
        let entries = self.directory.iter().filter_map(|folder| folder.read_dir().ok()).flatten();
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

    /// The file of a name. The error is what comes after the field's name.
    pub fn find(&self, name: &str) -> std::result::Result<PathBuf, String> {
        let mut files = self.list();
        match files.iter().position(|(known, _)| known == name) {
            Some(place) => Ok(files.swap_remove(place).1),
            None if files.is_empty() => Err(format!("{name:?}: this server has none")),
            None => {
                let names: Vec<_> = files.into_iter().map(|(name, _)| name).collect();
                Err(format!("{name:?} is unknown; there are {}", names.join(", ")))
            }
        }
    }
}

/// Files in memory, the one used last at the end.
pub(crate) struct Shelf<T> {
    folder: Folder,
    /// What they may take in all; the one that is needed now is there even if it takes more.
    max_bytes: u64,
    read: Mutex<Vec<Read<T>>>,
    /// Held while a file is read, so that each is read once; who asks for another waits for neither.
    reading: Mutex<()>,
}

struct Read<T> {
    name: String,
    bytes: u64,
    content: Arc<T>,
}

impl<T> Shelf<T> {
    pub(crate) fn new(folder: Folder, max_bytes: u64) -> Self {
        Self { folder, max_bytes, read: Mutex::default(), reading: Mutex::default() }
    }

    /// The content of a file, read if need be; `read` says how many bytes it takes. What was not
    /// used for longest makes room, and is gone when no picture needs it any more.
    pub(crate) fn get(
        &self,
        field: &'static str,
        name: &str,
        read: impl FnOnce(&Path) -> Result<(T, u64)>,
    ) -> Result<Arc<T>> {
        if let Some(content) = self.kept(name) {
            return Ok(content);
        }
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = self.kept(name) {
            return Ok(content);
        }
        let path = self.folder.find(name).map_err(|reason| Error::Spec { field, reason })?;
        // A file that is of no use is the request's error, not the server's.
        let (content, bytes) = read(&path).map_err(|error| match error {
            Error::File { .. } | Error::Config { .. } | Error::Tensor { .. } => {
                Error::Spec { field, reason: error.to_string() }
            }
            other => other,
        })?;
        let content = Arc::new(content);
        let mut kept = self.lock();
        kept.push(Read { name: name.to_owned(), bytes, content: Arc::clone(&content) });
        while kept.len() > 1 && kept.iter().map(|read| read.bytes).sum::<u64>() > self.max_bytes {
            kept.remove(0);
        }
        Ok(content)
    }

    /// Whether a file is in memory. Never waits for one that is being read.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.lock().iter().any(|read| read.name == name)
    }

    /// The content of a file in memory, which is now the one used last.
    fn kept(&self, name: &str) -> Option<Arc<T>> {
        let mut kept = self.lock();
        let place = kept.iter().position(|read| read.name == name)?;
        let entry = kept.remove(place);
        let content = Arc::clone(&entry.content);
        kept.push(entry);
        Some(content)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Read<T>>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_folder_and_no_others() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = vec![root.join("ops/mod.rs"), root.join("ops/simd.rs")];
        let folder = Folder { directory: Some(root.clone()), files, endings: &["rs"] };
        let names: Vec<_> = folder.list().into_iter().map(|(name, _)| name).collect();
        assert!(names.is_sorted() && names.contains(&"shelf".to_owned()));
        assert!(names.contains(&"simd".to_owned()) && !names.contains(&"gemm".to_owned()));
        assert_eq!(folder.find("shelf"), Ok(root.join("shelf.rs")));
        let own = Folder { files: vec![root.join("ops/shelf.rs")], ..folder.clone() };
        assert_eq!(own.find("shelf"), Ok(root.join("ops/shelf.rs")), "files come first");
        for name in ["../Cargo", "ops/conv", "conv", "shelf.rs", "", "/etc/passwd"] {
            assert!(folder.find(name).is_err_and(|reason| reason.contains("shelf")), "{name}");
        }
    }

    #[test]
    fn what_was_not_used_for_longest_makes_room() {
        let files = ["a.x", "b.x", "c.x", "d.x"].map(PathBuf::from).to_vec();
        let shelf = Shelf::new(Folder { directory: None, files, endings: &[] }, 10);
        let reads = Mutex::new(String::new());
        let get = |name: &str, bytes| {
            let read = |_: &Path| {
                // Whoever looks meanwhile does not wait.
                assert!(!shelf.has(name));
                reads.lock().expect("unpoisoned").push_str(name);
                Ok((name.to_owned(), bytes))
            };
            shelf.get("loras", name, read).expect("a file")
        };
        for (name, bytes) in [("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)] {
            assert_eq!(*get(name, bytes), name);
        }
        assert_eq!(*reads.lock().expect("unpoisoned"), "abcb");
        get("d", 11);
        assert_eq!(shelf.read.lock().expect("unpoisoned").len(), 1, "one that is too large stays");
    }
}
