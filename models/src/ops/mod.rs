//! The operations of the networks, each with one small file.
//!
//! Activations are channels-last throughout: pictures are (B, H, W, C), tokens (B, L, C), both
//! contiguous. On the CPU they are f32 and all that a network computes runs on our own kernels
//! (copies, and the samplers' sums of latents, are candle's); on CUDA devices our kernels are those
//! of [`cuda`], and where there is none the operation is composed from candle's, in the tensor's own
//! type, with norms and softmax accumulated in f32. That composition is also the reference that the
//! kernels are tested against.

#![expect(unsafe_code, reason = "vector instructions, disjoint writes, launches of our kernels")]

mod activation;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod buffers;
mod combine;
mod conv;
#[cfg(feature = "cuda")]
mod cuda;
mod gemm;
mod joined;
mod layout;
mod linear;
mod memory;
mod norm;
mod numbers;
mod packed;
mod simd;
mod winograd;

use candle_core::{CpuStorage, DType, Device, Result, Storage, StorageRef, Tensor, bail};

pub(crate) use activation::Activation;
pub(crate) use attention::{Attention, attention, self_attention};
pub(crate) use combine::{combine, extrapolate};
pub(crate) use conv::{Conv2d, Geometry};
#[cfg(feature = "cuda")]
pub(crate) use cuda::{
    free_bytes as free_device_bytes, images as device_kernels, name as device_name,
    open as open_cuda, work as device_work,
};
pub(crate) use joined::Joined;
pub(crate) use layout::{channels_first, channels_last};
pub(crate) use linear::{Geglu, Linear};
pub use memory::{keep_freed_memory, return_freed_memory};
pub(crate) use norm::{GroupNorm, LayerNorm};
pub(crate) use numbers::{Numbers, Weight};
pub use simd::instructions;
pub(crate) use simd::knows_bf16;

/// Without the feature `cuda` there is no such device; candle says so.
#[cfg(not(feature = "cuda"))]
pub(crate) fn open_cuda(number: usize) -> Result<Device> {
    Device::new_cuda(number)
}

/// What is only known of GPUs.
#[cfg(not(feature = "cuda"))]
mod no_gpu {
    use candle_core::Device;

    pub(crate) fn free_device_bytes(_: &Device) -> Option<u64> {
        None
    }

    pub(crate) fn device_name(_: &Device) -> Option<String> {
        None
    }

    pub(crate) fn device_kernels(_: &Device) -> Option<String> {
        None
    }

    pub(crate) fn device_work() -> Vec<(&'static str, crate::device::Work)> {
        Vec::new()
    }
}

#[cfg(not(feature = "cuda"))]
pub(crate) use no_gpu::{device_kernels, device_name, device_work, free_device_bytes};

/// A contiguous f32 tensor in host memory, held while its data is read.
struct Host<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl Host<'_> {
    fn data(&self) -> Result<&[f32]> {
        Ok(&floats(&self.storage)?[self.start..self.start + self.len])
    }
}

fn floats(storage: &Storage) -> Result<&[f32]> {
    match storage {
        Storage::Cpu(CpuStorage::F32(floats)) => Ok(floats),
        _ => bail!("a kernel of the CPU was given a tensor that is not f32 in host memory"),
    }
}

/// All elements of a contiguous tensor.
fn host(tensor: &Tensor) -> Result<Host<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(Host { storage, start, len: end - start }),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

/// Runs a network on a thread of the pool. A parallel loop that begins outside of the pool puts its
/// thread to sleep until it is done, and a step has some 200 of them. A network takes no lock that
/// somebody could hold who waits for the pool. (On other devices there is nothing to gain.)
pub(crate) fn in_pool<T: Send>(device: &Device, network: impl FnOnce() -> T + Send) -> T {
    if device.is_cpu() { rayon::scope(|_| network()) } else { network() }
}

fn on_cpu(tensor: &Tensor) -> bool {
    matches!(tensor.device(), Device::Cpu)
}

/// Parameters as plain f32 in host memory.
fn to_host(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn a_network_of_the_cpu_runs_inside_of_the_pool() {
        let thread = || rayon::current_thread_index();
        assert_eq!(thread(), None);
        assert!(in_pool(&Device::Cpu, thread).is_some());
    }

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
        let all =
            |x: &Tensor| [group.forward(x), layer.forward(x), linear.forward(x), conv.forward(x)];
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
            let refused = [group.forward(&x), layer.forward(&x), linear.forward(&x)];
            assert!(refused.iter().all(Result::is_err), "{channels} channels for 32");
        }
        let kernel = tensor(&[4, 15], 1);
        assert!(Conv2d::new(&kernel, &bias, Geometry::SAME, cpu, DType::F32).is_err());
        let kind = Attention { heads: 2, causal: false, tiles: false };
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
}
