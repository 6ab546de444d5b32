//! The command line: `generate`, `healthcheck`, help, exit codes, signals.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Output, Stdio};

use crate::harness::{Server, sd_server};
use crate::invocations::infotext;

fn run(args: &[&str]) -> Output {
    sd_server(args).output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn generate_writes_a_picture_with_its_parameters() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("house.png");
    let path = path.to_str().expect("UTF-8");
    let model = ["--model", "demo", "--device", "cpu"];
    let args = ["generate", "a red house", "-o", path, "--steps", "2", "--seed", "9"];
    let done = run(&[&args[..], &model].concat());
    assert!(done.status.success(), "{}", text(&done.stderr));
    let png = std::fs::read(path).expect("a file");
    assert!(infotext(&png).starts_with("a red house\nSteps: 2, Sampler: "), "{}", infotext(&png));
    assert!(text(&done.stdout).contains(&format!("{path} (seed 9)")));

    let again = folder.path().join("again.jpg");
    let again = again.to_str().expect("UTF-8");
    let args = ["generate", "x", "-n", "2", "-o", again, "--steps", "1", "-W", "64", "-H", "72"];
    assert!(run(&[&args[..], &model].concat()).status.success());
    for k in 0..2 {
        let picture = image::open(folder.path().join(format!("again-{k}.jpg"))).expect("a JPEG");
        assert_eq!((picture.width(), picture.height()), (64, 72));
    }

    let sizes = ["--steps", "2", "-W", "64", "-H", "96", "--hires-width", "128"];
    let second = ["--hires-steps", "4", "--hires-strength", "0.5", "--hires-upscaler", "Latent"];
    let args = [&["generate", "x", "-o", path][..], &sizes, &second, &model].concat();
    assert!(run(&args).status.success());
    let png = std::fs::read(path).expect("a file");
    let told = infotext(&png);
    assert!(told.contains("Hires upscale: 2, Hires steps: 2, Hires upscaler: Latent,"), "{told}");
    let picture = image::load_from_memory(&png).expect("a picture");
    assert_eq!((picture.width(), picture.height()), (128, 192));
}

#[test]
fn errors_of_generate_name_the_options() {
    let table: [(&[&str], &str); 5] = [
        (&["--hires-steps", "4"], "--hires-steps requires --hires-width"),
        (&["--steps", "0"], "--steps must be from 1 to"),
        (&["--num-images", "0"], "--num-images must be from 1 to"),
        (&["--lora", "none"], "--lora "),
        (&["--prompt-syntax", "php"], "--prompt-syntax "),
    ];
    for (args, message) in table {
        let done = run(&[&["generate", "x", "--model", "demo", "--device", "cpu"], args].concat());
        assert_eq!(done.status.code(), Some(64), "{args:?}");
        assert!(text(&done.stderr).contains(message), "{args:?}: {}", text(&done.stderr));
    }
}

#[test]
fn the_command_line_draws_what_the_server_draws() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("out.png");
    let server = Server::ready(&[]);
    let body = r#"{"prompt":"a cat","steps":2,"seed":3,"scheduler":"euler"}"#;
    let served = server.post(&["accept: image/png"], body).body;
    let args = ["generate", "a cat", "--steps", "2", "--seed", "3", "--scheduler", "Euler"];
    let done =
        sd_server(&args).args(["--model", "demo", "--device", "cpu", "-o"]).arg(&path).output();
    assert!(done.expect("it starts").status.success());
    assert!(std::fs::read(path).expect("a file") == served);
}

