//! The configuration of the original code, `NAME.yaml` beside `NAME.safetensors`: what of it no
//! tensor tells. The rest, which describes the networks, is in the shapes of the tensors.

use serde::Deserialize;

use crate::error::{Error, Result};

#[derive(Deserialize)]
struct File {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    params: OriginalConfig,
}

/// `model.params`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct OriginalConfig {
    /// What the UNet predicts: `eps`, the default, `v` or `x0`.
    parameterization: Option<String>,
    /// In files of Stability's later code, in place of `parameterization`.
    denoiser_config: Option<serde_json::Value>,
    beta_schedule: Option<String>,
    pub(super) linear_start: Option<f64>,
    pub(super) linear_end: Option<f64>,
    pub(super) timesteps: Option<usize>,
    pub(super) scale_factor: Option<f64>,
}

/// Maximum of `timesteps`, as of the `num_train_timesteps` of the Diffusers format.
const MAX_TIMESTEPS: usize = 100_000;

/// Why a text cannot be read. It reads on from the file's name.
fn refusal(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error as Yaml;
    match error.without_snippet() {
        Yaml::DuplicateMappingKey { key: Some(key), .. } => format!("has the key {key} twice"),
        Yaml::DuplicateMappingKey { .. } => "has a key twice".into(),
        Yaml::MultipleDocuments { .. } => "holds several documents, not one configuration".into(),
        Yaml::AliasError { .. } => "repeats a part of itself (&, *) where it does not fit".into(),
        error => {
            let error = error.to_string();
            let line = error.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
            format!("no configuration of the original code: {}", line.trim())
        }
    }
}

impl OriginalConfig {
    /// Reads a file.
    pub(super) fn parse(name: &str, bytes: &[u8]) -> Result<Self> {
        let file: File = serde_saphyr::from_slice(bytes)
            .map_err(|error| Error::config(name, refusal(&error)))?;
        let params = file.model.params;
        params.check().map_err(|reason| Error::config(name, reason))?;
        Ok(params)
    }

    fn check(&self) -> std::result::Result<(), String> {
        self.prediction()?;
        self.betas()?;
        let ends = [("linear_start", self.linear_start), ("linear_end", self.linear_end)];
        for (key, beta) in ends {
            if let Some(beta) = beta.filter(|beta| !(*beta > 0.0 && *beta < 1.0)) {
                return Err(format!("model.params.{key}: {beta} must be between 0 and 1"));
            }
        }
        match (self.timesteps, self.scale_factor) {
            (Some(steps), _) if !(1..=MAX_TIMESTEPS).contains(&steps) => {
                Err(format!("model.params.timesteps: {steps} must be 1 to {MAX_TIMESTEPS}"))
            }
            (_, Some(scale)) if scale == 0.0 || !scale.is_finite() => {
                Err(format!("model.params.scale_factor: {scale} is no scale"))
            }
            _ => Ok(()),
        }
    }

    /// `beta_schedule` of the Diffusers format, which names the original code's differently.
    pub(super) fn betas(&self) -> std::result::Result<&'static str, String> {
        match self.beta_schedule.as_deref() {
            None | Some("linear") => Ok("scaled_linear"),
            Some("sqrt_linear") => Ok("linear"),
            Some("cosine") => Ok("squaredcos_cap_v2"),
            Some(other) => Err(format!(
                "model.params.beta_schedule: {other:?} is not linear, sqrt_linear or cosine"
            )),
        }
    }

    /// `prediction_type` of the Diffusers format. The error reads on from the file's name.
    pub(super) fn prediction(&self) -> std::result::Result<&'static str, String> {
        match self.parameterization.as_deref() {
            Some("eps") => Ok("epsilon"),
            Some("v") => Ok("v_prediction"),
            Some("x0") => Ok("sample"),
            Some(other) => {
                Err(format!("model.params.parameterization: {other:?} is not eps, v or x0"))
            }
            None => {
                let denoiser = self.denoiser_config.as_ref();
                let velocity = denoiser.is_some_and(|value| value.to_string().contains("VScaling"));
                Ok(if velocity { "v_prediction" } else { "epsilon" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(params: &str) -> String {
        let text = format!(
            "# Stable Diffusion\nmodel:\n  base_learning_rate: 1.0e-4\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n{params}    linear_start: 0.00085\n    timesteps: 1000\n    use_ema: False\n    scale_factor: 0.18215\n    unet_config:\n      params:\n        attention_resolutions: [ 4, 2, 1 ]\n        use_checkpoint: True\n"
        );
        match OriginalConfig::parse("a.yaml", text.as_bytes()) {
            Ok(config) => {
                assert_eq!((config.linear_start, config.timesteps), (Some(0.00085), Some(1000)));
                config.prediction().map(str::to_owned).unwrap()
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_prediction_is_read() {
        assert_eq!(prediction(""), "epsilon");
        assert_eq!(prediction("    parameterization: \"v\"\n"), "v_prediction");
        assert_eq!(prediction("    parameterization: v # of 2.x\n"), "v_prediction");
        assert_eq!(prediction("    parameterization: eps\n"), "epsilon");
        let later = "    denoiser_config:\n      params:\n        scaling_config:\n          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n";
        assert_eq!(prediction(later), "v_prediction");
        let unknown = prediction("    parameterization: flow\n");
        assert!(unknown.starts_with("a.yaml: model.params.parameterization"), "{unknown}");
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_key() {
        let cases = [
            ("linear_start: .nan", "model.params.linear_start"),
            ("linear_end: 2", "model.params.linear_end"),
            ("timesteps: 1000000000000", "model.params.timesteps"),
            ("scale_factor: 0", "model.params.scale_factor"),
            ("beta_schedule: sqrt", "model.params.beta_schedule"),
            ("timesteps: 1000\n    timesteps: 900", "timesteps twice"),
            ("timesteps: 1000\n---\nmodel: 3", "several documents"),
        ];
        for (line, words) in cases {
            let text = format!("model:\n  params:\n    {line}\n");
            let error = OriginalConfig::parse("a.yaml", text.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("a.yaml: ") && error.contains(words), "{error}");
        }
        let text = b"model:\n  params:\n    beta_schedule: cosine\n";
        let config = OriginalConfig::parse("a.yaml", text).unwrap();
        assert_eq!(config.betas().unwrap(), "squaredcos_cap_v2");
    }

    #[test]
    fn other_files_are_refused_by_name() {
        for text in ["", "model: 3", "a: [1", "just text"] {
            let error = OriginalConfig::parse("a.yaml", text.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("a.yaml: ") && error.lines().count() == 1, "{error}");
        }
    }
}
