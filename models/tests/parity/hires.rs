//! Hires passes against torch's `interpolate` and diffusers' img2img of the latents that it returns.

use sd_models::{
    AddOns, AssetDir, Error, Hires, Img2Img, LatentUpscaler, MaskedStart, Pipeline, Sampler,
    SamplerName, Size, Spec, Trajectory, Upscaler,
};

use crate::img2img::{inpainting_model, load, spec, with_add_ons};
use crate::{fixture, path, relative_error};

const TOLERANCE: f32 = 1e-4;

/// Takes trajectories to their ends, in one step all those of one size.
pub(crate) fn finish(model: &Pipeline, mut batch: Vec<Trajectory>) -> Vec<candle_core::Tensor> {
    while let Some(size) = batch.iter().find(|t| !t.done()).map(Trajectory::size) {
        let mut members: Vec<_> = batch.iter_mut().filter(|t| t.size() == size).collect();
        let left: usize = members.iter().map(|t| t.work_left()).sum();
        model.step(&mut members).unwrap();
        let after: usize = members.iter().map(|t| t.work_left()).sum();
        assert!(after < left, "{after} after {left}");
    }
    batch.iter().map(|trajectory| trajectory.latents().clone()).collect()
}

fn hires(upscaler: Upscaler) -> Hires {
    Hires {
        size: Size::new(96, 80).unwrap(),
        steps: 10,
        strength: 0.5,
        upscaler,
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    }
}

#[test]
fn latents_are_enlarged_as_torch_enlarges_them() {
    let expected = fixture("hires.safetensors");
    let mut compared = 0;
    for (name, reference) in &expected {
        let Some(rest) = name.strip_prefix("enlarged.") else { continue };
        let (upscaler, size) = rest.rsplit_once('.').unwrap();
        let (width, height) = size.split_once('x').unwrap();
        let size = Size::new(width.parse().unwrap(), height.parse().unwrap()).unwrap();
        let from = Size::new(40, 48).unwrap();
        let upscaler: LatentUpscaler = upscaler.parse().unwrap();
        let ours = upscaler.upscale(&expected["latents"], (from, size), 8).unwrap();
        let error = relative_error(&ours, reference);
        println!("{rest}: {error:.1e}");
        assert!(error <= 1e-6, "{rest}: {error:.1e}");
        compared += 1;
    }
    assert_eq!(compared, 24);
}

#[test]
fn a_narrow_picture_is_not_blown_up() {
    let latents = candle_core::Tensor::ones(
        (1, 4, 20_000, 1),
        candle_core::DType::F32,
        &candle_core::Device::Cpu,
    );
    let sizes = (Size::new(8, 160_000).unwrap(), Size::new(1024, 1024).unwrap());
    for upscaler in LatentUpscaler::all() {
        let large = upscaler.upscale(latents.as_ref().unwrap(), sizes, 8).unwrap();
        assert_eq!(large.dims(), [1, 4, 128, 128], "{}", upscaler.title());
    }
}

#[test]
fn pictures_go_on_as_those_of_diffusers() {
    let (model, expected) = (load(path("v1")), fixture("hires.safetensors"));
    let mut cases: Vec<_> = expected.keys().filter_map(|name| name.strip_prefix("run.")).collect();
    cases.sort_unstable();
    assert_eq!(cases.len(), 10);
    let spec = |case: &&str| {
        let (scheduler, upscaler) = case.split_once('.').unwrap();
        let hires = Some(hires(upscaler.into()));
        let SamplerName { sampler, schedule } = scheduler.parse().unwrap();
        Spec { sampler, schedule, steps: 6, hires, ..spec(None) }
    };
    let specs: Vec<Spec> = cases.iter().map(spec).collect();
    let drawn = finish(&model, specs.iter().map(|spec| model.begin(spec).unwrap()).collect());
    for ((case, spec), latents) in cases.iter().zip(&specs).zip(&drawn) {
        let error = relative_error(latents, &expected[&format!("run.{case}")]);
        println!("{case}: {error:.1e}");
        assert!(error <= TOLERANCE, "{case}: {error:.1e}");
        let alone = finish(&model, vec![model.begin(spec).unwrap()]);
        assert_eq!(relative_error(&alone[0], latents), 0.0, "{case} alone");
    }
}

/// The small model with the upscalers of the fixture.
fn with_upscalers() -> Pipeline {
    let upscalers = AssetDir {
        directory: Some(path("upscalers")),
        endings: &["safetensors", "pth"],
        ..AssetDir::default()
    };
    let add_ons = AddOns { upscalers, max_upscaler_bytes: 1 << 20, ..AddOns::default() };
    with_add_ons(path("v1"), add_ons)
}

fn by_picture(side: usize, upscaler: &str) -> Hires {
    Hires { size: Size::new(side, side).unwrap(), ..hires(upscaler.into()) }
}

