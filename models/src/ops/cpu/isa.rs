//! What the processor can do, as far as the choice of a type and the log are concerned.

use super::amx::{AmxStatus, has_amx, status};
use super::simd::Isa;

/// Whether bf16 is faster than f32: on AMX's tiles. The bf16 dot products of AVX-512 are not used,
/// and without them bf16 weights are slower, and less exact.
pub(crate) fn has_bf16() -> bool {
    has_amx()
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
