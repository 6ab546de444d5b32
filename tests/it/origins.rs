//! Web pages of other origins, and proxies: who a request comes from, and where its links lead.

use std::time::Duration;

use anyhow::{Context as _, Result};
use sd_server::http::{AccessConfig, HttpConfig, TrustedProxies};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::engine::{LONG, Server, ready};
use crate::fake::{ACCESS, HTTP, Strings, keyed};

/// Status and body of a request with these headers, as they are.
async fn send(server: &Server, line: &str, headers: &[u8]) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(server.url.replace("http://", "")).await?;
    let head = [line.as_bytes(), b" HTTP/1.1\r\n", headers, b"Connection: close\r\n\r\n"].concat();
    stream.write_all(&head).await?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await?;
    let reply = String::from_utf8_lossy(&reply);
    let status = reply.get(9..12).context("an answer")?.parse()?;
    Ok((status, reply.into_owned()))
}

async fn start(access: AccessConfig) -> (Server, Strings) {
    let (engine, strings) = ready().await;
    (Server::start(engine, HttpConfig { access, ..HTTP }, LONG).await, strings)
}

/// A server that trusts no proxy. `ACCESS` trusts those of this host.
fn alone() -> AccessConfig {
    AccessConfig { trusted_proxies: TrustedProxies::NONE, ..ACCESS }
}

const ALLOWED: [&[u8]; 16] = [
    // Programs send no Origin and may use any name.
    b"",
    b"Host: any.example\r\n",
    b"Host: 127.0.0.1:8080\r\nOrigin: http://127.0.0.1:8080\r\n",
    b"Host: 127.0.0.1:8080\r\nOrigin: https://127.0.0.1:8080\r\n",
    b"hOsT: LOCALHOST:8080\r\noRiGiN: HTTP://localhost.:8080\r\n",
    b"Host: a.localhost\r\nOrigin: http://a.localhost:80\r\n",
    b"Host: 10.0.0.1:443\r\nOrigin: https://10.0.0.1\r\n",
    b"Host: [::1]:8080\r\nOrigin: http://[0:0::1]:8080\r\n",
    b"Host: [fd00::1]\r\nOrigin: https://[FD00::1]:443\r\n",
    b"Host: box.lan:8080\r\nOrigin: http://box.lan:8080\r\n",
    b"Host: Box.LAN.\r\nOrigin: http://box.lan\r\n",
    b"Host: box.lan\r\nOrigin: https://page.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: https://page.example:443\r\n",
    b"Host: public.example\r\nOrigin: http://public.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: https://public.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://10.0.0.1\r\nOrigin: https://page.example\r\n",
];

const FOREIGN: [&[u8]; 18] = [
    b"Host: 10.0.0.1\r\nOrigin: https://evil.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: null\r\n",
    b"Host: 10.0.0.1\r\nOrigin:\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://10.0.0.1:8080\r\n",
    b"Host: 10.0.0.1:8080\r\nOrigin: http://10.0.0.1\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://10.0.0.1.evil.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://10.0.0.1@evil.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://evil.example/10.0.0.1\r\n",
    b"Host: 10.0.0.1\r\nOrigin: ftp://10.0.0.1\r\n",
    b"Host: 10.0.0.1\r\nOrigin: 10.0.0.1\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://10.0.0.1, http://evil.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://10.0.0.1\r\nOrigin: http://evil.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://10.0.0.1\xff\r\n",
    b"Host: 10.0.0.1\r\nOrigin: http://page.example\r\n",
    b"Host: 10.0.0.1\r\nOrigin: https://page.example:8443\r\n",
    b"Host: 10.0.0.1\r\nOrigin: https://a.page.example\r\n",
    b"Host: [::1]\r\nOrigin: http://[::2]\r\n",
    // Nobody has said that this comes from a proxy.
    b"Host: 10.0.0.1\r\nOrigin: http://evil.example\r\nX-Forwarded-Host: evil.example\r\n",
];

