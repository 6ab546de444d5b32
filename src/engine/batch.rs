//! Selects the images of the next UNet call. Only images of one size can share it, so the sizes
//! take turns by deficit round robin (Shreedhar and Varghese 1995): each gets the same share of the
//! device, whatever its size. Arithmetic only, without a model.

use std::collections::VecDeque;

use sd_models::Size;

/// The order of the sizes.
#[derive(Debug, Default)]
pub(super) struct DeficitRoundRobin {
    buckets: VecDeque<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    size: Size,
    /// Work that this size may do before the next size's turn, in pixels times rows.
    credit: usize,
}

impl DeficitRoundRobin {
    /// The size of the next UNet call, given the number of rows that each size would have in it.
    /// `None` if there are no rows.
    pub(super) fn next(&mut self, loads: &[(Size, usize)]) -> Option<Size> {
        let cost = |size: Size| {
            loads.iter().find(|load| load.0 == size).map(|load| size.pixels() * load.1)
        };
        self.buckets.retain(|bucket| cost(bucket.size).is_some());
        for &(size, _) in loads {
            if self.buckets.iter().all(|bucket| bucket.size != size) {
                self.buckets.push_back(Bucket { size, credit: 0 });
            }
        }
        // With the largest cost as quantum, every size can run once per round, so this loop ends.
        let quantum = loads.iter().map(|(size, rows)| size.pixels() * rows).max()?;
        loop {
            let bucket = self.buckets.front_mut()?;
            let cost = cost(bucket.size)?;
            if bucket.credit >= cost {
                bucket.credit -= cost;
                return Some(bucket.size);
            }
            bucket.credit += quantum;
            self.buckets.rotate_left(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn square(side: usize) -> Size {
        Size::new(side, side).expect("a multiple of eight")
    }

    #[test]
    fn sizes_share_the_device_by_work() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [(square(64), 2), (square(128), 2)];
        let turns: Vec<_> = (0..500).filter_map(|_| rotation.next(&loads)).collect();
        let large = turns.iter().filter(|size| **size == square(128)).count();
        assert_eq!(turns.len(), 500);
        assert_eq!(large, 100, "one step of four times the pixels for four small ones");
    }

    #[test]
    fn no_size_waits_longer_than_a_round() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [(square(64), 8), (square(512), 2), (square(8), 1)];
        let mut since = [0_usize; 3];
        for _ in 0..10_000 {
            let size = rotation.next(&loads).expect("there is work");
            for (load, idle) in loads.iter().zip(&mut since) {
                *idle = if load.0 == size { 0 } else { *idle + 1 };
            }
            // 512² x 2 is 8192 times 8² x 1: so many small steps make one large one.
            assert!(since[1] <= 8192 + 17 + 1, "{since:?}");
            assert!(since[2] <= 17 + 1, "{since:?}");
        }
    }

    #[test]
    fn a_size_that_left_has_no_credit() {
        let mut rotation = DeficitRoundRobin::default();
        assert_eq!(rotation.next(&[(square(8), 1)]), Some(square(8)));
        assert_eq!(rotation.next(&[]), None);
        assert!(rotation.buckets.is_empty());
    }
}
