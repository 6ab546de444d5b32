//! The ControlNets of images in progress: what each image keeps of its nets, and what the nets add
//! to the batch rows of a step. Rows with the same net share its call.
//!
//! Reference: diffusers 0.42 `pipelines/controlnet/pipeline_controlnet.py`, and for
//! [`ControlRule::Extension`] sd-webui-controlnet 1.1.455 `scripts/hook.py`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::control_spec::{Control, ControlMode, ControlRule, Extension, MAX_CONTROL_SCALE};
use super::options::AddOns;
use super::rows::Rows;
use crate::error::{Error, Result};
use crate::files::{AssetCache, AssetDir, ControlNetFile};
use crate::networks::{Conditioning, ControlBatch, ControlNetModel, Residuals, UNetConfig};
use crate::ops::cat_rows;
use crate::picture::{Rgb, Size};
use crate::sampling::SamplerState;

/// The field that names them.
const FIELD: &str = "controlnets";

/// Factor from layer to layer of the extension's soft modes, and the layer that has 1.
const SOFT: (f64, i32) = (0.825, 12);

/// The ControlNets that requests can name, with an LRU cache. Usable from any thread.
pub(super) struct ControlNetCache {
    assets: AssetDir,
    cache: AssetCache<ControlNetModel>,
    /// Those of the binary that were named. They are small, and stay.
    built_in: Mutex<HashMap<&'static str, Arc<ControlNetModel>>>,
    unet: UNetConfig,
    /// Pixels per latent pixel, along one side.
    scale: usize,
    device: Device,
    dtype: DType,
}

/// The nets of a spec, one for each of its controls.
#[derive(Clone, Default)]
pub struct ControlNets(Vec<Arc<ControlNetModel>>);

impl ControlNetCache {
    /// An empty cache for a UNet whose latents have `scale` pixels a side.
    pub(super) fn new(
        add_ons: &AddOns,
        (unet, scale): (&UNetConfig, usize),
        (device, dtype): (&Device, DType),
    ) -> Self {
        let AddOns { controlnets, max_controlnet_bytes, .. } = add_ons;
        Self {
            assets: controlnets.clone(),
            cache: AssetCache::new(controlnets.clone(), *max_controlnet_bytes),
            built_in: Mutex::default(),
            unet: unet.clone(),
            scale,
            device: device.clone(),
            dtype,
        }
    }

    /// The nets of controls, read if they are not cached. Blocks.
    pub(super) fn get(&self, names: &[String]) -> Result<ControlNets> {
        let (mut nets, mut bytes) = (Vec::<Arc<ControlNetModel>>::new(), 0_u64);
        for name in names {
            let net = match self.assets.built_in(name) {
                Some(name) => self.built_in(name)?,
                None => self.cache.get(FIELD, name, |file| {
                    let net = self.read(&ControlNetFile::Path(file.path.clone()))?;
                    let bytes = net.bytes();
                    Ok((net, bytes))
                })?,
            };
            if nets.iter().all(|other| other.id() != net.id()) {
                bytes = bytes.saturating_add(net.bytes());
            }
            if bytes > self.cache.max_bytes() {
                let most = self.cache.max_bytes();
                let reason = format!(
                    "names nets that together take {bytes} bytes; at most {most} are allowed \
                     (--max-controlnet-bytes)"
                );
                return Err(Error::Spec { field: FIELD, reason });
            }
            nets.push(net);
        }
        Ok(ControlNets(nets))
    }

    fn read(&self, file: &ControlNetFile) -> Result<ControlNetModel> {
        let (model, place) = ((&self.unet, self.scale), (&self.device, self.dtype));
        ControlNetModel::read(file, model, place, self.cache.max_bytes())
    }

    /// One of the binary, read if it was not named before.
    fn built_in(&self, name: &'static str) -> Result<Arc<ControlNetModel>> {
        let mut known = self.built_in.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(net) = known.get(name) {
            return Ok(Arc::clone(net));
        }
        // Of another UNet, if the model's own was replaced.
        let refused = |error: Error| Error::Spec { field: FIELD, reason: error.to_string() };
        let net = Arc::new(self.read(&ControlNetFile::BuiltIn(name)).map_err(refused)?);
        known.insert(name, Arc::clone(&net));
        Ok(net)
    }
}

impl ControlNets {
    /// What is odd about their files.
    pub(super) fn warnings(&self) -> impl Iterator<Item = String> {
        self.0.iter().flat_map(|net| net.warnings().iter().cloned())
    }
}

/// A ControlNet of an image in one pass.
pub(super) struct ActiveControl {
    net: Arc<ControlNetModel>,
    /// (1, h, w, first)
    hint: Tensor,
    /// (evaluations, time_width)
    time_embeddings: Tensor,
    /// Whether it takes part in each evaluation.
    active: Vec<bool>,
    /// The factor of each residual.
    scales: Vec<f64>,
    /// Whether the unconditional row is left alone.
    prompted_only: bool,
    /// The net's keys and values of the rows' prompts that it has met.
    known: Vec<(Arc<Conditioning>, Conditioning)>,
}

