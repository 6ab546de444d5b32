//! PEFT's settings of a LoRA file: alphas and ranks where no tensor says them. In the file's header,
//! as diffusers writes them, or in `adapter_config.json` beside `adapter_model.safetensors`, as PEFT
//! does.
//!
//! Reference: PEFT 0.21 `tuners/*/config.py`, `utils/other.py` (`get_pattern_key`).

use std::io::Read as _;
use std::path::Path;

use regex::{Regex, RegexBuilder};
use serde_json::Value;

use super::builder::SECOND_ENCODER;
use super::lora_names::Network;
use crate::error::{Error, Result};
use crate::files::{PEFT_SETTINGS, Weights, not_json, open, peft_settings};

/// Maximum bytes of a file of settings; that of 1000 weights with an alpha each is 100 KB.
const MAX_BYTES: u64 = 4 << 20;

/// Maximum number of patterns that are not plain names.
const MAX_EXPRESSIONS: usize = 256;

/// Maximum bytes of such a pattern, compiled.
const MAX_EXPRESSION_BYTES: usize = 256 << 10;

/// What a LoRA can begin as without the model's own weights: PEFT's `init_lora_weights`, which may be
/// true or false too. The others, PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and MiCA, begin with parts of
/// them, and most take those out of the model.
const OWN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Settings that, where they are set, ask for more than the change by the file's factors.
const FURTHER: [&str; 4] =
    ["kasa_config", "use_qalora", "alora_invocation_tokens", "layer_replication"];

/// The settings of a weight.
#[derive(Clone, Copy)]
pub(super) struct Setting {
    alpha: f64,
    /// That of the settings; the tensors, if they are factors, have their own.
    pub(super) rank: f64,
    /// Whether alpha is divided by the root of the rank (rsLoRA), not by the rank.
    root: bool,
}

impl Setting {
    /// The factor of a change of this rank.
    pub(super) fn scale(self, rank: f64) -> f64 {
        self.alpha / if self.root { rank.sqrt() } else { rank }
    }
}

/// The settings of both networks.
#[derive(Default)]
pub(super) struct Settings {
    file: String,
    unet: Option<Adapter>,
    text: Option<Adapter>,
    text_2: Option<Adapter>,
}

/// The settings of one network.
struct Adapter {
    alpha: Choice,
    rank: Choice,
    root: bool,
}

/// A number, and others for the weights of some names.
struct Choice {
    key: &'static str,
    all: f64,
    others: Vec<(Pattern, f64)>,
}

/// The end of a name from one of its parts on: as text, or as a regular expression.
struct Pattern {
    text: String,
    expression: Option<Regex>,
}

impl Settings {
    /// Those of a file, if it has any.
    pub(super) fn read(weights: &Weights, path: &Path) -> Result<Self> {
        const KEY: &str = "lora_adapter_metadata";
        if let Some(text) = weights.note(KEY) {
            let file = format!("{}: {KEY}", weights.file_names());
            let refuse = |reason| Error::config(file.clone(), reason);
            let settings = parse(text).map_err(refuse)?;
            let keys = || settings.as_object().into_iter().flat_map(|all| all.keys());
            let of = |network: &str| match keys().any(|key| key.starts_with(network)) {
                true => Adapter::of(|name| &settings[format!("{network}{name}")]).map(Some),
                false => Ok(None),
            };
            let (unet, text) = (of("unet.").map_err(refuse)?, of("text_encoder.").map_err(refuse)?);
            let text_2 = of("text_encoder_2.").map_err(refuse)?;
            return Ok(Self { file, unet, text, text_2 });
        }
        let Some(text) = beside(path)? else { return Ok(Self::default()) };
        let refuse = |reason| Error::config(PEFT_SETTINGS, reason);
        let settings = parse(&text).map_err(refuse)?;
        let of = || Adapter::of(|name| &settings[name]).map(Some).map_err(refuse);
        Ok(Self { file: PEFT_SETTINGS.into(), unet: of()?, text: of()?, text_2: of()? })
    }

