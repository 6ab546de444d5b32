//! Requests that can be watched: server-sent events, and jobs that outlive their connection.

use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use reqwest::Response;
use sd_server::engine::{Client, Engine, Job};
use sd_server::http;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::engine::{LONG, Server, ready};
use crate::fake::{HTTP, spec, wait_until};

/// Posts a body and returns when the head of the answer is there.
async fn post(server: &Server, path: &str, body: &Value) -> Result<Response> {
    let request =
        reqwest::Client::new().post(format!("{}{path}", server.url)).body(body.to_string());
    Ok(request.send().await?)
}

async fn get(server: &Server, path: &str) -> Result<(u16, Value)> {
    let reply = reqwest::get(format!("{}{path}", server.url)).await?;
    let status = reply.status().as_u16();
    Ok((status, reply.json().await.unwrap_or_default()))
}

async fn delete(server: &Server, path: &str) -> Result<u16> {
    let reply = reqwest::Client::new().delete(format!("{}{path}", server.url)).send().await?;
    Ok(reply.status().as_u16())
}

/// Names and data of events.
pub(crate) fn events(text: &str) -> Vec<(String, Value)> {
    let field = |event: &str, name: &str| {
        let value = event.lines().find_map(|line| line.strip_prefix(name));
        value.map(|value| value.trim().to_owned())
    };
    text.split("\n\n")
        .filter_map(|event| Some((field(event, "event:")?, field(event, "data:")?)))
        .map(|(name, data)| (name, serde_json::from_str(&data).expect("JSON")))
        .collect()
}

