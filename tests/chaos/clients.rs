//! The mixed clients of the storm: each rolls what to do next, until the storm is over.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use reqwest::blocking::{Client, RequestBuilder};
use serde_json::{Value, json};

use crate::Dice;
use crate::hooks::Receiver;
use crate::ledger::{self, Job, Ledger, PRIORITIES};
use crate::wire::{self, Answer, Fault};

/// What all clients share.
pub(crate) struct Scene {
    pub(crate) address: String,
    pub(crate) ledger: Ledger,
    pub(crate) receiver: Receiver,
    /// Grows before the server is ended and after it is back.
    pub(crate) endings: AtomicU64,
    pub(crate) over: AtomicBool,
    /// Whether errors for want of memory or disk are expected now.
    pub(crate) short: AtomicBool,
}

/// The API keys of the clients; half of them have each.
pub(crate) const KEYS: [&str; 2] = ["one", "two"];

pub(crate) struct Visitor<'a> {
    scene: &'a Scene,
    client: Client,
    dice: Dice,
    key: &'static str,
}

impl<'a> Visitor<'a> {
    pub(crate) fn new(scene: &'a Scene, number: u64, seed: u64) -> Self {
        let dice = Dice::seed_from_u64(seed * 1000 + number + 1);
        Self { scene, client: wire::client(), dice, key: KEYS[number as usize % KEYS.len()] }
    }

    /// Visits until the storm is over.
    pub(crate) fn run(mut self) {
        while !self.scene.over.load(Ordering::Relaxed) {
            self.act();
            sleep(Duration::from_millis(self.dice.random_range(0..40)));
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.scene.address)
    }

    fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.client.post(self.url(path)).bearer_auth(self.key).json(body)
    }

    /// Sends a request of a client that behaves: while the server is up it must be answered.
    fn ask(&self, what: &str, request: RequestBuilder) -> Option<Answer> {
        let scene = self.scene;
        let before = scene.endings.load(Ordering::SeqCst);
        let answer = wire::send(request);
        let undisturbed =
            || before.is_multiple_of(2) && scene.endings.load(Ordering::SeqCst) == before;
        match &answer {
            None if undisturbed() && !scene.short.load(Ordering::SeqCst) => {
                scene.ledger.wrong(format!("{what}: no answer from a server that was up"));
            }
            None => scene.ledger.book().unanswered += 1,
            Some(answer) => {
                scene.ledger.note(what, answer);
                let of_file = answer.json()["error"]["code"] == "model_load_failed";
                if answer.status == 500 && !of_file && !scene.short.load(Ordering::SeqCst) {
                    let text = String::from_utf8_lossy(&answer.body).into_owned();
                    scene.ledger.wrong(format!("{what}: 500: {text}"));
                }
            }
        }
        answer
    }

    fn act(&mut self) {
        let seed = self.dice.random_range(0..40);
        let body = request(seed);
        match self.dice.random_range(0..22) {
            0 | 1 => self.draws("POST /invocations", "/invocations", &body, seed),
            2 => self.draws(
                "POST /v1/images/generations",
                "/v1/images/generations",
                &openai(seed),
                seed,
            ),
            3 => self.draws("POST /sdapi/v1/txt2img", "/sdapi/v1/txt2img", &a1111(seed), seed),
            4 => self.streams(&body),
            5 => self.sends_lines(&body),
            6 => self.changes_a_picture(seed),
            7 => self.names_a_lora(seed),
            8 => {
                let name = ["left", "right", "broken", "absent"][self.dice.random_range(0..4)];
                let request = self.post(&format!("/models/{name}"), &body);
                self.ask("POST /models/{name}", request);
            }
            9..=11 => self.submits(body, seed),
            12 | 13 => self.looks_at_a_job(),
            14 => {
                let request = self.client.get(self.url("/v1/jobs")).bearer_auth(self.key);
                self.ask("GET /v1/jobs", request);
            }
            15 => {
                let bodies =
                    ["{", "[]", "{\"prompt\":1}", "{\"prompt\":\"a\",\"steps\":0}", "\u{0}"];
                let body = bodies[self.dice.random_range(0..5)];
                let request = self.client.post(self.url("/invocations")).body(body);
                self.ask("a malformed request", request.header("content-type", "application/json"));
            }
            16 => {
                let zeros = format!("{{\"prompt\":[{}0]}}", "0,".repeat(1 << 20));
                let request = self.client.post(self.url("/invocations")).body(zeros);
                self.ask(
                    "an array of a million numbers",
                    request.header("content-type", "application/json"),
                );
            }
            17 => {
                let paths =
                    ["/ping", "/health/live", "/metrics", "/info", "/openapi.json", "/v1/models"];
                let path = paths[self.dice.random_range(0..6)];
                self.ask(path, self.client.get(self.url(path)).bearer_auth(self.key));
            }
            18 => {
                let request = self.post("/sdapi/v1/interrupt", &json!({}));
                self.ask("POST /sdapi/v1/interrupt", request);
            }
            _ => {
                let fault = Fault::ALL[self.dice.random_range(0..8)];
                let lasting = Duration::from_millis(200 + self.dice.random_range(0..2500));
                let said = fault.commit(&self.scene.address, body.to_string().as_bytes(), lasting);
                if !said.is_empty() && !said.starts_with(b"HTTP/1.1 ") {
                    self.scene.ledger.wrong(format!("{fault:?}: the answer is not HTTP"));
                }
            }
        }
    }

    /// The same seed has the same picture in every API.
    fn draws(&self, what: &str, path: &str, body: &Value, seed: u64) {
        let Some(answer) = self.ask(what, self.post(path, body)) else { return };
        if answer.status == 200 {
            let pictures = ledger::pictures(&answer.json());
            // None, if the client's own interrupt came first.
            if pictures.is_empty() && !path.starts_with("/sdapi") {
                self.scene.ledger.wrong(format!("{what}: 200 without a picture"));
            }
            for picture in pictures.iter().filter(|_| !path.starts_with("/sdapi")) {
                self.scene.ledger.picture(&format!("plain seed {seed}"), picture);
            }
        }
    }

    fn streams(&self, body: &Value) {
        let request = self.post("/invocations", body).header("accept", "text/event-stream");
        let Some(answer) = self.ask("a stream", request).filter(|answer| answer.status == 200)
        else {
            return;
        };
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let last = text.trim_end().rsplit("event: ").next().unwrap_or_default().to_owned();
        if !last.starts_with("result") && !last.starts_with("error") {
            self.scene.ledger.wrong("a stream ended without its last event");
        }
    }

    fn sends_lines(&self, body: &Value) {
        let lines = format!("{body}\n{{\"prompt\":7}}\n{body}\n");
        let request = self.client.post(self.url("/invocations")).body(lines);
        let answer =
            self.ask("JSON Lines", request.header("content-type", "application/jsonlines"));
        let Some(answer) = answer.filter(|answer| answer.status == 200) else { return };
        let count =
            answer.body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
        if count != 3 {
            self.scene.ledger.wrong(format!("JSON Lines: {count} answers for 3 lines"));
        }
    }

    fn changes_a_picture(&self, seed: u64) {
        use base64::Engine as _;
        let mut file = std::io::Cursor::new(Vec::new());
        let image = image::RgbImage::from_pixel(64, 64, image::Rgb([seed as u8, 90, 200]));
        image.write_to(&mut file, image::ImageFormat::Png).expect("a picture");
        let mut body = request(seed);
        body["image"] = base64::prelude::BASE64_STANDARD.encode(file.into_inner()).into();
        self.ask("image-to-image", self.post("/invocations", &body));
    }

    /// The pixels belong to the hash that the picture is signed with.
    fn names_a_lora(&self, seed: u64) {
        let mut body = request(seed);
        body["loras"] = json!([{ "name": "swapped" }]);
        body["output_format"] = "png".into();
        let Some(answer) = self.ask("a LoRA", self.post("/invocations", &body)) else { return };
        for picture in ledger::pictures(&answer.json()) {
            let text = String::from_utf8_lossy(&picture);
            let signed = text.split("swapped: ").nth(1).and_then(|rest| rest.get(..12));
            let signed = signed.unwrap_or("unsigned").to_owned();
            self.scene.ledger.picture(&format!("LoRA {signed} seed {seed}"), &picture);
        }
    }

    /// A job of any priority, every other one with a webhook.
    fn submits(&mut self, mut body: Value, seed: u64) {
        let priority = PRIORITIES[self.dice.random_range(0..PRIORITIES.len())];
        let has_webhook = self.dice.random_range(0..2) == 0;
        body["priority"] = priority.into();
        if has_webhook {
            body["webhook"] = self.scene.receiver.url().into();
        }
        let Some(answer) = self.ask("POST /v1/jobs", self.post("/v1/jobs", &body)) else { return };
        if answer.status == 202 {
            let job = Job::new(self.key, seed, priority, has_webhook);
            match answer.json()["id"].as_str() {
                Some(id) => self.scene.ledger.accepted(id, job),
                None => self.scene.ledger.wrong("202 without the ID of the job"),
            }
        }
    }

    fn looks_at_a_job(&mut self) {
        let ledger = &self.scene.ledger;
        let Some((id, job)) = ledger.any_job(&mut self.dice) else { return };
        if self.dice.random_range(0..8) == 0 {
            ledger.delete(&id);
            let request = self.client.delete(self.url(&format!("/v1/jobs/{id}")));
            self.ask("DELETE /v1/jobs/{id}", request.bearer_auth(job.key));
            return;
        }
        ledger.look(&self.client, &self.url(""), &id, &job);
    }
}

/// A small picture. PNG: the pixels are compared.
pub(crate) fn request(seed: u64) -> Value {
    json!({
        "prompt": "a red house", "seed": seed, "steps": 2, "width": 64, "height": 64,
        "guidance_scale": 4, "scheduler": "ddim", "output_format": "png",
    })
}

fn openai(seed: u64) -> Value {
    let mut body = request(seed);
    for field in ["width", "height"] {
        body.as_object_mut().expect("an object").remove(field);
    }
    body["size"] = "64x64".into();
    body
}

fn a1111(seed: u64) -> Value {
    json!({
        "prompt": "a red house", "seed": seed, "steps": 2, "width": 64, "height": 64,
        "cfg_scale": 4, "sampler_name": "DDIM",
    })
}
