//! Z-Image as a refiner: against diffusers' image-to-image pipeline on tiny random weights, and on
//! the command line.
//!
//! tests/data/z_image holds the folder of a pipeline, as `save_pretrained` wrote it in bf16, but
//! for one tensor of fixed size that is made here, and in img2img.io.safetensors what
//! `ZImageImg2ImgPipeline` of diffusers 0.42.1 made with it in f32: of a picture of 80x48 pixels,
//! strength 0.3, 8 steps, without guidance.

#[cfg(feature = "nano")]
mod common;

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use nextflow::checkpoint::Source;
use nextflow::z_image::{self, Schedule, Template, TextEncoder, ZImage, ZImageConfig};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/z_image");
const PROMPT: &str = "a red fox's den, 三只猫";

/// The whole pipeline at `folder`.
fn make(folder: &Path) -> PathBuf {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let to = to.join(path.file_name().unwrap());
            match path.is_dir() {
                true => copy(&path, &to),
                false => assert!(fs::copy(&path, &to).is_ok()),
            }
        }
    }
    let place = folder.join("tiny");
    copy(Path::new(DATA), &place);
    let file = place.join(z_image::TRANSFORMER);
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    // diffusers fixes its size at 256 x 1024: numbers by a formula take no space here.
    let values: Vec<f32> = (0..1024 * 256u64).map(|i| ((i * 7919 % 257) as f32 - 128.0) / 2048.0).collect();
    let time = Tensor::from_vec(values, (1024, 256), &Device::Cpu).unwrap();
    tensors.insert("t_embedder.mlp.0.weight".into(), time);
    candle_core::safetensors::save(&tensors, file).unwrap();
    place
}

fn golden() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(format!("{DATA}/img2img.io.safetensors"), &Device::Cpu).unwrap()
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, within: f32) {
    assert_eq!(got.dims(), want.dims());
    let difference = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    let difference = difference.to_scalar::<f32>().unwrap();
    assert!(difference < within, "{difference}");
}

fn loaded(folder: &Path) -> (Source, ZImageConfig, ZImage) {
    let source = Source::Folder(make(folder));
    let config = ZImageConfig::read(&source).unwrap();
    config.check(&source).unwrap();
    let model = ZImage::load(&source, &config, DType::F32, &Device::Cpu).unwrap();
    (source, config, model)
}

#[test]
fn the_text_encoder_is_that_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let source = Source::Folder(make(folder.path()));
    let config = ZImageConfig::read(&source).unwrap();
    let golden = golden();
    let ids: Vec<u32> = golden["ids"].to_vec1::<i64>().unwrap().iter().map(|&id| id as u32).collect();
    assert_eq!(Template::read(&source, &config).unwrap().ids(PROMPT).unwrap(), ids);
    let encoder = TextEncoder::load(&source, &config, DType::F32, &Device::Cpu).unwrap();
    close(&encoder.encode(PROMPT).unwrap(), &golden["features"], 1e-4);
}

#[test]
fn the_noise_levels_are_those_of_diffusers() {
    let schedule = Schedule { shift: 3.0 };
    for (name, want) in golden().iter().filter(|(name, _)| name.starts_with("schedule.")) {
        let strength: f64 = name["schedule.".len()..].parse().unwrap();
        let (sigmas, want) = (schedule.sigmas(strength), want.to_vec1::<f32>().unwrap());
        assert_eq!(sigmas.len(), want.len(), "{name}");
        assert!(sigmas.iter().zip(&want).all(|(a, b)| (a - f64::from(*b)).abs() < 1e-6), "{name}: {sigmas:?}");
    }
    assert_eq!([0.2, 0.3, 0.4, 0.5].map(|strength| schedule.passes(strength)), [2, 3, 4, 4]);
}