impl ActiveControl {
    /// The nets of an image in a pass, which begins with the sampler; `stages` is the evaluations
    /// of a step. Warns of those that act at none.
    pub(super) fn begin(
        ControlNets(nets): &ControlNets,
        controls: &[Control],
        hires: bool,
        (sampler, stages): (&SamplerState, usize),
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Self>> {
        if nets.len() != controls.len() {
            let reason = "were not read".into();
            return Err(Error::Spec { field: FIELD, reason });
        }
        let asks = |control: &Control| control.rule == ControlRule::Diffusers { guess: true };
        let pools = nets.first().is_some_and(|net| net.config().global_pool_conditions);
        let guess = pools || controls.iter().any(asks);
        let timesteps: Vec<_> = sampler.timesteps().collect();
        let mut begun = Vec::new();
        for (net, control) in nets.iter().zip(controls) {
            let picture =
                if hires { control.hires_picture.as_ref() } else { Some(&control.picture) };
            let Some(picture) = picture.filter(|_| control.is_in(hires)) else { continue };
            let (scales, prompted_only) = scales(net, control, guess, hires)?;
            if scales.iter().all(|scale| *scale == 0.0) {
                continue;
            }
            // Shares are of the whole run, also where another model takes it over.
            let mut active = control.active(sampler.whole(), stages);
            active.truncate(timesteps.len());
            if !active.contains(&true) {
                let Control { model, start, end, .. } = control;
                let pass = if hires { " of the hires pass" } else { "" };
                warnings.push(format!(
                    "controlnets: {model:?} has no effect: no step{pass} is between its start \
                     {start} and its end {end}"
                ));
                continue;
            }
            begun.push(Self {
                hint: net.hint(picture)?,
                time_embeddings: net.time_embeddings(&timesteps)?,
                active,
                scales,
                prompted_only,
                net: Arc::clone(net),
                known: Vec::new(),
            });
        }
        Ok(begun)
    }

    /// The name of its net.
    pub(super) fn name(&self) -> String {
        self.net.name().to_string()
    }

    /// Computes the keys and values of a row's prompt, unless they are known.
    fn meet(&mut self, row: &Arc<Conditioning>) -> Result<()> {
        if self.known.iter().all(|(known, _)| !Arc::ptr_eq(known, row)) {
            self.known.push((Arc::clone(row), self.net.condition(row)?));
        }
        Ok(())
    }

    fn of(&self, row: &Arc<Conditioning>) -> Option<&Conditioning> {
        self.known.iter().find(|(known, _)| Arc::ptr_eq(known, row)).map(|(_, own)| own)
    }
}

/// The calls of rows of nets in these evaluations, as those of a UNet, of which a
/// net is half.
pub(super) fn row_calls(
    controls: &[ActiveControl],
    evaluations: Range<usize>,
    rows: &Rows,
) -> usize {
    let of_net = |control: &ActiveControl| {
        let active = control.active.iter().take(evaluations.end).skip(evaluations.start);
        let calls = active.filter(|active| **active).count();
        let alone = usize::from(control.prompted_only && rows.unconditional.is_some());
        calls * (rows.len() - alone)
    };
    controls.iter().map(of_net).sum::<usize>() / 2
}

/// The factor of each residual of a net, and whether the unconditional row is left alone.
fn scales(
    net: &ControlNetModel,
    control: &Control,
    guess: bool,
    hires: bool,
) -> Result<(Vec<f64>, bool)> {
    let (count, scale) = (net.config().residuals(), control.scale);
    let pools = net.config().global_pool_conditions;
    let Extension { mode, is_soft_in_hires, layers, .. } = match &control.rule {
        ControlRule::Diffusers { .. } if guess && !pools => {
            // From 0.1 to 1, in f32 as there.
            let power = |i: usize| 10_f64.powf(i as f64 / (count - 1) as f64 - 1.0) as f32;
            return Ok(((0..count).map(|i| f64::from(power(i)) * scale).collect(), true));
        }
        ControlRule::Diffusers { .. } => return Ok((vec![scale; count], guess)),
        ControlRule::Extension(extension) => extension,
    };
    let prompted_only = *mode == ControlMode::Control || pools;
    if let Some(layers) = layers {
        if layers.len() != count {
            let found = layers.len();
            let reason = format!(
                "names {:?}, which takes {count} advanced weights, not {found}",
                net.name()
            );
            return Err(Error::Spec { field: FIELD, reason });
        }
        return Ok((layers.clone(), prompted_only));
    }
    let is_soft = *mode != ControlMode::Balanced || hires && *is_soft_in_hires;
    let factor = |i: usize| if is_soft { SOFT.0.powi(SOFT.1 - i as i32) } else { 1.0 };
    Ok(((0..count).map(|i| scale * factor(i)).collect(), prompted_only))
}

/// The rows of an image in a step.
pub(super) struct ControlledRows {
    /// The evaluation of its pass.
    pub(super) evaluation: usize,
    /// The latents as the UNet gets them, without its further channels: (1, C, h, w).
    pub(super) latents: Tensor,
    /// The conditioning of its rows; with guidance the first is the unconditional one.
    pub(super) conditioning: Vec<Arc<Conditioning>>,
    pub(super) is_guided: bool,
}

impl ControlledRows {
    /// The rows that a net steers, by their place here; none if it does not take part.
    fn steered(&self, control: &ActiveControl) -> std::ops::Range<usize> {
        let rows = self.conditioning.len();
        let first = usize::from(control.prompted_only && self.is_guided);
        match control.active.get(self.evaluation) {
            Some(true) => first..rows,
            _ => 0..0,
        }
    }
}

/// What the nets of all images add to the rows of a step, in the order of the images.
pub(super) fn residuals(
    nets: &mut [&mut Vec<ActiveControl>],
    steps: &[ControlledRows],
) -> Result<Residuals> {
    if nets.iter().all(|nets| nets.is_empty()) {
        return Ok(Residuals::default());
    }
    for (nets, step) in nets.iter_mut().zip(steps) {
        for control in nets.iter_mut() {
            step.steered(control).try_for_each(|row| control.meet(&step.conditioning[row]))?;
        }
    }
    let mut calls: Vec<Call<'_>> = Vec::new();
    let mut rows = Vec::new();
    for (nets, step) in nets.iter().zip(steps) {
        for (k, row) in step.conditioning.iter().enumerate() {
            let mut of_row = Vec::new();
            for control in nets.iter().filter(|net| step.steered(net).contains(&k)) {
                let Some(conditioning) = control.of(row) else { continue };
                let same = |call: &Call<'_>| call.net.id() == control.net.id();
                let place = calls.iter().position(same).unwrap_or_else(|| {
                    calls.push(Call::of(&control.net));
                    calls.len() - 1
                });
                let time = control.time_embeddings.narrow(0, step.evaluation, 1)?;
                of_row.push((place, calls[place].add(control, &step.latents, time, conditioning)));
            }
            rows.push(of_row);
        }
    }
    let calls = calls.iter().map(Call::run).collect::<Result<_>>()?;
    Ok(Residuals { calls, rows })
}

/// A call of a net.
struct Call<'a> {
    net: &'a ControlNetModel,
    latents: Vec<&'a Tensor>,
    hints: Vec<&'a Tensor>,
    time_embeddings: Vec<Tensor>,
    conditioning: Vec<&'a Conditioning>,
    scales: Vec<&'a [f64]>,
}

