//! Background jobs: what survives the end of the process, priorities, lists and webhooks.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use axum::body::Body;
use axum::http::Request;
use futures_util::FutureExt as _;
use reqwest::Client;
use sd_server::engine::Engine;
use sd_server::http::{self, HttpConfig};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::engine::{Server, ready};
use crate::fake::{ENGINE, Fake, HTTP, keyed, wait_until};
use crate::harness::{self, PATIENCE};

const LONG: Duration = Duration::from_secs(60);

fn durable(dir: &Path) -> HttpConfig {
    HttpConfig { data_dir: Some(dir.to_owned()), ..HTTP }
}

/// Status and JSON of a request.
async fn call(
    server: &Server,
    method: &str,
    path: &str,
    key: &str,
    body: &Value,
) -> Result<(u16, Value)> {
    let request = Client::new().request(method.parse()?, format!("{}{path}", server.url));
    let request = if body.is_null() { request } else { request.body(body.to_string()) };
    let reply = request.header("x-api-key", key).send().await?;
    Ok((reply.status().as_u16(), serde_json::from_slice(&reply.bytes().await?).unwrap_or_default()))
}

async fn get(server: &Server, path: &str) -> Result<(u16, Value)> {
    call(server, "GET", path, "", &Value::Null).await
}

/// Submits a job and returns its path.
async fn submit(server: &Server, key: &str, body: &Value) -> Result<String> {
    let (status, job) = call(server, "POST", "/v1/jobs", key, body).await?;
    assert_eq!(status, 202, "{job}");
    Ok(format!("/v1/jobs/{}", job["id"].as_str().context("an id")?))
}

