//! OneCAT on the real program: a tiny model in a folder, with the reference's tiny transformer, an
//! image tokenizer of random weights and words of one letter.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::{DType, Device, Tensor};
use nextflow::checkpoint::{Weights, save};
use nextflow::tokenizer::{BitConfig, BitDecoder, BitEncoder, BitTokenizerConfig, CnnConfig, CnnLayout};
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/onecat").join(name)
}

fn settings() -> Value {
    serde_json::from_slice(&std::fs::read(data("tiny.json")).unwrap()).unwrap()
}

const MARKS: [&str; 10] = [
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<img_gen>",
    "<REEF_GEN_CONTEXT>",
    "<ref_gen>",
    "</ref_gen>",
    "<|endoftext|>",
];

/// Letters, then marks: fewer words than any tiny model has.
fn words() -> Value {
    let mut vocab: BTreeMap<String, usize> =
        (b'!'..=b'~').enumerate().map(|(i, b)| ((b as char).to_string(), i)).collect();
    let letters = vocab.len();
    vocab.extend([("Ġ".to_string(), letters), ("Ċ".to_string(), letters + 1)]);
    let added: Vec<Value> = MARKS
        .iter()
        .enumerate()
        .map(|(i, mark)| {
            json!({"id": letters + 2 + i, "content": mark, "special": true, "normalized": false, "single_word": false,
                "lstrip": false, "rstrip": false})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({"version": "1.0", "added_tokens": added, "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}})
}

fn config() -> Value {
    let model = settings()["model"].clone();
    let keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"];
    let text: BTreeMap<&str, Value> = keys.into_iter().map(|key| (key, model[key].clone())).collect();
    json!({"model_type": "onecat", "template": "onecat", "llm_config": text, "downsample_ratio": 0.5,
        "patch_vision_config": {"hidden_size": model["patch_hidden_size"], "patch_size": model["patch_size"],
            "image_size": model["image_size"]},
        "vae_embed_dim": model["vae_embed_dim"], "saa_scales": model["saa_scales"], "saa_alpha": model["saa_alpha"],
        "system_message": "You draw."})
}

/// The reference's image decoder, if its file is there, and an encoder of random weights.
fn image_tokenizer(bits: usize, file: &Path) {
    let half = CnnConfig {
        ch: 32,
        ch_mult: vec![1; 5],
        num_res_blocks: 1,
        z_channels: bits,
        groups: 32,
        patch: 1,
        layout: CnnLayout::Infinity,
    };
    let config = BitTokenizerConfig { encoder: half.clone(), decoder: half, bits: BitConfig { dim: bits, patch: 1 } };
    let weights = Weights::trainable(7, &Device::Cpu);
    BitEncoder::load(&weights, &config).unwrap();
    BitDecoder::load(&weights, &config).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        weights.vars().into_iter().map(|(key, var)| (key, var.as_detached_tensor())).collect();
    if let Ok(known) = candle_core::safetensors::load(data("decoder_tiny.weights.safetensors"), &Device::Cpu) {
        for (key, tensor) in known {
            if tensors.get(&key).is_some_and(|own| own.dims() == tensor.dims()) {
                tensors.insert(key, tensor);
            }
        }
    }
    save(file, tensors, None).unwrap();
}

fn weights() -> PathBuf {
    let entries = std::fs::read_dir(data("")).unwrap().map(|entry| entry.unwrap().path());
    let is = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.ends_with(".weights.safetensors") && !name.starts_with("decoder")
    };
    entries.into_iter().find(is).expect("a model")
}

/// A folder of the model as it is published, with the image tokenizer beside it under its own name.
fn model() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| place.path().join(name);
    std::fs::copy(weights(), file("model.safetensors")).unwrap();
    std::fs::write(file("config.json"), config().to_string()).unwrap();
    std::fs::write(file("tokenizer.json"), words().to_string()).unwrap();
    let bits = settings()["model"]["vae_embed_dim"].as_u64().unwrap() as usize;
    image_tokenizer(bits, &file("infinity_vae_d32reg.pth"));
    place
}

/// A picture of (width, height) pixels.
fn picture(folder: &Path, name: &str, (width, height): (u32, u32)) -> String {
    let path = folder.join(name);
    image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, (3 * y) as u8, (x * y) as u8]))
        .save(&path)
        .unwrap();
    path.display().to_string()
}

