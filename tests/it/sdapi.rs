//! AUTOMATIC1111's API. `tests/clients` drives it with a client written for it; here are the shapes.

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::ModelInfo;
use sd_server::engine::Engine;
use sd_server::http;
use serde_json::{Value, json};

use crate::engine::{LONG, Server, ready};
use crate::fake::{ENGINE, Fake, HTTP, Strings, keyed, wait_until};
use crate::harness;
use crate::invocations::infotext;

pub(crate) async fn post(url: &str, path: &str, body: &Value) -> Result<(u16, Value)> {
    let request = reqwest::Client::new().post(format!("{url}{path}")).body(body.to_string());
    let reply = request.send().await?;
    Ok((reply.status().as_u16(), reply.json().await?))
}

pub(crate) async fn get(url: &str, path: &str) -> Result<Value> {
    Ok(reqwest::get(format!("{url}{path}")).await?.json().await?)
}

pub(crate) async fn start(settings: http::HttpConfig) -> (Server, Strings) {
    let (engine, strings) = ready().await;
    (Server::start(engine, settings, LONG).await, strings)
}

/// A server whose steps are free.
pub(crate) async fn free() -> Server {
    start(HTTP).await.0
}

/// A server of a model with other properties, whose steps are free.
async fn of_model(change: impl FnOnce(&mut ModelInfo)) -> Result<Server> {
    let (mut fake, _) = Fake::new();
    change(&mut fake.info);
    let engine = Engine::start(ENGINE, || Ok(fake))?;
    engine.ready().await?;
    Ok(Server::start(engine, HTTP, LONG).await)
}

fn file(image: &Value) -> Result<Vec<u8>> {
    Ok(BASE64_STANDARD.decode(image.as_str().context("base64")?)?)
}

