//! Implicit im2col: the receptive fields of a convolution as the rows of a matrix, gathered while
//! they are packed. Padding, stride, concatenation and nearest-neighbour resizing exist only as
//! addresses.

use super::product::Rows;
use crate::ops::types::Geometry;

/// Rows and columns after the padding that a kernel of several outputs at once may read.
pub(super) const OVERREAD: usize = 3;

/// The receptive fields of a convolution, one row for each output pixel.
pub(super) struct ReceptiveFields<'a> {
    /// Images (B, H, W, C1), and C1.
    first: (&'a [f32], usize),
    /// Images (B, H, W, C2) whose channels follow, and C2, which may be 0.
    second: (&'a [f32], usize),
    /// H and W.
    image: (usize, usize),
    /// Height and width of the output.
    pub(super) output: (usize, usize),
    geometry: Geometry,
    /// The row and the column of the image for each row and column of the padded and resized one;
    /// `None` is padding.
    sources: (Vec<Option<usize>>, Vec<Option<usize>>),
    /// A pixel of the padding.
    zeros: Vec<f32>,
}

/// Where a receptive field begins: sample, row and column.
type Corner = (usize, usize, usize);

impl<'a> ReceptiveFields<'a> {
    /// Of images (B, H, W, C) of one size, `resized` (height, width) by nearest neighbours.
    pub(super) fn new(
        first: (&'a [f32], usize),
        second: (&'a [f32], usize),
        image: (usize, usize),
        resized: (usize, usize),
        geometry: Geometry,
    ) -> Self {
        let sources = |side: usize, resized: usize| {
            let inside = |at: usize| at.checked_sub(geometry.before).filter(|at| *at < resized);
            let padded = geometry.before + resized + geometry.after + OVERREAD;
            (0..padded).map(|at| inside(at).map(|at| at * side / resized)).collect()
        };
        Self {
            first,
            second,
            image,
            output: (geometry.output(resized.0), geometry.output(resized.1)),
            geometry,
            sources: (sources(image.0, resized.0), sources(image.1, resized.1)),
            zeros: vec![0.0; first.1.max(second.1)],
        }
    }

    /// C1 + C2.
    pub(super) fn channels(&self) -> usize {
        self.first.1 + self.second.1
    }

    /// The channels of a pixel of the padded and resized image, where there is no second one.
    pub(super) fn input(&self, at: Corner) -> &[f32] {
        self.part(self.first, at)
    }

    /// The channels of a pixel in one of the two.
    fn part<'p>(&'p self, (data, channels): (&'p [f32], usize), at: Corner) -> &'p [f32] {
        let (sample, y, x) = at;
        let (Some(y), Some(x)) = (self.sources.0[y], self.sources.1[x]) else {
            return &self.zeros[..channels];
        };
        let (h, w) = self.image;
        &data[((sample * h + y) * w + x) * channels..][..channels]
    }
}

impl Rows for ReceptiveFields<'_> {
    type Place = Corner;

    fn place(&self, row: usize) -> Corner {
        let (rows, columns) = self.output;
        let (sample, place) = (row / (rows * columns), row % (rows * columns));
        let stride = self.geometry.stride;
        (sample, place / columns * stride, place % columns * stride)
    }

    fn runs<const N: usize>(&self, places: &[Corner; N], k: usize) -> [&[f32]; N] {
        let (tap, channel) = (k / self.channels(), k % self.channels());
        let (dy, dx) = (tap / self.geometry.kernel, tap % self.geometry.kernel);
        let (part, channel) = match channel.checked_sub(self.first.1) {
            None => (self.first, channel),
            Some(channel) => (self.second, channel),
        };
        places.map(|(sample, y, x)| &self.part(part, (sample, y + dy, x + dx))[channel..])
    }
}
