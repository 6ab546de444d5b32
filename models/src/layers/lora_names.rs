//! Names of tensors in LoRA files: the weight that a tensor belongs to, and its role for it. Not
//! what is computed with the tensors.
//!
//! Reference: diffusers 0.42 `loaders/lora_conversion_utils.py`, `utils/state_dict_utils.py`; PEFT's
//! `save_pretrained`; kohya's scripts (layers of diffusers or of the original code); LyCORIS 4.

use std::collections::HashMap;

use super::builder::SECOND_ENCODER;
use crate::files::{LoraTargets, Weights, names};

/// A network that LoRAs add to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Network {
    TextEncoder,
    /// That of Stable Diffusion XL.
    TextEncoder2,
    UNet,
}

/// The role of a tensor for its weight. The methods are explained in [`super::lora_delta`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Down,
    Mid,
    Up,
    UpBias,
    Alpha,
    /// DoRA's, as LyCORIS writes it: one number per output or per input.
    DoraScale,
    /// DoRA's, as PEFT writes it: one number per output.
    Magnitude,
    HadaW1A,
    HadaW1B,
    HadaT1,
    HadaW2A,
    HadaW2B,
    HadaT2,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    Diff,
    DiffBias,
    Ia3,
    OnInput,
    GloraA1,
    GloraA2,
    GloraB1,
    GloraB2,
}

/// Suffixes of names. Longer ones come before those that they end in.
const ROLES: [(&str, Role); 39] = [
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_mid.weight", Role::Mid),
    (".lora_up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_down", Role::Down),
    (".lora_up", Role::Up),
    ("_lora.alpha", Role::Alpha),
    (".lora.alpha", Role::Alpha),
    (".alpha", Role::Alpha),
    (".dora_scale", Role::DoraScale),
    (".hada_w1_a", Role::HadaW1A),
    (".hada_w1_b", Role::HadaW1B),
    (".hada_t1", Role::HadaT1),
    (".hada_w2_a", Role::HadaW2A),
    (".hada_w2_b", Role::HadaW2B),
    (".hada_t2", Role::HadaT2),
    (".lokr_w1", Role::LokrW1),
    (".lokr_w1_a", Role::LokrW1A),
    (".lokr_w1_b", Role::LokrW1B),
    (".lokr_w2", Role::LokrW2),
    (".lokr_w2_a", Role::LokrW2A),
    (".lokr_w2_b", Role::LokrW2B),
    (".lokr_t2", Role::LokrT2),
    (".diff", Role::Diff),
    (".diff_b", Role::DiffBias),
    (".on_input", Role::OnInput),
    (".a1.weight", Role::GloraA1),
    (".a2.weight", Role::GloraA2),
    (".b1.weight", Role::GloraB1),
    (".b2.weight", Role::GloraB2),
    (".a1", Role::GloraA1),
    (".a2", Role::GloraA2),
    (".b1", Role::GloraB1),
    (".b2", Role::GloraB2),
];

impl Role {
    /// How names of this role end.
    pub(super) fn suffix(self) -> &'static str {
        ROLES.iter().find(|(_, role)| *role == self).map_or("tensor", |(end, _)| end)
    }
}

/// PEFT's suffixes, before the name of the adapter, if there is one.
const PEFT_ROLES: [(&str, &str, Role); 4] = [
    (".lora_A", "weight", Role::Down),
    (".lora_B", "weight", Role::Up),
    (".lora_B", "bias", Role::UpBias),
    (".lora_magnitude_vector", "weight", Role::Magnitude),
];

/// Marks in names of what is rejected, and what it is called.
const REFUSED: [(&str, &str); 13] = [
    (".lora_E", "AdaLoRA"),
    (".oft_", "OFT"),
    (".boft_", "BOFT"),
    (".vera_lambda", "VeRA"),
    (".ia3_l", "PEFT's IA3"),
    (".w_norm", "a change of norms"),
    (".b_norm", "a change of norms"),
    (".bm.weight", "GLoRA with a third factor"),
    (".lora_embedding_", "a LoRA of token embeddings"),
    ("bundle_emb.", "an embedding beside a LoRA"),
    ("lora_controlnet_", "a ControlNet"),
    ("lora_te2_", SECOND_TEXT_ENCODER),
    ("text_encoder_2.", SECOND_TEXT_ENCODER),
];

/// Rejected only for models that have none.
const SECOND_TEXT_ENCODER: &str = "the second text encoder of Stable Diffusion XL";

