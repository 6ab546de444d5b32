//! Upscalers of the ESRGAN family: RRDBNet (ESRGAN, BSRGAN, RealSR, Real-ESRGAN, ESRGAN+) and
//! SRVGGNetCompact (Real-ESRGAN's small models). What a file is, its sizes and its scale are told
//! from its tensors.
//!
//! Reference: BasicSR `archs/rrdbnet_arch.py` and `srvgg_arch.py`; the names that tell them apart
//! are spandrel's, which AUTOMATIC1111 reads such files with.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::rrdb::Rrdb;
use super::srvgg::Srvgg;
use crate::error::{Error, Result};
use crate::files::Weights;
use crate::layers::{LayerBuilder, activation_dtype};
use crate::ops::in_pool;

/// The largest scale that is computed.
const MAX_SCALE: usize = 8;

/// What training writes before the names of its tensors.
const PREFIXES: [&str; 7] =
    ["", "params_ema.", "params.", "module.", "netG.", "state_dict.", "model."];

/// Names by which other networks for pictures are told, for the refusal of their files.
const OTHERS: [(&str, &str); 16] = [
    ("model.diffusion_model.", "a checkpoint of Stable Diffusion"),
    ("first_stage_model.", "a checkpoint of Stable Diffusion"),
    ("lora_unet_", "a LoRA"),
    ("lora_up", "a LoRA"),
    ("stylegan_decoder", "GFPGAN"),
    ("quantize.embedding", "CodeFormer"),
    ("overlap_attn", "HAT"),
    ("attn.attn.relative_position_bias_table", "DAT"),
    ("residual_group.blocks", "SwinIR or Swin2SR"),
    ("dysample", "an upscaler with DySample"),
    ("c1_r.sk.weight", "SPAN"),
    ("m_body", "SCUNet"),
    ("unet1.conv1", "Real-CUGAN"),
    ("feats.0.", "PLKSR"),
    ("aggr.", "an attention upscaler"),
    ("decoder.conv_in", "a VAE"),
];

/// An upscaler in memory.
pub struct UpscalerNetwork {
    /// The name of its file.
    file: String,
    network: Network,
    dtype: DType,
    scale: usize,
    bytes: u64,
}

enum Network {
    Rrdb(Box<Rrdb>),
    Srvgg(Srvgg),
}

impl UpscalerNetwork {
    /// Reads a file of safetensors or PyTorch, whose pickle is parsed and not run. A file of
    /// another kind is refused by what it is.
    pub fn read(path: &Path, device: &Device, dtype: DType) -> Result<Self> {
        let weights = Weights::copied(path)?;
        let has = |name: String| weights.shape(&name).is_some();
        let prefixed = |names: &[&str]| {
            let all = |prefix: &&&str| names.iter().all(|name| has(format!("{prefix}{name}")));
            PREFIXES.iter().find(all).map(|prefix| prefix.trim_end_matches('.'))
        };
        let root = |prefix: &str| match prefix {
            "" => LayerBuilder::new(&weights, device, dtype),
            prefix => LayerBuilder::new(&weights, device, dtype).pp(prefix),
        };
        let mut found = None;
        for names in Rrdb::NAMES {
            if let Some(prefix) = prefixed(names.marks) {
                let (rrdb, scale) = Rrdb::load(&root(prefix), &weights, names)?;
                found = Some((Network::Rrdb(Box::new(rrdb)), scale));
                break;
            }
        }
        if found.is_none()
            && let Some(prefix) = prefixed(&Srvgg::MARKS)
        {
            let (srvgg, scale) = Srvgg::load(&root(prefix), &weights)?;
            found = Some((Network::Srvgg(srvgg), scale));
        }
        let Some((network, scale)) = found else {
            return Err(Error::config(weights.file_names(), what_it_is(&weights)));
        };
        if scale > MAX_SCALE {
            let reason = format!("upscales {scale} times; the most is {MAX_SCALE}");
            return Err(Error::config(weights.file_names(), reason));
        }
        let unused = weights.unread();
        if let Some(first) = unused.first() {
            let reason =
                format!("tensor {first:?} is of no part of an upscaler of the ESRGAN family");
            return Err(Error::config(weights.file_names(), reason));
        }
        let bytes = match &network {
            Network::Rrdb(rrdb) => rrdb.bytes(),
            Network::Srvgg(srvgg) => srvgg.bytes(),
        };
        let bytes = bytes as u64;
        let file = weights.file_names();
        Ok(Self { file, network, dtype: activation_dtype(device, dtype), scale, bytes })
    }

    /// The name of its file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// How many pixels each side of a pixel becomes: 1, 2, 4 or 8 with RRDBNet, 1 to 8 with
    /// SRVGGNetCompact.
    pub fn scale(&self) -> usize {
        self.scale
    }

    /// Bytes of its weights.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// An estimate of the activations for a picture of so many pixels, in bytes: at its widest point
    /// two inputs and one output of the last layers, and what a convolution transforms.
    pub fn activation_bytes(&self, pixels: usize) -> u64 {
        let values = match &self.network {
            Network::Rrdb(rrdb) => rrdb.widest() * self.scale * self.scale,
            Network::Srvgg(srvgg) => srvgg.widest(),
        };
        (4 * values * pixels * self.dtype.size_in_bytes()) as u64
    }

    /// Pictures (B, H, W, 3) f32 in 0..1, in RGB as the networks were trained -> (B, s H, s W, 3)
    /// f32, nominally in 0..1. Sides are at least 4 pixels.
    pub fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        in_pool(pictures.device(), || {
            let x = pictures.to_dtype(self.dtype)?.contiguous()?;
            let y = match &self.network {
                Network::Rrdb(rrdb) => rrdb.forward(&x)?,
                Network::Srvgg(srvgg) => srvgg.forward(&x)?,
            };
            Ok(y.to_dtype(DType::F32)?)
        })
    }
}

/// Why a file is no upscaler that can be computed, which reads on from its name.
fn what_it_is(weights: &Weights) -> String {
    let expected = "expected an upscaler of the ESRGAN family (RRDBNet or SRVGGNetCompact)";
    let names: Vec<_> = weights.names().collect();
    let known = OTHERS.iter().find(|(mark, _)| names.iter().any(|name| name.contains(mark)));
    match (known, names.first()) {
        (Some((_, kind)), _) => format!("is {kind}; {expected}"),
        (None, Some(first)) => {
            format!("holds {} tensors, the first {first:?}; {expected}", names.len())
        }
        (None, None) => format!("holds no tensors; {expected}"),
    }
}
