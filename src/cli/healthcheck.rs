//! `sd-server healthcheck`: requests `/ping` of a running server. For Docker's HEALTHCHECK in
//! images that have neither a shell nor curl.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

/// SageMaker's timeout of `/ping`.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Fails unless the server is ready.
pub(crate) fn run(address: &str) -> Result<()> {
    let resolved = address.to_socket_addrs().ok().and_then(|mut found| found.next());
    let resolved = resolved.with_context(|| format!("{address} is not an address"))?;
    let mut stream = TcpStream::connect_timeout(&resolved, TIMEOUT)
        .with_context(|| format!("nothing listens on {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).context("no response")?;
    let status = String::from_utf8_lossy(&head[9..]);
    ensure!(status == "200", "not ready: /ping returned {status}");
    Ok(())
}
