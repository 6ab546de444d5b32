//! With the feature `cuda`: compiles our kernels to PTX for compute capability 7.5 and 8.0, which the
//! driver compiles for that capability and every later one; and to cubins for the capabilities in
//! `SD_CUDA_ARCHITECTURES`, separated as `CMAKE_CUDA_ARCHITECTURES` is: `75;80;86;89;90`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// The files of `src/ops/cuda`.
const KERNELS: [&str; 6] = ["attention", "combine", "elements", "layout", "norm", "product"];
/// What the kernels are written for.
const PTX: [u32; 2] = [75, 80];

fn main() {
    println!("cargo::rerun-if-changed=src/ops/cuda");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "SD_CUDA_ARCHITECTURES"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let (nvcc, cubins) = (nvcc(), architectures());
    // A file of kernels takes as long as the rest of the crate: all of them at once.
    let items: Vec<String> = thread::scope(|scope| {
        let (nvcc, cubins, out) = (&nvcc, &cubins, &out);
        let running = KERNELS.map(|kernels| scope.spawn(|| compile(nvcc, kernels, cubins, out)));
        running.map(|thread| thread.join().expect("nvcc has said why")).into()
    });
    let names = KERNELS.map(|kernels| format!("&{}", kernels.to_uppercase()));
    let all =
        format!("static KERNEL_FILES: [&KernelFile; {}] = [{}];", names.len(), names.join(", "));
    fs::write(out.join("kernels.rs"), items.concat() + &all).expect("OUT_DIR can be written to");
}

/// The item of `kernels.rs` that holds all images of a file of kernels.
fn compile(nvcc: &Path, kernels: &str, cubins: &[u32], out: &Path) -> String {
    let source = Path::new("src/ops/cuda").join(kernels).with_extension("cu");
    let image = |kind: &str, target: &str, capability: u32| {
        let image = out.join(format!("{kernels}_{capability}.{kind}"));
        let mut command = Command::new(nvcc);
        command.args([&format!("-{kind}"), "-std=c++17", "-O3"]);
        command.arg(format!("-arch={target}_{capability}")).arg("-o").args([&image, &source]);
        run(&mut command);
        image.display().to_string()
    };
    let ptx = |of| format!("({of}, include_str!({:?}))", image("ptx", "compute", of));
    let cubin = |of: &u32| format!("({of}, include_bytes!({:?}))", image("cubin", "sm", *of));
    format!(
        "pub(super) static {}: KernelFile = KernelFile::new({kernels:?}, &[{}], &[{}]);\n",
        kernels.to_uppercase(),
        PTX.map(ptx).join(", "),
        cubins.iter().map(cubin).collect::<Vec<_>>().join(", "),
    )
}

/// The capabilities to compile cubins for, ascending; default: none.
fn architectures() -> Vec<u32> {
    let asked = env::var("SD_CUDA_ARCHITECTURES").unwrap_or_default();
    let read = |part: &str| match part.trim().parse() {
        Ok(capability) if capability >= PTX[0] => capability,
        _ => panic!(
            "SD_CUDA_ARCHITECTURES: {part:?} is not a compute capability of at least {}, as in \
             75;80;86;89;90",
            PTX[0]
        ),
    };
    let mut asked: Vec<u32> =
        asked.split(';').filter(|part| !part.trim().is_empty()).map(read).collect();
    asked.sort_unstable();
    asked.dedup();
    asked
}

fn run(command: &mut Command) {
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{command:?}: {status}"),
        Err(error) => panic!(
            "the feature cuda needs the CUDA toolkit's nvcc, and {} cannot be run: {error}; set \
             NVCC, CUDA_HOME or PATH",
            Path::new(command.get_program()).display()
        ),
    }
}

/// `NVCC`, else that of the toolkit in `CUDA_HOME` or `CUDA_PATH`, else the one on the path.
fn nvcc() -> PathBuf {
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let installed =
        toolkits.map(|root| Path::new(&root).join("bin/nvcc")).find(|nvcc| nvcc.exists());
    env::var_os("NVCC").map(PathBuf::from).or(installed).unwrap_or_else(|| "nvcc".into())
}
