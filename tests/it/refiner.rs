//! A second model that takes images over, in every dialect that asks for one: small models of Stable
//! Diffusion XL with random weights.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::{PATIENCE, Reply, Server, sd_server};
use crate::invocations::infotext;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures").join(name)
}

/// A server with a base model, its refiner and a model of another family.
fn server() -> (tempfile::TempDir, Server) {
    let folder = tempfile::tempdir().expect("a directory");
    for (name, from) in [("base", "xl"), ("refiner", "xl/refiner"), ("old", "v1")] {
        std::os::unix::fs::symlink(fixture(from), folder.path().join(name)).expect("a link");
    }
    // One file, with no vocabulary beside it.
    let file = fixture("single/v1.safetensors");
    std::os::unix::fs::symlink(file, folder.path().join("single.safetensors")).expect("a link");
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--dtype", "f32"]);
    // No hub, and nothing in its cache.
    command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", folder.path().join(".hub"));
    let server = Server::spawn(command.arg("--models-dir").arg(folder.path()));
    (folder, server)
}

fn post(server: &Server, path: &str, body: &Value) -> Reply {
    let request = server.client.post(server.url(path)).body(body.to_string());
    let request = request.header("content-type", "application/json").timeout(PATIENCE);
    Reply::from(request.send().expect("an answer"))
}

/// A request to the base model, with more fields.
fn body(more: &Value) -> Value {
    let mut body = json!({
        "prompt": "a red house", "steps": 5, "width": 64, "height": 64, "seed": 11,
        "output_format": "png",
    });
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    body
}

fn file(base64: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(base64.as_str().expect("base64")).expect("base64")
}

fn pixels(file: &[u8]) -> Vec<u8> {
    image::load_from_memory(file).expect("a picture").to_rgb8().into_raw()
}