#[test]
fn a_single_file_is_a_model() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tests/fixtures/");
    let folder = tempfile::tempdir().expect("a directory");
    let place = |name: &str| folder.path().join(name);
    let copy = |from: &str, to: &str| {
        std::fs::copy(fixtures.to_owned() + from, place(to)).expect("copied");
    };
    copy("single/v1.safetensors", "v1.safetensors");
    std::fs::create_dir(place("other")).expect("made");
    copy("single/vae.safetensors", "other/vae.safetensors");
    let draw = |model: &std::path::Path| {
        let mut command = sd_server(&["generate", "x", "--steps", "1", "--device", "cpu"]);
        command.args(["-W", "64", "-H", "64", "-o"]).arg(place("out.png")).arg("--model");
        command.arg(model).arg("--vae").arg(place("other/vae.safetensors"));
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", place("cache"));
        command.output().expect("it starts")
    };
    let without = draw(&place("v1.safetensors"));
    assert_eq!(without.status.code(), Some(1));
    assert!(text(&without.stderr).contains("tokenizer/vocab.json"), "{}", text(&without.stderr));
    std::fs::create_dir(place("tokenizer")).expect("made");
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
        copy(&format!("tokenizer/{name}"), &format!("tokenizer/{name}"));
    }
    // By its name, and as the only one in a directory, as SageMaker mounts it.
    for model in [place("v1.safetensors"), folder.path().to_owned()] {
        let with = draw(&model);
        assert!(with.status.success(), "{}", text(&with.stderr));
        let picture = image::open(place("out.png")).expect("a picture");
        assert_eq!((picture.width(), picture.height()), (64, 64));
        std::fs::remove_file(place("out.png")).expect("there");
    }
}

#[test]
fn usage_errors_exit_with_64() {
    let table: [&[&str]; 18] = [
        &["train"],
        &["--port", "70000"],
        &["--nonsense"],
        &["serve", "serve"],
        &["--device", "gpu"],
        &["--dtype", "int4"],
        &["--max-batch-rows", "1"],
        &["--model", "/no/such/directory"],
        &["generate"],
        &["generate", "x", "-o", "out.gif", "--model", "demo"],
        &["generate", "x", "-o", "/no/such/directory/x.png", "--model", "demo"],
        &["generate", "x", "--steps", "many", "--model", "demo"],
        &["generate", "x", "--scheduler", "dpm_fast", "--model", "demo"],
        &["generate", "x", "--width", "7", "--model", "demo"],
        &["bench", "localhost:8080"],
        &["bench", "http://localhost:8080", "--rate", "0"],
        &["bench", "http://localhost:8080", "--rate", "1", "--clients", "2"],
        &["bench", "http://localhost:8080", "--body", "a cat"],
    ];
    for args in table {
        let done = run(args);
        assert_eq!(done.status.code(), Some(64), "{args:?}: {}", text(&done.stderr));
        assert!(!done.stderr.is_empty(), "{args:?}");
    }
    let ports = [("SAGEMAKER_BIND_TO_PORT", "port"), ("SD_PORT", "-1"), ("SD_MAX_STEPS", "0")];
    for (name, value) in ports {
        let done = sd_server(&["--model", "demo"]).env(name, value).output().expect("it starts");
        assert_eq!(done.status.code(), Some(64), "{name}={value}");
        assert!(text(&done.stderr).contains(name) || text(&done.stderr).contains("--max-steps"));
    }
}

#[test]
fn a_line_end_behind_a_variable_is_no_part_of_it() {
    let variables = [("SD_WEBHOOK_SECRET", "k3y\n"), ("SD_WEBHOOK_HOSTS", "a.example\n")];
    let run = |args: &[&str]| {
        let mut command = sd_server(args);
        command.envs(variables).env("SAGEMAKER_MULTI_MODEL", " true\n").output().expect("it starts")
    };
    let help = text(&run(&["serve", "--help"]).stdout);
    assert!(help.contains("SD_WEBHOOK_SECRET") && !help.contains("k3y"), "{help}");
    // All of them are read before what does not go together is refused.
    let said = text(&run(&["--models-dir", "x"]).stderr);
    assert!(said.contains("--models-dir cannot be used with --multi-model"), "{said}");
}

#[test]
fn a_misspelt_variable_is_named_with_the_nearest() {
    let mut command = sd_server(&["healthcheck", "--port", "1"]);
    command.envs([("SD_MAX_STPES", "9"), ("SD_PORT", "2"), ("SD_MAX_STEPS", "7")]);
    command.envs([("SD_SERVER_PORT", "tcp://10.0.0.1:80"), ("SD_SERVER_SERVICE_HOST", "10.0.0.1")]);
    let said = text(&command.output().expect("it starts").stderr);
    let warnings: Vec<_> = said.lines().filter(|line| line.contains("is ignored")).collect();
    let [warning] = warnings[..] else { panic!("{said}") };
    assert!(warning.contains("SD_MAX_STPES") && warning.ends_with("SD_MAX_STEPS"), "{warning}");
}

