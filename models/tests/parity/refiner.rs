//! The refiner of Stable Diffusion XL, alone and after a base model, and runs over a part of the
//! timesteps, against diffusers' pipelines.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_models::networks::{UNet2DConditionModel, UNetConfig};
use sd_models::{
    AddOns, Checkpoint, FreeBytes, Img2Img, LoadOptions, MaskedStart, Pipeline, PromptSyntax,
    Refiner, Rgb, Source, Span, Spec, XlOptions,
};

use crate::img2img::{bytes, copy, finish, load, open, options, spec, with_add_ons};
use crate::{fixture, floats, path, relative_error};

const TOLERANCE: f32 = 1e-4;

fn assert_close(what: &str, ours: &Tensor, reference: &Tensor) {
    let error = relative_error(ours, reference);
    println!("{what}: {error:.1e}");
    assert!(error <= TOLERANCE, "{what}: {error:.1e}");
}

fn expected() -> std::collections::HashMap<String, Tensor> {
    fixture("xl/refiner/pictures.safetensors")
}

/// The base model, which refiners of any size may follow.
fn base() -> Pipeline {
    with_add_ons(path("xl"), AddOns { max_refiner_bytes: u64::MAX, ..AddOns::default() })
}

fn refiner(switch_at: f64) -> Option<Arc<Refiner>> {
    let source = Source::Directory(path("xl/refiner"));
    Some(Arc::new(Refiner { name: "refiner".into(), source, switch_at }))
}

fn drawing(sampler: &str) -> Spec {
    Spec { sampler: sampler.parse::<sd_models::SamplerName>().unwrap().sampler, ..spec(None) }
}

fn start(strength: f64) -> Option<Arc<Img2Img>> {
    let data = bytes(&expected()["picture"]);
    let picture = Rgb { width: 64, height: 64, data };
    let masked_start = MaskedStart::Picture;
    Some(Arc::new(Img2Img { picture, strength, mask: None, masked_start, takes_all_steps: false }))
}

/// Specs against the cases of the fixture, all in one batch, and each alone.
fn check(model: &Pipeline, cases: &[(&str, Spec)]) {
    let expected = expected();
    let begun = |spec| model.begin(spec).unwrap();
    let together = finish(model, cases.iter().map(|(_, spec)| begun(spec)).collect());
    for ((case, spec), together) in cases.iter().zip(together) {
        assert_close(case, &together, &expected[*case]);
        let alone = finish(model, vec![begun(spec)]);
        assert_eq!(relative_error(&alone[0], &together), 0.0, "{case} alone");
    }
}

#[test]
fn the_unet_of_a_refiner_takes_a_score() {
    let source = Source::Directory(path("xl/refiner"));
    let weights = source.weights("unet", "diffusion_pytorch_model", false).unwrap();
    let config = UNetConfig::read(&source).unwrap();
    let model = UNet2DConditionModel::load(config, &weights, &Device::Cpu, DType::F32).unwrap();
    assert!(weights.warnings().is_empty(), "{:?}", weights.warnings());
    let expected = fixture("xl/refiner/networks.safetensors");
    let sizes = expected["sizes"].to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let times: Vec<f64> = floats(&expected["timesteps"]).into_iter().map(f64::from).collect();
    let one = |name: &str, row| expected[name].narrow(0, row, 1).unwrap();
    let rows = [0, 1].map(|row| {
        let prompt = model.condition(&one("context", row), &[]).unwrap();
        model.add(prompt, &one("pooled", row), &sizes[row], &[]).unwrap()
    });
    let times = model.time_embeddings(&times, &[]).unwrap();
    let ours = model.forward(&expected["latents"], &times, &rows, &[]).unwrap();
    assert_close("unet", &ours, &expected["output"]);
}

