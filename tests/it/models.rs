//! Models by name: SageMaker's multi-model contract, a folder of models, and one device for all.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sd_models::{ModelInfo, Rgb, Spec};
use sd_server::engine::{DeviceScheduler, Engine, EngineState, Job, JobError, Model};
use sd_server::registry::{ModelLoader, ModelRegistry, RegistryConfig, RegistryError};
use serde_json::{Value, json};

use crate::fake::{ENGINE, Fake, FakeTrajectory, spec};
use crate::harness::{PATIENCE, Reply, Server, sd_server};

/// A fake that is counted while it is in memory.
struct Counted {
    fake: Fake,
    alive: Arc<AtomicUsize>,
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
}

/// Models whose weights take as many bytes as their path says; `broken` is none.
#[derive(Clone, Default)]
struct Shelf {
    device: DeviceScheduler,
    alive: Arc<AtomicUsize>,
}

impl ModelLoader for Shelf {
    fn estimate_bytes(&self, path: &Path) -> anyhow::Result<u64> {
        Ok(path.file_name().and_then(|name| name.to_str()).unwrap_or_default().parse()?)
    }

    fn start(&self, path: &Path) -> io::Result<Engine> {
        let (full, alive) = (path.ends_with("13"), Arc::clone(&self.alive));
        Engine::start_on(&self.device, ENGINE, move || {
            if full {
                return Err(sd_models::Error::OutOfMemory("weights".into()).into());
            }
            alive.fetch_add(1, Ordering::SeqCst);
            let (mut fake, strings) = Fake::new();
            fake.pace = Duration::from_millis(5);
            drop(strings.permits);
            Ok(Counted { fake, alive })
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
        multi_model: true,
        drain_timeout: Duration::from_secs(20),
    };
    let first = Engine::absent(&shelf.device, ENGINE);
    (ModelRegistry::new(first, shelf.clone(), settings), shelf)
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
    let folder = tempfile::tempdir().expect("a directory");
    for name in ["50", "49", "48", "101"] {
        let model = folder.path().join(name);
        std::fs::create_dir(&model).expect("a directory");
        std::fs::write(model.join("model_index.json"), "{}").expect("a file");
    }
    std::fs::create_dir(folder.path().join("7")).expect("a directory that is no model");
    let (models, shelf) = shelf(Some(folder.path()));
    assert_eq!(models.names().await, ["101", "48", "49", "50"]);
    for name in ["50", "49", "50", "48"] {
        let engine = models.choose(name).await.expect("it loads").engine;
        assert_eq!(engine.submit(vec![spec(1, 1)]).expect("room").wait().await.map(drop), Ok(()));
    }
    assert_eq!(names(&models), ["50", "48"], "49 went");
    let both = tokio::join!(models.choose("49"), models.choose("49"));
    assert!(both.0.is_ok() && both.1.is_ok(), "loaded once for two who ask");
    drop(both);
    assert_eq!(shelf.alive.load(Ordering::SeqCst), 2);
    for unknown in ["7", "../50", "", "nobody"] {
        assert!(
            matches!(models.choose(unknown).await, Err(RegistryError::Unknown(_))),
            "{unknown}"
        );
    }
    assert!(matches!(models.choose("101").await, Err(RegistryError::NoRoom(_))), "it never fits");
    assert_eq!(names(&models), ["48", "49"], "nobody goes in vain");
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
    let mut command = sd_server(&["--device", "cpu", "--threads", "1"]);
    let server = Server::spawn(command.env("SAGEMAKER_MULTI_MODEL", "true"));
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
    let broken = load("three", Path::new("/no/such/model"));
    assert_eq!((broken.status, broken.error().0), (500, "model_load_failed".into()));
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
