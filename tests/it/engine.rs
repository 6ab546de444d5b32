//! The engine, and a server around it, with a fake model: what no real model does on command.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use sd_models::{Size, Spec};
use sd_server::engine::{DeviceScheduler, Engine, EngineConfig, EngineState, Job, JobError};
use sd_server::http;
use sd_server::registry::ModelRegistry;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::fake::{ENGINE, Fake, HTTP, Strings, spec, wait_until};
use crate::harness;
use crate::overload::here;

pub(crate) async fn ready() -> (Engine, Strings) {
    let (fake, strings) = Fake::new();
    let engine = Engine::start(ENGINE, || Ok(fake)).expect("a thread");
    engine.ready().await.expect("it loads");
    (engine, strings)
}

/// A server in this process.
pub(crate) struct Server {
    pub(crate) url: String,
    shutdown: Option<oneshot::Sender<()>>,
    pub(crate) ended: JoinHandle<Result<()>>,
}

impl Server {
    pub(crate) async fn start(
        models: impl Into<ModelRegistry>,
        settings: http::HttpConfig,
        drain: Duration,
    ) -> Self {
        let models = models.into();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (shutdown, stop) = oneshot::channel::<()>();
        let stop = async move { drop(stop.await) };
        let ended = tokio::spawn(sd_server::server::serve(models, settings, listener, drain, stop));
        Self { url, shutdown: Some(shutdown), ended }
    }

    /// What SIGTERM does.
    pub(crate) fn stop(&mut self) {
        self.shutdown.take().expect("only once").send(()).expect("it serves");
    }

    /// How it ended.
    pub(crate) async fn ended(self) -> Result<()> {
        self.ended.await?
    }

    async fn ping(&self) -> u16 {
        let reply = reqwest::get(format!("{}/ping", self.url)).await;
        reply.map_or(0, |reply| reply.status().as_u16())
    }

