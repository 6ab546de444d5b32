#!/usr/bin/env bash
# Builds the emulator and puts it under the names that linkers and loaders ask for.
#     EMUCUDA_OUT     the folder of the libraries (lib)
#     EMUCUDA_TARGET  cargo's target directory (target)
#     EMUCUDA_CPU     the processor to compile for (native; x86-64-v3 to run elsewhere)
#     CUDA_HOME       a toolkit whose libnvrtc is linked in too, if there is one
set -euo pipefail
cd "$(dirname "$0")"
out=${EMUCUDA_OUT:-$PWD/lib} target=${EMUCUDA_TARGET:-$PWD/target}
RUSTFLAGS="-C target-cpu=${EMUCUDA_CPU:-native}" \
    cargo build --release --locked --target-dir "$target"
mkdir -p "$out"
# A program that runs keeps the library that it has loaded.
cp "$target/release/libemucuda.so" "$out/libcuda.so.new"
mv "$out/libcuda.so.new" "$out/libcuda.so.1"
for name in libcuda.so libcublas.so{,.12,.13} libcublasLt.so{,.12,.13} libcurand.so{,.10} \
    libcudart.so{,.12,.13}; do
    ln -sf libcuda.so.1 "$out/$name"
done
for library in "${CUDA_HOME:-/nonexistent}"/lib{,64}/libnvrtc{,-builtins}.so.[0-9]*; do
    if [ -e "$library" ]; then ln -sf "$library" "$out/"; fi
done
# Without a toolkit's: one that links and compiles nothing.
if ! compgen -G "$out/libnvrtc.so.[0-9]*" >/dev/null; then
    # shellcheck disable=SC2046 # one word a function
    printf 'int %s(void) { return 11; }\n' $(cat stubs/nvrtc.txt) |
        cc -shared -x c - -Wl,-soname,libnvrtc.so.13 -o "$out/libnvrtc.so.13"
fi
nvrtc=$(cd "$out" && compgen -G 'libnvrtc.so.[0-9]*' | head -n 1)
ln -sf "$nvrtc" "$out/libnvrtc.so"
