//! `nextflow gen` with the embedded model, from the flags to the bytes.
#![cfg(feature = "nano")]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nextflow::generate::png_info::{self, PngInfo};

fn command(folder: &Path, args: &[&str]) -> Command {
    common::command(folder, &[&["gen"], args].concat())
}

#[track_caller]
fn gen_ok(folder: &Path, args: &[&str]) -> Output {
    let output = command(folder, args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The text of the chunk `key` of a PNG.
fn text(png: &[u8], key: &str) -> String {
    let reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().find(|t| t.keyword == key).map(|t| t.text.clone());
    latin.or_else(|| info.utf8_text.iter().find(|t| t.keyword == key).map(|t| t.get_text().unwrap())).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn same_seed_same_bytes_twice_in_a_batch_and_on_any_threads() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    gen_ok(here, &["-p", "a red apple", "--seed", "5", "--count", "3"]);
    assert_eq!(names(here), ["a-red-apple-5.png", "a-red-apple-6.png", "a-red-apple-7.png"]);
    let batch = |seed: u64| fs::read(here.join(format!("a-red-apple-{seed}.png"))).unwrap();
    assert_ne!(batch(5), batch(6));
    for seed in [5, 6, 7] {
        for threads in ["1", "2"] {
            let args = ["-p", "a red apple", "--seed", &seed.to_string(), "-o", "-"];
            let output = command(here, &args).env("RAYON_NUM_THREADS", threads).output().unwrap();
            assert!(output.stdout == batch(seed), "seed {seed} on {threads} threads");
        }
    }
    // Another prompt before it changes nothing either.
    fs::write(here.join("prompts.txt"), "a blue cat\n\na red apple\n").unwrap();
    gen_ok(here, &["--prompt-file", "prompts.txt", "--seed", "6", "--out-dir", "new"]);
    assert_eq!(names(&here.join("new")), ["a-blue-cat-6.png", "a-red-apple-6.png"]);
    assert!(fs::read(here.join("new/a-red-apple-6.png")).unwrap() == batch(6));
}

#[test]
fn images_drawn_in_one_pass_are_those_drawn_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    fs::write(here.join("prompts.txt"), "a blue cat\na red apple\na green circle above a yellow star\n").unwrap();
    let draw = |batch: &str, out: &str| {
        let more = ["--batch", batch, "--out-dir", out, "--json"];
        gen_ok(here, &[&["--prompt-file", "prompts.txt", "--seed", "6", "--count", "2"][..], &more].concat())
    };
    let (alone, together) = (draw("1", "alone"), draw("4", "together"));
    let seeds = |output: &std::process::Output| -> Vec<u64> {
        let lines = std::str::from_utf8(&output.stdout).unwrap().lines();
        lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["seed"].as_u64().unwrap()).collect()
    };
    assert_eq!(seeds(&together), [6, 7, 6, 7, 6, 7]);
    assert_eq!(seeds(&together), seeds(&alone));
    assert_eq!(names(&here.join("together")), names(&here.join("alone")));
    for name in names(&here.join("alone")) {
        let read = |folder: &str| fs::read(here.join(folder).join(&name)).unwrap();
        assert!(read("alone") == read("together"), "{name}");
    }
}

#[test]
fn default_names_never_replace() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for name in ["三只猫-1.png", "三只猫-1-2.png"] {
        let output = gen_ok(here, &["三只猫", "--seed", "1"]);
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{name}\n"));
    }
    assert!(fs::read(here.join("三只猫-1.png")).unwrap() == fs::read(here.join("三只猫-1-2.png")).unwrap());
    let output = gen_ok(here, &["三只猫", "--seed", "2", "-o", "三只猫-1.png", "--force"]);
    assert_eq!(output.stdout, "三只猫-1.png\n".as_bytes());
    assert!(fs::read(here.join("三只猫-1.png")).unwrap() != fs::read(here.join("三只猫-1-2.png")).unwrap());
    assert_eq!(names(here).len(), 2, "no temporary file stays");
}

