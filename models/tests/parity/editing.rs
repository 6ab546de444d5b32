//! Prompts with edits, alternations and `AND` against AUTOMATIC1111's own parser, and pictures by them
//! against its choice of the texts and diffusers' UNet and samplers; also its second seed of the
//! sampler's noise.

use sd_models::text::{Counted, Schedule, parts};
use sd_models::{
    Error, Hires, Img2Img, MaskedStart, PromptSyntax, Rgb, SamplerName, SamplerOptions, Size, Spec,
    Upscaler,
};

use crate::hires::finish;
use crate::img2img::{bytes, load, spec};
use crate::{fixture, path, read, relative_error};

const TOLERANCE: f32 = 1e-4;

#[derive(serde::Deserialize)]
struct Expected {
    counts: Vec<(usize, Option<usize>)>,
    edited: Vec<Edited>,
    joined: Vec<Joined>,
}

#[derive(serde::Deserialize)]
struct Edited {
    prompt: String,
    /// By the counts: the last evaluation of each text.
    schedules: Vec<Vec<(usize, String)>>,
}

#[derive(serde::Deserialize)]
struct Joined {
    prompt: String,
    parts: Vec<(String, f64)>,
}

fn expected() -> Expected {
    serde_json::from_slice(&read("editing.json")).unwrap()
}

