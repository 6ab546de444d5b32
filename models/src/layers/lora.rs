//! LoRA files: deltas of weights of the UNet and of the text encoder, read for a model. Their names
//! are in [`super::lora_names`], what they add in [`super::lora_delta`], and how it is added in
//! [`super::lora_layer`].
//!
//! A tensor that matches no weight is skipped with a warning; a file of which none does is refused.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};

use super::builder::SECOND_ENCODER;
use super::lora_delta::{Delta, WeightDelta};
use super::lora_names::{Network, Role, TargetNames, family, split};
use super::lora_parts::{Parts, TOO_LARGE};
use super::lora_peft::Settings;
use super::placed_delta::PlacedDelta;
use crate::error::{Error, Result};
use crate::files::{AssetCache, AssetFile, LoraTarget, LoraTargets, Weights, what};

/// The warning for a file of PEFT without its settings.
const NO_ALPHA: &str =
    "comes without PEFT's adapter_config.json; its alphas are taken to be its ranks";

/// Opens the files of a network again.
pub(crate) type Reopen = Box<dyn Fn(Network) -> Result<Weights> + Send + Sync>;

/// The weights of a model that a LoRA may add to, and the device where it is added.
pub(crate) struct TargetIndex {
    names: TargetNames,
    targets: LoraTargets,
    base: Reopen,
    device: Device,
    dtype: DType,
}

/// A loaded file: what it adds to each weight.
pub(crate) struct Lora {
    id: u64,
    file: AssetFile,
    deltas: HashMap<String, (Network, PlacedDelta)>,
    bytes: u64,
    warnings: Vec<String>,
}

/// The LoRAs that requests can name, with an LRU cache. Usable from any thread.
pub(crate) struct LoraCache {
    pub(crate) cache: AssetCache<Lora>,
    pub(crate) targets: TargetIndex,
}

impl LoraCache {
    /// The LoRA of this name as its file is now, read if it is not cached. Blocks.
    pub(crate) fn get(&self, field: &'static str, name: &str) -> Result<Arc<Lora>> {
        self.cache.get(field, name, |file| {
            let lora = Lora::read(file, &self.targets, self.cache.max_bytes())?;
            let bytes = lora.bytes;
            Ok((lora, bytes))
        })
    }

    /// Refuses the LoRAs of a picture if together they take more bytes than the cache.
    pub(crate) fn admit<'l>(
        &self,
        field: &'static str,
        loras: impl Iterator<Item = &'l Lora>,
    ) -> Result<()> {
        let sizes: BTreeMap<_, _> = loras.map(|lora| (lora.id, lora.bytes)).collect();
        if sizes.into_values().fold(0, u64::saturating_add) <= self.cache.max_bytes() {
            return Ok(());
        }
        Err(Error::Spec { field, reason: format!("names LoRAs that together {TOO_LARGE}") })
    }
}

impl TargetIndex {
    pub(crate) fn new(
        (unet, layers): (LoraTargets, usize),
        texts: Vec<LoraTargets>,
        base: Reopen,
        device: &Device,
        dtype: DType,
    ) -> Self {
        Self {
            names: TargetNames::new(&unet, layers, &texts),
            // The networks have no name in common.
            targets: unet.into_iter().chain(texts.into_iter().flatten()).collect(),
            base,
            device: device.clone(),
            dtype,
        }
    }
}

