//! Preprocessors of control pictures against OpenCV.

use candle_core::DType;
use sd_models::{Interpolation, Preprocessor, Rgb, otsu};

use crate::fixture;

#[test]
fn edges_are_those_that_opencv_finds() {
    let expected = fixture("control/canny.safetensors");
    let bytes = |name: &str| -> (Vec<usize>, Vec<u8>) {
        let x = &expected[name];
        let values = x.flatten_all().unwrap().to_vec1().unwrap();
        (x.dims().to_vec(), values)
    };
    for i in 0..10 {
        let (shape, data) = bytes(&format!("{i}.picture"));
        let picture = Rgb { width: shape[1], height: shape[0], data };
        let thresholds = expected[&format!("{i}.thresholds")].to_dtype(DType::F64).unwrap();
        let thresholds: Vec<f64> = thresholds.to_vec1().unwrap();
        let canny = Preprocessor::Canny { low: thresholds[0], high: thresholds[1] };
        let (_, edges) = bytes(&format!("{i}.edges"));
        let ours = canny.apply(&picture).data;
        assert_eq!(ours.len(), 3 * edges.len());
        let differing = ours.iter().enumerate().filter(|(k, byte)| **byte != edges[k / 3]).count();
        let white = edges.iter().filter(|byte| **byte == 255).count();
        println!("{i}: {shape:?}, {white} pixels of edges");
        assert_eq!(differing, 0, "picture {i}");
    }
}

#[test]
fn pictures_are_resized_as_by_opencv() {
    let expected = fixture("control/resized.safetensors");
    let picture = |name: &str| {
        let (height, width, _) = expected[name].dims3().unwrap();
        Rgb { width, height, data: expected[name].flatten_all().unwrap().to_vec1().unwrap() }
    };
    let mut count = 0;
    for name in expected.keys() {
        let Some(case) = name.strip_suffix(".picture") else { continue };
        let how = match case.split_once('.').unwrap().1 {
            "AREA" => Interpolation::Area,
            "CUBIC" => Interpolation::Cubic,
            "NEAREST" => Interpolation::Nearest,
            other => panic!("{other}"),
        };
        let (from, want) = (picture(name), picture(&format!("{case}.resized")));
        let size = (want.width, want.height);
        let got = how.resize(&from, size);
        let differences = got.data.iter().zip(&want.data).map(|(got, want)| got.abs_diff(*want));
        let most = if how == Interpolation::Cubic { want.data.len() / 10_000 + 1 } else { 0 };
        assert!(differences.clone().all(|by| by <= 1), "{case} {from:?}");
        let wrong = differences.filter(|by| *by > 0).count();
        assert!(wrong <= most, "{case} {from:?}: {wrong}");
        assert_eq!((got.width, got.height), size);
        let red: Vec<u8> = want.data.chunks_exact(3).map(|pixel| pixel[0]).collect();
        let threshold = expected[&format!("{case}.otsu")].to_vec1::<u8>().unwrap();
        assert_eq!(vec![otsu(&red)], threshold, "{case}");
        // A part of it is that part.
        let [columns, rows] = [size.0, size.1].map(|side| side / 3..side.div_ceil(2));
        let part = how.resize_part(&from, size, [columns.clone(), rows.clone()]);
        let line = |y: usize| &got.data[3 * (y * size.0 + columns.start)..][..3 * columns.len()];
        let of_whole: Vec<u8> = rows.flat_map(line).copied().collect();
        assert_eq!(part.data, of_whole, "{case}");
        count += 1;
    }
    assert_eq!(count, 17);
}
