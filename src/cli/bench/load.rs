//! `sd-server bench`: sends load to a running server and reports throughput and latency. With a
//! rate it is an open loop: requests arrive by a Poisson process, and latency counts from the
//! scheduled time, so that a slow server cannot delay arrivals (coordinated omission). With clients
//! it is a closed loop: each client has one request in flight.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rand_distr::Exp1;
use reqwest::Client;
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::options::{millis, min};

/// Configuration of `bench`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Load")]
pub(crate) struct LoadConfig {
    /// URL of the server: http://host:port
    #[arg(required_unless_present = "verify", conflicts_with = "verify", value_parser = url)]
    pub(crate) url: Option<String>,
    /// Number of requests per second in an open loop: random (Poisson) arrivals, independent of
    /// responses. Shows the behaviour under overload
    #[arg(long, conflicts_with = "clients", value_parser = positive)]
    pub(crate) rate: Option<f64>,
    /// Number of clients in a closed loop: each sends its next request when it has a response
    #[arg(long, default_value = "8", value_parser = min::<1>)]
    pub(crate) clients: usize,
    /// Time for which requests are sent, in seconds
    #[arg(long = "duration-s", default_value = "30", value_parser = seconds)]
    pub(crate) duration: Duration,
    /// Request body, as JSON; each request gets its own seed unless it has one
    #[arg(long, default_value = r#"{"prompt":"a red house by the sea","steps":20}"#)]
    #[arg(value_parser = object)]
    pub(crate) body: JsonObject,
    /// Time for a request, in milliseconds; after it the request counts as unanswered
    #[arg(long = "timeout-ms", default_value = "120000", value_parser = millis::<1>)]
    pub(crate) timeout: Duration,
    /// Seed of the random arrivals; the same seed gives the same arrivals
    #[arg(long, default_value = "1")]
    pub(crate) arrivals_seed: u64,
    /// Print JSON instead of a table
    #[arg(long, help_heading = None)]
    pub(crate) json: bool,
}

/// A JSON object.
type JsonObject = Map<String, Value>;

