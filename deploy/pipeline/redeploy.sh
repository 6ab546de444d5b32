#!/usr/bin/env bash
# Waits until the service runs what the stack says. With --force tasks are replaced even if nothing has changed,
# such as for weights that are downloaded at the start. SageMaker's endpoint is replaced by its stack alone.
set -euo pipefail
# shellcheck source=deploy/pipeline/common.sh
. "$(dirname "$0")/common.sh"

case $TARGET in
    ecs)
        if [ "${1:-}" = --force ]; then
            aws ecs update-service --cluster "$NAME" --service "$(output Service)" --force-new-deployment >/dev/null
        fi
        aws ecs wait services-stable --cluster "$NAME" --services "$(output Service)"
        ;;
    sagemaker)
        aws sagemaker wait endpoint-in-service --endpoint-name "$(output Endpoint)"
        ;;
esac