/// Every step from the picture to the refined one. 15 tokens of the image and 35 of the text: both
/// are padded.
#[test]
fn image_to_image_is_that_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let (_, config, model) = loaded(folder.path());
    let golden = golden();
    let rgb = golden["picture"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let picture = nextflow::pixels::to_tensor(&[&rgb], 48, 80, &Device::Cpu).unwrap();
    let latents = model.vae().encode(&picture, &golden["encode_noise"]).unwrap();
    let sigmas = config.schedule.sigmas(0.3);
    let start = z_image::with_noise(&latents, &golden["noise"], sigmas[0]).unwrap();
    close(&start, &golden["start"], 1e-4);
    let prompt = model.transformer().read(&golden["features"]).unwrap();
    let velocity = model.transformer().velocity(&start, sigmas[0], &prompt).unwrap();
    close(&velocity, &golden["velocity"].reshape(start.dims()).unwrap(), 1e-3);
    let all = &golden["latents"];
    for passes in 1..sigmas.len() {
        let mut seen = Vec::new();
        let mut progress = |pass, of| {
            seen.push((pass, of));
            ControlFlow::Continue(())
        };
        let x = model.denoise(start.clone(), &prompt, &sigmas[..=passes], &mut progress).unwrap().unwrap();
        close(&x.squeeze(0).unwrap(), &all.get(passes - 1).unwrap(), 1e-3);
        assert_eq!(seen, (1..=passes).map(|pass| (pass, passes)).collect::<Vec<_>>());
    }
    let last = all.get(sigmas.len() - 2).unwrap().unsqueeze(0).unwrap();
    close(&model.vae().decode(&last).unwrap(), &golden["decoded"], 1e-3);
    let stopped = model.denoise(start, &prompt, &sigmas, &mut |_, _| ControlFlow::Break(())).unwrap();
    assert!(stopped.is_none());
}

/// Why the transformer is put together here: candle-transformers' own masks the padding of a text,
/// and pads no image.
#[test]
fn the_whole_model_of_candle_transformers_pads_otherwise() {
    use candle_transformers::models::z_image::{ZImageTransformer2DModel, prepare_inputs};
    let folder = tempfile::tempdir().unwrap();
    let (source, config, model) = loaded(folder.path());
    let Source::Folder(place) = source else { panic!("a folder") };
    let tensors = candle_core::safetensors::load(place.join(z_image::TRANSFORMER), &Device::Cpu).unwrap();
    let tensors = tensors.into_iter().map(|(key, tensor)| (key, tensor.to_dtype(DType::F32).unwrap())).collect();
    let vb = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let theirs = ZImageTransformer2DModel::new(&config.transformer, vb).unwrap();
    let random = |shape: &[usize]| Tensor::randn(0f32, 1f32, shape, &Device::Cpu).unwrap();
    let time = Tensor::new(&[0.5f32], &Device::Cpu).unwrap();
    let difference = |size: (usize, usize), words: usize| {
        let (x, features) = (random(&[1, 4, size.0, size.1]), random(&[words, 16]));
        let inputs = prepare_inputs(&x, std::slice::from_ref(&features), &Device::Cpu).unwrap();
        let theirs = theirs.forward(&inputs.latents, &time, &inputs.cap_feats, &inputs.cap_mask).unwrap();
        let prompt = model.transformer().read(&features).unwrap();
        let ours = model.transformer().velocity(&x, 0.5, &prompt).unwrap();
        let difference = (theirs.squeeze(2).unwrap() - ours).unwrap().abs().unwrap().flatten_all().unwrap();
        difference.max(0).unwrap().to_scalar::<f32>().unwrap()
    };
    // 32 tokens each: nothing is padded.
    assert!(difference((8, 16), 32) < 1e-4);
    assert!(difference((8, 16), 35) > 1e-2, "a padded text");
    assert!(difference((6, 10), 32) > 1e-2, "a padded image");
}

