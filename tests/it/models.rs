//! Models by name over HTTP: SageMaker's multi-model contract, and a folder of models.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::{PATIENCE, Reply, Server, sd_server};
use crate::invocations::infotext;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}

fn ask(server: &Server, method: reqwest::Method, path: &str, body: &Value) -> Reply {
    let request = server.client.request(method, server.url(path)).body(body.to_string());
    Reply::from(request.timeout(PATIENCE).send().expect("an answer"))
}

#[test]
fn sagemaker_loads_uses_and_unloads_models() {
    use reqwest::Method;
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--multi-model-root"]);
    let root = demo().parent().expect("a directory").to_owned();
    let server = Server::spawn(command.arg(&root).env("SAGEMAKER_MULTI_MODEL", "true"));
    assert_eq!(server.ping(), 200, "with no model at all");
    let picture = json!({ "prompt": "a cat", "steps": 1, "seed": 1, "output_format": "png" });
    let invocations = ask(&server, Method::POST, "/invocations", &picture);
    assert_eq!((invocations.status, invocations.error().0), (404, "model_required".into()));
    let load = |name: &str, url: &Path| {
        ask(&server, Method::POST, "/models", &json!({ "model_name": name, "url": url }))
    };
    assert_eq!(load("one", &demo()).status, 200);
    assert_eq!(load("one", &demo()).error().0, "model_loaded");
    assert_eq!(load("one", &demo()).status, 409);
    assert_eq!(load("two", &demo()).status, 200);
    let broken = load("three", &root.join("no-such-model"));
    assert_eq!((broken.status, broken.error().0), (422, "model_load_failed".into()));
    for outside in [Path::new("/etc"), &root, &demo().join("../../src"), Path::new("demo")] {
        let refused = load("four", outside);
        assert_eq!((refused.status, refused.error()), (400, ("malformed".into(), "url".into())));
    }
    assert_eq!(ask(&server, Method::POST, "/models", &json!({ "url": "/" })).status, 400);
    for name in ["", "a/b", "a b", "a\nb", "\u{1b}[31m", "caf\u{e9}", &"x".repeat(257)] {
        let refused = load(name, &demo());
        let expected = (400, ("malformed".into(), "model_name".into()));
        assert_eq!((refused.status, refused.error()), expected, "{name:?}");
    }

    let list = ask(&server, Method::GET, "/models", &Value::Null).json();
    let model = |name: &str| json!({ "modelName": name, "modelUrl": demo() });
    assert_eq!(list, json!({ "models": [model("one"), model("two")] }));
    let one = ask(&server, Method::GET, "/models/one", &Value::Null);
    assert_eq!(one.json(), model("one"));
    assert_eq!(ask(&server, Method::GET, "/models/three", &Value::Null).status, 404);

    let alone = Server::ready(&[]).json(&picture).json();
    for name in ["one", "two"] {
        let drawn = ask(&server, Method::POST, &format!("/models/{name}/invoke"), &picture);
        assert_eq!(drawn.json()["data"], alone["data"], "as a server with one model draws it");
    }
    assert_eq!(ask(&server, Method::POST, "/models/three/invoke", &picture).status, 404);
    assert_eq!(ask(&server, Method::DELETE, "/models/one", &Value::Null).status, 200);
    assert_eq!(ask(&server, Method::DELETE, "/models/one", &Value::Null).status, 404);
    assert_eq!(ask(&server, Method::POST, "/models/one/invoke", &picture).status, 404);
    assert_eq!(ask(&server, Method::POST, "/models/two/invoke", &picture).status, 200);
    assert_eq!(server.ping(), 200);
}

#[test]
fn a_model_without_room_is_507() {
    let mut command = sd_server(&["--device", "cpu", "--multi-model"]);
    command.arg("--multi-model-root").arg(demo().parent().expect("a directory"));
    let server = Server::spawn(command.args(["--models-memory-bytes", "1000000"]));
    let load = json!({ "model_name": "one", "url": demo() });
    let reply = ask(&server, reqwest::Method::POST, "/models", &load);
    assert_eq!((reply.status, reply.error().0), (507, "out_of_memory".into()));
}

