//! Tiles of the VAE: by a field, by an option, and where the whole does not fit.

use std::process::Output;

use serde_json::{Value, json};

use crate::harness::{Server, sd_server};

/// The reply to a small body with more fields; the built-in model's tiles have 128 pixels a side.
fn drawn(server: &Server, extra: &Value) -> (u16, Value) {
    let mut body = json!({ "prompt": "a cat", "steps": 1, "seed": 3, "width": 192, "height": 128 });
    let fields = body.as_object_mut().expect("an object");
    fields.extend(extra.as_object().expect("an object").clone());
    let reply = server.json(&body);
    (reply.status, reply.json())
}

/// The picture of a reply, and its warnings.
fn picture(server: &Server, extra: &Value) -> (String, Vec<String>) {
    let (status, reply) = drawn(server, extra);
    assert_eq!(status, 200, "{reply}");
    let warnings = reply["warnings"].as_array().into_iter().flatten();
    let warnings = warnings.map(|warning| warning.as_str().expect("text").to_owned()).collect();
    (reply["data"].as_str().expect("base64").to_owned(), warnings)
}

#[test]
fn a_request_chooses_tiles() {
    let server = Server::ready(&[]);
    let whole = picture(&server, &json!({}));
    let tiled = picture(&server, &json!({ "vae_tiling": true }));
    assert!(tiled.0 != whole.0 && tiled.1.is_empty(), "{:?}", tiled.1);
    assert!(picture(&server, &json!({ "vae_tiling": false })) == whole);
    let (_, warnings) = picture(&server, &json!({ "vae_tiling": "true", "width": 128 }));
    assert!(warnings[0].starts_with("vae_tiling has no effect"), "{warnings:?}");
    let (status, reply) = drawn(&server, &json!({ "vae_tiling": true, "tiling": true }));
    assert_eq!((status, &reply["error"]["param"]), (422, &"vae_tiling".into()), "{reply}");
    assert_eq!(drawn(&server, &json!({ "vae_tiling": 2 })).0, 400);
}

#[test]
fn a_server_has_tiles_by_default_or_where_the_whole_does_not_fit() {
    let server = Server::ready(&["--vae-tiling"]);
    let tiled = picture(&server, &json!({}));
    assert!(tiled.1.is_empty(), "{:?}", tiled.1);
    let whole = picture(&server, &json!({ "vae_tiling": false }));
    assert!(tiled.0 != whole.0);
    assert_eq!(drawn(&server, &json!({ "tiling": true })).0, 200);
    // The whole takes some 11 MB, a tile two thirds of it.
    let server = Server::ready(&["--memory-budget-bytes", "9000000"]);
    let (data, warnings) = picture(&server, &json!({}));
    assert!(data == tiled.0);
    assert!(warnings[0].starts_with("vae_tiling: the VAE works in tiles of 128 pixels"));
    for asks in [json!({ "vae_tiling": false }), json!({ "tiling": true })] {
        assert_eq!(drawn(&server, &asks).0, 507, "{asks}");
    }
}

#[test]
fn the_command_line_has_tiles() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |name: &str, args: &[&str]| -> Output {
        let path = folder.path().join(name);
        let mut command = sd_server(&["generate", "a cat", "--model", "demo", "--device", "cpu"]);
        command.args(["--steps", "1", "--seed", "3", "-W", "192", "-H", "128", "-o"]);
        command.arg(path).args(args).output().expect("it runs")
    };
    assert!(run("whole.png", &[]).status.success());
    assert!(run("tiled.png", &["--vae-tiling"]).status.success());
    let pixels = |name: &str| image::open(folder.path().join(name)).expect("a picture").to_rgb8();
    assert!(pixels("whole.png") != pixels("tiled.png"));
    let refused = run("no.png", &["--vae-tiling", "--tiling"]);
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(told.contains("--vae-tiling does not go with tiling: "), "{told}");
}
