//! A hub on this host: what is asked of it, what ends up in the cache, and what is said when it
//! is not there.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use crate::harness::{Server, sd_server};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// Serves the built-in model's files as `acme/demo`.
struct FakeHub {
    endpoint: String,
    /// What was asked for, in order: path and range.
    asked: Arc<Mutex<Vec<String>>>,
}

/// How the hub behaves.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Friendly,
    /// Breaks off in the second part of the UNet.
    Failing,
    /// Stops in the second part of the UNet, but keeps the connection open: once, or always.
    Pausing,
    Stuck,
    Forbidding,
    Silent,
}

impl FakeHub {
    fn start(mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let mut files = HashMap::new();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
        for file in std::fs::read_dir(&demo).expect("the model").flatten() {
            for inner in std::fs::read_dir(file.path()).into_iter().flatten().flatten() {
                let name = inner.path().strip_prefix(&demo).expect("inside").to_owned();
                files.insert(name.to_str().expect("UTF-8").to_owned(), inner.path());
            }
        }
        files.insert("model_index.json".into(), demo.join("model_index.json"));
        let files = Arc::new(files);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log) = (Arc::clone(&files), Arc::clone(&log));
                std::thread::spawn(move || answer(stream, mood, &files, &log));
            }
        });
        Self { endpoint, asked }
    }

    fn run(&self, home: &Path, args: &[&str]) -> Output {
        let mut command = sd_server(args);
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", home);
        command.output().expect("the binary starts")
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().expect("unpoisoned"))
    }
}

