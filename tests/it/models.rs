//! Models by name: SageMaker's multi-model contract, a folder of models, and one device for all.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use sd_models::{ModelInfo, Rgb, Spec};
use sd_server::engine::{DeviceScheduler, Engine, EngineState, Job, JobError, Model};
use sd_server::registry::{ModelLoader, ModelRegistry, RegistryConfig, RegistryError};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::engine;
use crate::fake::{ENGINE, Fake, FakeTrajectory, HTTP, spec, wait_until};
use crate::harness::{PATIENCE, Reply, Server, sd_server};

/// A fake that is counted while it is in memory.
struct Counted {
    fake: Fake,
    alive: Arc<AtomicUsize>,
    free_bytes: Arc<AtomicU64>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Model for Counted {
    type Trajectory = FakeTrajectory;

    fn info(&self) -> &ModelInfo {
        self.fake.info()
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<FakeTrajectory> {
        self.fake.begin(spec)
    }

    fn step(&self, batch: &mut [&mut FakeTrajectory]) -> sd_models::Result<()> {
        self.fake.step(batch)
    }

    fn decode(&self, trajectory: &FakeTrajectory) -> sd_models::Result<Rgb> {
        self.fake.decode(trajectory)
    }

    fn free_bytes(&self) -> Option<u64> {
        Some(self.free_bytes.load(Ordering::SeqCst))
    }
}

/// Models whose weights take as many bytes as their path says; `broken` is none, and 13, 14 and 15
/// do not load: the device is full, a file is wrong, and the disk does not answer.
#[derive(Clone)]
struct Shelf {
    device: DeviceScheduler,
    alive: Arc<AtomicUsize>,
    starts: Arc<AtomicUsize>,
    free_bytes: Arc<AtomicU64>,
}

impl Default for Shelf {
    fn default() -> Self {
        let (device, alive, starts) = Default::default();
        Self { device, alive, starts, free_bytes: Arc::new(AtomicU64::new(u64::MAX)) }
    }
}

impl ModelLoader for Shelf {
    fn estimate_bytes(&self, path: &Path) -> anyhow::Result<u64> {
        Ok(path.file_name().and_then(|name| name.to_str()).unwrap_or_default().parse()?)
    }

    fn start(&self, path: &Path) -> io::Result<Engine> {
        let Self { alive, free_bytes, .. } = self.clone();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        self.starts.fetch_add(1, Ordering::SeqCst);
        Engine::start_on(&self.device, ENGINE, move || {
            match name.as_deref() {
                Some("13") => return Err(sd_models::Error::OutOfMemory("weights".into()).into()),
                Some("14") => anyhow::bail!("a tensor is missing"),
                Some("15") => std::thread::sleep(PATIENCE),
                _ => {}
            }
            alive.fetch_add(1, Ordering::SeqCst);
            let (mut fake, strings) = Fake::new();
            fake.pace = Duration::from_millis(5);
            drop(strings.permits);
            Ok(Counted { fake, alive, free_bytes })
        })
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }
}

fn shelf(folder: Option<&Path>) -> (ModelRegistry, Shelf) {
    let shelf = Shelf::default();
    let settings = RegistryConfig {
        max_models: 3,
        memory_bytes: Some(100),
        folder: folder.map(Path::to_owned),
        multi_model: folder.is_none(),
        multi_model_root: "/".into(),
        drain_timeout: Duration::from_secs(20),
    };
    let first = Engine::absent(&shelf.device, ENGINE);
    (ModelRegistry::new(first, shelf.clone(), settings), shelf)
}

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
    assert!(matches!(models.load("b", "/41".into()).await, Err(RegistryError::NoRoom(_))));
    assert_eq!(models.load("b", "/40".into()).await, Ok(()));
    assert!(matches!(models.load("c", "/broken".into()).await, Err(RegistryError::Broken(_))));
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
    let users: Vec<_> = (0..3)
        .map(|_| {
            let models = models.clone();
            tokio::spawn(async move {
                let mut drawn = 0;
                while drawn < 40 {
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
    for user in users {
        user.await.expect("all were drawn");
    }
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
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (a, b) = (a.borrow().completed, b.borrow().completed);
    // The second came a moment later; from then on they share by time.
    assert!(a > 0 && b > 0 && a < 60 && a.abs_diff(b) <= 15, "{a} and {b}");
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

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}

fn ask(server: &Server, method: reqwest::Method, path: &str, body: &Value) -> Reply {
    let request = server.client.request(method, server.url(path)).body(body.to_string());
    Reply::from(request.timeout(PATIENCE).send().expect("an answer"))
}

#[test]
fn sagemaker_loads_uses_and_unloads_models() {
    use reqwest::Method;
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--multi-model-root"]);
    let root = demo().parent().expect("a directory").to_owned();
    let server = Server::spawn(command.arg(&root).env("SAGEMAKER_MULTI_MODEL", "true"));
    assert_eq!(server.ping(), 200, "with no model at all");
    let picture = json!({ "prompt": "a cat", "steps": 1, "seed": 1, "output_format": "png" });
    let invocations = ask(&server, Method::POST, "/invocations", &picture);
    assert_eq!((invocations.status, invocations.error().0), (404, "model_required".into()));
    let load = |name: &str, url: &Path| {
        ask(&server, Method::POST, "/models", &json!({ "model_name": name, "url": url }))
    };
    assert_eq!(load("one", &demo()).status, 200);
    assert_eq!(load("one", &demo()).error().0, "model_loaded");
    assert_eq!(load("one", &demo()).status, 409);
    assert_eq!(load("two", &demo()).status, 200);
    let broken = load("three", &root.join("no-such-model"));
    assert_eq!((broken.status, broken.error().0), (500, "model_load_failed".into()));
    for outside in [Path::new("/etc"), &root, &demo().join("../../src"), Path::new("demo")] {
        let refused = load("four", outside);
        assert_eq!((refused.status, refused.error()), (400, ("malformed".into(), "url".into())));
    }
    assert_eq!(ask(&server, Method::POST, "/models", &json!({ "url": "/" })).status, 400);

    let list = ask(&server, Method::GET, "/models", &Value::Null).json();
    let model = |name: &str| json!({ "modelName": name, "modelUrl": demo() });
    assert_eq!(list, json!({ "models": [model("one"), model("two")] }));
    let one = ask(&server, Method::GET, "/models/one", &Value::Null);
    assert_eq!(one.json(), model("one"));
    assert_eq!(ask(&server, Method::GET, "/models/three", &Value::Null).status, 404);

    let alone = Server::ready(&[]).json(&picture).json();
    for name in ["one", "two"] {
        let drawn = ask(&server, Method::POST, &format!("/models/{name}/invoke"), &picture);
        assert_eq!(drawn.json()["data"], alone["data"], "as a server with one model draws it");
    }
    assert_eq!(ask(&server, Method::POST, "/models/three/invoke", &picture).status, 404);
    assert_eq!(ask(&server, Method::DELETE, "/models/one", &Value::Null).status, 200);
    assert_eq!(ask(&server, Method::DELETE, "/models/one", &Value::Null).status, 404);
    assert_eq!(ask(&server, Method::POST, "/models/one/invoke", &picture).status, 404);
    assert_eq!(ask(&server, Method::POST, "/models/two/invoke", &picture).status, 200);
    assert_eq!(server.ping(), 200);
}

#[test]
fn a_model_without_room_is_507() {
    let mut command = sd_server(&["--device", "cpu", "--multi-model"]);
    command.arg("--multi-model-root").arg(demo().parent().expect("a directory"));
    let server = Server::spawn(command.args(["--models-memory-bytes", "1000000"]));
    let load = json!({ "model_name": "one", "url": demo() });
    let reply = ask(&server, reqwest::Method::POST, "/models", &load);
    assert_eq!((reply.status, reply.error().0), (507, "out_of_memory".into()));
}

#[test]
fn single_files_of_the_folder_are_models() {
    let folder = tempfile::tempdir().expect("a directory");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures");
    for (file, name) in [
        ("single/inpaint.ckpt", "small.ckpt"),
        ("single/v1.safetensors", "small.safetensors"),
        ("single/inpaint.ckpt", "red.ckpt"),
        ("tokenizer", "tokenizer"),
    ] {
        std::os::unix::fs::symlink(fixtures.join(file), folder.path().join(name)).expect("a link");
    }
    std::os::unix::fs::symlink(demo(), folder.path().join("red")).expect("a link");
    std::fs::write(folder.path().join("notes.txt"), "no model").expect("a file");
    let mut command = sd_server(&["--device", "cpu", "--threads", "1"]);
    let vae = fixtures.join("single/vae.safetensors");
    let server =
        Server::spawn(command.arg("--models-dir").arg(folder.path()).arg("--vae").arg(vae));
    let list = ask(&server, reqwest::Method::GET, "/v1/models", &Value::Null).json();
    let names: Vec<_> = list["data"].as_array().expect("a list").iter().collect();
    assert_eq!(names.iter().map(|card| &card["id"]).collect::<Vec<_>>(), ["red", "small"]);
    let body = json!({ "prompt": "x", "steps": 1, "width": 64, "height": 64 });
    // The safetensors file has no VAE of its own.
    let drawn = ask(&server, reqwest::Method::POST, "/models/small", &body);
    assert_eq!(drawn.status, 200, "{}", drawn.json());
}

#[test]
fn a_request_may_name_a_model_of_the_folder() {
    let folder = tempfile::tempdir().expect("a directory");
    for name in ["red", "blue"] {
        std::os::unix::fs::symlink(demo(), folder.path().join(name)).expect("a link");
    }
    let mut command = sd_server(&["--device", "cpu", "--threads", "1", "--max-models", "1"]);
    let server = Server::spawn(command.arg("--models-dir").arg(folder.path()));
    let request = json!({ "inputs": "a cat", "parameters": { "num_inference_steps": 1 } });
    for name in ["red", "blue", "red"] {
        let reply = ask(&server, reqwest::Method::POST, &format!("/models/{name}"), &request);
        assert!(reply.status == 200 && reply.json().is_string(), "{name}");
    }
    let openai = json!({ "model": "blue", "prompt": "a cat", "steps": 1 });
    let drawn = ask(&server, reqwest::Method::POST, "/v1/images/generations", &openai);
    assert!(drawn.json()["data"][0]["b64_json"].is_string());
    let nameless = json!({ "prompt": "a cat", "steps": 1 });
    let nameless = ask(&server, reqwest::Method::POST, "/v1/images/generations", &nameless);
    assert_eq!(nameless.status, 404);
    let list = ask(&server, reqwest::Method::GET, "/v1/models", &Value::Null).json();
    assert_eq!((&list["data"][0]["id"], &list["data"][1]["id"]), (&"blue".into(), &"red".into()));
    let unknown = ask(&server, reqwest::Method::POST, "/models/owner/green", &request);
    assert_eq!(unknown.status, 404);
    let document = ask(&server, reqwest::Method::GET, "/openapi.json", &Value::Null);
    let described = document.json()["info"]["description"].as_str().map(str::to_owned);
    assert!(described.is_some_and(|text| text.contains("GET /v1/models")), "without a first model");
    let closed = ask(&server, reqwest::Method::GET, "/models", &Value::Null);
    assert_eq!(closed.status, 404, "only SageMaker manages models over HTTP");
}
