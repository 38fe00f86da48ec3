//! `nextflow edit`, `gen --think` and `nextflow chat` with the embedded model, from the flags to
//! the files.
#![cfg(feature = "nano")]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use image::{Rgb, RgbImage};
use serde_json::Value;

fn nextflow(folder: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut command = common::command(folder, args);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary");
    // A program that refuses its flags reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

#[track_caller]
fn works(folder: &Path, args: &[&str], input: &str) -> Vec<u8> {
    let output = nextflow(folder, args, input.as_bytes());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A red disc on white.
fn disc(path: &Path, (width, height): (u32, u32)) {
    let (x0, y0, r) = (width as f64 / 2.0, height as f64 / 2.0, width.min(height) as f64 * 0.28);
    let image = RgbImage::from_fn(width, height, |x, y| {
        let inside = (f64::from(x) - x0).hypot(f64::from(y) - y0) < r;
        Rgb(if inside { [220, 30, 35] } else { [255; 3] })
    });
    image.save(path).unwrap();
}

fn open(path: &Path) -> RgbImage {
    image::open(path).unwrap().to_rgb8()
}

#[test]
fn an_edit_is_drawn_named_and_repeatable() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    disc(&here.join("a.png"), (128, 128));
    let args = ["edit", "-i", "a.png", "-p", "make it blue", "--seed", "3"];
    let stdout = works(here, &[&args[..], &["-o", "b.png"]].concat(), "");
    assert_eq!(stdout, b"b.png\n");
    let (before, after) = (open(&here.join("a.png")), open(&here.join("b.png")));
    assert_eq!(after.dimensions(), (128, 128));
    assert!(before != after);
    // Alone, in a batch, and from standard input: the same bytes.
    works(here, &[&args[..], &["--count", "2"]].concat(), "");
    let bytes = fs::read(here.join("b.png")).unwrap();
    assert!(fs::read(here.join("make-it-blue-3.png")).unwrap() == bytes);
    assert!(fs::read(here.join("make-it-blue-4.png")).unwrap() != bytes);
    let piped = works(here, &["edit", "-i", "a.png", "-", "--seed", "3", "-o", "-"], "make it blue\n");
    assert!(piped == bytes);
    // An output is not overwritten.
    let again = nextflow(here, &[&args[..], &["-o", "b.png"]].concat(), b"");
    assert_eq!(again.status.code(), Some(2));
    assert!(fs::read(here.join("b.png")).unwrap() == bytes);
}

#[test]
fn the_result_has_the_ratio_of_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for (size, ratio) in [((300, 200), 1.5), ((64, 128), 0.5), ((1000, 1000), 1.0)] {
        disc(&here.join("a.png"), size);
        let args = ["edit", "-i", "a.png", "-p", "make it green", "--seed", "1", "-o", "b.png", "--force", "--json"];
        let line: Value = serde_json::from_slice(&works(here, &args, "")).unwrap();
        let (w, h) = open(&here.join("b.png")).dimensions();
        assert!((f64::from(w) / f64::from(h) / ratio - 1.0).abs() < 0.05, "{size:?} -> {w}x{h}");
        assert_eq!(line["size"], format!("{w}x{h}"));
        assert_eq!((&line["seed"], &line["prompt"]), (&1.into(), &"make it green".into()));
    }
    // A size that is asked for is the result's, whatever the image's is.
    disc(&here.join("a.png"), (160, 90));
    works(here, &["edit", "-i", "a.png", "-p", "make it green", "--size", "1:1", "-o", "c.png"], "");
    assert_eq!(open(&here.join("c.png")).dimensions(), (128, 128));
    // Several images, and a plan without weights.
    disc(&here.join("a.png"), (1000, 1000));
    let args = ["edit", "-i", "a.png", "-i", "a.png", "-p", "x", "--dry-run", "--json"];
    let plan: Value = serde_json::from_slice(&works(here, &args, "")).unwrap();
    assert_eq!((&plan["size"], &plan["codes"]), (&"128x128".into(), &204.into()));
}

