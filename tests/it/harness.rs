//! Starts the real binary on the built-in model and talks to it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use reqwest::blocking::{Client, Response};
use serde_json::Value;

/// More than any test needs, even on a busy machine with an unoptimised build.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The command, free of settings that the developer's shell may have.
pub(crate) fn sd_server(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sd-server"));
    command.args(args);
    for (name, _) in std::env::vars() {
        if ["SD_", "HF_", "SAGEMAKER_"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

/// A running server, killed when dropped.
pub(crate) struct Server {
    child: Child,
    /// `127.0.0.1:port`.
    pub(crate) address: String,
    pub(crate) client: Client,
}

impl Server {
    /// A server on the demo model that is ready to draw.
    pub(crate) fn ready(args: &[&str]) -> Self {
        let mut command = sd_server(&["--model", "demo", "--device", "cpu", "--threads", "1"]);
        let server = Self::spawn(command.args(args));
        server.wait_until_ready();
        server
    }

    /// A server that may still be loading.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        Self::spawn_as_is(command.args(["--port", "0", "--host", "127.0.0.1"]))
    }

    /// A server that listens where the command says.
    pub(crate) fn spawn_as_is(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let address = lines
            .map_while(Result::ok)
            .find_map(|line| Some(line.strip_prefix("listening on http://")?.trim().to_owned()));
        let address = address.expect("an address");
        let client = Client::builder().timeout(PATIENCE).build().expect("a client");
        Self { child, address, client }
    }

    pub(crate) fn wait_until_ready(&self) {
        let began = Instant::now();
        while self.ping() != 200 {
            assert!(began.elapsed() < PATIENCE, "not ready");
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn ping(&self) -> u16 {
        self.client.get(self.url("/ping")).send().map_or(0, |reply| reply.status().as_u16())
    }

    /// Posts a body with headers, given as `name: value`.
    pub(crate) fn post(&self, headers: &[&str], body: impl Into<Vec<u8>>) -> Reply {
        let mut request = self.client.post(self.url("/invocations")).body(body.into());
        for header in headers {
            let (name, value) = header.split_once(": ").expect("name: value");
            request = request.header(name, value);
        }
        Reply::from(request.send().expect("an answer"))
    }

    pub(crate) fn json(&self, body: &Value) -> Reply {
        self.post(&["content-type: application/json"], body.to_string())
    }

    /// The value of a metric; 0 while it is not there.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let reply = self.client.get(self.url("/metrics")).send().expect("an answer");
        let text = reply.text().expect("text");
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().expect("a number"))
    }

    /// Sends bytes as they are, and the end of the stream unless they ask for `Connection: close`.
    /// Returns what comes back, which may be nothing.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // The server may answer and hang up before it has read everything.
        let _ = stream.write_all(bytes);
        if !String::from_utf8_lossy(bytes).contains("Connection: close") {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        String::from_utf8_lossy(&reply).into_owned()
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let killed = Command::new("kill").args(["-s", name, &pid]).status().expect("kill runs");
        assert!(killed.success());
    }

    pub(crate) fn wait(mut self) -> ExitStatus {
        self.child.wait().expect("it ends")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl From<Response> for Reply {
    fn from(response: Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, body: response.bytes().expect("a whole body").to_vec() }
    }
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("not JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// Asserts the status and hands over the error's code and parameter.
    pub(crate) fn error(&self) -> (String, String) {
        let json = self.json();
        let field = |name: &str| json["error"][name].as_str().unwrap_or("").to_owned();
        assert!(!field("message").is_empty(), "{json}");
        (field("code"), field("param"))
    }
}
