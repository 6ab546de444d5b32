//! The names of samplers in requests and files: ours, AUTOMATIC1111's labels and diffusers'
//! classes, with a schedule or without.

use std::fmt;
use std::str::FromStr;

use super::algorithm::{Algorithm, Sampler};
use super::sigmas::SigmaSchedule;
use super::spelling::spelt;
use super::table::ALGORITHMS;

/// A sampler and its schedule under one name: `dpmpp_2m_karras` is `dpmpp_2m` on Karras' sigmas. A
/// name without an ending is the sampler on the model's own sigmas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SamplerName {
    /// The sampler.
    pub sampler: Sampler,
    /// Its schedule.
    pub schedule: SigmaSchedule,
}

/// The keys of diffusers' classes that choose a schedule, and the schedule at `true`.
const SCHEDULE_KEYS: [(&str, SigmaSchedule); 3] = [
    ("use_karras_sigmas", SigmaSchedule::Karras),
    ("use_exponential_sigmas", SigmaSchedule::Exponential),
    ("use_beta_sigmas", SigmaSchedule::Beta),
];

impl SamplerName {
    /// The names of all samplers, separated by commas.
    pub fn list() -> String {
        Sampler::all().map(Sampler::name).collect::<Vec<_>>().join(", ")
    }

    /// AUTOMATIC1111's label, which infotext uses: `DPM++ 2M Karras`.
    pub fn title(self) -> String {
        let title = self.sampler.title();
        match self.schedule {
            SigmaSchedule::Model => title.to_owned(),
            schedule => format!("{title} {}", schedule.title()),
        }
    }

    /// The sampler of one of diffusers' classes, with the values of its keys as text.
    ///
    /// # Errors
    /// A sentence that names the class, or the key whose value no sampler has.
    pub(super) fn of_class(
        class: &str,
        value: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let named = |row: &&Algorithm| row.class.is_some_and(|name| name == class);
        let Some(first) = ALGORITHMS.iter().find(named) else {
            return Err(format!("{class:?} is unknown; known are {}", Self::list()));
        };
        let value_of = |key: &str| {
            let default = first.class_keys.iter().find(|known| known.0 == key);
            value(key).or_else(|| default.map(|known| known.1[0].to_owned())).unwrap_or_default()
        };
        let is_row = |row: &&Algorithm| {
            let mut keys = row.class_keys.iter();
            keys.all(|(key, values)| values.contains(&value_of(key).as_str()))
        };
        let row = ALGORITHMS.iter().filter(named).find(is_row).ok_or_else(|| {
            let keys = first.class_keys.iter().map(|(key, _)| format!("{key} {:?}", value_of(key)));
            let keys: Vec<_> = keys.collect();
            format!("{class} with {} is not supported", keys.join(" and "))
        })?;
        let asked = |(key, _): &&(&str, _)| value(key).is_some_and(|value| value == "true");
        let schedule = SCHEDULE_KEYS.iter().find(asked).map(|(_, schedule)| *schedule);
        let schedule = schedule.filter(|schedule| row.sampler.runs_on(*schedule));
        Ok(Self { sampler: row.sampler, schedule: schedule.unwrap_or(SigmaSchedule::Model) })
    }

    /// A class with its keys: `DPMSolverMultistepScheduler(use_karras_sigmas=True)`.
    fn of_call(text: &str) -> Option<Result<Self, String>> {
        let (class, keys) = text.trim().strip_suffix(')')?.split_once('(')?;
        let pair = |pair: &str| {
            let (key, value) = pair.split_once('=')?;
            let value = value.trim().trim_matches(['"', '\'']);
            let value = match value {
                "True" | "False" => value.to_lowercase(),
                _ => value.to_owned(),
            };
            Some((key.trim().to_owned(), value))
        };
        let keys: Option<Vec<_>> =
            keys.split(',').filter(|key| !key.trim().is_empty()).map(pair).collect();
        let keys = keys?;
        let known = ["algorithm_type", "solver_order", "solver_type"];
        let is_known = |key: &str| {
            known.contains(&key) || SCHEDULE_KEYS.iter().any(|(schedule, _)| *schedule == key)
        };
        if let Some((key, _)) = keys.iter().find(|(key, _)| !is_known(key)) {
            return Some(Err(format!("{text:?} has the key {key:?}, which is not supported here")));
        }
        let value =
            |name: &str| keys.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        Some(Self::of_class(class.trim(), value))
    }
}

