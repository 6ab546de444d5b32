//! Clients that hold things: connections, slots, bodies, responses. Each holds them for a bounded
//! time, and others are served meanwhile.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream;
use sd_server::engine::Engine;
use sd_server::http::{self, HttpConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tower::ServiceExt as _;

use crate::engine::{LONG, Server, ready};
use crate::fake::{ACCESS, HTTP, keyed, wait_until};
use crate::harness;

const HEAD: &str = "Host: x\r\nContent-Type: application/json\r\n";

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.url.replace("http://", "")).expect("it listens");
    stream.set_read_timeout(Some(LONG)).expect("a timeout");
    stream
}

/// Sends bytes on a connection of their own.
fn send(server: &Server, bytes: &str) -> TcpStream {
    let mut stream = connect(server);
    stream.write_all(bytes.as_bytes()).expect("it reads");
    stream
}

/// A request whose body is declared longer than it is.
fn half_sent(server: &Server, declared: usize) -> TcpStream {
    send(
        server,
        &format!("POST /invocations HTTP/1.1\r\n{HEAD}Content-Length: {declared}\r\n\r\n{{"),
    )
}

/// Everything that comes until the connection is closed.
fn read(mut stream: TcpStream) -> String {
    let mut reply = Vec::new();
    // A reset ends it too.
    let _ = stream.read_to_end(&mut reply);
    String::from_utf8_lossy(&reply).into_owned()
}

