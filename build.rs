//! Compiles the CUDA kernels to PTX with `--features cuda`; other builds do nothing here.

use std::path::{Path, PathBuf};
use std::process::Command;

/// PTX for this architecture runs on all later ones, too: the driver compiles it for the GPU.
const ANY: &str = "compute_80";
/// With the instructions of Hopper, which no other GPU has.
const HOPPER: &str = "compute_90a";
const KERNELS: [(&str, &str); 8] = [
    ("bf16/attention", ANY),
    ("bf16/attention_hopper", HOPPER),
    ("bf16/conv", ANY),
    ("bf16/conv_hopper", HOPPER),
    ("bf16/elementwise", ANY),
    ("bf16/quants", ANY),
    ("bf16/sample", ANY),
    ("f32/f32", ANY),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/ops/cuda");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = nvcc();
    for (kernel, architecture) in KERNELS {
        let source = Path::new("src/ops/cuda").join(kernel).with_extension("cu");
        let ptx = out.join(source.file_name().expect("a file")).with_extension("ptx");
        let mut command = Command::new(&nvcc);
        command.args(["--ptx", "-O3", "-std=c++17", "-arch", architecture, "-o"]).arg(&ptx).arg(&source);
        match command.status() {
            Ok(status) if status.success() => {}
            Ok(status) => panic!("{} failed on {}: {status}", nvcc.display(), source.display()),
            Err(error) => panic!("{}: {error}. Install the CUDA toolkit, or set CUDA_HOME to it", nvcc.display()),
        }
    }
}

/// `NVCC`, or the compiler of the toolkit at `CUDA_HOME` or `CUDA_PATH`, in the usual folder, or on
/// the path.
fn nvcc() -> PathBuf {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let found = homes
        .chain(["/usr/local/cuda".into()])
        .map(|home| Path::new(&home).join("bin/nvcc"))
        .find(|nvcc| nvcc.exists());
    found.unwrap_or_else(|| "nvcc".into())
}
