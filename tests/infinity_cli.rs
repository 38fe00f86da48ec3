//! Infinity on the real program: a tiny model in a folder, with the reference's tiny transformer
//! and tokenizer and a text encoder of random weights.

#[path = "common/headers.rs"]
mod headers;

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::t5::Config;
use nextflow::checkpoint::Weights;
use nextflow::t5;
use serde_json::{Value, json};
use zip::write::{SimpleFileOptions, ZipWriter};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/infinity").join(name)
}

/// T5's file layout in a folder: 256 features for the tiny transformer, words of one letter.
fn text_encoder(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let mut vocab: Vec<(String, f64)> = ["<pad>", "</s>", "<unk>"]
        .map(|word| (word.into(), 0.0))
        .into_iter()
        .chain([("\u{2581}".into(), -2.0)])
        .collect();
    vocab.extend((b'!'..=b'~').map(|b| ((b as char).to_string(), -8.0)));
    let words = vocab.len();
    let added = [(0, "<pad>"), (1, "</s>"), (2, "<unk>")].map(|(id, content)| {
        json!({"id": id, "content": content, "special": true, "normalized": false, "single_word": false,
            "lstrip": false, "rstrip": false})
    });
    let spaces = json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}]});
    let tokenizer = json!({"version": "1.0", "added_tokens": added, "pre_tokenizer": spaces,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": false}});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"model_type": "t5", "vocab_size": words, "d_model": 256, "d_kv": 32, "d_ff": 96, "num_layers": 2,
        "num_heads": 2, "relative_attention_num_buckets": 32, "dropout_rate": 0.0, "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": true, "pad_token_id": 0,
        "eos_token_id": 1});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config: Config = serde_json::from_value(config).unwrap();
    let weights = Weights::trainable(7, &Device::Cpu);
    t5::ask(&weights, &config, false).unwrap();
    let tensors: BTreeMap<String, Tensor> =
        weights.vars().into_iter().map(|(key, var)| (key, var.as_detached_tensor())).collect();
    nextflow::checkpoint::save(&folder.join("model.safetensors"), tensors, None).unwrap();
}

/// A model folder as `quantize` writes it, but for the types.
fn model() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| place.path().join(name);
    std::fs::copy(data("t2i_tiny.weights.safetensors"), file("model.safetensors")).unwrap();
    std::fs::copy(data("tok_f16_tiny.weights.safetensors"), file("image_tokenizer.safetensors")).unwrap();
    std::fs::write(file("config.json"), r#"{"model_type": "infinity", "variant": null}"#).unwrap();
    text_encoder(&file("text_encoder"));
    place
}

/// The files of a transformer that somebody has trained further, called as the public ones are.
fn tuned(transformer: &str, tokenizer: &str, as_tokenizer: &str) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    std::fs::copy(data(&format!("{transformer}.weights.safetensors")), place.path().join("ar-final.pth")).unwrap();
    std::fs::copy(data(&format!("{tokenizer}.weights.safetensors")), place.path().join(as_tokenizer)).unwrap();
    text_encoder(&place.path().join("flan-t5-xl"));
    place
}

