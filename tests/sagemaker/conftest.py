"""Fixtures: SageMaker before the server's binary and an AWS account of moto's."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from container import Container
from fake_sagemaker import Endpoint, FakeSageMaker

pytest_plugins = ["server_binary", "moto_account"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "sagemaker"
DEMO = ROOT / "models" / "demo"
# As on an instance, except that the demo model on one CPU thread stands for the real one on a GPU.
ENVIRONMENT = {"SD_MODEL": "demo", "SD_DEVICE": "cpu", "SD_THREADS": "1", "SD_LOG_FORMAT": "json"}


@pytest.fixture(scope="module")
def bucket(aws):
    """An empty bucket."""
    boto3.client("s3").create_bucket(Bucket="sd-test")
    return "sd-test"


@pytest.fixture
def new_container(binary, tmp_path):
    """Makes containers; what the test says of the environment is added to ours."""

    def make(environment=None, **options):
        log = tmp_path / "container.log"
        return Container(binary, ENVIRONMENT | (environment or {}), log, **options)

    return make


@pytest.fixture(scope="module")
def container(binary, tmp_path_factory):
    """A container that is ready."""
    log = tmp_path_factory.mktemp("log") / "container.log"
    with Container(binary, ENVIRONMENT, log) as ready:
        yield ready


@pytest.fixture(scope="module")
def sagemaker(aws, bucket, container):
    """SageMaker with the endpoints `sd` and `sd-async`, and the container for transform jobs."""
    fake = FakeSageMaker(aws)
    places = {"output": f"s3://{bucket}/async/output", "failure": f"s3://{bucket}/async/failure"}
    fake.endpoints["sd"] = Endpoint(container)
    fake.endpoints["sd-async"] = Endpoint(container, **places, concurrency=4)
    fake.transform_container = container
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def runtime(sagemaker):
    """boto3's client of the endpoints."""
    return runtime_client(sagemaker)


def runtime_client(sagemaker):
    """A client that tries once, so that a test sees what happened."""
    once = Config(read_timeout=70, retries={"total_max_attempts": 1})
    return boto3.client("sagemaker-runtime", endpoint_url=sagemaker.url, config=once)


def run(script, *args, **environment):
    """Runs a script of sagemaker/; `aws` and `python3` are those of the tests."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [SCRIPTS / script, *map(str, args)],
        env={**os.environ, "PATH": tools, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
