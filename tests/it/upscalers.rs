//! Upscalers of `--upscalers-dir`: listed, in the hires pass of every dialect, and alone ("extras").

use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::{ImageFormat, RgbImage};
use serde_json::{Value, json};

use crate::harness::{Server, sd_server};
use crate::loras::{file, pixels};

fn server(more: &[&str]) -> Server {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/upscalers");
    let folder = folder.to_str().expect("UTF-8");
    Server::ready(&[&["--upscalers-dir", folder, "--dtype", "f32"], more].concat())
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

/// A PNG file with waves, in base64.
fn waves(width: u32, height: u32) -> String {
    let wave = |x: u32, y: u32| {
        let value = |a: u32, b: u32| (127.0 + 120.0 * f64::from(x * a + y * b).sin()) as u8;
        image::Rgb([value(1, 2), value(2, 1), value(3, 5)])
    };
    let mut png = std::io::Cursor::new(Vec::new());
    RgbImage::from_fn(width, height, wave).write_to(&mut png, ImageFormat::Png).expect("a file");
    BASE64_STANDARD.encode(png.into_inner())
}

fn size(file: &[u8]) -> (u32, u32) {
    let picture = image::load_from_memory(file).expect("a picture");
    (picture.width(), picture.height())
}

#[test]
fn upscalers_are_listed() {
    let server = server(&[]);
    let names = |path: &str| -> Vec<String> {
        let list = get(&server, path);
        let name = |item: &Value| item["name"].as_str().expect("a name").to_owned();
        list.as_array().expect("a list").iter().map(name).collect()
    };
    let listed = names("/sdapi/v1/upscalers");
    assert_eq!(listed[..3], ["None", "Lanczos", "Nearest"]);
    assert!(listed.contains(&"old-4x".into()) && listed.contains(&"compact-3x".into()));
    assert_eq!(names("/sdapi/v1/latent-upscale-modes").len(), 6);
    assert!(names("/sdapi/v1/realesrgan-models").is_empty());
}

#[test]
fn files_of_real_esrgan_have_their_names_of_automatic1111() {
    let folder = tempfile::tempdir().expect("a folder");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/upscalers");
    for (from, to) in [("old-4x.pth", "RealESRGAN_x4plus.pth"), ("new-2x.pth", "other.pth")] {
        std::fs::copy(fixtures.join(from), folder.path().join(to)).expect("a copy");
    }
    let server = Server::ready(&["--upscalers-dir", folder.path().to_str().expect("UTF-8")]);
    let listed = get(&server, "/sdapi/v1/realesrgan-models");
    let wanted = json!([{ "name": "R-ESRGAN 4x+", "path": "RealESRGAN_x4plus.pth", "scale": 4 }]);
    assert_eq!(listed, wanted);
    let upscalers = get(&server, "/sdapi/v1/upscalers");
    assert_eq!([&upscalers[3]["name"], &upscalers[4]["name"]], ["R-ESRGAN 4x+", "other"]);
    let upscaled = |name: &str| {
        let body = json!({ "image": waves(16, 16), "upscaler_1": name, "upscaling_resize": 4 });
        post(&server, "/sdapi/v1/extra-single-image", &body)
    };
    let drawn = ["R-ESRGAN 4x+", "r-esrgan 4X+", "RealESRGAN_x4plus", "RealESRGAN_x4plus.pth"];
    let drawn = drawn.map(|name| pixels(&file(&upscaled(name).1["image"])));
    assert!(drawn.iter().all(|other| *other == drawn[0]));
    let (status, reply) = upscaled("R-ESRGAN 2x+");
    let why = "the upscaler \"R-ESRGAN 2x+\", whose file RealESRGAN_x2plus is missing; known are";
    let said = reply["detail"].as_str().is_some_and(|text| text.contains(why));
    assert!(status == 422 && said, "{reply}");
}

#[test]
fn on_the_command_line_a_name_that_is_built_in_is_no_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/upscalers");
    for name in ["Lanczos", "Lanczos.pth", "mine.bin"] {
        std::fs::copy(fixtures.join("new-2x.pth"), folder.path().join(name)).expect("a copy");
    }
    let generate = |upscaler: &str| {
        let mut command = sd_server(&["generate", "a cat", "--model", "demo", "-o", "out.png"]);
        command.args(["--steps", "1", "--seed", "3", "--device", "cpu", "--dtype", "f32"]);
        command.args(["-W", "64", "-H", "64", "--hires-width", "128", "--hires-steps", "2"]);
        command.current_dir(folder.path()).args(["--hires-upscaler", upscaler]);
        command.output().expect("it runs")
    };
    let mut drawn = Vec::new();
    for (upscaler, title) in [
        ("Lanczos", "Lanczos,"),
        ("lanczos", "Lanczos,"),
        ("Lanczos.pth", "Lanczos.pth,"),
        ("./mine.bin", "mine.bin,"),
    ] {
        let done = generate(upscaler);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let file = std::fs::read(folder.path().join("out.png")).expect("a picture");
        let text = crate::invocations::infotext(&file);
        assert!(text.contains(&format!("Hires upscaler: {title}")), "{text}");
        drawn.push(pixels(&file));
    }
    assert!(drawn[0] == drawn[1] && drawn[2] == drawn[3] && drawn[0] != drawn[2]);
    let refused = generate("./Lanczos");
    let words = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(64), "{words}");
    assert!(words.contains("--hires-upscaler ./Lanczos: the file is called like"), "{words}");
}

