//! Pictures of the built-in model: against diffusers' for every sampler, and against their prompts.

use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use candle_core::{Device, safetensors};
use image::RgbImage;
use serde_json::{Value, json};

use crate::harness::{Server, sd_server};

/// The picture of `tests/pictures/`: what `models/tests/make_pictures.py` asks diffusers for.
const REFERENCE: [&str; 6] =
    ["a red house by the sea at night", "--seed", "7", "--steps", "20", "--dtype"];

/// The prompt of the pictures that are made from another.
const CHANGED: &str = "a blue house in the snow at sunset";

/// And of those that a model for inpainting makes.
const PAINTED: &str = "a yellow balloon by the sea at night";

pub(crate) fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// What the command draws in f32 on the CPU.
fn drawn(args: &[&str]) -> RgbImage {
    drawn_by("demo", args)
}

fn drawn_by(model: &str, args: &[&str]) -> RgbImage {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("out.png");
    let mut command = sd_server(&["generate", "--model", model, "--device", "cpu"]);
    let done = command.args(args).arg("-o").arg(&path).output().expect("the binary starts");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    image::open(&path).expect("a picture").to_rgb8()
}

/// How far a picture is from diffusers', when that is not too far: mean and maximum of 255.
fn distance(ours: &RgbImage, name: &str) -> String {
    let reference = repository(&format!("tests/pictures/{name}.png"));
    let reference = image::open(reference).expect("a reference").to_rgb8();
    assert_eq!(ours.dimensions(), reference.dimensions());
    let differences = || ours.iter().zip(reference.iter()).map(|(a, b)| a.abs_diff(*b));
    let max = differences().max().unwrap_or_default();
    let mean = differences().map(f64::from).sum::<f64>() / differences().count() as f64;
    let distance = format!("{name}: mean {mean:.4}/255, max {max}/255");
    assert!(mean <= 0.5 && max <= 4, "{distance}");
    distance
}

/// The samplers of the pictures in `tests/pictures`.
const PICTURED: [&str; 10] = [
    "pndm",
    "ddim",
    "ddpm",
    "euler",
    "euler_a",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "unipc",
    "lcm",
];

#[test]
fn every_sampler_draws_the_picture_of_diffusers() {
    for scheduler in PICTURED {
        let ours = drawn(&[&REFERENCE[..], &["f32", "--scheduler", scheduler]].concat());
        println!("{}", distance(&ours, scheduler));
    }
}

#[test]
fn pictures_from_pictures_are_those_of_diffusers() {
    let path = |name: &str| repository(&format!("tests/pictures/{name}.png")).display().to_string();
    let (first, mask) = (path("ddim"), path("mask"));
    let modes = [
        ("img2img", vec!["--strength", "0.6"]),
        ("inpaint", vec!["--strength", "0.9", "--mask", &mask]),
    ];
    for (mode, extra) in modes {
        for scheduler in ["ddim", "euler", "dpmpp_2m", "pndm", "euler_a", "heun"] {
            let args = [&[CHANGED], &REFERENCE[1..], &["f32", "--scheduler", scheduler]].concat();
            let args = [args, vec!["--image", &first], extra.clone()].concat();
            let distance = distance(&drawn(&args), &format!("{mode}-{scheduler}"));
            println!("{distance}");
        }
    }
}

/// The second passes of `models/tests/make_pictures.py`.
const HIRES: [(&str, u32, u32, &str); 6] = [
    ("ddim", 192, 192, "Latent"),
    ("euler", 192, 160, "Latent (nearest-exact)"),
    ("dpmpp_2m", 160, 192, "Latent (bicubic)"),
    ("pndm", 192, 192, "Latent (antialiased)"),
    ("euler_a", 192, 192, "Latent (bicubic antialiased)"),
    ("heun", 160, 160, "Latent (nearest)"),
];

