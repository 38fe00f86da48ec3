//! `--refine` with the embedded model: twice the size, the same bytes, stored and replayed.
#![cfg(feature = "nano")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use image::RgbImage;
use nextflow::generate::png_info::PngInfo;

fn command(folder: &Path, args: &[&str]) -> Command {
    common::command(folder, args)
}

#[track_caller]
fn ok(folder: &Path, args: &[&str]) -> Output {
    let output = command(folder, args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Fails with the exit code of a usage error, a message that contains `message` and a hint.
#[track_caller]
fn refused(folder: &Path, args: &[&str], message: &str) {
    let output = command(folder, args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).to_string();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    assert!(said.contains(message), "{args:?}: {said}");
    assert!(said.contains("hint:") || said.contains("--help"), "{args:?}: {said}");
}

fn open(path: &Path) -> RgbImage {
    image::open(path).unwrap().to_rgb8()
}

fn info(path: &Path) -> PngInfo {
    PngInfo::of_png(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_refined_image_is_twice_as_large_and_keeps_what_it_shows() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    ok(here, &["gen", "a red circle", "--seed", "1", "--refine=2", "-o", "refined.png"]);
    ok(here, &["gen", "a red circle", "--seed", "1", "--no-refine", "-o", "plain.png"]);
    let (refined, plain) = (open(&here.join("refined.png")), open(&here.join("plain.png")));
    assert_eq!((refined.dimensions(), plain.dimensions()), ((256, 256), (128, 128)));
    let small = nextflow::pixels::resize(&refined, (128, 128), nextflow::pixels::ResamplingFilter::Box);
    let error = small.iter().zip(plain.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>();
    assert!(error / (small.len() as f64) < 12.0, "another picture: {error}");
    assert_ne!(small, plain);
    for (size, pixels) in [("2:1", (384, 192)), ("512x128", (512, 128))] {
        ok(here, &["gen", "a blue star", "--seed", "1", "--refine=1", "--size", size, "--force", "-o", "wide.png"]);
        assert_eq!(open(&here.join("wide.png")).dimensions(), pixels, "{size}");
    }
}

#[test]
fn the_bytes_are_the_same_alone_in_a_batch_and_on_any_threads() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let gen_with = |threads: &str, args: &[&str]| {
        let args = [&["gen", "a cat", "--refine=2", "-q"], args].concat();
        assert!(command(here, &args).env("RAYON_NUM_THREADS", threads).output().unwrap().status.success());
    };
    gen_with("1", &["--seed", "4", "-o", "one.png"]);
    gen_with("2", &["--seed", "4", "-o", "two.png"]);
    gen_with("2", &["--seed", "3,4", "--batch", "2", "--out-dir", "batch"]);
    let bytes = |name: &str| fs::read(here.join(name)).unwrap();
    assert!(bytes("one.png") == bytes("two.png"));
    // A batch may round sums in another order: to one grey level.
    let (alone, batch) = (open(&here.join("one.png")), open(&here.join("batch/a-cat-4.png")));
    assert!(alone.iter().zip(batch.iter()).all(|(a, b)| a.abs_diff(*b) <= 1));
}

#[test]
fn steps_are_stored_replayed_and_set_by_jobs() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    ok(here, &["gen", "a sun", "--seed", "2", "--refine=3", "-o", "a.png"]);
    assert_eq!((info(&here.join("a.png")).refine, info(&here.join("a.png")).size.as_str()), (Some(3), "256x256"));
    ok(here, &["gen", "--from", "a.png", "-o", "again.png"]);
    assert_eq!(fs::read(here.join("a.png")).unwrap(), fs::read(here.join("again.png")).unwrap());
    ok(here, &["gen", "--from", "a.png", "--no-refine", "-o", "plain.png"]);
    assert_eq!((info(&here.join("plain.png")).refine, open(&here.join("plain.png")).dimensions()), (None, (128, 128)));

    let lines = [
        r#"{"prompt": "a sun", "seed": 2, "out": "b.png", "refine": 3}"#,
        r#"{"prompt": "a sun", "seed": 2, "out": "c.png", "refine": false}"#,
        r#"{"prompt": "a sun", "seed": 2, "out": "d.png", "refine": true}"#,
    ];
    fs::write(here.join("jobs.jsonl"), lines.join("\n")).unwrap();
    ok(here, &["gen", "--jsonl", "jobs.jsonl", "-q"]);
    assert!(open(&here.join("b.png")) == open(&here.join("a.png")));
    assert!(open(&here.join("c.png")) == open(&here.join("plain.png")));
    assert!(info(&here.join("d.png")).refine.is_some_and(|steps| steps > 0));
    fs::write(here.join("bad.jsonl"), r#"{"prompt": "a sun", "refine": 1000000000}"#).unwrap();
    refused(here, &["gen", "--jsonl", "bad.jsonl"], "steps from 1 to 100");
}

#[test]
fn codes_are_refined_as_what_was_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    ok(here, &["gen", "a red apple", "--seed", "1", "--no-refine", "-o", "a.png"]);
    ok(here, &["encode", "a.png", "-o", "a.json"]);
    let decode = |args: &[&str], out: &str| {
        ok(here, &[&["decode", "a.json", "-o", out], args].concat());
        open(&here.join(out))
    };
    let refined = decode(&["--refine=2", "--caption", "a red apple"], "b.png");
    assert_eq!(refined.dimensions(), (256, 256));
    assert_eq!(decode(&[], "c.png").dimensions(), (128, 128));
    assert!(decode(&["--refine=2", "--caption", "a red apple", "--seed", "1"], "d.png") != refined);
    assert!(decode(&["--refine=2", "--scales", "3"], "e.png") != refined);
    refused(here, &["decode", "a.json", "-o", "f.png", "--refine=0"], "steps from 1 to 100");
    refused(here, &["decode", "a.json", "-o", "f.png", "--caption", "x"], "--refine");
    assert!(!here.join("f.png").exists());
}

#[test]
fn an_edit_is_refined_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    ok(here, &["gen", "a red circle", "--seed", "1", "--no-refine", "--size", "2:1", "-o", "a.png"]);
    ok(here, &["edit", "-i", "a.png", "make it blue", "--seed", "1", "-o", "b.png"]);
    assert_eq!((open(&here.join("b.png")).dimensions(), info(&here.join("b.png")).refine), ((192, 96), None));
    ok(here, &["edit", "-i", "a.png", "make it blue", "--seed", "1", "--refine=2", "-o", "c.png"]);
    assert_eq!((open(&here.join("c.png")).dimensions(), info(&here.join("c.png")).refine), ((384, 192), Some(2)));
}

#[test]
fn what_cannot_be_refined_is_refused_before_anything_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for (value, message) in [
        ("--refine=0", "steps from 1 to 100"),
        ("--refine=1000000000", "steps from 1 to 100"),
        ("--refine=-1", "--refine"),
        ("--refine=NaN", "--refine"),
        ("--refine=", "--refine"),
    ] {
        refused(here, &["gen", "x", value, "-o", "x.png"], message);
    }
    refused(here, &["gen", "x", "--refine", "--no-refine", "-o", "x.png"], "cannot be used with");
    refused(here, &["gen", "x", "--think", "--refine", "-o", "x.png"], "cannot be used with");
    refused(here, &["gen", "x", "--refine", "--size", "128x128", "--dry-run"], "cannot draw 128x128");
    let plan = ok(here, &["gen", "x", "--refine", "--dry-run"]);
    let plan = String::from_utf8(plan.stdout).unwrap();
    assert!(plan.contains("256x256") && plan.contains("refiner "), "{plan}");
    assert_eq!(fs::read_dir(here).unwrap().count(), 0);

    // A model folder whose refiner is missing, damaged or another tokenizer's.
    ok(here, &["quantize", "--type", "f32", "-o", "model"]);
    let gen_with = ["gen", "x", "--model", "model", "--refine", "-o", "x.png"];
    ok(here, &["gen", "a cat", "--model", "model", "--refine=1", "-o", "cat.png"]);
    let file = here.join("model/refiner.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let code = |args: &[&str]| command(here, args).output().unwrap().status.code();
    assert_eq!(code(&gen_with), Some(3));
    fs::remove_file(&file).unwrap();
    assert_eq!(code(&gen_with), Some(3));
    assert_eq!(code(&["gen", "x", "--model", "model", "--refine", "--dry-run"]), Some(3));
    // Without it the model draws all the same.
    ok(here, &["gen", "a cat", "--model", "model", "--no-refine", "-o", "plain.png"]);
    ok(here, &["info", "model"]);
    let config = here.join("model/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replacen("\"semantic_dim\": 128", "\"semantic_dim\": 64", 1)).unwrap();
    assert_eq!(code(&gen_with), Some(3));
    assert!(!here.join("x.png").exists());
}
