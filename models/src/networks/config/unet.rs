//! `unet/config.json`.

use serde_json::json;

use super::levels::check_levels;
use crate::error::Result;
use crate::files::{Keys, Source};

/// Maximum of the `sample_size` of a UNet, in latent pixels.
const MAX_SAMPLE_SIZE: usize = 8192;

/// Maximum number of transformer blocks of a layer.
const MAX_DEPTH: usize = 100;

/// One value for all blocks, or one for each.
#[derive(Clone, serde::Deserialize)]
#[serde(untagged)]
enum OneOrEach {
    One(usize),
    Each(Vec<usize>),
}

impl OneOrEach {
    /// The one for all, if there is one.
    fn one(&self) -> Option<usize> {
        match self {
            Self::One(value) => Some(*value),
            Self::Each(_) => None,
        }
    }

    fn each(self, count: usize) -> Option<Vec<usize>> {
        match self {
            Self::One(value) => Some(vec![value; count]),
            Self::Each(values) => (values.len() == count).then_some(values),
        }
    }
}

/// `unet/config.json` of a `UNet2DConditionModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Height and width in latent pixels that it was trained on.
    pub sample_size: usize,
    /// Input channels: latents, and mask and masked image of an inpainting UNet.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Channels of each level.
    pub block_out_channels: Vec<usize>,
    /// Whether each down block has cross attention.
    pub down_cross_attention: Vec<bool>,
    /// The middle block.
    pub mid_block: MidBlock,
    /// Whether each up block has cross attention.
    pub up_cross_attention: Vec<bool>,
    /// Residual blocks of a down block; an up block has one more.
    pub layers_per_block: usize,
    /// Attention heads of each level: what the JSON's `attention_head_dim` means in SD 1.x and 2.x.
    pub heads: Vec<usize>,
    /// Transformer blocks of each layer of each down block: 0 in blocks without cross attention.
    pub down_depths: Vec<Vec<usize>>,
    /// Those of the middle block.
    pub mid_depth: usize,
    /// Those of the up blocks.
    pub up_depths: Vec<Vec<usize>>,
    /// Channels of the text encoders' output.
    pub cross_attention_dim: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the residual blocks' norms.
    pub norm_eps: f64,
    /// Whether `proj_in` and `proj_out` are linear layers rather than 1x1 convolutions.
    pub use_linear_projection: bool,
    /// Whether cosines come before sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of the time embedding's frequencies.
    pub freq_shift: f64,
    /// Width of the embedding of the guidance scale, which a distilled UNet takes as an input.
    pub time_cond_proj_dim: Option<usize>,
    /// Conditions beside timestep and prompt, of Stable Diffusion XL.
    pub added: Option<AddedConfig>,
}

/// The middle block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MidBlock {
    /// None, in distilled models.
    Absent,
    /// One residual block (`UNetMidBlock2D`).
    Plain,
    /// A transformer between two (`UNetMidBlock2DCrossAttn`).
    CrossAttention,
}

/// Of a UNet with `addition_embed_type` "text_time": the pooled prompt and sizes are added to the
/// time embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddedConfig {
    /// Width of the embedding of each size (`addition_time_embed_dim`).
    pub size_width: usize,
    /// Width of the pooled prompt and all sizes (`projection_class_embeddings_input_dim`).
    pub inputs: usize,
}

impl UNetConfig {
    /// Reads `unet/config.json`.
    pub fn read(source: &Source) -> Result<Self> {
        Self::parse(Keys::read(source, "unet/config.json")?)
    }

