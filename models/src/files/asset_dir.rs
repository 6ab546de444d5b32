//! Small files that requests name (LoRAs, textual inversion embeddings): which there are, and an
//! LRU cache of their contents.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lru::LruCache;

use super::alias::Aliases;
use super::version::FileVersion;
use crate::error::{Error, Result};

/// The files of a directory and single files, by name. The name is the file's stem or its folder, so
/// that no name leads out of the directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AssetDir {
    /// Its files with one of the extensions, and those of the folders below it.
    pub directory: Option<PathBuf>,
    /// Further files, which take precedence over those of the directory.
    pub files: Vec<PathBuf>,
    /// The extensions, without their dot: of several files of one name, that of the first counts.
    pub endings: &'static [&'static str],
    /// Whether its subdirectories in the Diffusers format are files, too, by the directory's name.
    pub folders: bool,
    /// What the names of subdirectories begin with that hold none of its files, in small letters.
    pub skipped: &'static [&'static str],
    /// The names in the headers of the files.
    pub aliases: Aliases,
    /// Names that AUTOMATIC1111 gives to files of known names: its own, and the file's.
    pub titles: &'static [(&'static str, &'static str)],
    /// Names of those in the binary, which stand behind files of the same name.
    pub built_in: &'static [&'static str],
}

/// What a directory of one network in the Diffusers format has.
const CONFIG: &str = "config.json";

impl AssetDir {
    /// Names and paths, sorted by name. The directory is read at each call, since files may be
    /// added and removed. Of several files of one name the one that is less deep counts.
    pub fn list(&self) -> Vec<(String, PathBuf)> {
        let rank = |path: &PathBuf| {
            if path.is_dir() {
                return Some(self.endings.len());
            }
            let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            self.endings.iter().position(|known| known.eq_ignore_ascii_case(ending))
        };
        let found = self.directory.iter().flat_map(|root| assets_below(root, self));
        let mut found: Vec<_> =
            found.filter_map(|(depth, path)| Some((depth, rank(&path)?, path))).collect();
        found.sort();
        let own = self.files.iter().map(|path| (0, path.clone()));
        let found = found.into_iter().map(|(depth, _, path)| (depth, path));
        let mut files: Vec<_> = own
            .chain(found)
            .filter_map(|(depth, path)| Some((name(&path, depth)?, path)))
            .collect();
        files.sort_by(|(a, _), (b, _)| a.cmp(b));
        files.dedup_by(|later, first| later.0 == first.0);
        files
    }

    /// All names, sorted, with the files of those that are not in the binary.
    pub fn names(&self) -> Vec<(String, Option<PathBuf>)> {
        let files = self.list();
        let is_new = |name: &&&str| files.iter().all(|(known, _)| known != **name);
        let built_in = self.built_in.iter().filter(is_new).map(|name| ((*name).to_owned(), None));
        let mut names: Vec<_> = built_in.collect();
        names.extend(files.into_iter().map(|(name, path)| (name, Some(path))));
        names.sort();
        names
    }

