//! `config.json` of a ControlNet, or what its tensors and the UNet that it steers tell in its place.

use serde_json::json;

use super::unet::{AddedConfig, MidBlock, UNetConfig};
use crate::error::{Error, Result};
use crate::files::{Keys, Weights};

/// Channels of the hint network of every published ControlNet.
const HINT_CHANNELS: [usize; 4] = [16, 32, 96, 256];

/// Maximum number of levels of a hint network.
const MAX_HINT_LEVELS: usize = 8;

/// The configuration of a `ControlNetModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlNetConfig {
    /// That of its copy of the UNet; of the way up, nothing is used.
    pub unet: UNetConfig,
    /// Channels of the hint network's levels, each half as large as the one before.
    pub hint_channels: Vec<usize>,
    /// Whether what it adds is the same for all pixels, their mean.
    pub global_pool_conditions: bool,
    /// Whether it was trained on pictures whose first channel is blue.
    pub is_bgr: bool,
}

impl ControlNetConfig {
    /// From a `config.json`.
    pub(crate) fn parse(mut keys: Keys) -> Result<Self> {
        keys.only("_class_name", &[json!("ControlNetModel")])?;
        keys.only("conditioning_channels", &[json!(3)])?;
        let key = "conditioning_embedding_out_channels";
        let hint_channels: Vec<usize> = keys.take(key, HINT_CHANNELS.to_vec())?;
        if !(1..=MAX_HINT_LEVELS).contains(&hint_channels.len()) || hint_channels.contains(&0) {
            return Err(keys.invalid(key, format!("{hint_channels:?} are no levels")));
        }
        let key = "controlnet_conditioning_channel_order";
        let is_bgr = match keys.take(key, String::from("rgb"))?.as_str() {
            "rgb" => false,
            "bgr" => true,
            other => return Err(keys.invalid(key, format!("{other:?} must be rgb or bgr"))),
        };
        let global_pool_conditions = keys.take("global_pool_conditions", false)?;
        let levels = keys.length("down_block_types").unwrap_or(4);
        // Read as a UNet, whose way up it lacks.
        let way_up = json!({
            "_class_name": "UNet2DConditionModel", "up_block_types": vec!["UpBlock2D"; levels],
        });
        keys.overlay(Keys::new("config.json", way_up)?);
        let unet = UNetConfig { up_depths: Vec::new(), ..UNetConfig::parse(keys)? };
        Ok(Self { unet, hint_channels, global_pool_conditions, is_bgr })
    }

    /// From the shapes of a file's tensors, and what no shape tells (heads, groups of the norms,
    /// the time embedding) from the UNet. `pools` says that the file is one of those that pool.
    pub(crate) fn infer(weights: &Weights, unet: &UNetConfig, pools: bool) -> Result<Self> {
        let side = |name: &str, dimension: usize| {
            let shape = weights.shape(name).ok_or_else(|| Error::Tensor {
                file: weights.file_names(),
                tensor: name.to_owned(),
                reason: "missing; this is no ControlNet".into(),
            })?;
            Ok::<_, Error>(shape.get(dimension).copied().unwrap_or(1))
        };
        let count = |name: &dyn Fn(usize) -> String| {
            (0..).find(|i| weights.shape(&name(*i)).is_none()).unwrap_or(0)
        };
        let conv = |level: usize, i: usize| format!("down_blocks.{level}.resnets.{i}.conv1.weight");
        let levels = count(&|level| conv(level, 0));
        let channels = (0..levels).map(|level| side(&conv(level, 0), 0));
        let block_out_channels = channels.collect::<Result<Vec<_>>>()?;
        let layers_per_block = count(&|i| conv(0, i)).max(1);
        let depth = |p: &str| count(&|i| format!("{p}.transformer_blocks.{i}.norm1.weight"));
        let depths = |level: usize| {
            (0..layers_per_block)
                .map(|layer| depth(&format!("down_blocks.{level}.attentions.{layer}")))
                .collect::<Vec<_>>()
        };
        let down_depths: Vec<_> = (0..levels).map(depths).collect();
        let mid_depth = depth("mid_block.attentions.0");
        let has_middle = weights.shape("mid_block.resnets.0.conv1.weight").is_some();
        let inputs = weights.shape("add_embedding.linear_1.weight").and_then(|shape| shape.get(1));
        let size_width = unet.added.map_or(1, |added| added.size_width);
        let ends = |end: &str| weights.names().find(|name| name.ends_with(end));
        let width = ends("attn2.to_k.weight").map(|name| side(name, 1)).transpose()?;
        let projection = ends("proj_in.weight").and_then(|name| weights.shape(name));
        let hint = |level: usize| match level {
            0 => side("controlnet_cond_embedding.conv_in.weight", 0),
            _ => side(&format!("controlnet_cond_embedding.blocks.{}.weight", 2 * level - 1), 0),
        };
        let blocks = count(&|i| format!("controlnet_cond_embedding.blocks.{i}.weight"));
        if blocks / 2 >= MAX_HINT_LEVELS {
            let reason = format!(
                "its controlnet_cond_embedding has {blocks} blocks, more than {MAX_HINT_LEVELS} \
                 levels have"
            );
            return Err(Error::config(weights.file_names(), reason));
        }
        Ok(Self {
            unet: UNetConfig {
                in_channels: side("conv_in.weight", 1)?,
                layers_per_block,
                down_cross_attention: down_depths.iter().map(|depths| depths[0] > 0).collect(),
                mid_block: match (has_middle, mid_depth) {
                    (false, _) => MidBlock::Absent,
                    (true, 0) => MidBlock::Plain,
                    (true, _) => MidBlock::CrossAttention,
                },
                down_depths,
                mid_depth,
                up_depths: Vec::new(),
                added: inputs.map(|inputs| AddedConfig { size_width, inputs: *inputs }),
                cross_attention_dim: width.unwrap_or(unet.cross_attention_dim),
                use_linear_projection: projection.is_some_and(|shape| shape.len() == 2),
                time_cond_proj_dim: None,
                heads: match block_out_channels.len() == unet.heads.len() {
                    true => unet.heads.clone(),
                    false => vec![1; levels],
                },
                block_out_channels,
                ..unet.clone()
            },
            hint_channels: (0..=blocks / 2).map(hint).collect::<Result<_>>()?,
            global_pool_conditions: pools,
            is_bgr: false,
        })
    }