    /// The settings of a weight.
    pub(super) fn of(&self, network: Network, weight: &str) -> Result<Option<Setting>> {
        let weight = weight.strip_prefix(SECOND_ENCODER).unwrap_or(weight);
        let (adapter, whole) = match network {
            Network::TextEncoder => (&self.text, format!("text_model.{weight}")),
            Network::TextEncoder2 => (&self.text_2, format!("text_model.{weight}")),
            Network::UNet => (&self.unet, weight.to_owned()),
        };
        let Some(Adapter { alpha, rank, root }) = adapter else { return Ok(None) };
        let of = |choice: &Choice| {
            choice.of([weight, &whole]).map_err(|reason| Error::config(&self.file, reason))
        };
        Ok(Some(Setting { alpha: of(alpha)?, rank: of(rank)?, root: *root }))
    }
}

/// The text of the settings beside a file, if it is one of PEFT and has any.
fn beside(path: &Path) -> Result<Option<String>> {
    let Some(path) = peft_settings(path) else { return Ok(None) };
    let failed = |reason| Error::File { path: path.clone(), reason };
    let file = match open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    match text.len() as u64 > MAX_BYTES {
        true => Err(Error::config(PEFT_SETTINGS, format!("is larger than {MAX_BYTES} bytes"))),
        false => Ok(Some(text)),
    }
}

fn parse(text: &str) -> std::result::Result<Value, String> {
    let settings: Value =
        serde_json::from_str(text).map_err(|error| format!("is {}", not_json(&error)))?;
    if settings.is_object() { Ok(settings) } else { Err("is not a JSON object".into()) }
}

impl Adapter {
    /// From settings by name. What is left out is PEFT's default.
    fn of<'v>(setting: impl Fn(&str) -> &'v Value) -> std::result::Result<Self, String> {
        let alpha = match setting("peft_type") {
            Value::Null => "lora_alpha",
            Value::String(kind) => match kind.as_str() {
                "LORA" => "lora_alpha",
                "LOHA" | "LOKR" => "alpha",
                other => return Err(format!("peft_type: {other:?} is not supported")),
            },
            _ => return Err("peft_type: expected a text".into()),
        };
        match setting("init_lora_weights") {
            Value::String(kind) if !OWN_STARTS.contains(&&*kind.to_ascii_lowercase()) => {
                return Err(format!(
                    "init_lora_weights: {kind:?} begins with parts of the model's own weights, which \
                     is not supported: save the adapter converted to a plain LoRA"
                ));
            }
            _ => {}
        }
        let asks = |key: &&&str| !matches!(setting(key), Value::Null | Value::Bool(false));
        if let Some(key) = FURTHER.iter().find(asks) {
            return Err(format!("{key}: is not supported"));
        }
        let choice = |key: &'static str, pattern: &'static str| {
            let all = match setting(key) {
                Value::Null => 8.0,
                value => value.as_f64().ok_or_else(|| format!("{key}: expected a number"))?,
            };
            Choice::new(pattern, all, setting(pattern))
        };
        let (alpha, rank) = (choice(alpha, "alpha_pattern")?, choice("r", "rank_pattern")?);
        let numbers = || rank.others.iter().map(|(_, rank)| *rank).chain([rank.all]);
        if numbers().any(|rank| rank < 1.0) {
            return Err("r, rank_pattern: ranks are 1 or more".into());
        }
        Ok(Self { alpha, rank, root: *setting("use_rslora") == true })
    }
}

impl Choice {
    fn new(key: &'static str, all: f64, others: &Value) -> std::result::Result<Self, String> {
        let others = match others {
            Value::Null => None,
            others => Some(others.as_object().ok_or_else(|| format!("{key}: expected an object"))?),
        };
        let others = others.into_iter().flatten().map(|(text, number)| {
            let number = number.as_f64();
            let number = number.ok_or_else(|| format!("{key}: {text:?}: expected a number"))?;
            let pattern = Pattern::new(text).map_err(|why| format!("{key}: {text:?}: {why}"))?;
            Ok::<_, String>((pattern, number))
        });
        let others = others.collect::<std::result::Result<Vec<_>, _>>()?;
        let expressions = others.iter().filter(|(pattern, _)| pattern.expression.is_some()).count();
        if expressions > MAX_EXPRESSIONS {
            let reason = format!("more than {MAX_EXPRESSIONS} regular expressions");
            return Err(format!("{key}: {reason}"));
        }
        Ok(Self { key, all, others })
    }

    /// The number of a weight with these names.
    fn of(&self, names: [&str; 2]) -> std::result::Result<f64, String> {
        let mut found = self.others.iter().filter(|(pattern, _)| pattern.matches(names));
        let Some((first, number)) = found.next() else { return Ok(self.all) };
        // PEFT takes the first in the order of the file.
        match found.find(|(_, other)| other != number) {
            None => Ok(*number),
            Some((second, _)) => {
                let (first, second, key) = (&first.text, &second.text, self.key);
                Err(format!("{key}: {first:?} and {second:?} both match {:?}", names[0]))
            }
        }
    }
}

