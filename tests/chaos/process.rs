//! The server's process: started under limits, killed, terminated, measured.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time for a start, also of an unoptimised build on a busy host.
const START: Duration = Duration::from_secs(60);

/// How to start the server.
pub(crate) struct Plan {
    pub(crate) binary: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// Where the output of all starts is appended.
    pub(crate) log: PathBuf,
    pub(crate) port: u16,
}

/// A running server.
pub(crate) struct Process {
    child: Child,
}

impl Plan {
    /// A plan for the built-in model on a free port.
    pub(crate) fn new(binary: &Path, folder: &Path, arguments: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let fixed = ["serve", "--model", "demo", "--device", "cpu", "--dtype", "f32"];
        let bound = ["--host", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned);
        let arguments = fixed.iter().chain(arguments).map(|&argument| argument.to_owned());
        let binary = fs::canonicalize(binary).expect("the server's binary");
        let arguments = arguments.chain(bound).collect();
        Self { binary, arguments, log: folder.join("log"), port }
    }

    /// Adds an option with its value if this build has it.
    pub(crate) fn add(&mut self, option: &str, value: &str) -> bool {
        let help = Command::new(&self.binary).args(["serve", "--help"]).output().expect("it runs");
        let known = String::from_utf8_lossy(&help.stdout).contains(&format!("{option} "));
        if known {
            self.arguments.extend([option.to_owned(), value.to_owned()]);
        }
        known
    }

    /// The same on another port, with data and a log of its own.
    pub(crate) fn beside(&self, folder: &Path) -> Self {
        fs::create_dir_all(folder).expect("a folder");
        let mut plan = Self::new(&self.binary, folder, &[]);
        plan.arguments = self.arguments.clone();
        for (option, value) in
            [("--port", plan.port.to_string()), ("--data-dir", folder.to_string_lossy().into())]
        {
            if let Some(place) = plan.arguments.iter().position(|argument| argument == option) {
                plan.arguments[place + 1] = value;
            }
        }
        plan
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Starts the server and waits until it is ready; `data_kib` limits its memory.
    pub(crate) fn start(&self, data_kib: Option<u64>) -> io::Result<Process> {
        let log =
            || -> io::Result<File> { OpenOptions::new().create(true).append(true).open(&self.log) };
        let limit = data_kib.map_or(String::new(), |kib| format!("ulimit -d {kib}; "));
        let mut command = Command::new("sh");
        // exec: the signals must reach the server, not the shell.
        command.arg("-c").arg(format!("{limit}exec \"$0\" \"$@\"")).arg(&self.binary);
        for (name, _) in std::env::vars() {
            if ["SD_", "HF_", "SAGEMAKER_"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log()?).stderr(log()?);
        let mut process = Process { child: command.spawn()? };
        let began = Instant::now();
        while ping(&self.address(), Duration::from_secs(2)) != Some(200) {
            if let Some(status) = process.child.try_wait()? {
                return Err(io::Error::other(format!("the server ended at its start: {status}")));
            }
            if began.elapsed() > START {
                process.kill();
                return Err(io::Error::other("the server was not ready in time"));
            }
            sleep(Duration::from_millis(20));
        }
        Ok(process)
    }
}

impl Process {
    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM; the exit status and the time until then, or an error after `limit`.
    pub(crate) fn terminate(&mut self, limit: Duration) -> Result<(ExitStatus, Duration), String> {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", "TERM", &pid]).status();
        sent.map_err(|error| error.to_string())?;
        let began = Instant::now();
        while began.elapsed() < limit {
            if let Some(status) = self.ended() {
                return Ok((status, began.elapsed()));
            }
            sleep(Duration::from_millis(5));
        }
        self.kill();
        Err(format!("SIGTERM did not end the server within {limit:?}"))
    }

    /// The exit status, if the process has ended.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// A number of `/proc/PID/status`, such as `VmRSS` in KiB or `Threads`.
    pub(crate) fn status(&self, key: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let text = text.unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let number = line.and_then(|rest| rest.split_whitespace().next());
        number.and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    /// The least number of `key` within `patience`, or the first that is at most `enough`.
    pub(crate) fn settled(&self, key: &str, enough: u64, patience: Duration) -> u64 {
        let began = Instant::now();
        let mut least = self.status(key);
        while least > enough && began.elapsed() < patience {
            sleep(Duration::from_millis(200));
            least = least.min(self.status(key));
        }
        least
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The status of `/ping` on a connection of its own; `None` if there is no answer in time.
pub(crate) fn ping(address: &str, limit: Duration) -> Option<u16> {
    let mut stream = TcpStream::connect_timeout(&address.parse().ok()?, limit).ok()?;
    stream.set_read_timeout(Some(limit)).ok()?;
    stream.set_nodelay(true).ok()?;
    stream.write_all(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut start = [0; 12];
    io::Read::read_exact(&mut stream, &mut start).ok()?;
    std::str::from_utf8(&start[9..]).ok()?.parse().ok()
}
