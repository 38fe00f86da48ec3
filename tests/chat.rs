//! `nextflow chat` and `nextflow assemble` on a tiny Qwen2.5-VL of random weights.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    command.args(args).current_dir(folder).env("NEXTFLOW_MODEL", data("qwen/tiny")).env_remove("NEXTFLOW_DEVICE");
    command
}

fn nextflow(folder: &Path, args: &[&str], input: &[u8]) -> (i32, Vec<u8>, String) {
    let mut command = command(folder, args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that needs no input may be gone before it is written.
    let _ = child.stdin.take().unwrap().write_all(input);
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    (status.code().unwrap(), stdout, String::from_utf8(stderr).unwrap())
}

fn json(folder: &Path, args: &[&str], input: &str) -> Vec<Value> {
    let (code, stdout, stderr) = nextflow(folder, args, input.as_bytes());
    assert_eq!(code, 0, "{args:?}: {stderr}");
    String::from_utf8(stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn one_question_has_one_answer() {
    let here = tempfile::tempdir().unwrap();
    let picture = data("tokenflow/preprocess/shapes.png");
    let picture = picture.to_str().unwrap();
    let greedy = ["--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "12", "--seed", "3"];
    let ask = |args: &[&str], input: &str| json(here.path(), &[&["chat", "--json"], args, &greedy].concat(), input);
    let answer = &ask(&["-i", picture, "What is this?"], "")[0];
    assert_eq!((&answer["prompt_tokens"], &answer["tokens"], &answer["seed"]), (&144.into(), &12.into(), &3.into()));
    assert_eq!((&answer["ending"], &answer["cached_tokens"]), (&"length".into(), &0.into()));
    assert_eq!(ask(&["-i", picture, "-"], "What is this?\n")[0]["text"], answer["text"]);
    assert_ne!(ask(&["What is this?"], "")[0]["text"], answer["text"]);
    // Two images, and thirty.
    assert_eq!(ask(&["-i", picture, "-i", picture, "x"], "")[0]["prompt_tokens"], 58 + 2 * 74);
    let thirty = [["-i", picture]; 30].concat();
    assert_eq!(ask(&[&thirty[..], &["x"]].concat(), "")[0]["prompt_tokens"], 58 + 30 * 74);
    // Smaller images are fewer tokens, in the plan too.
    let small = ["chat", "-i", picture, "x", "--max-pixels", "10000", "--json", "--dry-run"];
    assert_eq!(json(here.path(), &small, "")[0]["images"][0]["tokens"], 10);
    let (_, plain, stderr) =
        nextflow(here.path(), &[&["chat", "-i", picture, "What is this?"], &greedy[..]].concat(), b"");
    assert_eq!(String::from_utf8(plain).unwrap(), format!("{}\n", answer["text"].as_str().unwrap()));
    assert!(stderr.contains("--max-tokens"), "{stderr}");
    // A seed decides what is drawn.
    let draw = |seed| {
        let args = ["chat", "x", "--temperature", "1", "--json", "--max-tokens", "12", "--seed", seed];
        json(here.path(), &args, "")[0]["text"].clone()
    };
    assert!(draw("1") == draw("1") && draw("1") != draw("2"));
}

#[test]
fn a_conversation_goes_on_from_what_was_read() {
    let here = tempfile::tempdir().unwrap();
    std::fs::copy(data("tokenflow/preprocess/drawings_small.png"), here.path().join("a.png")).unwrap();
    let chat = ["chat", "--json", "--temperature", "0", "--max-tokens", "5"];
    let lines = [
        "/system Be brief.",
        "Hello",
        "/image a.png",
        "what \\",
        "is it",
        "/save a.json",
        "/undo",
        "again",
        "/clear",
        "Hello",
        "/load a.json",
        "Hello",
        "/show",
        "/help",
        "/exit",
        "never",
    ];
    let answers = json(here.path(), &chat, &lines.join("\n"));
    assert_eq!(answers.len(), 5);
    let number = |i: usize, key: &str| answers[i][key].as_u64().unwrap();
    // All that was said before was read before, but for the last word of an answer that was cut.
    assert_eq!((number(0, "cached_tokens"), number(1, "cached_tokens")), (0, number(0, "prompt_tokens") + 4));
    assert!(number(1, "prompt_tokens") > number(1, "cached_tokens") + 6 + 10);
    // The third question has the place of the second, whose image it does not see.
    assert!((number(1, "cached_tokens")..number(1, "prompt_tokens") - 6).contains(&number(2, "cached_tokens")));
    assert!(number(2, "prompt_tokens") < number(1, "prompt_tokens"));
    assert_eq!(answers[3]["text"], answers[0]["text"]);
    assert!(number(4, "prompt_tokens") > number(1, "prompt_tokens"));
    let saved: Value = serde_json::from_slice(&std::fs::read(here.path().join("a.json")).unwrap()).unwrap();
    assert_eq!(saved["system"], "Be brief.");
    let parts = serde_json::json!([{"image": "a.png"}, {"text": "what \nis it"}]);
    assert_eq!(saved["turns"][2]["parts"], parts);
    assert_eq!(saved["turns"].as_array().unwrap().len(), 4);
    // A block of several lines is one message.
    assert_eq!(json(here.path(), &chat, "\"\"\"\nHello\n\nthere\n\"\"\"\n").len(), 1);
}

#[test]
fn what_goes_wrong_in_a_conversation_does_not_end_it() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("broken.png"), b"no image").unwrap();
    std::fs::write(here.path().join("broken.json"), b"{\"turns\":[{}]}").unwrap();
    image::RgbImage::new(2000, 3).save(here.path().join("narrow.png")).unwrap();
    std::fs::write(here.path().join("there.json"), b"{}").unwrap();
    let long = "x".repeat(1 << 20);
    let past = "y".repeat(5000);
    let input = format!(
        "{long}\n/image broken.png\n/image none.png\n/image narrow.png\n/image\n/nope\n{past}\n/load broken.json\n/load \
         none.json\n/save there.json\n\"\"\"\n{long}\n{long}\n\"\"\"\nHello\n"
    );
    let input = [b"caf\xff\n", input.as_bytes()].concat();
    let (code, stdout, stderr) = nextflow(here.path(), &["chat", "--max-tokens", "3", "--json"], &input);
    assert_eq!(code, 1, "{stderr}");
    let answers: Vec<Value> =
        String::from_utf8(stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(answers.len() == 1 && answers[0]["cached_tokens"] == 0, "{answers:?}\n{stderr}");
    for part in [
        "not UTF-8 (byte 3)",
        "1048576 bytes, the limit is 65536",
        "cannot read broken.png as an image",
        "cannot read none.png",
        "2000x3 pixels is too narrow",
        "/image needs a file",
        "no command /nope",
        "the conversation has 5057 tokens, the model's limit is 4096",
        "cannot load broken.json",
        "cannot load none.json",
        "there.json exists already",
    ] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    assert_eq!(std::fs::read(here.path().join("there.json")).unwrap(), b"{}");
    let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
    let hints = stderr.lines().filter(|line| line.starts_with("hint: ")).count();
    assert_eq!((errors, hints), (13, 13), "{stderr}");
}

#[test]
fn bad_input_is_refused_with_a_hint() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("broken.png"), b"no image").unwrap();
    let nano = data("../../assets/nano");
    // A model that was never taught to talk has no control tokens.
    let mute = here.path().join("mute");
    std::fs::create_dir(&mute).unwrap();
    for file in ["config.json", "model.safetensors", "image_tokenizer.safetensors"] {
        std::fs::copy(nano.join(file), mute.join(file)).unwrap();
    }
    let mut words: Value = serde_json::from_slice(&std::fs::read(nano.join("tokenizer.json")).unwrap()).unwrap();
    words["added_tokens"] = serde_json::json!([]);
    std::fs::write(mute.join("tokenizer.json"), words.to_string()).unwrap();
    let nano = nano.to_str().unwrap();
    for (args, code, part) in [
        (&["chat", ""][..], 2, "the message is empty"),
        (&["chat", "x", "-i", "broken.png"], 2, "broken.png"),
        (&["chat", "x", "--top-k", "0"], 2, "top-k"),
        (&["chat", "x", "--temperature", "NaN"], 2, "temperature"),
        (&["chat", "x", "--top-p", "1.5"], 2, "top_p"),
        (&["chat", "x", "--repetition-penalty", "0"], 2, "repetition_penalty"),
        (&["chat", "x", "--max-tokens", "0"], 2, "max-tokens"),
        (&["chat", "x", "--min-pixels", "100000"], 2, "--min-pixels 100000 is above"),
        (&["chat", "x", "--model", "mute"], 3, "does not chat"),
        (&["chat", "x", "--model", "nowhere"], 3, "nowhere"),
        (&["gen", "-p", "x"], 3, "does not draw"),
        (&["assemble", "--backbone", nano, "--tokenizer", nano, "-o", "out"], 3, "is not Qwen2.5-VL"),
    ] {
        let (found, _, stderr) = nextflow(here.path(), args, b"");
        assert!(found == code && stderr.contains(part) && stderr.contains("hint: "), "{args:?} {found}: {stderr}");
    }
    let (code, _, stderr) = nextflow(here.path(), &["chat", "-"], &[b'x'; 100_000]);
    assert!(code == 2 && stderr.contains("100000 bytes"), "{stderr}");
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 2, "something was left over");
}

