"""SageMaker's Python SDK (version 2) in local mode: deploy, predict, batch transform."""

import base64
import io
import json
import os
import sys

import pytest
from PIL import Image

from test_deploy import tarball

__all__ = ["tarball"]
pytestmark = pytest.mark.filterwarnings("ignore")

HERE = os.path.dirname(__file__)
ROLE = "arn:aws:iam::123456789012:role/any"
FOX = {"prompt": "a fox", "num_inference_steps": 4, "seed": 7}


@pytest.fixture
def log(tmp_path):
    """What the containers were given, one JSON object a line."""
    return tmp_path / "log"


@pytest.fixture
def model(aws, binary, tarball, tmp_path, log, monkeypatch):
    """The model as a user of the SDK writes it down."""
    tools = tmp_path / "bin"
    tools.mkdir()
    docker = tools / "docker"
    docker.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/local_mode_docker.py "$@"\n')
    docker.chmod(0o755)
    config = tmp_path / "config.yaml"
    opt_out = {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}
    config.write_text(json.dumps({"SchemaVersion": "1.0", "SageMaker": opt_out}))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SD_SERVER", str(binary))
    monkeypatch.setenv("LOCAL_MODE_LOG", str(log))
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(config))
    monkeypatch.setenv("SAGEMAKER_ADMIN_CONFIG_OVERRIDE", str(config))
    from sagemaker.local import LocalSession
    from sagemaker.model import Model

    session = LocalSession()
    session.config = {"local": {"local_code": True, "container_root": str(tmp_path)}}
    return Model(
        image_uri="sd-server:cpu",
        model_data=f"file://{tarball}",
        role=ROLE,
        env={"SD_DEVICE": "cpu", "SD_THREADS": "1"},
        sagemaker_session=session,
    )


def test_deploy_and_predict(model, log):
    # What "Your own Stable Diffusion endpoint with AWS SageMaker" calls its endpoint with, and the
    # two fields that it reads (github.com/DanielKneipp/aws-sagemaker-stable-diffusion).
    from sagemaker.huggingface.model import HuggingFacePredictor

    model.deploy(1, "local", endpoint_name="local")
    try:
        predictor = HuggingFacePredictor("local", sagemaker_session=model.sagemaker_session)
        reply = predictor.predict(data=FOX)
        assert reply["prompt"] == "a fox"
        with Image.open(io.BytesIO(base64.b64decode(reply["data"]))) as image:
            assert image.size == (128, 128)
    finally:
        model.sagemaker_session.sagemaker_client.delete_endpoint(EndpointName="local")
    assert json.loads(log.read_text())["command"] == ["serve"]


def test_batch_transform(model, log, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    lines = [json.dumps(FOX | {"seed": seed}) for seed in range(3)]
    (source / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    transformer = model.transformer(
        1,
        "local",
        strategy="SingleRecord",
        assemble_with="Line",
        accept="application/json",
        output_path=f"file://{target}",
    )
    transformer.transform(f"file://{source}", content_type="application/json", split_type="Line")
    output = (target / "prompts.jsonl.out").read_text()
    assert [json.loads(line)["seed"] for line in output.splitlines()] == [0, 1, 2]
    assert json.loads(log.read_text())["environment"]["SAGEMAKER_BATCH"] == "True"
