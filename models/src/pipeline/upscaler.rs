//! The names of upscalers: of latents, and of pictures.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The work of an upscaler for a pixel beside that of a UNet call for a pixel and row: that of
/// RRDBNet with 23 blocks, beside the UNet of Stable Diffusion 1.x.
pub const TILE_WORK: usize = 12;

/// How the picture of a hires pass is upscaled: its latents, or the picture that they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Upscaler {
    /// Its latents.
    Latent(LatentUpscaler),
    /// The decoded picture, which is encoded again.
    Picture(PictureUpscaler),
}

impl Default for Upscaler {
    fn default() -> Self {
        Self::Latent(LatentUpscaler::default())
    }
}

impl Upscaler {
    /// The names of those that need no file, those of latents first.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        let pictures = PictureUpscaler::BUILT_IN.iter().map(PictureUpscaler::title);
        LATENT.iter().map(|row| row.1).chain(pictures)
    }

    /// AUTOMATIC1111's name, or that of a file.
    pub fn title(&self) -> &str {
        match self {
            Self::Latent(upscaler) => upscaler.title(),
            Self::Picture(upscaler) => upscaler.title(),
        }
    }
}

impl From<&str> for Upscaler {
    /// A name that is not built in is that of a file.
    fn from(name: &str) -> Self {
        match name.parse() {
            Ok(upscaler) => Self::Latent(upscaler),
            Err(()) => Self::Picture(name.into()),
        }
    }
}

/// How a picture is upscaled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PictureUpscaler {
    /// Not by itself: AUTOMATIC1111 resizes with Lanczos' filter.
    None,
    /// By Lanczos' filter, as Pillow.
    Lanczos,
    /// By nearest neighbours, as Pillow.
    Nearest,
    /// By the network of a file of this name.
    File(Arc<str>),
}

impl PictureUpscaler {
    /// Those that need no file.
    pub const BUILT_IN: [Self; 3] = [Self::None, Self::Lanczos, Self::Nearest];

    /// AUTOMATIC1111's name, or that of the file.
    pub fn title(&self) -> &str {
        match self {
            Self::None => "None",
            Self::Lanczos => "Lanczos",
            Self::Nearest => "Nearest",
            Self::File(name) => name,
        }
    }

    /// The name of its file, if it needs one.
    pub fn file(&self) -> Option<&str> {
        match self {
            Self::File(name) => Some(name),
            _ => None,
        }
    }
}

impl From<&str> for PictureUpscaler {
    fn from(name: &str) -> Self {
        let mut built_in = Self::BUILT_IN.into_iter();
        let known = built_in.find(|upscaler| upscaler.title().eq_ignore_ascii_case(name));
        known.unwrap_or_else(|| Self::File(name.into()))
    }
}

impl fmt::Display for PictureUpscaler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

/// AUTOMATIC1111's names of Real-ESRGAN's networks, and those of their files.
pub const REAL_ESRGAN: &[(&str, &str)] = &[
    ("R-ESRGAN General 4xV3", "realesr-general-x4v3"),
    ("R-ESRGAN General WDN 4xV3", "realesr-general-wdn-x4v3"),
    ("R-ESRGAN AnimeVideo", "realesr-animevideov3"),
    ("R-ESRGAN 4x+", "RealESRGAN_x4plus"),
    ("R-ESRGAN 4x+ Anime6B", "RealESRGAN_x4plus_anime_6B"),
    ("R-ESRGAN 2x+", "RealESRGAN_x2plus"),
];

/// How latents are upscaled: the modes of torch's `interpolate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LatentUpscaler {
    /// `bilinear`
    #[default]
    Bilinear,
    /// `bilinear`, antialiased
    BilinearAntialiased,
    /// `bicubic`
    Bicubic,
    /// `bicubic`, antialiased
    BicubicAntialiased,
    /// `nearest`
    Nearest,
    /// `nearest-exact`
    NearestExact,
}

/// One row per upscaler: AUTOMATIC1111's name.
const LATENT: [(LatentUpscaler, &str); 6] = [
    (LatentUpscaler::Bilinear, "Latent"),
    (LatentUpscaler::BilinearAntialiased, "Latent (antialiased)"),
    (LatentUpscaler::Bicubic, "Latent (bicubic)"),
    (LatentUpscaler::BicubicAntialiased, "Latent (bicubic antialiased)"),
    (LatentUpscaler::Nearest, "Latent (nearest)"),
    (LatentUpscaler::NearestExact, "Latent (nearest-exact)"),
];

impl LatentUpscaler {
    /// Every upscaler of latents.
    pub fn all() -> impl Iterator<Item = Self> {
        LATENT.iter().map(|row| row.0)
    }

    /// AUTOMATIC1111's name.
    pub fn title(self) -> &'static str {
        let row = LATENT.iter().find(|row| row.0 == self);
        row.expect("every variant has a row; a test walks them").1
    }
}

impl FromStr for LatentUpscaler {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let row = LATENT.iter().find(|row| row.1.eq_ignore_ascii_case(name));
        row.map(|row| row.0).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_title_of_an_upscaler_finds_it() {
        for upscaler in LatentUpscaler::all() {
            let title = upscaler.title().to_lowercase();
            assert_eq!(Upscaler::from(&*title), Upscaler::Latent(upscaler));
        }
        for upscaler in PictureUpscaler::BUILT_IN {
            let title = upscaler.title().to_lowercase();
            assert_eq!(Upscaler::from(&*title), Upscaler::Picture(upscaler));
        }
        let file = Upscaler::Picture(PictureUpscaler::File("4x-Anime".into()));
        assert_eq!(Upscaler::from("4x-Anime"), file);
    }
}
