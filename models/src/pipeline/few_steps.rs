//! The kinds of models, and of LoRAs, that were distilled to few steps, and how their authors draw
//! with them. They are told by the scheduler that they bring, else by the words of their names.

use crate::networks::UNetConfig;
use crate::sampling::{SamplerName, SchedulerConfig};

/// How a distilled model draws.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FewSteps {
    /// What it is called.
    pub(super) title: &'static str,
    pub(super) steps: usize,
    pub(super) guidance_scale: f64,
    /// The sampler; none where it is the model's own.
    pub(super) sampler: Option<SamplerName>,
    /// What the sampler draws anew at each step; none where it is the sampler's own default.
    pub(super) eta: Option<f64>,
    /// Side in pixels of the images that it was distilled on, where those of its family are others.
    pub(super) side: Option<usize>,
}

/// A kind, and what its authors draw with.
struct Kind {
    title: &'static str,
    /// The words of its name, one after the other.
    words: &'static [&'static str],
    /// Whether the word is a usual one too: it tells the kind only beside a number of steps.
    is_usual: bool,
    /// Steps, unless the name has them.
    steps: usize,
    /// Sampler and schedule, as a request names them.
    sampler: &'static str,
    /// Side of its images, where it is not that of the family.
    side: Option<usize>,
}

/// The guidance scale of a LoRA that keeps guidance.
const WITH_GUIDANCE: f64 = 7.5;
/// The guidance scale of diffusers' `LatentConsistencyModelPipeline`.
const EMBEDDED_GUIDANCE: f64 = 8.5;
/// Width of the prompts' embeddings in the models that SD-Turbo was distilled from.
const SD_2_WIDTH: usize = 1024;
/// Greater numbers of steps in a name are those of its training.
const MOST_STEPS: usize = 32;

const HYPER_SD: &str = "Hyper-SD";
/// Luo et al. 2023.
const LCM: Kind = kind("LCM", &["lcm"], "lcm");
/// Zheng et al. 2024, "Trajectory Consistency Distillation".
const TCD: Kind = kind("TCD", &["tcd"], "tcd");
/// Sauer et al. 2023; the published model is drawn in one step.
const SD_TURBO: Kind = Kind { steps: 1, ..kind("SD-Turbo", &["sd", "turbo"], "euler_sgm_uniform") };

/// The same of Stable Diffusion XL, on images of 512 pixels a side.
const SDXL_TURBO: Kind = Kind {
    steps: 1,
    side: Some(512),
    ..kind("SDXL-Turbo", &["sdxl", "turbo"], "euler_a_sgm_uniform")
};

/// The kinds that names tell, the longer names first.
const KINDS: [Kind; 9] = [
    LCM,
    TCD,
    // Ren et al. 2024.
    kind(HYPER_SD, &["hyper", "sd"], "ddim_sgm_uniform"),
    kind(HYPER_SD, &["hypersd"], "ddim_sgm_uniform"),
    SD_TURBO,
    SDXL_TURBO,
    Kind { words: &["sd", "xl", "turbo"], ..SDXL_TURBO },
    // Lin et al. 2024, "SDXL-Lightning".
    Kind { is_usual: true, ..kind("Lightning", &["lightning"], "euler_sgm_uniform") },
    Kind { is_usual: true, ..kind("Turbo", &["turbo"], "euler_sgm_uniform") },
];

