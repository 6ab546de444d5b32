"""What a kubelet, a Deployment's controller and KEDA do with a rendered chart, without a cluster.

The container's arguments, environment, probes, preStop and grace period are those that the chart
renders. Ports, paths of volumes and the device are this machine's. Images, volumes, limits and network
policies have no part in it.
"""

import math
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM

import yaml

from processes import free_port, status

CHART = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "sd-server"
NAMESPACE = "images"


def render(*overlays, **values):
    """The chart's objects with overlays and values; `HELM` names helm."""
    command = [os.environ["HELM"], "template", "sd", str(CHART), "--namespace", NAMESPACE]
    for overlay in overlays:
        command += ["--values", str(CHART.parent / "overlays" / f"{overlay}.yaml")]
    for name, value in values.items():
        kind = "--set-string" if name.startswith("environment") else "--set"
        command += [kind, f"{name.replace('__', '.')}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def find(objects, kind, name="sd"):
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


@dataclass
class Pod:
    """A process, and whether it may be asked."""

    name: str
    port: int
    process: subprocess.Popen
    ready: bool = False
    ending: bool = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


class Deployment:
    """Keeps a number of pods of a template, replaces those that die, and rolls to new templates.

    on_change(pods) is told the pods that are ready and not ending: those of the endpoints.
    """

    def __init__(self, objects, binary, directory, on_change):
        self.binary, self.directory, self.on_change = binary, Path(directory), on_change
        self.objects, self.pods, self.made, self.wanted = objects, [], 0, 0
        # Pods beyond those wanted, while the template changes.
        self.surge = 0
        self.lock, self.over, self.busy = threading.RLock(), threading.Event(), []

    def __enter__(self):
        self.keeper = threading.Thread(target=self._keep)
        self.keeper.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.keeper.join()
        for pod in self.pods:
            pod.process.kill()
        for thread in self.busy:
            thread.join()

    @property
    def pod_spec(self):
        return find(self.objects, "Deployment")["spec"]["template"]["spec"]

    @property
    def container(self):
        (server,) = self.pod_spec["containers"]
        return server

    def _start(self):
        with self.lock:
            self.made += 1
            pod_name, port = f"sd-{self.made}", free_port()
            environment = {one["name"]: one["value"] for one in self.container["env"] if "value" in one}
            environment |= {"SD_PORT": str(port), "SD_HOST": "127.0.0.1", "SD_THREADS": "1"}
            environment["SD_TRUSTED_PROXIES"] = "127.0.0.1"
            log = (self.directory / f"{pod_name}.log").open("ab")
            command = [self.binary, *self.container["args"]]
            process = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=log
            )
            pod = Pod(pod_name, port, process)
            self.pods.append(pod)
        self._spawn(self._probe, pod)
        return pod

    def _spawn(self, what, *given):
        thread = threading.Thread(target=what, args=given)
        self.busy.append(thread)
        thread.start()

    def _probe(self, pod):
        """The start-up probe, then the readiness probe, as they are rendered."""
        start, readiness = self.container["startupProbe"], self.container["readinessProbe"]
        path, failed = start["httpGet"]["path"], 0
        while pod.process.poll() is None and status(pod.url + path) != 200:
            failed += 1
            if failed > start["failureThreshold"]:
                pod.process.kill()
            time.sleep(start["periodSeconds"])
        path, failed = readiness["httpGet"]["path"], 0
        while pod.process.poll() is None and not self.over.is_set():
            right = status(pod.url + path, readiness["timeoutSeconds"]) == 200
            failed = 0 if right else failed + 1
            ready = right or (pod.ready and failed < readiness["failureThreshold"])
            if ready != pod.ready:
                pod.ready = ready
                self._changed()
            time.sleep(readiness["periodSeconds"])
        if pod.ready:
            pod.ready = False
            self._changed()

    def _changed(self):
        with self.lock:
            self.on_change([pod for pod in self.pods if pod.ready and not pod.ending])

    def _keep(self):
        """Replaces what has died, and adds or ends pods until there are as many as wanted."""
        while not self.over.wait(0.1):
            with self.lock:
                self.pods = [p for p in self.pods if p.process.poll() is None]
                living = [pod for pod in self.pods if not pod.ending]
                missing = self.wanted - len(living)
            for _ in range(missing):
                self._start()
            for pod in sorted(living, key=lambda pod: pod.ready)[: max(0, -missing - self.surge)]:
                self.end(pod)

    def end(self, pod):
        """The end of a pod: out of the endpoints, preStop, SIGTERM, and SIGKILL after the grace."""
        with self.lock:
            pod.ending = True
        self._changed()
        grace = self.pod_spec["terminationGracePeriodSeconds"]
        before = self.container["lifecycle"]["preStop"]["sleep"]["seconds"]

        def finish():
            time.sleep(before)
            pod.process.send_signal(SIGTERM)
            try:
                pod.code = pod.process.wait(grace - before)
            except subprocess.TimeoutExpired:
                pod.process.send_signal(SIGKILL)
                pod.code = pod.process.wait()

        self._spawn(finish)

    def ready(self):
        with self.lock:
            return [pod for pod in self.pods if pod.ready and not pod.ending]

    def roll(self, objects):
        """A rolling update with the rendered strategy: one more, and never one fewer."""
        strategy = find(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxSurge": 1, "maxUnavailable": 0}
        old = list(self.ready())
        self.objects, self.surge = objects, strategy["maxSurge"]
        for pod in old:
            fresh = self._start()
            while not fresh.ready:
                assert fresh.process.poll() is None, "the new pod ended"
                time.sleep(0.1)
            self.end(pod)
        self.surge = 0


def replicas(scaled, value, now):
    """The number of replicas that KEDA and the autoscaler want for the query's value."""
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["metricType"] == "AverageValue"
    threshold = float(trigger["metadata"]["threshold"])
    # The autoscaler leaves alone what is within a tenth of the target.
    if now and abs(value / (now * threshold) - 1) <= 0.1:
        return now
    wanted = math.ceil(value / threshold)
    return min(max(wanted, scaled["spec"]["minReplicaCount"]), scaled["spec"]["maxReplicaCount"])
