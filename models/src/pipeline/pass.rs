//! The passes of an image over its latents: the base pass, and the hires pass, which may have
//! prompts, a sampler and a guidance scale of its own.

use std::borrow::Cow;

use super::control_spec::Control;
use super::refiner_spec::Refiner;
use super::spec::{Hires, PromptSyntax, Spec};
use super::xl::XlOptions;
use crate::error::{Error, Result};
use crate::picture::Size;
use crate::sampling::{SamplerName, SamplerOptions, Span, share_of};
use crate::text::{
    Counted, LORA_TAGS, Loras, MAX_PARTS, MAX_TEXTS, Part, Schedule, max_chunks, most_texts, parts,
};

/// A pass of an image.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    pub(super) spec: &'a Spec,
    /// None in the base pass.
    hires: Option<&'a Hires>,
}

/// Names of fields, by pass.
const HIRES_FIELDS: [(&str, &str); 2] =
    [("prompt", "hires_prompt"), ("negative_prompt", "hires_negative_prompt")];

/// A prompt of an image as the batch rows have it: the texts of each part, and its weight.
pub(super) type Directions = Vec<(Schedule, f64)>;

impl Spec {
    /// The base pass, and the hires pass if there is one. What is only enlarged has none.
    pub fn passes(&self) -> impl Iterator<Item = Pass<'_>> {
        let passes = std::iter::once(Pass::base(self)).chain(Pass::hires(self));
        passes.filter(|_| self.enlarge.is_none())
    }

    /// Batch rows of one UNet call, in the pass that has the most.
    pub fn rows(&self) -> usize {
        self.passes().map(Pass::rows).max().unwrap_or(1)
    }

    /// Whether the spec may have a LoRA: true if it has any. Costs less than [`Pass::text`].
    pub fn has_loras(&self) -> bool {
        let has_tag = |pass: Pass<'_>| LORA_TAGS.iter().any(|tag| pass.prompt().contains(tag));
        !self.loras.is_empty()
            || self.prompt_syntax == PromptSyntax::A1111 && self.passes().any(has_tag)
    }
}

impl<'a> Pass<'a> {
    /// The base pass.
    pub(super) fn base(spec: &'a Spec) -> Self {
        Self { spec, hires: None }
    }

    /// The hires pass, if there is one.
    pub(super) fn hires(spec: &'a Spec) -> Option<Self> {
        spec.hires.as_ref().map(|hires| Self { spec, hires: Some(hires) })
    }

    /// Whether it is the hires pass.
    pub(super) fn is_hires(self) -> bool {
        self.hires.is_some()
    }

    /// Width and height.
    pub fn size(self) -> Size {
        self.hires.map_or(self.spec.size, |hires| hires.size)
    }

    /// The UNet calls; `pndm` takes one more.
    pub fn calls(self) -> usize {
        let SamplerName { sampler, schedule } = self.sampler();
        let end = self.span().end.map_or(self.steps(), |end| share_of(self.steps(), end));
        let taken = end.saturating_sub(self.skipped_steps()).max(1);
        sampler.evaluations(schedule, taken)
    }

    /// Batch rows of one UNet call: with guidance an unconditional row, and one for each prompt
    /// that is joined by `AND`.
    pub fn rows(self) -> usize {
        let parts = self.parts().map_or(1, |parts| parts.len().min(MAX_PARTS));
        parts + usize::from(self.is_guided())
    }

    /// Pixels times rows times UNet calls, those of ControlNets in the same unit: a net is half a UNet.
    pub fn work(self) -> usize {
        let (rows, calls) = (self.rows(), self.calls());
        let stages = self.sampler().sampler.evaluations_of_a_step();
        let nets = self.spec.controls.iter().filter(|control| control.is_in(self.is_hires()));
        let of_net = |control: &Control| {
            let alone = usize::from(control.steers_prompt_alone() && self.is_guided());
            (rows - alone) * control.active(calls, stages).into_iter().filter(|on| *on).count()
        };
        self.size().pixels() * (rows * calls + nets.map(of_net).sum::<usize>() / 2)
    }

    /// The part of the training's timesteps in which it is.
    pub(super) fn span(self) -> Span {
        self.hires.map_or(self.spec.span, |_| Span::default())
    }