/// A kind of four steps, whose words are no usual ones.
const fn kind(title: &'static str, words: &'static [&'static str], sampler: &'static str) -> Kind {
    Kind { title, words, is_usual: false, steps: 4, sampler, side: None }
}

impl FewSteps {
    /// The kind of a model with this UNet and scheduler, if they tell one.
    pub(super) fn of_model(unet: &UNetConfig, scheduler: &SchedulerConfig) -> Option<Self> {
        if unet.time_cond_proj_dim.is_some() {
            return Some(Self { guidance_scale: EMBEDDED_GUIDANCE, ..Self::of(&LCM, LCM.steps) });
        }
        let is_turbo = scheduler.timestep_spacing.as_deref() == Some("trailing")
            && scheduler.prediction_type.as_deref().is_none_or(|value| value == "epsilon");
        match scheduler.class_name.as_deref().unwrap_or_default() {
            "LCMScheduler" => Some(Self::of(&LCM, LCM.steps)),
            "TCDScheduler" => Some(Self::of(&TCD, TCD.steps)),
            // The only published models of this width whose scheduler is so; those of zero terminal
            // SNR, which is the other reason for this spacing, predict the velocity.
            "EulerDiscreteScheduler" if is_turbo && unet.cross_attention_dim == SD_2_WIDTH => {
                Some(Self { sampler: None, ..Self::of(&SD_TURBO, SD_TURBO.steps) })
            }
            "EulerAncestralDiscreteScheduler" if is_turbo && unet.added.is_some() => {
                Some(Self { sampler: None, ..Self::of(&SDXL_TURBO, SDXL_TURBO.steps) })
            }
            _ => None,
        }
    }

    /// The kind of a model or LoRA of this name, if the name tells one. Of an id on the hub, the
    /// owner is no part of it.
    pub(super) fn named(name: &str) -> Option<Self> {
        let words = words(name.rsplit('/').next().unwrap_or(name));
        let steps = words.windows(2).find_map(|pair| {
            let is_count = ["step", "steps"].contains(&pair[1].as_str());
            let count = pair[0].parse().ok().filter(|n| (1..=MOST_STEPS).contains(n));
            count.filter(|_| is_count)
        });
        let has = |kind: &&Kind| {
            words.windows(kind.words.len()).any(|part| part == kind.words)
                && (!kind.is_usual || steps.is_some())
        };
        let kind = KINDS.iter().find(has)?;
        let mut few = Self::of(kind, steps.unwrap_or(kind.steps));
        if kind.title == HYPER_SD && few.steps == 1 {
            // What its authors draw the one-step model with, in several steps too.
            (few.sampler, few.eta) = (TCD.sampler.parse().ok(), Some(1.0));
        }
        if words.iter().any(|word| word == "cfg") {
            few.guidance_scale = WITH_GUIDANCE;
        }
        Some(few)
    }

    fn of(kind: &Kind, steps: usize) -> Self {
        let Kind { title, sampler, side, .. } = *kind;
        Self { title, steps, guidance_scale: 1.0, sampler: sampler.parse().ok(), eta: None, side }
    }
}

/// The words of a name in lower case: "HyperSD15-8steps" is hyper, sd, 15, 8, steps.
fn words(name: &str) -> Vec<String> {
    let letters: Vec<char> = name.chars().collect();
    let mut words = vec![String::new()];
    for (i, &letter) in letters.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| letters[i]);
        let after_is_small = letters.get(i + 1).is_some_and(|next| next.is_lowercase());
        let begins = before.is_some_and(|before| {
            before.is_ascii_digit() != letter.is_ascii_digit()
                || letter.is_uppercase() && (before.is_lowercase() || after_is_small)
        });
        if begins || !letter.is_alphanumeric() {
            words.push(String::new());
        }
        if letter.is_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.extend(letter.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Source;

    #[test]
    fn names_of_published_files_tell_the_kind() {
        let table = [
            ("LCM_Dreamshaper_v7", Some(("LCM", 4, 1.0))),
            ("dreamshaper_8LCM", Some(("LCM", 4, 1.0))),
            ("photonLCM_v10", Some(("LCM", 4, 1.0))),
            ("SimianLuo/LCM_Dreamshaper_v7", Some(("LCM", 4, 1.0))),
            ("lcm-lora-sdv1-5", Some(("LCM", 4, 1.0))),
            ("TCD-SD15-LoRA", Some(("TCD", 4, 1.0))),
            ("Hyper-SD15-8steps-lora", Some(("Hyper-SD", 8, 1.0))),
            ("Hyper-SD15-12steps-CFG-lora", Some(("Hyper-SD", 12, 7.5))),
            ("HyperSD15_1step", Some(("Hyper-SD", 1, 1.0))),
            ("sd_turbo", Some(("SD-Turbo", 1, 1.0))),
            ("stabilityai/sdxl-turbo", Some(("SDXL-Turbo", 1, 1.0))),
            ("sd_xl_turbo_1.0_fp16", Some(("SDXL-Turbo", 1, 1.0))),
            ("sdxl_lightning_8step", Some(("Lightning", 8, 1.0))),
            ("dreamshaperXL_v21TurboDPMSDE", None),
            ("sd15_lightning_4step_lora", Some(("Lightning", 4, 1.0))),
            ("v1-5-pruned-emaonly", None),
            ("lcm-labs/lightning-art", None),
            ("dreamshaper_turbo", None),
            ("film_calcmatte", None),
            ("hyperrealism_v3", None),
        ];
        for (name, expected) in table {
            let found = FewSteps::named(name).map(|few| (few.title, few.steps, few.guidance_scale));
            assert_eq!(found, expected, "{name}");
        }
        for drawn in ["lightning_bolts", "porsche_911_turbo", "turbo_style_2000-steps"] {
            assert_eq!(FewSteps::named(drawn), None, "{drawn}");
        }
    }

    #[test]
    fn every_kind_has_a_sampler_that_runs_on_its_schedule() {
        for Kind { sampler, .. } in KINDS {
            let SamplerName { sampler, schedule } = sampler.parse().expect(sampler);
            assert!(sampler.check(schedule).is_ok());
        }
    }

    #[test]
    fn the_hyper_sd_of_one_step_is_drawn_by_tcd() {
        let drawn = |name| {
            let few = FewSteps::named(name).expect("a kind");
            (few.sampler.expect("a sampler").to_string(), few.eta)
        };
        assert_eq!(drawn("Hyper-SD15-1step-lora"), ("tcd".into(), Some(1.0)));
        assert_eq!(drawn("Hyper-SD15-2steps-lora"), ("ddim_sgm_uniform".into(), None));
    }

    #[test]
    fn a_scheduler_tells_the_kind() {
        let kind = |json: &str, embeds: Option<usize>, width| {
            let scheduler = SchedulerConfig::from_json(json).expect("a scheduler");
            let mut unet = UNetConfig::read(&Source::Demo).expect("a configuration");
            (unet.time_cond_proj_dim, unet.cross_attention_dim) = (embeds, width);
            FewSteps::of_model(&unet, &scheduler)
                .map(|few| (few.title, few.steps, few.guidance_scale))
        };
        let spaced = |class: &str, more: &str| {
            format!(r#"{{"_class_name":"{class}","timestep_spacing":"trailing"{more}}}"#)
        };
        let velocity = r#","prediction_type":"v_prediction""#;
        let (euler, turbo) = ("EulerDiscreteScheduler", Some(("SD-Turbo", 1, 1.0)));
        let table = [
            (r#"{"_class_name":"LCMScheduler"}"#.to_owned(), 768, Some(("LCM", 4, 1.0))),
            (spaced(euler, ""), 1024, turbo),
            (spaced(euler, ""), 768, None),
            (spaced("EulerAncestralDiscreteScheduler", ""), 1024, None),
            (spaced(euler, velocity), 1024, None),
            (r#"{"_class_name":"DDIMScheduler"}"#.to_owned(), 1024, None),
        ];
        for (json, width, expected) in table {
            assert_eq!(kind(&json, None, width), expected, "{json}");
            assert_eq!(kind(&json, Some(256), width), Some(("LCM", 4, 8.5)), "{json}");
        }
    }
}