    /// Checks that it can steer a UNet whose latents have `scale` pixels a side. The error reads
    /// on from the file's name.
    pub(crate) fn check(&self, unet: &UNetConfig, scale: usize) -> std::result::Result<(), String> {
        let same = |key: &str, own: &dyn std::fmt::Debug, model: &dyn std::fmt::Debug| {
            Err(format!(
                "is no ControlNet of this model: its {key} is {own:?}, the UNet's {model:?}"
            ))
        };
        let own = &self.unet;
        if own.block_out_channels != unet.block_out_channels {
            let key = "block_out_channels";
            return same(key, &own.block_out_channels, &unet.block_out_channels);
        }
        if own.layers_per_block != unet.layers_per_block {
            return same("layers_per_block", &own.layers_per_block, &unet.layers_per_block);
        }
        if own.cross_attention_dim != unet.cross_attention_dim {
            let key = "cross_attention_dim";
            return same(key, &own.cross_attention_dim, &unet.cross_attention_dim);
        }
        if own.added != unet.added {
            if let (Some(own), Some(unet)) = (own.added, unet.added) {
                return match own.inputs == unet.inputs {
                    true => same("addition_time_embed_dim", &own.size_width, &unet.size_width),
                    false => {
                        let key = "projection_class_embeddings_input_dim";
                        same(key, &own.inputs, &unet.inputs)
                    }
                };
            }
            let words = |xl| if xl { "takes" } else { "does not take" };
            let (own, model) = (words(own.added.is_some()), words(unet.added.is_some()));
            return Err(format!(
                "is no ControlNet of this model: it {own} the pooled prompts and sizes of Stable \
                 Diffusion XL, the UNet {model} them"
            ));
        }
        if own.in_channels != unet.out_channels {
            let (channels, latents) = (own.in_channels, unet.out_channels);
            return Err(format!("takes {channels} channels, but latents have {latents}"));
        }
        let shrinks = 1_usize << (self.hint_channels.len() - 1);
        if shrinks != scale {
            return Err(format!(
                "shrinks its picture {shrinks} times, but latents are {scale} times smaller"
            ));
        }
        Ok(())
    }

    /// How many residuals it adds: one for each skip, and one for the middle.
    pub fn residuals(&self) -> usize {
        let levels = self.unet.block_out_channels.len();
        // The first, those of the layers, and those of the downsamplers.
        1 + levels * self.unet.layers_per_block + levels.saturating_sub(1) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_file_is_understood() {
        let file = json!({
            "_class_name": "ControlNetModel", "_diffusers_version": "0.16.0.dev0",
            "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
            "class_embed_type": null, "conditioning_embedding_out_channels": [16, 32, 96, 256],
            "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                                 "CrossAttnDownBlock2D", "DownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
            "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
            "norm_num_groups": 32, "num_class_embeds": null, "only_cross_attention": false,
            "projection_class_embeddings_input_dim": null, "resnet_time_scale_shift": "default",
            "upcast_attention": false, "use_linear_projection": false,
        });
        let config = ControlNetConfig::parse(Keys::new("config.json", file).unwrap()).unwrap();
        assert_eq!(config.residuals(), 13);
        assert_eq!(config.hint_channels, HINT_CHANNELS);
        let unet = UNetConfig { cross_attention_dim: 768, ..config.unet.clone() };
        assert_eq!(config.check(&unet, 8), Ok(()));
        let other = UNetConfig { cross_attention_dim: 1024, ..unet };
        let refusal = config.check(&other, 8).unwrap_err();
        assert!(refusal.ends_with("its cross_attention_dim is 768, the UNet's 1024"), "{refusal}");
    }

    #[test]
    fn other_families_are_refused_by_name() {
        for (file, words) in [
            (json!({ "_class_name": "ControlNetUnionModel" }), "_class_name"),
            (json!({ "conditioning_channels": 4 }), "conditioning_channels"),
            (json!({ "controlnet_conditioning_channel_order": "gbr" }), "rgb or bgr"),
            (json!({ "conditioning_embedding_out_channels": [] }), "no levels"),
        ] {
            let keys = Keys::new("config.json", file).unwrap();
            let error = ControlNetConfig::parse(keys).unwrap_err().to_string();
            assert!(error.starts_with("config.json: ") && error.contains(words), "{error}");
        }
    }
}
