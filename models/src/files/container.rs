//! What a file is, by its first bytes: the containers that are read, and what is found in their
//! place. Not what the container holds: that is [`super::family`].

use super::gguf;
use super::numbers::NumberType;

/// The type of a tensor's numbers and their bytes, relative to the file's data; or why they cannot
/// be read, which matters only if they are asked for.
pub(super) type Place = Result<(NumberType, (usize, usize)), String>;

/// A container of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    Safetensors,
    /// The zip archive of PyTorch 1.6 and later.
    Archive,
    /// PyTorch's stream of pickles from before.
    OldPickle,
    /// ggml's, of stable-diffusion.cpp and of ComfyUI-GGUF.
    Gguf,
}

/// How PyTorch's files from before 1.6 begin: the pickle of a number that tells them.
pub(super) const OLD_PICKLE: &[u8] = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.";

/// What a pickle alone is, of any protocol.
const PICKLE: &str = "a pickle that PyTorch did not write: save its tensors with torch.save";

/// Beginnings of files that are mistaken for models, and what they are.
const OTHERS: [(&[u8], &str); 18] = [
    (
        b"version https://git-lfs",
        "a git-LFS pointer, not the file that it stands for: `git lfs pull` fetches it",
    ),
    (b"<", "a web page, not a model: the download was answered by an error or a login page"),
    (b"{", "JSON, not a model: a settings file, or the error that answered the download"),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"(dp", PICKLE),
    (b"}q", PICKLE),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file of Keras"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"GIF8", "an image"),
    (b"\x08\x00\x00\x00\x12", "an ONNX model"),
];

/// The most bytes of a safetensors header, as its specification bounds it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

impl Container {
    /// The container of a file with this content. The error reads on from the file's name.
    pub(super) fn of(bytes: &[u8]) -> Result<Self, String> {
        if bytes.is_empty() {
            return Err("is empty: the download has not begun, or has failed".into());
        }
        if bytes.starts_with(b"PK\x03\x04") {
            return Ok(Self::Archive);
        }
        if bytes.starts_with(OLD_PICKLE) {
            return Ok(Self::OldPickle);
        }
        if bytes.starts_with(gguf::MAGIC) {
            return Ok(Self::Gguf);
        }
        if let [a, b, c, d, e, f, g, h, b'{', ..] = *bytes
            && u64::from_le_bytes([a, b, c, d, e, f, g, h]) <= MAX_HEADER_BYTES
        {
            return Ok(Self::Safetensors);
        }
        let start = bytes.trim_ascii_start();
        let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
        if let Some((_, what)) = OTHERS.iter().find(|(beginning, _)| start.starts_with(beginning)) {
            return Err(format!("is {what}"));
        }
        if bytes.iter().take(4096).all(|byte| *byte == 0) {
            return Err("begins with zeros only: the download is unfinished".into());
        }
        Err("is not a safetensors file, a GGUF file, nor a checkpoint of PyTorch".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_by_their_first_bytes() {
        assert_eq!(Container::of(b"\x02\0\0\0\0\0\0\0{}"), Ok(Container::Safetensors));
        assert_eq!(Container::of(b"PK\x03\x04.."), Ok(Container::Archive));
        assert_eq!(Container::of(OLD_PICKLE), Ok(Container::OldPickle));
        let cases: [(&[u8], &str); 8] = [
            (b"", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-LFS pointer"),
            (b"\n <!DOCTYPE html><html>", "a web page"),
            (b"\xef\xbb\xbf{\"error\": \"gone\"}", "is JSON"),
            (b"\x80\x02}q\0.", "a pickle that PyTorch did not write"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (&[0; 5000], "zeros"),
            (b"this is no checkpoint", "not a safetensors file, a GGUF file, nor"),
        ];
        for (bytes, words) in cases {
            let refusal = Container::of(bytes).expect_err("no model");
            assert!(refusal.contains(words), "{refusal}");
        }
    }
}
