//! Kernels of CUDA devices: `*.cu` in this folder, compiled by `build.rs`.
//!
//! Every function returns `None` where there is no kernel for a device, type or shape, and the
//! operation is composed from candle's. There are kernels for compute capability 7.5 and later: in
//! f16, from 8.0 on in bf16, and norms in f32 too. Every launch is asynchronous, on the one stream
//! of its device.

mod attention;
mod combine;
mod device;
mod driver;
mod elements;
mod fault;
mod images;
mod launch;
mod layout;
mod memory;
mod norm;
mod pool;
mod product;
mod steps;
#[cfg(test)]
mod tests;

pub(super) use attention::attention;
pub(super) use combine::{lerp, linear_combination};
pub(super) use device::return_memory;
pub(crate) use device::{free_bytes, loaded_images, name, open, pool_bytes, uuids};
pub(super) use elements::{cat_rows, convert, embed, scaled_sum};
pub(crate) use fault::device_fault;
pub(crate) use images::stats;
pub(super) use layout::{channels_first, channels_last};
pub(super) use norm::{group_norm, layer_norm};
pub(super) use product::CudaFilter;
pub(crate) use steps::{begin_step, end_step};
