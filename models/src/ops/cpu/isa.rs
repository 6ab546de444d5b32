//! What the processor can do, as far as the choice of a type and the log are concerned.

use super::amx::{AmxStatus, has_amx, status};
use super::simd::Isa;

/// Whether the processor was made to compute in bf16.
pub(crate) fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    let avx512_bf16 = is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let avx512_bf16 = false;
    has_amx() || avx512_bf16
}

/// The instruction sets that the CPU kernels use, and a warning if AMX is present but not used.
pub fn cpu_isa() -> (&'static str, Option<&'static str>) {
    let vectors = Isa::detect().name();
    match status() {
        AmxStatus::Unsupported => (vectors, None),
        AmxStatus::Usable => ("AVX-512, AMX", None),
        AmxStatus::NotPermitted => (vectors, Some("AMX not used: the kernel does not permit it")),
        AmxStatus::SelfTestFailed => (vectors, Some("AMX not used: its self-test failed")),
    }
}
