//! The safety checker against diffusers' own: what it is shown, what it makes of it, what it says.

use candle_core::{DType, Device, Tensor};
use sd_models::networks::SafetyChecker;
use sd_models::{Error, Rgb, Source};
use serde_json::{Value, json};

use crate::img2img::{copy, open};
use crate::{fixture, floats, path, relative_error};

const TOLERANCE: f32 = 1e-4;

/// The images of `make_fixtures.py`: width, height and what makes them different.
const PAINTED: [(usize, usize, usize); 6] =
    [(64, 64, 0), (40, 72, 1), (512, 384, 2), (24, 24, 3), (16, 30, 4), (129, 65, 5)];

fn painted((width, height, k): (usize, usize, usize)) -> Rgb {
    let byte = |i: usize| {
        let (x, y, channel) = (i / 3 % width, i / 3 / width, i % 3);
        let shapes = 255 * x * (k % 3) / width + 255 * y * (2 - k % 3) / height + 85 * channel * k;
        let grain = (x * x * 3 + x * y * 7 + y * y * 5 + 11 * channel) % (1 + 40 * k);
        ((shapes + grain) % 256) as u8
    };
    Rgb { width, height, data: (0..3 * width * height).map(byte).collect() }
}

fn load(source: &Source) -> sd_models::Result<SafetyChecker> {
    let weights = source.weights("safety_checker", "model", false)?;
    SafetyChecker::load(source, &weights, &Device::Cpu, DType::F32)
}

#[test]
fn pictures_are_seen_and_judged_as_diffusers_does() {
    let checker = load(&Source::Directory(path("safety"))).unwrap();
    let expected = fixture("safety/expected.safetensors");
    let row = |name: &str, i: usize| expected[name].get(i).unwrap();
    let bad = expected["bad"].to_vec1::<u8>().unwrap();
    for (i, picture) in PAINTED.into_iter().enumerate() {
        let rgb = painted(picture);
        let pixels = checker.preprocess(&rgb).unwrap();
        // One byte is 0.0145 or more after the division by the deviation.
        let seen = floats(&(&pixels - row("pixels", i)).unwrap());
        let seen = seen.into_iter().fold(0_f32, |most, x| most.max(x.abs()));
        let embedding = checker.embed(&row("pixels", i)).unwrap().squeeze(0).unwrap();
        let error = relative_error(&embedding, &row("embeddings", i));
        let verdict = checker.check(&rgb).unwrap();
        println!("{picture:?}: pixels {seen:.1e}, embedding {error:.1e}, {verdict:?}");
        assert!(seen <= 1e-6, "{picture:?} is seen differently: {seen}");
        assert!(error <= TOLERANCE, "{picture:?}: {error:.1e}");
        // Scores are rounded to thousandths, here in f32 and there in Python's floats.
        let ours = [&verdict.special[..], &verdict.concepts].concat();
        for (ours, theirs) in ours.iter().zip(floats(&row("scores", i))) {
            assert!((ours - theirs).abs() <= 1e-6, "{picture:?}: {ours} and {theirs}");
        }
        assert_eq!(verdict.nsfw(), bad[i] == 1, "{picture:?}");
    }
    assert_eq!(bad, [0, 1, 1, 0, 0, 0]);
}

#[test]
fn narrow_pictures_are_not_blown_up() {
    let checker = load(&Source::Directory(path("safety"))).unwrap();
    let pixels = checker.preprocess(&painted((8, 100_000, 2))).unwrap();
    assert_eq!(pixels.dims(), [3, 24, 24]);
}

/// The model of SD 1.x with a checker, and its `model_index.json`.
fn model(test: &str, index: &Value) -> Source {
    let root = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("safety-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v1"), &root);
    copy(&path("safety"), &root);
    std::fs::write(root.join("model_index.json"), index.to_string()).unwrap();
    Source::Directory(root)
}

fn index(checker: Option<&str>) -> Value {
    let library = checker.map(|_| "stable_diffusion");
    json!({ "_class_name": "StableDiffusionPipeline", "safety_checker": [library, checker] })
}

#[test]
fn a_model_is_checked_when_its_index_says_so() {
    let named = model("named", &index(Some("StableDiffusionSafetyChecker")));
    let pipeline = open(named.clone(), None).unwrap();
    assert!(pipeline.info().checked);
    let judged =
        |pipeline: &sd_models::Pipeline, i: usize| pipeline.check_safety(&painted(PAINTED[i]));
    assert_eq!(judged(&pipeline, 0).unwrap(), Some(false));
    assert_eq!(judged(&pipeline, 2).unwrap(), Some(true));

    let unnamed = open(model("unnamed", &index(None)), None).unwrap();
    assert!(!unnamed.info().checked);
    assert_eq!(judged(&unnamed, 2).unwrap(), None);

    let other = open(model("other", &index(Some("Guard"))), None).err().unwrap().to_string();
    assert!(other.starts_with("model_index.json: safety_checker: "), "{other}");

    let Source::Directory(root) = &named else { unreachable!() };
    std::fs::remove_dir_all(root.join("safety_checker")).unwrap();
    // What is named and missing is an error: unchecked images would be a surprise.
    assert!(matches!(open(named, None), Err(Error::File { .. })));
}

#[test]
fn a_tensor_that_does_not_belong_is_left_out() {
    let source = model("stray", &index(Some("StableDiffusionSafetyChecker")));
    let Source::Directory(root) = &source else { unreachable!() };
    let file = root.join("safety_checker/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    // As transformers 5 writes them, and with one too many.
    let old = "vision_model.vision_model.";
    let new = |name: String| name.replace(old, "vision_model.");
    tensors = tensors.into_iter().map(|(name, tensor)| (new(name), tensor)).collect();
    candle_core::safetensors::save(&tensors, &file).unwrap();
    assert!(load(&source).is_ok());
    tensors.insert("stray".into(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&tensors, &file).unwrap();
    assert!(load(&source).is_ok());
}
