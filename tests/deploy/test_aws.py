"""deploy/aws: moto makes the stacks, Packer makes an image at moto, and the image's unit runs under systemd."""

import json
import math
import os
import re
import shutil
import subprocess

import boto3
import pytest

import cfn
from conftest import DEPLOY

AWS = DEPLOY / "aws"
IMAGE = AWS / "image"
REGION = "eu-central-1"
# What moto's CloudFormation leaves out.
UNMADE = {
    "AWS::ApplicationAutoScaling::ScalableTarget",
    "AWS::ApplicationAutoScaling::ScalingPolicy",
    "AWS::ECS::CapacityProvider",
    "AWS::ECS::ClusterCapacityProviderAssociations",
    "AWS::CloudWatch::Alarm",
    "AWS::CloudWatch::Dashboard",
}


@pytest.mark.parametrize("tasks", range(1, 6))
def test_a_deployment_may_stop_a_task_or_start_one(tasks):
    """ECS rounds the lower bound up and the upper one down; between them must be room for one task."""
    given = {"Image": "i", "VpcId": "v", "SubnetIds": "a", "LoadBalancerSubnetIds": "b"}
    made = cfn.resources(AWS / "ecs.yaml", **given, CertificateArn="arn:x", MinTasks=tasks)
    service = made["Service"]["Properties"]
    bounds = service["DeploymentConfiguration"]
    lower = math.ceil(tasks * bounds["MinimumHealthyPercent"] / 100)
    assert math.floor(tasks * bounds["MaximumPercent"] / 100) > lower
    assert "DesiredCount" not in service


def test_a_task_has_a_share_of_a_gpu_where_it_is_asked_for():
    given = {"Image": "i", "VpcId": "v", "SubnetIds": "a", "LoadBalancerSubnetIds": "b"}
    given |= {"CertificateArn": "arn:x", "TasksPerGpu": 2}
    for tasks, wanted in ((1, "Value"), (2, "SharingStrategy")):
        made = cfn.resources(AWS / "ecs.yaml", **{**given, "TasksPerGpu": tasks})
        (server,) = made["Task"]["Properties"]["ContainerDefinitions"]
        (gpu,) = server["ResourceRequirements"]
        assert gpu["Type"] == "GPU" and wanted in gpu
        names = {one["Name"] for one in server["Environment"]}
        assert ("SD_MEMORY_BUDGET_BYTES" in names) == (tasks > 1)
    share = gpu["SharingStrategy"]["NvidiaMps"]
    (budget,) = [e["Value"] for e in server["Environment"] if e["Name"] == "SD_MEMORY_BUDGET_BYTES"]
    assert int(budget.removesuffix("MiB")) < share["Memory"]


def test_a_task_has_the_time_that_it_takes_to_end():
    made = cfn.load(AWS / "ecs.yaml")["Resources"]
    (server,) = made["Task"]["Properties"]["ContainerDefinitions"]
    # The server's own default drain is 25 s.
    assert server["StopTimeout"] > 25
    attributes = made["Targets"]["Properties"]["TargetGroupAttributes"]
    delay = {a["Key"]: a["Value"] for a in attributes}["deregistration_delay.timeout_seconds"]
    assert int(delay) >= server["StopTimeout"]


@pytest.fixture(scope="module")
def network(aws):
    ec2 = boto3.client("ec2", region_name=REGION)
    (vpc,) = ec2.describe_vpcs()["Vpcs"]
    subnets = [s["SubnetId"] for s in ec2.describe_subnets()["Subnets"]][:2]
    return vpc["VpcId"], subnets, ec2.describe_images()["Images"][0]["ImageId"]


