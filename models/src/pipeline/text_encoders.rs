//! The text encoders of a model, each with its tokenizer: one in Stable Diffusion 1.x and 2.x, two in
//! XL. Of these the hidden states are joined, and the pooled state of the second is used too. The
//! refiner of XL has the second alone.
//!
//! Reference: diffusers 0.42 `encode_prompt` of `StableDiffusionPipeline` and
//! `StableDiffusionXLPipeline`; stable-diffusion-webui 1.10 `modules/sd_hijack_clip.py`,
//! `sd_hijack_open_clip.py` and `sd_models_xl.py`.

use candle_core::{DType, Tensor};

use super::spec::PromptSyntax;
use crate::error::Result;
use crate::layers::LoraStack;
use crate::networks::{ClipTextModel, PooledStates, PooledToken};
use crate::text::{ClipTokenizer, PromptChunk, chunks};

/// The text encoders of a model.
pub(super) struct TextEncoders {
    /// The only one of a refiner, too.
    pub(super) first: TextEncoder,
    /// Of Stable Diffusion XL.
    pub(super) second: Option<TextEncoder>,
}

/// A text encoder and its tokenizer.
pub(super) struct TextEncoder {
    pub(super) tokenizer: ClipTokenizer,
    pub(super) model: ClipTextModel,
}

/// A text to encode.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text<'a> {
    pub(super) text: &'a str,
    /// That of the second encoder, if it is another.
    pub(super) second: Option<&'a str>,
    pub(super) syntax: PromptSyntax,
    /// Layers that are skipped.
    pub(super) skip: usize,
}

impl<'a> Text<'a> {
    /// The texts of the first and of the second encoder.
    fn of_encoders(self) -> [&'a str; 2] {
        [self.text, self.second.unwrap_or(self.text)]
    }
}

/// What a text is to the UNet.
pub(super) struct EncodedText {
    /// Hidden states (1, L, D) f32.
    pub(super) context: Tensor,
    /// The pooled state (1, P) f32, of Stable Diffusion XL.
    pub(super) pooled: Option<Tensor>,
    /// How the text was truncated. Reads on from the name of the field.
    pub(super) warning: Option<String>,
    /// The same of the second encoder's text, if it is another.
    pub(super) second_warning: Option<String>,
}

impl TextEncoders {
    /// Tokens of a chunk.
    pub(super) fn max_length(&self) -> usize {
        self.first.tokenizer.max_length()
    }

    fn all(&self) -> impl Iterator<Item = &TextEncoder> {
        std::iter::once(&self.first).chain(&self.second)
    }

    /// Channels of the hidden states.
    pub(super) fn width(&self) -> usize {
        self.all().map(|encoder| encoder.model.config().transformer.hidden_size).sum()
    }

    /// Channels of the pooled state, of Stable Diffusion XL.
    pub(super) fn pooled_width(&self) -> Option<usize> {
        let last = self.all().last()?.model.config().projection_dim;
        (last > 0).then_some(last)
    }

    /// The most layers that can be skipped: at least the first hidden state is left.
    pub(super) fn most_skipped(&self) -> usize {
        let layers = |encoder: &TextEncoder| encoder.model.config().transformer.num_hidden_layers;
        let fewest = self.all().map(layers).min().unwrap_or_default();
        // The last one is always skipped where there is a pooled state.
        fewest.saturating_sub(usize::from(self.pooled_width().is_some()))
    }

    /// Encodes a text.
    pub(super) fn encode(&self, text: Text<'_>, loras: &LoraStack) -> Result<EncodedText> {
        let encoders: Vec<_> = self.all().collect();
        match text.syntax {
            _ if self.pooled_width().is_none() => self.first.encode(text, loras),
            PromptSyntax::Plain => plain_xl(&encoders, text, loras),
            PromptSyntax::A1111 => weighted_xl(&encoders, text, loras),
        }
    }

    /// Zeros in the place of an absent negative prompt.
    pub(super) fn zeros(&self) -> Result<EncodedText> {
        let device = self.first.model.device();
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device);
        Ok(EncodedText {
            context: zeros(&[1, self.max_length(), self.width()])?,
            pooled: self.pooled_width().map(|width| zeros(&[1, width])).transpose()?,
            warning: None,
            second_warning: None,
        })
    }
}

impl TextEncoder {
    /// Of Stable Diffusion 1.x and 2.x.
    fn encode(&self, text: Text<'_>, loras: &LoraStack) -> Result<EncodedText> {
        let (context, warning) = match text.syntax {
            // One chunk of tokens, as diffusers encodes a prompt.
            PromptSyntax::Plain => {
                let (ids, warning) = self.tokens(text.text)?;
                (self.model.forward_skipping(text.skip, &[ids], loras)?, warning)
            }
            // Several with weights, as AUTOMATIC1111 encodes a prompt.
            PromptSyntax::A1111 => {
                let (chunks, warning) = self.chunks(text.text)?;
                (encode_chunks(chunks, &self.model, text.skip, loras)?, warning)
            }
        };
        Ok(EncodedText { context, pooled: None, warning, second_warning: None })
    }

