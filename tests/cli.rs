//! The command line refuses bad input with one sentence, a hint and the right exit code.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs `nextflow` in `folder` with `input` on stdin.
fn nextflow(folder: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut child = command(folder, args).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // From another thread: the child may answer before it has read everything.
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join();
    output
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    command.args(args).current_dir(folder).env_remove("NEXTFLOW_MODEL").env_remove("NEXTFLOW_DEVICE");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn shells_complete_commands_and_flags() {
    for (shell, part) in [("bash", "--cfg-until"), ("zsh", "#compdef nextflow"), ("fish", "complete -c nextflow")] {
        let output = nextflow(Path::new("."), &["completions", shell], b"");
        assert!(output.status.success() && String::from_utf8(output.stdout).unwrap().contains(part), "{shell}");
    }
    refused(&["completions", "tcsh"], b"", 2, "tcsh", "a similar value exists: 'zsh'");
}

#[cfg(unix)]
#[test]
fn arguments_that_are_no_text_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let mut command = command(Path::new("."), &[]);
    let output = command.arg(std::ffi::OsStr::from_bytes(b"caf\xe9")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Asserts the exit code, the two lines on stderr, a silent stdout, and that no file appeared.
#[track_caller]
fn refused(args: &[&str], input: &[u8], code: i32, message: &str, hint: &str) {
    let folder = tempfile::tempdir().unwrap();
    refused_in(folder.path(), args, input, code, message, hint);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{args:?} left a file");
}

#[track_caller]
fn refused_in(folder: &Path, args: &[&str], input: &[u8], code: i32, message: &str, hint: &str) {
    is_refusal(&nextflow(folder, args, input), code, message, hint);
}

#[track_caller]
fn is_refusal(output: &Output, code: i32, message: &str, hint: &str) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(output.stdout.is_empty());
    let lines: Vec<&str> = stderr.lines().collect();
    let [error, advice] = lines[..] else { panic!("two lines were expected:\n{stderr}") };
    assert!(error.starts_with("error: ") && error.contains(message), "{error}");
    assert!(advice.starts_with("hint: ") && advice.contains(hint), "{advice}");
    assert!(!stderr.contains('\x1b'));
}

#[test]
fn verbose_prints_the_causes_of_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("config.json"), "{\"name\": ").unwrap();
    std::fs::write(model.join("model.safetensors"), "").unwrap();
    let png = folder.path().join("cut.png");
    std::fs::write(&png, b"\x89PNG\r\n\x1a\n").unwrap();
    let (model, png, missing) = (model.to_str().unwrap(), png.to_str().unwrap(), folder.path().join("no/where.png"));
    for (args, code, causes) in [
        (&["gen", "-p", "x", "--model", model][..], 3, &["EOF while parsing a value at line 1 column 9"][..]),
        (&["info", model], 3, &["EOF while parsing a value at line 1 column 9"]),
        (&["edit", "-i", png, "-p", "x"], 2, &["unexpected end of file"]),
        (&["encode", missing.to_str().unwrap()], 2, &["No such file or directory (os error 2)"]),
        // What a user typed wrong has no cause.
        (&["gen", "-p", "x", "--count", "0"], 2, &[]),
    ] {
        is_refusal(&nextflow(folder.path(), args, b""), code, "", "");
        for args in [[args, &["-v"]].concat(), [&["-v"], args].concat()] {
            let output = nextflow(folder.path(), &args, b"");
            let stderr = String::from_utf8(output.stderr).unwrap();
            let lines: Vec<&str> = stderr.lines().collect();
            let [error, printed @ .., hint] = &lines[..] else { panic!("{stderr}") };
            assert!(error.starts_with("error: ") && hint.starts_with("hint: "), "{stderr}");
            let printed: Vec<&str> = printed.iter().map(|line| line.strip_prefix("caused by: ").expect(line)).collect();
            assert!(printed.len() >= causes.len() && printed.starts_with(causes), "{args:?}: {stderr}");
            assert_eq!((output.status.code(), printed.is_empty()), (Some(code), causes.is_empty()), "{stderr}");
        }
    }
}

#[test]
fn help_fits_two_screens() {
    for command in
        ["gen", "edit", "chat", "encode", "decode", "info", "bench", "quantize", "assemble", "eval", "completions"]
    {
        let output = nextflow(Path::new("."), &[command, "--help"], b"");
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(help.lines().count() <= 100, "{command} --help has {} lines", help.lines().count());
    }
}

#[test]
fn help_and_version_are_data() {
    let here = Path::new(".");
    for (args, text) in [(&["--version"][..], "nextflow "), (&["--help"], "gen"), (&["gen", "--help"], "--temperature")]
    {
        let output = nextflow(here, args, b"");
        assert!(output.status.success() && output.stderr.is_empty());
        assert!(String::from_utf8(output.stdout).unwrap().contains(text));
    }
}

