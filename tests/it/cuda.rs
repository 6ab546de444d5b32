//! The real binary on a CUDA device, or on an emulator of one. Without either the tests say that
//! they are skipped; `SD_TEST_CUDA=required` makes that a failure.

use serde_json::json;

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
        eprintln!("skipped: no CUDA device: {reason}");
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
