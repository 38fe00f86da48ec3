//! Mutated inputs for every reader of files from strangers.
//!
//! `cargo bench --bench fuzz -- TARGET|all [--minutes N] [--seed N] [--dir FOLDER]`
//!
//! A worker process mutates known inputs of its target, and those of their mutants that were read
//! without an error, and reads each. It is a fault if a reader panics, dies of a signal, takes more
//! processor time than [`MAX_TIME`] or allocates more than [`MAX_MEMORY`]. Inputs that were at
//! fault stay in FOLDER; the parent starts the next worker after one that died. Prints one JSON
//! object a target.

mod mutate;
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use mutate::Mutator;
use targets::Target;

/// The most processor time that one input may take.
const MAX_TIME: Duration = Duration::from_secs(2);
/// The most that one input may have allocated at a time, in bytes: twice the limit of decoded
/// images.
const MAX_MEMORY: usize = 512 << 20;
/// Where a worker gives up on an input, by the clock: others may have the processors.
const HUNG: Duration = Duration::from_secs(120);
const EXHAUSTED: usize = 3 << 30;
/// Mutants kept beside the known inputs, to be mutated further.
const POOL: usize = 256;

/// Counts what the process has allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[allow(unsafe_code)]
// SAFETY: every call goes to the system's allocator unchanged; the counters are atomic.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        if live > EXHAUSTED {
            std::process::abort();
        }
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a worker, or all workers of a target, have done.
#[derive(Default, Serialize, Deserialize)]
struct Counts {
    target: String,
    inputs: u64,
    read: u64,
    panics: u64,
    slow: u64,
    large: u64,
    deaths: u64,
    seconds: f64,
    processor_seconds: f64,
}

struct Args {
    targets: Vec<Target>,
    worker: bool,
    minutes: f64,
    seed: u64,
    dir: PathBuf,
}

fn args() -> Result<Args, String> {
    let dir = std::env::temp_dir().join("nextflow-fuzz");
    let mut parsed = Args { targets: Vec::new(), worker: false, minutes: 1.0, seed: 0, dir };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            // cargo adds it.
            "--bench" => {}
            "--worker" => parsed.worker = true,
            "--minutes" => parsed.minutes = value()?.parse().map_err(|e| format!("--minutes: {e}"))?,
            "--seed" => parsed.seed = value()?.parse().map_err(|e| format!("--seed: {e}"))?,
            "--dir" => parsed.dir = value()?.into(),
            "all" => parsed.targets = Target::ALL.to_vec(),
            name => parsed.targets.push(Target::named(name)?),
        }
    }
    Ok(parsed)
}

