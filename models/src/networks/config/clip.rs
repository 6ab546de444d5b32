//! `text_encoder/config.json` and `text_encoder_2/config.json`, and what it has in common with that of the safety checker's vision
//! tower.

use serde_json::json;

use crate::error::Result;
use crate::files::{Keys, Source};
use crate::ops::Activation;

/// Keys about training, and settings of text generation in old files.
pub(crate) const IDLE_TEXT_KEYS: [&str; 34] = [
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "diversity_penalty",
    "dropout",
    "dtype",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "projection_dim",
    "repetition_penalty",
    "return_dict",
    "temperature",
    "tie_word_embeddings",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers_version",
    "typical_p",
];

/// The transformer of a CLIP tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Channels of the hidden states.
    pub hidden_size: usize,
    /// Channels inside the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads of a layer.
    pub num_attention_heads: usize,
    /// The MLP's activation.
    pub(crate) hidden_act: Activation,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
}

impl ClipConfig {
    /// Takes its keys; `hidden`, `inner` and `heads` are the defaults of the tower's class.
    pub(crate) fn take(
        keys: &mut Keys,
        (hidden, inner, heads): (usize, usize, usize),
    ) -> Result<Self> {
        let config = Self {
            hidden_size: keys.count("hidden_size", 1, hidden)?,
            intermediate_size: keys.count("intermediate_size", 1, inner)?,
            num_hidden_layers: keys.count("num_hidden_layers", 0, 12)?,
            num_attention_heads: keys.count("num_attention_heads", 1, heads)?,
            hidden_act: match keys.take("hidden_act", "quick_gelu".to_owned())?.as_str() {
                "quick_gelu" => Activation::QuickGelu,
                "gelu" => Activation::Gelu,
                other => {
                    let reason = format!("{other:?} is not quick_gelu or gelu");
                    return Err(keys.invalid("hidden_act", reason));
                }
            },
            layer_norm_eps: keys.take("layer_norm_eps", 1e-5)?,
        };
        let heads = config.num_attention_heads;
        if heads == 0 || !config.hidden_size.is_multiple_of(heads) {
            let reason = format!("{heads} heads do not divide {} channels", config.hidden_size);
            return Err(keys.invalid("num_attention_heads", reason));
        }
        Ok(config)
    }
}

/// `text_encoder/config.json` of a `CLIPTextModel` or `CLIPTextModelWithProjection`.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipTextConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Maximum number of tokens of a sequence.
    pub max_position_embeddings: usize,
    /// The layers between embeddings and final norm.
    pub transformer: ClipConfig,
    /// Channels of the projection of the pooled state, of a second text encoder; 0 of a first, which
    /// has none.
    pub projection_dim: usize,
    /// The token whose state is pooled there.
    pub(crate) end: EndToken,
}

/// The token whose state is pooled: the first of them in a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndToken {
    /// That of the greatest id, in files whose `eos_token_id` is 2, as those of Stable Diffusion XL.
    Greatest,
    /// This one.
    Id(u32),
}

impl ClipTextConfig {
    /// Reads `text_encoder/config.json`.
    pub fn read(source: &Source) -> Result<Self> {
        Self::read_in(source, "text_encoder")
    }

    /// Reads `config.json` in the folder of the encoder.
    pub fn read_in(source: &Source, folder: &str) -> Result<Self> {
        let mut keys = Keys::read(source, &format!("{folder}/config.json"))?;
        let is_first = folder == "text_encoder";
        keys.only("model_type", &[json!("clip_text_model")])?;
        keys.only("use_attention_mask", &[json!(false)])?;
        let config = Self {
            vocab_size: keys.count("vocab_size", 1, 49408)?,
            max_position_embeddings: keys.count("max_position_embeddings", 1, 77)?,
            transformer: ClipConfig::take(&mut keys, (512, 2048, 8))?,
            projection_dim: if is_first { 0 } else { keys.count("projection_dim", 1, 512)? },
            end: match keys.take("eos_token_id", json!(49407))?.as_u64() {
                Some(2) => EndToken::Greatest,
                _ if is_first => EndToken::Greatest,
                id => EndToken::Id(id.and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX)),
            },
        };
        keys.drop_idle(&IDLE_TEXT_KEYS);
        keys.finish()?;
        Ok(config)
    }
}
