//! `sd-server bench --verify`: times a device, and compares its images with those of the CPU. Reports
//! a table or JSON; of two that fail the other is reported all the same.

use std::fmt;
use std::iter::successors;
use std::time::Instant;

use anyhow::{Result, ensure};
use sd_models::{
    DeviceName, KernelStats, LoadOptions, Pipeline, Precision, Rgb, Sampler, SamplerOptions,
    SigmaSchedule, Size, Span, Spec, Trajectory, XlOptions,
};
use serde::Serialize;
use tracing::warn;

use super::load::print;
use crate::engine::is_out_of_memory;
use crate::options::min;
use crate::source::{self, ModelConfig};

/// Number of steps of the compared images.
const COMPARED_STEPS: usize = 2;
/// Number of warm-up steps.
const WARM_UP: usize = 2;

/// GPUs with known limits: part of the name, f16 operations per second on tensor cores without
/// sparsity and with f32 accumulation, memory bandwidth in bytes per second. From NVIDIA's data
/// sheets.
const GPUS: [(&str, f64, f64); 6] = [
    ("T4", 65e12, 320e9),
    ("A10G", 70e12, 600e9),
    ("L4", 121e12, 300e9),
    ("A100", 312e12, 1555e9),
    ("H100", 989e12, 3350e9),
    ("H200", 989e12, 4800e9),
];

/// What `bench --verify` times.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Timing")]
pub(crate) struct TimingConfig {
    /// Image size with --verify, such as 512x512. Default: the model's own
    #[arg(long, requires = "verify", value_parser = size)]
    pub(crate) size: Option<Size>,
    /// Maximum number of rows per step timed with --verify, in powers of two from 1
    #[arg(long, requires = "verify", default_value = "16", value_parser = min::<1>)]
    pub(crate) max_rows: usize,
    /// Number of steps timed with --verify for each number of rows
    #[arg(long, requires = "verify", default_value = "10", value_parser = min::<1>)]
    pub(crate) evaluations: usize,
}

fn size(text: &str) -> Result<Size, String> {
    let sides = text.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    sides
        .and_then(|(width, height)| Size::new(width, height))
        .ok_or_else(|| "must be two multiples of 8, as in 512x512".into())
}

#[derive(Debug, Serialize)]
struct DeviceReport {
    version: &'static str,
    model: String,
    device: String,
    name: Option<String>,
    /// Whether the kernels were loaded as cubins or JIT-compiled from PTX.
    kernels: Option<String>,
    dtype: String,
    size: String,
    load_seconds: f64,
    #[serde(flatten)]
    times: Option<Times>,
    #[serde(flatten)]
    difference: Option<Difference>,
    /// What could not be timed or compared, and why.
    failures: Vec<String>,
}

