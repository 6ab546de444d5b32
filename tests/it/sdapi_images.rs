//! AUTOMATIC1111's API with images: the parameters in their files, image-to-image and inpainting.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::ImageFormat;
use serde_json::{Value, json};

use crate::harness;
use crate::inputs::{file as png, gradient};

#[test]
fn a_pictures_parameters_are_read_out_of_its_file() {
    let server = harness::Server::ready(&[]);
    for (prompt, format) in
        [("a cat", "png"), ("eine Tür 🚪", "png"), ("a cat", "jpeg"), ("🚪", "webp")]
    {
        let body = json!({ "prompt": prompt, "negative_prompt": "dogs: all, of them", "steps": 1,
                           "seed": 7, "output_format": format, "width": 64, "height": 72 });
        let data = server.json(&body).json()["data"].clone();
        for prefix in ["", "data:image/png;base64,"] {
            let image = format!("{prefix}{}", data.as_str().expect("base64"));
            let reply = server.client.post(server.url("/sdapi/v1/png-info"));
            let reply =
                reply.body(json!({ "image": image }).to_string()).send().expect("an answer");
            let reply: Value = reply.json().expect("JSON");
            assert!(reply["info"].as_str().is_some_and(|info| info.starts_with(prompt)), "{reply}");
            let parameters = &reply["parameters"];
            assert_eq!(parameters["Prompt"], prompt);
            assert_eq!(parameters["Negative prompt"], "dogs: all, of them");
            assert_eq!((&parameters["Seed"], &parameters["Size"]), (&"7".into(), &"64x72".into()));
        }
    }
    let info = |file: &[u8]| {
        let body = json!({ "image": BASE64_STANDARD.encode(file) }).to_string();
        let request = server.client.post(server.url("/sdapi/v1/png-info")).body(body);
        let reply = request.send().expect("an answer");
        (reply.status().as_u16(), reply.json::<Value>().expect("JSON"))
    };
    let texts = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/texts");
    let novelai = std::fs::read(texts.join("novelai.png")).expect("a file");
    let (status, reply) = info(&novelai);
    assert_eq!((status, &reply["parameters"]["Sampler"]), (200, &"DPM++ 2M".into()), "{reply}");
    assert_eq!(reply["items"]["Software"], "NovelAI");
    assert_eq!(reply["items"]["parameters"], reply["info"]);
    let (status, reply) = info(&novelai[..40]);
    let said = "image is a PNG file that is damaged or cut short";
    assert_eq!((status, &reply["detail"]), (400, &said.into()));
    let wrong =
        [json!({}), json!({ "image": "?" }), json!({ "image": "AAAA" }), json!({ "image": 1 })];
    for body in wrong {
        let request = server.client.post(server.url("/sdapi/v1/png-info")).body(body.to_string());
        assert_eq!(request.send().expect("an answer").status(), 400, "{body}");
    }
}

#[test]
fn transparency_is_white_here_and_told_of_elsewhere() {
    let server = harness::Server::ready(&[]);
    // Alike in any viewer.
    let picture = |hidden: [u8; 3]| {
        let [red, green, blue] = hidden;
        let pixel = |x, _| match x < 32 {
            true => image::Rgba([220, 40, 40, 255]),
            false => image::Rgba([red, green, blue, 0]),
        };
        let picture = image::RgbaImage::from_fn(64, 64, pixel).into();
        BASE64_STANDARD.encode(png(&picture, ImageFormat::Png))
    };
    let pictures = [[0, 0, 0], [0, 255, 0], [255, 255, 255]].map(picture);
    let here = pictures.clone().map(|picture| {
        let body =
            json!({ "init_images": [picture], "steps": 2, "seed": 1, "denoising_strength": 0.5 });
        let request = server.client.post(server.url("/sdapi/v1/img2img")).body(body.to_string());
        let reply: Value = request.send().expect("an answer").json().expect("JSON");
        reply["images"][0].clone()
    });
    assert!(here[0].is_string() && here[0] == here[1] && here[1] == here[2]);
    let native = pictures.map(|picture| {
        let body =
            json!({ "prompt": "", "image": picture, "steps": 2, "seed": 1, "strength": 0.5 });
        let reply = server.json(&body).json();
        let warning = "image is transparent in places: their hidden colours were used";
        assert_eq!(reply["warnings"], json!([warning]));
        reply["data"].clone()
    });
    assert_ne!(native[0], native[1]);
}

