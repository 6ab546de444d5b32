//! The driver's version, and whether it can read this build's PTX.

use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{Result, bail};

use super::images::LAYOUT;

/// Versions of PTX, and those of CUDA (12040 for 12.4) whose drivers are the first to read them.
const READ_SINCE: [((u32, u32), i32); 12] = [
    ((7, 8), 11080),
    ((8, 0), 12000),
    ((8, 1), 12010),
    ((8, 2), 12020),
    ((8, 3), 12030),
    ((8, 4), 12040),
    ((8, 5), 12050),
    ((8, 6), 12070),
    ((8, 7), 12080),
    ((8, 8), 12090),
    ((9, 0), 13000),
    ((9, 1), 13010),
];

/// The version of CUDA that the driver is for.
fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the driver writes a number.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().w()?;
    Ok(version)
}

/// "the driver for CUDA 12.4", or without a number if there is none.
pub(super) fn name() -> String {
    version().map_or("the driver".into(), |version| format!("the driver for {}", cuda(version)))
}

fn cuda(version: i32) -> String {
    format!("CUDA {}.{}", version / 1000, version % 1000 / 10)
}

/// The version that a PTX file names.
fn ptx_version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once(".version")?;
    let (major, minor) = rest.split_whitespace().next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Fails if the driver is older than this build's PTX, which is as new as the toolkit that it is
/// of. candle's kernels are PTX alone, so machine code of our own does not help.
pub(super) fn check() -> Result<()> {
    let Some(ptx) = LAYOUT.ptx.first().and_then(|(_, text)| ptx_version(text)) else {
        return Ok(());
    };
    let needed = READ_SINCE.iter().find(|(version, _)| *version == ptx);
    match (needed, version()) {
        (Some((_, needed)), Ok(driver)) if driver < *needed => {
            let (needed, driver) = (cuda(*needed), cuda(driver));
            bail!(
                "the driver is for {driver}, and this build's kernels are PTX {}.{}: it needs a \
                 driver for {needed} or later, or a build with the toolkit of {driver}",
                ptx.0,
                ptx.1
            )
        }
        // A driver that has no version tells why when it is used.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(ptx_version("//\n.version 8.4\n.target sm_75\n"), Some((8, 4)));
        assert_eq!(ptx_version("no PTX"), None);
        assert_eq!(cuda(12040), "CUDA 12.4");
        let ours = ptx_version(LAYOUT.ptx[0].1).expect("nvcc writes it");
        assert!(READ_SINCE.iter().any(|(version, _)| *version == ours), "{ours:?}");
    }
}
