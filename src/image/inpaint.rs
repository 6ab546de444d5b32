//! Inpainting as AUTOMATIC1111 does it: the mask is blurred, the masked area may alone be generated
//! and may begin as something else than the image, and the result is laid below the unmasked part of
//! the image. Byte arithmetic as in Pillow, which it uses.

use image::{DynamicImage, GrayImage, Rgba, RgbaImage};
use sd_models::{Rgb, Size};

use super::fit::{Fit, fitted};
use super::gaussian::{blur_mask, blur_pixels};

/// The options of a mask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InpaintOptions {
    /// Standard deviation of the mask's blur, in pixels of the mask.
    pub blur: f64,
    /// Pixels around the masked area that are generated with it; none generates the whole image.
    pub only_masked: Option<u32>,
    /// Whether the masked area begins as the colours around it.
    pub fill: bool,
}

/// What is generated, and what is laid over it.
pub struct Inpainting {
    /// The image of the generated area.
    pub picture: Rgb,
    /// Its mask: one byte for each pixel, alike in each square that is one latent.
    pub mask: Vec<u8>,
    /// What is laid over the result.
    pub overlay: Overlay,
}

/// The unmasked part of an image, which is transparent where it is masked.
#[derive(Debug, Clone)]
pub struct Overlay {
    image: RgbaImage,
    /// The generated area of it; none is all of it.
    area: Option<Area>,
}

/// An area in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    left: u32,
    top: u32,
    width: u32,
    height: u32,
}

impl Inpainting {
    /// Prepares an opaque `image` for the size in which it is generated, where `mask` is white. None
    /// if nothing is masked, where only the masked area was to be generated.
    pub fn new(
        image: &DynamicImage,
        mask: &GrayImage,
        size: Size,
        fit: Fit,
        options: InpaintOptions,
    ) -> Option<Self> {
        let sides = (size.width() as u32, size.height() as u32);
        let (mask, blur) = bounded(mask, options.blur);
        let mask = blur_mask(&mask, blur);
        let (image, mask, area) = match options.only_masked {
            None => (fitted(image, sides, fit), resized_mask(&mask, sides, fit), None),
            Some(padding) => {
                let whole = (image.width(), image.height());
                let mask = resized_mask(&mask, whole, Fit::Stretch);
                let area = masked_area(&mask, padding)?.in_proportions(sides, whole);
                (image.clone(), mask, Some(area))
            }
        };
        // A mask that was blurred in its own size covers twice as much of the image.
        let shown = |value: u8| if area.is_some() { value } else { value.saturating_mul(2) };
        let overlay = unmasked(&image, |x, y| shown(mask.get_pixel(x, y).0[0]));
        let (image, mask) = match area {
            None => (image, mask),
            Some(area) => (
                fitted(&area.of(&image), sides, Fit::Pad),
                fitted(&area.of(&DynamicImage::from(mask)), sides, Fit::Pad).into_luma8(),
            ),
        };
        let image = if options.fill { filled(&image, &mask) } else { image };
        let picture =
            Rgb { width: size.width(), height: size.height(), data: image.into_rgb8().into_raw() };
        Some(Self { picture, mask: latent_mask(&mask), overlay: Overlay { image: overlay, area } })
    }
}

impl Overlay {
    /// Width and height of the result, in pixels.
    pub fn sides(&self) -> [usize; 2] {
        [self.image.width() as usize, self.image.height() as usize]
    }

    /// Memory that it takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.image.len()
    }

    /// A control picture of the whole image where only an area is generated: that area of it, in the
    /// size in which it is generated. None where all is.
    pub fn cropped(&self, control: &DynamicImage, size: Size, fit: Fit) -> Option<DynamicImage> {
        let area = self.area?;
        let whole = fitted(control, self.image.dimensions(), fit);
        let sides = (size.width() as u32, size.height() as u32);
        Some(fitted(&area.of(&whole), sides, Fit::Pad))
    }

    /// The result: a generated image below the overlay.
    pub fn over(&self, generated: &Rgb) -> Rgb {
        let (width, height) = self.image.dimensions();
        let raw = (generated.width as u32, generated.height as u32, generated.data.clone());
        let below = image::RgbImage::from_raw(raw.0, raw.1, raw.2).unwrap_or_default();
        let below = DynamicImage::from(below);
        let below = match self.area {
            None => below.into_rgba8(),
            Some(area) => {
                let below = fitted(&below, (area.width, area.height), Fit::Crop).into_rgba8();
                let mut whole = RgbaImage::new(width, height);
                image::imageops::replace(&mut whole, &below, area.left.into(), area.top.into());
                whole
            }
        };
        let pixels = below.pixels().zip(self.image.pixels());
        let data = pixels.flat_map(|(below, above)| {
            let [red, green, blue, _] = composite(below.0, above.0);
            [red, green, blue]
        });
        Rgb { width: width as usize, height: height as usize, data: data.collect() }
    }
}