/// How long the device takes.
#[derive(Debug, Serialize)]
struct Times {
    decode_seconds: f64,
    rows: Vec<Timing>,
    /// Work of the kernels in a step of two rows.
    step: Vec<(&'static str, KernelStats)>,
    /// Share of the roofline bound that a step of two rows reaches, if the GPU is known.
    roofline_share: Option<f64>,
    /// What the pool of the GPU keeps after the largest batch, beyond the weights.
    pool_bytes: Option<u64>,
}

/// Difference of an image's bytes from those of the CPU in f32.
#[derive(Debug, Serialize)]
struct Difference {
    mean_difference: f64,
    max_difference: u8,
    /// Tolerance of mean and max.
    allowed: (f64, u8),
}

#[derive(Debug, Serialize)]
struct Timing {
    rows: usize,
    steps_per_second: f64,
    /// With the model's default steps and one decode per image.
    images_per_second: f64,
}

/// Generates images of one size with one model.
struct DeviceBench {
    pipeline: Pipeline,
    size: Size,
    evaluations: usize,
}

pub(crate) fn run(model: ModelConfig, timing: &TimingConfig, json: bool) -> Result<()> {
    let options = source::locate(model)?;
    let began = Instant::now();
    let pipeline = Pipeline::load(&options)?;
    let load_seconds = began.elapsed().as_secs_f64();
    let info = pipeline.info().clone();
    if info.device == "cpu" {
        warn!(
            "--verify is for a GPU (--device cuda), whose images it compares with those of the CPU \
             in f32; here it compares the CPU in {} with that, and times it",
            info.precision
        );
    }
    let size = timing.size.unwrap_or(info.defaults.size);
    let bench = DeviceBench { pipeline, size, evaluations: timing.evaluations };
    // What takes seconds before what may take an hour, where the CPU draws a large image.
    let times = bench.all_times(timing.max_rows);
    let difference = bench.compare(options);
    let failures = [
        times.as_ref().err().map(|error| format!("not timed: {error:#}")),
        difference.as_ref().err().map(|error| format!("not compared: {error:#}")),
    ];
    let report = DeviceReport {
        version: env!("CARGO_PKG_VERSION"),
        model: info.name,
        device: info.device,
        name: bench.pipeline.device_name(),
        kernels: bench.pipeline.device_kernels(),
        dtype: info.precision,
        size: size.to_string(),
        load_seconds,
        times: times.ok(),
        difference: difference.ok(),
        failures: failures.into_iter().flatten().collect(),
    };
    print(&report, json)?;
    ensure!(report.failures.is_empty(), "{}", report.failures.join("; "));
    let Some(Difference { mean_difference: mean, max_difference: max, allowed }) =
        report.difference
    else {
        return Ok(());
    };
    ensure!(
        mean <= allowed.0 && max <= allowed.1,
        "the device's image differs from the CPU's: mean {mean:.3}/255, max {max}/255"
    );
    Ok(())
}

impl DeviceBench {
    /// The spec of a guided image, or an unguided one for one row.
    fn spec(&self, rows: usize, seed: u64, steps: usize) -> Spec {
        Spec {
            prompt: "a red house by the sea at night".into(),
            prompt_syntax: sd_models::PromptSyntax::Plain,
            loras: Vec::new(),
            negative_prompt: String::new(),
            size: self.size,
            steps,
            guidance_scale: if rows == 1 { 1.0 } else { 7.5 },
            seed,
            sampler: Sampler::Dpmpp2m,
            schedule: SigmaSchedule::Model,
            sampler_options: SamplerOptions::default(),
            img2img: None,
            embeds_guidance: false,
            clip_skip: 0,
            guidance_rescale: 0.0,
            variation: None,
            eta_noise_seed_delta: 0,
            xl: XlOptions::default(),
            span: Span::default(),
            refiner: None,
            warnings: Vec::new(),
            hires: None,
            controls: Vec::new(),
            tiling: false,
            vae_tiling: None,
            ip_adapters: Vec::new(),
            enlarge: None,
        }
    }

    fn compare(&self, options: LoadOptions) -> Result<Difference> {
        let cpu = LoadOptions { device: DeviceName::Cpu, precision: Precision::F32, ..options };
        let generate = |pipeline: &Pipeline| -> Result<Rgb> {
            let mut trajectory = pipeline.begin(&self.spec(2, 7, COMPARED_STEPS))?;
            while !trajectory.done() {
                pipeline.step(&mut [&mut trajectory])?;
            }
            Ok(pipeline.decode(&trajectory)?)
        };
        let (ours, theirs) = (generate(&self.pipeline)?, generate(&Pipeline::load(&cpu)?)?);
        let each = || ours.data.iter().zip(&theirs.data).map(|(a, b)| a.abs_diff(*b));
        Ok(Difference {
            mean_difference: each().map(f64::from).sum::<f64>() / ours.data.len() as f64,
            max_difference: each().max().unwrap_or_default(),
            allowed: if self.pipeline.info().precision == "f32" { (0.5, 2) } else { (3.0, 64) },
        })
    }

    /// The work of a step of two rows, and the times of a decode and of steps.
    fn all_times(&self, max_rows: usize) -> Result<Times> {
        let mut two = self.begin(2)?;
        let before = Pipeline::work();
        self.step(&mut two)?;
        let mut step = Pipeline::work();
        for ((_, work), (_, before)) in step.iter_mut().zip(before) {
            work.launches -= before.launches;
            work.flops -= before.flops;
            work.bytes -= before.bytes;
        }
        self.pipeline.decode(&two[0])?;
        let began = Instant::now();
        self.pipeline.decode(&two[0])?;
        let decode_seconds = began.elapsed().as_secs_f64();
        drop(two);
        let rows = self.times(max_rows, decode_seconds)?;
        let name = self.pipeline.device_name();
        let roofline_share = name.as_deref().and_then(limits).and_then(|(flops, bandwidth)| {
            let least = step
                .iter()
                .map(|(_, work)| (work.flops as f64 / flops).max(work.bytes as f64 / bandwidth));
            Some(least.sum::<f64>() * rows.get(1)?.steps_per_second)
        });
        let pool_bytes = self.pipeline.pool_bytes();
        Ok(Times { decode_seconds, rows, step, roofline_share, pool_bytes })
    }

