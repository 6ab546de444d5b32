//! Too much, too late, too large: what is refused, with which advice, and that the rest goes on.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::Result;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::{MemoryEstimate, Size, Spec};
use sd_server::engine::{Client, Engine, EngineConfig, Job, JobError};
use sd_server::http;

use crate::engine::{LONG, Server, ready};
use crate::fake::{ENGINE, Fake, HTTP, spec, wait_until};

/// The client that this host is.
pub(crate) fn here() -> Client {
    Client::at(std::net::Ipv4Addr::LOCALHOST.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_predicted_from_the_measured_speed() -> Result<()> {
    let (mut fake, strings) = Fake::new();
    fake.pace = Duration::from_millis(20);
    drop(strings);
    let engine = Engine::start(ENGINE, || Ok(fake))?;
    engine.ready().await?;
    engine.submit(vec![spec(0, 20), spec(0, 20)])?.wait().await?;
    let drawing = engine.submit(vec![spec(1, 1000), spec(2, 1000)])?;
    let _waiting = {
        wait_until(|| drawing.progress().borrow().started == 2);
        let specs = (3..7).map(|seed| spec(seed, 1000)).collect::<Vec<_>>();
        engine.submit(Job { client: here(), ..Job::from(specs) })?
    };
    // Six pictures of 1000 steps of 20 ms, two at a time, are 60 s; room for one after a sixth.
    let one_more = Job { client: here(), ..Job::from(vec![spec(8, 1)]) };
    let Err(JobError::Full { retry_after_s }) = engine.submit(one_more) else {
        panic!("the queue is full")
    };
    assert!((8..40).contains(&retry_after_s), "{retry_after_s}");
    let server = Server::start(engine.clone(), HTTP, Duration::ZERO).await;
    let request = reqwest::Client::new().post(format!("{}/invocations", server.url));
    let reply = request.body(r#"{"prompt":"a cat"}"#).send().await?;
    assert_eq!(reply.status(), 429);
    let header: u64 = reply.headers()["retry-after"].to_str()?.parse()?;
    assert!(header.abs_diff(retry_after_s) <= retry_after_s / 2, "{header} {retry_after_s}");
    assert!(reply.text().await?.contains("--max-queue"));
    engine.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_cannot_keep_others_out() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let drawing = engine.submit(vec![spec(1, 1), spec(2, 1)])?;
    wait_until(|| drawing.progress().borrow().started == 2);
    let greedy = engine.submit(vec![spec(3, 1)])?;
    let newest = engine.submit((4..7).map(|seed| spec(seed, 1)).collect::<Vec<_>>())?;
    let newcomer = server.draw("a cat", r#","n":1"#);
    assert!(matches!(newest.wait().await, Err(JobError::Full { .. })), "it made room");
    drop(strings.permits);
    assert_eq!(newcomer.await?.0, 200);
    assert_eq!((drawing.wait().await?.len(), greedy.wait().await?.len()), (2, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn input_images_are_weighed_until_they_are_generated_from() -> Result<()> {
    const BYTES: usize = 64 * 64 * 4;
    let (engine, strings) = ready().await;
    let settings = http::HttpConfig { max_decoded_bytes: 3 * BYTES, ..HTTP };
    let server = Server::start(engine.clone(), settings, LONG).await;
    let mut file = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(8, 8).write_to(&mut file, image::ImageFormat::Png)?;
    let file = BASE64_STANDARD.encode(file.into_inner());
    let rest = format!(r#","width":64,"height":64,"image":"{file}""#);
    let held: Vec<_> = (0..3).map(|_| server.draw("a cat", &rest)).collect();
    // In the queue, or begun since.
    wait_until(|| {
        engine.gauge();
        let metrics = engine.metrics().to_string();
        let count = |name: &str| -> Option<u64> {
            metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        count("sd_images_waiting ")
            .zip(count("sd_queue_duration_seconds_count "))
            .is_some_and(|(waiting, begun)| waiting + begun == 3)
    });
    let body = format!(r#"{{"prompt":"a cat"{rest}}}"#);
    let post = |body: &str, media: &str| {
        let post = reqwest::Client::new().post(format!("{}/invocations", server.url));
        post.header("content-type", media).body(body.to_owned()).send()
    };
    let refused = post(&body, "application/json").await?;
    assert_eq!(refused.status(), 429);
    assert!(refused.text().await?.contains("--max-decoded-bytes"));
    // Records wait for room.
    let records = tokio::spawn(post(&[&*body; 6].join("\n"), "application/jsonlines"));
    drop(strings.permits);
    for reply in held {
        assert_eq!(reply.await?, (200, String::new()));
    }
    let records = records.await??.text().await?;
    assert_eq!(records.matches("\"data\":").count(), 6, "{records}");
    assert_eq!(post(&body, "application/json").await?.status(), 200, "it is given back");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_does_not_fit_shrinks_and_everyone_is_drawn() -> Result<()> {
    let (mut fake, strings) = Fake::new();
    fake.capacity = 5;
    let settings = EngineConfig { max_batch_rows: 16, max_queue: 16, ..ENGINE };
    let engine = Engine::start(settings, || Ok(fake))?;
    engine.ready().await?;
    let job = engine.submit((1..7).map(|seed| spec(seed, 3)).collect::<Vec<_>>())?;
    let broken = Spec { prompt: "out of memory".into(), ..spec(9, 3) };
    let broken = engine.submit(vec![broken])?;
    drop(strings.permits);
    assert_eq!(job.wait().await?.len(), 6);
    assert_eq!(broken.wait().await.err(), Some(JobError::OutOfMemory));
    let steps = strings.steps.lock().expect("unpoisoned").clone();
    let of = |seed| steps.iter().filter(|step| step.contains(&seed)).count();
    assert!((1..7).all(|seed| of(seed) == 3), "each has made its steps, and once: {steps:?}");
    assert!(engine.metrics().to_string().contains("sd_batch_oom_retries_total "));
    assert_eq!(engine.submit(vec![spec(1, 1)])?.wait().await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_budget_bounds_rows_and_refuses_what_can_never_fit() -> Result<()> {
    let (mut fake, strings) = Fake::new();
    // A row of 64x64 takes 6400 bytes.
    fake.info.memory = MemoryEstimate { row_bytes: 100, scale: 8, ..MemoryEstimate::default() };
    let settings = EngineConfig { max_batch_rows: 16, memory_budget_bytes: Some(26_000), ..ENGINE };
    let engine = Engine::start(settings, || Ok(fake))?;
    engine.ready().await?;
    let large = Spec { size: Size::new(128, 128).expect("multiples"), ..spec(7, 1) };
    assert_eq!(engine.submit(vec![large.clone()]).err(), Some(JobError::OutOfMemory));
    let without_guidance = Spec { guidance_scale: 1.0, ..large };
    let alone = engine.submit(vec![without_guidance])?;
    let three = engine.submit((1..4).map(|seed| spec(seed, 2)).collect::<Vec<_>>())?;
    drop(strings.permits);
    alone.wait().await?;
    three.wait().await?;
    let steps = strings.steps.lock().expect("unpoisoned").clone();
    assert!(steps.iter().all(|step| step.len() <= 2), "{steps:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_may_ask_for_less_time_but_not_for_more() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = http::HttpConfig { request_timeout: Duration::from_secs(1), ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let post = async |timeout: &str| -> Result<(u16, Duration)> {
        let request = reqwest::Client::new().post(format!("{}/invocations", server.url));
        let request = request.header("x-request-timeout-ms", timeout).body("a cat");
        let began = Instant::now();
        let reply = request.header("content-type", "text/plain").send().await?;
        Ok((reply.status().as_u16(), began.elapsed()))
    };
    let (status, took) = post("20").await?;
    assert_eq!(status, 504);
    assert!(took < Duration::from_millis(900), "{took:?}");
    assert_eq!(post("3600000").await?.0, 504);
    for nonsense in ["0", "-1", "soon", "1.5", ""] {
        assert_eq!(post(nonsense).await?.0, 400, "{nonsense:?}");
    }
    drop(strings);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_counted_and_silent_ones_are_closed() -> Result<()> {
    let (engine, _strings) = ready().await;
    let settings =
        http::HttpConfig { idle_timeout: Duration::from_millis(300), max_connections: 2, ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let address = server.url.replace("http://", "");
    let closed = tokio::task::spawn_blocking(move || -> Result<bool> {
        let connect = || -> Result<TcpStream> {
            let stream = TcpStream::connect(&address)?;
            stream.set_read_timeout(Some(LONG))?;
            Ok(stream)
        };
        let (mut silent, mut slow, mut third) = (connect()?, connect()?, connect()?);
        slow.write_all(b"GET /ping HT")?;
        third.write_all(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        // The third is served when one of the others has been closed.
        let mut reply = String::new();
        third.read_to_string(&mut reply)?;
        anyhow::ensure!(reply.starts_with("HTTP/1.1 200"), "{reply}");
        Ok(silent.read(&mut [0; 9])? == 0 && slow.read(&mut [0; 9])? == 0)
    });
    assert!(closed.await??, "without an answer");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_may_last_longer_than_an_answer() -> Result<()> {
    let (engine, strings) = ready().await;
    let request_timeout = Duration::from_millis(200);
    let settings = http::HttpConfig { request_timeout, ..HTTP };
    let server = Server::start(engine, settings, LONG).await;
    let client = reqwest::Client::new();
    let stream =
        client.post(format!("{}/invocations", server.url)).body(r#"{"prompt":"a","stream":true}"#);
    let stream = tokio::spawn(async move { stream.send().await?.text().await });
    assert_eq!(server.draw("a cat", "").await?, (504, "deadline_exceeded".into()));
    drop(strings.permits);
    let events = stream.await??;
    assert!(events.contains("event: result"), "{events}");
    Ok(())
}
