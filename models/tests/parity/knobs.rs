//! Clip skip, guidance rescale and variations against diffusers' pipeline; the mixture of two
//! noises against AUTOMATIC1111's formula.

use candle_core::{DType, Device};
use sd_models::networks::{ClipTextConfig, ClipTextModel};
use sd_models::{Error, LoraStack, PromptSyntax, Source, Spec, Variation};

use crate::img2img::{finish, load, spec};
use crate::{fixture, path, relative_error};

const TOLERANCE: f32 = 1e-4;

fn asked(case: &str) -> Spec {
    let mut spec = Spec { steps: 5, negative_prompt: "the sea".into(), ..spec(None) };
    let (kind, value) = case.split_once('.').unwrap_or((case, ""));
    match kind {
        "clip_skip" => spec.clip_skip = value.parse().unwrap(),
        "rescale" => spec.guidance_rescale = value.parse().unwrap(),
        "variation" => {
            spec.variation = Some(Variation { seed: 5, strength: value.parse().unwrap() });
        }
        _ => {}
    }
    spec
}

#[test]
fn layers_are_skipped_as_by_diffusers() {
    let expected = fixture("knobs.safetensors");
    let mut compared = 0;
    for name in ["v1", "v2"] {
        let source = Source::Directory(path(name));
        let weights = source.weights("text_encoder", "model", false).unwrap();
        let config = ClipTextConfig::read(&source).unwrap();
        let model = ClipTextModel::load(config, &weights, &Device::Cpu, DType::F32).unwrap();
        let ids = &fixture(&format!("{name}/text_encoder/expected.safetensors"))["ids"];
        let ids = ids.to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
        for skip in 1.. {
            let Some(reference) = expected.get(&format!("states.{name}.{skip}")) else { break };
            let loras = LoraStack::default();
            let ours = model.forward_skipping(skip, &ids[..1], &loras).unwrap();
            let error = relative_error(&ours, reference);
            println!("{name} without {skip} layers: {error:.1e}");
            assert!(error <= TOLERANCE, "{name} without {skip} layers: {error:.1e}");
            compared += 1;
        }
    }
    assert_eq!(compared, 5);
}

#[test]
fn latents_are_those_of_diffusers_alone_and_in_one_batch() {
    let (model, expected) = (load(path("v1")), fixture("knobs.safetensors"));
    let mut cases: Vec<_> = expected.keys().filter_map(|k| k.strip_prefix("latents.")).collect();
    cases.sort_unstable();
    assert_eq!(cases.len(), 7);
    let specs: Vec<Spec> = cases.iter().map(|case| asked(case)).collect();
    let drawn = finish(&model, specs.iter().map(|spec| model.begin(spec).unwrap()).collect());
    for ((case, spec), latents) in cases.iter().zip(&specs).zip(&drawn) {
        let error = relative_error(latents, &expected[&format!("latents.{case}")]);
        println!("{case}: {error:.1e}");
        assert!(error <= TOLERANCE, "{case}: {error:.1e}");
        let alone = finish(&model, vec![model.begin(spec).unwrap()]);
        assert_eq!(relative_error(&alone[0], latents), 0.0, "{case} alone");
    }
    let distinct = |a: usize, b: usize| relative_error(&drawn[a], &drawn[b]) > 1e-3;
    assert!((0..7).all(|a| (0..a).all(|b| distinct(a, b))));
}

#[test]
fn the_syntax_decides_whether_the_negative_prompt_skips_layers_too() {
    let model = load(path("v1"));
    let draw = |prompt_syntax, clip_skip| {
        let spec = Spec { prompt_syntax, clip_skip, ..asked("plain") };
        finish(&model, vec![model.begin(&spec).unwrap()]).remove(0)
    };
    // The prompts have neither brackets nor more than one chunk: without skipped layers it is one.
    let of = |skip| [PromptSyntax::Plain, PromptSyntax::A1111].map(|syntax| draw(syntax, skip));
    let ([plain, a1111], [plain_skipped, a1111_skipped]) = (of(0), of(1));
    assert_eq!(relative_error(&plain, &a1111), 0.0);
    assert!(relative_error(&plain_skipped, &a1111_skipped) > 1e-3);
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    let model = load(path("v1"));
    let variation = |strength| Some(Variation { seed: 1, strength });
    let plain = || asked("plain");
    let refused = [
        ("clip_skip", Spec { clip_skip: 3, ..plain() }),
        ("guidance_rescale", Spec { guidance_rescale: 1.1, ..plain() }),
        ("guidance_rescale", Spec { guidance_rescale: f64::NAN, ..plain() }),
        ("variation_strength", Spec { variation: variation(-0.1), ..plain() }),
    ];
    for (wrong, spec) in refused {
        let error = model.check(&spec).unwrap_err();
        assert!(matches!(error, Error::Spec { field, .. } if field == wrong), "{error}");
    }
    let idle = Spec { guidance_scale: 1.0, guidance_rescale: 0.5, ..plain() };
    let warnings = model.begin(&idle).unwrap().warnings().to_vec();
    assert!(warnings[0].starts_with("negative_prompt has no effect"), "{warnings:?}");
    assert!(warnings[1].starts_with("guidance_rescale has no effect"), "{warnings:?}");
}