    /// The one in the binary that a name is of, in any letters, where no file has the name. Blocks:
    /// reads the directory.
    pub(crate) fn built_in(&self, name: &str) -> Option<&'static str> {
        let found = self.built_in.iter().find(|known| known.eq_ignore_ascii_case(name))?;
        self.entry(name).is_err().then_some(*found)
    }

    /// The name that AUTOMATIC1111's extension for ControlNets takes for another: the same without
    /// a hash in brackets, in other letters, or the shortest that has it as a part; and whether it is
    /// the same. Blocks: reads the directory.
    pub fn closest(&self, name: &str) -> Option<(String, bool)> {
        let bare = name.rsplit_once(" [").filter(|(_, hash)| hash.ends_with(']'));
        let bare = bare.map_or(name, |(bare, _)| bare).trim().to_lowercase();
        let known = || self.names().into_iter().map(|(known, _)| known);
        let same = known().find(|known| known.to_lowercase() == bare);
        let parts = || known().filter(|known| known.to_lowercase().contains(&bare));
        let shortest = || parts().min_by_key(String::len).filter(|_| !bare.is_empty());
        same.map(|same| (same, true)).or_else(|| Some((shortest()?, false)))
    }

    /// The name that a file's header gives it, if it does. Blocks: reads the header, once.
    pub fn alias(&self, path: &Path) -> Option<String> {
        self.aliases.of(path)
    }

    /// Whether there is one of a name. The error reads on from the field's name. Blocks: reads the
    /// directory, and for an unknown name the headers.
    pub fn check(&self, name: &str) -> std::result::Result<(), String> {
        match self.built_in(name) {
            Some(_) => Ok(()),
            None => self.entry(name).map(drop),
        }
    }

    /// The file of a name; one in the binary has none. The error reads on from the field's name.
    /// Blocks, as [`Self::check`].
    pub fn find(&self, name: &str) -> std::result::Result<PathBuf, String> {
        Ok(self.entry(name)?.1)
    }

    /// The file of a name, or the only one that has this name in its header or this stem, or this
    /// name in other letters or with a known ending; with its name in the list.
    fn entry(&self, name: &str) -> std::result::Result<(String, PathBuf), String> {
        let mut files = self.list();
        if let Some(place) = files.iter().position(|(known, _)| known == name) {
            return Ok(files.swap_remove(place));
        }
        let is_named = |path: &Path| {
            let own = [path.file_stem(), path.file_name()];
            own.into_iter().flatten().any(|own| own == name)
                || self.alias(path).as_deref() == Some(name)
        };
        let named = files.iter().filter(|(_, path)| is_named(path));
        match named.collect::<Vec<_>>()[..] {
            [] => {}
            [file] => return Ok(file.clone()),
            [(first, _), (second, _), ..] => {
                return Err(format!("{name:?}, which {first} and {second} have in their headers"));
            }
        }
        let bare = self.without_ending(name);
        let is_exact = files.iter().filter(|(known, _)| known == bare).count() == 1;
        let is_named = |known: &str| match is_exact {
            true => known == bare,
            false => known.to_lowercase() == bare.to_lowercase(),
        };
        match files.iter().filter(|(known, _)| is_named(known)).collect::<Vec<_>>()[..] {
            [] => {}
            [file] => return Ok(file.clone()),
            [(first, _), (second, _), ..] => {
                return Err(format!("{name:?}, which {first} and {second} are in other letters"));
            }
        }
        let title = self.titles.iter().find(|(title, _)| title.eq_ignore_ascii_case(name.trim()));
        let is_titled =
            |known: &str| title.is_some_and(|(_, titled)| titled.eq_ignore_ascii_case(known));
        if let Some(file) = files.iter().find(|(known, _)| is_titled(known)) {
            return Ok(file.clone());
        }
        let why = title.map_or_else(
            || "which is unknown".to_owned(),
            |(_, titled)| format!("whose file {titled} is missing"),
        );
        let names: Vec<_> = self.names().into_iter().map(|(name, _)| name).collect();
        if names.is_empty() {
            return Err(format!("{name:?}, {why}; there are none"));
        }
        Err(format!("{name:?}, {why}; known are {}", names.join(", ")))
    }

    /// A name without one of the extensions, if it ends with one.
    fn without_ending<'a>(&self, name: &'a str) -> &'a str {
        let known = |end: &str| self.endings.iter().any(|known| known.eq_ignore_ascii_case(end));
        name.rsplit_once('.').filter(|(_, end)| known(end)).map_or(name, |(stem, _)| stem)
    }
}

/// How deep folders are searched, and how many.
const MAX_DEPTH: usize = 8;
const MAX_FOLDERS: usize = 1 << 12;

/// The files of a directory and of the folders below it, with the number of folders between, and if it
/// has `folders` those that have one network. As in AUTOMATIC1111, links are followed and what is
/// hidden is not.
fn assets_below(directory: &Path, assets: &AssetDir) -> Vec<(usize, PathBuf)> {
    let AssetDir { folders: networks, skipped, .. } = *assets;
    let mut files = Vec::new();
    let mut folders = VecDeque::from([(0, directory.to_owned())]);
    // A folder may be linked below itself.
    let mut seen = HashSet::new();
    while let Some((depth, folder)) = folders.pop_front() {
        let is_new = folder.metadata().is_ok_and(|data| seen.insert((data.dev(), data.ino())));
        if !is_new || seen.len() > MAX_FOLDERS {
            continue;
        }
        for entry in folder.read_dir().into_iter().flatten().flatten() {
            let path = entry.path();
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            let name = entry.file_name().to_string_lossy().to_lowercase();
            let is_skipped = is_hidden || skipped.iter().any(|skipped| name.starts_with(skipped));
            match path.metadata() {
                Ok(data) if data.is_file() && !is_hidden => files.push((depth, path)),
                Ok(data) if data.is_dir() && networks && path.join(CONFIG).is_file() => {
                    files.push((depth, path));
                }
                Ok(data) if data.is_dir() && !is_skipped && depth < MAX_DEPTH => {
                    folders.push_back((depth + 1, path));
                }
                _ => {}
            }
        }
    }
    files
}

