//! Pictures enlarged by resampling or by a network: of the hires pass, and alone.
//!
//! Reference: AUTOMATIC1111's `Upscaler.upscale` (`modules/upscaler.py`): a network enlarges the
//! picture until it covers the size that is asked for, at most three times, and Lanczos' filter
//! brings it to that size. Tiles of a network are as there, but for a picture that fits into one,
//! which gets no black border. Networks see RGB, as they were trained, and not BGR as there.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::upscaler::{PictureUpscaler, TILE_WORK};
use crate::error::{Error, Result};
use crate::networks::UpscalerNetwork;
use crate::ops::on_host;
use crate::picture::{Canvas, Rgb, TILE, Tiles, blended, lanczos, nearest};

/// How often a network enlarges a picture at most.
const MAX_PASSES: usize = 3;

/// The most pixels that a picture has on the way to its size.
const MAX_PIXELS: usize = 1 << 26;

/// A picture to enlarge, without drawing.
#[derive(Debug, Clone, PartialEq)]
pub struct Enlarge {
    /// The picture.
    pub picture: Rgb,
    /// How much larger the sides become; they are rounded down to multiples of 8.
    pub scale: f64,
    /// The size (width, height) of the canvas on which the middle of the picture is laid; without
    /// one, the picture is as large as it becomes.
    pub canvas: Option<(usize, usize)>,
    /// How it is enlarged.
    pub upscaler: PictureUpscaler,
    /// A second upscaler, and the share of its picture in the result.
    pub second: Option<(PictureUpscaler, f32)>,
}

impl Enlarge {
    /// The upscalers: one or two.
    pub fn upscalers(&self) -> impl Iterator<Item = &PictureUpscaler> {
        std::iter::once(&self.upscaler).chain(self.second.iter().map(|(second, _)| second))
    }

    /// The size (width, height) to which the picture is enlarged.
    pub fn size(&self) -> (usize, usize) {
        target((self.picture.width, self.picture.height), self.scale)
    }
}

/// An upscaler whose file is read.
#[derive(Clone)]
pub(crate) enum LoadedUpscaler {
    None,
    Lanczos,
    Nearest,
    Network(Arc<UpscalerNetwork>),
}

impl LoadedUpscaler {
    /// How many times it makes the sides longer in a pass; `None` if it has no passes.
    fn by(&self) -> Option<usize> {
        match self {
            Self::Network(network) => Some(network.scale()),
            _ => None,
        }
    }

    /// An estimate of what a tile takes, in bytes.
    pub(crate) fn tile_bytes(&self) -> u64 {
        match self {
            Self::Network(network) => network.activation_bytes(TILE.0 * TILE.0),
            _ => 0,
        }
    }

    /// The work of a tile, in pixels times rows times UNet calls.
    pub(crate) fn tile_work(&self) -> usize {
        self.by().map_or(0, |_| TILE_WORK * TILE.0 * TILE.0)
    }

    /// The steps in which it enlarges a picture of (width, height), if it may.
    pub(crate) fn steps(
        &self,
        field: &'static str,
        of: (usize, usize),
        scale: f64,
    ) -> Result<usize> {
        Ok(self.tiles(field, of, scale)? + 1)
    }

    /// The tiles of all passes.
    fn tiles(&self, field: &'static str, of: (usize, usize), scale: f64) -> Result<usize> {
        let Some(by) = self.by() else { return Ok(0) };
        let passes = passes(of, target(of, scale), scale, by);
        let largest = by.pow(passes.len() as u32);
        let sides = (of.0 * largest, of.1 * largest);
        if sides.0.saturating_mul(sides.1) > MAX_PIXELS {
            let (width, height) = sides;
            let reason = format!(
                "makes a picture of {width}x{height} on the way; at most {MAX_PIXELS} pixels are \
                 computed"
            );
            return Err(Error::Spec { field, reason });
        }
        Ok(passes.iter().map(|size| Tiles::of(*size, TILE).count()).sum())
    }
}

/// A picture on the way to another size. Its steps are the tiles of its passes, and one step that
/// resamples.
pub struct Enlargement {
    runs: Vec<Run>,
    /// Of the second run.
    share: f32,
    canvas: Option<(usize, usize)>,
    device: Device,
    /// Number of tiles that are done.
    done: usize,
    result: Option<Rgb>,
}

/// What a step of an enlargement computes.
pub(crate) enum EnlargeStep {
    Tile(Rgb),
    Result(Rgb),
}

