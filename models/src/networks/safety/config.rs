//! `safety_checker/config.json` and `feature_extractor/preprocessor_config.json`, key for key.

use serde_json::{Value, json};

use crate::error::Result;
use crate::files::{Keys, Source};
use crate::networks::config::VisionConfig;
use crate::networks::vision::Normalization;

/// `safety_checker/config.json` of a `StableDiffusionSafetyChecker`: CLIP's vision tower.
pub(super) fn tower(source: &Source) -> Result<VisionConfig> {
    VisionConfig::parse_clip(Keys::read(source, "safety_checker/config.json")?)
}

/// `feature_extractor/preprocessor_config.json` of a `CLIPImageProcessor`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Preprocessor {
    /// The shorter side after resizing.
    pub(super) shortest_edge: usize,
    pub(super) normalization: Normalization,
}

impl Preprocessor {
    /// Of images that are cropped to `side` x `side` pixels.
    pub(super) fn read(source: &Source, side: usize) -> Result<Self> {
        Self::parse(Keys::read(source, "feature_extractor/preprocessor_config.json")?, side)
    }

    fn parse(mut keys: Keys, side: usize) -> Result<Self> {
        for step in ["do_resize", "do_center_crop", "do_rescale", "do_normalize"] {
            keys.only(step, &[json!(true)])?;
        }
        // Bicubic, in Pillow's numbering.
        keys.only("resample", &[json!(3)])?;
        keys.only("crop_size", &[json!(side), json!({ "height": side, "width": side })])?;
        let size: Value = keys.take("size", json!(224))?;
        let shortest_edge = size.as_u64().or_else(|| size.get("shortest_edge")?.as_u64());
        let shortest_edge = shortest_edge.filter(|edge| *edge >= side as u64);
        let Some(shortest_edge) = shortest_edge.and_then(|edge| usize::try_from(edge).ok()) else {
            let reason = format!("{size} must be a shortest edge of at least {side} pixels");
            return Err(keys.invalid("size", reason));
        };
        let Normalization { rescale_factor, mean, std } = Normalization::default();
        let normalization = Normalization {
            mean: keys.take("image_mean", mean)?,
            std: keys.take("image_std", std)?,
            rescale_factor: keys.take("rescale_factor", rescale_factor)?,
        };
        keys.drop_idle(&[
            "do_convert_rgb",
            "feature_extractor_type",
            "image_processor_type",
            "processor_class",
        ]);
        keys.finish()?;
        Ok(Self { shortest_edge, normalization })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(file: Value) -> Result<VisionConfig> {
        VisionConfig::parse_clip(Keys::new("safety_checker/config.json", file)?)
    }

    fn preprocessor(file: Value) -> Result<Preprocessor> {
        let name = "feature_extractor/preprocessor_config.json";
        Preprocessor::parse(Keys::new(name, file)?, 224)
    }

    #[test]
    fn published_files_are_understood() {
        // The kinds of keys that v1.4's files have, one of each.
        let checker = json!({
            "_name_or_path": "x", "_commit_hash": null, "architectures": ["Checker"],
            "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
            "projection_dim": 768, "torch_dtype": "float32", "transformers_version": null,
            "text_config": { "hidden_size": 768 }, "text_config_dict": { "hidden_size": 768 },
            "vision_config": {
                "_name_or_path": "", "add_cross_attention": false, "dropout": 0.0,
                "id2label": { "0": "LABEL_0" }, "image_size": 224, "model_type": "clip_vision_model",
                "num_channels": 3, "patch_size": 32, "pruned_heads": {}, "return_dict": true,
                "top_k": 50, "typical_p": 1.0, "hidden_act": "quick_gelu",
            },
            "vision_config_dict": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                "num_hidden_layers": 24, "patch_size": 14,
            },
        });
        let extractor = json!({
            "crop_size": 224, "do_center_crop": true, "do_normalize": true, "do_resize": true,
            "feature_extractor_type": "CLIPFeatureExtractor", "do_convert_rgb": true,
            "image_mean": [0.5, 0.5, 0.5], "resample": 3, "size": 224,
        });
        let read = config(checker.clone()).unwrap();
        assert_eq!(
            (read.transformer.hidden_size, read.patch_size, read.projection_dim),
            (1024, 14, 768)
        );
        let read = preprocessor(extractor.clone()).unwrap();
        assert_eq!((read.shortest_edge, read.normalization.mean), (224, [0.5; 3]));

        let (mut mish, mut nearest) = (checker, extractor);
        mish["vision_config"]["hidden_act"] = "mish".into();
        nearest["resample"] = 0.into();
        let error = config(mish).unwrap_err().to_string();
        let start = "safety_checker/config.json: vision_config: hidden_act: ";
        assert!(error.starts_with(start), "{error}");
        let error = preprocessor(nearest).unwrap_err().to_string();
        assert!(error.contains("preprocessor_config.json: resample: 0"), "{error}");
    }
}
