"""deploy/kubernetes without a cluster: the rendered chart as processes, under load.

    drill_kubernetes.py BINARY        (HELM names helm; prometheus is on the path)

A rolling update, kill -9 and scaling 1-4-1 by the ScaledObject's own query, asked of a real Prometheus
that scrapes the replicas. Ends with 0 if no request was lost and every aim holds.
"""

import json
import shutil
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from signal import SIGKILL

import yaml

import kubelet
from fleet import Fleet
from load import Load
from processes import Processes, await_that, free_port, status

# Short, so that the drill is: the chart's own window is two minutes.
WINDOW_S = 6
# On a machine that is busy otherwise the pictures of one replica take long.
PATIENT = {"environment__SD_REQUEST_TIMEOUT_MS": "240000"}


class Cluster:
    """The deployment, Envoy with the rendered configuration, and Prometheus."""

    def __init__(self, processes, binary, directory):
        self.directory, self.processes = directory, processes
        self.fleet = Fleet(processes, binary, directory)
        self.objects = kubelet.render("cpu", "keda", replicas=1, **PATIENT)
        self.scaled = kubelet.find(self.objects, "ScaledObject")
        self.metrics = free_port()
        self.deployment = kubelet.Deployment(self.objects, binary, directory, self.endpoints)
        self.targets = directory / "targets.json"
        self.targets.write_text("[]")

    def endpoints(self, pods):
        """What the headless service says, to Envoy and to Prometheus."""
        self.fleet.addresses = {pod.name: ("127.0.0.1", pod.port) for pod in pods}
        self.fleet.hosts(list(self.fleet.addresses))
        labels = {"namespace": kubelet.NAMESPACE, "job": "sd"}
        group = {"targets": [f"127.0.0.1:{pod.port}" for pod in pods], "labels": labels}
        fresh = self.directory / "targets.new"
        fresh.write_text(json.dumps([group]))
        fresh.replace(self.targets)

    def envoy(self):
        """Envoy with the chart's ConfigMap; the replicas' names are addresses in a file."""
        config = kubelet.find(self.objects, "ConfigMap", "sd-envoy")["data"]["envoy.yaml"]
        parsed = yaml.safe_load(config)
        (cluster,) = parsed["static_resources"]["clusters"]
        assert cluster["type"] == "STRICT_DNS"
        for name in ("load_assignment", "dns_refresh_rate", "respect_dns_ttl"):
            cluster.pop(name)
        source = {"path_config_source": {"path": "/etc/envoy/hosts.yaml"}}
        cluster["type"] = "EDS"
        cluster["eds_cluster_config"] = {"eds_config": {"resource_api_version": "V3", **source}}
        self.fleet.envoy(list(self.fleet.addresses), yaml.safe_dump(parsed))

    def prometheus(self):
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {
                    "job_name": "sd",
                    "file_sd_configs": [{"files": [str(self.targets)], "refresh_interval": "1s"}],
                }
            ],
        }
        path = self.directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self.processes.start(
            "prometheus",
            [
                shutil.which("prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={self.directory}/tsdb",
                f"--web.listen-address=127.0.0.1:{self.metrics}",
            ],
        )
        url = f"http://127.0.0.1:{self.metrics}/-/ready"
        await_that(lambda: status(url) == 200, 30, "Prometheus")

    def value(self):
        """What Prometheus answers to the ScaledObject's query."""
        query = self.scaled["spec"]["triggers"][0]["metadata"]["query"]
        url = f"http://127.0.0.1:{self.metrics}/api/v1/query?query={urllib.parse.quote(query)}"
        with urllib.request.urlopen(url, timeout=5) as reply:
            result = json.load(reply)["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def autoscale(self, until, seconds):
        """Asks as KEDA does, until the deployment has as many ready pods; the most that were wanted."""
        began, seen = time.monotonic(), []
        while True:
            value, now = self.value(), self.deployment.wanted
            wanted = now if value is None else kubelet.replicas(self.scaled, value, now)
            seen = [(at, n) for at, n in seen if at > time.monotonic() - WINDOW_S]
            seen.append((time.monotonic(), wanted))
            # Up at once, down to the most that was wanted in the window.
            self.deployment.wanted = max(n for _, n in seen) if wanted < now else wanted
            if len(self.deployment.ready()) == until == self.deployment.wanted:
                return time.monotonic() - began
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"{len(self.deployment.ready())} pods, {self.deployment.wanted} wanted, query {value}")
            time.sleep(1)


def drill(binary, directory):
    failed, began = 0, time.monotonic()

    def aim(what, load, holds=True):
        nonlocal failed
        lost = load.lost()
        right = holds and load.entries and not lost and not load.differing()
        failed += not right
        count = f"{len(lost)} of {len(load.entries)} requests lost"
        print(f"{'ok  ' if right else 'FAIL'}  {what}: {count} (aim: 0)", flush=True)
        for entry in lost[:3]:
            print(f"      {entry.status} {entry.why}")

    with Processes(directory) as processes:
        cluster = Cluster(processes, binary, directory)
        with cluster.deployment as deployment:
            deployment.wanted = 2
            await_that(lambda: len(deployment.ready()) == 2, 90, "two pods")
            cluster.envoy()
            cluster.prometheus()
            connect = cluster.fleet.connect
            print(f"      two replicas, Envoy and Prometheus are up after {time.monotonic() - began:.0f} s")

            with Load(connect, clients=4, pause=0.1) as load:
                time.sleep(1)
                old = deployment.ready()
                more = {"environment__SD_MAX_QUEUE": "128"}
                changed = kubelet.render("cpu", "keda", replicas=1, **PATIENT, **more)
                deployment.roll(changed)
                await_that(lambda: all(p.process.poll() is not None for p in old), 60, "old pods end")
                time.sleep(1)
            aim("rolling update", load, all(p.code == 0 for p in old))

            with Load(connect, clients=4, pause=0.1) as load:
                time.sleep(1)
                victim = deployment.ready()[0]
                victim.process.send_signal(SIGKILL)
                await_that(lambda: victim not in deployment.ready(), 20, "it is gone")
                await_that(lambda: len(deployment.ready()) == 2, 60, "another is there")
                time.sleep(1)
            aim("kill -9", load)

            deployment.wanted = 1
            await_that(lambda: len(deployment.ready()) == 1, 60, "one pod")
            # Four replicas of four pictures each, and as much again that waits.
            with Load(connect, clients=32, pause=0, steps=4) as load:
                up = cluster.autoscale(4, 120)
                print(f"      one replica to four in {up:.0f} s by the query")
                time.sleep(2)
                load.over.set()
                for thread in load.threads:
                    thread.join()
                down = cluster.autoscale(1, 120)
                print(f"      four to one in {down:.0f} s (window {WINDOW_S} s in place of the chart's)")
            aim("scale 1-4-1 under load", load)
    print(f"      {time.monotonic() - began:.0f} s")
    return failed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="sd-kubernetes-") as made:
        sys.exit(min(drill(sys.argv[1], Path(made)), 1))
