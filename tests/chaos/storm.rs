//! The storm: clients on one side, endings and shortages on the other, and the reckoning.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use clap::Args;
use rand::{Rng as _, SeedableRng as _};

use crate::clients::{KEYS, Scene, Visitor, request};
use crate::files::Files;
use crate::hooks::{Receiver, SECRET};
use crate::ledger::Ledger;
use crate::process::{Plan, Process};
use crate::{Dice, wire};

const CLIENTS: u64 = 16;
/// `--drain-timeout-ms`, and what the server may take beyond it.
const DRAIN: Duration = Duration::from_secs(4);
const AFTER_DRAIN: Duration = Duration::from_secs(2);
/// Time for all accepted jobs and their webhooks after the storm.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes of the disk for jobs.
const DISK: &str = "64m";

#[derive(Args)]
pub(crate) struct Options {
    /// The server's binary
    binary: PathBuf,
    /// Times of SIGKILL
    #[arg(long, default_value_t = 20)]
    kills: u64,
    /// Times of SIGTERM
    #[arg(long, default_value_t = 5)]
    terms: u64,
    /// Seconds without an ending, for the memory and the threads
    #[arg(long, default_value_t = 60)]
    calm: u64,
    /// Within a minute: 3 times SIGKILL, once SIGTERM
    #[arg(long)]
    short: bool,
    /// Another order of everything
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keeps the folder with the server's log
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(options: &Options) -> Vec<String> {
    let (kills, terms, calm) =
        if options.short { (3, 1, 12) } else { (options.kills, options.terms, options.calm) };
    let mut folder = tempfile::tempdir().expect("a folder");
    folder.disable_cleanup(options.keep);
    let files = Files::new(folder.path()).expect("the models' files");
    let disk = Disk::mount(folder.path());
    let receiver = Receiver::new();
    let plan = plan(options, folder.path(), &files, &disk, &receiver);
    let scene = Scene {
        address: plan.address(),
        ledger: Ledger::default(),
        receiver,
        endings: AtomicU64::new(0),
        over: AtomicBool::new(false),
        short: AtomicBool::new(false),
    };
    let began = Instant::now();
    let mut dice = Dice::seed_from_u64(options.seed);
    let director = Director {
        plan: &plan,
        scene: &scene,
        files: &files,
        disk: &disk,
        scratch: folder.path().join("beside"),
    };
    thread::scope(|scope| {
        let server = plan.start(None).expect("the server starts");
        scope.spawn(|| scene.receiver.run(&scene.ledger, options.seed));
        for number in 0..CLIENTS {
            let visitor = Visitor::new(&scene, number, options.seed);
            scope.spawn(|| visitor.run());
        }
        let server = director.end_it(server, kills, terms, &mut dice);
        // As short as memory is while the model still fits.
        let server = director.starve(server, if options.short { 3 } else { 15 });
        let server = director.restart(server);
        sleep(Duration::from_secs(calm / 4));
        director.calm(&server, calm - calm / 4, &mut dice);
        scene.over.store(true, Ordering::SeqCst);
        director.reckon(server);
        scene.receiver.over.store(true, Ordering::SeqCst);
    });
    let book = scene.ledger.book();
    println!("{:.0} s; answers by status: {:?}", began.elapsed().as_secs_f64(), book.answers);
    println!(
        "{} pictures compared; {} requests unanswered around an ending",
        book.pictures, book.unanswered
    );
    drop(book);
    if options.keep {
        println!("the log: {}", plan.log.display());
    }
    scene.ledger.sentences()
}

/// The options of the server; those for durable jobs where the build has them.
fn plan(options: &Options, folder: &Path, files: &Files, disk: &Disk, receiver: &Receiver) -> Plan {
    let (models, loras) = (files.models.to_string_lossy(), files.loras.to_string_lossy());
    let drain = DRAIN.as_millis().to_string();
    let (keys, hosts) = (KEYS.join(","), receiver.address.to_string());
    let arguments = [
        "--threads",
        "1",
        "--max-models",
        "1",
        "--models-dir",
        &models,
        "--loras-dir",
        &loras,
        "--drain-timeout-ms",
        &drain,
        "--request-timeout-ms",
        "30000",
        "--stream-timeout-ms",
        "30000",
        "--api-key",
        &keys,
        "--max-jobs",
        "100000",
        "--max-queue",
        "32",
        "--webhook-hosts",
        &hosts,
        "--webhook-secret",
        SECRET,
    ];
    let mut plan = Plan::new(&options.binary, folder, &arguments);
    plan.add("--max-jobs-per-client", "100000");
    plan.add("--max-job-bytes", "1000000000");
    if !plan.add("--data-dir", &disk.folder.to_string_lossy()) {
        println!("this build has no --data-dir: jobs do not survive an ending");
    }
    plan
}

struct Director<'a> {
    plan: &'a Plan,
    scene: &'a Scene,
    files: &'a Files,
    disk: &'a Disk,
    /// For the data of a second process.
    scratch: PathBuf,
}

