"""invoke.py and batch.py as a user runs them, and batch transform's rules."""

import json
import time

import boto3
import pytest
from PIL import Image

from conftest import DEMO, SCRIPTS, run
from test_deploy import IMAGE, INSTANCE, outputs, tarball

# Used as a fixture.
__all__ = ["tarball"]


@pytest.fixture(scope="module")
def deployed(aws, tarball):
    """The stacks, in which the scripts look for the bucket and the model."""
    done = run("deploy.sh", "--image", IMAGE, "--model", tarball, "--async", INSTANCE)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def script(deployed, sagemaker, tmp_path):
    """Runs a script before the fake SageMaker."""

    def call(name, *args):
        urls = {
            "AWS_ENDPOINT_URL_SAGEMAKER": sagemaker.url,
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": sagemaker.url,
        }
        return run(name, *args, **urls)

    return call


class TestInvoke:
    """invoke.py."""

    @pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
    def test_a_picture(self, script, tmp_path, extension):
        path = tmp_path / f"fox.{extension}"
        done = script("invoke.py", "a fox", "steps=4", "seed=7", "-o", path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{path} (seed 7)\n"
        with Image.open(path) as image:
            assert image.size == (128, 128)
            assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[extension]

    def test_several_pictures(self, script, tmp_path):
        done = script("invoke.py", "a fox", "steps=4", "seed=7", "n=2", "-o", tmp_path / "fox.png")
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in tmp_path.glob("*.png")) == ["fox-0.png", "fox-1.png"]
        assert "(seed 8)" in done.stdout

    def test_asynchronously(self, script, tmp_path):
        path = tmp_path / "fox.png"
        done = script("invoke.py", "--async", "a fox", "steps=4", "seed=7", "-o", path)
        assert done.returncode == 0, done.stderr
        with Image.open(path) as image:
            assert image.size == (128, 128)
        # The same as in real time.
        other = tmp_path / "other.png"
        script("invoke.py", "a fox", "steps=4", "seed=7", "-o", other)
        assert path.read_bytes() == other.read_bytes()

    def test_the_servers_words_reach_the_user(self, script, tmp_path):
        for road in ([], ["--async"]):
            done = script("invoke.py", *road, "a fox", "width=100", "-o", tmp_path / "fox.png")
            assert done.returncode == 1
            assert "multiple of 8" in done.stderr
        assert not list(tmp_path.glob("*.png"))

    def test_in_sight(self, script, tmp_path):
        path = tmp_path / "fox.png"
        fields = ["steps=4", "scheduler=euler", "seed=7"]
        done = script("invoke.py", "--stream", "a fox", *fields, "-o", path)
        assert done.returncode == 0, done.stderr
        assert "step 4 of 4" in done.stderr
        assert path.exists()

    @pytest.mark.parametrize("args", [[], ["a fox", "steps"], ["a fox", "-o", "fox.gif"]])
    def test_wrong_usage(self, script, args):
        assert script("invoke.py", *args).returncode == 2


class TestBatch:
    """Batch transform jobs."""

    def job(self, sagemaker, bucket, lines, **options):
        """Runs a job over one object; its end, and its output if there is any."""
        name = f"job-{time.monotonic_ns()}"
        key = f"batch/{name}/input/lines"
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body="".join(lines))
        client = boto3.client("sagemaker", endpoint_url=sagemaker.url)
        client.create_transform_job(
            TransformJobName=name,
            ModelName="any",
            TransformInput={
                "DataSource": {
                    "S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{bucket}/{key}"}
                },
                "ContentType": options.pop("ContentType", "application/json"),
                "SplitType": "Line",
            },
            TransformOutput={
                "S3OutputPath": f"s3://{bucket}/batch/{name}/output",
                "Accept": options.pop("Accept", "application/json"),
                "AssembleWith": "Line",
            },
            TransformResources={"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1},
            **options,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            state = client.describe_transform_job(TransformJobName=name)
            if state["TransformJobStatus"] != "InProgress":
                break
            time.sleep(0.2)
        s3 = boto3.client("s3")
        try:
            found = s3.get_object(Bucket=bucket, Key=f"batch/{name}/output/lines.out")
        except s3.exceptions.NoSuchKey:
            return state, None
        return state, found["Body"].read()

    def test_one_line_in_one_line_out_in_order(self, sagemaker, bucket):
        lines = [f'{{"prompt": "a fox", "steps": 4, "seed": {seed}}}\n' for seed in range(5)]
        settings = {"BatchStrategy": "SingleRecord", "MaxConcurrentTransforms": 3}
        state, output = self.job(sagemaker, bucket, lines, **settings)
        assert state["TransformJobStatus"] == "Completed", state
        assert [json.loads(line)["seed"] for line in output.splitlines()] == list(range(5))

    def test_a_bad_record_that_is_an_error_loses_the_whole_object(self, sagemaker, bucket):
        """Why JSON lines must answer bad records with a line, not with a status."""
        lines = ['{"prompt": "a fox", "steps": 4}\n', '{"prompt": 1}\n']
        state, output = self.job(sagemaker, bucket, lines, BatchStrategy="SingleRecord")
        assert state["TransformJobStatus"] == "Failed"
        assert "malformed" in state["FailureReason"]
        assert output is None

    @pytest.mark.parametrize("strategy", ["SingleRecord", "MultiRecord"])
    def test_json_lines(self, sagemaker, bucket, strategy):
        """One output line for each input line, bad ones included."""
        lines = [
            '{"prompt": "a fox", "steps": 4, "seed": 1}\n',
            '{"prompt": 1}\n',
            "nonsense\n",
            '{"prompt": "a fox", "steps": 4, "seed": 2}\n',
        ]
        kinds = {"ContentType": "application/jsonlines", "Accept": "application/jsonlines"}
        state, output = self.job(sagemaker, bucket, lines, BatchStrategy=strategy, **kinds)
        assert state["TransformJobStatus"] == "Completed", state
        replies = [json.loads(line) for line in output.splitlines()]
        assert [reply.get("seed") for reply in replies] == [1, None, None, 2]
        assert [reply["error"]["code"] for reply in replies[1:3]] == ["malformed", "malformed"]

    def test_the_container_says_how_it_wants_its_batches(self, container):
        answer = container.call("GET", "/execution-parameters", {}, None, 2)
        assert answer.status == 200
        assert json.loads(answer.body)["BatchStrategy"] == "SINGLE_RECORD"

    def test_the_script(self, script, tmp_path):
        done = script("batch.py", SCRIPTS / "prompts.jsonl", "-o", tmp_path)
        assert done.returncode == 0, done.stderr
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["00000-0.jpeg", "00001-0.jpeg", "00002-0.png"]

    def test_the_script_wants_a_tarball(self, script, tmp_path):
        """Batch transform cannot read a model from an S3 prefix. Comes last: it deploys anew."""
        assert run("deploy.sh", "--image", IMAGE, "--model", DEMO).returncode == 0
        assert outputs("sd-realtime")["Model"]
        done = script("batch.py", SCRIPTS / "prompts.jsonl", "-o", tmp_path)
        assert done.returncode == 1
        assert "tarball" in done.stderr