    fn begin(&self, rows: usize) -> Result<Vec<Trajectory>> {
        let trajectories = rows.div_ceil(2) as u64;
        let steps = WARM_UP + self.evaluations;
        let begin = |seed| Ok(self.pipeline.begin(&self.spec(rows, seed, steps))?);
        (0..trajectories).map(begin).collect()
    }

    fn step(&self, trajectories: &mut [Trajectory]) -> Result<()> {
        Ok(self.pipeline.step(&mut trajectories.iter_mut().collect::<Vec<_>>())?)
    }

    /// Times growing numbers of rows, until the GPU is out of memory.
    fn times(&self, max_rows: usize, decode_seconds: f64) -> Result<Vec<Timing>> {
        let mut rows = Vec::new();
        for count in successors(Some(1), |count| Some(2 * count)).take_while(|n| *n <= max_rows) {
            match self.time(count, decode_seconds) {
                Ok(timing) => rows.push(timing),
                // Out of memory at this number of rows: report the smaller ones.
                Err(error) if !rows.is_empty() && is_out_of_memory(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(rows)
    }

    fn time(&self, rows: usize, decode_seconds: f64) -> Result<Timing> {
        let mut trajectories = self.begin(rows)?;
        for _ in 0..WARM_UP {
            self.step(&mut trajectories)?;
        }
        self.pipeline.synchronize()?;
        let began = Instant::now();
        for _ in 0..self.evaluations {
            self.step(&mut trajectories)?;
        }
        self.pipeline.synchronize()?;
        let seconds = began.elapsed().as_secs_f64() / self.evaluations as f64;
        let count = trajectories.len() as f64;
        let all = self.pipeline.info().defaults.steps as f64 * seconds + count * decode_seconds;
        Ok(Timing { rows, steps_per_second: 1.0 / seconds, images_per_second: count / all })
    }
}

/// Operations and bytes per second of a GPU; the longest matching name is used.
fn limits(name: &str) -> Option<(f64, f64)> {
    let known = GPUS.iter().filter(|(part, ..)| name.split([' ', '-']).any(|word| word == *part));
    known.max_by_key(|(part, ..)| part.len()).map(|(_, flops, bandwidth)| (*flops, *bandwidth))
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().unwrap_or("the host");
        writeln!(f, "sd-server {}: {} on {} ({name})", self.version, self.model, self.device)?;
        writeln!(f, "{}, {}, loaded in {:.1} s", self.size, self.dtype, self.load_seconds)?;
        if let Some(kernels) = &self.kernels {
            writeln!(f, "kernels          {kernels}")?;
        }
        if let Some(Difference { mean_difference, max_difference, allowed: (mean, max) }) =
            self.difference
        {
            writeln!(
                f,
                "against the CPU  mean {mean_difference:.3}/255, max {max_difference}/255 (allowed \
                 {mean} and {max})"
            )?;
        }
        if let Some(times) = &self.times {
            times.fmt(f)?;
        }
        self.failures.iter().try_for_each(|failure| writeln!(f, "{failure}"))
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "decode           {:.4} s", self.decode_seconds)?;
        writeln!(f, "rows  steps/s    images/s")?;
        for Timing { rows, steps_per_second, images_per_second } in &self.rows {
            writeln!(f, "{rows:4}  {steps_per_second:7.2}  {images_per_second:10.4}")?;
        }
        for (kind, KernelStats { launches, flops, bytes }) in &self.step {
            let (gigaflops, megabytes) = (*flops as f64 / 1e9, *bytes as f64 / 1e6);
            writeln!(
                f,
                "{kind:9}  {launches} launches a step of 2 rows, {gigaflops:.1} GFLOP, {megabytes:.1} MB"
            )?;
        }
        if let Some(bytes) = self.pool_bytes {
            let taken = bytes as f64 / f64::from(1 << 20);
            let rows = self.rows.last().map_or(0, |timing| timing.rows);
            writeln!(f, "memory           {taken:.0} MiB beyond the weights for {rows} rows")?;
        }
        match self.roofline_share {
            Some(share) => {
                writeln!(f, "roofline         {:.0} % of this GPU's limit", share * 100.0)
            }
            None => writeln!(f, "roofline         this GPU's limits are not known"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_found_by_a_word_of_their_name() {
        assert_eq!(limits("NVIDIA A100-SXM4-80GB").map(|c| c.0), Some(312e12));
        assert_eq!(limits("NVIDIA A10G").map(|c| c.0), Some(70e12));
        assert_eq!(limits("Tesla T4").map(|c| c.0), Some(65e12));
        assert_eq!(limits("NVIDIA H200"), Some((989e12, 4800e9)));
        assert_eq!(limits("NVIDIA L40S"), None);
    }
}
