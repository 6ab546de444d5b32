//! JSON lines, as SageMaker's batch transform sends them.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use crate::engine::{LONG, Server, ready};
use crate::fake::HTTP;
use crate::harness;

const LINES: &str = "content-type: application/jsonlines";

#[test]
fn every_line_is_answered_in_its_place() {
    let server = harness::Server::ready(&[]);
    let good = json!({ "prompt": "a cat", "steps": 2, "seed": 7 });
    let lines: [String; 6] = [
        good.to_string(),
        "{\"prompt\":".into(),
        String::new(),
        json!({ "prompt": "a dog", "steps": 0 }).to_string(),
        json!({ "prompt": "two", "steps": 1, "n": 2, "seed": 1 }).to_string() + "\r",
        good.to_string(),
    ];
    for end in ["", "\n"] {
        let reply = server.post(&[LINES], lines.join("\n") + end);
        assert_eq!((reply.status, reply.header("content-type")), (200, "application/jsonlines"));
        let text = String::from_utf8(reply.body).expect("UTF-8");
        assert!(text.ends_with('\n'));
        let answers: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(answers.len(), lines.len());
        let code = |k: usize| answers[k]["error"]["code"].as_str();
        let codes: Vec<_> = (0..lines.len()).map(code).collect();
        let (malformed, range) = (Some("malformed"), Some("out_of_range"));
        assert_eq!(codes, [None, malformed, malformed, range, None, None]);
        assert_eq!(answers[3]["error"]["param"], "steps");
        assert_eq!(answers[4]["images"].as_array().map(Vec::len), Some(2));
        assert_eq!(answers[0], answers[5]);
        assert_eq!(answers[0]["data"], server.json(&good).json()["data"]);
    }
    let empty = server.post(&[LINES], "");
    assert_eq!((empty.status, empty.error().0.as_str()), (400, "malformed"));
    let one = server.post(&["content-type: application/x-ndjson"], good.to_string());
    assert_eq!(one.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_drawn_together_and_wait_for_room() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    drop(strings.permits);
    for pictures in [1, 3] {
        let line = |k| json!({ "prompt": "a cat", "seed": k, "n": pictures }).to_string();
        let lines: Vec<_> = (0..20).map(line).collect();
        let request = reqwest::Client::new().post(format!("{}/invocations", server.url));
        let request = request.header("content-type", "application/jsonlines");
        let text = request.body(lines.join("\n")).send().await?.text().await?;
        let seed = |line: &str| {
            let answer: Value = serde_json::from_str(line).expect("JSON");
            let first = if pictures == 1 { &answer["seed"] } else { &answer["images"][0]["seed"] };
            first.as_u64()
        };
        let seeds: Vec<_> = text.lines().map(seed).collect();
        assert_eq!(seeds, (0..20).map(Some).collect::<Vec<_>>());
    }
    let steps = strings.steps.lock().expect("unpoisoned");
    assert!(steps.iter().any(|step| step.len() == 2), "{steps:?}");
    Ok(())
}

#[test]
fn lines_of_a_client_that_left_are_withdrawn() {
    let server = harness::Server::ready(&["--max-batch-rows", "4"]);
    let line = json!({ "prompt": "a cat", "steps": 150 }).to_string();
    let reply = server
        .client
        .post(server.url("/invocations"))
        .header("content-type", "application/jsonlines");
    let reply = reply.body([line.as_str(); 8].join("\n")).send().expect("an answer");
    assert_eq!(reply.status(), 200, "before the first line is drawn");
    let began = Instant::now();
    let wait = |gauge: &str, value: f64| {
        while server.metric(gauge) != value {
            assert!(began.elapsed() < harness::PATIENCE, "{gauge} is not {value}");
        }
    };
    // As many lines are looked at as there are rows, and each picture takes two.
    wait("sd_images_running", 2.0);
    wait("sd_images_waiting", 2.0);
    drop(reply);
    wait("sd_requests_in_flight", 0.0);
    wait("sd_images_running", 0.0);
    let ended = |outcome| server.metric(&format!("sd_images_total{{outcome=\"{outcome}\"}}"));
    assert_eq!((ended("completed"), ended("cancelled")), (0.0, 4.0), "nobody waits for them");
}

#[test]
fn batch_transform_learns_what_to_send() {
    let server = harness::Server::ready(&["--max-batch-rows", "32"]);
    let reply = server.client.get(server.url("/execution-parameters")).send().expect("an answer");
    let parameters: Value = reply.json().expect("JSON");
    let expected = json!({
        "MaxConcurrentTransforms": 16, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 6,
    });
    assert_eq!(parameters, expected);
}
