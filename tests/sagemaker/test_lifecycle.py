"""A container's life: readiness, /ping under load, SIGTERM, what it may see of the world."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import threading
import time
from pathlib import Path

import pytest

from conftest import DEMO
from container import Limits, Unhealthy

HEADERS = {"Content-Type": "application/json"}
FOX = json.dumps({"prompt": "a fox", "seed": 7, "num_inference_steps": 4})
# More work for one CPU thread than the tests' patience, in steps of well below a second.
LONG = json.dumps({"prompt": "a fox", "num_inference_steps": 150, "width": 256, "height": 256})


def draw(container, body, seconds=60):
    """One invocation."""
    return container.call("POST", "/invocations", HEADERS, body, seconds)


def in_background(call, *args):
    """Starts a thread; the list receives what the call returns or raises."""
    got = []

    def target():
        try:
            got.append(call(*args))
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return thread, got


class TestReadiness:
    """From the start to the first 200."""

    def test_the_first_answer_to_ping_is_503_then_200_without_a_body(self, new_container):
        container = new_container()
        container.start()
        try:
            container.wait_until_ready()
            statuses = [status for status, _ in container.pings if status is not None]
            assert statuses[-1] == 200 and set(statuses[:-1]) <= {503}
            for method in ("GET", "HEAD", "POST"):
                answer = container.call(method, "/ping", {}, None, 2)
                assert (answer.status, answer.body) == (200, b""), method
        finally:
            container.stop()

    def test_a_start_that_is_too_slow_fails_the_endpoint(self, new_container):
        """Stopped before it is ready, the container answers no ping at all."""
        container = new_container(limits=Limits(startup_seconds=3, ping_seconds=0.5))
        container.start()
        container.process.send_signal(signal.SIGSTOP)
        with pytest.raises(Unhealthy):
            container.wait_until_ready()
        container.process.send_signal(signal.SIGCONT)
        assert container.stop()[1] in (0, -signal.SIGTERM)

    @pytest.mark.parametrize("damage", ["missing", "cut"])
    def test_a_broken_model_ends_the_container_with_a_reason(self, new_container, tmp_path, damage):
        model = tmp_path / "model"
        shutil.copytree(DEMO, model)
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        if damage == "missing":
            weights.unlink()
        else:
            os.truncate(weights, weights.stat().st_size // 2)
        container = new_container({"SD_MODEL": str(model)})
        with pytest.raises(Unhealthy, match="ended with 1"), container:
            pass
        assert "unet" in container.log()

    def test_an_empty_model_directory_is_an_error_that_names_it(self, new_container, tmp_path):
        container = new_container({"SD_MODEL": str(tmp_path)})
        with pytest.raises(Unhealthy), container:
            pass
        assert "model_index.json" in container.log()


def test_metrics_are_where_sagemaker_looks_for_them(container):
    """It scrapes /metrics at the container's own port, as Prometheus would."""
    draw(container, FOX)
    answer = container.call("GET", "/metrics", {}, None, 2)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert re.search(rb"^sd_requests_total\{.*\} [1-9]", answer.body, re.MULTILINE)


class TestLoad:
    """While pictures are drawn."""

    def test_ping_answers_under_load(self, new_container):
        """p99 of 50 ms, and never the 2 s after which SageMaker counts a failure."""
        with new_container() as container:
            threads = [in_background(draw, container, LONG, 5)[0] for _ in range(12)]
            time.sleep(0.5)
            seconds = []
            while any(thread.is_alive() for thread in threads) and len(seconds) < 500:
                began = time.monotonic()
                assert container.call("GET", "/ping", {}, None, 2).status == 200
                seconds.append(time.monotonic() - began)
                time.sleep(0.005)
            for thread in threads:
                thread.join()
            assert not container.unhealthy.is_set()
        assert len(seconds) > 100
        p99 = statistics.quantiles(seconds, n=100)[98]
        print(f"/ping under load: p99 {p99 * 1000:.1f} ms, max {max(seconds) * 1000:.1f} ms")
        assert p99 <= 0.05

    def test_connections_are_accepted_under_load(self, new_container):
        with new_container() as container:
            threads = [in_background(draw, container, LONG, 3)[0] for _ in range(40)]
            time.sleep(0.5)
            for _ in range(50):
                container.connect(1).close()
            for thread in threads:
                thread.join()


