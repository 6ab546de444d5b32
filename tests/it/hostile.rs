//! Malformed and hostile requests. Each gets a clear 4xx in the one JSON shape, and after each
//! the server works.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::ImageFormat;
use serde_json::json;

use crate::harness::{Reply, Server, sd_server};
use crate::inputs::{file, gradient};

const JSON: &str = "content-type: application/json";
const FORM: &str = "content-type: application/x-www-form-urlencoded";
const TEXT: &str = "content-type: text/plain";

/// Header, body, status, and the parameter that the error names.
const TABLE: [(&str, &[u8], u16, &str); 67] = [
    // Bodies that are nothing.
    (JSON, b"", 400, ""),
    (TEXT, b"", 400, ""),
    (FORM, b"", 400, ""),
    (TEXT, b" \r\n\t ", 400, ""),
    // JSON that is none, or no object.
    (JSON, b"{", 400, ""),
    (JSON, b"{}", 400, "prompt"),
    (JSON, b"[]", 400, ""),
    (JSON, b"null", 400, ""),
    (JSON, b"\"a cat\"", 400, ""),
    (JSON, b"a cat", 400, ""),
    (JSON, b"{\"prompt\":\"a\"} x", 400, ""),
    (JSON, b"{\"prompt\":\"a\"", 400, ""),
    (JSON, b"{prompt:\"a\"}", 400, ""),
    (JSON, b"{'prompt':'a'}", 400, ""),
    (JSON, b"{\"prompt\":\"a\",}", 400, ""),
    (JSON, b"{\"prompt\":\"a\",\"seed\":NaN}", 400, ""),
    (JSON, b"{\"prompt\":\"a\",\"guidance_scale\":Infinity}", 400, ""),
    (JSON, b"{\"prompt\":\"a\",\"guidance_scale\":1e999}", 400, ""),
    (JSON, b"{\"prompt\":\"\\ud800\"}", 400, ""),
    // Text that is not UTF-8.
    (JSON, b"{\"prompt\":\"\xff\xfe\"}", 400, ""),
    (TEXT, b"caf\xe9", 400, ""),
    (FORM, b"prompt=caf%E9", 400, ""),
    // Types.
    (JSON, b"{\"prompt\":1}", 400, "prompt"),
    (JSON, b"{\"prompt\":null}", 400, "prompt"),
    (JSON, b"{\"prompt\":[\"a\"]}", 400, "prompt"),
    (JSON, b"{\"prompt\":\"a\",\"negative_prompt\":{}}", 400, "negative_prompt"),
    (JSON, b"{\"prompt\":\"a\",\"steps\":\"many\"}", 400, "steps"),
    (JSON, b"{\"prompt\":\"a\",\"steps\":true}", 400, "steps"),
    (JSON, b"{\"prompt\":\"a\",\"steps\":2.5}", 400, "steps"),
    (JSON, b"{\"prompt\":\"a\",\"seed\":1.5}", 400, "seed"),
    (JSON, b"{\"prompt\":\"a\",\"cfg_scale\":false}", 400, "cfg_scale"),
    (JSON, b"{\"prompt\":\"a\",\"scheduler\":3}", 400, "scheduler"),
    (JSON, b"{\"prompt\":\"a\",\"width\":[512]}", 400, "width"),
    (JSON, b"{\"prompt\":\"a\",\"stream\":\"maybe\"}", 400, "stream"),
    (JSON, b"{\"prompt\":\"a\",\"preview\":2}", 400, "preview"),
    (FORM, b"prompt=a&stream=2", 400, "stream"),
    (FORM, b"prompt=a&steps=twenty", 400, "steps"),
    (FORM, b"prompt=a&width=null", 400, "width"),
    (FORM, b"prompt=a&guidance_scale=NaN", 400, "guidance_scale"),
    (FORM, b"prompt=a&guidance_scale=inf", 400, "guidance_scale"),
    // Names.
    (JSON, b"{\"prompt\":\"a\",\"stepz\":3}", 400, "stepz"),
    (JSON, b"{\"prompt\":\"a\",\"stepz\":null}", 400, "stepz"),
    (JSON, b"{\"prompt\":\"a\",\"prompt\":\"b\"}", 400, "prompt"),
    (JSON, b"{\"prompt\":\"a\",\"steps\":3,\"num_inference_steps\":4}", 400, "steps"),
    (FORM, b"prompt=a&colour=red", 400, "colour"),
    (FORM, b"prompt=a&prompt=b", 400, "prompt"),
    // Ranges.
    (JSON, b"{\"prompt\":\"a\",\"steps\":0}", 422, "steps"),
    (JSON, b"{\"prompt\":\"a\",\"steps\":-1}", 422, "steps"),
    (JSON, b"{\"prompt\":\"a\",\"steps\":1000000000}", 422, "steps"),
    (JSON, b"{\"prompt\":\"a\",\"steps\":1e9}", 422, "steps"),
    (JSON, b"{\"prompt\":\"a\",\"seed\":-2}", 422, "seed"),
    (JSON, b"{\"prompt\":\"a\",\"seed\":18446744073709551616}", 422, "seed"),
    (JSON, b"{\"prompt\":\"a\",\"guidance_scale\":-1}", 422, "guidance_scale"),
    (JSON, b"{\"prompt\":\"a\",\"guidance_scale\":1e300}", 422, "guidance_scale"),
    (JSON, b"{\"prompt\":\"a\",\"width\":7}", 422, "width"),
    (JSON, b"{\"prompt\":\"a\",\"width\":0}", 422, "width"),
    (JSON, b"{\"prompt\":\"a\",\"height\":100}", 422, "height"),
    (JSON, b"{\"prompt\":\"a\",\"height\":16384}", 422, "height"),
    (JSON, b"{\"prompt\":\"a\",\"width\":4294967296}", 422, "width"),
    (JSON, b"{\"prompt\":\"a\",\"n\":0}", 422, "n"),
    (JSON, b"{\"prompt\":\"a\",\"n\":1000}", 422, "n"),
    (JSON, b"{\"prompt\":\"a\",\"scheduler\":\"dpm_fast\"}", 422, "scheduler"),
    (JSON, b"{\"prompt\":\"a\",\"output_format\":\"gif\"}", 422, "output_format"),
    // Types of bodies.
    ("content-type: image/png", b"\x01\x02", 415, ""),
    ("content-type: nonsense", b"a cat", 415, ""),
    ("content-encoding: br", b"a cat", 415, ""),
    ("content-encoding: gzip", b"a cat", 400, ""),
];

