//! Pixels to PNG, JPEG or WebP, with the parameters of the picture in the file; and pictures that
//! came in to pixels. Not for the model thread, but for what it must not let out (`blurred`), and not
//! for async threads: both take milliseconds of a whole core.

mod blur;
mod decode;
mod encode;
mod hashes;
mod infotext;
mod mask;

pub use blur::blurred;
pub use decode::{decode, fit_mask, resize_to};
pub use encode::{Format, JPEG_QUALITY, encode};
pub use hashes::Hashes;
pub use infotext::infotext;
pub(crate) use infotext::{LORA_HASHES, find, hires_parameters, parse};
pub use mask::{inverted, mask, transparency_mask};