class TestEnd:
    """SIGTERM, and SIGKILL 30 s later."""

    def test_an_idle_container_goes_at_once(self, new_container):
        with new_container() as container:
            seconds, code = container.stop()
        assert code == 0 and seconds < 2

    def test_what_was_accepted_is_finished(self, new_container):
        body = json.dumps({"prompt": "a fox", "num_inference_steps": 20, "n": 2})
        with new_container() as container:
            thread, got = in_background(draw, container, body)
            time.sleep(0.3)
            seconds, code = container.stop()
            thread.join()
        assert code == 0 and seconds < 30
        assert got[0].status == 200
        assert len(json.loads(got[0].body)["images"]) == 2

    def test_what_takes_too_long_is_answered_before_the_kill(self, new_container):
        """The drain time is cut from 25 s to 2; the kill comes as late as ever."""
        with new_container({"SD_DRAIN_TIMEOUT_MS": "2000"}) as container:
            thread, got = in_background(draw, container, LONG)
            time.sleep(0.5)
            seconds, code = container.stop()
            thread.join()
        assert code == 0 and 1.5 < seconds < 10
        assert got[0].status == 503

    def test_who_does_not_go_is_killed(self, new_container):
        """Of the fake: a process that cannot react to SIGTERM ends by SIGKILL."""
        with new_container(limits=Limits(kill_seconds=1)) as container:
            container.process.send_signal(signal.SIGSTOP)
            seconds, code = container.stop()
        assert code == -signal.SIGKILL and seconds >= 1


def can_isolate():
    """Whether this process may make namespaces."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "--mount", "--net", "true"], check=False)
    return done.returncode == 0


# In namespaces of their own: the model at /opt/ml/model, the whole tree and the model read-only, no
# network but the loopback device, and the given user.
ISOLATED = """
set -e
ip link set lo up
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir -p /opt/ml/model
mount --bind "$MODEL" /opt/ml/model
mount -o remount,bind,ro /opt/ml/model
cp "$1" /opt/sd-server
mount -o remount,ro /opt
shift
exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups /opt/sd-server "$@"
"""

# An image for a newer driver than the host's.
OLD_DRIVER = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /proc/driver
mkdir /proc/driver/nvidia
echo "NVRM version: NVIDIA UNIX x86_64 Kernel Module  $DRIVER  Thu May  2 2024" >/proc/driver/nvidia/version
mount -t tmpfs tmpfs /usr/local
mkdir -p /usr/local/cuda/compat
ln -s libcuda.so.550.54.15 /usr/local/cuda/compat/libcuda.so.1
exec "$@"
"""


@pytest.mark.skipif(not can_isolate(), reason="namespaces need root and unshare")
class TestIsolation:
    """As with EnableNetworkIsolation and SageMaker's read-only mount."""

    def inside(self, container, *command):
        """Runs a command in the container's namespaces."""
        return subprocess.run(
            ["nsenter", "--target", str(container.process.pid), "--mount", "--net", *command],
            capture_output=True,
            check=False,
            timeout=60,
        )

    @pytest.fixture(params=["0", "1234"], ids=["root", "other"])
    def isolated(self, new_container, tmp_path, request):
        """A container that finds its model where SageMaker puts it."""
        model = tmp_path / "model"
        shutil.copytree(DEMO, model)
        wrapper = ("unshare", "--mount", "--net", "bash", "-c", ISOLATED, "bash")
        environment = {"MODEL": str(model), "USER_ID": request.param}
        container = new_container(environment, wrapper=wrapper)
        del container.environment["SD_MODEL"]
        container.start()
        yield container
        container.stop()

    def test_it_draws_without_a_network_from_a_read_only_model(self, isolated):
        url = f"http://127.0.0.1:{isolated.port}"
        deadline = time.monotonic() + 30
        while self.inside(isolated, "curl", "-sf", f"{url}/ping").returncode:
            assert time.monotonic() < deadline, isolated.log()
            time.sleep(0.2)
        done = self.inside(isolated, "curl", "-sf", "-d", FOX, f"{url}/invocations")
        assert json.loads(done.stdout)["seed"] == 7
        assert self.inside(isolated, "touch", "/opt/ml/model/x").returncode != 0
        assert isolated.stop()[1] == 0

    @pytest.mark.parametrize(("driver", "needed"), [("470.256.02", True), ("580.65.06", False)])
    def test_an_older_driver_gets_the_compatibility_library(self, new_container, driver, needed):
        """The process begins again once, as itself, with the library in front."""
        wrapper = ("unshare", "--mount", "bash", "-c", OLD_DRIVER, "bash")
        environment = {"DRIVER": driver, "LD_LIBRARY_PATH": "/usr/lib64"}
        with new_container(environment, wrapper=wrapper) as container:
            process = Path("/proc", str(container.process.pid))
            variables = process.joinpath("environ").read_bytes().split(b"\0")
            path = b"/usr/local/cuda/compat:/usr/lib64" if needed else b"/usr/lib64"
            assert b"LD_LIBRARY_PATH=" + path in variables
            assert b"serve" in process.joinpath("cmdline").read_bytes()
