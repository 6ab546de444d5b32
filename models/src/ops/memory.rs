//! The allocator's manners on Linux with glibc.

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
        const ONE_GIB: i32 = 1 << 30;
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        // SAFETY: mallopt only sets parameters of the allocator and takes its own lock.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, ONE_GIB);
            mallopt(M_TRIM_THRESHOLD, i32::MAX);
        }
    }
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
    }
}
