"""deploy/kubernetes: every overlay is rendered, and held against the schemas of what it makes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import kubelet
from kubelet import CHART, find, render

OVERLAYS = sorted(path.stem for path in (CHART.parent / "overlays").glob("*.yaml"))
KUBERNETES = "1.37"
# Kinds of others: by their own models (crds.mjs), or by the fields that their documentation has.
CRDS = {"ScaledObject", "HTTPRoute", "ServiceMonitor"}


def test_helm_lint_is_content():
    for overlay in [None, *OVERLAYS]:
        values = ["--values", f"{CHART.parent}/overlays/{overlay}.yaml"] if overlay else []
        command = [os.environ["HELM"], "lint", "--strict", str(CHART), *values]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{overlay}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_kubernetes_would_take_it(overlay):
    seen = set()
    for made in render(*[overlay] if overlay else []):
        seen.add(made["kind"])
        if made["kind"] in CRDS | {"InferencePool"}:
            continue
        kubernetes_validate.validate(made, KUBERNETES, strict=True)
    assert {"Service", "PodDisruptionBudget", "NetworkPolicy"} <= seen


def test_the_schemas_refuse_a_misspelt_field():
    made = find(render(), "Deployment")
    (server,) = made["spec"]["template"]["spec"]["containers"]
    server["readinessProb"] = server.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made, KUBERNETES, strict=True)


@pytest.mark.skipif("CRD_MODELS" not in os.environ, reason="CRD_MODELS names node's packages")
def test_others_would_take_theirs(tmp_path):
    """KEDA, Gateway API and the Prometheus operator, by the models of @kubernetes-models."""
    made = [o for overlay in ("keda", "gateway") for o in render(overlay) if o["kind"] in CRDS]
    assert {o["kind"] for o in made} == CRDS
    script = Path(__file__).with_name("crds.mjs")

    def check(objects):
        file = tmp_path / "objects.json"
        file.write_text(json.dumps(objects))
        return subprocess.run(["node", script, file], capture_output=True, text=True, check=False)

    done = check(made)
    assert done.returncode == 0, done.stderr
    for one in made:
        if one["kind"] == "ScaledObject":
            one["spec"]["scaleTargetRef"]["name"] = 7
    assert check(made).returncode != 0


def test_the_pool_is_as_its_documentation_says():
    pool = find(render("gateway"), "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    assert set(pool["spec"]["endpointPickerRef"]) <= {"name", "port", "failureMode", "group", "kind"}
    deployment = find(render("gateway"), "Deployment")["spec"]["template"]
    labels = deployment["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels["llm-d.ai/engine-type"] == "sd-server"


def test_the_router_reads_gauges_that_there_are(processes, binary):
    from urllib.request import urlopen

    from processes import free_port

    url = processes.server("server", binary, "127.0.0.1", free_port())
    processes.ready("server", url)
    with urlopen(f"{url}/metrics", timeout=5) as reply:
        metrics = set(re.findall(r"^(sd_\w+)", reply.read().decode(), re.MULTILINE))
    values = yaml.safe_load((CHART.parent / "cluster" / "llm-d-router.yaml").read_text())
    config = yaml.safe_load(
        values["inferenceExtension"]["pluginsCustomConfig"]["sd-server.yaml"]
    )
    (engine,) = [
        engine
        for plugin in config["plugins"]
        for engine in plugin.get("parameters", {}).get("engineConfigs", [])
    ]
    specs = {value for name, value in engine.items() if name.endswith("Spec")}
    assert specs and specs <= metrics
    query = find(render("keda"), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    assert set(re.findall(r"sd_\w+", query)) <= metrics


def test_profiles_name_plugins_that_are_declared():
    values = yaml.safe_load((CHART.parent / "cluster" / "llm-d-router.yaml").read_text())
    text = values["inferenceExtension"]["pluginsCustomConfig"]
    assert set(text) == {values["inferenceExtension"]["pluginsConfigFile"]}
    config = yaml.safe_load(text["sd-server.yaml"])
    declared = {plugin["type"] for plugin in config["plugins"]}
    for profile in config["schedulingProfiles"]:
        assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= declared


@pytest.mark.parametrize("overlay", ["mps", "time-slicing", "dra-mps"])
def test_a_share_of_a_card_is_a_budget(overlay):
    (server,) = find(render(overlay), "Deployment")["spec"]["template"]["spec"]["containers"]
    (budget,) = [e["value"] for e in server["env"] if e["name"] == "SD_MEMORY_BUDGET_BYTES"]
    values = yaml.safe_load((CHART.parent / "overlays" / f"{overlay}.yaml").read_text())["gpu"]
    share = values["memoryMi"] // values["replicas"]
    assert 0 < int(budget.removesuffix("MiB")) < share
    plugin = CHART.parent / "cluster" / f"{overlay}.yaml"
    if plugin.exists():
        config = yaml.safe_load(yaml.safe_load(plugin.read_text())["config"]["map"]["default"])
        ((_, sharing),) = config["sharing"].items()
        assert sharing["resources"] == [{"name": "nvidia.com/gpu", "replicas": values["replicas"]}]


def test_a_share_without_room_is_refused():
    with pytest.raises(ValueError, match="has no room"):
        render("mps", gpu__memoryMi=8192)


@pytest.mark.parametrize(
    "values",
    [
        {"gpu__sharing": "vgpu"},
        {"replica": 2},
        {"environment__HOME": "x"},
        {"ingress__enabled": "true"},
        {"gpu__replicas": 49},
        {"autoscaling__enabled": "true", "autoscaling__min": 0},
    ],
)
def test_wrong_values_are_refused(values):
    with pytest.raises(ValueError):
        render(**values)


def test_nothing_runs_as_root_or_writes_where_it_should_not():
    for overlay in OVERLAYS:
        for made in render(overlay):
            if made["kind"] not in ("Deployment", "StatefulSet"):
                continue
            pod = made["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["automountServiceAccountToken"] is False
            assert not pod.get("hostIPC") and not pod.get("hostPID")
            for container in pod["containers"] + pod.get("initContainers", []):
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"] is True
                assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("overlay", ["keda", "gateway"])
def test_prometheus_is_let_in_where_it_is_asked(overlay):
    made = render(overlay)
    assert find(made, "ServiceMonitor")
    (rule,) = find(made, "NetworkPolicy")["spec"]["ingress"]
    admitted = [
        peer["namespaceSelector"]["matchLabels"]
        for peer in rule["from"]
        if "namespaceSelector" in peer
    ]
    for trigger in find(made, "ScaledObject")["spec"]["triggers"]:
        namespace = trigger["metadata"]["serverAddress"].split("//")[1].split(":")[0].split(".")[1]
        assert {"kubernetes.io/metadata.name": namespace} in admitted


def test_a_pod_without_its_device_is_restarted_and_one_that_drains_is_not():
    spec = find(render(), "Deployment")["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    probe = server["livenessProbe"]
    # /health/live is 200 without a device.
    assert probe["httpGet"]["path"] == "/ping" and server["startupProbe"]["httpGet"]["path"] == "/ping"
    assert probe["failureThreshold"] * probe["periodSeconds"] > spec["terminationGracePeriodSeconds"]


def test_envoy_finishes_the_longest_request():
    made = render()
    deployment = find(made, "Deployment", "sd-envoy")["spec"]
    spec = deployment["template"]["spec"]
    sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > sleep > 480
    budget = find(made, "PodDisruptionBudget", "sd-envoy")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert budget["maxUnavailable"] == 1 and budget["selector"]["matchLabels"] == labels


def test_a_pod_has_the_time_that_it_takes_to_end():
    spec = find(render(), "Deployment")["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    (drain,) = [int(e["value"]) for e in server["env"] if e["name"] == "SD_DRAIN_TIMEOUT_MS"]
    sleep = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > sleep + drain / 1000


def test_the_server_takes_its_environment(binary):
    """Every variable of every overlay is known: what ends it is the model that is not there."""
    for overlay in OVERLAYS:
        kind = "StatefulSet" if overlay == "jobs" else "Deployment"
        (server,) = find(render(overlay), kind)["spec"]["template"]["spec"]["containers"]
        values = {e["name"]: e["value"] for e in server["env"] if "value" in e}
        environment = os.environ | values | {"SD_DATA_DIR": "", "SD_MODEL": "/nowhere"}
        command = [binary, *server["args"]]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert "SD_MODEL" in done.stderr or "/nowhere" in done.stderr, done.stderr
        assert "unexpected" not in done.stderr and "no option" not in done.stderr, done.stderr


@pytest.mark.drill
def test_replicas_roll_die_and_scale(binary):
    script = Path(__file__).with_name("drill_kubernetes.py")
    done = subprocess.run([sys.executable, script, binary], check=False, timeout=500)
    assert done.returncode == 0


def test_the_twin_scales_as_the_autoscaler_would():
    scaled = find(render("keda"), "ScaledObject")
    table = [(0, 1, 1), (1.9, 1, 1), (2.5, 1, 2), (7.9, 1, 4), (50, 1, 4), (4.2, 2, 2), (0, 4, 1)]
    for value, now, wanted in table:
        assert kubelet.replicas(scaled, value, now) == wanted, (value, now)
