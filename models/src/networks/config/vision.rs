//! `config.json` of CLIP's vision tower, which the safety checker and the image encoder of IP-Adapters
//! have in common, or what its tensors tell in its place.

use serde_json::json;

use super::clip::{ClipConfig, IDLE_TEXT_KEYS};
use crate::error::{Error, Result};
use crate::files::{Keys, Weights};
use crate::ops::Activation;

/// The published towers: channels, layers, heads and activation, of which no shape tells the last two.
const TOWERS: [(usize, usize, usize, Activation); 5] = [
    // ViT-B and ViT-L of OpenAI.
    (768, 12, 12, Activation::QuickGelu),
    (1024, 24, 16, Activation::QuickGelu),
    // ViT-H, ViT-g and ViT-bigG of OpenCLIP.
    (1280, 32, 16, Activation::Gelu),
    (1408, 40, 16, Activation::Gelu),
    (1664, 48, 16, Activation::Gelu),
];

/// The configuration of a `CLIPVisionModelWithProjection`.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::networks) struct VisionConfig {
    pub(in crate::networks) transformer: ClipConfig,
    /// Pixels of an image, along one side.
    pub(in crate::networks) image_size: usize,
    /// Pixels of a patch, along one side.
    pub(in crate::networks) patch_size: usize,
    /// Channels of the embedding of an image.
    pub(in crate::networks) projection_dim: usize,
}

impl VisionConfig {
    /// From the `config.json` of a tower, or of a whole CLIP model.
    pub(in crate::networks) fn parse(mut keys: Keys) -> Result<Self> {
        if keys.has("vision_config") || keys.has("vision_config_dict") {
            return Self::parse_clip(keys);
        }
        let projection_dim = keys.count("projection_dim", 1, 512)?;
        Self::take(keys, projection_dim)
    }

    /// From the `config.json` of a whole CLIP model, or of a safety checker.
    pub(in crate::networks) fn parse_clip(mut keys: Keys) -> Result<Self> {
        keys.only("model_type", &[json!("clip")])?;
        let projection_dim = keys.take("projection_dim", 512)?;
        let mut vision = keys.nested("vision_config")?;
        // In transformers the older key takes precedence.
        vision.overlay(keys.nested("vision_config_dict")?);
        keys.drop_idle(&["text_config", "text_config_dict", "logit_scale_init_value"]);
        keys.drop_idle(&IDLE_TEXT_KEYS);
        keys.finish()?;
        Self::take(vision, projection_dim)
    }

    fn take(mut keys: Keys, projection_dim: usize) -> Result<Self> {
        keys.only("model_type", &[json!("clip_vision_model")])?;
        keys.only("num_channels", &[json!(3)])?;
        keys.only("pruned_heads", &[json!({})])?;
        let config = Self {
            transformer: ClipConfig::take(&mut keys, (768, 3072, 12))?,
            image_size: keys.count("image_size", 1, 224)?,
            patch_size: keys.count("patch_size", 1, 32)?,
            projection_dim,
        };
        let patch = config.patch_size;
        if config.image_size < patch {
            let reason = format!("{patch} is no part of {} pixels", config.image_size);
            return Err(keys.invalid("patch_size", reason));
        }
        keys.drop_idle(&IDLE_TEXT_KEYS);
        keys.finish()?;
        Ok(config)
    }

    /// From the shapes of the tensors, whose names begin with `prefix` but for the projection's.
    pub(in crate::networks) fn infer(weights: &Weights, prefix: &str) -> Result<Self> {
        let side = |name: &str, dimension: usize| {
            let shape = weights.shape(name).ok_or_else(|| Error::Tensor {
                file: weights.file_names(),
                tensor: name.to_owned(),
                reason: "missing; this is no image encoder of CLIP".into(),
            })?;
            Ok::<_, Error>(shape.get(dimension).copied().unwrap_or(1))
        };
        let of = |name: &str| format!("{prefix}{name}");
        let patches = of("embeddings.patch_embedding.weight");
        let (hidden_size, patch_size) = (side(&patches, 0)?, side(&patches, 2)?);
        let tokens = side(&of("embeddings.position_embedding.weight"), 0)?;
        let layer = |i: usize, name: &str| of(&format!("encoder.layers.{i}.{name}.weight"));
        let num_hidden_layers =
            (0..).find(|i| weights.shape(&layer(*i, "layer_norm1")).is_none()).unwrap_or(0);
        let tower = TOWERS
            .iter()
            .find(|(width, layers, ..)| (*width, *layers) == (hidden_size, num_hidden_layers));
        let Some(&(_, _, heads, activation)) = tower else {
            return Err(Error::config(
                weights.file_names(),
                format!(
                    "has no config.json beside it, and {num_hidden_layers} layers of {hidden_size} \
                     channels tell neither its heads nor its activation"
                ),
            ));
        };
        // As many patches along each side, and one token for the whole.
        let across = tokens.saturating_sub(1).isqrt();
        if patch_size == 0 || across == 0 {
            let reason = "has no patches of pixels, or no place for one".into();
            return Err(Error::Tensor { file: weights.file_names(), tensor: patches, reason });
        }
        Ok(Self {
            transformer: ClipConfig {
                hidden_size,
                intermediate_size: side(&layer(0, "mlp.fc1"), 0)?,
                num_hidden_layers,
                num_attention_heads: heads,
                hidden_act: activation,
                layer_norm_eps: 1e-5,
            },
            image_size: across * patch_size,
            patch_size,
            projection_dim: side("visual_projection.weight", 0)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_file_is_understood() {
        let file = json!({
            "_name_or_path": "./image_encoder", "architectures": ["CLIPVisionModelWithProjection"],
            "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1280,
            "image_size": 224, "initializer_factor": 1.0, "initializer_range": 0.02,
            "intermediate_size": 5120, "layer_norm_eps": 1e-5, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 32, "patch_size": 14,
            "projection_dim": 1024, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0",
        });
        let config = VisionConfig::parse(Keys::new("config.json", file).unwrap()).unwrap();
        assert_eq!((config.transformer.hidden_size, config.projection_dim), (1280, 1024));
        assert_eq!((config.image_size, config.patch_size), (224, 14));
        let file = json!({ "model_type": "siglip_vision_model" });
        let error = VisionConfig::parse(Keys::new("config.json", file).unwrap()).unwrap_err();
        assert!(error.to_string().contains("siglip_vision_model"), "{error}");
    }
}
