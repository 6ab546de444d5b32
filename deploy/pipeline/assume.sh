#!/usr/bin/env bash
# Exchanges the runner's token for keys of the role AWS_ROLE that last an hour, in GITHUB_ENV.
set -euo pipefail

token=$(curl --fail --silent --show-error --retry 3 \
    --header "Authorization: Bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" \
    "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=sts.amazonaws.com" | python3 -c 'import json, sys; print(json.load(sys.stdin)["value"])')
read -r key secret session < <(aws sts assume-role-with-web-identity --role-arn "$AWS_ROLE" \
    --role-session-name "github-${GITHUB_RUN_ID:-0}" --web-identity-token "$token" --duration-seconds 3600 \
    --query 'Credentials.[AccessKeyId, SecretAccessKey, SessionToken]' --output text)
echo "::add-mask::$secret"
echo "::add-mask::$session"
printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\nAWS_SESSION_TOKEN=%s\n' \
    "$key" "$secret" "$session" >>"$GITHUB_ENV"
