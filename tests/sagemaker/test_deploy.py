"""deploy.sh and delete.sh with the real aws command line, against moto.

The tests build on each other, in the order of the file. moto leaves out some types of resources
without a word; UNMADE lists them, and test_templates.py looks at what they say.
"""

import ast
import json
import os
import tarfile

import boto3
import pytest

from conftest import DEMO, run
from moto_account import ACCOUNT, REGION
from test_templates import TEMPLATES

IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/sd:one"
# moto knows no newer GPU instances.
INSTANCE = "InstanceType=ml.g4dn.xlarge"
UNMADE = {
    "AWS::S3::BucketPolicy",
    "AWS::ApplicationAutoScaling::ScalableTarget",
    "AWS::ApplicationAutoScaling::ScalingPolicy",
    "AWS::CloudWatch::Alarm",
    "AWS::ApiGatewayV2::Api",
    "AWS::ApiGatewayV2::Stage",
    "AWS::ApiGatewayV2::Integration",
    "AWS::ApiGatewayV2::Route",
}


@pytest.fixture(scope="module")
def tarball(tmp_path_factory):
    """A model as `sd-server package` makes it."""
    path = tmp_path_factory.mktemp("model") / "model.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(DEMO, arcname=".")
    return path


def outputs(stack):
    """The outputs of a stack."""
    found = boto3.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]
    return {output["OutputKey"]: output["OutputValue"] for output in found["Outputs"]}


def only(items):
    """The single item of a list."""
    (item,) = items
    return item


def config_of(stack):
    """The endpoint's configuration and the model that it names."""
    client = boto3.client("sagemaker")
    endpoint = client.describe_endpoint(EndpointName=outputs(stack)["Endpoint"])
    config = client.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    variant = only(config["ProductionVariants"])
    return config, variant, client.describe_model(ModelName=variant["ModelName"])


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--image"],
        ["--image", "x", "--model", "/nowhere"],
        ["--image", "x", "--no-realtime"],
        ["--image", "x", "Instance=ml.g5.xlarge"],
        ["--image", "x", "--what"],
    ],
)
def test_wrong_usage_does_nothing(aws, args):
    done = run("deploy.sh", *args)
    assert done.returncode == 64
    assert "deploy.sh: " in done.stderr
    assert not boto3.client("cloudformation").describe_stacks()["Stacks"]


def test_everything_is_made(aws, tarball):
    args = ["--image", IMAGE, "--model", tarball, "--async", "--front", INSTANCE]
    done = run("deploy.sh", *args)
    assert done.returncode == 0, done.stderr
    assert "page: https://" in done.stdout
    client = boto3.client("cloudformation")
    for name, template in TEMPLATES.items():
        stack = client.describe_stack_resources(StackName=f"sd-{name}")["StackResources"]
        made = {resource["ResourceType"] for resource in stack if "LogicalResourceId" in resource}
        asked = {
            resource["Type"]
            for resource in template["Resources"].values()
            if resource.get("Condition") != "HasEmail"
        }
        assert asked - made == asked & UNMADE, name


def test_the_model_is_in_the_bucket(tarball):
    _, _, model = config_of("sd-realtime")
    url = model["PrimaryContainer"]["ModelDataUrl"]
    bucket, key = url.removeprefix("s3://").split("/", 1)
    assert bucket == outputs("sd-storage")["Bucket"]
    assert key.startswith("models/") and key.endswith(".tar.gz")
    stored = boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    assert stored == tarball.read_bytes()


