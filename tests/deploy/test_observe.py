"""deploy/observe: a real Prometheus scrapes a server under load, and every query returns series."""

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from signal import SIGKILL

import pytest
import yaml

from conftest import DEPLOY
from load import Load, ask
from processes import await_that, free_port, status

OBSERVE = DEPLOY / "observe"
# Metrics that a machine without a GPU does not have; their queries are asked of a page that was written by
# hand after docs/operations.md.
GPU_PAGE = Path(__file__).with_name("gpu.prom")
JSON = {"Content-Type": "application/json"}


def dashboards():
    return {
        path.stem: json.loads(path.read_text())
        for path in (OBSERVE / "grafana" / "dashboards").glob("*.json")
    }


def panels():
    """(dashboard, panel, query) of every target."""
    for name, made in dashboards().items():
        for panel in made["panels"]:
            for target in panel["targets"]:
                yield name, panel, target


def rules():
    groups = yaml.safe_load((OBSERVE / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def as_question(expression):
    """A query that returns series whenever its metrics exist: comparisons give 0 and 1, variables are
    what Grafana puts there, and ranges are short."""
    for name, value in (("$instance", ".*"), ("$__rate_interval", "5m")):
        expression = expression.replace(name, value)
    outside = re.split(r'("(?:[^"\\]|\\.)*")', expression)
    outside[::2] = [re.sub(r"(\s)(==|>|<|>=|<=)(\s)", r"\1\2 bool\3", part) for part in outside[::2]]
    return "".join(outside)


class Page(BaseHTTPRequestHandler):
    """Serves the GPU's page to Prometheus."""

    def do_GET(self):
        body = GPU_PAGE.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Webhook(BaseHTTPRequestHandler):
    """Keeps what Alertmanager sends."""

    alerts = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.alerts.extend(json.loads(body)["alerts"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Prometheus:
    """Prometheus with the rules and the configuration of deploy/observe, at the pace of a test."""

    def __init__(self, processes, directory, targets, alertmanager=None):
        config = yaml.safe_load((OBSERVE / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"}
        found = [c for c in config["scrape_configs"] if c["job_name"] == "sd"]
        config["scrape_configs"] = found
        (directory / "targets.yml").write_text(yaml.safe_dump([{"targets": targets}]))
        found[0]["file_sd_configs"][0]["files"] = [str(directory / "targets.yml")]
        config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = (
            [alertmanager] if alertmanager else []
        )
        text = (OBSERVE / "prometheus" / "rules.yml").read_text()
        (directory / "rules.yml").write_text(re.sub(r"for: \d+m", "for: 0s", text))
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        processes.start(
            "prometheus",
            [
                shutil.which("prometheus"),
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/tsdb",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
        )
        url = f"http://127.0.0.1:{self.port}/-/ready"
        await_that(lambda: status(url) == 200, 30, processes.tail("prometheus"))

    def ask(self, query):
        where = f"http://127.0.0.1:{self.port}/api/v1/query?query={urllib.parse.quote(query)}"
        with urllib.request.urlopen(where, timeout=60) as reply:
            return json.load(reply)["data"]["result"]


@pytest.fixture(scope="module")
def world(binary, tmp_path_factory):
    """A server that has drawn, refused, failed and timed out, and Prometheus that has seen it."""
    from processes import Processes

    directory = tmp_path_factory.mktemp("observe")
    with Processes(directory) as processes:
        port = free_port()
        url = processes.server("server", binary, "127.0.0.1", port, SD_MAX_QUEUE="1")
        processes.ready("server", url)
        gpu = serve(Page)
        targets = [f"127.0.0.1:{port}", "127.0.0.1:{}".format(gpu.server_address[1])]
        prometheus = Prometheus(processes, directory, targets)

        def connect():
            import http.client

            return http.client.HTTPConnection("127.0.0.1", port, timeout=60)

        def disturb():
            late = {**JSON, "x-request-timeout-ms": "1"}
            body = {"prompt": "x", "steps": 50, "width": 128, "height": 128}
            assert ask(connect(), "POST", "/invocations", json.dumps(body), late)[0] == 504
            assert ask(connect(), "POST", "/v1/jobs", json.dumps(body), JSON)[0] in (202, 429)

        with Load(connect, clients=12, pause=0.05) as load:
            for _ in range(6):
                disturb()
                time.sleep(1.5)
        assert {entry.status for entry in load.entries} >= {200, 429}
        # Rates need a second scrape, and rules of rules a second evaluation.
        for name in ("sd:failed:ratio_rate6h", "sd:slow:ratio_rate1h"):
            await_that(lambda name=name: prometheus.ask(name), 60, name)
        yield prometheus
        gpu.shutdown()


def promql():
    """Every query of every rule and panel, by where it is."""
    for rule in rules():
        yield rule.get("record") or rule["alert"], rule["expr"]
    for name, panel, target in panels():
        if target["datasource"]["type"] == "prometheus":
            yield f"{name}: {panel['title']}", target["expr"]


@pytest.mark.parametrize(("where", "query"), list(promql()))
def test_every_query_returns_series(world, where, query):
    assert world.ask(as_question(query)), f"{where}: {as_question(query)}"


def test_a_misspelt_metric_returns_none(world):
    """Else the test above would show nothing."""
    for name in ("sd_images_waitin", "sd_image_running"):
        assert not world.ask(as_question(f"{name}{{job=\"sd\"}} > 4"))


def test_the_gpus_page_has_the_servers_names():
    """Metrics of the page are those of docs/operations.md, and of no server without a GPU."""
    documented = (DEPLOY.parent / "docs" / "operations.md").read_text()
    names = set(re.findall(r"^(sd_\w+)", GPU_PAGE.read_text(), re.MULTILINE))
    assert names and all(f"`{name}`" in documented for name in names)


def test_prometheus_accepts_what_the_server_says(binary, processes):
    port = free_port()
    url = processes.server("server", binary, "127.0.0.1", port)
    processes.ready("server", url)
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as reply:
        text = reply.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rules_hold_their_tests():
    for args in (["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]):
        done = subprocess.run(
            ["promtool", *args], cwd=OBSERVE / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        ["amtool", "check-config", OBSERVE / "alertmanager.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_alerts_say_what_to_do():
    root = DEPLOY.parent
    for rule in rules():
        if "alert" not in rule:
            continue
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        text = (root / file).read_text()
        titles = {
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        }
        assert not anchor or anchor in titles, rule["alert"]


def test_people_hear_of_a_server_that_is_killed(binary, processes, tmp_path):
    """Prometheus, Alertmanager and a webhook; what waits a minute in production waits a second here."""
    hook, Webhook.alerts = serve(Webhook), []
    config = yaml.safe_load((OBSERVE / "alertmanager.yml").read_text())
    config["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    (receiver,) = config["receivers"]
    receiver["webhook_configs"][0]["url"] = "http://127.0.0.1:{}/".format(hook.server_address[1])
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port, server = free_port(), free_port()
    processes.start(
        "alertmanager",
        [
            shutil.which("prometheus-alertmanager") or shutil.which("alertmanager"),
            f"--config.file={tmp_path}/alertmanager.yml",
            f"--storage.path={tmp_path}/alertmanager",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ],
    )
    url = f"http://127.0.0.1:{port}/-/ready"
    await_that(lambda: status(url) == 200, 30, processes.tail("alertmanager"))
    processes.ready("server", processes.server("server", binary, "127.0.0.1", server))
    target = f"127.0.0.1:{server}"
    prometheus = Prometheus(processes, tmp_path, [target], f"127.0.0.1:{port}")
    await_that(lambda: prometheus.ask('up{job="sd"} == 1'), 20, "the server is scraped")
    assert not Webhook.alerts
    processes.end("server", SIGKILL)

    def told():
        down = [a for a in Webhook.alerts if a["labels"]["alertname"] == "SdDown"]
        return down and down[0]["labels"]["instance"] == target

    await_that(told, 30, "the webhook is called")
    hook.shutdown()


def test_dashboards_are_what_their_source_writes(tmp_path):
    before = {path: path.read_text() for path in (OBSERVE / "grafana" / "dashboards").glob("*.json")}
    copy = shutil.copytree(OBSERVE / "grafana", tmp_path / "grafana")
    subprocess.run([copy / "dashboards.py"], check=True)
    after = {path: (copy / "dashboards" / path.name).read_text() for path in before}
    assert len(before) == 2 and before == after


def test_panels_are_laid_out_and_explained():
    for name, made in dashboards().items():
        places = set()
        for panel in made["panels"]:
            place, what = panel["gridPos"], panel["description"]
            assert what.endswith("."), f"{name}: {panel['title']}"
            assert place["x"] + place["w"] <= 24
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not places & cells, f"{name}: {panel['title']} covers another"
            places |= cells


def test_logs_and_traces_are_asked_in_their_languages():
    """No Loki and no Tempo is to be had here: brackets and quotes are what is looked at."""
    seen = set()
    for name, panel, target in panels():
        kind = target["datasource"]["type"]
        query = target.get("query") if kind == "tempo" else target["expr"]
        seen.add(kind)
        if kind != "prometheus":
            assert re.fullmatch(r'\{[^{}]+\}( \| (json|[\w]+ ?(=|!=|=~|!~) ?"[^"]*"))*', query), query
    assert seen == {"prometheus", "loki", "tempo"}


def test_sources_lead_from_one_to_the_next():
    path = OBSERVE / "grafana" / "provisioning" / "datasources" / "all.yaml"
    sources = {source["uid"]: source for source in yaml.safe_load(path.read_text())["datasources"]}
    assert set(sources) == {"prometheus", "loki", "tempo"}
    (exemplar,) = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplar == {"name": "trace_id", "datasourceUid": "tempo"}
    (field,) = sources["loki"]["jsonData"]["derivedFields"]
    assert field["datasourceUid"] == "tempo"
    assert sources["tempo"]["jsonData"]["tracesToLogsV2"]["datasourceUid"] == "loki"
    used = {target["datasource"]["uid"] for _, _, target in panels()}
    assert used <= set(sources)


def test_compose_mounts_what_there_is():
    found = yaml.safe_load((OBSERVE / "compose.yaml").read_text())
    for name, service in found["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (OBSERVE / source).exists(), volume
            else:
                assert source in found["volumes"], volume
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
