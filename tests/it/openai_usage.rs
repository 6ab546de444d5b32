//! OpenAI's Images API: tokens, partial images, the names of its models, and images in JSON.

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::engine::{LONG, Server, ready};
use crate::fake::HTTP;
use crate::inputs::{file, gradient};
use crate::progress::events;

async fn server() -> Server {
    Server::start(ready().await.0, HTTP, LONG).await
}

async fn post(server: &Server, path: &str, body: &Value) -> Result<(u16, Value)> {
    let request = reqwest::Client::new().post(format!("{}/v1/images/{path}", server.url));
    let reply = request.header("content-type", "application/json").body(body.to_string());
    let reply = reply.send().await?;
    Ok((reply.status().as_u16(), reply.json().await?))
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted() -> Result<()> {
    let server = server().await;
    let body = json!({ "prompt": "a red house", "negative_prompt": "blue", "n": 2, "steps": 1,
                       "size": "128x64", "quality": "low" });
    let (_, reply) = post(&server, "generations", &body).await?;
    let usage = |output: usize| {
        json!({
            "total_tokens": 4 + output, "input_tokens": 4, "output_tokens": output,
            "input_tokens_details": { "text_tokens": 4, "image_tokens": 0 },
            "output_tokens_details": { "text_tokens": 0, "image_tokens": output },
        })
    };
    assert_eq!((&reply["usage"], &reply["quality"]), (&usage(2 * 3), &"low".into()), "{reply}");
    assert_eq!(reply["data"][0]["warnings"], json!(["quality has no effect"]));
    let mut streamed = body;
    streamed["stream"] = true.into();
    let request = reqwest::Client::new().post(format!("{}/v1/images/generations", server.url));
    let text = request.body(streamed.to_string()).send().await?.text().await?;
    for (name, data) in events(&text) {
        assert_eq!((name.as_str(), &data["usage"]), ("image_generation.completed", &usage(3)));
    }
    let png = BASE64_STANDARD.encode(file(&gradient(64, 64), image::ImageFormat::Png));
    let edit = json!({ "prompt": "a", "image": png, "steps": 2 });
    let (status, reply) = post(&server, "edits", &edit).await?;
    assert_eq!(status, 200, "{reply}");
    assert_eq!(reply["usage"]["input_tokens_details"]["image_tokens"], 65 + 129);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_partial_images_come_as_are_asked_for() -> Result<()> {
    let server = server().await;
    for (parts, steps, n) in [(0, 4, 1), (1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 7, 1), (3, 50, 2)] {
        let body = json!({ "prompt": "a", "stream": true, "partial_images": parts, "steps": steps,
                           "n": n });
        let request = reqwest::Client::new().post(format!("{}/v1/images/generations", server.url));
        let text = request.body(body.to_string()).send().await?.text().await?;
        let events = events(&text);
        let (partial, last) = events.split_at(parts);
        for (index, (name, data)) in partial.iter().enumerate() {
            assert_eq!(name, "image_generation.partial_image", "{body}");
            assert_eq!(data["partial_image_index"], index, "{body}");
        }
        assert_eq!(last.len(), n, "{body}");
        assert!(last.iter().all(|(name, _)| name == "image_generation.completed"), "{body}");
    }
    let body = json!({ "prompt": "a", "partial_images": 1, "preview": true, "steps": 1 });
    let (_, reply) = post(&server, "generations", &body).await?;
    let warnings = json!([
        "preview has no effect: partial_images is the number of partial images",
        "partial_images has no effect without stream"
    ]);
    assert_eq!(reply["data"][0]["warnings"], warnings);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn openais_names_are_those_of_the_default_model() -> Result<()> {
    let server = server().await;
    let card = async |id: &str| {
        let reply = reqwest::get(format!("{}/v1/models/{id}", server.url)).await?;
        anyhow::Ok((reply.status().as_u16(), reply.json::<Value>().await?))
    };
    for id in ["dall-e-3", "gpt-image-1", "GPT-Image-1-mini", "openai/dall-e-2"] {
        let (status, model) = card(id).await?;
        assert_eq!((status, &model["id"], &model["root"]), (200, &id.into(), &"fake".into()));
        let body = json!({ "prompt": "a", "steps": 1, "model": id });
        assert_eq!(post(&server, "generations", &body).await?.0, 200, "{id}");
    }
    assert_eq!(card("fake").await?.0, 200);
    for id in ["gpt-4o", "dall"] {
        assert_eq!(card(id).await?.1["error"]["code"], "model_not_found", "{id}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_may_be_in_json() -> Result<()> {
    let server = server().await;
    let png = BASE64_STANDARD.encode(file(&gradient(64, 48), image::ImageFormat::Png));
    let url = format!("data:image/png;base64,{png}");
    for image in [
        json!({ "image": png }),
        json!({ "image": [url] }),
        json!({ "image[]": url }),
        json!({ "images": [{ "image_url": url }] }),
        json!({ "image": { "type": "input_image", "image_url": { "url": url } } }),
    ] {
        let mut body = json!({ "prompt": "a", "steps": 2 });
        let fields = image.as_object().context("an object")?.clone();
        body.as_object_mut().context("an object")?.extend(fields);
        let (status, reply) = post(&server, "edits", &body).await?;
        assert_eq!((status, &reply["size"]), (200, &"64x48".into()), "{reply}");
    }
    for (image, param) in [
        (json!({}), "image"),
        (json!({ "image": [url, url] }), "image"),
        (json!({ "images": [{ "file_id": "file-1" }] }), "images"),
        (json!({ "image": "https://example.org/cat.png" }), "image"),
        (json!({ "image": 7 }), "image"),
        (json!({ "image": [] }), "image"),
    ] {
        let mut body = image;
        body["prompt"] = "a".into();
        let (status, reply) = post(&server, "edits", &body).await?;
        assert_eq!((status, &reply["error"]["param"]), (400, &param.into()), "{reply}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_may_be_written_as_people_do() -> Result<()> {
    let server = server().await;
    for (size, drawn) in [
        ("64x72", "64x72"),
        ("64X72", "64x72"),
        (" 64 x 72 ", "64x72"),
        ("64*72", "64x72"),
        ("64\u{d7}72", "64x72"),
        ("Auto", "64x64"),
        ("", "64x64"),
    ] {
        let body = json!({ "prompt": "a", "steps": 1, "size": size });
        assert_eq!(post(&server, "generations", &body).await?.1["size"], drawn, "{size:?}");
    }
    Ok(())
}