    /// The model that takes it over on its way, if one does.
    pub(super) fn refiner(self) -> Option<&'a Refiner> {
        let is_last = self.is_hires() == self.spec.hires.is_some();
        self.spec.refiner.as_deref().filter(|_| is_last)
    }

    /// Steps of the sampler as if from noise alone.
    pub(super) fn steps(self) -> usize {
        self.hires.map_or(self.spec.steps, |hires| hires.steps)
    }

    /// Steps that are skipped, because the latents begin as an image.
    pub(super) fn skipped_steps(self) -> usize {
        self.hires.map_or(self.spec.skipped_steps(), Hires::skipped_steps)
    }

    /// The share of the noise levels among which the steps are.
    pub(super) fn share_of_levels(self) -> f64 {
        self.hires.map_or(self.spec.share_of_levels(), |_| 1.0)
    }

    /// Sampler and schedule.
    pub(super) fn sampler(self) -> SamplerName {
        self.sampler_and_options().0
    }

    /// The random part of the sampler.
    pub(super) fn sampler_options(self) -> SamplerOptions {
        self.sampler_and_options().1
    }

    /// What is added to the seed for the sampler's noise; 0 also where that has no effect.
    pub fn seed_delta(self) -> i64 {
        let draws = self.sampler().sampler.draws_noise(&self.sampler_options());
        if draws { self.spec.eta_noise_seed_delta } else { 0 }
    }

    /// Whether an option, `eta`, `s_noise` or `s_churn`, has no effect on the sampler.
    pub fn is_idle(self, option: &str) -> bool {
        self.sampler().sampler.idle(&self.sampler_options()).any(|idle| idle == option)
    }

    /// Warnings for what has no effect on the sampler.
    pub(super) fn idle_options(self) -> Vec<String> {
        let sampler = self.sampler().sampler;
        let mut warnings = sampler.without_effect(&self.sampler_options());
        if self.spec.eta_noise_seed_delta != self.seed_delta() {
            warnings.push(format!("eta_noise_seed_delta has no effect on the sampler {sampler}"));
        }
        warnings
    }

    fn sampler_and_options(self) -> (SamplerName, SamplerOptions) {
        let own = self.hires.and_then(|hires| hires.sampler);
        own.unwrap_or((self.spec.sampler_name(), self.spec.sampler_options))
    }

    /// The guidance scale.
    pub(super) fn guidance_scale(self) -> f64 {
        let own = self.hires.and_then(|hires| hires.guidance_scale);
        own.unwrap_or(self.spec.guidance_scale)
    }

    /// The scale by which the outputs of the rows are guided.
    pub(super) fn scale_of_rows(self) -> f64 {
        if self.spec.embeds_guidance {
            return 1.0;
        }
        self.guidance_scale() * self.sampler().sampler.guidance_share()
    }

    /// Whether there is an unconditional row. Prompts that are joined or weighed need one at every
    /// scale, as in AUTOMATIC1111.
    pub fn is_guided(self) -> bool {
        let by_scale = self.spec.prompt_syntax.guides_at(self.guidance_scale());
        let by_scale = by_scale || self.sampler().sampler.needs_unguided();
        by_scale && !self.spec.embeds_guidance
            || self.parts().is_ok_and(|parts| is_composed(&parts))
    }

    /// The negative prompt.
    pub(super) fn negative_prompt(self) -> &'a str {
        let own = self.hires.and_then(|hires| hires.negative_prompt.as_deref());
        own.unwrap_or(&self.spec.negative_prompt)
    }

    /// The prompt of the second text encoder of Stable Diffusion XL, if it is another.
    pub(super) fn second_prompt(self) -> Option<&'a str> {
        let own = self.hires.is_some_and(|hires| hires.prompt.is_some());
        XlOptions::second(&self.spec.xl.prompt_2, self.prompt()).filter(|_| !own)
    }

    /// Its negative prompt, if it is another.
    pub(super) fn second_negative_prompt(self) -> Option<&'a str> {
        let own = self.hires.is_some_and(|hires| hires.negative_prompt.is_some());
        let second = &self.spec.xl.negative_prompt_2;
        XlOptions::second(second, self.negative_prompt()).filter(|_| !own)
    }

    /// Whether there is no negative prompt, not even an empty one.
    pub(super) fn negative_is_absent(self) -> bool {
        self.negative_prompt().is_empty() && !self.spec.xl.encodes_empty
    }

    /// The prompt with its tags.
    pub(super) fn prompt(self) -> &'a str {
        let own = self.hires.and_then(|hires| hires.prompt.as_deref());
        own.unwrap_or(&self.spec.prompt)
    }

    /// The field of the request in which a prompt stands.
    pub fn field(self, field: &'static str) -> &'static str {
        let is_own = self.hires.is_some_and(|hires| match field {
            "prompt" => hires.prompt.is_some(),
            _ => hires.negative_prompt.is_some(),
        });
        let own = HIRES_FIELDS.iter().find(|(base, _)| is_own && *base == field);
        own.map_or(field, |(_, own)| own)
    }

    /// The prompt without its `<lora:...>` tags, and the LoRAs of these.
    pub fn text(self) -> Result<(Cow<'a, str>, Loras)> {
        self.spec.prompt_syntax.text(self.prompt()).map_err(|error| match error {
            Error::Spec { reason, .. } => Error::Spec { field: self.field("prompt"), reason },
            other => other,
        })
    }

    /// The prompts that `AND` joins, and their weights.
    fn parts(self) -> Result<Vec<Part>> {
        let (text, _) = self.text()?;
        Ok(match self.spec.prompt_syntax {
            PromptSyntax::Plain => vec![Part { text: text.into_owned(), weight: 1.0 }],
            PromptSyntax::A1111 => parts(&text),
        })
    }

    /// What the prompt stands for in the pass.
    ///
    /// # Errors
    /// [`Error::Spec`] for too many texts or parts, and weights that are not finite.
    pub(super) fn directions(self) -> Result<Directions> {
        let field = self.field("prompt");
        let refuse = |reason: String| Error::Spec { field, reason };
        let parts = self.parts()?;
        if parts.len() > MAX_PARTS {
            let count = parts.len();
            return Err(refuse(format!(
                "joins {count} prompts by AND; at most {MAX_PARTS} can be"
            )));
        }
        let scheduled = |Part { text, weight }: Part| {
            // Beyond, the weighed outputs are no numbers in f32.
            const MOST: f64 = 1e4;
            if weight.abs() > MOST {
                let reason = format!("weighs a prompt by {weight:e}; at most {MOST} is possible");
                return Err(refuse(reason));
            }
            Ok((self.schedule(field, &text)?, weight))
        };
        let directions = parts.into_iter().map(scheduled).collect::<Result<Directions>>()?;
        // All are encoded before the first evaluation, while other images wait.
        if directions.iter().map(|(schedule, _)| schedule.texts.len()).sum::<usize>() > MAX_TEXTS {
            return Err(too_many_texts(field));
        }
        Ok(directions)
    }

    /// What the negative prompt stands for in the pass.
    ///
    /// # Errors
    /// [`Error::Spec`] for too many texts.
    pub(super) fn negative_directions(self) -> Result<Schedule> {
        self.schedule(self.field("negative_prompt"), self.negative_prompt())
    }

    fn schedule(self, field: &'static str, text: &str) -> Result<Schedule> {
        let schedule = match self.spec.prompt_syntax {
            PromptSyntax::Plain => return Ok(Schedule::plain(text)),
            PromptSyntax::A1111 => Schedule::new(text, self.counted()),
        };
        schedule.map_err(|_| too_many_texts(field))
    }

    /// An estimate of the chunks of tokens whose keys and values the pass needs.
    pub(super) fn chunks(self) -> Chunks {
        let PromptSyntax::A1111 = self.spec.prompt_syntax else {
            let rows = self.rows();
            return self.new_chunks(rows, rows);
        };
        let evaluations = self.counted().evaluations;
        let parts = self.parts().unwrap_or_default();
        // At an evaluation the parts are as long as the longest of them.
        let longest = parts.iter().map(|part| max_chunks(&part.text)).max().unwrap_or(1);
        let longest = longest.max(self.second_prompt().map_or(0, max_chunks));
        let texts: usize = parts.iter().map(|part| most_texts(&part.text, evaluations)).sum();
        let negative = self.is_guided().then(|| self.negative_prompt());
        let of_negative = negative.map_or(0, max_chunks);
        let second = negative.and(self.second_negative_prompt());
        let of_negative = of_negative.max(second.map_or(0, max_chunks));
        let texts_of_negative = negative.map_or(0, |text| most_texts(text, evaluations));
        self.new_chunks(
            texts * longest + texts_of_negative * of_negative,
            parts.len() * longest + of_negative,
        )
    }

    /// The texts of a hires pass are the same as the base pass's unless something makes them others.
    fn new_chunks(self, kept: usize, stacked: usize) -> Chunks {
        let is_as_base = self.hires.is_some_and(|hires| {
            let own = hires.prompt.is_some() || hires.negative_prompt.is_some();
            let own = own || hires.guidance_scale.is_some() || hires.sampler.is_some();
            !own && kept == stacked
        });
        Chunks { kept: if is_as_base { 0 } else { kept }, stacked }
    }

    /// The evaluations that a prompt's numbers count: as in AUTOMATIC1111, all those of the base
    /// pass, even if it skips some, and those that the hires pass takes.
    pub(super) fn counted(self) -> Counted {
        let calls = |pass: Self, steps| steps * pass.sampler().sampler.evaluations_of_a_step();
        let base = Self::base(self.spec);
        let of_base = calls(base, base.steps());
        match self.hires {
            None => Counted { evaluations: of_base, before: None },
            Some(hires) => Counted {
                evaluations: calls(self, hires.steps.saturating_sub(hires.skipped_steps())).max(1),
                before: Some(of_base),
            },
        }
    }
}

fn too_many_texts(field: &'static str) -> Error {
    let reason = format!("stands for more than {MAX_TEXTS} different texts, the most there can be");
    Error::Spec { field, reason }
}

/// Chunks of tokens of a pass.
pub(super) struct Chunks {
    /// Those of all its texts, but for those that the base pass has.
    pub(super) kept: usize,
    /// Those of an evaluation.
    pub(super) stacked: usize,
}

/// Whether parts are more than a prompt of weight 1.
fn is_composed(parts: &[Part]) -> bool {
    parts.len() != 1 || parts.iter().any(|part| part.weight != 1.0)
}