impl Enlargement {
    /// The upscalers are those of `enlarge`. Networks are on the device.
    pub(crate) fn new(
        enlarge: &Enlarge,
        upscalers: Vec<LoadedUpscaler>,
        device: &Device,
    ) -> Result<Self> {
        let named = ["upscaler", "second_upscaler"].into_iter().zip(upscalers);
        let run = |(field, upscaler)| Run::new(field, upscaler, enlarge);
        Ok(Self {
            runs: named.map(run).collect::<Result<_>>()?,
            share: enlarge.second.as_ref().map_or(0.0, |(_, share)| *share),
            canvas: enlarge.canvas,
            device: device.clone(),
            done: 0,
            result: None,
        })
    }

    /// Whether the picture is there.
    pub fn done(&self) -> bool {
        self.result.is_some()
    }

    /// The steps that are done, and all of them.
    pub fn progress(&self) -> (usize, usize) {
        let left: usize = self.runs.iter().map(|run| run.left).sum();
        (self.done + usize::from(self.done()), self.done + left + 1)
    }

    /// The work that is left, in pixels times rows times UNet calls.
    pub fn work_left(&self) -> usize {
        self.runs.iter().map(|run| run.left * run.upscaler.tile_work()).sum()
    }

    /// The picture, once it is there.
    pub fn picture(&self) -> Option<&Rgb> {
        self.result.as_ref()
    }

    /// Computes the next step. Nothing changes before [`Self::advance`], so that it can be repeated.
    pub(crate) fn step(&self) -> Result<EnlargeStep> {
        if let Some(run) = self.runs.iter().find(|run| run.left > 0) {
            return run.tile(&self.device).map(EnlargeStep::Tile);
        }
        let fitted = |run: &Run| match self.canvas {
            Some(canvas) => run.result().on_canvas(canvas),
            None => run.result(),
        };
        let pictures = self.runs.iter().map(fitted);
        let result = pictures.reduce(|first, second| blended(&first, &second, self.share));
        let nothing = || Rgb { width: 0, height: 0, data: Vec::new() };
        Ok(EnlargeStep::Result(result.unwrap_or_else(nothing)))
    }

    /// Takes a step that was computed.
    pub(crate) fn advance(&mut self, step: EnlargeStep) {
        match step {
            EnlargeStep::Result(result) => self.result = Some(result),
            EnlargeStep::Tile(tile) => {
                if let Some(run) = self.runs.iter_mut().find(|run| run.left > 0) {
                    run.lay(&tile);
                    self.done += 1;
                }
            }
        }
    }
}

/// A picture on the way to another size by one upscaler.
struct Run {
    /// The field that names its upscaler.
    field: &'static str,
    upscaler: LoadedUpscaler,
    /// As the passes that are done have made it.
    picture: Rgb,
    scale: f64,
    /// The size (width, height) it is to have.
    target: (usize, usize),
    /// The pass under way: the next tile, and those before it.
    pass: Option<(usize, Tiles, Canvas)>,
    /// Tiles of all passes that are left.
    left: usize,
}

impl Run {
    fn new(field: &'static str, upscaler: LoadedUpscaler, enlarge: &Enlarge) -> Result<Self> {
        let Enlarge { picture, scale, .. } = enlarge;
        let (scale, of) = (*scale, (picture.width, picture.height));
        let (left, target) = (upscaler.tiles(field, of, scale)?, target(of, scale));
        Ok(Self { field, upscaler, picture: picture.clone(), scale, target, pass: None, left })
    }

    /// Computes the next tile.
    fn tile(&self, device: &Device) -> Result<Rgb> {
        let LoadedUpscaler::Network(network) = &self.upscaler else {
            return Ok(self.picture.clone());
        };
        let tile = match &self.pass {
            Some((index, tiles, _)) => tiles.cut(&self.picture, *index),
            None => Tiles::of(self.size(), TILE).cut(&self.picture, 0),
        };
        enlarged(self.field, network, &tile, device)
    }

    fn lay(&mut self, tile: &Rgb) {
        let LoadedUpscaler::Network(network) = &self.upscaler else { return };
        let scale = network.scale();
        let (index, tiles, mut canvas) = self.pass.take().unwrap_or_else(|| {
            let tiles = Tiles::of(self.size(), TILE);
            let canvas = Canvas::new(self.size(), &tiles, scale);
            (0, tiles, canvas)
        });
        canvas.lay(&tiles, index, tile);
        self.left -= 1;
        match index + 1 == tiles.count() {
            true => self.picture = canvas.into_picture(),
            false => self.pass = Some((index + 1, tiles, canvas)),
        }
    }