#[test]
fn the_texts_of_a_file_are_kept() {
    let server = server(&[]);
    let texts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/texts");
    let read = |file: &[u8]| {
        let body = json!({ "image": BASE64_STANDARD.encode(file) });
        post(&server, "/sdapi/v1/png-info", &body).1
    };
    for name in ["zTXt.png", "unicode.jpg", "comfyui.png"] {
        let before = std::fs::read(texts.join(name)).expect("a file");
        let body = json!({ "image": BASE64_STANDARD.encode(&before), "upscaler_1": "Nearest" });
        let (_, reply) = post(&server, "/sdapi/v1/extra-single-image", &body);
        let after = read(&file(&reply["image"]));
        let mut wanted = read(&before);
        wanted["items"]["postprocessing"] =
            "Postprocess upscale by: 2.0, Postprocess upscaler: Nearest".into();
        assert_eq!(after, wanted, "{name}");
        let body = json!({ "image": reply["image"], "upscaler_1": "Lanczos" });
        let (_, reply) = post(&server, "/sdapi/v1/extra-single-image", &body);
        let again = read(&file(&reply["image"]))["items"]["postprocessing"].to_string();
        assert_eq!(again.matches("Postprocess upscale by").count(), 1, "{again}");
    }
}

#[test]
fn the_hires_pass_of_every_dialect_takes_them() {
    let server = server(&[]);
    let native = |upscaler: &str| {
        server.json(&json!({
            "prompt": "a red house", "seed": 3, "steps": 2, "width": 64, "height": 64,
            "scheduler": "euler", "output_format": "png", "prompt_syntax": "a1111",
            "hires_width": 128, "hires_upscaler": upscaler, "hires_steps": 2, "hires_strength": 0.5,
        }))
    };
    let mut drawn: Vec<Vec<u8>> = Vec::new();
    for upscaler in ["Latent", "None", "Lanczos", "nearest", "old-4x", "new-2x"] {
        let reply = native(upscaler);
        assert_eq!(reply.status, 200, "{upscaler}: {}", reply.json());
        let file = file(&reply.json()["data"]);
        assert_eq!(size(&file), (128, 128), "{upscaler}");
        let text = crate::invocations::infotext(&file);
        let said =
            text.to_lowercase().contains(&format!("hires upscaler: {upscaler}").to_lowercase());
        assert!(said, "{text}");
        let pixels = pixels(&file);
        assert!(!drawn.contains(&pixels) || upscaler == "Lanczos", "{upscaler}");
        drawn.push(pixels);
    }
    let body = json!({
        "prompt": "a red house", "seed": 3, "steps": 2, "width": 64, "height": 64, "cfg_scale": 7.5,
        "sampler_name": "Euler", "enable_hr": true, "hr_scale": 2, "hr_upscaler": "old-4x",
        "hr_second_pass_steps": 1, "denoising_strength": 0.5,
    });
    let (status, reply) = post(&server, "/sdapi/v1/txt2img", &body);
    assert_eq!(status, 200, "{reply}");
    assert_eq!(size(&file(&reply["images"][0])), (128, 128));
    let unknown = native("old-5x");
    assert_eq!(unknown.status, 422);
    let message = unknown.json()["error"]["message"].to_string();
    assert!(message.contains("old-5x") && message.contains("old-4x"), "{message}");
    let (status, reply) = post(&server, "/sdapi/v1/txt2img", &{
        let mut body = body;
        body["hr_upscaler"] = "pictures".into();
        body
    });
    assert_eq!(status, 422, "{reply}");
    assert!(reply["detail"].to_string().contains("ESRGAN family"), "{reply}");
}

