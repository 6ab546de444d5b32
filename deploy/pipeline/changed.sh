#!/usr/bin/env bash
# What a push has changed, as `app=true|false` and `stack=true|false`:
#
#     changed.sh BEFORE AFTER
#
# Without a commit before (a new branch, a run by hand) everything has.
set -euo pipefail

before=${1:-} after=${2:-HEAD}
declare -A paths=(
    [app]='^(src|models|docker)/|^Cargo\.(toml|lock)$|^rust-toolchain\.toml$|^\.cargo/'
    [stack]='^(deploy/aws|deploy/pipeline|sagemaker)/'
)

if [ -z "${before//0/}" ] || ! git cat-file -e "$before^{commit}" 2>/dev/null; then
    printf 'app=true\nstack=true\n'
    exit
fi
files=$(git diff --name-only "$before" "$after")
for what in app stack; do
    if grep -qE "${paths[$what]}" <<<"$files"; then echo "$what=true"; else echo "$what=false"; fi
done
