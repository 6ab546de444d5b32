#!/usr/bin/env python3
"""Generates images for a JSON Lines file in a batch transform job, on an instance of its own.

The model is that of the deployment's real-time stack, which must be deployed from a tarball: batch
transform does not support S3 prefixes. Record k becomes image k; a failed record does not stop the
others.
"""

import argparse
import base64
import json
import sys
import time
from pathlib import Path

import boto3

from invoke import output


def main():
    """Uploads the records, runs the job, downloads the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, help="one request per line, see prompts.jsonl")
    parser.add_argument("-o", "--output", type=Path, default=Path("pictures"))
    parser.add_argument("--name", default="sd", help="name of the deployment; default: sd")
    parser.add_argument("--instance-type", default="ml.g4dn.xlarge")
    parser.add_argument("--ami", default="al2-ami-sagemaker-batch-gpu-535", help="host AMI; '' for CPU instances")
    args = parser.parse_args()

    s3, sagemaker = boto3.client("s3"), boto3.client("sagemaker")
    bucket = output(args.name, "storage", "Bucket")
    model = output(args.name, "realtime", "Model")
    container = sagemaker.describe_model(ModelName=model)["PrimaryContainer"]
    if "ModelDataSource" in container:
        sys.exit("the model was deployed from a directory; batch transform needs a tarball")

    job = f"{args.name}-batch-{int(time.time())}"
    source = f"batch/{job}/input/{args.lines.name}"
    s3.upload_file(str(args.lines), bucket, source)
    resources = {"InstanceType": args.instance_type, "InstanceCount": 1}
    if args.ami:
        resources["TransformAmiVersion"] = args.ami
    sagemaker.create_transform_job(
        TransformJobName=job,
        ModelName=model,
        # One record per request keeps each short; four concurrent ones share UNet calls.
        BatchStrategy="SingleRecord",
        MaxConcurrentTransforms=4,
        MaxPayloadInMB=6,
        ModelClientConfig={"InvocationsTimeoutInSeconds": 3600, "InvocationsMaxRetries": 1},
        Environment={"SD_REQUEST_TIMEOUT_MS": "3540000"},
        TransformInput={
            "DataSource": {
                "S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{bucket}/{source}"}
            },
            "ContentType": "application/jsonlines",
            "SplitType": "Line",
        },
        TransformOutput={
            "S3OutputPath": f"s3://{bucket}/batch/{job}/output",
            "Accept": "application/jsonlines",
            "AssembleWith": "Line",
        },
        TransformResources=resources,
    )
    print(f"{job} started", file=sys.stderr)
    while (state := sagemaker.describe_transform_job(TransformJobName=job))[
        "TransformJobStatus"
    ] in ("InProgress", "Stopping"):
        time.sleep(5)
    if state["TransformJobStatus"] != "Completed":
        sys.exit(f"{job}: {state.get('FailureReason', state['TransformJobStatus'])}")

    key = f"batch/{job}/output/{args.lines.name}.out"
    body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    args.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    # Responses end in a newline, and SageMaker may add its own.
    for number, line in enumerate(filter(None, body.splitlines())):
        reply = json.loads(line)
        if "error" in reply:
            failed += 1
            print(f"line {number}: {reply['error']['message']}", file=sys.stderr)
            continue
        extension = reply["content_type"].removeprefix("image/")
        for k, image in enumerate(reply.get("images", [reply])):
            path = args.output / f"{number:05}-{k}.{extension}"
            path.write_bytes(base64.b64decode(image["data"]))
            print(f"{path} (seed {image['seed']})")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