impl<'a> Call<'a> {
    fn of(net: &'a ControlNetModel) -> Self {
        let (latents, hints, time_embeddings) = Default::default();
        let (conditioning, scales) = Default::default();
        Self { net, latents, hints, time_embeddings, conditioning, scales }
    }

    /// Returns the place of the row.
    fn add(
        &mut self,
        control: &'a ActiveControl,
        latents: &'a Tensor,
        time_embedding: Tensor,
        conditioning: &'a Conditioning,
    ) -> usize {
        self.latents.push(latents);
        self.hints.push(&control.hint);
        self.time_embeddings.push(time_embedding);
        self.conditioning.push(conditioning);
        self.scales.push(&control.scales);
        self.scales.len() - 1
    }

    fn run(&self) -> Result<Vec<Tensor>> {
        self.net.forward(&ControlBatch {
            latents: &cat_rows(&self.latents)?,
            hints: &cat_rows(&self.hints)?,
            time_embeddings: &cat_rows(&self.time_embeddings)?,
            conditioning: &Conditioning::stack(&self.conditioning)?,
            scales: &self.scales,
        })
    }
}

/// Checks controls against the limits of every model.
pub(super) fn check(controls: &[Control], size: Size, hires: Option<Size>) -> Result<()> {
    let refuse = |reason: String| Err(Error::Spec { field: FIELD, reason });
    for Control { model, picture, hires_picture, scale, start, end, rule, .. } in controls {
        if !(-MAX_CONTROL_SCALE..=MAX_CONTROL_SCALE).contains(scale) {
            let most = MAX_CONTROL_SCALE;
            return refuse(format!("{model:?} must have a scale from -{most} to {most}"));
        }
        if !(0.0..=1.0).contains(start) || !(0.0..=1.0).contains(end) {
            return refuse(format!("{model:?} must have a start and an end from 0 to 1"));
        }
        let is_empty = match rule {
            ControlRule::Diffusers { .. } => start >= end,
            ControlRule::Extension(_) => start > end,
        };
        if is_empty {
            return refuse(format!(
                "{model:?} must have a start before its end; {start} is not before {end}"
            ));
        }
        let fits = |picture: &Rgb, size: Size| {
            (picture.width, picture.height) == (size.width(), size.height())
                && picture.data.len() == 3 * size.pixels()
        };
        let fits_hires = match (hires_picture, hires) {
            (Some(picture), Some(size)) => fits(picture, size),
            (None, None) => true,
            _ => false,
        };
        if !fits(picture, size) || !fits_hires {
            return refuse(format!("{model:?} must have a picture of {size}"));
        }
    }
    Ok(())
}
