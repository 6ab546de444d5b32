//! Live previews: a latent-to-RGB approximation that maps each latent pixel and its neighbours to
//! one pixel. It is fitted to the model's own decoder, so it serves any VAE. Final images are
//! decoded by [`crate::networks::Decoder`].

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::networks::VaeConfig;
use crate::ops::on_host;
use crate::picture::Rgb;
use crate::sampling::Noise;

/// Side of the latents that the map is fitted on: 1024 equations for some 50 unknowns.
const SIDE: usize = 32;

/// Block sides of the noise that these latents are the sum of, and its standard deviation. The sum
/// has unit variance, as latents do, and both coarse and fine detail.
const OCTAVES: [usize; 4] = [1, 2, 4, 8];
const DEVIATION: f64 = 0.5;

/// Regularization of the least squares, relative to factors of unit variance: keeps the equations
/// solvable for any latents.
const RIDGE: f64 = 1e-3;

/// A polynomial for each colour: linear in the 3x3 latent pixels around a pixel, plus the products
/// of the channels at the pixel itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Preview {
    /// Coefficients of the features that [`Patches::at`] returns, for red, green and blue.
    weights: [Vec<f64>; 3],
}

impl Preview {
    /// Fits the map to the output of the VAE's decoder for random latents. `decode` takes them unscaled,
    /// and returns the images on the CPU.
    pub(crate) fn fit(
        config: &VaeConfig,
        decode: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let latents = octaves(config.latent_channels)?;
        let scaled = config.unscaled(&latents)?;
        let pictures = decode(&scaled)?.clamp(-1f32, 1f32)?;
        let pixels = pictures.permute((0, 3, 1, 2))?.avg_pool2d(config.scale())?;
        let pixels = pixels.squeeze(0)?.flatten_from(1)?.to_vec2::<f32>()?; // (3, h * w)
        let patches = Patches::of(&latents)?.all();
        let solve = |pixels: &Vec<f32>| least_squares(&patches, pixels);
        match &pixels[..] {
            [red, green, blue] => Ok(Self { weights: [solve(red), solve(green), solve(blue)] }),
            other => {
                let reason = format!("out_channels: {}, where a preview needs 3", other.len());
                Err(Error::config("vae/config.json", reason))
            }
        }
    }

    /// Latents (1, C, h, w) f32 -> h x w pixels.
    pub(crate) fn render(&self, latents: &Tensor) -> Result<Rgb> {
        let patches = Patches::of(latents)?;
        let (width, height) = (patches.width, patches.height);
        let byte = |v: f64| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8;
        let data = patches
            .all()
            .into_iter()
            .flat_map(|patch| self.weights.each_ref().map(|weights| byte(dot(weights, &patch))));
        Ok(Rgb { width, height, data: data.collect() })
    }
}

/// (1, C, SIDE, SIDE) on the CPU.
pub(super) fn octaves(channels: usize) -> Result<Tensor> {
    let mut noise = Noise::new(0);
    let mut sum = Tensor::zeros((1, channels, SIDE, SIDE), candle_core::DType::F32, &Device::Cpu)?;
    for block in OCTAVES {
        let side = SIDE / block;
        let values = noise.normal(channels * side * side);
        let blocks = Tensor::from_vec(values, (1, channels, side, side), &Device::Cpu)?;
        sum = (sum + (blocks.upsample_nearest2d(SIDE, SIDE)? * DEVIATION)?)?;
    }
    Ok(sum)
}

/// Latents, extended by their edge pixels.
struct Patches {
    /// By channel, row and column.
    values: Vec<f32>,
    channels: usize,
    height: usize,
    width: usize,
}

impl Patches {
    fn of(latents: &Tensor) -> Result<Self> {
        let (_, channels, height, width) = latents.dims4()?;
        let values = on_host(latents)?.flatten_all()?.to_vec1()?;
        Ok(Self { values, channels, height, width })
    }

    /// The features of all pixels, row by row.
    fn all(&self) -> Vec<Vec<f64>> {
        let places = (0..self.height).flat_map(|y| (0..self.width).map(move |x| (y, x)));
        places.map(|(y, x)| self.at(y, x)).collect()
    }

    /// The features of one pixel: 9 values of each of the C channels, the C (C + 1) / 2 products of
    /// the middle ones, and a one.
    fn at(&self, y: usize, x: usize) -> Vec<f64> {
        let near =
            |place: usize, side: usize| [place.saturating_sub(1), place, (place + 1).min(side - 1)];
        let mut patch = Vec::with_capacity(9 * self.channels + 1);
        for channel in 0..self.channels {
            for row in near(y, self.height) {
                let row = (channel * self.height + row) * self.width;
                let values = near(x, self.width).map(|column| self.values[row + column]);
                patch.extend(values.map(f64::from));
            }
        }
        for a in 0..self.channels {
            for b in 0..=a {
                patch.push(patch[9 * a + 4] * patch[9 * b + 4]);
            }
        }
        patch.push(1.0);
        patch
    }
}

