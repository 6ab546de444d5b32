//! Open WebUI and SillyTavern, as they were recorded before this server (`tests/clients/record/`):
//! what they sent is sent again, and what they read of the answers must be there.

use std::path::Path;
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use serde_json::Value;

use crate::harness::{Reply, Server};

/// Steps of a request that is not waited for, but interrupted.
const LONG: u64 = 100;

fn exchanges(client: &str) -> Vec<Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/recorded");
    let text = std::fs::read_to_string(folder.join(client)).expect("a recording");
    let mut recording: Value = serde_json::from_str(&text).expect("JSON");
    match recording["exchanges"].take() {
        Value::Array(exchanges) if !exchanges.is_empty() => exchanges,
        other => panic!("no exchanges: {other}"),
    }
}

fn send(server: &Server, exchange: &Value) -> Reply {
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let method: Method = text(&exchange["method"]).parse().expect("a method");
    let mut request = server.client.request(method, server.url(&text(&exchange["path"])));
    for (name, value) in exchange["headers"].as_object().expect("headers") {
        request = request.header(name, text(value));
    }
    request = match (exchange.get("json"), exchange.get("base64")) {
        (Some(json), _) => request.body(json.to_string()),
        (_, Some(body)) => request.body(BASE64_STANDARD.decode(text(body)).expect("base64")),
        _ => request,
    };
    Reply::from(request.send().expect("an answer"))
}

/// What a pointer points at; `*` stands for every element.
fn found<'a>(value: &'a Value, pointer: &str) -> Vec<&'a Value> {
    let mut found = vec![value];
    for part in pointer.split('/').skip(1) {
        found = found
            .into_iter()
            .flat_map(|value| match part {
                "*" => value.as_array().expect("a list").iter().collect::<Vec<_>>(),
                name => vec![value.get(name).unwrap_or_else(|| panic!("no {pointer}"))],
            })
            .collect();
    }
    found
}

fn size(picture: &Value) -> String {
    let file = BASE64_STANDARD.decode(picture.as_str().expect("a string")).expect("base64");
    // What the clients take it for.
    assert_eq!(image::guess_format(&file).ok(), Some(image::ImageFormat::Png));
    let picture = image::load_from_memory(&file).expect("a picture");
    format!("{}x{}", picture.width(), picture.height())
}

/// The size and the number of the pictures that were asked for.
fn wanted(exchange: &Value) -> (String, usize) {
    let body = exchange.get("json").unwrap_or(&Value::Null);
    let count = body.get("batch_size").or(body.get("n")).and_then(Value::as_u64).unwrap_or(1);
    let side = |name| {
        let scale = if body["enable_hr"] == true { &body["hr_scale"] } else { &Value::Null };
        body[name].as_u64().map(|side| side * scale.as_u64().unwrap_or(1))
    };
    let size = match (side("width"), side("height")) {
        (Some(width), Some(height)) => format!("{width}x{height}"),
        // Of an edit that names none, the picture's own.
        _ => body["size"].as_str().unwrap_or("64x96").to_owned(),
    };
    (size, count as usize)
}

fn check(exchange: &Value, reply: &Reply) {
    let text = String::from_utf8_lossy(&reply.body);
    assert_eq!(u64::from(reply.status), exchange["status"], "{exchange}: {text}");
    let reads = exchange["reads"].as_array().map_or(&[][..], Vec::as_slice);
    for pointer in reads.iter().map(|read| read.as_str().expect("a pointer")) {
        let json = reply.json();
        let read = found(&json, pointer);
        assert!(read.iter().all(|value| !value.is_null()), "{pointer}: {text}");
        if pointer.contains("image") || pointer.contains("b64_json") {
            let (size_wanted, count) = wanted(exchange);
            assert_eq!(read.len(), count, "{exchange}");
            assert!(read.iter().all(|picture| size(picture) == size_wanted), "{exchange}");
        }
    }
}

/// Replays a recording and returns how many pictures were asked for.
fn replay(client: &str) -> usize {
    let server = Server::ready(&["--api-key", "sesame"]);
    let exchanges = exchanges(client);
    let draws =
        |exchange: &&Value| exchange["method"] == "POST" && exchange["reads"][0].is_string();
    let steps = |exchange: &Value| exchange["json"]["steps"].as_u64().unwrap_or(0);
    let mut exchanges = exchanges.iter().peekable();
    let mut drawn = 0;
    while let Some(exchange) = exchanges.next() {
        drawn += usize::from(draws(&exchange));
        if steps(exchange) < LONG {
            check(exchange, &send(&server, exchange));
            continue;
        }
        let next = exchanges.peek().expect("an interrupt");
        assert_eq!(next["path"], "/sdapi/v1/interrupt");
        let begun = || server.metric("sd_stage_duration_seconds_count{stage=\"step\"}");
        thread::scope(|scope| {
            let before = begun();
            let drawing = scope.spawn(|| send(&server, exchange));
            while begun() == before {
                thread::sleep(Duration::from_millis(10));
            }
            check(next, &send(&server, next));
            let reply = drawing.join().expect("an answer");
            check(exchange, &reply);
            assert!(reply.json()["info"].as_str().is_some_and(|info| info.contains("interrupted")));
        });
    }
    drawn
}

#[test]
fn open_webui() {
    assert_eq!(replay("open-webui.json"), 7);
}

#[test]
fn sillytavern() {
    assert_eq!(replay("sillytavern.json"), 4);
}
