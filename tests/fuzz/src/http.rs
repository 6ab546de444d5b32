//! Requests, as the router gets them, to a server with a model that draws at once. Whatever the
//! bytes are: the status is one of those that docs/api.md lists for a client's fault or success,
//! the body is what its type says, an error is short, and nothing panics in any thread.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method, Request, StatusCode};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_server::engine::{Engine, EngineConfig};
use sd_server::http::HttpConfig;
use sd_server::request::Limits;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt as _;

use crate::fake::{ENGINE, Fake, HTTP, Steps};

/// SageMaker forwards so much of an error.
const MAX_ERROR_BYTES: usize = 2048;

/// A server in this process.
struct Site {
    runtime: Runtime,
    router: Router,
    steps: Steps,
}

static SITE: LazyLock<Mutex<Site>> = LazyLock::new(|| {
    let (mut fake, strings) = Fake::new();
    fake.obeys_prompts = false;
    // Without the sender of permits, no step waits.
    drop(strings.permits);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let engine = EngineConfig { max_queue: 64, ..ENGINE };
    let engine = Engine::start(engine, || Ok(fake)).expect("a thread");
    let limits = Limits { max_pixels: 128 * 64, max_steps: 3, ..HTTP.limits };
    let http = HttpConfig { limits, request_timeout: Duration::from_secs(20), ..HTTP };
    let router = runtime.block_on(async {
        engine.ready().await.expect("it loads");
        sd_server::http::router(engine.into(), http).expect("a router")
    });
    Mutex::new(Site { runtime, router, steps: strings.steps })
});

/// Sends a request and checks the answer.
fn send(request: Request<Body>) -> (StatusCode, Vec<u8>) {
    let site = SITE.lock().unwrap_or_else(PoisonError::into_inner);
    let (head, body) = site.runtime.block_on(async {
        let reply = site.router.clone().oneshot(request).await.expect("infallible");
        let (head, body) = reply.into_parts();
        (head, to_bytes(body, 64 << 20).await.expect("a whole body"))
    });
    site.steps.lock().expect("unpoisoned").clear();
    drop(site);
    let body = body.to_vec();
    sound(head.status, &head.headers, &body);
    (head.status, body)
}

/// Panics if an answer is none that the documentation allows.
fn sound(status: StatusCode, headers: &HeaderMap, body: &[u8]) {
    const KNOWN: [u16; 18] =
        [200, 202, 204, 304, 400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 429, 503, 504];
    let text = String::from_utf8_lossy(body);
    let start: String = text.chars().take(400).collect();
    assert!(KNOWN.contains(&status.as_u16()) || status == 507, "{status}: {start}");
    let media = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    match media.split(';').next().unwrap_or_default() {
        "application/json" => {
            let value: Value = serde_json::from_slice(body).expect("JSON as declared");
            if status.as_u16() >= 400 {
                assert!(value.is_object(), "{status}: {start}");
            }
        }
        "application/jsonlines" => {
            for line in text.lines() {
                let _: Value = serde_json::from_str(line).expect("JSON on each line");
            }
        }
        "text/event-stream" => {
            let mut names = text.lines().filter_map(|line| line.strip_prefix("event: "));
            let name = names.next_back().unwrap_or_default();
            let is_last = ["result", "error"].contains(&name) || name.ends_with(".completed");
            assert!(is_last, "{start}");
        }
        "image/png" | "image/jpeg" | "image/webp" => {
            sd_server::image::decode(body, 1 << 20).expect("an image as declared");
        }
        _ => {}
    }
    if status.as_u16() >= 400 {
        assert!(body.len() <= MAX_ERROR_BYTES, "{status}: {} bytes: {start}", body.len());
    }
}

fn post(path: &str, media_type: &str, body: impl Into<Body>) -> (StatusCode, Vec<u8>) {
    let request = Request::post(path).header(CONTENT_TYPE, media_type);
    send(request.body(body.into()).expect("a request"))
}

/// A whole request: `METHOD path`, headers, an empty line, the body.
pub fn request(data: &[u8]) {
    let end = data.windows(2).position(|pair| pair == b"\n\n").unwrap_or(data.len());
    let (head, body) = (&data[..end], data.get(end + 2..).unwrap_or_default());
    let mut lines = head.split(|byte| *byte == b'\n');
    let first = String::from_utf8_lossy(lines.next().unwrap_or_default());
    let (method, path) = first.split_once(' ').unwrap_or(("POST", "/invocations"));
    let Ok(method) = Method::from_bytes(method.as_bytes()) else { return };
    let mut request = Request::builder().method(method).uri(path);
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        request = request.header(&line[..colon], line.get(colon + 1..).unwrap_or_default());
    }
    if let Ok(request) = request.body(Body::from(body.to_vec())) {
        send(request);
    }
}

/// The fields of the native API.
pub fn json(data: &[u8]) {
    post("/invocations", "application/json", data.to_vec());
}

/// A form, or the bare prompt that curl sends as one.
pub fn form(data: &[u8]) {
    post("/invocations", "application/x-www-form-urlencoded", data.to_vec());
}

/// JSON Lines.
pub fn lines(data: &[u8]) {
    post("/invocations", "application/jsonlines", data.to_vec());
}

/// A multipart form of OpenAI's API; after a `v` one of variations.
pub fn multipart(data: &[u8]) {
    let (route, body) = match data {
        [b'v', body @ ..] => ("variations", body),
        body => ("edits", body),
    };
    post(&format!("/v1/images/{route}"), "multipart/form-data; boundary=B", body.to_vec());
}

/// The fields of OpenAI's API.
pub fn openai(data: &[u8]) {
    post("/v1/images/generations", "application/json", data.to_vec());
}

/// The fields of AUTOMATIC1111's API; the first byte tells the routes apart.
pub fn a1111(data: &[u8]) {
    let [kind, body @ ..] = data else { return };
    let route = ["txt2img", "img2img", "options", "png-info"][usize::from(kind % 4)];
    post(&format!("/sdapi/v1/{route}"), "application/json", body.to_vec());
}

/// An image file: as input, as mask, and for the parameters in it.
pub fn picture(data: &[u8]) {
    let file = BASE64_STANDARD.encode(data);
    let body = json!({ "prompt": "", "image": file, "mask": file }).to_string();
    post("/invocations", "application/json", body);
    post("/sdapi/v1/png-info", "application/json", json!({ "image": file }).to_string());
}

/// The text of an input image: base64 or a data URL.
pub fn data_url(data: &[u8]) {
    let body = json!({ "prompt": "", "image": String::from_utf8_lossy(data) }).to_string();
    post("/invocations", "application/json", body);
}

/// Generation parameters in a PNG file, which are read back as they are.
pub fn infotext(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 1, 1);
    encoder.add_itxt_chunk("parameters".into(), text.clone().into_owned()).expect("a text chunk");
    let mut writer = encoder.write_header().expect("a header");
    writer.write_image_data(&[0]).expect("a pixel");
    writer.finish().expect("a file");
    let body = json!({ "image": BASE64_STANDARD.encode(file) }).to_string();
    let (status, body) = post("/sdapi/v1/png-info", "application/json", body);
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(body["info"], *text);
}