#[test]
fn start_up_errors_name_the_option_or_variable() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let file = file.path().to_str().expect("UTF-8");
    let table: [(&[&str], &str, &[&str]); 22] = [
        (&["--log", "warning"], "", &["--log", "\"warning\" is no level"]),
        (&["--log", "warn,sd_server"], "", &["--log", "\"sd_server\" is no level"]),
        (&[], "SD_LOG=verbose", &["SD_LOG", "\"verbose\" is no level"]),
        (&[], "SD_LOG=sd_server=loud", &["SD_LOG", "sd_server=debug"]),
        (&[], "SD_LOG_FORMAT=xml", &["SD_LOG_FORMAT", "json"]),
        (&[], "SD_LOG_PROMPTS=maybe", &["SD_LOG_PROMPTS", "must be true or false"]),
        (&[], "SD_LOCK_INVOCATIONS=maybe", &["SD_LOCK_INVOCATIONS", "must be true or false"]),
        (&[], "SAGEMAKER_MULTI_MODEL=2", &["SAGEMAKER_MULTI_MODEL", "must be true or false"]),
        (&[], "HF_HUB_OFFLINE=ture", &["HF_HUB_OFFLINE", "must be true or false"]),
        (&[], "HF_HUB_DOWNLOAD_TIMEOUT=soon", &["HF_HUB_DOWNLOAD_TIMEOUT", "at least 1"]),
        (&[], "SD_MAX_STEPS=0", &["SD_MAX_STEPS", "at least 1"]),
        (&["--max-steps=0"], "SD_MAX_STEPS=5", &["--max-steps", "at least 1"]),
        (&["--memory-budget-bytes", "1X"], "", &["--memory-budget-bytes", "1M or 2GiB"]),
        (&["--models-dir", "/nope"], "", &["--models-dir /nope", "No such file"]),
        (&["--models-dir", file], "", &["--models-dir", "Not a directory"]),
        (&["--loras-dir", "/nope"], "", &["--loras-dir /nope", "No such file"]),
        (&["--unet", file], "", &["--unet", "nor a directory with config.json"]),
        (&["--models-dir", "/", "--multi-model"], "", &["--models-dir", "--multi-model"]),
        (&["--device", "cpu", "--dtype", "f16"], "", &["--dtype f16", "needs a CUDA device"]),
        (&["--device=cpu"], "SD_DTYPE=f16", &["SD_DTYPE", "needs a CUDA device"]),
        (&["package", "x/y", "-o", "d.zip"], "", &["--output d.zip", ".tar.gz"]),
        (&["package", "x/y", "-o", "d.tgz", "--layout=directory"], "", &["--output d.tgz"]),
    ];
    for (args, variable, words) in table {
        let mut command = sd_server(args);
        command.envs(variable.split_once('='));
        let done = command.output().expect("it starts");
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(64), "{args:?} {variable}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{args:?} {variable}: {said}");
    }
    // What is right is not complained of: the only error is another one.
    for right in [
        "SD_LOG_PROMPTS=No",
        "SD_LOG_PROMPTS=on",
        "SAGEMAKER_MULTI_MODEL=off",
        "SAGEMAKER_MULTI_MODEL=False",
        "SD_MEMORY_BUDGET_BYTES=1G",
        "SD_LOG=WARN",
        "SD_LOG=off,sd_server=debug,[request{id=1}]=trace",
    ] {
        let mut command = sd_server(&["--models-dir", "/nope"]);
        let done = command.envs(right.split_once('=')).output().expect("it starts");
        assert!(text(&done.stderr).contains("--models-dir /nope"), "{right}");
    }
    let help = text(&run(&["serve", "--help"]).stdout);
    let words = help.split_whitespace().map(|word| word.trim_end_matches(['.', ',', ';']));
    let sizes = words.filter(|word| word.starts_with("--max") && word.contains("-bytes"));
    let sizes = sizes.map(|name| format!("{name}=1M")).collect::<std::collections::BTreeSet<_>>();
    assert!(sizes.len() > 6, "{sizes:?}");
    let done = sd_server(&["--models-dir", "/nope"]).args(sizes).output().expect("it starts");
    assert!(text(&done.stderr).contains("--models-dir /nope"), "{}", text(&done.stderr));
}

