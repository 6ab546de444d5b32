#!/usr/bin/env bash
# Has a picture drawn through the endpoint, as a client does, and looks whether it is one.
#
#     TARGET=ecs URL=https://NAME [API_KEY=KEY] smoke.sh      TARGET=sagemaker smoke.sh
set -euo pipefail
# shellcheck source=deploy/pipeline/common.sh
. "$(dirname "$0")/common.sh"

body='{"prompt": "a red house by the sea", "steps": 2, "seed": 7, "num_images_per_prompt": 1}'
reply=$STATE/reply
printf %s "$body" >"$STATE/request"
case $TARGET in
    ecs)
        key=()
        if [ -n "${API_KEY:-}" ]; then key=(--header "Authorization: Bearer $API_KEY"); fi
        curl --fail --silent --show-error --max-time 90 --retry 5 --retry-all-errors --retry-delay 5 "${key[@]}" \
            --header 'Content-Type: application/json' --data "$body" --output "$reply" "$URL/invocations"
        ;;
    sagemaker)
        aws sagemaker-runtime invoke-endpoint --endpoint-name "$(output Endpoint)" --content-type application/json \
            --body "fileb://$STATE/request" "$reply" >/dev/null
        ;;
esac
python3 - "$reply" <<'PYTHON'
import base64, json, sys

reply = json.load(open(sys.argv[1]))
picture = base64.b64decode(reply["data"])
assert reply["seed"] == 7 and picture[:3] in (b"\xff\xd8\xff", b"\x89PN"), reply
print(f"smoke: {len(picture)} bytes of {reply['content_type']}", file=sys.stderr)
PYTHON
