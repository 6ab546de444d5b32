//! The fields of a sampler and of its schedule in AUTOMATIC1111's API.

use sd_models::{SamplerName, SigmaSchedule};

use crate::request::ValidationError;

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
        [sampler, scheduler]: [&str; 2],
    ) -> Result<(Option<String>, Option<String>), ValidationError> {
        let asked = self.scheduler.as_ref().filter(|name| !is_automatic(name));
        let asked = asked.map(|name| name.parse::<SigmaSchedule>()).transpose();
        let asked = asked.map_err(|reason| ValidationError::range(scheduler, reason))?;
        let Some(name) = self.sampler.as_ref().filter(|name| !is_automatic(name)) else {
            return Ok((None, asked.map(|schedule| schedule.to_string())));
        };
        let unknown = |reason: String| ValidationError::range(sampler, reason);
        let named: SamplerName = name.parse().map_err(unknown)?;
        let schedule = match (asked, named.schedule) {
            (Some(asked), _) => asked,
            (None, SigmaSchedule::Model) => named.sampler.automatic_schedule(),
            (None, named) => named,
        };
        Ok((Some(named.to_string()), Some(schedule.to_string())))
    }
}

/// Whether a name leaves the choice to the server.
fn is_automatic(name: &str) -> bool {
    let name = name.trim();
    ["", "none", "automatic"].iter().any(|automatic| name.eq_ignore_ascii_case(automatic))
}
