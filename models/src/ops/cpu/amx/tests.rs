//! AMX emulated in Rust, and the kernels on it, or on the processor's own.

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::files::Source;
use crate::networks::{UNet2DConditionModel, UNetConfig};
use crate::ops::cpu::epilogue::HostEpilogue;
use crate::ops::cpu::gemm::gemm;
use crate::ops::cpu::packed::{Packed, PanelLayout};
use crate::ops::cpu::product::Matrix;
use crate::ops::cpu::simd::vectorized;
use crate::ops::cpu::tensor_data::{TensorData, Weight};
use crate::ops::cpu::tile::{AMX_KC, Blocking};
use crate::ops::tests::{random, tensor};
use crate::ops::types::Activation;

thread_local! {
    /// Whether layers that this thread builds in bf16 use AMX even where there is none.
    pub(crate) static EMULATED: Cell<bool> = const { Cell::new(false) };
}

/// The instructions as in Intel's manual, but for denormals.
pub(crate) struct EmulatedTiles([Register; 8]);

/// Rows of 64 bytes.
type Register = [[u32; AMX_TILE]; AMX_TILE];

impl EmulatedTiles {
    pub(super) fn new() -> Self {
        Self([[[0; AMX_TILE]; AMX_TILE]; 8])
    }
}

impl Tiles for EmulatedTiles {
    fn zero<const T: usize>(&mut self) {
        self.0[T] = [[0; AMX_TILE]; AMX_TILE];
    }

    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        for (i, row) in self.0[T].iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *row = unsafe { from.add(i * stride).cast::<[u32; AMX_TILE]>().read_unaligned() };
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        for (i, row) in self.0[T].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(i * stride).cast::<[u32; AMX_TILE]>().write_unaligned(*row) };
        }
    }

    fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        let (a, b) = (self.0[A], self.0[B]);
        dot(&mut self.0[C], &a, &b);
    }
}

vectorized! {
    fn dot(c: &mut Register, a: &Register, b: &Register) {
        let wide = |pair: u32| [pair << 16, pair & 0xFFFF_0000].map(f32::from_bits);
        for (c, a) in c.iter_mut().zip(a) {
            // Sums of the first and of the second of each pair. Their products are exact.
            let (mut first, mut second) = ([0f32; AMX_TILE], [0f32; AMX_TILE]);
            for (a, b) in a.iter().zip(b) {
                let a = wide(*a);
                for j in 0..AMX_TILE {
                    let b = wide(b[j]);
                    first[j] += a[0] * b[0];
                    second[j] += a[1] * b[1];
                }
            }
            for j in 0..AMX_TILE {
                c[j] = (f32::from_bits(c[j]) + (first[j] + second[j])).to_bits();
            }
        }
    }
}

#[test]
fn tiles_are_right() {
    assert!(self_test(&mut EmulatedTiles::new()));
    // Where there is AMX this has run the self-test.
    println!("tiles of this processor: {:?}", status());
    assert_ne!(status(), AmxStatus::SelfTestFailed);
    // Set where they are emulated.
    if std::env::var_os("SD_TEST_AMX").is_some() {
        assert_eq!(status(), AmxStatus::Usable);
    }
}

/// AMX rounds activations too; the error is at most that of bf16 in other engines.
#[test]
fn a_network_on_tiles_stays_close_to_f32() {
    let device = Device::Cpu;
    let config = UNetConfig::read(&Source::Demo).unwrap();
    let stem = "diffusion_pytorch_model";
    let weights = Source::Demo.weights("unet", stem, false).unwrap();
    let run = |dtype| {
        let model = UNet2DConditionModel::load(config.clone(), &weights, &device, dtype);
        let model = model.unwrap();
        let context = tensor(&[2, 77, config.cross_attention_dim], 1);
        let conditioning = model.condition(&context, &[]).unwrap();
        let latents = (tensor(&[2, config.in_channels, 16, 16], 2) * 3f64.sqrt()).unwrap();
        model
            .forward(
                &latents,
                &model.time_embeddings(&[900.0, 300.0], &[]).unwrap(),
                &[conditioning],
                &[],
            )
            .unwrap()
    };
    let want = run(DType::F32);
    EMULATED.set(true);
    let got = run(DType::BF16);
    EMULATED.set(false);
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let error = norm(&(got - &want).unwrap()) / norm(&want);
    println!("bf16 on tiles beside f32: relative L2 {error:.1e}");
    assert!(error > 0.0 && error <= 2.5e-2, "relative L2 {error:.1e}");
}