#[test]
fn a_refiner_alone_refines_pictures() {
    let model = load(path("xl/refiner"));
    let info = model.info();
    assert!(info.is_xl && info.warnings.is_empty(), "{:?}", info.warnings);
    assert_eq!((info.text_width, info.defaults.guidance_scale), (24, 5.0));
    assert_eq!(info.defaults.sampler.name(), "euler");
    let base = Spec { img2img: start(0.5), steps: 6, ..drawing("euler") };
    let scores = XlOptions {
        aesthetic_score: Some(8.0),
        negative_aesthetic_score: Some(1.0),
        original_size: Some([512, 768]),
        crop: [8, 16],
        ..XlOptions::default()
    };
    let part = Span { start: Some(0.4), end: Some(0.8) };
    let end = Span { end: Some(0.8), ..Span::default() };
    check(
        &model,
        &[
            ("refined.half", base.clone()),
            ("refined.whole", Spec { img2img: start(1.0), ..base.clone() }),
            ("refined.negative", Spec { negative_prompt: "the sea".into(), ..base.clone() }),
            ("refined.scores", Spec { xl: scores, ..base.clone() }),
            ("refined.part", Spec { span: part, guidance_scale: 1.0, ..base.clone() }),
            ("refined.end", Spec { span: end, img2img: start(0.7), ..base.clone() }),
        ],
    );
    // It draws texts too, as in AUTOMATIC1111, and says what it does not take.
    let asks = XlOptions {
        prompt_2: "a tree".into(),
        target_size: Some([64, 64]),
        ..XlOptions::default()
    };
    let begun = model.begin(&Spec { xl: asks, ..drawing("euler") }).unwrap();
    let told: Vec<_> = begun.warnings().iter().map(|text| text.split(' ').next()).collect();
    assert_eq!(told, [Some("prompt_2"), Some("target_size")]);
    finish(&model, vec![begun]);
}

#[test]
fn a_run_may_begin_late_and_end_early() {
    let model = base();
    let span = |start, end| Span { start, end };
    let begins = Spec { span: span(Some(0.45), None), img2img: start(0.1), ..drawing("euler") };
    let ends = Spec { span: span(None, Some(0.6)), ..drawing("euler") };
    check(&model, &[("start", begins), ("end", ends.clone())]);
    let whole = Spec { span: span(None, Some(1.0)), ..ends.clone() };
    let drawn = [whole, drawing("euler")].map(|spec| model.begin(&spec).unwrap());
    let [whole, plain] = <[Tensor; 2]>::try_from(finish(&model, drawn.into())).unwrap();
    assert_eq!(relative_error(&whole, &plain), 0.0, "the whole is nothing else");
    for (bad, field) in [
        (span(None, Some(0.0)), "denoising_end: must be above 0"),
        (span(Some(0.5), None), "denoising_start: requires an input image"),
        (span(Some(1.0), None), "denoising_start: must be at least 0 and below 1"),
        (span(None, Some(0.01)), "denoising_end: of 0.01 is before the first step"),
    ] {
        let error = model.begin(&Spec { span: bad, ..ends.clone() }).map(drop).unwrap_err();
        assert!(error.to_string().starts_with(field), "{error}");
    }
    let late = Spec { span: span(Some(0.999), None), img2img: start(0.5), ..ends };
    let error = model.begin(&late).map(drop).unwrap_err().to_string();
    assert!(error.starts_with("denoising_start: of 0.999 is after the last"), "{error}");
}

