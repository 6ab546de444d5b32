//! The kinds of models, and of LoRAs, that were distilled to few steps, and how their authors draw
//! with them. They are told by the scheduler that they bring, else by the words of their names.

use crate::sampling::{Sampler, SamplerName, SchedulerConfig, SigmaSchedule};

/// How a distilled model draws.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct FewSteps {
    pub(super) steps: usize,
    pub(super) guidance_scale: f64,
    /// The sampler; none where it is the model's own.
    pub(super) sampler: Option<SamplerName>,
}

impl FewSteps {
    /// Latent consistency (Luo et al. 2023).
    const LCM: Self = Self {
        steps: 4,
        guidance_scale: 1.0,
        sampler: Some(SamplerName { sampler: Sampler::Lcm, schedule: SigmaSchedule::Model }),
    };

    /// The kind of a model of this name, if it is one of these.
    pub(super) fn of_model(
        _name: &str,
        embeds_guidance: bool,
        scheduler: &SchedulerConfig,
    ) -> Option<Self> {
        if embeds_guidance {
            // diffusers' default of LatentConsistencyModelPipeline.
            return Some(Self { guidance_scale: 8.5, ..Self::LCM });
        }
        match scheduler.class_name.as_deref() {
            Some("LCMScheduler") => Some(Self::LCM),
            _ => None,
        }
    }
}