fn counted(engine: &Engine, line: &str) -> bool {
    engine.metrics().to_string().lines().any(|found| found == line)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_tells_the_whole_story() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    let body = json!({ "prompt": "a cat", "steps": 3, "seed": 5, "stream": true, "preview": true });
    let mut stream = post(&server, "/invocations", &body).await?;
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    let first = stream.chunk().await?.context("an event before any step")?;
    assert_eq!(events(&String::from_utf8_lossy(&first))[0].0, "queued");
    strings.step();
    let mut text = String::new();
    while !text.contains("event: preview") {
        text += &String::from_utf8_lossy(&stream.chunk().await?.context("a preview")?);
    }
    drop(strings.permits);
    while let Some(chunk) = stream.chunk().await? {
        text += &String::from_utf8_lossy(&chunk);
    }
    let events = events(&text);
    let steps: Vec<_> = events.iter().filter(|event| event.0 == "step").collect();
    assert_eq!(steps.last().context("steps")?.1["step"], 3);
    assert!(steps.iter().all(|step| step.1["steps"] == 3));
    let preview = events.iter().find(|event| event.0 == "preview").context("a preview")?;
    assert_eq!(
        (&preview.1["index"], &preview.1["content_type"]),
        (&0.into(), &"image/jpeg".into())
    );
    assert!(preview.1["data"].as_str().is_some_and(|data| data.starts_with("/9j/")));
    let (name, result) = events.last().context("an end")?;
    assert_eq!((name.as_str(), &result["seed"]), ("result", &5.into()));
    assert!(result["data"].is_string() && result["prompt"] == "a cat");

    let broken = json!({ "prompt": "out of memory", "stream": true });
    let text = post(&server, "/invocations", &broken).await?.text().await?;
    let (name, error) = self::events(&text).pop().context("an end")?;
    assert_eq!((name.as_str(), &error["error"]["code"]), ("error", &"out_of_memory".into()));
    // What is wrong with the request itself is an answer like any other.
    let wrong = json!({ "prompt": "a cat", "stream": true, "steps": 0 });
    assert_eq!(post(&server, "/invocations", &wrong).await?.status(), 422);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_hears_of_its_deadline_while_a_step_lasts() -> Result<()> {
    let (engine, _strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    let request = reqwest::Client::new().post(format!("{}/invocations", server.url));
    let request = request.header("x-request-timeout-ms", "50");
    let text = request.body(r#"{"prompt":"a cat","stream":true}"#).send().await?.text().await?;
    let (name, error) = events(&text).pop().context("an end")?;
    assert_eq!((name.as_str(), &error["error"]["code"]), ("error", &"deadline_exceeded".into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_read_ends_with_its_error() -> Result<()> {
    let (engine, strings) = ready().await;
    let body = json!({ "prompt": "out of memory", "stream": true }).to_string();
    let request = axum::http::Request::post("/invocations").body(axum::body::Body::from(body))?;
    let reply = http::router(engine.clone().into(), HTTP)?.oneshot(request).await?;
    // The channel of events is full, and the next one waits, when the image fails.
    strings.permits.send(())?;
    wait_until(|| counted(&engine, "sd_images_total{outcome=\"failed\"} 1"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let read = axum::body::to_bytes(reply.into_body(), usize::MAX);
    let text = tokio::time::timeout(LONG, read).await.context("an end of the stream")??;
    let (name, error) = events(&String::from_utf8_lossy(&text)).pop().context("an event")?;
    assert_eq!((name.as_str(), &error["error"]["code"]), ("error", &"out_of_memory".into()));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_stream_on_which_nothing_happens_has_a_heartbeat() -> Result<()> {
    let (engine, _strings) = ready().await;
    let body = json!({ "prompt": "a cat", "stream": true }).to_string();
    let request = axum::http::Request::post("/invocations").body(axum::body::Body::from(body))?;
    let reply = http::router(engine.into(), HTTP)?.oneshot(request).await?;
    let mut parts = reply.into_body().into_data_stream();
    let mut next = async || -> Result<(Duration, String)> {
        let began = tokio::time::Instant::now();
        let part = parts.next().await.context("more")??;
        Ok((began.elapsed(), String::from_utf8_lossy(&part).into_owned()))
    };
    let (waited, first) = next().await?;
    assert!(waited.is_zero() && first.contains("event: queued"), "{first} after {waited:?}");
    // The picture begins, and its first step waits for a permit that does not come.
    let mut beats = 0;
    while beats < 3 {
        let (waited, part) = next().await?;
        assert!(waited <= Duration::from_millis(5010), "{part} after {waited:?}");
        assert!(part == ": waiting\n\n" || part.contains("\"step\":0"), "{part}");
        beats += usize::from(part.starts_with(':'));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_closed_withdraws_its_picture() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let request = reqwest::Client::new().post(format!("{}/invocations", server.url));
    let request = request.header("accept", "text/event-stream");
    let request = request.body(r#"{"prompt":"a cat","steps":150}"#);
    let mut stream = request.send().await?;
    assert!(stream.chunk().await?.is_some());
    drop(stream);
    // Fewer steps than there are until the server has noticed.
    wait_until(|| {
        let _ = strings.permits.send(());
        std::thread::sleep(Duration::from_millis(20));
        counted(&engine, "sd_images_total{outcome=\"cancelled\"} 1")
    });
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_accepted_watched_fetched_and_forgotten() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    let body = json!({ "prompt": "a cat", "steps": 2, "seed": 5, "output_format": "png" });
    let reply = post(&server, "/v1/jobs", &body).await?;
    assert_eq!(reply.status(), 202);
    let path = reply.headers()["location"].to_str()?.to_owned();
    let job: Value = reply.json().await?;
    assert!(["queued", "running"].contains(&job["state"].as_str().context("a state")?), "{job}");
    assert_eq!(path, format!("/v1/jobs/{}", job["id"].as_str().context("an id")?));
    let result = format!("{path}/result");
    assert_eq!(get(&server, &result).await?.0, 202, "not yet");
    strings.step();
    let mut state = Value::Null;
    while state["step"] != 1 {
        state = get(&server, &path).await?.1;
    }
    assert_eq!((&state["state"], &state["steps"]), (&"running".into(), &2.into()));
    drop(strings.permits);
    while state["state"] != "completed" {
        state = get(&server, &path).await?.1;
    }
    let (status, picture) = get(&server, &result).await?;
    assert_eq!((status, &picture["seed"]), (200, &5.into()));
    assert_eq!(picture["content_type"], "image/png");
    assert_eq!(delete(&server, &path).await?, 204);
    for path in [&path, &result] {
        assert_eq!(get(&server, path).await?.0, 404);
    }
    assert_eq!(delete(&server, &path).await?, 404);

    let broken = json!({ "prompt": "out of memory" });
    let reply = post(&server, "/v1/jobs", &broken).await?;
    let path = reply.headers()["location"].to_str()?.to_owned();
    while get(&server, &path).await?.1["state"] != "failed" {}
    assert_eq!(get(&server, &path).await?.1["error"]["code"], "out_of_memory");
    assert_eq!(get(&server, &format!("{path}/result")).await?.0, 507);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_job_frees_its_rows() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let reply = post(&server, "/v1/jobs", &json!({ "prompt": "a cat", "n": 2 })).await?;
    let path = reply.headers()["location"].to_str()?.to_owned();
    while get(&server, &path).await?.1["state"] != "running" {}
    assert_eq!(delete(&server, &path).await?, 204);
    wait_until(|| {
        let _ = strings.permits.send(());
        counted(&engine, "sd_images_total{outcome=\"cancelled\"} 2")
    });
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_made_room_for_another_client_is_drawn_later_and_counted_once() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let other = |seeds: std::ops::Range<u64>| {
        let specs = seeds.map(|seed| spec(seed, 1)).collect::<Vec<_>>();
        engine.submit(Job { client: Client::named("other"), ..Job::from(specs) })
    };
    let drawing = other(1..3)?;
    wait_until(|| drawing.progress().borrow().started == 2);
    let reply = post(&server, "/v1/jobs", &json!({ "prompt": "a cat", "n": 4 })).await?;
    assert_eq!(reply.status(), 202);
    let path = reply.headers()["location"].to_str()?.to_owned();
    while get(&server, &path).await?.1["position"].is_null() {}
    let one = other(3..4)?;
    drop(strings.permits);
    assert_eq!((drawing.wait().await?.len(), one.wait().await?.len()), (2, 1));
    while get(&server, &path).await?.1["state"] != "completed" {}
    wait_until(|| counted(&engine, "sd_images_total{outcome=\"completed\"} 7"));
    assert!(!engine.metrics().to_string().contains("outcome=\"rejected\""));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_bounded_in_number_and_time() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = http::HttpConfig {
        max_jobs_per_client: Some(2),
        job_retention: Duration::from_secs(2),
        ..HTTP
    };
    let server = Server::start(engine, settings, LONG).await;
    let body = json!({ "prompt": "a cat", "steps": 1 });
    let submit = async || -> Result<(u16, String)> {
        let reply = post(&server, "/v1/jobs", &body).await?;
        let location = reply.headers().get("location");
        let path = location.map(|path| path.to_str().unwrap_or_default().to_owned());
        Ok((reply.status().as_u16(), path.unwrap_or_default()))
    };
    let (first, second) = (submit().await?, submit().await?);
    assert_eq!((first.0, second.0), (202, 202));
    assert_eq!(submit().await?.0, 429, "two are under way");
    drop(strings.permits);
    while get(&server, &first.1).await?.1["state"] != "completed" {}
    while get(&server, &second.1).await?.1["state"] != "completed" {}
    assert_eq!(submit().await?.0, 202, "the oldest result makes room");
    let kept = [get(&server, &first.1).await?.0, get(&server, &second.1).await?.0];
    assert!(kept == [200, 404] || kept == [404, 200], "{kept:?}");
    for path in [&first.1, &second.1] {
        while get(&server, path).await?.0 != 404 {}
    }
    Ok(())
}
