"""SageMaker's side of the hosting contract, with the real server behind it.

A loopback HTTP server that boto3 takes for SageMaker: real time, response streaming, asynchronous
inference and batch transform. It passes bodies on unmodified, strips headers, enforces SageMaker's
limits and translates errors. S3 and whatever else a client asks for is moto's.

Where AWS documents no behaviour, a comment says that the choice is ours.
"""

import binascii
import http.client
import json
import struct
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import boto3

from container import Container, Limits

PREFIX = "X-Amzn-SageMaker-"
# What reaches the container of a client's headers, besides its type and what it accepts.
PASSED_IN = [
    "Custom-Attributes",
    "Inference-Id",
    "Target-Model",
    "Target-Variant",
    "Target-Container-Hostname",
    "Inference-Component",
    "Session-Id",
    "Enable-Explanations",
]
# What reaches the client of the container's headers, besides the type.
PASSED_OUT = ["Custom-Attributes", "New-Session-Id", "Closed-Session-Id"]


class Refusal(Exception):
    """An error of the service in the form that boto3 reads."""

    def __init__(self, status, code, **fields):
        super().__init__(code)
        self.status, self.code, self.fields = status, code, fields


@dataclass
class Endpoint:
    """A name, the container behind it and, for an asynchronous endpoint, where results go."""

    container: Container
    output: str | None = None
    failure: str | None = None
    concurrency: int = 1

    def __post_init__(self):
        self.workers = ThreadPoolExecutor(self.concurrency)


class FakeSageMaker:
    """Endpoints by name, and the jobs that were run."""

    def __init__(self, aws_url, limits=None):
        self.aws, self.limits = urlsplit(aws_url), limits or Limits()
        self.endpoints, self.jobs, self.transform_container = {}, {}, None
        self.s3 = boto3.client("s3")
        fake = self

        class Bound(_Handler):
            """The handler of this instance."""

            service = fake

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        """Takes no more calls."""
        self.server.shutdown()
        self.server.server_close()

    def endpoint(self, name, asynchronous):
        """The endpoint of that name and kind."""
        found = self.endpoints.get(name)
        if found is None or (found.output is not None) != asynchronous:
            raise Refusal(400, "ValidationError", message=f"Endpoint {name} not found.")
        return found

    def model_error(self, name, status, body):
        """What a client hears of an answer that is not 2xx, or of none (status 0)."""
        said = body.decode(errors="replace")[: self.limits.error_chars]
        kind = "client" if 400 <= status < 500 else "server"
        return Refusal(
            424,
            "ModelError",
            Message=f'Received {kind} error ({status}) from primary with message "{said}".',
            OriginalStatusCode=status,
            OriginalMessage=said,
            LogStreamArn=f"arn:aws:logs:::log-group:/aws/sagemaker/Endpoints/{name}",
        )

    def invoke(self, name, container, headers, body, seconds):
        """The container's answer, or the error that stands for it."""
        late = b"Your invocation timed out while waiting for a response from container primary."
        try:
            answer = container.call("POST", "/invocations", headers, body, seconds)
        except TimeoutError:
            raise self.model_error(name, 0, late) from None
        except (OSError, http.client.HTTPException) as error:
            raise self.model_error(name, 0, str(error).encode()) from None
        if not 200 <= answer.status < 300:
            raise self.model_error(name, answer.status, answer.body)
        return answer

    def read(self, uri):
        """The object at s3://bucket/key."""
        place = urlsplit(uri)
        reply = self.s3.get_object(Bucket=place.netloc, Key=place.path.lstrip("/"))
        return reply["Body"].read()

    def write(self, uri, body, content_type):
        """Puts an object at s3://bucket/key."""
        place = urlsplit(uri)
        key = place.path.lstrip("/")
        self.s3.put_object(Bucket=place.netloc, Key=key, Body=body, ContentType=content_type)

    def draw_later(self, endpoint, name, headers, source, seconds, output, failure):
        """An asynchronous request, once its turn has come. It is never tried again."""
        body = source if isinstance(source, bytes) else self.read(source)
        try:
            answer = self.invoke(name, endpoint.container, headers, body, seconds)
        except Refusal as refusal:
            # What a failure holds is not documented; the container's words are our choice.
            self.write(failure, refusal.fields["OriginalMessage"].encode(), "text/plain")
        else:
            self.write(output, answer.body, answer.headers.get("Content-Type", ""))

    def transform(self, job):
        """A batch transform job from beginning to end."""
        asked = self.jobs[job]
        try:
            self._transform(asked)
        except (Refusal, ValueError) as error:
            asked["FailureReason"] = f"{error}: {getattr(error, 'fields', {})}"
            asked["TransformJobStatus"] = "Failed"
        else:
            asked["TransformJobStatus"] = "Completed"

    def _transform(self, asked):
        container = self.transform_container
        own = container.call("GET", "/execution-parameters", {}, None, 60)
        # A 404 is allowed; the job's own settings come first in any case.
        offered = json.loads(own.body) if own.status == 200 else {}
        defaults = {"MaxConcurrentTransforms": 1, "BatchStrategy": "MULTI_RECORD"}
        settings = {**defaults, "MaxPayloadInMB": 6, **offered}
        settings |= {key: asked[key] for key in settings if key in asked}
        single = settings["BatchStrategy"].replace("_", "").lower() == "singlerecord"
        most = settings["MaxPayloadInMB"] << 20
        client = {"InvocationsTimeoutInSeconds": 600, "InvocationsMaxRetries": 3}
        client |= asked.get("ModelClientConfig", {})
        source, target = asked["TransformInput"], asked["TransformOutput"]
        headers = {"Content-Type": source.get("ContentType", "")}
        headers |= {"Accept": target["Accept"]} if "Accept" in target else {}
        headers = {key: value for key, value in headers.items() if value}

        def draw(record):
            for attempt in range(client["InvocationsMaxRetries"] + 1):
                try:
                    seconds = client["InvocationsTimeoutInSeconds"]
                    return self.invoke("job", container, headers, record, seconds).body
                except Refusal as refusal:
                    client_fault = 400 <= refusal.fields["OriginalStatusCode"] < 500
                    if client_fault or attempt == client["InvocationsMaxRetries"]:
                        raise
            raise AssertionError("unreachable")

        place = urlsplit(source["DataSource"]["S3DataSource"]["S3Uri"])
        prefix = place.path.lstrip("/")
        listing = self.s3.list_objects_v2(Bucket=place.netloc, Prefix=prefix)
        failed = None
        with ThreadPoolExecutor(settings["MaxConcurrentTransforms"]) as pool:
            for item in listing.get("Contents", []):
                body = self.read(f"s3://{place.netloc}/{item['Key']}")
                records = [body]
                if source.get("SplitType", "None") == "Line":
                    records = batches(body, single, most)
                try:
                    parts = list(pool.map(draw, records))
                except Refusal as refusal:
                    # The other objects go on; the job fails in the end.
                    failed = refusal
                    continue
                if target.get("AssembleWith", "None") == "Line":
                    parts = [part.rstrip(b"\n") + b"\n" for part in parts]
                name = item["Key"].removeprefix(prefix.rpartition("/")[0]).lstrip("/")
                uri = f"{target['S3OutputPath'].rstrip('/')}/{name}.out"
                self.write(uri, b"".join(parts), "application/octet-stream")
        if failed:
            raise failed


