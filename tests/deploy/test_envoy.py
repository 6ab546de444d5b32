"""deploy/envoy: replicas die, drain and come back behind Envoy and HAProxy, and nothing is lost."""

import base64
import json
import re
import time
from signal import SIGKILL, SIGTERM

import pytest
import yaml

from fleet import ENVOY, Fleet
from load import Load, ask
from processes import Processes, await_that, status

TERM_S = 40
JSON = {"Content-Type": "application/json"}
SMALL = {"prompt": "a red house by the sea", "steps": 2, "width": 64, "height": 64, "seed": 3}


@pytest.fixture(params=["envoy", "haproxy"], scope="module")
def fleet(request, binary, tmp_path_factory):
    """Two replicas, each with a volume of its own, behind a proxy; each test leaves both running."""
    directory = tmp_path_factory.mktemp(request.param)
    with Processes(directory) as processes:
        made = Fleet(processes, binary, directory)
        made.kind = request.param
        for name in ("one", "two"):
            (directory / f"data-{name}").mkdir()
            start(made, name)
        if made.kind == "envoy":
            made.envoy(["one", "two"])
        else:
            made.haproxy()
        yield made


def start(fleet, name):
    """A replica with its volume."""
    return fleet.add(name, SD_DATA_DIR=str(fleet.directory / f"data-{name}"))


def test_a_replica_that_is_killed_loses_nothing(fleet):
    with Load(fleet.connect, clients=4) as load:
        time.sleep(1.5)
        fleet.processes.end("one", SIGKILL)
        time.sleep(3)
        start(fleet, "one")
        time.sleep(2.5)
    assert len(load.entries) > 8
    assert not load.lost(), load.lost()[:3]
    assert not load.differing()


def test_a_replica_that_drains_loses_nothing(fleet):
    with Load(fleet.connect, clients=4) as load:
        time.sleep(1)
        assert fleet.processes.end("two", SIGTERM, TERM_S) == 0
        time.sleep(1)
        start(fleet, "two")
        time.sleep(1)
    assert not load.lost(), load.lost()[:3]


def test_a_job_is_found_where_it_was_made(fleet):
    """By the header of the reply; without it every other question goes astray."""
    astray = 0
    for _ in range(4):
        reply, headers, body = ask(fleet.connect(), "POST", "/v1/jobs", json.dumps(SMALL), JSON)
        assert reply == 202, body
        path, replica = f"/v1/jobs/{json.loads(body)['id']}", headers["x-sd-replica"]
        cookie = re.search(r"sd-replica=[^;]+", headers["set-cookie"])[0]
        for own in ({"x-sd-replica": replica}, {"Cookie": cookie}):
            for _ in range(3):
                assert ask(fleet.connect(), "GET", path, headers=own)[0] == 200
        astray += sum(ask(fleet.connect(), "GET", path)[0] != 200 for _ in range(6))
    assert astray, "both replicas know every job, so this test shows nothing"


def test_a_job_survives_its_replica(fleet):
    """While its replica restarts a job is not denied but 503."""
    job = SMALL | {"steps": 60, "width": 128, "height": 128}
    _, headers, body = ask(fleet.connect(), "POST", "/v1/jobs", json.dumps(job), JSON)
    path, own = f"/v1/jobs/{json.loads(body)['id']}", {"x-sd-replica": headers["x-sd-replica"]}
    served = [
        name
        for name, (address, port) in fleet.addresses.items()
        if status(f"http://{address}:{port}{path}") == 200
    ]
    assert len(served) == 1
    fleet.processes.end(served[0], SIGKILL)
    seen = {ask(fleet.connect(), "GET", path, headers=own)[0] for _ in range(5)}
    assert seen <= {502, 503}, seen
    start(fleet, served[0])

    def completed():
        reply, _, body = ask(fleet.connect(), "GET", path, headers=own)
        assert reply != 404, body
        return reply == 200 and json.loads(body)["state"] == "completed"

    await_that(completed, 60, "the job is completed")


def test_a_large_body_is_sent_again(fleet):
    """Envoy holds a whole request, so that a picture of 3 MB is not lost with a replica."""
    if fleet.kind != "envoy":
        pytest.skip("HAProxy does not")
    # A BMP of 1024 x 1024 pixels.
    size = 1024
    pixels = bytes(range(256)) * (size * size * 3 // 256)
    head = b"BM" + (54 + len(pixels)).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    head += (40).to_bytes(4, "little") + size.to_bytes(4, "little") * 2
    head += (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    picture = base64.b64encode(head + pixels).decode()
    body = json.dumps(SMALL | {"image": picture, "steps": 10})
    fleet.processes.end("one", SIGKILL)
    # Whichever replica is asked first: three at once go to both.
    for _ in range(3):
        reply, _, said = ask(fleet.connect(), "POST", "/invocations", body, JSON)
        assert reply == 200, said[:300]
    start(fleet, "one")


def test_replicas_come_and_go_by_the_file(fleet):
    if fleet.kind != "envoy":
        pytest.skip("HAProxy's are in its configuration")
    with Load(fleet.connect, clients=3) as load:
        url = fleet.add("three")
        fleet.hosts(["one", "two", "three"])
        await_that(lambda: "sd_images_total" in _metrics(url), 15, "three draws")
        fleet.hosts(["one", "two"])
        time.sleep(0.5)
        fleet.processes.end("three", SIGTERM, TERM_S)
        time.sleep(1)
    assert not load.lost(), load.lost()[:3]


def _metrics(url):
    from urllib.request import urlopen

    with urlopen(f"{url}/metrics", timeout=2) as reply:
        return reply.read().decode()


def test_what_the_proxy_waits_for_is_longer_than_the_server(binary):
    """--stream-timeout-ms is 470 s; the proxy must not give up before."""
    config = yaml.safe_load((ENVOY / "envoy.yaml").read_text())
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    assert manager["typed_config"]["stream_idle_timeout"] == "600s"
    cfg = (ENVOY / "haproxy.cfg").read_text()
    assert re.search(r"timeout server 600s", cfg) and re.search(r"timeout client 600s", cfg)
    buffer = config["static_resources"]["listeners"][0]["per_connection_buffer_limit_bytes"]
    assert buffer > 26214400
