//! Many requests of every kind, with clients that leave: no picture is lost, the server's count
//! agrees with its clients', and its memory does not grow. A few hundred requests here; all of it:
//!
//!     SOAK_REQUESTS=5000 cargo test --release --test it soak -- --nocapture

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::Server;

const CLIENTS: u64 = 6;

/// What the clients saw.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    drawn: u64,
    pictures: u64,
    malformed: u64,
    out_of_range: u64,
    overloaded: u64,
    left: u64,
}

/// One request, of a kind that its number chooses.
fn ask(server: &Server, k: u64, seen: &Mutex<Seen>) {
    // Knuth's multiplier scatters neighbours.
    let roll = (k.wrapping_mul(2_654_435_761) >> 7) % 20;
    let side = [64, 64, 96][(k % 3) as usize];
    let guidance = [1.0, 7.5][(k % 2) as usize];
    let schedulers = ["euler", "euler_a", "ddim", "pndm", "heun"];
    let body = json!({
        "prompt": if k.is_multiple_of(2) { "a red house" } else { "a blue car" }, "seed": k,
        "steps": 1 + k % 4, "width": side, "height": 64, "n": 1 + k % 2,
        "guidance_scale": guidance,
        "scheduler": schedulers[(k % 5) as usize], "stream": roll == 5,
    });
    let body = match roll {
        0 => "{\"prompt\":".to_owned(),
        1 => json!({ "prompt": "x", "steps": 0 }).to_string(),
        _ => body.to_string(),
    };
    if (2..5).contains(&roll) {
        leave(server, &body, k % 30);
        seen.lock().expect("unpoisoned").left += 1;
        return;
    }
    let status = server.post(&["content-type: application/json"], body).status;
    let mut seen = seen.lock().expect("unpoisoned");
    match status {
        200 => {
            seen.drawn += 1;
            seen.pictures += 1 + k % 2;
        }
        400 => seen.malformed += 1,
        422 => seen.out_of_range += 1,
        429 => seen.overloaded += 1,
        other => panic!("{other} for request {k}"),
    }
}

/// Asks and hangs up.
fn leave(server: &Server, body: &str, after_ms: u64) {
    let mut stream = TcpStream::connect(&server.address).expect("it listens");
    let length = body.len();
    let head = format!("POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).expect("it reads");
    thread::sleep(Duration::from_millis(after_ms));
}

fn metric(server: &Server, series: &str) -> f64 {
    let reply = server.client.get(server.url("/metrics")).send().expect("an answer");
    let text = reply.text().expect("text");
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().expect("a number"))
}

#[test]
fn nothing_is_lost_miscounted_or_leaked() {
    let requests = std::env::var("SOAK_REQUESTS").ok().and_then(|text| text.parse().ok());
    let requests: u64 = requests.unwrap_or(240);
    let server = Server::ready(&["--max-queue", "8"]);
    let (seen, next) = (Mutex::new(Seen::default()), AtomicU64::new(0));
    let resident = || metric(&server, "sd_host_resident_bytes");
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
                    ask(&server, k, &seen);
                }
            });
        }
    });
    let began = Instant::now();
    let idle = ["sd_pictures_waiting", "sd_pictures_drawing", "sd_requests_in_service"];
    while idle.iter().any(|gauge| metric(&server, gauge) > 0.0) {
        assert!(began.elapsed() < Duration::from_secs(20), "something is still in service");
    }
    let seen = *seen.lock().expect("unpoisoned");
    let (warm, end) = (*warm.lock().expect("unpoisoned"), resident());
    println!("{seen:?}\nresident: {:.1} MB warm, {:.1} MB at the end", warm / 1e6, end / 1e6);
    let counted = |outcome: &str| {
        metric(
            &server,
            &format!("sd_requests_total{{route=\"/invocations\",outcome=\"{outcome}\"}}"),
        )
    };
    assert_eq!(counted("malformed"), seen.malformed as f64);
    assert_eq!(counted("out_of_range"), seen.out_of_range as f64);
    // Some of those who left were answered, or refused, before they did; and some left before
    // anybody saw their request.
    let (left, gone) = (seen.left as f64, counted("gone"));
    let (drawn, refused) = (counted("ok"), counted("overloaded"));
    let answered = seen.drawn as f64;
    assert!((answered..=answered + left).contains(&drawn), "{drawn} {seen:?}");
    let most = answered + seen.overloaded as f64 + left;
    let total = drawn + refused + gone;
    assert!((most - left / 10.0..=most).contains(&total), "{drawn} {refused} {gone} {seen:?}");
    let pictures = metric(&server, "sd_pictures_total{outcome=\"drawn\"}");
    assert!(pictures >= seen.pictures as f64, "{pictures} {seen:?}");
    assert_eq!(metric(&server, "sd_pictures_total{outcome=\"failed\"}"), 0.0);
    if requests >= 2000 {
        assert!(end <= warm * 1.05, "memory grew from {warm} to {end}");
    }
}