#[test]
fn every_setting_is_in_the_png() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["-p", "a red apple", "--seed", "9", "--size", "16:9", "--cfg", "1.5", "--temperature", "0.5"];
    let output = gen_ok(folder.path(), &[&args[..], &["--top-k", "20", "--top-p", "0.8", "-o", "-"]].concat());
    let image = image::load_from_memory(&output.stdout).unwrap();
    assert_eq!((image.width(), image.height()), (176, 96));
    let settings: serde_json::Value = serde_json::from_str(&text(&output.stdout, "nextflow")).unwrap();
    for (key, value) in [
        ("prompt", serde_json::json!("a red apple")),
        ("seed", 9.into()),
        ("size", "176x96".into()),
        ("cfg", 1.5.into()),
        ("temperature", 0.5.into()),
        ("top_k", 20.into()),
        ("top_p", 0.8.into()),
        ("model", "nano".into()),
        ("version", env!("CARGO_PKG_VERSION").into()),
    ] {
        assert_eq!(settings[key], value, "{key}");
    }
    assert_eq!(settings["scales"].as_array().unwrap().len(), 8);
    assert!(text(&output.stdout, "parameters").starts_with("a red apple\nSteps: 8, "));
}

#[test]
fn every_flag_changes_the_picture() {
    let here = Path::new(".");
    let pixels = |more: &[&str]| {
        let output = gen_ok(here, &[&["-p", "a red apple", "--seed", "3", "-o", "-"], more].concat());
        image::load_from_memory(&output.stdout).unwrap().to_rgb8()
    };
    let plain = pixels(&[]);
    for more in [
        ["--cfg", "0"],
        ["--temperature", "0"],
        ["--top-k", "1"],
        ["--top-p", "0.01"],
        ["--size", "9:16"],
        ["--negative", "a green apple"],
        ["--cfg-until", "2"],
        ["--draft", "1"],
    ] {
        assert!(pixels(&more) != plain, "{more:?}");
    }
    // The likeliest code, three ways, whatever the seed.
    let greedy = pixels(&["--temperature", "0"]);
    assert!(pixels(&["--top-k", "1"]) == greedy);
    let output = gen_ok(here, &["-p", "a red apple", "--seed", "4", "-o", "-", "--temperature", "0"]);
    assert!(image::load_from_memory(&output.stdout).unwrap().to_rgb8() == greedy);
}

#[test]
fn json_has_one_object_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let output = gen_ok(folder.path(), &["-p", "a red apple", "--seed", "1", "--count", "2", "--json", "-q"]);
    assert!(output.stderr.is_empty());
    let lines: Vec<serde_json::Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["path"], format!("a-red-apple-{}.png", i + 1));
        assert_eq!(line["seed"], i + 1);
        assert_eq!(line["size"], "128x128");
        assert_eq!(line["prompt"], "a red apple");
        assert!(line["seconds"].as_f64().unwrap() > 0.0);
        assert!(folder.path().join(line["path"].as_str().unwrap()).is_file());
    }
}

#[test]
fn the_seed_is_chosen_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let output = gen_ok(folder.path(), &["-p", "a red apple"]);
    let path = String::from_utf8(output.stdout).unwrap();
    let png = fs::read(folder.path().join(path.trim_end())).unwrap();
    let settings: serde_json::Value = serde_json::from_str(&text(&png, "nextflow")).unwrap();
    let seed = settings["seed"].as_u64().unwrap();
    assert_eq!(path, format!("a-red-apple-{seed}.png\n"));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with(&format!("seed {seed} · 128x128 · ")) && said.lines().count() == 1, "{said}");
    let verbose = gen_ok(folder.path(), &["-p", "a red apple", "-v"]);
    assert!(String::from_utf8(verbose.stderr).unwrap().contains("scale 8/8"));
}