#[test]
fn nextflow_is_put_together_and_says_what_its_backbone_says() {
    let here = tempfile::tempdir().unwrap();
    let [tiny, nano] = [data("qwen/tiny"), data("../../assets/nano")];
    let (tiny, nano) = (tiny.to_str().unwrap(), nano.to_str().unwrap());
    let assemble = ["assemble", "--backbone", tiny, "--tokenizer", nano, "-o", "stage0"];
    let (code, stdout, stderr) = nextflow(here.path(), &assemble, b"");
    assert_eq!((code, &stdout[..]), (0, &b"stage0\n"[..]), "{stderr}");
    let info = &json(here.path(), &["info", "stage0", "--json"], "")[0];
    assert_eq!(info["family"], "NextFlow model stage0");
    for what in ["missing", "misshapen", "unknown"] {
        assert_eq!(info["fit"][what], serde_json::json!([]), "{what}");
    }
    let say = |model: &str| {
        let args = ["chat", "Hello, 你好", "--json", "--max-tokens", "32", "--temperature", "0", "--model", model];
        json(here.path(), &args, "")[0]["text"].clone()
    };
    assert_eq!(say("stage0"), say(tiny));
    let draw = ["gen", "-p", "a cat", "--size", "128x128", "--model", "stage0", "-o", "cat.png"];
    let (code, _, stderr) = nextflow(here.path(), &draw, b"");
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(image::open(here.path().join("cat.png")).unwrap().width(), 128);
    let (code, _, stderr) = nextflow(here.path(), &assemble, b"");
    assert!(code == 2 && stderr.contains("exists already"), "{stderr}");
}