    /// Status and error code of a request for a picture.
    pub(crate) fn draw(&self, prompt: &str, rest: &str) -> JoinHandle<(u16, String)> {
        let body = format!(r#"{{"prompt":"{prompt}"{rest}}}"#);
        let request = reqwest::Client::new().post(format!("{}/invocations", self.url)).body(body);
        tokio::spawn(async move {
            let reply = request.send().await.expect("an answer");
            let status = reply.status().as_u16();
            let json: serde_json::Value = reply.json().await.expect("JSON");
            (status, json["error"]["code"].as_str().unwrap_or("").to_owned())
        })
    }
}

pub(crate) const LONG: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn while_loading_everything_is_503() -> Result<()> {
    let (fake, strings) = Fake::new();
    let (loaded, wait) = std::sync::mpsc::channel::<()>();
    let load = move || {
        let _ = wait.recv();
        Ok(fake)
    };
    let engine = Engine::start(ENGINE, load)?;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    assert_eq!(server.ping().await, 503);
    assert_eq!(server.draw("a cat", "").await?, (503, "loading".into()));
    loaded.send(())?;
    engine.ready().await?;
    assert_eq!(server.ping().await, 200);
    drop(strings.permits);
    assert_eq!(server.draw("a cat", "").await?.0, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_load_ends_the_server() -> Result<()> {
    let load = || -> Result<Fake> { anyhow::bail!("unet/config.json is missing") };
    let server = Server::start(Engine::start(ENGINE, load)?, HTTP, LONG).await;
    let error = server.ended.await?.expect_err("it cannot serve");
    assert!(error.to_string().contains("unet/config.json"), "{error:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_model_is_answered_and_ends_the_server() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let drawing = server.draw("panic", "");
    wait_until(|| gauges(&engine) == (1, 0));
    let waiting = server.draw("a dog", r#","n":2"#);
    wait_until(|| gauges(&engine) == (1, 2));
    strings.permits.send(())?;
    for request in [drawing, waiting] {
        assert_eq!(request.await?, (500, "model_failed".into()));
    }
    assert!(matches!(engine.state(), EngineState::Dead(_)));
    assert_eq!(engine.submit(vec![spec(1, 1)]).err(), Some(JobError::Model));
    assert!(server.ended.await?.expect_err("it is dead").to_string().contains("panicked"));
    Ok(())
}

/// The number of images that have left the queue so far, and of those that wait.
fn gauges(engine: &Engine) -> (usize, usize) {
    engine.gauge();
    let text = engine.metrics().to_string();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    (value("sd_queue_duration_seconds_count"), value("sd_images_waiting"))
}

/// Says that this process is the child of the test below.
const CHILD: &str = "SD_TEST_CHILD";

/// A server as a process of its own, around a model that panics when a prompt asks for it. Only
/// the test below asks for it; otherwise this is nothing.
#[test]
fn a_child_whose_model_panics() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let served = runtime.block_on(async {
        let (mut fake, strings) = Fake::new();
        fake.pace = Duration::from_secs(1);
        drop(strings.permits);
        let engine = Engine::start(ENGINE, || Ok(fake))?;
        engine.ready().await?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("\nlistening on http://{}", listener.local_addr()?);
        sd_server::server::serve(engine, HTTP, listener, LONG, std::future::pending()).await
    });
    // As `main` does.
    std::process::exit(i32::from(served.is_err()));
}

#[test]
fn a_panic_of_the_model_ends_the_process_when_everyone_has_an_answer() {
    let mut child = Command::new(std::env::current_exe().expect("this test"));
    child.args(["--exact", "engine::a_child_whose_model_panics", "--nocapture"]).env(CHILD, "1");
    let server = harness::Server::spawn_as_is(&mut child);
    std::thread::scope(|scope| {
        // More than have a row each: whichever comes first, some are drawn and some wait.
        let waiting = ["panic"; 4].map(|prompt| {
            let body = serde_json::json!({ "prompt": prompt, "steps": 2 });
            let server = &server;
            scope.spawn(move || server.json(&body))
        });
        for reply in waiting {
            let reply = reply.join().expect("an answer");
            assert_eq!((reply.status, reply.error().0.as_str()), (500, "model_failed"));
        }
    });
    assert_eq!(server.ping(), 503, "before it is gone");
    assert_eq!(server.json(&serde_json::json!({ "prompt": "a cat" })).status, 500);
    assert_eq!(server.wait().code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_turns_ping_red() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let drawing = server.draw("device lost", "");
    wait_until(|| gauges(&engine) == (1, 0));
    let waiting = server.draw("a cat", "");
    wait_until(|| gauges(&engine) == (1, 1));
    strings.permits.send(())?;
    for request in [drawing, waiting] {
        assert_eq!(request.await?, (500, "device_lost".into()));
    }
    assert_eq!(server.ping().await, 503);
    assert_eq!(server.draw("a cat", "").await?, (500, "device_lost".into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory_is_507_and_the_next_picture_works() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    drop(strings.permits);
    assert_eq!(server.draw("out of memory", "").await?, (507, "out_of_memory".into()));
    assert_eq!(server.draw("a cat", "").await?.0, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_finishes_what_was_accepted() -> Result<()> {
    let (engine, strings) = ready().await;
    let mut server = Server::start(engine.clone(), HTTP, LONG).await;
    let accepted = server.draw("a cat", "");
    strings.step();
    server.stop();
    wait_until(|| matches!(engine.state(), EngineState::Draining));
    assert_eq!(engine.submit(vec![spec(1, 1)]).err(), Some(JobError::Stopping));
    assert_eq!(server.ping().await, 503);
    assert_eq!(server.draw("a dog", "").await?, (503, "shutting_down".into()));
    drop(strings.permits);
    assert_eq!(accepted.await?.0, 200);
    server.ended.await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_finished_before_the_end_and_told_to_those_who_ask() -> Result<()> {
    let (engine, strings) = ready().await;
    let mut server = Server::start(engine.clone(), HTTP, LONG).await;
    let client = reqwest::Client::new();
    let request = client.post(format!("{}/v1/jobs", server.url)).body(r#"{"prompt":"a cat"}"#);
    let reply = request.send().await?;
    let path = reply.headers()["location"].to_str()?.to_owned();
    strings.step();
    server.stop();
    wait_until(|| matches!(engine.state(), EngineState::Draining));
    let state = client.get(format!("{}{path}", server.url)).send().await?;
    assert!(state.text().await?.contains("running"));
    drop(strings.permits);
    server.ended.await??;
    assert!(engine.metrics().to_string().contains("sd_images_total{outcome=\"completed\"} 1"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_in_the_drain_timeout_is_503() -> Result<()> {
    let (engine, strings) = ready().await;
    let mut server = Server::start(engine, HTTP, Duration::from_millis(50)).await;
    let accepted = server.draw("a cat", "");
    strings.step();
    server.stop();
    assert_eq!(accepted.await?, (503, "shutting_down".into()));
    server.ended.await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_picture_is_504_and_its_rows_are_freed() -> Result<()> {
    let (engine, strings) = ready().await;
    let settings = http::HttpConfig { request_timeout: Duration::from_millis(100), ..HTTP };
    let server = Server::start(engine.clone(), settings, LONG).await;
    assert_eq!(server.draw("a cat", r#","seed":1"#).await?, (504, "deadline_exceeded".into()));
    let next = engine.submit(vec![spec(2, 2)])?;
    strings.step(); // The step that the late picture was waiting for.
    strings.step();
    assert_eq!(strings.last(), [2]);
    drop(strings.permits);
    assert_eq!(next.wait().await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_join_and_leave_between_steps() -> Result<()> {
    let (engine, strings) = ready().await;
    let long = engine.submit(vec![spec(1, 5)])?;
    strings.step();
    assert_eq!(strings.last(), [1]);
    let short = engine.submit(vec![spec(2, 1)])?;
    let gone = engine.submit(vec![spec(3, 100)])?;
    strings.step(); // Was already waiting for its permit when the others came.
    strings.step();
    assert_eq!(strings.last(), [1, 2], "four rows hold two pictures with guidance");
    assert_eq!(short.wait().await?.len(), 1);
    wait_until(|| gone.progress().borrow().total > 0);
    drop(gone);
    strings.step();
    assert_eq!(strings.last(), [1, 3], "this step had begun");
    strings.step();
    assert_eq!(strings.last(), [1]);
    assert_eq!(long.wait().await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_equal_sizes_share_a_step() -> Result<()> {
    let (engine, strings) = ready().await;
    let wide = Spec { size: Size::new(128, 64).expect("multiples"), ..spec(9, 3) };
    let tickets = [vec![spec(1, 3)], vec![wide], vec![spec(2, 3)]];
    let tickets = tickets.map(|specs| engine.submit(specs).expect("room"));
    drop(strings.permits);
    for ticket in tickets {
        ticket.wait().await?;
    }
    let steps = strings.steps.lock().expect("unpoisoned");
    assert!(steps.iter().all(|seeds| seeds == &[9] || !seeds.contains(&9)), "{steps:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_429_and_takes_jobs_whole() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let drawing = engine.submit(vec![spec(1, 1), spec(2, 1)])?;
    wait_until(|| drawing.progress().borrow().total == 2);
    let specs = (3..6).map(|seed| spec(seed, 1)).collect::<Vec<_>>();
    let waiting = engine.submit(Job { client: here(), ..Job::from(specs) })?;
    assert_eq!(server.draw("a cat", r#","n":2"#).await?, (429, "overloaded".into()));
    let last = server.draw("a cat", r#","n":1"#);
    drop(strings.permits);
    assert_eq!(last.await?.0, 200);
    assert_eq!(drawing.wait().await?.len(), 2);
    let pictures = waiting.wait().await?;
    let seeds: Vec<_> = pictures.iter().map(|picture| picture.rgb.data[0]).collect();
    assert_eq!(seeds, [3, 4, 5], "in the order of the specs");
    Ok(())
}

/// An engine that loads this many fakes, and counts those it has loaded.
fn reloading(
    fakes: Vec<Result<Fake>>,
    unload_after: Option<Duration>,
) -> Result<(Engine, Arc<AtomicUsize>)> {
    let loads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&loads);
    let mut fakes = fakes.into_iter();
    let load = move || {
        counted.fetch_add(1, Ordering::SeqCst);
        fakes.next().context("no fake is left")?
    };
    let settings = EngineConfig { unload_after, ..ENGINE };
    let engine = Engine::start_reloading(&DeviceScheduler::default(), settings, load)?;
    Ok((engine, loads))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unloaded_model_is_loaded_for_the_next_image() -> Result<()> {
    let [(first, strings), (mut second, _)] = [Fake::new(), Fake::new()];
    second.info.name = "another".into();
    let (engine, loads) = reloading(vec![Ok(first), Ok(second)], None)?;
    engine.ready().await?;
    let running = engine.submit(vec![spec(1, 1)])?;
    let unloading = {
        let engine = engine.clone();
        tokio::spawn(async move { engine.unload().await })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(engine.is_loaded() && !unloading.is_finished(), "an image is being generated");
    drop(strings.permits);
    assert_eq!(running.wait().await?.len(), 1);
    unloading.await?;
    assert!(!engine.is_loaded());
    assert_eq!(engine.model()?.name, "fake", "requests are checked by what is known of it");
    engine.unload().await;
    assert_eq!(loads.load(Ordering::SeqCst), 1);
    assert_eq!(engine.submit(vec![spec(2, 1)])?.wait().await?.len(), 1);
    assert!(engine.is_loaded());
    assert_eq!((engine.model()?.name.as_str(), loads.load(Ordering::SeqCst)), ("another", 2));
    engine.reload().await?;
    assert_eq!(loads.load(Ordering::SeqCst), 2, "it is loaded");
    engine.retire(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_load_again_fails_what_waits_and_is_tried_again() -> Result<()> {
    let (first, _) = Fake::new();
    let (third, _) = Fake::new();
    let broken = || Err(anyhow::anyhow!("the disk is gone"));
    let (engine, loads) = reloading(vec![Ok(first), broken(), broken(), Ok(third)], None)?;
    engine.ready().await?;
    engine.unload().await;
    assert_eq!(engine.reload().await, Err(JobError::Unloaded));
    assert_eq!(engine.submit(vec![spec(1, 1)])?.wait().await.err(), Some(JobError::Unloaded));
    assert!(!engine.is_loaded());
    assert_eq!(engine.submit(vec![spec(1, 1)])?.wait().await?.len(), 1);
    assert_eq!(loads.load(Ordering::SeqCst), 4);
    engine.unload().await;
    engine.retire(Duration::from_secs(5)).await;
    assert!(engine.submit(vec![spec(1, 1)]).is_err(), "drained without a model");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_model_from_loading_again_is_named() -> Result<()> {
    let (first, _) = Fake::new();
    let full = sd_models::Error::OutOfMemory("weights".into());
    let lost = sd_models::Error::DeviceLost("unplugged".into());
    let (engine, _) = reloading(vec![Ok(first), Err(full.into()), Err(lost.into())], None)?;
    engine.ready().await?;
    engine.unload().await;
    assert_eq!(engine.submit(vec![spec(1, 1)])?.wait().await.err(), Some(JobError::NoRoom));
    assert_eq!(engine.reload().await, Err(JobError::DeviceLost));
    assert_eq!(engine.reload().await, Err(JobError::DeviceLost), "at once");
    let absent = Engine::absent(&DeviceScheduler::default(), ENGINE);
    assert_eq!(absent.reload().await, Err(JobError::Absent));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_model_is_unloaded_after_a_while() -> Result<()> {
    let fakes = (0..5).map(|_| Ok(Fake::new().0)).collect();
    let (engine, loads) = reloading(fakes, Some(Duration::from_millis(30)))?;
    engine.ready().await?;
    for round in 1..3 {
        while engine.is_loaded() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(loads.load(Ordering::SeqCst), round);
        assert_eq!(engine.submit(vec![spec(1, 1)])?.wait().await?.len(), 1);
    }
    engine.unload().await;
    engine.reload().await?;
    Ok(())
}
