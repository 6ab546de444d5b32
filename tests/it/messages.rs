//! What errors say, in whose format, and what neither they nor the log repeat.

use std::fs::{self, File};

use anyhow::Result;
use reqwest::Method;
use serde_json::{Value, json};

use crate::engine::{self, LONG, ready};
use crate::fake::HTTP;
use crate::harness::{Server, sd_server};

const JSON: &str = "content-type: application/json";
const FORM: &str = "content-type: application/x-www-form-urlencoded";
const LINES: &str = "content-type: application/jsonlines";
const PARTS: &str = "content-type: multipart/form-data; boundary=x";
const GENERATIONS: &str = "/v1/images/generations";
const TXT2IMG: &str = "/sdapi/v1/txt2img";

/// Path, header and body of requests that are wrong because of a word.
fn wrong(word: &str) -> Vec<(&'static str, String, String)> {
    let field = |field: &str, value: Value| {
        let mut body = json!({ "prompt": "a" });
        body[field] = value;
        body.to_string()
    };
    let part = |name: &str, value: &[u8]| {
        let head = format!("--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        [head.as_bytes(), value, b"\r\n--x--\r\n"].concat()
    };
    let part = |name, value| String::from_utf8(part(name, value)).expect("text");
    let hires = json!({ "prompt": "a", "enable_hr": true, "hr_upscaler": word }).to_string();
    let upscaler = json!({ "prompt": "a", "hires_width": 128, "hires_upscaler": word });
    let table = [
        ("/invocations", JSON, field("scheduler", word.into())),
        ("/invocations", JSON, field("output_format", word.into())),
        ("/invocations", JSON, field("prompt_syntax", word.into())),
        ("/invocations", JSON, field("loras", json!([{ "name": word }]))),
        ("/invocations", JSON, field("loras", json!([{ "name": "a", word: 1 }]))),
        ("/invocations", JSON, field("image", word.into())),
        ("/invocations", JSON, field("steps", word.into())),
        ("/invocations", JSON, field(word, 1.into())),
        ("/invocations", JSON, upscaler.to_string()),
        ("/invocations", JSON, json!({ "inputs": "a", "parameters": { word: 1 } }).to_string()),
        ("/invocations", LINES, field("scheduler", word.into())),
        ("/invocations", FORM, format!("prompt=a&{word}=1")),
        ("/invocations", FORM, format!("prompt=a&steps={word}")),
        ("/invocations", FORM, format!("prompt=a&loras=[{{\"name\":\"{word}\"}}]")),
        ("/v1/jobs", JSON, field("scheduler", word.into())),
        (GENERATIONS, JSON, field("size", word.into())),
        (GENERATIONS, JSON, field("model", word.into())),
        (GENERATIONS, JSON, field("response_format", word.into())),
        ("/v1/images/edits", PARTS, part(word, b"1")),
        ("/v1/images/edits", PARTS, part("image", b"") + &part(word, b"1")),
        (TXT2IMG, JSON, field("sampler_name", word.into())),
        (TXT2IMG, JSON, field("script_name", word.into())),
        (TXT2IMG, JSON, field("prompt", format!("<lora:{word}:1>").into())),
        (TXT2IMG, JSON, field("prompt", format!("<lora:a:{word}>").into())),
        (TXT2IMG, JSON, json!({ "sampler_name": "Euler", "scheduler": word }).to_string()),
        (TXT2IMG, JSON, field("override_settings", json!({ "sd_model_checkpoint": word }))),
        (TXT2IMG, JSON, field("override_settings", json!({ "samples_format": word }))),
        (TXT2IMG, JSON, field("override_settings", json!({ "randn_source": word }))),
        (TXT2IMG, JSON, hires),
        ("/sdapi/v1/options", JSON, field("sd_model_checkpoint", word.into())),
        ("/sdapi/v1/options", JSON, field("randn_source", json!([word, { word: word }]))),
    ];
    let owned = table.map(|(path, header, body)| (path, header.to_owned(), body));
    let headers = ["content-type", "content-encoding", "accept"];
    let headers = headers.map(|name| ("/invocations", format!("{name}: {word}"), "a cat".into()));
    owned.into_iter().chain(headers).collect()
}

#[test]
fn what_was_typed_is_repeated_briefly_and_never_logged() -> Result<()> {
    let log = tempfile::NamedTempFile::new()?;
    let start = |args: &[&str]| -> Result<Server> {
        let mut command = sd_server(&["--model", "demo", "--device", "cpu", "--threads", "1"]);
        let server = Server::spawn(command.args(args).stderr(File::create(log.path())?));
        server.wait_until_ready();
        Ok(server)
    };
    let post = |server: &Server, (path, header, body): &(&str, String, String)| -> Result<String> {
        let (name, value) = header.split_once(": ").expect("name: value");
        let request = server.client.post(server.url(path)).header(name, value).body(body.clone());
        let reply = request.send()?;
        assert!(reply.status().is_client_error() || *header == LINES, "{path} {body}");
        Ok(reply.text()?)
    };
    let server = start(&["--log", "debug"])?;
    // A quotation has 64 characters.
    let (long, too_long) = ("xyzzy".repeat(400), "xyzzy".repeat(13));
    for word in ["xyzzy", &long] {
        for request in wrong(word) {
            let text = post(&server, &request)?;
            let short = !text.contains(&too_long) && text.len() < 2048;
            assert!(short, "{} {}: {text}", request.0, &request.2[..request.2.len().min(90)]);
        }
    }
    let path = format!("/models/{}", "xyzzy".repeat(400));
    let text = post(&server, &(&path, JSON.into(), "{}".into()))?;
    assert!(!text.contains(&too_long), "{text}");
    for path in ["/xyzzy", "/v1/jobs/xyzzy", "/files/xyzzy.png"] {
        let method = reqwest::Method::from_bytes(b"XYZZY")?;
        assert!(server.client.request(method, server.url(path)).send()?.status().is_client_error());
        assert_eq!(server.client.get(server.url(path)).send()?.status(), 404, "{path}");
    }
    // The end of the log is written when the server ends by itself.
    server.signal("TERM");
    server.wait();
    let logged = fs::read_to_string(log.path())?;
    assert!(!logged.to_lowercase().contains("xyzzy"), "{logged}");
    assert!(logged.contains("/v1/jobs/{id}"), "{logged}");
    assert!(logged.contains("out_of_range") && logged.contains("scheduler"), "{logged}");

    let server = start(&["--log-prompts"])?;
    post(&server, &wrong("xyzzy")[0])?;
    server.client.get(server.url("/plugh")).send()?;
    // The end of the log is written when the server ends by itself.
    server.signal("TERM");
    server.wait();
    let logged = fs::read_to_string(log.path())?;
    assert!(logged.contains("is unknown; known") && logged.contains("xyzzy"), "{logged}");
    assert!(logged.contains("/plugh"), "{logged}");
    Ok(())
}

#[test]
fn errors_of_routing_are_in_the_format_of_the_api() {
    let server = Server::ready(&[]);
    let openai = |json: &Value| json["error"]["type"] == "invalid_request_error";
    let a1111 = |json: &Value| json["detail"].is_string() && json["error"].is_string();
    let native =
        |json: &Value| json["error"]["type"].is_null() && json["error"]["code"].is_string();
    type Is<'a> = &'a dyn Fn(&Value) -> bool;
    let (openai, a1111, native): (Is<'_>, Is<'_>, Is<'_>) = (&openai, &a1111, &native);
    let table = [
        (Method::GET, "/nope", 404, native),
        (Method::GET, "/v1/nope", 404, openai),
        (Method::POST, "/v1/images/nope", 404, openai),
        (Method::GET, GENERATIONS, 405, openai),
        (Method::GET, "/v1/models/nope", 404, openai),
        (Method::GET, "/v1/models/%FF", 400, openai),
        (Method::GET, "/v1/jobs/nope", 404, native),
        (Method::GET, "/v1/jobs/%FF", 400, native),
        (Method::GET, "/v1/jobs/%FF/result", 400, native),
        (Method::DELETE, "/v1/jobs/%FF", 400, native),
        (Method::PUT, "/v1/jobs", 405, native),
        (Method::GET, "/files/%FF", 400, native),
        (Method::POST, "/models/%FF", 400, native),
        (Method::GET, "/sdapi/v1/nope", 404, a1111),
        (Method::GET, TXT2IMG, 405, a1111),
        (Method::GET, "/internal/progress", 405, a1111),
        (Method::GET, "/sdapi/v1/progress?skip_current_image=maybe", 400, a1111),
        (Method::PUT, "/ping", 405, native),
    ];
    for (method, path, status, is_in_format) in table {
        let reply = server.client.request(method, server.url(path)).send().expect("an answer");
        assert_eq!(reply.status(), status, "{path}");
        let json: Value = reply.json().unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(is_in_format(&json), "{path}: {json}");
    }
    assert_eq!(
        server.metric(r#"sd_requests_total{route="/v1/jobs/{id}",outcome="malformed"}"#),
        2.0
    );
    let metrics = server.client.get(server.url("/metrics")).send().expect("an answer");
    let text = metrics.text().expect("text");
    assert!(!text.contains(r#"outcome="other""#), "{text}");
    let ok = |line: &str| line.contains("route=\"/ping\"") || line.contains("route=\"/health");
    let not_ready = |line: &&str| line.contains(r#"outcome="not_ready""#);
    assert!(text.lines().filter(not_ready).all(ok), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_format_that_cannot_hold_the_image_is_refused_before_the_first_step() -> Result<()> {
    let (engine, strings) = ready().await;
    let (steps, _) = (strings.steps.clone(), drop(strings.permits));
    let server = engine::Server::start(engine, HTTP, LONG).await;
    let (tall, wide) =
        (json!({ "width": 8, "height": 65536 }), json!({ "width": 16384, "height": 8 }));
    let with = |size: &Value, fields: Value| {
        let mut body = json!({ "prompt": "a", "steps": 4 });
        for fields in [size, &fields] {
            body.as_object_mut()
                .expect("an object")
                .extend(fields.as_object().expect("one").clone());
        }
        body
    };
    let hires = json!({ "width": 8, "height": 8192, "hires_width": 8, "hires_height": 65536 });
    let hr = json!({ "width": 8, "height": 8192, "enable_hr": true, "hr_scale": 8, "hr_resize_x": 8, "hr_resize_y": 65536 });
    let settings = |format: &str| json!({ "override_settings": { "samples_format": format } });
    let table = [
        ("/invocations", with(&tall, json!({})), "height"),
        ("/invocations", with(&tall, json!({ "stream": true, "output_format": "jpeg" })), "height"),
        ("/invocations", with(&wide, json!({ "output_format": "webp" })), "width"),
        ("/invocations", with(&hires, json!({ "output_format": "webp" })), "hires_height"),
        ("/v1/jobs", with(&tall, json!({ "output_format": "webp" })), "height"),
        (GENERATIONS, json!({ "prompt": "a", "size": "8x65536", "output_format": "jpeg" }), "size"),
        (GENERATIONS, json!({ "prompt": "a", "size": "16384x8", "output_format": "webp" }), "size"),
        (TXT2IMG, with(&tall, settings("jpg")), "height"),
        (TXT2IMG, with(&hr, settings("webp")), "hr_resize_x"),
    ];
    for (path, body, param) in table {
        let request = reqwest::Client::new().post(format!("{}{path}", server.url));
        let reply = request.body(body.to_string()).send().await?;
        let (status, text) = (reply.status(), reply.text().await?);
        let expected = if path == GENERATIONS { 400 } else { 422 };
        assert_eq!(status, expected, "{path} {body}: {text}");
        assert!(text.contains(&format!("{param} gives a side of")), "{path} {body}: {text}");
    }
    assert_eq!(steps.lock().expect("unpoisoned").len(), 0);
    let fits = with(&tall, json!({ "output_format": "png" }));
    let request = reqwest::Client::new().post(format!("{}/invocations", server.url));
    assert_eq!(request.body(fits.to_string()).send().await?.status(), 200);
    Ok(())
}
