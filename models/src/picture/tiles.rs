//! A picture as tiles that overlap, and the enlarged tiles as a picture again, each blended into
//! those at its left and above.
//!
//! Reference: AUTOMATIC1111's `images.split_grid` and `combine_grid`.

use super::pillow::pasted;
use super::rgb::Rgb;

/// Sides of the tiles and of their overlap in pixels, as AUTOMATIC1111's defaults for ESRGAN.
pub(crate) const TILE: (usize, usize) = (192, 8);

/// The tiles of a picture.
pub(crate) struct Tiles {
    /// Where they begin, from the left and from the top.
    columns: Vec<usize>,
    rows: Vec<usize>,
    /// Their width and height.
    size: (usize, usize),
    overlap: usize,
}

impl Tiles {
    /// Those of a picture of (width, height). One that is no larger than a tile is one tile.
    pub(crate) fn of((width, height): (usize, usize), (tile, overlap): (usize, usize)) -> Self {
        let starts = |side: usize| {
            if side <= tile {
                return vec![0];
            }
            let count = (side - overlap).div_ceil(tile - overlap);
            let step = (side - tile) as f64 / (count - 1).max(1) as f64;
            let start = |i: usize| ((i as f64 * step) as usize).min(side - tile);
            (0..count).map(start).collect()
        };
        let (columns, rows) = (starts(width), starts(height));
        Self { columns, rows, size: (width.min(tile), height.min(tile)), overlap }
    }

    /// Their number.
    pub(crate) fn count(&self) -> usize {
        self.columns.len() * self.rows.len()
    }

    /// The pixels of one of them, row by row.
    pub(crate) fn cut(&self, picture: &Rgb, index: usize) -> Rgb {
        let (left, top) = self.place(index);
        let (width, height) = self.size;
        let row = |y: usize| {
            let from = 3 * (y * picture.width + left);
            &picture.data[from..from + 3 * width]
        };
        Rgb { width, height, data: (top..top + height).flat_map(row).copied().collect() }
    }

    fn place(&self, index: usize) -> (usize, usize) {
        let across = self.columns.len();
        (self.columns[index % across], self.rows[index / across])
    }
}

/// The enlarged tiles, laid over each other one after the other.
pub(crate) struct Canvas {
    picture: Rgb,
    /// The present row of tiles.
    row: Rgb,
    scale: usize,
}

impl Canvas {
    /// For a picture of (width, height), enlarged.
    pub(crate) fn new((width, height): (usize, usize), tiles: &Tiles, scale: usize) -> Self {
        let black = |width, height| Rgb { width, height, data: vec![0; 3 * width * height] };
        let width = width * scale;
        let row = black(width, tiles.size.1 * scale);
        Self { picture: black(width, height * scale), row, scale }
    }

    /// Lays the next tile.
    pub(crate) fn lay(&mut self, tiles: &Tiles, index: usize, tile: &Rgb) {
        let (left, top) = tiles.place(index);
        let overlap = tiles.overlap * self.scale;
        let left = left * self.scale;
        // A tile at the left edge has nothing under it.
        let ramp = if left == 0 { 0 } else { overlap };
        let lines = self.row.data.chunks_exact_mut(3 * self.row.width);
        for (line, tile) in lines.zip(tile.data.chunks_exact(3 * tile.width)) {
            let line = &mut line[3 * left..];
            for (x, (line, pixel)) in line.chunks_exact_mut(3).zip(tile.chunks_exact(3)).enumerate()
            {
                lay_over(line, pixel, opacity(x, ramp));
            }
        }
        if (index + 1).is_multiple_of(tiles.columns.len()) {
            let ramp = if top == 0 { 0 } else { overlap };
            let bytes = 3 * self.row.width;
            let lines = self.picture.data.chunks_exact_mut(bytes).skip(top * self.scale);
            for (y, (line, row)) in lines.zip(self.row.data.chunks_exact(bytes)).enumerate() {
                lay_over(line, row, opacity(y, ramp));
            }
        }
    }

    /// The whole picture.
    pub(crate) fn into_picture(self) -> Rgb {
        self.picture
    }
}

/// The opacity of a tile so many pixels from the edge at which it lies over another.
fn opacity(at: usize, ramp: usize) -> u8 {
    if at < ramp { (at as f32 * 255.0 / ramp as f32) as u8 } else { 255 }
}

fn lay_over(under: &mut [u8], over: &[u8], opacity: u8) {
    for (under, over) in under.iter_mut().zip(over) {
        *under = pasted(*under, *over, opacity);
    }
}