    pub(super) fn parse(mut keys: Keys) -> Result<Self> {
        keys.only("_class_name", &[json!("UNet2DConditionModel")])?;
        let block_out_channels: Vec<usize> =
            keys.take("block_out_channels", vec![320, 640, 1280, 1280])?;
        let levels = block_out_channels.len();
        let down = blocks(&mut keys, "down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"])?;
        let up = blocks(&mut keys, "up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"])?;
        if down.len() != levels || up.len() != levels {
            return Err(keys.invalid("block_out_channels", "another length than the block types"));
        }
        let heads = keys.take("attention_head_dim", OneOrEach::One(8))?;
        let heads = keys.take("num_attention_heads", heads)?.each(levels);
        let heads = heads.ok_or_else(|| keys.invalid("attention_head_dim", "wrong length"))?;
        let layers_per_block = keys.count("layers_per_block", 1, 2)?;
        let Depths { down_depths, mid_depth, up_depths } =
            Depths::take(&mut keys, levels, layers_per_block)?.only_crossing(&down, &up);
        // As diffusers: files of its first releases have 32 here, and mean 64.
        let least = if keys.text("_diffusers_version").is_some_and(is_old) { 64 } else { 0 };
        let sample_size = keys.count("sample_size", 1, 64)?;
        if sample_size > MAX_SAMPLE_SIZE {
            let reason = format!("{sample_size} must be 1 to {MAX_SAMPLE_SIZE}");
            return Err(keys.invalid("sample_size", reason));
        }
        let config = Self {
            sample_size: sample_size.max(least),
            mid_block: mid_block(&mut keys)?,
            in_channels: keys.count("in_channels", 1, 4)?,
            out_channels: keys.count("out_channels", 1, 4)?,
            down_cross_attention: down,
            up_cross_attention: up,
            layers_per_block,
            down_depths,
            mid_depth,
            up_depths,
            cross_attention_dim: keys.count("cross_attention_dim", 1, 1280)?,
            norm_num_groups: keys.count("norm_num_groups", 1, 32)?,
            norm_eps: keys.take("norm_eps", 1e-5)?,
            use_linear_projection: keys.take("use_linear_projection", false)?,
            flip_sin_to_cos: keys.take("flip_sin_to_cos", true)?,
            freq_shift: keys.take("freq_shift", 0.0)?,
            time_cond_proj_dim: keys.take("time_cond_proj_dim", None)?,
            added: added(&mut keys)?,
            block_out_channels,
            heads,
        };
        config.check(&keys)?;
        refuse_other_unets(&mut keys)?;
        keys.finish()?;
        Ok(config)
    }

    fn check(&self, keys: &Keys) -> Result<()> {
        let groups = self.norm_num_groups;
        check_levels(keys, &self.block_out_channels)?;
        let middle = (self.mid_block == MidBlock::CrossAttention).then_some(self.mid_depth);
        let down = self.down_depths.iter().zip(&self.down_cross_attention);
        let up = self.up_depths.iter().zip(&self.up_cross_attention);
        let crossing = down.chain(up).filter(|(_, cross)| **cross);
        let mut depths = crossing.flat_map(|(depths, _)| depths).copied().chain(middle);
        if depths.any(|depth| !(1..=MAX_DEPTH).contains(&depth)) {
            let reason = format!("each must be 1 to {MAX_DEPTH}");
            return Err(keys.invalid("transformer_layers_per_block", reason));
        }
        if self.time_cond_proj_dim.is_some_and(|width| width < 4) {
            return Err(keys.invalid("time_cond_proj_dim", "must be at least 4"));
        }
        for (channels, heads) in self.block_out_channels.iter().zip(&self.heads) {
            if groups == 0 || *channels == 0 || channels % groups != 0 {
                let reason = format!("{groups} does not divide {channels} channels");
                return Err(keys.invalid("norm_num_groups", reason));
            }
            if *heads == 0 || channels % heads != 0 {
                let reason = format!("{heads} heads do not divide {channels} channels");
                return Err(keys.invalid("attention_head_dim", reason));
            }
        }
        Ok(())
    }
}

/// One number for all blocks, or for each one, or one for each of its layers.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Blocks {
    All(usize),
    Each(Vec<OneOrEach>),
}

/// Transformer blocks of all cross-attention layers.
struct Depths {
    down_depths: Vec<Vec<usize>>,
    mid_depth: usize,
    up_depths: Vec<Vec<usize>>,
}

impl Depths {
    /// One number for all blocks, or one for each, or in it one for each layer. Up blocks have those
    /// of the down blocks, unless some layers of a block differ: then they have a list of their own.
    fn take(keys: &mut Keys, levels: usize, layers: usize) -> Result<Self> {
        const KEY: &str = "transformer_layers_per_block";
        const UP: &str = "reverse_transformer_layers_per_block";
        let found = match keys.take(KEY, Blocks::All(1))? {
            Blocks::All(depth) => vec![OneOrEach::One(depth); levels],
            Blocks::Each(found) if found.len() == levels => found,
            Blocks::Each(_) => return Err(keys.invalid(KEY, "wrong length")),
        };
        let same: Option<Vec<usize>> = found.iter().map(OneOrEach::one).collect();
        // In diffusers the middle block has one layer: of a list it takes the first number.
        let mid_depth = match found.last() {
            Some(OneOrEach::Each(depths)) => depths.first().copied().unwrap_or_default(),
            Some(OneOrEach::One(depth)) => *depth,
            None => 0,
        };
        let each = |keys: &Keys, key: &str, found: Vec<OneOrEach>, layers| {
            let depths: Option<_> = found.into_iter().map(|depths| depths.each(layers)).collect();
            depths.ok_or_else(|| keys.invalid(key, "wrong length of the list of a block"))
        };
        let down_depths = each(keys, KEY, found, layers)?;
        let up_depths = match keys.take::<Option<Vec<OneOrEach>>>(UP, None)? {
            Some(found) if found.len() != levels => return Err(keys.invalid(UP, "wrong length")),
            Some(found) => each(keys, UP, found, layers + 1)?,
            None => {
                let reason = "is missing, with lists in transformer_layers_per_block";
                let same = same.ok_or_else(|| keys.invalid(UP, reason))?;
                same.into_iter().rev().map(|depth| vec![depth; layers + 1]).collect()
            }
        };
        Ok(Self { down_depths, mid_depth, up_depths })
    }

