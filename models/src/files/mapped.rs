//! The bytes of a file: a read-only memory map, a copy, or part of the binary.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

#[expect(unsafe_code, reason = "the one memory map")]
pub(super) fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is read only. Truncating the file while it is mapped would be a bus error;
    // model directories are immutable in every deployment that we describe. Files that may be
    // replaced at any time are copied.
    unsafe { Mmap::map(&file) }
}

/// The bytes of a file.
pub(super) enum Bytes {
    Mapped(Mmap),
    Copied(Vec<u8>),
    Static(&'static [u8]),
}

impl Bytes {
    pub(super) fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Copied(bytes) => bytes,
            Self::Static(bytes) => bytes,
        }
    }

    /// Releases the pages of a range, so that packed weights are not in memory twice.
    #[cfg(unix)]
    #[expect(unsafe_code, reason = "the one memory map")]
    pub(super) fn release(&self, range: Range<usize>) {
        if let Self::Mapped(map) = self {
            // SAFETY: the map is read only and backed by the file: released pages are read again on
            // access. An error leaves them resident.
            let _ = unsafe {
                map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
    }

    #[cfg(not(unix))]
    pub(super) fn release(&self, _: Range<usize>) {}
}