// The counts are the results.
#[allow(clippy::print_stdout)]
fn main() -> ExitCode {
    let run = || -> Result<bool, String> {
        let args = args()?;
        if args.targets.is_empty() {
            eprintln!("cargo bench --bench fuzz -- {}|all [--minutes N]", Target::names().join("|"));
        }
        if args.worker {
            work(&args).map_err(|e| e.to_string())?;
            return Ok(true);
        }
        let mut sound = true;
        for &target in &args.targets {
            let counts = supervise(&args, target).map_err(|e| e.to_string())?;
            println!("{}", serde_json::to_string(&counts).map_err(|e| e.to_string())?);
            sound &= counts.panics + counts.slow + counts.large + counts.deaths == 0;
        }
        Ok(sound)
    };
    match run() {
        Ok(sound) => ExitCode::from(u8::from(!sound)),
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

/// Runs workers of a target until its time is over, and adds up what they did.
fn supervise(args: &Args, target: Target) -> std::io::Result<Counts> {
    let dir = args.dir.join(target.name());
    std::fs::create_dir_all(&dir)?;
    let (start, time) = (Instant::now(), Duration::from_secs_f64(args.minutes * 60.0));
    let mut total = Counts { target: target.name().into(), ..Counts::default() };
    for round in 0u64.. {
        let left = time.saturating_sub(start.elapsed());
        if left.is_zero() {
            break;
        }
        let report = dir.join("report.json");
        let _ = std::fs::remove_file(&report);
        let minutes = (left.as_secs_f64() / 60.0).to_string();
        let seed = args.seed.wrapping_add(round << 32).to_string();
        let status = Command::new(std::env::current_exe()?)
            .args([target.name(), "--worker", "--minutes", &minutes, "--seed", &seed, "--dir"])
            .arg(&args.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        let counts = std::fs::read(&report).ok().and_then(|bytes| serde_json::from_slice::<Counts>(&bytes).ok());
        let counts = counts.unwrap_or_default();
        total.inputs += counts.inputs;
        total.read += counts.read;
        total.panics += counts.panics;
        total.slow += counts.slow;
        total.large += counts.large;
        total.processor_seconds += counts.processor_seconds;
        if !status.success() {
            total.deaths += 1;
            keep(&dir, "death", total.deaths, &status.to_string());
        }
    }
    total.seconds = start.elapsed().as_secs_f64();
    Ok(total)
}

/// Keeps the present input of a worker as an example of a fault.
fn keep(dir: &Path, fault: &str, number: u64, what: &str) {
    const MOST: u64 = 50;
    if number <= MOST {
        let _ = std::fs::copy(dir.join("input"), dir.join(format!("{fault}-{number}")));
        let _ = std::fs::write(dir.join(format!("{fault}-{number}.txt")), what);
    }
}

/// Time that all threads of this process have run.
#[allow(unsafe_code)]
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Reads mutants until the time is over.
fn work(args: &Args) -> std::io::Result<()> {
    static BEGUN: AtomicU64 = AtomicU64::new(0);
    static BUSY: AtomicBool = AtomicBool::new(false);
    let target = args.targets[0];
    let dir = args.dir.join(target.name());
    let reader = target.reader(&dir)?;
    let known = target.inputs();
    let mut pool = known.clone();
    let mut mutator = Mutator::new(args.seed);
    let mut counts = Counts { target: target.name().into(), ..Counts::default() };
    let start = Instant::now();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let begun = Duration::from_nanos(BEGUN.load(Relaxed));
            if BUSY.load(Relaxed) && start.elapsed().saturating_sub(begun) > HUNG {
                std::process::abort();
            }
        }
    });
    while start.elapsed().as_secs_f64() < args.minutes * 60.0 {
        let input = target.mutant(&mut mutator, &pool);
        std::fs::write(dir.join("input"), &input)?;
        let (before, begun) = (LIVE.load(Relaxed), processor_time());
        PEAK.store(before, Relaxed);
        BEGUN.store(start.elapsed().as_nanos() as u64, Relaxed);
        BUSY.store(true, Relaxed);
        let read = catch_unwind(AssertUnwindSafe(|| reader.read(&input)));
        BUSY.store(false, Relaxed);
        let (took, peak) = (processor_time().saturating_sub(begun), PEAK.load(Relaxed).saturating_sub(before));
        counts.inputs += 1;
        if read.is_err() {
            counts.panics += 1;
            keep(&dir, "panic", counts.panics, "");
        }
        if took > MAX_TIME {
            counts.slow += 1;
            keep(&dir, "slow", counts.slow, &format!("{took:?}"));
        }
        if peak > MAX_MEMORY {
            counts.large += 1;
            keep(&dir, "large", counts.large, &format!("{} MB", peak >> 20));
        }
        if matches!(read, Ok(true)) {
            counts.read += 1;
            if input.len() <= 1 << 16 {
                match pool.len() < known.len() + POOL {
                    true => pool.push(input),
                    false => pool[known.len() + mutator.below(POOL)] = input,
                }
            }
        }
        counts.processor_seconds = processor_time().as_secs_f64();
        if counts.inputs.is_multiple_of(64) {
            std::fs::write(dir.join("report.json"), serde_json::to_vec(&counts)?)?;
        }
    }
    std::fs::write(dir.join("report.json"), serde_json::to_vec(&counts)?)
}