    fn size(&self) -> (usize, usize) {
        (self.picture.width, self.picture.height)
    }

    /// The picture in its size, once no tile is left.
    fn result(&self) -> Rgb {
        let size = |side: usize| (side as f64 * self.scale) as usize;
        let size = (size(self.picture.width), size(self.picture.height));
        let grows = !passes(self.size(), self.target, self.scale, 1).is_empty();
        let picture = match self.upscaler {
            LoadedUpscaler::Lanczos if grows => lanczos(&self.picture, size),
            LoadedUpscaler::Nearest if grows => nearest(&self.picture, size),
            _ => self.picture.clone(),
        };
        match (picture.width, picture.height) == self.target {
            true => picture,
            false => lanczos(&picture, self.target),
        }
    }
}

/// The size that a picture is to have, in whole multiples of 8.
fn target((width, height): (usize, usize), scale: f64) -> (usize, usize) {
    let side = |side: usize| (side as f64 * scale) as usize / 8 * 8;
    (side(width), side(height))
}

/// The sizes of the picture before each pass of a network that enlarges it `by` so many times.
fn passes(
    of: (usize, usize),
    target: (usize, usize),
    scale: f64,
    by: usize,
) -> Vec<(usize, usize)> {
    let (mut size, mut passes) = (of, Vec::new());
    while by > 0 && passes.len() < MAX_PASSES {
        let covers = size.0 >= target.0 && size.1 >= target.1;
        // At a scale of 1 the network is what is asked for.
        if covers && (scale != 1.0 || !passes.is_empty()) {
            break;
        }
        passes.push(size);
        if by == 1 {
            break;
        }
        size = (size.0 * by, size.1 * by);
    }
    passes
}

