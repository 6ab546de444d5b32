//! What the models on one device have in common: their turns, the memory of an evaluation, and the
//! measurements. One model alone has all of it.
//!
//! A turn is one round of a worker's loop. Turns are shared out by time, as start-time fair
//! queueing does it: whoever has had the device for the shortest time is next, and nobody makes
//! up for the time in which it had nothing to do. So activations are in memory for one model at
//! a time, and one budget is enough for all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::telemetry::Metrics;

/// A device and who is on it.
#[derive(Debug, Clone, Default)]
pub struct Device {
    shared: Arc<Shared>,
    pub(super) metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Shared {
    turns: Mutex<Turns>,
    freed: Condvar,
    /// Bytes; zero until the first model is there.
    budget: AtomicU64,
}

#[derive(Debug, Default)]
struct Turns {
    busy: bool,
    /// Virtual time: what whoever had the last turn had had before.
    now: Duration,
    /// Time had and order of arrival of those who wait.
    waiting: Vec<(Duration, u64)>,
    arrivals: u64,
}

impl Turns {
    /// A place among those who wait, for a model that has had so much time.
    fn wait(&mut self, had: &mut Duration) -> (Duration, u64) {
        *had = (*had).max(self.now);
        let me = (*had, self.arrivals);
        self.arrivals += 1;
        self.waiting.push(me);
        me
    }

    /// Takes the turn if the device is free and nobody has had it for less time.
    fn begin(&mut self, me: (Duration, u64)) -> bool {
        if self.busy || self.waiting.iter().min() != Some(&me) {
            return false;
        }
        self.waiting.retain(|waiting| *waiting != me);
        self.busy = true;
        self.now = me.0;
        true
    }
}

/// The device, held until this is dropped; then the time is on the holder's account.
pub(super) struct Turn<'a> {
    shared: Arc<Shared>,
    began: Instant,
    had: &'a mut Duration,
}

impl Device {
    /// Waits for a turn; `had` is the time that the model has had so far.
    pub(super) fn turn<'a>(&self, had: &'a mut Duration) -> Turn<'a> {
        let mut turns = self.shared.turns();
        let me = turns.wait(had);
        while !turns.begin(me) {
            turns = self.shared.freed.wait(turns).unwrap_or_else(PoisonError::into_inner);
        }
        Turn { shared: Arc::clone(&self.shared), began: Instant::now(), had }
    }

    /// What one evaluation or decoding may take, once that is known.
    pub(super) fn budget_bytes(&self) -> Option<u64> {
        Some(self.shared.budget.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0)
    }

    /// The newest model knows best how much is left.
    pub(super) fn set_budget_bytes(&self, bytes: u64) {
        self.shared.budget.store(bytes, Ordering::Relaxed);
    }
}

impl Shared {
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.had += self.began.elapsed();
        self.shared.turns().busy = false;
        self.shared.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_share_the_device_by_time() {
        let mut turns = Turns::default();
        let steps = [2, 20].map(Duration::from_millis);
        let mut had = [Duration::ZERO; 2];
        let mut places = [0, 1].map(|model: usize| turns.wait(&mut had[model]));
        for _ in 0..1000 {
            let next = [0, 1].into_iter().find(|model: &usize| turns.begin(places[*model]));
            let next = next.expect("someone's turn");
            assert!(!turns.begin(places[1 - next]), "the device is taken");
            had[next] += steps[next];
            turns.busy = false;
            places[next] = turns.wait(&mut had[next]);
            assert!(had[0].abs_diff(had[1]) <= steps[1], "{had:?}");
        }
    }

    #[test]
    fn time_without_work_is_not_made_up_for() {
        let device = Device::default();
        let (mut busy, mut idle) = (Duration::from_secs(100), Duration::ZERO);
        drop(device.turn(&mut busy));
        drop(device.turn(&mut idle));
        assert!(idle >= Duration::from_secs(100));
    }
}