#[test]
fn a_second_model_takes_images_over_and_is_named_in_them() {
    let (_folder, server) = server();
    let draw = |more: Value| {
        let reply = post(&server, "/models/base", &body(&more));
        assert_eq!(reply.status, 200, "{}", reply.json());
        reply.json()
    };
    let plain = file(&draw(json!({}))["data"]);
    let asks = json!({ "refiner": "refiner" });
    let refined = file(&draw(asks.clone())["data"]);
    assert_ne!(pixels(&plain), pixels(&refined));
    let text = infotext(&refined);
    assert!(text.contains(", Refiner: refiner, Refiner switch at: 0.8, "), "{text}");
    assert!(text.contains("Model: base, "), "{text}");
    let parameters = post(
        &server,
        "/sdapi/v1/png-info",
        &json!({
            "image": BASE64_STANDARD.encode(&refined),
        }),
    );
    assert_eq!(parameters.json()["parameters"]["Refiner"], "refiner");
    // Beside images without, and of a job.
    let both = draw(json!({ "refiner": "refiner", "num_images_per_prompt": 3, "seed": 10 }));
    assert_eq!(pixels(&file(&both["images"][1]["data"])), pixels(&refined));
    let job = post(&server, "/v1/jobs", &{
        let mut job = body(&asks);
        job["model"] = "base".into();
        job
    });
    assert_eq!(job.status, 202, "{}", job.json());
    let id = job.json()["id"].as_str().expect("an id").to_owned();
    let result = loop {
        let reply = server.client.get(server.url(&format!("/v1/jobs/{id}/result"))).send();
        let reply = Reply::from(reply.expect("an answer"));
        if reply.status != 202 {
            break reply.json();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(file(&result["data"]), refined);
    let begun = draw(json!({
        "image": BASE64_STANDARD.encode(&plain), "denoising_start": 0.5, "strength": 0.5,
    }));
    assert_eq!(begun["warnings"], json!(["strength has no effect with denoising_start"]));
    // The model itself, and a share at which nothing is left.
    for (more, words) in [
        (json!({ "refiner": "base" }), "refiner \"base\" has no effect: it is the model itself"),
        (
            json!({ "refiner": "refiner", "refiner_switch_at": 1 }),
            "refiner \"refiner\" has no effect",
        ),
    ] {
        let reply = draw(more);
        assert_eq!(pixels(&file(&reply["data"])), pixels(&plain));
        let told = reply["warnings"][0].as_str().expect("a warning");
        assert!(told.starts_with(words), "{told}");
    }
}

#[test]
fn what_cannot_take_over_is_refused_by_name() {
    let (_folder, server) = server();
    for (more, status, param, words) in [
        (json!({ "refiner": "none" }), 422, "refiner", "known are base, old, refiner, single"),
        (json!({ "refiner": "old" }), 422, "refiner", "refiner \"old\" has other latents"),
        (json!({ "refiner_switch_at": 0.5 }), 400, "refiner_switch_at", "requires refiner"),
        (
            json!({ "refiner": "refiner", "refiner_switch_at": 2 }),
            422,
            "refiner_switch_at",
            "from 0",
        ),
        (json!({ "refiner": "single" }), 422, "refiner", "single.safetensors holds no vocabulary"),
        (
            json!({ "denoising_end": 0.01 }),
            422,
            "denoising_end",
            "denoising_end of 0.01 is before the first step of the image",
        ),
        (json!({ "denoising_start": 0.5 }), 400, "denoising_start", "requires image"),
        (json!({ "denoising_end": 0 }), 422, "denoising_end", "must be above 0"),
        (json!({ "denoising_end": 0.5, "hires_width": 96 }), 422, "denoising_end", "hires pass"),
    ] {
        let reply = post(&server, "/models/base", &body(&more));
        let message = reply.json()["error"]["message"].as_str().expect("words").to_owned();
        assert_eq!((reply.status, reply.error().1.as_str()), (status, param), "{more}: {message}");
        assert!(message.contains(words), "{message}");
        // Nothing of the hub, to which no client can go.
        assert!(!message.contains("--model") && !message.contains("http"), "{message}");
    }
}

#[test]
fn in_automatic1111_it_is_a_checkpoint() {
    let (_folder, server) = server();
    let draw = |more: Value| {
        let mut body = body(&json!({ "override_settings": { "sd_model_checkpoint": "base" } }));
        let fields = body.as_object_mut().expect("an object");
        fields.remove("output_format");
        fields.extend(more.as_object().expect("an object").clone());
        post(&server, "/sdapi/v1/txt2img", &body)
    };
    let info = |reply: &Reply| -> Value {
        assert_eq!(reply.status, 200, "{}", reply.json());
        let info = reply.json()["info"].as_str().expect("text").to_owned();
        serde_json::from_str(&info).expect("JSON")
    };
    let share = json!({
        "refiner_checkpoint": "refiner.safetensors [0123456789]", "refiner_switch_at": 0.5,
    });
    let refined = draw(share);
    let told = info(&refined);
    let parameters = &told["extra_generation_params"];
    assert_eq!(
        (&parameters["Refiner"], &parameters["Refiner switch at"]),
        (&"refiner".into(), &"0.5".into())
    );
    let script = draw(json!({
        "alwayson_scripts": { "Refiner": { "args": [true, "refiner", 0.5] } },
        "refiner_checkpoint": "", "refiner_switch_at": 0.8,
    }));
    let drawn = |reply: &Reply| pixels(&file(&reply.json()["images"][0]));
    assert_eq!(drawn(&script), drawn(&refined));
    let infotext = draw(json!({
        "infotext": "a cat\nSteps: 5, Sampler: Euler, Refiner: refiner, Refiner switch at: 0.5",
    }));
    assert_eq!(info(&infotext)["extra_generation_params"]["Refiner switch at"], "0.5");
    assert_eq!(info(&infotext)["warnings"], json!([]));
    let twice = draw(json!({
        "alwayson_scripts": { "Refiner": { "args": [true, "refiner", 0.5] } },
        "refiner_checkpoint": "refiner",
    }));
    let errors = twice.json()["errors"].to_string();
    let both = "alwayson_scripts.Refiner names a refiner, and so does refiner_checkpoint";
    assert!(twice.status == 400 && errors.contains(both), "{errors}");
    let scored = draw(json!({ "override_settings": {
        "sd_model_checkpoint": "base", "sdxl_refiner_high_aesthetic_score": 3,
    } }));
    let told = info(&scored)["warnings"][0].to_string();
    let field = "override_settings.sdxl_refiner_high_aesthetic_score has no effect";
    assert!(told.contains(field), "{told}");
    // What clients send where they ask for none.
    let plain = draw(json!({}));
    let off = draw(json!({ "refiner_checkpoint": "None", "refiner_switch_at": 0.8 }));
    assert_eq!(drawn(&off), drawn(&plain));
    assert_eq!(info(&off)["warnings"], json!([]));
    assert_ne!(drawn(&plain), drawn(&refined));
    let unknown = draw(json!({ "refiner_checkpoint": "sd_xl_refiner_1.0" }));
    let errors = unknown.json()["errors"].as_str().expect("words").to_owned();
    assert!(unknown.status == 422 && errors.starts_with("refiner_checkpoint names"), "{errors}");
}

#[test]
fn the_command_line_names_a_model_as_model_does() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("house.png");
    let draw = |more: &[&str]| {
        let mut command =
            sd_server(&["generate", "a red house", "--device", "cpu", "--threads", "1"]);
        command.args(["--dtype", "f32", "--steps", "5", "--seed", "11", "-W", "64", "-H", "64"]);
        command.arg("--model").arg(fixture("xl")).arg("-o").arg(&path).args(more);
        command.output().expect("the binary starts")
    };
    let refiner = fixture("xl/refiner");
    let refiner = ["--refiner", refiner.to_str().expect("UTF-8")];
    let done = draw(&refiner);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let drawn = std::fs::read(&path).expect("a file");
    assert!(infotext(&drawn).contains(", Refiner: refiner, Refiner switch at: 0.8, "));
    let (_folder, server) = server();
    let served = post(&server, "/models/base", &body(&json!({ "refiner": "refiner" })));
    assert_eq!(pixels(&file(&served.json()["data"])), pixels(&drawn));
    for (more, code, words) in [
        (&["--refiner-switch-at", "0.5"][..], 64, "--refiner"),
        (&["--refiner", "nowhere.safetensors"], 64, "--refiner nowhere.safetensors: neither"),
        (
            &[&refiner[..], &["--refiner-switch-at", "3"]].concat(),
            64,
            "--refiner-switch-at must be",
        ),
        (&[&refiner[..], &["--max-refiner-bytes", "9"]].concat(), 1, "(--max-refiner-bytes)"),
    ] {
        let done = draw(more);
        let told = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(code), "{told}");
        assert!(told.contains(words), "{told}");
    }
}
