//! With the feature `cuda`: compiles our kernels to PTX, for compute capability 7.5 and 8.0.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src/ops/cuda");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = nvcc();
    for kernels in ["attention", "layout", "norm", "product"] {
        for capability in ["75", "80"] {
            let source = Path::new("src/ops/cuda").join(kernels).with_extension("cu");
            let ptx = out.join(format!("{kernels}_{capability}.ptx"));
            let done = Command::new(&nvcc)
                .args(["-ptx", "-std=c++17", "-O3", &format!("-arch=compute_{capability}"), "-o"])
                .args([&ptx, &source])
                .status();
            match done {
                Ok(status) if status.success() => {}
                Ok(status) => panic!("{} on {}: {status}", nvcc.display(), source.display()),
                Err(error) => panic!(
                    "the feature cuda needs the CUDA toolkit's nvcc, and {} cannot be run: {error}; \
                     set NVCC, CUDA_HOME or PATH",
                    nvcc.display()
                ),
            }
        }
    }
}

/// `NVCC`, else that of the toolkit in `CUDA_HOME` or `CUDA_PATH`, else the one on the path.
fn nvcc() -> PathBuf {
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let installed =
        toolkits.map(|root| Path::new(&root).join("bin/nvcc")).find(|nvcc| nvcc.exists());
    env::var_os("NVCC").map(PathBuf::from).or(installed).unwrap_or_else(|| "nvcc".into())
}
