//! Control pictures as AUTOMATIC1111's extension makes them: the preprocessor works at a resolution
//! of its own, and the map that it makes is fitted to the images by what it is.
//!
//! Reference: sd-webui-controlnet 1.1.455 `resize_image_with_pad` and `detectmap_proc`, with OpenCV's
//! resizing. Other than there, lines of one pixel are not thinned, and the threshold of a cropped map
//! of black and white is that of what is left of it.

use std::ops::Range;

use image::{DynamicImage, GenericImageView as _, RgbImage};
use sd_models::{Interpolation, Preprocessor, Rgb, Size, otsu};

use super::fit::Fit;

/// The preprocessors' pictures have sides that are multiples of this.
const MULTIPLE: u32 = 64;

/// A picture of fewer colours is one of areas, whose colours have a meaning.
const FEW_COLOURS: usize = 200;

/// What a preprocessor makes of a picture.
pub struct ControlMap(RgbImage);

/// The RGB pixels of an image. Transparency is ignored.
pub fn rgb(image: &DynamicImage) -> Rgb {
    let image = image.to_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    Rgb { width, height, data: image.into_raw() }
}

/// The image of RGB pixels.
pub fn of_rgb(Rgb { width, height, data }: Rgb) -> DynamicImage {
    RgbImage::from_raw(width as u32, height as u32, data).unwrap_or_default().into()
}

/// The shorter side of an image when it fills a size.
pub fn pixel_perfect(image: &DynamicImage, size: Size, fit: Fit) -> usize {
    let (width, height) = (f64::from(image.width()), f64::from(image.height()));
    let (across, down) = (size.width() as f64 / width, size.height() as f64 / height);
    let scale = if fit == Fit::Pad { across.min(down) } else { across.max(down) };
    (scale * width.min(height)).round_ties_even() as usize
}

/// Checks that a picture of these sides has at most `most` pixels, where a preprocessor makes
/// something of it in its own size. The error reads on from the picture's name.
pub fn check_own_size(
    image: &DynamicImage,
    preprocessor: Preprocessor,
    most: usize,
) -> Result<(), String> {
    let ((width, height), name) = (image.dimensions(), preprocessor.name());
    if area((width, height)) > most {
        return Err(format!(
            "is {width}x{height}; at most {most} pixels are processed by the preprocessor {name}"
        ));
    }
    Ok(())
}

/// The sides of a picture whose shorter side is made `shorter` pixels long, and those of the picture
/// that a preprocessor of the extension sees.
fn sides((width, height): (u32, u32), shorter: usize) -> [(u32, u32); 2] {
    let scale = shorter.max(1) as f64 / f64::from(width.min(height).max(1));
    let side = |side: u32| ((f64::from(side) * scale).round_ties_even() as u32).max(1);
    let padded = |side: u32| side.checked_next_multiple_of(MULTIPLE).unwrap_or(side);
    let (width, height) = (side(width), side(height));
    [(width, height), (padded(width), padded(height))]
}

/// The number of pixels of an image of these sides.
fn area((width, height): (u32, u32)) -> usize {
    (width as usize).saturating_mul(height as usize)
}

/// The number of pixels that a preprocessor of the extension sees of a picture of these sides.
pub fn processed(own: (u32, u32), preprocessor: Preprocessor, shorter: usize) -> usize {
    match preprocessor {
        Preprocessor::None | Preprocessor::Invert => area(own),
        Preprocessor::Canny { .. } | Preprocessor::Threshold { .. } => area(sides(own, shorter)[1]),
    }
}