/// The base64 of a mask whose halves have these values.
fn half(left: u8, right: u8) -> String {
    let pixel = |x, _| image::Luma([if x < 32 { left } else { right }]);
    let mask = image::GrayImage::from_fn(64, 72, pixel).into();
    BASE64_STANDARD.encode(png(&mask, ImageFormat::Png))
}

fn pixels(data: &Value) -> image::RgbImage {
    let file = BASE64_STANDARD.decode(data.as_str().expect("base64")).expect("base64");
    image::load_from_memory(&file).expect("a picture").into_rgb8()
}

#[test]
fn a_mask_is_used_as_its_options_say() {
    let server = harness::Server::ready(&[]);
    let picture = BASE64_STANDARD.encode(png(&gradient(64, 72), ImageFormat::Png));
    let body = json!({ "prompt": "a red house", "steps": 4, "seed": 3, "sampler_name": "Euler",
        "denoising_strength": 0.5, "init_images": [picture], "mask": half(255, 0), "mask_blur": 0,
        "inpainting_fill": 1, "inpaint_full_res": false });
    let with = |changes: Value| {
        let mut body = body.clone();
        for (name, value) in changes.as_object().expect("an object") {
            body[name] = value.clone();
        }
        let request = server.client.post(server.url("/sdapi/v1/img2img")).body(body.to_string());
        let reply: Value = request.send().expect("an answer").json().expect("JSON");
        pixels(&reply["images"][0])
    };
    let found = with(json!({}));
    assert_eq!(with(json!({ "mask": half(0, 255), "inpainting_mask_invert": 1 })), found);
    let starts = [0, 1, 2, 3].map(|fill| with(json!({ "inpainting_fill": fill })));
    for (k, start) in starts.iter().enumerate() {
        assert!(starts[..k].iter().all(|other| other != start), "{k}");
        assert_eq!(start.get_pixel(60, 30), found.get_pixel(60, 30));
    }
    // Without a mask there is nothing that begins as something else.
    let [noise, picture] =
        [2, 1].map(|fill| with(json!({ "inpainting_fill": fill, "mask": null })));
    assert_eq!(noise, picture);
    // Blurred, it keeps less of the edge of the unmasked part.
    let soft = with(json!({ "mask_blur": 4 }));
    assert_eq!(
        (soft.get_pixel(60, 30), soft.get_pixel(34, 30) == found.get_pixel(34, 30)),
        (found.get_pixel(60, 30), false)
    );
    // The masked area alone in another size, put back.
    let part = json!({ "inpaint_full_res": true, "inpaint_full_res_padding": 8, "width": 128,
        "height": 128 });
    let part = with(part);
    assert_eq!(part.dimensions(), (64, 72));
    assert_eq!(part.get_pixel(60, 30), found.get_pixel(60, 30));
    assert_ne!(part, found);
    for mode in [1, 2] {
        let other = with(json!({ "resize_mode": mode, "width": 96, "mask": null }));
        assert_eq!(other.dimensions(), (96, 72));
        assert_ne!(other, with(json!({ "resize_mode": 0, "width": 96, "mask": null })));
    }
}