#[test]
fn malformed_requests_get_clear_errors() {
    let server = Server::ready(&["--request-timeout-ms", "10000"]);
    for (header, body, status, param) in TABLE {
        let shown = String::from_utf8_lossy(body);
        let reply = server.post(&[header], body);
        assert_eq!(
            reply.status,
            status,
            "{header} {shown} {:?}",
            String::from_utf8_lossy(&reply.body)
        );
        let (code, named) = reply.error();
        assert_eq!(named, param, "{header} {shown}");
        let codes = match status {
            400 => "malformed",
            415 => "unsupported_media_type",
            _ => "out_of_range",
        };
        assert_eq!(code, codes, "{header} {shown}");
        assert_eq!(server.ping(), 200);
    }
    assert_still_draws(&server);
}

/// Values, fields and parts whose memory would be many times that of their text, for every route
/// that reads a body.
#[test]
fn bodies_that_would_take_many_times_their_bytes_are_refused() {
    const MULTIPART: &str = "content-type: multipart/form-data; boundary=x";
    const LINES: &str = "content-type: application/jsonlines";
    let server = Server::ready(&[]);
    let zeros = format!("[{}0]", "0,".repeat(1 << 16));
    let object = |name: &str| format!(r#"{{"prompt":"a","{name}":{zeros}}}"#);
    let field = format!("prompt=a&loras={zeros}");
    let pairs = format!("prompt=a{}", "&a=1".repeat(300));
    let part = "--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n";
    let parts = format!("{}--x--\r\n", part.repeat(300));
    let (values, fields) = ("more than 65536 values", "more than 256 fields");
    let table = [
        ("/invocations", JSON, object("loras"), values),
        ("/invocations", JSON, object("unknown"), values),
        ("/invocations", TEXT, object("prompt"), values),
        ("/invocations", JSON, object("text_prompts"), values),
        ("/invocations", JSON, object("inputs"), values),
        ("/invocations", LINES, object("loras"), values),
        ("/invocations", FORM, field, "loras must be a list"),
        ("/invocations", FORM, pairs, fields),
        ("/v1/jobs", JSON, object("loras"), values),
        ("/v1/images/generations", JSON, object("size"), values),
        ("/v1/images/edits", MULTIPART, parts, fields),
        ("/sdapi/v1/txt2img", JSON, object("unknown"), values),
        ("/sdapi/v1/img2img", JSON, object("init_images"), values),
        ("/sdapi/v1/options", JSON, object("unknown"), values),
        ("/sdapi/v1/png-info", JSON, object("unknown"), values),
        ("/internal/progress", JSON, object("unknown"), values),
    ];
    for (path, header, body, expected) in table {
        let (name, value) = header.split_once(": ").expect("name: value");
        let request = server.client.post(server.url(path)).header(name, value).body(body);
        let reply = request.send().expect("an answer");
        let (status, text) = (reply.status().as_u16(), reply.text().expect("text"));
        assert!(status == 400 || header == LINES, "{path} {header}: {status}");
        assert!(text.contains(expected) && text.len() < 2048, "{path} {header}: {text}");
    }
    assert_still_draws(&server);
}

#[test]
fn the_memory_of_large_bodies_is_returned() {
    let server = Server::ready(&[]);
    assert_still_draws(&server);
    let resident = || server.metric("process_resident_memory_bytes");
    let before = resident();
    let zeros = format!(r#"{{"prompt":[0{}]}}"#, ",0".repeat(12 << 20));
    let pairs = format!("prompt=a{}", "&a=1".repeat(6 << 20));
    // The image is no base64, which is found after the body has become fields.
    let image = format!(r#"{{"prompt":"a","image":"{}!"}}"#, "A".repeat(24 << 20));
    std::thread::scope(|scope| {
        for (header, body) in [(JSON, &zeros), (JSON, &zeros), (FORM, &pairs), (JSON, &image)] {
            scope.spawn(|| assert_eq!(server.post(&[header], body.as_str()).status, 400));
        }
    });
    let began = Instant::now();
    while resident() > before + 50e6 {
        assert!(began.elapsed() < Duration::from_secs(20), "{before} {}", resident());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_still_draws(&server);
}

/// Messages that say what to do, without the words of libraries and types of this program.
#[test]
fn messages_name_what_is_wrong_and_what_is_known() {
    let server = Server::ready(&["--max-body-bytes", "100K"]);
    let picture = BASE64_STANDARD.encode(file(&gradient(64, 64), ImageFormat::Png));
    let base64 = "image must be an image file in base64, bare or as a data URL";
    let address = "image is an address: nothing is fetched, send the file in base64";
    let table = [
        (json!({ "scheduler": "x" }), "scheduler \"x\" is unknown; known are pndm"),
        (json!({ "output_format": "x" }), "output_format \"x\" is unknown; known are png"),
        (json!({ "prompt_syntax": "x" }), "prompt_syntax \"x\" is unknown; known are plain"),
        (json!({ "loras": [{ "name": "x" }] }), "loras names the LoRA \"x\", which is unknown;"),
        (json!({ "image": "abcd=a" }), base64),
        (json!({ "image": "https://example.org/a.png" }), address),
        (json!({ "preview": true }), "preview requires stream"),
        (
            json!({ "image": picture, "strength": 0.01, "steps": 4 }),
            "strength of 0.01 takes less than one of 4 steps; raise it",
        ),
        (
            json!({ "negative_prompt": "x".repeat(200_000) }),
            "102400 bytes, the limit of --max-body",
        ),
    ];
    for (mut body, message) in table {
        body["prompt"] = "a".into();
        let error = server.json(&body).json();
        let found = error["error"]["message"].as_str().expect("a message");
        assert!(found.contains(message), "{found}");
    }
    let late = server.post(&["x-request-timeout-ms: 1"], r#"{"prompt":"a","steps":150}"#);
    let message = late.json()["error"]["message"].to_string();
    assert!(message.contains("the timeout of x-request-timeout-ms"), "{message}");
}

#[test]
fn a_model_to_load_is_named_and_has_a_url() {
    let server = Server::spawn(&mut sd_server(&["--multi-model", "--device", "cpu"]));
    for (body, param) in
        [(r#"{"url":"/a"}"#, "model_name"), (r#"{"model_name":"a","url":1}"#, "url"), ("[]", "")]
    {
        let reply = server.client.post(server.url("/models")).body(body).send().expect("an answer");
        let reply = Reply::from(reply);
        assert_eq!((reply.status, &*reply.error().1), (400, param), "{body}");
        assert!(!String::from_utf8_lossy(&reply.body).contains("LoadModelBody"));
    }
}

fn assert_still_draws(server: &Server) {
    let reply = server.post(&[FORM], "prompt=a cat&steps=1");
    assert_eq!((reply.status, reply.header("content-type")), (200, "image/png"));
}

#[test]
fn deep_and_long_bodies_are_refused() {
    let server = Server::ready(&["--max-body-bytes", "2000000"]);
    let deep = format!("{{\"prompt\":{}", "[".repeat(100_000));
    let many_fields: String = (0..20_000).map(|k| format!(",\"f{k}\":1")).collect();
    let table = [
        (deep, 400),
        (format!("{{\"prompt\":\"a\"{many_fields}}}"), 400),
        (format!("{{\"prompt\":\"{}\"}}", "a".repeat(1 << 20)), 422),
        (format!("{{\"prompt\":\"a\",\"negative_prompt\":\"{}\"}}", "b ".repeat(9000)), 422),
        ("x ".repeat(20_000), 422),
        ("y".repeat(2_000_001), 413),
    ];
    for (body, status) in table {
        let reply = server.post(&[TEXT], body.as_str());
        assert_eq!(reply.status, status, "{}", &body[..40]);
        let _ = reply.error();
        assert!(reply.body.len() < 2048, "SageMaker cuts longer messages");
    }
    let long = format!("{{\"prompt\":\"{}\",\"steps\":1}}", "cat ".repeat(4000));
    let cut = server.post(&[JSON], long);
    assert_eq!(cut.status, 200);
    assert!(cut.json()["warnings"][0].as_str().expect("a warning").contains("77"));
}

#[test]
fn prompts_may_hold_anything() {
    let server = Server::ready(&[]);
    let prompts =
        ["", "   ", "\u{0}\u{1}\u{fffd}", "🏠🌊", "عربي", "a\nb\r\n\tc", "\\\"<script>{{}}%s"];
    for prompt in prompts {
        let body = serde_json::json!({ "prompt": prompt, "steps": 1 });
        let headers = [JSON, "accept: image/png"];
        assert_eq!(server.post(&headers, body.to_string()).status, 200, "{prompt:?}");
        assert_eq!(server.json(&body).json()["prompt"], prompt);
    }
}

#[test]
fn what_is_wrong_is_not_repeated_at_length() {
    let server = Server::ready(&[]);
    let long = "x".repeat(1 << 20);
    let fields = (0..1000).map(|k| format!("\"{k}\":0")).collect::<Vec<_>>().join(",");
    let bodies = [
        format!("{{\"prompt\":\"a\",\"scheduler\":\"{long}\"}}"),
        format!("{{\"prompt\":\"a\",\"{long}\":1}}"),
        format!("{{{fields}}}"),
        format!("\"{long}\""),
    ];
    for body in bodies {
        let reply = server.post(&[JSON], body);
        let length = reply.json().to_string().len();
        assert!((400..423).contains(&reply.status) && length < 2048, "{length} bytes");
    }
    assert_still_draws(&server);
}

#[test]
fn broken_http_is_survived() {
    let server = Server::ready(&[]);
    let head = "POST /invocations HTTP/1.1\r\nHost: x\r\n";
    // A client that ends its stream has left, and nobody answers it.
    let close = "Host: x\r\nConnection: close\r\n";
    let table = [
        (format!("{head}Content-Length: 100\r\n\r\n{{\"prompt\":"), "400"),
        (format!("{head}Transfer-Encoding: chunked\r\n\r\nff\r\n{{\"pro"), "400"),
        (format!("{head}Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n"), "400"),
        (format!("{head}Content-Length: -1\r\n\r\n"), "400"),
        (
            format!("{head}Connection: close\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
            "400",
        ),
        (
            format!(
                "{head}Connection: close\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"
            ),
            "400",
        ),
        (format!("{head}Transfer-Encoding: gzip\r\n\r\nabc"), "400"),
        (format!("{head}Content-Length: 99999999999\r\n\r\nabc"), "413"),
        (format!("GET /invocations HTTP/1.1\r\n{close}\r\n"), "405"),
        (format!("PUT /ping HTTP/1.1\r\n{close}\r\n"), "405"),
        (format!("GET /../etc/passwd HTTP/1.1\r\n{close}\r\n"), "404"),
        (format!("POST /invocations/x HTTP/1.1\r\n{close}Content-Length: 0\r\n\r\n"), "404"),
        ("\u{0}\u{1}\u{2}\r\n\r\n".into(), ""),
        (format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(70_000)), "414"),
        (format!("GET /ping HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(700_000)), "431"),
    ];
    for (bytes, status) in table {
        let reply = server.raw(bytes.as_bytes());
        let expected = format!("HTTP/1.1 {status}");
        let shown: String = bytes.chars().take(90).collect();
        assert!(status.is_empty() || reply.starts_with(&expected), "{shown:?}: {reply:?}");
        assert_eq!(server.ping(), 200, "{shown:?}");
    }
    let chunked = format!("{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n");
    let body = "3\r\na c\r\n2\r\nat\r\n0\r\n\r\n";
    assert!(server.raw(format!("{chunked}{body}").as_bytes()).starts_with("HTTP/1.1 200"));
    assert_still_draws(&server);
}

#[test]
fn what_follows_a_chunked_body_is_no_request() {
    let server = Server::ready(&[]);
    // A proxy that goes by the length passes all of it on as one request.
    let second = "GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let body = format!("3\r\na c\r\n2\r\nat\r\n0\r\n\r\n{second}");
    let (chunked, length) =
        ("Transfer-Encoding: chunked\r\n", format!("Content-Length: {}\r\n", body.len()));
    for framing in [chunked.into(), format!("{length}{chunked}"), format!("{chunked}{length}")] {
        let head = format!("POST /invocations HTTP/1.1\r\nHost: x\r\n{framing}\r\n");
        let reply = server.raw(format!("{head}{body}").as_bytes());
        assert!(reply.starts_with("HTTP/1.1 200"), "{framing:?}: {reply:?}");
        assert!(reply.contains("connection: close\r\n"), "{framing:?}: {reply:?}");
        assert_eq!(reply.matches("HTTP/1.1 ").count(), 1, "{framing:?}: {reply:?}");
    }
}

#[test]
fn a_body_that_does_not_come_is_408() {
    for limit in ["--request-timeout-ms", "--body-timeout-ms"] {
        let server = Server::ready(&[limit, "300"]);
        let head = "POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
        let reply = server.raw(format!("{head}Content-Length: 9\r\n\r\na cat").as_bytes());
        assert!(reply.starts_with("HTTP/1.1 408") && reply.contains("body_timeout"), "{reply}");
        assert!(reply.contains(&format!("did not arrive within {limit}")), "{reply}");
    }
}

/// `close` and a half-closed connection look alike from here, so both are a client that left.
#[test]
fn the_end_of_a_clients_stream_is_its_leaving() {
    let server = Server::ready(&[]);
    let body = "prompt=a cat&steps=150";
    let head = format!(
        "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nContent-Type: \
         application/x-www-form-urlencoded\r\n\r\n",
        body.len()
    );
    assert_eq!(server.raw(format!("{head}{body}").as_bytes()), "");
    let metrics = || {
        let reply = server.client.get(server.url("/metrics")).send().expect("an answer");
        reply.text().expect("text")
    };
    let began = Instant::now();
    while !metrics()
        .contains("sd_requests_total{route=\"/invocations\",outcome=\"client_closed\"} 1\n")
    {
        assert!(began.elapsed() < Duration::from_secs(10), "{}", metrics());
    }
    // What is answered at once is answered, unless the end is seen before the request is run.
    let ping = || server.raw(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n");
    let replies: Vec<_> = (0..20).map(|_| ping()).collect();
    assert!(replies.iter().all(|reply| reply.is_empty() || reply.starts_with("HTTP/1.1 200")));
    assert!(replies.iter().any(|reply| !reply.is_empty()));
}

#[test]
fn clients_that_leave_do_no_harm() {
    let server = Server::ready(&["--max-queue", "4"]);
    for k in 0..30 {
        let mut stream = TcpStream::connect(&server.address).expect("it listens");
        let body = "prompt=a cat&steps=150&width=128&height=128";
        let length = body.len() + usize::from(k % 3 == 0);
        let head = format!(
            "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).expect("it reads");
        stream.write_all(body.as_bytes()).expect("it reads");
    }
    // A queue of four would be full for long if pictures that nobody waits for stayed in it.
    let began = Instant::now();
    while server.post(&[FORM], "prompt=a cat&steps=1").status != 200 {
        assert!(began.elapsed() < Duration::from_secs(10), "the queue is still full");
    }
}
