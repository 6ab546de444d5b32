//! IP-Adapters by name, from a folder: natively and on the command line, and what is refused.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::controlnet::{base64, copy, fixtures, shapes};
use crate::harness::{Server, sd_server};
use crate::invocations::infotext;
use crate::loras::{file, pixels};

/// A model that the adapters of the fixtures fit; each test has its own.
fn model(test: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ip-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&fixtures().join("v1"), &root);
    std::fs::remove_dir_all(root.join("unet")).expect("removed");
    copy(&fixtures().join("control/v1"), &root);
    root
}

fn server(test: &str) -> Server {
    let paths = [model(test), fixtures().join("ip"), fixtures().join("control/nets")];
    let [model, adapters, nets] = paths.each_ref().map(|path| path.to_str().expect("UTF-8"));
    let mut command = sd_server(&["--model", model, "--device", "cpu", "--threads", "1"]);
    command.args(["--ip-adapters-dir", adapters, "--controlnets-dir", nets, "--dtype", "f32"]);
    let server = Server::spawn(&mut command);
    server.wait_until_ready();
    server
}

fn body(adapter: &Value) -> Value {
    json!({
        "prompt": "a red house", "seed": 3, "steps": 4, "width": 64, "height": 64,
        "guidance_scale": 4, "scheduler": "ddim", "output_format": "png", "ip_adapter": adapter,
    })
}

fn native(server: &Server, adapter: &Value) -> Vec<u8> {
    let reply = server.json(&body(adapter));
    assert_eq!(reply.status, 200, "{}", reply.json());
    file(&reply.json()["data"])
}

#[test]
fn the_native_api_and_the_command_line_draw_the_same() {
    let server = server("same");
    let picture = shapes(80, 64);
    let adapter = |changes: Value| {
        let mut own = json!({ "model": "ip-adapter-plus_sd15", "image": base64(&picture) });
        own.as_object_mut().expect("an object").extend(changes.as_object().expect("one").clone());
        own
    };
    let one = adapter(json!({ "scale": 0.7 }));
    let drawn = native(&server, &one);
    let plain = native(&server, &json!(null));
    assert_ne!(pixels(&drawn), pixels(&plain), "the picture counts");
    assert_eq!(pixels(&native(&server, &json!([one]))), pixels(&drawn), "a list of one");
    let list = adapter(json!({ "scale": 0.7, "image": [base64(&picture)] }));
    assert_eq!(pixels(&native(&server, &list)), pixels(&drawn), "a list of one picture");
    let zero = adapter(json!({ "scale": 0 }));
    assert_eq!(pixels(&native(&server, &zero)), pixels(&plain));
    let text = infotext(&drawn);
    let unit =
        ", ControlNet 0: \"Module: ip-adapter-auto, Model: ip-adapter-plus_sd15, Weight: 0.7, ";
    assert!(text.contains(unit), "{text}");
    // By blocks, and of several adapters and pictures.
    let blocks = adapter(json!({ "scale": { "up": { "block_1": [0, 0.9] }, "mid": 0.5 } }));
    let several = json!([one, {
        "model": "ip-adapter_sd15", "image": [base64(&picture), base64(&shapes(40, 90))],
    }]);
    let late = adapter(json!({ "start": 0.5 }));
    for other in [blocks, several, late] {
        assert_ne!(pixels(&native(&server, &other)), pixels(&drawn));
    }

    let folder = tempfile::tempdir().expect("a directory");
    let [input, out] = ["seen.png", "out.png"].map(|name| folder.path().join(name));
    std::fs::write(&input, &picture).expect("written");
    let adapter = fixtures().join("ip/models/ip-adapter-plus_sd15.safetensors");
    let paths = [input, out.clone(), model("generate"), adapter];
    let [input, output, model, adapter] = paths.each_ref().map(|p| p.to_str().expect("UTF-8"));
    let mut command = sd_server(&["generate", "a red house", "--model", model, "--seed", "3"]);
    command.args(["--steps", "4", "-W", "64", "-H", "64", "--guidance-scale", "4"]);
    command.args(["--scheduler", "ddim", "--dtype", "f32", "--threads", "1", "-o", output]);
    command.args(["--ip-adapter", adapter, "--ip-image", input, "--ip-scale", "0.7"]);
    let ran = command.args(["--device", "cpu"]).output().expect("it runs");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(pixels(&std::fs::read(&out).expect("a picture")), pixels(&drawn));
}

