//! The real server under fault: mixed clients, some of them hostile, while it is killed and
//! terminated, its disk fills, its memory is short and its files are replaced. The figures of a run
//! are in docs/reliability.md.
//!
//! ```sh
//! cargo build --release && cargo build --release --example chaos
//! target/release/examples/chaos storm target/release/sd-server          # minutes
//! target/release/examples/chaos storm --short target/release/sd-server  # within a minute
//! target/release/examples/chaos load target/release/sd-server           # /ping under 64 attackers
//! ```
//!
//! All traffic is on the loopback interface. The exit code is 1 if anything was wrong.

#![expect(clippy::print_stdout, reason = "its figures")]

mod attack;
mod clients;
mod files;
mod hooks;
mod ledger;
mod load;
mod process;
mod storm;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The source of chance, which a run's seed repeats.
type Dice = rand::rngs::StdRng;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// 16 clients while the server is killed 20 times and terminated 5 times
    Storm(storm::Options),
    /// The latency of /ping while 64 clients do their worst and the model is busy; the median of
    /// three runs
    Load(load::Options),
    /// The clients of `load`, in a process of their own
    #[command(hide = true)]
    Attack(attack::Options),
    /// Loads and unloads two models and swaps a LoRA, round after round
    Swap(files::Options),
}

fn main() -> ExitCode {
    let wrong = match Arguments::parse().mode {
        Mode::Storm(options) => storm::run(&options),
        Mode::Load(options) => load::run(&options),
        Mode::Attack(options) => attack::run(&options),
        Mode::Swap(options) => files::run(&options),
    };
    for sentence in &wrong {
        println!("WRONG: {sentence}");
    }
    ExitCode::from(u8::from(!wrong.is_empty()))
}

/// The top of the repository, whose built-in model's files serve as models by name.
fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
