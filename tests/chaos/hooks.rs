//! The receiver of webhooks: on this host, down for seconds at a time, and strict about what it gets.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use ring::hmac;
use serde_json::Value;

use crate::Dice;
use crate::ledger::Ledger;

/// `--webhook-secret`.
pub(crate) const SECRET: &str = "the-key-of-the-storm";

/// The longest that a webhook may be: a state of a job, or an error.
const MAX_BYTES: usize = 16 << 10;

/// How the receiver is down.
#[derive(Debug, Clone, Copy)]
enum Down {
    /// Nobody listens.
    Gone,
    /// It listens and hangs up.
    HangsUp,
    /// It reads all and has no time.
    Refuses,
}

pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    /// From now on it is up.
    pub(crate) stays: AtomicBool,
    pub(crate) over: AtomicBool,
    /// How often it was down, and how many calls it turned away.
    downs: AtomicU64,
    turned_away: AtomicU64,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let (stays, over, downs, turned_away) = Default::default();
        Self { address, stays, over, downs, turned_away }
    }

    /// The URL for a job, which the server must take to the letter.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/ended?by=storm", self.address)
    }

    /// Receives until the storm is over.
    pub(crate) fn run(&self, ledger: &Ledger, seed: u64) {
        let mut dice = Dice::seed_from_u64(seed);
        while !self.over.load(Ordering::Relaxed) {
            let up = Duration::from_millis(dice.random_range(1500..5000));
            self.listen(up, |stream| self.take(stream, ledger));
            if self.stays.load(Ordering::Relaxed) {
                continue;
            }
            self.downs.fetch_add(1, Ordering::Relaxed);
            let down = Duration::from_millis(dice.random_range(500..2500));
            match [Down::Gone, Down::HangsUp, Down::Refuses][dice.random_range(0..3)] {
                Down::Gone => sleep(down),
                Down::HangsUp => self.listen(down, |_| self.turn_away()),
                Down::Refuses => self.listen(down, |mut stream| {
                    self.turn_away();
                    let _ = read(&mut stream);
                    answer(&mut stream, "503 Service Unavailable");
                }),
            }
        }
    }

    fn turn_away(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// Accepts one connection after the other for so long.
    fn listen(&self, lasting: Duration, mut each: impl FnMut(TcpStream)) {
        let listener = TcpListener::bind(self.address).expect("the port is still free");
        listener.set_nonblocking(true).expect("a socket");
        let until = Instant::now() + lasting;
        while Instant::now() < until {
            match listener.accept() {
                Ok((stream, _)) => each(stream),
                Err(_) => sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Takes a webhook. One that is cut, because the server was killed, is no webhook.
    fn take(&self, mut stream: TcpStream, ledger: &Ledger) {
        let Some((head, body)) = read(&mut stream) else { return };
        if !is_signed(&head, &body) {
            ledger.wrong("a webhook is not signed by its secret");
        }
        if !head.starts_with("post /ended?by=storm http/1.1\r\n") {
            ledger.wrong("a webhook is sent to another path");
        }
        match serde_json::from_slice::<Value>(&body) {
            Ok(state) => ledger.told(&state),
            Err(_) => ledger.wrong("a webhook is not JSON"),
        }
        answer(&mut stream, "204 No Content");
    }

    pub(crate) fn figures(&self) -> String {
        let [downs, away] = [&self.downs, &self.turned_away].map(|n| n.load(Ordering::Relaxed));
        format!("the receiver of webhooks was down {downs} times and turned {away} calls away")
    }
}

/// The head, in small letters, and the body of a request.
fn read(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    let mut reader = BufReader::new(stream).take(MAX_BYTES as u64);
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let start = head.len();
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
        head.make_ascii_lowercase();
        if let Some(value) = head[start..].strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; usize::min(length, MAX_BYTES)];
    reader.read_exact(&mut body).ok()?;
    Some((head, body))
}

fn answer(stream: &mut TcpStream, status: &str) {
    let text = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let _ = stream.write_all(text.as_bytes());
}

fn is_signed(head: &str, body: &[u8]) -> bool {
    let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
    let tag = hmac::sign(&key, body);
    let hex: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    head.lines().any(|line| line == format!("x-sd-signature: sha256={hex}"))
}