#[test]
fn bad_input_is_refused_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    disc(&here.join("a.png"), (128, 128));
    fs::write(here.join("broken.png"), b"no image").unwrap();
    let whole = fs::read(here.join("a.png")).unwrap();
    fs::write(here.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(here.join("there.png"), b"mine").unwrap();
    fs::create_dir(here.join("folder")).unwrap();
    for (args, part) in [
        (&["-p", "x"][..], "--image"),
        (&["-i", "a.png"], "there is no prompt"),
        (&["-i", "a.png", "-p", ""], "empty"),
        (&["-i", "none.png", "-p", "x"], "none.png"),
        (&["-i", "folder", "-p", "x"], "is a folder, no image"),
        (&["-i", "broken.png", "-p", "x"], "broken.png"),
        (&["-i", "cut.png", "-p", "x"], "cut.png"),
        (&["-i", "a.png", "-i", "broken.png", "-p", "x"], "broken.png"),
        (&["-i", "a.png", "-p", "x", "-o", "there.png"], "there.png"),
        (&["-i", "a.png", "-p", "x", "--cfg", "NaN"], "cfg"),
        (&["-i", "a.png", "-p", "x", "--cfg-until", "9"], "8 scales"),
        (&["-i", "a.png", "-p", "x", "--cfg", "0", "--cfg-until", "3"], "guides nothing"),
        (&["-i", "a.png", "-p", "x", "--size", "1x1"], "1x1"),
    ] {
        let output = nextflow(here, &[&["edit"], args].concat(), b"");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(part) && stderr.contains("hint: "), "{args:?}: {stderr}");
    }
    assert_eq!(fs::read(here.join("there.png")).unwrap(), b"mine");
    assert_eq!(fs::read_dir(here).unwrap().count(), 5, "something was left over");
}

#[test]
fn a_conversation_draws_edits_and_looks() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    disc(&here.join("a.png"), (128, 128));
    let lines = [
        "/edit make it blue",
        "/gen a red circle",
        "/edit make it blue",
        "/edit $1 make it green",
        "/gen a yellow star",
        "/image a.png",
        "what colour is the circle? $1",
        "/regen",
        "$9 what is this?",
        "/seed x",
        "/save a.json",
        "/clear",
        "/load a.json",
        "/show",
    ];
    let output = nextflow(here, &["chat", "--seed", "1", "--json"], lines.join("\n").as_bytes());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 6, "{stdout}\n{stderr}");
    let image = |i: usize| open(&here.join(lines[i]["images"][0].as_str().unwrap()));
    assert!(image(0) != image(1) && image(1) != image(2));
    let seeds: Vec<u64> = lines[..4].iter().map(|line| line["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds, [1, 2, 3, 4]);
    // A new image has nothing to do with those before.
    let [r, g, b] = image(3).get_pixel(64, 64).0;
    assert!(r > 150 && g > 120 && b < 120, "{r} {g} {b} is not yellow");
    // An edit of an edit goes on from what is in the cache: the image, bar the sum of its codes and
    // what ends it.
    let number = |i: usize, key: &str| lines[i][key].as_u64().unwrap();
    assert!(number(1, "cached_tokens") >= number(0, "prompt_tokens") + 203, "{stdout}");
    for part in [
        "there is no image to edit yet",
        "$9 is not an image: there are ",
        "\"x\" is not a seed",
        // An image that is named is none that was not there.
        "you: [$1 a-red-circle-1.png]",
        "model: [$1 a-red-circle-1.png]",
        "you: [$5 a.png]",
    ] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
}

#[test]
fn thinking_comes_to_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let plan = works(here, &["gen", "--think", "-p", "a red circle", "--seed", "1", "--dry-run"], "");
    let plan = String::from_utf8(plan).unwrap();
    assert!(plan.starts_with("1 x 128x128 with nano, seed 1: ") && plan.contains("weights "), "{plan}");
    for (size, dimensions) in [("auto", (128, 128)), ("1:2", (96, 192))] {
        let args = ["gen", "--think", "-p", "a red circle", "--seed", "1", "--size", size, "--json"];
        let line: Value = serde_json::from_slice(&works(here, &args, "")).unwrap();
        assert!(line["thought"].as_str().unwrap().contains("the final prompt is: "), "{line}");
        let path = here.join(line["path"].as_str().unwrap());
        assert_eq!(open(&path).dimensions(), dimensions);
        // The image tells what was thought.
        let bytes = fs::read(path).unwrap();
        assert!(bytes.windows(20).any(|part| part == b"the final prompt is:"), "{line}");
    }
}

