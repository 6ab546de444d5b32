//! What an image needs at the steps of a pass, and what of it a refiner takes over.

use std::sync::Arc;

use candle_core::Tensor;

use super::control::{self, ActiveControl, ControlNets};
use super::drawing_model::DrawingModel;
use super::ip_adapter::{ActiveImages, IpAdapters};
use super::pass::Pass;
use super::prompts::Encoding;
use super::refiner::LoadedRefiner;
use super::refiner_spec::Refiner;
use super::rows::Rows;
use super::spec::PromptSyntax;
use super::xl::SizesOf;
use crate::error::{Error, Result};
use crate::layers::LoraStack;
use crate::sampling::{Run, SamplerName, SamplerState, Span};

/// What an image needs at the steps of a pass.
pub(super) struct PassRun {
    /// The refiner, if it is the model that predicts.
    pub(super) model: Option<Arc<DrawingModel>>,
    pub(super) sampler: SamplerState,
    /// Time embeddings of the sampler's timesteps (evaluations, time_width).
    pub(super) time_embeddings: Tensor,
    pub(super) rows: Rows,
    pub(super) loras: LoraStack,
    pub(super) controls: Vec<ActiveControl>,
    /// The pictures of IP-Adapters that its rows see.
    pub(super) images: ActiveImages,
    /// What a refiner takes over where the sampler ends.
    pub(super) refiner: Option<Box<TakeOver>>,
}

/// What a refiner takes over.
pub(super) struct TakeOver {
    pub(super) run: PassRun,
    /// Whether the sampler of the model before goes on, with the refiner's outputs.
    pub(super) goes_on: bool,
    /// Evaluations of the refiner.
    evaluations: usize,
}

impl PassRun {
    /// Evaluations of the whole run, of both models.
    pub(super) fn evaluations(&self) -> usize {
        let of_refiner = self.refiner.as_ref().map_or(0, |refiner| refiner.evaluations);
        self.sampler.evaluations() + of_refiner
    }

    /// The calls of rows that are left after so many evaluations of the sampler, those of ControlNets
    /// in the same unit.
    pub(super) fn row_calls(&self, done: usize) -> usize {
        self.rows.len() * (self.evaluations() - done)
            + control::row_calls(&self.controls, done..self.sampler.evaluations(), &self.rows)
    }
}

/// What an image names for its passes.
#[derive(Clone, Copy)]
pub(super) struct Named<'a> {
    pub(super) nets: &'a ControlNets,
    pub(super) adapters: &'a IpAdapters,
    pub(super) refiner: Option<&'a LoadedRefiner>,
}

