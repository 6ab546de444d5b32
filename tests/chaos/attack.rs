//! 64 clients that do their worst, in a process of their own. It runs at the lowest priority: real
//! attackers bring their own processors, and what is measured is the server.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::clients::request;
use crate::wire;

#[derive(Args)]
pub(crate) struct Options {
    /// `127.0.0.1:port`
    address: String,
    /// Seconds
    #[arg(long)]
    seconds: u64,
}

/// Bytes of the large bodies: the default of `--max-body-bytes` is 25 MiB.
const LARGE: usize = 25 << 20;

/// The pause of each client after each attack.
const PAUSE: Duration = Duration::from_millis(50);

pub(crate) fn run(options: &Options) -> Vec<String> {
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let array = [&b"{\"prompt\":["[..], &b"0,".repeat(LARGE / 2 - 10), b"0]}"].concat();
    let form = [&b"prompt=x"[..], &b"&a=1".repeat(LARGE / 4 - 4)].concat();
    let wide = json!({ "prompt": "", "image": wide_picture() }).to_string().into_bytes();
    let (address, array, form, wide) = (options.address.as_str(), &array, &form, &wide);
    let attack = |k: usize| match k % 8 {
        0 => drip(address, end),
        1 | 2 => flood(address, "application/json", array, end),
        3 => flood(address, "application/x-www-form-urlencoded", form, end),
        4 => unread(address, end),
        5 => abandoned(address, wide, end),
        6 => silent(address, end),
        // Clients that behave keep the model busy.
        _ => draw(address, end),
    };
    thread::scope(|scope| {
        for k in 0..64 {
            scope.spawn(move || {
                while Instant::now() < end {
                    attack(k);
                    sleep(PAUSE);
                }
            });
        }
    });
    Vec::new()
}

fn connect(address: &str) -> Option<TcpStream> {
    let stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.set_write_timeout(Some(Duration::from_secs(5))).ok()?;
    Some(stream)
}

fn head(path: &str, media_type: &str, length: usize) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {media_type}\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n"
    )
    .into_bytes()
}

/// A body of 100 bytes, one each 200 ms.
fn drip(address: &str, end: Instant) {
    let Some(mut stream) = connect(address) else { return };
    let _ = stream.write_all(&head("/invocations", "application/json", 100));
    while Instant::now() < end && stream.write_all(b" ").is_ok() {
        sleep(Duration::from_millis(200));
    }
}

/// As large a body as is allowed, of as many values as fit.
fn flood(address: &str, media_type: &str, body: &[u8], _end: Instant) {
    let Some(mut stream) = connect(address) else { return };
    let _ = stream.write_all(&head("/invocations", media_type, body.len()));
    let _ = stream.write_all(body);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Large answers that nobody reads.
fn unread(address: &str, end: Instant) {
    let Some(mut stream) = connect(address) else { return };
    let _ =
        stream.write_all("GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(400).as_bytes());
    let left = end.saturating_duration_since(Instant::now());
    sleep(left.min(Duration::from_secs(4)));
}

/// An image of many pixels in few bytes, whose client leaves.
fn abandoned(address: &str, body: &[u8], _end: Instant) {
    let Some(mut stream) = connect(address) else { return };
    let _ = stream.write_all(&head("/invocations", "application/json", body.len()));
    let _ = stream.write_all(body);
    sleep(Duration::from_millis(50));
}

/// 16 connections on which nothing is said.
fn silent(address: &str, end: Instant) {
    let held: Vec<_> = (0..16).map(|_| connect(address)).collect();
    let left = end.saturating_duration_since(Instant::now());
    sleep(left.min(Duration::from_secs(3)));
    drop(held);
}

fn draw(address: &str, _end: Instant) {
    let mut body = request(1);
    body["steps"] = 20.into();
    let _ = wire::send(wire::client().post(format!("http://{address}/invocations")).json(&body));
}

/// A PNG file of 4000x4000 black pixels of 16 bits, in base64.
fn wide_picture() -> String {
    use base64::Engine as _;
    let image = image::ImageBuffer::<image::Rgb<u16>, Vec<u16>>::new(4000, 4000);
    let mut file = std::io::Cursor::new(Vec::new());
    let image = image::DynamicImage::from(image);
    image.write_to(&mut file, image::ImageFormat::Png).expect("a picture");
    base64::prelude::BASE64_STANDARD.encode(file.into_inner())
}
