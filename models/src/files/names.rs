//! The names of the original (LDM) code's tensors in the Diffusers format.

use super::tensors::Renamed;

/// The first component of a name and the rest.
fn cut(name: &str) -> (&str, &str) {
    name.split_once('.').unwrap_or((name, ""))
}

/// The name of a UNet tensor in the Diffusers format.
pub(crate) fn unet(name: &str, layers: usize) -> String {
    let fixed = [
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("label_emb.0.0.", "add_embedding.linear_1."),
        ("label_emb.0.2.", "add_embedding.linear_2."),
        ("input_blocks.0.0.", "conv_in."),
        ("middle_block.0.", "mid_block.resnets.0."),
        ("middle_block.1.", "mid_block.attentions.0."),
        ("middle_block.2.", "mid_block.resnets.1."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
    ];
    for (theirs, ours) in fixed {
        if let Some(rest) = name.strip_prefix(theirs) {
            return format!("{ours}{}", resnet(rest));
        }
    }
    let (way, rest) = cut(name);
    let (number, rest) = cut(rest);
    let (part, rest) = cut(rest);
    let Ok(number) = number.parse::<usize>() else { return name.to_owned() };
    // Input block 0 is conv_in.
    let (blocks, number) = match way {
        "input_blocks" => ("down_blocks", number.saturating_sub(1)),
        _ => ("up_blocks", number),
    };
    let (level, layer) = (number / (layers + 1), number % (layers + 1));
    let p = format!("{blocks}.{level}");
    if let Some(rest) = rest.strip_prefix("op.") {
        return format!("{p}.downsamplers.0.conv.{rest}");
    }
    match (part, rest.strip_prefix("conv.")) {
        ("0", _) => format!("{p}.resnets.{layer}.{}", resnet(rest)),
        (_, Some(rest)) => format!("{p}.upsamplers.0.conv.{rest}"),
        _ => format!("{p}.attentions.{layer}.{rest}"),
    }
}

fn resnet(name: &str) -> String {
    let layers = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    let renamed = layers
        .iter()
        .find_map(|(theirs, ours)| name.strip_prefix(theirs).map(|rest| format!("{ours}{rest}")));
    renamed.unwrap_or_else(|| name.to_owned())
}

/// The name of a VAE tensor in the Diffusers format, of a VAE of so many levels; none for tensors
/// that only training uses.
pub(super) fn vae(name: &str, levels: usize) -> Option<String> {
    let (half, rest) = cut(name);
    if half == "loss" || half.starts_with("model_ema") {
        return None;
    }
    let mut rest = rest.to_owned();
    for (theirs, ours) in [
        ("mid.block_1.", "mid_block.resnets.0."),
        ("mid.block_2.", "mid_block.resnets.1."),
        ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
        ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
        ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
        ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
        ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
        // Converters from the Diffusers format leave its names of the layers, old or new.
        ("mid.attn_1.", "mid_block.attentions.0."),
        ("norm_out.", "conv_norm_out."),
    ] {
        if let Some(end) = rest.strip_prefix(theirs) {
            rest = format!("{ours}{end}");
        }
    }
    let (way, tail) = cut(&rest);
    if let ("down" | "up", Some((Ok(level), tail))) =
        (way, tail.split_once('.').map(|(level, tail)| (level.parse::<usize>(), tail)))
    {
        // Up blocks are numbered from the outermost level there.
        let level =
            if way == "up" { levels.saturating_sub(level.saturating_add(1)) } else { level };
        let tail = tail
            .replace("block.", "resnets.")
            .replace("downsample.", "downsamplers.0.")
            .replace("upsample.", "upsamplers.0.");
        rest = format!("{way}_blocks.{level}.{tail}");
    }
    Some(format!("{half}.{}", rest.replace("nin_shortcut", "conv_shortcut")))
}

/// The names in the Diffusers format of a tensor of CLIP's text tower. stable-diffusion.cpp writes
/// OpenCLIP's projections under its names, in one.
pub(super) fn clip(name: &str, shape: &[usize]) -> Vec<Renamed> {
    match name.split_once(".self_attn.in_proj.") {
        Some((layer, kind)) => projections(layer, kind, shape),
        None => vec![Renamed { name: name.to_owned(), shape: shape.to_vec(), part: (0, 1) }],
    }
}

/// The three projections of a layer's attention that are stored as one, a weight or a bias.
fn projections(layer: &str, kind: &str, shape: &[usize]) -> Vec<Renamed> {
    let mut third = shape.to_vec();
    match third.first_mut() {
        Some(rows) if rows.is_multiple_of(3) => *rows /= 3,
        // No three projections: their tensors are missing then.
        _ => return Vec::new(),
    }
    let part = |(k, name): (usize, &str)| Renamed {
        name: format!("{layer}.self_attn.{name}.{kind}"),
        shape: third.clone(),
        part: (k, 3),
    };
    ["q_proj", "k_proj", "v_proj"].into_iter().enumerate().map(part).collect()
}

/// The names in the Diffusers format of a tensor of OpenCLIP's text tower; none of those that are
/// not needed, as the projection is not where nothing is `projected`. It keeps its name: without
/// `.weight`, it is the other way round.
pub(super) fn open_clip(name: &str, shape: &[usize], projected: bool) -> Vec<Renamed> {
    let whole = |name: String| vec![Renamed { name, shape: shape.to_vec(), part: (0, 1) }];
    match name {
        "positional_embedding" => return whole("embeddings.position_embedding.weight".into()),
        "token_embedding.weight" => return whole("embeddings.token_embedding.weight".into()),
        "text_projection" | "text_projection.weight" if projected => return whole(name.to_owned()),
        "text_projection" | "text_projection.weight" | "logit_scale" => return Vec::new(),
        _ => {}
    }
    if let Some(rest) = name.strip_prefix("ln_final.") {
        return whole(format!("final_layer_norm.{rest}"));
    }
    let Some(rest) = name.strip_prefix("transformer.resblocks.") else { return Vec::new() };
    let (layer, rest) = cut(rest);
    let p = format!("encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        return projections(&p, kind, shape);
    }
    let rest = rest
        .replace("attn.out_proj", "self_attn.out_proj")
        .replace("ln_", "layer_norm")
        .replace("c_fc", "fc1")
        .replace("c_proj", "fc2");
    whole(format!("{p}.{rest}"))
}
