//! The version of a file, by which a replaced one is told from the one that was read. Not its
//! content: nothing is read.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;

/// What the file system says of a file. The time of the last change of its metadata is kept beside
/// that of its content, since programs that copy files (`cp -p`, rsync) restore the latter only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FileVersion {
    inode: u64,
    /// Bytes.
    length: u64,
    /// Seconds and nanoseconds of the last change of the content.
    modified: (i64, i64),
    /// Seconds and nanoseconds of the last change of content or metadata.
    changed: (i64, i64),
}

impl FileVersion {
    /// The version of the file with this metadata.
    pub fn of(data: &Metadata) -> Self {
        Self {
            inode: data.ino(),
            length: data.len(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_file_of_the_same_length_and_time_is_another_version() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("a.safetensors");
        let version = || FileVersion::of(&path.metadata().expect("a file"));
        fs::write(&path, "old").expect("written");
        let (first, time) = (version(), path.metadata().and_then(|data| data.modified()));
        assert_eq!(version(), first);
        let restore = || {
            // Longer than a tick of the clock of the file system.
            std::thread::sleep(Duration::from_millis(50));
            fs::write(&path, "new").expect("written");
            let file = File::options().write(true).open(&path).expect("a file");
            file.set_modified(*time.as_ref().expect("a time")).expect("set");
        };
        restore();
        let in_place = version();
        assert_ne!(in_place, first);
        fs::rename(&path, folder.path().join("b")).expect("renamed");
        restore();
        assert_ne!(version(), in_place);
    }
}