impl Lora {
    /// Reads a file for a model; refuses one that would take more bytes.
    fn read(from: &AssetFile, index: &TargetIndex, max_bytes: u64) -> Result<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let weights = Weights::copied(&from.path)?;
        let (found, skipped) = sort(&weights, index)?;
        let mut warnings: Vec<_> = skipped.into_iter().collect();
        let settings = Settings::read(&weights, &from.path)?;
        let base = BaseWeights {
            open: &index.base,
            unet: OnceCell::new(),
            text: OnceCell::new(),
            text_2: OnceCell::new(),
        };
        let (mut deltas, mut bytes, mut unused) = (HashMap::new(), 0_u64, Vec::new());
        for ((network, name), tensors) in found {
            let (target, setting) = (index.targets[name], settings.of(network, name)?);
            let first = tensors.values().next().cloned().unwrap_or_default();
            // PEFT's default is not the rank.
            let silent = setting.is_none() && !tensors.contains_key(&Role::Alpha);
            if silent && first.starts_with("base_model.") && !warnings.contains(&NO_ALPHA.into()) {
                warnings.push(NO_ALPHA.into());
            }
            let room = max_bytes.saturating_sub(bytes) / index.dtype.size_in_bytes() as u64;
            let parts = Parts {
                weights: &weights,
                target,
                tensors,
                setting,
                room,
                asked: RefCell::default(),
            };
            let delta = parts.delta(|| base.read(network, name, target));
            let delta = delta.and_then(|delta| check(&delta, &first, &weights).map(|()| delta));
            let delta = delta.map_err(|error| of_file(error, &first, &weights))?;
            unused.extend(delta.unused.iter().cloned());
            let delta = PlacedDelta::new(&delta, target, &index.device, index.dtype)?;
            bytes = bytes.saturating_add(delta.bytes());
            // Kernels may keep a weight in a larger form.
            if bytes > max_bytes {
                return Err(Error::config(weights.file_names(), TOO_LARGE));
            }
            deltas.insert(name.to_owned(), (network, delta));
        }
        let method = ["that its method does not use", "that their methods do not use"];
        warnings.extend(left_out(&unused, method));
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, file: from.clone(), deltas, bytes, warnings })
    }

    /// A unique id of this read, for comparison.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The file, in the version that was read.
    pub(crate) fn file(&self) -> &AssetFile {
        &self.file
    }

    /// What of the file is not applied, or assumed. The texts read on from the LoRA's name.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What is added to a weight, and its network.
    pub(crate) fn delta(&self, name: &str) -> Option<&(Network, PlacedDelta)> {
        self.deltas.get(name)
    }
}

/// The tensors of each weight, and a warning if some belong to none.
type Sorted<'i> = (BTreeMap<(Network, &'i str), BTreeMap<Role, String>>, Option<String>);

fn sort<'i>(weights: &Weights, index: &'i TargetIndex) -> Result<Sorted<'i>> {
    let file = weights.file_names();
    let refuse = |tensor: &str, reason: String| {
        Err(Error::Tensor { file: file.clone(), tensor: tensor.to_owned(), reason })
    };
    let mut found: BTreeMap<_, BTreeMap<Role, String>> = BTreeMap::new();
    let (mut skipped, mut is_lora) = (Vec::new(), false);
    for tensor in weights.names() {
        if let Some(reason) = index.names.refused(tensor) {
            return refuse(tensor, reason);
        }
        let role = split(tensor, weights);
        is_lora |= role.is_some();
        let target = role.and_then(|(module, role)| Some((index.names.find(module)?, role)));
        let Some((target, role)) = target else {
            skipped.push(tensor);
            continue;
        };
        if let Some(other) = found.entry(target).or_default().insert(role, tensor.to_owned()) {
            return refuse(tensor, format!("is for {}, as is {other}", target.1));
        }
    }
    let count = skipped.len();
    match (found.is_empty(), skipped.first()) {
        (true, None) => Err(Error::config(file, "holds no LoRA")),
        (true, Some(first)) if !is_lora => {
            let reason = match what(weights) {
                Some(what) if what.starts_with("a LoRA") => format!("is {what}"),
                Some(what) => format!("is no LoRA: this is {what}"),
                None => format!("holds no LoRA but {count} other tensors, the first {first:?}"),
            };
            Err(Error::config(file, reason))
        }
        (true, Some(first)) => {
            let seems = family(weights).map(|family| format!("; it seems to be for {family}"));
            let seems = seems.unwrap_or_default();
            let reason =
                format!("none of its {count} tensors matches a weight of this model{seems}");
            Err(Error::config(file, format!("{reason}; the first is {first:?}")))
        }
        (false, _) => {
            let matching =
                ["that matches no weight of this model", "that match no weight of this model"];
            Ok((found, left_out(&skipped, matching)))
        }
    }
}

