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
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum OneOrEach {
    One(usize),
    Each(Vec<usize>),
}

impl OneOrEach {
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
    /// Whether there is a middle block.
    pub mid_block: bool,
    /// Whether each up block has cross attention.
    pub up_cross_attention: Vec<bool>,
    /// Residual blocks of a down block; an up block has one more.
    pub layers_per_block: usize,
    /// Attention heads of each level: what the JSON's `attention_head_dim` means in SD 1.x and 2.x.
    pub heads: Vec<usize>,
    /// Transformer blocks of each cross-attention layer, by level.
    pub transformer_layers_per_block: Vec<usize>,
    /// Channels of the text encoder's output.
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
        let depths = keys.take("transformer_layers_per_block", OneOrEach::One(1))?.each(levels);
        let depths =
            depths.ok_or_else(|| keys.invalid("transformer_layers_per_block", "wrong length"))?;
        // As diffusers: files of its first releases have 32 here, and mean 64.
        let least = if keys.text("_diffusers_version").is_some_and(is_old) { 64 } else { 0 };
        let sample_size = keys.count("sample_size", 1, 64)?;
        if sample_size > MAX_SAMPLE_SIZE {
            let reason = format!("{sample_size} must be 1 to {MAX_SAMPLE_SIZE}");
            return Err(keys.invalid("sample_size", reason));
        }
        let config = Self {
            sample_size: sample_size.max(least),
            mid_block: !keys.is_null("mid_block_type"),
            in_channels: keys.count("in_channels", 1, 4)?,
            out_channels: keys.count("out_channels", 1, 4)?,
            down_cross_attention: down,
            up_cross_attention: up,
            layers_per_block: keys.count("layers_per_block", 1, 2)?,
            transformer_layers_per_block: depths,
            cross_attention_dim: keys.count("cross_attention_dim", 1, 1280)?,
            norm_num_groups: keys.count("norm_num_groups", 1, 32)?,
            norm_eps: keys.take("norm_eps", 1e-5)?,
            use_linear_projection: keys.take("use_linear_projection", false)?,
            flip_sin_to_cos: keys.take("flip_sin_to_cos", true)?,
            freq_shift: keys.take("freq_shift", 0.0)?,
            time_cond_proj_dim: keys.take("time_cond_proj_dim", None)?,
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
        if self.transformer_layers_per_block.iter().any(|depth| !(1..=MAX_DEPTH).contains(depth)) {
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

/// Rejects features of other members of the family (SDXL, unCLIP, Kandinsky).
fn refuse_other_unets(keys: &mut Keys) -> Result<()> {
    const NULL: [&str; 14] = [
        "addition_embed_type",
        "addition_time_embed_dim",
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "mid_block_only_cross_attention",
        "num_class_embeds",
        "projection_class_embeddings_input_dim",
        "reverse_transformer_layers_per_block",
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
    keys.only("mid_block_type", &[json!("UNetMidBlock2DCrossAttn")])?;
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
        let depths = |depths| parse(depths).unwrap().transformer_layers_per_block;
        assert_eq!(depths(json!([1, 2, 10])), [1, 2, 10]);
        assert_eq!(depths(json!(1)), [1, 1, 1]);
        let error = parse(json!([1, 2])).unwrap_err().to_string();
        assert!(error.starts_with("unet/config.json: transformer_layers_per_block: "), "{error}");
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
