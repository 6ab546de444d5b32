//! The kernels against the CPU, on whatever CUDA device there is.

use candle_core::{DType, Device, Tensor};

use super::device::has_products;
use super::product::{FORCED, Tile};
use super::*;
use crate::ops::tests::{difference, tensor};
use crate::ops::{
    self, Activation, Attention, ChannelConcat, Conv2d, Epilogue, Geometry, Linear, self_attention,
};

/// The device, or a message why the test is skipped; see `tests/cuda.rs`.
pub(super) fn device() -> Option<Device> {
    let required = std::env::var_os("SD_TEST_CUDA").is_some_and(|v| v == "required");
    match open(0) {
        Ok(device) => Some(device),
        Err(error) => {
            assert!(!required, "no CUDA device: {error}");
            eprintln!("skipped: no CUDA device: {error}");
            None
        }
    }
}

/// Types of this device's tensor cores, each with the tolerance of its rounding.
fn halves(device: &Device) -> impl Iterator<Item = (DType, f32)> {
    let known = |(dtype, _): &(DType, f32)| has_products(device, *dtype).unwrap();
    [(DType::F16, 3e-3), (DType::BF16, 2e-2)].into_iter().filter(known)
}

/// Random numbers that are exact in the type, on the CPU in f32.
fn exact(shape: &[usize], seed: u64, dtype: DType) -> Tensor {
    tensor(shape, seed).to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

fn place(x: &Tensor, dtype: DType, device: &Device) -> Tensor {
    x.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn close(got: &Tensor, want: &Tensor, allowed: f32, what: &str) {
    let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let found = difference(&got, want);
    assert!(found < allowed, "{what}: {found} is not below {allowed}");
}

#[test]
fn norms_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    for (dtype, allowed) in halves(&device).chain([(DType::F32, 1e-5)]) {
        for (h, w, channels, groups) in
            [(8, 8, 64, 32), (5, 13, 96, 32), (1, 1, 32, 32), (36, 30, 48, 16), (33, 32, 640, 32)]
        {
            let what = format!("group norm {dtype:?} {h}x{w}x{channels}");
            let x = tensor(&[2, h, w, channels], 1).affine(3.0, 0.7).unwrap();
            let x = x.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
            let affine = (tensor(&[channels], 2), tensor(&[channels], 3));
            let norm =
                |device| ops::GroupNorm::new(&affine.0, &affine.1, groups, 1e-5, device).unwrap();
            let (on_device, on_cpu) = (norm(&device), norm(&Device::Cpu));
            let placed = place(&x, dtype, &device);
            let got = on_device.forward(&placed).unwrap();
            close(&got, &on_cpu.forward(&x).unwrap(), allowed, &what);
            let got = on_device.forward_silu(&placed).unwrap();
            close(&got, &on_cpu.forward_silu(&x).unwrap(), allowed, &what);
        }
        for width in [5, 64, 320] {
            let x = tensor(&[2, 35, width], 4).affine(3.0, -0.2).unwrap();
            let x = x.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
            let (weight, bias) = (tensor(&[width], 5), tensor(&[width], 6));
            let norm = |device| ops::LayerNorm::new(&weight, &bias, 1e-5, device).unwrap();
            let got = norm(&device).forward(&place(&x, dtype, &device)).unwrap();
            let want = norm(&Device::Cpu).forward(&x).unwrap();
            close(&got, &want, allowed, &format!("layer norm {dtype:?} {width}"));
        }
    }
}

#[test]
fn pictures_are_turned_as_on_the_cpu() {
    let Some(device) = device() else { return };
    for (dtype, allowed) in halves(&device).chain([(DType::F32, 1e-9)]) {
        let x = exact(&[2, 4, 9, 13], 1, dtype);
        let placed = place(&x, DType::F32, &device);
        let got = channels_last(&placed, dtype).unwrap().expect("a kernel");
        assert_eq!(got.dtype(), dtype);
        close(&got, &ops::channels_last(&x, DType::F32).unwrap(), allowed, "last");
        let back = channels_first(&got).unwrap().expect("a kernel");
        close(&back, &x, allowed, "first");
    }
}

#[test]
fn combinations_are_those_of_the_cpu_to_the_bit() {
    let Some(device) = device() else { return };
    let latents = |seed| tensor(&[3, 4, 9, 13], seed).affine(3.0, 0.1).unwrap();
    let cpu = [1, 2, 3, 4].map(latents);
    let row = |x: &Tensor| x.narrow(0, 1, 1).unwrap();
    let ours = [0, 1, 2, 3].map(|i| row(&cpu[i].to_device(&device).unwrap()));
    let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let factors = [55.0 / 24.0, -59.0 / 24.0, 1.0, -9.0 / 24.0];
    for terms in 1..=4 {
        let sum: Vec<_> = factors.into_iter().zip(&ours).take(terms).collect();
        let got = linear_combination(&sum).unwrap().expect("a kernel");
        let rows = [0, 1, 2, 3].map(|i| row(&cpu[i]));
        let sum: Vec<_> = factors.into_iter().zip(&rows).take(terms).collect();
        assert_eq!(values(&got), values(&ops::linear_combination(&sum).unwrap()), "{terms} terms");
    }
    let got = lerp(&ours[0], &ours[1], 7.5).unwrap().expect("a kernel");
    let want = ops::lerp(&row(&cpu[0]), &row(&cpu[1]), 7.5).unwrap();
    assert_eq!(values(&got), values(&want), "guidance");
    // More terms than a launch takes are left to candle.
    assert!(linear_combination(&[(0.5, &ours[0]); 5]).unwrap().is_none());
}

#[test]
fn elements_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    let values = |x: &Tensor| {
        let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    for (dtype, allowed) in halves(&device).chain([(DType::F32, 1e-6)]) {
        let (a, b) = (tensor(&[3, 5, 67], 1), tensor(&[3, 5, 67], 2));
        let narrow = [&a, &b].map(|x| x.to_dtype(dtype).unwrap());
        let placed = [0, 1].map(|i| narrow[i].to_device(&device).unwrap());
        if dtype != DType::F32 {
            let got = ops::cast(&a.to_device(&device).unwrap(), dtype).unwrap();
            assert_eq!((got.dtype(), values(&got)), (dtype, values(&narrow[0])));
            let got = ops::cast(&placed[0], DType::F32).unwrap();
            assert_eq!((got.dtype(), values(&got)), (DType::F32, values(&narrow[0])));
        }
        let want = (&narrow[0] + &narrow[1]).unwrap();
        assert_eq!(values(&ops::add(&placed[0], &placed[1]).unwrap()), values(&want), "{dtype:?}");
        let silu = want.to_dtype(DType::F32).unwrap().silu().unwrap();
        close(&ops::add_silu(&placed[0], &placed[1]).unwrap(), &silu, 3.0 * allowed, "silu");
        let rows = [&placed[0], &placed[1], &placed[0]].map(|x| x.narrow(0, 1, 2).unwrap());
        let of_cpu = [&narrow[0], &narrow[1], &narrow[0]].map(|x| x.narrow(0, 1, 2).unwrap());
        let (got, want) = (ops::cat_rows(&rows).unwrap(), Tensor::cat(&of_cpu, 0).unwrap());
        assert_eq!((got.dims(), values(&got)), (want.dims(), values(&want)), "{dtype:?}");
        let wide = narrow[0].to_dtype(DType::F32).unwrap().affine(0.7, 0.0).unwrap();
        close(&ops::scale(&placed[0], 0.7).unwrap(), &wide, allowed, "scaled");
        let (table, places) = (tensor(&[11, 24], 3), tensor(&[4, 24], 4));
        let [table, places] = [table, places].map(|x| x.to_dtype(dtype).unwrap());
        let ids = [vec![10, 0, 3, 3], vec![1, 2, 9, 10]];
        let want = ops::embed(&table, &places, &ids).unwrap();
        let [table, places] = [table, places].map(|x| x.to_device(&device).unwrap());
        let got = ops::embed(&table, &places, &ids).unwrap();
        assert_eq!((got.dims(), values(&got)), (want.dims(), values(&want)), "{dtype:?}");
        assert!(ops::embed(&table, &places, &[vec![11]]).is_err());
    }
}

#[test]
fn attention_agrees_with_the_cpu() {
    let Some(device) = device() else { return };
    for (dtype, allowed) in halves(&device) {
        for (queries, keys, heads, width, causal) in [
            (64, 64, 2, 40, false),
            (33, 77, 2, 80, false),
            (70, 70, 2, 64, true),
            (1, 1, 1, 8, false),
            (20, 130, 2, 160, false),
            (65, 40, 1, 128, false),
            (77, 77, 3, 32, true),
            (40, 100, 1, 512, false),
            (64, 64, 2, 512, false),
        ] {
            let channels = heads * width;
            let what = format!("{dtype:?} {queries} to {keys}, {heads} of {width}");
            let q = exact(&[2, queries, channels], 1, dtype).affine(4.0, 0.0).unwrap();
            let (k, v) =
                (exact(&[2, keys, channels], 2, dtype), exact(&[2, keys, channels], 3, dtype));
            let kind = Attention { heads, causal, amx: false };
            let placed = [&q, &k, &v].map(|t| place(t, dtype, &device));
            let got = attention(&placed[0], &placed[1], &placed[2], kind).unwrap();
            let want = ops::attention(&q, &k, &v, kind).unwrap();
            close(&got.expect("a kernel"), &want, allowed, &what);
        }
        let qkv = exact(&[2, 50, 3 * 32], 7, dtype);
        let kind = Attention { heads: 2, causal: false, amx: false };
        let got = self_attention(&place(&qkv, dtype, &device), kind).unwrap();
        close(&got, &self_attention(&qkv, kind).unwrap(), allowed, "columns");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let Some(device) = device() else { return };
    let q = exact(&[1, 40, 16], 8, DType::F16).affine(256.0, 0.0).unwrap();
    let kind = Attention { heads: 1, causal: false, amx: false };
    let placed = place(&q, DType::F16, &device);
    let got = attention(&placed, &placed, &placed, kind).unwrap().expect("a kernel");
    close(&got, &ops::attention(&q, &q, &q, kind).unwrap(), 3e-3, "large scores");
}

#[test]
fn widths_without_a_kernel_are_composed() {
    let Some(device) = device() else { return };
    let q = exact(&[1, 9, 2 * 12], 1, DType::F16);
    let kind = Attention { heads: 2, causal: false, amx: false };
    let placed = place(&q, DType::F16, &device);
    assert!(attention(&placed, &placed, &placed, kind).unwrap().is_none());
    let got = ops::attention(&placed, &placed, &placed, kind).unwrap();
    close(&got, &ops::attention(&q, &q, &q, kind).unwrap(), 3e-3, "composed");
}

#[test]
fn linear_layers_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    for (dtype, allowed) in halves(&device) {
        for (rows, inputs, outputs) in [(9, 72, 45), (130, 64, 128), (3, 320, 66), (70, 20, 8)] {
            let what = format!("{dtype:?} {rows}x{inputs}x{outputs}");
            let x = exact(&[2, rows, inputs], 1, dtype);
            let weight = exact(&[outputs, inputs], 2, dtype);
            let (bias, residual) = (tensor(&[outputs], 3), exact(&[2, rows, outputs], 4, dtype));
            let layer =
                |device: &Device, dtype| Linear::new(&weight, Some(&bias), device, dtype).unwrap();
            let (ours, cpu) = (layer(&device, dtype), layer(&Device::Cpu, DType::F32));
            let placed = place(&x, dtype, &device);
            let got = ours.forward(&placed, Epilogue::NONE).unwrap();
            close(&got, &cpu.forward(&x, Epilogue::NONE).unwrap(), allowed, &what);
            let on_device = place(&residual, dtype, &device);
            let got = ours.forward(&placed, Epilogue::residual(&on_device)).unwrap();
            let want = cpu.forward(&x, Epilogue::residual(&residual)).unwrap();
            close(&got, &want, allowed, &what);
            for activation in
                [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::LeakyRelu]
            {
                let epilogue = Epilogue::activation(activation);
                let got = ours.forward(&placed, epilogue).unwrap();
                let want = cpu.forward(&x, epilogue).unwrap();
                close(&got, &want, allowed, &what);
            }
        }
        let (x, weight) = (exact(&[2, 50, 64], 5, dtype), exact(&[2 * 72, 64], 6, dtype));
        let bias = tensor(&[2 * 72], 7);
        let gate = |device: &Device, dtype| Linear::geglu(&weight, &bias, device, dtype).unwrap();
        let got = gate(&device, dtype).forward(&place(&x, dtype, &device), Epilogue::NONE).unwrap();
        let want = gate(&Device::Cpu, DType::F32).forward(&x, Epilogue::NONE).unwrap();
        close(&got, &want, allowed, "geglu");
    }
}

#[test]
fn convolutions_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    let down = Geometry { kernel: 3, stride: 2, before: 1, after: 1 };
    let vae_down = Geometry { kernel: 3, stride: 2, before: 0, after: 1 };
    let (dtype, allowed) = (DType::F16, 3e-3);
    for geometry in [Geometry::SAME, Geometry::POINT, down, vae_down] {
        for (h, w, inputs, outputs) in
            [(8, 8, 16, 32), (5, 7, 4, 3), (1, 1, 40, 34), (18, 17, 32, 70)]
        {
            if h + geometry.before + geometry.after < geometry.kernel {
                continue;
            }
            let what = format!("{geometry:?} {h}x{w}, {inputs} to {outputs}");
            let x = exact(&[2, h, w, inputs], 1, dtype);
            let weight = exact(&[outputs, inputs, geometry.kernel, geometry.kernel], 2, dtype);
            let bias = tensor(&[outputs], 3);
            let conv = |device: &Device, dtype| {
                Conv2d::new(&weight, &bias, geometry, device, dtype).unwrap()
            };
            let (ours, cpu) = (conv(&device, dtype), conv(&Device::Cpu, DType::F32));
            let placed = place(&x, dtype, &device);
            for size in [(h, w), (2 * h, 2 * w), (2 * h - 1, 2 * w - 1)] {
                let got = ours.forward_resized(&placed, size, Epilogue::NONE).unwrap();
                let want = cpu.forward_resized(&x, size, Epilogue::NONE).unwrap();
                close(&got, &want, allowed, &what);
            }
            let want = cpu.forward(&x, Epilogue::NONE).unwrap();
            let (shift, residual) = (exact(&[2, outputs], 4, dtype), exact(want.dims(), 5, dtype));
            let on_device = place(&shift, dtype, &device);
            let got = ours.forward(&placed, Epilogue::shift(&on_device)).unwrap();
            let want = cpu.forward(&x, Epilogue::shift(&shift)).unwrap();
            close(&got, &want, allowed, &what);
            let on_device = place(&residual, dtype, &device);
            let got = ours.forward(&placed, Epilogue::residual(&on_device)).unwrap();
            let want = cpu.forward(&x, Epilogue::residual(&residual)).unwrap();
            close(&got, &want, allowed, &what);
        }
    }
}

