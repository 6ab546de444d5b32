//! Whole runs whose VAE works in tiles against diffusers' pipelines with `enable_tiling`, and how far
//! pictures in tiles are from whole ones.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use sd_models::{Error, Hires, Img2Img, MaskedStart, Pipeline, Rgb, Sampler, Size, Source, Spec};

use crate::img2img::{bytes, inpainting_model, load, open, spec};
use crate::{fixture, floats, path, relative_error};

const TOLERANCE: f32 = 1e-4;

/// The image of a spec, decoded part by part, its last latents, and the number of its steps and of the
/// parts.
fn drawn(model: &Pipeline, spec: &Spec) -> (Rgb, Tensor, [usize; 2]) {
    let mut trajectory = model.begin(spec).unwrap();
    let (_, all) = trajectory.progress();
    let mut steps = 0;
    while !trajectory.done() {
        assert_eq!(trajectory.progress(), (steps, all));
        model.step(&mut [&mut trajectory]).unwrap();
        steps += 1;
    }
    assert_eq!(trajectory.progress(), (all, all));
    let whole = model.decode(&trajectory).unwrap();
    let mut parts = 0;
    let image = loop {
        parts += 1;
        if let Some(image) = model.decode_part(&mut trajectory).unwrap() {
            break image;
        }
    };
    assert!(image == whole, "part by part it is the same");
    (image, trajectory.latents().clone(), [steps, parts])
}

#[test]
fn whole_runs_with_tiles_are_diffusers() {
    let (plain, expected) = (load(path("v1")), fixture("vae_tiles.safetensors"));
    let painting = load(inpainting_model("tiles"));
    let picture = Rgb { width: 104, height: 72, data: bytes(&expected["picture"]) };
    let start = |has_mask: bool| Img2Img {
        picture: picture.clone(),
        strength: 0.5,
        mask: has_mask.then(|| bytes(&expected["mask"])),
        masked_start: MaskedStart::Picture,
        takes_all_steps: false,
    };
    // 3 by 2 tiles, and a step that begins with what was made of them.
    for (kind, model, start, before) in [
        ("text", &plain, None, 0),
        ("image", &plain, Some(start(false)), 7),
        ("hole", &plain, Some(start(true)), 7),
        ("told", &painting, Some(start(true)), 13),
    ] {
        let calls = if start.is_some() { 5 } else { 10 };
        let tiled = Spec {
            size: Size::new(104, 72).unwrap(),
            sampler: Sampler::EulerAncestral,
            vae_tiling: Some(true),
            ..spec(start)
        };
        let (image, latents, counts) = drawn(model, &tiled);
        assert_eq!(counts, [before + calls, 6], "{kind}");
        let error = relative_error(&latents, &expected[&format!("{kind}.latents")]);
        println!("tiles of the VAE, {kind}: {error:.1e}");
        assert!(error <= TOLERANCE, "{kind}: {error:.1e}");
        let want = expected[&format!("{kind}.decoded")].permute((0, 2, 3, 1)).unwrap();
        let differences = floats(&want).into_iter().zip(&image.data);
        let most =
            differences.map(|(want, got)| (want - f32::from(*got)).abs()).fold(0.0, f32::max);
        assert!(most <= 1.0, "{kind} decoded: {most}");
        let whole = drawn(model, &Spec { vae_tiling: None, ..tiled });
        assert_eq!(whole.2, [calls, 1]);
        assert!(whole.0 != image, "{kind}: tiles change the picture");
    }
}

#[test]
fn a_picture_between_two_passes_is_decoded_and_encoded_in_tiles() {
    let model = load(path("v1"));
    let hires = Hires {
        size: Size::new(104, 72).unwrap(),
        steps: 4,
        strength: 0.5,
        upscaler: "Lanczos".into(),
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    };
    let whole =
        Spec { steps: 2, hires: Some(hires), size: Size::new(80, 64).unwrap(), ..spec(None) };
    let tiled = Spec { vae_tiling: Some(true), ..whole.clone() };
    let [(a, _, of_whole), (b, _, of_tiles)] = [&whole, &tiled].map(|spec| drawn(&model, spec));
    // Decoding and encoding are 4 tiles and 6, each with a step before and one behind.
    assert_eq!((of_whole, of_tiles), ([7, 1], [7 - 2 + 6 + 8, 6]));
    let differences = a.data.iter().zip(&b.data).map(|(a, b)| f64::from(a.abs_diff(*b)));
    let mean = differences.sum::<f64>() / a.data.len() as f64;
    assert!(mean > 0.0 && mean < 30.0, "{mean}");
}

#[test]
fn tiles_are_refused_where_they_cannot_be() {
    let refused = |root: PathBuf, tiling: bool| {
        let asks = Spec { vae_tiling: Some(true), tiling, ..spec(None) };
        match load(root).begin(&asks) {
            Err(Error::Spec { field: "vae_tiling", reason }) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => String::new(),
        }
    };
    assert_eq!(refused(path("v1"), false), "");
    assert!(refused(path("v1"), true).contains("opposite edges"));
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("odd-tiles");
    let _ = std::fs::remove_dir_all(&root);
    crate::img2img::copy(&path("v1"), &root);
    let file = root.join("vae/config.json");
    let config = std::fs::read_to_string(&file).unwrap();
    for (size, is_possible) in [("40", false), ("0", false), ("96", true), ("[64, 64]", true)] {
        let size = format!(r#""sample_size": {size}"#);
        let changed = config.replace(r#""sample_size": 64"#, &size);
        assert!(changed.contains(&size));
        std::fs::write(&file, changed).unwrap();
        let reason = refused(root.clone(), false);
        assert_eq!(reason.is_empty(), is_possible, "{size}: {reason}");
        assert!(is_possible || reason.contains("multiple of 32 pixels"), "{reason}");
    }
}

/// The seams of the built-in model, whose tiles have 128 pixels a side.
#[test]
fn seams_are_small() {
    let model = open(Source::DemoLcm, None).unwrap();
    let picture = |vae_tiling| {
        let defaults = model.info().defaults;
        let spec = Spec {
            prompt: "a red house by the sea at night".into(),
            size: Size::new(256, 256).unwrap(),
            steps: defaults.steps,
            guidance_scale: defaults.guidance_scale,
            embeds_guidance: model.info().embeds_guidance,
            sampler: defaults.sampler,
            schedule: defaults.schedule,
            vae_tiling,
            ..spec(None)
        };
        drawn(&model, &spec).0
    };
    let (whole, tiled) = (picture(None), picture(Some(true)));
    let differences: Vec<_> =
        whole.data.iter().zip(&tiled.data).map(|(a, b)| f64::from(a.abs_diff(*b))).collect();
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    let most = differences.iter().copied().fold(0.0, f64::max);
    // How much more a pixel differs from the one at its left where a tile begins or ends than it does in
    // the whole picture.
    let step = |image: &Rgb, x: usize| {
        let at = |y: usize, x: usize| &image.data[3 * (y * 256 + x)..][..3];
        let rows = (0..256).flat_map(|y| at(y, x).iter().zip(at(y, x - 1)));
        rows.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / 768.0
    };
    let seams = [96, 128, 192, 224].map(|x| step(&tiled, x) - step(&whole, x));
    println!("seams: mean {mean:.2}, most {most}; steps at their edges {seams:.2?}");
    assert!(mean > 0.0 && mean < 16.0, "{mean}");
    assert!(seams.iter().all(|seam| *seam < 2.0), "{seams:?}");
}