/// What clients send who leave nothing out.
pub(crate) fn wordy() -> Value {
    json!({
        "prompt": "a cat", "negative_prompt": "dogs", "sampler_name": "Euler a",
        "scheduler": "automatic", "steps": 2, "cfg_scale": 7, "width": 64, "height": 72,
        "restore_faces": false, "enable_hr": false, "hr_upscaler": "Latent", "hr_scale": 2,
        "hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0,
        "seed": -1, "override_settings": { "CLIP_stop_at_last_layers": 1 },
        "override_settings_restore_afterwards": true, "clip_skip": 1, "save_images": true,
        "send_images": true, "do_not_save_grid": false, "do_not_save_samples": false,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_comes_with_its_info() -> Result<()> {
    let server = free().await;
    let mut body = wordy();
    (body["batch_size"], body["n_iter"]) = (2.into(), 2.into());
    let (status, reply) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
    assert_eq!(status, 200, "{reply}");
    assert_eq!(reply["parameters"], body);
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    let images = reply["images"].as_array().context("images")?;
    let seeds = info["all_seeds"].as_array().context("seeds")?;
    assert_eq!((images.len(), seeds.len()), (4, 4));
    assert_eq!(seeds[1].as_u64(), seeds[0].as_u64().map(|seed| seed + 1));
    assert_eq!((&info["seed"], &info["sampler_name"]), (&seeds[0], &"Euler a".into()));
    assert_eq!((&info["width"], &info["height"]), (&64.into(), &72.into()));
    for (image, text) in images.iter().zip(info["infotexts"].as_array().context("texts")?) {
        assert_eq!(infotext(&file(image)?), *text);
    }
    let chance = post(&server.url, "/sdapi/v1/txt2img", &wordy()).await?.1;
    assert_ne!(chance["info"], reply["info"], "-1 is chance");

    let body = json!({ "send_images": false, "seed": 5, "steps": 1 });
    let (status, reply) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
    assert_eq!((status, &reply["images"]), (200, &json!([])));
    let body = json!({ "override_settings": { "samples_format": "jpg" }, "colour": "red" });
    let (_, reply) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
    assert!(file(&reply["images"][0])?.starts_with(b"\xff\xd8"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_may_be_text() -> Result<()> {
    let server = free().await;
    let body = json!({ "steps": "2", "width": "64", "height": " 72 ", "cfg_scale": "7.5",
        "seed": "-1", "enable_hr": "" });
    let (status, reply) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
    assert_eq!(status, 200, "{reply}");
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    assert_eq!((&info["width"], &info["height"]), (&64.into(), &72.into()));
    assert_eq!((&info["steps"], &info["cfg_scale"]), (&2.into(), &7.5.into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn samplers_and_schedules_go_by_their_names() -> Result<()> {
    let server = free().await;
    let table = [
        (json!({ "sampler_name": "DPM++ 2M" }), Some("DPM++ 2M Karras")),
        (json!({ "sampler_name": "Default", "sampler_index": "Heun" }), Some("Heun")),
        (json!({ "sampler_name": "DPM++ 2M", "scheduler": "Automatic" }), Some("DPM++ 2M Karras")),
        (json!({ "sampler_name": "DPM++ 2M", "scheduler": "Karras" }), Some("DPM++ 2M Karras")),
        (json!({ "sampler_name": "DPM++ 2M", "scheduler": "Uniform" }), Some("DPM++ 2M")),
        (json!({ "sampler_name": "DPM++ 2M Karras" }), Some("DPM++ 2M Karras")),
        (json!({ "sampler_index": "Heun" }), Some("Heun")),
        (json!({ "sampler_name": "", "sampler_index": "DDIM" }), Some("DDIM")),
        (json!({}), Some("Euler")),
        (json!({ "sampler_name": "Euler", "scheduler": "Karras" }), Some("Euler Karras")),
        (json!({ "scheduler": "SGMUniform" }), Some("Euler SGM Uniform")),
        (json!({ "sampler_name": "k_euler_a", "scheduler": "ddim" }), Some("Euler a DDIM")),
        (json!({ "sampler_name": "DPM++ 2M SDE" }), Some("DPM++ 2M SDE Exponential")),
        (json!({ "sampler_name": "DPM++ SDE", "s_tmax": 0, "eta": 1 }), Some("DPM++ SDE Karras")),
        (json!({ "sampler_name": "DDIM", "scheduler": "Karras" }), None),
        (json!({ "sampler_name": "Euler", "scheduler": "Turbo" }), None),
        (json!({ "sampler_name": "Euler", "eta": 1.5 }), None),
        (json!({ "initial_noise_multiplier": 0.5 }), None),
        (json!({ "initial_noise_multiplier": 1.0, "s_min_uncond": 0 }), Some("Euler")),
        (json!({ "sampler_name": "DPM++ 2M Karras", "scheduler": "Uniform" }), None),
        (json!({ "sampler_name": "DPM fast" }), None),
    ];
    for (mut body, title) in table {
        body["steps"] = 2.into();
        let (status, reply) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
        let Some(title) = title else {
            assert_eq!(status, 422, "{body}");
            continue;
        };
        let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
        assert_eq!(info["sampler_name"], title, "{body}");
    }
    Ok(())
}

/// The `info` of a txt2img.
async fn info_of(server: &Server, body: Value) -> Result<Value> {
    let (status, reply) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
    anyhow::ensure!(status == 200, "{body}: {reply}");
    Ok(serde_json::from_str(reply["info"].as_str().context("a string")?)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variation_has_seeds_of_its_own() -> Result<()> {
    let server = free().await;
    let body = |strength: f64, subseed: i64| json!({ "seed": 7, "subseed": subseed, "subseed_strength": strength, "steps": 1, "batch_size": 2 });
    let info = info_of(&server, body(0.25, 100)).await?;
    assert_eq!((&info["all_seeds"], &info["all_subseeds"]), (&json!([7, 7]), &json!([100, 101])));
    assert_eq!(info["subseed_strength"], 0.25);
    let text = info["infotexts"][1].as_str().context("a text")?;
    assert!(text.contains("Variation seed: 101, Variation seed strength: 0.25, "), "{text}");
    let info = info_of(&server, body(0.0, 100)).await?;
    assert_eq!((&info["all_seeds"], &info["all_subseeds"]), (&json!([7, 8]), &json!([0, 0])));
    assert!(!info["infotexts"][0].as_str().context("a text")?.contains("Variation"));
    let mut chance = Vec::new();
    for _ in 0..2 {
        chance.push(info_of(&server, body(0.25, -1)).await?["subseed"].clone());
    }
    assert_ne!(chance[0], chance[1]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clip_skip_is_counted_from_the_last_layer() -> Result<()> {
    let server = free().await;
    let option = |layers: Value| json!({ "steps": 1, "override_settings": { "CLIP_stop_at_last_layers": layers } });
    for (body, clip_skip) in [
        (option(json!(2)), 2),
        (option(json!(1)), 1),
        (json!({ "steps": 1, "clip_skip": 3 }), 3),
        (json!({ "steps": 1, "clip_skip": "0" }), 1),
    ] {
        let info = info_of(&server, body).await?;
        assert_eq!(info["clip_skip"], clip_skip);
        let text = info["infotexts"][0].as_str().context("a text")?;
        assert_eq!(text.contains(&format!("Clip skip: {clip_skip}, ")), clip_skip > 1, "{text}");
    }
    let (status, error) =
        post(&server.url, "/sdapi/v1/options", &json!({ "CLIP_stop_at_last_layers": 2 })).await?;
    assert_eq!(status, 422, "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clip_skip_of_openclip_is_dropped_and_bounds_are_the_clients() -> Result<()> {
    let server = free().await;
    let body = json!({ "override_settings": { "CLIP_stop_at_last_layers": 99 } });
    let (status, error) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
    let rule = "override_settings.CLIP_stop_at_last_layers must be from 1 to 13, not 99";
    assert_eq!((status, &error["detail"]), (422, &rule.into()));
    let (status, error) =
        post(&server.url, "/invocations", &json!({ "prompt": "x", "clip_skip": -1 })).await?;
    let rule = "clip_skip must be at least 0, not -1";
    assert_eq!((status, &error["error"]["message"]), (422, &rule.into()), "{error}");
    let server = of_model(|info| info.text_width = 1024).await?;
    let info = info_of(&server, json!({ "steps": 1, "clip_skip": 2 })).await?;
    assert_eq!(info["clip_skip"], 1);
    assert!(info["warnings"][0].as_str().is_some_and(|text| text.contains("OpenCLIP")), "{info}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_steps_that_a_strength_needs_are_told_and_bounded_by_the_sampler() -> Result<()> {
    let server = of_model(|info| info.defaults.steps = 1).await?;
    let drawn = async |body: Value| post(&server.url, "/invocations", &body).await;
    let (status, reply) = drawn(json!({ "prompt": "x", "hires_width": 128 })).await?;
    let warning = "hires_strength 0.75 takes less than one of 1 steps: there are 2";
    assert_eq!((status, &reply["warnings"]), (200, &json!([warning])), "{reply}");
    for (fields, rule) in [
        (json!({ "steps": 51 }), "steps must be 1 to 50 with lcm, not 51"),
        (
            json!({ "hires_width": 128, "hires_steps": 51 }),
            "hires_steps must be 1 to 50 with lcm, not 51",
        ),
        (
            json!({ "hires_width": 128, "hires_strength": 0.01 }),
            "hires_strength of 0.01 takes less than one of 50 steps, the most there can be",
        ),
    ] {
        let mut body = json!({ "prompt": "x", "scheduler": "lcm" });
        body.as_object_mut().context("one")?.extend(fields.as_object().context("one")?.clone());
        let (status, error) = drawn(body).await?;
        assert_eq!((status, &error["error"]["message"]), (422, &rule.into()), "{error}");
        let param = rule.split(' ').next();
        assert_eq!(error["error"]["param"].as_str(), param);
    }
    let hires = json!({ "steps": 10, "sampler_name": "LCM", "enable_hr": true,
                        "denoising_strength": 0.1 });
    let info = info_of(&server, hires).await?;
    let warning = info["warnings"][0].as_str().context("a warning")?;
    assert!(warning.starts_with("the hires pass takes 5 of 10 steps"), "{warning}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_refused_by_name() -> Result<()> {
    let server = free().await;
    let table = [
        ("restore_faces", json!(true)),
        ("subseed_strength", json!(1.5)),
        ("seed_resize_from_w", json!(512)),
        ("styles", json!(["oil"])),
        ("script_name", json!("x/y/z plot")),
        ("alwayson_scripts", json!({ "ADetailer": { "args": [true, { "ad_model": "face" }] } })),
        ("steps", json!("many")),
        ("width", json!(-8)),
        ("batch_size", json!(100)),
        ("CLIP_stop_at_last_layers", json!(40)),
        ("sd_model_checkpoint", json!("sdxl")),
    ];
    for (name, value) in table {
        let setting = name.starts_with("CLIP") || name.starts_with("sd_");
        let body = match setting {
            true => json!({ "override_settings": { name: value } }),
            false => json!({ name: value }),
        };
        let (status, error) = post(&server.url, "/sdapi/v1/txt2img", &body).await?;
        assert!((400..500).contains(&status), "{body}");
        let detail = error["detail"].as_str().context("a detail")?;
        let named =
            detail.contains(name) || name == "sd_model_checkpoint" && detail.contains("sdxl");
        assert!(named && error["errors"] == detail && error["error"].is_string(), "{error}");
    }
    let idle = json!({ "prompt": "x", "steps": 1.0, "n_iter": "1", "styles": [""], "tiling": "False",
                       "script_name": null, "subseed_strength": 0, "seed_resize_from_w": -1,
                       "alwayson_scripts": { "ControlNet": { "args": [{ "enabled": false }] } } });
    assert_eq!(post(&server.url, "/sdapi/v1/txt2img", &idle).await?.0, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_pass_is_what_automatic1111_makes_of_its_fields() -> Result<()> {
    let server = free().await;
    let modes = get(&server.url, "/sdapi/v1/latent-upscale-modes").await?;
    assert_eq!((&modes[0]["name"], modes.as_array().map(Vec::len)), (&"Latent".into(), Some(6)));
    let base = json!({ "prompt": "x", "steps": 2, "width": 64, "height": 96, "enable_hr": true,
                       "hr_prompt": "", "hr_sampler_name": null, "hr_additional_modules": [] });
    let with = |extra: Value| {
        let mut body = base.clone();
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("one").clone());
        body
    };
    let table = [
        (json!({}), "128x192", "Hires upscale: 2, Hires steps: 2, Hires upscaler: Latent,"),
        (
            json!({ "hr_scale": 1.3, "hr_second_pass_steps": 5, "hr_upscaler": "Latent (nearest)" }),
            "80x120",
            "Hires upscale: 1.25, Hires steps: 5, Hires upscaler: Latent (nearest),",
        ),
        (json!({ "hr_resize_x": 100 }), "96x144", "Hires upscale: 1.5, "),
        // Not more than --max-steps, of which a hundredth is taken.
        (json!({ "hr_scale": 3, "denoising_strength": 0.01 }), "192x288", "Hires steps: 1, "),
        (json!({ "hr_resize_y": 100 }), "64x96", ""),
        (json!({ "hr_resize_x": 128, "hr_resize_y": 100 }), "128x96", "Hires resize: 128x96, "),
        (json!({ "hr_scale": 1 }), "64x96", ""),
        (json!({ "enable_hr": "0", "tiling": "false" }), "64x96", ""),
        (json!({ "hr_prompt": "x", "hr_scheduler": "automatic" }), "128x192", "upscale: 2, "),
    ];
    // Clients write yes and no as any JSON value.
    let mut no = vec![json!(false), json!(0), json!(null), json!([]), json!({})];
    no.extend(["", "None", "False", "0"].map(Value::from));
    let yes = [json!(true), json!(1), json!("true"), json!([1]), json!({ "a": 1 })];
    let said = |answers: &[Value], size, told| {
        let bodies = answers.iter().map(|answer| json!({ "enable_hr": answer }));
        bodies.map(|body| (body, size, told)).collect::<Vec<_>>()
    };
    let answers = [said(&no, "64x96", ""), said(&yes, "128x192", "Hires upscale: 2, ")].concat();
    for (extra, size, told) in table.into_iter().chain(answers) {
        let (status, reply) = post(&server.url, "/sdapi/v1/txt2img", &with(extra)).await?;
        assert_eq!(status, 200, "{reply}");
        let picture = image::load_from_memory(&file(&reply["images"][0])?)?;
        assert_eq!(format!("{}x{}", picture.width(), picture.height()), size);
        let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
        let text = info["infotexts"][0].as_str().context("a text")?;
        assert!(text.contains("Size: 64x96, ") && text.contains(told), "{text}");
        let strength = if told.contains("steps: 1,") { 0.01 } else { 0.75 };
        let strength = if told.is_empty() { Value::Null } else { strength.into() };
        assert_eq!((&info["denoising_strength"], &info["width"]), (&strength, &64.into()));
        let written = format!("Denoising strength: {strength}, ");
        assert_eq!(text.contains(&written), !told.is_empty(), "{text}");
        let parameters = info["extra_generation_params"].as_object().context("an object")?;
        assert_eq!(parameters.is_empty(), told.is_empty(), "{info}");
    }
    for (name, value) in [
        ("hr_upscaler", json!("R-ESRGAN 4x+")),
        ("hr_checkpoint_name", json!("another")),
        ("hr_sampler_name", json!("Ueler")),
        ("hr_scale", json!(100)),
        ("hr_resize_x", json!(4096)),
        ("hr_second_pass_steps", json!(1000)),
        ("width", json!(u64::MAX)),
        ("denoising_strength", json!(2)),
    ] {
        let (status, error) =
            post(&server.url, "/sdapi/v1/txt2img", &with(json!({ name: value }))).await?;
        let detail = error["detail"].as_str().context("a detail")?;
        assert!((400..500).contains(&status) && detail.contains(name), "{name}: {error}");
    }
    let again = with(json!({ "init_images": ["x"] }));
    let (status, error) = post(&server.url, "/sdapi/v1/img2img", &again).await?;
    assert!(status == 422 && error["detail"].as_str().context("a")?.contains("enable_hr"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_told_and_an_interrupt_is_heard() -> Result<()> {
    let (server, strings) = start(HTTP).await;
    let idle = get(&server.url, "/sdapi/v1/progress").await?;
    assert_eq!((&idle["progress"], &idle["state"]["job_count"]), (&json!(0.0), &json!(0)));
    let url = server.url.clone();
    let body = json!({ "prompt": "a cat", "steps": 4, "force_task_id": "task(1)" });
    let drawing = tokio::spawn(async move { post(&url, "/sdapi/v1/txt2img", &body).await });
    strings.step();
    let mut progress = idle;
    while progress["progress"] != 0.25 {
        progress = get(&server.url, "/sdapi/v1/progress").await?;
    }
    assert_eq!(progress["state"]["job_count"], 1);
    assert_eq!(progress["state"]["sampling_step"], 1);
    assert_eq!(progress["state"]["sampling_steps"], 4);
    assert!(file(&progress["current_image"])?.starts_with(b"\x89PNG"));
    let blind = get(&server.url, "/sdapi/v1/progress?skip_current_image=true").await?;
    assert!(blind["current_image"].is_null());
    let ask =
        async |id: &str| post(&server.url, "/internal/progress", &json!({ "id_task": id })).await;
    let task = ask("task(1)").await?.1;
    assert_eq!((&task["active"], &task["progress"]), (&true.into(), &json!(0.25)));
    assert!(
        task["live_preview"]
            .as_str()
            .is_some_and(|data| data.starts_with("data:image/png;base64,iVB"))
    );
    assert_eq!(ask("task(2)").await?.1["active"], false);

    assert_eq!(post(&server.url, "/sdapi/v1/interrupt", &json!({})).await?, (200, json!({})));
    // The step that was being made.
    strings.step();
    let (status, reply) = drawing.await??;
    assert_eq!((status, reply["images"].as_array().map(Vec::len)), (200, Some(1)), "{reply}");
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    assert_eq!(info["warnings"], json!(["interrupted after 2 of 4 UNet calls"]));
    assert_eq!(infotext(&file(&reply["images"][0])?), info["infotexts"][0]);
    while progress["state"]["job_count"] != 0 {
        progress = get(&server.url, "/sdapi/v1/progress").await?;
    }
    Ok(())
}

/// A batch holds two of these; the third waits, and is not drawn at all.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_ends_what_waits() -> Result<()> {
    let (server, strings) = start(HTTP).await;
    let first = json!({ "prompt": "a cat", "steps": 4, "batch_size": 3, "seed": 5 });
    let url = server.url.clone();
    let first = tokio::spawn(async move { post(&url, "/sdapi/v1/txt2img", &first).await });
    strings.step();
    let url = server.url.clone();
    let second = json!({ "prompt": "a dog", "steps": 4, "width": 1024, "height": 1024,
                         "force_task_id": "task(2)" });
    let second = tokio::spawn(async move { post(&url, "/sdapi/v1/txt2img", &second).await });
    while get(&server.url, "/internal/pending-tasks").await?["tasks"] != json!(["task(2)"]) {}
    post(&server.url, "/sdapi/v1/interrupt", &json!({})).await?;
    drop(strings.permits);
    let (status, reply) = first.await??;
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    assert_eq!((status, reply["images"].as_array().map(Vec::len)), (200, Some(2)), "{reply}");
    assert_eq!(info["all_seeds"], json!([5, 6]));
    let (status, reply) = second.await??;
    let seen = reply["images"].as_array().context("images")?.len();
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    assert_eq!((status, seen), (200, 0));
    assert_eq!(info["warnings"], json!(["interrupted before the first step was finished"]));
    Ok(())
}

/// Two clients that are one address: their keys tell them apart.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_neither_sees_nor_ends_what_is_anothers() -> Result<()> {
    let (server, strings) = start(keyed(&["ann", "bob"])).await;
    let request = |key: &str, path: &str, body: Value| {
        let request = reqwest::Client::new().post(format!("{}{path}", server.url));
        request.basic_auth("user", Some(key)).body(body.to_string()).send()
    };
    let drawing =
        tokio::spawn(request("ann", "/sdapi/v1/txt2img", json!({ "steps": 2, "prompt": "a" })));
    strings.step();
    let count = async |key: &str| {
        let request = reqwest::Client::new().get(format!("{}/sdapi/v1/progress", server.url));
        let progress: Value = request.bearer_auth(key).send().await?.json().await?;
        anyhow::Ok(progress["state"]["job_count"].clone())
    };
    while count("ann").await? != 1 {}
    assert_eq!(count("bob").await?, 0);
    request("bob", "/sdapi/v1/interrupt", json!({})).await?;
    drop(strings.permits);
    assert_eq!(drawing.await??.status(), 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_forgotten() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine.clone(), HTTP, LONG).await;
    let url = server.url.clone();
    let body = json!({ "prompt": "a", "steps": 3 });
    let drawing = tokio::spawn(async move { post(&url, "/sdapi/v1/txt2img", &body).await });
    strings.step();
    drawing.abort();
    while get(&server.url, "/sdapi/v1/progress").await?["state"]["job_count"] != 0 {}
    wait_until(|| {
        let _ = strings.permits.send(());
        engine.metrics().to_string().contains("sd_images_total{outcome=\"cancelled\"} 1")
    });
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_find_what_they_look_for_before_they_draw() -> Result<()> {
    let server = free().await;
    let options = get(&server.url, "/sdapi/v1/options").await?;
    let models = get(&server.url, "/sdapi/v1/sd-models").await?;
    assert_eq!(
        (&options["sd_model_checkpoint"], &models[0]["title"]),
        (&"fake".into(), &"fake".into())
    );
    let samplers = get(&server.url, "/sdapi/v1/samplers").await?;
    let names: Vec<_> = samplers.as_array().context("a list")?.iter().map(|s| &s["name"]).collect();
    assert!(names.contains(&&"Euler a".into()) && names.contains(&&"DPM++ 2M".into()));
    let schedulers = get(&server.url, "/sdapi/v1/schedulers").await?;
    assert_eq!(schedulers[2]["label"], "Karras");
    let of =
        |name: &str| samplers.as_array().and_then(|all| all.iter().find(|s| s["name"] == name));
    assert_eq!(of("DPM++ 3M SDE").context("listed")?["options"]["scheduler"], "exponential");
    for path in ["sd-vae", "upscalers", "latent-upscale-modes", "loras"] {
        assert!(get(&server.url, &format!("/sdapi/v1/{path}")).await?.is_array(), "{path}");
    }
    // Clients send all options back, with one of them changed.
    let (status, _) = post(&server.url, "/sdapi/v1/options", &options).await?;
    assert_eq!(status, 200);
    let other = json!({ "sd_model_checkpoint": "sdxl" });
    let (status, error) = post(&server.url, "/sdapi/v1/options", &other).await?;
    assert_eq!((status, &error["error"]), (404, &"model_not_found".into()));
    Ok(())
}

#[test]
fn the_model_can_be_chosen_for_all_who_name_none() {
    let folder = tempfile::tempdir().expect("a directory");
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for name in ["red", "blue"] {
        std::os::unix::fs::symlink(&demo, folder.path().join(name)).expect("a link");
    }
    let mut command = harness::sd_server(&["--device", "cpu", "--threads", "1"]);
    let loras = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/loras");
    command.arg("--models-dir").arg(folder.path()).arg("--loras-dir").arg(loras);
    let server = harness::Server::spawn(&mut command);
    server.wait_until_ready();
    let list = |path: &str| {
        let reply = server.client.get(server.url(path)).send().expect("an answer");
        reply.json::<Value>().expect("JSON")
    };
    let loras = || list("/sdapi/v1/loras").as_array().map(Vec::len);
    assert_eq!(
        loras(),
        Some(3),
        "those of the directory, before there is a model to use them with"
    );
    assert_eq!(list("/sdapi/v1/embeddings"), json!({ "loaded": {}, "skipped": {} }));
    let post = |path: &str, body: &Value| {
        let request = server.client.post(server.url(path)).body(body.to_string());
        let reply = request.send().expect("an answer");
        (reply.status().as_u16(), reply.json::<Value>().expect("JSON"))
    };
    let current = || -> Value {
        let options = server.client.get(server.url("/sdapi/v1/options")).send();
        options.expect("an answer").json::<Value>().expect("JSON")["sd_model_checkpoint"].clone()
    };
    let drawn_by = |body: &Value| -> Value {
        let (status, reply) = post("/sdapi/v1/txt2img", body);
        assert_eq!(status, 200, "{reply}");
        let info = reply["info"].as_str().expect("a string");
        serde_json::from_str::<Value>(info).expect("JSON")["sd_model_name"].clone()
    };
    let body = json!({ "prompt": "x", "steps": 1, "width": 64, "height": 64 });
    assert_eq!((current(), post("/sdapi/v1/txt2img", &body).0), ("".into(), 404));
    for name in ["red", "blue"] {
        assert_eq!(post("/sdapi/v1/options", &json!({ "sd_model_checkpoint": name })).0, 200);
        assert_eq!((current(), drawn_by(&body)), (name.into(), name.into()));
        assert_eq!(loras(), Some(3));
    }
    let mut own = body.clone();
    own["override_settings"] = json!({ "sd_model_checkpoint": "red", "samples_format": "jpg" });
    assert_eq!((drawn_by(&own), current()), ("red".into(), "blue".into()));
    let (status, error) = post("/sdapi/v1/options", &json!({ "sd_model_checkpoint": "green" }));
    assert_eq!(
        (status, &error["error"], current()),
        (404, &"model_not_found".into(), "blue".into())
    );
    let (status, _) = post("/sdapi/v1/options", &json!({ "samples_format": "jpg" }));
    assert_eq!((status, current()), (422, "blue".into()));
}
