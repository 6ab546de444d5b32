//! Threads and memory of the process while networks run.

use candle_core::Device;

use super::tiling::{is_tiling, tiling};
use super::{cpu, cuda};

/// Runs a network on a worker thread of rayon's pool. A parallel loop that begins outside of the
/// pool blocks its thread until it is done, and a step has some 200 of them. A network takes no
/// lock that a thread may hold while it waits for the pool. (On other devices there is nothing to
/// gain.)
pub(crate) fn in_pool<T: Send>(device: &Device, network: impl FnOnce() -> T + Send) -> T {
    let is_tiling = is_tiling();
    if device.is_cpu() { rayon::scope(|_| tiling(is_tiling, network)) } else { network() }
}

/// The UUIDs of all GPUs in CUDA's order, as NVIDIA's management library writes them; none without
/// CUDA.
pub fn cuda_uuids() -> Vec<String> {
    cuda::uuids()
}

/// Returns to the kernel what [`keep_freed_memory`](super::keep_freed_memory) has kept.
///
/// On other systems than Linux with glibc host memory stays as it is.
pub fn return_host_memory() {
    cpu::trim_heap();
}

/// Returns the host's freed memory and that of GPUs, for which it waits: after a model has been
/// dropped, before the room for the next one is measured, and when nothing is drawn.
pub fn return_freed_memory() {
    cuda::return_memory();
    return_host_memory();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_the_cpu_runs_inside_of_the_pool() {
        let thread = || rayon::current_thread_index();
        assert_eq!(thread(), None);
        assert!(in_pool(&Device::Cpu, thread).is_some());
    }

    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn freed_memory_is_returned_on_request() {
        let resident = || -> usize {
            let text = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
            text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number")
        };
        cpu::keep_freed_memory();
        let blocks: Vec<_> = (0..64).map(|_| vec![1u8; 4 << 20]).collect();
        assert!(blocks.iter().all(|block| block[4 << 10] == 1));
        let full = resident();
        drop(blocks);
        return_freed_memory();
        let pages_of_half = (128 << 20) / 4096;
        assert!(resident() + pages_of_half < full, "{} of {full} pages left", resident());
    }
}
