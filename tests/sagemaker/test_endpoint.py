"""boto3 through SageMaker's limits to the real server: real time, streaming, asynchronous."""

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.eventstream import EventStreamBuffer
from botocore.exceptions import ClientError, EventStreamError
from PIL import Image

from conftest import runtime_client
from container import Limits
from fake_sagemaker import Endpoint, FakeSageMaker, payload_part, stream_error
from invoke import events

FOX = {"prompt": "a fox", "seed": 7, "num_inference_steps": 4}
# More work for one CPU thread than the tests' patience, in steps of well below a second.
LONG = {"prompt": "a fox", "num_inference_steps": 150, "width": 512, "height": 512}


def invoke(runtime, body, **options):
    """InvokeEndpoint with a JSON request."""
    body = body if isinstance(body, bytes) else json.dumps(body)
    options = {"EndpointName": "sd", "ContentType": "application/json"} | options
    return runtime.invoke_endpoint(Body=body, **options)


def size(data):
    """The format and the size of an image file."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.format, image.size


def failure(call, *args, **options):
    """The answer of a call that must fail."""
    with pytest.raises(ClientError) as raised:
        call(*args, **options)
    return raised.value.response


class TestRealTime:
    """InvokeEndpoint."""

    def test_json(self, runtime):
        reply = invoke(runtime, FOX)
        assert reply["ContentType"] == "application/json"
        assert reply["InvokedProductionVariant"] == "main"
        body = json.load(reply["Body"])
        assert body["prompt"] == "a fox" and body["seed"] == 7
        assert size(base64.b64decode(body["data"])) == ("JPEG", (128, 128))

    @pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
    def test_the_bytes_arrive_unmodified(self, runtime, container, name):
        accept = f"image/{name.lower()}"
        reply = invoke(runtime, FOX, Accept=accept)
        data = reply["Body"].read()
        assert reply["ContentType"] == accept
        assert size(data) == (name, (128, 128))
        headers = {"Content-Type": "application/json", "Accept": accept}
        direct = container.call("POST", "/invocations", headers, json.dumps(FOX), 60)
        assert direct.body == data

    def test_a_bare_prompt(self, runtime):
        reply = invoke(runtime, b"a fox", ContentType="text/plain")
        assert reply["ContentType"] == "image/png"
        assert size(reply["Body"].read())[0] == "PNG"

    def test_the_seed_survives_in_the_custom_attributes(self, runtime):
        """It is the only header of ours that SageMaker passes on."""
        reply = invoke(runtime, FOX, Accept="image/png")
        assert "seed=7" in reply["CustomAttributes"]
        assert "x-sd-seed" not in reply["ResponseMetadata"]["HTTPHeaders"]

    def test_the_inference_id_is_in_the_log(self, runtime, container):
        invoke(runtime, FOX, InferenceId="find-me-1")
        assert "find-me-1" in container.log()

    def test_prompts_are_not_in_the_log(self, runtime, container):
        invoke(runtime, FOX | {"prompt": "unspeakable"})
        assert "unspeakable" not in container.log()


class TestErrors:
    """What goes wrong is told in SageMaker's way."""

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (b"{", 400, "malformed"),
            ({}, 400, "malformed"),
            (FOX | {"colour": "red"}, 400, "malformed"),
            (FOX | {"width": 100}, 422, "out_of_range"),
            (FOX | {"num_inference_steps": 0}, 422, "out_of_range"),
        ],
    )
    def test_a_bad_request_is_a_model_error(self, runtime, body, status, code):
        reply = failure(invoke, runtime, body)
        assert reply["Error"]["Code"] == "ModelError"
        assert reply["ResponseMetadata"]["HTTPStatusCode"] == 424
        assert reply["OriginalStatusCode"] == status
        # No more than 2048 characters come through, and they are JSON still.
        assert json.loads(reply["OriginalMessage"])["error"]["code"] == code

    def test_an_unknown_type(self, runtime):
        reply = failure(invoke, runtime, b"\x00", ContentType="application/x-npy")
        assert reply["OriginalStatusCode"] == 415

    def test_an_unknown_accept(self, runtime):
        assert failure(invoke, runtime, FOX, Accept="audio/wav")["OriginalStatusCode"] == 406

    def test_a_long_message_is_cut_and_says_enough(self, runtime):
        reply = failure(invoke, runtime, {"prompt": "a fox", "x" * 9000: 1})
        assert len(reply["OriginalMessage"]) <= 2048
        assert json.loads(reply["OriginalMessage"])["error"]["code"] == "malformed"

    def test_an_unknown_endpoint(self, runtime):
        reply = failure(invoke, runtime, FOX, EndpointName="nobody")
        assert reply["Error"]["Code"] == "ValidationError"

    def test_a_body_up_to_the_limit_reaches_the_server(self, runtime):
        """The limit is SageMaker's, not ours: the server complains of the length of the prompt."""
        head, tail = b'{"prompt": "', b'"}'
        room = Limits().payload_bytes - len(head) - len(tail)
        reply = failure(invoke, runtime, head + b"a" * room + tail)
        assert reply["OriginalStatusCode"] == 422
        reply = failure(invoke, runtime, head + b"a" * (room + 1) + tail)
        assert reply["Error"]["Code"] == "ValidationError"

    def test_nonsense_does_not_hurt(self, runtime, container):
        for body in [b"\xff\xfe", b"[]", b"null", b'"a', b"{" * 5000]:
            assert failure(invoke, runtime, body)["OriginalStatusCode"] == 400
        assert container.ping() == 200


