//! Broken model folders: one sentence, a hint and exit code 3 or 5, before anything is drawn.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};

/// A copy of the embedded model's folder.
fn folder(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nano");
    for file in std::fs::read_dir(assets).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    model
}

fn edit(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

fn draw(model: &Path, dir: &Path) -> Output {
    run(&["gen", "-p", "a red apple", "--seed", "1", "-o", "apple.png", "--model", model.to_str().unwrap()], dir)
}

fn run(args: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nextflow")).args(args).current_dir(dir).output().unwrap()
}

/// Draws with a model whose folder was changed; asserts the exit code and that nothing was written.
/// What is broken, and not just meaningless, is also found without drawing.
fn fails(code: i32, change: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let model = folder(dir.path());
    change(&model);
    let output = draw(&model, dir.path());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains("error: ") && stderr.contains("hint: "), "{stderr}");
    assert!(!dir.path().join("apple.png").exists());
    if code == 3 {
        let model = model.to_str().unwrap();
        let planned = run(&["gen", "-p", "a red apple", "--dry-run", "--model", model], dir.path());
        assert_eq!((planned.status.code(), String::from_utf8(planned.stderr).unwrap()), (Some(code), stderr.clone()));
        let smaller = run(&["quantize", "--model", model, "-o", "smaller"], dir.path());
        assert!(smaller.status.code() == Some(code) && !dir.path().join("smaller").exists());
    }
    stderr
}

#[test]
fn a_config_that_makes_no_sense_is_refused() {
    for (place, value, part) in [
        ("/sampling/top_k", serde_json::json!(0), "top-k 0 is not 1 or more"),
        ("/sampling/top_p", serde_json::json!(2), "top-p 2 is not"),
        ("/sampling/temperature", serde_json::json!(-1), "temperature -1 is not"),
        ("/scales", serde_json::json!(18), "18 scales need max_scales"),
        ("/scales", serde_json::json!(0), "max_scales"),
        ("/tokenizer/encoder/ch_mult", serde_json::json!([]), "needs 1 to 16 levels"),
        ("/backbone/num_attention_heads", serde_json::json!(0), "heads"),
    ] {
        let error = fails(3, |model| {
            let path = model.join("config.json");
            let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            *config.pointer_mut(place).unwrap() = value;
            std::fs::write(&path, config.to_string()).unwrap();
        });
        assert!(error.contains(part), "{place}: {error}");
    }
}

#[test]
fn a_whole_folder_draws_what_the_embedded_model_draws() {
    let dir = tempfile::tempdir().unwrap();
    let output = draw(&folder(dir.path()), dir.path());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let embedded = dir.path().join("embedded.png");
    let status = Command::new(env!("CARGO_BIN_EXE_nextflow"))
        .args(["gen", "-q", "-p", "a red apple", "--seed", "1", "-o"])
        .arg(&embedded)
        .status();
    assert!(status.unwrap().success());
    assert_eq!(std::fs::read(dir.path().join("apple.png")).unwrap(), std::fs::read(embedded).unwrap());
}

#[test]
fn tensors_that_nothing_uses_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let model = folder(dir.path());
    edit(&model.join("model.safetensors"), |tensors| {
        tensors.insert("visual.norm.weight".into(), Tensor::zeros(3, DType::BF16, &Device::Cpu).unwrap());
    });
    let args = ["gen", "-p", "a cat", "-v", "-o", "-", "--model"];
    let output = Command::new(env!("CARGO_BIN_EXE_nextflow")).args(args).arg(&model).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.contains("1 tensors are not used, visual.norm.weight among"), "{stderr}");
}

#[test]
fn missing_and_misshapen_tensors_are_listed() {
    let stderr = fails(3, |model| {
        edit(&model.join("model.safetensors"), |tensors| {
            tensors.retain(|name, _| !name.contains("layers.1."));
            tensors.insert("model.norm.weight".into(), Tensor::zeros(3, DType::BF16, &Device::Cpu).unwrap());
        });
    });
    assert!(stderr.contains("model.safetensors") && stderr.contains("model.layers.1."), "{stderr}");
    let listed = stderr.matches("layers.1.").count() + stderr.matches("model.norm.weight").count();
    assert_eq!(listed, 5, "{stderr}");
    let stderr = fails(3, |model| {
        edit(&model.join("image_tokenizer.safetensors"), |tensors| {
            tensors.insert("post_quant_conv.bias".into(), Tensor::zeros((2, 3), DType::BF16, &Device::Cpu).unwrap());
        });
    });
    assert!(stderr.contains("post_quant_conv.bias") && stderr.contains("2, 3"), "{stderr}");
}

#[test]
fn scales_of_bytes_are_checked_too() {
    const SCALE: &str = "model.layers.0.mlp.up_proj.weight.scale";
    let change = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        fails(3, |model| edit(&model.join("model.safetensors"), |tensors| change(tensors)))
    };
    let stderr = change(&|tensors| drop(tensors.remove(SCALE)));
    assert!(stderr.contains(&format!("1 missing: {SCALE}: missing")), "{stderr}");
    let stderr = change(&|tensors| {
        let short = tensors[SCALE].narrow(0, 0, 3).unwrap();
        tensors.insert(SCALE.into(), short);
    });
    assert!(stderr.contains(&format!("1 wrongly shaped: {SCALE}: found (3), expected (")), "{stderr}");
}

#[test]
fn info_tells_what_a_folder_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let model = folder(dir.path());
    let info = || {
        let output = run(&["info", "model"], dir.path());
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (code, text) = info();
    assert!(code == Some(0) && text.contains("  text tokenizer: ") && text.ends_with("  complete\n"), "{text}");
    edit(&model.join("model.safetensors"), |tensors| {
        tensors.remove("model.layers.0.mlp.up_proj.weight.scale");
    });
    let (code, text) = info();
    assert!(
        code == Some(3)
            && text.contains("1 missing: model.layers.0.mlp.up_proj.weight.scale")
            && !text.contains("complete"),
        "{text}"
    );
    let words = std::fs::read(model.join("tokenizer.json")).unwrap();
    std::fs::write(model.join("tokenizer.json"), &words[..words.len() / 2]).unwrap();
    assert_eq!(info().0, Some(3));
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let (code, text) = info();
    assert!(code == Some(3) && text.contains("  no text tokenizer: ") && !text.contains("complete"), "{text}");
    std::fs::remove_file(model.join("config.json")).unwrap();
    let (code, text) = info();
    assert!(code == Some(3) && text.contains("config.json is missing"), "{text}");
}

#[test]
fn truncated_and_absent_files_are_named() {
    for name in ["model.safetensors", "image_tokenizer.safetensors", "config.json", "tokenizer.json"] {
        let stderr = fails(3, |model| {
            let path = model.join(name);
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        });
        assert!(stderr.contains(name), "{stderr}");
        let stderr = fails(3, |model| std::fs::remove_file(model.join(name)).unwrap());
        assert!(stderr.contains(name), "{stderr}");
    }
}

#[test]
fn numbers_that_are_not_finite_stop_the_run() {
    let stderr = fails(5, |model| {
        edit(&model.join("model.safetensors"), |tensors| {
            let norm = &tensors["model.norm.weight"];
            let nan = Tensor::full(f32::NAN, norm.shape(), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
            tensors.insert("model.norm.weight".into(), nan);
        });
    });
    assert!(stderr.contains("scale 1 (1x1)"), "{stderr}");
}