fn url(text: &str) -> Result<String, String> {
    let known = ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
    let url = known.then(|| text.trim_end_matches('/').to_owned());
    url.ok_or_else(|| "must start with http:// or https://".into())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if number > 0.0 && number <= 1e6 => Ok(number),
        _ => Err("must be a positive number".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    positive(text).map(Duration::from_secs_f64)
}

fn object(text: &str) -> Result<JsonObject, String> {
    serde_json::from_str(text).map_err(|error| format!("must be a JSON object: {error}"))
}

/// The result of a request.
struct Sample {
    latency: Duration,
    /// HTTP status; 0 without a response.
    status: u16,
    images: usize,
}

/// Sends requests, each with its own seed.
struct Sender {
    client: Client,
    url: String,
    body: JsonObject,
    sent: AtomicU64,
}

/// The result of a run.
#[derive(Debug, Serialize)]
struct LoadReport {
    requests: usize,
    /// Number of requests by status; 0 is no response.
    statuses: BTreeMap<u16, usize>,
    seconds: f64,
    requests_per_second: f64,
    images_per_second: f64,
    /// Latency of the requests that returned images.
    latency_seconds: Option<Latency>,
    /// Mean batch size on the server meanwhile, if it reports it.
    rows_per_step: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Latency {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

pub(crate) async fn run(config: LoadConfig) -> Result<()> {
    let url = config.url.unwrap_or_default();
    let client = Client::builder().timeout(config.timeout).build()?;
    let ping = client.get(format!("{url}/ping")).send().await;
    let ping = ping.with_context(|| format!("{url} does not respond"))?;
    ensure!(ping.status().is_success(), "{url} is not ready: {}", ping.status());
    let steps_before = steps(&client, &url).await;
    let (body, sent) = (config.body, AtomicU64::new(0));
    let endpoint = format!("{url}/invocations");
    let sender = Arc::new(Sender { client: client.clone(), url: endpoint, body, sent });
    let began = Instant::now();
    let samples = match config.rate {
        Some(rate) => open(&sender, rate, config.duration, config.arrivals_seed).await,
        None => closed(&sender, config.clients, config.duration).await,
    };
    let mut report = LoadReport::new(&samples, began.elapsed());
    if let (Some(before), Some(after)) = (steps_before, steps(&client, &url).await) {
        let (rows, count) = (after.0 - before.0, after.1 - before.1);
        report.rows_per_step = (count > 0.0).then_some(rows / count);
    }
    print(&report, config.json)
}

/// Prints a report as a table or as JSON.
pub(super) fn print(report: &(impl fmt::Display + Serialize), json: bool) -> Result<()> {
    let json = json.then(|| serde_json::to_string_pretty(report)).transpose()?;
    let text = json.map_or_else(|| report.to_string(), |json| json + "\n");
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// Sends requests in an open loop.
async fn open(sender: &Arc<Sender>, rate: f64, duration: Duration, seed: u64) -> Vec<Sample> {
    let mut requests = JoinSet::new();
    let mut due = Instant::now();
    let end = due + duration;
    // The gaps of a Poisson process of rate one.
    for gap in StdRng::seed_from_u64(seed).sample_iter::<f64, _>(Exp1) {
        due += Duration::from_secs_f64(gap / rate);
        if due >= end {
            break;
        }
        sleep_until(due).await;
        let sender = Arc::clone(sender);
        requests.spawn(async move { sender.send(due).await });
    }
    requests.join_all().await
}

/// Sends requests in a closed loop.
async fn closed(sender: &Arc<Sender>, clients: usize, duration: Duration) -> Vec<Sample> {
    let end = Instant::now() + duration;
    let client = async |sender: Arc<Sender>| {
        let mut samples = Vec::new();
        while Instant::now() < end {
            samples.push(sender.send(Instant::now()).await);
        }
        samples
    };
    let clients = (0..clients).map(|_| client(Arc::clone(sender)));
    futures_util::future::join_all(clients).await.into_iter().flatten().collect()
}

impl Sender {
    /// Sends one request; its latency counts from `due`.
    async fn send(&self, due: Instant) -> Sample {
        let k = self.sent.fetch_add(1, Ordering::Relaxed);
        let mut body = self.body.clone();
        body.entry("seed").or_insert(k.into());
        let images = ["n", "num_images_per_prompt"].iter().find_map(|name| body.get(*name));
        let images = images.and_then(Value::as_u64).unwrap_or(1) as usize;
        let request = self.client.post(&self.url).body(Value::Object(body).to_string());
        let request = request.header(CONTENT_TYPE, "application/json");
        let response = async {
            let response = request.header(ACCEPT, "application/json").send().await?;
            let status = response.status();
            response.bytes().await?;
            Ok::<_, reqwest::Error>(status.as_u16())
        };
        let status = response.await.unwrap_or(0);
        Sample { latency: due.elapsed(), status, images }
    }
}

/// Sum of rows and number of steps so far, from the server's metrics.
async fn steps(client: &Client, url: &str) -> Option<(f64, f64)> {
    let text = client.get(format!("{url}/metrics")).send().await.ok()?.text().await.ok()?;
    let value = |name| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        // A server without a step yet has no such series.
        value.unwrap_or(0.0)
    };
    Some((value("sd_batch_size_sum "), value("sd_batch_size_count ")))
}

impl LoadReport {
    fn new(samples: &[Sample], elapsed: Duration) -> Self {
        let mut statuses = BTreeMap::new();
        for sample in samples {
            *statuses.entry(sample.status).or_insert(0) += 1;
        }
        let completed = || samples.iter().filter(|sample| sample.status == 200);
        let latencies = completed().map(|sample| sample.latency.as_secs_f64()).collect();
        let seconds = elapsed.as_secs_f64();
        let images: usize = completed().map(|sample| sample.images).sum();
        Self {
            requests: samples.len(),
            statuses,
            seconds,
            requests_per_second: completed().count() as f64 / seconds,
            images_per_second: images as f64 / seconds,
            latency_seconds: Latency::of(latencies),
            rows_per_step: None,
        }
    }
}

impl Latency {
    fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        // Nearest-rank percentile.
        let rank = |p: f64| {
            let place = (p * seconds.len() as f64).ceil() as usize;
            seconds.get(place.saturating_sub(1)).copied()
        };
        Some(Self {
            mean: seconds.iter().sum::<f64>() / seconds.len() as f64,
            p50: rank(0.5)?,
            p90: rank(0.9)?,
            p99: rank(0.99)?,
            max: rank(1.0)?,
        })
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "requests      {} in {:.1} s", self.requests, self.seconds)?;
        for (status, count) in &self.statuses {
            match status {
                0 => writeln!(f, "  unanswered  {count}")?,
                _ => writeln!(f, "  {status}         {count}")?,
            }
        }
        writeln!(f, "throughput    {:.2} requests/s", self.requests_per_second)?;
        writeln!(f, "              {:.2} images/s", self.images_per_second)?;
        if let Some(Latency { mean, p50, p90, p99, max }) = &self.latency_seconds {
            writeln!(f, "latency       mean {mean:.3} s, p50 {p50:.3}, p90 {p90:.3}")?;
            writeln!(f, "              p99 {p99:.3}, max {max:.3}")?;
        }
        if let Some(rows) = self.rows_per_step {
            writeln!(f, "rows per step {rows:.2}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let latency = Latency::of((1..=200).rev().map(f64::from).collect()).expect("values");
        assert_eq!((latency.p50, latency.p90, latency.p99), (100.0, 180.0, 198.0));
        assert_eq!((latency.max, latency.mean), (200.0, 100.5));
        assert!(Latency::of(Vec::new()).is_none());
    }
}
