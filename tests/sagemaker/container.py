"""One container as SageMaker hosts it: `serve`, /ping, SIGTERM and, after a while, SIGKILL."""

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """SageMaker's rules, with their documented values. Tests may shorten the long ones."""

    accept_seconds: float = 0.25
    ping_seconds: float = 2
    ping_interval_seconds: float = 0.25
    # Pings that fail in a row until the instance is replaced: not documented.
    ping_failures: int = 3
    startup_seconds: float = 60
    kill_seconds: float = 30
    answer_seconds: float = 60
    stream_seconds: float = 480
    payload_bytes: int = 6_291_456
    async_inline_bytes: int = 128_000
    error_chars: int = 2048


class Unhealthy(Exception):
    """The container did not become ready, or is ready no longer."""


@dataclass
class Answer:
    """What the container said."""

    status: int
    headers: dict
    body: bytes


@dataclass
class Container:
    """The binary, run as the image would be. Enter it to start it and to wait until it is ready."""

    binary: str
    environment: dict
    log_path: str
    limits: Limits = Limits()
    # What stands before the command, such as `unshare`.
    wrapper: tuple = ()
    pings: list = field(default_factory=list)

    def __enter__(self):
        self.start()
        try:
            self.wait_until_ready()
        except Unhealthy:
            self.stop()
            raise
        self._watch = threading.Thread(target=self._keep_pinging, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """`docker run IMAGE serve`, on a free port by way of SAGEMAKER_BIND_TO_PORT."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.unhealthy = threading.Event()
        self.stopping = threading.Event()
        environment = {
            "PATH": os.environ["PATH"],
            "SAGEMAKER_BIND_TO_PORT": str(self.port),
            **self.environment,
        }
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, self.binary, "serve"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self):
        """Pings until the first 200; fails as CreateEndpoint would."""
        deadline = time.monotonic() + self.limits.startup_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Unhealthy(f"the container ended with {self.process.returncode}")
            if self.ping() == 200:
                return
            time.sleep(0.1)
        raise Unhealthy("/ping was not answered with 200 in time")

    def ping(self):
        """The status of GET /ping; None if there was no answer within 2 s."""
        began = time.monotonic()
        try:
            status = self.call("GET", "/ping", {}, None, self.limits.ping_seconds).status
        except OSError:
            status = None
        self.pings.append((status, time.monotonic() - began))
        return status

    def _keep_pinging(self):
        failures = 0
        while not self.stopping.wait(self.limits.ping_interval_seconds):
            failures = 0 if self.ping() == 200 else failures + 1
            if failures >= self.limits.ping_failures:
                self.unhealthy.set()
                return

    def connect(self, seconds):
        """A connection on which `seconds` bound every wait; it must be accepted within 250 ms."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=self.limits.accept_seconds
        )
        connection.connect()
        connection.sock.settimeout(seconds)
        return connection

    def call(self, method, path, headers, body, seconds):
        """One request, answered within `seconds` as a whole."""
        deadline = time.monotonic() + seconds
        connection = self.connect(seconds)
        try:
            sock = connection.sock
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            text = b""
            while chunk := reply.read1(1 << 16):
                text += chunk
                sock.settimeout(max(0.001, deadline - time.monotonic()))
            if reply.length:
                raise http.client.IncompleteRead(text, reply.length)
            return Answer(reply.status, dict(reply.headers), text)
        finally:
            connection.close()

    def stop(self):
        """SIGTERM, then SIGKILL after 30 s. Returns the seconds it took and the exit code."""
        self.stopping.set()
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(self.limits.kill_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return time.monotonic() - began, code

    def log(self):
        """What it has written so far, as CloudWatch would show it."""
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            return log.read()
