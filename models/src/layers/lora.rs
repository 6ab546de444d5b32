//! LoRA files: low-rank deltas of weights of the UNet and of the text encoder, in the naming
//! schemes of kohya's scripts (of diffusers' layers or of the original code's), of diffusers and of
//! PEFT. How they are added is in [`super::lora_layer`].
//!
//! Reference: diffusers 0.42 `loaders/lora_conversion_utils.py`, `utils/state_dict_utils.py`;
//! LyCORIS for `lora_mid`. Every tensor of a file must match a weight: a skipped tensor would
//! silently change the image.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::files::{AssetCache, AssetFile, LoraTarget, LoraTargets, Weights, ldm};
use crate::ops::{Conv2d, Linear};

/// The weights of a model that a LoRA may add to, by their names in LoRA files.
pub(crate) struct TargetIndex {
    unet: HashMap<String, String>,
    text: HashMap<String, String>,
    targets: LoraTargets,
    /// Residual blocks per level of the UNet.
    layers: usize,
    device: Device,
    dtype: DType,
}

/// A loaded file: the down and the up projection of each weight.
pub(crate) struct Lora {
    id: u64,
    file: AssetFile,
    linears: HashMap<String, (Linear, Linear)>,
    convs: HashMap<String, (Conv2d, Linear)>,
    bytes: u64,
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
            let lora = Lora::read(file, &self.targets)?;
            let bytes = lora.bytes();
            Ok((lora, bytes))
        })
    }
}

/// The role of a tensor for its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Down,
    Mid,
    Up,
    Alpha,
}

