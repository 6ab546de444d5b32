//! The ControlNet that comes with the built-in model: that it steers, in every dialect.

use std::io::Cursor;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::{Preprocessor, Rgb};
use serde_json::{Value, json};

use crate::harness::{Server, sd_server};
use crate::loras::file;
use crate::pictures::{inpainting_model, repository};

/// How far an edge may lie from where it was to be, in pixels.
const REACH: usize = 2;

fn rgb(file: &[u8]) -> Rgb {
    let picture = image::load_from_memory(file).expect("a picture").to_rgb8();
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    Rgb { width, height, data: picture.into_raw() }
}

/// Where the edges of a picture are.
fn edges(picture: &Rgb) -> Vec<bool> {
    let canny: Preprocessor = "canny".parse().expect("a preprocessor");
    canny.apply(picture).data.chunks(3).map(|pixel| pixel[0] > 0).collect()
}

/// The share of edges that have one of the others near them.
fn met(edges: &[bool], others: &[bool], width: usize) -> f64 {
    let height = others.len() / width;
    let near = |at: usize| {
        let (x, y) = (at % width, at / width);
        let rows = y.saturating_sub(REACH)..(y + REACH + 1).min(height);
        let columns = x.saturating_sub(REACH)..(x + REACH + 1).min(width);
        rows.into_iter().any(|y| others[y * width..][columns.clone()].contains(&true))
    };
    let on: Vec<_> = (0..edges.len()).filter(|at| edges[*at]).collect();
    on.iter().filter(|at| near(**at)).count() as f64 / on.len().max(1) as f64
}

/// The harmonic mean of the shares of drawn edges that were wanted and of wanted ones that were drawn.
fn f1(wanted: &Rgb, drawn: &Rgb) -> f64 {
    let (width, wanted, drawn) = (wanted.width, edges(wanted), edges(drawn));
    let (precision, recall) = (met(&drawn, &wanted, width), met(&wanted, &drawn, width));
    2.0 * precision * recall / (precision + recall).max(1e-9)
}

fn drawn(server: &Server, prompt: &str, seed: u64, more: &Value) -> Vec<u8> {
    let mut body = json!({ "prompt": prompt, "seed": seed, "output_format": "png" });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("one").clone());
    let reply = server.json(&body);
    assert_eq!(reply.status, 200, "{}", reply.json());
    file(&reply.json()["data"])
}

fn base64(file: &[u8]) -> String {
    BASE64_STANDARD.encode(file)
}

/// A picture by one prompt and the same outlines by another, with the net and without: the means of
/// what their edges have in common.
fn steered(server: &Server, steps: &Value) -> [f64; 2] {
    let pairs = [
        ("a red house by the sea at night", "a yellow house on a green hill in daylight"),
        ("a green tree in the snow", "an orange tree in the desert at sunset"),
        ("a blue car in the desert in daylight", "a white car in the snow in daylight"),
        ("a pink balloon on mars", "a blue balloon in the snow in daylight"),
    ];
    let mut sums = [0.0; 2];
    for (seed, (first, second)) in (1..).zip(pairs) {
        let control = drawn(server, first, seed, steps);
        for (sum, scale) in sums.iter_mut().zip([1.0, 0.0]) {
            let mut asked = steps.clone();
            asked["controlnets"] = json!([{
                "model": "canny", "image": base64(&control), "preprocessor": "canny",
                "scale": scale,
            }]);
            let picture = drawn(server, second, seed + 100, &asked);
            *sum += f1(&rgb(&control), &rgb(&picture)) / pairs.len() as f64;
        }
    }
    sums
}

#[test]
fn pictures_have_the_edges_of_the_control_picture() {
    let server = Server::ready(&["--dtype", "f32"]);
    let [with, without] = steered(&server, &json!({ "scheduler": "dpmpp_2m", "steps": 12 }));
    println!("{with:.3} with the net, {without:.3} without");
    assert!(with > 0.55 && without < 0.45, "{with} {without}");
}

#[test]
fn the_variant_for_four_steps_is_steered_too() {
    let mut command = sd_server(&["--model", "demo-lcm", "--device", "cpu", "--threads", "1"]);
    let server = Server::spawn(command.args(["--dtype", "f32"]));
    server.wait_until_ready();
    let [with, without] = steered(&server, &json!({}));
    println!("{with:.3} with the net, {without:.3} without");
    assert!(with > without + 0.15, "{with} {without}");
}