/// A warning for tensors that are not used, if there are any: what they are, one or several.
fn left_out<T: std::fmt::Debug>(tensors: &[T], [one, several]: [&str; 2]) -> Option<String> {
    match tensors {
        [] => None,
        [only] => Some(format!("has 1 tensor {one}, left out: {only:?}")),
        [first, ..] => {
            let count = tensors.len();
            Some(format!("has {count} tensors {several}, left out: {first:?} and others"))
        }
    }
}

/// The error of a weight's tensors, of which this is the first: names the file, and if the tensors
/// do not fit the model, the models that the file seems to be for.
fn of_file(error: Error, first: &str, weights: &Weights) -> Error {
    match (error, family(weights)) {
        (Error::Compute(_), _) => {
            let reason = "cannot be multiplied with those beside it".into();
            Error::Tensor { file: weights.file_names(), tensor: first.to_owned(), reason }
        }
        (Error::Tensor { file, tensor, reason }, Some(family))
            if reason.contains("expected shape") =>
        {
            let reason = format!("{reason}; the file seems to be for {family}");
            Error::Tensor { file, tensor, reason }
        }
        (error, _) => error,
    }
}

/// The largest change of a weight by one rank: with more an image is not finite.
const MOST_CHANGE: f32 = 1e9;

/// Checks that the products of the tensors are finite, as the tensors are.
fn check(delta: &Delta, tensor: &str, weights: &Weights) -> Result<()> {
    let most = match &delta.weight {
        Some(WeightDelta::LowRank { down, up }) => largest(down)? * largest(up)?,
        Some(WeightDelta::Dense(delta)) => largest(delta)?,
        None => 0.0,
    };
    let bias = delta.bias.as_ref().map_or(Ok(0.0), largest)?;
    if most <= MOST_CHANGE && bias <= MOST_CHANGE {
        return Ok(());
    }
    let (file, reason) = (weights.file_names(), "overflows with its factors".into());
    Err(Error::Tensor { file, tensor: tensor.to_owned(), reason })
}

/// The largest magnitude in an f32 tensor; NaN or infinite if one of its numbers is.
fn largest(tensor: &Tensor) -> Result<f32> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    let larger = |most: f32, value: f32| if value.abs() <= most { most } else { value.abs() };
    Ok(values.into_iter().fold(0.0, larger))
}

/// The model's own weights, whose files are opened when the first is asked for.
struct BaseWeights<'a> {
    open: &'a Reopen,
    unet: OnceCell<Weights>,
    text: OnceCell<Weights>,
    text_2: OnceCell<Weights>,
}

impl BaseWeights<'_> {
    /// A weight (out, in, k, k) f32.
    fn read(&self, network: Network, name: &str, target: LoraTarget) -> Result<Tensor> {
        let cell = match network {
            Network::UNet => &self.unet,
            Network::TextEncoder => &self.text,
            Network::TextEncoder2 => &self.text_2,
        };
        if cell.get().is_none() {
            let _ = cell.set((self.open)(network)?);
        }
        let name = name.strip_prefix(SECOND_ENCODER).unwrap_or(name);
        // Only some files of text encoders have this prefix.
        let names = [format!("{name}.weight"), format!("text_model.{name}.weight")];
        let found = cell.get().and_then(|weights| {
            let name = names.iter().find(|name| weights.shape(name).is_some())?;
            Some((weights, name))
        });
        let bare = || cell.get().filter(|weights| weights.shape(name).is_some());
        if let (None, Some(weights)) = (&found, bare()) {
            // OpenCLIP's projection: a matrix (in, out).
            let matrix = weights.widened(name)?.reshape((target.inputs, target.outputs))?;
            let weight = matrix.t()?.contiguous()?;
            return Ok(weight.reshape((target.outputs, target.inputs, 1, 1))?);
        }
        let Some((weights, name)) = found else {
            return Err(Error::config(&names[0], "is not in the model's files any more"));
        };
        let LoraTarget { inputs, outputs, geometry } = target;
        let kernel = geometry.map_or(1, |geometry| geometry.kernel);
        Ok(weights.widened(name)?.reshape((outputs, inputs, kernel, kernel))?)
    }
}
