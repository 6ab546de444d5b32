//! The operations of the networks: types and functions that choose between the kernels of the CPU
//! ([`cpu`]), those of CUDA devices ([`cuda`]) and compositions of candle's operations
//! ([`reference`]), which are the fallback for other devices and the oracle of the tests.
//!
//! Activations are channels-last and contiguous throughout: images are (B, H, W, C), tokens
//! (B, L, C). On the CPU they are f32; on other devices they have the network's type, and norms and
//! softmax accumulate in f32.

#![expect(unsafe_code, reason = "vector instructions, disjoint writes, kernel launches")]

mod attention;
mod concat;
mod conv;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
mod elements;
mod filter;
mod gated;
mod host_copy;
mod latents;
mod linear;
mod norm;
mod reference;
mod runtime;
#[cfg(test)]
pub(crate) mod tests;
mod tiling;
mod types;

pub(crate) use attention::{attention, self_attention};
pub(crate) use concat::ChannelConcat;
pub(crate) use conv::Conv2d;
pub(crate) use cpu::{TensorData, Weight, has_bf16};
pub use cpu::{cpu_isa, keep_freed_memory};
pub(crate) use cuda::{
    begin_step, device_fault, end_step, free_bytes as free_device_bytes,
    loaded_images as device_kernels, name as device_name, open as open_cuda,
    pool_bytes as device_pool_bytes, stats as device_stats,
};
pub(crate) use elements::{add, add_silu, cast, cat_rows, embed, scale};
pub(crate) use host_copy::on_host;
pub(crate) use latents::{channels_first, channels_last, lerp, linear_combination};
pub(crate) use linear::Linear;
pub(crate) use norm::{GroupNorm, LayerNorm};
pub(crate) use runtime::in_pool;
pub use runtime::{cuda_uuids, return_freed_memory, return_host_memory};
pub(crate) use tiling::tiling;
pub use types::KernelStats;
pub(crate) use types::{Activation, Attention, DeviceFault, Epilogue, Geometry};
