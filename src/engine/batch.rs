//! Selects the images of the next UNet call. Only images of one size can share it, so the sizes
//! take turns by deficit round robin (Shreedhar and Varghese 1995). Each client has the same share
//! of the device, divided between the sizes of its images: many sizes do not get it more time, and
//! neither do large ones. Arithmetic only, without a model.

use std::collections::{HashMap, HashSet, VecDeque};

use sd_models::Size;

use super::client::Client;

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

/// The images of one size that could share the next UNet call.
#[derive(Debug, Clone)]
pub(super) struct BucketLoad {
    pub(super) size: Size,
    pub(super) rows: usize,
    /// The clients of the images, in any order.
    pub(super) clients: Vec<Client>,
}

impl BucketLoad {
    fn cost(&self) -> usize {
        self.size.pixels() * self.rows
    }
}

/// A client's share of a round; it is divided by the number of its sizes.
const SHARE: usize = 1 << 10;

/// The shares of all clients in each size.
fn weights(loads: &[BucketLoad]) -> HashMap<Size, usize> {
    let mut sizes: HashMap<&Client, HashSet<Size>> = HashMap::new();
    for load in loads {
        for client in &load.clients {
            sizes.entry(client).or_default().insert(load.size);
        }
    }
    let mut weights = HashMap::new();
    for sizes in sizes.into_values() {
        let share = SHARE / sizes.len();
        sizes.iter().for_each(|size| *weights.entry(*size).or_default() += share);
    }
    weights
}

impl DeficitRoundRobin {
    /// The size of the next UNet call. `None` if there are no images.
    pub(super) fn next(&mut self, loads: &[BucketLoad]) -> Option<Size> {
        let load = |size: Size| loads.iter().find(|load| load.size == size);
        self.buckets.retain(|bucket| load(bucket.size).is_some());
        for load in loads {
            if self.buckets.iter().all(|bucket| bucket.size != load.size) {
                self.buckets.push_back(Bucket { size: load.size, credit: 0 });
            }
        }
        // With the largest cost as quantum of the largest weight, one size can run in each round,
        // and every credit grows, so this loop ends.
        let quantum = loads.iter().map(BucketLoad::cost).max()?;
        let weights = weights(loads);
        let largest = weights.values().copied().max()?;
        loop {
            let bucket = self.buckets.front_mut()?;
            let cost = load(bucket.size)?.cost();
            if bucket.credit >= cost {
                bucket.credit -= cost;
                return Some(bucket.size);
            }
            let weight = weights.get(&bucket.size).copied().unwrap_or(1).max(1);
            bucket.credit += (quantum * weight).div_ceil(largest);
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

    /// The images of these clients, one row each unless there are more rows.
    fn load(side: usize, rows: usize, clients: &[&str]) -> BucketLoad {
        let clients = clients.iter().copied().map(Client::named).collect();
        BucketLoad { size: square(side), rows, clients }
    }

    #[test]
    fn a_client_with_many_sizes_has_one_share() {
        let mut rotation = DeficitRoundRobin::default();
        let odd = [56, 72, 80, 88].map(|side| load(side, 2, &["many"]));
        let loads = [&odd[..], &[load(64, 2, &["one"])]].concat();
        let mut work = [0, 0];
        for _ in 0..2000 {
            let size = rotation.next(&loads).expect("there is work");
            work[usize::from(size == square(64))] += size.pixels();
        }
        assert!(work[0].abs_diff(work[1]) * 20 < work[0] + work[1], "{work:?}");
    }

    #[test]
    fn a_size_of_several_clients_has_their_shares() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [load(64, 4, &["a", "b", "c", "c"]), load(128, 1, &["d"])];
        let turns = (0..1000).filter_map(|_| rotation.next(&loads));
        let shared = turns.filter(|size| *size == square(64)).count();
        assert_eq!(shared, 750, "the calls cost the same");
    }

    #[test]
    fn sizes_share_the_device_by_work() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [load(64, 2, &["a"]), load(128, 2, &["b"])];
        let turns: Vec<_> = (0..500).filter_map(|_| rotation.next(&loads)).collect();
        let large = turns.iter().filter(|size| **size == square(128)).count();
        assert_eq!(turns.len(), 500);
        assert_eq!(large, 100, "one step of four times the pixels for four small ones");
    }

    #[test]
    fn no_size_waits_longer_than_a_round() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [load(64, 8, &["a"]), load(512, 2, &["b"]), load(8, 1, &["c"])];
        let mut since = [0_usize; 3];
        for _ in 0..10_000 {
            let size = rotation.next(&loads).expect("there is work");
            for (load, idle) in loads.iter().zip(&mut since) {
                *idle = if load.size == size { 0 } else { *idle + 1 };
            }
            // 512² x 2 is 8192 times 8² x 1: so many small steps make one large one.
            assert!(since[1] <= 8192 + 17 + 1, "{since:?}");
            assert!(since[2] <= 17 + 1, "{since:?}");
        }
    }

    #[test]
    fn a_size_that_left_has_no_credit() {
        let mut rotation = DeficitRoundRobin::default();
        assert_eq!(rotation.next(&[load(8, 1, &["a"])]), Some(square(8)));
        assert_eq!(rotation.next(&[]), None);
        assert!(rotation.buckets.is_empty());
    }
}
