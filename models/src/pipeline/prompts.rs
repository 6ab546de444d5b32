//! Prompts to the UNet's conditioning, with an LRU cache of encoded texts.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{DType, Tensor};
use lru::LruCache;

use super::load::LoadedModel;
use super::pass::Directions;
use super::rows::Row;
use super::spec::PromptSyntax;
use crate::error::Result;
use crate::layers::LoraStack;
use crate::networks::{ClipTextModel, Conditioning};
use crate::text::{PromptChunk, Schedule, chunks};

/// Chunks of tokens whose encoding is cached: the empty negative prompt, and the texts of a series of
/// requests.
pub(super) const CACHED_CHUNKS: usize = 128;

/// A text, its syntax, the layers skipped, the tokens to which it is lengthened, and the LoRAs of
/// its encoder.
pub(super) type PromptKey = (String, (PromptSyntax, usize), usize, Vec<(u64, [u64; 2])>);

/// The texts that were encoded last.
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
        Self { encoded: Mutex::new(LruCache::unbounded()) }
    }
}

/// How the prompts of a batch row are encoded.
pub(super) struct Encoding<'a> {
    pub(super) cache: &'a PromptCache,
    pub(super) model: &'a LoadedModel,
    pub(super) syntax: PromptSyntax,
    /// Layers that are skipped.
    pub(super) skip: usize,
    pub(super) loras: &'a LoraStack,
    /// What is odd about the prompt; the sentences read on from the field's name.
    pub(super) warnings: Vec<String>,
    /// Whether a text was truncated, of which one warning is enough.
    pub(super) has_truncated: bool,
}

impl Encoding<'_> {
    /// The batch row of a prompt.
    pub(super) fn row(&mut self, schedule: &Schedule) -> Result<Row> {
        let texts = schedule.texts.iter().map(|text| Ok(self.encode(text, 0)?.0));
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let spans = schedule.spans.iter();
        Ok(Row(spans.map(|(until, index)| (*until, Arc::clone(&texts[*index]))).collect()))
    }

    /// The batch rows of prompts that are joined. As in AUTOMATIC1111, all have the tokens of the
    /// longest at each evaluation, by repeating their last one's state.
    pub(super) fn rows(&mut self, directions: &Directions) -> Result<Vec<(Row, f64)>> {
        if let [(schedule, weight)] = &directions[..] {
            return Ok(vec![(self.row(schedule)?, *weight)]);
        }
        let mut lengths = Vec::new();
        for (schedule, _) in directions {
            let lengths_of = schedule.texts.iter().map(|text| Ok(self.encode(text, 0)?.1));
            lengths.push(lengths_of.collect::<Result<Vec<_>>>()?);
        }
        let spans = directions.iter().flat_map(|(schedule, _)| &schedule.spans);
        let mut ends: Vec<_> = spans.map(|(until, _)| *until).collect();
        ends.sort_unstable();
        ends.dedup();
        let mut rows: Vec<_> =
            directions.iter().map(|(_, weight)| (Row(Vec::new()), *weight)).collect();
        for until in ends {
            let indices = directions.iter().map(|(schedule, _)| schedule.at(until));
            let indices: Vec<_> = indices.collect();
            let longest =
                indices.iter().zip(&lengths).map(|(index, lengths)| lengths[*index]).max();
            let longest = longest.unwrap_or_default();
            for ((row, _), ((schedule, _), index)) in
                rows.iter_mut().zip(directions.iter().zip(indices))
            {
                let (conditioning, _) = self.encode(&schedule.texts[index], longest)?;
                match row.0.last_mut() {
                    Some(last) if Arc::ptr_eq(&last.1, &conditioning) => last.0 = until,
                    _ => row.0.push((until, conditioning)),
                }
            }
        }
        Ok(rows)
    }

    /// The conditioning of a text, and its number of tokens, which is at least `least`.
    fn encode(&mut self, text: &str, least: usize) -> Result<(Arc<Conditioning>, usize)> {
        let mut cache = self.cache.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        let key =
            |least: usize| (text.to_owned(), (self.syntax, self.skip), least, self.loras.key());
        let encoded = cache.try_get_or_insert_mut(key(0), || match self.syntax {
            PromptSyntax::Plain => encode_plain(self.model, text, self.skip, self.loras),
            PromptSyntax::A1111 => encode_weighted(self.model, text, self.skip, self.loras),
        })?;
        if !self.has_truncated {
            self.has_truncated = encoded.warning.is_some();
            self.warnings.extend(encoded.warning.clone());
        }
        let context = encoded.context.clone();
        let encoded = match context.dim(1)? < least {
            false => encoded,
            true => cache.try_get_or_insert_mut(key(least), || lengthened(&context, least))?,
        };
        let conditioning = match encoded.conditioning.upgrade() {
            Some(conditioning) => conditioning,
            None => {
                let loras = std::slice::from_ref(self.loras);
                Arc::new(self.model.unet.condition(&encoded.context, loras)?)
            }
        };
        encoded.conditioning = Arc::downgrade(&conditioning);
        let tokens = encoded.context.dim(1)?;
        let chunks = |(_, encoded): (&PromptKey, &EncodedPrompt)| {
            let tokens = encoded.context.dims()[1];
            tokens.div_ceil(self.model.tokenizer.max_length())
        };
        while cache.len() > 1 && cache.iter().map(chunks).sum::<usize>() > CACHED_CHUNKS {
            cache.pop_lru();
        }
        Ok((conditioning, tokens))
    }
}

/// A context (1, L, D) of so many tokens, the last of which is repeated.
fn lengthened(context: &Tensor, tokens: usize) -> Result<EncodedPrompt> {
    let length = context.dim(1)?;
    let last = context.narrow(1, length - 1, 1)?;
    let more = last.repeat((1, tokens - length, 1))?;
    let context = Tensor::cat(&[context, &more], 1)?;
    Ok(EncodedPrompt { context, conditioning: Weak::new(), warning: None })
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