/// Completes a file of `torch.save`, whose numbers tests/data does not repeat: storage i is the f32
/// of tensor i of `weights` in the order of names. The pickle, and the storages of tensors that
/// `weights` lacks (unused biases, optimizer states), are as PyTorch wrote them.
fn pytorch_file(saved: &str, weights: &str, to: &Path) {
    let saved_bytes = std::fs::read(data(&format!("{saved}.pth"))).unwrap();
    let mut zip = ZipWriter::new_append(Cursor::new(saved_bytes)).unwrap();
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let weights = candle_core::safetensors::load(data(&format!("{weights}.weights.safetensors")), &Device::Cpu);
    let weights: BTreeMap<String, Tensor> = weights.unwrap().into_iter().collect();
    for (i, tensor) in weights.values().enumerate() {
        let numbers = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        zip.start_file(format!("{saved}/data/{i}"), stored).unwrap();
        zip.write_all(&numbers.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    }
    std::fs::write(to, zip.finish().unwrap().into_inner()).unwrap();
}

fn pixels(path: &Path) -> Vec<u8> {
    image::open(path).unwrap().to_rgb8().into_raw()
}

fn nextflow(args: &[&str]) -> Output {
    let home = std::env::temp_dir().join("nextflow-no-cache");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    command.args(args).env("HF_HOME", home).env("HF_HUB_OFFLINE", "1").env_remove("NEXTFLOW_MODEL");
    command.output().unwrap()
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

fn gen_args<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["gen", "--model", model, "-p", "a red apple", "--seed", "3", "--size", "256x256", "-o", out];
    args.extend(more);
    args
}

#[test]
fn images_are_drawn_and_drawn_again() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let (folder, place) = (model.path().to_str().unwrap(), |name: &str| out.path().join(name).display().to_string());
    let read = |name: &str| std::fs::read(place(name)).unwrap();
    for (name, more) in [
        ("plain.png", &[][..]),
        ("list.png", &["--cfg", "4,4,3,3,2,1,1", "--temperature", "1,1,0.9,0.8,0.7,0.6,0.5"]),
        ("negative.png", &["-n", "a  blue\tpear"]),
        ("within.png", &["--cfg-layers", "2"]),
        ("early.png", &["--cfg-until", "3", "--top-p", "1"]),
        ("draft.png", &["--draft", "1"]),
    ] {
        let path = place(name);
        assert_eq!(ok(&gen_args(folder, &path, more)).trim(), path);
        assert_eq!(image::open(&path).unwrap().to_rgb8().dimensions(), (256, 256));
        let again = place(&format!("again-{name}"));
        ok(&["gen", "--model", folder, "--from", &path, "-o", &again]);
        assert!(read(name) == read(&format!("again-{name}")), "{name} is not drawn again");
        assert!(name == "plain.png" || read(name) != read("plain.png"), "{name} is like plain.png");
    }
    // Every ratio's name and a level's pixels.
    let wide = place("wide.png");
    ok(&["gen", "--model", folder, "-p", "x", "--size", "336x224", "--seed", "1", "-o", &wide]);
    assert_eq!(image::open(&wide).unwrap().to_rgb8().dimensions(), (336, 224));
    fails(&["gen", "--model", folder, "-p", "x", "--size", "300x300", "-o", &place("x.png")], 2, "--size 256x256");
}

#[test]
fn a_prompt_that_is_cut_is_reported() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let (folder, path) = (model.path().to_str().unwrap(), out.path().join("a.png").display().to_string());
    let long = "a red apple ".repeat(400);
    let said = |prompt: &str| {
        let args = ["gen", "--model", folder, "-p", prompt, "--size", "256x256", "--dry-run", "-o", &path];
        let output = nextflow(&args);
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said(&long).contains("the model reads the first 511"), "{}", said(&long));
    assert_eq!(said("a red apple"), "");
}

