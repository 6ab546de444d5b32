//! Measured throughput, and estimates from it: time left and `Retry-After`. The unit of work is
//! pixels times rows times UNet calls, so that images of different sizes are comparable.

use std::time::Duration;

/// Exponential decay per turn: the weights of all turns sum to fifty.
const MEMORY: f64 = 0.98;

/// Maximum estimate, in seconds.
const LONGEST: f64 = 3600.0;

/// The measured throughput and the running work. The worker updates it once per turn.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Throughput {
    seconds: f64,
    work: f64,
    turns: f64,
    /// Remaining work of the running images.
    pub(super) work_left: u64,
    /// Number of running images.
    pub(super) running: usize,
    /// Number of image sizes that take turns.
    pub(super) sizes: usize,
}

impl Throughput {
    /// Adds a turn of this time and work. Turns without a step are not counted.
    pub(super) fn measure(&mut self, elapsed: Duration, work: u64) {
        if work == 0 {
            return;
        }
        self.seconds = self.seconds * MEMORY + elapsed.as_secs_f64();
        self.work = self.work * MEMORY + work as f64;
        self.turns = self.turns * MEMORY + 1.0;
    }

    /// Estimated time for this work; `None` before the first measurement.
    pub(super) fn time(&self, work: u64) -> Option<Duration> {
        (self.work > 0.0).then(|| duration(work as f64 * self.seconds / self.work))
    }

    /// Estimated time for this number of UNet calls of a running image.
    pub(super) fn time_of(&self, evaluations: usize) -> Option<Duration> {
        let turns = evaluations as f64 * self.sizes.max(1) as f64;
        (self.turns > 0.0).then(|| duration(turns * self.seconds / self.turns))
    }

    /// Estimated time until `count` of the waiting and running images have ended, in whole seconds;
    /// `work` is that of the waiting ones.
    pub(super) fn retry_after(&self, count: usize, waiting: usize, work: u64) -> u64 {
        let all = (self.running + waiting).max(1);
        let share = (count as f64 / all as f64).min(1.0);
        let drained = self.time(self.work_left + work).unwrap_or_default();
        (drained.as_secs_f64() * share).ceil().max(1.0) as u64
    }
}

fn duration(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_follow_the_measured_speed() {
        let mut pace = Throughput::default();
        assert_eq!(pace.time(100), None);
        assert_eq!(pace.retry_after(1, 64, 1000), 1, "nothing is known yet");
        for _ in 0..1000 {
            pace.measure(Duration::from_secs(1), 10);
            pace.measure(Duration::from_secs(100), 0);
        }
        (pace.running, pace.work_left) = (2, 20);
        let near = |time: Option<Duration>, seconds: f64| {
            (time.expect("measured").as_secs_f64() - seconds).abs() < 0.01
        };
        assert!(near(pace.time(50), 5.0));
        assert!(near(pace.time_of(7), 7.0));
        assert_eq!(pace.retry_after(10, 8, 80), 10, "all of them");
        assert_eq!(pace.retry_after(1, 8, 80), 1);
        assert_eq!(pace.retry_after(3, 8, 80), 3);
        for _ in 0..1000 {
            pace.measure(Duration::from_secs(2), 10);
        }
        assert!(near(pace.time(50), 10.0), "recent turns count most");
    }
}