#[test]
fn a_pass_goes_on_from_an_upscaled_picture() {
    let (model, expected) = (with_upscalers(), fixture("upscalers/hires.safetensors"));
    let mut cases: Vec<_> = expected.keys().map(|name| &name["run.".len()..]).collect();
    cases.sort_unstable();
    assert_eq!(cases, ["Lanczos", "Nearest", "None", "new-2x", "old-4x"]);
    let spec = |case: &&str| {
        let hires = Some(by_picture(104, case));
        Spec { sampler: Sampler::Euler, steps: 6, hires, ..spec(None) }
    };
    let specs: Vec<Spec> = cases.iter().map(spec).collect();
    let drawn = finish(&model, specs.iter().map(|spec| model.begin(spec).unwrap()).collect());
    for ((case, spec), latents) in cases.iter().zip(&specs).zip(&drawn) {
        let error = relative_error(latents, &expected[&format!("run.{case}")]);
        println!("{case}: {error:.1e}");
        // A byte of the decoded picture may differ by one.
        assert!(error <= 5e-2, "{case}: {error:.1e}");
        let alone = finish(&model, vec![model.begin(spec).unwrap()]);
        assert_eq!(relative_error(&alone[0], latents), 0.0, "{case} alone");
    }
}

#[test]
fn the_steps_between_the_passes_are_counted() {
    let model = with_upscalers();
    // 6 and 5 UNet calls; decoding and encoding; a tile and a resampling; the tile of a second pass.
    for (side, upscaler, steps) in
        [(104, "None", 13), (104, "Lanczos", 14), (104, "old-4x", 15), (40, "old-4x", 13)]
    {
        let hires = Some(by_picture(side, upscaler));
        let spec = Spec { sampler: Sampler::Euler, steps: 6, hires, ..spec(None) };
        let mut trajectory = model.begin(&spec).unwrap();
        let mut between = 0;
        for made in 0..steps {
            assert_eq!(trajectory.progress(), (made, steps), "{upscaler} {side}");
            between += usize::from(trajectory.enlarging());
            let left = trajectory.work_left();
            model.step(&mut [&mut trajectory]).unwrap();
            assert!(trajectory.work_left() < left);
            // Also what is shown, and returned if it is interrupted here.
            let size = trajectory.size();
            let preview = model.preview(&trajectory).unwrap();
            assert_eq!((8 * preview.width, 8 * preview.height), (size.width(), size.height()));
        }
        assert!(trajectory.done() && trajectory.work_left() == 0);
        assert_eq!(between, steps - 11);
        let picture = model.decode(&trajectory).unwrap();
        assert_eq!((picture.width, picture.height), (side, side));
    }
}

#[test]
fn upscalers_that_cannot_be_are_refused_by_name() {
    let model = with_upscalers();
    let begun = |upscaler: &str| {
        let spec = Spec { hires: Some(by_picture(104, upscaler)), ..spec(None) };
        let checked = model.info().check_files(&spec).err();
        (checked.map(|e| e.to_string()), model.begin(&spec).err().map(|e| e.to_string()))
    };
    let (checked, begun_unknown) = begun("old-5x");
    let checked = checked.unwrap();
    assert!(checked.starts_with("hires_upscaler: names the upscaler \"old-5x\""), "{checked}");
    assert!(checked.contains("old-4x") && checked.contains("Lanczos"), "{checked}");
    assert!(begun_unknown.is_some_and(|error| error.starts_with("hires_upscaler: ")));
    let (checked, refused) = begun("pictures");
    let refused = refused.unwrap();
    assert!(checked.is_none() && refused.contains("ESRGAN family"), "{refused}");
}

#[test]
fn both_passes_are_counted_and_shown() {
    let model = load(path("v1"));
    let spec = Spec { hires: Some(hires(Upscaler::default())), ..spec(None) };
    let mut trajectory = model.begin(&spec).unwrap();
    assert_eq!((trajectory.size(), trajectory.progress()), (spec.size, (0, 15)));
    for made in 1..=15 {
        model.step(&mut [&mut trajectory]).unwrap();
        assert_eq!(trajectory.progress(), (made, 15));
        let size = if made < 10 { spec.size } else { spec.final_size() };
        assert_eq!(trajectory.size(), size);
        let preview = model.preview(&trajectory).unwrap();
        assert_eq!((8 * preview.width, 8 * preview.height), (size.width(), size.height()));
    }
    assert!(trajectory.done() && trajectory.work_left() == 0);
    let picture = model.decode(&trajectory).unwrap();
    assert_eq!((picture.width, picture.height), (96, 80));
}

#[test]
fn a_second_pass_that_cannot_be_is_refused_by_name() {
    let model = load(path("v1"));
    let good = hires(Upscaler::default());
    let refused = [
        ("hires_steps", Hires { steps: 0, ..good.clone() }),
        ("hires_strength", Hires { strength: 0.05, ..good.clone() }),
        ("hires_strength", Hires { strength: f64::NAN, ..good.clone() }),
    ];
    for (wrong, hires) in refused {
        let error = model.check(&Spec { hires: Some(hires), ..spec(None) }).unwrap_err();
        assert!(matches!(error, Error::Spec { field, .. } if field == wrong), "{error}");
    }
    let picture = sd_models::Rgb { width: 64, height: 64, data: vec![0; 64 * 64 * 3] };
    let start = Img2Img {
        picture,
        strength: 0.5,
        takes_all_steps: false,
        mask: None,
        masked_start: MaskedStart::Picture,
    };
    let both = Spec { hires: Some(good.clone()), ..spec(Some(start)) };
    assert!(matches!(model.check(&both), Err(Error::Spec { field: "hires_width", .. })));
    let inpainting = load(inpainting_model("hires"));
    let begun = inpainting.begin(&Spec { hires: Some(good), ..spec(None) });
    assert!(matches!(begun, Err(Error::Spec { field: "hires_width", .. })));
}
