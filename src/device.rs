//! What computes: the value of `--device`.

use candle_core::Device;
use candle_core::utils::{cuda_is_available, metal_is_available};

use crate::error::{Error, Kind, Result};

/// `auto`, `cpu`, `cuda`, `cuda:N` or `metal`; `auto` is the first of CUDA, Metal and CPU that is
/// compiled in and works.
///
/// Errors: usage if the name is unknown, its backend is not compiled in, or there is no such
/// device.
pub fn parse(name: &str) -> Result<Device> {
    match name {
        // A variable that is set to nothing counts as one that is not set.
        "auto" | "" => Ok(auto()),
        "cpu" => Ok(Device::Cpu),
        "metal" if metal_is_available() => Device::new_metal(0).map_err(|e| absent(name, e)),
        "metal" => Err(not_compiled(name, "metal")),
        _ => {
            let number = if name == "cuda" { Some("0") } else { name.strip_prefix("cuda:") };
            let digits = number.filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
            match digits.and_then(|n| n.parse().ok()) {
                Some(ordinal) if cuda_is_available() => cuda(ordinal).map_err(|e| absent(name, e)),
                Some(_) => Err(not_compiled(name, "cuda")),
                None => {
                    let message = format!("--device {name} is none of auto, cpu, cuda, cuda:N and metal");
                    Err(Error::usage(message).hint("--device auto"))
                }
            }
        }
    }
}

fn auto() -> Device {
    let cuda = cuda_is_available().then(|| cuda(0).ok()).flatten();
    let metal = || metal_is_available().then(|| Device::new_metal(0).ok()).flatten();
    cuda.or_else(metal).unwrap_or(Device::Cpu)
}

/// A GPU with one stream, the same in every call, whose pool keeps freed memory.
///
/// Errors: no such GPU, one older than compute capability 8.0, for which candle has no bf16, and
/// one without room.
#[cfg(feature = "cuda")]
pub(crate) fn cuda(ordinal: usize) -> candle_core::Result<Device> {
    use std::collections::HashMap;
    use std::sync::{Mutex, PoisonError};
    static OPEN: Mutex<Option<HashMap<usize, Device>>> = Mutex::new(None);
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let open = open.get_or_insert_default();
    if let Some(device) = open.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = Device::new_cuda_with_stream(ordinal)?;
    if let Device::Cuda(gpu) = &device {
        use candle_core::cuda_backend::WrapErr;
        let (major, minor) = gpu.cuda_stream().context().compute_capability().w()?;
        if major < 8 {
            candle_core::bail!("its compute capability is {major}.{minor}, 8.0 is needed");
        }
        // SAFETY: nothing has to be tracked between streams where there is one.
        #[allow(unsafe_code)]
        unsafe {
            gpu.disable_event_tracking();
        }
        crate::memory::gpu::keep(gpu)?;
    }
    open.insert(ordinal, device.clone());
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn cuda(ordinal: usize) -> candle_core::Result<Device> {
    Device::new_cuda(ordinal)
}

fn not_compiled(name: &str, feature: &str) -> Error {
    Error::usage(format!("--device {name}: this build of nextflow has no {feature} in it"))
        .hint(format!("cargo build --release --features {feature}"))
}

fn absent(name: &str, error: candle_core::Error) -> Error {
    let message = format!("--device {name} cannot be used: {error}");
    match Error::from(error) {
        full if full.kind == Kind::Memory => full,
        other => Error { kind: Kind::Usage, message, ..other }.hint("--device auto"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_are_usage_errors_that_say_so() {
        for name in ["gpu", "CPU", "cuda:", "cuda:x", "cuda:+1", "cuda:-1", "cuda0", "cuda:99999999999999999999"] {
            let error = parse(name).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.message.contains(&format!("--device {name} is none of")), "{error}");
        }
    }

    #[test]
    fn backends_that_are_not_compiled_in_name_the_build_command() {
        for (name, feature, compiled) in [
            ("cuda", "cuda", cuda_is_available()),
            ("cuda:1", "cuda", cuda_is_available()),
            ("metal", "metal", metal_is_available()),
        ] {
            if !compiled {
                let error = parse(name).unwrap_err();
                assert_eq!(error.exit_code(), 2);
                assert!(error.message.contains(name));
                assert_eq!(error.hint, Some(format!("cargo build --release --features {feature}")));
            }
        }
    }

    #[test]
    fn a_cpu_is_always_there() {
        assert!(parse("cpu").unwrap().is_cpu());
        let auto = parse("auto").unwrap();
        assert!(auto.is_cpu() || cuda_is_available() || metal_is_available());
    }
}