#[test]
fn a_folder_that_is_no_refiner_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let place = make(folder.path());
    let source = Source::Folder(place.clone());
    let check =
        || ZImageConfig::read(&source).and_then(|config| config.check(&source)).map_err(|e| (e.exit_code(), e.message));
    assert_eq!(check(), Ok(()));
    for (file, from, to, part) in [
        ("model_index.json", "ZImageImg2ImgPipeline", "FluxPipeline", "names \"FluxPipeline\""),
        (
            "scheduler/scheduler_config.json",
            "\"use_karras_sigmas\": false",
            "\"use_karras_sigmas\": true",
            "use_karras_sigmas",
        ),
        ("scheduler/scheduler_config.json", "\"shift\": 3.0", "\"shift\": -1.0", "a shift of -1"),
        ("text_encoder/config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 1", "1 layers"),
        ("text_encoder/config.json", "\"num_key_value_heads\": 1", "\"num_key_value_heads\": 0", "sizes"),
        (
            "text_encoder/config.json",
            "\"hidden_size\": 16",
            "\"hidden_size\": 32",
            "16 features of text, the text encoder gives 32",
        ),
        ("text_encoder/config.json", "\"vocab_size\": 269", "\"vocab_size\": 200", "269 tokens, the text encoder 200"),
        ("transformer/config.json", "\"n_heads\": 2", "\"n_heads\": 0", "sizes"),
        ("transformer/config.json", "\"dim\": 24", "\"dim\": 48", "positions do not fit"),
        ("transformer/config.json", "\"n_layers\": 2", "\"n_layers\": 3", "does not fit"),
        ("transformer/config.json", "\"in_channels\": 4", "\"in_channels\": 8", "8 channels, the autoencoder gives 4"),
        ("vae/config.json", "\"norm_num_groups\": 2", "\"norm_num_groups\": 3", "in 3 groups"),
        ("vae/config.json", "\"layers_per_block\": 1", "\"layers_per_block\": 2", "does not fit"),
        ("tokenizer/tokenizer.json", "<|im_start|>", "<|start|>", "has no <|im_start|>"),
    ] {
        let path = place.join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file}: {from}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let (code, message) = check().unwrap_err();
        assert!(code == 3 && message.contains(part), "{file}: {message}");
        fs::write(&path, text).unwrap();
    }
    for file in [z_image::INDEX, z_image::TRANSFORMER, z_image::VAE, z_image::TEXT_ENCODER, z_image::TOKENIZER] {
        let path = place.join(file);
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(check().unwrap_err().0, 3, "{file}");
        if file.ends_with(".safetensors") {
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            assert_eq!(check().unwrap_err().0, 3, "{file}");
        }
        fs::write(&path, bytes).unwrap();
    }
    assert_eq!(check(), Ok(()));
}

#[test]
fn the_forecast_of_z_image_turbo_is_that_of_its_weights() {
    let memory = ZImageConfig::turbo().memory((1024, 1024), 64, &Device::Cpu).unwrap();
    // 4.0 and 6.2 billion parameters of two bytes, and what a pass takes.
    assert!((7_900_000_000..9_500_000_000).contains(&memory.text), "{memory:?}");
    assert!((12_300_000_000..19_000_000_000).contains(&memory.refining), "{memory:?}");
    let small = ZImageConfig::turbo().memory((512, 512), 64, &Device::Cpu).unwrap();
    assert!(small.refining < memory.refining && small.text == memory.text);
}

#[cfg(feature = "nano")]
mod cli {
    use super::*;
    use image::RgbImage;
    use nextflow::generate::png_info::PngInfo;

    /// Exit code and stderr.
    #[track_caller]
    fn run(folder: &Path, args: &[&str]) -> (i32, String) {
        let output = common::command(folder, args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).to_string();
        assert!(!said.contains("panicked"), "{args:?}: {said}");
        (output.status.code().unwrap(), said)
    }