/// Stems that training gives every file: in a folder of its own it goes by the folder's name.
const USUAL_STEMS: [&str; 4] = [
    "adapter_model",
    "pytorch_lora_weights",
    "diffusion_pytorch_model",
    "diffusion_pytorch_model.fp16",
];

/// The name by which requests select a file, or a directory.
fn name(path: &Path, depth: usize) -> Option<String> {
    if path.is_dir() {
        return Some(path.file_name()?.to_str()?.to_owned());
    }
    let stem = path.file_stem()?;
    let is_usual = USUAL_STEMS.iter().any(|usual| stem == *usual);
    let folder = path.parent().and_then(Path::file_name).filter(|_| is_usual && depth > 0);
    Some(folder.unwrap_or(stem).to_str()?.to_owned())
}

/// A file in one version: when it is replaced, the file of the same name is another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AssetFile {
    /// The name by which requests select it.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
    version: FileVersion,
    /// The versions of PEFT's settings beside it; of a directory those of its files.
    others: Vec<FileVersion>,
}

/// The name of PEFT's settings of the file beside it.
pub(crate) const PEFT_SETTINGS: &str = "adapter_config.json";

/// Where the settings of a file are, if it has the name that PEFT gives it.
pub(crate) fn peft_settings(path: &Path) -> Option<PathBuf> {
    path.file_stem().filter(|stem| *stem == "adapter_model")?;
    Some(path.with_file_name(PEFT_SETTINGS))
}

impl AssetFile {
    /// The present version of a file.
    pub fn new(name: &str, path: PathBuf) -> Result<Self> {
        let version = match path.metadata() {
            Ok(data) => FileVersion::of(&data),
            Err(reason) => return Err(Error::File { path, reason }),
        };
        let mut others: Vec<_> = peft_settings(&path).into_iter().collect();
        if let Ok(entries) = path.read_dir() {
            others.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
            others.sort();
        }
        let versions = others.iter().filter_map(|path| path.metadata().ok());
        let others = versions.map(|data| FileVersion::of(&data)).collect();
        Ok(Self { name: name.to_owned(), path, version, others })
    }

    /// Whether the file still is in this version.
    pub fn is_current(&self) -> bool {
        Self::new(&self.name, self.path.clone()).is_ok_and(|file| file == *self)
    }
}

/// How often a file that changes while it is read is read again.
const MAX_READS: usize = 3;

/// An LRU cache of the contents of such files by version, bounded by their bytes.
pub(crate) struct AssetCache<T> {
    assets: AssetDir,
    /// Bytes of all contents; a single content that is larger is kept alone.
    max_bytes: u64,
    contents: Mutex<Contents<T>>,
    /// Held while a file is read, so that each is read once; others do not wait.
    reading: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
}

/// Bytes and contents.
struct Contents<T> {
    kept: LruCache<AssetFile, (u64, Arc<T>)>,
    /// Those that were evicted, as long as they are in use: they take memory too.
    evicted: Vec<(AssetFile, u64, Weak<T>)>,
}

impl<T> Contents<T> {
    /// The content of a file. An evicted one that is still there is kept again.
    fn get(&mut self, file: &AssetFile) -> Option<Arc<T>> {
        if let Some((_, content)) = self.kept.get(file) {
            return Some(Arc::clone(content));
        }
        let place = self.evicted.iter().position(|(other, ..)| other == file)?;
        let (file, bytes, content) = self.evicted.swap_remove(place);
        let content = content.upgrade()?;
        self.kept.put(file, (bytes, Arc::clone(&content)));
        Some(content)
    }

    fn evict(&mut self, file: AssetFile, (bytes, content): (u64, Arc<T>)) {
        self.evicted.push((file, bytes, Arc::downgrade(&content)));
    }

    /// Evicts the least recently used content, if there is one.
    fn evict_one(&mut self) -> bool {
        let evicted = self.kept.pop_lru().map(|(file, entry)| self.evict(file, entry));
        evicted.is_some()
    }