def test_the_real_time_endpoint_is_as_asked():
    config, variant, model = config_of("sd-realtime")
    assert variant["InstanceType"] == "ml.g4dn.xlarge"
    assert variant["InferenceAmiVersion"] == "al2-ami-sagemaker-inference-gpu-3-1"
    assert variant["ModelDataDownloadTimeoutInSeconds"] == 900
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 600
    assert variant["RoutingConfig"] == {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    assert not config["AsyncInferenceConfig"]
    assert model["PrimaryContainer"]["Image"] == IMAGE
    assert model["PrimaryContainer"]["Environment"]["SD_REQUEST_TIMEOUT_MS"] == "58000"
    assert model["ExecutionRoleArn"] == outputs("sd-storage")["Role"]


def test_the_asynchronous_endpoint_is_as_asked():
    config, _, model = config_of("sd-async")
    bucket = outputs("sd-storage")["Bucket"]
    assert config["AsyncInferenceConfig"] == {
        "ClientConfig": {"MaxConcurrentInvocationsPerInstance": 4},
        "OutputConfig": {
            "S3OutputPath": f"s3://{bucket}/async/output",
            "S3FailurePath": f"s3://{bucket}/async/failure",
        },
    }
    assert model["PrimaryContainer"]["Environment"]["SD_REQUEST_TIMEOUT_MS"] == "3540000"


def test_the_role_reaches_this_deployment_only():
    client, bucket = boto3.client("iam"), outputs("sd-storage")["Bucket"]
    role = outputs("sd-storage")["Role"].rpartition("/")[2]
    policy = client.get_role_policy(RoleName=role, PolicyName="endpoint")["PolicyDocument"]
    # moto gives the document as Python would print it.
    policy = ast.literal_eval(policy)
    by_name = {statement["Sid"]: statement for statement in policy["Statement"]}
    own = f"arn:aws:s3:::{bucket}"
    assert by_name["List"]["Resource"] == own
    assert set(by_name["Read"]["Resource"]) == {
        f"{own}/{p}/*" for p in ("models", "async", "batch")
    }
    assert set(by_name["Write"]["Resource"]) == {f"{own}/{p}/*" for p in ("async", "batch")}
    assert by_name["Image"]["Resource"] == f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/sd"
    attached = client.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
    assert not attached


def test_the_function_is_the_one_in_the_repository():
    function = boto3.client("lambda").get_function(FunctionName="sd-front")["Configuration"]
    assert function["Timeout"] == 29
    variables = function["Environment"]["Variables"]
    assert variables["REALTIME_ENDPOINT"] == "sd"
    assert variables["ASYNC_ENDPOINT"] == "sd-async"
    assert variables["BUCKET"] == outputs("sd-storage")["Bucket"]


def test_logs_are_kept_for_a_month():
    groups = boto3.client("logs").describe_log_groups()["logGroups"]
    assert {group["logGroupName"]: group["retentionInDays"] for group in groups} == {
        "/aws/sagemaker/Endpoints/sd": 30,
        "/aws/sagemaker/Endpoints/sd-async": 30,
        "/aws/lambda/sd-front": 30,
        "/aws/http-api/sd-front": 30,
    }


def test_the_dashboard_is_one():
    body = boto3.client("cloudwatch").get_dashboard(DashboardName="sd")["DashboardBody"]
    widgets = json.loads(body)["widgets"]
    assert len(widgets) == 6
    assert "${" not in body


def test_a_second_run_changes_only_what_is_said(tarball):
    """A model as a directory takes the tarball's place; the asynchronous endpoint stays.

    moto leaves the endpoint at its old configuration, so the model is found by the stack's output.
    """
    before = config_of("sd-async")[2]["ModelName"]
    done = run("deploy.sh", "--image", IMAGE, "--model", DEMO, "MaxSteps=99")
    assert done.returncode == 0, done.stderr
    name = outputs("sd-realtime")["Model"]
    container = boto3.client("sagemaker").describe_model(ModelName=name)["PrimaryContainer"]
    assert "ModelDataUrl" not in container
    assert container["Environment"]["SD_MAX_STEPS"] == "99"
    source = container["ModelDataSource"]["S3DataSource"]
    assert source["S3DataType"] == "S3Prefix" and source["CompressionType"] == "None"
    bucket, prefix = source["S3Uri"].removeprefix("s3://").split("/", 1)
    assert prefix.endswith("/")
    stored = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    here = {str(p.relative_to(DEMO)): p.stat().st_size for p in DEMO.rglob("*") if p.is_file()}
    assert {item["Key"].removeprefix(prefix): item["Size"] for item in stored} == here
    assert config_of("sd-async")[2]["ModelName"] == before
    variables = boto3.client("lambda").get_function(FunctionName="sd-front")
    assert variables["Configuration"]["Environment"]["Variables"]["ASYNC_ENDPOINT"] == "sd-async"


def test_deletion_leaves_nothing():
    logs = boto3.client("logs")
    jobs = "/aws/sagemaker/TransformJobs"
    logs.create_log_group(logGroupName=jobs)
    for stream in ["sd-batch-1/i-1", "other-job/i-1"]:
        logs.create_log_stream(logGroupName=jobs, logStreamName=stream)
    done = run("delete.sh")
    assert done.returncode == 0, done.stderr
    assert "nothing is left of sd" in done.stdout

    assert not boto3.client("cloudformation").describe_stacks()["Stacks"]
    assert not boto3.client("s3").list_buckets()["Buckets"]
    assert not boto3.client("ecr").describe_repositories()["repositories"]
    assert not boto3.client("iam").list_roles()["Roles"]
    assert not boto3.client("lambda").list_functions()["Functions"]
    assert not boto3.client("sns").list_topics()["Topics"]
    assert not boto3.client("cloudwatch").list_dashboards()["DashboardEntries"]
    client = boto3.client("sagemaker")
    assert not client.list_endpoints()["Endpoints"]
    assert not client.list_endpoint_configs()["EndpointConfigs"]
    assert not client.list_models()["Models"]
    # The group of all transform jobs is not ours; our streams in it are.
    assert only(logs.describe_log_groups()["logGroups"])["logGroupName"] == jobs
    left = logs.describe_log_streams(logGroupName=jobs)["logStreams"]
    assert only(left)["logStreamName"] == "other-job/i-1"


def test_deleting_nothing_is_no_error():
    assert run("delete.sh", "--name", "other").returncode == 0


def test_who_cannot_look_does_not_say_that_nothing_is_left(aws):
    done = run("delete.sh", AWS_ENDPOINT_URL="http://127.0.0.1:1", AWS_MAX_ATTEMPTS="1")
    assert done.returncode != 0
    assert "nothing is left" not in done.stdout


# Writes down what it is asked, and knows one image.
DOCKER = """#!/bin/sh
echo "$@" >>"$DOCKER_LOG"
case $1 in
    image) echo sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef ;;
    login) cat >/dev/null ;;
esac
"""


def test_a_local_image_is_pushed_under_its_content(aws, tmp_path, monkeypatch):
    """With a stand-in for the docker command, since there is no registry to push to."""
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    log = tmp_path / "log"
    args = ["--name", "other", "--image", "sd-server:cuda", INSTANCE]
    done = run("deploy.sh", *args, DOCKER_LOG=str(log))
    assert done.returncode == 0, done.stderr
    target = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/other:0123456789abcdef"
    assert log.read_text().splitlines() == [
        "image inspect --format {{.Id}} sd-server:cuda",
        f"login --username AWS --password-stdin {ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com",
        f"tag sd-server:cuda {target}",
        f"push {target}",
    ]
    container = config_of("other-realtime")[2]["PrimaryContainer"]
    assert container["Image"] == target
    assert "ModelDataUrl" not in container and "ModelDataSource" not in container
    assert run("delete.sh", "--name", "other").returncode == 0


def test_a_failing_push_deploys_no_endpoint(aws, tmp_path, monkeypatch):
    docker = tmp_path / "docker"
    docker.write_text(DOCKER + '[ "$1" != push ]\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = run("deploy.sh", "--image", "sd-server:cuda", DOCKER_LOG=str(tmp_path / "log"))
    assert done.returncode != 0
    stacks = boto3.client("cloudformation").describe_stacks()["Stacks"]
    assert [stack["StackName"] for stack in stacks] == ["sd-storage"]
