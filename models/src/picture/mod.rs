//! Images as bytes, and resampling.

mod opencv;
mod pillow;
mod preprocess;
mod resample;
mod rgb;
mod tiles;

pub use self::opencv::{Interpolation, otsu};
pub(crate) use self::pillow::{blended, clip_crop, lanczos, nearest};
pub use self::preprocess::{CANNY, Preprocessor, THRESHOLD};
pub(crate) use self::resample::{CUBIC, TRIANGLE, Taps, antialiased, cubic, interpolated};
pub use self::rgb::{Rgb, Size};
pub(crate) use self::tiles::{Canvas, TILE, Tiles};
