//! Image files: encoding with generation parameters, decoding, masks and blurring. These functions
//! take milliseconds of a core: not for async threads, and except for `blurred` not for the model
//! thread.

mod blur;
mod decode;
mod encode;
mod hashes;
mod infotext;
mod mask;

pub use blur::blurred;
pub use decode::{decode, decoded_bytes, fit_mask, is_transparent, on_white, resize_to};
pub use encode::{Format, JPEG_QUALITY, encode};
pub use hashes::Hashes;
pub use infotext::infotext;
pub(crate) use infotext::{LORA_HASHES, extra_parameters, find, parse};
pub use mask::{inverted, transparency_mask};
