#!/usr/bin/env bash
# Continuous batching on and off: two servers with the built-in model, one with eight rows per step and
# one with two (a single guided image), under the same loads alternately. First the throughput of both
# (8 clients in a closed loop), then Poisson arrivals at 0.5, 1 and 2 times the throughput of the first.
# Takes 8 to 11 minutes; --quick takes one minute and only shows that the script works.
#
#     cargo build --release && benches/batching.sh [--quick] [PATH_OF_SD_SERVER]
set -euo pipefail
cd "$(dirname "$0")/.."

closed_s=25 open_s=50 steps=20
if [ "${1:-}" = --quick ]; then
    closed_s=4 open_s=4 steps=4
    shift
fi
server=${1:-target/release/sd-server}
[ -x "$server" ] || { echo "$server does not exist: run cargo build --release" >&2; exit 64; }
scratch=$(mktemp -d)
processes=()
trap 'kill "${processes[@]}" 2>/dev/null || true; wait; rm -rf "$scratch"' EXIT

# Starts a server with this number of rows per step and prints its URL when it is ready.
start() {
    "$server" --model demo --device cpu --dtype f32 --host 127.0.0.1 --port 0 --log warn --max-batch-rows "$1" \
        >"$scratch/$1" &
    processes+=($!)
    for _ in $(seq 600); do
        url=$(sed -n 's/^listening on //p' "$scratch/$1")
        [ -n "$url" ] && "$server" healthcheck --port "${url##*:}" 2>/dev/null && return
        sleep 0.1
    done
    echo "the server with $1 rows was not ready after a minute" >&2
    exit 1
}

# Sends load to a server and writes the result to $report.
load() {
    report=$scratch/report
    "$server" bench "$1" --json --body "{\"prompt\":\"a red house by the sea\",\"steps\":$steps}" \
        "${@:2}" >"$report"
}

# Prints a number of the report by its name; nan if there is none.
number() {
    sed -n "s/.*\"$1\": \([0-9.]*\).*/\1/p" "$report" | head -1 | grep . || echo nan
}

row() {
    printf '| %s | %s | %.2f | %.0f | %.0f | %.2f | %.2f | %.2f |\n' "$1" "$2" \
        "$(number images_per_second)" "$(number 200)" "$(number 429)" "$(number p50)" \
        "$(number p99)" "$(number rows_per_step)"
}

start 8; on=$url
start 2; off=$url
load "$on" --clients 2 --duration-s 2 # The first images of a process are slower.
load "$off" --clients 2 --duration-s 2

echo "| load | batching | images/s | completed | rejected | p50, s | p99, s | rows per step |"
echo "|---|---|---|---|---|---|---|---|"
load "$on" --clients 8 --duration-s "$closed_s"
row "8 clients" on
capacity=$(number images_per_second)
load "$off" --clients 8 --duration-s "$closed_s"
row "8 clients" off
for times in 0.5 1 2; do
    rate=$(awk "BEGIN { printf \"%.3f\", $times * $capacity }")
    load "$on" --rate "$rate" --duration-s "$open_s"
    row "$times x ($rate/s)" on
    load "$off" --rate "$rate" --duration-s "$open_s"
    row "$times x ($rate/s)" off
done