#[test]
fn a_refiner_takes_images_over() {
    let model = base();
    let taken = |sampler| Spec { refiner: refiner(0.8), ..drawing(sampler) };
    let image = Spec { img2img: start(0.6), steps: 6, ..taken("euler") };
    let negative = Spec { negative_prompt: "the sea".into(), ..taken("euler") };
    let mut cases = vec![
        ("ensemble.negative", negative),
        ("ensemble.late", Spec { refiner: refiner(0.95), ..drawing("euler") }),
        ("ensemble.image", image),
    ];
    for (case, sampler) in [
        ("ensemble.euler", "euler"),
        ("ensemble.dpmpp_2m", "dpmpp_2m"),
        ("ensemble.heun", "heun"),
        ("ensemble.dpm2", "dpm2"),
        ("ensemble.ddim", "ddim"),
        ("ensemble.unipc", "unipc"),
    ] {
        cases.push((case, taken(sampler)));
    }
    check(&model, &cases);
    // The picture is that of the refiner's VAE.
    let mut begun = model.begin(&taken("euler")).unwrap();
    let (mut steps, all) = (0, begun.progress().1);
    while !begun.done() {
        assert_eq!(begun.progress(), (steps, all));
        model.step(&mut [&mut begun]).unwrap();
        model.preview(&begun).unwrap();
        steps += 1;
    }
    assert_eq!((steps, all), (10, 10));
    let ours = model.decode(&begun).unwrap();
    let theirs = expected()["picture.ensemble"].permute((0, 2, 3, 1)).unwrap();
    let theirs = floats(&(theirs * 255.0).unwrap());
    let differences = theirs.iter().zip(&ours.data).map(|(a, b)| (a - f32::from(*b)).abs());
    let (sum, most) = differences.fold((0.0, 0_f32), |(sum, most), d| (sum + d, most.max(d)));
    let mean = sum / ours.data.len() as f32;
    println!("picture: mean {mean:.2e}, most {most:.2e}");
    assert!(mean <= 0.5 && most <= 4.0, "{mean} {most}");
}

/// The other model of the same shapes takes over: the model itself, whose images are then its own.
#[test]
fn in_automatic1111_the_sampler_goes_on() {
    let model = base();
    let own = Refiner { name: "xl".into(), source: Source::Directory(path("xl")), switch_at: 0.55 };
    let own = Some(Arc::new(own));
    for sampler in ["euler", "dpmpp_2m", "heun", "dpm2", "pndm", "lms", "euler_a"] {
        let plain = Spec { prompt_syntax: PromptSyntax::A1111, ..drawing(sampler) };
        let specs = [Spec { refiner: own.clone(), ..plain.clone() }, plain];
        let begun: Vec<_> = specs.iter().map(|spec| model.begin(spec).unwrap()).collect();
        assert_eq!(begun[0].progress(), begun[1].progress(), "{sampler}");
        let drawn = finish(&model, begun);
        assert_eq!(relative_error(&drawn[0], &drawn[1]), 0.0, "{sampler}");
    }
    // diffusers' second run has no history.
    let plain = drawing("dpmpp_2m");
    let specs = [Spec { refiner: own, ..plain.clone() }, plain];
    let begun = specs.iter().map(|spec| model.begin(spec).unwrap()).collect();
    let drawn = finish(&model, begun);
    assert!(relative_error(&drawn[0], &drawn[1]) > 1e-3);
}

/// What the last call of the first model predicted, whatever the second one predicts.
#[test]
fn a_preview_shows_what_there_is_when_a_refiner_takes_over() {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("refiner-velocity");
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("xl"), &root);
    let scheduler = root.join("scheduler/scheduler_config.json");
    let config = std::fs::read_to_string(&scheduler).unwrap();
    assert!(config.contains("\"epsilon\""));
    std::fs::write(&scheduler, config.replace("\"epsilon\"", "\"v_prediction\"")).unwrap();
    let other = Refiner { name: "v".into(), source: Source::Directory(root), switch_at: 0.5 };
    let other = Some(Arc::new(other));
    let model = base();
    for prompt_syntax in [PromptSyntax::A1111, PromptSyntax::Plain] {
        let plain = Spec { prompt_syntax, ..drawing("euler") };
        let taken = Spec { refiner: other.clone(), ..plain.clone() };
        let [mut taken, mut plain] = [taken, plain].map(|spec| model.begin(&spec).unwrap());
        while taken.refiner().is_none() {
            model.step(&mut [&mut taken, &mut plain]).unwrap();
            assert_eq!(model.preview(&taken).unwrap(), model.preview(&plain).unwrap());
        }
        assert!(!taken.done());
    }
}