class TestTime:
    """Deadlines, with patience shortened from minutes to seconds."""

    def test_the_server_gives_up_before_sagemaker_does(self, aws, new_container):
        """A 504 with a reason, not a hang-up, as 58 s are less than 60."""
        limits = Limits(answer_seconds=4)
        with new_container({"SD_REQUEST_TIMEOUT_MS": "1000"}, limits=limits) as container:
            fake = FakeSageMaker(aws, limits)
            fake.endpoints["sd"] = Endpoint(container)
            began = time.monotonic()
            reply = failure(invoke, runtime_client(fake), LONG)
            assert 1 <= time.monotonic() - began < 3
            fake.close()
        assert reply["OriginalStatusCode"] == 504
        assert json.loads(reply["OriginalMessage"])["error"]["code"] == "deadline_exceeded"

    def test_who_is_given_up_by_sagemaker_is_not_drawn(self, aws, new_container):
        """The container notices that SageMaker has hung up and is free at once."""
        limits = Limits(answer_seconds=1)
        with new_container(limits=limits) as container:
            fake = FakeSageMaker(aws, limits)
            fake.endpoints["sd"] = Endpoint(container)
            reply = failure(invoke, runtime_client(fake), LONG)
            assert reply["OriginalStatusCode"] == 0
            assert "timed out" in reply["OriginalMessage"]
            began = time.monotonic()
            headers = {"Content-Type": "application/json"}
            answer = container.call("POST", "/invocations", headers, json.dumps(FOX), 60)
            assert answer.status == 200
            assert time.monotonic() - began < 30
            fake.close()

    def test_a_full_queue_is_429_at_once(self, aws, new_container):
        limits = Limits(answer_seconds=8)
        environment = {"SD_MAX_QUEUE": "1", "SD_MAX_BATCH_ROWS": "2"}
        with new_container(environment, limits=limits) as container:
            fake = FakeSageMaker(aws, limits)
            fake.endpoints["sd"] = Endpoint(container)
            client = runtime_client(fake)

            def attempt(_):
                began = time.monotonic()
                status = failure(invoke, client, LONG)["OriginalStatusCode"]
                return status, time.monotonic() - began

            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(attempt, range(6)))
            refused = [seconds for status, seconds in answers if status == 429]
            # One is drawn, one waits; both are given up by SageMaker.
            assert len(refused) == 4
            assert max(refused) < 2
            fake.close()


