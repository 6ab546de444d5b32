//! The real binary on a CUDA device, or on an emulator of one. Without either the tests say that
//! they are skipped; `SD_TEST_CUDA=required` makes that a failure.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use reqwest::blocking::Client;
use serde_json::{Value, json};

use crate::harness::{Server, sd_server};
use crate::pictures::judged;

/// Whether a device opens: the command line draws on it.
fn device() -> bool {
    let folder = tempfile::tempdir().expect("a directory");
    let mut command = sd_server(&["generate", "x", "--model", "demo", "--device", "cuda"]);
    command.args(["--steps", "1", "-W", "32", "-H", "32", "-o"]).arg(folder.path().join("x.png"));
    let done = command.output().expect("the binary starts");
    let required = std::env::var_os("SD_TEST_CUDA").is_some_and(|value| value == "required");
    let reason = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() || !required, "no CUDA device: {reason}");
    if !done.status.success() {
        eprintln!("skipped: no CUDA device: {reason}");
    }
    done.status.success()
}

/// Whether a device opens whose memory the test can choose.
fn small_device() -> bool {
    let emulated = std::env::var_os("EMUCUDA_OUT").is_some();
    if !emulated {
        eprintln!("skipped: only an emulated device can be made small");
    }
    emulated && device()
}

/// A server that may take minutes for a picture, as on an emulator it does.
fn patient(command: &mut Command) -> Server {
    const PATIENCE: Duration = Duration::from_secs(1200);
    let timeout = PATIENCE.as_millis().to_string();
    let mut server = Server::spawn(command.args(["--request-timeout-ms", &timeout]));
    server.client = Client::builder().timeout(PATIENCE).build().expect("a client");
    server
}

#[test]
fn a_picture_too_large_for_the_device_is_refused_and_the_next_is_drawn() {
    if !small_device() {
        return;
    }
    let mut command = sd_server(&["--model", "demo", "--device", "cuda"]);
    // 26 MiB beyond the weights: enough for a small picture, and gone early in a large one.
    command.env("EMUCUDA_MEMORY", (48 << 20).to_string()).args(["--max-pixels", "4194304"]);
    // The engine's own estimate must not be what refuses: the device is to run out.
    command.args(["--memory-budget-bytes", "1099511627776"]);
    let server = Server::spawn(&mut command);
    server.wait_until_ready();
    let draw = |side: u32| {
        server.json(&json!({"prompt": "a cat", "steps": 1, "width": side, "height": side}))
    };
    assert_eq!(draw(64).status, 200);
    let refused = draw(2048);
    assert_eq!(refused.status, 507);
    assert_eq!(refused.error().0, "out_of_memory");
    assert_eq!(server.ping(), 200);
    assert_eq!(draw(64).status, 200);
}

#[test]
fn models_that_go_leave_their_memory_to_those_that_come() {
    if !small_device() {
        return;
    }
    let folder = tempfile::tempdir().expect("a directory");
    let (models, report) = (folder.path().join("models"), folder.path().join("report.json"));
    std::fs::create_dir(&models).expect("a directory");
    for name in ["red", "blue"] {
        // Of few channels: each time one comes it is warmed, on an emulator too.
        let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/v1");
        std::os::unix::fs::symlink(small, models.join(name)).expect("a link");
    }
    // One model at a time; the most memory that the device gave.
    let peak = |memory: u64, names: &[&str]| {
        let mut command = sd_server(&["--device", "cuda", "--max-models", "1", "--models-dir"]);
        command.arg(&models).env("EMUCUDA_MEMORY", memory.to_string());
        command.env("EMUCUDA_REPORT", &report).args(["--memory-budget-bytes", "1099511627776"]);
        let server = patient(&mut command);
        for name in names {
            let body = json!({ "prompt": "a cat", "steps": 1, "width": 64, "height": 64 });
            let request = server.client.post(server.url(&format!("/models/{name}")));
            let reply = request.body(body.to_string()).send().expect("an answer");
            assert_eq!(reply.status(), 200, "{name}: {}", reply.text().unwrap_or_default());
        }
        server.signal("TERM");
        assert!(server.wait().success());
        let report = std::fs::read(&report).expect("a report");
        let report: Value = serde_json::from_slice(&report).expect("JSON");
        report["bytes"]["peak"].as_u64().expect("bytes")
    };
    let alone = peak(1 << 30, &["red"]);
    println!("a model and its picture take {alone} bytes");
    // Next to nothing more: if anything of a model stayed behind, the next would not fit.
    peak(alone + 4096, &["red", "blue", "red"]);
}

/// A server on a model of few channels, which an emulated device warms in a moment.
fn small_model() -> Command {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/v1");
    let mut command = sd_server(&["--device", "cuda", "--model"]);
    command.arg(model);
    command
}

/// What the emulator counts until a server that does something ends.
fn counted(command: &mut Command, work: impl FnOnce(&Server)) -> Value {
    let folder = tempfile::tempdir().expect("a directory");
    let report = folder.path().join("report.json");
    let server = patient(command.env("EMUCUDA_REPORT", &report));
    server.wait_until_ready();
    work(&server);
    server.signal("TERM");
    assert!(server.wait().success());
    serde_json::from_slice(&std::fs::read(report).expect("a report")).expect("JSON")
}

