//! Alphas from PEFT's settings, for LoRA files that hold no alpha tensors: in the file's header, as
//! diffusers writes them, or in `adapter_config.json` beside `adapter_model.safetensors`, as PEFT
//! does.

use std::path::Path;

use serde_json::Value;

use super::lora_names::Network;
use crate::error::{Error, Result};
use crate::files::Weights;

/// The alphas of both networks.
#[derive(Default)]
pub(super) struct Alphas {
    unet: Option<Alpha>,
    text: Option<Alpha>,
}

struct Alpha {
    all: f64,
    /// Exceptions, by suffix of the name.
    others: Vec<(String, f64)>,
    /// Whether alpha is divided by the root of the rank (rsLoRA), not by the rank.
    root: bool,
}

impl Alphas {
    pub(super) fn read(weights: &Weights, path: &Path) -> Result<Self> {
        const KEY: &str = "lora_adapter_metadata";
        const BESIDE: &str = "adapter_config.json";
        if let Some(text) = weights.note(KEY) {
            let file = weights.file_names();
            let settings = parse(text).map_err(|e| Error::config(file, format!("{KEY}: {e}")))?;
            let of = |network: &str| Alpha::of(|name| &settings[format!("{network}.{name}")]);
            return Ok(Self { unet: of("unet"), text: of("text_encoder") });
        }
        if path.file_stem().is_some_and(|stem| stem == "adapter_model")
            && let Ok(text) = std::fs::read_to_string(path.with_file_name(BESIDE))
        {
            let settings = parse(&text).map_err(|error| Error::config(BESIDE, error))?;
            let of = || Alpha::of(|name| &settings[name]);
            return Ok(Self { unet: of(), text: of() });
        }
        Ok(Self::default())
    }

    /// The alpha of a weight, and whether it is divided by the root of the rank.
    pub(super) fn of(&self, network: Network, weight: &str) -> Option<(f64, bool)> {
        let alpha = match network {
            Network::TextEncoder => self.text.as_ref(),
            Network::UNet => self.unet.as_ref(),
        }?;
        let other = alpha.others.iter().find(|(name, _)| {
            let name = name.strip_prefix("text_model.").unwrap_or(name);
            weight.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        });
        Some((other.map_or(alpha.all, |(_, alpha)| *alpha), alpha.root))
    }
}

fn parse(text: &str) -> std::result::Result<Value, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

impl Alpha {
    fn of<'v>(setting: impl Fn(&str) -> &'v Value) -> Option<Self> {
        let all = setting("lora_alpha").as_f64()?;
        let others = setting("alpha_pattern").as_object().into_iter().flatten();
        let others = others.filter_map(|(name, alpha)| Some((name.clone(), alpha.as_f64()?)));
        Some(Self { all, others: others.collect(), root: *setting("use_rslora") == true })
    }
}