/// Answers requests of one connection until it ends.
fn answer(
    mut stream: TcpStream,
    mood: Mood,
    files: &HashMap<String, std::path::PathBuf>,
    log: &Mutex<Vec<String>>,
) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    loop {
        let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
        let head: Vec<_> =
            lines.by_ref().map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
        let range = head
            .iter()
            .find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
        log.lock().ok()?.push(format!("{path} {}", range.clone().unwrap_or_default()));
        let plain = |status: &str, body: &str| {
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        };
        if mood == Mood::Silent {
            std::thread::sleep(std::time::Duration::from_secs(600));
        }
        if mood == Mood::Forbidding {
            stream.write_all(plain("401 Unauthorized", "").as_bytes()).ok()?;
            continue;
        }
        if path == "/api/models/acme/demo/revision/main" {
            let names = files.keys().map(|name| format!(r#"{{"rfilename":"{name}"}}"#));
            let extra = [r#"{"rfilename":"unet/diffusion_pytorch_model.bin"}"#.to_owned()];
            let names: Vec<_> = names.chain(extra).collect();
            let body = format!(r#"{{"sha":"{COMMIT}","siblings":[{}]}}"#, names.join(","));
            stream.write_all(plain("200 OK", &body).as_bytes()).ok()?;
            continue;
        }
        let name = path.strip_prefix("/acme/demo/resolve/main/").unwrap_or_default();
        let Some(file) = files.get(name) else {
            stream.write_all(plain("404 Not Found", "").as_bytes()).ok()?;
            continue;
        };
        let bytes = std::fs::read(file).ok()?;
        let (start, stop) = range.as_deref()?.split_once('-')?;
        let start: usize = start.parse().ok()?;
        let stop = stop.parse::<usize>().ok()?.min(bytes.len() - 1);
        let part = &bytes[start..=stop];
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nETag: \"{}\"\r\n\
             X-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{stop}/{}\r\n\r\n",
            part.len(),
            name.replace('/', "-"),
            bytes.len()
        );
        stream.write_all(head.as_bytes()).ok()?;
        if mood == Mood::Failing && name == UNET && start > 0 {
            stream.write_all(&part[..part.len() / 2]).ok()?;
            return None;
        }
        let begun = |entry: &&String| entry.contains(name) && !entry.contains(" 0-");
        let earlier = log.lock().ok()?.iter().filter(begun).count();
        if name == UNET
            && start > 0
            && (mood == Mood::Stuck || mood == Mood::Pausing && earlier < 2)
        {
            stream.write_all(&part[..part.len() / 2]).ok()?;
            std::thread::sleep(std::time::Duration::from_secs(600));
        }
        stream.write_all(part).ok()?;
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_model_is_fetched_once_and_then_needs_no_network() {
    let home = tempfile::tempdir().expect("a directory");
    let hub = FakeHub::start(Mood::Friendly);
    let done = hub.run(home.path(), &["download", "acme/demo"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let snapshot = text(&done.stdout).trim().to_owned();
    assert!(
        snapshot.ends_with(&format!("hub/models--acme--demo/snapshots/{COMMIT}")),
        "{snapshot}"
    );
    assert!(Path::new(&snapshot).join(UNET).is_file());
    assert!(!hub.asked().iter().any(|path| path.contains(".bin")), "pickles are not fetched");

    assert!(hub.run(home.path(), &["download", "acme/demo"]).status.success());
    assert_eq!(hub.asked().len(), 1, "only the listing is asked for again");

    let picture = home.path().join("x.png");
    let picture = picture.to_str().expect("UTF-8");
    let args =
        ["generate", "x", "--model", "acme/demo", "--steps", "1", "--device", "cpu", "-o", picture];
    assert!(hub.run(home.path(), &args).status.success());
    assert!(hub.asked().is_empty(), "the cache is enough");
}

#[test]
fn a_model_of_the_hub_goes_by_its_id_and_needs_no_network() {
    let home = tempfile::tempdir().expect("a directory");
    let hub = FakeHub::start(Mood::Friendly);
    assert!(hub.run(home.path(), &["download", "acme/demo"]).status.success());
    hub.asked();
    let path = |name: &str| home.path().join(name).to_str().expect("UTF-8").to_owned();
    let (picture, package) = (path("x.png"), path("package"));
    let small = ["--steps", "1", "-W", "64", "-H", "64"];
    let generate =
        [&["generate", "x", "--model", "demo", "--vae", "acme/demo"][..], &small].concat();
    let commands: [&[&str]; 3] = [
        &["download", "acme/demo"],
        &["package", "acme/demo", "--layout", "directory", "--output", &package],
        &[&generate[..], &["-o", &picture]].concat(),
    ];
    // As a file of variables has them: with the ends of their lines.
    let offline = |command: &mut std::process::Command| {
        command.env("HF_HUB_OFFLINE", "1\n").env("HF_HOME", format!("{}\n", home.path().display()));
        command.env("HF_ENDPOINT", &hub.endpoint).env("SD_DEVICE", " cpu\n");
    };
    for arguments in commands {
        let mut command = sd_server(arguments);
        offline(&mut command);
        let done = command.output().expect("it starts");
        assert!(done.status.success(), "{arguments:?}: {}", text(&done.stderr));
    }
    let mut command = sd_server(&["--model", "acme/demo"]);
    offline(&mut command);
    let server = Server::spawn(&mut command);
    server.wait_until_ready();
    let get = |path: &str| -> serde_json::Value {
        let reply = reqwest::blocking::get(server.url(path)).expect("an answer");
        assert_eq!(reply.status(), 200, "{path}");
        reply.json().expect("JSON")
    };
    assert_eq!(get("/v1/models")["data"][0]["id"], "acme/demo");
    assert_eq!(get("/v1/models/acme/demo")["id"], "acme/demo");
    assert_eq!(get("/sdapi/v1/sd-models")[0]["model_name"], "acme/demo");
    let asked = serde_json::json!({
        "prompt": "x", "model": "acme/demo", "steps": 1, "size": "64x64",
    });
    let client = reqwest::blocking::Client::new();
    let reply = client.post(server.url("/v1/images/generations")).json(&asked).send();
    assert_eq!(reply.expect("an answer").status(), 200);
    assert!(hub.asked().is_empty(), "the cache is enough");
}

#[test]
fn an_interrupted_download_goes_on() {
    let home = tempfile::tempdir().expect("a directory");
    let broken = FakeHub::start(Mood::Failing);
    let done = broken.run(home.path(), &["download", "acme/demo"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains(UNET), "{}", text(&done.stderr));

    let friendly = FakeHub::start(Mood::Friendly);
    assert!(friendly.run(home.path(), &["download", "acme/demo"]).status.success());
    let asked = friendly.asked();
    let parts: Vec<_> = asked.iter().filter(|path| path.contains(UNET)).collect();
    assert!(!parts.iter().any(|path| path.contains(" 0-9999999")), "{parts:?}");
}

#[test]
fn a_download_that_stalls_is_resumed_and_then_given_up() {
    let download = |mood: Mood| {
        let (home, hub) = (tempfile::tempdir().expect("a directory"), FakeHub::start(mood));
        let mut command = sd_server(&["download", "acme/demo"]);
        command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", home.path());
        let done = command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1").output().expect("the binary starts");
        (done, hub.endpoint)
    };
    let (done, endpoint) = download(Mood::Pausing);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let stalled = format!("{endpoint} sent nothing for 1 s");
    assert!(text(&done.stderr).contains(&stalled), "{}", text(&done.stderr));
    let (done, endpoint) = download(Mood::Stuck);
    assert_eq!(done.status.code(), Some(1));
    let (error, stalled) = (text(&done.stderr), format!("{endpoint} sent nothing for 1 s"));
    let last = error.lines().last().unwrap_or_default();
    assert!(last.contains(UNET) && last.contains(&stalled), "{error}");
}

#[test]
fn a_cache_that_another_process_fills_is_waited_for() {
    let (home, hub) = (tempfile::tempdir().expect("a directory"), FakeHub::start(Mood::Friendly));
    let blobs = home.path().join("hub/models--acme--demo/blobs");
    std::fs::create_dir_all(&blobs).expect("directories");
    let lock = std::fs::File::create(blobs.join("unet-diffusion_pytorch_model.lock"));
    let lock = lock.expect("a file");
    lock.lock().expect("locked");
    let mut command = sd_server(&["download", "acme/demo"]);
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", home.path());
    let mut download = command.stderr(Stdio::piped()).spawn().expect("the binary starts");
    let log = BufReader::new(download.stderr.take().expect("piped"));
    let mut lines = log.lines().map_while(Result::ok);
    let waits = lines.find(|line| line.contains("waiting for another process"));
    assert!(waits.is_some_and(|line| line.contains(UNET)));
    lock.unlock().expect("unlocked");
    lines.for_each(drop);
    assert!(download.wait().expect("it ends").success());
}

#[test]
fn what_the_hub_refuses_is_explained() {
    let home = tempfile::tempdir().expect("a directory");
    let hub = FakeHub::start(Mood::Forbidding);
    let denied = hub.run(home.path(), &["download", "acme/secret"]);
    assert_eq!(denied.status.code(), Some(1));
    assert!(text(&denied.stderr).contains("HF_TOKEN"), "{}", text(&denied.stderr));

    let missing = FakeHub::start(Mood::Friendly).run(home.path(), &["download", "acme/none"]);
    assert!(text(&missing.stderr).contains("no such model"), "{}", text(&missing.stderr));
}

#[test]
fn without_a_network_the_error_says_so() {
    let home = tempfile::tempdir().expect("a directory");
    let nobody = FakeHub { endpoint: "http://127.0.0.1:9".into(), asked: Arc::default() };
    let done = nobody.run(home.path(), &["--port", "0", "--model", "acme/demo"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("without a network"), "{}", text(&done.stderr));

    let mut offline = sd_server(&["--port", "0", "--model", "acme/demo"]);
    offline.env("HF_HUB_OFFLINE", "1").env("HF_HOME", home.path());
    let done = offline.output().expect("it starts");
    assert!(text(&done.stderr).contains("HF_HUB_OFFLINE"), "{}", text(&done.stderr));
}

#[test]
fn a_server_that_waits_for_the_hub_answers_503_and_can_be_stopped() {
    let home = tempfile::tempdir().expect("a directory");
    let hub = FakeHub::start(Mood::Silent);
    let mut command = sd_server(&["--model", "acme/demo"]);
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", home.path());
    let server = Server::spawn(&mut command);
    assert_eq!(server.ping(), 503);
    let reply = server.post(&[], "a cat");
    assert_eq!((reply.status, reply.error().0.as_str()), (503, "loading"));
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}
