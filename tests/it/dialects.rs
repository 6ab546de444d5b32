//! What clients of other servers send to `/invocations`, and what they expect to hear.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::{Reply, Server};
use crate::invocations::infotext;

const JSON: &str = "content-type: application/json";
const PNG: &[u8] = b"\x89PNG";
const JPEG: &[u8] = b"\xff\xd8\xff";

fn file(data: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(data.as_str().expect("a string")).expect("base64")
}

/// The picture that the native dialect draws, as RGB.
fn native(server: &Server, request: &Value) -> image::RgbImage {
    let reply = server.post(&[JSON, "accept: image/png"], request.to_string());
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    image::load_from_memory(&reply.body).expect("a picture").to_rgb8()
}

/// Nested arrays as a picture.
fn rgb(rows: &Value) -> image::RgbImage {
    let rows = rows.as_array().expect("rows");
    let width = rows[0].as_array().expect("pixels").len();
    let numbers = rows.iter().flat_map(|row| row.as_array().expect("pixels"));
    let numbers = numbers.flat_map(|pixel| pixel.as_array().expect("RGB"));
    let bytes = numbers.map(|byte| byte.as_u64().expect("a number") as u8).collect();
    image::RgbImage::from_raw(width as u32, rows.len() as u32, bytes).expect("rectangular")
}

fn refused(reply: &Reply, status: u16, param: &str) {
    assert_eq!(reply.status, status, "{}", String::from_utf8_lossy(&reply.body));
    assert_eq!(reply.error().1, param);
}

#[test]
fn jumpstart_text_is_answered_with_pixels() {
    let server = Server::ready(&[]);
    let text = "content-type: application/x-text";
    for body in ["a red house", r#""a red house""#] {
        let reply = server.post(&[text], body);
        assert_eq!(reply.header("content-type"), "application/json");
        let json = reply.json();
        assert_eq!(json["prompt"], "a red house");
        let seed: u64 = reply.header("x-sd-seed").parse().expect("a seed");
        let picture = rgb(&json["generated_image"]);
        assert_eq!(picture, native(&server, &json!({ "prompt": "a red house", "seed": seed })));
    }
    let files = server.post(&[text, "accept: application/json;jpeg"], "a red house").json();
    assert!(file(&files["generated_image"]).starts_with(JPEG));
    let bytes = server.post(&[text, "accept: image/png"], "a red house");
    assert!(bytes.body.starts_with(PNG));
}

#[test]
fn jumpstart_json_is_answered_with_what_its_accept_says() {
    let server = Server::ready(&[]);
    let request = json!({
        "prompt": "a red house", "width": 64, "height": 96, "num_inference_steps": 2,
        "num_images_per_prompt": 2, "guidance_scale": 5.0, "negative_prompt": "dogs", "seed": 3
    });
    for (accept, magic) in [("application/json;jpeg", JPEG), ("application/json; png", PNG)] {
        let header = format!("accept: {accept}");
        let json = server.post(&[JSON, &header], request.to_string()).json();
        assert_eq!(json["prompt"], "a red house");
        let images = json["generated_images"].as_array().expect("a list");
        assert_eq!(images.len(), 2, "{accept}");
        assert!(images.iter().all(|image| file(image).starts_with(magic)), "{accept}");
    }
    let prompts = json!({
        "prompt": ["a red house", "a blue car"], "negative_prompt": ["dogs", "cats"],
        "width": 64, "height": 64, "num_inference_steps": 2, "seed": 3
    });
    let accept = "accept: application/json;png";
    let json = server.post(&[JSON, accept], prompts.to_string()).json();
    assert_eq!(json["prompt"], json!(["a red house", "a blue car"]));
    let second = json!({
        "prompt": "a blue car", "negative_prompt": "cats",
        "width": 64, "height": 64, "steps": 2, "seed": 4
    });
    let drawn = image::load_from_memory(&file(&json["generated_images"][1])).expect("a picture");
    assert_eq!(drawn.to_rgb8(), native(&server, &second));
}

#[test]
fn jumpstart_lists_are_bounded_and_checked() {
    let server = Server::ready(&["--max-images", "3"]);
    let accept = "accept: application/json;jpeg";
    let ask = |request: Value| server.post(&[JSON, accept], request.to_string());
    refused(&server.json(&json!({ "prompt": ["a"] })), 400, "prompt");
    refused(&ask(json!({ "prompt": [] })), 400, "prompt");
    refused(&ask(json!({ "prompt": ["a", 1] })), 400, "prompt[1]");
    refused(&ask(json!({ "prompt": ["a"], "stepz": 1 })), 400, "stepz");
    let unpaired = json!({ "prompt": ["a", "b"], "negative_prompt": ["c"] });
    refused(&ask(unpaired), 400, "negative_prompt");
    let many = json!({ "prompt": ["a", "b"], "num_images_per_prompt": 2 });
    refused(&ask(many), 422, "prompt");
    refused(&ask(json!({ "prompt": vec![""; 60_000] })), 422, "prompt");
}

