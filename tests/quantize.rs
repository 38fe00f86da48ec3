//! Weights in few bits: at load, in a GGUF file, and what memory they are said to take.
#![cfg(feature = "nano")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Output;

use candle_core::{DType, Device, Tensor};
use nextflow::backbone::{Backbone, Context, Layout, Rope};
use nextflow::checkpoint::{Matrices, Source, WeightType, Weights};
use nextflow::generate::ModelConfig;

fn nextflow(folder: &Path, args: &[&str]) -> Output {
    common::command(folder, args).output().unwrap()
}

#[track_caller]
fn stdout(folder: &Path, args: &[&str]) -> Vec<u8> {
    let Output { status, stdout, stderr } = nextflow(folder, args);
    assert!(status.success(), "{args:?}: {}", String::from_utf8_lossy(&stderr));
    stdout
}

#[track_caller]
fn refused(folder: &Path, args: &[&str], code: i32, part: &str) {
    let Output { status, stderr, .. } = nextflow(folder, args);
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(part) && stderr.contains("hint: "), "{stderr}");
}

/// Code logits of nano after a few tokens.
fn logits(weights: WeightType) -> Vec<f32> {
    let config = ModelConfig::read(&Source::Embedded).unwrap();
    let build = |w: &Weights| {
        Backbone::load(&w.with_matrices(weights.blocks().map_or(Matrices::Tensors, Matrices::Blocks)), &config.backbone)
    };
    let backbone = Source::Embedded.load("model.safetensors", DType::F32, &Device::Cpu, build).unwrap();
    let ids: Vec<u32> = (300..320).collect();
    let mut layout = Layout::after(0);
    layout.push_text(ids.len());
    let rope = Rope::new(&config.backbone, &[&layout.positions], &Device::Cpu).unwrap();
    let n = ids.len();
    let mask = Tensor::from_iter((0..n * n).map(|i| u8::from(i % n <= i / n)), &Device::Cpu).unwrap();
    let x = backbone.embed_text(&Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap();
    let hidden = backbone.forward(&x, &rope, Context::Masked(&mask.reshape((n, n)).unwrap())).unwrap();
    backbone.code_logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn fewer_bits_change_the_logits_little() {
    let exact = logits(WeightType::F32);
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
    let size = norm(&mut exact.iter().copied());
    let mut last = 0.0;
    for (weights, limit) in [
        (WeightType::F16, 2e-3),
        (WeightType::Bf16, 2e-2),
        (WeightType::Q8_0, 5e-2),
        (WeightType::Q4_0, 0.6),
        (WeightType::Q4K, 0.5),
    ] {
        let off = norm(&mut logits(weights).iter().zip(&exact).map(|(a, b)| a - b)) / size;
        assert!(off > last && off < limit, "{weights}: {off}");
        last = if weights == WeightType::Q8_0 { off } else { 0.0 };
    }
}

#[test]
fn a_quantised_folder_draws_what_quantising_at_load_draws() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for weights in ["q8_0", "q4_0", "q4_K", "bf16"] {
        let path = stdout(here, &["quantize", "--type", weights, "-o", weights]);
        assert_eq!(String::from_utf8(path).unwrap().trim(), weights);
        let draw =
            |more: &[&str]| stdout(here, &[&["gen", "-p", "a cat", "--seed", "4", "-q", "-o", "-"], more].concat());
        let pixels = |png: Vec<u8>| image::load_from_memory(&png).unwrap().into_rgb8().into_raw();
        assert!(pixels(draw(&["--model", weights])) == pixels(draw(&["--quant", weights])), "{weights}");
        let info = String::from_utf8(stdout(here, &["info", weights])).unwrap();
        assert!(info.contains("complete") && info.to_lowercase().contains(&weights.to_lowercase()), "{info}");
    }
    // What is there already, or has its type already, is left as it is.
    refused(here, &["quantize", "-o", "q8_0"], 2, "exists already");
    refused(here, &["gen", "-p", "x", "--model", "q8_0", "--quant", "q4_K"], 2, "leave out --quant");
    let left = fs::read_dir(here).unwrap().count();
    assert_eq!(left, 4, "something was left over");
    // A file cut short is no model.
    let gguf = here.join("q8_0/model.gguf");
    let bytes = fs::read(&gguf).unwrap();
    for length in [0, 20, 3000, bytes.len() / 2] {
        fs::write(&gguf, &bytes[..length]).unwrap();
        refused(here, &["gen", "-p", "x", "--model", "q8_0"], 3, "model.gguf");
    }
}

fn json(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn the_forecast_holds() {
    let here = Path::new(".");
    let embedded = Source::Embedded.embedded_bytes();
    for weights in [&[][..], &["--quant", "f32"], &["--quant", "q8_0"]] {
        let run = |args: &[&str]| json(&stdout(here, &[args, weights].concat()));
        let plan = run(&["gen", "-p", "x", "--dry-run", "--json"]);
        assert_eq!((&plan["codes"], &plan["passes"], &plan["size"]), (&204.into(), &8.into(), &"128x128".into()));
        let report = run(&["bench", "--synthetic", "nano", "--prompt", "1", "--json"]);
        assert_eq!(plan["peak_memory"].as_u64(), report["forecast_bytes"].as_u64().map(|bytes| bytes + embedded));
        assert_eq!(report["parts"].as_array().unwrap().len(), 9);
        // Only Linux tells the peak.
        let (Some(peak), forecast) = (report["peak_bytes"].as_f64(), report["forecast_bytes"].as_f64().unwrap()) else {
            continue;
        };
        // What the program itself takes differs by a few MB between machines and their numbers of
        // threads.
        assert!((forecast - peak).abs() < 0.1 * peak + 1e7, "{weights:?}: forecast {forecast}, peak {peak}");
    }
}
