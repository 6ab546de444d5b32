//! A picture depends on its request alone, not on who shared its evaluations, came or left.

use std::io::Write as _;
use std::net::TcpStream;
use std::thread;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::Server;
use crate::scheduling::Dice;

/// A request for one picture, small and of few steps.
fn random_request(dice: &mut Dice) -> Value {
    let schedulers = ["pndm", "ddim", "ddpm", "euler", "euler_a", "heun", "dpmpp_2m", "unipc"];
    let prompts = ["a red house by the sea", "a blue car at night", ""];
    let mut one_of = |words: &[Value]| words[dice.roll(words.len() as u64) as usize].clone();
    let prompt = one_of(&prompts.map(Value::from));
    let negative_prompt = one_of(&["".into(), "a tree".into()]);
    let scheduler = one_of(&schedulers.map(Value::from));
    let guidance_scale = one_of(&[7.5.into(), 1.0.into(), 3.0.into()]);
    let width = one_of(&[64.into(), 64.into(), 64.into(), 96.into()]);
    json!({
        "prompt": prompt, "negative_prompt": negative_prompt, "scheduler": scheduler,
        "guidance_scale": guidance_scale, "width": width, "height": 64,
        "steps": 1 + dice.roll(8), "seed": dice.roll(1 << 32),
    })
}

/// Asks for a picture and leaves when it has hardly begun.
fn leave(server: &Server, body: &Value) {
    let body = body.to_string();
    let mut stream = TcpStream::connect(&server.address).expect("it listens");
    let length = body.len();
    let head = format!("POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).expect("it reads");
    thread::sleep(std::time::Duration::from_millis(30));
}

#[test]
fn pictures_in_company_equal_pictures_alone() {
    let server = Server::ready(&["--max-batch-rows", "16"]);
    let draw = |body: &Value| {
        let reply = server.post(&["accept: image/png"], body.to_string());
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        reply.body
    };
    let picture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures/");
    let file = |name: &str| {
        BASE64_STANDARD.encode(std::fs::read(picture.to_owned() + name).expect("there"))
    };
    for round in 1..=3 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(round));
        let mut mix: Vec<_> = (0..7).map(|_| random_request(&mut dice)).collect();
        let mut begun =
            json!({ "prompt": "a blue car", "steps": 3, "scheduler": "ddim", "seed": 1 });
        (begun["width"], begun["height"]) = (64.into(), 64.into());
        begun["image"] = file("ddim.png").into();
        mix.push(begun.clone());
        begun["mask"] = file("mask.png").into();
        mix.push(begun);
        let alone: Vec<_> = mix.iter().map(draw).collect();
        thread::scope(|scope| {
            let company: Vec<_> = mix.iter().map(|body| scope.spawn(|| draw(body))).collect();
            for k in 0..3 {
                let size = 64;
                let long = json!({ "prompt": "a cow", "steps": 100, "seed": k, "width": size, "height": size });
                leave(&server, &long);
            }
            for ((body, alone), together) in mix.iter().zip(&alone).zip(company) {
                assert!(together.join().expect("drawn") == *alone, "round {round}: {body}");
            }
        });
    }
    let text = server.client.get(server.url("/metrics")).send().expect("an answer").text();
    let text = text.expect("text");
    let value = |series: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
    };
    let bucket = value("sd_batch_size_bucket{le=\"4\"}");
    assert!(bucket < value("sd_batch_size_count"), "there was company: {text}");
    assert!(value("sd_images_total{outcome=\"cancelled\"}") > 0.0, "and some left: {text}");
}
