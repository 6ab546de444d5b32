//! How bodies are written: compressed, and in which character set. What is made of them is neither:
//! UTF-8 where it is text. Not the types of bodies, which the dialects tell apart.

use std::borrow::Cow;
use std::io::{self, Read};

use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use encoding_rs::{Encoding, UTF_8};
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

use super::error::{ApiError, Result};
use crate::request::{ValidationError, brief};

/// The bytes that are decompressed at a time.
const CHUNK_BYTES: usize = 1 << 16;

/// A body's codings, by its headers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Coding {
    compression: Option<Compression>,
    /// None is UTF-8, or no text.
    charset: Option<&'static Encoding>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Compression {
    Gzip,
    Deflate,
}

impl Coding {
    /// The codings that headers declare. An error if they are not known.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self> {
        Ok(Self { compression: compression(headers)?, charset: charset(headers)? })
    }

    /// Whether the body is as it was sent.
    pub(super) fn is_plain(self, body: &[u8]) -> bool {
        self.compression.is_none() && self.charset(body).is_none()
    }

    /// The body decompressed and, if it is text, in UTF-8. `grow` is asked as it grows. Not for async
    /// threads.
    pub(super) fn decode(
        self,
        body: Vec<u8>,
        mut grow: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let body = match self.compression {
            None => body,
            Some(Compression::Gzip) => read(MultiGzDecoder::new(&body[..]), "gzip", &mut grow)?,
            // Some clients leave out the header of zlib.
            Some(Compression::Deflate) if !has_zlib_header(&body) => {
                read(DeflateDecoder::new(&body[..]), "deflate", &mut grow)?
            }
            Some(Compression::Deflate) => read(ZlibDecoder::new(&body[..]), "deflate", &mut grow)?,
        };
        let Some(charset) = self.charset(&body) else { return Ok(body) };
        // Many clients declare a character set of one byte for what they send in UTF-8.
        if charset.is_ascii_compatible() && std::str::from_utf8(&body).is_ok() {
            return Ok(body);
        }
        let (text, _, is_broken) = charset.decode(&body);
        if is_broken {
            let message = format!("the body is not {}", charset.name());
            return Err(ValidationError::body(message).into());
        }
        grow(text.len())?;
        Ok(match text {
            Cow::Borrowed(_) => body,
            Cow::Owned(text) => text.into_bytes(),
        })
    }

    /// The character set of a text that is not UTF-8: the one that its first bytes mark, else the
    /// declared one.
    fn charset(self, body: &[u8]) -> Option<&'static Encoding> {
        let marked = Encoding::for_bom(body).map(|(charset, _)| charset);
        marked.or(self.charset).filter(|charset| *charset != UTF_8)
    }
}

/// The one compression of a body; bodies are seldom compressed twice.
fn compression(headers: &HeaderMap) -> Result<Option<Compression>> {
    let codings = headers.get_all(CONTENT_ENCODING).iter();
    let codings = codings.map(|value| value.to_str().unwrap_or("?")).flat_map(|all| all.split(','));
    let mut found = None;
    for coding in codings.map(str::trim) {
        let compression = match coding.to_ascii_lowercase().as_str() {
            "" | "identity" => continue,
            "gzip" | "x-gzip" => Compression::Gzip,
            "deflate" => Compression::Deflate,
            _ => {
                return Err(ApiError::MediaType(format!(
                    "the content encoding {:?} is not supported; send the body as gzip, as \
                     deflate or uncompressed",
                    brief(coding)
                )));
            }
        };
        if found.replace(compression).is_some() {
            return Err(ApiError::MediaType("send the body compressed once".into()));
        }
    }
    Ok(found)
}

/// The character set of a body by its type.
fn charset(headers: &HeaderMap) -> Result<Option<&'static Encoding>> {
    let Some(media_type) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return Ok(None);
    };
    let mut parameters = media_type.split(';');
    // The parts of a form have types of their own.
    let name = parameters.next().unwrap_or_default().trim_start().to_ascii_lowercase();
    if name.starts_with("multipart/") {
        return Ok(None);
    }
    let named = parameters.filter_map(|parameter| parameter.split_once('='));
    let mut named = named.filter(|(name, _)| name.trim().eq_ignore_ascii_case("charset"));
    let Some((_, label)) = named.next() else { return Ok(None) };
    let label = label.trim().trim_matches('"');
    match Encoding::for_label_no_replacement(label.as_bytes()) {
        Some(charset) => Ok(Some(charset)),
        None => {
            let reason = format!("the charset {:?} is not supported; send UTF-8", brief(label));
            Err(ApiError::MediaType(reason))
        }
    }
}

