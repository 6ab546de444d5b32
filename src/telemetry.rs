//! Telemetry: the log, one line per event to standard error, and the table of all metrics. The
//! store of the metrics is in `metrics`.

mod metrics;

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

pub use metrics::{Metric, MetricKind, Metrics};

/// The format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text, coloured on a terminal.
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

/// Starts the log. Panics are logged too, so that a JSON log contains nothing else.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    started.map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))
}

/// The metrics, in the order of [`TABLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "described in the table")]
pub enum MetricId {
    Requests,
    RequestDuration,
    RequestsInFlight,
    Images,
    ImagesWaiting,
    ImagesRunning,
    ImagesCapacity,
    QueueDuration,
    StageDuration,
    ImageDuration,
    BatchSize,
    BatchOomRetries,
    SafetyChecks,
    Ready,
    LoadDuration,
    Jobs,
    MemoryBudget,
    ResidentMemory,
    AvailableMemory,
    GpuMemoryUsed,
    GpuMemoryTotal,
    GpuUtilization,
    GpuPower,
    GpuTemperature,
    Build,
}

/// Seconds: from a probe to a job of an hour.
const REQUEST_BUCKETS: MetricKind = MetricKind::Histogram(&[
    0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0,
]);

/// Seconds: from a step of a small model on a GPU to one of a large image on a CPU.
const STAGE_BUCKETS: MetricKind = MetricKind::Histogram(&[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
]);

/// Rows of a batch.
const BATCH_BUCKETS: MetricKind =
    MetricKind::Histogram(&[1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]);

/// Indices of GPUs in NVIDIA's management library (NVML); GPUs beyond have no series.
pub const GPUS: [&str; 8] = ["0", "1", "2", "3", "4", "5", "6", "7"];

/// Every metric. Those of GPUs exist where NVIDIA's driver is installed.
pub const TABLE: [Metric; 25] = {
    use MetricId::*;
    use MetricKind::{Counter, Gauge};
    const fn row(
        id: MetricId,
        name: &'static str,
        kind: MetricKind,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Metric {
        Metric { id, name, help, kind, labels }
    }
    [
        row(
            Requests,
            "sd_requests_total",
            Counter,
            &["route", "outcome"],
            "Requests by route and outcome: ok, an error code, or client_closed.",
        ),
        row(
            RequestDuration,
            "sd_request_duration_seconds",
            REQUEST_BUCKETS,
            &["route"],
            "Time from request headers to response headers.",
        ),
        row(
            RequestsInFlight,
            "sd_requests_in_flight",
            Gauge,
            &[],
            "Generation requests in flight, queued ones included.",
        ),
        row(
            Images,
            "sd_images_total",
            Counter,
            &["outcome"],
            "Requested images by outcome: completed, failed, cancelled or rejected.",
        ),
        row(ImagesWaiting, "sd_images_waiting", Gauge, &[], "Images in the queue."),
        row(
            ImagesRunning,
            "sd_images_running",
            Gauge,
            &[],
            "Images that have left the queue and are not finished.",
        ),
        row(
            ImagesCapacity,
            "sd_images_capacity",
            Gauge,
            &[],
            "Guided images per UNet call: half of the maximum number of batch rows.",
        ),
        row(
            QueueDuration,
            "sd_queue_duration_seconds",
            REQUEST_BUCKETS,
            &[],
            "Time of an image in the queue, from acceptance to its text encoding.",
        ),
        row(
            StageDuration,
            "sd_stage_duration_seconds",
            STAGE_BUCKETS,
            &["stage"],
            "Time of one text_encode (with noise), step, decode, safety_check or image_encode.",
        ),
        row(
            ImageDuration,
            "sd_image_duration_seconds",
            REQUEST_BUCKETS,
            &[],
            "Time to generate an image, from its text encoding to its pixels.",
        ),
        row(
            BatchSize,
            "sd_batch_size",
            BATCH_BUCKETS,
            &[],
            "Rows per UNet call; a guided image has two.",
        ),
        row(
            BatchOomRetries,
            "sd_batch_oom_retries_total",
            Counter,
            &[],
            "Steps retried with fewer rows because the device was out of memory.",
        ),
        row(
            SafetyChecks,
            "sd_safety_checks_total",
            Counter,
            &["result"],
            "Images checked by the safety checker: pass, or the action on a flagged image.",
        ),
        row(Ready, "sd_ready", Gauge, &[], "1 if the model is ready to generate images, else 0."),
        row(
            LoadDuration,
            "sd_model_load_seconds",
            Gauge,
            &[],
            "Time from the start of loading the model, download included, to the end of its warm-up.",
        ),
        row(
            Jobs,
            "sd_jobs",
            Gauge,
            &["state"],
            "Jobs of /v1/jobs held in memory, by state: running or finished.",
        ),
        row(
            MemoryBudget,
            "sd_memory_budget_bytes",
            Gauge,
            &[],
            "Device memory available to one UNet call or VAE decode.",
        ),
        row(
            ResidentMemory,
            "process_resident_memory_bytes",
            Gauge,
            &[],
            "Resident memory size in bytes.",
        ),
        row(
            AvailableMemory,
            "sd_host_memory_available_bytes",
            Gauge,
            &[],
            "Memory available on the host, or within the container's limit.",
        ),
        row(
            GpuMemoryUsed,
            "sd_gpu_memory_used_bytes",
            Gauge,
            &["gpu"],
            "GPU memory used by all processes.",
        ),
        row(GpuMemoryTotal, "sd_gpu_memory_total_bytes", Gauge, &["gpu"], "GPU memory in total."),
        row(
            GpuUtilization,
            "sd_gpu_utilization_ratio",
            Gauge,
            &["gpu"],
            "Share of recent time in which a kernel ran, whatever its batch size.",
        ),
        row(GpuPower, "sd_gpu_power_watts", Gauge, &["gpu"], "Power draw of the GPU."),
        row(
            GpuTemperature,
            "sd_gpu_temperature_celsius",
            Gauge,
            &["gpu"],
            "Temperature of the GPU.",
        ),
        row(
            Build,
            "sd_build_info",
            Gauge,
            &["version"],
            "Always 1; the label is the version of the server.",
        ),
    ]
};