    /// The tokens of one chunk, and a warning if the text is longer.
    fn tokens(&self, text: &str) -> Result<(Vec<u32>, Option<String>)> {
        let tokens = self.tokenizer.encode(text)?;
        let length = tokens.ids.len();
        let warning =
            tokens.cut.map(|cut| format!("is longer than {length} tokens; truncated: {cut:?}"));
        Ok((tokens.ids, warning))
    }

    /// The chunks of a text, and a warning if it is longer.
    fn chunks(&self, text: &str) -> Result<(Vec<PromptChunk>, Option<String>)> {
        let (chunks, cut) = chunks(text, &self.tokenizer)?;
        let count = chunks.len();
        let warning = (cut > 0)
            .then(|| format!("is longer than {count} chunks of tokens; {cut} more are truncated"));
        Ok((chunks, warning))
    }
}

/// As diffusers: a chunk of each encoder, side by side.
fn plain_xl(encoders: &[&TextEncoder], text: Text<'_>, loras: &LoraStack) -> Result<EncodedText> {
    let encode = |(encoder, own): (&&TextEncoder, &str)| {
        let (ids, warning) = encoder.tokens(own)?;
        let token = PooledToken::Configured;
        Ok((encoder.model.forward_pooled(text.skip, &[ids], token, loras)?, warning))
    };
    let encoded = encoders.iter().zip(text.of_encoders()).map(encode);
    joined(encoded.collect::<Result<Vec<_>>>()?, text)
}

/// As AUTOMATIC1111: chunks of each encoder, side by side, each with its weights. The pooled state
/// is that of the first chunk, without weights. There is no other text for the second encoder there:
/// the shorter of two is filled up with empty chunks, as the shorter prompt of a batch is.
fn weighted_xl(
    encoders: &[&TextEncoder],
    text: Text<'_>,
    loras: &LoraStack,
) -> Result<EncodedText> {
    let all = encoders.iter().zip(text.of_encoders()).map(|(encoder, own)| encoder.chunks(own));
    let all = all.collect::<Result<Vec<_>>>()?;
    let count = all.iter().map(|(chunks, _)| chunks.len()).max().unwrap_or_default();
    let encode = |(encoder, (mut chunks, warning)): (&&TextEncoder, (Vec<PromptChunk>, _))| {
        while chunks.len() < count {
            chunks.extend(encoder.chunks("")?.0);
        }
        let (ids, weights): (Vec<_>, Vec<_>) =
            chunks.into_iter().map(|chunk| (chunk.ids, chunk.weights)).unzip();
        let token = PooledToken::Id(encoder.tokenizer.end());
        let PooledStates { states, pooled } =
            encoder.model.forward_pooled(text.skip, &ids, token, loras)?;
        let pooled = pooled.map(|pooled| pooled.narrow(0, 0, 1)).transpose()?;
        Ok((PooledStates { states: weighed(states, weights.concat())?, pooled }, warning))
    };
    joined(encoders.iter().zip(all).map(encode).collect::<Result<Vec<_>>>()?, text)
}

/// The states of all encoders side by side, the pooled one of the last, and the warnings of each.
fn joined(encoded: Vec<(PooledStates, Option<String>)>, text: Text<'_>) -> Result<EncodedText> {
    let states: Vec<_> = encoded.iter().map(|(states, _)| &states.states).collect();
    let context = Tensor::cat(&states, 2)?;
    let pooled = encoded.last().and_then(|(states, _)| states.pooled.clone());
    let mut warnings = encoded.into_iter().map(|(_, warning)| warning);
    let warning = warnings.next().flatten();
    let second_warning = warnings.next().flatten().filter(|_| text.second.is_some());
    Ok(EncodedText { context, pooled, warning, second_warning })
}

/// Chunks -> the context (1, chunks x tokens, D) f32: the hidden states times their weights, with
/// the mean of each chunk restored. The last `skip` layers are skipped.
pub fn encode_chunks(
    chunks: Vec<PromptChunk>,
    encoder: &ClipTextModel,
    skip: usize,
    loras: &LoraStack,
) -> Result<Tensor> {
    let (ids, weights): (Vec<_>, Vec<_>) = chunks.into_iter().map(|w| (w.ids, w.weights)).unzip();
    weighed(encoder.forward_skipping(skip, &ids, loras)?, weights.concat())
}

/// Hidden states (chunks, tokens, D) and a weight for each token -> (1, chunks x tokens, D)
fn weighed(states: Tensor, weights: Vec<f32>) -> Result<Tensor> {
    let (count, length, width) = states.dims3()?;
    let states = if weights.iter().all(|weight| *weight == 1.0) {
        states
    } else {
        let weights = Tensor::from_vec(weights, (count, length, 1), states.device())?;
        let scaled = states.broadcast_mul(&weights)?;
        let mean = |x: &Tensor| x.flatten_from(1)?.to_dtype(DType::F64)?.mean_keepdim(1);
        let factor = (mean(&states)? / mean(&scaled)?)?.to_dtype(DType::F32)?;
        scaled.broadcast_mul(&factor.reshape((count, 1, 1))?)?
    };
    Ok(states.reshape((1, count * length, width))?)
}
