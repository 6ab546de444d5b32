//! The other routes of AUTOMATIC1111's API, the state of its jobs, and what it passes over: here the
//! reply warns.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::engine::Server;
use crate::fake::{HTTP, Strings};
use crate::sdapi::{free, get, post, start, wordy};

/// The `info` of a request that is drawn.
async fn info_of(server: &Server, body: &Value) -> Result<Value> {
    let (status, reply) = post(&server.url, "/sdapi/v1/txt2img", body).await?;
    anyhow::ensure!(status == 200, "{body}: {reply}");
    Ok(serde_json::from_str(reply["info"].as_str().context("a string")?)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_or_is_refused_by_name() -> Result<()> {
    let server = free().await;
    for path in [
        "hypernetworks",
        "face-restorers",
        "realesrgan-models",
        "prompt-styles",
        "script-info",
        "extensions",
        "upscalers",
        "sd-vae",
    ] {
        assert!(get(&server.url, &format!("/sdapi/v1/{path}")).await?.is_array(), "{path}");
    }
    let memory = get(&server.url, "/sdapi/v1/memory").await?;
    let of = |name: &str| memory["ram"][name].as_u64();
    assert_eq!(of("total"), of("free").zip(of("used")).map(|(free, used)| free + used));
    assert!(of("used").is_some_and(|bytes| bytes > 1 << 20));
    assert_eq!(memory["cuda"], json!({ "error": "unavailable" }));
    assert_eq!(get(&server.url, "/sdapi/v1/cmd-flags").await?["api"], true);
    assert_eq!(get(&server.url, "/internal/ping").await?, json!({}));
    for path in
        ["skip", "refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"]
    {
        let reply = post(&server.url, &format!("/sdapi/v1/{path}"), &json!({})).await?;
        assert_eq!(reply, (200, Value::Null), "{path}");
    }
    for (path, name) in [
        ("interrogate", "interrogate"),
        ("create/embedding", "training"),
        ("create/hypernetwork", "training"),
        ("train/embedding", "training"),
        ("train/hypernetwork", "training"),
    ] {
        let (status, error) = post(&server.url, &format!("/sdapi/v1/{path}"), &json!({})).await?;
        let detail = error["detail"].as_str().context("a detail")?;
        assert!(
            status == 422 && detail.starts_with(&format!("{name} is not supported")),
            "{error}"
        );
    }
    let (status, _) = post(&server.url, "/sdapi/v1/server-kill", &json!({})).await?;
    assert_eq!(status, 404, "as there without --api-server-stop");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_reads_is_warned_of() -> Result<()> {
    let server = free().await;
    let said = |name: &str| format!("{name} has no effect here and was ignored");
    for (body, names) in [
        (wordy(), vec!["save_images"]),
        (json!({ "colour": "red", "flavour": null, "mode": "", "fast": false }), vec!["colour"]),
        (json!({ "init_images": ["x"], "hr_prompt": "y" }), vec!["init_images"]),
        (
            json!({ "override_settings": { "token_merging_ratio": 0.5, "sd_vae": "Automatic",
                                           "samples_save": false } }),
            vec!["override_settings.token_merging_ratio"],
        ),
    ] {
        let info = info_of(&server, &body).await?;
        let wanted: Vec<_> = names.into_iter().map(said).collect();
        assert_eq!(info["warnings"], json!(wanted), "{body}");
    }
    let many: serde_json::Map<_, _> = (0..40).map(|k| (format!("x{k}"), 1.into())).collect();
    let info = info_of(&server, &many.into()).await?;
    let warnings = info["warnings"].as_array().context("a list")?;
    assert_eq!(
        (warnings.len(), &warnings[16]),
        (17, &said("24 more fields").replace("has", "have").replace("was", "were").into())
    );
    let path = "/sdapi/v1/txt2img?steps=7&x";
    let (_, reply) = post(&server.url, path, &json!({ "steps": 1 })).await?;
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    assert_eq!(info["steps"], 1);
    let unread = |name: &str| {
        format!("the query parameter {name} was ignored: fields are read from the body")
    };
    assert_eq!(info["warnings"], json!([unread("steps"), unread("x")]));
    let request = reqwest::Client::new().post(format!("{}/sdapi/v1/options", server.url));
    let reply = request.body(json!({ "live_previews_enable": true }).to_string()).send().await?;
    let warnings = reply.headers().get("x-sd-warnings").context("a header")?.to_str()?.to_owned();
    assert_eq!((reply.status().as_u16(), warnings), (200, said("live_previews_enable")));
    for options in [
        json!({ "samples_format": "PNG", "sd_vae": "automatic", "randn_source": " cpu " }),
        json!({ "eta_noise_seed_delta": "0", "CLIP_stop_at_last_layers": "1.0" }),
    ] {
        let reply = post(&server.url, "/sdapi/v1/options", &options).await?;
        assert_eq!(reply, (200, Value::Null), "{options}");
    }
    let (status, error) =
        post(&server.url, "/sdapi/v1/options", &json!({ "samples_format": "avif" })).await?;
    let said = "samples_format cannot be set to \"avif\"; it is \"png\"";
    assert_eq!((status, &error["detail"]), (422, &said.into()));
    for (name, value) in [
        ("disable_extra_networks", json!(true)),
        ("firstpass_image", json!("x")),
        ("latent_mask", json!("x")),
    ] {
        let (status, error) =
            post(&server.url, "/sdapi/v1/txt2img", &json!({ name: value })).await?;
        assert!(status == 422 && error["detail"].as_str().is_some_and(|text| text.contains(name)));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_are_rounded_as_there() -> Result<()> {
    let server = free().await;
    for (given, drawn, warns) in [
        (json!(72), 72, false),
        (json!(71), 64, true),
        (json!("100"), 96, true),
        (json!(7), 64, true),
        (json!(16), 16, false),
        (json!(0), 64, false),
    ] {
        let info = info_of(&server, &json!({ "width": given, "steps": 1 })).await?;
        assert_eq!((&info["width"], &info["height"]), (&drawn.into(), &64.into()), "{given}");
        let warning = json!([format!(
            "width {} is no multiple of 8: it is {drawn}",
            given.to_string().trim_matches('"')
        )]);
        assert_eq!(info["warnings"], if warns { warning } else { json!([]) });
    }
    Ok(())
}

/// A batch holds two of these; the third waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_skip_ends_the_images_that_run() -> Result<()> {
    let (server, strings) = start(HTTP).await;
    let body = json!({ "prompt": "a cat", "steps": 4, "batch_size": 3, "seed": 5 });
    let url = server.url.clone();
    let drawing = tokio::spawn(async move { post(&url, "/sdapi/v1/txt2img", &body).await });
    strings.step();
    while state(&server).await?["sampling_step"] == 0 {}
    post(&server.url, "/sdapi/v1/skip", &json!({})).await?;
    assert_eq!(state(&server).await?["skipped"], true);
    drop(strings.permits);
    let (status, reply) = drawing.await??;
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    assert_eq!((status, &info["all_seeds"]), (200, &json!([5, 6, 7])), "{reply}");
    assert_eq!(strings.steps.lock().expect("unpoisoned").last(), Some(&vec![7]));
    let warnings = info["warnings"].as_array().context("a list")?;
    assert!(warnings.iter().all(|warning| {
        warning.as_str().is_some_and(|text| text.starts_with("interrupted after"))
    }));
    assert!(!warnings.is_empty());
    Ok(())
}

async fn state(server: &Server) -> Result<Value> {
    Ok(get(&server.url, "/sdapi/v1/progress").await?["state"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_and_passes_are_jobs() -> Result<()> {
    let (server, strings) = start(HTTP).await;
    let Strings { permits, .. } = &strings;
    let body = json!({ "prompt": "a cat", "steps": 4, "n_iter": 2, "enable_hr": true,
                       "denoising_strength": 0.5, "hr_second_pass_steps": 2 });
    let url = server.url.clone();
    let drawing = tokio::spawn(async move { post(&url, "/sdapi/v1/txt2img", &body).await });
    strings.step();
    while state(&server).await?["job_count"] == 0 {}
    let first = state(&server).await?;
    assert_eq!((&first["job_count"], &first["job_no"]), (&4.into(), &0.into()));
    assert_eq!((&first["job"], &first["sampling_steps"]), (&"Batch 1 out of 2".into(), &4.into()));
    let began = first["job_timestamp"].as_str().context("digits")?;
    assert!(began.len() == 14 && began.starts_with("20"), "{began}");
    (0..4).try_for_each(|_| permits.send(()))?;
    while state(&server).await?["job_no"] == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(strings.permits);
    let reply = drawing.await??.1;
    let info: Value = serde_json::from_str(reply["info"].as_str().context("a string")?)?;
    assert_eq!((&info["job_timestamp"], &info["batch_size"]), (&json!(began), &1.into()));
    Ok(())
}
