//! `sd-server bench`: load on a running server, or a device compared with the CPU.

pub(crate) mod device;
pub(crate) mod load;
