//! Files and prompts that would take memory or time without bound: each is refused in a sentence,
//! quickly.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// What a run came to.
struct Run {
    code: i32,
    out: String,
    err: String,
    /// The most memory that it had, in bytes.
    peak: u64,
}

/// Runs the program in a folder with `input` on standard input.
// `wait4` waits for it, and says what memory it took.
#[allow(clippy::zombie_processes)]
fn nextflow(folder: &Path, args: &[&str], input: &[u8]) -> Run {
    let file = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    };
    let (input, mut out, mut err) = (file(input), file(b""), file(b""));
    let mut command = common::command(folder, args);
    command.stdin(input).stdout(Stdio::from(out.try_clone().unwrap())).stderr(Stdio::from(err.try_clone().unwrap()));
    let child = command.spawn().unwrap();
    let mut status = 0;
    // SAFETY: the child is ours and nothing else waits for it; zeros are a valid rusage.
    #[allow(unsafe_code)]
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::wait4(child.id() as i32, &mut status, 0, &mut usage), child.id() as i32);
        usage
    };
    assert!(libc::WIFEXITED(status), "{args:?}: status {status:#x}");
    let read = |file: &mut fs::File| {
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    };
    let (out, err) = (read(&mut out), read(&mut err));
    Run { code: libc::WEXITSTATUS(status), out, err, peak: usage.ru_maxrss as u64 * 1024 }
}

const MB: u64 = 1_000_000;

/// Refused with this exit code, by one sentence that has `part` in it, and a hint, within some
/// memory.
fn refused(folder: &Path, args: &[&str], input: &[u8], code: i32, part: &str, most: u64) {
    let Run { code: got, err, peak, .. } = nextflow(folder, args, input);
    assert_eq!(got, code, "{args:?}: {err}");
    assert!(err.starts_with("error: ") && err.contains(part) && err.contains("hint: "), "{args:?}: {err}");
    assert!(err.lines().count() == 2 && err.len() < 1000 && !err.contains("panicked"), "{args:?}: {err}");
    assert!(peak < most, "{args:?}: {peak} bytes");
}

/// A copy of a model of the tree with another text tokenizer.
fn model(folder: &Path, of: &Path, name: &str, tokenizer: &[u8]) -> String {
    let copy = tempfile::Builder::new().disable_cleanup(true).tempdir_in(folder).unwrap();
    for file in fs::read_dir(of).unwrap() {
        let file = file.unwrap();
        if file.file_name() != "tokenizer.json" {
            symlink(file.path(), copy.path().join(file.file_name())).unwrap();
        }
    }
    fs::write(copy.path().join(name), tokenizer).unwrap();
    copy.path().display().to_string()
}

/// nano's tokenizer, or that of the tiny Qwen2.5-VL, with some parts replaced; `a.b` names `b` of
/// `a`.
fn tokenizer(of: &Path, changes: &Value) -> Vec<u8> {
    let mut file: Value = serde_json::from_slice(&fs::read(of.join("tokenizer.json")).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        *file.pointer_mut(&format!("/{}", key.replace('.', "/"))).unwrap() = value.clone();
    }
    file.to_string().into_bytes()
}

#[test]
fn tokenizers_are_refused_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let (nano, tiny) = (data("../../assets/nano"), data("qwen/tiny"));
    let mut cases: Vec<Value> = Vec::new();
    for file in fs::read_dir(data("hostile/tokenizer")).unwrap() {
        cases.push(serde_json::from_slice(&fs::read(file.unwrap().path()).unwrap()).unwrap());
    }
    assert_eq!(cases.len(), 7);
    // A table whose trie leads outside of itself: the library panics at the text.
    cases.push(serde_json::json!({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////9hAA=="}}));
    for changes in cases {
        let folder = model(dir.path(), &nano, "tokenizer.json", &tokenizer(&nano, &changes));
        let args = ["gen", "--model", &folder, "-p", "a cat", "-o", "x.png"];
        refused(dir.path(), &args, b"", 3, "cannot be used", 200 * MB);
        let folder = model(dir.path(), &tiny, "tokenizer.json", &tokenizer(&tiny, &changes));
        refused(
            dir.path(),
            &["chat", "--model", &folder, "--max-tokens", "20", "hi a"],
            b"",
            3,
            "cannot be used",
            200 * MB,
        );
    }
    assert!(!dir.path().join("x.png").exists());
}

/// A field of bytes of a protocol buffer.
fn field(id: u8, data: &[u8]) -> Vec<u8> {
    assert!(data.len() < 128);
    [&[id << 3 | 2, data.len() as u8], data].concat()
}

#[test]
fn a_sentencepiece_model_of_a_million_merges_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // Every word of up to 16 letters a and b.
    let mut file = Vec::new();
    for (length, bits) in (1..17).flat_map(|length| (0..1 << length).map(move |bits: u32| (length, bits))) {
        let word: Vec<u8> = (0..length).map(|i| b'a' + (bits >> i & 1) as u8).collect();
        let score = (-(length as f32)).to_le_bytes();
        file.extend(field(1, &[field(1, &word), [&[0x15], &score[..], b"\x18\x01"].concat()].concat()));
    }
    file.extend([field(2, b"\x18\x02"), field(3, b"\x18\x01\x20\x00")].concat());
    let folder = model(dir.path(), &data("../../assets/nano"), "tokenizer.model", &file);
    for args in [&["info", &folder][..], &["gen", "--model", &folder, "-p", "a", "--dry-run"]] {
        refused(dir.path(), args, b"", 3, "more than 524288 merges", 200 * MB);
    }
}

#[test]
fn tokens_of_prompts_are_counted_before_weights_load() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    // Every one of them becomes 18 letters.
    let long = "\u{fdfa}".repeat(1000);
    fs::write(here.join("prompts.txt"), format!("a cat\n{long}\n")).unwrap();
    let jobs = format!(
        "{{\"prompt\": \"a cat\"}}\n{{\"prompt\": \"{long}\"}}\n{{\"prompt\": \"a\", \"negative\": \"{long}\"}}\n"
    );
    fs::write(here.join("jobs.jsonl"), jobs).unwrap();
    image::RgbImage::new(64, 64).save(here.join("a.png")).unwrap();
    let refused = |args: &[&str], input: &[u8], part: &str| {
        refused(here, args, input, 2, part, 100 * MB);
        refused(here, &[args, &["--dry-run"]].concat(), input, 2, "tokens, the limit is 8192", 100 * MB);
    };
    refused(&["gen", "-", "-o", "-"], long.as_bytes(), "error: the prompt has 33001 tokens, the limit is 8192");
    refused(&["gen", &long], b"", "error: the prompt has");
    refused(&["gen", "a cat", "-n", &long], b"", "negative: the prompt has");
    refused(&["gen", "--think", &long], b"", "error: the prompt has");
    refused(&["gen", "--prompt-file", "prompts.txt"], b"", "error: prompt 2 of 2: the prompt has");
    refused(&["gen", "--jsonl", "jobs.jsonl", "--out-dir", "out"], b"", "error: line 2 of jobs.jsonl: the prompt has");
    refused(&["edit", "-i", "a.png", &long], b"", "error: the prompt has");
    // A conversation is limited by the model's context.
    let message = "\u{fdfa}".repeat(1100);
    for args in [&["chat", &message][..], &["chat", &message, "--dry-run"]] {
        self::refused(here, args, b"", 2, "tokens, the model's limit is 32768", 100 * MB);
    }
}

