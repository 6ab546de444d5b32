//! Prompts to the UNet's conditioning, with an LRU cache of encoded prompts.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{DType, Tensor};
use lru::LruCache;

use super::load::LoadedModel;
use super::spec::PromptSyntax;
use crate::error::Result;
use crate::layers::LoraStack;
use crate::networks::{ClipTextModel, Conditioning};
use crate::text::{PromptChunk, chunks};

/// Prompts whose encoding is cached: the empty negative prompt, and those of a series of requests.
pub(super) const CACHED_PROMPTS: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");

/// A prompt, its syntax, the layers skipped, and the LoRAs of its encoder.
pub(super) type PromptKey = (String, (PromptSyntax, usize), Vec<(u64, [u64; 2])>);

/// The prompts that were encoded last.
pub(super) struct PromptCache {
    pub(super) encoded: Mutex<LruCache<PromptKey, EncodedPrompt>>,
}

/// An encoded prompt.
pub(super) struct EncodedPrompt {
    /// Hidden states of the text encoder (1, L, D) f32.
    pub(super) context: Tensor,
    /// Shared by the trajectories with this prompt and freed with the last of them: its keys and
    /// values are far larger than the context (33 times in v1.4).
    pub(super) conditioning: Weak<Conditioning>,
    warning: Option<String>,
}

impl Default for PromptCache {
    fn default() -> Self {
        Self { encoded: Mutex::new(LruCache::new(CACHED_PROMPTS)) }
    }
}

impl PromptCache {
    /// The conditioning of a batch row with this prompt, and a warning if the prompt was truncated.
    /// `skip` is the number of skipped layers.
    pub(super) fn encode(
        &self,
        model: &LoadedModel,
        prompt: &str,
        (syntax, skip): (PromptSyntax, usize),
        loras: &LoraStack,
    ) -> Result<(Arc<Conditioning>, Option<String>)> {
        let mut cache = self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (prompt.to_owned(), (syntax, skip), loras.key());
        let encoded = cache.try_get_or_insert_mut(key, || match syntax {
            PromptSyntax::Plain => encode_plain(model, prompt, skip, loras),
            PromptSyntax::A1111 => encode_weighted(model, prompt, skip, loras),
        })?;
        let conditioning = match encoded.conditioning.upgrade() {
            Some(conditioning) => conditioning,
            None => Arc::new(model.unet.condition(&encoded.context, std::slice::from_ref(loras))?),
        };
        encoded.conditioning = Arc::downgrade(&conditioning);
        Ok((conditioning, encoded.warning.clone()))
    }
}

/// One chunk of tokens, as diffusers encodes a prompt.
fn encode_plain(
    model: &LoadedModel,
    prompt: &str,
    skip: usize,
    loras: &LoraStack,
) -> Result<EncodedPrompt> {
    let tokens = model.tokenizer.encode(prompt)?;
    let length = tokens.ids.len();
    let warning =
        tokens.cut.map(|cut| format!("is longer than {length} tokens; truncated: {cut:?}"));
    let context = model.text_encoder.forward_skipping(skip, &[tokens.ids], loras)?;
    Ok(EncodedPrompt { context, conditioning: Weak::new(), warning })
}

/// Several chunks of tokens with weights, as AUTOMATIC1111 encodes a prompt.
fn encode_weighted(
    model: &LoadedModel,
    prompt: &str,
    skip: usize,
    loras: &LoraStack,
) -> Result<EncodedPrompt> {
    let (chunks, cut) = chunks(prompt, &model.tokenizer)?;
    let count = chunks.len();
    let warning = (cut > 0)
        .then(|| format!("is longer than {count} chunks of tokens; {cut} more are truncated"));
    let context = encode_chunks(chunks, &model.text_encoder, skip, loras)?;
    Ok(EncodedPrompt { context, conditioning: Weak::new(), warning })
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
    let states = encoder.forward_skipping(skip, &ids, loras)?; // (chunks, tokens, D)
    let (count, length, width) = states.dims3()?;
    let weights = weights.concat();
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
