//! What a file of tensors holds that is no Stable Diffusion 1.x, 2.x or XL, by the names and shapes of
//! its tensors. Reference: diffusers 0.42 `loaders/single_file_utils.py`, and ComfyUI's
//! `supported_models.py` for the widths of the UNets.

use super::tensors::Weights;

/// The prefix of the UNet in a checkpoint of the original code.
pub(super) const UNET: &str = "model.diffusion_model.";

/// Parts of names that only one kind of file has, and what it is. The first that is found counts.
const MARKS: [(&str, &str); 39] = [
    ("lora_down", LORA),
    ("lora_up", LORA),
    ("lora_A", LORA),
    ("lora_B", LORA),
    ("_lora.", LORA),
    ("hada_w1", LORA),
    ("lokr_w", LORA),
    (
        ":0:down",
        "a LoRA of cloneofsimo's scripts, whose layers have no names: convert it to kohya's",
    ),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    ("motion_modules.", "a motion module of AnimateDiff"),
    ("edm_mean", EDM),
    ("edm_vpred.", EDM),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("distilled_guidance_layer.", "Chroma"),
    ("individual_token_refiner.", "HunyuanVideo"),
    ("double_blocks.", "Flux"),
    ("single_stream_modulation.", "Flux"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("channelwise.", "Stable Cascade or Würstchen"),
    ("effnet_mapper", "Stable Cascade or Würstchen"),
    ("double_layers.", "AuraFlow"),
    ("adaln_single.", "PixArt"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("patchify_proj.", "LTX-Video"),
    ("head.modulation", "Wan"),
    ("cross_attn.q_linear", "Sana"),
    ("txt_in.", "Qwen-Image"),
    ("time_mix_block", "Stable Video Diffusion"),
    ("time_stack.", "Stable Video Diffusion"),
    ("cc_projection.", "Zero123"),
    ("roberta.", "AltDiffusion"),
    ("image_proj", "an IP-Adapter"),
    ("emb_params", EMBEDDING),
    ("clip_g", EMBEDDING),
    ("SelfAttention.", "the text encoder T5"),
    ("RDB1.", "an upscaler"),
    (
        "cond_stage_model.1.",
        "Stable Diffusion XL with its second text encoder in the names of stable-diffusion.cpp \
         (cond_stage_model.1.), which are not read",
    ),
];

/// A model that was trained on other noise levels.
const EDM: &str = "a model of the noise levels of EDM, such as Playground 2.5 or CosXL";

const XL: &str = "Stable Diffusion XL";

/// Of the second text encoder of Stable Diffusion XL.
pub(super) const SECOND_TOWER: &str = "conditioner.embedders.1.model.";

/// The same of the refiner, which has no first.
pub(super) const REFINER_TOWER: &str = "conditioner.embedders.0.model.";

/// The first layer of what Stable Diffusion XL adds to its time embedding.
pub(super) const LABEL: &str = "label_emb.0.0.weight";

/// Channels of the prompts of Stable Diffusion XL.
const XL_WIDTH: usize = 2048;

const LORA: &str = "a LoRA, which adds to a model: --loras-dir takes it";
/// How the description of a file begins of which nothing is known.
const NO_MODEL: &str = "no model";

const EMBEDDING: &str =
    "a textual inversion embedding, which adds to a model: --embeddings-dir takes it";

/// Ends of names of networks that a checkpoint has among others, and what a file is that has no
/// other.
const PARTS: [(&str, &str); 5] = [
    ("decoder.conv_in.weight", "a VAE, which is a part of a model: --vae takes it"),
    ("input_blocks.0.0.weight", "a UNet alone, without text encoder and VAE"),
    ("down_blocks.0.resnets.0.conv1.weight", "a UNet alone, without text encoder and VAE"),
    ("token_embedding.weight", "a text encoder alone, without UNet and VAE"),
    ("patch_embedding.weight", "an image encoder"),
];

/// Whether a checkpoint or its UNet is of Stable Diffusion XL: with a second text encoder, or else by
/// the width of its prompts.
pub(super) fn is_xl(weights: &Weights) -> bool {
    let conditioned = weights.shape(&format!("{UNET}{LABEL}")).is_some();
    let second = [SECOND_TOWER, REFINER_TOWER].into_iter().any(|tower| has_tower(weights, tower));
    conditioned && (second || context_width(weights) == Some(XL_WIDTH))
}

/// Whether a checkpoint of Stable Diffusion XL is a refiner: its second text encoder is the only one.
pub(super) fn is_refiner(weights: &Weights) -> bool {
    has_tower(weights, REFINER_TOWER) && !has_tower(weights, SECOND_TOWER) && is_xl(weights)
}

/// Whether a checkpoint has a text encoder there in OpenCLIP's names.
fn has_tower(weights: &Weights, tower: &str) -> bool {
    weights.shape(&format!("{tower}token_embedding.weight")).is_some()
}

/// What a file is, a checkpoint of Stable Diffusion 1.x, 2.x or XL included, if its names tell.
pub(crate) fn what(weights: &Weights) -> Option<String> {
    match other(weights) {
        None => Some("a whole model: --models-dir takes it".into()),
        Some(what) => Some(what).filter(|what| !what.starts_with(NO_MODEL)),
    }
}

/// What a file is that is no checkpoint of Stable Diffusion 1.x, 2.x or XL; `None` of those that are.
pub(super) fn other(weights: &Weights) -> Option<String> {
    let first = format!("{UNET}input_blocks.0.0.weight");
    let inputs = weights.shape(&first).map(|shape| shape.get(1).copied().unwrap_or_default());
    let marked = |names: &mut dyn Iterator<Item = &str>| {
        let names: Vec<_> = names.collect();
        let has = |mark: &&str| names.iter().any(|name| name.contains(*mark));
        MARKS.iter().find(|(mark, _)| has(mark)).map(|(_, what)| (*what).to_owned())
    };
    let Some(inputs) = inputs else {
        let part = || {
            let has = |end: &str| weights.names().any(|name| name.ends_with(end));
            let others = ["decoder.conv_in.weight", "token_embedding.weight"];
            if has("input_blocks.0.0.weight") && others.into_iter().any(has) {
                let first = weights.names().next().unwrap_or_default();
                return Some(format!("a model whose tensors have other names, such as {first:?}"));
            }
            PARTS.iter().find(|(end, _)| has(end)).map(|(_, what)| (*what).to_owned())
        };
        return marked(&mut weights.names()).or_else(part).or_else(|| {
            if weights.names().eq(["*"]) {
                return Some(EMBEDDING.into());
            }
            let names: Vec<_> = weights.names().take(3).collect();
            Some(match names[..] {
                [] => "a file without tensors".into(),
                _ => format!("{NO_MODEL}: its first tensors are {}", names.join(", ")),
            })
        });
    };
    // Other networks of a checkpoint may have names of the table.
    let by_name = marked(&mut weights.names().filter(|name| {
        let others = ["model_ema.", "optimizer", "first_stage_model."];
        !others.iter().any(|other| name.starts_with(other)) && !name.contains("lora")
    }));
    if by_name.is_some() {
        return by_name;
    }
    let label = weights.shape(&format!("{UNET}label_emb.0.0.weight"));
    let label = label.map(|shape| shape.get(1).copied().unwrap_or_default());
    let width = context_width(weights);
    Some(match (inputs, width, label) {
        (8, ..) => "InstructPix2Pix, whose UNet of 8 input channels takes the image to edit".into(),
        (5, ..) => "the depth model, whose UNet of 5 input channels takes a depth map".into(),
        (7, ..) => "the upscaler, whose UNet of 7 input channels takes the image to enlarge".into(),
        _ if is_xl(weights) => return None,
        (.., Some(2816)) => format!("{XL} without its second text encoder"),
        (.., None) if has_tower(weights, SECOND_TOWER) => {
            format!("{XL} with a UNet that takes no sizes")
        }
        (_, Some(1280), _) | (.., Some(2560)) => {
            format!("the refiner of {XL} without its text encoder")
        }
        (.., Some(_)) => "an unCLIP model, which takes images as prompts".into(),
        _ if weights.shape(&format!("{UNET}label_emb.weight")).is_some() => {
            "a model of classes, not of prompts".into()
        }
        (_, None, _) => "a diffusion model without prompts".into(),
        _ => return None,
    })
}

/// Channels of the prompt that a checkpoint's UNet attends to.
pub(super) fn context_width(weights: &Weights) -> Option<usize> {
    let of_unet = |name: &&str| name.starts_with(UNET) && name.ends_with("attn2.to_k.weight");
    let name = weights.names().find(of_unet)?;
    weights.shape(name)?.get(1).copied()
}