#[test]
fn jobs_batches_and_stored_features_give_the_same() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let (folder, at) = (model.path().to_str().unwrap(), |name: &str| out.path().join(name).display().to_string());
    let jobs = out.path().join("jobs.jsonl");
    let lines = [
        json!({"prompt": "a cat", "out": "a.png", "seed": 1}),
        json!({"prompt": "two dogs", "out": "b.png", "seed": 2}),
        json!({"prompt": "a cat", "out": "c.png", "seed": 3, "cfg": [4, 4, 3, 3, 2, 1, 1], "negative": "grey"}),
    ];
    std::fs::write(&jobs, lines.map(|line| line.to_string()).join("\n")).unwrap();
    let (jobs, features) = (jobs.display().to_string(), at("features.safetensors"));
    let run = |to: &str, more: &[&str]| {
        let to = at(to);
        let args = ["gen", "--model", folder, "--jsonl", &jobs, "--size", "256x256", "--out-dir", &to];
        assert_eq!(ok(&[&args[..], more].concat()).lines().count(), 3);
        ["a.png", "b.png", "c.png"].map(|name| std::fs::read(Path::new(&to).join(name)).unwrap())
    };
    for to in ["one", "batch", "stored", "again", "folder"] {
        std::fs::create_dir(at(to)).unwrap();
    }
    let one = run("one", &[]);
    assert!(one == run("batch", &["--batch", "2"]));
    assert!(one == run("stored", &["--text-features", &features]));
    // Without the text encoder, by what is stored.
    std::fs::remove_dir_all(model.path().join("text_encoder")).unwrap();
    assert!(one == run("again", &["--text-features", &features]));
    fails(
        &["gen", "--model", folder, "-p", "a bird", "--text-features", &features, "-o", &at("x.png")],
        3,
        "text encoder",
    );
    fails(&["gen", "--model", folder, "-p", "a cat", "-o", &at("x.png")], 3, "text encoder");
    fails(&["gen", "-p", "a cat", "--text-features", &features, "-o", &at("x.png")], 2, "is for Infinity");
}

#[test]
fn what_is_forecast_is_told_by_phase() {
    let model = model();
    let folder = model.path().to_str().unwrap();
    let plan: Value = serde_json::from_str(&ok(&["gen", "--model", folder, "-p", "x", "--dry-run", "--json"])).unwrap();
    // The largest level, for the shape is of no released model.
    assert_eq!((&plan["size"], &plan["codes"], &plan["passes"]), (&json!("1024x1024"), &json!(10521), &json!(13)));
    assert!(
        plan["memory"]["text"].as_u64() > Some(0) && plan["peak_memory"].as_u64() > plan["memory"]["text"].as_u64()
    );
    let text = ok(&["gen", "--model", folder, "-p", "x", "--size", "16:9", "--dry-run"]);
    assert!(
        text.contains("1344x768") && ["text", "drawing", "decoding"].iter().all(|part| text.contains(part)),
        "{text}"
    );
    let info = ok(&["info", folder]);
    for part in ["4 blocks, 64 wide, 4 heads, 12 bits a token", "text tokenizer: 98 words", "complete"] {
        assert!(info.contains(part), "{part}: {info}");
    }
    assert!(!info.contains("unknown"), "{info}");
}

#[test]
fn a_smaller_copy_draws() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let folder = model.path().to_str().unwrap();
    for kind in ["q8_0", "q4_0", "q4_K", "bf16"] {
        let (small, image) = (out.path().join(kind), out.path().join(format!("{kind}.png")));
        let (small, image) = (small.to_str().unwrap(), image.to_str().unwrap());
        assert_eq!(ok(&["quantize", "--model", folder, "--type", kind, "-o", small]).trim(), small);
        ok(&gen_args(small, image, &[]));
        let info = ok(&["info", small]);
        assert!(info.contains("complete") && !info.contains("unknown"), "{info}");
        // The same weights, made smaller on the way.
        let direct = out.path().join(format!("direct-{kind}.png"));
        ok(&gen_args(folder, direct.to_str().unwrap(), &["--quant", kind]));
        assert!(pixels(Path::new(image)) == pixels(&direct), "{kind}");
        fails(&gen_args(small, "x.png", &["--quant", "q8_0"]), 2, "have their type already");
    }
}

