//! Kernels of the CPU: activations are f32 in host memory, weights f32 or bf16 in packed panels.

mod activation;
mod amx;
mod amx_gemm;
mod attention;
mod bf16;
mod buffers;
mod epilogue;
mod filter;
mod gemm;
mod host;
mod im2col;
mod isa;
mod memory;
mod norm;
mod packed;
mod product;
mod simd;
mod tensor_data;
mod tile;
mod transpose;
mod vectors;
mod winograd;

pub(super) use attention::attention;
pub(super) use filter::PackedFilter;
pub(super) use host::to_host;
pub use isa::cpu_isa;
pub(crate) use isa::has_bf16;
pub use memory::keep_freed_memory;
pub(super) use memory::trim_heap;
pub(super) use norm::{group_norm, layer_norm};
pub(crate) use tensor_data::{TensorData, Weight};

/// Keys of a block of attention.
#[cfg(test)]
pub(super) const KEY_BLOCK: usize = attention::BLOCK;
