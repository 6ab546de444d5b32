//! The tiles of a VAE: parts of latents or of a picture that overlap by a quarter, and what becomes
//! of them joined again, each fading into the one above it and the one at its left. Not the networks
//! that take the parts, and not which pictures are taken in parts.
//!
//! Reference: diffusers 0.42 `models/autoencoders/autoencoder_kl.py`, `tiled_decode`, `_tiled_encode`.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::ops::on_host;

/// The share of a tile that lies over the one before it: one part of so many.
pub(crate) const OVERLAP: usize = 4;

/// A plane cut into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Grid {
    /// Height and width of the plane.
    plane: [usize; 2],
    /// Side of a tile, a multiple of [`OVERLAP`].
    tile: usize,
}

impl Grid {
    /// That of a plane of (height, width); `None` if it is no larger than a tile.
    fn of(plane: [usize; 2], tile: usize) -> Option<Self> {
        plane.iter().any(|side| *side > tile).then_some(Self { plane, tile })
    }

    /// Number of tiles.
    fn count(self) -> usize {
        self.along(0) * self.along(1)
    }

    /// From the beginning of a tile to that of the next.
    fn step(self) -> usize {
        self.tile - self.tile / OVERLAP
    }

    fn along(self, axis: usize) -> usize {
        self.plane[axis].div_ceil(self.step())
    }

    /// Rows and columns of a tile; the last ones may be narrower.
    fn place(self, index: usize) -> [Range<usize>; 2] {
        let columns = self.along(1);
        let range = |axis: usize, place: usize| {
            let first = place * self.step();
            first..(first + self.tile).min(self.plane[axis])
        };
        [range(0, index / columns), range(1, index % columns)]
    }
}

/// Number of tiles of a plane of (height, width); 0 if it is no larger than a tile.
pub(crate) fn tiles(plane: [usize; 2], tile: usize) -> usize {
    Grid::of(plane, tile).map_or(0, Grid::count)
}

/// The values (height, width, channels) of a tile, or of a part of one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Part {
    sides: [usize; 2],
    values: Vec<f32>,
}

impl Part {
    fn channels(&self) -> usize {
        self.values.len() / (self.sides[0] * self.sides[1]).max(1)
    }

    /// The values from a row and a column on.
    fn at(&self, row: usize, column: usize) -> &[f32] {
        let channels = self.channels();
        let first = row * self.sides[1] + column;
        self.values.get(first * channels..).unwrap_or_default()
    }

    /// Its last rows, or columns, at most so many.
    fn last(&self, axis: usize, most: usize) -> Self {
        let [height, width] = self.sides;
        let channels = self.channels();
        let [mut top, mut left] = [0, 0];
        match axis {
            0 => top = height.saturating_sub(most),
            _ => left = width.saturating_sub(most),
        }
        let sides = [height - top, width - left];
        let rows = (top..height).flat_map(|row| &self.at(row, left)[..sides[1] * channels]);
        Self { sides, values: rows.copied().collect() }
    }

    /// Lets the end of `before` fade into its beginning, along an axis.
    fn fade(&mut self, before: &Self, axis: usize) {
        let extent = before.sides[axis].min(self.sides[axis]);
        let skipped = before.sides[axis] - extent;
        let ([height, width], channels) = (self.sides, self.channels());
        let [rows, columns] = if axis == 0 { [extent, width] } else { [height, extent] };
        for row in 0..rows {
            let old = if axis == 0 { before.at(skipped + row, 0) } else { before.at(row, skipped) };
            let first = row * width * channels;
            let new = &mut self.values[first..first + columns * channels];
            for (at, (new, old)) in new.iter_mut().zip(old).enumerate() {
                let place = if axis == 0 { row } else { at / channels };
                let share = place as f64 / extent as f64;
                *new = old * (1.0 - share) as f32 + *new * share as f32;
            }
        }
    }
}

/// What has become of the tiles so far.
struct Joined {
    grid: Grid,
    /// All of it, (height, width, channels).
    whole: Part,
    /// The last rows of each tile above and, from the left on, of the present row of tiles.
    above: Vec<Part>,
    /// The last columns of the tile at the left.
    left: Part,
    done: usize,
}

impl Joined {
    fn new(grid: Grid, channels: usize) -> Self {
        let [height, width] = grid.plane;
        let whole = Part { sides: grid.plane, values: vec![0.0; height * width * channels] };
        let above = vec![Part::default(); grid.along(1)];
        Self { grid, whole, above, left: Part::default(), done: 0 }
    }

    /// Lays the next tile, which is as large as its place.
    fn lay(&mut self, mut tile: Part) {
        let ([rows, columns], across) = (self.grid.place(self.done), self.grid.along(1));
        let (step, overlap) = (self.grid.step(), self.grid.tile / OVERLAP);
        let column = self.done % across;
        if self.done >= across {
            tile.fade(&self.above[column], 0);
        }
        if column > 0 {
            tile.fade(&self.left, 1);
        }
        let ([height, width], channels) = (tile.sides.map(|side| side.min(step)), tile.channels());
        let line = self.whole.sides[1] * channels;
        for row in 0..height {
            let first = (rows.start + row) * line + columns.start * channels;
            let from = &tile.at(row, 0)[..width * channels];
            self.whole.values[first..first + width * channels].copy_from_slice(from);
        }
        self.above[column] = tile.last(0, overlap);
        self.left = tile.last(1, overlap);
        self.done += 1;
    }
}

/// A plane on its way through a network, tile by tile.
pub(crate) struct Tiled {
    /// What the tiles are cut of, (1, ...), and the axes that are its height and width.
    input: Tensor,
    axes: [usize; 2],
    from: Grid,
    joined: Joined,
}