/// Rounded as the operands of AMX are.
fn rounded(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|v| bf16::from_f32(*v).to_f64()).collect()
}

#[test]
fn products_agree_with_the_sum_in_f64_whatever_the_batch() {
    for (rows, k, n) in [
        (1, 1, 1),
        (33, 31, 33),
        (70, 97, 64),
        (400, 17, 70),
        (30, Blocking::AMX.depth + 99, 40),
        (40, AMX_KC + 32, 4),
        (3, 5, 257),
    ] {
        let (a, w, bias) = (random(rows * k, 4), random(k * n, 5), random(n, 6));
        let weight = Weight::Data(TensorData::Floats(&w), &[n, k]);
        let packed = Packed::new(&weight, 1, false, PanelLayout::Vnni).unwrap();
        let epilogue = HostEpilogue { bias: Some(&bias), ..HostEpilogue::default() };
        let out = gemm(rows, &Matrix { data: &a, stride: k }, &packed, epilogue);
        let (wide_a, wide_w) = (rounded(&a), rounded(&w));
        for (at, got) in out.iter().enumerate() {
            let (i, j) = (at / n, at % n);
            let row = &wide_a[i * k..][..k];
            let sum: f64 = row.iter().zip(&wide_w[j * k..]).map(|(a, w)| a * w).sum();
            let want = sum + f64::from(bias[j]);
            assert!((f64::from(*got) - want).abs() < 2e-4, "{rows} {k} {n}: {i} {j}");
        }
        let last = Matrix { data: &a[(rows - 1) * k..], stride: k };
        let alone = gemm(1, &last, &packed, epilogue);
        assert_eq!(alone, out[(rows - 1) * n..], "a row depends on its batch");
    }
}

#[test]
fn gates_and_all_that_follows_a_product_are_as_without_tiles() {
    let (rows, k, n) = (50, Blocking::AMX.depth + 65, 37);
    let (a, w, bias) = (random(rows * k, 1), random(2 * n * k, 2), random(96, 3));
    // Operands that are exact in bf16, so that both kernels read the same.
    let exact = |v: Vec<f32>| rounded(&v).into_iter().map(|v| v as f32).collect::<Vec<_>>();
    let (a, w) = (exact(a), exact(w));
    let (added, shift) = (random(rows * 2 * n, 4), random(5 * n, 5));
    let matrix = Matrix { data: &a, stride: k };
    let close = |tiles: Vec<f32>, vectors: Vec<f32>| {
        let most = vectors.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (got, want) in tiles.iter().zip(&vectors) {
            assert!((got - want).abs() < 1e-5 * most, "{got} {want}");
        }
    };
    let weight = Weight::Data(TensorData::Floats(&w), &[2 * n, k]);
    let gated = |layout| {
        let packed = Packed::new(&weight, 1, true, layout).unwrap();
        let epilogue =
            HostEpilogue { bias: Some(&bias), residual: Some(&added), ..HostEpilogue::default() };
        gemm(rows, &matrix, &packed, epilogue)
    };
    close(gated(PanelLayout::Vnni), gated(PanelLayout::F32));
    let weight = Weight::Data(TensorData::Floats(&w[..n * k]), &[n, k]);
    let plain = |layout| {
        let packed = Packed::new(&weight, 1, false, layout).unwrap();
        let epilogue = HostEpilogue {
            bias: Some(&bias[..n]),
            shift: Some((&shift, 10)),
            residual: Some(&added[..rows * n]),
            activation: Some(Activation::Silu),
        };
        gemm(rows, &matrix, &packed, epilogue)
    };
    close(plain(PanelLayout::Vnni), plain(PanelLayout::F32));
}
