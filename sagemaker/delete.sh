#!/usr/bin/env bash
# Deletes a deployment and everything it created: stacks, results, models, container images, logs.
set -euo pipefail
shopt -s inherit_errexit

if [[ ${1:-} == -h || ${1:-} == --help || $# -gt 2 || ($# -gt 0 && $1 != --name) || $# -eq 1 ]]; then
    echo "usage: delete.sh [--name NAME]"
    exit 64
fi
name=${2:-sd}

# exists STACK: whether the stack exists. Any other error than its absence ends the script.
exists() {
    local error
    if error=$(aws cloudformation describe-stacks --stack-name "$1" 2>&1 >/dev/null); then
        return 0
    fi
    [[ $error == *'does not exist'* ]] || { echo "$error" >&2 && exit 1; }
    return 1
}

# In the reverse order of deploy.sh: each depends on those after it.
for stack in front watch async realtime storage; do
    exists "$name-$stack" || continue
    if [[ $stack == storage ]]; then
        bucket=$(aws cloudformation describe-stacks --stack-name "$name-storage" --output text \
            --query "Stacks[0].Outputs[?OutputKey=='Bucket'].OutputValue")
        aws s3 rm --recursive --only-show-errors "s3://$bucket"
    fi
    echo "deleting stack $name-$stack"
    aws cloudformation delete-stack --stack-name "$name-$stack"
    aws cloudformation wait stack-delete-complete --stack-name "$name-$stack"
done

# Terminating instances may write their last lines after their stack and its log group are deleted.
groups=("/aws/sagemaker/Endpoints/$name" "/aws/sagemaker/Endpoints/$name-async"
    "/aws/lambda/$name-front" "/aws/http-api/$name-front")
for group in "${groups[@]}"; do
    aws logs delete-log-group --log-group-name "$group" 2>/dev/null || true
done
# This group is shared with other jobs of the account; only this deployment's streams are deleted.
jobs=/aws/sagemaker/TransformJobs
streams=$(aws logs describe-log-streams --log-group-name "$jobs" \
    --log-stream-name-prefix "$name-batch-" --output text \
    --query 'logStreams[].logStreamName' 2>/dev/null || true)
for stream in $streams; do
    aws logs delete-log-stream --log-group-name "$jobs" --log-stream-name "$stream"
done

left=$(
    for stack in front watch async realtime storage; do
        if exists "$name-$stack"; then echo "stack $name-$stack"; fi
    done
    for group in "${groups[@]}"; do
        aws logs describe-log-groups --log-group-name-prefix "$group" --output text \
            --query "logGroups[?logGroupName=='$group'].logGroupName"
    done
)
if [[ $left ]]; then
    printf 'still there:\n%s\n' "$left" >&2
    exit 1
fi
echo "nothing is left of $name"