impl Director<'_> {
    fn start(&self, data_kib: Option<u64>) -> Process {
        let server = self.plan.start(data_kib).unwrap_or_else(|error| panic!("{error}"));
        self.scene.endings.fetch_add(1, Ordering::SeqCst);
        server
    }

    /// Ends the server again and again, at random moments, in random order.
    fn end_it(
        &self,
        mut server: Process,
        mut kills: u64,
        mut terms: u64,
        dice: &mut Dice,
    ) -> Process {
        let mut slowest = Duration::ZERO;
        let (all, mut filled) = (kills + terms, 0);
        while kills + terms > 0 {
            self.files.disturb(dice).expect("the files change");
            let full = filled < 1 + all / 8 && dice.random_range(0..4) == 0;
            if full {
                filled += 1;
                self.disk.fill();
                sleep(Duration::from_millis(1500));
            }
            sleep(Duration::from_millis(500 + dice.random_range(0..4000)));
            self.scene.endings.fetch_add(1, Ordering::SeqCst);
            if dice.random_range(0..kills + terms) < kills {
                kills -= 1;
                server.kill();
            } else {
                terms -= 1;
                match server.terminate(DRAIN + AFTER_DRAIN) {
                    Ok((status, time)) => {
                        slowest = slowest.max(time);
                        if !status.success() {
                            self.scene.ledger.wrong(format!("after SIGTERM: {status}"));
                        }
                    }
                    Err(sentence) => self.scene.ledger.wrong(sentence),
                }
            }
            if full {
                self.disk.empty();
            }
            server = self.start(None);
        }
        println!(
            "{all} endings; the slowest SIGTERM took {:.2} s; the disk was full {filled} times",
            slowest.as_secs_f64()
        );
        server
    }

    /// Lets the clients run while memory is short. The server may end by that, and is started again.
    fn starve(&self, mut server: Process, seconds: u64) -> Process {
        let used = server.status("VmData");
        self.scene.endings.fetch_add(1, Ordering::SeqCst);
        self.scene.short.store(true, Ordering::SeqCst);
        server.kill();
        let limit = Some(used + (128 << 10));
        server = self.start(limit);
        let (began, mut ended) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(seconds) {
            if server.ended().is_some() {
                ended += 1;
                self.scene.endings.fetch_add(1, Ordering::SeqCst);
                server = self.start(limit);
            }
            sleep(Duration::from_millis(100));
        }
        println!(
            "with {} KiB of memory for {seconds} s the server ended {ended} times",
            used + (128 << 10)
        );
        server
    }

    fn restart(&self, mut server: Process) -> Process {
        self.scene.endings.fetch_add(1, Ordering::SeqCst);
        server.kill();
        let server = self.start(None);
        self.scene.short.store(false, Ordering::SeqCst);
        server
    }

    /// The clients go on, without endings.
    fn calm(&self, server: &Process, seconds: u64, dice: &mut Dice) {
        println!(
            "under load: {} KiB resident, {} threads",
            server.status("VmRSS"),
            server.status("Threads")
        );
        for _ in 0..seconds {
            self.files.disturb(dice).expect("the files change");
            sleep(Duration::from_secs(1));
        }
    }

    /// After the storm: every job has one end, which its webhook has told, memory and threads are
    /// back, no panic is in the log.
    fn reckon(&self, mut server: Process) {
        let ledger = &self.scene.ledger;
        let client = wire::client();
        let url = format!("http://{}", self.plan.address());
        self.scene.receiver.stays.store(true, Ordering::SeqCst);
        let began = Instant::now();
        loop {
            let (_, open) = ledger.ends();
            for (id, job) in &open {
                ledger.look(&client, &url, id, job);
            }
            let (left, untold) = (ledger.ends().1.len(), ledger.untold());
            if left + untold == 0 || began.elapsed() > PATIENCE {
                if left > 0 {
                    ledger.wrong(format!("{left} accepted jobs had no end after {PATIENCE:?}"));
                }
                if untold > 0 {
                    ledger.wrong(format!("{untold} webhooks had not come after {PATIENCE:?}"));
                }
                break;
            }
            sleep(Duration::from_millis(200));
        }
        for key in KEYS {
            ledger.list(&client, &url, key);
        }
        let jobs = ledger.book().jobs.len();
        let (ends, _) = ledger.ends();
        println!("{jobs} jobs accepted; their ends: {ends:?}");
        println!("completed by priority: {:?}", ledger.priorities());
        println!("{}; {}", ledger.webhooks(), self.scene.receiver.figures());
        let drawn = wire::send(client.post(format!("{url}/invocations")).json(&request(1)));
        if drawn.is_none_or(|answer| answer.status != 200) {
            ledger.wrong("no picture after the storm");
        }
        self.measure(&server);
        match server.terminate(DRAIN + AFTER_DRAIN) {
            Ok((_, time)) if time <= AFTER_DRAIN => {
                println!("idle: SIGTERM took {:.2} s", time.as_secs_f64());
            }
            Ok((_, time)) => ledger.wrong(format!("idle: SIGTERM took {time:?}")),
            Err(sentence) => ledger.wrong(format!("idle: {sentence}")),
        }
        let log = fs::read_to_string(&self.plan.log).unwrap_or_default();
        println!("{} lines in the log", log.lines().count());
        for line in log.lines().filter(|line| line.contains("panicked at")) {
            ledger.wrong(format!("in the log: {line}"));
        }
    }

    /// Compares memory and threads with those of a new process that has drawn with every model.
    fn measure(&self, server: &Process) {
        let fresh = self.plan.beside(&self.scratch);
        let other = fresh.start(None).expect("it starts");
        let client = wire::client();
        for path in ["/invocations", "/models/left"] {
            let ask = client.post(format!("http://{}{path}", fresh.address()));
            let _ = wire::send(ask.bearer_auth(KEYS[0]).json(&request(1)));
        }
        sleep(Duration::from_secs(1));
        let (memory, threads) = (other.status("VmRSS"), other.status("Threads"));
        drop(other);
        // Idle threads of the runtime end after 10 s.
        let patience = Duration::from_secs(20);
        let threads_now = server.settled("Threads", threads + 2, patience);
        let bound = memory + memory / 4 + (32 << 10);
        let memory_now = server.settled("VmRSS", bound, patience);
        println!(
            "resident: {memory} KiB of a new process, {memory_now} KiB after the storm; \
             threads: {threads} and {threads_now}"
        );
        if memory_now > bound {
            self.scene.ledger.wrong(format!("{memory_now} KiB are resident after the storm"));
        }
        if threads_now > threads + 2 {
            self.scene.ledger.wrong(format!("{threads_now} threads after the storm"));
        }
    }
}

/// A small disk of its own, if the system allows to mount one.
struct Disk {
    folder: PathBuf,
    mounted: bool,
}

impl Disk {
    fn mount(folder: &Path) -> Self {
        let folder = folder.join("data");
        fs::create_dir_all(&folder).expect("a folder");
        let size = format!("size={DISK}");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&folder).output();
        let mounted = mount.is_ok_and(|output| output.status.success());
        if !mounted {
            println!("no disk can be mounted here: it does not fill in this run");
        }
        Self { folder, mounted }
    }

    /// Takes all room.
    fn fill(&self) {
        if self.mounted {
            // Ends with an error when the disk is full, as it should.
            let chunk = vec![0; 1 << 20];
            let mut file = fs::File::create(self.folder.join("filler")).expect("a file");
            while std::io::Write::write_all(&mut file, &chunk).is_ok() {}
            let _ = std::io::Write::write_all(&mut file, &chunk[..4096]);
        }
    }

    fn empty(&self) {
        let _ = fs::remove_file(self.folder.join("filler"));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("--lazy").arg(&self.folder).status();
        }
    }
}