#[test]
fn it_needs_no_option_in_any_dialect() {
    let server = Server::ready(&["--dtype", "f32"]);
    let list = |path: &str| server.client.get(server.url(path)).send().expect("an answer");
    let nets: Value = list("/controlnet/model_list").json().expect("JSON");
    assert_eq!(nets, json!({ "model_list": ["canny"] }));
    let types: Value = list("/controlnet/control_types").json().expect("JSON");
    assert_eq!(types["control_types"]["Canny"]["default_model"], "canny");

    let steps = json!({ "steps": 4, "scheduler": "ddim" });
    let control = drawn(&server, "a red house", 1, &steps);
    let asked = |name: &str| {
        let mut asked = steps.clone();
        asked["controlnets"] =
            json!([{ "model": name, "image": base64(&control), "preprocessor": "canny" }]);
        drawn(&server, "a blue house", 2, &asked)
    };
    let native = rgb(&asked("canny")).data;
    assert_ne!(native, rgb(&drawn(&server, "a blue house", 2, &steps)).data);
    assert_eq!(native, rgb(&asked("Canny")).data);

    let unit = json!({
        "model": "canny", "module": "canny", "image": base64(&control), "processor_res": 128,
    });
    let body = json!({
        "prompt": "a blue house", "seed": 2, "steps": 4, "sampler_name": "DDIM",
        "alwayson_scripts": { "controlnet": { "args": [unit] } },
    });
    let request = server.client.post(server.url("/sdapi/v1/txt2img")).body(body.to_string());
    let reply = request.header("content-type", "application/json").send().expect("an answer");
    let reply: Value = reply.json().expect("JSON");
    assert_eq!(native, rgb(&file(&reply["images"][0])).data, "{}", reply["info"]);

    let folder = tempfile::tempdir().expect("a directory");
    let [input, out] = ["control.png", "out.png"].map(|name| folder.path().join(name));
    std::fs::write(&input, &control).expect("written");
    let mut command = sd_server(&["generate", "a blue house", "--model", "demo", "--seed", "2"]);
    command.args(["--steps", "4", "--scheduler", "ddim", "--dtype", "f32", "--threads", "1"]);
    command.args(["--device", "cpu", "--controlnet", "canny", "--control-preprocessor", "canny"]);
    let output = command.arg("--control-image").arg(&input).arg("-o").arg(&out).output();
    let output = output.expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(native, rgb(&std::fs::read(&out).expect("a picture")).data);
}

#[test]
fn another_name_or_another_model_is_refused_with_those_that_there_are() {
    let server = Server::ready(&[]);
    let reply = server.json(&json!({
        "prompt": "a", "steps": 1, "controlnets": [{ "model": "depth", "image": "" }],
    }));
    let message = reply.json()["error"]["message"].to_string();
    assert!(reply.status == 422 && message.contains("known are canny"), "{message}");
    let folder = tempfile::tempdir().expect("a directory");
    let input = folder.path().join("control.png");
    image::RgbImage::new(8, 8).save(&input).expect("written");
    for (model, name, words) in [
        ("demo", "depth", "nor one of the model's own (canny)"),
        ("acme/other", "canny", "neither a file, nor a directory with config.json\n"),
    ] {
        let mut command = sd_server(&["generate", "a", "--model", model, "--controlnet", name]);
        let output = command.arg("--control-image").arg(&input).output().expect("it runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(64) && message.contains(words), "{message}");
    }
}

#[test]
fn the_variant_for_inpainting_is_steered_too() {
    let folder = tempfile::tempdir().expect("a directory");
    inpainting_model(folder.path());
    let nets = repository("models/demo/controlnets");
    let [model, nets] = [folder.path(), &nets].map(|path| path.to_str().expect("UTF-8"));
    let mut command = sd_server(&["--model", model, "--device", "cpu", "--threads", "1"]);
    let server = Server::spawn(command.args(["--controlnets-dir", nets, "--dtype", "f32"]));
    server.wait_until_ready();
    let plain = |grey| {
        let mut png = Cursor::new(Vec::new());
        let picture = image::RgbImage::from_pixel(128, 128, image::Rgb([grey; 3]));
        picture.write_to(&mut png, image::ImageFormat::Png).expect("memory");
        base64(png.get_ref())
    };
    let [with, without] = steered(
        &server,
        &json!({ "image": plain(128), "mask": plain(255), "strength": 1, "steps": 12 }),
    );
    println!("{with:.3} with the net, {without:.3} without");
    assert!(with > without + 0.15, "{with} {without}");
}

#[test]
fn a_model_that_it_does_not_fit_refuses_it_by_name() {
    let [model, net] = ["models/tests/fixtures/v1", "models/demo/controlnets/canny"]
        .map(|path| repository(path).to_str().expect("UTF-8").to_owned());
    let folder = tempfile::tempdir().expect("a directory");
    let input = folder.path().join("control.png");
    image::RgbImage::new(8, 8).save(&input).expect("written");
    let mut command = sd_server(&["generate", "a", "--model", &model, "--device", "cpu"]);
    command.args(["--controlnet", &net, "--steps", "1", "-W", "64", "-H", "64"]);
    let output =
        command.arg("--control-image").arg(&input).arg("-o").arg(folder.path().join("a.png"));
    let output = output.output().expect("it runs");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success()
            && message.contains("canny")
            && message.contains("is no ControlNet of this model"),
        "{message}"
    );
}
