#!/usr/bin/env python3
"""Generates images with a deployment of deploy.sh. Needs boto3 and AWS credentials."""

import argparse
import base64
import json
import sys
import time
import uuid
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

TYPES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def main():
    """Reads the command line and sends the request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", help="prompt")
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help="request fields, such as steps=20 seed=7")
    parser.add_argument("-o", "--output", type=Path, default=Path("picture.png"))
    parser.add_argument("--name", default="sd", help="name of the deployment; default: sd")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--async", action="store_true", dest="wait", help="use the asynchronous endpoint, up to an hour")
    mode.add_argument("--stream", action="store_true", help="show progress step by step")
    args = parser.parse_args()

    if args.output.suffix not in TYPES:
        parser.error(f"{args.output}: the name must end in .png, .jpg or .webp")
    fields = {"prompt": args.prompt, "output_format": TYPES[args.output.suffix]}
    for field in args.fields:
        key, equals, value = field.partition("=")
        if not equals:
            parser.error(f"{field}: must be FIELD=VALUE")
        fields[key] = parsed(value)

    # No retries: a second attempt would generate a second image. SageMaker times out after 60 s.
    retries = {"total_max_attempts": 1}
    runtime = boto3.client("sagemaker-runtime", config=Config(read_timeout=70, retries=retries))
    try:
        if args.wait:
            reply = invoke_async(runtime, args.name, fields)
        elif args.stream:
            reply = invoke_stream(runtime, args.name, fields)
        else:
            reply = invoke(runtime, args.name, fields)
    except ClientError as error:
        sys.exit(explained(error))
    for path, seed in saved(reply, args.output):
        print(f"{path} (seed {seed})")


def parsed(value):
    """A JSON value, or else the text itself."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def invoke(runtime, name, fields):
    """The response of the real-time endpoint."""
    reply = runtime.invoke_endpoint(
        EndpointName=name,
        ContentType="application/json",
        Accept="application/json",
        Body=json.dumps(fields),
    )
    return json.load(reply["Body"])


def invoke_stream(runtime, name, fields):
    """The result at the end of the real-time endpoint's stream of server-sent events."""
    reply = runtime.invoke_endpoint_with_response_stream(
        EndpointName=name,
        ContentType="application/json",
        Accept="text/event-stream",
        Body=json.dumps(fields | {"stream": True}),
    )
    parts = (part["PayloadPart"]["Bytes"] for part in reply["Body"])
    for event, data in events(parts):
        if event == "step":
            print(f"\rstep {data['step']} of {data['steps']}", end="", file=sys.stderr, flush=True)
        elif event == "result":
            print(file=sys.stderr)
            return data
        elif event == "error":
            sys.exit(f"\n{data['error']['message']}")
    sys.exit("the stream ended without a result")


def events(parts):
    """Yields server-sent events from chunks that may end anywhere."""
    buffer = b""
    for part in parts:
        buffer += part
        while b"\n\n" in buffer:
            block, buffer = buffer.split(b"\n\n", 1)
            lines = [line.partition(b":") for line in block.splitlines()]
            values = {key: value.removeprefix(b" ") for key, _, value in lines if key}
            if b"data" in values:
                yield values.get(b"event", b"message").decode(), json.loads(values[b"data"])


def invoke_async(runtime, name, fields):
    """The response of the asynchronous endpoint, once it is in the bucket."""
    s3 = boto3.client("s3")
    bucket = output(name, "storage", "Bucket")
    key = f"async/input/{uuid.uuid4().hex}.json"
    s3.put_object(Bucket=bucket, Key=key, Body=json.dumps(fields))
    reply = runtime.invoke_endpoint_async(
        EndpointName=f"{name}-async",
        ContentType="application/json",
        Accept="application/json",
        InputLocation=f"s3://{bucket}/{key}",
        InvocationTimeoutSeconds=3600,
    )
    print(f"waiting for {reply['OutputLocation']}", file=sys.stderr)
    while True:
        if body := fetched(s3, reply["OutputLocation"]):
            return json.loads(body)
        if body := fetched(s3, reply["FailureLocation"]):
            sys.exit(body.decode(errors="replace"))
        time.sleep(2)


def output(name, template, key):
    """An output of one of the deployment's stacks."""
    client = boto3.client("cloudformation")
    stack = client.describe_stacks(StackName=f"{name}-{template}")["Stacks"][0]
    return next(o["OutputValue"] for o in stack["Outputs"] if o["OutputKey"] == key)


def fetched(s3, uri):
    """The object at s3://bucket/key, or None if it does not exist yet."""
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    try:
        return s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    except s3.exceptions.NoSuchKey:
        return None


def explained(error):
    """One line about a failed call, with the container's own message if there is one."""
    reply = error.response
    if reply["Error"]["Code"] != "ModelError":
        return str(error)
    try:
        message = json.loads(reply["OriginalMessage"])["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = reply["OriginalMessage"]
    return f"{reply['OriginalStatusCode']}: {message}"


def saved(reply, path):
    """Writes the images of a response; yields their paths and seeds."""
    images = reply.get("images", [reply])
    for number, image in enumerate(images):
        target = path if len(images) == 1 else path.with_stem(f"{path.stem}-{number}")
        target.write_bytes(base64.b64decode(image["data"]))
        yield target, image["seed"]


if __name__ == "__main__":
    main()
