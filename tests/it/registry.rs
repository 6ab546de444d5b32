//! The registry of models with fake models: room, eviction, deadlines, and one device for all.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_models::Spec;
use sd_server::engine::{EngineState, Job, JobError};
use sd_server::registry::{ModelLoader as _, ModelRegistry, RegistryError};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::engine;
use crate::fake::{HTTP, spec, wait_until};
use crate::harness::PATIENCE;
use crate::shelf::{Shelf, TURN, shelf, unloading};

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn names(models: &ModelRegistry) -> Vec<String> {
    models.loaded().into_iter().map(|model| model.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_loaded_while_there_is_room() {
    let (models, shelf) = shelf(None);
    assert!(matches!(models.state(), EngineState::Absent));
    assert_eq!(models.default_engine().submit(vec![spec(1, 1)]).err(), Some(JobError::Absent));
    assert_eq!(models.load("a", "/60".into()).await, Ok(()));
    assert_eq!(models.load("a", "/1".into()).await, Err(RegistryError::Loaded("a".into())));
    let full = models.load("b", "/41".into()).await.expect_err("no room");
    assert!(matches!(full, RegistryError::NoRoom(_)));
    assert!(full.to_string().contains("within --models-memory-bytes; unload another"), "{full}");
    assert_eq!(models.load("b", "/40".into()).await, Ok(()));
    assert!(matches!(models.load("c", "/broken".into()).await, Err(RegistryError::Damaged(_))));
    assert_eq!(models.unload("a").await, Ok(()));
    assert_eq!(shelf.alive.load(Ordering::SeqCst), 1, "the memory is free when it returns");
    assert_eq!(models.unload("a").await, Err(RegistryError::Unknown("a".into())));
    assert!(matches!(models.load("d", "/13".into()).await, Err(RegistryError::NoRoom(_))));
    assert_eq!(names(&models), ["b"]);
    for name in ["e", "f"] {
        assert_eq!(models.load(name, "/1".into()).await, Ok(()));
    }
    assert!(matches!(models.load("g", "/1".into()).await, Err(RegistryError::NoRoom(_))));
}

/// The server looks for them.
#[tokio::test(flavor = "multi_thread")]
async fn models_that_nobody_uses_are_unloaded() {
    let folder = tempfile::tempdir().expect("a directory");
    for name in ["1", "2"] {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).expect("a directory");
        std::fs::write(path.join("model_index.json"), "{}").expect("a file");
    }
    let (models, shelf) = unloading(Some(folder.path()), Some(Duration::from_millis(150)));
    let server = engine::Server::start(models.clone(), HTTP, engine::LONG).await;
    drop(models.choose("1", soon()).await.expect("room"));
    let used = models.choose("2", soon()).await.expect("room");
    wait_until(|| names(&models) == ["2"] && shelf.alive.load(Ordering::SeqCst) == 1);
    drop(used);
    wait_until(|| names(&models).is_empty() && shelf.alive.load(Ordering::SeqCst) == 0);
    drop(models.choose("1", soon()).await.expect("it is loaded again"));
    assert_eq!(shelf.starts.load(Ordering::SeqCst), 3);
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn unloading_finishes_what_was_accepted() {
    let (models, shelf) = shelf(None);
    models.load("a", "/1".into()).await.expect("room");
    let engine = models.get("a").expect("it is there").engine;
    let ticket = engine.submit(vec![spec(1, 20)]).expect("room");
    models.unload("a").await.expect("it was there");
    assert_eq!(shelf.alive.load(Ordering::SeqCst), 0);
    assert_eq!(ticket.wait().await.expect("finished").len(), 1);
    assert_eq!(engine.submit(vec![spec(1, 1)]).err(), Some(JobError::Stopping));
}

#[tokio::test(flavor = "multi_thread")]
async fn unloading_lets_in_who_has_chosen_the_model() {
    let (models, shelf) = shelf(None);
    models.load("a", "/1".into()).await.expect("room");
    let chosen = models.get("a").expect("it is there");
    let unloaded = tokio::spawn({
        let models = models.clone();
        async move { models.unload("a").await }
    });
    while models.get("a").is_ok() {
        tokio::task::yield_now().await;
    }
    let ticket = chosen.engine.submit(vec![spec(1, 2)]).expect("it is still there");
    drop(chosen);
    assert_eq!(ticket.wait().await.expect("finished").len(), 1);
    assert_eq!(unloaded.await.expect("no panic"), Ok(()));
    assert_eq!(shelf.alive.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_used_longest_ago_makes_room() {
    let folder = folder(&["50", "49", "48", "101"]);
    std::fs::create_dir(folder.path().join("7")).expect("a directory that is no model");
    let (models, shelf) = shelf(Some(folder.path()));
    assert_eq!(models.names().await, ["101", "48", "49", "50"]);
    for name in ["50", "49", "50", "48"] {
        let engine = models.choose(name, soon()).await.expect("it loads").engine;
        assert_eq!(engine.submit(vec![spec(1, 1)]).expect("room").wait().await.map(drop), Ok(()));
    }
    assert_eq!(names(&models), ["50", "48"], "49 went");
    let both = tokio::join!(models.choose("49", soon()), models.choose("49", soon()));
    assert!(both.0.is_ok() && both.1.is_ok(), "loaded once for two who ask");
    drop(both);
    assert_eq!(shelf.alive.load(Ordering::SeqCst), 2);
    for unknown in ["7", "../50", "", "nobody"] {
        assert!(
            matches!(models.choose(unknown, soon()).await, Err(RegistryError::Unknown(_))),
            "{unknown}"
        );
    }
    assert!(
        matches!(models.choose("101", soon()).await, Err(RegistryError::NoRoom(_))),
        "it never fits"
    );
    assert_eq!(names(&models), ["48", "49"], "nobody goes in vain");
}

/// A directory of models that take as many bytes as their names say.
fn folder(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a directory");
    for name in names {
        let model = folder.path().join(name);
        std::fs::create_dir(&model).expect("a directory");
        std::fs::write(model.join("model_index.json"), "{}").expect("a file");
    }
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_model_is_not_evicted() {
    let folder = folder(&["50", "49", "48"]);
    let (models, shelf) = shelf(Some(folder.path()));
    let busy = models.choose("50", soon()).await.expect("room").engine;
    let ticket = busy.submit(vec![spec(1, 400)]).expect("room");
    models.choose("49", soon()).await.expect("room");
    models.choose("48", soon()).await.expect("49 makes room");
    assert_eq!(names(&models), ["50", "48"], "not the least recently used one, which is busy");
    let leased = models.get("48").expect("it is there");
    let now = Instant::now();
    let refused = models.choose("49", now + Duration::from_millis(50)).await.map(drop);
    assert!(matches!(refused, Err(RegistryError::Busy { .. })), "{refused:?}");
    assert_eq!(shelf.starts.load(Ordering::SeqCst), 3, "nothing was evicted in vain");
    // Loaded models can be selected again when the newcomer has left.
    models.choose("50", soon()).await.expect("it is there");
    drop(leased);
    models.choose("49", soon()).await.expect("48 makes room");
    assert_eq!(ticket.wait().await.expect("finished").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_gets_in_although_another_model_is_always_in_use() {
    let folder = folder(&["90", "80"]);
    let (models, _shelf) = shelf(Some(folder.path()));
    models.choose("90", soon()).await.expect("room");
    let got_in = Arc::new(AtomicBool::new(false));
    let users: Vec<_> = (0..3)
        .map(|_| {
            let (models, stop) = (models.clone(), Arc::clone(&got_in));
            tokio::spawn(async move {
                let mut drawn = 0;
                while drawn < 40 || !stop.load(Ordering::SeqCst) {
                    let lease = models.choose("90", soon()).await.expect("it is loaded again");
                    let ticket = lease.engine.submit(vec![spec(1, 1)]).expect("room");
                    drawn += ticket.wait().await.expect("accepted, so it is finished").len();
                }
            })
        })
        .collect();
    for _ in 0..2 {
        let lease = models.choose("80", soon()).await.expect("it gets its turn");
        let ticket = lease.engine.submit(vec![spec(2, 1)]).expect("room");
        assert_eq!(ticket.wait().await.expect("finished").len(), 1);
    }
    got_in.store(true, Ordering::SeqCst);
    for user in users {
        user.await.expect("all were drawn");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_wait_for_another_model_keep_nobody_off_a_loaded_one() {
    let folder = folder(&["90", "80"]);
    let (models, _shelf) = shelf(Some(folder.path()));
    let busy = models.choose("90", soon()).await.expect("room");
    // At any time one of them waits, as of a client that asks again and again.
    let waiting: Vec<_> = [0, 1, 2]
        .into_iter()
        .map(|place| {
            let models = models.clone();
            tokio::spawn(async move {
                tokio::time::sleep(TURN / 3 * place).await;
                loop {
                    let refused = models.choose("80", Instant::now() + TURN).await;
                    assert!(refused.is_err(), "the other is busy");
                }
            })
        })
        .collect();
    let (mut open, mut closed) = (0, 0);
    let end = soon();
    while open < 3 || closed < 3 {
        assert!(Instant::now() < end, "{open} times open, {closed} times closed");
        let asked = models.choose("90", Instant::now() + TURN / 8).await;
        *if asked.is_ok() { &mut open } else { &mut closed } += 1;
        drop(asked);
        models.choose("90", Instant::now() + 4 * TURN).await.expect("closed for a turn at most");
        tokio::time::sleep(TURN / 4).await;
    }
    assert!(waiting.iter().all(|one| !one.is_finished()));
    drop(busy);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_covers_the_loading_of_a_model() {
    let folder = folder(&["15"]);
    let (models, _shelf) = shelf(Some(folder.path()));
    let waiting = models.clone();
    let deadline = Instant::now() + Duration::from_millis(500);
    let late = tokio::spawn(async move { waiting.choose("15", deadline).await.map(drop) });
    wait_until(|| models.engines().len() == 2);
    assert_eq!(late.await.expect("no panic"), Err(RegistryError::Deadline));
    assert_eq!(models.engines().len(), 2, "it is still loading, for the next request");
    models.drain();
    wait_until(|| models.engines().len() == 1);
    assert_eq!(models.choose("15", soon()).await.map(drop), Err(RegistryError::Stopping));
}

#[tokio::test(flavor = "multi_thread")]
async fn unloading_goes_on_without_who_asked_for_it() {
    let (models, shelf) = shelf(None);
    models.load("a", "/1".into()).await.expect("room");
    let ticket = models.get("a").expect("it is there").engine.submit(vec![spec(1, 100)]);
    let cut_off = tokio::time::timeout(Duration::from_millis(1), models.unload("a")).await;
    assert!(cut_off.is_err(), "it is busy");
    assert_eq!((names(&models).len(), models.engines().len()), (0, 2), "it is still in memory");
    assert_eq!(
        models.load("b", "/100".into()).await.map_err(|e| e.to_string().len() > 9),
        Err(true)
    );
    assert_eq!(models.unload("a").await, Ok(()), "to ask again is to wait");
    assert_eq!((shelf.alive.load(Ordering::SeqCst), models.engines().len()), (0, 1));
    assert_eq!(ticket.expect("room").wait().await.expect("finished").len(), 1);
    assert_eq!(models.load("b", "/100".into()).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_nobody_holds_ends() {
    let shelf = Shelf::default();
    let engine = shelf.start(Path::new("/1")).expect("a thread");
    engine.ready().await.expect("it loads");
    let ticket = engine.submit(vec![spec(1, 3)]).expect("room");
    let other = engine.clone();
    drop(engine);
    assert!(matches!(other.state(), EngineState::Ready(_)));
    drop(other);
    assert_eq!(ticket.wait().await.expect("finished").len(), 1);
    wait_until(|| shelf.alive.load(Ordering::SeqCst) == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_evicts_another_once() {
    let folder = folder(&["90", "14"]);
    let (models, shelf) = shelf(Some(folder.path()));
    for starts in [2, 3, 3] {
        models.choose("90", soon()).await.expect("it loads");
        let broken = models.choose("14", soon()).await.map(drop);
        assert!(matches!(broken, Err(RegistryError::Broken(_))), "{broken:?}");
        assert_eq!(shelf.starts.load(Ordering::SeqCst), starts);
    }
    assert_eq!(names(&models), ["90"]);
    std::fs::write(folder.path().join("14/model_index.json"), "{ }").expect("a file");
    assert!(models.choose("14", soon()).await.is_err());
    assert_eq!(shelf.starts.load(Ordering::SeqCst), 4, "its files have changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_whose_thread_has_died_is_not_listed() {
    let (models, _shelf) = shelf(None);
    models.load("a", "/100".into()).await.expect("room");
    let engine = models.get("a").expect("it is there").engine;
    let panics = Spec { prompt: "panic".into(), ..spec(1, 1) };
    let ticket = engine.submit(vec![panics]).expect("room");
    assert_eq!(ticket.wait().await.err(), Some(JobError::Model));
    wait_until(|| names(&models).is_empty());
    assert_eq!(models.load("a", "/100".into()).await, Ok(()), "it takes no room");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_budget_is_measured_when_models_come_and_go() {
    let (models, shelf) = shelf(None);
    let budget = || {
        models.default_engine().gauge();
        let text = models.default_engine().metrics().to_string();
        let line = text.lines().find_map(|line| line.strip_prefix("sd_memory_budget_bytes "));
        line.and_then(|bytes| bytes.parse::<f64>().ok())
    };
    for (name, free, expected) in [("a", 1000, 800.0), ("b", 0, 0.0)] {
        shelf.free_bytes.store(free, Ordering::SeqCst);
        models.load(name, "/1".into()).await.expect("room");
        assert_eq!(budget(), Some(expected));
    }
    shelf.free_bytes.store(500, Ordering::SeqCst);
    models.unload("b").await.expect("it is there");
    let engine = models.get("a").expect("it is there").engine;
    assert_eq!(engine.submit(vec![spec(1, 1)]).expect("room").wait().await.map(drop), Ok(()));
    assert_eq!(budget(), Some(400.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_another_model_waits_until_its_timeout() -> anyhow::Result<()> {
    let folder = folder(&["90", "80", "15"]);
    let (models, _shelf) = shelf(Some(folder.path()));
    let server = engine::Server::start(models.clone(), HTTP, engine::LONG).await;
    let client = reqwest::Client::new();
    let ask = |model: &str, steps: usize, timeout_ms: u64| {
        let request = client.post(format!("{}/models/{model}", server.url));
        let request = request.header("x-request-timeout-ms", timeout_ms.to_string());
        request.body(json!({ "prompt": "a cat", "steps": steps }).to_string()).send()
    };
    let long = tokio::spawn(ask("90", 100, 20_000));
    wait_until(|| models.loaded().len() == 1);
    let busy = ask("80", 1, 50).await?;
    assert_eq!(busy.status(), 503);
    assert!(busy.headers().contains_key("retry-after"));
    assert_eq!(busy.json::<Value>().await?["error"]["code"], "models_busy");
    assert_eq!(ask("80", 1, 20_000).await?.status(), 200, "it waits for the other");
    assert_eq!(long.await??.status(), 200, "which was not disturbed");
    let late = ask("15", 1, 50).await?;
    assert_eq!(late.status(), 504);
    assert_eq!(late.json::<Value>().await?["error"]["code"], "deadline_exceeded");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_sagemaker_loads_is_loaded_after_the_deadline_too() -> anyhow::Result<()> {
    let (models, shelf) = shelf(None);
    let server = engine::Server::start(models, HTTP, engine::LONG).await;
    let load = reqwest::Client::new().post(format!("{}/models", server.url));
    let load = load.header("x-request-timeout-ms", "50");
    let late = load.body(r#"{"model_name":"slow","url":"/15"}"#).send().await?;
    assert_eq!(late.status(), 504);
    let error = late.json::<Value>().await?;
    let message = error["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("loading goes on"), "{error}");
    assert_eq!(shelf.starts.load(Ordering::SeqCst), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn models_take_turns() {
    let (models, _shelf) = shelf(None);
    let mut tickets = Vec::new();
    for name in ["a", "b"] {
        models.load(name, "/1".into()).await.expect("room");
        let engine = models.get(name).expect("it is there").engine;
        let pictures = vec![spec(1, 60)];
        tickets.push(engine.submit(Job::from(pictures)).expect("room"));
    }
    let (a, b) = (tickets[0].progress(), tickets[1].progress());
    wait_until(|| b.borrow().completed >= 20);
    let (a, b) = (a.borrow().completed, b.borrow().completed);
    // The second came a moment later; from then on they share by time.
    assert!((5..60).contains(&a) && a.abs_diff(b) <= 15, "{a} and {b}");
    for ticket in tickets {
        assert_eq!(ticket.wait().await.map(drop), Ok(()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_lost_is_lost_for_all() {
    let (models, _shelf) = shelf(None);
    models.load("a", "/1".into()).await.expect("room");
    let engine = models.get("a").expect("it is there").engine;
    let lost = Spec { prompt: "device lost".into(), ..spec(1, 1) };
    let ticket = engine.submit(vec![lost]).expect("room");
    assert_eq!(ticket.wait().await.err(), Some(JobError::DeviceLost));
    assert!(matches!(models.state(), EngineState::DeviceLost));
}