    /// Bytes of all that is there.
    fn bytes(&mut self) -> u64 {
        self.evicted.retain(|(.., content)| content.strong_count() > 0);
        let kept = self.kept.iter().map(|(_, (bytes, _))| *bytes);
        kept.chain(self.evicted.iter().map(|(_, bytes, _)| *bytes)).fold(0, u64::saturating_add)
    }
}

impl<T> AssetCache<T> {
    pub(crate) fn new(assets: AssetDir, max_bytes: u64) -> Self {
        let contents = Contents { kept: LruCache::unbounded(), evicted: Vec::new() };
        let contents = Mutex::new(contents);
        Self { assets, max_bytes, contents, reading: Mutex::default() }
    }

    /// Maximum bytes of all contents.
    pub(crate) fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Bytes of all contents that are there.
    pub(crate) fn bytes(&self) -> u64 {
        lock(&self.contents).bytes()
    }

    /// The content of a file as it is now, read if it is not cached; `read` returns its bytes with
    /// it. The least recently used contents are evicted, and freed when no trajectory uses them any
    /// more. Blocks: reads directories and files.
    pub(crate) fn get(
        &self,
        field: &'static str,
        name: &str,
        read: impl Fn(&AssetFile) -> Result<(T, u64)>,
    ) -> Result<Arc<T>> {
        let unknown = |reason| Error::Spec { field, reason: format!("names {reason}") };
        let (listed, path) = self.assets.entry(name).map_err(unknown)?;
        self.get_at(field, (&listed, &path), read)
    }

    /// The same of a file that goes by this name.
    pub(crate) fn get_at(
        &self,
        field: &'static str,
        (listed, path): (&str, &Path),
        read: impl Fn(&AssetFile) -> Result<(T, u64)>,
    ) -> Result<Arc<T>> {
        let refuse = |reason| Error::Spec { field, reason };
        // A file that cannot be used is an error of the request that names it.
        let of_request = |error| match error {
            Error::File { .. } | Error::Config { .. } | Error::Tensor { .. } => {
                // A file of a directory does not tell which one it is of.
                let reason = error.to_string();
                let is_told = reason.contains(listed);
                refuse(if is_told { reason } else { format!("{listed}: {reason}") })
            }
            other => other,
        };
        let alone = self.reading_of(path);
        let _reading = alone.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..MAX_READS {
            let file = AssetFile::new(listed, path.to_owned()).map_err(of_request)?;
            if let Some(content) = lock(&self.contents).get(&file) {
                return Ok(content);
            }
            let content = read(&file);
            // What was read while the file changed is of neither version.
            if file.is_current() {
                let (content, bytes) = content.map_err(of_request)?;
                return Ok(self.insert(file, content, bytes));
            }
        }
        Err(refuse(format!("names {listed:?}, whose file is being replaced; try again later")))
    }

    fn insert(&self, file: AssetFile, content: T, bytes: u64) -> Arc<T> {
        let content = Arc::new(content);
        let mut contents = lock(&self.contents);
        let old = contents.kept.iter().find(|(other, _)| other.path == file.path);
        if let Some(old) = old.map(|(old, _)| old.clone())
            && let Some(entry) = contents.kept.pop(&old)
        {
            contents.evict(old, entry);
        }
        contents.kept.put(file, (bytes, Arc::clone(&content)));
        while contents.kept.len() > 1 && self.max_bytes < contents.bytes() {
            contents.evict_one();
        }
        content
    }

    /// Evicts the least recently used contents until there is room by the bytes of the rest, or none
    /// is left: before a content is read that memory has no room for beside them.
    pub(crate) fn evict_until(&self, has_room: impl Fn(u64) -> bool) {
        let mut contents = lock(&self.contents);
        while !has_room(contents.bytes()) && contents.evict_one() {}
    }

