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
# Tags are not overwritten: a commit that was pushed before is taken as it is. An attestation needs a builder of its own.
digest_of_tag() {
    aws ecr describe-images --repository-name "$repository" --image-ids "imageTag=$commit" \
        --query 'imageDetails[0].imageDigest' --output text
}
if digest=$(digest_of_tag 2>/dev/null); then
    say "$tag is there"
else
    docker buildx inspect sd >/dev/null 2>&1 || docker buildx create --name sd --driver docker-container >/dev/null
    docker buildx build --builder sd --file docker/Dockerfile --target "${DOCKER_TARGET:-cuda}" --platform linux/amd64 \
        --sbom=true --provenance=mode=max --tag "$tag" --push .
    digest=$(digest_of_tag)
fi

# Attestations make the tag an index, of which ECR scans nothing; it scans the image in it.
scanned=$(docker buildx imagetools inspect --raw "$REGISTRY@$digest" | python3 -c '
import json, sys

for one in json.load(sys.stdin).get("manifests", []):
    if one.get("platform", {}).get("os") == "linux" and one["platform"]["architecture"] == "amd64":
        print(one["digest"])')
scanned=${scanned:-$digest}
for _ in $(seq "${SCAN_TRIES:-60}"); do
    state=$(aws ecr describe-image-scan-findings --repository-name "$repository" --image-id "imageDigest=$scanned" \
        --query imageScanStatus.status --output text 2>/dev/null || echo PENDING)
    [ "$state" = PENDING ] || [ "$state" = IN_PROGRESS ] || break
    sleep 5
done
[ "$state" = COMPLETE ] || [ "$state" = ACTIVE ] || fail "the scan of $scanned ended as $state"
critical=$(aws ecr describe-image-scan-findings --repository-name "$repository" --image-id "imageDigest=$scanned" \
    --query imageScanFindings.findingSeverityCounts.CRITICAL --output text)
case $critical in None | 0) ;; *) fail "$critical critical findings in $scanned" ;; esac

echo "$REGISTRY@$digest" >"$STATE/image"
if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "digest=$digest" >>"$GITHUB_OUTPUT"; fi
say "$REGISTRY@$digest"
