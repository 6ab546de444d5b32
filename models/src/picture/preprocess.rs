//! Preprocessors of control pictures: what a ControlNet was trained to see, out of a picture.
//!
//! Those that are pure arithmetic. The others (depth, poses, lines, ...) are networks of their own.
//! Reference: OpenCV 4 `modules/imgproc/src/canny.cpp`, and for the names and the threshold the
//! A1111 extension sd-webui-controlnet.

use std::str::FromStr;

use super::rgb::Rgb;

/// Tangent of 22.5 degrees, with [`SHIFT`] fractional bits.
const TAN_22: i64 = 13_573;
const SHIFT: u32 = 15;

/// What is done with a control picture before a ControlNet sees it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Preprocessor {
    /// Nothing.
    #[default]
    None,
    /// Edges: white on black. A pixel whose gradient is above `high` begins an edge, one above
    /// `low` continues it. Gradients are `|dx| + |dy|` of OpenCV's 3x3 Sobel filter.
    Canny {
        /// Gradient that continues an edge.
        low: f64,
        /// Gradient that begins an edge.
        high: f64,
    },
    /// 255 minus every byte.
    Invert,
    /// White where every channel is above the threshold, else black.
    Threshold {
        /// The threshold.
        above: f64,
    },
}

/// Defaults of [`Preprocessor::Canny`]: the extension's.
pub const CANNY: (f64, f64) = (100.0, 200.0);

/// Default of [`Preprocessor::Threshold`]: the extension's.
pub const THRESHOLD: f64 = 127.0;

/// Names of the extension, and what stands for it here.
const NAMES: [(&str, Preprocessor); 5] = [
    ("none", Preprocessor::None),
    ("canny", Preprocessor::Canny { low: CANNY.0, high: CANNY.1 }),
    ("invert", Preprocessor::Invert),
    ("invert (from white bg & black line)", Preprocessor::Invert),
    ("threshold", Preprocessor::Threshold { above: THRESHOLD }),
];

impl Preprocessor {
    /// The names, each once.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ["none", "canny", "invert", "threshold"].into_iter()
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Canny { .. } => "canny",
            Self::Invert => "invert",
            Self::Threshold { .. } => "threshold",
        }
    }

    /// The picture that a ControlNet sees, in the same size.
    pub fn apply(self, picture: &Rgb) -> Rgb {
        let Rgb { width, height, .. } = *picture;
        let data = match self {
            Self::None => picture.data.clone(),
            Self::Invert => picture.data.iter().map(|byte| 255 - byte).collect(),
            Self::Threshold { above } => {
                let least = |pixel: &[u8]| f64::from(pixel.iter().copied().min().unwrap_or(0));
                let pixels = picture.data.chunks_exact(3);
                pixels.flat_map(|pixel| [if least(pixel) > above { 255 } else { 0 }; 3]).collect()
            }
            Self::Canny { low, high } => {
                canny(picture, low, high).into_iter().flat_map(|byte| [byte; 3]).collect()
            }
        };
        Rgb { width, height, data }
    }
}

impl FromStr for Preprocessor {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let row = NAMES.iter().find(|row| row.0.eq_ignore_ascii_case(name.trim()));
        row.map(|row| row.1).ok_or_else(|| {
            let known = Self::names().collect::<Vec<_>>().join(", ");
            format!(
                "{name:?} is not supported (known are {known}): give the picture that it would \
                 make, with the preprocessor none"
            )
        })
    }
}

/// Whether a pixel is on an edge.
#[derive(Clone, Copy, PartialEq)]
enum Mark {
    Off,
    /// If an edge leads to it.
    Perhaps,
    On,
}

/// `cv2.Canny(picture, low, high)` of an RGB picture: a byte a pixel, 255 on edges, else 0. Of the
/// channels, that with the largest gradient counts.
fn canny(picture: &Rgb, low: f64, high: f64) -> Vec<u8> {
    let Rgb { width, height, .. } = *picture;
    let (low, high) = if low > high { (high, low) } else { (low, high) };
    let (low, high) = (low.floor() as i32, high.floor() as i32);
    let gradients = Gradients::of(picture);
    let mut marks = vec![Mark::Off; width * height];
    let mut edge = Vec::new();
    for y in 0..height {
        for x in 0..width {
            let at = y * width + x;
            let norm = gradients.norm(x as isize, y as isize);
            if norm > low && gradients.is_ridge(x, y) {
                marks[at] = Mark::Perhaps;
                if norm > high {
                    marks[at] = Mark::On;
                    edge.push((x, y));
                }
            }
        }
    }
    // Along the edges.
    while let Some((x, y)) = edge.pop() {
        for y in y.saturating_sub(1)..(y + 2).min(height) {
            for x in x.saturating_sub(1)..(x + 2).min(width) {
                let mark = &mut marks[y * width + x];
                if *mark == Mark::Perhaps {
                    *mark = Mark::On;
                    edge.push((x, y));
                }
            }
        }
    }
    marks.into_iter().map(|mark| if mark == Mark::On { 255 } else { 0 }).collect()
}