    /// None in blocks without cross attention, whatever the file says of them.
    fn only_crossing(mut self, down: &[bool], up: &[bool]) -> Self {
        for (depths, crossing) in [(&mut self.down_depths, down), (&mut self.up_depths, up)] {
            let others = depths.iter_mut().zip(crossing).filter(|(_, crosses)| !**crosses);
            others.for_each(|(depths, _)| depths.fill(0));
        }
        self
    }
}

/// The middle block.
fn mid_block(keys: &mut Keys) -> Result<MidBlock> {
    if keys.is_null("mid_block_type") {
        return Ok(MidBlock::Absent);
    }
    let kinds = ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"];
    let plain = keys.text("mid_block_type") == Some(kinds[1]);
    keys.only("mid_block_type", &kinds.map(|kind| json!(kind)))?;
    Ok(if plain { MidBlock::Plain } else { MidBlock::CrossAttention })
}

/// The conditions beside timestep and prompt.
fn added(keys: &mut Keys) -> Result<Option<AddedConfig>> {
    let (kind, width) = ("addition_embed_type", "addition_time_embed_dim");
    let inputs = "projection_class_embeddings_input_dim";
    if keys.text(kind) != Some("text_time") {
        return Ok(None);
    }
    keys.only(kind, &[json!("text_time")])?;
    let added =
        AddedConfig { size_width: keys.count(width, 0, 0)?, inputs: keys.count(inputs, 0, 0)? };
    for (key, value) in [(width, added.size_width), (inputs, added.inputs)] {
        if value < 4 {
            return Err(
                keys.invalid(key, "must be at least 4, with the added conditions of text_time")
            );
        }
    }
    Ok(Some(added))
}

/// Whether a version of diffusers is older than 0.9.
fn is_old(version: &str) -> bool {
    let mut numbers = version.split('.').map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(0)), Some(Ok(..9))))
}

/// Whether each block of a list is of the second of two types; any other type is rejected.
fn blocks(keys: &mut Keys, key: &str, types: [&str; 2]) -> Result<Vec<bool>> {
    let names: Vec<String> = keys.take(key, Vec::new())?;
    let names = if names.is_empty() { defaults(types) } else { names };
    names
        .iter()
        .map(|name| match types.iter().position(|known| known == name) {
            Some(index) => Ok(index == 1),
            None => Err(keys.invalid(key, format!("{name:?} is not supported"))),
        })
        .collect()
}

/// SD 1.x: three blocks with cross attention; the innermost has none.
fn defaults(types: [&str; 2]) -> Vec<String> {
    let mut names = vec![types[1].to_owned(); 3];
    let inner = if types[0].starts_with("Up") { 0 } else { names.len() };
    names.insert(inner, types[0].to_owned());
    names
}

