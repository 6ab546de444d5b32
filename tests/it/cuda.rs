//! The real binary on a CUDA device, or on an emulator of one. Without either the tests say that
//! they are skipped; `SD_TEST_CUDA=required` makes that a failure.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Server, sd_server};

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
        println!("skipped: no CUDA device: {reason}");
    }
    done.status.success()
}

#[test]
fn a_picture_too_large_for_the_device_is_refused_and_the_next_is_drawn() {
    if !device() {
        return;
    }
    if std::env::var_os("EMUCUDA_OUT").is_none() {
        println!("skipped: only an emulated device can be made small");
        return;
    }
    let mut command = sd_server(&["--model", "demo", "--device", "cuda"]);
    command.env("EMUCUDA_MEMORY", (64 << 20).to_string());
    // The engine's own estimate must not be what refuses: the device is to run out.
    command.args(["--memory-budget-bytes", "1099511627776"]);
    let server = Server::spawn(&mut command);
    server.wait_until_ready();
    let draw = |side: u32| {
        server.json(&json!({"prompt": "a cat", "steps": 1, "width": side, "height": side}))
    };
    assert_eq!(draw(64).status, 200);
    let refused = draw(1024);
    assert_eq!(refused.status, 507);
    assert_eq!(refused.error().0, "out_of_memory");
    assert_eq!(server.ping(), 200);
    assert_eq!(draw(64).status, 200);
}

/// Stable Diffusion v1.4 in its shapes: configurations, a tokenizer, and f16 files of zeros that
/// take no room on the disk.
fn full_size(folder: &Path) {
    let shapes = std::fs::read("tests/shapes/stable-diffusion-v1-4.json").expect("the shapes");
    let shapes: Value = serde_json::from_slice(&shapes).expect("JSON");
    let create = |name: &str| {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a directory");
        File::create(path).expect("a file")
    };
    for (name, config) in shapes["files"].as_object().expect("files") {
        serde_json::to_writer(create(name), config).expect("a configuration");
    }
    for name in ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"] {
        let from = Path::new("models/demo/tokenizer").join(name);
        std::io::copy(
            &mut File::open(from).expect("the tokenizer"),
            &mut create(&format!("tokenizer/{name}")),
        )
        .expect("a copy");
    }
    for (name, tensors) in shapes["tensors"].as_object().expect("tensors") {
        let mut end = 0;
        let mut header = serde_json::Map::new();
        for (tensor, shape) in tensors.as_object().expect("shapes") {
            let sides = shape.as_array().expect("a shape").iter();
            let begin = end;
            end += 2 * sides.map(|side| side.as_u64().expect("a number")).product::<u64>();
            let entry = json!({"dtype": "F16", "shape": shape, "data_offsets": [begin, end]});
            header.insert(tensor.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let mut file = create(name);
        file.write_all(&(header.len() as u64).to_le_bytes()).expect("room");
        file.write_all(header.as_bytes()).expect("room");
        file.set_len(8 + header.len() as u64 + end).expect("a sparse file");
    }
}

/// What the emulator counted while a picture of 512x512 was drawn in so many evaluations.
fn counted(folder: &Path, steps: usize) -> Value {
    let report = folder.join(format!("{steps}.json"));
    let mut command = sd_server(&["generate", "a cat", "--device", "cuda", "--dtype", "f16"]);
    command.args(["--scheduler", "dpmpp_2m", "--steps", &steps.to_string(), "--model"]);
    command.arg(folder).arg("-o").arg(folder.join("cat.png"));
    let done = command.env("EMUCUDA_DRY", "1").env("EMUCUDA_REPORT", &report).output();
    let done = done.expect("the binary starts");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&std::fs::read(report).expect("a report")).expect("JSON")
}

/// Issue 5's bounds for the full-size network with guidance, by counting without computing.
#[test]
fn a_step_takes_few_launches_and_a_picture_little_memory() {
    if std::env::var_os("EMUCUDA_OUT").is_none() || !device() {
        println!("skipped: only an emulated device counts");
        return;
    }
    let folder = tempfile::tempdir().expect("a directory");
    full_size(folder.path());
    let (few, more) = (counted(folder.path(), 6), counted(folder.path(), 8));
    let step = |path: &str| {
        let count = |report: &Value| report.pointer(path).and_then(Value::as_u64).expect("a count");
        (count(&more) - count(&few)) / 2
    };
    let peak = |report: &Value| report["bytes"]["peak"].as_u64().expect("bytes");
    println!("launches {}, peak {} bytes", step("/launches"), peak(&more));
    assert!(step("/launches") <= 450, "{} launches a step", step("/launches"));
    assert!(peak(&more) <= 2_791_728_742, "{} bytes at the most", peak(&more));
    assert_eq!(peak(&few), peak(&more), "memory must not grow with the steps");
    assert_eq!(step("/copied/device_to_host"), 0, "a step waits for the device");
    // The time embedding's (2, 320) f32, and nothing else.
    assert!(step("/copied/host_to_device") <= 2 * 320 * 4);
}
