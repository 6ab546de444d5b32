//! Latent consistency models whose UNet takes the guidance scale as an input, against diffusers'
//! `LatentConsistencyModelPipeline`.

use std::path::{Path, PathBuf};

use sd_models::{Sampler, Spec};

use crate::img2img::{copy, finish, load, spec};
use crate::{fixture, path, relative_error};

const TOLERANCE: f32 = 1e-4;

/// The model of SD 1.x with the other UNet, scheduler and index; each test has its own.
pub(crate) fn model(test: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lcm-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v1"), &root);
    std::fs::remove_dir_all(root.join("unet")).unwrap();
    copy(&path("lcm"), &root);
    root
}

#[test]
fn the_guidance_scale_is_an_input_of_each_row() {
    let (model, expected) = (load(model("rows")), fixture("lcm/expected.safetensors"));
    let mut cases: Vec<_> = expected.keys().collect();
    cases.sort_unstable();
    assert_eq!(cases.len(), 4);
    let asked = |case: &&String| {
        let (steps, guidance) = case.split_once('.').unwrap();
        let (steps, guidance_scale) = (steps.parse().unwrap(), guidance.parse().unwrap());
        let (sampler, embeds_guidance) = (Sampler::Lcm, model.info().embeds_guidance);
        Spec { steps, guidance_scale, sampler, embeds_guidance, ..spec(None) }
    };
    let specs: Vec<Spec> = cases.iter().map(asked).collect();
    assert!(specs.iter().all(|spec| spec.rows() == 1));
    let drawn = finish(&model, specs.iter().map(|spec| model.begin(spec).unwrap()).collect());
    for ((case, spec), latents) in cases.iter().zip(&specs).zip(&drawn) {
        let error = relative_error(latents, &expected[*case]);
        println!("{case}: {error:.1e}");
        assert!(error <= TOLERANCE, "{case}: {error:.1e}");
        let alone = finish(&model, vec![model.begin(spec).unwrap()]);
        assert_eq!(relative_error(&alone[0], latents), 0.0, "{case} alone");
    }
    let negative = Spec { negative_prompt: "the sea".into(), ..specs[0].clone() };
    let begun = model.begin(&negative).unwrap();
    assert_eq!(begun.rows(), 1);
    assert!(begun.warnings()[0].contains("guidance scale as an input"), "{:?}", begun.warnings());
}
