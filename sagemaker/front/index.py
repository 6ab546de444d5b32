"""The public web page of sd-server: an AWS Lambda function behind an HTTP API.

    GET  /                  a page with a prompt box
    GET  /random            a page with an image of a random prompt
    GET  /default           an image of the default prompt
    GET  /<description>     an image of this prompt; ?seed= makes it repeatable
    POST /pictures          any request of the server as JSON; 202 and the location of the result
    GET  /pictures/<id>     202 until the result is ready, then 303 to it

The first four use the real-time endpoint and must finish before the API closes the connection,
after 30 s. POST /pictures uses the asynchronous endpoint and may take an hour.
"""

import base64
import html
import json
import os
import random
import re
import uuid
from urllib.parse import quote, unquote

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError, ReadTimeoutError

DEFAULT_PROMPT = "a photo of an astronaut riding a horse on mars"
SUBJECTS = ["a fox", "a lighthouse", "an old car", "a castle", "a sailing ship", "two herons"]
PLACES = ["in a snowy forest", "by the sea", "on the moon", "in a desert", "under a night sky"]
STYLES = ["oil on canvas", "a woodcut", "a photograph at dawn", "watercolour", "a pencil drawing"]

MAX_PROMPT_CHARS = 1000
# An asynchronous request is stored in S3; it may hold input images.
MAX_BODY_BYTES = 5_000_000
LINK_SECONDS = 3600

# No retries: a second attempt would generate a second image and finish after the API's timeout.
RUNTIME = boto3.client(
    "sagemaker-runtime",
    config=Config(connect_timeout=2, read_timeout=26, retries={"total_max_attempts": 1}),
)
S3 = boto3.client("s3", config=Config(signature_version="s3v4"))


def handler(event, _context):
    """Handles one request of the HTTP API (payload format 2.0)."""
    method = event["requestContext"]["http"]["method"]
    path = unquote(event["rawPath"]).strip("/")
    query = event.get("queryStringParameters") or {}
    if path == "pictures":
        return submit(event) if method == "POST" else problem(405, "POST a request here")
    if method != "GET":
        return problem(405, "only GET is supported here")
    if path.startswith("pictures/"):
        return poll(path.removeprefix("pictures/"))
    if path in ("", "random"):
        return page(query.get("prompt") or (random_prompt() if path else ""))
    if path in ("favicon.ico", "robots.txt"):
        return problem(404, "not found")
    return image(DEFAULT_PROMPT if path == "default" else path, query.get("seed"))


def random_prompt():
    """One of a few hundred prompts."""
    return f"{random.choice(SUBJECTS)} {random.choice(PLACES)}, {random.choice(STYLES)}"


def page(prompt):
    """The HTML page, with the image of `prompt` if there is one."""
    shown = html.escape(prompt, quote=True)
    tag = ""
    if prompt:
        tag = f'<p><img src="{html.escape(quote(prompt, safe=""))}" alt="{shown}"></p>'
    text = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>sd-server</title>