/// Rejects features of other members of the family (unCLIP, Kandinsky).
fn refuse_other_unets(keys: &mut Keys) -> Result<()> {
    const NULL: [&str; 13] = [
        "addition_embed_type",
        "addition_time_embed_dim",
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "mid_block_only_cross_attention",
        "num_class_embeds",
        "projection_class_embeddings_input_dim",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "timestep_post_act",
        "resnet_pre_norm",
    ];
    for key in NULL {
        keys.only(key, &[json!(false), json!(null)])?;
    }
    keys.only("act_fn", &[json!("silu"), json!("swish")])?;
    keys.only("attention_type", &[json!("default")])?;
    keys.only("conv_in_kernel", &[json!(3)])?;
    keys.only("conv_out_kernel", &[json!(3)])?;
    keys.only("downsample_padding", &[json!(1)])?;
    keys.only("mid_block_scale_factor", &[json!(1), json!(1.0)])?;
    keys.only("only_cross_attention", &[json!(false)])?;
    keys.only("resnet_out_scale_factor", &[json!(1), json!(1.0)])?;
    keys.only("resnet_time_scale_shift", &[json!("default")])?;
    keys.only("time_embedding_type", &[json!("positional")])?;
    // Scores and softmax accumulate in f32 everywhere, as upcast_attention asks for.
    keys.drop_idle(&["addition_embed_type_num_heads", "dropout", "upcast_attention"]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_files_mean_64_latent_pixels() {
        let size = |version: &str| {
            let file = json!({ "sample_size": 32, "_diffusers_version": version });
            UNetConfig::parse(Keys::new("unet/config.json", file).unwrap()).unwrap().sample_size
        };
        let sizes = ["0.6.0", "0.8.0.dev0", "0.9.0.dev0", "0.10.2", "1.0.0"].map(size);
        assert_eq!(sizes, [64, 64, 32, 32, 32]);
    }

    #[test]
    fn transformers_may_be_deeper_at_some_levels() {
        let file = |depths| {
            json!({
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": depths,
            })
        };
        let parse = |depths| UNetConfig::parse(Keys::new("unet/config.json", file(depths))?);
        let depths = |depths| {
            let config = parse(depths).unwrap();
            (config.down_depths, config.mid_depth, config.up_depths)
        };
        let twice = |depths: [usize; 3]| depths.map(|depth| vec![depth; 2]).to_vec();
        let thrice = |depths: [usize; 3]| depths.map(|depth| vec![depth; 3]).to_vec();
        let of_xl = (twice([0, 2, 10]), 10, thrice([10, 2, 0]));
        assert_eq!(depths(json!([1, 2, 10])), of_xl, "there is none at the first");
        assert_eq!(depths(json!([0, 2, 10])), of_xl);
        assert_eq!(depths(json!(1)), (twice([0, 1, 1]), 1, thrice([1, 1, 0])));
        let error = parse(json!([1, 2])).unwrap_err().to_string();
        assert!(error.starts_with("unet/config.json: transformer_layers_per_block: "), "{error}");
    }

    #[test]
    fn layers_of_a_block_may_differ() {
        // As SSD-1B has it.
        let mut file = json!({
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [0, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        });
        let parse = |file: &serde_json::Value| {
            UNetConfig::parse(Keys::new("unet/config.json", file.clone())?)
        };
        let config = parse(&file).unwrap();
        assert_eq!(config.mid_block, MidBlock::Plain);
        assert_eq!(config.down_depths, [[0, 0], [2, 2], [4, 4]]);
        assert_eq!(config.up_depths, [[4, 4, 10], [2, 1, 1], [0, 0, 0]]);
        for (value, words) in [
            (json!([[4, 4], [2, 1, 1], 1]), "wrong length of the list of a block"),
            (json!([1, 1]), "wrong length"),
            (json!(null), "is missing"),
        ] {
            file["reverse_transformer_layers_per_block"] = value;
            let error = parse(&file).unwrap_err().to_string();
            let begin = "unet/config.json: reverse_transformer_layers_per_block: ";
            assert!(error.starts_with(begin) && error.contains(words), "{error}");
        }
    }

    #[test]
    fn added_conditions_are_those_of_text_time() {
        let parse = |file| UNetConfig::parse(Keys::new("unet/config.json", file)?);
        let file = json!({
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        });
        let added = AddedConfig { size_width: 256, inputs: 2816 };
        assert_eq!(parse(file).unwrap().added, Some(added));
        for (file, key) in [
            (json!({ "addition_embed_type": "text" }), "addition_embed_type"),
            (json!({ "addition_embed_type": "text_time" }), "addition_time_embed_dim"),
            (json!({ "addition_time_embed_dim": 256 }), "addition_time_embed_dim"),
        ] {
            let error = parse(file).unwrap_err().to_string();
            assert!(error.starts_with(&format!("unet/config.json: {key}: ")), "{error}");
        }
    }

    #[test]
    fn counts_out_of_range_are_refused_by_name() {
        let cases = [
            (json!({ "sample_size": u64::MAX / 4 }), "sample_size"),
            (json!({ "sample_size": 0 }), "sample_size"),
            (json!({ "transformer_layers_per_block": 0 }), "transformer_layers_per_block"),
            (json!({ "cross_attention_dim": 0 }), "cross_attention_dim"),
            (json!({ "in_channels": u64::MAX / 2 }), "in_channels"),
            (json!({ "layers_per_block": 0 }), "layers_per_block"),
            (json!({ "block_out_channels": [32, 32, 32, 1u64 << 60] }), "block_out_channels"),
        ];
        for (file, key) in cases {
            let keys = Keys::new("unet/config.json", file).unwrap();
            let error = UNetConfig::parse(keys).unwrap_err().to_string();
            assert!(error.starts_with(&format!("unet/config.json: {key}: ")), "{error}");
        }
    }
}
