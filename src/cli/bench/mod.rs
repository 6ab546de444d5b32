//! `sd-server bench`: load tests of a running server, or verification of a device.

pub(crate) mod device;
pub(crate) mod load;