#[test]
fn single_files_of_the_folder_are_models() {
    let folder = tempfile::tempdir().expect("a directory");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures");
    for (file, name) in [
        ("single/inpaint.ckpt", "small.ckpt"),
        ("single/v1.safetensors", "small.safetensors"),
        ("single/inpaint.ckpt", "red.ckpt"),
        ("tokenizer", "tokenizer"),
    ] {
        std::os::unix::fs::symlink(fixtures.join(file), folder.path().join(name)).expect("a link");
    }
    std::os::unix::fs::symlink(demo(), folder.path().join("red")).expect("a link");
    std::fs::write(folder.path().join("notes.txt"), "no model").expect("a file");
    let lora = fixtures.join("../../../tests/pictures/loras/everywhere.safetensors");
    std::os::unix::fs::symlink(lora, folder.path().join("style.safetensors")).expect("a link");
    let mut command = sd_server(&["--device", "cpu", "--threads", "1"]);
    let vae = fixtures.join("single/vae.safetensors");
    let server =
        Server::spawn(command.arg("--models-dir").arg(folder.path()).arg("--vae").arg(vae));
    let list = ask(&server, reqwest::Method::GET, "/v1/models", &Value::Null).json();
    let names: Vec<_> = list["data"].as_array().expect("a list").iter().collect();
    assert_eq!(names.iter().map(|card| &card["id"]).collect::<Vec<_>>(), ["red", "small"]);
    let body = json!({ "prompt": "x", "steps": 1, "width": 64, "height": 64 });
    let lora = ask(&server, reqwest::Method::POST, "/models/style", &body);
    let refusal = lora.json()["error"]["message"].to_string();
    assert!(lora.status >= 400 && refusal.contains("--loras-dir takes it"), "{refusal}");
    // The safetensors file has no VAE of its own.
    let drawn = ask(&server, reqwest::Method::POST, "/models/small", &body);
    assert_eq!(drawn.status, 200, "{}", drawn.json());
}

#[test]
fn defaults_beyond_the_limits_are_refused_when_a_model_is_loaded() {
    let folder = tempfile::tempdir().expect("a directory");
    for (name, defaults) in [
        ("long", json!({ "steps": 151 })),
        ("large", json!({ "width": 2048 })),
        ("sound", json!({ "steps": 1 })),
    ] {
        let model = folder.path().join(name);
        std::fs::create_dir(&model).expect("a directory");
        for entry in demo().read_dir().expect("the built-in model").flatten() {
            std::os::unix::fs::symlink(entry.path(), model.join(entry.file_name()))
                .expect("a link");
        }
        std::fs::write(model.join("sd-server.json"), defaults.to_string()).expect("a file");
    }
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--max-pixels", "65536"]);
    let server = Server::spawn(command.arg("--models-dir").arg(folder.path()));
    let body = json!({ "prompt": "x", "width": 64, "height": 64, "num_inference_steps": 1 });
    let draw = |name: &str| {
        let reply = ask(&server, reqwest::Method::POST, &format!("/models/{name}"), &body);
        (reply.status, reply.json()["error"]["message"].as_str().unwrap_or_default().to_owned())
    };
    for (name, words) in [
        ("long", "sd-server.json: steps: 151 are more than --max-steps 150"),
        ("large", "are more pixels than --max-pixels 65536"),
    ] {
        let (status, message) = draw(name);
        assert!(status >= 400 && message.contains(words), "{status}: {message}");
    }
    assert_eq!(draw("sound").0, 200);
}

#[test]
fn what_is_odd_about_a_model_is_in_its_information() {
    let folder = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(folder.path().join("old")).expect("a directory");
    std::fs::write(folder.path().join("old/broken.pt"), "no embedding").expect("a file");
    let server = Server::ready(&["--embeddings-dir", folder.path().to_str().expect("UTF-8")]);
    let info = ask(&server, reqwest::Method::GET, "/info", &Value::Null).json();
    let warnings = info["model"]["warnings"].as_array().expect("a list").clone();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].as_str().is_some_and(|text| text.contains("broken")), "{warnings:?}");
    let sound = ask(&Server::ready(&[]), reqwest::Method::GET, "/info", &Value::Null).json();
    assert_eq!(sound["model"]["warnings"], json!([]));
}

#[test]
fn a_request_may_name_a_model_of_the_folder() {
    let folder = tempfile::tempdir().expect("a directory");
    for name in ["red", "blue"] {
        std::os::unix::fs::symlink(demo(), folder.path().join(name)).expect("a link");
    }
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--max-models", "1"]);
    let server = Server::spawn(command.arg("--models-dir").arg(folder.path()));
    let request = json!({ "inputs": "a cat", "parameters": { "num_inference_steps": 1 } });
    for name in ["red", "blue", "red"] {
        let reply = ask(&server, reqwest::Method::POST, &format!("/models/{name}"), &request);
        assert!(reply.status == 200 && reply.json().is_string(), "{name}");
    }
    let openai = json!({ "model": "blue", "prompt": "a cat", "steps": 1 });
    let drawn = ask(&server, reqwest::Method::POST, "/v1/images/generations", &openai);
    assert!(drawn.json()["data"][0]["b64_json"].is_string());
    let nameless = json!({ "prompt": "a cat", "steps": 1 });
    let nameless = ask(&server, reqwest::Method::POST, "/v1/images/generations", &nameless);
    assert_eq!(nameless.status, 404);
    let list = ask(&server, reqwest::Method::GET, "/v1/models", &Value::Null).json();
    assert_eq!((&list["data"][0]["id"], &list["data"][1]["id"]), (&"blue".into(), &"red".into()));
    let unknown = ask(&server, reqwest::Method::POST, "/models/owner/green", &request);
    assert_eq!(unknown.status, 404);
    let document = ask(&server, reqwest::Method::GET, "/openapi.json", &Value::Null);
    let described = document.json()["info"]["description"].as_str().map(str::to_owned);
    assert!(described.is_some_and(|text| text.contains("GET /v1/models")), "without a first model");
    let closed = ask(&server, reqwest::Method::GET, "/models", &Value::Null);
    assert_eq!(closed.status, 404, "only SageMaker manages models over HTTP");
}