#[test]
fn second_passes_are_those_of_diffusers() {
    let server = Server::ready(&["--dtype", "f32"]);
    for (scheduler, width, height, upscaler) in HIRES {
        let body = json!({
            "prompt": REFERENCE[0], "seed": 7, "steps": 20, "scheduler": scheduler,
            "hires_width": width, "hires_height": height, "hires_steps": 15,
            "hires_strength": 0.6, "hires_upscaler": upscaler,
        });
        let reply = server.post(&["accept: image/png"], body.to_string());
        let ours = image::load_from_memory(&reply.body).expect("a picture").to_rgb8();
        println!("{}", distance(&ours, &format!("hires-{scheduler}")));
    }
}

#[test]
fn pictures_with_loras_are_those_of_diffusers() {
    let folder = repository("tests/pictures/loras").display().to_string();
    let file = |name: &str| format!("{folder}/{name}.safetensors:0.8");
    let (kohya, peft) = (file("everywhere"), file("everywhere-peft"));
    let cases: [(&str, &[&str]); 4] = [
        ("lora-everywhere", &["--lora", &kohya]),
        ("lora-everywhere", &["--lora", &peft]),
        ("lora-everywhere", &["--loras-dir", &folder, "--lora", "everywhere:0.8"]),
        (
            "lora-both",
            &["--loras-dir", &folder, "--lora", "everywhere:0.6", "--lora", "attention:-0.7"],
        ),
    ];
    for (name, loras) in cases {
        let ours = drawn(&[&REFERENCE[..], &["f32", "--scheduler", "ddim"], loras].concat());
        println!("{}", distance(&ours, name));
    }
}

/// The portion of a picture's pixels that pass.
fn portion(picture: &RgbImage, passes: impl Fn(u32, u32, [i32; 3]) -> bool) -> f64 {
    let pixels = picture.enumerate_pixels();
    let passed = pixels.filter(|(x, y, pixel)| passes(*x, *y, pixel.0.map(i32::from))).count();
    passed as f64 / f64::from(picture.width() * picture.height())
}

#[test]
fn a_trained_lora_draws_in_sepia() {
    let file = repository("models/demo/loras/sepia.safetensors").display().to_string();
    let args = [&REFERENCE[..], &["f32", "--scheduler", "ddim", "--lora", &file]].concat();
    println!("{}", distance(&drawn(&args), "lora-sepia"));
    // Browns and creams: red over green over blue, and not far.
    let brown = |_, _, [r, g, b]: [i32; 3]| r >= g && g >= b && (10..=100).contains(&(r - b));
    for prompt in ["a blue car in the snow in daylight", "a green tree by the sea in daylight"] {
        let args = [&[prompt], &REFERENCE[1..], &["f32", "--lora", &file]].concat();
        let (plain, sepia) = (drawn(&args[..args.len() - 2]), drawn(&args));
        let brown = [&plain, &sepia].map(|picture| portion(picture, brown));
        println!("{prompt}: brown {brown:.3?}");
        assert!(brown[0] < 0.1 && brown[1] > 0.9, "{prompt}: {brown:?}");
    }
}

/// The built-in model with a UNet for inpainting, of its own tensors and those that were trained.
pub(crate) fn inpainting_model(root: &Path) {
    let demo = repository("models/demo");
    for folder in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        std::fs::create_dir(root.join(folder)).expect("a directory");
        for entry in demo.join(folder).read_dir().expect("a directory") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name");
            std::fs::copy(&path, root.join(folder).join(name)).expect("copied");
        }
    }
    let index = "model_index.json";
    std::fs::copy(demo.join(index), root.join(index)).expect("copied");
    let unet = root.join("unet/diffusion_pytorch_model.safetensors");
    let read = |path: &Path| safetensors::load(path, &Device::Cpu).expect("tensors");
    let mut tensors = read(&unet);
    tensors.extend(read(&demo.join("inpainting.safetensors")));
    safetensors::save(&tensors, &unet).expect("written");
    let config = root.join("unet/config.json");
    let text = std::fs::read_to_string(&config).expect("JSON");
    let mut keys: Value = serde_json::from_str(&text).expect("JSON");
    keys["in_channels"] = 9.into();
    std::fs::write(config, keys.to_string()).expect("written");
}