#[test]
fn a_lora_is_not_taken_for_a_model() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("style.safetensors");
    let header =
        r#"{"lora_unet_mid.lora_down.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let length = header.len() as u64;
    let file = [&length.to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
    std::fs::write(&path, file).expect("written");
    let path = path.to_str().expect("UTF-8");
    let done = run(&["--port", "0", "--model", path]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("style.safetensors: this is a LoRA"));
}

#[test]
fn a_reader_of_the_log_that_stalls_stalls_nothing_else() {
    let mut command = sd_server(&["--model", "demo", "--device", "cpu", "--log", "debug"]);
    let server = Server::spawn(command.stderr(std::process::Stdio::piped()));
    server.wait_until_ready();
    let ping = "GET /ping HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let pings = ping.repeat(299) + last;
    // Each is a line. A pipe holds 64 KiB, and the server some thousand lines.
    for _ in 0..40 {
        assert_eq!(server.raw(pings.as_bytes()).matches("HTTP/1.1 200").count(), 300);
    }
    assert!(server.metric("sd_log_lines_dropped_total") > 0.0);
    let began = std::time::Instant::now();
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    assert!(began.elapsed().as_secs() < 20);
}

#[test]
fn other_failures_exit_with_1() {
    let empty = tempfile::tempdir().expect("a directory");
    let empty = empty.path().to_str().expect("UTF-8");
    let done = run(&["--port", "0", "--model", empty]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("model_index.json"), "{}", text(&done.stderr));
    assert_eq!(run(&["healthcheck", "--port", "1"]).status.code(), Some(1));
}

#[test]
fn help_is_for_people() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    for word in ["serve", "generate", "download", "healthcheck"] {
        assert!(text(&help.stdout).contains(word));
    }
    let serve = text(&run(&["serve", "--help"]).stdout);
    for words in [
        "SageMaker",
        "--drain-timeout-ms <MS>",
        "--max-body-bytes <BYTES>",
        "--max-body-bytes-in-flight <BYTES>",
    ] {
        assert!(serve.contains(words), "{words} in {serve}");
    }
    assert!(!text(&run(&["package", "--help"]).stdout).contains("blur"));
    let bench = text(&run(&["bench", "--help"]).stdout);
    let (load, model) = (bench.find("--rate"), bench.find("Model:"));
    assert!(load.is_some() && load < model, "{bench}");
    assert!(text(&run(&["--version"]).stdout).starts_with("sd-server "));
}

#[test]
fn the_documentation_has_every_option_and_variable_of_serve() {
    let help = text(&run(&["serve", "--help"]).stdout);
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    let document = std::fs::read_to_string(document).expect("a document");
    let names = help.lines().filter_map(|line| {
        let variable = line.trim_start().strip_prefix("[env: ");
        let variable = variable.and_then(|rest| rest.split(['=', ']']).next());
        // Text that is wrapped is indented more.
        let option = line.strip_prefix("      ").filter(|line| line.starts_with("--"));
        variable.or_else(|| option?.split(' ').next())
    });
    let names: Vec<&str> = names.filter(|name| name.len() > 2).collect();
    assert!(names.len() > 50, "{help}");
    for name in names {
        assert!(document.contains(&format!("`{name}`")), "{name}");
    }
    for name in document.split('`').filter(|word| word.starts_with("--")) {
        assert!(
            help.contains(&format!("{name} ")) || help.contains(&format!("{name}\n")),
            "{name}"
        );
    }
}