#[test]
fn a_body_may_name_a_model_of_the_directory() {
    let folder = tempfile::tempdir().expect("a directory");
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for name in ["red", "blue"] {
        std::os::unix::fs::symlink(&demo, folder.path().join(name)).expect("a link");
    }
    let data = tempfile::tempdir().expect("a directory");
    let start = || {
        let mut command = sd_server(&["--device", "cpu", "--threads", "1"]);
        command.arg("--models-dir").arg(folder.path()).arg("--data-dir").arg(data.path());
        let server = Server::spawn(&mut command);
        server.wait_until_ready();
        server
    };
    let server = start();
    let post = |path: &str, body: &Value| {
        let request = server.client.post(server.url(path)).body(body.to_string());
        let reply = request.header("content-type", "application/json").send().expect("an answer");
        (reply.status().as_u16(), reply.json::<Value>().expect("JSON"))
    };
    let body = |model: &str| {
        json!({ "prompt": "x", "steps": 1, "width": 64, "height": 64, "model": model,
                "output_format": "png" })
    };
    let drawn_by = |reply: &Value| {
        let file = BASE64_STANDARD.decode(reply["data"].as_str().expect("base64")).expect("base64");
        let text = infotext(&file);
        let (_, rest) = text.split_once("Model: ").expect("a name");
        rest.split(',').next().expect("a name").to_owned()
    };
    let (status, reply) = post("/invocations", &body("blue"));
    assert_eq!((status, drawn_by(&reply)), (200, "blue".into()));
    assert_eq!(post("/invocations", &body("green")).1["error"]["code"], "model_not_found");
    assert_eq!(post("/v1/jobs", &body("green")).1["error"]["code"], "model_not_found");
    assert_eq!(post("/models/blue", &body("blue")).0, 200);
    let (status, error) = post("/models/red", &body("blue"));
    assert_eq!((status, &error["error"]["param"]), (400, &"model".into()));
    let (status, error) = post("/v1/jobs", &json!({ "prompt": "x" }));
    assert_eq!((status, &error["error"]["code"]), (404, &"model_required".into()));
    let result = |server: &Server, id: &str| {
        loop {
            let url = server.url(&format!("/v1/jobs/{id}/result"));
            let reply = server.client.get(url).send().expect("an answer");
            if reply.status().as_u16() != 202 {
                assert_eq!(reply.status().as_u16(), 200);
                return reply.json::<Value>().expect("JSON");
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    let (status, job) = post("/v1/jobs", &body("red"));
    assert_eq!(status, 202, "{job}");
    let id = job["id"].as_str().expect("an id").to_owned();
    assert_eq!(drawn_by(&result(&server, &id)), "red");

    // One that was accepted and not begun is continued with its model.
    let mut long = body("red");
    (long["steps"], long["width"], long["height"]) = (40.into(), 128.into(), 128.into());
    let first = post("/v1/jobs", &long).1["id"].as_str().expect("an id").to_owned();
    let second = post("/v1/jobs", &body("blue")).1["id"].as_str().expect("an id").to_owned();
    server.signal("KILL");
    server.wait();
    let server = start();
    for (id, name) in [(first, "red"), (second, "blue")] {
        assert_eq!(drawn_by(&result(&server, &id)), name);
    }
}

#[test]
fn a_model_is_chosen_with_a_key_only() {
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--api-key", "sesame"]);
    let folder = demo().parent().expect("a directory").to_owned();
    let command = command.args(["--model", "demo", "--models-dir"]).arg(folder);
    let server = Server::spawn(command);
    server.wait_until_ready();
    let body = json!({ "prompt": "x", "steps": 1, "width": 64, "height": 64, "model": "demo" });
    let send = |path: &str, key: &str, body: &Value| {
        let request = server.client.post(server.url(path)).body(body.to_string());
        Reply::from(request.header("x-api-key", key).send().expect("an answer"))
    };
    let post = |path: &str, key: &str| send(path, key, &body);
    let refiner = json!({ "prompt": "x", "steps": 1, "refiner": "any" });
    let refused = send("/invocations", "sesame", &refiner);
    assert_eq!((refused.status, refused.error()), (422, ("out_of_range".into(), "refiner".into())));
    assert!(refused.json()["error"]["message"].to_string().contains("needs an API key"));
    let refused = post("/invocations", "sesame");
    assert_eq!((refused.status, refused.error()), (422, ("out_of_range".into(), "model".into())));
    assert_eq!(post("/v1/invocations", "").status, 401);
    assert_eq!(post("/v1/invocations", "sesame").status, 200);
}
