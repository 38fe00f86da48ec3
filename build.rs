//! Compiles the CUDA kernels to PTX with `--features cuda`; other builds need nothing of it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// PTX for this architecture runs on it and on all later ones: the driver compiles it for the GPU that is there.
const ANY: &str = "compute_80";
/// With the instructions of Hopper, which no other GPU has.
const HOPPER: &str = "compute_90a";
const KERNELS: [(&str, &str); 8] = [
    ("attention", ANY),
    ("attention_hopper", HOPPER),
    ("blocks", ANY),
    ("conv", ANY),
    ("conv_hopper", HOPPER),
    ("sample", ANY),
    ("step", ANY),
    ("training", ANY),
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
        let ptx = out.join(kernel).with_extension("ptx");
        let mut command = Command::new(&nvcc);
        command.args(["--ptx", "-O3", "-std=c++17", "-arch", architecture, "-o"]).arg(&ptx).arg(&source);
        match command.status() {
            Ok(status) if status.success() => {}
            Ok(status) => panic!("{} failed on {}: {status}", nvcc.display(), source.display()),
            Err(error) => panic!("{}: {error}. Install the CUDA toolkit, or set CUDA_HOME to it", nvcc.display()),
        }
    }
}

/// The compiler: as told, of the toolkit that is told, where toolkits usually are, or on the path.
fn nvcc() -> PathBuf {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let told = homes
        .chain(["/usr/local/cuda".into()])
        .map(|home| Path::new(&home).join("bin/nvcc"))
        .find(|nvcc| nvcc.exists());
    told.unwrap_or_else(|| "nvcc".into())
}
