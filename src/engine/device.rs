//! The resources shared by the models on one device: its time, the memory budget of one UNet call,
//! and the metrics.
//!
//! A worker holds the device for one round of its loop. Rounds are scheduled by start-time fair
//! queueing over time: the model that has used the device least is next, and idle time earns no
//! credit. Only one model has activations in memory at a time, so one budget is enough for all.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::telemetry::Metrics;

/// A device and its models.
#[derive(Debug, Clone, Default)]
pub struct DeviceScheduler {
    shared: Arc<DeviceShared>,
    pub(super) metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct DeviceShared {
    lock: Mutex<FairLock>,
    freed: Condvar,
    /// Bytes; `None` until a model measures it.
    budget: Mutex<Option<u64>>,
}

#[derive(Debug, Default)]
struct FairLock {
    busy: bool,
    /// Virtual time: the time used by the last holder when it acquired the device.
    now: Duration,
    /// Time used and order of arrival of each waiting model.
    waiting: Vec<(Duration, u64)>,
    arrivals: u64,
}

impl FairLock {
    /// Adds a waiting model, which has used the device for `time_used`.
    fn wait(&mut self, time_used: &mut Duration) -> (Duration, u64) {
        *time_used = (*time_used).max(self.now);
        let me = (*time_used, self.arrivals);
        self.arrivals += 1;
        self.waiting.push(me);
        me
    }

    /// Takes the device if it is free and no waiting model has used it less.
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

/// Exclusive use of the device until this is dropped, which adds the time to the holder's account.
pub(super) struct Lease<'a> {
    shared: Arc<DeviceShared>,
    began: Instant,
    time_used: &'a mut Duration,
}

impl DeviceScheduler {
    /// Waits for the device. `time_used` is the time that the model has used it so far.
    pub(super) fn acquire<'a>(&self, time_used: &'a mut Duration) -> Lease<'a> {
        let mut lock = self.shared.lock();
        let me = lock.wait(time_used);
        while !lock.begin(me) {
            lock = self.shared.freed.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
        Lease { shared: Arc::clone(&self.shared), began: Instant::now(), time_used }
    }

    /// Whether another model waits for the device.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.shared.lock().waiting.is_empty()
    }

    /// Memory budget of one UNet call or VAE decode, in bytes; the maximum of the type if there is
    /// no limit. `None` if it has to be measured.
    pub(super) fn budget_bytes(&self) -> Option<u64> {
        *self.shared.budget()
    }

    /// Replaces the budget by a new measurement.
    pub(super) fn set_budget_bytes(&self, bytes: u64) {
        *self.shared.budget() = Some(bytes);
    }

    /// Takes from the budget what models need that came after it was measured, and gives back what
    /// those had that went.
    pub(super) fn change_budget(&self, taken: u64, given_back: u64) {
        let mut budget = self.shared.budget();
        let changed = budget.filter(|bytes| *bytes < u64::MAX);
        if let Some(bytes) = changed {
            *budget = Some(bytes.saturating_add(given_back).saturating_sub(taken));
        }
    }

    /// A model was unloaded, so the next model that has the device measures the budget.
    pub(super) fn forget_budget(&self) {
        *self.shared.budget() = None;
    }
}

impl DeviceShared {
    fn lock(&self) -> MutexGuard<'_, FairLock> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn budget(&self) -> MutexGuard<'_, Option<u64>> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        *self.time_used += self.began.elapsed();
        self.shared.lock().busy = false;
        self.shared.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_share_the_device_by_time() {
        let mut lock = FairLock::default();
        let steps = [2, 20].map(Duration::from_millis);
        let mut time_used = [Duration::ZERO; 2];
        let mut places = [0, 1].map(|model: usize| lock.wait(&mut time_used[model]));
        for _ in 0..1000 {
            let next = [0, 1].into_iter().find(|model: &usize| lock.begin(places[*model]));
            let next = next.expect("a model is next");
            assert!(!lock.begin(places[1 - next]), "the device is taken");
            time_used[next] += steps[next];
            lock.busy = false;
            places[next] = lock.wait(&mut time_used[next]);
            assert!(time_used[0].abs_diff(time_used[1]) <= steps[1], "{time_used:?}");
        }
    }

    #[test]
    fn models_that_come_later_take_from_the_budget() {
        let device = DeviceScheduler::default();
        device.change_budget(1, 0);
        assert_eq!(device.budget_bytes(), None, "it is not measured");
        device.set_budget_bytes(1000);
        for (taken, given_back, left) in [(200, 0, 800), (300, 200, 700), (0, 300, 1000)] {
            device.change_budget(taken, given_back);
            assert_eq!(device.budget_bytes(), Some(left));
        }
        device.set_budget_bytes(u64::MAX);
        device.change_budget(200, 0);
        assert_eq!(device.budget_bytes(), Some(u64::MAX), "there is no limit");
    }

    #[test]
    fn time_without_work_is_not_made_up_for() {
        let device = DeviceScheduler::default();
        let (mut busy, mut idle) = (Duration::from_secs(100), Duration::ZERO);
        drop(device.acquire(&mut busy));
        drop(device.acquire(&mut idle));
        assert!(idle >= Duration::from_secs(100));
    }
}
