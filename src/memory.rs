//! The machine's memory: free and used memory, and whether a forecast fits.

mod cgroup;
#[cfg(feature = "cuda")]
pub(crate) mod gpu;

use candle_core::Device;

use crate::error::{Error, Kind, Result};

/// The number of kB in a line of a file of Linux's /proc, as bytes.
fn proc_bytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

/// Lets glibc keep freed memory for the next allocations: every layer needs as much as the one
/// before, and getting it from the system each time takes a third of the time of a prompt. With
/// `apart` threads may have arenas of their own, as those that make training samples for a GPU.
#[cfg_attr(not(all(target_os = "linux", target_env = "gnu")), allow(unused_variables))]
pub fn keep(apart: bool) {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// More threads than this wait for each other at one arena.
        const FEW: usize = 4;
        const MB: libc::c_int = 1 << 20;
        let many = std::thread::available_parallelism().is_ok_and(|threads| threads.get() > FEW);
        // One arena: what one thread frees another may have.
        let arenas = (!apart || !many).then_some((libc::M_ARENA_MAX, 1));
        let sizes = [(libc::M_MMAP_THRESHOLD, 256 * MB), (libc::M_TRIM_THRESHOLD, 512 * MB)];
        for (setting, value) in arenas.into_iter().chain(sizes) {
            // SAFETY: it takes numbers, any of them, and refuses those that it does not like.
            #[allow(unsafe_code)]
            unsafe {
                libc::mallopt(setting, value);
            }
        }
    }
}

/// Returns freed memory to the system, as the next allocations have other sizes.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes a number, and touches free memory only.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The most memory that was taken so far, in bytes: by this process, unknown but on Linux, or of a
/// GPU by its tensors.
pub fn peak(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => proc_bytes("/proc/self/status", "VmHWM"),
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => gpu::peak(gpu),
        _ => None,
    }
}

/// Bytes that are free or can be freed, of the machine or of the container's limit; known on Linux
/// only.
fn available() -> Option<u64> {
    [proc_bytes("/proc/meminfo", "MemAvailable"), cgroup::left()].into_iter().flatten().min()
}

/// Bytes of a device's memory that are free, or can be; as far as that is known.
pub fn free(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => available(),
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => gpu::free(gpu),
        _ => None,
    }
}

/// Checks that a device has `needed` bytes of memory, as far as that is known.
///
/// Errors: [`Kind::Memory`], with `hint`.
pub fn check(needed: u64, device: &Device, hint: &str) -> Result<()> {
    match free(device) {
        Some(available) if available < needed => {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            let message = format!("{:.1} GB of memory are needed, {:.1} GB are free", gb(needed), gb(available));
            Err(Error::new(Kind::Memory, message).hint(hint))
        }
        _ => Ok(()),
    }
}
