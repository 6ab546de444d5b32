//! Prompts to the UNet's conditioning, with an LRU cache of encoded texts.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::Tensor;
use lru::LruCache;

use super::load::LoadedModel;
use super::pass::Directions;
use super::rows::Row;
use super::spec::PromptSyntax;
use super::text_encoders::{EncodedText, Text};
use crate::error::Result;
use crate::layers::LoraStack;
use crate::networks::Conditioning;
use crate::text::Schedule;

/// Chunks of tokens whose encoding is cached: the empty negative prompt, and the texts of a series of
/// requests.
pub(super) const CACHED_CHUNKS: usize = 128;

/// What an encoded text is known by.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct PromptKey {
    /// None for the zeros in the place of an absent negative prompt.
    pub(super) text: Option<String>,
    /// That of the second encoder, if it is another.
    second: Option<String>,
    syntax: PromptSyntax,
    /// The layers skipped.
    skip: usize,
    /// The tokens to which it is lengthened.
    least: usize,
    /// The LoRAs of the encoders.
    loras: Vec<(u64, [u64; 2])>,
}

/// The texts that were encoded last.
pub(super) struct PromptCache {
    pub(super) encoded: Mutex<LruCache<PromptKey, EncodedPrompt>>,
}

/// An encoded prompt.
pub(super) struct EncodedPrompt {
    /// Hidden states of the text encoders (1, L, D) f32.
    pub(super) context: Tensor,
    /// The pooled state (1, P) f32, of Stable Diffusion XL.
    pooled: Option<Tensor>,
    /// Keys and values, shared by the trajectories with this prompt and freed with the last of them:
    /// they are far larger than the context (33 times in v1.4).
    pub(super) kv: Weak<Tensor>,
    warning: Option<String>,
    second_warning: Option<String>,
}

impl From<EncodedText> for EncodedPrompt {
    fn from(text: EncodedText) -> Self {
        let EncodedText { context, pooled, warning, second_warning } = text;
        Self { context, pooled, kv: Weak::new(), warning, second_warning }
    }
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
    /// The text of the second encoder, if it is another.
    pub(super) second: Option<&'a str>,
    /// Layers that are skipped.
    pub(super) skip: usize,
    /// Sizes, of Stable Diffusion XL.
    pub(super) sizes: Vec<f64>,
    pub(super) loras: &'a LoraStack,
    /// What is odd about the prompt; the sentences read on from the field's name.
    pub(super) warnings: Vec<String>,
    /// Whether a text was truncated, of which one warning is enough.
    pub(super) has_truncated: bool,
    /// Why those of the second encoder were.
    pub(super) second_warnings: Vec<String>,
}

impl Encoding<'_> {
    /// The batch row of a prompt.
    pub(super) fn row(&mut self, schedule: &Schedule) -> Result<Row> {
        let texts = schedule.texts.iter().map(|text| Ok(self.encode(text, 0)?.0));
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let spans = schedule.spans.iter();
        Ok(Row(spans.map(|(until, index)| (*until, Arc::clone(&texts[*index]))).collect()))
    }

    /// The batch row of an absent negative prompt, where that is zeros.
    pub(super) fn zeros(&mut self) -> Result<Row> {
        Ok(Row(vec![(usize::MAX, self.condition(None, 0)?.0)]))
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
                    Some(last) if last.1.has_prompt_of(&conditioning) => last.0 = until,
                    _ => row.0.push((until, conditioning)),
                }
            }
        }
        Ok(rows)
    }

    /// The conditioning of a text, and its number of tokens, which is at least `least`.
    fn encode(&mut self, text: &str, least: usize) -> Result<(Arc<Conditioning>, usize)> {
        self.condition(Some(text), least)
    }

    /// The same, and for no text that of zeros.
    fn condition(
        &mut self,
        text: Option<&str>,
        least: usize,
    ) -> Result<(Arc<Conditioning>, usize)> {
        let mut cache = self.cache.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        let key = |least: usize| PromptKey {
            text: text.map(str::to_owned),
            second: self.second.map(str::to_owned),
            syntax: self.syntax,
            skip: self.skip,
            least,
            loras: self.loras.key(),
        };
        let encoded = cache.try_get_or_insert_mut(key(0), || -> Result<EncodedPrompt> {
            let Some(text) = text else { return Ok(self.model.texts.zeros()?.into()) };
            let Self { second, syntax, skip, .. } = *self;
            Ok(self.model.texts.encode(Text { text, second, syntax, skip }, self.loras)?.into())
        })?;
        if !self.has_truncated {
            self.has_truncated = encoded.warning.is_some();
            self.warnings.extend(encoded.warning.clone());
        }
        self.second_warnings.extend(encoded.second_warning.clone());
        let (context, pooled) = (encoded.context.clone(), encoded.pooled.clone());
        let encoded = match context.dim(1)? < least {
            false => encoded,
            true => cache.try_get_or_insert_mut(key(least), || {
                lengthened(&context, pooled.clone(), least)
            })?,
        };
        let (unet, loras) = (&self.model.unet, std::slice::from_ref(self.loras));
        let kv = match encoded.kv.upgrade() {
            Some(kv) => kv,
            None => Arc::new(unet.keys_values(&encoded.context, loras)?),
        };
        encoded.kv = Arc::downgrade(&kv);
        let of_prompt = unet.on_prompt(kv, &encoded.context)?;
        let conditioning = match &encoded.pooled {
            None => of_prompt,
            Some(pooled) => unet.add(of_prompt, pooled, &self.sizes, loras)?,
        };
        let tokens = encoded.context.dim(1)?;
        let chunks = |(_, encoded): (&PromptKey, &EncodedPrompt)| {
            let tokens = encoded.context.dims()[1];
            tokens.div_ceil(self.model.texts.max_length())
        };
        while cache.len() > 1 && cache.iter().map(chunks).sum::<usize>() > CACHED_CHUNKS {
            cache.pop_lru();
        }
        Ok((Arc::new(conditioning), tokens))
    }
}

/// A context (1, L, D) of so many tokens, the last of which is repeated.
fn lengthened(context: &Tensor, pooled: Option<Tensor>, tokens: usize) -> Result<EncodedPrompt> {
    let length = context.dim(1)?;
    let last = context.narrow(1, length - 1, 1)?;
    let more = last.repeat((1, tokens - length, 1))?;
    let context = Tensor::cat(&[context, &more], 1)?;
    let (warning, second_warning) = (None, None);
    Ok(EncodedText { context, pooled, warning, second_warning }.into())
}