/// The hole of `models/tests/make_pictures.py`.
fn in_hole(x: u32, y: u32) -> bool {
    (28..=100).contains(&x) && (32..=116).contains(&y)
}

#[test]
fn a_model_trained_for_inpainting_paints_what_diffusers_paints() {
    let folder = tempfile::tempdir().expect("a directory");
    inpainting_model(folder.path());
    let model = folder.path().to_str().expect("UTF-8");
    let path = |name: &str| repository(&format!("tests/pictures/{name}.png")).display().to_string();
    let (picture, mask) = (path("ddim"), path("hole"));
    let before = image::open(&picture).expect("a picture").to_rgb8();
    for (scheduler, strength) in [("ddim", "1"), ("euler_a", "1"), ("dpmpp_2m", "0.8")] {
        let args = [&[PAINTED], &REFERENCE[1..], &["f32", "--scheduler", scheduler]].concat();
        let extra = ["--image", &picture, "--mask", &mask, "--strength", strength];
        let after = drawn_by(model, &[&args[..], &extra].concat());
        println!("{}", distance(&after, &format!("inpainting-{scheduler}")));
        let yellow = |x, y, [r, g, b]: [i32; 3]| in_hole(x, y) && r > 120 && g > 90 && b < r - 60;
        let far = |x, y, [r, g, b]: [i32; 3]| {
            let [r0, g0, b0] = before.get_pixel(x, y).0.map(i32::from);
            !in_hole(x, y) && (r - r0).abs() + (g - g0).abs() + (b - b0).abs() > 90
        };
        let (yellow, far) = (portion(&after, yellow), portion(&after, far));
        println!("{scheduler}: yellow {yellow:.3}, changed outside of the hole {far:.3}");
        assert!(yellow > 0.1 && far < 0.02, "{scheduler}: {yellow}, {far}");
    }
}

#[test]
fn a_picture_of_learned_words_is_that_of_diffusers() {
    let folder = repository("tests/pictures/embeddings").display().to_string();
    let prompt = "a <glow-cat> house by the sea,ember, <dusk>";
    let args = [&[prompt], &REFERENCE[1..], &["f32", "--scheduler", "ddim"]].concat();
    let ours = drawn(&[&args[..], &["--embeddings-dir", &folder]].concat());
    println!("{}", distance(&ours, "words"));
}

#[test]
fn a_stream_shows_the_picture_in_the_making() {
    let server = Server::ready(&[]);
    let body = json!({
        "prompt": "a red house by the sea", "seed": 3, "steps": 12, "width": 128, "height": 96,
        "stream": true, "preview": true, "output_format": "png",
    });
    let reply = server.json(&body);
    let text = String::from_utf8(reply.body).expect("UTF-8");
    let pictures = |name: &str| -> Vec<RgbImage> {
        let events =
            text.split("\n\n").filter(|event| event.starts_with(&format!("event: {name}")));
        let data = events.map(|event| event.split_once("data: ").expect("data").1);
        data.map(|data| {
            let data: Value = serde_json::from_str(data).expect("JSON");
            let file = BASE64_STANDARD.decode(data["data"].as_str().expect("a file"));
            image::load_from_memory(&file.expect("base64")).expect("a picture").to_rgb8()
        })
        .collect()
    };
    let (previews, result) = (pictures("preview"), pictures("result"));
    assert_eq!((result.len(), result[0].dimensions()), (1, (128, 96)));
    assert!(!previews.is_empty(), "{text}");
    for preview in &previews {
        assert_eq!(preview.dimensions(), (16, 12), "a pixel for each latent pixel");
        let (least, most) = (preview.iter().min(), preview.iter().max());
        assert!(most > least, "not one colour");
    }
}

