//! The safety checker: what a client hears of a picture that should not be shown, in every dialect.
//! The demo model has none, so it gets a small one of random weights whose thresholds object to
//! everything, or to nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use serde_json::{Value, json};

use crate::harness::{Reply, Server, sd_server};

/// The demo model with a checker for which a cosine above this is an objection.
fn model(root: &Path, threshold: f64) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The same name, and so the same text in the pictures.
    let model = root.join("demo");
    fs::create_dir(&model).expect("a directory");
    for folder in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        symlink(here.join("models/demo").join(folder), model.join(folder)).expect("a link");
    }
    let fixtures = here.join("models/tests/fixtures/safety");
    symlink(fixtures.join("feature_extractor"), model.join("feature_extractor")).expect("a link");
    let index = fs::read(here.join("models/demo/model_index.json")).expect("an index");
    let mut index: Value = serde_json::from_slice(&index).expect("JSON");
    index["safety_checker"] = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    fs::write(model.join("model_index.json"), index.to_string()).expect("a file");
    let checker = model.join("safety_checker");
    fs::create_dir(&checker).expect("a directory");
    let config = fixtures.join("safety_checker/config.json");
    symlink(config, checker.join("config.json")).expect("a link");
    let weights = fixtures.join("safety_checker/model.safetensors");
    let mut tensors = candle_core::safetensors::load(weights, &Device::Cpu).expect("tensors");
    let thresholds = Tensor::full(threshold as f32, 17, &Device::Cpu).expect("numbers");
    assert_eq!(thresholds.dtype(), DType::F32);
    tensors.insert("concept_embeds_weights".into(), thresholds);
    let file = checker.join("model.safetensors");
    candle_core::safetensors::save(&tensors, file).expect("a file");
    model
}

/// No cosine is less.
const EVERYTHING: f64 = -1.1;
/// No cosine is more.
const NOTHING: f64 = 1.1;

fn serve(model: &Path, policy: &[&str]) -> Server {
    let mut command = sd_server(&["--device", "cpu", "--threads", "1"]);
    let server = Server::spawn(command.args(policy).arg("--model").arg(model));
    server.wait_until_ready();
    server
}

fn request() -> Value {
    json!({ "prompt": "a red house", "steps": 1, "seed": 7, "width": 64, "height": 64,
            "output_format": "png" })
}

fn ask(server: &Server, path: &str, body: &Value) -> Reply {
    let request = server.client.post(server.url(path)).body(body.to_string());
    Reply::from(request.send().expect("an answer"))
}

fn picture(file: &Value) -> RgbImage {
    let file = BASE64_STANDARD.decode(file.as_str().expect("a file")).expect("base64");
    image::load_from_memory(&file).expect("a picture").to_rgb8()
}

/// The largest difference between neighbours in a row.
fn contrast(picture: &RgbImage) -> u8 {
    let rows = picture.rows().map(|row| row.map(|pixel| pixel.0).collect::<Vec<_>>());
    let steps = rows.flat_map(|row| {
        let step = |pair: &[[u8; 3]]| (0..3).map(|c| pair[0][c].abs_diff(pair[1][c])).max();
        row.windows(2).filter_map(step).collect::<Vec<_>>()
    });
    steps.max().unwrap_or_default()
}