/// The gradient of each pixel, of its strongest channel.
struct Gradients {
    width: usize,
    height: usize,
    /// Along the row, and down the column.
    of_pixels: Vec<[i16; 2]>,
}

impl Gradients {
    /// By the 3x3 Sobel filter, with the border pixels repeated outside of the picture.
    fn of(picture: &Rgb) -> Self {
        let Rgb { width, height, ref data } = *picture;
        let mut of_pixels = Vec::with_capacity(width * height);
        for y in 0..height {
            let rows = [y.saturating_sub(1), y, (y + 1).min(height - 1)].map(|y| 3 * y * width);
            for x in 0..width {
                let columns = [x.saturating_sub(1), x, (x + 1).min(width - 1)].map(|x| 3 * x);
                let sobel = |channel: usize| {
                    let value =
                        |i: usize, j: usize| i16::from(data[rows[i] + columns[j] + channel]);
                    let across = |i: usize| value(i, 2) - value(i, 0);
                    let down = |j: usize| value(2, j) - value(0, j);
                    let weighted = |line: &dyn Fn(usize) -> i16| line(0) + 2 * line(1) + line(2);
                    [weighted(&across), weighted(&down)]
                };
                // Of equal ones the first.
                let [red, green, blue] = [0, 1, 2].map(sobel);
                let stronger = |a, b| if norm(b) > norm(a) { b } else { a };
                of_pixels.push(stronger(stronger(red, green), blue));
            }
        }
        Self { width, height, of_pixels }
    }

    /// The norm of a pixel's gradient; 0 outside of the picture.
    fn norm(&self, x: isize, y: isize) -> i32 {
        let inside = |at: isize, side: usize| usize::try_from(at).ok().filter(|at| *at < side);
        match (inside(x, self.width), inside(y, self.height)) {
            (Some(x), Some(y)) => norm(self.of_pixels[y * self.width + x]),
            _ => 0,
        }
    }

    /// Whether a pixel's gradient is larger than that of both neighbours in its direction, of the
    /// four there are.
    fn is_ridge(&self, x: usize, y: usize) -> bool {
        let [dx, dy] = self.of_pixels[y * self.width + x];
        let (x, y) = (x as isize, y as isize);
        let at = |right: isize, down: isize| self.norm(x + right, y + down);
        let own = at(0, 0);
        let across = i64::from(dx.unsigned_abs()) * TAN_22;
        let down = i64::from(dy.unsigned_abs()) << SHIFT;
        // Beyond 22.5 degrees, and beyond 67.5.
        if down < across {
            return own > at(-1, 0) && own >= at(1, 0);
        }
        if down > across + (i64::from(dx.unsigned_abs()) << (SHIFT + 1)) {
            return own > at(0, -1) && own >= at(0, 1);
        }
        let side = if (dx ^ dy) < 0 { -1 } else { 1 };
        own > at(-side, -1) && own > at(side, 1)
    }
}

fn norm([dx, dy]: [i16; 2]) -> i32 {
    i32::from(dx).abs() + i32::from(dy).abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_inverted_and_cut_at_the_threshold() {
        let picture = Rgb { width: 2, height: 1, data: vec![0, 127, 255, 128, 200, 128] };
        let of = |name: &str| name.parse::<Preprocessor>().map(|p| p.apply(&picture).data);
        assert_eq!(of("None"), Ok(picture.data.clone()));
        assert_eq!(of("invert"), Ok(vec![255, 128, 0, 127, 55, 127]));
        assert_eq!(of(" threshold"), Ok(vec![0, 0, 0, 255, 255, 255]));
        let refusal = of("depth_midas").expect_err("a network");
        assert!(refusal.contains("none, canny, invert, threshold"), "{refusal}");
    }

    #[test]
    fn every_name_is_that_of_its_preprocessor() {
        for name in Preprocessor::names() {
            assert_eq!(name.parse::<Preprocessor>().map(Preprocessor::name), Ok(name));
        }
    }
}