impl Tiled {
    /// Latents (1, C, h, w) that are decoded in tiles with `tile` latent pixels a side to a picture of
    /// (1, `scale` h, `scale` w, 3); `None` if one tile holds them.
    pub(crate) fn decode(latents: &Tensor, tile: usize, scale: usize) -> Result<Option<Self>> {
        let (_, _, h, w) = latents.dims4()?;
        let Some(from) = Grid::of([h, w], tile) else { return Ok(None) };
        let to = Grid { plane: [h * scale, w * scale], tile: tile * scale };
        let (input, joined) = (latents.clone(), Joined::new(to, 3));
        Ok(Some(Self { input, axes: [2, 3], from, joined }))
    }

    /// A picture (1, H, W, 3) that is encoded in tiles with `tile` latent pixels a side to so many
    /// channels (1, H / `scale`, W / `scale`, channels); `None` if one tile holds it.
    pub(crate) fn encode(
        picture: &Tensor,
        (tile, scale): (usize, usize),
        channels: usize,
    ) -> Result<Option<Self>> {
        let (_, h, w, _) = picture.dims4()?;
        let Some(from) = Grid::of([h, w], tile * scale) else { return Ok(None) };
        let to = Grid { plane: [h / scale, w / scale], tile };
        let (input, joined) = (picture.clone(), Joined::new(to, channels));
        Ok(Some(Self { input, axes: [1, 2], from, joined }))
    }

    /// Number of tiles that are left.
    pub(crate) fn left(&self) -> usize {
        self.from.count() - self.joined.done
    }

    /// Puts the next tile through a network, whose output is (1, h, w, channels) f32. Nothing changes
    /// before [`Self::lay`], so that it can be repeated.
    pub(crate) fn next(&self, network: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Part> {
        let [rows, columns] = self.from.place(self.joined.done);
        let part = self.input.narrow(self.axes[0], rows.start, rows.len())?;
        let part = part.narrow(self.axes[1], columns.start, columns.len())?.contiguous()?;
        let output = on_host(&network(&part)?)?;
        let (_, height, width, _) = output.dims4()?;
        Ok(Part { sides: [height, width], values: output.flatten_all()?.to_vec1()? })
    }

    /// Takes a tile that was computed.
    pub(crate) fn lay(&mut self, tile: Part) {
        self.joined.lay(tile);
    }

    /// What has become of all tiles, (1, height, width, channels) f32 on the CPU.
    pub(crate) fn joined(&self) -> Result<Tensor> {
        let Part { sides: [height, width], ref values } = self.joined.whole;
        let shape = (1, height, width, self.joined.whole.channels());
        Ok(Tensor::from_slice(values, shape, &Device::Cpu)?)
    }

    /// All tiles, one after the other, and what becomes of them.
    pub(crate) fn run(mut self, network: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        while self.left() > 0 {
            let tile = self.next(&network)?;
            self.lay(tile);
        }
        self.joined()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::DType;

    use super::*;
    use crate::files::Source;
    use crate::networks::{Decoder, Encoder, VaeConfig};

    /// The largest difference over the largest magnitude of the reference.
    fn error(got: &Tensor, want: &Tensor) -> f32 {
        let most = |x: Tensor| {
            let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().fold(0.0, |most: f32, value| most.max(value.abs()))
        };
        assert_eq!(got.dims(), want.dims());
        most((got - want).unwrap()) / most(want.clone())
    }

    #[test]
    fn what_becomes_of_tiles_is_as_in_diffusers() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let file = fixtures.join("vae_tiles.safetensors");
        let expected = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let mut cases = 0;
        for (key, latents) in &expected {
            let Some(case) = key.strip_suffix(".latents").filter(|case| case.contains('x')) else {
                continue;
            };
            let Some((model, _)) = case.split_once('.') else { continue };
            let source = Source::Directory(fixtures.join(model));
            let weights = || source.weights("vae", "diffusion_pytorch_model", false).unwrap();
            let config = VaeConfig::read(&source).unwrap();
            let (tile, scale, cpu) = (config.tile().unwrap(), config.scale(), &Device::Cpu);
            let encoder = Encoder::load(config.clone(), &weights(), cpu, DType::F32).unwrap();
            let decoder = Decoder::load(config.clone(), &weights(), cpu, DType::F32).unwrap();

            let tiled = Tiled::decode(latents, tile, scale).unwrap().unwrap();
            let decoded = tiled.run(|latents| decoder.forward(latents)).unwrap();
            let want = expected[&format!("{case}.decoded")].permute((0, 2, 3, 1)).unwrap();
            let of_decoder = error(&decoded, &want);

            let picture = expected[&format!("{case}.picture")].to_dtype(DType::F32).unwrap();
            let picture = picture.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
            let channels = 2 * config.latent_channels;
            let tiled = Tiled::encode(&picture, (tile, scale), channels).unwrap().unwrap();
            let moments = tiled.run(|picture| encoder.moments(picture)).unwrap();
            let want = expected[&format!("{case}.moments")].permute((0, 2, 3, 1)).unwrap();
            let of_encoder = error(&moments, &want);
            assert!(of_decoder <= 1e-4 && of_encoder <= 1e-4, "{case}: {of_decoder} {of_encoder}");
            cases += 1;
        }
        assert_eq!(cases, 3);
    }

    #[test]
    fn what_one_tile_holds_is_no_tile() {
        assert_eq!(tiles([8, 8], 8), 0);
        assert_eq!(tiles([4, 9], 8), 2);
        assert_eq!(tiles([13, 20], 8), 3 * 4);
    }
}
