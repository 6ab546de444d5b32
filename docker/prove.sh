#!/usr/bin/env bash
# Builds the cpu image and runs it as a container, without a Docker engine, a registry or a rootless
# daemon:
#
#     docker/prove.sh build DIRECTORY   # the image sd-server:cpu, in a store in DIRECTORY
#     docker/prove.sh run DIRECTORY     # checks it, and writes DIRECTORY/picture.png
#
# Needs root, buildah, debootstrap, curl, and the Rust toolchain of rust-toolchain.toml. The two
# base images are built from Debian's packages under their official names; the toolchain is the
# host's, bind-mounted. Everything is written to DIRECTORY.
set -euo pipefail
cd "$(dirname "$0")/.."

action=${1:?usage: prove.sh build|run DIRECTORY}
mkdir -p "${2:?usage: prove.sh build|run DIRECTORY}"
work=$(realpath "$2")
export TMPDIR=$work
store=(--storage-driver vfs --root "$work/store" --runroot "$work/run")
rust=docker.io/library/rust:$(sed -n 's/^ARG RUST_VERSION=//p' docker/Dockerfile)-slim-bookworm
distroless=$(sed -n 's/^ARG RUNTIME=//p' docker/Dockerfile)

# import NAME DIRECTORY [CONFIG...]: a base image from a root file system.
import() {
    buildah "${store[@]}" inspect --type image "$1" >/dev/null 2>&1 && return
    local container
    container=$(buildah "${store[@]}" from scratch)
    buildah "${store[@]}" add --quiet "$container" "$2" / >/dev/null
    buildah "${store[@]}" config "${@:3}" "$container"
    buildah "${store[@]}" commit --quiet --rm "$container" "$1" >/dev/null
}

debian() {
    [[ -e $work/debian/.whole ]] && return
    debootstrap --variant=minbase --include=ca-certificates,gcc,libc6-dev bookworm "$work/debian"
    touch "$work/debian/.whole"
}

# The packages of distroless/base-nossl, unpacked without their maintainer scripts.
base() {
    [[ -e $work/base ]] && return
    local packages=(base-files netbase tzdata ca-certificates libc6)
    rm -rf "$work/base.new"
    mkdir "$work/base.new"
    chroot "$work/debian" sh -c \
        "cd /var/tmp && apt-get update --quiet=2 && apt-get download --quiet=2 ${packages[*]}"
    for package in "$work"/debian/var/tmp/*.deb; do dpkg-deb --extract "$package" "$work/base.new"; done
    rm -rf "$work"/debian/var/tmp/*.deb "$work"/base.new/usr/share/{doc,man,locale,lintian}
    cat "$work"/base.new/usr/share/ca-certificates/mozilla/*.crt >"$work/ca-certificates.crt"
    install -D --mode=644 "$work/ca-certificates.crt" "$work/base.new/etc/ssl/certs/ca-certificates.crt"
    echo "root:x:0:0:root:/root:/sbin/nologin" >"$work/base.new/etc/passwd"
    mv "$work/base.new" "$work/base"
}

build() {
    debian
    base
    local sysroot
    sysroot=$(rustc --print sysroot)
    import "$rust" "$work/debian" --env RUSTUP_HOME=/usr/local/rustup \
        --env CARGO_HOME=/usr/local/cargo --env PATH=/usr/local/rustup/bin:/usr/bin:/bin
    import "$distroless" "$work/base" --env PATH=/usr/bin:/bin --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
    buildah "${store[@]}" build --format docker --isolation chroot --pull=never --layers \
        --volume "$sysroot:/usr/local/rustup:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro \
        --file docker/Dockerfile --ignorefile docker/Dockerfile.dockerignore \
        --target cpu --tag sd-server:cpu .
    buildah "${store[@]}" images
}

# contained USER COMMAND...: the image's binary as process 1 on a read-only root, without a
# network, as SageMaker and `docker run --read-only --network none --user USER` start it.
contained() {
    # shellcheck disable=SC2016
    unshare --mount --net --pid --fork --kill-child sh -euc '
        root=$1 user=$2; shift 2
        ip link set lo up
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        mount -o remount,bind,ro "$root"
        exec chroot --userspec="$user" "$root" "$@"
    ' sh "$root" "$@"
}

# check USER: ready, healthy, an image, nothing written, a shutdown in time.
check() {
    local began pid='' code
    contained "$1" /usr/local/bin/sd-server serve --model demo --device cpu 2>"$work/log" &
    job=$!
    trap 'kill -KILL $(pgrep --parent "$job") 2>/dev/null || true' EXIT
    for _ in $(seq 600); do
        # The subshell's child is unshare, whose child is process 1 of the container.
        pid=$(pgrep --parent "$(pgrep --parent "$job")" 2>/dev/null || true)
        [[ -n $pid ]] && inside "$pid" --fail http://127.0.0.1:8080/ping 2>/dev/null && break
        sleep 0.2
    done
    inside "$pid" --fail http://127.0.0.1:8080/ping
    nsenter --target "$pid" --net chroot "$root" /usr/local/bin/sd-server healthcheck
    inside "$pid" --fail -d "a photo of an astronaut riding a horse on mars" \
        --output "$work/picture.png" http://127.0.0.1:8080/invocations
    [[ $(head --bytes 4 "$work/picture.png" | tail --bytes 3) == PNG ]]
    inside "$pid" --max-time 5 http://1.1.1.1/ 2>/dev/null && { echo "the container has a network"; exit 1; }
    began=$SECONDS
    kill -TERM "$pid"
    code=0
    wait "$job" || code=$?
    [[ $code == 0 && $((SECONDS - began)) -lt 30 ]] || { cat "$work/log"; echo "exited with $code"; exit 1; }
    echo "as $1: ready, healthy, generated an image, exited $((SECONDS - began)) s after SIGTERM"
}

inside() {
    nsenter --target "$1" --net curl --silent --show-error "${@:2}"
}

run() {
    local container binary files
    container=$(buildah "${store[@]}" from --pull=never sd-server:cpu)
    root=$(buildah "${store[@]}" mount "$container")
    mkdir -p "$root/proc"
    find "$root" -xdev -type f -newer docker/prove.sh -print >"$work/before" || true
    check 0:0
    check 1234:1234
    find "$root" -xdev -type f -newer docker/prove.sh -print | diff "$work/before" - ||
        { echo "the container wrote to its root"; exit 1; }
    files=$(du --apparent-size --block-size=1M --summarize "$root" | cut -f1)
    binary=$(du --apparent-size --block-size=1M "$root/usr/local/bin/sd-server" | cut -f1)
    echo "the image holds $files MB, of which the binary is $binary MB"
    buildah "${store[@]}" rm "$container" >/dev/null
}

"$action"
