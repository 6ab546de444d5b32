//! Memory of the kernels: aligned to cache lines, scratch reused by its thread, outputs that are
//! written without being cleared first.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

use half::bf16;
use rayon::prelude::*;

use super::memory::prefer_huge_pages;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Numbers aligned to a cache line.
pub(super) struct Aligned<T = f32> {
    numbers: Vec<T>,
    first: usize,
    len: usize,
}

thread_local! {
    /// Free scratch of this thread, the largest last.
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Maximum number of scratch buffers that a thread uses at a time: attention by AMX has its
/// queries, scores, weights, sums and results.
const MAX_KEPT: usize = 5;

/// [`Aligned`] floats of undefined value (those of the thread's last use): the scratch of a task is
/// as large as its work, so clearing it would take as long as writing it.
pub(super) struct Scratch(Aligned);

impl Scratch {
    pub(super) fn new(len: usize) -> Self {
        let room = len + Aligned::<f32>::PER_LINE;
        let kept = KEPT.with_borrow_mut(|kept| {
            let fits = kept.iter().position(|floats| floats.len() >= room);
            fits.map(|at| kept.remove(at)).or_else(|| kept.pop())
        });
        // Where none fits the largest is freed before a larger one replaces it.
        let floats = kept.filter(|floats| floats.len() >= room).unwrap_or_else(|| {
            let mut floats = Vec::with_capacity(room);
            prefer_huge_pages(floats.spare_capacity_mut());
            floats.resize(room, 0.0);
            floats
        });
        Self(Aligned::within(floats, len))
    }
}

impl Scratch {
    /// The same memory as twice as many bf16.
    pub(super) fn halves(&mut self) -> &mut [bf16] {
        let floats = &mut **self;
        let len = 2 * floats.len();
        // SAFETY: the memory is borrowed as a whole, and all bit patterns are valid in both types.
        unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), len) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let floats = std::mem::take(&mut self.0.numbers);
        // While the thread ends its thread-local values may be gone.
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            let at = kept.partition_point(|other| other.len() < floats.len());
            kept.insert(at, floats);
            if kept.len() > MAX_KEPT {
                kept.remove(0);
            }
        });
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.0.as_slice()
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.0.as_mut_slice()
    }
}

impl<T: Copy + Default> Aligned<T> {
    /// Numbers in a cache line.
    const PER_LINE: usize = LINE / size_of::<T>();

    pub(super) fn zeros(len: usize) -> Self {
        Self::within(vec![T::default(); len + Self::PER_LINE], len)
    }

    fn within(numbers: Vec<T>, len: usize) -> Self {
        Self { first: Self::first(numbers.as_ptr()), numbers, len }
    }

    /// Elements from `start` to the next cache line.
    fn first(start: *const T) -> usize {
        start.align_offset(LINE).min(Self::PER_LINE)
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.numbers[self.first..self.first + self.len]
    }
}

impl<T: Copy + Default + Send> Aligned<T> {
    /// On huge pages, filled by many threads: `write` gets the index of each chunk and the chunk.
    ///
    /// # Safety
    /// `write` writes all of each chunk.
    pub(super) unsafe fn fill(
        len: usize,
        chunk: usize,
        write: impl Fn(usize, &mut [MaybeUninit<T>]) + Sync,
    ) -> Self {
        let mut numbers: Vec<T> = Vec::with_capacity(len + Self::PER_LINE);
        let first = Self::first(numbers.as_ptr());
        numbers.resize(first, T::default());
        let room = &mut numbers.spare_capacity_mut()[..len];
        prefer_huge_pages(room);
        let chunk = chunk.max(1);
        // The loading thread is not of the pool and would block once per call on its only thread.
        let alone = rayon::current_num_threads() == 1;
        let least = if alone { usize::MAX } else { FEWEST_PACKED.div_ceil(chunk) };
        let chunks = room.par_chunks_mut(chunk).enumerate().with_min_len(least);
        chunks.for_each(|(i, chunk)| write(i, chunk));
        // SAFETY: the chunks cover the room, and the caller has written all of each.
        unsafe { numbers.set_len(first + len) };
        Self { numbers, first, len }
    }
}

