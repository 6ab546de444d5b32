//! Images whose opposite edges meet against diffusers with `padding_mode="circular"`.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use sd_models::{Img2Img, MaskedStart, Rgb, SamplerName, Size, Spec};

use crate::img2img::{finish, load, spec};
use crate::{fixture, floats, path, relative_error};

const TOLERANCE: f32 = 1e-4;

#[test]
fn opposite_edges_meet_in_whole_runs() {
    let (model, expected) = (load(path("v1")), fixture("tiling.safetensors"));
    let size = Size::new(96, 64).unwrap();
    let bytes = expected["picture"].to_dtype(DType::U8).unwrap().flatten_all().unwrap();
    let picture = Rgb { width: 96, height: 64, data: bytes.to_vec1().unwrap() };
    let start = Img2Img {
        picture,
        strength: 0.5,
        mask: None,
        masked_start: MaskedStart::Picture,
        takes_all_steps: false,
    };
    let start = Arc::new(start);
    let cases = ["text.ddim", "text.euler_a", "image.ddim", "image.euler_a"];
    let of = |case: &&str| {
        let (kind, name) = case.split_once('.').unwrap();
        let SamplerName { sampler, schedule } = name.parse().unwrap();
        let img2img = (kind == "image").then(|| Arc::clone(&start));
        Spec { size, sampler, schedule, img2img, tiling: true, ..spec(None) }
    };
    let tiled: Vec<Spec> = cases.iter().map(of).collect();
    // In one batch with images that have edges, of which the first must be as it is alone.
    let plain = Spec { tiling: false, ..tiled[0].clone() };
    let specs: Vec<&Spec> = tiled.iter().chain([&plain]).collect();
    let mut batch: Vec<_> = specs.iter().map(|spec| model.begin(spec).unwrap()).collect();
    while batch.iter().any(|trajectory| !trajectory.done()) {
        model.step(&mut batch.iter_mut().collect::<Vec<_>>()).unwrap();
    }
    for (case, trajectory) in cases.iter().zip(&batch) {
        let error = relative_error(trajectory.latents(), &expected[*case]);
        println!("{case}: {error:.1e}");
        assert!(error <= TOLERANCE, "{case}: {error:.1e}");
        let image = model.decode(trajectory).unwrap();
        let want = expected[&format!("{case}.decoded")].permute((0, 2, 3, 1)).unwrap();
        let want = floats(&want).into_iter().map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0)) * 255.0);
        let most = want.zip(&image.data).map(|(w, got)| (w - f32::from(*got)).abs());
        assert!(most.fold(0.0, f32::max) <= 1.0, "{case} decoded");
    }
    let alone = finish(&model, vec![model.begin(&plain).unwrap()]);
    assert_eq!(relative_error(&alone[0], batch[4].latents()), 0.0);
    let differs = |a: &Tensor, b: &Tensor| relative_error(a, b) > 1e-2;
    assert!(differs(batch[0].latents(), batch[4].latents()));
}