/// Stable Diffusion XL's heads of 64, 640 and 1,280 channels, 4,096 and 1,024 tokens. The queries are a
/// block's; all blocks are alike.
#[test]
fn attention_of_xl_agrees_with_the_cpu() {
    let Some(device) = device() else { return };
    for (dtype, allowed) in halves(&device) {
        for (channels, heads, tokens) in [(640, 10, 4096), (1280, 20, 1024), (1280, 20, 77)] {
            let q = exact(&[1, 66, channels], 1, dtype).affine(4.0, 0.0).unwrap();
            let kv = exact(&[1, tokens, 2 * channels], 2, dtype);
            let kind = Attention { heads, causal: false, amx: false };
            let halves =
                |kv: &Tensor| [0, channels].map(|from| kv.narrow(2, from, channels).unwrap());
            let [k, v] = halves(&place(&kv, dtype, &device));
            let got = attention(&place(&q, dtype, &device), &k, &v, kind).unwrap();
            let [k, v] = halves(&kv).map(|x| x.contiguous().unwrap());
            let want = ops::attention(&q, &k, &v, kind).unwrap();
            let what = format!("{dtype:?} {heads} heads, {tokens} tokens");
            close(&got.expect("a kernel"), &want, allowed, &what);
        }
    }
}

/// Its layers at their width and depth, over few pixels.
#[test]
fn layers_of_xl_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    let (dtype, allowed) = (DType::F16, 3e-3);
    let weights = |shape: &[usize], seed| {
        let depth: usize = shape[1..].iter().product();
        let weight = tensor(shape, seed).affine((depth as f64).powf(-0.5), 0.0).unwrap();
        weight.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
    };
    for channels in [640, 1280] {
        let x = exact(&[1, 20, channels], 1, dtype);
        let (weight, bias) = (weights(&[8 * channels, channels], 2), tensor(&[8 * channels], 3));
        let gate = |device: &Device, dtype| Linear::geglu(&weight, &bias, device, dtype).unwrap();
        let got = gate(&device, dtype).forward(&place(&x, dtype, &device), Epilogue::NONE).unwrap();
        let want = gate(&Device::Cpu, DType::F32).forward(&x, Epilogue::NONE).unwrap();
        close(&got, &want, allowed, &format!("geglu of {channels}"));
        let (weight, bias) = (tensor(&[channels], 4), tensor(&[channels], 5));
        let norm = |device| ops::LayerNorm::new(&weight, &bias, 1e-5, device).unwrap();
        let got = norm(&device).forward(&place(&x, dtype, &device)).unwrap();
        close(&got, &norm(&Device::Cpu).forward(&x).unwrap(), allowed, "layer norm");
    }
    // The resnets of the way up: all channels of two pictures.
    for (c1, c2, outputs, side) in [(1280, 1280, 1280, 5), (640, 320, 320, 40)] {
        let parts = [exact(&[1, side, side, c1], 6, dtype), exact(&[1, side, side, c2], 7, dtype)];
        let cpu = ChannelConcat::from(&Tensor::cat(&parts, 3).unwrap());
        let placed = [0, 1].map(|i| place(&parts[i], dtype, &device));
        let ours = ChannelConcat::new(&placed[0], &placed[1]).unwrap();
        let (weight, bias) = (tensor(&[c1 + c2], 8), tensor(&[c1 + c2], 9));
        let norm = |device| ops::GroupNorm::new(&weight, &bias, 32, 1e-5, device).unwrap();
        let got = norm(&device).forward_silu(&ours).unwrap();
        let want = norm(&Device::Cpu).forward_silu(&cpu).unwrap();
        close(&got, &want, allowed, &format!("group norm of {c1} and {c2}"));
        let (weight, bias) = (weights(&[outputs, c1 + c2, 3, 3], 10), tensor(&[outputs], 11));
        let conv = |device: &Device, dtype| {
            Conv2d::new(&weight, &bias, Geometry::SAME, device, dtype).unwrap()
        };
        let few = |x: &Tensor| x.narrow(1, 0, 3).unwrap().contiguous().unwrap();
        let want = want.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
        let x = few(&want);
        let got = conv(&device, dtype).forward(&place(&x, dtype, &device), Epilogue::NONE).unwrap();
        let want = conv(&Device::Cpu, DType::F32).forward(&x, Epilogue::NONE).unwrap();
        close(&got, &want, allowed, &format!("convolution of {}", c1 + c2));
    }
}