impl DrawingModel {
    /// What an image needs in a pass; adds to the warnings.
    pub(super) fn run(
        &self,
        pass: Pass<'_>,
        (loras, named): (&LoraStack, Named<'_>),
        warnings: &mut Vec<String>,
    ) -> Result<PassRun> {
        let whole = self.sampler(pass, pass.span())?;
        if whole.evaluations() == 0 {
            return Err(no_step(pass.span()));
        }
        let Some((refiner, asked)) = named.refiner.zip(pass.refiner()) else {
            return self.controlled_run(pass, (loras, named, whole), warnings);
        };
        let own = self.before_refiner(pass, asked, &whole)?;
        if own.evaluations() == whole.evaluations() {
            let Refiner { name, switch_at, .. } = asked;
            warnings.push(format!(
                "refiner {name:?} has no effect: no step is after refiner_switch_at {switch_at}"
            ));
            return self.controlled_run(pass, (loras, named, whole), warnings);
        }
        let of_refiner = refiner.run(pass, (&own, &whole), warnings)?;
        for (field, is_idle) in [
            ("loras have", loras.key().len() > of_refiner.run.loras.key().len()),
            ("controlnets have", !pass.spec.controls.is_empty()),
            ("ip_adapter has", !pass.spec.ip_adapters.is_empty()),
        ] {
            if is_idle {
                warnings.push(format!("{field} no effect on the refiner {:?}", asked.name));
            }
        }
        if own.evaluations() == 0 {
            return Ok(of_refiner.run);
        }
        let run = self.controlled_run(pass, (loras, named, own), warnings)?;
        Ok(PassRun { refiner: Some(Box::new(of_refiner)), ..run })
    }

    /// The sampler of a pass as far as a refiner takes over from it.
    fn before_refiner(
        &self,
        pass: Pass<'_>,
        refiner: &Refiner,
        whole: &SamplerState,
    ) -> Result<SamplerState> {
        let share = refiner.switch_at;
        if goes_on(pass) {
            let mut own = whole.clone();
            own.pause_at(share, (&self.model.scheduler, pass.sampler().sampler))?;
            return Ok(own);
        }
        let span = pass.span();
        let end = span.end.map_or(share, |end| end.min(share));
        self.sampler(pass, Span { end: Some(end), ..span })
    }

    /// The run of a sampler in a pass, with ControlNets and IP-Adapters.
    fn controlled_run(
        &self,
        pass: Pass<'_>,
        (loras, named, sampler): (&LoraStack, Named<'_>, SamplerState),
        warnings: &mut Vec<String>,
    ) -> Result<PassRun> {
        let run = self.plain_run(pass, (loras, sampler), warnings)?;
        let stages = pass.sampler().sampler.evaluations_of_a_step();
        let (controls, sampler) = (&pass.spec.controls, (&run.sampler, stages));
        let controls =
            ActiveControl::begin(named.nets, controls, pass.is_hires(), sampler, warnings)?;
        let adapters = (named.adapters, &*self.model.ip_adapters);
        let images = ActiveImages::begin(adapters, pass, &run.sampler, warnings)?;
        Ok(PassRun { controls, images, ..run })
    }

    /// The same without any.
    fn plain_run(
        &self,
        pass: Pass<'_>,
        (loras, sampler): (&LoraStack, SamplerState),
        warnings: &mut Vec<String>,
    ) -> Result<PassRun> {
        let mut found = Vec::new();
        let rows = self.rows(pass, loras, &mut found)?;
        found.retain(|warning| !warnings.contains(warning));
        warnings.extend(found);
        Ok(PassRun {
            model: None,
            time_embeddings: self.time_embeddings(&sampler, pass, loras)?,
            sampler,
            rows,
            loras: loras.clone(),
            controls: Vec::new(),
            images: ActiveImages::default(),
            refiner: None,
        })
    }

    /// The batch rows of a pass; adds to the warnings.
    fn rows<'a>(
        &'a self,
        pass: Pass<'a>,
        loras: &'a LoraStack,
        warnings: &mut Vec<String>,
    ) -> Result<Rows> {
        let spec = pass.spec;
        let is_xl = self.model.info.is_xl;
        let (has_second, is_scored) = (self.model.texts.second.is_some(), self.model.is_scored);
        let encoding = |skip, second: Option<&'a str>, of: SizesOf| Encoding {
            cache: &self.prompts,
            model: &self.model,
            syntax: spec.prompt_syntax,
            second: second.filter(|_| has_second),
            skip,
            sizes: spec.xl.sizes(pass.size(), is_scored, of),
            loras,
            warnings: Vec::new(),
            has_truncated: false,
            second_warnings: Vec::new(),
        };
        // AUTOMATIC1111 always takes the last layer but one of Stable Diffusion XL's encoders.
        let skips = !(is_xl && spec.prompt_syntax == PromptSyntax::A1111);
        if spec.clip_skip > 0 && !skips {
            let why = "has no effect on Stable Diffusion XL, as in AUTOMATIC1111";
            warnings.push(format!("clip_skip {why}"));
        }
        let skip = |layers| if skips { layers } else { 0 };
        let mut warn = |field: &'static str, encoding: Encoding<'_>| {
            let own = encoding.warnings.into_iter();
            warnings.extend(own.map(|warning| format!("{} {warning}", pass.field(field))));
            // Of several texts the first.
            let second = encoding.second_warnings.into_iter().next();
            warnings.extend(second.map(|warning| format!("{field}_2 {warning}")));
        };
        let mut prompt = encoding(skip(spec.clip_skip), pass.second_prompt(), SizesOf::Prompt);
        let directions = pass.directions()?;
        if let [(_, weight)] = &directions[..]
            && *weight != 1.0
        {
            // "a photo, 16:9"
            prompt.warnings.push(format!(
                "is weighed by {weight}: its guidance is multiplied by that, as in AUTOMATIC1111"
            ));
        }
        let conditional = prompt.rows(&directions)?;
        warn("prompt", prompt);
        // AUTOMATIC1111 does not ask the model.
        let takes_zeros =
            self.model.zeros_for_absent || is_xl && spec.prompt_syntax == PromptSyntax::A1111;
        let zeros = takes_zeros && pass.negative_is_absent();
        let unconditional = match pass.is_guided() {
            true => {
                let second = pass.second_negative_prompt();
                let skipped = skip(spec.negative_clip_skip());
                let mut negative = encoding(skipped, second, SizesOf::Negative);
                let row = match zeros {
                    true => negative.zeros()?,
                    false => negative.row(&pass.negative_directions()?)?,
                };
                warn("negative_prompt", negative);
                if zeros && second.is_some() {
                    let why = "without a negative_prompt the model takes zeros for both";
                    warnings.push(format!("negative_prompt_2 has no effect: {why}"));
                }
                Some(row)
            }
            false => {
                warnings.extend(without_guidance(pass, has_second));
                None
            }
        };
        let (guidance_scale, guidance_rescale) = (pass.scale_of_rows(), spec.guidance_rescale);
        Ok(Rows { unconditional, conditional, guidance_scale, guidance_rescale })
    }

