//! No number of a config.json makes the program allocate, wrap or panic: every one of them is set
//! to values that no model has, and shapes are compared with the headers of the weights before
//! anything of that size is made.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use candle_core::Device;
use nextflow::chat::{ChatConfig, ChatModel};
use nextflow::checkpoint::Source;
use nextflow::generate::cost::{self, Work};
use nextflow::generate::{Model, ModelConfig, Size, tokenflow};
use serde_json::{Value, json};

/// The system's allocator, which counts.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is left to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// More than any check may take: bytes, and seconds on a busy machine.
const MOST_BYTES: usize = 64 << 20;
const MOST_SECONDS: f64 = 10.0;

fn values() -> Vec<Value> {
    let numbers = [0, 1, 1 << 20, 1 << 24, 1 << 31, 1 << 53, 1 << 63, u64::MAX].map(Value::from);
    let others = [json!(-1), json!(-1e300), json!(0.5), json!(1e300), Value::Null, json!("x"), json!([]), json!({})];
    numbers.into_iter().chain(others).collect()
}

/// JSON pointers of all numbers.
fn numbers(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(at.into()),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| numbers(v, &format!("{at}/{i}"), found)),
        Value::Object(fields) => fields.iter().for_each(|(k, v)| numbers(v, &format!("{at}/{k}"), found)),
        _ => {}
    }
}

/// Runs `check` on `file` of a folder with every number in turn set to every value.
fn walk(folder: &Path, file: &str, config: &Value, check: impl Fn(&Source)) {
    let (mut pointers, source) = (Vec::new(), Source::Folder(folder.into()));
    numbers(config, "", &mut pointers);
    assert!(pointers.len() > 2, "{file}");
    for pointer in pointers {
        for value in values() {
            let mut changed = config.clone();
            *changed.pointer_mut(&pointer).unwrap() = value.clone();
            fs::write(folder.join(file), changed.to_string()).unwrap();
            drop(changed);
            let before = NOW.load(Relaxed);
            PEAK.store(before, Relaxed);
            let started = Instant::now();
            let run = catch_unwind(AssertUnwindSafe(|| check(&source)));
            assert!(run.is_ok(), "{file}{pointer} = {value} panics");
            let (bytes, seconds) = (PEAK.load(Relaxed).saturating_sub(before), started.elapsed().as_secs_f64());
            assert!(bytes < MOST_BYTES, "{file}{pointer} = {value} takes {} MB", bytes >> 20);
            assert!(seconds < MOST_SECONDS, "{file}{pointer} = {value} takes {seconds:.1} s");
        }
    }
    fs::write(folder.join(file), config.to_string()).unwrap();
}

/// What `info`, `chat --dry-run` and `chat` do before a tensor is read.
fn chat(source: &Source) {
    let Ok(config) = ChatConfig::read(source) else { return };
    let _ = config.compare(source);
    let _ = ChatModel::check(source, &config);
    let _ = config.image_tokens((640, 480));
    let _ = config.memory(Some(source), None, 1000, Some((16, 16)), &Device::Cpu);
}

/// What `info`, `gen --dry-run` and `gen` do before a tensor is read.
fn draw(source: &Source) {
    let Ok(config) = ModelConfig::read(source) else { return };
    let _ = config.compare(source);
    let _ = Model::check(source, &config);
    for size in [Size::Auto, Size::Ratio(0.5), Size::Pixels { width: 128, height: 128 }] {
        let Ok(scales) = size.grids(&config) else { continue };
        let _ = config.pixels(&scales);
        let work = Work { scales: &scales, images: 8, text_tokens: 1000, sampling: &config.sampling, prompts: 1 };
        let _ = cost::memory(&config, source, None, work, &Device::Cpu);
    }
    chat(source);
}

fn folder(from: &[PathBuf]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for folder in from {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            fs::write(dir.path().join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
    }
    dir
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

// One test: the counts are of the whole process.
#[test]
fn no_number_of_a_config_is_taken_on_trust() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let qwen = root.join("tests/data/qwen");
    let tiny = folder(&[qwen.join("tiny")]);
    for file in ["config.json", "generation_config.json", "preprocessor_config.json"] {
        walk(tiny.path(), file, &json_of(&qwen.join("tiny").join(file)), chat);
    }
    walk(tiny.path(), "config.json", &json_of(&qwen.join("saved/5.24-plain.json")), chat);
    let yarn = json!({"type": "yarn", "mrope_section": [2, 3, 3], "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 1024, "attention_factor": 1.1, "mscale": 1.0, "mscale_all_dim": 1.0});
    let mut config = json_of(&qwen.join("tiny/config.json"));
    config["rope_scaling"] = yarn;
    walk(tiny.path(), "config.json", &config, chat);
    let processor = json!({"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 60000},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1.0 / 255.0, "patch_size": 14}});
    walk(tiny.path(), "processor_config.json", &processor, chat);

    let nano = folder(&[root.join("assets/nano")]);
    walk(nano.path(), "config.json", &json_of(&root.join("assets/nano/config.json")), draw);

    // TokenFlow-t2i at full size, beside weights without a tensor.
    let large = folder(&[]);
    for file in ["model.safetensors", "image_tokenizer.safetensors"] {
        fs::write(large.path().join(file), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    }
    fs::write(large.path().join("tokenizer.json"), fs::read(qwen.join("tiny/tokenizer.json")).unwrap()).unwrap();
    walk(large.path(), "config.json", &serde_json::to_value(tokenflow::config()).unwrap(), draw);
}
