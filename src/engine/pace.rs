//! How fast pictures are drawn, learned from what was measured, and what follows for those who
//! wait. Work is counted in pixels times rows times evaluations: what a picture costs, whatever
//! its size.

use std::time::Duration;

/// How much the past counts against one more turn: about the last fifty count.
const MEMORY: f64 = 0.98;

/// Rejected clients are told to come back within an hour.
const LONGEST: f64 = 3600.0;

/// The measured speed and the work under way. The worker writes it once a turn.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Throughput {
    seconds: f64,
    work: f64,
    turns: f64,
    /// Work left in the pictures in the making.
    pub(super) drawing: u64,
    /// How many they are.
    pub(super) pictures: usize,
    /// Sizes that take turns.
    pub(super) sizes: usize,
}

impl Throughput {
    /// A turn took so long and did so much; turns without a step are nobody's measure.
    pub(super) fn measure(&mut self, elapsed: Duration, work: u64) {
        if work == 0 {
            return;
        }
        self.seconds = self.seconds * MEMORY + elapsed.as_secs_f64();
        self.work = self.work * MEMORY + work as f64;
        self.turns = self.turns * MEMORY + 1.0;
    }

    /// The time for so much work, once anything has been measured.
    pub(super) fn time(&self, work: u64) -> Option<Duration> {
        (self.work > 0.0).then(|| duration(work as f64 * self.seconds / self.work))
    }

    /// The time until a picture in the making has made so many more evaluations.
    pub(super) fn time_of(&self, evaluations: usize) -> Option<Duration> {
        let turns = evaluations as f64 * self.sizes.max(1) as f64;
        (self.turns > 0.0).then(|| duration(turns * self.seconds / self.turns))
    }

    /// Whole seconds until as many of the pictures that wait or are drawn have ended as are in
    /// the way, given the work of those that wait.
    pub(super) fn retry_after(&self, in_the_way: usize, waiting: usize, work: u64) -> u64 {
        let all = (self.pictures + waiting).max(1);
        let share = (in_the_way as f64 / all as f64).min(1.0);
        let drained = self.time(self.drawing + work).unwrap_or_default();
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
        (pace.pictures, pace.drawing) = (2, 20);
        let near = |time: Option<Duration>, seconds: f64| {
            (time.expect("measured").as_secs_f64() - seconds).abs() < 0.01
        };
        assert!(near(pace.time(50), 5.0));
        assert!(near(pace.time_of(7), 7.0));
        assert_eq!(pace.retry_after(10, 8, 80), 10, "all of it is in the way");
        assert_eq!(pace.retry_after(1, 8, 80), 1);
        assert_eq!(pace.retry_after(3, 8, 80), 3);
        for _ in 0..1000 {
            pace.measure(Duration::from_secs(2), 10);
        }
        assert!(near(pace.time(50), 10.0), "it learns");
    }
}
