//! The host that the process runs on: its memory, its GPUs and its CUDA driver.

pub mod cuda_compat;
pub(crate) mod freed;
pub(crate) mod gpu;
pub(crate) mod memory;
