//! LoRAs by name, from a folder: in every dialect, beside other requests, and what is refused.

use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::{Server, sd_server};
use crate::invocations::infotext;

fn server() -> Server {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/loras");
    Server::ready(&["--loras-dir", folder.to_str().expect("UTF-8"), "--max-loras", "2"])
}

/// A small picture, in a PNG file.
fn body(loras: &Value) -> Value {
    json!({
        "prompt": "a red house", "seed": 3, "steps": 3, "width": 64, "height": 64,
        "guidance_scale": 4, "scheduler": "ddim", "output_format": "png", "loras": loras,
    })
}

pub(crate) fn file(data: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(data.as_str().expect("base64")).expect("base64")
}

fn drawn(server: &Server, loras: &Value) -> Vec<u8> {
    let reply = server.json(&body(loras));
    assert_eq!(reply.status, 200, "{}", reply.json());
    file(&reply.json()["data"])
}

pub(crate) fn pixels(file: &[u8]) -> Vec<u8> {
    image::load_from_memory(file).expect("a picture").to_rgb8().into_raw()
}

/// Posts to a route of another dialect.
fn post(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let request = server.client.post(server.url(path)).body(body.to_string());
    let reply = request.header("content-type", "application/json").send().expect("an answer");
    (reply.status().as_u16(), reply.json().expect("JSON"))
}

#[test]
fn every_dialect_can_name_loras() {
    let server = server();
    let one = json!([{ "name": "everywhere", "scale": 0.8 }]);
    let native = drawn(&server, &one);
    assert!(infotext(&native).starts_with("a red house <lora:everywhere:0.8>\nSteps: 3"));
    // What hashlib.sha256 makes of the file behind its header.
    assert!(infotext(&native).contains(", Lora hashes: \"everywhere: 41135439c692\", Version: "));
    assert_ne!(pixels(&native), pixels(&drawn(&server, &json!(null))));
    let whole = json!([{ "name": "everywhere", "scale": null }]);
    assert_ne!(pixels(&native), pixels(&drawn(&server, &whole)));

    let mut theirs = body(&one);
    theirs["size"] = "64x64".into();
    for field in ["width", "height"] {
        theirs.as_object_mut().expect("an object").remove(field);
    }
    let (status, openai) = post(&server, "/v1/images/generations", &theirs);
    assert_eq!(status, 200, "{openai}");
    assert_eq!(pixels(&file(&openai["data"][0]["b64_json"])), pixels(&native));

    let sdapi = json!({
        "prompt": "a red <lora:everywhere:0.8>house", "seed": 3, "steps": 3, "width": 64,
        "height": 64, "cfg_scale": 4, "sampler_name": "DDIM",
    });
    let (status, reply) = post(&server, "/sdapi/v1/txt2img", &sdapi);
    assert_eq!(status, 200, "{reply}");
    let info: Value =
        serde_json::from_str(reply["info"].as_str().expect("a string")).expect("JSON");
    let hashes = &info["extra_generation_params"]["Lora hashes"];
    assert_eq!(hashes, "everywhere: 41135439c692");
    let same = file(&reply["images"][0]);
    assert_eq!(pixels(&same), pixels(&native));
    // As it was typed, which is what AUTOMATIC1111 would read again.
    assert!(infotext(&same).starts_with("a red <lora:everywhere:0.8>house\nSteps: 3"));
    let list = server.client.get(server.url("/sdapi/v1/loras")).send().expect("an answer");
    let list: Value = list.json().expect("JSON");
    let names: Vec<_> =
        list.as_array().expect("a list").iter().map(|lora| lora["name"].as_str()).collect();
    assert_eq!(names, [Some("attention"), Some("everywhere"), Some("everywhere-peft")]);
    let form = "prompt=a red house&steps=1&loras=[{\"name\":\"attention\"}]";
    let reply = server.post(&["content-type: application/x-www-form-urlencoded"], form);
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
}

#[test]
fn requests_with_different_loras_do_not_change_each_other() {
    let server = server();
    let mixes = [
        json!([{ "name": "everywhere", "scale": 0.8 }]),
        json!([]),
        json!([{ "name": "attention" }, { "name": "everywhere", "scale": -0.3 }]),
        json!([{ "name": "attention" }]),
    ];
    let alone: Vec<_> = mixes.iter().map(|loras| drawn(&server, loras)).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> =
            mixes.iter().map(|loras| scope.spawn(|| drawn(&server, loras))).collect();
        asked.into_iter().map(|asked| asked.join().expect("a picture")).collect()
    });
    assert!(alone == together);
    assert!(server.metric("sd_batch_size_sum") > 2.0 * server.metric("sd_batch_size_count"));
}

