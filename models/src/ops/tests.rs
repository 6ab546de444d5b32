//! Tests of several operations together, and what the tests of single ones share.

use candle_core::{DType, Device, Result, Tensor};

use super::*;

const NONE: Epilogue<'_> = Epilogue::NONE;

/// As LoRAs and guidance read single rows of a batch.
#[test]
fn a_sample_is_read_where_it_lies() {
    let (x, cpu) = (tensor(&[3, 9, 8, 32], 1), &Device::Cpu);
    let (weight, bias) = (tensor(&[32], 2), tensor(&[32], 3));
    let group = GroupNorm::new(&weight, &bias, 8, 1e-5, cpu).unwrap();
    let layer = LayerNorm::new(&weight, &bias, 1e-5, cpu).unwrap();
    let linear = Linear::new(&tensor(&[40, 32], 4), None, cpu, DType::F32).unwrap();
    let (kernel, bias) = (tensor(&[40, 32, 3, 3], 5), tensor(&[40], 6));
    let conv = Conv2d::new(&kernel, &bias, Geometry::SAME, cpu, DType::F32).unwrap();
    let all = |x: &Tensor| {
        [group.forward(x), layer.forward(x), linear.forward(x, NONE), conv.forward(x, NONE)]
    };
    for row in 0..3 {
        let own = |t: &Tensor| t.narrow(0, row, 1).unwrap();
        for (alone, together) in all(&own(&x)).into_iter().zip(all(&x)) {
            assert_eq!(difference(&alone.unwrap(), &own(&together.unwrap())), 0.0);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let cpu = &Device::Cpu;
    let (weight, bias) = (tensor(&[32], 2), tensor(&[32], 3));
    let group = GroupNorm::new(&weight, &bias, 8, 1e-5, cpu).unwrap();
    let layer = LayerNorm::new(&weight, &bias, 1e-5, cpu).unwrap();
    let linear = Linear::new(&tensor(&[40, 32], 4), None, cpu, DType::F32).unwrap();
    for channels in [16, 48] {
        let x = tensor(&[1, 4, 4, channels], 1);
        let refused = [group.forward(&x), layer.forward(&x), linear.forward(&x, NONE)];
        assert!(refused.iter().all(Result::is_err), "{channels} channels for 32");
    }
    let kernel = tensor(&[4, 15], 1);
    assert!(Conv2d::new(&kernel, &bias, Geometry::SAME, cpu, DType::F32).is_err());
    let kind = Attention { heads: 2, causal: false, amx: false };
    let (q, k) = (tensor(&[1, 3, 32], 1), tensor(&[1, 5, 32], 2));
    for v in [tensor(&[1, 4, 32], 3), tensor(&[1, 5, 16], 3), tensor(&[2, 5, 32], 3)] {
        assert!(attention(&q, &k, &v, kind).is_err());
    }
    let none = k.narrow(1, 0, 0).unwrap();
    assert!(attention(&q, &none, &none, kind).is_err());
}

/// Deterministic numbers in (-1, 1) by a linear congruence: good enough to tell kernels apart.
pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A random tensor on the CPU.
pub(crate) fn tensor(shape: &[usize], seed: u64) -> Tensor {
    let data = random(shape.iter().product(), seed);
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// max |a - b| / max |b|
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let max = |t: &Tensor| {
        let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| v.is_finite()));
        values.iter().fold(0f32, |m, v| m.max(v.abs()))
    };
    max(&(a - b).unwrap()) / max(b)
}