#[test]
fn healthcheck_asks_the_server() {
    let server = Server::ready(&[]);
    let port = server.address.rsplit(':').next().expect("a port");
    assert!(run(&["healthcheck", "--port", port]).status.success());
    let from_environment = sd_server(&["healthcheck"]).env("SAGEMAKER_BIND_TO_PORT", port).status();
    assert!(from_environment.expect("it starts").success());
}

#[test]
fn signals_end_the_server_with_0() {
    for signal in ["TERM", "INT"] {
        let server = Server::ready(&[]);
        let silent = std::net::TcpStream::connect(&server.address).expect("it listens");
        let began = std::time::Instant::now();
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0), "SIG{signal}");
        assert!(began.elapsed().as_secs() < 20, "a silent connection holds nobody up");
        drop(silent);
    }
}

#[test]
fn a_hangup_ends_the_server_unless_it_was_started_without() {
    for option in ["--default-signal=HUP", "--ignore-signal=HUP"] {
        let mut command = Command::new("env");
        command.args([option, env!("CARGO_BIN_EXE_sd-server"), "--model", "demo"]);
        let server = Server::spawn(command.args(["--device", "cpu", "--threads", "1"]));
        server.wait_until_ready();
        server.signal("HUP");
        if option.starts_with("--ignore") {
            assert_eq!(server.json(&serde_json::json!({ "prompt": "x", "steps": 1 })).status, 200);
            server.signal("TERM");
        }
        assert_eq!(server.wait().code(), Some(0), "{option}");
    }
}

#[test]
fn a_full_standard_output_is_no_end() {
    let mut command = sd_server(&["--model", "demo", "--device", "cpu", "--port", "0"]);
    let full = std::fs::File::create("/dev/full").expect("a device");
    let mut child = command.stdout(full).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let mut logged = |text: &str| lines.any(|line| line.is_ok_and(|line| line.contains(text)));
    assert!(logged("cannot be written to standard output") && logged("ready"), "it went on");
    child.kill().expect("it runs");
    child.wait().expect("it ends");
}

