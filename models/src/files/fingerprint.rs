//! A digest that tells a model from another of the same name without reading all of its files.

use std::io;
use std::ops::Range;

use ring::digest::{Context, SHA256};

use super::bytes::Bytes;

/// Maximum number of samples of a file.
const SAMPLES: usize = 256;

/// Length of a sample.
const SAMPLE_BYTES: usize = 4096;

/// SHA-256 of the names, the lengths and samples of files. Files that differ in a hundredth of their
/// bytes, in one piece, may have the same.
pub(crate) struct Fingerprint(Context);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(Context::new(&SHA256))
    }
}

impl Fingerprint {
    /// Adds a file.
    pub(super) fn add_file(&mut self, name: &str, bytes: &Bytes) -> io::Result<()> {
        self.begin(name, bytes.len());
        samples(bytes.len()).try_for_each(|range| {
            self.0.update(&bytes.read(range)?);
            Ok(())
        })
    }

    /// Adds a file that was read.
    pub(crate) fn add(&mut self, name: &str, bytes: &[u8]) {
        self.begin(name, bytes.len());
        samples(bytes.len()).for_each(|range| self.0.update(&bytes[range]));
    }

    fn begin(&mut self, name: &str, length: usize) {
        self.0.update(&(name.len() as u64).to_le_bytes());
        self.0.update(name.as_bytes());
        self.0.update(&(length as u64).to_le_bytes());
    }

    /// The digest in hexadecimal.
    pub(crate) fn finish(self) -> String {
        self.0.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The parts of a file that count: up to 1 MiB all of it, else samples at equal distances from its
/// start to its end.
fn samples(length: usize) -> impl Iterator<Item = Range<usize>> {
    let (count, size) =
        if length > SAMPLES * SAMPLE_BYTES { (SAMPLES, SAMPLE_BYTES) } else { (0, length) };
    let last = length - size;
    let starts = (0..count).map(move |k| last / (SAMPLES - 1) * k);
    starts.chain([last]).map(move |start| start..start + size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, bytes: &[u8]) -> String {
        let mut fingerprint = Fingerprint::default();
        fingerprint.add(name, bytes);
        fingerprint.finish()
    }

    #[test]
    fn names_lengths_and_contents_tell_files_apart() {
        let mut large = vec![7; 5 << 20];
        let first = of("a", &large);
        assert_eq!((first.len(), of("a", &large)), (64, first.clone()));
        assert_ne!(of("b", &large), first);
        assert_ne!(of("a", &large[1..]), first);
        for changed in [0..1, (5 << 20) - 1..5 << 20, 3_000_000..3_060_000] {
            large[changed.clone()].fill(8);
            assert_ne!(of("a", &large), first, "{changed:?}");
            large[changed].fill(7);
        }
        assert_ne!(of("a", b"bc"), of("ab", b"c"));
        let small = vec![7; SAMPLES * SAMPLE_BYTES];
        for changed in [0, 5000, small.len() - 1] {
            let mut other = small.clone();
            other[changed] = 8;
            assert_ne!(of("a", &other), of("a", &small));
        }
    }
}
