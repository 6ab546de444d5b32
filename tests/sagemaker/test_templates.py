"""The templates, without deploying them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cfnlint.decode import cfn_yaml

from conftest import SCRIPTS

TEMPLATES = {path.stem: cfn_yaml.load(str(path)) for path in SCRIPTS.glob("*.yaml")}
# Actions that know no narrower resource than `*`.
UNBOUNDED = {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}


def resources(kind):
    """Every resource of a type, over all templates."""
    for template in TEMPLATES.values():
        for resource in template["Resources"].values():
            if resource["Type"] == kind:
                yield resource["Properties"]


def test_there_are_five():
    assert set(TEMPLATES) == {"storage", "realtime", "async", "front", "watch"}


def test_cfn_lint_is_content():
    lint = Path(sys.executable).with_name("cfn-lint")
    paths = sorted(SCRIPTS.glob("*.yaml"))
    done = subprocess.run([lint, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_endpoints_have_the_same_knobs():
    """What both have is the same in both, but for defaults that suit their use."""
    cooldowns = {"ScaleOutCooldownSeconds", "ScaleInCooldownSeconds"}
    own = {
        "realtime": {"MinInstances", "StreamTimeoutMs"} | cooldowns,
        "async": {"BacklogPerInstance", "CooldownSeconds", "SuccessTopic", "ErrorTopic"},
    }
    differ = {"MaxQueue", "MaxInstances", "ConcurrencyPerInstance", "RequestTimeoutMs"}
    knobs = {name: dict(TEMPLATES[name]["Parameters"]) for name in own}
    for name, parameters in knobs.items():
        assert own[name] <= set(parameters)
        for knob in own[name] | differ:
            parameters.pop(knob, None)
    assert knobs["realtime"] == knobs["async"]


def test_no_container_has_a_network():
    models = list(resources("AWS::SageMaker::Model"))
    assert len(models) == 2
    assert all(model["EnableNetworkIsolation"] is True for model in models)


def test_the_environment_is_the_servers(binary):
    """Every variable that a template sets is one that the server reads."""
    help_text = subprocess.run(
        [binary, "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"env: (SD_\w+)=", help_text))
    for model in resources("AWS::SageMaker::Model"):
        assert set(model["PrimaryContainer"]["Environment"]) <= known


def test_the_container_gives_up_before_sagemaker():
    for name, seconds in [("realtime", 60), ("async", 3600)]:
        assert TEMPLATES[name]["Parameters"]["RequestTimeoutMs"]["Default"] < seconds * 1000


def statements():
    """Every statement of every role's policies."""
    for role in resources("AWS::IAM::Role"):
        assert "ManagedPolicyArns" not in role
        for policy in role["Policies"]:
            for statement in policy["PolicyDocument"]["Statement"]:
                # Those under a condition.
                yield statement["Fn::If"][1] if "Fn::If" in statement else statement


def test_roles_may_do_little():
    seen = 0
    for statement in statements():
        seen += 1
        actions = statement["Action"]
        actions = [actions] if isinstance(actions, str) else actions
        assert not any("*" in action for action in actions), statement
        if statement["Resource"] == "*":
            assert set(actions) <= UNBOUNDED, statement
    assert seen > 10


def test_every_log_group_ends_some_day():
    groups = list(resources("AWS::Logs::LogGroup"))
    assert len(groups) == 4
    assert all(group["RetentionInDays"] == {"Ref": "LogRetentionDays"} for group in groups)


def test_the_bucket_is_private_and_forgets():
    """moto makes the bucket without these settings."""
    (bucket,) = resources("AWS::S3::Bucket")
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    rules = bucket["LifecycleConfiguration"]["Rules"]
    expires = {rule["Prefix"] for rule in rules if "ExpirationInDays" in rule}
    assert expires == {"async/", "batch/"}


def test_async_scales_to_zero_and_back():
    """moto makes none of these resources, so only the template can be looked at."""
    found = TEMPLATES["async"]["Resources"]
    assert found["ScalableTarget"]["Properties"]["MinCapacity"] == 0
    alarm = found["BacklogWithoutCapacity"]["Properties"]
    assert alarm["MetricName"] == "HasBacklogWithoutCapacity"
    assert alarm["AlarmActions"] == [{"Ref": "Wake"}]
    wake = found["Wake"]["Properties"]["StepScalingPolicyConfiguration"]
    assert wake["StepAdjustments"] == [{"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}]
    backlog = found["Backlog"]["Properties"]["TargetTrackingScalingPolicyConfiguration"]
    metric = backlog["CustomizedMetricSpecification"]["MetricName"]
    assert metric == "ApproximateBacklogSizePerInstance"


@pytest.mark.parametrize("name", ["realtime", "async"])
def test_scaling_names_the_endpoint_and_its_variant(name):
    found = TEMPLATES[name]["Resources"]
    endpoint = found["Endpoint"]["Properties"]["EndpointName"]["Fn::Sub"]
    variant = found["EndpointConfig"]["Properties"]["ProductionVariants"][0]["VariantName"]
    target = found["ScalableTarget"]["Properties"]["ResourceId"]["Fn::Sub"]
    assert target == f"endpoint/{endpoint}/variant/{variant}"
    group = found["LogGroup"]["Properties"]["LogGroupName"]["Fn::Sub"]
    assert group == f"/aws/sagemaker/Endpoints/{endpoint}"


def test_the_front_is_throttled_and_gives_up_before_the_api():
    found = TEMPLATES["front"]["Resources"]
    assert found["Function"]["Properties"]["Timeout"] < 30
    settings = found["Stage"]["Properties"]["DefaultRouteSettings"]
    assert set(settings) == {"ThrottlingRateLimit", "ThrottlingBurstLimit"}


def test_the_image_is_built_with_the_pinned_toolchain():
    root = SCRIPTS.parent
    pinned = re.search(r'channel = "(.+)"', (root / "rust-toolchain.toml").read_text())[1]
    dockerfile = (root / "docker" / "Dockerfile").read_text()
    assert f"ARG RUST_VERSION={pinned}\n" in dockerfile