    /// The lock of the readers of a file.
    fn reading_of(&self, path: &Path) -> Arc<Mutex<()>> {
        let mut reading = lock(&self.reading);
        reading.retain(|_, alone| Arc::strong_count(alone) > 1);
        Arc::clone(reading.entry(path.to_owned()).or_default())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_directory_and_no_others() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = vec![root.join("files/asset_dir.rs"), root.join("ops/mod.rs")];
        let assets = AssetDir {
            directory: Some(root.join("sampling")),
            files,
            endings: &["rs"],
            ..AssetDir::default()
        };
        let names: Vec<_> = assets.list().into_iter().map(|(name, _)| name).collect();
        assert!(names.is_sorted() && names.contains(&"euler".to_owned()));
        assert!(names.contains(&"asset_dir".to_owned()) && !names.contains(&"json".to_owned()));
        assert_eq!(assets.find("euler"), Ok(root.join("sampling/euler.rs")));
        for name in ["euler.rs", "EULER", "Euler.RS"] {
            assert_eq!(assets.find(name), Ok(root.join("sampling/euler.rs")), "{name}");
        }
        assert_eq!(assets.find("mod"), Ok(root.join("ops/mod.rs")), "files come first");
        for name in ["../Cargo", "sampling/euler", "json", "euler.pt", "", "/etc/passwd"] {
            assert!(assets.check(name).is_err_and(|reason| reason.contains("euler")), "{name}");
        }
    }

