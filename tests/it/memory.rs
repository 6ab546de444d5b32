//! Memory returns: models that come and go, and LoRAs that are replaced, leave nothing behind. A few
//! rounds here; all of them:
//!
//!     MEMORY_ROUNDS=100 cargo test --test it memory -- --nocapture

use std::fs;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Server, sd_server};

/// The rounds after which the memory is first measured: caches and allocators are warm.
const WARM: usize = 5;

/// Less than the weights of the built-in model take, in MB.
const WEIGHTS_MB: f64 = 10.0;

/// Draws round after round, and compares the memory after the last with that after the fifth.
fn assert_level(server: &Server, draw: impl Fn(usize)) {
    let rounds = std::env::var("MEMORY_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    let rounds: usize = rounds.unwrap_or(4 * WARM);
    let mut levels = Vec::new();
    for round in 0..rounds.max(WARM + 1) {
        draw(round);
        levels.push(server.metric("process_resident_memory_bytes") / 1e6);
    }
    writeln!(std::io::stderr(), "MB after each round: {levels:.1?}").expect("it can be written");
    assert!(levels[0] > 1.0, "nothing is measured");
    let (warm, last) = (levels[WARM - 1], levels[levels.len() - 1]);
    assert!(last <= 1.03 * warm, "{last:.1} MB, and {warm:.1} MB after round {WARM}: {levels:.1?}");
}

fn picture() -> Value {
    json!({ "prompt": "a cat", "steps": 1, "seed": 1, "width": 64, "height": 64 })
}

#[test]
fn models_that_come_and_go_leave_nothing() {
    let folder = tempfile::tempdir().expect("a directory");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for name in ["red", "blue"] {
        std::os::unix::fs::symlink(&demo, folder.path().join(name)).expect("a link");
    }
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--max-models", "1"]);
    let server = Server::spawn(command.arg("--models-dir").arg(folder.path()));
    assert_level(&server, |_| {
        for name in ["red", "blue"] {
            let request = server.client.post(server.url(&format!("/models/{name}")));
            let reply = request.body(picture().to_string()).send().expect("an answer");
            assert_eq!(reply.status(), 200);
        }
    });
}

#[test]
fn loras_that_are_replaced_leave_nothing() {
    let folder = tempfile::tempdir().expect("a directory");
    let loras = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/loras");
    let files = ["attention", "everywhere"]
        .map(|name| fs::read(loras.join(name).with_extension("safetensors")).expect("a file"));
    let server = Server::ready(&["--loras-dir", folder.path().to_str().expect("UTF-8")]);
    let mut body = picture();
    body["loras"] = json!([{ "name": "a" }]);
    assert_level(&server, |round| {
        let new = folder.path().join("new");
        fs::write(&new, &files[round % 2]).expect("a file");
        fs::rename(&new, folder.path().join("a.safetensors")).expect("renamed");
        assert_eq!(server.json(&body).status, 200);
    });
}

#[test]
fn a_model_that_is_unloaded_takes_no_memory() {
    let server = Server::ready(&[]);
    let resident = || server.metric("process_resident_memory_bytes") / 1e6;
    let unload = || {
        let request = server.client.post(server.url("/sdapi/v1/unload-checkpoint"));
        assert_eq!(request.send().expect("an answer").status(), 200);
    };
    assert_level(&server, |_| {
        assert_eq!(server.json(&picture()).status, 200);
        unload();
    });
    assert_eq!(server.json(&picture()).status, 200);
    let loaded = resident();
    unload();
    let freed = loaded - resident();
    assert!(freed > WEIGHTS_MB, "{freed:.1} MB of {loaded:.1} MB");
}
