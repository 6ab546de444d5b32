//! A digest that tells a model from another of the same name without reading all of its files.

use ring::digest::{Context, SHA256};

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
    /// Adds a file: up to 1 MiB whole, else samples at equal distances from its start to its end.
    pub(crate) fn add(&mut self, name: &str, bytes: &[u8]) {
        let mut add = |part: &[u8]| self.0.update(part);
        add(&(name.len() as u64).to_le_bytes());
        add(name.as_bytes());
        add(&(bytes.len() as u64).to_le_bytes());
        match bytes.len().checked_sub(SAMPLE_BYTES) {
            Some(last) if bytes.len() > SAMPLES * SAMPLE_BYTES => {
                for start in (0..SAMPLES).map(|k| last / (SAMPLES - 1) * k) {
                    add(&bytes[start..start + SAMPLE_BYTES]);
                }
                add(&bytes[last..]);
            }
            _ => add(bytes),
        }
    }

    /// The digest in hexadecimal.
    pub(crate) fn finish(self) -> String {
        self.0.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
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