/// Suffixes of names. Longer ones come before those that they end in.
const ROLES: [(&str, Role); 15] = [
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_mid.weight", Role::Mid),
    (".lora_up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    ("_lora.alpha", Role::Alpha),
    (".alpha", Role::Alpha),
];

/// Marks of other methods in names, which are rejected, and what they are called.
const REFUSED: [(&str, &str); 12] = [
    (".hada_", "LoHa"),
    (".lokr_", "LoKr"),
    (".dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    (".oft_", "OFT"),
    (".on_input", "IA3"),
    (".diff", "a full difference of weights"),
    (".lora_B.bias", "a bias beside a LoRA"),
    ("bundle_emb.", "an embedding beside a LoRA"),
    ("lora_te1_", "SDXL's text encoder"),
    ("lora_te2_", "SDXL's second text encoder"),
    ("text_encoder_2.", "SDXL's second text encoder"),
];

/// The tensors of one weight.
type Parts = BTreeMap<Role, String>;

impl TargetIndex {
    pub(crate) fn new(
        (unet, layers): (LoraTargets, usize),
        text: LoraTargets,
        device: &Device,
        dtype: DType,
    ) -> Self {
        let flat =
            |targets: &LoraTargets| targets.keys().map(|name| (flat(name), name.clone())).collect();
        Self {
            unet: flat(&unet),
            text: flat(&text),
            // The networks have no name in common.
            targets: unet.into_iter().chain(text).collect(),
            layers,
            device: device.clone(),
            dtype,
        }
    }

    /// The weight that a tensor belongs to, and its role.
    fn find(&self, tensor: &str) -> Option<(&str, Role)> {
        let (end, role) = ROLES.iter().find(|(end, _)| tensor.ends_with(end))?;
        // Attention processors once were named apart from their layers.
        let module = tensor.strip_suffix(end)?.replace(".processor.", ".");
        let to_out = end.starts_with("_lora") && module.ends_with("to_out");
        let module = flat(&module) + if to_out { "_0" } else { "" };
        let text = ["lora_te_", "text_encoder_"];
        let found = match text.iter().find_map(|start| module.strip_prefix(start)) {
            Some(name) => self.text.get(name.strip_prefix("text_model_").unwrap_or(name)),
            None => {
                let of_unet = ["lora_unet_", "unet_"];
                let name = of_unet.iter().find_map(|start| module.strip_prefix(start));
                let name = name.unwrap_or(&module);
                self.unet.get(name).or_else(|| self.unet.get(&original(name, self.layers)?))
            }
        };
        Some((found?, *role))
    }
}

/// Kohya's scripts write every dot as an underscore.
fn flat(name: &str) -> String {
    name.replace('.', "_")
}

/// The name of a UNet weight of the original code, written with underscores, in the Diffusers
/// format.
fn original(name: &str, layers: usize) -> Option<String> {
    let parts = |name: &str, count: usize| -> Option<String> {
        let mut parts = name.splitn(count + 1, '_');
        let numbers = parts.by_ref().take(count).collect::<Vec<_>>();
        let rest = parts.next().unwrap_or_default();
        let digits = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        numbers.iter().all(digits).then(|| format!("{}.{rest}", numbers.join(".")))
    };
    let blocks = [("input_blocks", 2), ("output_blocks", 2), ("middle_block", 1)];
    let found =
        blocks.iter().chain(&[("time_embed", 1), ("out", 1)]).find_map(|(block, count)| {
            let rest = name.strip_prefix(block)?.strip_prefix('_')?;
            Some(format!("{block}.{}", parts(rest, *count)?))
        })?;
    let mut dotted = found;
    for layer in ["in_layers", "out_layers", "emb_layers"] {
        dotted = dotted.replace(&format!("{layer}_"), &format!("{layer}."));
    }
    let dotted = dotted.trim_end_matches('.');
    Some(flat(ldm::unet(&format!("{dotted}."), layers).trim_end_matches('.')))
}

impl Lora {
    /// Reads a file for a model.
    pub(crate) fn read(from: &AssetFile, targets: &TargetIndex) -> Result<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let weights = Weights::copied(&from.path)?;
        let file = weights.file_names();
        let refuse = |tensor: &str, reason: String| {
            Err(Error::Tensor { file: file.clone(), tensor: tensor.to_owned(), reason })
        };
        let mut adapted: BTreeMap<&str, Parts> = BTreeMap::new();
        for tensor in weights.names() {
            if let Some((_, kind)) = REFUSED.iter().find(|(mark, _)| tensor.contains(mark)) {
                return refuse(tensor, format!("is of {kind}; only LoRA and LoCon are supported"));
            }
            let Some((name, role)) = targets.find(tensor) else {
                return refuse(tensor, "no weight of this model has this name".into());
            };
            let parts = adapted.entry(name).or_default();
            if let Some(other) = parts.insert(role, tensor.to_owned()) {
                return refuse(tensor, format!("is for {name}, as is {other}"));
            }
        }
        if adapted.is_empty() {
            return Err(Error::config(file, "holds no LoRA"));
        }
        let mut lora = Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            file: from.clone(),
            linears: HashMap::new(),
            convs: HashMap::new(),
            bytes: 0,
        };
        let alphas = Alphas::read(&weights)?;
        for (name, parts) in adapted {
            let target = targets.targets[name];
            let pair = Pair { weights: &weights, name, parts: &parts, target };
            lora.add(&pair, &alphas, targets)?;
        }
        Ok(lora)
    }

    fn add(&mut self, pair: &Pair<'_>, alphas: &Alphas, targets: &TargetIndex) -> Result<()> {
        let TargetIndex { device, dtype, .. } = targets;
        let (down, up) = pair.tensors(alphas)?;
        let up = Linear::new(&up, None, device, *dtype)?;
        let name = pair.name.to_owned();
        match pair.target.geometry {
            None => {
                let down = Linear::new(&down, None, device, *dtype)?;
                self.bytes += (down.bytes() + up.bytes()) as u64;
                self.linears.insert(name, (down, up));
            }
            Some(geometry) => {
                let none = Tensor::zeros(down.dim(0)?, DType::F32, &Device::Cpu)?;
                let down = Conv2d::new(&down, &none, geometry, device, *dtype)?;
                self.bytes += (down.bytes() + up.bytes()) as u64;
                self.convs.insert(name, (down, up));
            }
        }
        Ok(())
    }

    /// A unique id of this read, for comparison.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The file, in the version that was read.
    pub(crate) fn file(&self) -> &AssetFile {
        &self.file
    }

    /// Bytes of its projections.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn linear(&self, name: &str) -> Option<&(Linear, Linear)> {
        self.linears.get(name)
    }

    pub(crate) fn conv(&self, name: &str) -> Option<&(Conv2d, Linear)> {
        self.convs.get(name)
    }
}

/// The tensors of one weight in a file.
struct Pair<'a> {
    weights: &'a Weights,
    name: &'a str,
    parts: &'a Parts,
    target: LoraTarget,
}