/// RFC 1950: the method deflate, and a checksum of the first two bytes.
fn has_zlib_header(body: &[u8]) -> bool {
    matches!(body, [first, second, ..]
        if first & 0x0f == 8 && (u16::from(*first) << 8 | u16::from(*second)) % 31 == 0)
}

/// Decompresses a body.
fn read(
    mut reader: impl Read,
    name: &str,
    grow: &mut impl FnMut(usize) -> Result<()>,
) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let broken = |_: io::Error| ValidationError::body(format!("the body is not valid {name}"));
    loop {
        let read = reader.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut body);
        if read.map_err(broken)? == 0 {
            return Ok(body);
        }
        grow(body.len())?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use axum::http::HeaderName;
    use flate2::Compression as Level;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    type Header<'a> = (HeaderName, &'a str);

    fn decoded(headers: &[Header<'_>], body: &[u8], most: usize) -> Result<Vec<u8>> {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap()));
        let grow = |length| match length > most {
            true => Err(ApiError::TooLarge { bytes: most, limit: "test" }),
            false => Ok(()),
        };
        Coding::of(&headers.collect())?.decode(body.into(), grow)
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn bodies_are_read_however_they_are_written() {
        let mut zlib = ZlibEncoder::new(Vec::new(), Level::fast());
        zlib.write_all("café".as_bytes()).unwrap();
        let utf_16: Vec<u8> = "café".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let marked = [&[0xff, 0xfe], &utf_16[..]].concat();
        let (coding, media) = (CONTENT_ENCODING, CONTENT_TYPE);
        let table: [(&[Header<'_>], Vec<u8>); 9] = [
            (&[], "café".into()),
            (&[(coding.clone(), "gzip")], gzip("café".as_bytes())),
            (&[(coding.clone(), "identity, X-GZIP")], gzip("café".as_bytes())),
            (&[(coding.clone(), "deflate")], zlib.finish().unwrap()),
            (&[(media.clone(), "text/plain; charset=\"ISO-8859-1\"")], b"caf\xe9".into()),
            (&[(media.clone(), "application/json;charset=utf-8")], "café".into()),
            (&[(media.clone(), "text/plain;charset=utf-16le")], utf_16),
            (&[(media.clone(), "text/plain")], marked),
            (&[(coding, "gzip"), (media.clone(), "text/plain; charset=latin1")], gzip(b"caf\xe9")),
        ];
        for (headers, body) in table {
            let text = decoded(headers, &body, 1 << 20).expect("text");
            assert_eq!(String::from_utf8_lossy(&text), "café", "{headers:?}");
        }
        let mut raw = DeflateEncoder::new(Vec::new(), Level::fast());
        raw.write_all("café".as_bytes()).unwrap();
        let raw = raw.finish().unwrap();
        let text = decoded(&[(CONTENT_ENCODING, "deflate")], &raw, 1 << 20).expect("text");
        assert_eq!(text, "café".as_bytes());
        let mislabelled = (media.clone(), "application/json; charset=ISO-8859-1");
        assert_eq!(decoded(&[mislabelled], "café".as_bytes(), 10).unwrap(), "café".as_bytes());
        let parts = (media, "Multipart/Form-Data; boundary=x; charset=nonsense");
        assert_eq!(decoded(&[parts], b"caf\xe9", 100).expect("as it is"), b"caf\xe9");
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let bomb = gzip(&vec![0; 16 << 20]);
        let bomb = decoded(&[(CONTENT_ENCODING, "gzip")], &bomb, 1 << 20).unwrap_err();
        assert!(matches!(bomb, ApiError::TooLarge { bytes, .. } if bytes == 1 << 20));
        let mut cut = gzip(b"a body that is cut");
        cut.truncate(cut.len() - 9);
        for (name, value, body, reason) in [
            (CONTENT_ENCODING, "br", &b"x"[..], "content encoding \"br\" is not supported"),
            (CONTENT_ENCODING, "gzip, gzip", b"x", "compressed once"),
            (CONTENT_ENCODING, "gzip", b"x", "not valid gzip"),
            (CONTENT_ENCODING, "gzip", &cut, "not valid gzip"),
            (CONTENT_ENCODING, "deflate", b"\xff\xff", "not valid deflate"),
            (CONTENT_TYPE, "text/plain; charset=klingon", b"x", "charset \"klingon\""),
            (CONTENT_TYPE, "text/plain; charset=utf-16le", b"x", "not UTF-16LE"),
            (CONTENT_TYPE, "text/plain; charset=iso-2022-kr", b"x", "charset \"iso-2022-kr\""),
        ] {
            let error = decoded(&[(name, value)], body, 1 << 20).unwrap_err().to_string();
            assert!(error.contains(reason), "{value}: {error}");
        }
    }
}