/// What the options of a mask change in a native request and in AUTOMATIC1111's.
#[test]
fn native_options_of_a_mask_are_those_of_a1111() {
    let server = harness::Server::ready(&[]);
    let picture = BASE64_STANDARD.encode(png(&gradient(64, 72), ImageFormat::Png));
    let with = |body: &Value, changes: &Value| {
        let mut body = body.clone();
        for (name, value) in changes.as_object().expect("an object") {
            body[name] = value.clone();
        }
        body
    };
    let theirs = json!({ "prompt": "a red house", "steps": 4, "seed": 3, "sampler_name": "Euler",
        "denoising_strength": 0.5, "init_images": [picture], "mask": half(255, 0), "mask_blur": 0,
        "inpainting_fill": 1, "inpaint_full_res": false });
    let ours = json!({ "prompt": "a red house", "steps": 4, "seed": 3, "scheduler": "euler",
        "strength": 0.5, "image": picture, "mask": half(255, 0), "output_format": "png" });
    let pairs = [
        (json!({ "mask_blur": 4 }), json!({ "mask_blur": "4.0" })),
        (
            json!({ "inpaint_full_res": true, "inpaint_full_res_padding": 8, "width": 128,
                "height": 128 }),
            json!({ "mask_padding": 8, "width": 128, "height": 128 }),
        ),
        (json!({ "inpainting_fill": 0 }), json!({ "mask_fill": "fill" })),
        (json!({ "inpainting_fill": 2 }), json!({ "mask_fill": "Noise" })),
        (json!({ "inpainting_fill": 3 }), json!({ "mask_fill": "nothing" })),
        (
            json!({ "inpainting_mask_invert": 1, "mask_blur": 2 }),
            json!({ "mask_invert": true, "mask_blur": 2 }),
        ),
    ];
    for (a1111, native) in pairs {
        let body = with(&theirs, &a1111).to_string();
        let reply = server.client.post(server.url("/sdapi/v1/img2img")).body(body).send();
        let reply: Value = reply.expect("an answer").json().expect("JSON");
        let found = server.json(&with(&ours, &native)).json()["data"].clone();
        assert_eq!(pixels(&found), pixels(&reply["images"][0]), "{native}");
    }
    let refused = [
        (json!({ "mask_blur": 4, "mask": null }), "mask_blur requires mask"),
        (json!({ "mask_fill": "red" }), "mask_fill \"red\" is unknown; known are original, fill"),
        (
            json!({ "mask_blur": 4, "hires_width": 128 }),
            "mask_blur is not supported with a hires pass",
        ),
        (json!({ "mask_padding": 257 }), "mask_padding must be from 0 to 256, not 257"),
    ];
    for (options, reason) in refused {
        let error = server.json(&with(&ours, &options)).json()["error"]["message"].clone();
        assert!(error.as_str().is_some_and(|message| message.contains(reason)), "{error}");
    }
    let nothing = json!({ "prompt": "a", "steps": 1, "seed": 1, "mask_blur": 0, "mask_invert": "off",
        "mask_fill": "original" });
    assert_eq!(server.json(&nothing).status, 200);
}

