//! Pictures that come in: every form of them is understood, and none does harm.

use std::io::Cursor;

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE};
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, ImageEncoder as _, ImageFormat, RgbImage};
use serde_json::{Value, json};

use crate::harness::Server;

/// A picture whose pixels are all different.
pub(crate) fn gradient(width: u32, height: u32) -> DynamicImage {
    let pixel = |x: u32, y: u32| image::Rgb([(x * 3) as u8, (y * 2) as u8, (x + y) as u8]);
    RgbImage::from_fn(width, height, pixel).into()
}

pub(crate) fn file(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    image.write_to(&mut file, format).expect("encodes");
    file.into_inner()
}

/// A JPEG that asks to be turned by a quarter.
fn turned(image: &DynamicImage) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut file, 95);
    // A TIFF header and a directory with one entry: orientation (0x112), short, 1 value, 6.
    let exif = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0".to_vec();
    encoder.set_exif_metadata(exif).expect("set");
    let (width, height) = (image.width(), image.height());
    let data = image.to_rgb8();
    encoder.write_image(&data, width, height, image::ExtendedColorType::Rgb8).expect("encodes");
    file
}

fn body(image: &str) -> Value {
    json!({ "prompt": "a red house", "steps": 4, "strength": 0.5, "seed": 3, "image": image })
}

fn drawn(server: &Server, body: &Value) -> RgbImage {
    let reply = server.post(&["accept: image/png"], body.to_string());
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    image::load_from_memory(&reply.body).expect("a picture").to_rgb8()
}

#[test]
fn a_picture_is_understood_in_every_format_and_size() {
    let server = Server::ready(&["--max-pixels", "8192", "--max-decoded-bytes", "1000"]);
    let picture = gradient(64, 64);
    let png = BASE64_STANDARD.encode(file(&picture, ImageFormat::Png));
    let first = drawn(&server, &body(&png));
    assert_eq!(first.dimensions(), (64, 64));
    let (webp, bmp) = (file(&picture, ImageFormat::WebP), file(&picture, ImageFormat::Bmp));
    let same = [
        format!("data:image/png;base64,{png}"),
        format!("{}\r\n{}", &png[..76], &png[76..]),
        BASE64_STANDARD_NO_PAD.encode(file(&picture, ImageFormat::Png)),
        BASE64_URL_SAFE.encode(&webp),
        BASE64_STANDARD.encode(webp),
        BASE64_STANDARD.encode(bmp),
        BASE64_STANDARD.encode(file(&picture.to_rgba8().into(), ImageFormat::Png)),
    ];
    for image in same {
        assert!(drawn(&server, &body(&image)) == first, "{image:.40}");
    }
    let gif = BASE64_STANDARD.encode(file(&picture, ImageFormat::Gif));
    assert_eq!(drawn(&server, &body(&gif)).dimensions(), (64, 64));
    let mut alias = body(&png);
    let fields = alias.as_object_mut().expect("an object");
    let image = fields.remove("image").expect("an image");
    fields.insert("init_image".into(), image);
    assert!(drawn(&server, &alias) == first);

    let sizes = [((70, 90), (64, 88)), ((160, 160), (88, 88)), ((3, 90), (8, 88))];
    for ((width, height), expected) in sizes {
        let image = BASE64_STANDARD.encode(file(&gradient(width, height), ImageFormat::Png));
        assert_eq!(drawn(&server, &body(&image)).dimensions(), expected);
    }
    let mut sized = body(&png);
    sized["width"] = 96.into();
    assert_eq!(drawn(&server, &sized).dimensions(), (96, 64));
    let jpeg = BASE64_STANDARD.encode(turned(&gradient(96, 64)));
    assert_eq!(drawn(&server, &body(&jpeg)).dimensions(), (64, 96));
}