/// The coefficients for which `rows` times coefficients is nearest to `targets`: normal equations
/// with a ridge, which makes them positive definite, so no pivot is zero.
fn least_squares(rows: &[Vec<f64>], targets: &[f32]) -> Vec<f64> {
    let unknowns = rows.first().map_or(0, Vec::len);
    let mut system = vec![vec![0.0; unknowns + 1]; unknowns];
    for (row, &target) in rows.iter().zip(targets) {
        for (equation, &factor) in system.iter_mut().zip(row) {
            for (sum, &other) in equation.iter_mut().zip(row.iter().chain([&f64::from(target)])) {
                *sum += factor * other;
            }
        }
    }
    for (i, equation) in system.iter_mut().enumerate() {
        equation[i] += RIDGE * rows.len() as f64;
    }
    for i in 0..unknowns {
        let pivot = system[i].clone();
        for equation in &mut system[i + 1..] {
            let factor = equation[i] / pivot[i];
            equation.iter_mut().zip(&pivot).for_each(|(value, pivot)| *value -= factor * pivot);
        }
    }
    let mut solution = vec![0.0; unknowns];
    for i in (0..unknowns).rev() {
        let known = dot(&system[i][i + 1..unknowns], &solution[i + 1..]);
        solution[i] = (system[i][unknowns] - known) / system[i][i];
    }
    solution
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::Size;
    use crate::pipeline::spec::Spec;
    use crate::pipeline::tests::demo;
    use crate::pipeline::xl::XlOptions;
    use crate::sampling::{Sampler, SamplerOptions, SigmaSchedule, Span};

    /// The correlation of a preview with an image whose squares of pixels are averaged.
    fn likeness(preview: &Rgb, picture: &Rgb) -> f64 {
        let scale = picture.width / preview.width;
        assert_eq!(
            (preview.width * scale, preview.height * scale),
            (picture.width, picture.height)
        );
        let mut pooled = vec![0.0; preview.data.len()];
        for (i, &value) in picture.data.iter().enumerate() {
            let (y, x, colour) = (i / 3 / picture.width, i / 3 % picture.width, i % 3);
            pooled[(y / scale * preview.width + x / scale) * 3 + colour] += f64::from(value);
        }
        let centred = |values: Vec<f64>| -> Vec<f64> {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            values.iter().map(|value| value - mean).collect()
        };
        let ours = centred(preview.data.iter().map(|&value| f64::from(value)).collect());
        let theirs = centred(pooled);
        dot(&ours, &theirs) / (dot(&ours, &ours) * dot(&theirs, &theirs)).sqrt()
    }

    #[test]
    fn a_preview_resembles_the_picture() {
        let pipeline = demo();
        let mut ends = Vec::new();
        let prompts = ["a red house by the sea at night", "a green tree in the snow"];
        for (k, sampler) in Sampler::all().enumerate() {
            let spec = Spec {
                prompt: prompts[k % 2].into(),
                prompt_syntax: crate::PromptSyntax::Plain,
                negative_prompt: String::new(),
                loras: Vec::new(),
                size: Size::new(128, 96).expect("multiples of 8"),
                steps: 12,
                guidance_scale: 5.0,
                seed: k as u64,
                sampler,
                schedule: SigmaSchedule::Model,
                sampler_options: SamplerOptions::default(),
                img2img: None,
                embeds_guidance: false,
                clip_skip: 0,
                guidance_rescale: 0.0,
                variation: None,
                eta_noise_seed_delta: 0,
                xl: XlOptions::default(),
                span: Span::default(),
                refiner: None,
                warnings: Vec::new(),
                hires: None,
                controls: Vec::new(),
                tiling: false,
                vae_tiling: None,
                ip_adapters: Vec::new(),
                enlarge: None,
            };
            let mut trajectory = pipeline.begin(&spec).expect("begun");
            let mut previews = vec![pipeline.preview(&trajectory).expect("of noise")];
            let mut half_made = None;
            while !trajectory.done() {
                pipeline.step(&mut [&mut trajectory]).expect("a step");
                previews.push(pipeline.preview(&trajectory).expect("a preview"));
                let (made, all) = trajectory.progress();
                if 2 * made >= all && half_made.is_none() {
                    half_made = Some(pipeline.decode(&trajectory).expect("what there is of it"));
                }
            }
            let picture = pipeline.decode(&trajectory).expect("a picture");
            let interrupted = half_made.map_or(0.0, |half| likeness(&half, &picture));
            assert!(interrupted > 0.75, "{sampler}: {interrupted:.2}");
            let likeness: Vec<f64> = previews.iter().map(|p| likeness(p, &picture)).collect();
            let (noise, half) = (likeness[0], likeness[likeness.len() / 2]);
            println!("{sampler}: {likeness:.2?}");
            assert!(half > 0.75 && half > noise + 0.4, "{sampler}: {noise:.2} to {half:.2}");
            ends.push(likeness[likeness.len() - 1]);
        }
        let mean = ends.iter().sum::<f64>() / ends.len() as f64;
        assert!(mean > 0.9 && ends.iter().all(|end| *end > 0.8), "{ends:.2?}");
    }

    #[test]
    fn least_squares_finds_a_linear_law() {
        let mut noise = Noise::new(1);
        let mut row = || [noise.normal(16), vec![1.0]].concat().into_iter().map(f64::from);
        let rows: Vec<Vec<f64>> = (0..4000).map(|_| row().collect()).collect();
        let law: Vec<f64> = (0..17).map(|k| f64::from(k) / 10.0 - 0.8).collect();
        let targets: Vec<f32> = rows.iter().map(|row| dot(row, &law) as f32).collect();
        for (found, expected) in least_squares(&rows, &targets).iter().zip(&law) {
            assert!((found - expected).abs() < 0.01, "{found} {expected}");
        }
    }
}
