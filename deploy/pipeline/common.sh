# shellcheck shell=bash disable=SC2034
# Sourced by the steps: what they share.

say() { echo "$(basename "$0" .sh): $*" >&2; }
fail() { say "$@"; exit 1; }

: "${NAME:=sd}" "${TARGET:=ecs}" "${STATE:=${RUNNER_TEMP:-/tmp}/sd-pipeline}"
mkdir -p "$STATE"
case $TARGET in
    ecs) stack=$NAME-ecs template=deploy/aws/ecs.yaml image_parameter=Image ;;
    sagemaker) stack=$NAME-realtime template=sagemaker/realtime.yaml image_parameter=Image ;;
    *) fail "TARGET is ecs or sagemaker, not $TARGET" ;;
esac

# output KEY: an output of the stack.
output() {
    aws cloudformation describe-stacks --stack-name "$stack" --output text \
        --query "Stacks[0].Outputs[?OutputKey=='$1'].OutputValue"
}

# parameter KEY: a parameter of the stack as it is, or nothing where there is no stack.
parameter() {
    aws cloudformation describe-stacks --stack-name "$stack" --output text \
        --query "Stacks[0].Parameters[?ParameterKey=='$1'].ParameterValue" 2>/dev/null || true
}