    #[test]
    fn those_in_the_binary_stand_behind_files() {
        let folder = tempfile::tempdir().expect("a directory");
        let directory = Some(folder.path().to_owned());
        let built_in = &["canny", "lines"];
        let assets = AssetDir { directory, endings: &["x"], built_in, ..AssetDir::default() };
        let names = || assets.names().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(), ["canny", "lines"]);
        assert_eq!((assets.check("Canny"), assets.built_in("CANNY")), (Ok(()), Some("canny")));
        assert_eq!(assets.closest("lin [0123abcd]"), Some(("lines".into(), false)));
        let unknown = assets.check("depth").expect_err("none of them");
        assert!(unknown.ends_with("known are canny, lines"), "{unknown}");
        std::fs::write(folder.path().join("canny.x"), "").expect("a file");
        assert_eq!(names(), ["canny", "lines"]);
        assert_eq!((assets.check("canny"), assets.built_in("canny")), (Ok(()), None));
        assert_eq!(assets.find("canny"), Ok(folder.path().join("canny.x")));
    }

    #[test]
    fn files_in_folders_are_found_by_their_stem_or_their_folder() {
        let root = tempfile::tempdir().expect("a directory");
        let at = |name: &str| root.path().join(name);
        for (folder, file) in [
            ("", "top.x"),
            ("style/old", "deep.x"),
            ("style", "top.x"),
            ("style/cat", "adapter_model.x"),
            ("style/dog", "pytorch_lora_weights.x"),
            ("style/net", "diffusion_pytorch_model.x"),
            (".hidden", "hidden.x"),
            ("", ".top.x"),
        ] {
            std::fs::create_dir_all(at(folder)).expect("a folder");
            std::fs::write(at(folder).join(file), file).expect("a file");
        }
        std::os::unix::fs::symlink(root.path(), at("style/round")).expect("a link");
        let directory = Some(root.path().to_owned());
        let assets = AssetDir { directory, endings: &["x"], ..AssetDir::default() };
        let names: Vec<_> = assets.list().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["cat", "deep", "dog", "net", "top"]);
        assert_eq!(assets.find("deep"), Ok(at("style/old/deep.x")));
        assert_eq!(assets.find("top"), Ok(at("top.x")), "the less deep one");
        for name in ["cat", "adapter_model"] {
            assert_eq!(assets.find(name), Ok(at("style/cat/adapter_model.x")));
        }
    }

    #[test]
    fn of_files_of_one_name_the_first_ending_counts() {
        let folder = tempfile::tempdir().expect("a directory");
        for name in ["a.pt", "a.safetensors", "b.pt", "c.txt"] {
            std::fs::write(folder.path().join(name), name).expect("a file");
        }
        let directory = Some(folder.path().to_owned());
        let assets = AssetDir { directory, endings: &["safetensors", "pt"], ..AssetDir::default() };
        let files = assets.list().into_iter().map(|(_, path)| path);
        let wanted = ["a.safetensors", "b.pt"].map(|name| folder.path().join(name));
        assert_eq!(files.collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn a_directory_of_a_network_is_a_file_of_its_whole_name() {
        let folder = tempfile::tempdir().expect("a directory");
        let net = folder.path().join("canny-1.0");
        std::fs::create_dir(&net).expect("a directory");
        std::fs::create_dir(folder.path().join("other")).expect("a directory");
        std::fs::write(net.join("config.json"), "{}").expect("a file");
        let directory = Some(folder.path().to_owned());
        let assets = AssetDir { directory, endings: &["x"], folders: true, ..AssetDir::default() };
        assert_eq!(assets.list(), [("canny-1.0".to_owned(), net.clone())]);
        for (typed, is_same) in
            [("canny-1.0", true), ("Canny-1.0 [0123abcd]", true), ("CANNY", false), ("nny", false)]
        {
            let closest = Some(("canny-1.0".to_owned(), is_same));
            assert_eq!(assets.closest(typed), closest, "{typed}");
        }
        assert_eq!(assets.closest("depth"), None);
        let none = AssetDir { folders: false, ..assets };
        assert!(none.list().is_empty());
        let version = AssetFile::new("canny-1.0", net.clone()).expect("a directory");
        std::fs::write(net.join("config.json"), "{ }").expect("a file");
        assert!(!version.is_current(), "one of its files is another");
    }

    #[test]
    fn the_least_recently_used_content_is_evicted() {
        let folder = tempfile::tempdir().expect("a directory");
        for name in ["a", "b", "c", "d"] {
            std::fs::write(folder.path().join(name).with_extension("x"), name).expect("a file");
        }
        let directory = Some(folder.path().to_owned());
        let cache =
            AssetCache::new(AssetDir { directory, endings: &["x"], ..AssetDir::default() }, 10);
        let reads = Mutex::new(String::new());
        let get = |name: &str, bytes| {
            let read = |file: &AssetFile| {
                reads.lock().expect("unpoisoned").push_str(&file.name);
                Ok((std::fs::read_to_string(&file.path).expect("a file"), bytes))
            };
            cache.get("loras", name, read).expect("a file")
        };
        for (name, bytes) in [("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)] {
            assert_eq!(*get(name, bytes), name);
        }
        assert_eq!(*reads.lock().expect("unpoisoned"), "abcb");
        std::fs::write(folder.path().join("b.x"), "new").expect("a file");
        assert_eq!(*get("b", 4), "new");
        assert_eq!(
            cache.contents.lock().expect("unpoisoned").kept.len(),
            2,
            "one version of a file"
        );
        get("d", 11);
        assert_eq!(
            cache.contents.lock().expect("unpoisoned").kept.len(),
            1,
            "one that is too large stays"
        );
    }

    #[test]
    fn what_is_in_use_counts_and_is_not_read_twice() {
        let folder = tempfile::tempdir().expect("a directory");
        for name in ["a", "b", "c"] {
            std::fs::write(folder.path().join(name).with_extension("x"), name).expect("a file");
        }
        let directory = Some(folder.path().to_owned());
        let cache =
            AssetCache::new(AssetDir { directory, endings: &["x"], ..AssetDir::default() }, 10);
        let get = |name: &str, bytes| {
            cache.get("loras", name, |file| Ok((file.name.clone(), bytes))).expect("a file")
        };
        let a = get("a", 8);
        drop(get("b", 8));
        assert!(Arc::ptr_eq(&a, &get("a", 8)), "it was evicted and is still there");
        drop(get("b", 8));
        drop(get("c", 1));
        let count = || lock(&cache.contents).kept.len();
        assert_eq!(count(), 1, "b and c would fit but for a");
        drop(a);
        drop(get("b", 8));
        assert_eq!(count(), 2);
        cache.evict_until(|bytes| bytes <= 8);
        assert_eq!((count(), cache.bytes()), (1, 8), "c was used before b");
        cache.evict_until(|_| false);
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_read_again() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("a.x");
        std::fs::write(&path, "1").expect("a file");
        let assets = AssetDir { files: vec![path.clone()], ..AssetDir::default() };
        let cache = AssetCache::new(assets, 10);
        let reads = Mutex::new(0);
        let get = |changes: usize| {
            *reads.lock().expect("unpoisoned") = 0;
            cache.get("loras", "a", |file| {
                let content = std::fs::read_to_string(&file.path).expect("a file");
                let mut reads = reads.lock().expect("unpoisoned");
                *reads += 1;
                if *reads <= changes {
                    std::fs::write(&file.path, content.clone() + "+").expect("a file");
                }
                Ok((content, 1))
            })
        };
        assert_eq!(*get(2).expect("the third time"), "1++");
        std::fs::write(&path, "").expect("a file");
        let error = get(9).expect_err("it never rests").to_string();
        assert!(error.contains("is being replaced"), "{error}");
    }
}