#[test]
fn usage_errors() {
    refused(&[], b"", 2, "subcommand", "--help");
    refused(&["xyzzy"], b"", 2, "xyzzy", "--help");
    refused(&["gen"], b"", 2, "no prompt", "-p");
    refused(&["gen", "-p", "x", "--sed", "1"], b"", 2, "--sed", "--seed");
    refused(&["gen", "-p", "x", "--seed", "-1"], b"", 2, "--seed", "");
    refused(&["gen", "-p", "x", "--count", "0"], b"", 2, "--count 0", "--count 1");
    refused(&["gen", "-p", "x", "--batch", "0"], b"", 2, "--batch 0", "--batch 4");
    refused(&["gen", "-p", "x", "--batch", "18446744073709551615"], b"", 2, "more than 1024", "--batch 4");
    refused(&["gen", "-p", "x", "--seed", "18446744073709551615", "--count", "2"], b"", 2, "--count 2", "--seed");
    refused(&["gen", "-p", "\x1b[31mx", "--size", "\x1b[2J"], b"", 2, "\\u{1b}[2J", "--size");
}

#[test]
fn flags_that_would_be_ignored() {
    refused(&["gen", "-p", "x", "-q", "-v"], b"", 2, "cannot be used with", "");
    refused(&["gen", "-p", "x", "--think", "--batch", "2"], b"", 2, "cannot be used with", "");
    refused(&["gen", "-p", "x", "-o", "a.png", "--out-dir", "b"], b"", 2, "cannot be used with", "");
    refused(&["gen", "--jsonl", "x", "--resume", "--force"], b"", 2, "cannot be used with", "");
    // The likeliest code, or token, needs no filter; a model's own filter is none of the user's.
    for (command, flag, value) in
        [("gen", "--top-k", "5"), ("gen", "--top-p", "0.5"), ("chat", "--top-k", "5"), ("chat", "--top-p", "0.5")]
    {
        let words = if command == "gen" { "--prompt=x" } else { "x" };
        let args = [command, words, "--temperature", "0", flag, value];
        refused(&args, b"", 2, &format!("{flag} has no effect with --temperature 0"), "leave out");
    }
    refused(&["gen", "-p", "x", "-o", "a.png", "--count", "2"], b"", 2, "several images", "--out-dir");
    refused(&["gen", "--prompt-file", "-", "-o", "a.png"], b"x\ny\n", 2, "several images", "--out-dir");
    refused(&["gen", "-p", "x", "-o", "-", "--json"], b"", 2, "--json has no meaning", "-o FILE");
    refused(&["gen", "-p", "x", "-o", "-", "--force"], b"", 2, "--force has no meaning", "-o FILE");
}

#[cfg(feature = "nano")]
#[test]
fn flags_about_words_where_none_are_said() {
    refused(&["chat", "/gen a cat", "--top-k", "5"], b"", 2, "--top-k is about text", "nextflow gen");
}

#[test]
fn bad_prompts() {
    let million = vec![b'a'; 1_000_000];
    refused(&["gen", "-p", ""], b"", 2, "empty", "");
    refused(&["gen", "-p", " \t"], b"", 2, "empty", "");
    refused(&["gen", "-"], b"", 2, "empty", "");
    refused(&["gen", "-p", "-"], &million, 2, "1000000", "");
    refused(&["gen", "--prompt-file", "-"], &million, 2, "1000000", "");
    refused(&["gen", "-p", "-"], b"a \xff\xfe", 2, "UTF-8", "");
    refused(&["gen", "--prompt-file", "-"], b"a cat\n\xff\xfe\n", 2, "line 2 of standard input", "");
    refused(&["gen", "--prompt-file", "-"], b"\n", 2, "no prompt", "line");
    refused(&["gen", "--prompt-file", "nowhere.txt"], b"", 2, "cannot read nowhere.txt", "--prompt-file");
    refused(&["gen", "--prompt-file", "-"], b"caf\xe9\n", 2, "line 1 of standard input", "iconv -f");
    refused(&["gen", "-cat"], b"", 2, "unexpected argument", "nextflow gen -- -cat");
    refused(
        &["gen", "--from", "https://a.b/x.png"],
        b"",
        2,
        "addresses are not fetched",
        "curl -sLO https://a.b/x.png",
    );
    refused(
        &["edit", "x", "-i", "https://a.b/x.png"],
        b"",
        2,
        "not fetched",
        "curl -sL https://a.b/x.png | nextflow edit -i -",
    );
    refused(
        &["chat", "x", "-i", "https://a.b/x.png"],
        b"",
        2,
        "not fetched",
        "curl -sL https://a.b/x.png | nextflow chat -i -",
    );
}

#[cfg(unix)]
#[test]
fn a_prompt_argument_that_is_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let output =
        command(folder.path(), &["gen", "-p"]).arg(std::ffi::OsStr::from_bytes(b"a \xff cat")).output().unwrap();
    is_refusal(&output, 2, "UTF-8", "");
}