#[test]
fn whatever_loses_the_device_is_told_by_ping() {
    if !small_device() {
        return;
    }
    let warmed = counted(&mut small_model(), |_| {});
    let launches = warmed["launches"].as_u64().expect("launches");
    // A misaligned address, an illegal instruction, a time-out, an error of memory, any other.
    for code in [716, 715, 702, 214, 999] {
        let mut command = small_model();
        command.env("EMUCUDA_FAIL", format!("{code}@{}", launches + 10));
        let server = patient(&mut command);
        server.wait_until_ready();
        let body = json!({ "prompt": "a cat", "steps": 4, "width": 64, "height": 64 });
        let lost = server.json(&body);
        assert_eq!((lost.status, lost.error().0.as_str()), (500, "device_lost"), "{code}");
        assert_eq!(server.ping(), 503, "{code}");
    }
}

#[test]
fn a_picture_of_many_kinds_of_work_waits_for_its_copies_and_keeps_its_pool() {
    if !small_device() {
        return;
    }
    let report = counted(&mut small_model(), |server| {
        let hires = json!({
            "prompt": "a cat", "steps": 4, "width": 64, "height": 64, "seed": 3,
            "hires_width": 96, "hires_height": 96, "stream": true, "preview": true,
        });
        for body in [hires, json!({ "prompt": "a cat", "steps": 3, "width": 64, "height": 64 })] {
            let reply = server.json(&body);
            assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        }
    });
    println!("{report}");
    assert_eq!(report["copied"]["unsynchronized"], 0);
    assert!(report["copied"]["device_to_host"].as_u64() > Some(0));
}

#[test]
fn a_driver_that_is_older_than_the_kernels_is_named() {
    if !small_device() {
        return;
    }
    let folder = tempfile::tempdir().expect("a directory");
    let draw = |device: &str| {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/v1");
        let mut command = sd_server(&["generate", "x", "--device", device, "--steps", "1"]);
        command.args(["-W", "64", "-H", "64", "--model"]).arg(model).arg("-o");
        command.arg(folder.path().join("x.png")).env("EMUCUDA_DRIVER", "11080");
        let done = command.output().expect("the binary starts");
        (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let (drawn, reason) = draw("cuda");
    assert!(!drawn && reason.contains("the driver is for CUDA 11.8"), "{reason}");
    assert!(reason.contains("kernels are PTX"), "{reason}");
    let (drawn, reason) = draw("auto");
    assert!(drawn && reason.contains("no GPU can be used"), "{reason}");
    assert!(reason.contains("the driver is for CUDA 11.8"), "{reason}");
}

#[test]
fn metrics_count_cards_as_the_device_option_does() {
    if !small_device() {
        return;
    }
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/v1");
    let mut command = sd_server(&["--device", "cuda:1", "--model"]);
    let server = patient(command.arg(model).env("EMUCUDA_DEVICES", "3"));
    server.wait_until_ready();
    // The emulated management library counts from the last card.
    for (card, used) in [(0, false), (1, true), (2, false)] {
        let read = |name: &str| server.metric(&format!("{name}{{gpu=\"{card}\"}}"));
        assert_eq!(read("sd_gpu_power_watts"), f64::from(card) + 1.0);
        assert_eq!(read("sd_gpu_memory_used_bytes") > 0.0, used, "{card}");
    }
}

/// Three scenes of six steps: an emulated device takes minutes for more, and with this sampler the
/// rules hold for them as they do at 20 steps of the model's own.
#[test]
fn scenes_in_f16_show_what_those_of_the_cpu_show() {
    if !device() {
        return;
    }
    let mut command = sd_server(&["--model", "demo", "--device", "cuda", "--dtype", "f16"]);
    let (ours, cpu) = (patient(&mut command), Server::ready(&["--dtype", "f32"]));
    ours.wait_until_ready();
    let judge = |server| judged(server, serde_json::json!({ "steps": 6, "scheduler": "dpmpp_2m" }));
    for (ours, reference) in judge(&ours).zip(judge(&cpu)).take(3) {
        println!("{}: f16 fails {:?}, the CPU {:?}", ours.0, ours.1, reference.1);
        assert_eq!(ours, reference);
        assert!(ours.1.is_empty(), "{ours:?}");
    }
}

#[test]
fn a_card_is_verified_by_one_command() {
    if !device() {
        return;
    }
    let verify = |more: &[&str]| {
        let mut command = sd_server(&["bench", "--verify", "--device", "cuda", "--model", "demo"]);
        command.args(["--size", "64x64", "--max-rows", "2", "--evaluations", "1"]).args(more);
        let done = command.output().expect("the binary starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("text")
    };
    let report: Value = serde_json::from_str(&verify(&["--json"])).expect("JSON");
    println!("{report}");
    assert_eq!((&report["device"], &report["size"]), (&json!("cuda:0"), &json!("64x64")));
    assert_eq!((&report["dtype"], &report["allowed"]), (&json!("f16"), &json!([3.0, 64])));
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64).expect(pointer);
    assert!(number("/mean_difference") <= 3.0 && number("/max_difference") <= 64.0);
    let kernels = report["kernels"].as_str().expect("kernels");
    assert!(kernels.starts_with("PTX ") || kernels.starts_with("cubin "), "{kernels}");
    for (place, rows) in [1.0, 2.0].into_iter().enumerate() {
        assert_eq!(number(&format!("/rows/{place}/rows")), rows);
        assert!(number(&format!("/rows/{place}/steps_per_second")) > 0.0);
    }
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(2));
    let step = report["step"].as_array().expect("kinds of kernels");
    for kind in ["attention", "combine", "layout", "norm", "product"] {
        let counted = step.iter().find(|counted| counted[0] == kind).expect(kind);
        assert!(counted[1]["launches"].as_u64() > Some(0), "{kind}");
    }

    let table = verify(&[]);
    println!("{table}");
    for line in ["against the CPU", "decode", "rows  steps/s", "   1  ", "   2  ", "roofline"] {
        assert!(table.lines().any(|found| found.starts_with(line)), "{line:?} in {table}");
    }
}