/// The module and the role of a tensor, if its name has the form of one of a LoRA.
pub(super) fn split<'t>(tensor: &'t str, weights: &Weights) -> Option<(&'t str, Role)> {
    for (mark, end, role) in PEFT_ROLES {
        let Some((module, rest)) = tensor.split_once(mark) else { continue };
        // Nothing, `.weight`, `.adapter` or `.adapter.weight`.
        let mut rest: Vec<_> = rest.split('.').collect();
        let ends = rest.pop_if(|last| *last == end).is_some();
        if (ends || role == Role::Magnitude) && rest.len() <= 2 && rest.first() == Some(&"") {
            return Some((module, role));
        }
    }
    let known = ROLES.iter().find_map(|(end, role)| Some((tensor.strip_suffix(end)?, *role)));
    // IA3 calls its vector as networks call their weights.
    known.or_else(|| {
        let module = tensor.strip_suffix(".weight")?;
        weights.shape(&format!("{module}.on_input")).map(|_| (module, Role::Ia3))
    })
}

/// The names of a model's weights as LoRA files write them.
pub(super) struct TargetNames {
    unet: HashMap<String, String>,
    text: HashMap<String, String>,
    /// Of the second text encoder, if there is one.
    text_2: Option<HashMap<String, String>>,
    /// Residual blocks per level of the UNet.
    layers: usize,
}

impl TargetNames {
    /// The names of the weights of the UNet, whose levels have so many residual blocks, and of the
    /// text encoders.
    pub(super) fn new(unet: &LoraTargets, layers: usize, texts: &[LoraTargets]) -> Self {
        let flat = |targets: &LoraTargets| -> HashMap<_, _> {
            let own = |name: &str| flat(name.strip_prefix(SECOND_ENCODER).unwrap_or(name));
            targets.keys().map(|name| (own(name), name.clone())).collect()
        };
        let mut texts = texts.iter().map(flat);
        let (text, text_2) = (texts.next().unwrap_or_default(), texts.next());
        Self { unet: flat(unet), text, text_2, layers }
    }

    /// Why a tensor is rejected, if it is. The text reads on from its name.
    pub(super) fn refused(&self, tensor: &str) -> Option<String> {
        let found = REFUSED.iter().find(|(mark, _)| tensor.contains(mark));
        match found.map(|(_, kind)| *kind)? {
            SECOND_TEXT_ENCODER if self.text_2.is_some() => None,
            SECOND_TEXT_ENCODER => {
                Some(format!("is of {SECOND_TEXT_ENCODER}, which the model does not have"))
            }
            kind => Some(format!("is of {kind}, which is not supported")),
        }
    }

    /// The network and the name of a module's weight.
    pub(super) fn find(&self, module: &str) -> Option<(Network, &str)> {
        // Attention processors once were named apart from their layers.
        let module = flat(&module.replace(".processor.", "."));
        let mut name = module.as_str();
        for start in ["base_model_model_", "lycoris_", "model_diffusion_model_"] {
            name = name.strip_prefix(start).unwrap_or(name);
        }
        const TEXT_2: [&str; 6] = [
            "lora_te2_",
            "text_encoder_2_",
            "te2_",
            "conditioner_embedders_1_model_transformer_",
            "clip_g_",
            "text_encoders_clip_g_transformer_",
        ];
        const TEXT: [&str; 9] = [
            "lora_te_",
            "lora_te1_",
            "text_encoder_",
            "te_",
            "te1_",
            "clip_l_",
            "cond_stage_model_transformer_",
            "conditioner_embedders_0_transformer_",
            "text_encoders_clip_l_transformer_",
        ];
        const UNET: [&str; 3] = ["lora_unet_", "unet_", "diffusion_model_"];
        let of = |starts: &[&str]| starts.iter().find_map(|start| name.strip_prefix(start));
        if let (Some(name), Some(second)) = (of(&TEXT_2), &self.text_2) {
            return Some((Network::TextEncoder2, of_text(second, name)?));
        }
        if let Some(name) = of(&TEXT) {
            return self.of_text(name);
        }
        match of(&UNET) {
            Some(name) => self.of_unet(name),
            None => self.of_unet(name).or_else(|| self.of_text(name)),
        }
    }

    fn of_text(&self, name: &str) -> Option<(Network, &str)> {
        Some((Network::TextEncoder, of_text(&self.text, name)?))
    }

    fn of_unet(&self, name: &str) -> Option<(Network, &str)> {
        let find = |name: &str| self.unet.get(name);
        let found = find(name).or_else(|| {
            // The older names of diffusers leave out the index.
            let whole = name.ends_with("_to_out").then(|| format!("{name}_0"));
            whole.and_then(|name| find(&name))
        });
        let found = found.or_else(|| find(&original(name, self.layers)?));
        Some((Network::UNet, found?))
    }
}

