//! The sampler of a pass and its schedule, which are two fields. The name of one in the field of the
//! other is refused with the name of the field where it belongs.

use sd_models::{SamplerName, SigmaSchedule};

use super::draw::DrawRequest;
use super::error::ValidationError;

/// A sampler by its name. The error reads on from the field's name.
pub(crate) fn sampler(name: &str, schedule_field: &str) -> Result<SamplerName, String> {
    name.parse().map_err(|unknown| match name.parse::<SigmaSchedule>() {
        Ok(_) => format!("{name:?} is a schedule and no sampler: it belongs in {schedule_field}"),
        Err(_) => unknown,
    })
}

/// A schedule by its name. The error reads on from the field's name.
pub(crate) fn schedule(name: &str, sampler_field: &str) -> Result<SigmaSchedule, String> {
    name.parse().map_err(|unknown| match name.parse::<SamplerName>() {
        Ok(_) => format!("{name:?} is a sampler and no schedule: it belongs in {sampler_field}"),
        Err(_) => unknown,
    })
}

impl DrawRequest {
    /// The sampler and its schedule, by two fields, where they name any. A name that has a schedule
    /// allows no other.
    pub(super) fn sampler_of(
        &self,
        [(sampler_field, of_sampler), (schedule_field, of_schedule)]: [(&str, &Option<String>); 2],
        default: SamplerName,
    ) -> Result<SamplerName, ValidationError> {
        let named = of_sampler.as_ref().map(|name| sampler(name, self.names.of(schedule_field)));
        let named = named.transpose().map_err(|reason| self.range(sampler_field, reason))?;
        let asked =
            of_schedule.as_ref().filter(|name| !name.trim().eq_ignore_ascii_case("automatic"));
        let asked = asked.map(|name| schedule(name, self.names.of(sampler_field))).transpose();
        let asked = asked.map_err(|reason| self.range(schedule_field, reason))?;
        let Some(named) = named else {
            return Ok(SamplerName { schedule: asked.unwrap_or(default.schedule), ..default });
        };
        let schedule = asked.unwrap_or(named.schedule);
        if ![schedule, SigmaSchedule::Model].contains(&named.schedule) {
            let reason = format!("{schedule} is another than that of the sampler {named}");
            return Err(self.range(schedule_field, reason));
        }
        Ok(SamplerName { schedule, ..named })
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields::Fields;
    use super::super::limits::LIMITS;
    use super::*;

    #[test]
    fn a_name_in_the_field_of_the_other_is_refused_with_the_name_of_its_own() {
        let read = |fields: &str| {
            let body = format!(r#"{{"prompt":"a",{fields}}}"#);
            let fields = Fields::json(&body).expect("an object");
            let request = DrawRequest::read(fields, &LIMITS).expect("a request");
            let fields = [("scheduler", &request.scheduler), ("schedule", &request.schedule)];
            let default =
                SamplerName { sampler: sd_models::Sampler::Pndm, schedule: SigmaSchedule::Model };
            request.sampler_of(fields, default).map_err(|error| error.to_string())
        };
        for (fields, message) in [
            (
                r#""scheduler":"karras""#,
                r#"scheduler "karras" is a schedule and no sampler: it belongs in schedule"#,
            ),
            (
                r#""sampler":"SGM Uniform","schedule":"karras""#,
                r#"sampler "SGM Uniform" is a schedule and no sampler: it belongs in schedule"#,
            ),
            (
                r#""sampler":"euler","schedule":"DPM++ 2M Karras""#,
                r#"schedule "DPM++ 2M Karras" is a sampler and no schedule: it belongs in sampler"#,
            ),
            (
                r#""schedule":"euler_a""#,
                r#"schedule "euler_a" is a sampler and no schedule: it belongs in scheduler"#,
            ),
            (r#""scheduler":"ueler""#, r#"scheduler "ueler" is unknown; known are "#),
            (r#""schedule":"kerras""#, r#"schedule "kerras" is unknown; known are "#),
        ] {
            let error = read(fields).expect_err(fields);
            assert!(error.starts_with(message), "{error}");
        }
        // A name of both.
        assert!(read(r#""scheduler":"ddim","schedule":"model""#).is_ok());
        let named = read(r#""scheduler":"euler","schedule":"DDIM""#).expect("a pair");
        assert_eq!(named.schedule, SigmaSchedule::DdimUniform);
    }
}
