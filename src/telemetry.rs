//! What the server says about itself: the log, one line an event, to standard error; and every
//! metric, in one table. A route or a stage that is measured has no name of its own elsewhere.

mod metrics;

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

pub use metrics::{Metric, MetricKind, Metrics};

/// The look of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    Text,
    /// One JSON object a line, for log collectors.
    Json,
}

/// Starts the log. Panics go there too, so that a JSON log stays one.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    started.map_err(|error| anyhow::anyhow!("the log does not start: {error}"))
}

/// The metrics, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the table says what they are")]
pub enum MetricId {
    Requests,
    RequestSeconds,
    RequestsInService,
    Pictures,
    PicturesWaiting,
    PicturesDrawing,
    QueueSeconds,
    StageSeconds,
    PictureSeconds,
    StepRows,
    BatchShrinks,
    Verdicts,
    Ready,
    LoadSeconds,
    Jobs,
    BudgetBytes,
    HostBytes,
    HostAvailableBytes,
    GpuUsedBytes,
    GpuBytes,
    GpuBusy,
    GpuWatts,
    GpuCelsius,
    Build,
}

/// From an answer to `/ping` to an hour.
const REQUEST_BUCKETS: MetricKind = MetricKind::Histogram(&[
    0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0,
]);

/// From a step of a small model on a GPU to one of a large picture on a CPU.
const STAGE_BUCKETS: MetricKind = MetricKind::Histogram(&[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
]);

const BATCH_BUCKETS: MetricKind =
    MetricKind::Histogram(&[1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]);

/// The numbers that NVIDIA's management library gives to GPUs; those beyond have no series.
pub const GPUS: [&str; 8] = ["0", "1", "2", "3", "4", "5", "6", "7"];

/// Every metric. Those of a GPU are there when its driver is.
pub const TABLE: [Metric; 24] = {
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
            "Requests answered; ok, an error's code, or gone when the client left first.",
        ),
        row(
            RequestSeconds,
            "sd_request_seconds",
            REQUEST_BUCKETS,
            &["route"],
            "From the head of a request to the head of its answer.",
        ),
        row(
            RequestsInService,
            "sd_requests_in_service",
            Gauge,
            &[],
            "Requests for pictures that are being served, waiting ones included.",
        ),
        row(
            Pictures,
            "sd_pictures_total",
            Counter,
            &["outcome"],
            "Pictures asked for, by their end: drawn, failed, cancelled or refused.",
        ),
        row(PicturesWaiting, "sd_pictures_waiting", Gauge, &[], "Pictures in the queue."),
        row(PicturesDrawing, "sd_pictures_drawing", Gauge, &[], "Pictures in the making."),
        row(
            QueueSeconds,
            "sd_queue_seconds",
            REQUEST_BUCKETS,
            &[],
            "From the acceptance of a picture to the encoding of its text.",
        ),
        row(
            StageSeconds,
            "sd_stage_seconds",
            STAGE_BUCKETS,
            &["stage"],
            "One text encoding with its noise, step of a batch, decoding, safety check or file.",
        ),
        row(
            PictureSeconds,
            "sd_picture_seconds",
            REQUEST_BUCKETS,
            &[],
            "From the encoding of a picture's text to its pixels.",
        ),
        row(
            StepRows,
            "sd_step_rows",
            BATCH_BUCKETS,
            &[],
            "Rows that shared a step; a picture with guidance has two.",
        ),
        row(
            BatchShrinks,
            "sd_batch_shrinks_total",
            Counter,
            &[],
            "Steps tried again with fewer rows because the device had no memory for all.",
        ),
        row(
            Verdicts,
            "sd_safety_verdicts_total",
            Counter,
            &["verdict"],
            "Pictures that the safety checker judged: pass, or what became of them.",
        ),
        row(Ready, "sd_ready", Gauge, &[], "1 when pictures can be drawn."),
        row(
            LoadSeconds,
            "sd_model_load_seconds",
            Gauge,
            &[],
            "From the start to the first picture, fetching the model included.",
        ),
        row(Jobs, "sd_jobs", Gauge, &["state"], "Jobs of /v1/jobs that are kept."),
        row(
            BudgetBytes,
            "sd_memory_budget_bytes",
            Gauge,
            &[],
            "What one evaluation may take of the device's memory.",
        ),
        row(HostBytes, "sd_host_resident_bytes", Gauge, &[], "Memory of this process."),
        row(
            HostAvailableBytes,
            "sd_host_available_bytes",
            Gauge,
            &[],
            "Memory that the host or the container has left.",
        ),
        row(
            GpuUsedBytes,
            "sd_gpu_memory_used_bytes",
            Gauge,
            &["gpu"],
            "Memory of the GPU that is taken, by whomever.",
        ),
        row(GpuBytes, "sd_gpu_memory_bytes", Gauge, &["gpu"], "Memory of the GPU."),
        row(
            GpuBusy,
            "sd_gpu_busy_ratio",
            Gauge,
            &["gpu"],
            "Share of the last moments in which a kernel ran; full at one row or at many.",
        ),
        row(GpuWatts, "sd_gpu_power_watts", Gauge, &["gpu"], "Power that the GPU draws."),
        row(
            GpuCelsius,
            "sd_gpu_temperature_celsius",
            Gauge,
            &["gpu"],
            "Temperature of the GPU's die.",
        ),
        row(
            Build,
            "sd_build_info",
            Gauge,
            &["version"],
            "Always 1; the label says which server this is.",
        ),
    ]
};
