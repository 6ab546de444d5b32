//! Every form of body and of reply that `/invocations` knows.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::{Reply, Server};

const FORM: &str = "content-type: application/x-www-form-urlencoded";
const JSON: &str = "content-type: application/json";
const PNG: &[u8] = b"\x89PNG";
const JPEG: &[u8] = b"\xff\xd8\xff";
const WEBP: &[u8] = b"RIFF";

/// The infotext of a PNG.
pub(crate) fn infotext(png: &[u8]) -> String {
    let reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().expect("a PNG");
    let info = reader.info();
    let latin =
        info.uncompressed_latin1_text.iter().map(|chunk| (&chunk.keyword, chunk.text.clone()));
    let other = info.utf8_text.iter();
    let other = other.map(|chunk| (&chunk.keyword, chunk.get_text().expect("readable text")));
    let mut texts = latin.chain(other).filter(|(keyword, _)| *keyword == "parameters");
    texts.next().expect("a parameters chunk").1
}

fn prompt_of(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    assert_eq!(reply.header("content-type"), "image/png");
    infotext(&reply.body).split("\nSteps:").next().expect("a prompt").to_owned()
}

#[test]
fn clip_skip_rescale_and_variation_change_the_picture_and_are_written_into_it() {
    let server = Server::ready(&[]);
    let draw = |fields: Value| {
        let mut body =
            json!({ "prompt": "a red house", "steps": 2, "seed": 7, "output_format": "png" });
        body.as_object_mut()
            .expect("an object")
            .extend(fields.as_object().expect("an object").clone());
        let reply: Value = serde_json::from_slice(&server.json(&body).body).expect("JSON");
        let file =
            BASE64_STANDARD.decode(reply["data"].as_str().expect("an image")).expect("base64");
        (infotext(&file), reply, image::load_from_memory(&file).expect("an image"))
    };
    let (text, _, plain) = draw(json!({}));
    assert!(!text.contains("Clip skip") && !text.contains("phi"), "{text}");
    for (fields, written) in [
        (json!({ "clip_skip": 1 }), "Clip skip: 2, "),
        (json!({ "guidance_rescale": 0.7 }), "CFG Rescale phi: 0.7, "),
        (
            json!({ "variation_seed": 9, "variation_strength": 0.5 }),
            "Variation seed: 9, Variation seed strength: 0.5, ",
        ),
    ] {
        let (text, reply, picture) = draw(fields);
        assert!(text.contains(written) && picture != plain, "{text}");
        assert_eq!(
            reply.get("variation_seed").is_some(),
            written.starts_with("Variation"),
            "{reply}"
        );
    }
    let (_, _, other) = draw(json!({ "seed": 9 }));
    assert_eq!(draw(json!({ "variation_seed": 9, "variation_strength": 1 })).2, other);
    assert_eq!(draw(json!({ "variation_seed": 9, "variation_strength": 0 })).2, plain);
    let one_row = draw(json!({ "guidance_scale": 1, "negative_prompt": "the sea" })).1;
    assert!(
        one_row["warnings"][0]
            .as_str()
            .expect("a warning")
            .starts_with("negative_prompt has no effect")
    );
    for (fields, field) in [
        (json!({ "prompt": "x", "clip_skip": 5 }), "clip_skip"),
        (json!({ "prompt": "x", "guidance_rescale": 2 }), "guidance_rescale"),
        (json!({ "prompt": "x", "variation_seed": 2 }), "variation_seed"),
        (json!({ "prompt": "x", "variation_strength": -1 }), "variation_strength"),
    ] {
        let reply = server.json(&fields);
        assert!((400..500).contains(&reply.status));
        let error: Value = serde_json::from_slice(&reply.body).expect("JSON");
        assert_eq!(error["error"]["param"], field, "{error}");
    }
}