<style>body {{ font: 1rem/1.5 sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }}
input {{ width: 100%; font: inherit }} img {{ max-width: 100% }}</style>
<h1>sd-server</h1>
<form action="./"><label>Prompt
<input name="prompt" value="{shown}" maxlength="{MAX_PROMPT_CHARS}" required></label></form>
{tag}<p><a href="random">random prompt</a></p>
</html>
"""
    return respond(200, text, "text/html; charset=utf-8")


def image(prompt, seed):
    """Generates an image of `prompt` while the client waits."""
    endpoint = os.environ["REALTIME_ENDPOINT"]
    if not endpoint:
        return problem(404, "there is no real-time endpoint; POST to /pictures")
    if len(prompt) > MAX_PROMPT_CHARS:
        return problem(414, f"a prompt may have {MAX_PROMPT_CHARS} characters")
    request = {
        "prompt": prompt,
        "num_inference_steps": int(os.environ["STEPS"]),
        "scheduler": os.environ["SCHEDULER"],
    }
    if seed is not None:
        if not re.fullmatch(r"\d{1,19}", seed):
            return problem(400, "seed must be a whole number")
        request["seed"] = int(seed)
    try:
        reply = RUNTIME.invoke_endpoint(
            EndpointName=endpoint,
            ContentType="application/json",
            Accept="image/jpeg",
            Body=json.dumps(request),
        )
    except ReadTimeoutError:
        return problem(504, "timed out; POST long requests to /pictures")
    except ClientError as error:
        return refusal(error)
    headers = {"x-sd-attributes": reply.get("CustomAttributes", "")}
    if seed is not None:
        headers["cache-control"] = "public, max-age=86400"
    return respond(200, reply["Body"].read(), reply["ContentType"], headers)


def submit(event):
    """Sends a request to the asynchronous endpoint."""
    endpoint, bucket = os.environ["ASYNC_ENDPOINT"], os.environ["BUCKET"]
    if not endpoint:
        return problem(404, "there is no asynchronous endpoint")
    body = (event.get("body") or "").encode()
    if event.get("isBase64Encoded"):
        body = base64.b64decode(body)
    if len(body) > MAX_BODY_BYTES:
        return problem(413, f"a request may have {MAX_BODY_BYTES} bytes")
    try:
        prompt = json.loads(body).get("prompt")
    except (ValueError, AttributeError):
        return problem(400, "the body must be a JSON object")
    if not isinstance(prompt, str):
        return problem(400, "prompt is required")
    name = uuid.uuid4().hex
    key = f"async/input/{name}.json"
    S3.put_object(Bucket=bucket, Key=key, Body=body, ContentType="application/json")
    try:
        reply = RUNTIME.invoke_endpoint_async(
            EndpointName=endpoint,
            ContentType="application/json",
            Accept="image/*" if wants_one(body) else "application/json",
            InputLocation=f"s3://{bucket}/{key}",
            InferenceId=name,
            InvocationTimeoutSeconds=3600,
        )
    except ClientError as error:
        return refusal(error)
    # SageMaker chooses the locations of the results; they are stored for later polls.
    places = {"output": reply["OutputLocation"], "failure": reply["FailureLocation"]}
    S3.put_object(Bucket=bucket, Key=f"async/input/{name}.places", Body=json.dumps(places))
    location = f"/pictures/{name}"
    text = json.dumps({"id": name, "location": location})
    return respond(202, text, "application/json", {"location": location, "retry-after": "5"})


def wants_one(body):
    """Whether the request is for a single image."""
    fields = json.loads(body)
    return fields.get("num_images_per_prompt", fields.get("n", 1)) == 1


def poll(name):
    """Reports the state of a submitted request."""
    if not re.fullmatch(r"[0-9a-f]{32}", name):
        return problem(404, "there is no such image")
    try:
        kept = S3.get_object(Bucket=os.environ["BUCKET"], Key=f"async/input/{name}.places")
    except ClientError as error:
        if is_missing(error):
            return problem(404, "there is no such image")
        raise
    places = json.load(kept["Body"])
    output = location(places["output"])
    try:
        S3.head_object(**output)
    except ClientError as error:
        if not is_missing(error):
            raise
    else:
        link = S3.generate_presigned_url("get_object", Params=output, ExpiresIn=LINK_SECONDS)
        return respond(303, "", "text/plain", {"location": link})
    try:
        failure = S3.get_object(**location(places["failure"]))
    except ClientError as error:
        if not is_missing(error):
            raise
    else:
        return problem(502, failure["Body"].read(2048).decode(errors="replace"))
    text = json.dumps({"id": name, "status": "pending"})
    return respond(202, text, "application/json", {"retry-after": "5"})


def location(uri):
    """s3://bucket/key as boto3 arguments."""
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    return {"Bucket": bucket, "Key": key}


def is_missing(error):
    """Whether S3 says that there is no such object."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"] == 404


def refusal(error):
    """The response to a failed invocation."""
    if error.response["Error"]["Code"] != "ModelError":
        print(json.dumps({"level": "ERROR", "message": str(error)}))
        return problem(503, "the endpoint does not respond", {"retry-after": "10"})
    status = error.response["OriginalStatusCode"]
    try:
        message = json.loads(error.response["OriginalMessage"])["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = "the endpoint failed"
    if status in (429, 503):
        return problem(503, message, {"retry-after": "5"})
    return problem(status if 400 <= status < 500 else 502, message)


def problem(status, message, headers=None):
    """An error response."""
    return respond(status, json.dumps({"error": message}), "application/json", headers)


def respond(status, body, content_type, headers=None):
    """A response in payload format 2.0."""
    binary = isinstance(body, bytes)
    return {
        "statusCode": status,
        "headers": {"content-type": content_type, **(headers or {})},
        "body": base64.b64encode(body).decode() if binary else body,
        "isBase64Encoded": binary,
    }
