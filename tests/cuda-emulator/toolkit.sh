#!/usr/bin/env bash
# Makes a CUDA 13.0 toolkit (nvcc, headers, nvrtc) of PyPI's wheels in a folder, and prints its
# CUDA_HOME. About 1.2 GB.
#     export CUDA_HOME=$(./toolkit.sh DIRECTORY)
set -euo pipefail
directory=${1:?usage: toolkit.sh DIRECTORY}
[ -x "$directory/bin/pip" ] || python3 -m venv "$directory"
v='==13.0.*'
"$directory/bin/pip" install --quiet --disable-pip-version-check \
    "nvidia-cuda-nvcc$v" "nvidia-cuda-runtime$v" "nvidia-cuda-cccl$v" "nvidia-cuda-crt$v" \
    "nvidia-nvvm$v" "nvidia-cuda-nvrtc$v" nvidia-cublas nvidia-curand >&2
echo "$directory"/lib/python3.*/site-packages/nvidia/cu13