#[test]
fn what_is_not_there_is_refused_by_field() {
    let server = server();
    let refused = [
        (json!([{ "name": "other" }]), 422),
        (json!([{ "name": "../loras/everywhere" }]), 422),
        (json!([{ "name": "attention", "scale": 1e9 }]), 422),
        (json!([{ "name": "a" }, { "name": "b" }, { "name": "c" }]), 422),
        (json!("everywhere"), 400),
        (json!([{ "name": "attention", "weight": 1 }]), 400),
        (json!([{ "scale": 1 }]), 400),
    ];
    for (loras, status) in refused {
        let reply = server.json(&body(&loras));
        assert_eq!(reply.status, status, "{loras}: {}", reply.json());
        assert_eq!(reply.error().1, "loras", "{loras}");
    }
    let unknown = server.json(&body(&json!([{ "name": "other" }]))).json();
    let message = unknown["error"]["message"].as_str().expect("a message").to_owned();
    assert!(
        message.contains("\"other\", which is unknown; known are attention, everywhere"),
        "{message}"
    );

    let ask =
        |prompt: &str| post(&server, "/sdapi/v1/txt2img", &json!({ "prompt": prompt, "steps": 1 }));
    for prompt in ["<lora:other:1>", "<hypernet:x:1>", "<lora:attention:1:2:4>"] {
        let (status, reply) = ask(prompt);
        assert_eq!(status, 422, "{prompt}: {reply}");
        assert!(reply["errors"].as_str().is_some_and(|text| text.starts_with("prompt")), "{reply}");
    }
    let many = "<lora:attention:1>".repeat(3);
    assert_eq!(ask(&many).0, 422);
    // In the plain syntax it is text, as in diffusers.
    let mut plain = body(&json!(null));
    plain["prompt"] = "<lora:other:1>".into();
    assert_eq!(server.json(&plain).status, 200);
}

#[test]
fn a_replaced_file_is_drawn_and_signed_as_the_new_one() {
    let folder = tempfile::tempdir().expect("a directory");
    let loras = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/loras");
    let server = Server::ready(&["--loras-dir", folder.path().to_str().expect("UTF-8")]);
    let put = |name: &str| {
        let file = loras.join(name).with_extension("safetensors");
        std::fs::copy(file, folder.path().join("a.safetensors")).expect("copied");
    };
    let draw = || drawn(&server, &json!([{ "name": "a" }]));
    let signed = |file: &[u8]| {
        let text = infotext(file);
        text.split_once("Lora hashes: ").map(|(_, hashes)| hashes[..17].to_owned())
    };
    put("everywhere");
    let first = draw();
    put("attention");
    let second = draw();
    put("everywhere");
    let third = draw();
    assert_eq!(signed(&first).as_deref(), Some("\"a: 41135439c692\""));
    assert!(pixels(&first) != pixels(&second) && signed(&first) != signed(&second));
    assert!(pixels(&first) == pixels(&third) && signed(&first) == signed(&third));
    std::fs::write(folder.path().join("a.safetensors"), "x").expect("a file");
    let reply = server.json(&body(&json!([{ "name": "a" }])));
    assert_eq!((reply.status, reply.error().1), (422, "loras".into()));
}

/// A file with a name in its header.
fn with_alias(file: &[u8], alias: &str) -> Vec<u8> {
    with_header(file, |header| header["__metadata__"] = json!({ "ss_output_name": alias }))
}

#[test]
fn a_file_goes_also_by_the_name_in_its_header() {
    let folder = tempfile::tempdir().expect("a directory");
    let loras = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/loras");
    let put = |name: &str, from: &str, alias: &str| {
        let file = std::fs::read(loras.join(from).with_extension("safetensors")).expect("a file");
        let file = with_alias(&file, alias);
        std::fs::write(folder.path().join(name).with_extension("safetensors"), file)
            .expect("written");
    };
    put("1", "attention", "style");
    put("2", "everywhere", "1");
    let server = Server::ready(&["--loras-dir", folder.path().to_str().expect("UTF-8")]);
    let draw = |name: &str| drawn(&server, &json!([{ "name": name }]));
    assert!(pixels(&draw("style")) == pixels(&draw("1")), "a file's own name comes first");
    assert!(infotext(&draw("style")).contains("Lora hashes: \"1: "));
    let list = server.client.get(server.url("/sdapi/v1/loras")).send().expect("an answer");
    let list: Value = list.json().expect("JSON");
    assert_eq!((&list[0]["name"], &list[0]["alias"]), (&json!("1"), &json!("style")), "{list}");
    put("3", "everywhere", "style");
    let reply = server.json(&body(&json!([{ "name": "style" }])));
    let message = reply.json()["error"]["message"].as_str().expect("a message").to_owned();
    assert!(reply.status == 422 && message.contains("1 and 3 have in their headers"), "{message}");
}

/// A file with one more tensor, which is empty.
fn with_tensor(file: &[u8], name: &str) -> Vec<u8> {
    let empty = json!({ "dtype": "F32", "shape": [0], "data_offsets": [0, 0] });
    with_header(file, |header| header[name] = empty)
}

fn with_header(file: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + length]).expect("JSON");
    change(&mut header);
    let header = header.to_string();
    let new = (header.len() as u64).to_le_bytes();
    [&new[..], header.as_bytes(), &file[8 + length..]].concat()
}

