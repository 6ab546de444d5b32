//! Selects the images of the next step. Only images of one size can share a UNet call, and a picture
//! that is enlarged has its steps for itself, so the kinds of steps take turns by deficit round robin (Shreedhar and Varghese 1995). Each client has the same share
//! of the device, divided between the sizes of its images: many sizes do not get it more time, and
//! neither do large ones. Arithmetic only, without a model.

use std::collections::{HashMap, HashSet, VecDeque};

use sd_models::{Size, TILE_WORK};

use super::client::Client;

/// Pixels of a tile of an upscaler.
const TILE_PIXELS: usize = 192 * 192;

/// What images must have in common to take turns together: the size of their UNet calls, or that
/// the next step of each is one of a picture that is enlarged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct StepKind {
    pub(super) size: Size,
    pub(super) enlarging: bool,
}

impl StepKind {
    /// The work of a step, in pixels times rows.
    pub(super) fn cost(self, rows: usize) -> usize {
        match self.enlarging {
            true => TILE_WORK * TILE_PIXELS,
            false => self.size.pixels() * rows,
        }
    }
}

/// The order of the kinds.
#[derive(Debug, Default)]
pub(super) struct DeficitRoundRobin {
    buckets: VecDeque<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    kind: StepKind,
    /// Work that this kind may do before the next one's turn, in pixels times rows.
    credit: usize,
}

/// The images of one kind that could share the next step.
#[derive(Debug, Clone)]
pub(super) struct BucketLoad {
    pub(super) kind: StepKind,
    pub(super) rows: usize,
    /// The clients of the images, in any order.
    pub(super) clients: Vec<Client>,
}

impl BucketLoad {
    fn cost(&self) -> usize {
        self.kind.cost(self.rows)
    }
}

/// A client's share of a round; it is divided by the number of its sizes.
const SHARE: usize = 1 << 10;

/// The shares of all clients in each kind.
fn weights(loads: &[BucketLoad]) -> HashMap<StepKind, usize> {
    let mut kinds: HashMap<&Client, HashSet<StepKind>> = HashMap::new();
    for load in loads {
        for client in &load.clients {
            kinds.entry(client).or_default().insert(load.kind);
        }
    }
    let mut weights = HashMap::new();
    for kinds in kinds.into_values() {
        let share = SHARE / kinds.len();
        kinds.iter().for_each(|kind| *weights.entry(*kind).or_default() += share);
    }
    weights
}

impl DeficitRoundRobin {
    /// The kind of the next step. `None` if there are no images.
    pub(super) fn next(&mut self, loads: &[BucketLoad]) -> Option<StepKind> {
        let load = |kind: StepKind| loads.iter().find(|load| load.kind == kind);
        self.buckets.retain(|bucket| load(bucket.kind).is_some());
        for load in loads {
            if self.buckets.iter().all(|bucket| bucket.kind != load.kind) {
                self.buckets.push_back(Bucket { kind: load.kind, credit: 0 });
            }
        }
        // With the largest cost as quantum of the largest weight, one kind can run in each round,
        // and every credit grows, so this loop ends.
        let quantum = loads.iter().map(BucketLoad::cost).max()?;
        let weights = weights(loads);
        let largest = weights.values().copied().max()?;
        loop {
            let bucket = self.buckets.front_mut()?;
            let cost = load(bucket.kind)?.cost();
            if bucket.credit >= cost {
                bucket.credit -= cost;
                return Some(bucket.kind);
            }
            let weight = weights.get(&bucket.kind).copied().unwrap_or(1).max(1);
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

    /// UNet calls of this size.
    fn step(side: usize) -> StepKind {
        StepKind { size: square(side), enlarging: false }
    }

    /// The images of these clients, one row each unless there are more rows.
    fn load(side: usize, rows: usize, clients: &[&str]) -> BucketLoad {
        let clients = clients.iter().copied().map(Client::named).collect();
        BucketLoad { kind: step(side), rows, clients }
    }

    #[test]
    fn a_client_with_many_sizes_has_one_share() {
        let mut rotation = DeficitRoundRobin::default();
        let odd = [56, 72, 80, 88].map(|side| load(side, 2, &["many"]));
        let loads = [&odd[..], &[load(64, 2, &["one"])]].concat();
        let mut work = [0, 0];
        for _ in 0..2000 {
            let kind = rotation.next(&loads).expect("there is work");
            work[usize::from(kind == step(64))] += kind.cost(1);
        }
        assert!(work[0].abs_diff(work[1]) * 20 < work[0] + work[1], "{work:?}");
    }

    #[test]
    fn a_size_of_several_clients_has_their_shares() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [load(64, 4, &["a", "b", "c", "c"]), load(128, 1, &["d"])];
        let turns = (0..1000).filter_map(|_| rotation.next(&loads));
        let shared = turns.filter(|kind| *kind == step(64)).count();
        assert_eq!(shared, 750, "the calls cost the same");
    }

    #[test]
    fn sizes_share_the_device_by_work() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [load(64, 2, &["a"]), load(128, 2, &["b"])];
        let turns: Vec<_> = (0..500).filter_map(|_| rotation.next(&loads)).collect();
        let large = turns.iter().filter(|kind| **kind == step(128)).count();
        assert_eq!(turns.len(), 500);
        assert_eq!(large, 100, "one step of four times the pixels for four small ones");
    }

    #[test]
    fn a_tile_counts_for_what_it_takes() {
        let mut rotation = DeficitRoundRobin::default();
        let kind = StepKind { enlarging: true, ..step(64) };
        let tiles = BucketLoad { kind, ..load(64, 1, &["a"]) };
        let loads = [tiles, load(192, 1, &["b"])];
        let turns = (0..1300).filter_map(|_| rotation.next(&loads));
        let tiles = turns.filter(|kind| kind.enlarging).count();
        assert_eq!(tiles, 100, "one tile for twelve UNet calls of its size");
    }

    #[test]
    fn no_size_waits_longer_than_a_round() {
        let mut rotation = DeficitRoundRobin::default();
        let loads = [load(64, 8, &["a"]), load(512, 2, &["b"]), load(8, 1, &["c"])];
        let mut since = [0_usize; 3];
        for _ in 0..10_000 {
            let kind = rotation.next(&loads).expect("there is work");
            for (load, idle) in loads.iter().zip(&mut since) {
                *idle = if load.kind == kind { 0 } else { *idle + 1 };
            }
            // 512² x 2 is 8192 times 8² x 1: so many small steps make one large one.
            assert!(since[1] <= 8192 + 17 + 1, "{since:?}");
            assert!(since[2] <= 17 + 1, "{since:?}");
        }
    }

    #[test]
    fn a_size_that_left_has_no_credit() {
        let mut rotation = DeficitRoundRobin::default();
        assert_eq!(rotation.next(&[load(8, 1, &["a"])]), Some(step(8)));
        assert_eq!(rotation.next(&[]), None);
        assert!(rotation.buckets.is_empty());
    }
}
