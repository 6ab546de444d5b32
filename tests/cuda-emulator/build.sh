#!/usr/bin/env bash
# Builds the emulator. In lib/ it has the names that loaders ask for; lib/link/ is what programs are
# linked with: empty libraries with the names of NVIDIA's, so that a program finds these on a machine
# that has them, and the emulator where LD_LIBRARY_PATH says so.
#     EMUCUDA_OUT     the folder of the libraries (lib)
#     EMUCUDA_TARGET  cargo's target directory (target)
#     EMUCUDA_CPU     the processor to compile for (native; x86-64-v3 to run elsewhere)
#     CUDA_HOME       a toolkit, whose version the libraries get, and whose libnvrtc, if there is one
set -euo pipefail
cd "$(dirname "$0")"
out=${EMUCUDA_OUT:-$PWD/lib} target=${EMUCUDA_TARGET:-$PWD/target}
RUSTFLAGS="-C target-cpu=${EMUCUDA_CPU:-native}" \
    cargo build --release --locked --target-dir "$target"
mkdir -p "$out/link"
# A program that runs keeps the library that it has loaded.
cp "$target/release/libemucuda.so" "$out/libcuda.so.new"
mv "$out/libcuda.so.new" "$out/libcuda.so.1"
for name in libcublas.so.1{2,3} libcublasLt.so.1{2,3} libcudart.so.1{2,3} libcurand.so.10 \
    libnvidia-ml.so.1; do
    ln -sf libcuda.so.1 "$out/$name"
done

header=${CUDA_HOME:-/nonexistent}/include/cuda.h
major=$(sed -n 's/^#define CUDA_VERSION \([0-9]*\)[0-9]\{3\}.*/\1/p' "$header" 2>/dev/null)
major=${major:-13}
# shellcheck disable=SC2046 # a word each
stub() { # file, soname, name
    printf 'void %s(void) {}\n' $(cat "stubs/$1.txt") |
        cc -shared -x c -w - -Wl,-soname,"$2" -o "$out/link/lib$3.so"
}
stub driver libcuda.so.1 cuda
stub cublas "libcublas.so.$major" cublas
stub cublaslt "libcublasLt.so.$major" cublasLt
stub curand libcurand.so.10 curand
stub cudart "libcudart.so.$major" cudart
stub nvrtc "libnvrtc.so.$major" nvrtc

# Without a toolkit's nvrtc one that compiles nothing.
found=
for library in "${CUDA_HOME:-/nonexistent}"/lib{,64}/libnvrtc{,-builtins}.so.[0-9]*; do
    if [ -e "$library" ]; then
        ln -sf "$library" "$out/"
        found=yes
    fi
done
if [ -z "$found" ]; then
    # shellcheck disable=SC2046 # a word each
    printf 'int %s(void) { return 11; }\n' $(cat stubs/nvrtc.txt) |
        cc -shared -x c - -Wl,-soname,"libnvrtc.so.$major" -o "$out/libnvrtc.so.$major"
fi
