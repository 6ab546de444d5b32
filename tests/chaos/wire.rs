//! Requests and answers: those of clients that behave, and the bytes of those that do not. An
//! answer that comes whole is checked, whoever asked for it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::thread::sleep;
use std::time::Duration;

use reqwest::blocking::{Client, RequestBuilder, Response};
use serde_json::Value;

/// The statuses of docs/api.md.
const KNOWN: [u16; 20] = [
    200, 202, 204, 304, 400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 429, 500, 503, 504,
    507,
];

/// Longer than the server's own time for any request.
const PATIENCE: Duration = Duration::from_secs(90);

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) media: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// What is wrong with it by itself, in a sentence.
    pub(crate) fn fault(&self) -> Option<String> {
        let start = || String::from_utf8_lossy(&self.body).chars().take(200).collect::<String>();
        let told =
            |reason: &str| Some(format!("{} {}: {reason}: {}", self.status, self.media, start()));
        if !KNOWN.contains(&self.status) {
            return told("the status is not documented");
        }
        if self.status >= 400 && self.body.len() > 2048 {
            return told("the error is too long");
        }
        let is_json = |text: &[u8]| serde_json::from_slice::<Value>(text).is_ok();
        let essence = self.media.split(';').next().unwrap_or_default();
        let sound = match essence {
            "application/json" => is_json(&self.body),
            "application/jsonlines" => {
                self.body.split(|byte| *byte == b'\n').all(|line| line.is_empty() || is_json(line))
            }
            "image/png" | "image/jpeg" | "image/webp" => is_picture(&self.body),
            _ => true,
        };
        if !sound {
            return told("the body is not what its type says");
        }
        None
    }
}

pub(crate) fn is_picture(bytes: &[u8]) -> bool {
    image::load_from_memory(bytes).is_ok()
}

/// A client that behaves.
pub(crate) fn client() -> Client {
    let builder = Client::builder().timeout(PATIENCE).pool_max_idle_per_host(0);
    builder.build().expect("a client")
}

/// Sends a request; `None` if no whole answer came.
pub(crate) fn send(request: RequestBuilder) -> Option<Answer> {
    let response: Response = request.send().ok()?;
    let status = response.status().as_u16();
    let media = response.headers().get("content-type").and_then(|value| value.to_str().ok());
    let media = media.unwrap_or_default().to_owned();
    Some(Answer { status, media, body: response.bytes().ok()?.to_vec() })
}

/// How a client misbehaves.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// Sends half of the body, a byte at a time, and hangs up.
    Drips,
    /// Sends half of the body and hangs up.
    CutsBody,
    /// Sends all and hangs up.
    CutsAnswer,
    /// Declares more than it sends and closes its side.
    DeclaresMore,
    /// Declares less than it sends.
    DeclaresLess,
    /// Declares two lengths.
    DeclaresTwice,
    /// Asks for much and reads nothing.
    ReadsNothing,
    /// Sends half a head and waits.
    StallsInHead,
}

impl Fault {
    pub(crate) const ALL: [Self; 8] = [
        Self::Drips,
        Self::CutsBody,
        Self::CutsAnswer,
        Self::DeclaresMore,
        Self::DeclaresLess,
        Self::DeclaresTwice,
        Self::ReadsNothing,
        Self::StallsInHead,
    ];

    /// Commits the fault with a JSON body; returns what the server said, if it said anything.
    pub(crate) fn commit(self, address: &str, body: &[u8], lasting: Duration) -> Vec<u8> {
        let Ok(mut stream) = TcpStream::connect(address) else { return Vec::new() };
        let _ = stream.set_read_timeout(Some(lasting));
        let _ = stream.set_write_timeout(Some(lasting));
        let length = match self {
            Self::DeclaresMore => body.len() + 1000,
            Self::DeclaresLess => body.len() / 2,
            _ => body.len(),
        };
        let head = format!(
            "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n"
        );
        let half = &body[..body.len() / 2];
        // Every write may fail: the server is free to hang up on such clients.
        let _ = match self {
            Self::StallsInHead => stream.write_all(&head.as_bytes()[..40]),
            Self::ReadsNothing => {
                let ask = "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(50);
                stream.write_all(ask.as_bytes())
            }
            Self::DeclaresTwice => {
                stream.write_all(format!("{head}Content-Length: 7\r\n\r\n").as_bytes())
            }
            _ => stream.write_all(format!("{head}\r\n").as_bytes()),
        };
        let mut said = Vec::new();
        match self {
            Self::Drips => {
                let pause = lasting / half.len().max(1) as u32;
                for byte in half {
                    if stream.write_all(&[*byte]).is_err() {
                        break;
                    }
                    sleep(pause);
                }
            }
            Self::CutsBody => drop(stream.write_all(half)),
            Self::CutsAnswer => drop(stream.write_all(body)),
            Self::DeclaresMore | Self::DeclaresLess | Self::DeclaresTwice => {
                let _ = stream.write_all(body);
                let _ = stream.shutdown(Shutdown::Write);
                let _ = stream.read_to_end(&mut said);
            }
            Self::ReadsNothing | Self::StallsInHead => sleep(lasting),
        }
        said
    }
}
