//! The bytes of a file: read from it piece by piece, a copy, or part of the binary. A file is never
//! mapped into memory: one that is shortened at that moment would end the process.

use std::borrow::Cow;
use std::fs::{File, Metadata};
use std::io::{self, BufReader, Cursor, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::time::SystemTime;

/// The bytes of a file.
pub(super) enum Bytes {
    Opened(OpenFile),
    Copied(Vec<u8>),
    Static(&'static [u8]),
}

/// What reads the bytes of a file as a stream.
pub(super) trait Reader: Read + Seek {}

impl<T: Read + Seek> Reader for T {}

/// A file that is read piece by piece.
pub(super) struct OpenFile {
    file: File,
    length: usize,
    modified: SystemTime,
}

impl OpenFile {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let (length, modified) = state(&file.metadata()?)?;
        Ok(Self { file, length, modified })
    }

    fn read(&self, range: Range<usize>) -> io::Result<Vec<u8>> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(range.start as u64))?;
        let mut bytes = Vec::with_capacity(range.len());
        file.take(range.len() as u64).read_to_end(&mut bytes)?;
        if bytes.len() < range.len() { Err(changed()) } else { Ok(bytes) }
    }
}

/// Opens a regular file. To open another, such as a pipe, can wait for ever.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let data = path.metadata()?;
    match () {
        () if data.is_file() => File::open(path),
        () if data.is_dir() => Err(ErrorKind::IsADirectory.into()),
        () => Err(io::Error::new(ErrorKind::InvalidInput, "is no regular file")),
    }
}

/// What tells that a file was written to. Not the time of the last change of its metadata: renaming
/// another file into its place changes that, and is allowed.
fn state(data: &Metadata) -> io::Result<(usize, SystemTime)> {
    let length = usize::try_from(data.len()).map_err(|_| ErrorKind::FileTooLarge)?;
    Ok((length, data.modified()?))
}

fn changed() -> io::Error {
    io::Error::other("the file was changed while it was read; load the model again")
}

impl Bytes {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Opened(file) => file.length,
            Self::Copied(bytes) => bytes.len(),
            Self::Static(bytes) => bytes.len(),
        }
    }

    /// All bytes from the start on, in any order.
    pub(super) fn reader(&self) -> Box<dyn Reader + '_> {
        match self {
            Self::Opened(file) => Box::new(BufReader::new(&file.file)),
            Self::Copied(bytes) => Box::new(Cursor::new(&bytes[..])),
            Self::Static(bytes) => Box::new(Cursor::new(*bytes)),
        }
    }

    /// The bytes of a range.
    pub(super) fn read(&self, range: Range<usize>) -> io::Result<Cow<'_, [u8]>> {
        let part = match self {
            Self::Opened(file) => return Ok(Cow::Owned(file.read(range)?)),
            Self::Copied(bytes) => bytes.get(range),
            Self::Static(bytes) => bytes.get(range),
        };
        part.map(Cow::Borrowed).ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }

    /// Fails if the file has been written to since it was opened.
    pub(super) fn check_unchanged(&self) -> io::Result<()> {
        match self {
            Self::Opened(OpenFile { file, length, modified })
                if state(&file.metadata()?)? != (*length, *modified) =>
            {
                Err(changed())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_file_that_is_written_to_is_told_and_one_that_is_replaced_is_read_to_its_end() {
        let folder = tempfile::tempdir().expect("a directory");
        let (path, other) = (folder.path().join("a"), folder.path().join("b"));
        let open = |text: &str| {
            fs::write(&path, text).expect("written");
            Bytes::Opened(OpenFile::open(&path).expect("opened"))
        };
        let bytes = open("0123456789");
        assert_eq!(bytes.read(2..5).expect("read"), &b"234"[..]);
        fs::write(&other, "other").expect("written");
        fs::rename(&other, &path).expect("renamed");
        assert_eq!(bytes.read(8..10).expect("read"), &b"89"[..]);
        assert!(bytes.check_unchanged().is_ok());
        let bytes = open("0123456789");
        fs::write(&path, "0123").expect("written");
        assert!(bytes.read(2..5).is_err_and(|error| error.to_string().contains("was changed")));
        assert!(bytes.check_unchanged().is_err());
        let bytes = open("0123456789");
        // Longer than a tick of the clock of the file system.
        std::thread::sleep(Duration::from_millis(50));
        fs::write(&path, "9876543210").expect("written");
        assert!(bytes.check_unchanged().is_err());
        assert!(OpenFile::open(folder.path()).is_err());
        assert!(OpenFile::open(Path::new("/dev/zero")).is_err(), "no regular file");
    }
}