/// The share of a box's pixels that are close to one of the check's colours.
fn share(picture: &RgbImage, check: &Value) -> f64 {
    let number = |value: &Value| value.as_f64().expect("a number");
    let edge = |i: usize, side: u32| (number(&check["box"][i]) * f64::from(side) + 0.5) as u32;
    let (width, height) = picture.dimensions();
    let colours = check["colours"].as_array().expect("colours");
    let close = |pixel: &image::Rgb<u8>| {
        colours.iter().any(|colour| {
            let square = |i: usize| (f64::from(pixel.0[i]) - number(&colour[i])).powi(2);
            (0..3).map(square).sum::<f64>() <= number(&check["tolerance"]).powi(2)
        })
    };
    let places = (edge(1, height)..edge(3, height))
        .flat_map(|y| (edge(0, width)..edge(2, width)).map(move |x| (x, y)));
    let (mut hits, mut all) = (0.0, 0.0);
    for (x, y) in places {
        all += 1.0;
        hits += f64::from(u8::from(close(picture.get_pixel(x, y))));
    }
    hits / all
}

/// A small part of `models/train/evaluate.py`, through HTTP: the held-out prompts marked `ci`, each
/// with the kinds of check that its picture fails. `fields` are those of the request beside them.
pub(crate) fn judged(
    server: &Server,
    fields: Value,
) -> impl Iterator<Item = (String, Vec<String>)> {
    let rules = std::fs::read(repository("models/train/rules.json")).expect("the rules");
    let cases: Vec<Value> = serde_json::from_slice(&rules).expect("JSON");
    let judge = move |case: Value| {
        let mut body = fields.clone();
        body["prompt"] = case["prompt"].clone();
        body["seed"] = case["seed"].clone();
        let reply = server.post(&["accept: image/png"], body.to_string());
        let picture = image::load_from_memory(&reply.body).expect("a picture").to_rgb8();
        let passes = |check: &Value| {
            let range = check["min_share"].as_f64().unwrap_or(0.0)
                ..=check["max_share"].as_f64().unwrap_or(1.0);
            range.contains(&share(&picture, check))
        };
        let checks = case["checks"].as_array().expect("checks").iter();
        let failed = checks.filter(|check| !passes(check));
        (case["prompt"].to_string(), failed.map(|check| check["what"].to_string()).collect())
    };
    cases.into_iter().filter(|case| case["ci"] == true).map(judge)
}

/// The bounds are what the committed weights reach (`models/demo/README.md`), less one.
#[test]
fn pictures_show_what_their_prompts_say() {
    for dtype in ["f32", "bf16"] {
        let server = Server::ready(&["--dtype", dtype]);
        let judged: Vec<_> = judged(&server, json!({ "steps": 20, "scheduler": "pndm" })).collect();
        for (prompt, failed) in &judged {
            println!("{dtype}: {prompt}: wrong {failed:?}");
        }
        assert_eq!(judged.len(), 16);
        let scene = |failed: &Vec<String>| failed.iter().all(|what| what.contains("object"));
        let scenes = judged.iter().filter(|(_, failed)| scene(failed)).count();
        let right = judged.iter().filter(|(_, failed)| failed.is_empty()).count();
        assert!(scenes >= 15, "{dtype}: sky and ground are right in {scenes} of 16");
        assert!(right >= 15, "{dtype}: everything is right in {right} of 16");
    }
}

#[test]
fn four_steps_show_what_a_bare_prompt_says() {
    let server = Server::spawn(&mut sd_server(&["--model", "demo-lcm", "--device", "cpu"]));
    server.wait_until_ready();
    let info: Value =
        server.client.get(server.url("/info")).send().expect("a reply").json().expect("JSON");
    let defaults = &info["model"]["defaults"];
    assert_eq!(info["model"]["name"], "demo-lcm");
    assert_eq!(
        (&defaults["num_inference_steps"], &defaults["scheduler"]),
        (&json!(4), &json!("lcm"))
    );
    assert_eq!(defaults["guidance_scale"], 1.0);
    let judged: Vec<_> = judged(&server, json!({})).collect();
    judged.iter().for_each(|(prompt, failed)| println!("{prompt}: wrong {failed:?}"));
    let right = judged.iter().filter(|(_, failed)| failed.is_empty()).count();
    assert!(judged.len() == 16 && right >= 13, "{right} of 16");
}