#[test]
fn two_pictures_are_read_as_one() {
    let Some(device) = device() else { return };
    for (c1, c2, pixels) in [(16, 32, 8), (48, 16, 36), (12, 20, 8)] {
        let parts = [
            exact(&[2, pixels, pixels, c1], 1, DType::F16),
            exact(&[2, pixels, pixels, c2], 2, DType::F16),
        ];
        let placed = [0, 1].map(|i| place(&parts[i], DType::F16, &device));
        let ours = ChannelConcat::new(&placed[0], &placed[1]).unwrap();
        let cpu = ChannelConcat::from(&Tensor::cat(&parts, 3).unwrap());
        let (weight, bias) = (tensor(&[c1 + c2], 3), tensor(&[c1 + c2], 4));
        let norm = |device| ops::GroupNorm::new(&weight, &bias, 16, 1e-5, device).unwrap();
        let got = norm(&device).forward_silu(&ours).unwrap();
        let want = norm(&Device::Cpu).forward_silu(&cpu).unwrap();
        close(&got, &want, 3e-3, "norm");
        let (weight, bias) = (exact(&[24, c1 + c2, 1, 1], 5, DType::F16), tensor(&[24], 6));
        let conv = |device: &Device, dtype| {
            Conv2d::new(&weight, &bias, Geometry::POINT, device, dtype).unwrap()
        };
        let got = conv(&device, DType::F16).forward(&ours, Epilogue::NONE).unwrap();
        let want = conv(&Device::Cpu, DType::F32).forward(&cpu, Epilogue::NONE).unwrap();
        close(&got, &want, 3e-3, "convolution");
    }
}