#[test]
fn a_mask_keeps_what_is_black() {
    let server = Server::ready(&[]);
    let picture = gradient(64, 64);
    let mask = RgbImage::from_fn(64, 64, |x, _| image::Rgb([if x < 24 { 255 } else { 0 }; 3]));
    let png = |image: &DynamicImage| BASE64_STANDARD.encode(file(image, ImageFormat::Png));
    let mut request = body(&png(&picture));
    request["mask"] = png(&mask.into()).into();
    request["strength"] = 1.0.into();
    let one = drawn(&server, &request);
    request["prompt"] = "a blue car at night".into();
    let other = drawn(&server, &request);
    // The decoder looks some pixels over the edge.
    let difference = |from: u32, to: u32| {
        let place = (from..to).flat_map(|x| (0..64).map(move |y| (x, y)));
        let apart = |(x, y)| {
            let (a, b) = (one.get_pixel(x, y), other.get_pixel(x, y));
            (0..3).map(|c| u32::from(a.0[c].abs_diff(b.0[c]))).sum::<u32>()
        };
        place.map(apart).sum::<u32>() / ((to - from) * 64)
    };
    assert!(difference(0, 24) > 4 * difference(48, 64), "the mask has no effect");
}

#[test]
fn a_picture_that_cannot_be_used_is_refused_by_name() {
    let server = Server::ready(&["--max-input-pixels", "10000"]);
    let png = |side| BASE64_STANDARD.encode(file(&gradient(side, side), ImageFormat::Png));
    // The head of a picture of 60,000 by 60,000 pixels in some sixty bytes.
    let mut bomb = file(&gradient(1, 1), ImageFormat::Png);
    bomb[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let checksum = !bomb[12..29].iter().fold(u32::MAX, |crc, byte| {
        let next = |crc: u32, _| (crc >> 1) ^ (if crc & 1 == 1 { 0xedb8_8320 } else { 0 });
        (0..8).fold(crc ^ u32::from(*byte), next)
    });
    bomb[29..33].copy_from_slice(&checksum.to_be_bytes());
    let mut cut = file(&gradient(64, 64), ImageFormat::Png);
    cut.truncate(200);
    let table = [
        (400, "image", json!({ "image": 5 })),
        (400, "image", json!({ "image": "no base64!" })),
        (400, "image", json!({ "image": "https://example.org/cat.png" })),
        (422, "image", json!({ "image": "" })),
        (422, "image", json!({ "image": BASE64_STANDARD.encode("GIF89a but not really") })),
        (422, "image", json!({ "image": BASE64_STANDARD.encode(cut) })),
        (422, "image", json!({ "image": BASE64_STANDARD.encode(bomb) })),
        (422, "image", json!({ "image": png(101) })),
        (422, "mask", json!({ "image": png(64), "mask": BASE64_STANDARD.encode("text") })),
        (422, "strength", json!({ "image": png(64), "strength": 1.1 })),
        (422, "strength", json!({ "image": png(64), "strength": 0.01, "steps": 20 })),
        (400, "mask", json!({ "mask": png(64) })),
        (400, "strength", json!({ "strength": 0.5 })),
        (400, "image", json!({ "image": png(64), "init_image": png(64) })),
    ];
    for (status, param, mut fields) in table {
        fields["prompt"] = "a cat".into();
        let reply = server.json(&fields);
        let error = String::from_utf8_lossy(&reply.body);
        assert_eq!(reply.status, status, "{param}: {error}");
        let named = reply.error().1;
        assert!(named == param || named == "init_image", "{param}: {error}");
    }
    assert_eq!(drawn(&server, &body(&png(64))).dimensions(), (64, 64));
}

#[test]
fn warnings_of_an_image_file_are_in_a_header() {
    let server = Server::ready(&[]);
    let post = |prompt: &str| {
        let request = server.client.post(server.url("/invocations")).header("accept", "image/png");
        let body = json!({ "prompt": prompt, "steps": 1, "width": 64, "height": 64 });
        let request = request.header("content-type", "application/json").body(body.to_string());
        let reply = request.send().expect("an answer");
        assert_eq!(reply.status(), 200);
        reply.headers().get("x-sd-warnings").map(|text| text.to_str().expect("ASCII").to_owned())
    };
    assert_eq!(post("a house"), None);
    let warnings = post("a höuse <lora:sepiä:1>").expect("a warning");
    assert!(warnings.contains("<lora:sepi?:1>") && warnings.contains("a1111"), "{warnings}");
}
