//! Every metric in one table: its name, labels and help. The callers measure; gauges of values that
//! can be read at any time are set just before rendering.

use std::array;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

type FloatGauge = Gauge<f64, AtomicU64>;

/// Series by the names and values of their labels.
type SeriesFamily<M, const N: usize> = Family<[(&'static str, String); N], M, fn() -> M>;

/// A metric of the table, with a series for each combination of label values.
#[derive(Debug)]
pub struct Series<M, const N: usize> {
    labels: [&'static str; N],
    family: SeriesFamily<M, N>,
}

impl<M: Metric + Clone, const N: usize> Series<M, N> {
    fn register(
        registry: &mut Registry,
        name: &str,
        help: &str,
        labels: [&'static str; N],
        new: fn() -> M,
    ) -> Self
    where
        SeriesFamily<M, N>: Metric,
    {
        let family = Family::new_with_constructor(new);
        // The formats end the sentence.
        registry.register(name, help.trim().trim_end_matches('.'), family.clone());
        Self { labels, family }
    }

    /// The series of these label values, in the order of the table.
    pub fn with(&self, values: [&str; N]) -> M {
        let pair = |n: usize| (self.labels[n], values[n].to_owned());
        self.family.get_or_create_owned(&array::from_fn(pair))
    }
}

impl<const N: usize> Series<Histogram, N> {
    /// Adds a duration in seconds.
    pub fn time(&self, values: [&str; N], duration: Duration) {
        self.with(values).observe(duration.as_secs_f64());
    }
}

impl<const N: usize> Series<Counter, N> {
    /// Sets a count that is kept elsewhere.
    pub fn set_count(&self, values: [&str; N], count: u64) {
        self.with(values).inner().store(count, Ordering::Relaxed);
    }
}

impl<const N: usize> Series<Gauge, N> {
    /// Sets a number of bytes, if known.
    pub fn set_bytes(&self, values: [&str; N], bytes: Option<u64>) {
        if let Some(bytes) = bytes {
            self.with(values).set(bytes as i64);
        }
    }
}

/// One entry of the table: `/// help`, then field, kind, name, labels and constructor.
macro_rules! metrics {
    ($(#[doc = $help:literal]
       $field:ident: $kind:ident = $name:literal [$($label:literal),*] $new:expr;)*) => {
        /// The measurements of one process.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            $(#[doc = $help] pub $field: Series<$kind, { <[&str]>::len(&[$($label),*]) }>,)*
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::default();
                $(let $field =
                    Series::register(&mut registry, $name, $help, [$($label),*], $new);)*
                Self { registry, $($field,)* }
            }
        }
    };
}

// The last word of a name is its unit; the formats add `_total` to counters.
metrics! {
    /// Requests by route and outcome, of a stream when it ends: ok, an error code, not_ready (the 503 of a probe) or client_closed.
    requests: Counter = "sd_requests" ["route", "outcome"] Counter::default;
    /// Time from request headers to response headers.
    request_duration: Histogram = "sd_request_duration_seconds" ["route"] request_buckets;
    /// Generation requests in flight, queued ones included.
    requests_in_flight: Gauge = "sd_requests_in_flight" [] Gauge::default;
    /// Bytes of request bodies, received or declared and not yet released, and of unread responses.
    body_bytes_in_flight: Gauge = "sd_body_bytes_in_flight" [] Gauge::default;
    /// Requested images by outcome: completed, failed, cancelled or rejected.
    images: Counter = "sd_images" ["outcome"] Counter::default;
    /// Images in the queue.
    images_waiting: Gauge = "sd_images_waiting" [] Gauge::default;
    /// Images that have left the queue and are not finished.
    images_running: Gauge = "sd_images_running" [] Gauge::default;
    /// Guided images that one UNet call takes at most: half of --max-batch-rows, as each has two rows.
    images_capacity: Gauge = "sd_images_capacity" [] Gauge::default;
    /// Time of an image in the queue, from acceptance to its text encoding.
    queue_duration: Histogram = "sd_queue_duration_seconds" [] request_buckets;
    /// Time of one text_encode (with noise), step, decode, safety_check or image_encode.
    stage_duration: Histogram = "sd_stage_duration_seconds" ["stage"] stage_buckets;
    /// Time to generate an image, from its text encoding to its pixels.
    image_duration: Histogram = "sd_image_duration_seconds" [] request_buckets;
    /// Rows per UNet call; a guided image has two.
    batch_size: Histogram = "sd_batch_size" [] batch_buckets;
    /// Steps retried with fewer rows because the device was out of memory.
    batch_oom_retries: Counter = "sd_batch_oom_retries" [] Counter::default;
    /// Images checked by the safety checker: pass, or the action on a flagged image.
    safety_checks: Counter = "sd_safety_checks" ["result"] Counter::default;
    /// 1 if the model is ready to generate images, else 0.
    ready: Gauge = "sd_ready" [] Gauge::default;
    /// Time from the start of loading the model, download included, to the end of its warm-up.
    model_load: FloatGauge = "sd_model_load_seconds" [] FloatGauge::default;
    /// Jobs of /v1/jobs, by state: running, which includes queued ones, or finished.
    jobs: Gauge = "sd_jobs" ["state"] Gauge::default;
    /// Jobs of /v1/jobs that have ended, by outcome: completed, failed or cancelled.
    jobs_ended: Counter = "sd_jobs_ended" ["outcome"] Counter::default;
    /// Device memory available to one UNet call or VAE decode.
    memory_budget: Gauge = "sd_memory_budget_bytes" [] Gauge::default;
    /// Resident memory size in bytes.
    resident_memory: Gauge = "process_resident_memory_bytes" [] Gauge::default;
    /// Memory available on the host, or within the container's limit.
    available_memory: Gauge = "sd_host_memory_available_bytes" [] Gauge::default;
    /// GPU memory used by all processes.
    gpu_memory_used: Gauge = "sd_gpu_memory_used_bytes" ["gpu"] Gauge::default;
    /// GPU memory in total.
    gpu_memory_total: Gauge = "sd_gpu_memory_total_bytes" ["gpu"] Gauge::default;
    /// Share of recent time in which a kernel ran, whatever its batch size.
    gpu_utilization: FloatGauge = "sd_gpu_utilization_ratio" ["gpu"] FloatGauge::default;
    /// Power draw of the GPU.
    gpu_power: FloatGauge = "sd_gpu_power_watts" ["gpu"] FloatGauge::default;
    /// Temperature of the GPU.
    gpu_temperature: FloatGauge = "sd_gpu_temperature_celsius" ["gpu"] FloatGauge::default;
    /// Lines of the log that were dropped because the reader of standard error was too slow.
    log_lines_dropped: Counter = "sd_log_lines_dropped" [] Counter::default;
    /// Always 1; the label is the version of the server.
    build: Gauge = "sd_build_info" ["version"] Gauge::default;
}

/// Seconds: from a probe to a job of an hour.
fn request_buckets() -> Histogram {
    Histogram::new([
        0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0,
        3600.0,
    ])
}

/// Seconds: from a step of a small model on a GPU to one of a large image on a CPU.
fn stage_buckets() -> Histogram {
    Histogram::new([
        0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
        30.0,
    ])
}

/// Rows of a batch.
fn batch_buckets() -> Histogram {
    Histogram::new([1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0])
}

impl Metrics {
    /// The OpenMetrics text format, version 1.0.0.
    pub fn open_metrics(&self) -> String {
        let mut rendered = String::new();
        // Writing into a string does not fail.
        let _ = text::encode(&mut rendered, &self.registry);
        rendered
    }
}

/// The Prometheus text format, version 0.0.4.
impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        prometheus_text::encode(f, &self.registry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_have_every_series() {
        let metrics = Metrics::default();
        for rows in [1.0, 2.0, 2.0, 1000.0] {
            metrics.batch_size.with([]).observe(rows);
        }
        metrics.requests.with(["/ping", "ok"]).inc();
        metrics.ready.with([]).set(1);
        metrics.gpu_power.with(["0"]).set(7.5);
        let (classic, open) = (metrics.to_string(), metrics.open_metrics());
        for line in [
            "# HELP sd_requests_total Requests by route and outcome, of a stream when it ends: ok, an error code, not_ready (the 503 of a probe) or client_closed.",
            "# TYPE sd_requests_total counter",
            "sd_requests_total{route=\"/ping\",outcome=\"ok\"} 1",
            "# TYPE sd_batch_size histogram",
            "sd_batch_size_bucket{le=\"1\"} 1",
            "sd_batch_size_bucket{le=\"2\"} 3",
            "sd_batch_size_bucket{le=\"64\"} 3",
            "sd_batch_size_bucket{le=\"+Inf\"} 4",
            "sd_batch_size_sum 1005.0",
            "sd_batch_size_count 4",
            "sd_ready 1",
            "sd_gpu_power_watts{gpu=\"0\"} 7.5",
        ] {
            assert!(classic.lines().any(|found| found == line), "{line} in {classic}");
        }
        assert!(open.contains("# TYPE sd_requests counter\nsd_requests_total{"), "{open}");
        assert!(open.contains("sd_ready 1\n") && open.ends_with("# EOF\n"), "{open}");
    }
}