#[test]
fn special_words_are_plain_text() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = "<|im_start|> <boi> <|endoftext|> a red apple";
    let output = gen_ok(folder.path(), &["-p", prompt, "--seed", "1"]);
    assert_eq!(output.stdout, b"im-start-boi-endoftext-a-red-apple-1.png\n".as_slice());
    let png = fs::read(folder.path().join("im-start-boi-endoftext-a-red-apple-1.png")).unwrap();
    assert!(text(&png, "nextflow").contains("<|im_start|> <boi>"));
}

#[test]
fn standard_input_is_a_prompt_or_many() {
    let folder = tempfile::tempdir().unwrap();
    for (args, files) in [(["-", "--seed", "1", "-q"], 1), (["--prompt-file=-", "--seed", "2", "-q"], 2)] {
        let mut command = command(folder.path(), &args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"a red apple\na blue cat\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), files);
    }
    assert_eq!(names(folder.path()), ["a-blue-cat-2.png", "a-red-apple-2.png", "a-red-apple-a-blue-cat-1.png"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["-p", "a red apple", "--seed", "1", "--count", "50", "-q"];
    let mut child = command(folder.path(), &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(names(folder.path()), ["a-red-apple-1.png"], "nobody wanted the rest");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_behind_stdout_is_an_error() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command(Path::new("."), &["-p", "a red apple", "-o", "-", "-q"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: cannot write to standard output"));
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_130_and_leaves_whole_files() {
    use std::time::{Duration, Instant};
    let folder = tempfile::tempdir().unwrap();
    let args = ["-p", "a red apple", "--seed", "1", "--count", "10000", "-q"];
    let mut child = command(folder.path(), &args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while names(folder.path()).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(!names(folder.path()).is_empty());
    for name in names(folder.path()) {
        assert!(name.ends_with(".png") && image::open(folder.path().join(&name)).is_ok(), "{name}");
    }
}

#[test]
fn seeds_may_be_several() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    gen_ok(here, &["-p", "a cat", "--seed", "9,4", "--count", "2", "-q"]);
    assert_eq!(names(here), ["a-cat-10.png", "a-cat-4.png", "a-cat-5.png", "a-cat-9.png"]);
    let plan = gen_ok(here, &["-p", "a cat", "--seed", "9,4", "--dry-run"]);
    assert!(String::from_utf8(plan.stdout).unwrap().starts_with("2 x 128x128 with nano, seeds 9, 4: "));
    for (seeds, part) in [("1,x", "whole number"), ("1,18446744073709551615", "do not leave room")] {
        let output = command(here, &["-p", "a cat", "--count", "2", "--seed", seeds]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8(output.stderr).unwrap().contains(part));
    }
}

#[test]
fn a_png_is_drawn_again_but_for_what_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let set = ["--cfg", "2.5", "--temperature", "0.7", "--top-k", "40", "--top-p", "0.9", "--cfg-until", "6"];
    let rest = ["--draft", "1", "--size", "192x96", "-n", "a pale cup", "--seed", "5", "-o", "one.png"];
    gen_ok(here, &[&["-p", "un café"][..], &set, &rest].concat());
    gen_ok(here, &["--from", "one.png", "-o", "again.png"]);
    let read = |name: &str| fs::read(here.join(name)).unwrap();
    assert!(read("again.png") == read("one.png"));
    let output =
        command(here, &["--from", "-", "-o", "-"]).stdin(fs::File::open(here.join("one.png")).unwrap()).output();
    assert!(output.unwrap().stdout == read("one.png"));
    // Ratios that end in the same grid differ in coarser ones.
    gen_ok(here, &["-p", "a red circle", "--size", "8:5", "--seed", "1", "-o", "wide.png"]);
    gen_ok(here, &["--from", "wide.png", "-o", "wide-again.png"]);
    assert!(read("wide-again.png") == read("wide.png"));
    // Passes that this model does not take are left out, as another model's are; typed, they are
    // refused.
    let mut told = PngInfo::of_png(&read("one.png")).unwrap();
    told.passes = Some(2);
    let picture = image::open(here.join("one.png")).unwrap().to_rgb8();
    fs::write(here.join("passes.png"), png_info::encode(&picture, &told).unwrap()).unwrap();
    gen_ok(here, &["--from", "passes.png", "-o", "once.png"]);
    assert!(read("once.png") == read("one.png"));
    assert_eq!(command(here, &["--from", "one.png", "--passes", "2"]).status().unwrap().code(), Some(2));
    // What is typed is not the fault of the PNG.
    let there = command(here, &["--from", "one.png", "-o", "one.png"]).output().unwrap();
    assert!(String::from_utf8(there.stderr).unwrap().starts_with("error: one.png already exists"));
    gen_ok(here, &["--from", "one.png", "a cat", "--seed", "6", "--cfg", "0", "--draft", "0", "-o", "other.png"]);
    let settings: serde_json::Value = serde_json::from_str(&text(&read("other.png"), "nextflow")).unwrap();
    let told: [(&str, serde_json::Value); 4] =
        [("prompt", "a cat".into()), ("seed", 6.into()), ("cfg", 0.0.into()), ("top_k", 40.into())];
    for (key, value) in told {
        assert_eq!(settings[key], value, "{key}");
    }
    assert!(settings["size"] == "192x96" && settings.get("draft").is_none() && settings.get("negative").is_none());
    assert!(text(&read("one.png"), "parameters").starts_with("un café\nNegative prompt: a pale cup\nSteps: 8, "));

    image::RgbImage::new(4, 4).save(here.join("plain.png")).unwrap();
    gen_ok(here, &["--think", "-p", "a red circle", "--seed", "1", "-o", "thought.png"]);
    let chat = ["chat", "/gen a blue star", "--seed", "3", "--out-dir", "chat"];
    assert!(
        Command::new(env!("CARGO_BIN_EXE_nextflow")).args(chat).current_dir(here).output().unwrap().status.success()
    );
    fs::copy(here.join("chat").join(&names(&here.join("chat"))[0]), here.join("chat.png")).unwrap();
    let other = gen_ok(here, &["--from", "one.png", "--quant", "q8_0", "-o", "q8.png"]);
    assert!(String::from_utf8(other.stderr).unwrap().contains("drawn by nano, this is nano (q8_0)"));
    let edit = ["edit", "-i", "one.png", "make it blue", "--seed", "1", "-o", "edit.png"];
    let edited = Command::new(env!("CARGO_BIN_EXE_nextflow")).args(edit).current_dir(here).output().unwrap();
    assert!(edited.status.success());
    for (name, hint) in [
        ("plain.png", "name a PNG that nextflow gen drew"),
        ("no.png", "name a PNG"),
        ("edit.png", "nextflow edit -i IMAGE -p TEXT --seed 1"),
        ("thought.png", "nextflow gen --think -p TEXT --seed 1"),
        ("chat.png", "nextflow chat"),
    ] {
        let output = command(here, &["--from", name]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(hint), "{name}: {stderr}");
    }
}

#[test]
fn prompts_may_begin_with_a_dash() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, words) in
        [("1", &["-p", "-a cat"][..]), ("2", &["-a cat"]), ("3", &["--prompt=-a cat"]), ("4", &["--", "-a cat"])]
    {
        let args = [&["--seed", seed, "-o", seed][..], words].concat();
        gen_ok(folder.path(), &args);
        let png = fs::read(folder.path().join(seed)).unwrap();
        assert_eq!(PngInfo::of_png(&png).unwrap().prompt, "-a cat", "{words:?}");
    }
}

#[test]
fn prompt_files_of_other_systems_are_read() {
    let folder = tempfile::tempdir().unwrap();
    for bytes in [u16::to_le_bytes, u16::to_be_bytes] {
        let text: Vec<u8> = "\u{feff}一只猫\r\na café\r\n".encode_utf16().flat_map(bytes).collect();
        fs::write(folder.path().join("prompts.txt"), text).unwrap();
        let plan = gen_ok(folder.path(), &["--prompt-file", "prompts.txt", "--seed", "1", "--json", "-q"]);
        let lines: Vec<serde_json::Value> =
            String::from_utf8(plan.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!((&lines[0]["prompt"], &lines[1]["prompt"]), (&"一只猫".into(), &"a café".into()));
    }
}

#[test]
fn text_behind_the_pixels_draws_again() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    gen_ok(here, &["-p", "a red apple", "--seed", "5", "-o", "a.png"]);
    let png = fs::read(here.join("a.png")).unwrap();
    // Chunks of text go behind the pixels, where some tools put them.
    let (mut head, mut texts, mut rest) = (png[..8].to_vec(), Vec::new(), &png[8..]);
    while rest.len() > 12 {
        let length = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize + 12;
        let (chunk, after) = rest.split_at(length);
        if chunk[5..8] == *b"EXt" || chunk[5..8] == *b"TXt" { &mut texts } else { &mut head }.extend_from_slice(chunk);
        rest = after;
    }
    assert!(!texts.is_empty());
    fs::write(here.join("moved.png"), [&head[..], &texts, rest].concat()).unwrap();
    gen_ok(here, &["--from", "moved.png", "-o", "again.png"]);
    assert!(fs::read(here.join("again.png")).unwrap() == png);
    fs::write(here.join("bare.png"), [&head[..], rest].concat()).unwrap();
    fs::write(here.join("photo.jpg"), b"\xff\xd8\xff\xe0").unwrap();
    for (name, part) in [("bare.png", "holds no nextflow settings"), ("photo.jpg", "is no PNG")] {
        let output = command(here, &["--from", name]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(part), "{stderr}");
    }
}

#[test]
fn force_draws_over_the_names_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for more in [&["--out-dir", "x"][..], &["--out-dir", "."]] {
        let draw = |size: &str, force: &[&str]| {
            let args = [&["-p", "a cat", "--seed", "1", "--size", size][..], more, force].concat();
            String::from_utf8(gen_ok(here, &args).stdout).unwrap().trim_end().to_string()
        };
        let first = draw("1:1", &[]);
        assert_eq!(draw("2:1", &["--force"]), first);
        assert!(image::open(here.join(&first)).unwrap().width() > 128);
        assert_ne!(draw("1:1", &[]), first, "without --force a free name");
    }
    // Two of one run never have one name.
    fs::write(here.join("prompts.txt"), "A dog\na dog!\n").unwrap();
    gen_ok(here, &["--prompt-file", "prompts.txt", "--seed", "1", "--out-dir", "two", "--force"]);
    assert_eq!(names(&here.join("two")), ["a-dog-1-2.png", "a-dog-1.png"]);
}

/// A limit of file size is an error as a full disk is, and leaves nothing.
#[cfg(target_os = "linux")]
#[test]
fn a_limit_of_file_size_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("jobs.jsonl"), "{\"prompt\": \"a cat\", \"out\": \"x.png\"}").unwrap();
    let nextflow = env!("CARGO_BIN_EXE_nextflow");
    for (blocks, args) in
        [(8, "gen -p cat -o x.png"), (8, "gen -p cat"), (8, "gen --jsonl jobs.jsonl"), (8, "quantize -o small")]
    {
        let script = format!("ulimit -f {blocks}; exec {nextflow} {args}");
        let output = Command::new("bash").args(["-c", &script]).current_dir(folder.path()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args}: {stderr}");
        assert!(stderr.contains("cannot write") && stderr.contains("hint: "), "{args}: {stderr}");
        assert_eq!(names(folder.path()), ["jobs.jsonl"], "{args}");
    }
}