/// The published layout (a flat dictionary of f32 tensors with attributes) and that of a checkpoint
/// of the trainer (`trainer.gpt_fsdp`, beside an optimizer and a tokenizer), each with the dump that
/// the tokenizer's trainer writes (`vae`, beside a discriminator and optimizers).
#[test]
fn pytorch_files_draw_what_safetensors_draw() {
    let (model, out) = (model(), tempfile::tempdir().unwrap());
    let image = |name: &str| out.path().join(name);
    ok(&gen_args(model.path().to_str().unwrap(), image("want.png").to_str().unwrap(), &[]));
    let want = pixels(&image("want.png"));
    for (saved, name) in [("pickle_t2i_tiny", "infinity_tiny.pth"), ("pickle_t2i_tiny_trainer", "ar-ckpt-last.pth")] {
        let folder = tempfile::tempdir().unwrap();
        pytorch_file(saved, "t2i_tiny", &folder.path().join(name));
        pytorch_file("pickle_tok_f16_tiny", "tok_f16_tiny", &folder.path().join("infinity_vae_tiny.pth"));
        text_encoder(&folder.path().join("flan-t5-xl"));
        let folder = folder.path().to_str().unwrap();
        let info = ok(&["info", folder]);
        assert!(info.contains("complete") && !info.contains("unknown"), "{info}");
        let got = image(&format!("{saved}.png"));
        ok(&gen_args(folder, got.to_str().unwrap(), &[]));
        assert!(pixels(&got) == want, "{saved}");
    }
}

#[test]
fn files_of_one_model_are_found_and_others_refused() {
    let out = tempfile::tempdir().unwrap();
    let image = out.path().join("a.png");
    let image = image.to_str().unwrap();
    // Names of their own, but the shapes fit.
    let good = tuned("t2i_tiny", "tok_f16_tiny", "my_vae.pth");
    ok(&gen_args(good.path().to_str().unwrap(), image, &[]));
    // A published tokenizer beside a transformer of other bits.
    let bad = tuned("t2i_tiny", "tok_f8_patchify_tiny", "my_vae.pth");
    fails(&gen_args(bad.path().to_str().unwrap(), "x.png", &[]), 3, "20 bits a token");
    // The complaint of most users: d32 in place of d32reg, which has the same shape.
    let keys = data("keys_infinity_2b.txt");
    let wrong = tempfile::tempdir().unwrap();
    header_only(&keys, &wrong.path().join("infinity_2b_reg.pth"));
    header_only(&data("keys_infinity_vae_d32reg.txt"), &wrong.path().join("infinity_vae_d32.pth"));
    text_encoder(&wrong.path().join("flan-t5-xl"));
    let folder = wrong.path().to_str().unwrap();
    let error = fails(&gen_args(folder, "x.png", &[]), 3, "infinity_vae_d32.pth");
    assert!(error.contains("hf download FoundationVision/Infinity infinity_vae_d32reg.pth"), "{error}");
    // With the right one beside it, that one is taken, and the text encoder's width is what does
    // not fit.
    header_only(&data("keys_infinity_vae_d32reg.txt"), &wrong.path().join("infinity_vae_d32reg.pth"));
    fails(&gen_args(folder, "x.png", &[]), 3, "gives 256 features, its transformer reads 2048");
    std::fs::remove_dir_all(wrong.path().join("flan-t5-xl")).unwrap();
    fails(&gen_args(folder, "x.png", &["--dry-run"]), 3, "has no text encoder");
    // Two models in one folder.
    header_only(&data("keys_infinity_125m.txt"), &wrong.path().join("infinity_125M_256x256.pth"));
    let error = fails(&gen_args(folder, "x.png", &[]), 2, "which one?");
    assert!(error.contains(":125m") && error.contains(":2b") && error.contains("GB in all"), "{error}");
    fails(&gen_args(&format!("{folder}:2b"), "x.png", &["--dry-run"]), 3, "has no text encoder");
    let error = fails(&gen_args("FoundationVision/Infinity", "x.png", &[]), 2, "which one?");
    assert!(error.contains("8b-512"), "{error}");
    fails(
        &["edit", "--model", good.path().to_str().unwrap(), "-i", image, "-p", "x", "-o", "x.png"],
        2,
        "neither edits nor talks",
    );
    fails(&["chat", "--model", good.path().to_str().unwrap(), "hello"], 3, "infinity");
}

/// A file with the keys and shapes of a list, without any data on the disk.
fn header_only(list: &Path, file: &Path) {
    headers::header_only(&headers::keys(list), DType::F32, file);
}