fn get(server: &Server, path: &str) -> String {
    read(send(server, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")))
}

fn has(engine: &Engine, line: &str) -> bool {
    engine.metrics().to_string().lines().any(|found| found == line)
}

/// Whether `/metrics` of the server has a line.
fn shows(server: &Server, line: &str) -> bool {
    get(server, "/metrics").lines().any(|found| found == line)
}

fn post(path: &str, media_type: &str, body: impl Into<Body>) -> Request<Body> {
    let request = Request::post(path).header("content-type", media_type);
    request.body(body.into()).expect("a request")
}

async fn text(reply: Response) -> String {
    let body = axum::body::to_bytes(reply.into_body(), usize::MAX).await.expect("a whole body");
    String::from_utf8_lossy(&body).into_owned()
}

async fn in_flight(app: &Router) -> Result<[bool; 2]> {
    let request = Request::get("/metrics").body(Body::empty())?;
    // The database has a thread of its own, for which paused time would not wait.
    tokio::time::resume();
    let metrics = text(app.clone().oneshot(request).await?).await;
    tokio::time::pause();
    let none = |name: &str| metrics.lines().any(|line| line == format!("{name} 0"));
    Ok([none("sd_requests_in_flight"), none("sd_body_bytes_in_flight")])
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_answered_when_all_connections_are_held() -> Result<()> {
    let (engine, _strings) = ready().await;
    let settings = HttpConfig { max_connections: 2, ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let held = [send(&server, "GET /ping HT"), connect(&server)];
    for path in ["/ping", "/health/live", "/health/ready"] {
        assert!(get(&server, path).starts_with("HTTP/1.1 200"), "{path}");
    }
    let other = get(&server, "/info").to_lowercase();
    assert!(other.starts_with("http/1.1 503") && other.contains("connection: close"), "{other}");
    assert!(other.contains("retry-after: 1") && other.contains("too many connections"), "{other}");
    // Those that are silent make room for those that are not.
    let silent: Vec<_> = (0..100).map(|_| connect(&server)).collect();
    assert!(get(&server, "/ping").starts_with("HTTP/1.1 200"));
    assert_eq!(read(silent.into_iter().next().context("one")?), "", "the oldest is closed");
    drop(held);
    wait_until(|| get(&server, "/info").starts_with("HTTP/1.1 200"));
    Ok(())
}

#[test]
fn health_is_answered_when_few_files_may_be_open() {
    let mut command = std::process::Command::new("sh");
    let limited = "ulimit -n 400; exec \"$0\" \"$@\"";
    let model = ["--model", "demo", "--device", "cpu", "--threads", "1"];
    command.args(["-c", limited, env!("CARGO_BIN_EXE_sd-server")]).args(model);
    let server = harness::Server::spawn(&mut command);
    server.wait_until_ready();
    let connect = |_| TcpStream::connect(&server.address).expect("it listens");
    let silent: Vec<_> = (0..500).map(connect).collect();
    let reply = server.raw(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_hung_up_on() -> Result<()> {
    let (engine, _strings) = ready().await;
    let settings = HttpConfig { write_timeout: Duration::from_millis(300), ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let mut stream = connect(&server);
    // More than fits in the buffers of both sides.
    stream.write_all("GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(400).as_bytes())?;
    wait_until(|| stream.write_all(b"GET").is_err());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_body_has_its_own_time_and_more_only_if_it_comes_fast() -> Result<()> {
    let (engine, _strings) = ready().await;
    let body_timeout = Duration::from_secs(2);
    let settings = HttpConfig {
        body_timeout,
        request_timeout: Duration::from_secs(20),
        max_body_bytes: 8 << 20,
        max_body_bytes_in_flight: 8 << 20,
        ..HTTP
    };
    let app = http::router(engine.into(), settings)?;
    // Bytes every 100 ms, how often, and the status and seconds until then.
    let table = [
        (1, 1000, 408, 2),
        (1000, 1000, 408, 2),
        (6000, 1000, 408, 2),
        (7000, 100, 400, 10),
        (7000, 1000, 408, 20),
        (1 << 17, 30, 400, 3),
    ];
    for path in ["/invocations", "/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"] {
        for (bytes, count, status, seconds) in table {
            let parts = stream::unfold(0, move |sent| async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                (sent < count)
                    .then(|| (Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; bytes])), sent + 1))
            });
            let began = tokio::time::Instant::now();
            let request = post(path, "application/json", Body::from_stream(parts));
            let reply = app.clone().oneshot(request).await?;
            let took = began.elapsed().as_secs();
            assert_eq!(reply.status(), status, "{path} {bytes}");
            assert!(took.abs_diff(seconds) <= 1, "{path} {bytes}: {took}");
            assert_eq!(in_flight(&app).await?, [true, true]);
        }
    }
    // Where no picture can be, 1 MiB is enough.
    for path in ["/sdapi/v1/options", "/internal/progress"] {
        let reply = app.clone().oneshot(post(path, "application/json", vec![b' '; 2 << 20]));
        assert_eq!(reply.await?.status(), 413, "{path}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_cannot_hold_all_slots() -> Result<()> {
    let (engine, _strings) = ready().await;
    let settings = HttpConfig { max_requests: 4, ..keyed(&["a", "b"]) };
    let server = Server::start(engine, settings, LONG).await;
    let request = |key: &str, length: usize| {
        let head =
            format!("POST /v1/invocations HTTP/1.1\r\n{HEAD}Authorization: Bearer {key}\r\n");
        send(&server, &format!("{head}Connection: close\r\nContent-Length: {length}\r\n\r\n{{"))
    };
    let held = [request("a", 2), request("a", 2)];
    wait_until(|| shows(&server, "sd_requests_in_flight 2"));
    let third = read(request("a", 1));
    assert!(third.starts_with("HTTP/1.1 429") && third.contains("of this client"), "{third}");
    assert!(third.contains("retry-after: "), "{third}");
    assert!(read(request("b", 1)).starts_with("HTTP/1.1 400"), "the other is served");
    drop(held);
    wait_until(|| shows(&server, "sd_requests_in_flight 0"));
    assert!(read(request("a", 1)).starts_with("HTTP/1.1 400"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_behind_a_trusted_proxy_has_its_own_share() -> Result<()> {
    let (engine, _strings) = ready().await;
    let server = Server::start(engine, HttpConfig { max_requests: 4, ..HTTP }, LONG).await;
    let request = |client: &str, length: usize| {
        let head = format!("POST /invocations HTTP/1.1\r\n{HEAD}{client}Connection: close\r\n");
        send(&server, &format!("{head}Content-Length: {length}\r\n\r\n{{"))
    };
    let (first, second) = ("X-Forwarded-For: 192.0.2.1\r\n", "x-forwarded-for: 192.0.2.2\r\n");
    let _held = [request(first, 2), request(first, 2)];
    wait_until(|| shows(&server, "sd_requests_in_flight 2"));
    assert!(read(request(first, 1)).starts_with("HTTP/1.1 429"));
    assert!(read(request(second, 1)).starts_with("HTTP/1.1 400"), "another client");
    assert!(read(request("", 1)).starts_with("HTTP/1.1 400"), "the proxy itself has no limit");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_cannot_hold_all_connections() -> Result<()> {
    let access = http::AccessConfig { trusted_proxies: http::TrustedProxies::NONE, ..ACCESS };
    for (access, own) in [(access, "503"), (ACCESS, "200")] {
        let (engine, _strings) = ready().await;
        let settings = HttpConfig { max_connections: 4, access, ..HTTP };
        let server = Server::start(engine, settings, LONG).await;
        let _held = [connect(&server), connect(&server)];
        assert!(get(&server, "/info").starts_with(&format!("HTTP/1.1 {own}")), "{own}");
        assert!(get(&server, "/ping").starts_with("HTTP/1.1 200"));
        let other = tokio::net::TcpSocket::new_v4()?;
        other.bind("127.0.0.2:0".parse()?)?;
        let mut other = other.connect(server.url.replace("http://", "").parse()?).await?;
        other.write_all(b"GET /info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut reply = String::new();
        other.read_to_string(&mut reply).await?;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bytes_of_all_bodies_are_limited_together() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = HttpConfig { max_body_bytes_in_flight: 150_000, ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let held = half_sent(&server, 90_000);
    wait_until(|| shows(&server, "sd_body_bytes_in_flight 90000"));
    let chunk = format!("{:x}\r\n{}\r\n0\r\n\r\n", 70_000, " ".repeat(70_000));
    let chunked = format!("Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n{chunk}");
    for body in [&chunked, "Content-Length: 60001\r\nConnection: close\r\n\r\n"] {
        let reply = read(send(&server, &format!("POST /invocations HTTP/1.1\r\n{HEAD}{body}")));
        assert!(reply.starts_with("HTTP/1.1 429"), "{reply}");
        assert!(
            reply.contains("the maximum is 150000") && reply.contains("retry-after: "),
            "{reply}"
        );
    }
    drop(held);
    wait_until(|| shows(&server, "sd_body_bytes_in_flight 0"));
    // The room is free once the body has been understood, long before the picture is drawn.
    let drawing = server.draw("a cat", "");
    strings.step();
    assert!(
        shows(&server, "sd_requests_in_flight 1") && shows(&server, "sd_body_bytes_in_flight 0")
    );
    drop(strings.permits);
    assert_eq!(drawing.await?.0, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unread_response_is_weighed_until_it_is_read() -> Result<()> {
    let (engine, _strings) = ready().await;
    let limits = http::HttpConfig { max_body_bytes: 2 << 20, ..HTTP };
    let settings = HttpConfig { max_body_bytes_in_flight: 2 << 20, ..limits };
    let server = Server::start(engine, settings, LONG).await;
    // A response of about twice the text, which is more than fits in the buffers of both sides.
    let text: String = (0..400_000_u64).map(|n| char::from(b'a' + (n * n % 23) as u8)).collect();
    let picture = sd_models::Rgb { width: 8, height: 8, data: vec![0; 8 * 8 * 3] };
    let file = sd_server::image::encode(&picture, sd_server::image::Format::Png, None, &text)?;
    let body = format!(r#"{{"image":"{}"}}"#, BASE64_STANDARD.encode(file));
    let length = body.len();
    let head = format!("POST /sdapi/v1/png-info HTTP/1.1\r\n{HEAD}Content-Length: {length}\r\n");
    let mut unread = send(&server, &format!("{head}Connection: close\r\n\r\n{body}"));
    let mut begin = [0; 400];
    let begin = unread.read(&mut begin).map(|length| String::from_utf8_lossy(&begin[..length]))?;
    assert!(begin.starts_with("HTTP/1.1 200"), "{begin}");
    let metrics = get(&server, "/metrics");
    let held = metrics.lines().find_map(|line| line.strip_prefix("sd_body_bytes_in_flight "));
    assert!(held.context("a metric")?.parse::<usize>()? > 2 * text.len(), "{metrics}");
    let small =
        format!("POST /invocations HTTP/1.1\r\n{HEAD}Connection: close\r\nContent-Length: ");
    let refused = read(send(&server, &format!("{small}1800000\r\n\r\n")));
    assert!(refused.starts_with("HTTP/1.1 429"), "{refused}");
    assert!(refused.contains("--max-body-bytes-in-flight"), "{refused}");
    let whole = read(unread);
    assert!(whole.contains(&text) && whole.ends_with('}'), "{} bytes", whole.len());
    wait_until(|| shows(&server, "sd_body_bytes_in_flight 0"));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn an_unread_response_gives_its_slot_back() -> Result<()> {
    let (engine, _strings) = ready().await;
    let second = Duration::from_secs(1);
    let settings = HttpConfig { request_timeout: 3 * second, stream_timeout: 5 * second, ..HTTP };
    let app = http::router(engine.clone().into(), settings)?;
    let (json, lines) = ("application/json", "application/jsonlines");
    let stream = r#"{"prompt":"a cat","stream":true}"#;
    let table = [
        ("/invocations", json, stream.to_owned(), 5),
        ("/v1/images/generations", json, stream.to_owned(), 5),
        ("/invocations", lines, "x\n".repeat(900), 3),
        ("/invocations", lines, "{\"prompt\":\"a cat\"}\n".repeat(9), 3),
    ];
    for (path, media_type, body, seconds) in table {
        let began = tokio::time::Instant::now();
        let reply = app.clone().oneshot(post(path, media_type, body)).await?;
        assert_eq!(reply.status(), 200, "{path}");
        while in_flight(&app).await? != [true, true] {
            tokio::time::sleep(second / 10).await;
            assert!(began.elapsed() < 20 * second, "{path} {media_type}");
        }
        assert!(began.elapsed() >= (seconds - 1) * second, "{path} {media_type}");
        drop(reply);
        let count = format!("sd_requests_total{{route=\"{path}\",outcome=\"deadline_exceeded\"}} ");
        assert!(engine.metrics().to_string().contains(&count), "{path} {media_type}");
    }
    Ok(())
}

#[tokio::test]
async fn a_compressed_body_is_415_on_every_route() -> Result<()> {
    let (engine, _strings) = ready().await;
    let app = http::router(engine.into(), HTTP)?;
    let (json, form) = ("application/json", "multipart/form-data; boundary=x");
    for (path, media_type) in [
        ("/invocations", json),
        ("/invocations", "application/jsonlines"),
        ("/v1/jobs", json),
        ("/v1/images/generations", json),
        ("/v1/images/edits", form),
        ("/sdapi/v1/txt2img", json),
        ("/sdapi/v1/options", json),
    ] {
        let mut request = post(path, media_type, "\x1f\u{8b}");
        request.headers_mut().append("content-encoding", "Identity".parse()?);
        request.headers_mut().append("content-encoding", "br".parse()?);
        let reply = app.clone().oneshot(request).await?;
        assert_eq!(reply.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE, "{path} {media_type}");
        let text = text(reply).await;
        assert!(text.contains("\\\"br\\\" is not supported; send the body as gzip"), "{text}");
    }
    Ok(())
}

#[test]
fn a_compressed_body_is_read_on_every_route() {
    let server = harness::Server::ready(&["--max-body-bytes", "1MiB"]);
    let gzip = |text: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).expect("memory");
        encoder.finish().expect("memory")
    };
    let post = |path: &str, media_type: &str, body: Vec<u8>| {
        let request = server.client.post(server.url(path)).header("content-encoding", "gzip");
        let request = request.header("content-type", media_type);
        request.body(body).send().expect("an answer").status().as_u16()
    };
    let json = r#"{"prompt":"a","steps":1,"width":64,"height":64}"#;
    let form = "--x\r\nContent-Disposition: form-data; name=\"steps\"\r\n\r\n1\r\n--x--\r\n";
    for (path, media_type, body, status) in [
        ("/invocations", "application/json", json, 200),
        ("/invocations", "text/plain", "a cat", 200),
        ("/invocations", "application/jsonlines", json, 200),
        ("/sdapi/v1/txt2img", "application/json", json, 200),
        ("/v1/images/edits", "multipart/form-data; boundary=x", form, 400),
        ("/sdapi/v1/options", "application/json", "{}", 200),
    ] {
        assert_eq!(post(path, media_type, gzip(body)), status, "{path} {media_type}");
    }
    let bomb = gzip(&" ".repeat(64 << 20));
    assert!(bomb.len() < 1 << 20);
    assert_eq!(post("/invocations", "application/json", bomb), 413);
    assert_eq!(server.ping(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_bounded_in_number_and_in_errors() -> Result<()> {
    let (engine, _strings) = ready().await;
    let app = http::router(engine.into(), HTTP)?;
    let lines =
        |body: String| app.clone().oneshot(post("/invocations", "application/jsonlines", body));
    let bad = text(lines("x\n".repeat(5000)).await?).await;
    assert_eq!(bad.lines().count(), 1001);
    let last = bad.lines().last().context("a last line")?;
    assert!(last.contains("1000 lines failed; the rest is not read"), "{last}");
    assert_eq!(text(lines("x\n".repeat(999)).await?).await.lines().count(), 999);
    let many = lines("x\n".repeat(10_001)).await?;
    assert_eq!(many.status(), StatusCode::BAD_REQUEST);
    assert!(text(many).await.contains("more than 10000 lines"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_reaches_a_client_that_is_still_sending() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = HttpConfig { max_requests: 1, ..keyed(&["a"]) };
    let server = Server::start(engine, settings, LONG).await;
    let post = |head: &str, megabytes: usize, chunked: bool| {
        let mut stream = connect(&server);
        let length = match chunked {
            true => "Transfer-Encoding: chunked".into(),
            false => format!("Content-Length: {}", megabytes << 20),
        };
        write!(stream, "POST {head}\r\nHost: x\r\n{length}\r\n\r\n").expect("it reads");
        for _ in 0..megabytes << 4 {
            let part = [b' '; 1 << 16];
            let (before, after) = if chunked { ("10000\r\n", "\r\n") } else { ("", "") };
            let parts = [before.as_bytes(), &part, after.as_bytes()];
            parts.iter().try_for_each(|part| stream.write_all(part)).expect("it reads on");
        }
        let mut status = [0; 12];
        stream.read_exact(&mut status).expect("an answer");
        String::from_utf8_lossy(&status[9..]).into_owned()
    };
    let key = "Authorization: Bearer a";
    let table = [
        ("/nowhere HTTP/1.1".to_owned(), "404"),
        ("/metrics HTTP/1.1".to_owned(), "405"),
        ("/v1/jobs HTTP/1.1".to_owned(), "401"),
        ("/invocations HTTP/1.1\r\nx-request-timeout-ms: soon".to_owned(), "400"),
        ("/invocations HTTP/1.1".to_owned(), "413"),
        (format!("/sdapi/v1/options HTTP/1.1\r\n{key}"), "413"),
    ];
    for (head, status) in &table {
        for megabytes in [1, 5] {
            assert_eq!(post(head, megabytes, false), *status, "{head}");
            assert_eq!(post(head, megabytes, true), *status, "{head}");
        }
    }
    // What comes first when several things are wrong.
    let drawing = server.draw("a cat", "");
    wait_until(|| shows(&server, "sd_requests_in_flight 1"));
    let late = "\r\nx-request-timeout-ms: soon";
    let table = [
        ("/invocations HTTP/1.1".to_owned(), "429"),
        (format!("/invocations HTTP/1.1{late}"), "400"),
        (format!("/v1/jobs HTTP/1.1{late}"), "401"),
        (format!("/v1/jobs HTTP/1.1\r\n{key}{late}"), "400"),
        (format!("/v1/jobs HTTP/1.1\r\n{key}"), "429"),
    ];
    for (head, status) in &table {
        assert_eq!(post(head, 5, false), *status, "{head}");
    }
    drop(strings.permits);
    assert_eq!(drawing.await?.0, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_ends_whatever_connections_hang() -> Result<()> {
    let (engine, _strings) = ready().await;
    let mut server = Server::start(engine, HTTP, 3 * LONG).await;
    let mut unread = connect(&server);
    unread.write_all("GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(400).as_bytes())?;
    let mut idle = send(&server, "GET /ping HTTP/1.1\r\nHost: x\r\n\r\n");
    idle.read_exact(&mut [0; 12])?;
    let _held = [
        unread,
        idle,
        connect(&server),
        send(&server, "GET /ping HT"),
        half_sent(&server, 100),
        send(&server, &format!("POST /nowhere HTTP/1.1\r\n{HEAD}Content-Length: 9\r\n\r\n")),
    ];
    wait_until(|| shows(&server, "sd_requests_in_flight 1"));
    let began = Instant::now();
    server.stop();
    server.ended().await?;
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    Ok(())
}

#[test]
fn a_second_signal_ends_the_server_at_once() {
    // Whatever the level of the log is: nothing that is done depends on a line of it.
    for (name, code, level) in [("TERM", 143, "info"), ("INT", 130, "warn")] {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let mut command =
            harness::sd_server(&["--model", "demo", "--device", "cpu", "--log", level]);
        let server = harness::Server::spawn(command.stderr(log.reopen().expect("a handle")));
        server.wait_until_ready();
        let address = server.address.clone();
        let body = serde_json::json!({ "prompt": "a cat", "steps": 150, "n": 8, "width": 512, "height": 512 });
        let client = server.client.clone();
        let drawing = std::thread::spawn(move || {
            client.post(format!("http://{address}/invocations")).body(body.to_string()).send()
        });
        wait_until(|| server.metric("sd_images_running") > 0.0);
        server.signal(name);
        // A terminal and the parent process may send the same signal each.
        server.signal(name);
        wait_until(|| server.ping() == 503);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(server.ping(), 503, "it is still draining");
        server.signal(name);
        assert_eq!(server.wait().code(), Some(code));
        assert!(drawing.join().expect("no panic").is_err(), "it was not finished");
        let log = std::fs::read_to_string(log.path()).expect("a log");
        assert!(log.contains("again: exiting"), "the log is whole: {log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_stream_is_counted() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let stream = |timeout: &str, prompt: &str| {
        let body = format!(r#"{{"prompt":"{prompt}","stream":true}}"#);
        let request = reqwest::Client::new().post(format!("{}/v1/invocations", server.url));
        request.header("x-request-timeout-ms", timeout).body(body).send()
    };
    let counted = |outcome: &str| {
        let route = "route=\"/v1/invocations\"";
        has(&engine, &format!("sd_requests_total{{{route},outcome=\"{outcome}\"}} 1"))
    };
    let late = stream("50", "a cat").await?;
    assert!(late.text().await?.contains("deadline_exceeded"));
    wait_until(|| counted("deadline_exceeded"));
    let closed = stream("30000", "a cat").await?;
    assert_eq!(closed.status(), 200);
    assert!(!counted("client_closed") && !counted("ok"), "it has not ended");
    drop(closed);
    wait_until(|| counted("client_closed"));
    drop(strings.permits);
    for (prompt, outcome) in [("out of memory", "out_of_memory"), ("a cat", "ok")] {
        stream("30000", prompt).await?.text().await?;
        wait_until(|| counted(outcome));
    }
    Ok(())
}