#[test]
fn texts_are_those_of_the_reference_at_every_evaluation() {
    let Expected { counts, edited, .. } = expected();
    let mut failures = Vec::new();
    for Edited { prompt, schedules } in &edited {
        for (reference, (base, hires)) in schedules.iter().zip(&counts) {
            let evaluations = hires.unwrap_or(*base);
            let counted = Counted { evaluations, before: hires.map(|_| *base) };
            let ours = Schedule::new(prompt, counted).unwrap();
            for evaluation in 0..=evaluations {
                let theirs = reference.iter().find(|(until, _)| evaluation <= *until);
                let (theirs, ours) = (&theirs.unwrap().1, &ours.texts[ours.at(evaluation)]);
                if theirs != ours {
                    failures
                        .push(format!("{prompt:?} {counted:?} {evaluation}: {ours:?} {theirs:?}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(edited.len() >= 100);
}

#[test]
fn joined_prompts_and_weights_are_those_of_the_reference() {
    let joined = expected().joined;
    for Joined { prompt, parts: theirs } in &joined {
        let ours: Vec<_> = parts(prompt).into_iter().map(|part| (part.text, part.weight)).collect();
        assert_eq!(&ours, theirs, "{prompt:?}");
    }
    assert!(joined.len() >= 20);
}

/// A case of the fixture: the sampler, steps, prompt, negative prompt and guidance scale.
fn drawn(case: &str) -> Spec {
    let (sampler, steps, prompt, negative, guidance_scale) = match case {
        "edited" => ("ddim", 6, "a [red:blue:0.5] house", "", 3.0),
        "by step" => ("dpmpp_2m", 6, "a [red:blue:2] house [by the sea::4]", "the sea", 3.0),
        "alternating" => ("ddim", 6, "a [red|blue|green] house", "[moon|]", 3.0),
        "twice a step" => ("heun", 6, "[a red house:the sea:4] at night", "[moon:sun:0.3]", 3.0),
        "joined" => ("ddim", 6, "a red house :1.2 AND the sea :0.7 AND night:-0.3", "moon", 3.0),
        "of two lengths" => {
            let prompt = "a [red:blue:2] house BREAK the sea AND [night:moon BREAK sun:3]:0.5";
            ("euler", 6, prompt, "", 3.0)
        }
        "joined without guidance" => ("ddim", 6, "a red house AND the sea:0.5", "moon", 1.0),
        "joined below" => ("ddim", 6, "a red house AND the sea:0.5", "moon", 0.5),
        "weighed" => ("ddim", 6, "a red house :1.5", "", 3.0),
        "loose" => ("ddim", 6, "a | [red:blue:0.5] house", "", 3.0),
        "image" => ("ddim", 10, "a [red:blue:0.3] house", "", 3.0),
        "delta.euler_a" => ("euler_a", 6, "a red house", "", 3.0),
        "delta.ddim" => ("ddim", 6, "a red house", "", 3.0),
        _ if case.starts_with("hires.") => return drawn("edited"),
        _ => panic!("{case:?} has no spec"),
    };
    let SamplerName { sampler, schedule } = sampler.parse().unwrap();
    Spec {
        prompt: prompt.into(),
        negative_prompt: negative.into(),
        prompt_syntax: PromptSyntax::A1111,
        steps,
        guidance_scale,
        sampler,
        schedule,
        sampler_options: SamplerOptions {
            eta: (case == "delta.ddim").then_some(1.0),
            ..SamplerOptions::default()
        },
        eta_noise_seed_delta: if case.starts_with("delta.") { 31337 } else { 0 },
        ..spec(None)
    }
}

/// The hires pass of a case, which takes 5 steps.
fn hires(case: &str) -> Option<Hires> {
    let same = Hires {
        size: Size::new(96, 80).unwrap(),
        steps: 10,
        strength: 0.5,
        upscaler: Upscaler::default(),
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    };
    match case {
        "hires.same" => Some(same),
        "hires.own" => Some(Hires {
            prompt: Some("the [sea:night:1.4] AND a [red:green:9] moon :0.5".into()),
            negative_prompt: Some("sun".into()),
            guidance_scale: Some(5.0),
            sampler: Some(("euler".parse().unwrap(), SamplerOptions::default())),
            ..same
        }),
        _ => None,
    }
}

#[test]
fn pictures_change_their_prompts_as_in_the_reference_alone_and_in_one_batch() {
    let (model, expected) = (load(path("v1")), fixture("editing.safetensors"));
    let mut cases: Vec<_> = expected.keys().collect();
    cases.sort_unstable();
    assert_eq!(cases.len(), 15);
    let picture = bytes(&fixture("start.safetensors")["picture"]);
    let start = Img2Img {
        picture: Rgb { width: 64, height: 64, data: picture },
        strength: 0.5,
        takes_all_steps: false,
        mask: None,
        masked_start: MaskedStart::Picture,
    };
    let specs = cases.iter().map(|case| Spec {
        hires: hires(case),
        img2img: (*case == "image").then(|| std::sync::Arc::new(start.clone())),
        ..drawn(case)
    });
    let specs: Vec<_> = specs.collect();
    let together = finish(&model, specs.iter().map(|spec| model.begin(spec).unwrap()).collect());
    let mut failures = Vec::new();
    for ((case, spec), latents) in cases.iter().zip(&specs).zip(&together) {
        let error = relative_error(latents, &expected[*case]);
        println!("{case}: {error:.1e}");
        if error.is_nan() || error > TOLERANCE {
            failures.push(format!("{case}: {error:.1e}"));
        }
        let alone = finish(&model, vec![model.begin(spec).unwrap()]);
        assert_eq!(relative_error(&alone[0], latents), 0.0, "{case} alone");
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn rows_are_as_many_as_there_are_prompts() {
    let model = load(path("v1"));
    let of = |prompt: &str, guidance_scale| Spec {
        prompt: prompt.into(),
        prompt_syntax: PromptSyntax::A1111,
        guidance_scale,
        ..spec(None)
    };
    for (prompt, scale, rows) in [
        ("a AND b AND c", 3.0, 4),
        (" a AND b AND a", 3.0, 3),
        ("a AND b", 1.0, 3),
        ("a :0.5", 1.0, 2),
        ("[a|b]", 1.0, 1),
    ] {
        let spec = of(prompt, scale);
        let begun = model.begin(&spec).unwrap();
        assert_eq!((spec.rows(), begun.rows()), (rows, rows), "{prompt}");
        assert_eq!(begun.work_left(), 64 * 64 * rows * 10, "{prompt}");
    }
    let warnings = |prompt| model.begin(&of(prompt, 3.0)).unwrap().warnings().to_vec();
    assert_eq!(warnings("a photo, 16:9").len(), 1);
    assert_eq!(warnings("a:1.0 AND b:2"), [""; 0]);
    let plain = Spec { prompt_syntax: PromptSyntax::Plain, ..of("a AND [b|c] :2", 3.0) };
    assert_eq!((plain.rows(), model.begin(&plain).unwrap().rows()), (2, 2));
}

#[test]
fn prompts_beyond_the_bounds_are_refused_by_name() {
    let model = load(path("v1"));
    let letters = |n: usize| (0..n).map(|k| format!("{k}")).collect::<Vec<_>>();
    let many = format!("a [{}]", letters(65).join("|"));
    let joined = letters(17).join(" AND ");
    let long = Spec { steps: 80, prompt_syntax: PromptSyntax::A1111, ..spec(None) };
    let of = |prompt: &str| Spec { prompt: prompt.into(), ..long.clone() };
    let own = |prompt: &str| Hires {
        prompt: Some(prompt.into()),
        steps: 160,
        ..hires("hires.same").unwrap()
    };
    for (field, spec) in [
        ("prompt", of(&many)),
        ("prompt", of(&joined)),
        ("prompt", of("a :1e9 AND b :20000")),
        ("negative_prompt", Spec { negative_prompt: many.clone(), ..of("a") }),
        ("hires_prompt", Spec { hires: Some(own(&many)), ..of("a") }),
        ("hires_prompt", Spec { hires: Some(own("<lora:x:much>")), ..of("a") }),
    ] {
        let error = model.check(&spec).unwrap_err();
        assert!(matches!(error, Error::Spec { field: found, .. } if found == field), "{error}");
    }
    assert!(model.check(&of(&format!("a [{}]", letters(64).join("|")))).is_ok());
    assert!(model.check(&of(&letters(16).join(" AND "))).is_ok());
}