fn post(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let request = server.client.post(server.url(path)).body(body.to_string());
    let reply = request.header("content-type", "application/json").send().expect("an answer");
    (reply.status().as_u16(), reply.json().expect("JSON"))
}

fn sdapi(unit: &Value) -> Value {
    json!({
        "prompt": "a red house", "seed": 3, "steps": 4, "width": 64, "height": 64, "cfg_scale": 4,
        "sampler_name": "DDIM", "alwayson_scripts": { "controlnet": { "args": [unit] } },
    })
}

#[test]
fn units_of_the_extension_ask_for_adapters() {
    let server = server("units");
    // A square is seen whole by both.
    let picture = base64(&shapes(28, 28));
    let drawn = native(
        &server,
        &json!({
            "model": "ip-adapter-plus_sd15", "image": picture, "scale": 0.7,
        }),
    );
    let unit = |changes: Value| {
        let mut own = json!({
            "enabled": true, "module": "ip-adapter-auto", "model": "ip-adapter-plus_sd15 [01234567]",
            "image": picture, "weight": 0.7,
        });
        own.as_object_mut().expect("an object").extend(changes.as_object().expect("one").clone());
        sdapi(&own)
    };
    let ask = |body: &Value| post(&server, "/sdapi/v1/txt2img", body);
    let (status, reply) = ask(&unit(json!({})));
    assert_eq!(status, 200, "{reply}");
    assert_eq!(reply["images"].as_array().map(Vec::len), Some(1), "no map follows");
    assert_eq!(pixels(&file(&reply["images"][0])), pixels(&drawn));
    // The same weight in each of the four transformers.
    let (_, each) = ask(&unit(json!({ "advanced_weighting": [0.7, 0.7, 0.7, 0.7] })));
    assert_eq!(pixels(&file(&each["images"][0])), pixels(&drawn), "{}", each["info"]);
    let zeros = ask(&unit(json!({ "advanced_weighting": [0, 0, 0, 0] }))).1;
    let none = ask(&unit(json!({ "weight": 0 }))).1;
    assert_eq!(pixels(&file(&zeros["images"][0])), pixels(&file(&none["images"][0])));
    assert_ne!(pixels(&file(&zeros["images"][0])), pixels(&drawn));
    let (_, late) = ask(&unit(json!({ "guidance_start": 0.6 })));
    assert_ne!(pixels(&file(&late["images"][0])), pixels(&drawn));
    // Without a picture of its own it sees the input image; beside a net.
    let mut body = unit(json!({ "image": null }));
    body["init_images"] = json!([base64(&shapes(64, 64))]);
    let net = json!({ "module": "none", "model": "edges", "image": picture });
    body["alwayson_scripts"]["controlnet"]["args"].as_array_mut().expect("a list").push(net);
    let (status, reply) = post(&server, "/sdapi/v1/img2img", &body);
    assert_eq!(status, 200, "{reply}");
    for (changes, words) in [
        (json!({ "model": "cat" }), "args[0].model names the IP-Adapter \"cat\""),
        (json!({ "module": "ip-adapter_face_id" }), "args[0].module \"ip-adapter_face_id\" is not"),
        (json!({ "image": null }), "args[0].image is required"),
        (json!({ "mask": picture }), "args[0].mask is not supported"),
        (
            json!({ "advanced_weighting": [1, 2] }),
            "controlnet.args \"ip-adapter-plus_sd15\" takes 4 advanced weights, not 2",
        ),
    ] {
        let (status, reply) = ask(&unit(changes));
        let message = reply["detail"].as_str().unwrap_or_default();
        assert!([400, 422].contains(&status) && message.contains(words), "{words}: {message}");
    }
    let types = server.client.get(server.url("/controlnet/control_types")).send();
    let types: Value = types.expect("an answer").json().expect("JSON");
    let own = &types["control_types"]["IP-Adapter"];
    assert_eq!(own["default_option"], "ip-adapter-auto");
    let names = own["model_list"].as_array().expect("a list");
    let is_listed =
        |name: &Value| name.as_str().is_some_and(|n| n.starts_with("ip-adapter_sd15 ["));
    assert!(names.iter().any(is_listed), "{names:?}");
    assert!(!names.contains(&json!("model")), "an image encoder is none");
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let server = server("refusals");
    let picture = base64(&shapes(64, 64));
    let adapter = |changes: Value| {
        let mut own = json!({ "model": "ip-adapter_sd15", "image": picture });
        own.as_object_mut().expect("an object").extend(changes.as_object().expect("one").clone());
        own
    };
    let many = |count: usize| json!(vec![adapter(json!({})); count]);
    for (own, words) in [
        (adapter(json!({ "model": "face" })), "ip_adapter names the IP-Adapter \"face\", which is"),
        (adapter(json!({ "model": "model" })), "\"model\", which is unknown"),
        (
            adapter(json!({ "model": "ip-adapter_sdxl" })),
            "prompts of 40 channels, the model's have",
        ),
        (adapter(json!({ "model": "tokens" })), "what is wanted is an IP-Adapter"),
        (adapter(json!({ "model": null })), "ip_adapter must have \"model\""),
        (adapter(json!({ "image": null })), "ip_adapter must have \"image\""),
        (adapter(json!({ "image": [] })), "ip_adapter.image is required"),
        (adapter(json!({ "image": 7 })), "ip_adapter.image must be a string or a list, not 7"),
        (adapter(json!({ "image": "AAAA" })), "ip_adapter.image"),
        (adapter(json!({ "image": [picture, "AAAA"] })), "ip_adapter.image[1]"),
        (adapter(json!({ "scale": 11 })), "ip_adapter.scale must be from -10"),
        (adapter(json!({ "scale": { "left": 1 } })), "ip_adapter.scale.left is unknown"),
        (adapter(json!({ "scale": { "up": { "1": 1 } } })), "ip_adapter.scale.up.1 is no block"),
        (adapter(json!({ "scale": { "up": "x" } })), "ip_adapter.scale.up must be a number or"),
        (
            adapter(json!({ "scale": { "up": { "block_1": [1, 2, 3] } } })),
            "ip_adapter \"ip-adapter_sd15\" has 3 scales of up.block_1, which has 2 transformers",
        ),
        (adapter(json!({ "scale": { "down": 11 } })), "must have a scale from -10 to 10"),
        (adapter(json!({ "start": 0.5, "end": 0.5 })), "a start before its end"),
        (adapter(json!({ "strength": 5 })), "ip_adapter has no \"strength\""),
        (json!([adapter(json!({})), adapter(json!({ "end": 2 }))]), "ip_adapter[1].end must be"),
        (many(5), "ip_adapter has 5 entries; at most 4 are allowed"),
        (json!("ip-adapter_sd15"), "ip_adapter must be a list or an object"),
    ] {
        let reply = server.json(&body(&own));
        let message = reply.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(
            [400, 422].contains(&reply.status) && message.contains(words),
            "{words}: {message}"
        );
    }
}

