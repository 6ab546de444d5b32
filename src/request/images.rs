//! Input images and masks: their files, and how they become pixels. Not for async threads: a
//! decoder takes milliseconds of a whole core.

use std::borrow::Cow;

use ::image::DynamicImage;
use base64::Engine as _;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;

use super::error::ValidationError;
use super::limits::Limits;
use crate::image;

/// Base64 with or without padding: clients differ.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The same with the letters that may stand in addresses.
const OF_ADDRESSES: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// An image file of a client.
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "String")]
pub(crate) enum ImageFile {
    /// Base64, bare or as a data URL, in one line or in several.
    Base64(Bytes),
    /// The bytes of the file.
    Bytes(Bytes),
}

impl From<String> for ImageFile {
    fn from(text: String) -> Self {
        Self::Base64(text.into())
    }
}

impl JsonSchema for ImageFile {
    fn schema_name() -> Cow<'static, str> {
        "ImageFile".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "contentEncoding": "base64" })
    }
}

impl ImageFile {
    /// The file in the field `name`.
    pub(crate) fn bytes(&self, name: &str) -> Result<Bytes, ValidationError> {
        let text = match self {
            Self::Base64(text) => text.as_ref(),
            Self::Bytes(bytes) => return Ok(bytes.clone()),
        };
        let comma = text.starts_with(b"data:").then(|| text.iter().position(|b| *b == b','));
        let mut text = Cow::from(comma.flatten().map_or(text, |comma| &text[comma + 1..]));
        if text.iter().any(u8::is_ascii_whitespace) {
            text.to_mut().retain(|byte| !byte.is_ascii_whitespace());
        }
        let broken = |_| {
            let is_address = text.starts_with(b"http:") || text.starts_with(b"https:");
            let reason = match is_address {
                true => "is an address: nothing is fetched, send the file in base64",
                false => "must be an image file in base64, bare or as a data URL",
            };
            ValidationError::malformed(name, reason)
        };
        let decoded = BASE64.decode(&text).or_else(|_| OF_ADDRESSES.decode(&text));
        decoded.map(Into::into).map_err(broken)
    }

    /// Memory that decoding the image takes, in bytes; 0 for a file that will not be decoded. If
    /// the file was base64, it is not any more.
    pub(crate) fn weigh(&mut self, max_pixels: usize) -> usize {
        let Ok(file) = self.bytes("") else { return 0 };
        let bytes = image::decoded_bytes(&file, max_pixels).unwrap_or(0);
        *self = Self::Bytes(file);
        bytes
    }

    /// Width and height of the image, if it will be decoded.
    pub(crate) fn dimensions(&self, max_pixels: usize) -> Option<(u32, u32)> {
        image::dimensions(&self.bytes("").ok()?, max_pixels).ok()
    }

    /// The image in the field `name`.
    pub(crate) fn decoded(
        &self,
        name: &str,
        limits: &Limits,
    ) -> Result<DynamicImage, ValidationError> {
        self.decode(name, limits.max_input_pixels)
    }

    /// The image in the field `name`, of at most so many pixels.
    pub(crate) fn decode(
        &self,
        name: &str,
        max_pixels: usize,
    ) -> Result<DynamicImage, ValidationError> {
        let image = image::decode(&self.bytes(name)?, max_pixels);
        image.map_err(|reason| ValidationError::range(name, reason))
    }
}

/// What transparent pixels of an input image are.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum Transparency {
    /// Their hidden colours, as in diffusers, with a warning.
    #[default]
    Ignored,
    /// White, as in AUTOMATIC1111.
    White,
}

/// The pixels of a mask that are inpainted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum MaskArea {
    /// White pixels.
    #[default]
    White,
    /// Black pixels.
    Black,
    /// Transparent pixels, of the input image itself where there is no mask.
    Transparent,
}

impl MaskArea {
    /// The mask in which white is inpainted, out of a mask in the field `name` or an input image.
    pub(super) fn mask(
        self,
        name: &str,
        mask: Option<DynamicImage>,
        image: &DynamicImage,
    ) -> Result<Option<DynamicImage>, ValidationError> {
        match self {
            Self::White => Ok(mask),
            Self::Black => Ok(mask.map(|mask| image::inverted(&mask).into())),
            Self::Transparent => match image::transparency_mask(mask.as_ref().unwrap_or(image)) {
                None if mask.is_some() => {
                    let reason = "has no transparent pixels, which mark the area to inpaint";
                    Err(ValidationError::range(name, reason))
                }
                found => Ok(found.map(Into::into)),
            },
        }
    }
}
