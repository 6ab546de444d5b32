//! Kernels of CUDA devices: `*.cu` in this folder, compiled by `build.rs`.
//!
//! Every function returns `None` where there is no kernel for a device, type or shape, and the
//! operation is composed from candle's. There are kernels for compute capability 7.5 and later: in
//! f16, from 8.0 on in bf16, and norms in f32 too. Every launch is asynchronous, on the one stream
//! of its device.

mod attention;
mod combine;
mod device;
mod images;
mod launch;
mod layout;
mod memory;
mod norm;
mod product;
#[cfg(test)]
mod tests;

pub(super) use attention::attention;
pub(super) use combine::{lerp, linear_combination};
pub(super) use device::unload_closed;
pub(crate) use device::{free_bytes, loaded_images, name, open};
pub(crate) use images::stats;
pub(super) use layout::{channels_first, channels_last};
pub(super) use norm::{group_norm, layer_norm};
pub(super) use product::CudaFilter;