#[test]
fn the_command_line_says_what_is_wrong_with_adapters() {
    let adapter = fixtures().join("ip/models/ip-adapter_sd15.safetensors");
    let adapter = adapter.to_str().expect("UTF-8");
    let folder = tempfile::tempdir().expect("a directory");
    let picture = folder.path().join("seen.png");
    std::fs::write(&picture, shapes(64, 64)).expect("written");
    let picture = picture.to_str().expect("UTF-8");
    for (args, words) in [
        (&["--ip-adapter", adapter][..], "--ip-image"),
        (&["--ip-image", picture], "--ip-adapter"),
        (
            &["--ip-adapter", adapter, "--ip-adapter", adapter, "--ip-image", picture],
            "2 adapters and 1 pictures",
        ),
        (&["--ip-adapter", "nowhere", "--ip-image", picture], "--ip-adapter nowhere: not a file"),
        (
            &["--ip-adapter", adapter, "--ip-image", picture, "--ip-scale=1", "--ip-scale=1"],
            "--ip-scale: is given 2 times, --ip-adapter 1 times",
        ),
    ] {
        let output = sd_server(&["generate", "a", "--model", "demo"]).args(args).output();
        let output = output.expect("it runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{message}");
        assert!(message.contains(words), "{words}: {message}");
    }
}