#[test]
fn every_tile_computes_the_same() {
    let Some(device) = device() else { return };
    for (dtype, allowed) in halves(&device) {
        for tile in [Tile::LARGE, Tile::MIDDLE, Tile::SMALL, Tile::RAGGED] {
            // Neither rows nor columns are whole tiles; the last depth is the network's deepest.
            for (rows, outputs, depth) in [(300, 200, 64), (7, 5 * 64, 40), (3, 24, 23_040)] {
                let what = format!("{dtype:?} {rows}x{depth}x{outputs} by {tile:?}");
                let (x, weight) =
                    (exact(&[1, rows, depth], 1, dtype), tensor(&[outputs, depth], 2));
                let weight = weight.affine((depth as f64).powf(-0.5), 0.0).unwrap();
                let weight = weight.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
                let linear =
                    |device: &Device, dtype| Linear::new(&weight, None, device, dtype).unwrap();
                let want = linear(&Device::Cpu, DType::F32).forward(&x, Epilogue::NONE).unwrap();
                let ours = linear(&device, dtype);
                FORCED.set(Some(tile));
                let got = ours.forward(&place(&x, dtype, &device), Epilogue::NONE).unwrap();
                FORCED.set(None);
                close(&got, &want, allowed, &what);
            }
        }
    }
}
