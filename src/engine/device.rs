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
        *had = (*had).max(turns.now);
        let me = (*had, turns.arrivals);
        turns.arrivals += 1;
        turns.waiting.push(me);
        while turns.busy || turns.waiting.iter().min() != Some(&me) {
            turns = self.shared.freed.wait(turns).unwrap_or_else(PoisonError::into_inner);
        }
        turns.waiting.retain(|waiting| *waiting != me);
        turns.busy = true;
        turns.now = me.0;
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
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    /// Two models with steps of so many milliseconds; the time that each had.
    fn share(steps: [u64; 2]) -> [Duration; 2] {
        let (device, over) = (Device::default(), AtomicBool::new(false));
        let model = |millis: u64| {
            let (mut had, mut all) = (Duration::ZERO, Duration::ZERO);
            while !over.load(Ordering::Relaxed) {
                let turn = device.turn(&mut had);
                let began = Instant::now();
                thread::sleep(Duration::from_millis(millis));
                all += began.elapsed();
                drop(turn);
            }
            all
        };
        thread::scope(|scope| {
            let models = steps.map(|millis| scope.spawn(move || model(millis)));
            thread::sleep(Duration::from_millis(600));
            over.store(true, Ordering::Relaxed);
            models.map(|model| model.join().expect("no panic"))
        })
    }

    #[test]
    fn models_share_the_device_by_time() {
        // By turns instead of time it would be ten to one; a busy machine sleeps long and late.
        let [a, b] = share([2, 20]);
        assert!(a.max(b) < 4 * a.min(b), "{a:?} and {b:?}");
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
