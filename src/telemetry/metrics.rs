//! The store of measurements and its Prometheus text form. It knows no metric: those are the
//! table in the parent module. Every label value is a word of this program, so the number of
//! series is bounded. What can be asked for when it is wanted (depths, memory) is not kept here
//! but set just before rendering, so that no gauge can be left behind.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{MetricId, TABLE};

/// One row of the table.
#[derive(Debug)]
pub struct Metric {
    /// Which metric this is; its place in the table.
    pub id: MetricId,
    /// The name; its last word but `total` is the unit.
    pub name: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// How it is counted.
    pub kind: MetricKind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
}

/// How a metric is counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Is what it is now.
    Gauge,
    /// How many values were at most so large; upper bounds of the buckets, rising.
    Histogram(&'static [f64]),
}

/// The measurements of one process.
#[derive(Debug)]
pub struct Metrics {
    /// As many as the table has rows; the key is the label values.
    families: Vec<Mutex<BTreeMap<Vec<&'static str>, Series>>>,
}

#[derive(Debug, Default)]
struct Series {
    /// The value, or the sum of all values of a histogram.
    value: f64,
    /// One for each bucket and one for what is larger than the last bound.
    counts: Vec<u64>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { families: TABLE.iter().map(|_| Mutex::default()).collect() }
    }
}

impl Metrics {
    /// Counts one.
    pub fn count(&self, id: MetricId, labels: &[&'static str]) {
        self.update(id, labels, |series| series.value += 1.0);
    }

    /// Sets a gauge.
    pub fn set(&self, id: MetricId, labels: &[&'static str], value: f64) {
        self.update(id, labels, |series| series.value = value);
    }

    /// Puts a value into a histogram.
    pub fn observe(&self, id: MetricId, labels: &[&'static str], value: f64) {
        let MetricKind::Histogram(bounds) = TABLE[id as usize].kind else { return };
        self.update(id, labels, |series| {
            series.counts.resize(bounds.len() + 1, 0);
            series.counts[bounds.partition_point(|bound| *bound < value)] += 1;
            series.value += value;
        });
    }

    /// Puts a duration into a histogram.
    pub fn time(&self, id: MetricId, labels: &[&'static str], duration: Duration) {
        self.observe(id, labels, duration.as_secs_f64());
    }

    fn update(&self, id: MetricId, labels: &[&'static str], change: impl FnOnce(&mut Series)) {
        debug_assert_eq!(labels.len(), TABLE[id as usize].labels.len(), "{id:?}");
        let mut family = lock(&self.families[id as usize]);
        match family.get_mut(labels) {
            Some(series) => change(series),
            None => change(family.entry(labels.to_vec()).or_default()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The Prometheus text format, version 0.0.4.
impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (metric, family) in TABLE.iter().zip(&self.families) {
            let family = lock(family);
            let kind = match metric.kind {
                MetricKind::Counter => "counter",
                MetricKind::Gauge => "gauge",
                MetricKind::Histogram(_) => "histogram",
            };
            writeln!(f, "# HELP {} {}\n# TYPE {} {kind}", metric.name, metric.help, metric.name)?;
            for (values, series) in family.iter() {
                metric.write(f, values, series)?;
            }
        }
        Ok(())
    }
}

impl Metric {
    fn write(&self, f: &mut fmt::Formatter<'_>, values: &[&str], series: &Series) -> fmt::Result {
        let name = self.name;
        let MetricKind::Histogram(bounds) = self.kind else {
            return writeln!(f, "{name}{} {}", self.tags(values, None), series.value);
        };
        let mut below = 0;
        for (count, bound) in series.counts.iter().zip(bounds) {
            below += count;
            let tags = self.tags(values, Some(&bound.to_string()));
            writeln!(f, "{name}_bucket{tags} {below}")?;
        }
        let all: u64 = series.counts.iter().sum();
        writeln!(f, "{name}_bucket{} {all}", self.tags(values, Some("+Inf")))?;
        let tags = self.tags(values, None);
        writeln!(f, "{name}_sum{tags} {}\n{name}_count{tags} {all}", series.value)
    }

    fn tags(&self, values: &[&str], bound: Option<&str>) -> String {
        let pairs = self.labels.iter().copied().zip(values.iter().copied());
        let mut tags = String::new();
        for (name, value) in pairs.chain(bound.map(|bound| ("le", bound))) {
            let comma = if tags.is_empty() { "" } else { "," };
            let _ = write!(tags, "{comma}{name}=\"{value}\"");
        }
        if tags.is_empty() { tags } else { format!("{{{tags}}}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_well_named() {
        for (place, metric) in TABLE.iter().enumerate() {
            assert_eq!(metric.id as usize, place, "{}", metric.name);
            // The process metrics have the names of the Prometheus client libraries.
            assert!(["sd_", "process_"].iter().any(|prefix| metric.name.starts_with(prefix)));
            assert_eq!(metric.name.ends_with("_total"), metric.kind == MetricKind::Counter);
            if let MetricKind::Histogram(bounds) = metric.kind {
                assert!(bounds.is_sorted_by(|a, b| a < b), "{}", metric.name);
            }
        }
    }

    #[test]
    fn histograms_are_cumulative() {
        let metrics = Metrics::default();
        for rows in [1.0, 2.0, 2.0, 1000.0] {
            metrics.observe(MetricId::BatchSize, &[], rows);
        }
        metrics.count(MetricId::Requests, &["/ping", "ok"]);
        let text = metrics.to_string();
        for line in [
            "sd_requests_total{route=\"/ping\",outcome=\"ok\"} 1",
            "sd_batch_size_bucket{le=\"1\"} 1",
            "sd_batch_size_bucket{le=\"2\"} 3",
            "sd_batch_size_bucket{le=\"64\"} 3",
            "sd_batch_size_bucket{le=\"+Inf\"} 4",
            "sd_batch_size_sum 1005",
            "sd_batch_size_count 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