    #[track_caller]
    fn ok(folder: &Path, args: &[&str]) -> String {
        let output = common::command(folder, args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn open(path: &Path) -> RgbImage {
        image::open(path).unwrap().to_rgb8()
    }

    fn info(path: &Path) -> PngInfo {
        PngInfo::of_png(&fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn an_image_is_drawn_and_refined_stored_and_replayed() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        make(here);
        let with = ["gen", "a red fox", "--seed", "3", "--refiner", "tiny"];
        ok(here, &[&with[..], &["-o", "a.png"]].concat());
        assert_eq!(open(&here.join("a.png")).dimensions(), (512, 512));
        let stored = info(&here.join("a.png"));
        assert_eq!((stored.refiner.as_deref(), stored.refine_strength), (Some("tiny"), Some(0.3)));
        assert_eq!((stored.size.as_str(), stored.refine), ("512x512", None));
        // The same bytes again, by its flags and by itself.
        ok(here, &[&with[..], &["-o", "b.png"]].concat());
        ok(here, &["gen", "--from", "a.png", "-o", "c.png"]);
        let bytes = |name: &str| fs::read(here.join(name)).unwrap();
        assert!(bytes("a.png") == bytes("b.png"), "the same flags");
        assert!(bytes("a.png") == bytes("c.png"), "--from");
        ok(here, &["gen", "--from", "a.png", "--refine-strength", "0.1", "-o", "d.png"]);
        assert_eq!(info(&here.join("d.png")).refine_strength, Some(0.1));
        assert!(open(&here.join("d.png")) != open(&here.join("a.png")));
        ok(here, &["gen", "--from", "a.png", "--no-refine", "--size", "1:1", "-o", "e.png"]);
        assert_eq!((open(&here.join("e.png")).dimensions(), info(&here.join("e.png")).refiner), ((128, 128), None));
    }

    #[test]
    fn the_plan_lists_size_and_memory_and_draws_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        make(here);
        let plan = |size: &str| ok(here, &["gen", "x", "--refiner", "tiny", "--dry-run", "--size", size]);
        for (size, refined) in
            [("auto", "512x512"), ("2:1", "1024x512"), ("128x128", "512x512"), ("640x512", "640x512")]
        {
            let plan = plan(size);
            assert!(plan.contains(&format!("1 x {refined} ")) && plan.contains("in 3 passes"), "{size}: {plan}");
            assert!(plan.contains("refining ") && plan.contains("memory "), "{plan}");
        }
        let json = ok(here, &["gen", "x", "--refiner", "tiny", "--dry-run", "--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert!(json["refining"]["memory"]["refining"].as_u64().unwrap() > 0, "{json}");
        assert_eq!((json["size"].as_str(), json["refining"]["passes"].as_u64()), (Some("512x512"), Some(3)));
        assert_eq!(fs::read_dir(here).unwrap().count(), 1);
    }

    #[test]
    fn an_edit_is_refined() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        make(here);
        ok(here, &["gen", "a red circle", "--seed", "1", "--no-refine", "--size", "2:1", "-o", "a.png"]);
        let edit =
            ["edit", "-i", "a.png", "make it blue", "--seed", "1", "--refiner", "tiny", "--refine-strength", "0.1"];
        ok(here, &[&edit[..], &["-o", "b.png"]].concat());
        assert_eq!(open(&here.join("b.png")).dimensions(), (1024, 512));
        assert_eq!(info(&here.join("b.png")).refine_strength, Some(0.1));
    }

    #[test]
    fn bad_input_is_refused_before_anything_is_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let place = make(here);
        let refused = |args: &[&str], code: i32, part: &str| {
            let (found, said) = run(here, &[&["gen", "x", "-o", "x.png"], args].concat());
            assert!(found == code && said.contains(part), "{args:?}: {found}: {said}");
            assert!(said.contains("hint:") && !here.join("x.png").exists(), "{args:?}: {said}");
        };
        for strength in ["0", "-1", "1.5", "NaN", "inf", "1e9"] {
            refused(&["--refiner", "tiny", "--refine-strength", strength], 2, "above 0 and at most 1");
        }
        refused(&["--refiner", "tiny", "--refine-strength", "much"], 2, "--refine-strength");
        refused(&["--refine-strength", "0.3"], 2, "another model");
        refused(&["--refiner", "tiny", "--refine"], 2, "cannot be used with");
        refused(&["--refiner", "tiny", "--size", "1000x1000"], 2, "multiples of 16");
        refused(&["--refiner", "tiny", "--size", "8192x512"], 2, "cannot draw");
        refused(&["--refiner", "nowhere"], 3, "nowhere");
        refused(&["--refiner", "nano"], 2, "its own images only");
        refused(&["--refiner", ""], 2, "names no model");
        refused(&["--refiner", "."], 3, "is no refiner");
        refused(&["--model", "tiny"], 2, "refines what another model draws");
        // Of a size that no machine has the memory for.
        refused(&["--refiner", "tiny", "--size", "8192x8192"], 4, "of memory are needed");
        fs::remove_file(place.join(z_image::VAE)).unwrap();
        refused(&["--refiner", "tiny"], 3, "vae");
        let (code, said) = run(here, &["gen", "--jsonl", "jobs.jsonl", "--refiner", "tiny"]);
        assert!(code == 2 && said.contains("cannot be used with"), "{said}");
    }
}
