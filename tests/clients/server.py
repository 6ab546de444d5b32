"""The server under test: the real binary on the demo model."""

import os
import subprocess
import time
import urllib.request
from contextlib import contextmanager

# One CPU thread, so that the tests do not depend on the machine.
ARGUMENTS = ["--device", "cpu", "--threads", "1", "--host", "127.0.0.1", "--port", "0"]
STARTUP_SECONDS = 120


@contextmanager
def serving(binary, log, *arguments, model=("--model", "demo")):
    """The address of a server that is ready to draw."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SD_")}
    with open(log, "w", encoding="utf-8") as errors:
        command = [binary, *model, *ARGUMENTS, *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=inherited
        )
        try:
            # Its only line of output tells the port.
            url = process.stdout.readline().split()[-1]
            wait_until_ready(url)
            yield url
            assert process.poll() is None, f"the server ended: {log}"
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()


def wait_until_ready(url):
    """Until /ping says so."""
    for _ in range(STARTUP_SECONDS * 10):
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{url} is not ready")
