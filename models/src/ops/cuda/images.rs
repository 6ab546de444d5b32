//! The files of kernels as `build.rs` compiled them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Result;
use candle_core::cuda::WrapErr as _;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaModule};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use crate::ops::types::KernelStats;

/// A file of kernels and its statistics. Compute capability 7.5 is written as 75.
pub(super) struct KernelFile {
    pub(super) name: &'static str,
    /// PTX, which the driver compiles for this capability and every later one; ascending.
    pub(super) ptx: &'static [(i32, &'static str)],
    /// Cubins, for one capability and later ones of the same major version; ascending.
    cubins: &'static [(i32, &'static [u8])],
    launches: AtomicU64,
    flops: AtomicU64,
    bytes: AtomicU64,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

impl KernelFile {
    pub(super) const fn new(
        name: &'static str,
        ptx: &'static [(i32, &'static str)],
        cubins: &'static [(i32, &'static [u8])],
    ) -> Self {
        let [launches, flops, bytes] = [const { AtomicU64::new(0) }; 3];
        Self { name, ptx, cubins, launches, flops, bytes }
    }

    /// The images for a device of this capability, the best first.
    pub(super) fn images(&self, capability: i32) -> impl Iterator<Item = ModuleImage> {
        let same = |of: i32| of / 10 == capability / 10 && of <= capability;
        let cubin = self.cubins.iter().rev().find(|(of, _)| same(*of));
        let ptx = self.ptx.iter().rev().find(|(of, _)| *of <= capability);
        let cubin = cubin.map(|(of, code)| ModuleImage::Cubin(*of, code));
        cubin.into_iter().chain(ptx.map(|(of, text)| ModuleImage::Ptx(*of, text)))
    }

    pub(super) fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the work of an operation.
    pub(super) fn count(&self, flops: u64, bytes: u64) {
        self.flops.fetch_add(flops, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What was launched since the program began, by file of kernels. Benchmarks, which run alone, read
/// it.
pub(crate) fn stats() -> Vec<(&'static str, KernelStats)> {
    let read = |file: &KernelFile| {
        let [launches, flops, bytes] =
            [&file.launches, &file.flops, &file.bytes].map(|count| count.load(Ordering::Relaxed));
        (file.name, KernelStats { launches, flops, bytes })
    };
    KERNEL_FILES.iter().map(|file| read(file)).collect()
}

/// A file of kernels as the driver loads it, and its capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ModuleImage {
    Cubin(i32, &'static [u8]),
    Ptx(i32, &'static str),
}

impl ModuleImage {
    pub(super) fn load(self, context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
        let image = match self {
            Self::Cubin(_, code) => Ptx::from_binary(code.to_vec()),
            Self::Ptx(_, text) => Ptx::from_src(text),
        };
        context.load_module(image).w()
    }

    /// As the log names it.
    pub(super) fn name(self) -> String {
        let (kind, of) = match self {
            Self::Cubin(of, _) => ("cubin", of),
            Self::Ptx(of, _) => ("PTX", of),
        };
        format!("{kind} {}.{}", of / 10, of % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static FAT: KernelFile = KernelFile::new(
        "fat",
        &[(75, "old"), (80, "new")],
        &[(75, b"75"), (80, b"80"), (86, b"86"), (89, b"89"), (90, b"90")],
    );

    #[test]
    fn a_device_gets_the_cubin_of_its_kind_and_ptx_after_it() {
        let images = |file: &KernelFile, capability| -> Vec<_> {
            file.images(capability).map(ModuleImage::name).collect()
        };
        for (capability, expected) in [
            (75, ["cubin 7.5", "PTX 7.5"]),
            (80, ["cubin 8.0", "PTX 8.0"]),
            (86, ["cubin 8.6", "PTX 8.0"]),
            (87, ["cubin 8.6", "PTX 8.0"]),
            (89, ["cubin 8.9", "PTX 8.0"]),
            (90, ["cubin 9.0", "PTX 8.0"]),
        ] {
            assert_eq!(images(&FAT, capability), expected, "{capability}");
        }
        // A cubin of another major version never runs.
        assert_eq!(images(&FAT, 120), ["PTX 8.0"]);
        assert!(images(&FAT, 70).is_empty());
        let lean = KernelFile::new("lean", FAT.ptx, &[(86, b"86")]);
        assert_eq!(images(&lean, 80), ["PTX 8.0"]);
        assert_eq!(images(&lean, 75), ["PTX 7.5"]);
    }

    #[test]
    fn every_cubin_is_for_the_capability_that_it_is_said_to_be() {
        for file in KERNEL_FILES {
            assert!(file.cubins.is_sorted_by_key(|(of, _)| of), "{}", file.name);
            for (of, code) in file.cubins {
                assert_eq!(&code[..4], b"\x7fELF", "{}", file.name);
                // EM_CUDA; nvcc 13 (ABI 8) keeps the capability one byte further up than nvcc 12.
                assert_eq!(code[18..20], 190_u16.to_le_bytes(), "{}", file.name);
                let place = if code[8] >= 8 { 49 } else { 48 };
                assert_eq!(i32::from(code[place]), *of, "{}", file.name);
            }
        }
    }
}