#[test]
fn bad_sampler_values() {
    for value in ["NaN", "-1", "inf"] {
        refused(&["gen", "-p", "x", "--cfg", value], b"", 2, &format!("--cfg {value}"), "--cfg");
        refused(
            &["gen", "-p", "x", "--temperature", value],
            b"",
            2,
            &format!("--temperature {value}"),
            "--temperature",
        );
        refused(&["gen", "-p", "x", "--top-p", value], b"", 2, &format!("--top-p {value}"), "--top-p");
    }
    refused(&["gen", "-p", "x", "--cfg=-inf"], b"", 2, "--cfg -inf", "--cfg");
    refused(&["gen", "-p", "x", "--top-k", "0"], b"", 2, "--top-k 0", "--top-k");
    refused(&["gen", "-p", "x", "--passes", "2"], b"", 2, "nano draws every scale in one pass", "leave out --passes");
    refused(&["gen", "-p", "x", "--passes", "4"], b"", 2, "4 is not in 1..=3", "nextflow gen --help");
    refused(&["gen", "-p", "x", "--top-k", "-3"], b"", 2, "--top-k", "");
    refused(&["gen", "-p", "x", "--top-p", "0"], b"", 2, "--top-p 0", "--top-p");
    refused(&["gen", "-p", "x", "--top-p", "1.5"], b"", 2, "--top-p 1.5", "--top-p");
}

#[test]
fn bad_sizes() {
    for size in ["0", "-1", "1000000000", "big", "128", "1:9", "nan:1", ""] {
        refused(&["gen", "-p", "x", &format!("--size={size}")], b"", 2, "--size", "--size");
    }
}

#[cfg(feature = "nano")]
#[test]
fn sizes_that_nano_cannot_draw() {
    for size in ["1024x1024", "127x127", "129x128", "128x256"] {
        refused(&["gen", "-p", "x", "--size", size], b"", 2, size, "--size ");
    }
    refused(&["gen", "-p", "x", "--size", "1024x1024"], b"", 2, "cannot draw", "--size 128x128");
    for size in ["0x0", "0x128", "1000000000x1000000000"] {
        refused(&["gen", "-p", "x", "--size", size], b"", 2, size, "--size ");
    }
}

#[cfg(feature = "nano")]
#[test]
fn bad_outputs() {
    refused(&["gen", "-p", "x", "-o", "no/such/a.png"], b"", 2, "no folder", "mkdir -p no/such");
    refused(&["gen", "-p", "x", "-o", "."], b"", 2, "is a folder", "-o ./NAME");
    refused(&["gen", "-p", "x", "-o", "a.jpg"], b"", 2, "not a PNG name", "-o a.png");
    refused(&["gen", "-p", "x", "-o", ""], b"", 2, "--output", "");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.png");
    std::fs::write(&file, "mine").unwrap();
    refused_in(folder.path(), &["gen", "-p", "x", "-o", "a.png"], b"", 2, "already exists", "--force");
    refused_in(folder.path(), &["gen", "-p", "x", "--out-dir", "a.png"], b"", 2, "not a folder", "--out-dir");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    if cfg!(target_os = "linux") {
        refused(&["gen", "-p", "x", "-o", "/proc/a.png"], b"", 2, "cannot write", "-o FILE");
        refused(&["gen", "-p", "x", "--out-dir", "/proc/a"], b"", 2, "cannot write", "--out-dir");
        refused(&["gen", "-p", "x", "-o", "/dev/null", "--force"], b"", 2, "not a regular file", "-o - >");
    }
}

/// A thread whose stack is larger than any memory is refused, as where a container grants none.
#[cfg(all(unix, target_pointer_width = "64", feature = "nano"))]
#[test]
fn without_threads_there_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let alone = |args: &[&str]| {
        let mut command = command(folder.path(), args);
        command.env("RUST_MIN_STACK", "70000000000000").env("RAYON_NUM_THREADS", "4").env("HF_HOME", folder.path());
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !stderr.contains("panicked"), "{args:?}: {stderr}");
        output.stdout
    };
    let args = ["gen", "-p", "a cat", "--seed", "1", "-o", "-"];
    let drawn = alone(&args);
    assert!(drawn == nextflow(folder.path(), &args, b"").stdout);
    alone(&["chat", "what is this?", "--max-tokens", "2"]);
    std::fs::write(folder.path().join("a.png"), drawn).unwrap();
    alone(&["edit", "-i", "a.png", "make it red", "-o", "b.png"]);
    alone(&["encode", "a.png"]);
    #[cfg(feature = "hub")]
    alone(&["models", "list"]);
}

#[test]
fn bad_models_and_devices() {
    refused(&["gen", "-p", "x", "--model", "nowhere"], b"", 3, "nowhere", "");
    refused(&["gen", "-p", "x", "--device", "abacus"], b"", 2, "abacus", "");
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    refused_in(folder.path(), &["gen", "-p", "x", "--model", "empty"], b"", 3, "empty", "");
    let output = command(folder.path(), &["gen", "-p", "x"]).env("NEXTFLOW_MODEL", "from-env").output().unwrap();
    is_refusal(&output, 3, "from-env", "");
}