impl Area {
    /// The area around this one that has the proportions of a size, as far as the image has room.
    fn in_proportions(self, (width, height): (u32, u32), (w, h): (u32, u32)) -> Self {
        let ratio = f64::from(width) / f64::from(height);
        let mut area = self;
        if f64::from(self.width) / f64::from(self.height) > ratio {
            let wanted = f64::from(self.width) / ratio;
            (area.top, area.height) = widened(self.top, self.height, wanted as u32, h);
        } else {
            let wanted = f64::from(self.height) * ratio;
            (area.left, area.width) = widened(self.left, self.width, wanted as u32, w);
        }
        area
    }

    fn of(self, image: &DynamicImage) -> DynamicImage {
        image.crop_imm(self.left, self.top, self.width, self.height)
    }
}

/// The begin and length of a part of a side, made `wanted` long evenly, and moved where it would go
/// beyond an end.
fn widened(begin: u32, length: u32, wanted: u32, side: u32) -> (u32, u32) {
    let more = wanted.saturating_sub(length);
    let side = i64::from(side);
    let begin = i64::from(begin) - i64::from(more / 2);
    let end = begin + i64::from(length + more);
    let over = (end - side).max(0);
    let begin = (begin - over).max(0);
    let end = (begin + i64::from(length + more)).min(side);
    (begin as u32, (end - begin) as u32)
}

/// The smallest area of a mask that is not black, with so many pixels around it.
fn masked_area(mask: &GrayImage, padding: u32) -> Option<Area> {
    let masked = || mask.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] > 0);
    let (left, right) = (masked().map(|p| p.0).min()?, masked().map(|p| p.0).max()? + 1);
    let (top, bottom) = (masked().map(|p| p.1).min()?, masked().map(|p| p.1).max()? + 1);
    let (left, top) = (left.saturating_sub(padding), top.saturating_sub(padding));
    let right = right.saturating_add(padding).min(mask.width());
    let bottom = bottom.saturating_add(padding).min(mask.height());
    Some(Area { left, top, width: right - left, height: bottom - top })
}

/// A mask of not too many pixels for its blur, and the blur for it.
fn bounded(mask: &GrayImage, blur: f64) -> (GrayImage, f64) {
    const MAX_PIXELS: f64 = 4.0 * 1024.0 * 1024.0;
    let (width, height) = mask.dimensions();
    let scale = (MAX_PIXELS / (f64::from(width) * f64::from(height))).sqrt();
    if scale >= 1.0 {
        return (mask.clone(), blur);
    }
    let side = |side: u32| ((f64::from(side) * scale) as u32).max(1);
    (resized_mask(mask, (side(width), side(height)), Fit::Stretch), blur * scale)
}

fn resized_mask(mask: &GrayImage, sides: (u32, u32), fit: Fit) -> GrayImage {
    fitted(&DynamicImage::from(mask.clone()), sides, fit).into_luma8()
}

/// The mask of each latent, repeated for its pixels.
fn latent_mask(mask: &GrayImage) -> Vec<u8> {
    const SCALE: u32 = 8;
    let (width, height) = mask.dimensions();
    let filter = image::imageops::FilterType::CatmullRom;
    let latents = image::imageops::resize(mask, width / SCALE, height / SCALE, filter);
    let value = |x: u32, y: u32| if latents.get_pixel(x, y).0[0] >= 128 { 255 } else { 0 };
    (0..height).flat_map(|y| (0..width).map(move |x| value(x / SCALE, y / SCALE))).collect()
}

/// An image that is transparent where it is masked.
fn unmasked(image: &DynamicImage, mask: impl Fn(u32, u32) -> u8) -> RgbaImage {
    let mut image = image.to_rgba8();
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        pixel.0 = divided(multiplied(pixel.0, 255 - mask(x, y)));
    }
    image
}

/// An image whose masked area has the colours around it: the unmasked part, blurred less and less,
/// laid on each other.
fn filled(image: &DynamicImage, mask: &GrayImage) -> DynamicImage {
    const LAYERS: [(f64, usize); 6] =
        [(256.0, 1), (64.0, 1), (16.0, 2), (4.0, 4), (2.0, 2), (0.0, 1)];
    let image = image.to_rgba8();
    let (width, height) = image.dimensions();
    let pixels = image.pixels().zip(mask.pixels());
    let part: Vec<[u8; 4]> =
        pixels.map(|(pixel, mask)| multiplied(pixel.0, 255 - mask.0[0])).collect();
    let mut filled = vec![[0; 4]; part.len()];
    for (radius, repeats) in LAYERS {
        let mut layer = part.clone();
        blur_pixels(&mut layer, width as usize, radius);
        for (below, above) in filled.iter_mut().zip(layer) {
            let above = divided(above);
            (0..repeats).for_each(|_| *below = composite(*below, above));
        }
    }
    RgbaImage::from_fn(width, height, |x, y| {
        let [red, green, blue, _] = filled[(y * width + x) as usize];
        Rgba([red, green, blue, u8::MAX])
    })
    .into()
}

/// An opaque pixel pasted with a mask, its colours multiplied by the alpha.
fn multiplied([red, green, blue, alpha]: [u8; 4], mask: u8) -> [u8; 4] {
    let times = |value: u8| div255(u32::from(value) * u32::from(mask)) as u8;
    [times(red), times(green), times(blue), times(alpha)]
}