def made(name, capabilities, **parameters):
    """A stack of moto's, and the types of which it made something."""
    client = boto3.client("cloudformation", region_name=REGION)
    given = [{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()]
    client.create_stack(
        StackName=name,
        TemplateBody=(AWS / f"{name}.yaml").read_text(),
        Parameters=given,
        Capabilities=capabilities,
    )
    found = client.describe_stack_resources(StackName=name)["StackResources"]
    return {one["ResourceType"] for one in found if one.get("PhysicalResourceId")}


def types(name):
    resources = cfn.load(AWS / f"{name}.yaml")["Resources"].values()
    return {one["Type"] for one in resources if one.get("Condition") != "HasEmail"}


def test_moto_makes_the_instance_and_its_alarms(network):
    vpc, subnets, image = network
    found = made(
        "instance", ["CAPABILITY_IAM"], ImageId=image, VpcId=vpc, SubnetId=subnets[0], Model="demo"
    )
    assert types("instance") - found <= UNMADE
    ec2 = boto3.client("ec2", region_name=REGION)
    (reservation,) = ec2.describe_instances()["Reservations"]
    (instance,) = reservation["Instances"]
    assert instance["InstanceType"] == "g4dn.xlarge" and "KeyName" not in instance
    found = made("watch", [], InstanceId=instance["InstanceId"])
    assert types("watch") - found <= UNMADE


def agent():
    return json.loads((IMAGE / "amazon-cloudwatch-agent.json").read_text())


def test_alarms_watch_what_the_agent_reports():
    """A misspelt metric makes an alarm that is silent for ever."""
    prefixes = {"nvidia_gpu": "nvidia_smi_", "disk": "disk_", "diskio": "diskio_"}
    reported = {
        name if name.startswith(kind) else prefixes.get(kind, "") + name
        for kind, what in agent()["metrics"]["metrics_collected"].items()
        for name in what.get("measurement", [])
    }
    resources = cfn.load(AWS / "watch.yaml")["Resources"]
    text = json.dumps(resources)
    watched = set(re.findall(r'"MetricName": "([a-z]\w+)"', text))
    shown = set(re.findall(r'\["sd-server", "(\w+)"', json.loads(json.dumps(text)).replace('\\"', '"')))
    assert watched and shown and (watched | shown) <= reported, (watched | shown) - reported
    # What the author's gpumon reported, and beside it what his agent did.
    wanted = {"utilization_gpu", "memory_used", "memory_free", "power_draw", "temperature_gpu"}
    assert {f"nvidia_smi_{name}" for name in wanted} <= shown
    json.loads(resources["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"])


def test_the_agent_knows_the_instance():
    metrics = agent()["metrics"]
    assert {"InstanceId", "ImageId", "InstanceType"} <= set(metrics["append_dimensions"])
    assert ["InstanceId"] in metrics["aggregation_dimensions"]
    assert metrics["metrics_collected"]["nvidia_gpu"]["metrics_collection_interval"] == 10


def packer(*args, **environment):
    return subprocess.run(
        ["packer", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CHECKPOINT_DISABLE": "1", **environment},
        timeout=120,
    )


@pytest.mark.skipif(not shutil.which("packer"), reason="packer is not installed")
def test_packer_makes_an_image_at_moto(aws, binary, tmp_path):
    """The whole build but its provisioners, for which moto has no machine: test_the_unit runs those."""
    assert packer("validate", "-var", f"binary={binary}", IMAGE).returncode == 0
    bad = packer("validate", "-var", "binary=/nowhere", IMAGE)
    assert bad.returncode != 0
    copy = tmp_path / "image"
    shutil.copytree(IMAGE, copy)
    text = (copy / "sd-server.pkr.hcl").read_text()
    (copy / "sd-server.pkr.hcl").write_text(re.sub(r"(?s)  provisioner .*?\n  }\n\n?", "", text))
    ec2 = boto3.client("ec2", region_name=REGION)
    source = ec2.describe_images()["Images"][0]["ImageId"]
    settings = {"binary": binary, "endpoint": aws, "communicator": "none", "source_ami": source}
    variables = [part for name, value in settings.items() for part in ("-var", f"{name}={value}")]
    done = packer("build", *variables, copy)
    assert done.returncode == 0, done.stdout + done.stderr
    images = ec2.describe_images(Owners=["self"])["Images"]
    assert [i for i in images if i["Name"].startswith("sd-server-")]


def test_the_unit_is_hardened():
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", IMAGE / "sd-server.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout + done.stderr)
    assert found and float(found[1]) < 3.0, done.stdout[-2000:] + done.stderr


@pytest.mark.drill
def test_the_unit_runs_restarts_and_logs(binary, tmp_path):
    """install.sh in a Debian of its own, booted: 200, a new process after SIGABRT, JSON in the journal."""
    root = tmp_path / "root"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=systemd,systemd-sysv,dbus,curl,libgcc-s1", "bookworm", root],
        check=True,
        capture_output=True,
        timeout=400,
    )
    files = root / "tmp-sd-server"
    files.mkdir()
    for name in ("sd-server.service", "amazon-cloudwatch-agent.json", "install.sh"):
        shutil.copy(IMAGE / name, files)
    shutil.copy(binary, files / "sd-server")
    script = ["chroot", root, "env", "DRIVER=none", "FILES=/tmp-sd-server", "bash", "/tmp-sd-server/install.sh"]
    subprocess.run(script, check=True)
    (root / "etc/sd-server.env").write_text("SD_MODEL=demo\nSD_DEVICE=cpu\nSD_PORT=8095\nSD_THREADS=1\n")
    (root / "prove.sh").write_text(PROOF)
    (root / "etc/systemd/system/prove.service").write_text(
        "[Unit]\nAfter=multi-user.target\n[Service]\nType=oneshot\nExecStart=/bin/bash /prove.sh\n"
        "ExecStopPost=/bin/systemctl poweroff\nStandardOutput=append:/proved\nStandardError=append:/proved\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )
    subprocess.run(["chroot", root, "systemctl", "enable", "sd-server", "prove"], check=True)
    boot = (
        "mount -t tmpfs tmpfs /run/systemd/nspawn 2>/dev/null || "
        "{ mkdir -p /run/systemd/nspawn && mount -t tmpfs tmpfs /run/systemd/nspawn; };"
        f"exec systemd-nspawn --register=no --keep-unit --quiet --directory={root} --boot"
    )
    log = tmp_path / "boot.log"
    with log.open("wb") as out:
        subprocess.run(["unshare", "-m", "bash", "-c", boot], stdout=out, stderr=out, timeout=180, check=False)
    said = (root / "proved").read_text() if (root / "proved").exists() else log.read_text()[-3000:]
    assert said.strip().endswith("all of it"), said


PROOF = """
set -euo pipefail
up() { for _ in $(seq 60); do curl -sf localhost:8095/ping >/dev/null && return; sleep 1; done; journalctl -u sd-server | tail; exit 1; }
up && echo "up"
before=$(systemctl show -P MainPID sd-server)
systemctl kill --signal=SIGABRT sd-server
sleep 1
up
[ "$(systemctl show -P NRestarts sd-server)" = 1 ] && [ "$(systemctl show -P MainPID sd-server)" != "$before" ] && echo restarted
journalctl -u sd-server -o cat | grep -q '^{"timestamp".*"ready"' || journalctl -u sd-server -o cat | grep -q '^{"timestamp"' && echo "JSON in the journal"
[ "$(stat -c %U /proc/$(systemctl show -P MainPID sd-server))" != root ] && echo "not root"
systemctl stop sd-server
[ "$(systemctl show -P Result sd-server)" = success ] && echo "stopped"
echo "all of it"
"""