impl Pattern {
    fn new(text: &str) -> std::result::Result<Self, String> {
        let text = text.to_owned();
        if text.chars().all(|c| c.is_alphanumeric() || "._-".contains(c)) {
            return Ok(Self { text, expression: None });
        }
        let expression = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{text})$"));
        let expression = { expression }.size_limit(MAX_EXPRESSION_BYTES).build();
        let why = "not a regular expression that is supported";
        Ok(Self { text, expression: Some(expression.map_err(|_| why)?) })
    }

    fn matches(&self, names: [&str; 2]) -> bool {
        names.iter().any(|name| match &self.expression {
            Some(expression) => expression.is_match(name),
            None => {
                let rest = name.strip_suffix(&self.text);
                rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scale(settings: &Value, weight: &str, rank: f64) -> std::result::Result<f64, String> {
        let adapter = Adapter::of(|name| &settings[name])?;
        let names = [weight, weight];
        let (alpha, root) = (adapter.alpha.of(names)?, adapter.root);
        Ok(Setting { alpha, rank: adapter.rank.of(names)?, root }.scale(rank))
    }

    #[test]
    fn alphas_are_those_of_the_settings() {
        let name = "down_blocks.0.attn1.to_q";
        for (settings, wanted) in [
            (json!({ "lora_alpha": 2, "r": 4 }), 0.5),
            (json!({ "peft_type": "LORA" }), 2.0),
            (json!({ "peft_type": "LOHA", "alpha": 2, "lora_alpha": 100 }), 0.5),
            (json!({ "peft_type": "LOKR", "alpha": 2 }), 0.5),
            (json!({ "lora_alpha": 2, "use_rslora": true }), 1.0),
            (json!({ "lora_alpha": 2, "r": 4, "init_lora_weights": "gaussian" }), 0.5),
            (json!({ "lora_alpha": 2, "r": 4, "init_lora_weights": true }), 0.5),
            (json!({ "lora_alpha": 2, "alpha_pattern": { "to_q": 4, "to_k": 8 } }), 1.0),
            (json!({ "lora_alpha": 2, "alpha_pattern": { "o_q": 4, "attn2.to_q": 4 } }), 0.5),
            (json!({ "lora_alpha": 2, "alpha_pattern": { r"attn\d\.to_[qk]": 4 } }), 1.0),
            (json!({ "lora_alpha": 2, "alpha_pattern": { "^down_blocks.*": 4, "^to_q": 8 } }), 1.0),
        ] {
            assert_eq!(scale(&settings, name, 4.0), Ok(wanted), "{settings}");
        }
    }

    #[test]
    fn settings_that_cannot_be_followed_are_refused_by_name() {
        let many: Value = (0..300).map(|k| (format!("a{k}|b"), json!(1))).collect();
        for (settings, words) in [
            (json!({ "peft_type": "ADALORA" }), "peft_type: \"ADALORA\" is not supported"),
            (json!({ "lora_alpha": "16" }), "lora_alpha: expected a number"),
            (json!({ "r": 0 }), "ranks are 1 or more"),
            (json!({ "init_lora_weights": "pissa_niter_16" }), "\"pissa_niter_16\" begins with"),
            (json!({ "init_lora_weights": "olora" }), "init_lora_weights"),
            (json!({ "use_qalora": true }), "use_qalora: is not supported"),
            (json!({ "alpha_pattern": [] }), "alpha_pattern: expected an object"),
            (json!({ "alpha_pattern": { "a": "b" } }), "alpha_pattern: \"a\": expected a number"),
            (json!({ "alpha_pattern": { "(": 1 } }), "\"(\": not a regular expression"),
            (json!({ "alpha_pattern": { "(a{99}){99}": 1 } }), "not a regular expression"),
            (json!({ "rank_pattern": many }), "rank_pattern: more than 256"),
            (json!({ "alpha_pattern": { "x": 1, "a.*": 2 } }), "\"a.*\" and \"x\" both match"),
        ] {
            let refusal = scale(&settings, "a.x", 4.0).expect_err("refused");
            assert!(refusal.contains(words), "{refusal}");
        }
    }
}
