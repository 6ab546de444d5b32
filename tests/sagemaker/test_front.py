"""The function behind the public page, before the fake SageMaker and moto's S3."""

import base64
import importlib
import io
import json
import re
import time
from urllib.parse import unquote
from urllib.request import urlopen

import boto3
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def index(sagemaker, bucket):
    """The function's module, in the environment of its template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", sagemaker.url)
        patch.setenv("REALTIME_ENDPOINT", "sd")
        patch.setenv("ASYNC_ENDPOINT", "sd-async")
        patch.setenv("BUCKET", bucket)
        patch.setenv("STEPS", "4")
        patch.setenv("SCHEDULER", "dpmpp_2m_karras")
        yield importlib.reload(importlib.import_module("index"))


def ask(index, path, method="GET", query=None, body=None):
    """One request in payload format 2.0."""
    event = {
        "rawPath": path,
        "requestContext": {"http": {"method": method}},
        "isBase64Encoded": False,
    }
    if query:
        event["queryStringParameters"] = query
    if body is not None:
        event["body"] = body
    return index.handler(event, None)


def image(answer):
    """The format and the size of the picture in an answer."""
    assert answer["statusCode"] == 200, answer
    assert answer["isBase64Encoded"]
    with Image.open(io.BytesIO(base64.b64decode(answer["body"]))) as opened:
        return opened.format, opened.size


def test_the_page_is_html_and_asks_for_nothing(index):
    answer = ask(index, "/")
    assert answer["statusCode"] == 200
    assert answer["headers"]["content-type"].startswith("text/html")
    assert "<img" not in answer["body"]


def test_a_prompt_in_the_page_is_text_not_markup(index):
    answer = ask(index, "/", query={"prompt": '"><script>alert(1)</script>'})
    assert "<script>" not in answer["body"]


def test_the_random_page_shows_a_picture_that_can_be_had(index):
    body = ask(index, "/random")["body"]
    source = re.search(r'<img src="([^"]+)"', body)[1]
    assert " " in unquote(source)
    assert image(ask(index, f"/{source}")) == ("JPEG", (128, 128))


def test_random_prompts_differ(index):
    assert len({index.random_prompt() for _ in range(50)}) > 10


@pytest.mark.parametrize("path", ["/default", "/a%20red%20house", "/a fox, oil/acrylic"])
def test_a_description_is_a_picture(index, path):
    answer = ask(index, path)
    assert image(answer) == ("JPEG", (128, 128))
    assert "seed=" in answer["headers"]["x-sd-attributes"]


def test_a_seed_repeats_a_picture(index):
    bodies = {ask(index, "/a fox", query={"seed": "7"})["body"] for _ in range(2)}
    assert len(bodies) == 1
    assert ask(index, "/a fox", query={"seed": "-1"})["statusCode"] == 400


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/favicon.ico", "GET", 404),
        ("/", "POST", 405),
        ("/pictures", "GET", 405),
        ("/pictures/../secret", "GET", 404),
        ("/pictures/" + "0" * 32, "GET", 404),
        ("/" + "a" * 1001, "GET", 414),
    ],
)
def test_what_is_not_there(index, path, method, status):
    answer = ask(index, path, method)
    assert answer["statusCode"] == status
    assert json.loads(answer["body"])["error"]


@pytest.mark.parametrize("body", ["", "[]", "{", '{"prompt": 1}', "{}"])
def test_a_request_that_is_none_is_not_submitted(index, body):
    assert ask(index, "/pictures", "POST", body=body)["statusCode"] == 400


def finished(index, path):
    """Asks until the answer is no longer 202."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = ask(index, path)
        if answer["statusCode"] != 202:
            return answer
        assert answer["headers"]["retry-after"]
        time.sleep(0.2)
    raise AssertionError("it takes too long")


def submit(index, request):
    """Where to ask for the result of a request."""
    answer = ask(index, "/pictures", "POST", body=json.dumps(request))
    assert answer["statusCode"] == 202, answer
    assert json.loads(answer["body"])["location"] == answer["headers"]["location"]
    return answer["headers"]["location"]


def test_submit_and_poll(index):
    answer = finished(index, submit(index, {"prompt": "a fox", "steps": 4, "seed": 7}))
    assert answer["statusCode"] == 303
    with urlopen(answer["headers"]["location"], timeout=10) as reply:
        data = reply.read()
    with Image.open(io.BytesIO(data)) as opened:
        assert (opened.format, opened.size) == ("PNG", (128, 128))


def test_several_pictures_come_as_json(index):
    answer = finished(index, submit(index, {"prompt": "a fox", "steps": 4, "n": 2}))
    with urlopen(answer["headers"]["location"], timeout=10) as reply:
        assert len(json.load(reply)["images"]) == 2


def test_a_failed_request_says_why(index):
    answer = finished(index, submit(index, {"prompt": "a fox", "width": 100}))
    assert answer["statusCode"] == 502
    assert "multiple of 8" in answer["body"]


def test_a_bad_prompt_is_the_callers_fault(index, monkeypatch):
    monkeypatch.setenv("STEPS", "0")
    answer = ask(index, "/a fox")
    assert answer["statusCode"] == 422
    assert "step" in json.loads(answer["body"])["error"]


def test_an_endpoint_that_is_not_there(index, monkeypatch):
    monkeypatch.setenv("REALTIME_ENDPOINT", "nobody")
    assert ask(index, "/a fox")["statusCode"] == 503
    monkeypatch.setenv("REALTIME_ENDPOINT", "")
    assert ask(index, "/a fox")["statusCode"] == 404


def test_nothing_is_kept_outside_the_async_prefix(index, bucket):
    listing = boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    assert {item["Key"].split("/")[0] for item in listing} == {"async"}