/// A picture enlarged by the network that a field names, as a whole.
fn enlarged(
    field: &'static str,
    network: &UpscalerNetwork,
    picture: &Rgb,
    device: &Device,
) -> Result<Rgb> {
    let values: Vec<f32> = picture.data.iter().map(|byte| f32::from(*byte) / 255.0).collect();
    let pixels = Tensor::from_vec(values, (1, picture.height, picture.width, 3), device)?;
    let enlarged = on_host(&network.forward(&pixels)?)?;
    let (_, height, width, _) = enlarged.dims4()?;
    let values = enlarged.flatten_all()?.to_vec1::<f32>()?;
    if !values.iter().all(|value| value.is_finite()) {
        let reason = format!("{} computes NaN or infinite numbers", network.file());
        return Err(Error::Spec { field, reason });
    }
    // Rounds half to even, as numpy.
    let byte = |v: f32| (v.clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
    Ok(Rgb { width, height, data: values.into_iter().map(byte).collect() })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};

    use candle_core::DType;

    use super::*;

    fn path(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/upscalers").join(name)
    }

    fn pictures() -> HashMap<String, Rgb> {
        let tensors = candle_core::safetensors::load(path("pictures.safetensors"), &Device::Cpu);
        let picture = |(name, x): (String, Tensor)| {
            let (height, width, _) = x.dims3().unwrap();
            let data = x.flatten_all().unwrap().to_vec1::<u8>().unwrap();
            (name, Rgb { width, height, data })
        };
        tensors.unwrap().into_iter().map(picture).collect()
    }

    fn network(name: &str) -> LoadedUpscaler {
        let path = ["pth", "safetensors"].map(|ending| path(&format!("{name}.{ending}")));
        let path = path.into_iter().find(|path| path.exists()).unwrap();
        let network = UpscalerNetwork::read(&path, &Device::Cpu, DType::F32).unwrap();
        LoadedUpscaler::Network(Arc::new(network))
    }

    /// Bytes may differ by one where a sum in f32 is near the middle of two.
    fn assert_close(what: &str, got: &Rgb, want: &Rgb) {
        assert_eq!((got.width, got.height), (want.width, want.height), "{what}");
        let most = got.data.iter().zip(&want.data).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(most <= Some(1), "{what}: {most:?}");
    }

    fn run(enlarge: &Enlarge, upscalers: Vec<LoadedUpscaler>) -> Rgb {
        let mut enlargement = Enlargement::new(enlarge, upscalers, &Device::Cpu).unwrap();
        let (done, all) = enlargement.progress();
        assert_eq!(done, 0);
        for step in 1..=all {
            assert!(!enlargement.done());
            let next = enlargement.step().unwrap();
            enlargement.advance(next);
            assert_eq!(enlargement.progress(), (step, all));
        }
        assert!(enlargement.done() && enlargement.work_left() == 0);
        enlargement.picture().unwrap().clone()
    }

    fn enlarge(picture: &Rgb, scale: f64) -> Enlarge {
        let (picture, upscaler) = (picture.clone(), PictureUpscaler::Lanczos);
        Enlarge { picture, scale, canvas: None, upscaler, second: None }
    }

    #[test]
    fn pictures_are_enlarged_as_by_automatic1111() {
        let pictures = pictures();
        let (mut exact, mut close) = (0, 0);
        for (name, want) in &pictures {
            let Some(rest) = name.strip_prefix("upscaled.") else { continue };
            let (how, scale) = rest.split_once('.').unwrap();
            let enlarge = enlarge(&pictures["small"], scale.parse().unwrap());
            match how {
                "Lanczos" | "Nearest" => {
                    let lanczos = how == "Lanczos";
                    let how =
                        if lanczos { LoadedUpscaler::Lanczos } else { LoadedUpscaler::Nearest };
                    assert!(run(&enlarge, vec![how]) == *want, "{name}");
                    exact += 1;
                }
                how => {
                    assert_close(name, &run(&enlarge, vec![network(how)]), want);
                    close += 1;
                }
            }
        }
        assert_eq!((exact, close), (8, 12));
    }

    #[test]
    fn tiles_are_joined_as_by_automatic1111() {
        let pictures = pictures();
        for (name, of, sides) in [("old-4x", "small", (24, 4)), ("new-2x", "wide", (192, 8))] {
            let (picture, network) = (&pictures[of], network(name));
            let LoadedUpscaler::Network(network) = network else { unreachable!() };
            let size = (picture.width, picture.height);
            let tiles = Tiles::of(size, sides);
            assert!(tiles.count() > 1);
            let mut canvas = Canvas::new(size, &tiles, network.scale());
            for index in 0..tiles.count() {
                let tile = tiles.cut(picture, index);
                canvas.lay(
                    &tiles,
                    index,
                    &enlarged("upscaler", &network, &tile, &Device::Cpu).unwrap(),
                );
            }
            let want = &pictures[&format!("tiled.{name}.{}.{}", sides.0, sides.1)];
            assert_close(name, &canvas.into_picture(), want);
        }
    }

    #[test]
    fn pictures_are_cropped_and_blended_as_by_pillow() {
        let pictures = pictures();
        for (name, want) in &pictures {
            if let Some(canvas) = name.strip_prefix("fitted.") {
                let (width, height) = canvas.split_once('x').unwrap();
                let canvas = Some((width.parse().unwrap(), height.parse().unwrap()));
                let enlarge = Enlarge { canvas, ..enlarge(&pictures["small"], 1.5) };
                assert!(run(&enlarge, vec![LoadedUpscaler::Lanczos]) == *want, "{name}");
            }
            if let Some(share) = name.strip_prefix("blended.") {
                let share = share.parse().unwrap();
                let [a, b] =
                    ["Lanczos", "old-4x"].map(|how| &pictures[&format!("upscaled.{how}.1.5")]);
                assert!(blended(a, b, share) == *want, "{name}");
            }
        }
    }

    #[test]
    fn what_grows_beyond_all_bounds_is_refused() {
        let picture = Rgb { width: 2000, height: 2000, data: vec![0; 3 * 2000 * 2000] };
        let enlarge = enlarge(&picture, 4.5);
        let refused = Enlargement::new(&enlarge, vec![network("old-8x")], &Device::Cpu);
        let refused = refused.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(refused.contains("at most 67108864"), "{refused}");
    }
    #[test]
    fn an_upscaler_that_overflows_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path_of_huge = folder.path().join("huge.safetensors");
        let tensors = candle_core::safetensors::load(path("old-1x.safetensors"), &Device::Cpu);
        let huge =
            |(name, x): (String, Tensor)| (name, (x.to_dtype(DType::F32).unwrap() * 1e20).unwrap());
        let tensors: HashMap<_, _> = tensors.unwrap().into_iter().map(huge).collect();
        candle_core::safetensors::save(&tensors, &path_of_huge).unwrap();
        let network = UpscalerNetwork::read(&path_of_huge, &Device::Cpu, DType::F32).unwrap();
        let picture = Rgb { width: 16, height: 16, data: vec![200; 3 * 16 * 16] };
        let error = enlarged("second_upscaler", &network, &picture, &Device::Cpu).unwrap_err();
        assert_eq!(
            error.to_string(),
            "second_upscaler: huge.safetensors computes NaN or infinite numbers"
        );
    }
}