#[test]
fn every_dialect_says_what_of_a_file_is_left_out() {
    let folder = tempfile::tempdir().expect("a directory");
    let loras = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/loras");
    let whole = std::fs::read(loras.join("attention.safetensors")).expect("a file");
    let more = with_tensor(&whole, "lora_unet_elsewhere.alpha");
    std::fs::write(folder.path().join("more.safetensors"), more).expect("written");
    let server = Server::ready(&["--loras-dir", folder.path().to_str().expect("UTF-8")]);
    let warning = "the LoRA \"more\" has 1 tensor that matches no weight of this model, left out: \
                   \"lora_unet_elsewhere.alpha\"";
    let one = json!([{ "name": "more" }]);
    assert_eq!(server.json(&body(&one)).json()["warnings"], json!([warning]));
    let prompt = json!({ "prompt": "<lora:more:0.5:1>", "steps": 1, "width": 64, "height": 64 });
    let (_, reply) = post(&server, "/sdapi/v1/txt2img", &prompt);
    let info: Value = serde_json::from_str(reply["info"].as_str().expect("text")).expect("JSON");
    assert!(info["warnings"].as_array().is_some_and(|all| all.contains(&warning.into())), "{info}");
    let prompt = json!({ "prompt": "a cat", "steps": 1, "size": "64x64", "loras": one });
    let (_, reply) = post(&server, "/v1/images/generations", &prompt);
    assert_eq!(reply["data"][0]["warnings"], json!([warning]), "{reply}");
}

#[test]
fn a_folder_that_is_not_there_is_a_mistake() {
    for option in ["--loras-dir", "--embeddings-dir"] {
        let done = sd_server(&["--model", "demo", option, "/nowhere"]).output().expect("it starts");
        assert_eq!(done.status.code(), Some(64));
        assert!(
            String::from_utf8_lossy(&done.stderr)
                .contains("/nowhere cannot be read as a directory")
        );
    }
}

#[test]
fn two_files_of_one_name_are_a_mistake() {
    let folder = tempfile::tempdir().expect("a directory");
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/loras/attention.safetensors");
    let copy = folder.path().join("attention.safetensors");
    std::fs::copy(&file, &copy).expect("copied");
    let [file, copy] = [&file, &copy].map(|path| path.to_str().expect("UTF-8"));
    let args = ["generate", "x", "--model", "demo", "--lora", file, "--lora", copy];
    let done = sd_server(&args).output().expect("it starts");
    assert_eq!(done.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&done.stderr).contains("is also named attention"));
}

#[test]
fn an_lcm_lora_brings_its_own_defaults() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo/loras/lcm.safetensors");
    std::fs::copy(file, folder.path().join("my-lcm-lora.safetensors")).expect("a copy");
    let server =
        Server::ready(&["--loras-dir", &folder.path().display().to_string(), "--dtype", "f32"]);
    let draw = |fields: Value| {
        let mut body = json!({ "prompt": "a red house by the sea <lora:my-lcm-lora:1>", "seed": 7,
                               "prompt_syntax": "a1111", "output_format": "png" });
        body.as_object_mut()
            .expect("an object")
            .extend(fields.as_object().cloned().expect("an object"));
        let reply: Value = server.json(&body).json();
        let file = BASE64_STANDARD.decode(reply["data"].as_str().expect("an image"));
        let file = file.expect("base64");
        (infotext(&file), reply, image::load_from_memory(&file).expect("an image").to_rgb8())
    };
    let (text, reply, ours) = draw(json!({}));
    assert!(text.contains("Steps: 4, Sampler: LCM, CFG scale: 1, "), "{text}");
    let warning = reply["warnings"][0].as_str().expect("a warning");
    assert_eq!(
        warning,
        "the LoRA \"my-lcm-lora\" is of the kind LCM: its defaults were taken, 4 steps, \
         guidance scale 1, the sampler lcm"
    );
    let (text, reply, _) = draw(json!({ "steps": 2, "scheduler": "euler", "guidance_scale": 3 }));
    assert!(text.contains("Steps: 2, Sampler: Euler, CFG scale: 3, "), "{text}");
    assert!(reply.get("warnings").is_none(), "{reply}");
    let unused = json!({ "prompt": "a house <lora:my-lcm-lora:0>", "steps": 2 });
    let (text, ..) = draw(unused);
    assert!(text.contains("Steps: 2, ") && text.contains("CFG scale: 7.5, "), "{text}");
    // The model that has it in its weights draws the same, but for their rounding to f16.
    let path = folder.path().join("merged.png");
    let mut command = sd_server(&["generate", "a red house by the sea", "--seed", "7"]);
    command.args(["--model", "demo-lcm", "--device", "cpu", "--dtype", "f32", "-o"]).arg(&path);
    assert!(command.output().expect("it starts").status.success());
    let merged = image::open(&path).expect("an image").to_rgb8();
    let distance: f64 =
        ours.iter().zip(merged.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    assert!(distance / (ours.len() as f64) < 1.0, "{distance}");
}