fn command(args: &[&str]) -> Command {
    let home = std::env::temp_dir().join("nextflow-no-cache");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    command.args(args).env("HF_HOME", home).env("HF_HUB_OFFLINE", "1").env_remove("NEXTFLOW_MODEL");
    command
}

fn nextflow(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

#[track_caller]
fn ok(args: &[&str]) -> String {
    let output = nextflow(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fails(args: &[&str], code: i32, part: &str) -> String {
    let output = nextflow(args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    assert!(error.contains(part) && error.contains("hint: "), "{args:?}: {error}");
    error
}

fn pixels(path: &str) -> image::RgbImage {
    image::open(path).unwrap().to_rgb8()
}

#[test]
fn images_are_drawn_and_drawn_again() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let (folder, place) = (model.path().to_str().unwrap(), |name: &str| out.path().join(name).display().to_string());
    let read = |name: &str| std::fs::read(place(name)).unwrap();
    for (name, more) in [
        ("plain.png", &[][..]),
        ("unguided.png", &["--cfg", "1"]),
        ("list.png", &["--cfg", "4,4,3,3,2,1,1", "--temperature", "1,1,0.9,0.8,0.7,0.6,0.5"]),
        ("negative.png", &["-n", "a blue pear"]),
        ("early.png", &["--cfg-until", "3", "--top-p", "1"]),
        ("draft.png", &["--draft", "1"]),
    ] {
        let path = place(name);
        let mut args =
            vec!["gen", "--model", folder, "-p", "a red apple", "--seed", "3", "--size", "256x256", "-o", &path];
        args.extend(more);
        assert_eq!(ok(&args).trim(), path);
        assert_eq!(pixels(&path).dimensions(), (256, 256));
        let again = place(&format!("again-{name}"));
        ok(&["gen", "--model", folder, "--from", &path, "-o", &again]);
        assert!(read(name) == read(&format!("again-{name}")), "{name} is not drawn again");
        assert!(name == "plain.png" || read(name) != read("plain.png"), "{name} is like plain.png");
    }
    let wide = place("wide.png");
    ok(&["gen", "--model", folder, "-p", "x", "--size", "336x224", "--seed", "1", "-o", &wide]);
    assert_eq!(pixels(&wide).dimensions(), (336, 224));
}

/// Prompts that are read beforehand, those that come one by one, and batches.
#[test]
fn jobs_and_batches_give_the_same() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let (folder, at) = (model.path().to_str().unwrap(), |name: &str| out.path().join(name).display().to_string());
    let lines = [
        json!({"prompt": "a cat", "out": "a.png", "seed": 1}),
        json!({"prompt": "two dogs", "out": "b.png", "seed": 2}),
        json!({"prompt": "a cat", "out": "c.png", "seed": 3, "cfg": 3, "negative": "grey"}),
    ];
    let lines = lines.map(|line| line.to_string()).join("\n");
    std::fs::write(out.path().join("jobs.jsonl"), &lines).unwrap();
    let jobs = at("jobs.jsonl");
    let run = |to: &str, file: &str, more: &[&str]| {
        let to = at(to);
        std::fs::create_dir(&to).unwrap();
        let args = ["gen", "--model", folder, "--jsonl", file, "--size", "256x256", "--out-dir", &to];
        let mut child =
            command(&[&args[..], more].concat()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout.iter().filter(|b| **b == b'\n').count(), 3);
        ["a.png", "b.png", "c.png"].map(|name| std::fs::read(Path::new(&to).join(name)).unwrap())
    };
    let one = run("one", &jobs, &[]);
    assert!(one == run("batch", &jobs, &["--batch", "2"]));
    assert!(one == run("pipe", "-", &[]));
}

#[test]
fn edits_have_the_ratio_of_their_source() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let folder = model.path().to_str().unwrap();
    let place = |name: &str| out.path().join(name).display().to_string();
    let mut edits = Vec::new();
    for (size, drawn, level) in
        [((64, 48), (320, 240), "320x240"), ((50, 75), (224, 336), "224x336"), ((40, 40), (256, 256), "256x256")]
    {
        let source = picture(out.path(), "source.png", size);
        // What would be drawn without a size: the same ratio, at 1024 pixels.
        let plan = ["edit", "--model", folder, "-i", &source, "-p", "make it blue", "--dry-run", "--json"];
        let plan: Value = serde_json::from_str(&ok(&plan)).unwrap();
        let sides: Vec<f64> = plan["size"].as_str().unwrap().split('x').map(|side| side.parse().unwrap()).collect();
        assert!((sides[0] / sides[1] - f64::from(size.0) / f64::from(size.1)).abs() < 0.02, "{plan}");
        assert!(plan["peak_memory"].as_u64() > Some(0) && plan["passes"] == 13);
        let path = place("edit.png");
        let args = [
            "edit",
            "--model",
            folder,
            "-i",
            &source,
            "-p",
            "make it blue",
            "--seed",
            "3",
            "--size",
            level,
            "-o",
            &path,
        ];
        ok(&[&args[..], &["--force"]].concat());
        assert_eq!(pixels(&path).dimensions(), drawn);
        edits.push(pixels(&path));
        if size == (40, 40) {
            // Every strength of guidance is another image, and the same is the same.
            for (more, same) in [
                (&[][..], true),
                (&["--image-cfg", "1"], true),
                (&["--image-cfg", "0"], false),
                (&["--image-cfg", "4"], false),
                (&["--cfg", "1"], false),
                (&["--cfg", "1", "--image-cfg", "0"], false),
                (&["--cfg-until", "2"], false),
            ] {
                let other = place("other.png");
                let args = [
                    "edit",
                    "--model",
                    folder,
                    "-i",
                    &source,
                    "-p",
                    "make it blue",
                    "--seed",
                    "3",
                    "--size",
                    level,
                    "-o",
                    &other,
                ];
                ok(&[&args[..], more, &["--force"]].concat());
                assert_eq!(pixels(&other) == edits[2], same, "{more:?}");
            }
        }
    }
    // Another picture is another edit; two instructions and two seeds are four images.
    let [first, second] = [(40, 40), (41, 41)].map(|size| picture(out.path(), &format!("{}.png", size.0), size));
    let mut lines = std::fs::File::create(out.path().join("prompts.txt")).unwrap();
    writeln!(lines, "make it blue\nmake it red").unwrap();
    let (prompts, to) = (place("prompts.txt"), place("many"));
    std::fs::create_dir(&to).unwrap();
    for source in [&first, &second] {
        let args = [
            "edit",
            "--model",
            folder,
            "-i",
            source,
            "--prompt-file",
            &prompts,
            "--seed",
            "3,4",
            "--size",
            "256x256",
            "--out-dir",
            &to,
        ];
        assert_eq!(ok(&args).lines().count(), 4);
    }
    let all: Vec<Vec<u8>> = std::fs::read_dir(&to)
        .unwrap()
        .map(|entry| pixels(entry.unwrap().path().to_str().unwrap()).into_raw())
        .collect();
    assert!((0..8).all(|i| all[..i].iter().all(|other| *other != all[i])), "two of the edits are the same");
}

fn chat(folder: &str, more: &[&str], said: &str) -> String {
    let args = ["chat", "--model", folder, "--max-tokens", "12", "--seed", "1"];
    let mut child = command(&[&args[..], more].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(said.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap() + &error
}

#[test]
fn conversations_go_on_from_what_was_read() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let folder = model.path().to_str().unwrap();
    let [one, other] = [(60, 90), (64, 64)].map(|size| picture(out.path(), &format!("{}.png", size.0), size));
    let json = |more: &[&str], said: &str| -> Vec<Value> {
        let lines = chat(folder, &[&["--json"], more].concat(), said);
        lines.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    // Several turns, of which only what is new is read; the answers are those of the same
    // conversation at once.
    let turns = json(&["-i", &one], "What is this?\nAnd its colour?\nWhy?\n");
    assert_eq!(turns.len(), 3);
    assert_eq!(turns[0]["cached_tokens"], 0);
    for pair in turns.windows(2) {
        let (before, now) = (&pair[0], &pair[1]);
        assert!(now["cached_tokens"].as_u64() >= before["prompt_tokens"].as_u64(), "{now}");
        assert!(now["prompt_tokens"].as_u64() > now["cached_tokens"].as_u64());
    }
    assert_eq!(json(&["-i", &one, "What is this?"], "")[0]["text"], turns[0]["text"]);
    // The same again, turn by turn.
    let again = json(&["-i", &one], "What is this?\nAnd its colour?\nWhy?\n");
    assert!(again.iter().zip(&turns).all(|(again, first)| again["text"] == first["text"]));
    // The image makes a difference, and so do its pixels.
    let answer = |more: &[&str]| json(&[more, &["What is this?"]].concat(), "")[0].clone();
    let tokens = |answer: &Value| answer["prompt_tokens"].as_u64().unwrap();
    let (with, without) = (answer(&["-i", &one]), answer(&[]));
    // 24x36 tokens, a thumbnail, two marks and a newline.
    let dry: Value =
        serde_json::from_str(&ok(&["chat", "--model", folder, "-i", &one, "--dry-run", "--json", "x"])).unwrap();
    assert_eq!(tokens(&with) - tokens(&without), dry["images"][0]["tokens"].as_u64().unwrap() + 3);
    assert!(dry["peak_memory"].as_u64() > Some(0));
    // A new conversation may have another image, the old one may not.
    let said = format!("What is this?\n/clear\n/image {other}\nAnd this?\n");
    assert_eq!(json(&["-i", &one], &said).len(), 2);
    // Streamed text is the whole text.
    let streamed = chat(folder, &["-q", "-i", &one, "What is this?"], "");
    assert!(streamed.trim().starts_with(with["text"].as_str().unwrap().trim()), "{streamed}");
}

#[test]
fn a_smaller_copy_does_the_same() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let folder = model.path().to_str().unwrap();
    let source = picture(out.path(), "source.png", (40, 40));
    for kind in ["q8_0", "q4_0", "q4_K", "bf16"] {
        let small = out.path().join(kind);
        let small = small.to_str().unwrap();
        assert_eq!(ok(&["quantize", "--model", folder, "--type", kind, "-o", small]).trim(), small);
        let info = ok(&["info", small]);
        assert!(info.contains("complete") && !info.contains("unknown"), "{info}");
        for verb in [&["gen"][..], &["edit", "-i", &source]] {
            let [copy, direct] =
                ["copy", "direct"].map(|name| out.path().join(format!("{kind}-{}-{name}.png", verb[0])));
            let [copy, direct] = [copy.to_str().unwrap(), direct.to_str().unwrap()];
            let more = ["-p", "a red apple", "--seed", "3", "--size", "256x256"];
            ok(&[verb, &more, &["--model", small, "-o", copy]].concat());
            ok(&[verb, &more, &["--model", folder, "--quant", kind, "-o", direct]].concat());
            assert!(pixels(copy) == pixels(direct), "{kind} {verb:?}");
        }
        let said = |args: &[&str]| {
            let line = ok(&[&["chat", "--json", "--max-tokens", "9", "-i", &source, "What?"], args].concat());
            serde_json::from_str::<Value>(&line).unwrap()["text"].clone()
        };
        assert_eq!(said(&["--model", small]), said(&["--model", folder, "--quant", kind]));
        fails(&["gen", "--model", small, "--quant", "q8_0", "-p", "x", "-o", "x.png"], 2, "have their type already");
    }
}

#[test]
fn what_a_folder_holds_is_said() {
    let model = model();
    let folder = model.path().to_str().unwrap();
    let info = ok(&["info", folder]);
    let layers = settings()["model"]["num_hidden_layers"].clone();
    for part in [
        format!("{layers} layers"),
        "bits a token, adapters of rank".into(),
        "text tokenizer: 96 words".into(),
        "complete".into(),
    ] {
        assert!(info.contains(&part), "{part}: {info}");
    }
    assert!(info.starts_with("OneCAT\n") && !info.contains("unknown"), "{info}");
    let file = model.path().join("model.safetensors");
    assert!(ok(&["info", file.to_str().unwrap()]).starts_with("OneCAT, the transformer\n"));
    // Codes are Infinity's.
    let out = tempfile::tempdir().unwrap();
    let source = picture(out.path(), "source.png", (256, 256));
    let codes = out.path().join("codes.json").display().to_string();
    ok(&["encode", &source, "--model", folder, "--size", "256x256", "-o", &codes]);
    ok(&["decode", &codes, "--model", folder, "-o", &out.path().join("back.png").display().to_string()]);
    // Without it, conversations go on, and nothing else.
    std::fs::remove_file(model.path().join("infinity_vae_d32reg.pth")).unwrap();
    let info = ok(&["info", folder]);
    assert!(info.contains("does not draw") && info.contains("complete"), "{info}");
    ok(&["chat", "--model", folder, "-i", &source, "--max-tokens", "3", "What?"]);
}

/// A change of a folder, and what is then said.
type Case = (&'static str, fn(&Path), &'static [&'static str], i32, &'static str);

fn set(folder: &Path, pointer: &str, value: Value) {
    let mut config = config();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    config.pointer_mut(parent).unwrap()[key] = value;
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

fn retokenize(folder: &Path, change: impl Fn(&mut Vec<Value>)) {
    let mut words = words();
    change(words["added_tokens"].as_array_mut().unwrap());
    std::fs::write(folder.join("tokenizer.json"), words.to_string()).unwrap();
}

fn rewrite(folder: &Path, change: impl Fn(&mut BTreeMap<String, Tensor>)) {
    let mut tensors: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(weights(), &Device::Cpu).unwrap().into_iter().collect();
    change(&mut tensors);
    save(&folder.join("model.safetensors"), tensors, None).unwrap();
}

const GEN: &[&str] = &["gen", "-p", "a cat", "--seed", "1", "--size", "256x256", "-o", "x.png"];
const EDIT: &[&str] = &["edit", "-i", "p.png", "-p", "make it red", "--seed", "1", "--size", "256x256", "-o", "x.png"];
const CHAT: &[&str] = &["chat", "-i", "p.png", "--max-tokens", "3", "What?"];
const ANY: &[&[&str]] = &[GEN, EDIT, CHAT];

/// Folders and inputs that are wrong, each with its exit code and a part of the sentence. `*`
/// stands for every command.
const CASES: &[Case] = &[
    // Weights.
    (
        "a file that is cut",
        |f| {
            let bytes = std::fs::read(f.join("model.safetensors")).unwrap();
            std::fs::write(f.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
        },
        &["*"],
        3,
        "model.safetensors",
    ),
    (
        "a pointer of git-lfs",
        |f| {
            std::fs::write(
                f.join("model.safetensors"),
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            )
            .unwrap()
        },
        &["*"],
        3,
        "git-lfs",
    ),
    ("no weights", |f| std::fs::remove_file(f.join("model.safetensors")).unwrap(), &["*"], 3, "model.safetensors"),
    (
        "a missing shard",
        |f| {
            std::fs::remove_file(f.join("model.safetensors")).unwrap();
            let map = json!({"weight_map": {"lvl_embed.weight": "model-00001-of-00002.safetensors", "mlp.0.bias": "model-00002-of-00002.safetensors"}});
            std::fs::write(f.join("model.safetensors.index.json"), map.to_string()).unwrap();
        },
        &["*"],
        3,
        "shards are missing",
    ),
    (
        "an index that leads elsewhere",
        |f| {
            std::fs::remove_file(f.join("model.safetensors")).unwrap();
            std::fs::write(f.join("model.safetensors.index.json"), r#"{"weight_map": {"x": "../x.safetensors"}}"#)
                .unwrap();
        },
        &["*"],
        3,
        "not a plain file",
    ),
    (
        "a tensor of another shape",
        |f| {
            rewrite(f, |t| {
                let key = "image_gen_out_projector.mlp.0.weight";
                let half = t[key].narrow(0, 0, 3).unwrap().contiguous().unwrap();
                t.insert(key.into(), half);
            })
        },
        &["gen", "edit"],
        3,
        "image_gen_out_projector.mlp.0.weight",
    ),
    (
        "an adapter of another shape",
        |f| {
            rewrite(f, |t| {
                let key = t.keys().find(|key| key.ends_with("up_proj.lora_B.default.weight")).unwrap().clone();
                let part = t[&key].narrow(1, 0, 4).unwrap().contiguous().unwrap();
                t.insert(key, part);
            })
        },
        &["gen", "edit"],
        3,
        "lora_B.default.weight",
    ),
    (
        "a missing expert",
        |f| rewrite(f, |t| t.retain(|key, _| !key.contains("mlp_ue"))),
        &["edit", "chat"],
        3,
        "mlp_ue",
    ),
    (
        "a missing layer",
        |f| rewrite(f, |t| t.retain(|key, _| !key.contains("layers.1."))),
        &["*"],
        3,
        "num_hidden_layers",
    ),
    (
        "weights that are not finite",
        |f| {
            rewrite(f, |t| {
                let nan =
                    Tensor::full(f32::NAN, t["patch_language_model.model.norm.weight"].shape(), &Device::Cpu).unwrap();
                t.insert("patch_language_model.model.norm.weight".into(), nan);
            })
        },
        &["*"],
        5,
        "not finite",
    ),
    (
        "weights of integers",
        |f| {
            rewrite(f, |t| {
                let key = "lvl_embed.weight";
                let whole = t[key].to_dtype(DType::I64).unwrap();
                t.insert(key.into(), whole);
            })
        },
        &["gen", "edit"],
        3,
        "lvl_embed.weight",
    ),
    // Configs.
    ("a config that is not JSON", |f| std::fs::write(f.join("config.json"), "{").unwrap(), &["*"], 3, "config.json"),
    ("a config of another size", |f| set(f, "/llm_config/hidden_size", json!(4096)), &["*"], 3, "hidden_size 4096"),
    ("heads that do not divide", |f| set(f, "/llm_config/num_attention_heads", json!(7)), &["*"], 3, "7 heads"),
    ("a size that is none", |f| set(f, "/llm_config/num_hidden_layers", json!(-1)), &["*"], 3, "num_hidden_layers -1"),
    ("another template", |f| set(f, "/template", json!("internvl2_5")), &["*"], 3, "template"),
    ("another patch", |f| set(f, "/patch_vision_config/patch_size", json!(16)), &["*"], 3, "patch_size 16"),
    ("other bits", |f| set(f, "/vae_embed_dim", json!(16)), &["*"], 3, "vae_embed_dim 16"),
    (
        "weights of another program",
        |f| set(f, "/quantization_config", json!({"quant_method": "gptq"})),
        &["*"],
        3,
        "quantised for another program",
    ),
    // Words.
    ("no words", |f| std::fs::remove_file(f.join("tokenizer.json")).unwrap(), &["*"], 3, "tokenizer.json"),
    (
        "words that are not JSON",
        |f| std::fs::write(f.join("tokenizer.json"), "[").unwrap(),
        &["*"],
        3,
        "tokenizer.json",
    ),
    (
        "a missing mark",
        |f| retokenize(f, |added| added.retain(|token| token["content"] != "<img_gen>")),
        &["*"],
        3,
        "<img_gen>",
    ),
    (
        "a mark without a row",
        |f| retokenize(f, |added| added[7]["id"] = json!(4000)),
        &["*"],
        3,
        "<ref_gen> the id 4000",
    ),
    // The image tokenizer.
    (
        "no image tokenizer",
        |f| std::fs::remove_file(f.join("infinity_vae_d32reg.pth")).unwrap(),
        &["gen", "edit"],
        3,
        "no image tokenizer",
    ),
    (
        "an image tokenizer of other bits",
        |f| image_tokenizer(16, &f.join("infinity_vae_d32reg.pth")),
        &["gen", "edit"],
        3,
        "16 bits",
    ),
    (
        "something else for it",
        |f| std::fs::write(f.join("infinity_vae_d32reg.pth"), "x").unwrap(),
        &["gen", "edit"],
        3,
        "infinity_vae_d32reg.pth",
    ),
    // Pictures.
    (
        "a picture that is cut",
        |f| {
            let bytes = std::fs::read(f.join("p.png")).unwrap();
            std::fs::write(f.join("p.png"), &bytes[..bytes.len() / 2]).unwrap();
        },
        &["edit", "chat"],
        2,
        "p.png",
    ),
    (
        "a picture of words",
        |f| std::fs::write(f.join("p.png"), "not a picture").unwrap(),
        &["edit", "chat"],
        2,
        "p.png",
    ),
    ("no picture", |f| std::fs::remove_file(f.join("p.png")).unwrap(), &["edit", "chat"], 2, "p.png"),
    ("a picture that is too narrow", |f| drop(picture(f, "p.png", (1000, 4))), &["edit", "chat"], 2, "too narrow"),
];

#[test]
fn what_is_wrong_is_said_in_a_sentence() {
    assert!(CASES.len() >= 24);
    for (what, change, verbs, code, part) in CASES {
        let place = model();
        picture(place.path(), "p.png", (40, 40));
        change(place.path());
        for args in ANY.iter().filter(|args| verbs.contains(&"*") || verbs.contains(&args[0])) {
            let output = command(&[*args, &["--model", "."][..]].concat()).current_dir(place.path()).output().unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(*code), "{what}, {}: {error}", args[0]);
            let lines: Vec<&str> = error.lines().collect();
            assert!(error.contains(part) && error.contains("hint: "), "{what}, {}: {error}", args[0]);
            assert!(lines.len() <= 3 && !error.contains("panicked"), "{what}, {}: {error}", args[0]);
            assert!(!place.path().join("x.png").exists(), "{what}, {}: an image", args[0]);
        }
    }
}

/// Flags and inputs that do not fit a sound model.
#[test]
fn flags_that_mean_nothing_are_refused() {
    let model = model();
    let folder = model.path().to_str().unwrap();
    let [one, two] = [(40, 40), (50, 50)].map(|size| picture(model.path(), &format!("{}.png", size.0), size));
    let edit = |more: &[&'static str], code, part: &str| {
        let args = ["edit", "--model", folder, "-i", &one, "-p", "make it red", "-o", "x.png"];
        fails(&[&args[..], more].concat(), code, part);
    };
    edit(&["--size", "300x300"], 2, "--size 256x256");
    edit(&["--size", "0x0"], 2, "0x0");
    edit(&["--free"], 2, "--image-cfg 0");
    edit(&["--image-cfg", "-1"], 2, "--image-cfg -1");
    edit(&["--image-cfg", "NaN"], 2, "--image-cfg NaN");
    edit(&["--cfg", "NaN"], 2, "--cfg NaN");
    edit(&["--cfg", "1,2,3"], 2, "3 values");
    edit(&["--cfg-until", "40"], 2, "--cfg-until 13");
    edit(&["--cfg", "1", "--cfg-until", "4"], 2, "without guidance");
    edit(&["--temperature", "0", "--top-k", "3"], 2, "no effect");
    fails(&["edit", "--model", folder, "-i", &one, "-i", &two, "-p", "x", "-o", "x.png"], 2, "edits one image, not 2");
    fails(&["edit", "-i", &one, "-p", "x", "--image-cfg", "1", "-o", "x.png"], 2, "is for OneCAT");
    let draw = |more: &[&'static str], code, part: &str| {
        fails(&[&["gen", "--model", folder, "-o", "x.png"][..], more].concat(), code, part);
    };
    draw(&["-p", ""], 2, "empty");
    draw(&["-p", "x", "--think"], 2, "does not think");
    draw(&["-p", "x", "--passes", "2"], 2, "one pass");
    draw(&["-p", "x", "--cfg-layers", "2"], 2, "is for Infinity");
    draw(&["-p", "x", "--draft", "13"], 2, "--draft 13");
    draw(&["-p", "x", "-n", "grey", "--cfg", "1"], 2, "leads away from nothing");
    fails(&["chat", "--model", folder, "-i", &one, "-i", &two, "What?"], 2, "one image in a conversation, not 2");
    fails(&["chat", "--model", folder, "/gen a cat"], 2, "not within a conversation");
    let error = fails(&["chat", "--model", folder, "-i", &one, "/edit make it red"], 2, "not within a conversation");
    assert!(error.contains("nextflow edit --model FOLDER -i IMAGE -p TEXT"), "{error}");
    fails(&["chat", "--model", folder, "--out-dir", ".", "What?"], 2, "draws nothing");
    fails(&["eval", "--model", folder], 3, "OneCAT");
    fails(&["bench", "--synthetic", "nextflow-7b", "--task", "chat"], 2, "onecat-3b");
    // Too much for the context, before anything is loaded.
    set(model.path(), "/llm_config/max_position_embeddings", json!(600));
    edit(&["--size", "256x256"], 2, "the model's limit is 600");
    fails(&["chat", "--model", folder, "-i", &one, "What?"], 2, "the model's limit is 600");
    // A second image in a conversation that goes on.
    std::fs::write(model.path().join("config.json"), config().to_string()).unwrap();
    let mut child = command(&["chat", "--model", folder, "-i", &one, "--max-tokens", "3"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said = format!("What?\n/image {two}\nAnd this?\nWhat?\n");
    child.stdin.take().unwrap().write_all(said.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.contains("one image in a conversation, not 2"), "{error}");
}