#[test]
fn every_form_of_a_prompt_is_understood() {
    let server = Server::ready(&["--max-steps", "3"]);
    let steps = r#","steps":1}"#;
    let json = format!(r#"{{"prompt":"a red house"{steps}"#);
    let json_accept_png = [
        vec![JSON, "accept: image/png"],
        vec!["accept: image/png"],
        vec!["content-type: application/octet-stream", "accept: image/png"],
        vec![FORM, "accept: image/png"],
        vec!["content-type: text/plain", "x-amzn-sagemaker-accept: image/png"],
    ];
    for headers in json_accept_png {
        assert_eq!(prompt_of(&server.post(&headers, json.as_str())), "a red house", "{headers:?}");
    }
    let bom = format!("\u{feff}\n {json}\n");
    assert_eq!(prompt_of(&server.post(&[JSON, "accept: image/png"], bom)), "a red house");
    let forms = [
        ("prompt=a red house&steps=2", "a red house"),
        ("prompt=a+red%20house&steps=1&seed=&width=", "a red house"),
        ("prompt=&steps=1", ""),
        ("prompt=50%25+caf%C3%A9&steps=1", "50% café"),
    ];
    for (body, prompt) in forms {
        assert_eq!(prompt_of(&server.post(&[FORM], body)), prompt);
    }
}

#[test]
fn a_bare_prompt_is_answered_with_a_picture() {
    let server = Server::ready(&[]);
    // The finer points of bare prompts are tested in src/http/invocations/body.rs: these take all the steps.
    let table = [
        (FORM, "a red house", "a red house"),
        ("content-type: text/plain; charset=utf-8", "ein Häuschen 🏠\n", "ein Häuschen 🏠"),
    ];
    for (header, body, prompt) in table {
        assert_eq!(prompt_of(&server.post(&[header], body)), prompt, "{header} {body}");
    }
}

#[test]
fn the_reply_takes_the_form_that_is_asked_for() {
    let server = Server::ready(&[]);
    let body = |format: &str| format!(r#"{{"prompt":"x","steps":1,"seed":5{format}}}"#);
    let bytes = [
        ("accept: image/png", "", "image/png", PNG),
        ("accept: image/jpeg", "", "image/jpeg", JPEG),
        ("accept: image/webp", "", "image/webp", WEBP),
        ("accept: image/*", "", "image/png", PNG),
        ("accept: image/*", r#","output_format":"jpeg""#, "image/jpeg", JPEG),
        ("accept: text/html, image/webp;q=0.3, image/jpeg;q=0.9", "", "image/jpeg", JPEG),
    ];
    for (accept, format, media_type, magic) in bytes {
        let reply = server.post(&[JSON, accept], body(format));
        assert_eq!((reply.status, reply.header("content-type")), (200, media_type), "{accept}");
        assert!(reply.body.starts_with(magic), "{accept}");
        assert_eq!(reply.header("x-sd-seed"), "5");
        assert_eq!(reply.header("x-amzn-sagemaker-custom-attributes"), "seed=5");
    }
    let json = [
        ("accept: */*", "", "image/jpeg", JPEG),
        ("accept: application/json", r#","output_format":"png""#, "image/png", PNG),
        ("accept: application/json", r#","output_format":"WEBP""#, "image/webp", WEBP),
    ];
    for (accept, format, media_type, magic) in json {
        let reply = server.post(&[JSON, accept], body(format));
        let json = reply.json();
        assert_eq!(reply.header("content-type"), "application/json");
        assert_eq!((&json["prompt"], &json["seed"]), (&"x".into(), &5.into()));
        assert_eq!(json["content_type"], media_type);
        let data = BASE64_STANDARD.decode(json["data"].as_str().expect("text")).expect("base64");
        assert!(data.starts_with(magic), "{accept} {format}");
    }
    let text_as_json = server.post(&["accept: application/json", FORM], "prompt=x&steps=1");
    assert_eq!(text_as_json.json()["prompt"], "x");
}

#[test]
fn replies_that_cannot_be_given_are_406() {
    let server = Server::ready(&[]);
    let table = [
        ("accept: text/html", r#"{"prompt":"x"}"#),
        ("accept: image/gif", r#"{"prompt":"x"}"#),
        ("accept: image/png", r#"{"prompt":"x","n":2}"#),
        ("accept: image/png", r#"{"prompt":"x","output_format":"jpeg"}"#),
        ("accept: application/json;q=0", r#"{"prompt":"x"}"#),
    ];
    for (accept, body) in table {
        let reply = server.post(&[JSON, accept], body);
        assert_eq!(reply.status, 406, "{accept} {body}");
        assert_eq!(reply.error().0, "not_acceptable");
    }
}

#[test]
fn seeds_are_echoed_and_repeat_the_picture() {
    let server = Server::ready(&[]);
    let request = json!({ "prompt": "a blue car", "steps": 2, "output_format": "png" });
    let first = server.json(&request).json();
    let mut again = request.clone();
    again["seed"] = first["seed"].clone();
    assert_eq!(server.json(&again).json()["data"], first["data"]);
    assert_ne!(server.json(&request).json()["seed"], first["seed"]);
}

#[test]
fn image_k_has_seed_plus_k() {
    let server = Server::ready(&[]);
    let request = |seed: u64, n: usize| {
        json!({ "prompt": "x", "num_inference_steps": 2, "seed": seed,
                "num_images_per_prompt": n, "output_format": "png" })
    };
    let several = server.json(&request(u64::MAX - 1, 3)).json();
    let images = several["images"].as_array().expect("an array").clone();
    assert!(several.get("data").is_none() && several.get("seed").is_none());
    let seeds: Vec<_> = images.iter().map(|image| image["seed"].as_u64()).collect();
    assert_eq!(seeds, [Some(u64::MAX - 1), Some(u64::MAX), Some(0)]);
    for image in &images {
        let seed = image["seed"].as_u64().expect("a seed");
        assert_eq!(server.json(&request(seed, 1)).json()["data"], image["data"], "seed {seed}");
    }
}

#[test]
fn prompts_are_read_in_the_syntax_that_is_asked_for() {
    let server = Server::ready(&[]);
    let draw = |prompt: &str, syntax: &str| {
        server.json(&json!({ "prompt": prompt, "prompt_syntax": syntax, "steps": 2, "seed": 1 }))
    };
    // The parameters in the files name the syntax.
    let data = |prompt: &str, syntax: &str| {
        let reply = draw(prompt, syntax).json();
        let file = BASE64_STANDARD.decode(reply["data"].as_str().expect("base64")).expect("base64");
        image::load_from_memory(&file).expect("an image").to_rgb8().into_raw()
    };
    assert_eq!(data("a red house", "plain"), data("a red house", "a1111"));
    assert_ne!(data("a (red:1.5) house", "plain"), data("a (red:1.5) house", "a1111"));
    let long = "a red house, ".repeat(40);
    assert!(draw(&long, "plain").json()["warnings"][0].is_string());
    assert!(draw(&long, "a1111").json().get("warnings").is_none());
    let unknown = draw("a cat", "compel");
    assert_eq!((unknown.status, unknown.error().1), (422, "prompt_syntax".into()));
}

#[test]
fn a_schedule_is_chosen_beside_the_sampler_or_with_it() {
    let server = Server::ready(&[]);
    let draw = |fields: serde_json::Value| {
        let mut request = json!({
            "prompt": "a cat", "width": 64, "height": 64, "steps": 2, "guidance_scale": 1,
        });
        request.as_object_mut().expect("an object").extend(fields.as_object().cloned().unwrap());
        server.post(&[JSON, "accept: image/png"], request.to_string())
    };
    for (fields, written) in [
        (json!({ "scheduler": "euler", "schedule": "karras" }), "Sampler: Euler Karras,"),
        (json!({ "scheduler": "euler_karras", "schedule": "Karras" }), "Sampler: Euler Karras,"),
        (json!({ "scheduler": "euler", "schedule": "Automatic" }), "Sampler: Euler,"),
        (json!({ "scheduler": "ddim", "schedule": "trailing" }), "Sampler: DDIM SGM Uniform,"),
        (
            json!({ "scheduler": "KDPM2AncestralDiscreteScheduler", "schedule": "beta" }),
            "Sampler: DPM2 a Beta,",
        ),
        (json!({ "scheduler": "tcd", "eta": 0.5 }), "Sampler: TCD, CFG scale: 1, "),
        (json!({ "scheduler": "tcd", "eta": 0.5 }), ", Eta: 0.5, "),
        // What has no effect is not written.
        (
            json!({ "scheduler": "euler", "eta": 0.5, "s_noise": 0.5, "eta_noise_seed_delta": 7 }),
            "Model: demo, RNG: CPU, Prompt syntax: plain, Version",
        ),
    ] {
        let reply = draw(fields.clone());
        assert_eq!(reply.status, 200, "{fields} {}", String::from_utf8_lossy(&reply.body));
        let parameters = infotext(&reply.body);
        assert!(parameters.contains(written), "{fields}: {parameters}");
    }
    for (fields, field, words) in [
        (json!({ "scheduler": "ddim", "schedule": "karras" }), "schedule", ["ddim", "karras"]),
        (json!({ "sampler": "lcm_beta" }), "schedule", ["lcm", "beta"]),
        (
            json!({ "scheduler": "dpmpp_2m_karras", "schedule": "exponential" }),
            "schedule",
            ["dpmpp_2m_karras", "exponential"],
        ),
        (json!({ "schedule": "turbo" }), "schedule", ["turbo", "align_your_steps"]),
        (json!({ "scheduler": "euler_a", "eta": 2 }), "eta", ["0", "1"]),
    ] {
        let reply = draw(fields.clone());
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        assert_eq!((reply.status, reply.error().1), (422, field.into()), "{fields}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn the_parameters_are_in_the_file() {
    let server = Server::ready(&[]);
    let request = json!({
        "prompt": "a cat", "negative_prompt": "dogs", "width": 64, "height": 96, "steps": 2,
        "cfg_scale": 4.5, "sampler": "DPM++ 2M Karras", "seed": 7
    });
    let reply = server.post(&[JSON, "accept: image/png"], request.to_string());
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        infotext(&reply.body),
        format!(
            "a cat\nNegative prompt: dogs\nSteps: 2, Sampler: DPM++ 2M Karras, CFG scale: 4.5, \
             Seed: 7, Size: 64x96, Model: demo, RNG: CPU, Prompt syntax: plain, Version: sd-server {version}"
        )
    );
    for format in ["jpeg", "webp"] {
        let accept = format!("accept: image/{format}");
        let reply = server.post(&[JSON, &accept], request.to_string());
        let utf16: Vec<u8> = "Sampler: DPM++".encode_utf16().flat_map(u16::to_be_bytes).collect();
        assert!(reply.body.windows(utf16.len()).any(|window| window == utf16), "{format}");
        let picture = image::load_from_memory(&reply.body).expect("readable");
        assert_eq!((picture.width(), picture.height()), (64, 96), "{format}");
    }
}

#[test]
fn ping_answers_every_method_that_sagemaker_uses() {
    let server = Server::ready(&[]);
    for method in [reqwest::Method::GET, reqwest::Method::HEAD, reqwest::Method::POST] {
        let reply =
            Reply::from(server.client.request(method, server.url("/ping")).send().expect("ok"));
        assert_eq!((reply.status, reply.body.len()), (200, 0));
    }
}

#[test]
fn requests_keep_their_name() {
    let server = Server::ready(&[]);
    let named = server.post(&["x-amzn-sagemaker-inference-id: abc-1"], "");
    assert_eq!(named.header("x-request-id"), "abc-1");
    let odd = server.post(&["x-request-id: a b"], "");
    assert_eq!(odd.header("x-request-id").len(), 16);
}