#[test]
fn a_quantised_copy_says_what_quantising_at_load_says() {
    let here = tempfile::tempdir().unwrap();
    let (code, _, stderr) = nextflow(here.path(), &["quantize", "--type", "q8_0", "-o", "small"], b"");
    assert_eq!(code, 0, "{stderr}");
    let picture = data("tokenflow/preprocess/drawings_small.png");
    let say = |more: &[&str]| {
        let args = ["chat", "-i", picture.to_str().unwrap(), "x", "--json", "--max-tokens", "20", "--temperature", "0"];
        json(here.path(), &[&args, more].concat(), "")[0]["text"].clone()
    };
    assert_eq!(say(&["--model", "small"]), say(&["--quant", "q8_0"]));
}

#[test]
fn the_models_own_settings_hold_where_no_flag_says_otherwise() {
    let here = tempfile::tempdir().unwrap();
    let model = here.path().join("m");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(data("qwen/tiny")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let answer = |settings: Value, more: &[&str]| {
        std::fs::write(model.join("generation_config.json"), settings.to_string()).unwrap();
        let args = ["chat", "b", "--model", "m", "--json", "--max-tokens", "30"];
        json(here.path(), &[&args, more].concat(), "").remove(0)
    };
    let text = |settings: &Value, more: &[&str]| answer(settings.clone(), more)["text"].clone();
    let greedy = serde_json::json!({ "do_sample": false, "eos_token_id": 258 });
    assert_eq!(text(&greedy, &["--seed", "1"]), text(&greedy, &["--seed", "2"]));
    let mut other = greedy.clone();
    other["repetition_penalty"] = 3.0.into();
    assert_ne!(text(&other, &[]), text(&greedy, &[]));
    assert_eq!(text(&other, &["--repetition-penalty", "1"]), text(&greedy, &[]));
    let draws =
        serde_json::json!({ "do_sample": true, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "eos_token_id": 258 });
    assert_ne!(text(&draws, &["--seed", "1"]), text(&draws, &["--seed", "2"]));
    for (key, one) in [("top_k", serde_json::json!(1)), ("top_p", serde_json::json!(1e-6))] {
        let mut draws = draws.clone();
        draws[key] = one;
        assert_eq!(text(&draws, &["--seed", "1"]), text(&greedy, &[]), "{key}");
    }
    // Any word is a stop.
    let stops: Vec<u32> = (0..280).collect();
    let stopped = answer(serde_json::json!({ "eos_token_id": stops }), &[]);
    assert_eq!((&stopped["ending"], &stopped["text"]), (&"stop".into(), &"".into()));
}

/// Ctrl-C ends a reply; the conversation goes on.
#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_reply_only() {
    use std::io::Read;
    let here = tempfile::tempdir().unwrap();
    let mut chat =
        command(here.path(), &["chat", "--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "4000"]);
    let mut child = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    // A question whose answer has 3,772 words: it is not over before it is interrupted.
    input.write_all(b"b\n").unwrap();
    output.read_exact(&mut [0; 10]).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    // Its end is told before the next line is read.
    input.write_all(b"/show\n/exit\n").unwrap();
    drop(input);
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).unwrap();
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    assert!(stderr.contains("(stopped)") && stderr.contains("you: b") && stderr.contains("model: "), "{stderr}");
}

/// Files as terminals paste them, and numbers of images that there are not.
#[test]
fn images_are_named_as_people_name_them() {
    let here = tempfile::tempdir().unwrap();
    let picture = data("tokenflow/preprocess/drawings_small.png");
    for name in ["my pic.png", "b.png"] {
        std::fs::copy(&picture, here.path().join(name)).unwrap();
    }
    let at = here.path().to_str().unwrap();
    let lines = [
        "$9 what is it?".into(),
        "$0 what is it?".into(),
        "$99999999999999999999999 what is it?".into(),
        "it costs \\$5".into(),
        "/image \"my pic.png\"".into(),
        "/image 'my pic.png' b.png".into(),
        "/image my\\ pic.png".into(),
        format!("/image file://{at}/my%20pic.png"),
        "/image 'none at all.png'".into(),
        "/image https://example.com/a.png".into(),
        "what are they?".into(),
    ];
    let args = ["chat", "--temperature", "0", "--max-tokens", "3", "--json"];
    let (code, stdout, stderr) = nextflow(here.path(), &args, lines.join("\n").as_bytes());
    assert_eq!(code, 1, "{stderr}");
    for part in [
        "$9 is not an image: there are none yet",
        "$0 is not an image",
        "$99999999999999999999999 is not an image",
        "cannot read none at all.png",
        "addresses are not fetched",
    ] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    assert_eq!(stderr.matches("is attached to the next message").count(), 5, "{stderr}");
    let answers: Vec<Value> =
        String::from_utf8(stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 2, "{stderr}");
    assert!(answers[1]["prompt_tokens"].as_u64().unwrap() > answers[0]["prompt_tokens"].as_u64().unwrap() + 50);
}

/// An image that comes through a pipe of the shell, or as standard input by its other names.
#[cfg(target_os = "linux")]
#[test]
fn images_come_through_pipes() {
    let here = tempfile::tempdir().unwrap();
    std::fs::copy(data("tokenflow/preprocess/drawings_small.png"), here.path().join("a.png")).unwrap();
    let ask = |image: &str, rest: &str| {
        let nextflow = env!("CARGO_BIN_EXE_nextflow");
        let script = format!("{nextflow} chat hi -i {image} --temperature 0 --max-tokens 3 --json {rest}");
        let mut command = Command::new("bash");
        let command = command.args(["-c", &script]).current_dir(here.path()).env("NEXTFLOW_MODEL", data("qwen/tiny"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{image}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["text"].clone()
    };
    let plain = ask("a.png", "");
    assert_eq!(ask("<(cat a.png)", ""), plain);
    assert_eq!(ask("/dev/stdin", "< a.png"), plain);
    assert_eq!(ask("/dev/fd/0", "< <(cat a.png)"), plain);
}
