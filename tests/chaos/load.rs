//! The latency of `/ping` on connections of its own, while the attackers attack and the model draws
//! on one of the processors.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;

use crate::process::{Plan, Process, ping};

/// SageMaker's limit for `/ping`.
const SAGEMAKER: Duration = Duration::from_secs(2);

/// The bound of the 99.9th percentile.
const BOUND: Duration = Duration::from_millis(50);

#[derive(Args)]
pub(crate) struct Options {
    /// The server's binary, built with --release
    binary: PathBuf,
    /// Seconds of a run
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Runs, of which the median counts
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

/// The latencies of a run, sorted. A ping without an answer counts as [`SAGEMAKER`].
struct Run {
    sorted: Vec<Duration>,
    unanswered: usize,
    /// KiB, the highest.
    resident: u64,
}

impl Run {
    /// The latency that a share of the pings does not exceed.
    fn at(&self, share: f64) -> Duration {
        let rank = (share * self.sorted.len() as f64).ceil() as usize;
        self.sorted[rank.clamp(1, self.sorted.len()) - 1]
    }
}

pub(crate) fn run(options: &Options) -> Vec<String> {
    println!("       pings   p50 ms   p99 ms   p99.9 ms   max ms   unanswered   peak MiB");
    let mut tails: Vec<Duration> = (1..=options.runs)
        .map(|number| {
            let run = measure(options);
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            println!(
                "run {number}: {:6} {:8.2} {:8.2} {:10.2} {:8.2} {:12} {:10}",
                run.sorted.len(),
                ms(run.at(0.5)),
                ms(run.at(0.99)),
                ms(run.at(0.999)),
                ms(run.at(1.0)),
                run.unanswered,
                run.resident >> 10,
            );
            run.at(0.999)
        })
        .collect();
    tails.sort();
    let median = tails[tails.len() / 2];
    println!("median of p99.9: {:.2} ms", median.as_secs_f64() * 1e3);
    let bad = median > BOUND;
    bad.then(|| format!("the median of p99.9 is above {BOUND:?}")).into_iter().collect()
}

fn measure(options: &Options) -> Run {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = Plan::new(&options.binary, folder.path(), &["--threads", "1"]);
    let server: Process = plan.start(None).expect("it starts");
    let address = plan.address();
    let attack = |seconds: u64| {
        let mut command = Command::new("nice");
        let this = std::env::current_exe().expect("a path");
        command.args(["-n", "19"]).arg(this).args(["attack", &address, "--seconds"]);
        command.arg(seconds.to_string()).stdout(Stdio::null()).spawn().expect("it starts")
    };
    // The attackers make their bodies first.
    let mut attackers = attack(options.seconds + 3);
    sleep(Duration::from_secs(3));
    let (began, mut unanswered, mut resident) = (Instant::now(), 0, 0);
    let mut sorted = Vec::new();
    while began.elapsed() < Duration::from_secs(options.seconds) {
        let asked = Instant::now();
        let answered = ping(&address, SAGEMAKER) == Some(200);
        unanswered += usize::from(!answered);
        sorted.push(if answered { asked.elapsed() } else { SAGEMAKER });
        resident = resident.max(server.status("VmRSS"));
        sleep(Duration::from_millis(5));
    }
    let _ = attackers.wait();
    sorted.sort();
    Run { sorted, unanswered, resident }
}
