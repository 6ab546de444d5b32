"""Servers, proxies and the like as processes of a drill: started, awaited, ended."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen


def status(url, timeout=2):
    """The status that an URL answers with, or None."""
    try:
        with urlopen(url, timeout=timeout) as reply:
            return reply.status
    except HTTPError as error:
        return error.code
    except (URLError, OSError):
        return None


def await_that(what, seconds, said, every=0.05):
    """Asks until what() is true; returns the seconds that it took."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds} s: {said}")
        time.sleep(every)
    return time.monotonic() - began


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Processes:
    """The processes of a drill, by name; their output is in files below a directory."""

    def __init__(self, directory):
        self.directory, self.running = Path(directory), {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in list(self.running):
            self.end(name, signal.SIGKILL)

    def start(self, name, command, environment=None):
        """Starts a process under a name that no other has."""
        assert name not in self.running, name
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        return self.running[name]

    def server(self, name, binary, address, port, **environment):
        """An sd-server with the built-in model on one thread; returns its address."""
        settings = {
            "SD_MODEL": "demo",
            "SD_DEVICE": "cpu",
            "SD_THREADS": "1",
            "SD_LOG_FORMAT": "json",
            "SD_HOST": address,
            "SD_PORT": str(port),
        }
        self.start(name, [binary, "serve"], settings | environment)
        return f"http://{address}:{port}"

    def end(self, name, how=signal.SIGTERM, seconds=40):
        """Signals a process and waits for its end; returns its exit code."""
        process = self.running.pop(name)
        process.send_signal(how)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def tail(self, name, lines=20):
        """The end of what a process has said."""
        return "\n".join((self.directory / f"{name}.log").read_text().splitlines()[-lines:])

    def ready(self, name, url, seconds=60):
        """Waits until /ping is 200, and fails at once if the process ends."""

        def is_ready():
            code = self.running[name].poll()
            if code is not None:
                raise RuntimeError(f"{name} ended with {code}:\n{self.tail(name)}")
            return status(f"{url}/ping") == 200

        return await_that(is_ready, seconds, f"{name} at {url}:\n{self.tail(name)}")
