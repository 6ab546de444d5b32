//! ControlNets by name, from a folder: in every dialect and on the command line, and what is refused.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::{DynamicImage, ImageFormat, RgbImage};
use serde_json::{Value, json};

use crate::harness::{Server, sd_server};
use crate::inputs::file as encoded;
use crate::invocations::infotext;
use crate::loras::{file, pixels};

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures")
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in from.read_dir().expect("a directory").map(|entry| entry.expect("an entry")) {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).expect("copied")),
        }
    }
}

/// A model that the nets of the fixtures fit; each test has its own.
fn model(test: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("control-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&fixtures().join("v1"), &root);
    std::fs::remove_dir_all(root.join("unet")).expect("removed");
    copy(&fixtures().join("control/v1"), &root);
    root
}

fn server(test: &str) -> Server {
    let (model, nets) = (model(test), fixtures().join("control/nets"));
    let [model, nets] = [&model, &nets].map(|path| path.to_str().expect("UTF-8"));
    let mut command = sd_server(&["--model", model, "--device", "cpu", "--threads", "1"]);
    let server = Server::spawn(command.args(["--controlnets-dir", nets, "--dtype", "f32"]));
    server.wait_until_ready();
    server
}

/// A picture with edges, in a PNG file.
pub(crate) fn shapes(width: u32, height: u32) -> Vec<u8> {
    let pixel = |x: u32, y: u32| {
        let inside = x > width / 4 && x < width / 2 && y > height / 3 && y < height / 2;
        image::Rgb(if inside { [230, 40, 90] } else { [20, (x % 50) as u8, 60] })
    };
    encoded(&DynamicImage::from(RgbImage::from_fn(width, height, pixel)), ImageFormat::Png)
}

pub(crate) fn base64(file: &[u8]) -> String {
    BASE64_STANDARD.encode(file)
}

fn post(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let request = server.client.post(server.url(path)).body(body.to_string());
    let reply = request.header("content-type", "application/json").send().expect("an answer");
    (reply.status().as_u16(), reply.json().expect("JSON"))
}

fn get(server: &Server, path: &str) -> Value {
    let reply = server.client.get(server.url(path)).send().expect("an answer");
    reply.json().expect("JSON")
}

fn native(server: &Server, nets: &Value) -> Vec<u8> {
    let reply = server.json(&json!({
        "prompt": "a red house", "seed": 3, "steps": 4, "width": 64, "height": 64,
        "guidance_scale": 4, "scheduler": "ddim", "output_format": "png", "controlnets": nets,
    }));
    assert_eq!(reply.status, 200, "{}", reply.json());
    file(&reply.json()["data"])
}

fn sdapi(unit: &Value) -> Value {
    json!({
        "prompt": "a red house", "seed": 3, "steps": 4, "width": 64, "height": 64, "cfg_scale": 4,
        "sampler_name": "DDIM", "alwayson_scripts": { "controlnet": { "args": [unit] } },
    })
}

#[test]
fn every_dialect_and_the_command_line_draw_the_same() {
    let server = server("same");
    let picture = shapes(64, 64);
    let net = json!([{ "model": "edges", "image": base64(&picture), "scale": 0.7 }]);
    let drawn = native(&server, &net);
    assert_ne!(pixels(&drawn), pixels(&native(&server, &json!(null))), "the net steers");
    let unit = json!({
        "enabled": true, "model": "edges [01234567]", "image": base64(&picture), "weight": 0.7,
        "resize_mode": "Just Resize", "module": "none",
    });
    let (status, reply) = post(&server, "/sdapi/v1/txt2img", &sdapi(&unit));
    assert_eq!(status, 200, "{reply}");
    let images = reply["images"].as_array().expect("a list");
    assert_eq!(images.len(), 2, "the control picture follows");
    assert_eq!(pixels(&file(&images[0])), pixels(&drawn));
    assert_eq!(pixels(&file(&images[1])), pixels(&picture));
    let text = infotext(&file(&images[0]));
    let said = "Module: none, Model: edges, Weight: 0.7, Resize Mode: Just Resize, Processor Res: 512, \
                Guidance Start: 0, Guidance End: 1, Pixel Perfect: False, Control Mode: Balanced";
    assert!(text.contains(&format!(", ControlNet 0: \"{said}\", ")), "{text}");
    let info: Value = serde_json::from_str(reply["info"].as_str().expect("text")).expect("JSON");
    assert_eq!(info["extra_generation_params"]["ControlNet 0"], said);
    let text = infotext(&drawn);
    let said =
        "Weight: 0.7, Resize Mode: Just Resize, Guidance Start: 0, Guidance End: 1, Control Mode";
    assert!(text.contains(said), "{text}");

    let folder = tempfile::tempdir().expect("a directory");
    let [input, out] = ["control.png", "out.png"].map(|name| folder.path().join(name));
    std::fs::write(&input, &picture).expect("written");
    let model = model("generate");
    let net = fixtures().join("control/nets/edges");
    let [input, out, model, net] =
        [&input, &out, &model, &net].map(|path| path.to_str().expect("UTF-8").to_owned());
    let mut command = sd_server(&["generate", "a red house", "--model", &model, "--seed", "3"]);
    command.args(["--steps", "4", "-W", "64", "-H", "64", "--guidance-scale", "4"]);
    command.args(["--scheduler", "ddim", "--dtype", "f32", "--threads", "1", "-o", &out]);
    command.args(["--controlnet", &net, "--control-image", &input, "--control-scale", "0.7"]);
    let output = command.args(["--device", "cpu"]).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(pixels(&std::fs::read(&out).expect("a picture")), pixels(&drawn));
}

#[test]
fn preprocessors_make_what_the_net_sees() {
    let server = server("preprocessors");
    let picture = shapes(64, 64);
    for (name, low) in
        [("canny", Some(30)), ("invert", None), ("threshold", Some(50)), ("none", None)]
    {
        let detect = json!({
            "controlnet_module": name, "controlnet_input_images": [base64(&picture)],
            "controlnet_processor_res": 64, "controlnet_threshold_a": low.unwrap_or(-1),
        });
        let (status, reply) = post(&server, "/controlnet/detect", &detect);
        assert_eq!((status, &reply["info"]), (200, &json!("Success")), "{reply}");
        let map = file(&reply["images"][0]);
        assert_eq!(pixels(&map) == pixels(&picture), name == "none", "{name}");
        let made = json!([{
            "model": "edges", "image": base64(&picture), "preprocessor": name, "low": low,
        }]);
        let given = json!([{ "model": "edges", "image": base64(&map) }]);
        let [made, given] = [made, given].map(|nets| pixels(&native(&server, &nets)));
        assert_eq!(made, given, "{name}");
        // At the same resolution the extension's unit sees the same.
        let unit = json!({
            "model": "EDGES", "input_image": base64(&picture), "module": name, "threshold_a": low,
            "processor_res": 64, "resize_mode": 1, "save_detected_map": false,
        });
        let (status, reply) = post(&server, "/sdapi/v1/txt2img", &sdapi(&unit));
        assert_eq!(status, 200, "{reply}");
        assert_eq!(reply["images"].as_array().map(Vec::len), Some(1));
        assert_eq!(pixels(&file(&reply["images"][0])), given, "{name}");
    }
}

#[test]
fn a_control_picture_gives_the_size_and_may_be_the_input_image() {
    let server = server("size");
    let wide = base64(&shapes(100, 72));
    let body = json!({
        "prompt": "a red house", "steps": 2, "output_format": "png",
        "controlnets": [{ "model": "edges", "image": wide }],
    });
    let reply = server.json(&body);
    assert_eq!(reply.status, 200, "{}", reply.json());
    let drawn = image::load_from_memory(&file(&reply.json()["data"])).expect("a picture");
    assert_eq!((drawn.width(), drawn.height()), (96, 72));
    // Without a picture of its own, a unit sees the input image; and so in a hires pass.
    let unit =
        json!({ "enabled": true, "model": "edges", "control_mode": 2, "pixel_perfect": true });
    let mut body = sdapi(&unit);
    body["init_images"] = json!([wide]);
    let (status, reply) = post(&server, "/sdapi/v1/img2img", &body);
    assert_eq!(status, 200, "{reply}");
    assert_eq!(reply["images"].as_array().map(Vec::len), Some(2));
    let mut unit = unit;
    (unit["image"], unit["module"]) = (json!(wide), json!("canny"));
    let mut body = sdapi(&unit);
    (body["enable_hr"], body["hr_scale"]) = (json!(true), json!(1.5));
    let (status, reply) = post(&server, "/sdapi/v1/txt2img", &body);
    assert_eq!(status, 200, "{reply}");
    let sides = |k: usize| {
        let map = image::load_from_memory(&file(&reply["images"][k])).expect("a picture");
        (map.width(), map.height())
    };
    assert_eq!([sides(0), sides(1), sides(2)], [(96, 96), (96, 96), (64, 64)]);
    let text = infotext(&file(&reply["images"][0]));
    let said = "Resize Mode: Crop and Resize, Processor Res: 512, Threshold A: 100, Threshold B: 200, \
                Guidance Start: 0, Guidance End: 1, Pixel Perfect: True, Control Mode: ControlNet is";
    assert!(text.contains(said), "{text}");
}

#[test]
fn nets_and_preprocessors_are_listed() {
    let server = server("lists");
    assert_eq!(get(&server, "/controlnet/version"), json!({ "version": 3 }));
    assert_eq!(get(&server, "/controlnet/settings"), json!({ "control_net_unit_count": 3 }));
    let nets = get(&server, "/controlnet/model_list?update=true")["model_list"].clone();
    let names: Vec<_> = nets.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(names.len(), 4);
    assert!(names[0].starts_with("edges [") && names[0].len() == "edges [01234567]".len());
    let modules = get(&server, "/controlnet/module_list?alias_names=false");
    let listed = modules["module_list"].as_array().expect("a list");
    assert_eq!(listed[..4], ["none", "canny", "invert", "threshold"]);
    assert!(listed.contains(&json!("ip-adapter-auto")), "{listed:?}");
    assert_eq!(modules["module_detail"]["canny"]["sliders"][1]["value"], 100.0);
    let types = get(&server, "/controlnet/control_types")["control_types"].clone();
    assert_eq!(types["All"]["model_list"].as_array().map(Vec::len), Some(5));
    assert_eq!(types["Canny"]["default_option"], "canny");
    assert_eq!(types["Shuffle"]["model_list"].as_array().map(Vec::len), Some(2));
    assert_eq!(get(&server, "/info")["limits"]["max_controlnets"], 3);
    assert_eq!(get(&server, "/sdapi/v1/scripts")["img2img"], json!(["controlnet"]));
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let server = server("refusals");
    let picture = base64(&shapes(64, 64));
    let net = |changes: Value| {
        let mut net = json!({ "model": "edges", "image": picture });
        net.as_object_mut().expect("an object").extend(changes.as_object().expect("one").clone());
        json!([net])
    };
    for (nets, words) in [
        (
            net(json!({ "model": "lines" })),
            "controlnets names the ControlNet \"lines\", which is unknown",
        ),
        (net(json!({ "model": null })), "controlnets[0] must have \"model\""),
        (net(json!({ "image": null })), "controlnets[0] must have \"image\""),
        (net(json!({ "image": "AAAA" })), "controlnets[0].image"),
        (net(json!({ "scale": 11 })), "controlnets[0].scale must be from -10"),
        (net(json!({ "start": 0.5, "end": 0.5 })), "a start before its end"),
        (
            net(json!({ "preprocessor": "openpose" })),
            "controlnets[0].preprocessor \"openpose\" is not",
        ),
        (net(json!({ "low": 5 })), "controlnets[0].low has no effect"),
        (net(json!({ "strength": 5 })), "controlnets[0] has no \"strength\""),
        (json!(vec![net(json!({}))[0].clone(); 4]), "4 entries; at most 3"),
    ] {
        let reply = server.json(&json!({ "prompt": "a", "steps": 1, "controlnets": nets }));
        let message = reply.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(
            [400, 422].contains(&reply.status) && message.contains(words),
            "{words}: {message}"
        );
    }
    for (unit, words) in [
        (json!({ "enabled": true, "model": "edges" }), "controlnet.args[0].image is required"),
        (json!({ "enabled": true, "image": picture }), "controlnet.args[0].model must name"),
        (json!({ "model": "tile", "image": picture }), "names the ControlNet \"tile\""),
        (
            json!({ "enabled": true, "module": "reference_only", "model": "None" }),
            "args[0].module \"reference_only\" is not supported",
        ),
        (
            json!({ "model": "edges", "module": "depth", "image": picture }),
            "args[0].module \"depth\" is",
        ),
        (
            json!({ "model": "edges", "image": picture, "advanced_weighting": [1, 2] }),
            "controlnet.args names \"edges\", which takes 5 advanced weights, not 2",
        ),
    ] {
        let (status, reply) = post(&server, "/sdapi/v1/txt2img", &sdapi(&unit));
        let message = reply["detail"].as_str().unwrap_or_default();
        assert!([400, 422].contains(&status) && message.contains(words), "{words}: {message}");
    }
    let mut by_places = sdapi(&json!({}));
    by_places["alwayson_scripts"]["controlnet"]["args"] =
        json!({ "0": { "model": "tile", "image": picture } });
    let (_, reply) = post(&server, "/sdapi/v1/txt2img", &by_places);
    assert!(reply["detail"].as_str().is_some_and(|told| told.contains("\"tile\"")), "{reply}");
    // What is off asks for nothing.
    let nothing = json!({ "enabled": true, "model": "edges", "image": picture, "mask": null,
                          "mask_image": "", "input_image": null, "advanced_weighting": [] });
    assert_eq!(post(&server, "/sdapi/v1/txt2img", &sdapi(&nothing)).0, 200);
    for off in [json!({ "enabled": false, "model": "x" }), json!({}), json!(null)] {
        let (status, reply) = post(&server, "/sdapi/v1/txt2img", &sdapi(&off));
        assert_eq!((status, reply["images"].as_array().map(Vec::len)), (200, Some(1)), "{reply}");
    }
    let (status, reply) = post(&server, "/controlnet/detect", &json!({}));
    assert_eq!(
        (status, reply["detail"].as_str()),
        (422, Some("controlnet_input_images has no image"))
    );
}

#[test]
fn the_command_line_says_what_is_wrong_with_nets() {
    let net = fixtures().join("control/nets/edges");
    let net = net.to_str().expect("UTF-8");
    let folder = tempfile::tempdir().expect("a directory");
    let picture = folder.path().join("control.png");
    std::fs::write(&picture, shapes(64, 64)).expect("written");
    let picture = picture.to_str().expect("UTF-8");
    for (args, words) in [
        (&["--controlnet", net][..], "--control-image"),
        (&["--control-image", picture], "--controlnet"),
        (
            &["--controlnet", net, "--controlnet", net, "--control-image", picture],
            "2 nets and 1 pictures",
        ),
        (
            &["--controlnet", "nowhere", "--control-image", picture],
            "neither a file, nor a directory",
        ),
        (
            &[
                "--controlnet",
                net,
                "--control-image",
                picture,
                "--control-end",
                "1",
                "--control-end",
                "1",
            ],
            "--control-end: is given 2 times, --controlnet 1 times",
        ),
    ] {
        let output = sd_server(&["generate", "a", "--model", "demo"]).args(args).output();
        let output = output.expect("it runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{message}");
        assert!(message.contains(words), "{words}: {message}");
    }
    // What the model refuses as it begins goes by the option, too.
    let output = sd_server(&["generate", "a", "--model", "demo", "-W", "64", "-H", "64"])
        .args(["--controlnet", net, "--control-image", picture])
        .output();
    let message = String::from_utf8_lossy(&output.expect("it runs").stderr).into_owned();
    assert!(
        message.contains("--controlnet edges: ") && !message.contains("controlnets"),
        "{message}"
    );
    let canny = ["--controlnet", "canny", "--control-image", picture];
    for (args, words) in [
        (&["--control-scale", "100"][..], "--control-scale must be from -10 to 10, not 100"),
        (&["--control-preprocessor", "depth"], "--control-preprocessor \"depth\" is"),
        (&["--control-end", "2"], "--control-end must be from 0 to 1, not 2"),
        (
            &["--controlnet", net, "--control-image", "Cargo.toml"],
            "--control-image number 2 is in no known format",
        ),
    ] {
        let output = sd_server(&["generate", "a", "--model", "demo", "-W", "64", "-H", "64"])
            .args(canny)
            .args(args)
            .output();
        let output = output.expect("it runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{message}");
        assert!(message.contains(words), "{words}: {message}");
    }
}
