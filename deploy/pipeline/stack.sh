#!/usr/bin/env bash
# Deploys the stack with the image of STATE/image, or with the one that it has. What the stack had before is
# kept in STATE/before for rollback.sh. A stack without changes is no failure.
#
#     TARGET=ecs|sagemaker STACKS_ROLE=ARN stack.sh [PARAMETER=VALUE...]
set -euo pipefail
# shellcheck source=deploy/pipeline/common.sh
. "$(dirname "$0")/common.sh"

before=$(parameter "$image_parameter")
echo "$before" >"$STATE/before"
image=$(cat "$STATE/image" 2>/dev/null || echo "$before")
[ -n "$image" ] || fail "there is no image yet: run image.sh first"

role=()
if [ -n "${STACKS_ROLE:-}" ]; then role=(--role-arn "$STACKS_ROLE"); fi
aws cloudformation deploy --stack-name "$stack" --template-file "$template" --no-fail-on-empty-changeset \
    --capabilities CAPABILITY_IAM "${role[@]}" --parameter-overrides "$image_parameter=$image" "$@"
say "$stack has $image"