#[test]
fn a_refiner_that_takes_no_step_says_so() {
    let model = base();
    let begun = model.begin(&Spec { refiner: refiner(1.0), ..drawing("euler") }).unwrap();
    assert!(begun.warnings()[0].starts_with("refiner \"refiner\" has no effect"));
    // From the first step on, it draws the image alone.
    let alone = load(path("xl/refiner"));
    let of_alone = alone.begin(&drawing("euler")).unwrap();
    let of_both = model.begin(&Spec { refiner: refiner(0.0), ..drawing("euler") }).unwrap();
    let [both] = &finish(&model, vec![of_both])[..] else { panic!("one") };
    assert_eq!(relative_error(both, &finish(&alone, vec![of_alone])[0]), 0.0);
}

#[test]
fn refiners_that_do_not_fit_are_refused_by_name() {
    let model = base();
    let inpainting = || {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("refiner-inpainting");
        let _ = std::fs::remove_dir_all(&root);
        copy(&path("xl"), &root);
        std::fs::remove_dir_all(root.join("unet")).unwrap();
        copy(&path("xl/inpaint/unet"), &root.join("unet"));
        root
    };
    for (source, words) in [
        (path("v1"), "other: has other latents than the model: its scaling_factor is 0.18215"),
        (inpainting(), "other: has an inpainting UNet"),
        (path("nowhere"), "nowhere"),
    ] {
        let source = Source::Directory(source);
        let other = Refiner { name: "other".into(), source, switch_at: 0.8 };
        let spec = Spec { refiner: Some(Arc::new(other)), ..drawing("euler") };
        let error = model.begin(&spec).map(drop).unwrap_err().to_string();
        let words = words.replacen("other: ", "\"other\" ", 1);
        assert!(error.starts_with("refiner: ") && error.contains(&words), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
    let small = AddOns { max_refiner_bytes: 1000, ..AddOns::default() };
    let full = AddOns {
        free_host_bytes: Some(FreeBytes(|| Some(7))),
        max_refiner_bytes: u64::MAX,
        ..small.clone()
    };
    for (add_ons, words) in [(small, "(--max-refiner-bytes)"), (full, "7 are free")] {
        let model = with_add_ons(path("xl"), add_ons);
        let spec = Spec { refiner: refiner(0.8), ..drawing("euler") };
        let error = model.begin(&spec).map(drop).unwrap_err().to_string();
        assert!(
            error.starts_with("refiner: \"refiner\" takes ") && error.ends_with(words),
            "{error}"
        );
    }
}

#[test]
fn a_refiner_may_be_a_single_file() {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("refiner-single");
    let _ = std::fs::remove_dir_all(&root);
    let from = path("xl/refiner");
    let file: PathBuf = root.join("a.safetensors");
    copy(&from.join("tokenizer_2"), &root.join("tokenizer_2"));
    std::fs::copy(from.join("single.safetensors"), &file).unwrap();
    let source = || Source::Checkpoint(Checkpoint { file: file.clone(), vocabulary: None });
    let theirs = UNetConfig::read(&Source::Directory(from.clone())).unwrap();
    let mut ours = UNetConfig::read(&source()).unwrap();
    assert_eq!((ours.sample_size, ours.added), (128, theirs.added));
    (ours.sample_size, ours.norm_num_groups) = (theirs.sample_size, theirs.norm_num_groups);
    ours.heads.clone_from(&theirs.heads);
    assert_eq!(ours, theirs);
    // What no shape tells of so small a model.
    for folder in ["unet", "text_encoder_2", "vae"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
        let config = |root: &Path| root.join(folder).join("config.json");
        std::fs::copy(config(&from), config(&root)).unwrap();
    }
    let model = open(source(), None).unwrap();
    assert!(model.info().warnings.is_empty(), "{:?}", model.info().warnings);
    let spec = Spec { img2img: start(0.5), steps: 6, ..drawing("euler") };
    check(&model, &[("refined.half", spec.clone())]);
    assert!(sd_models::parameters(&LoadOptions { ..options(source()) }, false).unwrap() > 0);
    let named = Refiner { name: "a".into(), source: source(), switch_at: 0.8 };
    let spec = Spec { refiner: Some(Arc::new(named)), ..drawing("euler") };
    check(&base(), &[("ensemble.euler", spec)]);
}
