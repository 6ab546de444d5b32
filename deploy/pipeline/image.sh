#!/usr/bin/env bash
# Builds the image with a bill of materials and its provenance, pushes it, waits for ECR's scan, and
# refuses what has critical findings. Writes the image by its digest to STATE/image.
#
#     REGISTRY=ACCOUNT.dkr.ecr.REGION.amazonaws.com/sd image.sh COMMIT
set -euo pipefail
# shellcheck source=deploy/pipeline/common.sh
. "$(dirname "$0")/common.sh"

commit=${1:?usage: image.sh COMMIT}
tag=$REGISTRY:$commit
repository=${REGISTRY#*/}

aws ecr get-login-password | docker login --username AWS --password-stdin "${REGISTRY%%/*}"
docker buildx build --file docker/Dockerfile --target "${DOCKER_TARGET:-cuda}" --platform linux/amd64 \
    --sbom=true --provenance=mode=max --tag "$tag" --push .

digest=$(aws ecr describe-images --repository-name "$repository" --image-ids "imageTag=$commit" \
    --query 'imageDetails[0].imageDigest' --output text)
for _ in $(seq "${SCAN_TRIES:-60}"); do
    state=$(aws ecr describe-image-scan-findings --repository-name "$repository" --image-id "imageDigest=$digest" \
        --query imageScanStatus.status --output text 2>/dev/null || echo PENDING)
    [ "$state" = PENDING ] || [ "$state" = IN_PROGRESS ] || break
    sleep 5
done
[ "$state" = COMPLETE ] || [ "$state" = ACTIVE ] || fail "the scan of $digest ended as $state"
critical=$(aws ecr describe-image-scan-findings --repository-name "$repository" --image-id "imageDigest=$digest" \
    --query imageScanFindings.findingSeverityCounts.CRITICAL --output text)
case $critical in None | 0) ;; *) fail "$critical critical findings in $digest" ;; esac

echo "$REGISTRY@$digest" >"$STATE/image"
if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "digest=$digest" >>"$GITHUB_OUTPUT"; fi
say "$REGISTRY@$digest"