impl Pair<'_> {
    /// Down (rank, in) or (rank, in, k, k), and up (out, rank) times alpha / rank.
    fn tensors(&self, alphas: &Alphas) -> Result<(Tensor, Tensor)> {
        let LoraTarget { inputs, outputs, geometry } = self.target;
        let rank = self.dims(Role::Down)?.first().copied().unwrap_or_default().max(1);
        let kernel = geometry.map_or(1, |geometry| geometry.kernel);
        let mid = self.parts.contains_key(&Role::Mid);
        let mid = mid.then(|| self.tensor(Role::Mid, (rank, rank, kernel))).transpose()?;
        let down =
            self.tensor(Role::Down, (rank, inputs, if mid.is_some() { 1 } else { kernel }))?;
        let down = match mid {
            Some(mid) => {
                // mid over down is one convolution: their product over the rank.
                let mid = mid.permute((0, 2, 3, 1))?.contiguous()?;
                let mid = mid.reshape((rank * kernel * kernel, rank))?;
                let down = mid.matmul(&down.reshape((rank, inputs))?)?;
                down.reshape((rank, kernel, kernel, inputs))?.permute((0, 3, 1, 2))?.contiguous()?
            }
            None => down,
        };
        let down = if geometry.is_some() { down } else { down.reshape((rank, inputs))? };
        let up = self.tensor(Role::Up, (outputs, rank, 1))?.reshape((outputs, rank))?;
        let alpha = match self.parts.get(&Role::Alpha) {
            Some(name) => {
                let listed = self.weights.shape(name).is_some_and(|shape| shape.len() == 1);
                let alpha = self.weights.tensor(name, if listed { &[1] } else { &[] })?;
                f64::from(alpha.flatten_all()?.to_vec1::<f32>()?.first().copied().unwrap_or(0.0))
            }
            None => alphas.of(self.name).unwrap_or(rank as f64),
        };
        Ok((down, (up * (alpha / rank as f64))?))
    }

    fn dims(&self, role: Role) -> Result<&[usize]> {
        let shape = self.parts.get(&role).and_then(|name| self.weights.shape(name));
        shape.ok_or_else(|| {
            let given = self.parts.values().next().cloned().unwrap_or_default();
            let which = if role == Role::Up { "up" } else { "down" };
            Error::Tensor {
                file: self.weights.file_names(),
                tensor: given,
                reason: format!("has no {which} projection beside it"),
            }
        })
    }

    /// A projection (out, in, k, k); that of a 1x1 convolution may be stored as (out, in).
    fn tensor(&self, role: Role, (out, inputs, kernel): (usize, usize, usize)) -> Result<Tensor> {
        let square = kernel > 1 || self.dims(role)?.len() == 4;
        let shape = [out, inputs, kernel, kernel];
        let shape = if square { &shape[..] } else { &shape[..2] };
        let tensor = self.weights.tensor(&self.parts[&role], shape)?;
        Ok(tensor.reshape((out, inputs, kernel, kernel))?)
    }
}

/// Alphas from PEFT's settings in a file's header, where there are no alpha tensors.
#[derive(Default)]
struct Alphas {
    unet: Option<Alpha>,
    text: Option<Alpha>,
}

struct Alpha {
    all: f64,
    /// Exceptions, by suffix of the name.
    others: Vec<(String, f64)>,
}

impl Alphas {
    fn read(weights: &Weights) -> Result<Self> {
        const KEY: &str = "lora_adapter_metadata";
        let Some(text) = weights.note(KEY) else { return Ok(Self::default()) };
        let file = weights.file_names();
        let settings: Value = serde_json::from_str(text)
            .map_err(|error| Error::config(&file, format!("{KEY}: {error}")))?;
        let of = |network: &str| -> Result<Option<Alpha>> {
            let setting = |name: &str| &settings[format!("{network}.{name}")];
            for method in ["use_dora", "use_rslora"] {
                if setting(method) == true {
                    let reason = format!("{KEY}: {network}.{method} is not supported");
                    return Err(Error::config(&file, reason));
                }
            }
            let Some(all) = setting("lora_alpha").as_f64() else { return Ok(None) };
            let others = setting("alpha_pattern").as_object();
            let others = others.into_iter().flatten();
            let others =
                others.filter_map(|(name, alpha)| Some((name.clone(), alpha.as_f64()?))).collect();
            Ok(Some(Alpha { all, others }))
        };
        Ok(Self { unet: of("unet")?, text: of("text_encoder")? })
    }

    fn of(&self, weight: &str) -> Option<f64> {
        let text = weight.starts_with("encoder.");
        let alpha = if text { self.text.as_ref() } else { self.unet.as_ref() }?;
        let other = alpha.others.iter().find(|(name, _)| {
            let name = name.strip_prefix("text_model.").unwrap_or(name);
            weight.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        });
        Some(other.map_or(alpha.all, |(_, alpha)| *alpha))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_original_code_are_understood() {
        let table = [
            (
                "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
                "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            ),
            ("input_blocks_4_0_in_layers_2", "down_blocks_1_resnets_0_conv1"),
            ("input_blocks_4_0_emb_layers_1", "down_blocks_1_resnets_0_time_emb_proj"),
            ("input_blocks_4_0_skip_connection", "down_blocks_1_resnets_0_conv_shortcut"),
            ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
            ("middle_block_1_proj_in", "mid_block_attentions_0_proj_in"),
            ("middle_block_2_out_layers_3", "mid_block_resnets_1_conv2"),
            ("output_blocks_5_2_conv", "up_blocks_1_upsamplers_0_conv"),
            ("output_blocks_5_1_proj_out", "up_blocks_1_attentions_2_proj_out"),
            ("time_embed_2", "time_embedding_linear_2"),
            ("out_2", "conv_out"),
        ];
        for (theirs, ours) in table {
            assert_eq!(original(theirs, 2).as_deref(), Some(ours), "{theirs}");
        }
        assert_eq!(original("input_blocks", 2), None);
        assert_eq!(original("output_blocks_x_1_proj_in", 2), None);
    }
}