#[test]
fn img2img_begins_with_a_picture() {
    let server = harness::Server::ready(&[]);
    let post = |body: &Value| {
        let request = server.client.post(server.url("/sdapi/v1/img2img")).body(body.to_string());
        let reply = request.send().expect("an answer");
        (reply.status().as_u16(), reply.json::<Value>().expect("JSON"))
    };
    let picture = BASE64_STANDARD.encode(png(&gradient(64, 72), ImageFormat::Png));
    let native = json!({ "prompt": "a red house", "steps": 4, "seed": 3, "guidance_scale": 7,
        "scheduler": "euler", "strength": 0.5, "image": picture, "mask": half(255, 0),
        "output_format": "png" });
    let native = server.json(&native).json()["data"].clone();
    let body = json!({ "prompt": "a red house", "steps": 4, "seed": 3, "cfg_scale": 7,
        "sampler_name": "Euler", "denoising_strength": 0.5, "init_images": [picture],
        "mask": half(255, 0), "resize_mode": 0, "mask_blur": 0, "inpainting_fill": 1,
        "inpaint_full_res": false, "inpainting_mask_invert": 0, "image_cfg_scale": 1.5 });
    let (status, reply) = post(&body);
    assert_eq!(status, 200, "{reply}");
    // Below the unmasked part of the input image lies what the native API gives.
    let (found, below, above) = (pixels(&reply["images"][0]), pixels(&native), gradient(64, 72));
    for (x, y, pixel) in found.enumerate_pixels() {
        let expected = if x < 32 { below.get_pixel(x, y) } else { &above.to_rgb8()[(x, y)] };
        assert_eq!(pixel, expected, "{x} {y}");
    }
    assert!(reply["parameters"].get("init_images").is_none());
    let info: Value =
        serde_json::from_str(reply["info"].as_str().expect("a string")).expect("JSON");
    assert_eq!(info["denoising_strength"], 0.5);
    assert!(
        info["infotexts"][0].as_str().is_some_and(|text| text.contains("Denoising strength: 0.5"))
    );
    assert_eq!(info["warnings"], json!([]));
    let table = [
        ("init_images", json!([])),
        ("init_images", json!(null)),
        ("init_images", json!([picture, picture])),
        ("init_images", json!(["AAAA"])),
        ("denoising_strength", json!(2)),
        ("resize_mode", json!(3)),
        ("inpainting_fill", json!(4)),
        ("mask_blur_x", json!(1)),
    ];
    for (name, value) in table {
        let mut wrong = body.clone();
        wrong[name] = value;
        let (status, error) = post(&wrong);
        assert!((400..500).contains(&status), "{error}");
        assert!(error["detail"].as_str().is_some_and(|detail| detail.contains(name)), "{error}");
    }
}

#[test]
fn how_a_mask_was_used_is_among_the_parameters() {
    let server = harness::Server::ready(&[]);
    let picture = BASE64_STANDARD.encode(png(&gradient(64, 72), ImageFormat::Png));
    let post = |path: &str, body: &Value| -> Value {
        let request = server.client.post(server.url(path)).body(body.to_string());
        request.send().expect("an answer").json().expect("JSON")
    };
    for (changes, wanted) in [
        (
            json!({}),
            json!({ "Mask blur": "4", "Inpaint area": "Only masked", "Masked area padding": "0",
                    "Masked content": "fill" }),
        ),
        (json!({ "mask_blur": 0, "inpaint_full_res": false, "inpainting_fill": 1 }), json!({})),
        (
            json!({ "mask_blur": 2.5, "inpaint_full_res_padding": 8, "inpainting_fill": 2,
                    "inpainting_mask_invert": 1 }),
            json!({ "Mask mode": "Inpaint not masked", "Mask blur": "2.5",
                    "Inpaint area": "Only masked", "Masked area padding": "8",
                    "Masked content": "latent noise" }),
        ),
        (
            json!({ "inpaint_full_res": 0, "inpainting_fill": 3 }),
            json!({ "Mask blur": "4", "Masked content": "latent nothing" }),
        ),
        (json!({ "mask": null }), json!({})),
    ] {
        let mut body = json!({ "prompt": "a", "steps": 2, "seed": 3, "init_images": [picture],
                               "mask": half(255, 0) });
        let changes = changes.as_object().expect("an object").clone();
        body.as_object_mut().expect("an object").extend(changes);
        let reply = post("/sdapi/v1/img2img", &body);
        let read = post("/sdapi/v1/png-info", &json!({ "image": reply["images"][0] }));
        let names =
            ["Mask mode", "Mask blur", "Inpaint area", "Masked area padding", "Masked content"];
        let found = names
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), read["parameters"].get(name)?.clone())));
        assert_eq!(Value::Object(found.collect()), wanted, "{body}");
        let info: Value =
            serde_json::from_str(reply["info"].as_str().expect("a string")).expect("JSON");
        assert_eq!(info["extra_generation_params"].get("Mask blur"), wanted.get("Mask blur"));
    }
}