#[test]
fn a_signal_lets_the_picture_under_way_be_finished() {
    let server = Server::ready(&[]);
    let body = r#"{"prompt":"a cat","steps":20}"#;
    let reply = std::thread::scope(|scope| {
        let drawing = scope.spawn(|| server.post(&["accept: image/png"], body));
        std::thread::sleep(std::time::Duration::from_millis(200));
        server.signal("TERM");
        drawing.join().expect("an answer")
    });
    assert_eq!(reply.status, 200);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_directory_may_wrap_the_model() {
    let folder = tempfile::tempdir().expect("a directory");
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    std::os::unix::fs::symlink(demo, folder.path().join("v1")).expect("a link");
    let path = folder.path().join("out.webp");
    let mut command = sd_server(&["generate", "x", "--steps", "1", "--device", "cpu", "--model"]);
    let done = command.arg(folder.path()).arg("-o").arg(&path).output().expect("it starts");
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(image::open(path).is_ok());
}

#[test]
fn a_json_log_is_json_and_keeps_prompts_to_itself() {
    let logged = |more: &[&str]| {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let mut command = sd_server(&["--model", "demo", "--device", "cpu", "--log-format=json"]);
        command.args(more).stderr(log.reopen().expect("a handle"));
        let server = Server::spawn(&mut command);
        while server.ping() != 200 {}
        let body = r#"{"prompt":"a secret","steps":1}"#;
        assert_eq!(server.post(&["x-request-id: r-1"], body).status, 200);
        let job = server.client.post(server.url("/v1/jobs")).header("x-request-id", "r-2");
        let job = job.body(body).send().expect("an answer").text().expect("text");
        let job: serde_json::Value = serde_json::from_str(&job).expect("JSON");
        let path = format!("/v1/jobs/{}/result", job["id"].as_str().expect("an id"));
        while server.client.get(server.url(&path)).send().expect("an answer").status() != 200 {}
        server.signal("TERM");
        server.wait();
        std::fs::read_to_string(log.path()).expect("a log")
    };
    let log = logged(&[]);
    for line in log.lines() {
        let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(event["level"].is_string() && event["message"] != "");
    }
    assert!(log.contains("r-1") && !log.contains("secret"), "{log}");
    let ended = log.lines().find(|line| line.contains("job ended")).expect("a line");
    assert!(ended.contains("r-2") && ended.contains(r#""outcome":"completed""#), "{ended}");
    assert!(logged(&["--log-prompts"]).contains("a secret"));
}

#[test]
fn sagemakers_word_and_port_are_understood() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("an address").port().to_string();
    drop(free);
    let mut command = sd_server(&["serve"]);
    command.env("SAGEMAKER_BIND_TO_PORT", &port).env("SD_PORT", "1").env("SD_MODEL", "demo");
    let server = Server::spawn_as_is(command.env("SD_HOST", "127.0.0.1"));
    assert_eq!(server.address, format!("127.0.0.1:{port}"));
}

#[test]
fn a_variable_that_is_set_to_nothing_is_not_set() {
    let mut command = sd_server(&["--model", "demo"]);
    for name in
        ["SD_THREADS", "SD_MAX_STEPS", "SD_DEVICE", "SD_LOG_FORMAT", "SAGEMAKER_BIND_TO_PORT"]
    {
        command.env(name, "");
    }
    let server = Server::spawn(command.envs([("SD_MODEL", ""), ("SD_LOG_PROMPTS", "")]));
    assert!([200, 503].contains(&server.ping()));
}

#[test]
fn bench_reports_what_became_of_its_load() {
    let server = Server::ready(&[]);
    let url = server.url("/");
    let bench = |more: &[&str]| {
        let body = r#"{"prompt":"x","steps":1,"width":64,"height":64,"n":2}"#;
        let args = ["bench", &url, "--duration-s", "1", "--body", body];
        let done = run(&[&args[..], more].concat());
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stdout)
    };
    for load in [["--clients", "3"], ["--rate", "5"]] {
        let report: serde_json::Value =
            serde_json::from_str(&bench(&[&load[..], &["--json"]].concat())).expect("JSON");
        let number = |name: &str| report[name].as_f64().expect("a number");
        let requests = number("requests");
        assert!(requests > 0.0 && report["statuses"]["200"] == report["requests"], "{report}");
        let pictures = number("images_per_second") * number("seconds");
        assert!((pictures - 2.0 * requests).abs() < 0.5, "{report}");
        assert!(number("rows_per_step") >= 1.0, "{report}");
        assert!(
            report["latency_seconds"]["p99"].as_f64() >= report["latency_seconds"]["p50"].as_f64()
        );
    }
    let table = bench(&["--rate", "5"]);
    assert!(table.contains("throughput") && table.contains("p99"), "{table}");
    assert_eq!(run(&["bench", "http://127.0.0.1:9"]).status.code(), Some(1));
}

#[test]
fn numbers_are_refused_in_words_and_a_seed_may_be_random() {
    let file = std::env::temp_dir().join(format!("seed-{}.png", std::process::id()));
    let path = file.to_str().expect("UTF-8");
    let generate = |more: &[&str]| {
        let args = ["generate", "a cat", "-o", path, "--steps", "1", "--model", "demo"];
        run(&[&args[..], more].concat())
    };
    let drawn = generate(&["--seed", "-1", "--revision", "old"]);
    assert!(drawn.status.success(), "{}", text(&drawn.stderr));
    assert!(
        text(&drawn.stderr).contains("--revision old has no effect"),
        "{}",
        text(&drawn.stderr)
    );
    std::fs::remove_file(&file).expect("the picture");
    for (args, expected) in [
        (["--seed", "x"], "must be a whole number"),
        (["--width", "2.0"], "must be a whole number"),
        (["--height", "-5"], "must be a whole number"),
        (["--scheduler", "karras"], "is a schedule and no sampler: it belongs in --schedule"),
        (["--schedule", "euler"], "is a sampler and no schedule: it belongs in --scheduler"),
        (["--width", "99999999999999999999999"], "is too large"),
    ] {
        let refused = generate(&args);
        let words = text(&refused.stderr);
        assert!(words.contains(args[0]) && words.contains(expected), "{words}");
    }
}
