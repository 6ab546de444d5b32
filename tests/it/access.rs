//! Who may come in: API keys and their routes, and CORS.

use anyhow::Result;
use reqwest::{Client, Method, RequestBuilder};
use sd_server::http;
use serde_json::Value;

use crate::engine::{LONG, Server, ready};
use crate::fake::{HTTP, keyed, spec, wait_until};
use crate::harness::{self, sd_server};

const LOCKED: [(&str, &str); 14] = [
    ("POST", "/v1/invocations"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/1"),
    ("DELETE", "/v1/jobs/1"),
    ("GET", "/v1/jobs/1/result"),
    ("POST", "/v1/images/generations"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/sdapi/v1/txt2img"),
    ("GET", "/sdapi/v1/progress"),
    ("POST", "/sdapi/v1/interrupt"),
    ("GET", "/sdapi/v1/options"),
    ("POST", "/sdapi/v1/options"),
    ("POST", "/internal/progress"),
];

fn request(server: &Server, method: &str, path: &str) -> Result<RequestBuilder> {
    let method = Method::from_bytes(method.as_bytes())?;
    Ok(Client::new().request(method, format!("{}{path}", server.url)))
}

/// The keys of the servers of these tests.
const KEYS: [&str; 2] = ["sesame", "open"];

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_needed_but_not_on_the_routes_of_machines() -> Result<()> {
    let (engine, strings) = ready().await;
    drop(strings.permits);
    let server = Server::start(engine, keyed(&KEYS), LONG).await;
    for (method, path) in LOCKED {
        for key in [None, Some("sesam"), Some("sesameopen"), Some("Open")] {
            let request = request(&server, method, path)?;
            let reply = match key {
                Some(key) => request.header("x-api-key", key),
                None => request,
            };
            let reply = reply.send().await?;
            assert_eq!(reply.status(), 401, "{method} {path} {key:?}");
            assert_eq!(reply.headers()["www-authenticate"], "Bearer");
            let text = reply.text().await?;
            let parts = ["invalid_api_key", "Authorization: Bearer", "X-Api-Key", "Basic"];
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        for key in ["sesame", "open"] {
            let reply = request(&server, method, path)?.bearer_auth(key).send().await?;
            assert_ne!(reply.status(), 401, "{method} {path}");
        }
    }
    let body = r#"{"prompt":"a cat","steps":1}"#;
    let basic = request(&server, "POST", "/v1/invocations")?.basic_auth("me", Some("open"));
    assert_eq!(basic.body(body).send().await?.status(), 200);
    let open = [
        ("GET", "/ping"),
        ("POST", "/invocations"),
        ("GET", "/execution-parameters"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/info"),
        ("GET", "/metrics"),
    ];
    for (method, path) in open {
        assert_eq!(
            request(&server, method, path)?.body(body).send().await?.status(),
            200,
            "{path}"
        );
    }
    Ok(())
}

/// Both requests come from one address; only their keys tell them apart.
#[tokio::test(flavor = "multi_thread")]
async fn those_who_share_a_key_share_a_turn() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), keyed(&KEYS), LONG).await;
    let draw = |key: &str, seed: u64, n: usize| {
        let body = format!(r#"{{"prompt":"a cat","steps":1,"seed":{seed},"n":{n}}}"#);
        let request = request(&server, "POST", "/v1/invocations").map(|r| r.bearer_auth(key));
        request.map(|request| tokio::spawn(request.body(body).send()))
    };
    let waiting = |pictures: usize| {
        engine.gauge();
        let line = format!("\nsd_images_waiting {pictures}\n");
        engine.metrics().to_string().contains(&line)
    };
    let drawing = engine.submit(vec![spec(1, 1), spec(2, 1)])?;
    wait_until(|| drawing.progress().borrow().started == 2);
    let greedy = draw("sesame", 20, 4)?;
    wait_until(|| waiting(4));
    // The queue is full of one key's pictures: it gives way to the other's and not to its own.
    assert_eq!(draw("sesame", 30, 1)?.await??.status(), 429);
    let other = draw("open", 40, 1)?;
    assert_eq!(greedy.await??.status(), 429);
    drop(strings.permits);
    assert_eq!(other.await??.status(), 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_pages_are_let_in_only_by_configuration() -> Result<()> {
    let (engine, _strings) = ready().await;
    let header = async |settings: http::HttpConfig, origin: &str, method: &str| {
        let server = Server::start(engine.clone(), settings, LONG).await;
        let request = request(&server, method, "/v1/jobs")?;
        let request = request.header("origin", origin);
        let request = request.header("access-control-request-method", "POST");
        let reply =
            request.header("access-control-request-headers", "authorization").send().await?;
        let header = reply.headers().get("access-control-allow-origin");
        let allowed = header.and_then(|value| value.to_str().ok()).map(str::to_owned);
        anyhow::Ok((reply.status().as_u16(), allowed))
    };
    let page = "https://page.example";
    // Without the header no browser goes on.
    assert_eq!(header(HTTP, page, "OPTIONS").await?, (204, None));
    let cors = |origin: &'static str| {
        let cors_origins = vec![http_header(origin), http_header("https://other.example")];
        let keyed = keyed(&KEYS);
        http::HttpConfig {
            access: http::AccessConfig { cors_origins, ..keyed.access.clone() },
            ..keyed
        }
    };
    // A browser sends no key with its question, only with what follows.
    assert_eq!(header(cors(page), page, "OPTIONS").await?, (200, Some(page.into())));
    assert_eq!(header(cors(page), page, "POST").await?, (401, Some(page.into())));
    assert_eq!(header(cors(page), "https://evil.example", "OPTIONS").await?.1, None);
    assert_eq!(header(cors("*"), page, "OPTIONS").await?, (200, Some("*".into())));
    Ok(())
}

fn http_header(value: &'static str) -> reqwest::header::HeaderValue {
    reqwest::header::HeaderValue::from_static(value)
}

/// What `route=` reaches is open like `/invocations`, and locked with it.
#[tokio::test(flavor = "multi_thread")]
async fn the_routes_of_machines_are_locked_on_demand() -> Result<()> {
    for lock_invocations in [false, true] {
        let (engine, strings) = ready().await;
        drop(strings.permits);
        let keyed = keyed(&KEYS);
        let access = http::AccessConfig { lock_invocations, ..keyed.access.clone() };
        let settings = http::HttpConfig { access, ..keyed };
        let server = Server::start(engine, settings, LONG).await;
        let post = async |route: &str, key: Option<&str>| {
            let body = r#"{"prompt":"a cat","steps":1}"#;
            let request = request(&server, "POST", "/invocations")?.body(body);
            let request = match route {
                "" => request,
                route => request.header("x-amzn-sagemaker-custom-attributes", route),
            };
            let request = match key {
                Some(key) => request.header("x-api-key", key),
                None => request,
            };
            anyhow::Ok(request.send().await?.status().as_u16())
        };
        for route in ["", "route=/v1/images/generations", "route=/sdapi/v1/txt2img"] {
            let expected = if lock_invocations { 401 } else { 200 };
            assert_eq!(post(route, None).await?, expected, "{route}");
            assert_eq!(post(route, Some("open")).await?, 200, "{route}");
        }
        for route in ["route=/sdapi/v1/options", "route=/sdapi/v1/interrupt", "route=/v1/jobs"] {
            assert_eq!(post(route, None).await?, 404, "{route}");
        }
        for path in ["/ping", "/execution-parameters"] {
            assert_eq!(request(&server, "GET", path)?.send().await?.status(), 200, "{path}");
        }
        let document: Value =
            request(&server, "GET", "/openapi.json")?.send().await?.json().await?;
        let keyed = document["paths"]["/invocations"]["post"]["security"].is_array();
        assert_eq!(keyed, lock_invocations);
    }
    Ok(())
}

#[test]
fn the_models_of_sagemaker_are_locked_with_its_invocations() -> Result<()> {
    let server = harness::Server::spawn(
        sd_server(&["--multi-model", "--api-key", "sesame"]).arg("--lock-invocations"),
    );
    server.wait_until_ready();
    let client = reqwest::blocking::Client::new();
    let routes = [
        ("POST", "/models"),
        ("GET", "/models"),
        ("DELETE", "/models/a"),
        ("POST", "/models/a/invoke"),
    ];
    for (method, path) in routes {
        let method = Method::from_bytes(method.as_bytes())?;
        let request = || client.request(method.clone(), server.url(path)).body("{}");
        assert_eq!(request().send()?.status(), 401, "{method} {path}");
        assert_ne!(request().bearer_auth("sesame").send()?.status(), 401, "{method} {path}");
    }
    Ok(())
}

#[test]
fn what_is_no_key_host_or_address_ends_the_server_with_64() {
    let options = [
        &["--api-key", ""],
        &["--api-key", "a b"],
        &["--cors-origin", "example.org"],
        &["--public-url", "example.org"],
        &["--public-url", "https://example.org/?a"],
        &["--allowed-hosts", "example.org:80"],
        &["--trusted-proxies", "localhost"],
        &["--lock-invocations"][..],
    ];
    for args in options {
        let done = sd_server(&["--model", "demo"]).args(args).output().expect("it starts");
        assert_eq!(done.status.code(), Some(64), "{args:?}");
    }
    // A variable that was meant to hold a key and holds none must not open the door.
    let done = sd_server(&["--model", "demo"]).env("SD_API_KEY", "").output().expect("it starts");
    assert_eq!(done.status.code(), Some(64));
}
