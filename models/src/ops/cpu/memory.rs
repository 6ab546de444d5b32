//! What the kernels want of the allocator and of the operating system: freed memory is kept, and
//! large blocks are on huge pages.

/// Makes glibc keep freed memory, for the whole process. A step allocates and frees the same few
/// hundred megabytes of activations in blocks that glibc would otherwise return to the kernel one
/// by one, and fault in again page by page. Call it before other threads are started: the arenas
/// that they have already stay.
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

/// Returns to the kernel what [`keep_freed_memory`] has kept. On other systems it does nothing.
pub(in crate::ops) fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(keep: usize) -> i32;
        }
        // SAFETY: malloc_trim only touches memory that is not allocated, and takes the allocator's
        // own lock.
        unsafe { malloc_trim(0) };
    }
}

/// Asks for huge pages (2 MiB) under a large block that is about to be written for the first time.
/// The weights of a model are a million small pages, each a fault at load and TLB misses at every
/// step; activations and scratch of large images on small pages make a step up to a sixth slower.
/// The pages at both ends are shared with the neighbouring allocations. Blocks below 2 MiB stay on
/// small pages.
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
            // SAFETY: the advice changes no contents, neither of the block nor of its neighbours.
            // On an error the pages stay small.
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
}