#[test]
fn pictures_are_upscaled_alone() {
    let server = server(&[]);
    let single = |more: Value| {
        let mut body = json!({ "image": waves(50, 41), "upscaler_1": "Lanczos" });
        body.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
        let (status, reply) = post(&server, "/sdapi/v1/extra-single-image", &body);
        assert_eq!(status, 200, "{reply}");
        (file(&reply["image"]), reply)
    };
    for (more, expected, info) in [
        (json!({}), (96, 80), "Postprocess upscale by: 2.0, Postprocess upscaler: Lanczos"),
        (
            json!({ "upscaling_resize": 3.3, "upscaler_1": "old-4x" }),
            (160, 128),
            "Postprocess upscale by: 3.3, Postprocess upscaler: old-4x",
        ),
        (
            json!({ "resize_mode": 1, "upscaling_resize_w": 61, "upscaling_resize_h": 40 }),
            (61, 40),
            "Postprocess upscale to: 61x40, Postprocess crop to: 61x40, Postprocess upscaler: Lanczos",
        ),
        (
            json!({ "resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64,
                    "upscaling_crop": false, "upscaler_2": "Nearest",
                    "extras_upscaler_2_visibility": 0.5, "gfpgan_visibility": 0, "upscale_first": true,
                    "show_extras_results": true, "codeformer_weight": 0.7 }),
            (72, 64),
            "Postprocess upscale to: 64x64, Postprocess upscaler: Lanczos, Postprocess upscaler 2: Nearest",
        ),
        (json!({ "upscaler_1": "None" }), (50, 41), ""),
        (json!({ "upscaler_1": "" }), (50, 41), ""),
    ] {
        let (file, reply) = single(more.clone());
        assert_eq!(size(&file), expected, "{more}");
        assert_eq!(reply["html_info"], format!("<p>{info}</p>"));
    }
    let (_, reply) = single(json!({ "upscaler_3": "Lanczos", "codeformer_weight": 1 }));
    assert_eq!(reply["warnings"], json!(["upscaler_3 has no effect here and was ignored"]));
    let (unchanged, _) = single(json!({ "upscaler_1": null }));
    assert_eq!(pixels(&unchanged), pixels(&BASE64_STANDARD.decode(waves(50, 41)).expect("base64")));
    let list =
        json!([{ "data": waves(50, 41), "name": "a" }, { "data": waves(16, 24), "name": "b" }]);
    let body = json!({ "imageList": list, "upscaler_1": "new-2x" });
    let (status, reply) = post(&server, "/sdapi/v1/extra-batch-images", &body);
    assert_eq!(status, 200, "{reply}");
    let sizes: Vec<_> = [0, 1].map(|i| size(&file(&reply["images"][i]))).to_vec();
    assert_eq!(sizes, [(96, 80), (32, 48)]);
}

#[test]
fn what_extras_cannot_do_is_refused_by_name() {
    let server = server(&["--max-pixels", "65536"]);
    for (more, field) in [
        (json!({ "gfpgan_visibility": 0.5 }), "gfpgan_visibility"),
        (json!({ "codeformer_visibility": 1 }), "codeformer_visibility"),
        (json!({ "upscaler_1": "old-5x" }), "upscaler_1"),
        (json!({ "upscaler_1": "pictures" }), "upscaler_1"),
        (json!({ "upscaler_2": "old-5x", "extras_upscaler_2_visibility": 1 }), "upscaler_2"),
        (json!({ "upscaling_resize": 8 }), "upscaling_resize"),
        (json!({ "upscaling_resize": 0.1 }), "upscaling_resize"),
        (json!({ "resize_mode": 2 }), "resize_mode"),
        (
            json!({ "resize_mode": 1, "upscaling_resize_w": 500, "upscaling_resize_h": 500 }),
            "upscaling_resize_w",
        ),
        (json!({ "image": "AAAA" }), "image"),
        (json!({ "image": null }), "image"),
    ] {
        let mut body = json!({ "image": waves(50, 41), "upscaler_1": "Lanczos" });
        body.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
        let (status, reply) = post(&server, "/sdapi/v1/extra-single-image", &body);
        assert!([400, 422].contains(&status), "{more}: {status} {reply}");
        assert!(reply["detail"].as_str().expect("a sentence").contains(field), "{more}: {reply}");
    }
    let (status, reply) = post(&server, "/sdapi/v1/extra-batch-images", &json!({}));
    assert!(status == 400 && reply["detail"].to_string().contains("imageList"), "{reply}");
}
