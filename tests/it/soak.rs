//! Many requests of every kind, with clients that leave: no picture is lost, the server's count is
//! its clients', and its memory does not grow. A few hundred requests here; all of it:
//!
//!     SOAK_REQUESTS=5000 cargo test --test it soak -- --nocapture

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::Server;

const CLIENTS: u64 = 6;

/// What the clients saw.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    answered: u64,
    malformed: u64,
    out_of_range: u64,
    overloaded: u64,
    left: u64,
    /// Of the answers.
    pictures: u64,
    /// That those who left would have had.
    left_pictures: u64,
    jobs: u64,
    jobs_refused: u64,
}

/// One request, of a kind that its number chooses.
fn ask(server: &Server, k: u64, seen: &Mutex<Seen>) {
    // Knuth's multiplier scatters neighbours.
    let roll = (k.wrapping_mul(2_654_435_761) >> 7) % 20;
    let pictures = 1 + k % 2;
    let schedulers = ["euler", "euler_a", "ddim", "pndm", "heun"];
    let (width, guidance) = ([64, 64, 96][(k % 3) as usize], [1.0, 7.5][(k % 2) as usize]);
    let body = json!({
        "prompt": if k.is_multiple_of(2) { "a red house" } else { "a blue car" }, "seed": k,
        "steps": 1 + k % 4, "width": width, "height": 64, "n": pictures,
        "guidance_scale": guidance, "scheduler": schedulers[(k % 5) as usize],
        "stream": (5..7).contains(&roll), "preview": roll == 6,
    });
    let mut saw = Seen::default();
    let mut post = |kind: &str, body: String| {
        let reply = server.post(&[kind], body);
        // Every picture that came has its seed beside it; a stream or a line may hold an error.
        saw.pictures += String::from_utf8_lossy(&reply.body).matches("\"seed\":").count() as u64;
        reply.status
    };
    let status = match roll {
        0 => post(JSON, "{\"prompt\":".to_owned()),
        1 => post(JSON, json!({ "prompt": "x", "steps": 0 }).to_string()),
        2..5 => {
            leave(server, &body.to_string(), k % 30);
            saw = Seen { left: 1, left_pictures: pictures, ..saw };
            0
        }
        7 => post(LINES, format!("{body}\n\n{body}")),
        8 => job(server, &body.to_string(), pictures, &mut saw),
        _ => post(JSON, body.to_string()),
    };
    match status {
        0 => {}
        200 => saw.answered = 1,
        400 => saw.malformed = 1,
        422 => saw.out_of_range = 1,
        429 => saw.overloaded = 1,
        other => panic!("{other} for request {k}"),
    }
    let mut seen = seen.lock().expect("unpoisoned");
    seen.answered += saw.answered;
    seen.malformed += saw.malformed;
    seen.out_of_range += saw.out_of_range;
    seen.overloaded += saw.overloaded;
    seen.left += saw.left;
    seen.pictures += saw.pictures;
    seen.left_pictures += saw.left_pictures;
    seen.jobs += saw.jobs;
    seen.jobs_refused += saw.jobs_refused;
}

const JSON: &str = "content-type: application/json";
const LINES: &str = "content-type: application/jsonlines";