#[test]
fn hugging_face_toolkit_is_answered_with_a_string() {
    let server = Server::ready(&[]);
    let request = json!({
        "inputs": "a red house",
        "parameters": {
            "num_inference_steps": 2, "guidance_scale": 4.5, "seed": 7, "negative_prompt": "dogs",
            "target_size": { "width": 64, "height": 96 }, "scheduler": "EulerDiscreteScheduler"
        },
        "options": { "wait_for_model": true }
    });
    let reply = server.json(&request);
    let png = file(&reply.json());
    let written = infotext(&png);
    for part in ["a red house", "dogs", "Steps: 2", "CFG scale: 4.5", "Seed: 7", "Size: 64x96"] {
        assert!(written.contains(part), "{part} in {written}");
    }
    let bytes = server.post(&[JSON, "accept: image/jpeg"], request.to_string());
    assert!(bytes.body.starts_with(JPEG));
    let bare = file(&server.json(&json!({ "inputs": "a red house" })).json());
    assert!(infotext(&bare).starts_with("a red house\n"));
    let root = server.client.post(server.url("/")).body(request.to_string()).send();
    assert_eq!(file(&Reply::from(root.expect("an answer")).json()), png);
}

#[test]
fn hugging_face_examples_are_answered_with_a_list() {
    let server = Server::ready(&[]);
    let request =
        json!({ "inputs": "a cat", "num_inference_steps": 1, "num_images_per_prompt": 2 });
    let json = server.json(&request).json();
    let images = json["generated_images"].as_array().expect("a list");
    assert!(images.len() == 2 && images.iter().all(|image| file(image).starts_with(JPEG)));
}

#[test]
fn hugging_face_errors_name_the_parameter() {
    let server = Server::ready(&[]);
    let ask = |parameters: Value| server.json(&json!({ "inputs": "x", "parameters": parameters }));
    refused(&ask(json!({ "width": 7 })), 422, "parameters.width");
    refused(
        &ask(json!({ "target_size": { "height": 100 } })),
        422,
        "parameters.target_size.height",
    );
    refused(&ask(json!({ "num_inference_steps": "two" })), 400, "parameters.num_inference_steps");
    refused(&ask(json!({ "clip_skips": 1 })), 400, "parameters.clip_skips");
    refused(&ask(json!([])), 400, "parameters");
    refused(&server.json(&json!({ "inputs": 1 })), 400, "inputs");
    refused(&server.json(&json!({ "inputs": "x", "prompt": "y" })), 400, "prompt");
}

#[test]
fn stability_is_answered_with_artifacts() {
    let server = Server::ready(&[]);
    let request = json!({
        "text_prompts": [
            { "text": "a red house" }, { "text": "dogs", "weight": -1 },
            { "text": "at night", "weight": 1.0 }
        ],
        "cfg_scale": 5, "width": 64, "height": 96, "samples": 2, "steps": 2, "seed": 9,
        "sampler": "K_EULER_ANCESTRAL", "clip_guidance_preset": "NONE"
    });
    let json = server.json(&request).json();
    assert_eq!(json["result"], "success");
    let artifacts = json["artifacts"].as_array().expect("a list");
    assert_eq!(artifacts.len(), 2);
    for (k, artifact) in artifacts.iter().enumerate() {
        assert_eq!(artifact["finishReason"], "SUCCESS");
        assert_eq!(artifact["seed"], 9 + k as u64);
        let written = infotext(&file(&artifact["base64"]));
        assert!(written.starts_with("a red house, at night\nNegative prompt: dogs\n"), "{written}");
        assert!(written.contains("Sampler: Euler a,"), "{written}");
    }
    let any = json!({ "text_prompts": [{ "text": "x" }], "seed": 0, "steps": 1 });
    let seed = |reply: Value| reply["artifacts"][0]["seed"].as_u64().expect("a seed");
    assert_ne!(seed(server.json(&any).json()), seed(server.json(&any).json()));
}

#[test]
fn stability_errors_name_the_field() {
    let server = Server::ready(&[]);
    let ask = |name: &str, value: Value| {
        let mut request = json!({ "text_prompts": [{ "text": "x" }] });
        request[name] = value;
        server.json(&request)
    };
    refused(&ask("text_prompts", json!([])), 400, "text_prompts");
    refused(&ask("negative_prompt", json!("y")), 400, "negative_prompt");
    refused(&ask("text_prompts", json!("x")), 400, "text_prompts");
    refused(&ask("text_prompts", json!([{ "weight": 1 }])), 400, "text_prompts[0]");
    let weighed = json!([{ "text": "x", "weight": 0.5 }]);
    refused(&ask("text_prompts", weighed), 422, "text_prompts[0].weight");
    refused(&ask("samples", json!(0)), 422, "samples");
    refused(&ask("sampler", json!("K_DPM_FAST")), 422, "sampler");
    refused(&ask("style_preset", json!("anime")), 400, "style_preset");
    refused(&ask("clip_guidance_preset", json!("FAST_BLUE")), 422, "clip_guidance_preset");
}

#[test]
fn attributes_route_to_other_dialects_only() {
    let server = Server::ready(&[]);
    let request = json!({ "prompt": "a cat", "steps": 1 }).to_string();
    let ask = |attributes: &str| {
        let header = format!("x-amzn-sagemaker-custom-attributes: {attributes}");
        server.post(&[JSON, &header], request.as_str())
    };
    assert!(ask("route=/sdapi/v1/txt2img").json()["images"][0].is_string());
    assert_eq!(ask("trace=1").json()["prompt"], "a cat");
    for closed in
        ["route=/v1/jobs", "route=/sdapi/v1/options", "route=/v1/images/edits?x", "route=/"]
    {
        assert_eq!(ask(closed).status, 404, "{closed}");
    }
}