impl ControlMap {
    /// What a preprocessor makes of a picture whose shorter side is made `shorter` pixels long, if
    /// it has at most `most` pixels then, with those that make its sides multiples. None and invert
    /// work in its own size, of any number of pixels. The error reads on from the picture's name.
    pub fn new(
        image: &DynamicImage,
        preprocessor: Preprocessor,
        shorter: usize,
        most: usize,
    ) -> Result<Self, String> {
        if matches!(preprocessor, Preprocessor::None | Preprocessor::Invert) {
            return Ok(Self(of_rgb(preprocessor.apply(&rgb(image))).into_rgb8()));
        }
        let [(width, height), padded] = sides(image.dimensions(), shorter);
        if area(padded) > most {
            let (name, (w, h)) = (preprocessor.name(), padded);
            return Err(format!(
                "is {w}x{h} at the resolution of {name}; at most {most} pixels are processed"
            ));
        }
        let how = match shorter > image.width().min(image.height()) as usize {
            true => Interpolation::Cubic,
            false => Interpolation::Area,
        };
        let resized = how.resize(&rgb(image), (width as usize, height as usize));
        let resized = of_rgb(resized).into_rgb8();
        let continued = RgbImage::from_fn(padded.0, padded.1, |x, y| {
            *resized.get_pixel(x.min(width - 1), y.min(height - 1))
        });
        let made = of_rgb(preprocessor.apply(&rgb(&continued.into())));
        Ok(Self(made.crop_imm(0, 0, width, height).into_rgb8()))
    }

    /// The map itself.
    pub fn whole(self) -> RgbImage {
        self.0
    }

    /// The map in the size of the images.
    pub fn fitted(&self, size: Size, fit: Fit) -> Rgb {
        let Self(map) = self;
        let (width, height) = (size.width(), size.height());
        let (w, h) = (f64::from(map.width()), f64::from(map.height()));
        let (across, down) = (width as f64 / w, height as f64 / h);
        let scaled =
            |scale: f64| [w, h].map(|side| ((side * scale).round_ties_even() as usize).max(1));
        match fit {
            Fit::Stretch => self.resized((width, height), [0..width, 0..height]),
            Fit::Crop => {
                let [wide, high] = scaled(across.max(down));
                // Only what is left is computed: what is cut off takes no memory.
                let middle = |whole: usize, side: usize| {
                    let first = whole.saturating_sub(side) / 2;
                    first..(first + side).min(whole)
                };
                self.resized((wide, high), [middle(wide, width), middle(high, height)])
            }
            Fit::Pad => {
                let [wide, high] = scaled(across.min(down));
                let inner = of_rgb(self.resized((wide, high), [0..wide, 0..high])).into_rgb8();
                let mut outer = RgbImage::from_pixel(width as u32, height as u32, self.border());
                let middle = |outer: u32, inner: u32| (i64::from(outer) - i64::from(inner)) / 2;
                let left = middle(outer.width(), inner.width());
                let top = middle(outer.height(), inner.height());
                image::imageops::replace(&mut outer, &inner, left, top);
                rgb(&outer.into())
            }
        }
    }

    /// The columns and rows of the map in this size: areas keep their colours, and a map of black and
    /// white stays one.
    fn resized(&self, size: (usize, usize), part: [Range<usize>; 2]) -> Rgb {
        let Self(map) = self;
        let own = area(map.dimensions());
        let mut colours: Vec<_> = Vec::new();
        for pixel in map.pixels() {
            if !colours.contains(pixel) {
                colours.push(*pixel);
                if colours.len() == FEW_COLOURS {
                    break;
                }
            }
        }
        let how = match colours.len() {
            3..FEW_COLOURS => Interpolation::Nearest,
            _ if size.0.saturating_mul(size.1) < own => Interpolation::Area,
            _ => Interpolation::Cubic,
        };
        let map = rgb(&map.clone().into());
        let is_same = (map.width, map.height) == size;
        let mut resized = how.resize_part(&map, size, part);
        let of = |value: fn(&u8) -> bool| colours.iter().any(|colour| colour.0.iter().any(value));
        let is_binary = colours.len() == 2 && of(|byte| *byte < 16) && of(|byte| *byte > 240);
        if is_binary && !is_same {
            let mean = |pixel: &[u8]| pixel.iter().map(|byte| u16::from(*byte)).sum::<u16>() / 3;
            let means: Vec<_> = resized.data.chunks_exact(3).map(|p| mean(p) as u8).collect();
            let threshold = otsu(&means);
            let cut = |mean: u8| [if mean > threshold { 255 } else { 0 }; 3];
            resized.data = means.into_iter().flat_map(cut).collect();
        }
        resized
    }