async fn state_of(server: &Server, path: &str) -> Result<String> {
    // Each call is a connection of its own, and their number is limited.
    tokio::time::sleep(Duration::from_millis(10)).await;
    Ok(get(server, path).await?.1["state"].as_str().unwrap_or("none").to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unfinished_job_is_continued_by_the_next_process() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (engine, strings) = ready().await;
    let settings = HttpConfig {
        webhook_hosts: vec!["127.0.0.1:1".into()],
        webhook_secret: Some("secret".parse().expect("a key")),
        ..durable(dir.path())
    };
    let mut server = Server::start(engine, settings, LONG).await;
    // The next process lists no host, which is no reason to lose the images.
    let webhook = "http://127.0.0.1:1/";
    let body = json!({
        "prompt": "a cat", "n": 2, "steps": 2, "output_format": "png", "webhook": webhook,
    });
    let begun = submit(&server, "", &body).await?;
    strings.step();
    let waiting = submit(&server, "", &json!({ "prompt": "a cat", "n": 4, "seed": 7 })).await?;
    let seed = strings.last()[0];
    server.stop();
    // Nobody lets the pictures be finished, and nobody has to.
    drop(strings.permits);
    server.ended.await??;

    let (fake, strings) = Fake::new();
    drop(strings.permits);
    let engine = Engine::start(ENGINE, || {
        std::thread::sleep(Duration::from_millis(100));
        Ok(fake)
    })?;
    let mut server = Server::start(engine, durable(dir.path()), LONG).await;
    let mut results = Vec::new();
    for path in [&begun, &waiting] {
        while state_of(&server, path).await? != "completed" {}
        results.push(get(&server, &format!("{path}/result")).await?);
    }
    assert_eq!((results[0].0, &results[0].1["images"][1]["seed"]), (200, &(seed + 1).into()));
    assert_eq!(results[1].1["images"][3]["seed"], 10);
    server.stop();
    server.ended.await??;

    let (engine, _strings) = ready().await;
    let server = Server::start(engine, durable(dir.path()), LONG).await;
    for (path, result) in [&begun, &waiting].into_iter().zip(results) {
        assert_eq!(get(&server, &format!("{path}/result")).await?, result, "the same bytes");
        assert_eq!(call(&server, "DELETE", path, "", &Value::Null).await?.0, 204);
        assert_eq!(get(&server, path).await?.0, 404);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_continued_fails_with_the_reason() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (engine, strings) = ready().await;
    let mut server = Server::start(engine, durable(dir.path()), LONG).await;
    let path = submit(&server, "", &json!({ "prompt": "a cat" })).await?;
    server.stop();
    drop(strings.permits);
    server.ended.await??;
    let (mut fake, _strings) = Fake::new();
    fake.info.fingerprint = "of another model with this name".into();
    let engine = Engine::start(ENGINE, || Ok(fake))?;
    let server = Server::start(engine, durable(dir.path()), LONG).await;
    while state_of(&server, &path).await? != "failed" {}
    assert_eq!(get(&server, &path).await?.1["error"]["code"], "model_changed");
    assert_eq!(get(&server, &format!("{path}/result")).await?.0, 409);
    let metrics = Client::new().get(format!("{}/metrics", server.url)).send().await?.text().await?;
    assert!(metrics.contains("sd_jobs_ended_total{outcome=\"failed\"} 1\n"), "{metrics}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_beyond_the_queue_wait_for_room_by_priority() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = HttpConfig { max_jobs: 20, ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let mut paths = Vec::new();
    let urgency = ["normal", "normal", "low", "normal", "high"];
    for (seed, priority) in urgency.into_iter().enumerate() {
        let body = json!({ "prompt": "a cat", "n": 4, "steps": 1, "seed": 10 * seed, "priority": priority });
        paths.push(submit(&server, "", &body).await?);
    }
    let body = json!({ "prompt": "a cat", "priority": "urgent" });
    let (status, error) = call(&server, "POST", "/v1/jobs", "", &body).await?;
    assert_eq!((status, &error["error"]["param"]), (422, &"priority".into()));
    let body = json!({ "prompt": "a cat", "priority": "high" });
    let (status, error) = call(&server, "POST", "/invocations", "", &body).await?;
    assert_eq!(status, 400, "{error}");
    assert!(error.to_string().contains("priority"), "{error}");
    drop(strings.permits);
    for path in &paths {
        while state_of(&server, path).await? != "completed" {}
    }
    let steps = strings.steps.lock().expect("unpoisoned").concat();
    let begun = |seed: u64| steps.iter().position(|step| *step == 10 * seed);
    assert!(begun(4) < begun(3) && begun(3) < begun(2), "{steps:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_evicted_for_another_client_has_no_place_until_it_is_back() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = HttpConfig { max_jobs: 20, ..keyed(&["one", "two"]) };
    let server = Server::start(engine, settings, LONG).await;
    let body = |count: usize| json!({ "prompt": "a cat", "n": count, "steps": 1 });
    let state = async |key: &'static str, path: &str| -> Result<Value> {
        tokio::time::sleep(Duration::from_millis(10)).await;
        Ok(call(&server, "GET", path, key, &Value::Null).await?.1)
    };
    let running = submit(&server, "one", &body(2)).await?;
    while state("one", &running).await?["state"] != "running" {}
    // All that the queue holds.
    let evicted = submit(&server, "one", &body(4)).await?;
    while state("one", &evicted).await?["position"].is_null() {}
    let newcomer = submit(&server, "two", &body(1)).await?;
    while state("two", &newcomer).await?["position"].is_null() {}
    let seen = state("one", &evicted).await?;
    let place = (&seen["state"], &seen["position"], &seen["seconds_left"]);
    assert_eq!(place, (&"queued".into(), &Value::Null, &Value::Null), "{seen}");
    drop(strings.permits);
    for (key, path) in [("one", &running), ("two", &newcomer), ("one", &evicted)] {
        while state(key, path).await?["state"] != "completed" {}
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_goes_on_without_who_asked_for_it() -> Result<()> {
    let (engine, strings) = ready().await;
    let app = http::router(engine.clone().into(), HTTP)?;
    let body = json!({ "prompt": "a cat", "steps": 100 }).to_string();
    let accepted = app.clone().oneshot(Request::post("/v1/jobs").body(Body::from(body))?).await?;
    let job = accepted.headers()["location"].to_str()?.to_owned();
    let counts = |line: &str| engine.metrics().to_string().contains(line);
    wait_until(|| counts("sd_queue_duration_seconds_count 1"));
    let mut deleted = Box::pin(app.clone().oneshot(Request::delete(&job).body(Body::empty())?));
    // The task is begun; it may even have ended.
    let _ = (&mut deleted).now_or_never();
    drop(deleted);
    let status = async || -> Result<u16> {
        let request = Request::get(&job).body(Body::empty())?;
        Ok(app.clone().oneshot(request).await?.status().as_u16())
    };
    let began = Instant::now();
    while status().await? != 404 {
        assert!(began.elapsed() < PATIENCE, "it is not deleted");
    }
    wait_until(|| {
        strings.permits.send(()).expect("the model lives");
        counts("sd_images_total{outcome=\"cancelled\"} 1")
    });
    wait_until(|| counts("sd_jobs_ended_total{outcome=\"cancelled\"} 1"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_lists_its_own_jobs_by_page_and_state() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = HttpConfig { max_jobs: 20, ..keyed(&["one", "two"]) };
    let server = Server::start(engine, settings, LONG).await;
    let body = json!({ "prompt": "a cat", "steps": 1 });
    for _ in 0..3 {
        submit(&server, "one", &body).await?;
    }
    let other = submit(&server, "two", &body).await?;
    let list = async |key: &'static str, query: &str| {
        call(&server, "GET", &format!("/v1/jobs{query}"), key, &Value::Null).await
    };
    let ids = |page: &Value| -> Vec<String> {
        let jobs = page["jobs"].as_array().into_iter().flatten();
        jobs.map(|job| job["id"].as_str().unwrap_or("").to_owned()).collect()
    };
    let (_, first) = list("one", "?limit=2").await?;
    let cursor = first["next"].as_str().context("there are more")?;
    let (_, second) = list("one", &format!("?limit=2&cursor={cursor}")).await?;
    assert_eq!((ids(&first).len(), ids(&second).len(), &second["next"]), (2, 1, &Value::Null));
    let mut all = [ids(&first), ids(&second)].concat();
    assert_eq!(all, ids(&list("one", "").await?.1), "the newest first");
    all.dedup();
    assert!(all.len() == 3 && !all.iter().any(|id| other.ends_with(id)));
    drop(strings.permits);
    while ids(&list("one", "?state=completed").await?.1).len() < 3 {}
    assert_eq!(ids(&list("one", "?state=failed").await?.1), [""; 0]);
    for query in ["?limit=0", "?limit=a", "?limit=101", "?cursor=a", "?state=done"] {
        let (status, error) = list("one", query).await?;
        let name = query[1..].split('=').next();
        assert_eq!(error["error"]["param"].as_str(), name, "{query}");
        assert!([400, 422].contains(&status), "{query}");
    }
    let (engine, _strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    submit(&server, "", &body).await?;
    let (status, list) = get(&server, "/v1/jobs").await?;
    assert_eq!((status, &list["jobs"], &list["next"]), (200, &json!([]), &Value::Null));
    assert!(list["warnings"][0].as_str().is_some_and(|text| text.contains("--api-key")), "{list}");
    Ok(())
}

/// Answers one POST with a status, and returns its head and body.
fn receive(listener: &TcpListener, status: &str) -> (String, String) {
    let (stream, _) = listener.accept().expect("a call");
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a line");
        head.push_str(&line.to_ascii_lowercase());
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    let reply = format!(
        "HTTP/1.1 {status}\r\nlocation: /other\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    );
    reader.get_mut().write_all(reply.as_bytes()).expect("an answer");
    (head, String::from_utf8(body).expect("text"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_is_sent_until_it_is_received() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let host = listener.local_addr()?.to_string();
    let settings = HttpConfig {
        webhook_hosts: vec![host.clone()],
        webhook_secret: Some("secret".parse().expect("a key")),
        ..durable(dir.path())
    };
    let (engine, strings) = ready().await;
    drop(strings.permits);
    let server = Server::start(engine, settings.clone(), LONG).await;
    let body = json!({ "prompt": "a cat", "webhook": format!("http://{host}/done?a=b") });
    let path = submit(&server, "", &body).await?;
    let calls = tokio::task::spawn_blocking(move || {
        ["302 Found", "500 Oops", "204 No Content"].map(|status| receive(&listener, status))
    });
    for (head, body) in calls.await? {
        assert!(head.starts_with("post /done?a=b http/1.1"), "{head}");
        let state: Value = serde_json::from_str(&body)?;
        assert_eq!(state["state"], "completed");
        assert!(path.ends_with(state["id"].as_str().context("an id")?));
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"secret");
        let signature = head.lines().find_map(|line| line.strip_prefix("x-sd-signature: sha256="));
        let signature = signature.context("a signature")?;
        let byte = |k: usize| u8::from_str_radix(&signature[k..k + 2], 16);
        let tag = (0..64).step_by(2).map(byte).collect::<Result<Vec<_>, _>>()?;
        ring::hmac::verify(&key, body.as_bytes(), &tag).expect("signed");
    }
    for url in ["http://127.0.0.1:1/", "ftp://example.org/", "nonsense"] {
        let body = json!({ "prompt": "a cat", "webhook": url });
        let (status, error) = call(&server, "POST", "/v1/jobs", "", &body).await?;
        assert_eq!((status, &error["error"]["param"]), (422, &"webhook".into()), "{url}");
    }
    Ok(())
}

#[test]
fn after_a_kill_every_accepted_job_has_one_end_and_its_own_pictures() {
    let dir = tempfile::tempdir().expect("a directory");
    let folder = dir.path().to_str().expect("a path");
    let start = || harness::Server::ready(&["--data-dir", folder]);
    let body = json!({ "prompt": "a red house", "steps": 20, "n": 2, "output_format": "png" });
    let mut jobs = Vec::new();
    for pause_ms in [0, 50, 200, 600] {
        let server = start();
        let post = || {
            let request = server.client.post(server.url("/v1/jobs")).body(body.to_string());
            let reply = harness::Reply::from(request.send().expect("an answer"));
            assert_eq!(reply.status, 202);
            reply.header("location").to_owned()
        };
        jobs.extend([post(), post()]);
        std::thread::sleep(Duration::from_millis(pause_ms));
        server.signal("KILL");
        server.wait();
    }
    let server = start();
    let began = std::time::Instant::now();
    let get = |server: &harness::Server, path: &str| {
        harness::Reply::from(server.client.get(server.url(path)).send().expect("an answer"))
    };
    let mut results = Vec::new();
    for job in &jobs {
        let path = format!("{job}/result");
        let mut reply = get(&server, &path);
        while reply.status == 202 {
            assert!(began.elapsed() < PATIENCE, "{job} does not end");
            std::thread::sleep(Duration::from_millis(20));
            reply = get(&server, &path);
        }
        assert_eq!(reply.status, 200, "{}", reply.json());
        // The seed is the job's own, and the pictures are those that it gives without any kill.
        let seed = &reply.json()["images"][0]["seed"];
        let mut again = body.clone();
        again["seed"] = seed.clone();
        assert_eq!(server.json(&again).json()["images"], reply.json()["images"]);
        results.push(reply.body);
    }
    let mut folders = harness::sd_server(&["--model", "demo", "--data-dir", folder, "--port", "0"]);
    let second = folders.output().expect("it ends");
    let log = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(log.contains("another process uses it"), "{log}");
    assert_eq!((second.status.code(), &*second.stdout), (Some(1), &b""[..]), "not listening");
    server.signal("KILL");
    server.wait();
    let server = start();
    for (job, result) in jobs.iter().zip(results) {
        assert!(get(&server, &format!("{job}/result")).body == result, "the same bytes");
    }
}

#[test]
fn a_data_directory_that_cannot_be_used_is_a_usage_error_before_the_port_is_bound() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "text").expect("written");
    let path = file.to_str().expect("a path");
    let args = ["--model", "demo", "--data-dir", path, "--port", "0"];
    let ended = harness::sd_server(&args).output().expect("it ends");
    let log = String::from_utf8_lossy(&ended.stderr);
    assert!(log.contains(&format!("--data-dir {path} cannot be used: it is not a dir")), "{log}");
    assert_eq!((ended.status.code(), &*ended.stdout), (Some(64), &b""[..]), "{log}");
}

#[test]
fn an_option_that_makes_no_sense_is_a_usage_error() {
    for (args, name) in [
        (&["--webhook-hosts", "example.org"][..], "--webhook-secret"),
        (&["--webhook-hosts", "http://example.org", "--webhook-secret", "a"], "--webhook-hosts"),
        (&["--webhook-hosts", "a/b", "--webhook-secret", "a"], "--webhook-hosts"),
        (&["--webhook-secret", "a b"], "a key is one or more visible ASCII characters"),
        (&["--max-jobs-per-client", "0"], "--max-jobs-per-client"),
        (&["--max-job-bytes", "many"], "--max-job-bytes"),
    ] {
        let ended = harness::sd_server(args).output().expect("it ends");
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(64), "{text}");
        assert!(text.contains(name), "{text}");
    }
}