impl<T> Aligned<T> {
    pub(super) fn as_slice(&self) -> &[T] {
        &self.numbers[self.first..self.first + self.len]
    }
}

/// An output that several threads write at once, each a part of its own.
#[derive(Clone, Copy)]
pub(super) struct SharedOutput {
    start: *mut MaybeUninit<f32>,
    len: usize,
}
// SAFETY: parts are handed out by the unsafe `slice`, whose callers own them.
unsafe impl Send for SharedOutput {}
// SAFETY: as above.
unsafe impl Sync for SharedOutput {}

/// A vector that `write` fills through the [`SharedOutput`] it is given, without being cleared
/// first.
///
/// # Safety
/// `write` writes every element.
pub(super) unsafe fn fill(len: usize, write: impl FnOnce(SharedOutput)) -> Vec<f32> {
    let mut out: Vec<f32> = Vec::with_capacity(len);
    let room = &mut out.spare_capacity_mut()[..len];
    prefer_huge_pages(room);
    write(SharedOutput { start: room.as_mut_ptr(), len });
    // SAFETY: the capacity is `len` or more, and the caller has written all of it.
    unsafe { out.set_len(len) };
    out
}

/// Fewest numbers that are worth a second thread.
pub(super) const FEWEST: usize = 16 << 10;
/// The same of weights, which are packed while other networks run.
const FEWEST_PACKED: usize = 128 << 10;

/// As [`fill`], by many threads: `write` gets the index of each chunk and the chunk.
///
/// # Safety
/// `write` writes all of each chunk.
pub(super) unsafe fn fill_chunks(
    len: usize,
    chunk: usize,
    write: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync,
) -> Vec<f32> {
    let part = |out: SharedOutput, i: usize| {
        // SAFETY: no two chunks overlap.
        write(i, unsafe { out.slice(i * chunk, chunk.min(len - i * chunk)) });
    };
    let chunks = (0..len.div_ceil(chunk)).into_par_iter().with_min_len(FEWEST.div_ceil(chunk));
    let all = |out| chunks.for_each(|i| part(out, i));
    // SAFETY: the chunks cover the vector, and the caller writes all of each.
    unsafe { fill(len, all) }
}

impl SharedOutput {
    /// # Safety
    /// No other thread touches these elements while the slice lives.
    pub(super) unsafe fn slice<'a>(self, first: usize, len: usize) -> &'a mut [MaybeUninit<f32>] {
        assert!(first + len <= self.len, "output part");
        // SAFETY: the part lies inside the output, and the caller owns it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_written_in_its_place() {
        for (len, chunk) in [(0, 4), (1, 4), (8, 4), (1003, 16)] {
            let write = |i: usize, part: &mut [MaybeUninit<f32>]| {
                for (value, at) in part.iter_mut().zip(i * chunk..) {
                    value.write(at as f32);
                }
            };
            // SAFETY: all of each part is written.
            let all = unsafe { fill_chunks(len, chunk, write) };
            assert_eq!(all, (0..len).map(|i| i as f32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn scratch_is_aligned_and_reused() {
        let mut first = Scratch::new(1000);
        first.fill(1.0);
        let place = first.as_ptr();
        assert_eq!((first.len(), place.align_offset(64)), (1000, 0));
        let second = Scratch::new(1000);
        assert_ne!(second.as_ptr(), place, "two at a time do not share");
        drop((first, second));
        // No free buffer is large enough for this one.
        let larger = Scratch::new(5000);
        assert_eq!((larger.len(), larger.as_ptr().align_offset(64)), (5000, 0));
        let many: Vec<_> = (1..=2 * MAX_KEPT).map(|i| Scratch::new(100 * i)).collect();
        drop((larger, many));
        KEPT.with_borrow(|kept| {
            let sizes: Vec<_> = kept.iter().map(Vec::len).collect();
            assert!(kept.len() == MAX_KEPT && sizes.is_sorted(), "{sizes:?}");
        });
        for _ in 0..10 {
            let smaller = Scratch::new(10);
            assert_eq!((smaller.len(), smaller.as_ptr().align_offset(64)), (10, 0));
        }
    }
}
