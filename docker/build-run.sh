#!/usr/bin/env bash
# Builds the container image and generates one image with it into output/:
#
#     docker/build-run.sh [PROMPT]
#
# TARGET=cuda runs on the GPU. MODEL names another model than the built-in one; its weights are
# stored in the volume sd-server_weights, which compose.yaml uses too.
set -euo pipefail
cd "$(dirname "$0")/.."

prompt=${1:-a photo of an astronaut riding a horse on mars}
target=${TARGET:-cpu}
image=sd-server:$target

options=()
if [[ $target == cuda ]]; then options+=(--gpus all); fi

docker build --file docker/Dockerfile --target "$target" --tag "$image" .
mkdir -p output
docker run --rm "${options[@]}" --env HF_TOKEN \
    --volume sd-server_weights:/models --volume "$PWD/output:/output" \
    "$image" generate --model "${MODEL:-demo}" "$prompt" --output /output/picture.png
echo "built $image; generated output/picture.png"