/// Asks and hangs up.
fn leave(server: &Server, body: &str, after_ms: u64) {
    let mut stream = TcpStream::connect(&server.address).expect("it listens");
    let length = body.len();
    let head = format!("POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).expect("it reads");
    thread::sleep(Duration::from_millis(after_ms));
}

/// Asks for a job and fetches what became of it.
fn job(server: &Server, body: &str, pictures: u64, saw: &mut Seen) -> u16 {
    let request = server.client.post(server.url("/v1/jobs")).body(body.to_owned());
    let reply = request.send().expect("an answer");
    if reply.status() == 429 {
        saw.jobs_refused = 1;
        return 0;
    }
    assert_eq!(reply.status(), 202);
    saw.jobs = 1;
    let path = reply.headers()["location"].to_str().expect("a path").to_owned();
    let url = server.url(&path);
    let state = || server.client.get(&url).send().expect("an answer").json::<Value>();
    loop {
        match state().expect("JSON")["state"].as_str() {
            Some("completed") => break,
            Some("queued" | "running") => thread::sleep(Duration::from_millis(10)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(server.client.delete(&url).send().expect("an answer").status(), 204);
    saw.pictures += pictures;
    0
}

/// Sends them all and returns what was seen, with the memory after a quarter and at the end.
fn send(server: &Server, requests: u64) -> (Seen, f64, f64) {
    let (seen, next) = (Mutex::new(Seen::default()), AtomicU64::new(0));
    let resident = || server.metric("process_resident_memory_bytes");
    let warm = Mutex::new(0.0);
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let k = next.fetch_add(1, Ordering::Relaxed);
                    if k == requests / 4 {
                        *warm.lock().expect("unpoisoned") = resident();
                    }
                    if k >= requests {
                        return;
                    }
                    ask(server, k, &seen);
                }
            });
        }
    });
    let began = Instant::now();
    let idle = ["sd_images_waiting", "sd_images_running", "sd_requests_in_flight"];
    while idle.iter().any(|gauge| server.metric(gauge) > 0.0) {
        assert!(began.elapsed() < Duration::from_secs(20), "something is still in flight");
    }
    let (seen, warm) = (*seen.lock().expect("unpoisoned"), *warm.lock().expect("unpoisoned"));
    (seen, warm, resident())
}

#[test]
fn nothing_is_lost_miscounted_or_leaked() {
    let requests = std::env::var("SOAK_REQUESTS").ok().and_then(|text| text.parse().ok());
    let requests: u64 = requests.unwrap_or(240);
    let server = Server::ready(&["--max-queue", "8"]);
    let (seen, warm, end) = send(&server, requests);
    println!("{seen:?}\nresident: {:.1} MB warm, {:.1} MB at the end", warm / 1e6, end / 1e6);
    let counted = |route: &str, outcome: &str| {
        let labels = format!("{{route=\"{route}\",outcome=\"{outcome}\"}}");
        server.metric(&format!("sd_requests_total{labels}")) as u64
    };
    let invocations = |outcome: &str| counted("/invocations", outcome);
    assert_eq!(invocations("malformed"), seen.malformed);
    assert_eq!(invocations("out_of_range"), seen.out_of_range);
    assert_eq!(counted("/v1/jobs", "ok"), seen.jobs);
    assert_eq!(counted("/v1/jobs", "overloaded"), seen.jobs_refused);
    // Some of those who left were answered, or refused, before they did; all are counted.
    let ends = ["ok", "overloaded", "client_closed"].map(invocations);
    println!("ok, overloaded, client_closed: {ends:?}");
    let answered = seen.answered + seen.overloaded;
    assert_eq!(ends.iter().sum::<u64>(), answered + seen.left, "{ends:?} {seen:?}");
    assert!(ends[0] >= seen.answered && ends[1] >= seen.overloaded, "{ends:?} {seen:?}");
    let all = answered + seen.left + seen.malformed + seen.out_of_range;
    assert_eq!(all + seen.jobs + seen.jobs_refused, requests);
    assert_eq!(
        server.metric("sd_request_duration_seconds_count{route=\"/invocations\"}") as u64,
        all
    );

    let pictures =
        |outcome: &str| server.metric(&format!("sd_images_total{{outcome=\"{outcome}\"}}")) as u64;
    let drawn = pictures("completed");
    let most = seen.pictures + seen.left_pictures;
    assert!((seen.pictures..=most).contains(&drawn), "{drawn} {seen:?}");
    assert_eq!(pictures("failed"), 0);
    assert!(pictures("cancelled") <= seen.left_pictures, "{seen:?}");
    let stage = |name: &str| {
        server.metric(&format!("sd_stage_duration_seconds_count{{stage=\"{name}\"}}")) as u64
    };
    assert!((drawn..=drawn + seen.left_pictures).contains(&stage("decode")), "{seen:?}");
    assert_eq!(stage("text_encode"), server.metric("sd_queue_duration_seconds_count") as u64);
    if requests >= 2000 {
        assert!(end <= warm * 1.05, "memory grew from {warm} to {end}");
    }
}