const UNKNOWN: [&[u8]; 10] = [
    b"Host: evil.example\r\nOrigin: http://evil.example\r\n",
    b"Host: evil.example:8080\r\nOrigin: http://evil.example:8080\r\n",
    b"Host: evil.example\r\nOrigin: https://page.example\r\n",
    b"Host: 10.0.0.1.evil.example\r\nOrigin: http://10.0.0.1.evil.example\r\n",
    b"Host: localhost.evil.example\r\nOrigin: http://localhost.evil.example\r\n",
    b"Host: a.box.lan\r\nOrigin: http://a.box.lan\r\n",
    b"Host: 10.0.0.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n",
    b"Host: 10.0.0.1, evil.example\r\nOrigin: http://10.0.0.1\r\n",
    b"Host: 10.0.0.1\xff\r\nOrigin: http://10.0.0.1\r\n",
    b"Origin: https://public.example\r\n",
];

fn named() -> AccessConfig {
    AccessConfig {
        cors_origins: vec![reqwest::header::HeaderValue::from_static("https://page.example")],
        public_url: Some("https://public.example/sd".parse().expect("a URL")),
        allowed_hosts: vec!["box.lan".parse().expect("a host")],
        ..alone()
    }
}

/// The route does not exist: 404 says that the request was looked at.
#[tokio::test(flavor = "multi_thread")]
async fn pages_change_nothing_unless_they_are_ones_own() -> Result<()> {
    let (server, _strings) = start(named()).await;
    let check = async |headers: &[u8], status: u16, code: &str| {
        let reply = send(&server, "POST /nowhere", headers).await?;
        let text = headers.escape_ascii();
        assert_eq!((reply.0, reply.1.contains(code)), (status, true), "{text}: {}", reply.1);
        anyhow::Ok(())
    };
    for headers in ALLOWED {
        check(headers, 404, "not_found").await?;
    }
    for headers in FOREIGN {
        check(headers, 403, "origin_not_allowed").await?;
    }
    for headers in UNKNOWN {
        check(headers, 403, "host_not_allowed").await?;
    }
    let all = vec![reqwest::header::HeaderValue::from_static("*")];
    let (server, _strings) = start(AccessConfig { cors_origins: all, ..ACCESS }).await;
    assert_eq!(send(&server, "POST /nowhere", FOREIGN[0]).await?.0, 404);
    assert_eq!(send(&server, "POST /nowhere", FOREIGN[1]).await?.0, 404);
    assert_eq!(send(&server, "POST /nowhere", UNKNOWN[0]).await?.0, 403);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_origin_is_looked_at_before_anything_else() -> Result<()> {
    let (engine, _strings) = ready().await;
    let server = Server::start(engine, keyed(&["sesame"]), LONG).await;
    let paths =
        ["/ping", "/invocations", "/v1/jobs/1", "/sdapi/v1/options", "/files/a", "/nowhere"];
    for path in paths {
        for method in ["POST", "DELETE", "PUT", "PATCH", "BREW"] {
            let (status, text) = send(&server, &format!("{method} {path}"), FOREIGN[0]).await?;
            assert_eq!(status, 403, "{method} {path}: {text}");
        }
        for method in ["GET", "HEAD", "OPTIONS"] {
            let line = format!("{method} {path}");
            // Browsers show no answer to a page of another origin.
            assert_ne!(send(&server, &line, FOREIGN[0]).await?.0, 403, "{line}");
            assert_eq!(send(&server, &line, UNKNOWN[0]).await?.0, 403, "{line}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_says_under_which_name_it_is_known() -> Result<()> {
    let (server, _strings) = start(ACCESS).await;
    let table: [(&str, &str, u16); 9] = [
        ("https://sd.example", "X-Forwarded-Host: SD.example", 404),
        ("https://sd.example", "x-forwarded-HOST: sd.example:443 , inner:80", 404),
        ("https://inner", "X-Forwarded-Host: sd.example, inner", 403),
        ("https://sd.example:8443", "X-Forwarded-Host: sd.example:8443", 404),
        ("https://sd.example:8443", "X-Forwarded-Host: sd.example\r\nX-Forwarded-Port: 8443", 404),
        ("https://sd.example:8443", "X-Forwarded-Host: sd.example\r\nX-Forwarded-Port: 443", 403),
        ("http://10.0.0.1:8080", "X-Forwarded-Port: 8080", 404),
        ("http://10.0.0.1", "X-Forwarded-Host: sd.example", 404),
        ("https://evil.example", "X-Forwarded-Host: sd.example", 403),
    ];
    for (origin, headers, status) in table {
        let headers = format!("Host: 10.0.0.1\r\nOrigin: {origin}\r\n{headers}\r\n");
        let reply = send(&server, "POST /nowhere", headers.as_bytes()).await?;
        assert_eq!(reply.0, status, "{headers}: {}", reply.1);
    }
    // A page of a site that points to this address can send any header to it.
    let headers = b"Host: evil.example\r\nOrigin: http://evil.example\r\n\
                    X-Forwarded-Host: 127.0.0.1\r\n";
    assert_eq!(send(&server, "POST /nowhere", headers).await?.0, 403);
    Ok(())
}

const GENERATIONS: &str = "/v1/images/generations";
const JOBS: &str = "/v1/jobs";

#[tokio::test(flavor = "multi_thread")]
async fn links_lead_to_where_the_client_came_from() -> Result<()> {
    let table: [(&str, &[(&str, &str)]); 9] = [
        ("http://10.0.0.1:8080", &[]),
        ("https://10.0.0.1:8080", &[("X-FORWARDED-PROTO", "HTTPS, http")]),
        (
            "https://sd.example",
            &[("x-forwarded-proto", "https"), ("x-forwarded-host", "SD.example, b")],
        ),
        (
            "http://sd.example:81",
            &[("x-forwarded-host", "sd.example"), ("x-forwarded-port", "81, 82")],
        ),
        (
            "https://sd.example",
            &[
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "sd.example"),
                ("x-forwarded-port", "443"),
            ],
        ),
        (
            "http://[::1]:81/a/b",
            &[("x-forwarded-host", "[::1]:81"), ("x-forwarded-prefix", "/a/b/, /c")],
        ),
        ("http://10.0.0.1:8080", &[("x-forwarded-prefix", "//evil.example")]),
        ("http://a.example", &[("x-forwarded-host", "a.example"), ("x-forwarded-port", "0")]),
        (
            "http://10.0.0.1:8080",
            &[("x-forwarded-host", "a/b"), ("x-forwarded-proto", "javascript")],
        ),
    ];
    let post = async |server: &Server, path: &str, headers: &[(&str, &str)]| {
        let request = reqwest::Client::new().post(format!("{}{path}", server.url));
        let request = request.header("host", "10.0.0.1:8080");
        let request =
            headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let body = json!({ "prompt": "a cat", "steps": 1 });
        let extra = json!({ "prompt": "a cat", "steps": 1, "response_format": "url" });
        let body = if path == JOBS { body } else { extra };
        anyhow::Ok(request.body(body.to_string()).send().await?)
    };
    let draw = async |server: &Server, headers: &[(&str, &str)]| {
        let reply: Value = post(server, GENERATIONS, headers).await?.json().await?;
        anyhow::Ok(reply["data"][0]["url"].as_str().context("a URL")?.to_owned())
    };
    // The path before that of the job: this link has no host.
    let job = async |server: &Server, headers: &[(&str, &str)]| {
        let reply = post(server, JOBS, headers).await?;
        let location = reply.headers()["location"].to_str()?.to_owned();
        let (prefix, id) = location.split_once(JOBS).context("a job")?;
        anyhow::ensure!(id.len() == 33, "{location}");
        anyhow::Ok(prefix.to_owned())
    };
    let public_url = Some("https://public.example:8443/sd/".parse().expect("a URL"));
    let public = AccessConfig { public_url, ..ACCESS };
    let [(proxied, a), (alone, b), (public, c)] =
        [start(ACCESS).await, start(alone()).await, start(public).await];
    drop((a.permits, b.permits, c.permits));
    for (base, headers) in table {
        let servers = [
            (&proxied, base),
            (&alone, "http://10.0.0.1:8080"),
            (&public, "https://public.example:8443/sd"),
        ];
        for (server, base) in servers {
            let url = draw(server, headers).await?;
            assert!(url.starts_with(&format!("{base}/files/")), "{headers:?}: {url}");
            let path = base.splitn(4, '/').nth(3).map_or(String::new(), |path| format!("/{path}"));
            assert_eq!(job(server, headers).await?, path, "{headers:?}");
        }
    }
    Ok(())
}

/// AUTOMATIC1111's progress counts the pictures of one's own client.
#[tokio::test(flavor = "multi_thread")]
async fn clients_behind_a_trusted_proxy_are_told_apart() -> Result<()> {
    for (access, spoofed) in [(ACCESS, false), (alone(), true)] {
        let (server, strings) = start(access).await;
        let url = format!("{}/sdapi/v1/txt2img", server.url);
        let body = json!({ "prompt": "a cat", "steps": 2 }).to_string();
        let drawing =
            reqwest::Client::new().post(url).header("X-Forwarded-For", "9.9.9.9, 1.1.1.1");
        let drawing = tokio::spawn(drawing.body(body).send());
        strings.step();
        let own = [("1.1.1.1", true), ("7.7.7.7, 1.1.1.1", true), ("1.1.1.1:80, 127.0.0.1", true)];
        let other = ["2.2.2.2", "1.1.1.1, 2.2.2.2", "9.9.9.9", "127.0.0.1"].map(|x| (x, spoofed));
        let count = async |forwarded: &str| -> Result<Option<u64>> {
            let url = format!("{}/sdapi/v1/progress", server.url);
            let request = reqwest::Client::new().get(url).header("x-forwarded-FOR", forwarded);
            let progress: Value = request.send().await?.json().await?;
            Ok(progress["state"]["job_count"].as_u64())
        };
        // The model may be at work before its request is in the list.
        while count(own[0].0).await? != Some(1) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for (forwarded, seen) in own.into_iter().chain(other) {
            assert_eq!(count(forwarded).await?, Some(u64::from(seen)), "{forwarded}");
        }
        drop(strings.permits);
        assert_eq!(drawing.await??.status(), 200);
    }
    Ok(())
}

/// The limits of one client are those of the address that a trusted proxy names.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_behind_a_proxy_has_limits_of_its_own() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = HttpConfig { max_requests_per_client: Some(1), ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let draw = |client: &str| {
        let request = reqwest::Client::new().post(format!("{}/invocations", server.url));
        let request = request.header("x-forwarded-for", client).body(r#"{"prompt":"a","steps":1}"#);
        tokio::spawn(request.send())
    };
    let in_flight = async |requests: usize| {
        let line = format!("\nsd_requests_in_flight {requests}\n");
        let wait = async {
            let metrics =
                || async { reqwest::get(format!("{}/metrics", server.url)).await?.text().await };
            while !metrics().await?.contains(&line) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(LONG, wait).await?
    };
    let first = draw("1.1.1.1");
    in_flight(1).await?;
    assert_eq!(draw("6.6.6.6, 1.1.1.1").await??.status(), 429, "it is the same client");
    let others = [draw("2.2.2.2"), draw("[2001:db8::1]:4711")];
    in_flight(3).await?;
    drop(strings.permits);
    for accepted in [first].into_iter().chain(others) {
        assert_eq!(accepted.await??.status(), 200);
    }
    Ok(())
}
