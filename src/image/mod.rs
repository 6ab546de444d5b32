//! Image files: encoding with generation parameters, decoding, masks and blurring. These functions
//! take milliseconds of a core: not for async threads, and except for `blurred` not for the model
//! thread.

mod blur;
mod control_map;
mod decode;
mod embedded;
mod encode;
mod fit;
mod gaussian;
mod hashes;
mod infotext;
mod inpaint;
mod mask;

pub use blur::blurred;
pub use control_map::{ControlMap, check_own_size, of_rgb, pixel_perfect, processed, rgb};
pub use decode::{
    decode, decoded_bytes, dimensions, fit_mask, is_transparent, on_white, resize_to,
};
pub(crate) use embedded::Embedded;
pub(crate) use encode::encode_png;
pub use encode::{Format, encode};
pub use fit::Fit;
pub use hashes::Hashes;
pub use infotext::{ControlOrigin, Origin, infotext, short_hash};
pub(crate) use infotext::{
    LORA_HASHES, control_parameters, extra_parameters, parse, refiner_parameters,
};
pub use inpaint::{InpaintOptions, Inpainting, Overlay};
pub use mask::{inverted, opaque_mask, transparency_mask};
