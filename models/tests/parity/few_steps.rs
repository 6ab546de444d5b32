//! Models that were distilled to few steps: what a bare prompt draws by their defaults, against the
//! calls of their authors in diffusers.

use sd_models::{LoadOptions, Pipeline, SamplerOptions, Spec};

use crate::img2img::{finish, options, spec};
use crate::{fixture, path, relative_error};

const TOLERANCE: f32 = 1e-4;

/// The request of a prompt alone.
fn bare(model: &Pipeline) -> Spec {
    let (info, defaults) = (model.info(), &model.info().defaults);
    Spec {
        size: defaults.size,
        steps: defaults.steps,
        guidance_scale: defaults.guidance_scale,
        embeds_guidance: info.embeds_guidance,
        sampler: defaults.sampler,
        schedule: defaults.schedule,
        sampler_options: SamplerOptions { eta: defaults.eta, ..SamplerOptions::default() },
        ..spec(None)
    }
}

#[test]
fn a_bare_prompt_is_drawn_as_the_authors_of_the_model_do() {
    let expected = fixture("few_steps.safetensors");
    assert_eq!(expected.len(), 8);
    for (case, reference) in &expected {
        let (root, name) = match case.strip_prefix("named.") {
            Some(name) => (path("v1"), Some(name.to_owned())),
            None => (crate::lcm::model("bare"), None),
        };
        let source = sd_models::Source::Directory(root);
        let model = Pipeline::load(&LoadOptions { name, ..options(source) }).unwrap();
        let latents = finish(&model, vec![model.begin(&bare(&model)).unwrap()]);
        let error = relative_error(&latents[0], reference);
        println!("{case}: {error:.1e}");
        assert!(error <= TOLERANCE, "{case}: {error:.1e}");
    }
}
