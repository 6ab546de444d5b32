//! Memory as the kernels want it: kept by the allocator, in large pages.

/// Tells the allocator to keep what is freed. A step allocates and frees the same few hundred
/// megabytes of activations in blocks that glibc would otherwise return to the kernel one by one,
/// and fault in again page by page.
///
/// On other systems it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// From `malloc.h`.
        const M_TRIM_THRESHOLD: i32 = -1;
        const M_MMAP_THRESHOLD: i32 = -3;
        const M_ARENA_MAX: i32 = -8;
        const ONE_GIB: i32 = 1 << 30;
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        // SAFETY: mallopt only sets parameters of the allocator and takes its own lock.
        unsafe {
            // Before 2.35 glibc takes no more than half of a heap.
            if mallopt(M_MMAP_THRESHOLD, ONE_GIB) == 0 {
                mallopt(M_MMAP_THRESHOLD, 32 << 20);
            }
            mallopt(M_TRIM_THRESHOLD, i32::MAX);
            // Arenas of other threads are made of heaps of 64 MiB, which they return.
            mallopt(M_ARENA_MAX, 1);
        }
    }
}

/// Gives back to the kernel what [`keep_freed_memory`] has kept, and to GPUs what was loaded for
/// models that are no more: after a model has gone, and before it is measured how much there is
/// for the next.
///
/// On other systems than Linux the host's memory stays as it is.
pub fn return_freed_memory() {
    #[cfg(feature = "cuda")]
    super::cuda::forget_closed();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(keep: usize) -> i32;
        }
        // SAFETY: malloc_trim only touches memory that is not allocated, and takes the
        // allocator's own lock.
        unsafe { malloc_trim(0) };
    }
}

/// Asks for pages of 2 MiB under a large block that is about to be written for the first time:
/// the weights of a model are a million small pages, each a fault at load and an entry that
/// address translation must find at every step; activations and scratch of large pictures on small
/// pages cost a sixth of a step, where chance has them so. Pages at both ends are shared with what
/// lies beside the block: one block follows another, and small ones stay as they are.
pub(super) fn prefer_huge_pages<T>(block: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        /// From `sys/mman.h`.
        const MADV_HUGEPAGE: i32 = 14;
        const HUGE: usize = 2 << 20;
        unsafe extern "C" {
            fn madvise(address: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
        }
        let range = block.as_mut_ptr_range();
        let start = range.start as usize / HUGE * HUGE;
        let end = (range.end as usize).next_multiple_of(HUGE);
        if size_of_val(block) >= HUGE {
            // SAFETY: this advice changes no contents, neither of the block nor of its neighbours.
            // An error means that the pages stay small.
            unsafe { madvise(start as *mut std::ffi::c_void, end - start, MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = block;
}

#[cfg(test)]
mod tests {
    #[test]
    fn allocation_works_after_the_call() {
        super::keep_freed_memory();
        for _ in 0..3 {
            let block = vec![1u8; 64 << 20];
            assert_eq!(block[block.len() - 1], 1);
        }
        let mut block = vec![7u8; 8 << 20];
        super::prefer_huge_pages(&mut block);
        assert!(block.iter().all(|b| *b == 7));
    }

    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn what_is_freed_goes_back_when_asked() {
        let resident = || -> usize {
            let text = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
            text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number")
        };
        super::keep_freed_memory();
        let blocks: Vec<_> = (0..64).map(|_| vec![1u8; 4 << 20]).collect();
        assert!(blocks.iter().all(|block| block[4 << 10] == 1));
        let full = resident();
        drop(blocks);
        super::return_freed_memory();
        let pages_of_half = (128 << 20) / 4096;
        assert!(resident() + pages_of_half < full, "{} of {full} pages left", resident());
    }
}