    /// The sampler of a pass in a part of the timesteps.
    fn sampler(&self, pass: Pass<'_>, span: Span) -> Result<SamplerState> {
        let SamplerName { sampler, schedule } = pass.sampler();
        let (steps, skipped) = (pass.steps(), pass.skipped_steps());
        let (options, share) = (pass.sampler_options(), pass.share_of_levels());
        let is_xl = self.model.info.is_xl;
        let run = Run { sampler, schedule, options, steps, skipped, share, is_xl, span };
        SamplerState::new(&self.model.scheduler, run)
    }

    /// The time embeddings of a sampler's timesteps (evaluations, time_width).
    fn time_embeddings(
        &self,
        sampler: &SamplerState,
        pass: Pass<'_>,
        loras: &LoraStack,
    ) -> Result<Tensor> {
        let timesteps: Vec<_> = sampler.timesteps().collect();
        let loras = vec![loras.clone(); timesteps.len()];
        self.model.unet.guided_time_embeddings(&timesteps, pass.guidance_scale(), &loras)
    }
}

impl LoadedRefiner {
    /// What a refiner takes over in a pass, of whose run the first model takes its own part.
    fn run(
        &self,
        pass: Pass<'_>,
        (own, whole): (&SamplerState, &SamplerState),
        warnings: &mut Vec<String>,
    ) -> Result<TakeOver> {
        self.model.model.info.check(pass.spec).map_err(|error| self.refused(error))?;
        let (span, goes_on) = (pass.span(), goes_on(pass));
        let begins = own.evaluations() == 0;
        let start = pass.refiner().map(|refiner| refiner.switch_at);
        let span = if goes_on || begins { span } else { Span { start, ..span } };
        let sampler = self.model.sampler(pass, span).map_err(|error| self.refused(error))?;
        let (sampler, evaluations) = match goes_on {
            true => (own.resumed(&sampler), whole.evaluations() - own.evaluations()),
            false => (sampler.clone(), sampler.evaluations()),
        };
        let run = self.model.plain_run(pass, (&self.loras, sampler), warnings)?;
        let run = PassRun { model: Some(Arc::clone(&self.model)), ..run };
        Ok(TakeOver { run, goes_on, evaluations })
    }

    /// The error of what the refiner does not take.
    fn refused(&self, error: Error) -> Error {
        let reason = match error {
            Error::Spec { field, reason } => format!("{field} {reason}"),
            error @ Error::Config { .. } => error.to_string(),
            other => return other,
        };
        let reason = format!("{:?}: {reason}", self.model.model.info.name);
        Error::Spec { field: "refiner", reason }
    }
}

/// The error of a part of the noise levels in which there is no step.
fn no_step(span: Span) -> Error {
    let (field, reason) = match (span.start, span.end) {
        (_, Some(end)) => {
            ("denoising_end", format!("of {end} is before the first step of the image"))
        }
        (start, None) => {
            let start = start.unwrap_or_default();
            ("denoising_start", format!("of {start} is after the last step"))
        }
    };
    Error::Spec { field, reason }
}

/// Whether the sampler of a pass goes on where a refiner takes over, as in AUTOMATIC1111: diffusers
/// has another.
fn goes_on(pass: Pass<'_>) -> bool {
    pass.spec.prompt_syntax == PromptSyntax::A1111
}

/// Warnings for what has no effect in a pass without an unconditional row.
fn without_guidance(pass: Pass<'_>, has_second: bool) -> impl Iterator<Item = String> {
    let idle = [
        (pass.field("negative_prompt"), !pass.negative_prompt().trim().is_empty()),
        ("negative_prompt_2", has_second && pass.second_negative_prompt().is_some()),
        ("guidance_rescale", pass.spec.guidance_rescale > 0.0),
    ];
    let why = match pass.spec.embeds_guidance {
        true => "the model takes the guidance scale as an input",
        false => "there is no guidance at a guidance scale of 1 or less",
    };
    idle.into_iter()
        .filter(|(_, is_set)| *is_set)
        .map(move |(field, _)| format!("{field} has no effect: {why}"))
}
