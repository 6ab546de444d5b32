//! Models and LoRAs that come, go and are replaced. Files are exchanged by renaming, as an operator
//! does: a file that is in use is never truncated.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use rand::Rng as _;
use serde_json::json;

use crate::clients::request;
use crate::process::{Plan, Process};
use crate::{Dice, repository, wire};

/// The folders that the server reads.
pub(crate) struct Files {
    folder: PathBuf,
    pub(crate) models: PathBuf,
    pub(crate) loras: PathBuf,
}

impl Files {
    /// Two copies of the built-in model, one that cannot be loaded, and two versions of a LoRA.
    pub(crate) fn new(folder: &Path) -> io::Result<Self> {
        let (models, loras) = (folder.join("models"), folder.join("loras"));
        let demo = repository().join("models/demo");
        for name in ["left", "right", "broken"] {
            copy(&demo, &models.join(name))?;
        }
        fs::write(models.join("broken/unet/config.json"), "{")?;
        fs::create_dir_all(&loras)?;
        let first = fs::read(demo.join("loras/sepia.safetensors"))?;
        let mut second = first.clone();
        // The last tensor's numbers change their signs.
        let end = second.len();
        second[end - 4096..].chunks_exact_mut(2).for_each(|number| number[1] ^= 0x80);
        fs::write(folder.join("first"), first)?;
        fs::write(folder.join("second"), second)?;
        let files = Self { folder: folder.to_owned(), models, loras };
        files.swap_lora(0)?;
        Ok(files)
    }

    /// Makes one of the two versions the LoRA.
    pub(crate) fn swap_lora(&self, version: u64) -> io::Result<()> {
        let next = self.folder.join("next");
        fs::copy(self.folder.join(["first", "second"][version as usize % 2]), &next)?;
        fs::rename(next, self.loras.join("swapped.safetensors"))
    }

    /// Changes one thing at random.
    pub(crate) fn disturb(&self, dice: &mut Dice) -> io::Result<()> {
        let lora = self.loras.join("swapped.safetensors");
        match dice.random_range(0..5) {
            0 | 1 => self.swap_lora(dice.random_range(0..2))?,
            2 => {
                let next = self.folder.join("next");
                fs::write(&next, b"\x10\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"F")?;
                fs::rename(next, lora)?;
            }
            3 => drop(fs::remove_file(lora)),
            _ => {
                let (here, away) = (self.models.join("right"), self.folder.join("right-away"));
                let _ = fs::rename(&here, &away).or_else(|_| fs::rename(&away, &here));
            }
        }
        Ok(())
    }
}

/// Copies a folder with its folders.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (entry, to) = (entry?, to);
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy(&entry.path(), &target)?,
            false => drop(fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}

#[derive(Args)]
pub(crate) struct Options {
    /// The server's binary
    binary: PathBuf,
    /// Rounds of loading and unloading two models and of swapping a LoRA
    #[arg(long, default_value_t = 100)]
    rounds: u64,
}

/// Loads, draws with and evicts two models by turns, and swaps a LoRA: the memory after the last
/// round is at most 3 % above that after the fifth.
pub(crate) fn run(options: &Options) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a folder");
    let files = Files::new(folder.path()).expect("the models' files");
    let (models, loras) = (files.models.to_string_lossy(), files.loras.to_string_lossy());
    let arguments = ["--models-dir", &models, "--loras-dir", &loras, "--max-models", "1"];
    let plan = Plan::new(&options.binary, folder.path(), &arguments);
    let server = plan.start(None).expect("it starts");
    let client = wire::client();
    let mut wrong = Vec::new();
    let mut draw = |path: &str, body: &serde_json::Value| {
        let request = client.post(format!("http://{}{path}", plan.address())).json(body);
        match wire::send(request) {
            Some(answer) if answer.status == 200 => {}
            answer => wrong.push(format!("{path}: {:?}", answer.map(|a| a.status))),
        }
    };
    let resident =
        |server: &Process, enough| server.settled("VmRSS", enough, Duration::from_secs(5));
    let (mut fifth, mut threads) = (0, 0);
    for round in 1..=options.rounds {
        for name in ["left", "right"] {
            draw(&format!("/models/{name}"), &request(round));
        }
        files.swap_lora(round).expect("it is swapped");
        let mut body = request(round);
        body["loras"] = json!([{ "name": "swapped" }]);
        draw("/invocations", &body);
        if round == 5 {
            (fifth, threads) = (resident(&server, 0), server.status("Threads"));
        }
    }
    let last = resident(&server, fifth);
    let growth = (last as f64 / fifth as f64 - 1.0) * 100.0;
    println!(
        "{} rounds; resident: {fifth} KiB after round 5, {last} KiB at the end ({growth:+.1} %)",
        options.rounds
    );
    let threads_now = server.settled("Threads", threads, Duration::from_secs(15));
    println!("threads: {threads} after round 5, {threads_now} at the end");
    if growth > 3.0 {
        wrong.push(format!("memory grew by {growth:.1} %"));
    }
    if threads_now > threads + 1 {
        wrong.push(format!("{threads} threads became {threads_now}"));
    }
    wrong
}
