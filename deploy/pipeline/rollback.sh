#!/usr/bin/env bash
# Brings back the image that the stack had before stack.sh.
set -euo pipefail
# shellcheck source=deploy/pipeline/common.sh
. "$(dirname "$0")/common.sh"

before=$(cat "$STATE/before" 2>/dev/null || true)
[ -n "$before" ] || fail "the stack had no image before: delete it, or deploy one that works"
echo "$before" >"$STATE/image"
"$(dirname "$0")/stack.sh"
"$(dirname "$0")/redeploy.sh"
say "back to $before"
