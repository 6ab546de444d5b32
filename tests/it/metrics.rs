//! Metrics, health routes and `/info` agree with what the clients received.

use serde_json::Value;

use crate::harness::Server;

fn get(server: &Server, path: &str) -> (u16, String) {
    let reply = server.client.get(server.url(path)).send().expect("an answer");
    (reply.status().as_u16(), reply.text().expect("text"))
}

#[test]
fn metrics_count_what_clients_saw() {
    let server = Server::ready(&["--max-queue", "3"]);
    let draw = |body: &'static str| server.post(&["content-type: application/json"], body).status;
    assert_eq!(draw(r#"{"prompt":"a cat","steps":2,"n":2}"#), 200);
    assert_eq!(draw(r#"{"prompt":"a cat","steps":3,"guidance_scale":1}"#), 200);
    assert_eq!(draw(r#"{"prompt":"a cat","steps":0}"#), 422);
    assert_eq!(draw("{"), 400);
    assert_eq!(get(&server, "/made/up").0, 404);
    // The last response is sent a moment before the worker updates the gauges.
    let text = loop {
        let (status, text) = get(&server, "/metrics");
        assert_eq!(status, 200);
        if text.contains("sd_images_running 0\n") {
            break text;
        }
    };
    let value = |series: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{series} in {text}")).parse().expect("a number")
    };
    for (series, expected) in [
        (r#"sd_requests_total{route="/invocations",outcome="ok"}"#, 2.0),
        (r#"sd_requests_total{route="/invocations",outcome="out_of_range"}"#, 1.0),
        (r#"sd_requests_total{route="/invocations",outcome="malformed"}"#, 1.0),
        (r#"sd_requests_total{route="other",outcome="not_found"}"#, 1.0),
        (r#"sd_request_duration_seconds_count{route="/invocations"}"#, 4.0),
        (r#"sd_images_total{outcome="completed"}"#, 3.0),
        (r#"sd_stage_duration_seconds_count{stage="text_encode"}"#, 3.0),
        (r#"sd_stage_duration_seconds_count{stage="decode"}"#, 3.0),
        (r#"sd_stage_duration_seconds_count{stage="image_encode"}"#, 3.0),
        ("sd_queue_duration_seconds_count", 3.0),
        ("sd_image_duration_seconds_count", 3.0),
        ("sd_images_waiting", 0.0),
        ("sd_images_running", 0.0),
        ("sd_requests_in_flight", 0.0),
        ("sd_images_capacity", 4.0),
        ("sd_ready", 1.0),
    ] {
        assert_eq!(value(series), expected, "{series}");
    }
    // PNDM: one UNet call more than steps; two images of two rows, one of one.
    assert_eq!(value("sd_batch_size_sum"), 2.0 * 2.0 * 3.0 + 4.0);
    assert!(value("process_resident_memory_bytes") > 1e6 && value("sd_memory_budget_bytes") > 1e6);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, number) = line.rsplit_once(' ').expect("a name and a number");
        let ours = series.starts_with("sd_") || series.starts_with("process_");
        assert!(ours && number.parse::<f64>().is_ok(), "{line}");
    }
}

#[test]
fn open_metrics_are_rendered_when_they_are_accepted() {
    let server = Server::ready(&[]);
    let accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
    let reply = server.client.get(server.url("/metrics")).header("accept", accept).send();
    let reply = reply.expect("an answer");
    let media_type = reply.headers()["content-type"].to_str().expect("text").to_owned();
    assert!(media_type.starts_with("application/openmetrics-text"), "{media_type}");
    let text = reply.text().expect("text");
    assert!(text.contains("\nsd_ready 1\n") && text.ends_with("\n# EOF\n"), "{text}");
}

#[test]
fn health_and_info_answer() {
    let server = Server::ready(&[]);
    assert_eq!(get(&server, "/health/live").0, 200);
    assert_eq!(get(&server, "/health/ready").0, 200);
    let info: Value = serde_json::from_str(&get(&server, "/info").1).expect("JSON");
    assert_eq!((&info["phase"], &info["model"]["name"]), (&"ready".into(), &"demo".into()));
    assert_eq!(info["model"]["defaults"]["width"], 128);
    assert_eq!(info["limits"]["request_timeout_ms"], 58000);
}
