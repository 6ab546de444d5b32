//! OpenAI's Images API. `tests/clients` drives it with OpenAI's own client; here are the shapes.

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::ImageFormat;
use reqwest::StatusCode;
use sd_server::http;
use serde_json::{Value, json};

use crate::engine::{LONG, Server, ready};
use crate::fake::{HTTP, keyed};
use crate::harness;
use crate::inputs::{file as png, gradient};
use crate::invocations::infotext;
use crate::progress::events;

const GENERATIONS: &str = "/v1/images/generations";

async fn post(server: &Server, body: &Value) -> Result<(u16, Value)> {
    let request = reqwest::Client::new().post(format!("{}{GENERATIONS}", server.url));
    let reply = request.body(body.to_string()).send().await?;
    Ok((reply.status().as_u16(), reply.json().await?))
}

/// A server whose steps are free.
async fn free(settings: http::HttpConfig) -> Server {
    let (engine, _) = ready().await;
    Server::start(engine, settings, LONG).await
}

fn picture(object: &Value) -> Result<Vec<u8>> {
    Ok(BASE64_STANDARD.decode(object["b64_json"].as_str().context("base64")?)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_come_as_base64_with_their_seeds() -> Result<()> {
    let server = free(HTTP).await;
    let body = json!({
        "model": "gpt-image-1", "prompt": "a cat", "n": 2, "size": "64x96", "quality": "high",
        "style": "vivid", "user": "me", "background": "auto", "moderation": "low",
        "response_format": null, "seed": 7, "steps": 3, "guidance_scale": 2.5,
        "negative_prompt": "dogs", "scheduler": "Euler a",
    });
    let (status, reply) = post(&server, &body).await?;
    assert_eq!(status, 200, "{reply}");
    assert!(reply["created"].as_u64().context("a time")? > 1_700_000_000);
    assert_eq!((&reply["size"], &reply["output_format"]), (&"64x96".into(), &"png".into()));
    let data = reply["data"].as_array().context("data")?;
    let seeds: Vec<_> = data.iter().map(|object| object["seed"].as_u64()).collect();
    assert_eq!(seeds, [Some(7), Some(8)]);
    let text = infotext(&picture(&data[1])?);
    let wanted = "a cat\nNegative prompt: dogs\nSteps: 3, Sampler: Euler a, CFG scale: 2.5, Seed: 8, Size: 64x96";
    assert!(text.starts_with(wanted), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn formats_and_their_quality() -> Result<()> {
    let (engine, strings) = ready().await;
    drop(strings.permits);
    let server = Server::start(engine, HTTP, LONG).await;
    let sized = async |compression: Value| {
        let body = json!({
            "prompt": "a cat", "size": "auto", "output_format": "jpeg",
            "output_compression": compression,
        });
        let (status, reply) = post(&server, &body).await?;
        assert_eq!((status, &reply["output_format"]), (200, &"jpeg".into()), "{reply}");
        let file = picture(&reply["data"][0])?;
        // The first quantisation table tells the quality; the fake's pictures have one colour.
        let table = file.windows(2).position(|bytes| bytes == b"\xff\xdb").context("a table")?;
        anyhow::Ok(file[table + 5])
    };
    let (low, default, high) =
        (sized(json!(5)).await?, sized(json!(null)).await?, sized(json!(100)).await?);
    assert!(low > default && default > high, "{low} {default} {high}");
    for compression in [json!(100), json!(50), json!(0)] {
        let body = json!({
            "prompt": "a cat", "output_format": "webp", "output_compression": compression,
            "seed": 7, "size": "64x72",
        });
        let (status, reply) = post(&server, &body).await?;
        assert_eq!(status, 200, "{reply}");
        let file = picture(&reply["data"][0])?;
        let has = |chunk: &[u8]| file.windows(4).any(|bytes| bytes == chunk);
        assert_eq!((has(b"VP8L"), has(b"VP8 ")), (compression == 100, compression != 100));
        let request = reqwest::Client::new().post(format!("{}/sdapi/v1/png-info", server.url));
        let body = json!({ "image": reply["data"][0]["b64_json"] });
        let read: Value = request.body(body.to_string()).send().await?.json().await?;
        let [seed, height] = ["Seed", "Size-2"].map(|name| &read["parameters"][name]);
        assert_eq!((seed, height), (&"7".into(), &"72".into()));
        let shown = image::load_from_memory(&file)?.to_rgb8();
        assert_eq!(shown.dimensions(), (64, 72));
        let far = shown.pixels().flat_map(|pixel| pixel.0).map(|value| value.abs_diff(7)).max();
        assert!(far <= Some(if compression == 100 { 0 } else { 4 }), "{far:?}");
    }
    let body = json!({ "prompt": "a cat", "output_format": "png", "output_compression": 50 });
    let (status, reply) = post(&server, &body).await?;
    assert_eq!((status, &reply["error"]["param"]), (400, &"output_compression".into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_is_good_for_a_while() -> Result<()> {
    // Two of the fake's pictures fit on the shelf, three do not.
    let server = free(http::HttpConfig { max_url_bytes: 700, ..HTTP }).await;
    let draw = async |seed: u64| {
        let body = json!({ "prompt": "a cat", "seed": seed, "response_format": "url" });
        let (status, reply) = post(&server, &body).await?;
        assert_eq!(status, 200, "{reply}");
        assert!(reply["data"][0].get("b64_json").is_none());
        anyhow::Ok(reply["data"][0]["url"].as_str().context("a URL")?.to_owned())
    };
    let first = draw(1).await?;
    assert!(first.starts_with(&format!("{}/files/", server.url)), "{first}");
    let reply = reqwest::get(&first).await?;
    assert_eq!(
        (reply.status().as_u16(), &reply.headers()["content-type"]),
        (200, &"image/png".parse()?)
    );
    let file = reply.bytes().await?;
    assert!((234..350).contains(&file.len()), "{}", file.len());
    assert!(infotext(&file).contains("Seed: 1,"));
    let last = [draw(2).await?, draw(3).await?, draw(4).await?];
    assert_eq!(reqwest::get(&first).await?.status(), 404, "it made room");
    assert_eq!(reqwest::get(&last[2]).await?.status(), 200);
    let large = json!({ "prompt": "a cat", "n": 3, "response_format": "url" });
    let (status, error) = post(&server, &large).await?;
    assert_eq!((status, &error["error"]["param"]), (400, &"response_format".into()), "{error}");
    assert_eq!(reqwest::get(&last[2]).await?.status(), 200, "nothing goes in vain");
    let both = json!({ "prompt": "a cat", "n": 2, "response_format": "url" });
    for object in post(&server, &both).await?.1["data"].as_array().context("data")? {
        let url = object["url"].as_str().context("a URL")?;
        assert_eq!(reqwest::get(url).await?.status(), 200, "they go together");
    }

    let short = std::time::Duration::from_millis(1);
    let server = free(http::HttpConfig { url_retention: short, ..HTTP }).await;
    let body = json!({ "prompt": "a cat", "response_format": "url" });
    let url = post(&server, &body).await?.1["data"][0]["url"].as_str().context("a URL")?.to_owned();
    tokio::time::sleep(2 * short).await;
    assert_eq!(reqwest::get(&url).await?.status(), 404);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_openais_events() -> Result<()> {
    let server = free(HTTP).await;
    let body = json!({
        "prompt": "a cat", "stream": true, "partial_images": 2, "steps": 6, "seed": 5,
        "output_format": "jpeg",
    });
    let request = reqwest::Client::new().post(format!("{}{GENERATIONS}", server.url));
    let text = request.body(body.to_string()).send().await?.text().await?;
    let events = events(&text);
    for (name, data) in &events {
        assert_eq!(&data["type"], name);
        assert_eq!((&data["size"], &data["output_format"]), (&"64x64".into(), &"jpeg".into()));
        assert!(picture(data)?.starts_with(b"\xff\xd8"));
        assert!(data["created_at"].is_u64());
    }
    let (last, partial) = events.split_last().context("events")?;
    assert_eq!((last.0.as_str(), &last.1["seed"]), ("image_generation.completed", &5.into()));
    for (index, (name, data)) in partial.iter().enumerate() {
        assert_eq!(name, "image_generation.partial_image");
        assert_eq!(data["partial_image_index"], index);
    }
    let broken = json!({ "prompt": "out of memory", "stream": true });
    let request = reqwest::Client::new().post(format!("{}{GENERATIONS}", server.url));
    let text = request.body(broken.to_string()).send().await?.text().await?;
    let (name, data) = self::events(&text).pop().context("an end")?;
    assert_eq!((name.as_str(), &data["error"]["code"]), ("error", &"out_of_memory".into()));
    assert_eq!(data["error"]["type"], "server_error");
    Ok(())
}

/// Previews are at least half a second apart: one step now, one after that.
#[tokio::test(flavor = "multi_thread")]
async fn partial_pictures_come_as_the_steps_are_made() -> Result<()> {
    let (engine, strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    let body = json!({ "prompt": "a cat", "stream": true, "partial_images": 1, "steps": 3 });
    let request = reqwest::Client::new().post(format!("{}{GENERATIONS}", server.url));
    let mut stream = request.body(body.to_string()).send().await?;
    strings.step();
    strings.step();
    tokio::time::sleep(std::time::Duration::from_millis(600)).await;
    strings.step();
    let mut text = String::new();
    while let Some(chunk) = stream.chunk().await? {
        text += &String::from_utf8_lossy(&chunk);
    }
    let names: Vec<_> = events(&text).into_iter().map(|event| event.0).collect();
    assert_eq!(names, ["image_generation.partial_image", "image_generation.completed"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_openais_shape() -> Result<()> {
    let server = free(HTTP).await;
    let table = [
        (json!({}), 400, "malformed", json!("prompt")),
        (json!({ "prompt": "x", "size": "large" }), 400, "malformed", json!("size")),
        (json!({ "prompt": "x", "size": "100x64" }), 400, "out_of_range", json!("size")),
        (json!({ "prompt": "x", "size": "64x64", "width": 8 }), 400, "malformed", json!("size")),
        (json!({ "prompt": "x", "n": 11 }), 400, "out_of_range", json!("n")),
        (
            json!({ "prompt": "x", "partial_images": 4 }),
            400,
            "out_of_range",
            json!("partial_images"),
        ),
        (json!({ "prompt": "x", "quality": 5 }), 400, "malformed", json!("quality")),
        (
            json!({ "prompt": "x", "output_format": "svg" }),
            400,
            "out_of_range",
            json!("output_format"),
        ),
        (
            json!({ "prompt": "x", "response_format": "png" }),
            400,
            "out_of_range",
            json!("response_format"),
        ),
        (json!({ "prompt": "x", "model": "sdxl" }), 404, "model_not_found", json!("model")),
        (json!({ "prompt": "out of memory" }), 507, "out_of_memory", json!(null)),
    ];
    for (body, status, code, param) in table {
        let request = reqwest::Client::new().post(format!("{}{GENERATIONS}", server.url));
        let reply = request.body(body.to_string()).send().await?;
        let again = reply.headers().get("x-should-retry").cloned();
        assert_eq!(reply.status().as_u16(), status, "{body}");
        assert_eq!(again.is_some(), status == 507, "a client that tries again must have a chance");
        let error = reply.json::<Value>().await?["error"].clone();
        assert_eq!((&error["code"], &error["param"]), (&code.into(), &param), "{body}");
        let kind = if status == 507 { "server_error" } else { "invalid_request_error" };
        assert_eq!(error["type"], kind);
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 10));
    }
    let server = free(keyed(&["sesame"])).await;
    let (status, reply) = post(&server, &json!({})).await?;
    assert_eq!((status, &reply["error"]["type"]), (401, &"invalid_request_error".into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_effect_is_told() -> Result<()> {
    let server = free(HTTP).await;
    let quiet = json!({ "prompt": "x", "model": "gpt-image-1", "quality": "auto", "style": "",
        "background": "opaque", "user": "someone", "moderation": null });
    let (status, reply) = post(&server, &quiet).await?;
    assert_eq!((status, &reply["data"][0]["warnings"]), (200, &Value::Null), "{reply}");
    let mut loud =
        json!({ "prompt": "x", "quality": "high", "background": "transparent", "colour": 1 });
    let (status, reply) = post(&server, &loud).await?;
    let warnings = json!([
        "quality has no effect",
        "background has no effect: images are opaque",
        "colour is unknown and was ignored"
    ]);
    assert_eq!((status, &reply["data"][0]["warnings"]), (200, &warnings));
    for k in 0..100 {
        loud[format!("field{k}")] = json!("x");
    }
    let (_, reply) = post(&server, &loud).await?;
    let warnings = reply["data"][0]["warnings"].as_array().context("a list")?;
    assert_eq!(warnings.len(), 2 + 16 + 1);
    assert_eq!(warnings.last(), Some(&"85 more fields are unknown and were ignored".into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_is_listed_under_its_name() -> Result<()> {
    let server = free(HTTP).await;
    let get = async |path: &str| {
        let reply = reqwest::get(format!("{}{path}", server.url)).await?;
        anyhow::Ok((reply.status().as_u16(), reply.json::<Value>().await?))
    };
    let (_, list) = get("/v1/models").await?;
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&"list".into(), &"fake".into()));
    assert_eq!(get("/v1/models/fake").await?, (200, list["data"][0].clone()));
    for other in ["owner/name", "owner%2Fname"] {
        let (status, error) = get(&format!("/v1/models/{other}")).await?;
        assert_eq!((status, &error["error"]["code"]), (404, &"model_not_found".into()));
        assert!(error["error"]["message"].as_str().is_some_and(|text| text.contains("owner/name")));
    }
    assert_eq!(post(&server, &json!({ "prompt": "x", "model": "fake" })).await?.0, 200);
    Ok(())
}

/// A part of a form: its name, and a text or a file.
type Part<'a> = (&'a str, &'a [u8]);

fn form(parts: &[Part<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, data) in parts {
        let file = if ["image", "mask"].contains(name) { "; filename=\"a.png\"" } else { "" };
        let head =
            format!("--frontier\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        body.extend(head.into_bytes());
        body.extend(*data);
        body.extend(b"\r\n");
    }
    body.extend(b"--frontier--\r\n");
    body
}

#[test]
fn a_variation_begins_with_its_image_alone() {
    let server = harness::Server::ready(&[]);
    let (file, mask) =
        (png(&gradient(64, 72), ImageFormat::Png), png(&gradient(64, 72), ImageFormat::Png));
    let body = json!({ "prompt": "", "steps": 4, "seed": 3, "image": BASE64_STANDARD.encode(&file),
        "output_format": "png" });
    let native = server.json(&body).json()["data"].clone();
    let vary = |parts: &[Part<'_>]| {
        let request = server.client.post(server.url("/v1/images/variations"));
        let request = request.header("content-type", "multipart/form-data; boundary=frontier");
        let reply = request.body(form(parts)).send().expect("an answer");
        (reply.status().as_u16(), reply.json::<Value>().expect("JSON"))
    };
    let rest: [Part<'_>; 2] = [("steps", b"4"), ("seed", b"3")];
    let (status, reply) = vary(&[&rest[..], &[("image", &file[..]), ("n", b"2")]].concat());
    assert_eq!((status, reply["data"].as_array().map(Vec::len)), (200, Some(2)));
    assert_eq!(reply["data"][0]["b64_json"], native);
    for parts in [&rest[..], &[("image", &file[..]), ("mask", &mask[..])]] {
        assert_eq!(vary(parts).0, 400);
    }
}

#[test]
fn an_edit_paints_where_the_mask_is_transparent() -> Result<()> {
    let server = harness::Server::ready(&[]);
    let edit = |parts: &[Part<'_>]| {
        let request = server.client.post(server.url("/v1/images/edits"));
        let request = request.header("content-type", "multipart/form-data; boundary=frontier");
        let reply = request.body(form(parts)).send().expect("an answer");
        (reply.status().as_u16(), reply.json::<Value>().expect("JSON"))
    };
    let picture = gradient(64, 72);
    let holed = |hole: u8| {
        let mut holed = picture.to_rgba8();
        holed
            .enumerate_pixels_mut()
            .filter(|(x, _, _)| *x < 32)
            .for_each(|(_, _, p)| p.0[3] = hole);
        png(&holed.into(), ImageFormat::Png)
    };
    let left =
        image::GrayImage::from_fn(64, 72, |x, _| image::Luma([if x < 32 { 255 } else { 0 }]));
    let base64 = |image: &image::DynamicImage| BASE64_STANDARD.encode(png(image, ImageFormat::Png));
    let native = |more: Value| {
        let mut body = json!({ "prompt": "a red house", "steps": 4, "seed": 3,
            "image": base64(&picture), "output_format": "png" });
        for (name, value) in more.as_object().expect("an object") {
            body[name] = value.clone();
        }
        server.json(&body).json()["data"].clone()
    };
    let texts: [Part<'_>; 3] = [("prompt", b"a red house"), ("steps", b"4"), ("seed", b"3")];
    let (file, hole) = (png(&picture, ImageFormat::Png), holed(0));
    let drawn = |parts: &[Part<'_>]| {
        let (status, reply) = edit(&[&texts, parts].concat());
        assert_eq!(status, 200, "{reply}");
        reply["data"][0]["b64_json"].clone()
    };
    let painted = native(json!({ "mask": base64(&left.into()), "strength": 1 }));
    assert_eq!(drawn(&[("image", &file), ("mask", &hole), ("size", b"64x72")]), painted);
    assert_eq!(drawn(&[("image", &hole)]), painted, "the picture's own transparency");
    assert_eq!(
        drawn(&[("image[]", &file), ("strength", b"0.5")]),
        native(json!({ "strength": 0.5 }))
    );

    let whole = holed(255);
    let text = base64(&picture);
    let text = text.as_bytes();
    let wrong: [(&[Part<'_>], u16, &str); 9] = [
        (&[], 400, "image"),
        (&[("image", &file), ("image", &file)], 400, "image"),
        (&[("image", b"GIF")], 400, "image"),
        (&[("image", &file), ("mask", &whole)], 400, "mask"),
        (&[("image", &file), ("strength", b"much")], 400, "strength"),
        // A file, and the same as a native field.
        (&[("image", &file), ("init_image", text)], 400, "init_image"),
        (&[("image", &file), ("mask", &hole), ("mask_image", text)], 400, "mask_image"),
        (&[("image", &file), ("mask", &hole), ("mask", text)], 400, "mask"),
        (&[("image", &file), ("mask_image", text), ("mask_image", text)], 400, "mask_image"),
    ];
    for (parts, status, param) in wrong {
        let (found, reply) = edit(&[&texts, parts].concat());
        assert_eq!((found, &reply["error"]["param"]), (status, &param.into()), "{reply}");
    }
    let send = |body| server.client.post(server.url("/v1/images/edits")).body(body).send();
    assert_eq!(
        (send("{}")?.status(), send("a cat")?.status()),
        (StatusCode::BAD_REQUEST, StatusCode::UNSUPPORTED_MEDIA_TYPE)
    );
    Ok(())
}

#[test]
fn a_mask_has_the_size_of_the_image_and_transparent_pixels() {
    let server = harness::Server::ready(&["--max-input-pixels", "1000000"]);
    let picture = png(&gradient(64, 72), ImageFormat::Png);
    let clear =
        |width, height| png(&image::DynamicImage::new_rgba8(width, height), ImageFormat::Png);
    let opaque = png(&gradient(64, 72), ImageFormat::Jpeg);
    let sentence = |mask: &[u8]| {
        let parts: [Part<'_>; 4] =
            [("prompt", b"a"), ("steps", b"1"), ("image", &picture), ("mask", mask)];
        let request = server.client.post(server.url("/v1/images/edits"));
        let request = request.header("content-type", "multipart/form-data; boundary=frontier");
        let reply: Value =
            request.body(form(&parts)).send().expect("an answer").json().expect("JSON");
        let error = &reply["error"];
        let kind = (&error["param"], &error["type"]);
        assert_eq!(kind, (&"mask".into(), &"invalid_request_error".into()), "{reply}");
        error["message"].as_str().expect("a sentence").to_owned()
    };
    // Stretched it would be another mask.
    assert_eq!(sentence(&clear(32, 36)), "mask is 32x36; it must be 64x72 as the image is");
    assert!(sentence(&clear(1100, 1000)).starts_with("mask is 1100x1000; at most 1000000 pixels"));
    let none = "mask has no transparent pixels, which mark the area to inpaint";
    assert_eq!(sentence(&opaque), none);
    assert!(sentence(b"no picture").starts_with("mask is in no known format"));
    assert_eq!(sentence(&clear(64, 72)[..40]), "mask is a PNG file that is damaged or cut short");
    assert_eq!(sentence(b""), "mask is an empty file: the client could not read it");
}