#[test]
fn an_objection_blurs_the_picture_and_every_dialect_says_so() {
    let folder = tempfile::tempdir().expect("a directory");
    let server = serve(&model(folder.path(), EVERYTHING), &[]);
    let plain = Server::ready(&[]).json(&request()).json();
    assert!(plain.get("nsfw").is_none() && plain.get("warnings").is_none(), "{plain}");

    let reply = server.json(&request());
    let json = reply.json();
    assert_eq!((reply.status, &json["nsfw"]), (200, &true.into()), "{json}");
    assert!(json["warnings"][0].as_str().expect("a warning").contains("blurred"), "{json}");
    let (clear, blurred) = (picture(&plain["data"]), picture(&json["data"]));
    assert_eq!(blurred.dimensions(), clear.dimensions());
    assert!(contrast(&blurred) * 2 < contrast(&clear), "{}", contrast(&blurred));

    let mut two = request();
    two["n"] = 2.into();
    let two = server.json(&two).json();
    assert_eq!(
        (&two["images"][0]["nsfw"], &two["images"][1]["nsfw"]),
        (&true.into(), &true.into())
    );
    assert_eq!(two["warnings"].as_array().map(Vec::len), Some(1), "each once");

    let bytes = server.post(&["accept: image/png"], request().to_string());
    assert_eq!((bytes.status, bytes.header("x-sd-nsfw")), (200, "true"));
    assert_eq!(bytes.header("x-amzn-sagemaker-custom-attributes"), "seed=7;nsfw=true");

    let theirs = json!({ "text_prompts": [{ "text": "x" }], "steps": 1 });
    let stability = server.json(&theirs).json();
    assert_eq!(stability["artifacts"][0]["finishReason"], "CONTENT_FILTERED");
    let theirs = json!({ "inputs": "x", "parameters": { "num_inference_steps": 1 } });
    let hugging_face = server.json(&theirs);
    assert!(hugging_face.json().is_string() && hugging_face.header("x-sd-nsfw") == "true");
    let openai = ask(&server, "/v1/images/generations", &request()).json();
    assert_eq!(openai["data"][0]["nsfw"], true, "{openai}");
    let theirs = json!({ "prompt": "x", "steps": 1, "batch_size": 2 });
    let a1111 = ask(&server, "/sdapi/v1/txt2img", &theirs).json();
    let info: Value = serde_json::from_str(a1111["info"].as_str().expect("text")).expect("JSON");
    assert_eq!(info["all_nsfw"], json!([true, true]), "{info}");
    assert_eq!(info["warnings"].as_array().map(Vec::len), Some(1));

    let mut stream = request();
    (stream["stream"], stream["preview"], stream["steps"]) = (true.into(), true.into(), 4.into());
    let text = String::from_utf8(server.json(&stream).body).expect("UTF-8");
    let preview = text.split("\n\n").find(|event| event.starts_with("event: preview"));
    let data = preview.expect("a preview").split_once("data: ").expect("data").1;
    let preview = picture(&serde_json::from_str::<Value>(data).expect("JSON")["data"]);
    assert_eq!(preview.dimensions(), (8, 8), "of 64 pixels; nothing is left to blur");
    assert!(text.contains(r#""nsfw":true"#), "{text}");

    let judged = server.metric(r#"sd_safety_checks_total{result="blur"}"#);
    assert!(judged >= 9.0, "{judged}");
    let info = server.client.get(server.url("/info")).send().expect("an answer");
    assert_eq!(Reply::from(info).json()["model"]["safety_checker"], "blur");
}

#[test]
fn an_objection_can_be_a_mere_word() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path(), EVERYTHING);
    let plain = Server::ready(&[]).json(&request()).json();
    let flagged = serve(&model, &["--safety-checker", "flag"]).json(&request()).json();
    assert_eq!((&flagged["nsfw"], &flagged["data"]), (&true.into(), &plain["data"]));
    let unchecked = serve(&model, &["--safety-checker", "off"]).json(&request());
    assert_eq!(unchecked.json(), plain);
    assert_eq!(unchecked.header("x-sd-nsfw"), "");
}

#[test]
fn an_objection_can_be_an_error() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path(), EVERYTHING);
    let server = serve(&model, &["--safety-checker", "block"]);
    let reply = server.json(&request());
    assert_eq!((reply.status, reply.error().0), (400, "content_policy_violation".into()));
    let openai = ask(&server, "/v1/images/generations", &request());
    let error = &openai.json()["error"];
    assert_eq!(openai.status, 400);
    assert_eq!(error["type"], "invalid_request_error", "{error}");
    assert_eq!(error["code"], "content_policy_violation", "{error}");
    let a1111 = ask(&server, "/sdapi/v1/txt2img", &json!({ "prompt": "x", "steps": 1 }));
    assert_eq!(a1111.json()["error"], "content_policy_violation");
    let mut stream = request();
    stream["stream"] = true.into();
    let text = String::from_utf8(server.json(&stream).body).expect("UTF-8");
    assert!(text.contains("event: error") && text.contains("content_policy_violation"), "{text}");
    assert_eq!(server.metric(r#"sd_safety_checks_total{result="block"}"#), 4.0);

    let mut generate = sd_server(&["generate", "x", "--steps", "1", "--device", "cpu"]);
    let output = folder.path().join("x.png");
    generate.arg("--model").arg(&model).arg("-o").arg(&output);
    let done = generate.env("SD_SAFETY_CHECKER", "block").output().expect("the binary starts");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(1) && said.contains("safety checker"), "{said}");
    assert!(!output.exists());
}

#[test]
fn what_passes_is_told_too() {
    let folder = tempfile::tempdir().expect("a directory");
    let server = serve(&model(folder.path(), NOTHING), &["--safety-checker", "block"]);
    let reply = server.json(&request());
    assert_eq!((reply.status, &reply.json()["nsfw"]), (200, &false.into()));
    assert_eq!(reply.header("x-sd-nsfw"), "false");
    assert_eq!(reply.header("x-amzn-sagemaker-custom-attributes"), "seed=7");
    assert_eq!(server.metric(r#"sd_safety_checks_total{result="pass"}"#), 1.0);
}

#[test]
fn a_checker_that_is_asked_for_must_be_there() {
    let mut command = sd_server(&["--model", "demo", "--device", "cpu", "--port", "0"]);
    let done = command.args(["--safety-checker", "blur"]).output().expect("it starts");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(1) && said.contains("model_index.json"), "{said}");

    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path(), NOTHING);
    fs::remove_dir_all(model.join("safety_checker")).expect("it was there");
    let mut command = sd_server(&["--device", "cpu", "--port", "0"]);
    let done = command.arg("--model").arg(&model).output().expect("it starts");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(said.contains("safety_checker/model.safetensors: no such file"), "{said}");
    assert!(said.contains("--safety-checker off goes without it"), "{said}");
    assert!(!done.status.success(), "{said}");
}

#[test]
fn a_package_takes_the_checker_along() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path(), NOTHING);
    for (policy, there) in [("blur", true), ("off", false)] {
        let output = folder.path().join(policy);
        let mut command = sd_server(&["package", "--layout", "directory"]);
        let done = command.args(["--safety-checker", policy]).arg(&model).arg("-o").arg(&output);
        let done = done.output().expect("the binary starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        for file in [
            "safety_checker/config.json",
            "safety_checker/model.safetensors",
            "feature_extractor/preprocessor_config.json",
        ] {
            assert_eq!(output.join(file).is_file(), there, "{policy}: {file}");
        }
    }
}