impl fmt::Display for SamplerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.schedule {
            SigmaSchedule::Model => write!(f, "{}", self.sampler),
            schedule => write!(f, "{}_{schedule}", self.sampler),
        }
    }
}

impl FromStr for SamplerName {
    type Err = String;

    /// The name in requests, AUTOMATIC1111's label or alias, with a schedule or without, or
    /// diffusers' class, with its keys in brackets or without; in any case.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(named) = Self::of_call(text) {
            return named;
        }
        let text_spelt = spelt(text);
        let of = |row: &Algorithm, known: &str| {
            let rest = text_spelt.strip_prefix(&spelt(known))?;
            let schedule = match rest.strip_prefix(' ') {
                None if rest.is_empty() => SigmaSchedule::Model,
                None => return None,
                // AUTOMATIC1111's short form: `k_dpmpp_2m_ka`.
                Some("ka") => SigmaSchedule::Karras,
                Some(schedule) => schedule.parse().ok()?,
            };
            Some(Self { sampler: row.sampler, schedule })
        };
        let named = |row: &Algorithm| {
            let names = [row.name, row.title].into_iter().chain(row.class);
            names.chain(row.aliases.iter().copied()).find_map(|known| of(row, known))
        };
        ALGORITHMS
            .iter()
            .find_map(named)
            .ok_or_else(|| format!("{text:?} is unknown; known are {}", Self::list()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_sampler_finds_it() {
        for sampler in Sampler::all() {
            let plain = SamplerName { sampler, schedule: SigmaSchedule::Model };
            for name in [sampler.name(), sampler.title()].iter().chain(sampler.aliases()) {
                assert_eq!(name.parse(), Ok(plain), "{name}");
            }
            for schedule in sampler.schedules() {
                let named = SamplerName { sampler, schedule };
                assert_eq!(named.to_string().parse(), Ok(named));
                assert_eq!(named.title().to_uppercase().parse(), Ok(named));
            }
        }
        let on = |sampler, schedule| SamplerName { sampler, schedule };
        let table = [
            ("dpmpp_2m_karras", on(Sampler::Dpmpp2m, SigmaSchedule::Karras)),
            (" DPM++  2M SDE Karras", on(Sampler::Dpmpp2mSde, SigmaSchedule::Karras)),
            ("k_dpmpp_2m_ka", on(Sampler::Dpmpp2m, SigmaSchedule::Karras)),
            ("K_DPM_2_ANCESTRAL", on(Sampler::Dpm2Ancestral, SigmaSchedule::Model)),
            ("Euler SGMUniform", on(Sampler::Euler, SigmaSchedule::SgmUniform)),
            // A pair that is refused, but not as unknown.
            ("ddim_karras", on(Sampler::Ddim, SigmaSchedule::Karras)),
            ("DPM++ 2M SDE Heun Karras", on(Sampler::Dpmpp2mSdeHeun, SigmaSchedule::Karras)),
            ("DDIM CFG++", on(Sampler::DdimCfgPp, SigmaSchedule::Model)),
            ("LMSDiscreteScheduler", on(Sampler::Lms, SigmaSchedule::Model)),
            (
                "DPMSolverMultistepScheduler(use_karras_sigmas=True, \
                 algorithm_type=\"sde-dpmsolver++\", solver_order=3)",
                on(Sampler::Dpmpp3mSde, SigmaSchedule::Karras),
            ),
            (
                "UniPCMultistepScheduler(solver_type='bh1')",
                on(Sampler::UniPcBh1, SigmaSchedule::Model),
            ),
        ];
        for (name, expected) in table {
            assert_eq!(name.parse(), Ok(expected), "{name}");
        }
        assert_eq!(table[0].1.title(), "DPM++ 2M Karras");
        for (name, part) in [
            ("dpm_fast", "euler_a"),
            ("DPM++ 2M SDE Midpoint", "is unknown"),
            ("", "is unknown"),
            ("DEISMultistepScheduler(solver_p=1)", "solver_p"),
            ("UniPCMultistepScheduler(solver_order=3, solver_type=bh1)", "solver_order \"3\""),
        ] {
            let error = name.parse::<SamplerName>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