/// The name of a text encoder's weight, among those of the encoder.
fn of_text<'n>(names: &'n HashMap<String, String>, name: &str) -> Option<&'n str> {
    let name = name.strip_prefix("text_model_").unwrap_or(name);
    let found = names.get(name).or_else(|| {
        let (layer, part) = name.split_once("_self_attn_to_")?;
        let part = if part == "out" { "out_proj" } else { &format!("{part}_proj") };
        names.get(&format!("{layer}_self_attn_{part}"))
    });
    found.map(String::as_str)
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
    let found = blocks.iter().chain(&[("time_embed", 1), ("label_emb", 2), ("out", 1)]).find_map(
        |(block, count)| {
            let rest = name.strip_prefix(block)?.strip_prefix('_')?;
            Some(format!("{block}.{}", parts(rest, *count)?))
        },
    )?;
    let mut dotted = found;
    for layer in ["in_layers", "out_layers", "emb_layers"] {
        dotted = dotted.replace(&format!("{layer}_"), &format!("{layer}."));
    }
    let dotted = dotted.trim_end_matches('.');
    Some(flat(names::unet(&format!("{dotted}."), layers).trim_end_matches('.')))
}

/// The models that a LoRA file seems to be for, as far as its names and shapes tell.
pub(super) fn family(weights: &Weights) -> Option<&'static str> {
    const MARKS: [(&str, &str); 14] = [
        ("lora_te2_", "Stable Diffusion XL"),
        ("text_encoder_2.", "Stable Diffusion XL"),
        ("double_blocks", "Flux"),
        ("single_blocks", "Flux"),
        ("single_transformer_blocks", "Flux"),
        ("joint_blocks", "Stable Diffusion 3"),
        ("lora_te3_", "Stable Diffusion 3"),
        ("motion_modules", "AnimateDiff"),
        ("lora_transformer_", "a diffusion transformer"),
        ("diffusion_model.blocks.", "a diffusion transformer"),
        ("diffusion_model.layers.", "a diffusion transformer"),
        ("lora_unet_blocks_", "a diffusion transformer"),
        // The UNet of Stable Diffusion 1.x and 2.x has one block in each transformer.
        ("transformer_blocks_1_attn", "Stable Diffusion XL"),
        ("transformer_blocks.1.attn", "Stable Diffusion XL"),
    ];
    const WIDTHS: [(usize, &str); 3] = [
        (2048, "Stable Diffusion XL"),
        (1024, "Stable Diffusion 2.x"),
        (768, "Stable Diffusion 1.x"),
    ];
    if weights.names().all(|name| name.starts_with("transformer.")) {
        return Some("a diffusion transformer such as Flux or Stable Diffusion 3");
    }
    let has = |mark: &str| weights.names().any(|name| name.contains(mark));
    let marked = MARKS.iter().find(|(mark, _)| has(mark)).map(|(_, family)| *family);
    marked.or_else(|| {
        // The keys of cross attention see the text encoder's channels.
        let keys = weights.names().filter(|name| flat(name).contains("attn2_to_k"));
        let sides: Vec<_> = keys.filter_map(|name| weights.shape(name)).flatten().collect();
        let found = WIDTHS.iter().find(|(width, _)| sides.contains(&width));
        found.map(|(_, family)| *family)
    })
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
            ("label_emb_0_0", "add_embedding_linear_1"),
            (
                "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
                "down_blocks_2_attentions_1_transformer_blocks_9_ff_net_0_proj",
            ),
            ("out_2", "conv_out"),
        ];
        for (theirs, ours) in table {
            assert_eq!(original(theirs, 2).as_deref(), Some(ours), "{theirs}");
        }
        assert_eq!(original("input_blocks", 2), None);
        assert_eq!(original("output_blocks_x_1_proj_in", 2), None);
    }

    #[test]
    fn the_role_of_a_tensor_is_in_its_name() {
        let none = Weights::default();
        let table = [
            ("a.b.lora_A.weight", "a.b", Role::Down),
            ("a.b.lora_B.style.weight", "a.b", Role::Up),
            ("a.b.lora_B.bias", "a.b", Role::UpBias),
            ("a.lora_magnitude_vector", "a", Role::Magnitude),
            ("a.lora_magnitude_vector.default.weight", "a", Role::Magnitude),
            ("a.to_q_lora.down.weight", "a.to_q", Role::Down),
            ("a.lora.up.weight", "a", Role::Up),
            ("a.lokr_w1", "a", Role::LokrW1),
            ("a.diff_b", "a", Role::DiffBias),
        ];
        for (name, module, role) in table {
            assert_eq!(split(name, &none), Some((module, role)), "{name}");
        }
        for name in ["a.weight", "a.lora_A.b.c.d.weight", "lora_A", "a.lora_A.bias"] {
            assert_eq!(split(name, &none), None, "{name}");
        }
    }
}