/// The pixel's own colours.
fn divided(pixel: [u8; 4]) -> [u8; 4] {
    let [red, green, blue, alpha] = pixel;
    if alpha == 0 || alpha == u8::MAX {
        return pixel;
    }
    let own = |value: u8| (255 * u32::from(value) / u32::from(alpha)).min(255) as u8;
    [own(red), own(green), own(blue), alpha]
}

/// A pixel laid over another.
fn composite(below: [u8; 4], above: [u8; 4]) -> [u8; 4] {
    /// Bits of precision beyond the byte.
    const PRECISION: u32 = 7;
    let [a, b] = [above[3], below[3]].map(u32::from);
    if a == 0 {
        return below;
    }
    let all = a * 255 + b * (255 - a);
    let over = a * 255 * 255 * (1 << PRECISION) / all;
    let under = 255 * (1 << PRECISION) - over;
    let mixed = |k: usize| {
        let sum = u32::from(above[k]) * over + u32::from(below[k]) * under;
        (shift255(sum + (0x80 << PRECISION)) >> PRECISION) as u8
    };
    [mixed(0), mixed(1), mixed(2), shift255(all + 0x80) as u8]
}

/// A rounded division by 255.
fn div255(value: u32) -> u32 {
    shift255(value + 128)
}

fn shift255(value: u32) -> u32 {
    ((value >> 8) + value) >> 8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `make_masks.py` with Pillow and OpenCV.
    fn file(name: &str) -> DynamicImage {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures/masks/");
        image::open(format!("{folder}{name}.png")).expect("a picture")
    }

    /// The largest difference of two lists of bytes.
    fn off(found: &[u8], expected: &[u8]) -> u8 {
        assert_eq!(found.len(), expected.len());
        found.iter().zip(expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0)
    }

    #[test]
    fn masks_are_blurred_as_by_opencv() {
        let mask = file("mask").into_luma8();
        for (sigma, name) in [(1.5, "blurred-1.5"), (4.0, "blurred-4"), (20.0, "blurred-20")] {
            let blurred = blur_mask(&mask, sigma);
            assert_eq!(off(&blurred, &file(name).into_luma8()), 0, "{name}");
        }
        assert_eq!(blur_mask(&mask, 0.0), mask);
    }

    #[test]
    fn a_masked_area_is_filled_as_by_pillow() {
        let filled = filled(&file("image"), &file("blurred-4").into_luma8()).into_rgb8();
        assert_eq!(off(&filled, &file("filled").into_rgb8()), 0);
    }

    #[test]
    fn a_result_lies_below_the_unmasked_part() {
        let (mask, size) = (file("mask").into_luma8(), Size::new(64, 48).expect("a size"));
        let options = InpaintOptions { blur: 4.0, only_masked: None, fill: false };
        let whole = Inpainting::new(&file("image"), &mask, size, Fit::Stretch, options);
        let whole = whole.expect("a mask");
        let generated = file("generated").into_rgb8();
        let (width, height) = (generated.width() as usize, generated.height() as usize);
        let generated = Rgb { width, height, data: generated.into_raw() };
        let over = whole.overlay.over(&generated);
        assert_eq!(off(&over.data, &file("over").into_rgb8()), 0);
        assert_eq!(off(&whole.mask, &file("latents").into_luma8()), 0);

        let options = InpaintOptions { only_masked: Some(3), ..options };
        let part = Inpainting::new(&file("image"), &mask, size, Fit::Stretch, options);
        let part = part.expect("a mask");
        let area = part.overlay.area.expect("an area");
        let expected = std::fs::read_to_string(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/pictures/masks/area.txt"
        ));
        let found = format!("{} {} {} {}", area.left, area.top, area.width, area.height);
        assert_eq!(found, expected.expect("a text").trim());
        let over = part.overlay.over(&generated);
        assert_eq!((over.width, over.height), (64, 48));
        let image = file("image").into_rgb8();
        assert_eq!(over.data[..3], image.as_raw()[..3], "what is not masked is kept");

        let black = GrayImage::new(64, 48);
        assert!(Inpainting::new(&file("image"), &black, size, Fit::Stretch, options).is_none());
    }

    #[test]
    fn an_area_gets_the_proportions_of_its_size_where_there_is_room() {
        let area = |left, top, width, height| Area { left, top, width, height };
        let table = [
            (area(40, 0, 16, 32), (64, 64), (100, 100), area(32, 0, 32, 32)),
            (area(0, 40, 32, 16), (64, 64), (100, 100), area(0, 32, 32, 32)),
            (area(90, 10, 10, 40), (64, 64), (100, 100), area(60, 10, 40, 40)),
            (area(0, 0, 100, 10), (64, 64), (100, 30), area(0, 0, 100, 30)),
            (area(1, 2, 3, 4), (96, 128), (9, 9), area(1, 2, 3, 4)),
        ];
        for (small, size, image, large) in table {
            assert_eq!(small.in_proportions(size, image), large, "{small:?}");
        }
    }
}