def batches(body, single, most):
    """Lines one by one, or as many together as fit. Every line keeps its end."""
    lines = [line + b"\n" for line in body.split(b"\n") if line]
    if single:
        return lines
    together = [b""]
    for line in lines:
        if together[-1] and len(together[-1]) + len(line) > most:
            together.append(b"")
        together[-1] += line
    return together


def event(headers, payload):
    """One message of application/vnd.amazon.eventstream."""
    packed = b""
    for name, value in headers.items():
        packed += struct.pack("!B", len(name)) + name.encode()
        packed += struct.pack("!BH", 7, len(value)) + value.encode()
    prelude = struct.pack("!II", 16 + len(packed) + len(payload), len(packed))
    message = prelude + struct.pack("!I", binascii.crc32(prelude)) + packed + payload
    return message + struct.pack("!I", binascii.crc32(message))


def payload_part(payload):
    """A piece of the container's answer."""
    headers = {
        ":message-type": "event",
        ":event-type": "PayloadPart",
        ":content-type": "application/octet-stream",
    }
    return event(headers, payload)


def stream_error(code, message):
    """The end of a stream that did not end well."""
    headers = {
        ":message-type": "exception",
        ":exception-type": "ModelStreamError",
        ":content-type": "application/json",
    }
    return event(headers, json.dumps({"Message": message, "ErrorCode": code}).encode())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: FakeSageMaker

    def log_message(self, *_):
        pass

    def do_POST(self):
        """Every call of the two APIs is a POST."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            parts = unquote(self.path).strip("/").split("/")
            if parts[0] != "endpoints":
                self.control(body)
            elif parts[2:] == ["invocations"]:
                self.real_time(parts[1], body)
            elif parts[2:] == ["invocations-response-stream"]:
                self.stream(parts[1], body)
            elif parts[2:] == ["async-invocations"]:
                self.asynchronous(parts[1], body)
            else:
                raise Refusal(404, "UnknownOperationException")
        except Refusal as refusal:
            text = json.dumps(refusal.fields).encode()
            headers = {"x-amzn-errortype": refusal.code, "Content-Type": "application/json"}
            self.reply(refusal.status, headers, text)
        except BrokenPipeError:
            pass

    def reply(self, status, headers, body):
        """An answer with a request id, as AWS gives one."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def passed_in(self, api, content_type="Content-Type", accept="Accept"):
        """The headers for the container: nothing else of what the client sent gets there."""
        headers = {"X-Amzn-SageMaker-Forwarded-Api": api}
        wanted = {"Content-Type": content_type, "Accept": accept}
        wanted |= {PREFIX + name: PREFIX + name for name in PASSED_IN}
        for theirs, ours in wanted.items():
            if value := self.headers.get(ours):
                headers[theirs] = value
        return headers

    def check_size(self, body):
        """Bodies above the API's limit never reach a container."""
        if len(body) > self.service.limits.payload_bytes:
            # The status is documented nowhere; the API's model has only this class of error.
            raise Refusal(400, "ValidationError", message="the body is too large")

    def real_time(self, name, body):
        """InvokeEndpoint."""
        service = self.service
        endpoint = service.endpoint(name, asynchronous=False)
        self.check_size(body)
        headers = self.passed_in("InvokeEndpoint")
        seconds = service.limits.answer_seconds
        answer = service.invoke(name, endpoint.container, headers, body, seconds)
        if len(answer.body) > service.limits.payload_bytes:
            raise service.model_error(name, 0, b"the response is too large")
        self.reply(200, self.passed_out(answer.headers), answer.body)

    def passed_out(self, theirs):
        """The headers for the client: the rest of the container's is lost."""
        headers = {"x-Amzn-Invoked-Production-Variant": "main"}
        theirs = {name.lower(): value for name, value in theirs.items()}
        for name in ["Content-Type", *(PREFIX + name for name in PASSED_OUT)]:
            if value := theirs.get(name.lower()):
                headers[name] = value
        return headers

    def stream(self, name, body):
        """InvokeEndpointWithResponseStream: chunks of the container's answer as events."""
        service = self.service
        endpoint = service.endpoint(name, asynchronous=False)
        self.check_size(body)
        headers = self.passed_in("InvokeEndpointWithResponseStream", accept=PREFIX + "Accept")
        deadline = time.monotonic() + service.limits.stream_seconds
        try:
            connection = endpoint.container.connect(service.limits.stream_seconds)
            sock = connection.sock
            connection.request("POST", "/invocations", body, headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise service.model_error(name, 0, str(error).encode()) from None
        try:
            if answer.status != 200:
                raise service.model_error(name, answer.status, answer.read())
            self.send_response(200)
            headers = self.passed_out(dict(answer.headers))
            headers[PREFIX + "Content-Type"] = headers.pop("Content-Type", "")
            headers["Content-Type"] = "application/vnd.amazon.eventstream"
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                while part := answer.read1(1 << 16):
                    self.chunk(payload_part(part))
                    sock.settimeout(max(0.001, deadline - time.monotonic()))
            except TimeoutError:
                self.chunk(stream_error("ModelInvocationTimeExceeded", "it took too long"))
            except (OSError, http.client.HTTPException) as error:
                self.chunk(stream_error("StreamBroken", str(error)))
            self.wfile.write(b"0\r\n\r\n")
        finally:
            # A client that has left is felt by the container.
            connection.close()

    def chunk(self, data):
        """One HTTP chunk."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def asynchronous(self, name, body):
        """InvokeEndpointAsync: the answer is 202 and two places in S3."""
        service = self.service
        endpoint = service.endpoint(name, asynchronous=True)
        location = self.headers.get(PREFIX + "InputLocation")
        if bool(location) == bool(body) or len(body) > service.limits.async_inline_bytes:
            raise Refusal(400, "ValidationError", message="one of InputLocation and Body")
        inference = self.headers.get(PREFIX + "Inference-Id") or str(uuid.uuid4())
        stem = uuid.uuid4().hex
        output = f"{endpoint.output}/{stem}.out"
        failure = f"{endpoint.failure}/{stem}-error.out"
        headers = self.passed_in("InvokeEndpointAsync", PREFIX + "Content-Type", PREFIX + "Accept")
        seconds = float(self.headers.get(PREFIX + "InvocationTimeoutSeconds") or 900)
        endpoint.workers.submit(
            service.draw_later, endpoint, name, headers, location or body, seconds, output, failure
        )
        headers = {
            PREFIX + "OutputLocation": output,
            PREFIX + "FailureLocation": failure,
            "Content-Type": "application/json",
        }
        self.reply(202, headers, json.dumps({"InferenceId": inference}).encode())

    def control(self, body):
        """The SageMaker API: transform jobs are run here, everything else is moto's."""
        service = self.service
        action = self.headers.get("X-Amz-Target", "").removeprefix("SageMaker.")
        if action == "CreateTransformJob":
            asked = json.loads(body)
            name = asked["TransformJobName"]
            service.jobs[name] = asked | {"TransformJobStatus": "InProgress"}
            threading.Thread(target=service.transform, args=[name], daemon=True).start()
            reply = {"TransformJobArn": f"arn:aws:sagemaker:::transform-job/{name}"}
        elif action == "DescribeTransformJob":
            reply = service.jobs[json.loads(body)["TransformJobName"]]
        else:
            return self.forward(body)
        headers = {"Content-Type": "application/x-amz-json-1.1"}
        return self.reply(200, headers, json.dumps(reply).encode())

    def forward(self, body):
        """Asks moto."""
        connection = http.client.HTTPConnection(self.service.aws.netloc, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
        connection.request("POST", self.path, body, headers)
        answer = connection.getresponse()
        kept = {"Content-Type": answer.headers.get("Content-Type", "")}
        self.reply(answer.status, kept, answer.read())
