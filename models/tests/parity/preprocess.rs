//! Preprocessors of control pictures against OpenCV.

use candle_core::DType;
use sd_models::{Preprocessor, Rgb};

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