class TestStreaming:
    """InvokeEndpointWithResponseStream, with the real framing."""

    def stream(self, runtime, body, **options):
        """The parts of the answer."""
        reply = runtime.invoke_endpoint_with_response_stream(
            EndpointName="sd", ContentType="application/json", Body=json.dumps(body), **options
        )
        return reply, [part["PayloadPart"]["Bytes"] for part in reply["Body"]]

    def test_a_picture_comes_through_the_stream(self, runtime):
        reply, parts = self.stream(runtime, FOX, Accept="image/png")
        assert reply["ContentType"] == "image/png"
        assert size(b"".join(parts)) == ("PNG", (128, 128))
        direct = invoke(runtime, FOX, Accept="image/png")["Body"].read()
        assert b"".join(parts) == direct

    def test_an_error_before_the_first_part_is_a_model_error(self, runtime):
        reply = failure(self.stream, runtime, {})
        assert reply["Error"]["Code"] == "ModelError"
        assert reply["OriginalStatusCode"] == 400

    def test_a_container_that_dies_before_the_first_part_is_a_model_error(self, aws, new_container):
        with new_container() as container:
            fake = FakeSageMaker(aws)
            fake.endpoints["sd"] = Endpoint(container)
            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(self.stream, runtime_client(fake), LONG)
                time.sleep(1)
                container.process.kill()
                reply = failure(call.result)
            fake.close()
        assert reply["Error"]["Code"] == "ModelError"
        assert reply["OriginalStatusCode"] == 0

    def test_the_framing_is_amazons(self):
        """Of the fake: botocore's own parser, which checks both checksums, reads what it sends."""
        buffer = EventStreamBuffer()
        buffer.add_data(payload_part(b"abc") + stream_error("StreamBroken", "gone"))
        part, error = [event.to_response_dict() for event in buffer]
        assert (part["status_code"], part["body"]) == (200, b"abc")
        assert error["status_code"] == 400
        assert error["headers"][":exception-type"] == "ModelStreamError"
        assert json.loads(error["body"])["ErrorCode"] == "StreamBroken"

    def test_steps_and_then_the_picture(self, runtime):
        reply, parts = self.stream(runtime, FOX | {"stream": True}, Accept="text/event-stream")
        assert reply["ContentType"].startswith("text/event-stream")
        found = list(events(parts))
        steps = [(data["step"], data["steps"]) for event, data in found if event == "step"]
        last = steps[-1][1]
        assert steps == sorted(steps) and steps[-1] == (last, last)
        event, data = found[-1]
        assert event == "result" and data["seed"] == 7
        assert size(base64.b64decode(data["data"])) == ("JPEG", (128, 128))

    def test_the_first_part_comes_at_once(self, runtime):
        """Long before the picture, so that nobody in between loses patience."""
        began = time.monotonic()
        reply = runtime.invoke_endpoint_with_response_stream(
            EndpointName="sd",
            ContentType="application/json",
            Accept="text/event-stream",
            Body=json.dumps(LONG | {"stream": True}),
        )
        assert next(iter(reply["Body"]))["PayloadPart"]["Bytes"]
        assert time.monotonic() - began < 2
        reply["Body"].close()

    def test_an_error_after_the_first_part_is_an_event(self, aws, new_container):
        with new_container({"SD_STREAM_TIMEOUT_MS": "1000"}) as container:
            fake = FakeSageMaker(aws)
            fake.endpoints["sd"] = Endpoint(container)
            body = LONG | {"stream": True}
            _, parts = self.stream(runtime_client(fake), body, Accept="text/event-stream")
            fake.close()
        event, data = list(events(parts))[-1]
        assert event == "error" and data["error"]["code"] == "deadline_exceeded"

    def test_a_container_that_dies_breaks_the_stream(self, aws, new_container):
        with new_container() as container:
            fake = FakeSageMaker(aws)
            fake.endpoints["sd"] = Endpoint(container)
            reply = runtime_client(fake).invoke_endpoint_with_response_stream(
                EndpointName="sd",
                ContentType="application/json",
                Accept="text/event-stream",
                Body=json.dumps(LONG | {"stream": True}),
            )
            parts = iter(reply["Body"])
            next(parts)
            container.process.kill()
            with pytest.raises(EventStreamError) as raised:
                list(parts)
            fake.close()
        assert "ModelStreamError" in str(raised.value)


class TestAsynchronous:
    """InvokeEndpointAsync, with moto's S3."""

    def submit(self, runtime, **options):
        """Submits a request; its places and a way to wait for either."""
        options = {"EndpointName": "sd-async", "ContentType": "application/json"} | options
        return runtime.invoke_endpoint_async(**options)

    def result(self, reply):
        """What appears first, the output or the failure."""
        s3 = boto3.client("s3")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for kind in ("OutputLocation", "FailureLocation"):
                bucket, key = reply[kind].removeprefix("s3://").split("/", 1)
                try:
                    return kind, s3.get_object(Bucket=bucket, Key=key)
                except s3.exceptions.NoSuchKey:
                    pass
            time.sleep(0.1)
        raise AssertionError("neither output nor failure")

    def test_input_and_output_in_s3(self, runtime, bucket):
        boto3.client("s3").put_object(Bucket=bucket, Key="async/input/1", Body=json.dumps(FOX))
        location = f"s3://{bucket}/async/input/1"
        reply = self.submit(runtime, InputLocation=location, Accept="image/png")
        assert reply["ResponseMetadata"]["HTTPStatusCode"] == 202
        kind, found = self.result(reply)
        assert kind == "OutputLocation"
        direct = invoke(runtime, FOX, Accept="image/png")["Body"].read()
        assert found["Body"].read() == direct

    def test_the_request_inline(self, runtime):
        kind, found = self.result(self.submit(runtime, Body=json.dumps(FOX)))
        assert kind == "OutputLocation"
        assert json.load(found["Body"])["seed"] == 7

    def test_a_failure_has_a_place_of_its_own(self, runtime):
        kind, found = self.result(self.submit(runtime, Body=b"{}"))
        assert kind == "FailureLocation"
        assert json.load(found["Body"])["error"]["code"] == "malformed"

    def test_many_at_once_all_arrive(self, runtime):
        replies = [
            self.submit(runtime, Body=json.dumps(FOX | {"seed": seed})) for seed in range(12)
        ]
        seeds = [json.load(self.result(reply)[1]["Body"])["seed"] for reply in replies]
        assert seeds == list(range(12))

    def test_it_takes_asynchronous_calls_only(self, runtime):
        reply = failure(invoke, runtime, FOX, EndpointName="sd-async")
        assert reply["Error"]["Code"] == "ValidationError"
        reply = failure(self.submit, runtime, EndpointName="sd", Body=b"{}")
        assert reply["Error"]["Code"] == "ValidationError"
