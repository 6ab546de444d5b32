//! The fields of a sampler and of its schedule in AUTOMATIC1111's API.

use sd_models::{ModelInfo, Sampler, SigmaSchedule};

use crate::request::{DrawRequest, ValidationError, sampler, schedule};

/// The names of a sampler and of its schedule.
pub(crate) struct SamplerFields {
    /// Without one, the model's own.
    pub(crate) sampler: Option<String>,
    /// Without one, or with "Automatic", the one that the sampler prefers.
    pub(crate) scheduler: Option<String>,
}

impl SamplerFields {
    /// Our names of the sampler and its schedule.
    ///
    /// # Errors
    /// If a name is unknown, by the client's name of its field.
    pub(crate) fn names(
        &self,
        [sampler_field, scheduler_field]: [&str; 2],
    ) -> Result<(Option<String>, Option<String>), ValidationError> {
        let asked = self.scheduler.as_ref().filter(|name| !is_automatic(name));
        let asked = asked.map(|name| schedule(name, sampler_field)).transpose();
        let asked = asked.map_err(|reason| ValidationError::range(scheduler_field, reason))?;
        let Some(name) = self.sampler.as_ref().filter(|name| !is_automatic(name)) else {
            return Ok((None, asked.map(|schedule| schedule.to_string())));
        };
        let named = sampler(name, scheduler_field);
        let named = named.map_err(|reason| ValidationError::range(sampler_field, reason))?;
        let schedule = match (asked, named.schedule) {
            (Some(asked), _) => asked,
            (None, SigmaSchedule::Model) => named.sampler.automatic_schedule(),
            (None, named) => named,
        };
        Ok((Some(named.to_string()), Some(schedule.to_string())))
    }
}

/// Takes Euler where a request names a schedule and no sampler, and the model's own is not on it: in
/// AUTOMATIC1111 Euler is the default.
pub(crate) fn take_euler(draw: &mut DrawRequest, model: &ModelInfo) {
    let own = model.defaults.sampler;
    let (None, Some(schedule)) = (&draw.scheduler, &draw.schedule) else { return };
    if schedule.parse().is_ok_and(|schedule| own.check(schedule).is_err()) {
        let field = draw.names.of("schedule");
        let warning = format!(
            "{field} {schedule} is none of the model's sampler {own}: euler was taken, the default of \
             AUTOMATIC1111"
        );
        draw.warnings.push(warning);
        draw.scheduler = Some(Sampler::Euler.to_string());
    }
}

/// Whether a name leaves the choice to the server.
fn is_automatic(name: &str) -> bool {
    let name = name.trim();
    ["", "none", "automatic"].iter().any(|automatic| name.eq_ignore_ascii_case(automatic))
}
