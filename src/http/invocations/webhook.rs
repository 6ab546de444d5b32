//! Webhooks: when a job has ended, its state is sent by POST to the URL of its request, until the
//! URL responds with 2xx or the job is deleted. So each end is sent at least once, unless nobody
//! answers while the job is retained. Only hosts that the operator lists are called.

use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use reqwest::redirect::Policy;
use reqwest::{Client, Url};
use ring::hmac;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::job_state::describe;
use crate::http::error::ApiError;
use crate::http::state::AppState;

/// Header with `sha256=` and the HMAC-SHA256 of the body in hexadecimal.
const SIGNATURE: &str = "x-sd-signature";

/// Maximum length of a URL.
const MAX_URL_BYTES: usize = 2048;

/// Time for a response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Time until the second attempt. It doubles with each.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The same, at most.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(300);

/// Why a URL cannot be called, if so. `hosts` are hosts with their ports, if not the scheme's own.
pub(super) fn check(url: &str, hosts: &[String]) -> Result<Url, &'static str> {
    let parsed = Url::parse(url).ok().filter(|_| url.len() <= MAX_URL_BYTES);
    let parsed = parsed.filter(|url| ["http", "https"].contains(&url.scheme()));
    let url = parsed.ok_or("must be a URL of http or https of at most 2048 bytes")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not contain a user or password");
    }
    let host = url.host_str().unwrap_or_default();
    let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
    let is_listed = |listed: &String| {
        listed.eq_ignore_ascii_case(&with_port)
            || (url.port().is_none() && listed.eq_ignore_ascii_case(host))
    };
    let listed = hosts.iter().any(is_listed);
    if listed { Ok(url) } else { Err("is on a host that --webhook-hosts does not list") }
}

/// Sends the state of a job until it is received.
pub(super) async fn deliver(state: AppState, id: String, url: String) {
    let settings = &state.settings;
    // The options may have changed since the job was accepted.
    let checked = check(&url, &settings.webhook_hosts);
    let client = Client::builder().redirect(Policy::none()).no_proxy().timeout(TIMEOUT).build();
    let (url, client) = match (checked, client) {
        (Ok(url), Ok(client)) => (url, client),
        (Err(reason), _) => {
            warn!(job = id, "a webhook is not called: its URL {reason}");
            let _ = state.jobs.set_notified(&id).await;
            return;
        }
        (_, Err(error)) => return warn!(job = id, "a webhook cannot be called: {error}"),
    };
    let host = url.host_str().unwrap_or_default();
    let place = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
    let mut pause = RETRY_INTERVAL;
    let mut attempts = 0_u32;
    loop {
        let called = state.calls.place(&place).await;
        let job = match state.jobs.get(&id).await {
            Ok(job) => job,
            Err(ApiError::NoJob) => {
                return warn!(job = id, host, attempts, "webhook not received; its job is gone");
            }
            // The error is in the log; the next attempt may succeed.
            Err(_) => {
                drop(called);
                sleep(MAX_RETRY_INTERVAL).await;
                continue;
            }
        };
        attempts += 1;
        let body = describe(&state, &job).to_string();
        let mut request = client.post(url.clone()).header(CONTENT_TYPE, "application/json");
        if let Some(secret) = &settings.webhook_secret {
            request = request.header(SIGNATURE, signature(secret.as_bytes(), body.as_bytes()));
        }
        match request.body(body).send().await {
            Ok(response) if response.status().is_success() => {
                info!(job = id, host, "webhook received");
                let _ = state.jobs.set_notified(&id).await;
                return;
            }
            Ok(response) => {
                let status = response.status().as_u16();
                debug!(job = id, host, attempts, status, "webhook refused; it is sent again");
            }
            Err(error) => {
                let error = error.without_url();
                debug!(job = id, host, attempts, "webhook not received, it is sent again: {error}");
            }
        }
        drop(called);
        sleep(pause).await;
        pause = (2 * pause).min(MAX_RETRY_INTERVAL);
    }
}

fn signature(key: &[u8], body: &[u8]) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let hex = |byte: &u8| format!("{byte:02x}");
    let tag: String = hmac::sign(&key, body).as_ref().iter().map(hex).collect();
    format!("sha256={tag}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_hosts_are_called() {
        let hosts = ["example.org", "10.0.0.1:8080", "[::1]:9", "secure.example:443"];
        let hosts = hosts.map(str::to_owned);
        let long = format!("http://example.org/{}", "a".repeat(3000));
        let table = [
            ("http://example.org/done?a=b", true),
            ("https://EXAMPLE.org", true),
            ("http://example.org:80/", true),
            ("http://10.0.0.1:8080/x", true),
            ("http://[::1]:9/x", true),
            ("https://secure.example/", true),
            ("http://secure.example/", false),
            ("http://example.org:81/", false),
            ("http://10.0.0.1/", false),
            ("http://example.org.evil.test/", false),
            ("http://evil.test/example.org", false),
            ("http://example.org@evil.test/", false),
            ("http://user@example.org/", false),
            ("http://167772161:8080/x", true), // Another spelling of 10.0.0.1.
            ("ftp://example.org/", false),
            ("file:///etc/passwd", false),
            ("example.org", false),
            ("", false),
            (&long, false),
        ];
        for (url, allowed) in table {
            assert_eq!(check(url, &hosts).is_ok(), allowed, "{url}");
        }
        assert!(check("http://example.org", &[]).is_err());
    }

    #[test]
    fn the_signature_is_that_of_rfc_4231() {
        let expected = "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(signature(b"Jefe", b"what do ya want for nothing?"), expected);
    }
}
