//! Hashes of the files of LoRAs and models, as used by model sites and written by AUTOMATIC1111 into
//! the generation parameters.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ring::digest::{Context, SHA256};
use sd_models::AssetFile;
use serde::Deserialize;

/// Maximum length of the header of a safetensors file, as in the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Number of hexadecimal digits.
const SHORT: usize = 12;

/// Number of known hashes at which all are forgotten.
const MAX_KNOWN: usize = 10_000;

/// Cache of the hashes, each computed once per file version.
#[derive(Debug, Clone, Default)]
pub struct Hashes {
    known: Known,
    parts: Known,
    whole: Arc<Mutex<HashMap<AssetFile, Whole>>>,
}

/// Hashes that are read at once.
type Known = Arc<Mutex<HashMap<AssetFile, String>>>;

/// The hash of a whole file, once it is known; none if the file is gone or was replaced.
type Whole = Arc<OnceLock<Option<String>>>;

impl Hashes {
    /// The LoRAs of an image as in AUTOMATIC1111, `name: hash, name: hash`. Files that were
    /// replaced before they could be hashed are omitted: the hash of another version would be wrong.
    /// Blocks: reads whole files, once.
    pub fn of(&self, files: &[AssetFile]) -> String {
        let mut files: Vec<_> = files.iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files.dedup();
        let hashes = files.into_iter().filter_map(|file| {
            let name = file.name.replace([':', ',', '"', '\n'], "");
            Some(format!("{name}: {}", self.get(file)?))
        });
        hashes.collect::<Vec<_>>().join(", ")
    }

    /// SHA-256 of a whole file, as of checkpoints and VAEs. Blocks: reads the file, once, or waits
    /// until another thread has read it.
    pub fn whole(&self, file: &AssetFile) -> Option<String> {
        let (entry, _) = self.entry(file);
        let read = || {
            let mut opened = File::open(&file.path).ok()?;
            let hash = sha256(&mut opened).ok()?;
            file.is_current().then(|| hex(&hash))
        };
        entry.get_or_init(read).clone()
    }

    /// The same if it is known by now. Never blocks.
    pub fn known(&self, file: &AssetFile) -> Option<String> {
        let whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        whole.get(file)?.get().cloned().flatten()
    }

    /// Whether nobody has asked for the hash of this file yet, except with [`Self::known`]. From now on
    /// somebody has.
    pub fn is_new(&self, file: &AssetFile) -> bool {
        self.entry(file).1
    }

    /// The entry of a file, and whether it is new.
    fn entry(&self, file: &AssetFile) -> (Whole, bool) {
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        if whole.len() >= MAX_KNOWN {
            whole.clear();
        }
        let before = whole.len();
        let entry = Arc::clone(whole.entry(file.clone()).or_default());
        (entry, whole.len() > before)
    }

    fn get(&self, file: &AssetFile) -> Option<String> {
        cached(&self.known, file, short)
    }

    /// AUTOMATIC1111's first kind of hash, which its extension for ControlNets has kept: of a part of
    /// the file alone. Blocks: reads that part, once.
    pub fn part(&self, file: &AssetFile) -> Option<String> {
        cached(&self.parts, file, of_part)
    }
}

/// A hash from a cache, else from the file.
fn cached(
    known: &Known,
    file: &AssetFile,
    read: fn(&Path) -> io::Result<String>,
) -> Option<String> {
    let known = || known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(hash) = known().get(file) {
        return Some(hash.clone());
    }
    // Without the lock: a large file on a slow disk takes long.
    let hash = read(&file.path).ok()?;
    if !file.is_current() {
        return None;
    }
    let mut known = known();
    if known.len() >= MAX_KNOWN {
        known.clear();
    }
    known.insert(file.clone(), hash.clone());
    Some(hash)
}

/// Opens a file. To open a pipe would wait for whoever writes to it.
fn open(path: &Path) -> io::Result<File> {
    match path.metadata()?.is_file() {
        true => File::open(path),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Reference: AUTOMATIC1111's `model_hash`.
fn of_part(path: &Path) -> io::Result<String> {
    const PART: (u64, u64) = (0x10_0000, 0x1_0000);
    let mut file = open(path)?;
    file.seek(SeekFrom::Start(PART.0))?;
    Ok(hex(&sha256(&mut file.take(PART.1))?)[..8].to_owned())
}

/// Reference: AUTOMATIC1111's `NetworkOnDisk`: the hash written by kohya's trainer, else SHA-256 of
/// the tensors, without the header, which tools change.
fn short(path: &Path) -> io::Result<String> {
    let mut file = open(path)?;
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
    Ok(hex(&sha256(&mut file)?)[..SHORT].to_owned())
}

/// SHA-256 of the rest of a file.
fn sha256(file: &mut impl io::Read) -> io::Result<Vec<u8>> {
    let (mut sum, mut part) = (Context::new(&SHA256), vec![0; 1 << 20]);
    loop {
        match file.read(&mut part)? {
            0 => return Ok(sum.finish().as_ref().to_vec()),
            length => sum.update(&part[..length]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
        let file = || AssetFile::new("a", path.clone()).expect("a file");
        std::fs::write(&path, "abc").expect("a file");
        let old = file();
        // The first of NIST's examples.
        assert_eq!(hashes.of(&[old.clone(), old.clone()]), "a: ba7816bf8f01");
        let unseen = Hashes::default();
        std::fs::write(&path, "").expect("a file");
        assert_eq!(hashes.of(&[file()]), "a: e3b0c44298fc");
        assert_eq!(hashes.of(std::slice::from_ref(&old)), "a: ba7816bf8f01", "known from before");
        assert_eq!(unseen.of(&[old]), "", "the file of this version is gone");
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(hashes.known(&file()), None);
        assert!(hashes.is_new(&file()), "to look whether it is known does not ask for it");
        assert!(!hashes.is_new(&file()));
        assert_eq!(hashes.whole(&file()).as_deref(), Some(empty));
        assert_eq!(
            (hashes.is_new(&file()), hashes.known(&file()).as_deref()),
            (false, Some(empty))
        );
        // That of a part which the file does not reach.
        assert_eq!(hashes.part(&file()).as_deref(), Some(&empty[..8]));
        let gone = file();
        std::fs::remove_file(&path).expect("it is there");
        assert_eq!(unseen.of(std::slice::from_ref(&gone)), "");
        assert_eq!(unseen.part(&gone), None);
        assert_eq!(hashes.part(&gone).as_deref(), Some(&empty[..8]), "it is not read again");
    }
}
