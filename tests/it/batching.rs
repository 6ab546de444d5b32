//! A picture depends on its request alone, not on who shared its evaluations.

use std::thread;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::Server;

#[test]
fn pictures_in_company_equal_pictures_alone() {
    let server = Server::ready(&["--max-batch-rows", "16"]);
    let draw = |body: &Value| {
        let reply = server.post(&["accept: image/png"], body.to_string());
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        reply.body
    };
    let mut mix = Vec::new();
    for (k, scheduler) in
        ["pndm", "ddim", "euler_a", "heun", "dpmpp_2m", "unipc"].iter().enumerate()
    {
        let prompt = ["a red house by the sea", "a blue car at night"][k % 2];
        let guidance = [7.5, 1.0, 3.0][k % 3];
        let width = [64, 64, 64, 96][k % 4];
        mix.push(json!({
            "prompt": prompt, "steps": 2 + k, "seed": k, "scheduler": scheduler,
            "guidance_scale": guidance, "width": width, "height": 64
        }));
    }
    let picture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures/");
    let file = |name: &str| {
        BASE64_STANDARD.encode(std::fs::read(picture.to_owned() + name).expect("there"))
    };
    let mut begun = mix[1].clone();
    begun["image"] = file("ddim.png").into();
    mix.push(begun.clone());
    begun["mask"] = file("mask.png").into();
    mix.push(begun);
    let alone: Vec<_> = mix.iter().map(draw).collect();
    for round in 0..2 {
        thread::scope(|scope| {
            let company: Vec<_> = mix.iter().map(|body| scope.spawn(|| draw(body))).collect();
            for ((body, alone), together) in mix.iter().zip(&alone).zip(company) {
                assert!(together.join().expect("drawn") == *alone, "round {round}: {body}");
            }
        });
    }
}