#[test]
fn forecasts_count_the_tokens_of_the_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let forecast = |args: &[&str]| {
        let Run { code, out, err, .. } = nextflow(dir.path(), &[args, &["--dry-run", "--json"]].concat(), b"");
        assert_eq!(code, 0, "{err}");
        serde_json::from_str::<Value>(&out).unwrap()["memory"]["cache"].as_u64().unwrap()
    };
    // 22,000 bytes once they are normalised, and 8,192 tokens at most.
    let long = "\u{fdfa}".repeat(240);
    let short = forecast(&["gen", "a cat"]);
    assert!(forecast(&["gen", &long]) > 10 * short);
    fs::write(dir.path().join("jobs.jsonl"), format!("{{\"prompt\": \"{long}\"}}\n")).unwrap();
    assert_eq!(forecast(&["gen", "--jsonl", "jobs.jsonl", "--out-dir", "out"]), forecast(&["gen", &long]));
    let tiny = data("qwen/tiny").display().to_string();
    let chat = |most: &str| forecast(&["chat", "--model", &tiny, "--max-tokens", most, "hi"]);
    assert_eq!(chat("4000000000"), chat("4096"));
    assert!(chat("4096") > chat("2048"));
}

/// A PyTorch archive of a pickle.
fn archive(path: &Path, pickle: &[u8]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("x/data.pkl", pickle), ("x/data/0", &[0; 8])] {
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

#[test]
fn pickles_take_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.pt");
    let flood = |start: &[u8], part: &[u8], bytes: usize| [start, &part.repeat(bytes / part.len()), b"."].concat();
    // Just as much as is read, and far too much.
    for bytes in [1_000_000, 10 << 20] {
        for (start, part) in [
            (&b"\x80\x02"[..], &b")"[..]),
            (b"\x80\x02)", b"\x85"),
            (b"\x80\x02", b"]"),
            (b"\x80\x02", b"}"),
            (b"\x80\x02", b"}NNs"),
            (b"\x80\x02", b"(NNNt"),
            (b"\x80\x02}", b"NNs"),
            (b"\x80\x02N", b"2"),
            (b"\x80\x02N", b"\x94"),
            (b"\x80\x02", b"X\x01\0\0\0a\x94"),
            (b"\x80\x02", b"ca\nb\n)R"),
        ] {
            archive(&file, &flood(start, part, bytes));
            refused(dir.path(), &["info", "x.pt"], b"", 3, "x.pt h", 100 * MB);
        }
    }
    archive(&file, &[0; 60_000_000]);
    refused(dir.path(), &["info", "x.pt"], b"", 3, "more than 16777216", 100 * MB);
}

#[test]
fn pixels_take_what_the_limit_says() {
    let dir = tempfile::tempdir().unwrap();
    let image = data("hostile/palette-8192-with-transparency.png").display().to_string();
    let Run { code, err, peak, .. } = nextflow(dir.path(), &["encode", &image], b"");
    assert_eq!(code, 0, "{err}");
    assert!(peak < 400 * MB, "{peak} bytes");
    let three = ["edit", "-i", &image, "-i", &image, "-i", &image, "make it red", "-o", "x.png"];
    refused(dir.path(), &three, b"", 2, "after others that take 192 of 256 MB", 400 * MB);
}
