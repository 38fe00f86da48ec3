//! `nextflow gen --jsonl`: many images, each in its own way.
#![cfg(feature = "nano")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn command(folder: &Path, args: &[&str]) -> Command {
    common::command(folder, &[&["gen"], args].concat())
}

/// The exit code, the lines of output, and what is told beside.
fn run(folder: &Path, args: &[&str]) -> (i32, Vec<Value>, String) {
    let Output { status, stdout, stderr } = command(folder, args).output().unwrap();
    let lines = String::from_utf8(stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (status.code().unwrap(), lines, String::from_utf8(stderr).unwrap())
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_line_is_drawn_as_by_its_flags() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let lines = [
        "\u{feff}{\"prompt\": \"a red apple\", \"out\": \"fruit/sweet/apple.png\", \"seed\": 3, \"id\": \"one\"}\r\n",
        "\n",
        "{\"prompt\": \"a cat\", \"size\": \"3:2\", \"cfg\": 3, \"cfg_until\": 4, \"top_k\": 20, \"negative\": \"a dog\"}\n",
        "{\"prompt\": \"a cat\", \"id\": \"The 2nd\", \"temperature\": 0, \"draft\": 1.0, \"seed\": 18446744073709551615}",
    ];
    fs::write(here.join("jobs.jsonl"), lines.concat()).unwrap();
    let (code, told, stderr) = run(here, &["--jsonl", "jobs.jsonl", "--out-dir", "new", "--seed", "5"]);
    assert_eq!(code, 0, "{stderr}");
    let places = ["fruit/sweet/apple.png", "a-cat-5.png", "the-2nd.png"];
    let flags: [&[&str]; 3] = [
        &["-p", "a red apple", "--seed", "3"],
        &[
            "-p",
            "a cat",
            "--size",
            "3:2",
            "--cfg",
            "3",
            "--cfg-until",
            "4",
            "--top-k",
            "20",
            "-n",
            "a dog",
            "--seed",
            "5",
        ],
        &["-p", "a cat", "--temperature", "0", "--draft", "1", "--seed", "18446744073709551615"],
    ];
    for (i, (place, flags)) in places.iter().zip(flags).enumerate() {
        assert_eq!((&told[i]["line"], &told[i]["path"]), (&[1, 3, 4][i].into(), &format!("new/{place}").into()));
        let alone = command(here, &[flags, &["-o", "-"]].concat()).output().unwrap().stdout;
        assert!(fs::read(here.join("new").join(place)).unwrap() == alone, "{place}");
    }
    assert_eq!((&told[0]["id"], &told[1]["id"], &told[2]["id"]), (&"one".into(), &Value::Null, &"The 2nd".into()));
    assert_eq!((&told[1]["size"], &told[2]["prompt"]), (&"144x96".into(), &"a cat".into()));
    // Two in one pass are what they are alone.
    let two = "{\"prompt\": \"a cat\", \"out\": \"a.png\"}\n{\"prompt\": \"a dog\", \"out\": \"b.png\"}\n";
    fs::write(here.join("two.jsonl"), two).unwrap();
    for (batch, folder) in [("1", "alone"), ("4", "together")] {
        let args = ["--jsonl", "two.jsonl", "--out-dir", folder, "--seed", "5", "--batch", batch];
        assert_eq!(run(here, &args).0, 0);
    }
    for name in ["a.png", "b.png"] {
        assert!(
            fs::read(here.join("alone").join(name)).unwrap() == fs::read(here.join("together").join(name)).unwrap()
        );
    }
}

#[test]
fn lines_that_make_no_sense_are_told_before_anything_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let good = r#"{"prompt": "a cat", "out": "a.png", "id": "a"}"#;
    for (line, part) in [
        ("{", "the line ends before its JSON does"),
        ("a cat", "it is not a JSON object"),
        ("\"a cat\"", "it is not a JSON object"),
        (r#"{"out": "b.png"}"#, "it has no prompt"),
        (r#"{"prompt": "x", "colour": 1}"#, "there is no key \"colour\""),
        (r#"{"prompt": "x", "prompt": "y"}"#, "prompt is there twice"),
        (r#"{"prompt": ""}"#, "it has no prompt"),
        (r#"{"prompt": "\u001b[2J"}"#, "control character"),
        (r#"{"prompt": "x", "seed": -1}"#, "seed is a whole number from 0 to 18446744073709551615, not -1"),
        (r#"{"prompt": "x", "seed": 1.5}"#, "seed is a whole number"),
        (r#"{"prompt": "x", "cfg": 1e999}"#, "number out of range"),
        (r#"{"prompt": "x", "cfg": -1}"#, "cfg -1 is not"),
        (r#"{"prompt": "x", "top_k": 0}"#, "top-k 0 is not"),
        (r#"{"prompt": "x", "cfg_until": 9}"#, "8 scales"),
        (r#"{"prompt": "x", "negative": " "}"#, "negative: the prompt is empty"),
        (r#"{"prompt": "x", "negative": "y", "cfg_until": 0}"#, "leads away from nothing"),
        (r#"{"prompt": "x", "negative": "y", "cfg": 0}"#, "leads away from nothing"),
        (r#"{"prompt": "x", "draft": 8}"#, "draft"),
        (r#"{"prompt": "x", "size": "1x1"}"#, "1x1"),
        (r#"{"prompt": "x", "size": "big"}"#, "big is not a size"),
        (r#"{"prompt": "x", "out": "../b.png"}"#, "is not a place below the folder"),
        (r#"{"prompt": "x", "out": "/etc/b.png"}"#, "is not a place below the folder"),
        (r#"{"prompt": "x", "out": "b.jpg"}"#, "is not the name of a PNG"),
        (r#"{"prompt": "x", "id": "a"}"#, "the id \"a\" is there twice"),
        (r#"{"prompt": "x", "out": "a.png"}"#, "its place, a.png, is that of line 1"),
        (r#"{"prompt": "x", "out": "./a.png/b.png"}"#, "its place, a.png/b.png, is below that of line 1"),
        (r#"["x", null, null]"#, "a JSON array"),
        (r#"{"prompt": "x", "temperature": 0, "top_k": 5}"#, "top_k has no effect with temperature 0"),
        (r#"{"prompt": "x", "temperature": 0, "top_p": 0.5}"#, "top_p has no effect with temperature 0"),
        (r#"{"prompt": "x", "out": "a\\b.png"}"#, "folders are separated by /"),
        ("prompt,seed", "looks like CSV"),
        (r#"{"prompt": "x", "out": "there.png"}"#, "already exists"),
    ] {
        fs::write(here.join("there.png"), "mine").unwrap();
        fs::write(here.join("bad.jsonl"), format!("{good}\n\n{line}\n")).unwrap();
        let (code, told, stderr) = run(here, &["--jsonl", "bad.jsonl"]);
        assert!(code == 2 && told.is_empty(), "{line}: {code} {stderr}");
        assert!(stderr.contains("line 3 of bad.jsonl: ") && stderr.contains(part), "{line}: {stderr}");
        assert!(stderr.contains("hint: ") && !stderr.contains('\u{1b}'), "{line}: {stderr}");
    }
    fs::write(here.join("bad.jsonl"), [good.as_bytes(), b"\n{\"prompt\": \"caf\xff\"}"].concat()).unwrap();
    assert!(run(here, &["--jsonl", "bad.jsonl"]).2.contains("line 2 of bad.jsonl: "));
    fs::write(here.join("bad.jsonl"), format!("{{\"prompt\": \"{}\"}}", "x".repeat(2 << 20))).unwrap();
    assert!(run(here, &["--jsonl", "bad.jsonl"]).2.contains("longer than 1 MB"));
    // What is too long is passed over where the rest goes on, and a hint is for a line, not for
    // flags.
    let long = format!("{{\"prompt\": \"{}\"}}\n{{\"prompt\": \"x\", \"cfg_until\": 9}}\n", "x".repeat(2 << 20));
    fs::write(here.join("bad.jsonl"), long).unwrap();
    let (_, told, _) = run(here, &["--jsonl", "bad.jsonl", "--keep-going"]);
    assert_eq!((told.len(), &told[1]["line"], &told[1]["hint"]), (2, &2.into(), &"\"cfg_until\": 8".into()));
    // The longest line that there may be, and another.
    let line = format!("{{\"prompt\": \"x\", {}\"cfg\": -1}}", " ".repeat((1 << 20) - 26));
    assert_eq!(line.len(), 1 << 20);
    fs::write(here.join("bad.jsonl"), format!("{line}\n{line}\n")).unwrap();
    assert_eq!(run(here, &["--jsonl", "bad.jsonl", "--keep-going"]).1.len(), 2);
    fs::write(here.join("bad.jsonl"), "\n \n").unwrap();
    assert!(run(here, &["--jsonl", "bad.jsonl"]).2.contains("holds no job"));
    fs::write(here.join("bad.jsonl"), good).unwrap();
    for (args, part) in [
        (&["--jsonl", "none.jsonl"][..], "cannot read none.jsonl"),
        (&["--jsonl", "bad.jsonl", "-p", "x"], "cannot be used with"),
        (&["--jsonl", "bad.jsonl", "-o", "x.png"], "cannot be used with"),
        (&["--jsonl", "bad.jsonl", "--think"], "cannot be used with"),
        (&["--jsonl", "bad.jsonl", "--seed", "1,2"], "takes one --seed"),
        (&["--jsonl", "bad.jsonl", "--shard", "3/2"], "1/4 to 4/4"),
        (&["--jsonl", "bad.jsonl", "--batch", "0"], "--batch 0"),
        (&["--jsonl", "-", "--batch", "2"], "would wait"),
        (&["--jsonl", "bad.jsonl", "--force", "--resume"], "cannot be used with"),
        (&["-p", "x", "--resume"], "--jsonl"),
        (&["-p", "x", "--keep-going"], "--jsonl"),
        (&["--shard", "1/2"], "--jsonl"),
    ] {
        let (code, _, stderr) = run(here, args);
        assert!(code == 2 && stderr.contains(part), "{args:?}: {code} {stderr}");
    }
    assert_eq!(files(here), ["bad.jsonl", "there.png"]);
    assert_eq!(fs::read(here.join("there.png")).unwrap(), b"mine");
}

#[test]
fn what_fails_is_told_and_the_rest_goes_on_and_comes_back_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let line = |i: usize| format!("{{\"prompt\": \"a cat\", \"seed\": {i}, \"id\": \"cat {i}\"}}");
    let lines = |bad: &str| [line(1), bad.into(), line(3), line(4)].join("\n");
    fs::write(here.join("jobs.jsonl"), lines("{\"prompt\": \"a cat\", \"id\": \"cat 2\", \"size\": \"x\"}")).unwrap();
    let args = ["--jsonl", "jobs.jsonl", "--out-dir", "out", "--keep-going"];
    let (code, _, stderr) = run(here, &[&args[..], &["--dry-run", "--json"]].concat());
    assert!(code == 1 && stderr.contains("line 2 of jobs.jsonl: ") && !here.join("out").exists(), "{stderr}");
    let (code, told, stderr) = run(here, &args);
    assert!(code == 1 && stderr.contains("1 of 4 jobs failed"), "{stderr}");
    assert_eq!(told.len(), 4);
    assert_eq!((&told[1]["line"], &told[1]["id"], &told[1]["code"]), (&2.into(), &"cat 2".into(), &2.into()));
    assert!(told[1]["error"].as_str().unwrap().contains("x is not a size") && told[1]["hint"].is_string());
    assert_eq!(files(&here.join("out")), ["cat-1.png", "cat-3.png", "cat-4.png"]);
    // Corrected, and one image lost: both are drawn, the others stay as they are.
    fs::write(here.join("jobs.jsonl"), lines(&line(2))).unwrap();
    let kept = fs::read(here.join("out/cat-3.png")).unwrap();
    fs::write(here.join("out/cat-1.png"), &kept).unwrap();
    fs::remove_file(here.join("out/cat-4.png")).unwrap();
    let again = ["--jsonl", "jobs.jsonl", "--out-dir", "out", "--resume"];
    let plan = &run(here, &[&again[..], &["--dry-run", "--json"]].concat()).1[0];
    assert_eq!((&plan["images"], &plan["there"], &plan["codes"]), (&2.into(), &2.into(), &408.into()));
    let (code, told, stderr) = run(here, &again);
    assert_eq!((code, told.len()), (0, 4), "{stderr}");
    let there: Vec<&Value> = told.iter().map(|line| &line["there"]).collect();
    assert_eq!(there, [&true.into(), &Value::Null, &true.into(), &Value::Null]);
    assert_eq!((&told[0]["id"], &told[0]["path"]), (&"cat 1".into(), &"out/cat-1.png".into()));
    assert!(stderr.contains("(2 of 4 images exist)"), "{stderr}");
    assert!(fs::read(here.join("out/cat-1.png")).unwrap() == kept, "what is there stays, whatever it shows");
    assert!(run(here, &again).1.iter().all(|line| line["there"] == true));
    // What is no file is no image.
    fs::remove_file(here.join("out/cat-3.png")).unwrap();
    fs::create_dir(here.join("out/cat-3.png")).unwrap();
    let (code, _, stderr) = run(here, &again);
    assert!(code == 2 && stderr.contains("line 3 of jobs.jsonl: out/cat-3.png exists and is not an image"), "{stderr}");
    // An image that nothing names cannot be known again.
    fs::write(here.join("jobs.jsonl"), "{\"prompt\": \"a cat\"}").unwrap();
    assert!(run(here, &again).2.contains("line 1 of jobs.jsonl: without id or out"));
}

#[test]
fn the_parts_of_a_file_are_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let lines: Vec<String> = (1..=5).map(|i| format!("{{\"prompt\": \"a cat\", \"out\": \"{i}.png\"}}\n\n")).collect();
    fs::write(here.join("jobs.jsonl"), lines.concat()).unwrap();
    let mut all = Vec::new();
    for shard in ["1/3", "2/3", "3/3"] {
        let (code, told, stderr) = run(here, &["--jsonl", "jobs.jsonl", "--shard", shard]);
        assert_eq!(code, 0, "{stderr}");
        all.extend(told.iter().map(|line| line["path"].as_str().unwrap().to_string()));
    }
    assert_eq!(all, ["1.png", "4.png", "2.png", "5.png", "3.png"]);
    assert_eq!(run(here, &["--jsonl", "jobs.jsonl", "--shard", "7/9"]).0, 0, "a part may be empty");
    let mut piped = command(here, &["--jsonl", "-", "--shard", "7/9"]);
    let piped = piped.stdin(fs::File::open(here.join("jobs.jsonl")).unwrap()).output().unwrap();
    assert_eq!(piped.status.code(), Some(0), "{}", String::from_utf8_lossy(&piped.stderr));
    // What is wrong with a line is told in its own part.
    fs::write(here.join("bad.jsonl"), format!("{{\"prompt\": \"a cat\"}}\n{}\n", "x".repeat(2 << 20))).unwrap();
    let dry_run = |shard| run(here, &["--jsonl", "bad.jsonl", "--shard", shard, "--dry-run", "--json"]).0;
    assert_eq!((dry_run("1/2"), dry_run("2/2")), (0, 2));
}

#[test]
fn a_pipe_has_its_answer_before_it_asks_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = command(dir.path(), &["--jsonl", "-", "-q", "--keep-going"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary");
    let (mut ask, mut answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
    for (line, key) in [
        (r#"{"prompt": "a cat", "out": "a.png"}"#, "path"),
        ("nonsense", "error"),
        (r#"{"prompt": "a dog", "out": "b.png"}"#, "path"),
    ] {
        writeln!(ask, "{line}").unwrap();
        let answer: Value = serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap();
        assert!(answer[key].is_string(), "{line}: {answer}");
    }
    drop(ask);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(files(dir.path()), ["a.png", "b.png"]);
}

#[test]
fn what_is_no_whole_png_is_drawn_anew() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let line = |out: &str| format!("{{\"prompt\": \"a cat\", \"seed\": 1, \"out\": \"{out}\"}}\n");
    let names = ["whole.png", "empty.png", "cut.png", "text.png", "zeros.png"];
    fs::write(here.join("jobs.jsonl"), names.map(line).concat()).unwrap();
    let args = ["--jsonl", "jobs.jsonl", "--out-dir", "out"];
    assert_eq!(run(here, &args).0, 0);
    let read = |name: &str| fs::read(here.join("out").join(name)).unwrap();
    let whole = read("whole.png");
    let damaged = [vec![], whole[..whole.len() - 20].to_vec(), b"<html>".to_vec(), vec![0; whole.len()]];
    for (name, bytes) in names[1..].iter().zip(damaged) {
        fs::write(here.join("out").join(name), bytes).unwrap();
    }
    let again = [&args[..], &["--resume"]].concat();
    let plan = &run(here, &[&again[..], &["--dry-run", "--json"]].concat()).1[0];
    assert_eq!((&plan["images"], &plan["there"]), (&4.into(), &1.into()));
    let (code, told, stderr) = run(here, &again);
    assert!(code == 0 && stderr.contains("(4 files are no whole PNG and will be replaced)"), "{stderr}");
    let there: Vec<bool> = told.iter().map(|line| line["there"] == true).collect();
    assert_eq!(there, [true, false, false, false, false]);
    assert!(names.iter().all(|name| read(name) == whole));
    // Without a flag what is there is a fault; with --force it is drawn over.
    fs::write(here.join("out/text.png"), "mine").unwrap();
    let (code, _, stderr) = run(here, &args);
    assert!(code == 2 && stderr.contains("already exists") && stderr.contains("--force replaces them"), "{stderr}");
    assert_eq!(read("text.png"), b"mine");
    let (code, told, stderr) = run(here, &[&args[..], &["--force"]].concat());
    assert!(code == 0 && told.len() == 5 && read("text.png") == whole, "{stderr}");
    assert_eq!(files(&here.join("out")).len(), 5);
}

#[cfg(unix)]
#[test]
fn links_below_the_folder_do_not_lead_out_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    ["out", "out/real", "other"].iter().for_each(|folder| fs::create_dir(here.join(folder)).unwrap());
    std::os::unix::fs::symlink("../other", here.join("out/link")).unwrap();
    std::os::unix::fs::symlink("real", here.join("out/within")).unwrap();
    std::os::unix::fs::symlink("../../other/x.png", here.join("out/real/x.png")).unwrap();
    for (out, code) in [("link/x.png", 2), ("link/new/x.png", 2), ("real/x.png", 2), ("within/y.png", 0)] {
        fs::write(here.join("jobs.jsonl"), format!("{{\"prompt\": \"a cat\", \"out\": \"{out}\"}}")).unwrap();
        for more in [&[][..], &["--resume"], &["--force"]] {
            let (found, _, stderr) = run(here, &[&["--jsonl", "jobs.jsonl", "--out-dir", "out"], more].concat());
            assert!(found == code || code == 0 && stderr.contains("already exists"), "{out} {more:?}: {stderr}");
            assert!(code == 0 || stderr.contains("by a link") && stderr.contains("hint: "), "{out} {more:?}: {stderr}");
        }
    }
    assert_eq!(
        (files(&here.join("other")).len(), files(&here.join("out/real"))),
        (0, vec!["x.png".into(), "y.png".into()])
    );
}

#[test]
fn files_of_other_systems_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let text = "\u{feff}{\"prompt\": \"a cat\", \"id\": 12, \"seed\": 7.0}\r\n{\"prompt\": \"一只猫\", \"id\": 13, \"seed\": 1e3}\r\n";
    for (n, bytes) in [u16::to_le_bytes, u16::to_be_bytes].into_iter().enumerate() {
        fs::write(here.join("jobs.jsonl"), text.encode_utf16().flat_map(bytes).collect::<Vec<u8>>()).unwrap();
        let folder = format!("out{n}");
        let (code, told, stderr) = run(here, &["--jsonl", "jobs.jsonl", "--out-dir", &folder]);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!((&told[0]["id"], &told[0]["seed"], &told[1]["seed"]), (&"12".into(), &7.into(), &1000.into()));
        assert_eq!(
            (&told[1]["prompt"], files(&here.join(folder))),
            (&"一只猫".into(), vec!["12.png".into(), "13.png".into()])
        );
    }
}

/// What a process that is killed in the middle of a file leaves is removed by the next one; what
/// another still writes is not.
#[cfg(target_os = "linux")]
#[test]
fn what_a_killed_process_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    fs::create_dir(here.join("out")).unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let host: String = host.trim().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).take(32).collect();
    let host = host.trim_end_matches('_');
    let [dead, alive] = ["dead12", "alive3"].map(|end| here.join(format!("out/.nextflow-{host}-{end}.tmp")));
    fs::write(&dead, "half").unwrap();
    let lock = fs::File::create(&alive).unwrap();
    lock.lock().unwrap();
    fs::write(here.join("jobs.jsonl"), "{\"prompt\": \"a cat\", \"out\": \"a.png\"}").unwrap();
    assert_eq!(run(here, &["--jsonl", "jobs.jsonl", "--out-dir", "out"]).0, 0);
    assert!(!dead.exists() && alive.exists());
    drop(lock);
    assert_eq!(run(here, &["--jsonl", "jobs.jsonl", "--out-dir", "out", "--resume"]).0, 0);
    assert_eq!(files(&here.join("out")), ["a.png"]);
}