    /// The median of the pixels at the border, for each channel.
    fn border(&self) -> image::Rgb<u8> {
        let Self(map) = self;
        let (width, height) = map.dimensions();
        let lines = (0..width).flat_map(|x| [(x, 0), (x, height - 1)]);
        let columns = (0..height).flat_map(|y| [(0, y), (width - 1, y)]);
        let pixels: Vec<_> = lines.chain(columns).map(|(x, y)| map.get_pixel(x, y).0).collect();
        let median = |channel: usize| {
            let mut values: Vec<_> = pixels.iter().map(|pixel| pixel[channel]).collect();
            values.sort_unstable();
            let half = values.len() / 2;
            // There are an even number of them.
            ((u16::from(values[half - 1]) + u16::from(values[half])) / 2) as u8
        };
        image::Rgb([0, 1, 2].map(median))
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb as Pixel;

    use super::*;

    fn size(width: usize, height: usize) -> Size {
        Size::new(width, height).expect("multiples of 8")
    }

    #[test]
    fn maps_keep_what_their_colours_mean() {
        // Black and white stay so, and three areas get no fourth colour.
        let edges = RgbImage::from_fn(20, 30, |x, _| Pixel([if x < 9 { 0 } else { 255 }; 3]));
        let map = ControlMap(edges).fitted(size(64, 96), Fit::Stretch);
        assert!(map.data.iter().all(|byte| [0, 255].contains(byte)));
        assert!(map.data.contains(&0) && map.data.contains(&255));
        let areas = RgbImage::from_fn(20, 20, |x, _| Pixel([(x / 7) as u8 * 90, 7, 9]));
        let map = ControlMap(areas.clone()).fitted(size(64, 64), Fit::Crop);
        assert!(
            map.data
                .chunks_exact(3)
                .all(|p| [[0, 7, 9], [90, 7, 9], [180, 7, 9]].contains(&[p[0], p[1], p[2]]))
        );
        // Beside a map of other proportions is the colour of its border.
        let map = ControlMap(RgbImage::from_pixel(10, 20, Pixel([3, 4, 5])));
        assert!(map.fitted(size(64, 64), Fit::Pad).data.chunks_exact(3).all(|p| p == [3, 4, 5]));
    }

    #[test]
    fn thin_maps_take_no_more_memory_than_the_images() {
        // Scaled as a whole, each of these would take gigabytes; with a few colours, with many, and
        // with two.
        let colours: [fn(u32) -> [u8; 3]; 3] = [
            |k| [(k % 3) as u8 * 90, 7, 9],
            |k| [k as u8, (k / 256) as u8, 9],
            |k| [(k % 2) as u8 * 255; 3],
        ];
        for colour in colours {
            for (w, h) in [(1, 32768), (32768, 1)] {
                let map = ControlMap(RgbImage::from_fn(w, h, |x, y| Pixel(colour(x + y))));
                for fit in [Fit::Stretch, Fit::Crop, Fit::Pad] {
                    let fitted = map.fitted(size(512, 512), fit);
                    assert_eq!((fitted.width, fitted.height), (512, 512));
                }
            }
        }
    }

    #[test]
    fn preprocessors_work_at_their_resolution() {
        let image = DynamicImage::from(RgbImage::from_fn(40, 20, |x, _| {
            Pixel([if x < 20 { 9 } else { 222 }; 3])
        }));
        let canny = Preprocessor::Canny { low: 100.0, high: 200.0 };
        assert_eq!(processed((40, 20), canny, 70), 192 * 128);
        assert_eq!(processed((40, 20), Preprocessor::Invert, 70), 800);
        assert_eq!(check_own_size(&image, canny, 800), Ok(()));
        let refused = check_own_size(&image, canny, 799);
        assert!(refused.is_err_and(|reason| reason.starts_with("is 40x20; at most 799")));
        let sides = |preprocessor, most| {
            ControlMap::new(&image, preprocessor, 70, most).map(|map| map.whole().dimensions())
        };
        assert_eq!(sides(canny, 192 * 128), Ok((140, 70)));
        let refused = sides(canny, 192 * 128 - 1);
        assert!(refused.is_err_and(|reason| reason.starts_with("is 192x128 at the resolution")));
        assert_eq!(sides(Preprocessor::Invert, 0), Ok((40, 20)));
        assert_eq!(pixel_perfect(&image, size(80, 80), Fit::Crop), 80);
        assert_eq!(pixel_perfect(&image, size(80, 80), Fit::Pad), 40);
    }
}