#[test]
fn one_command_is_a_conversation_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    disc(&here.join("a.png"), (128, 128));
    works(here, &["chat", "/exit"], "");
    // A conversation is found from elsewhere, and goes elsewhere with its images.
    ["one", "other"].iter().for_each(|name| fs::create_dir(here.join(name)).unwrap());
    let said = "/size 2:1\n/gen a red circle\n/edit make it blue\n/size auto\n/gen a star\n/save a.json";
    works(&here.join("one"), &["chat", "-q", "--seed", "1"], said);
    for (name, size) in [("a-red-circle-1", (192, 96)), ("make-it-blue-2", (192, 96)), ("a-star-3", (128, 128))] {
        assert_eq!(open(&here.join(format!("one/{name}.png"))).dimensions(), size, "{name}");
    }
    fs::rename(here.join("one"), here.join("two")).unwrap();
    works(&here.join("other"), &["chat", "-q"], "/load ../two/a.json");
    works(here, &["chat", "-i", "a.png", "/edit make it blue", "--seed", "1"], "");
    assert_eq!(open(&here.join("make-it-blue-1.png")).dimensions(), (128, 128));
    for (args, code, part) in [
        (&["chat", "/paint"][..], 2, "there is no command /paint"),
        (&["chat", "/size 1x1"], 2, "cannot draw 1x1"),
        (&["chat", "/size foo"], 2, "/size foo is not a size"),
        (&["chat", "/undo it"], 2, "/undo takes no argument"),
        (&["chat", "/load ."], 2, "not a regular file"),
        (&["chat", "a red circle", "--repetition-penalty", "1e9"], 2, "repetition_penalty cannot be"),
        (&["edit", "-i", "a.png", "-p", "make it blue", "--free", "--cfg", "0"], 2, "--free without guidance"),
        (&["chat", "a red circle", "--out-dir", "a.png"], 2, "a.png is not a folder"),
        (&["chat", "a \u{1b}[31mred circle"], 2, "control character"),
        (&["chat", "x", "--max-pixels", "1000"], 2, "leave out"),
    ] {
        let output = nextflow(here, args, b"");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(code) && stderr.contains(part), "{args:?}: {stderr}");
    }
}

/// What cannot be kept was not said: nothing later stands on it.
#[test]
fn an_image_that_cannot_be_kept_is_no_part_of_the_conversation() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let mut chat = common::command(here, &["chat", "--seed", "1", "--out-dir", "new"]);
    let mut child = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    input.write_all(b"/gen a cat\n").unwrap();
    let mut path = String::new();
    BufReader::new(output).read_line(&mut path).unwrap();
    assert_eq!(path, "new/a-cat-1.png\n");
    fs::rename(here.join("new"), here.join("old")).unwrap();
    fs::write(here.join("new"), "in the way").unwrap();
    input.write_all(b"/gen a dog\n/show\n/save a.json\n").unwrap();
    drop(input);
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: cannot write new") && stderr.contains("you: a cat"), "{stderr}");
    assert!(!stderr.contains("you: a dog") && !stderr.contains("$1 $1"), "{stderr}");
    assert!(!fs::read_to_string(here.join("a.json")).unwrap().contains('$'));
}

/// What one command writes to standard output another one reads; but there is one standard input.
#[test]
fn commands_are_joined_by_pipes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let drawn = nextflow(folder, &["gen", "-p", "a red circle", "--seed", "1", "-o", "-", "-q"], b"").stdout;
    fs::write(folder.join("drawn.png"), &drawn).unwrap();
    let edit = |image: &str, out: &str, input: &[u8]| {
        nextflow(folder, &["edit", "-i", image, "make it blue", "--seed", "2", "-o", out, "-q"], input)
    };
    assert!(edit("-", "piped.png", &drawn).status.success() && edit("drawn.png", "named.png", b"").status.success());
    assert_eq!(open(&folder.join("piped.png")), open(&folder.join("named.png")));
    let codes = nextflow(folder, &["encode", "-"], &drawn).stdout;
    let pixels = nextflow(folder, &["decode", "-", "-o", "-"], &codes).stdout;
    assert_eq!(image::load_from_memory(&pixels).unwrap().to_rgb8().dimensions(), (128, 128));
    let answer = nextflow(folder, &["chat", "-i", "-", "what colour is the circle?", "-q"], &drawn);
    assert!(answer.status.success() && !answer.stdout.is_empty());
    for (args, part) in [
        (&["edit", "-i", "-", "-"][..], "can be read once"),
        (&["edit", "-i", "-", "-i", "-", "make it blue"], "can be read once"),
        (&["chat", "-i", "-"], "there is no question"),
    ] {
        let output = nextflow(folder, args, &drawn);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(part) && stderr.contains("hint: "), "{stderr}");
    }
    let nothing = nextflow(folder, &["edit", "-i", "-", "make it blue"], b"");
    assert_eq!(nothing.status.code(), Some(2), "{}", String::from_utf8_lossy(&nothing.stderr));
    // What cannot be read ends a conversation: it would fail again.
    let mut chat = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    let output = chat.arg("chat").current_dir(folder).stdin(fs::File::open(folder).unwrap()).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), stderr.matches("cannot read standard input").count()), (Some(1), 1), "{stderr}");
}
