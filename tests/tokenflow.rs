//! TokenFlow's public tokenizers from outside: their key lists, how images reach them, what their
//! codes tell a language model.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use nextflow::checkpoint::{Source, Weights};
use nextflow::tokenizer::{ImageTokenizer, Preset, TokenizerConfig};
use nextflow::{ops, pixels};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenflow").join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(data(name), &Device::Cpu).unwrap()
}

/// Keys and shapes of a public checkpoint: lines of a key and its dimensions.
fn public_keys(preset: &Preset) -> BTreeMap<String, Vec<usize>> {
    let text = std::fs::read_to_string(data(&format!("tok_{}.keys.txt", preset.name))).unwrap();
    let line = |line: &str| {
        let mut words = line.split(' ');
        let key = words.next().unwrap().to_string();
        (key, words.map(|n| n.parse().unwrap()).collect())
    };
    text.lines().map(line).collect()
}

#[test]
fn presets_ask_for_the_public_keys_and_no_others() {
    for (preset, count) in Preset::all().iter().zip([649, 848]) {
        let weights = Weights::inventory();
        ImageTokenizer::load(&weights, &preset.config).unwrap();
        let (requested, public) = (weights.requested(), public_keys(preset));
        assert_eq!(public.len(), count);
        for (key, shape) in &public {
            assert_eq!(requested.get(key), Some(shape), "{}: {key}", preset.name);
        }
        let extra: Vec<_> = requested.keys().filter(|key| !public.contains_key(*key)).collect();
        assert!(extra.is_empty(), "{}: {extra:?}", preset.name);
    }
}

/// A checkpoint of nothing but a header: its data is a hole that takes no room on the disk.
fn hollow(keys: &BTreeMap<String, Vec<usize>>) -> tempfile::TempDir {
    let mut end = 0;
    let mut header = serde_json::Map::new();
    for (key, shape) in keys {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        header.insert(key.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image_tokenizer.safetensors");
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), &header[..]].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    folder
}

fn load(folder: &tempfile::TempDir, config: &TokenizerConfig) -> Result<ImageTokenizer, nextflow::error::Error> {
    let source = Source::Folder(folder.path().into());
    source.load("image_tokenizer.safetensors", DType::F32, &Device::Cpu, |w| ImageTokenizer::load(w, config))
}

#[test]
fn what_is_missing_or_misshapen_is_named_and_what_is_unused_may_go() {
    for preset in Preset::all() {
        let mut keys = public_keys(&preset);
        let unused = ["quantize.codebook_used", "scaling_layer.shift", "encoder_vqkd.vision_model.head.probe"];
        unused.iter().for_each(|key| drop(keys.remove(*key)));
        keys.insert("decoder.conv_in.weight".into(), vec![3, 5]);
        let error = load(&hollow(&keys), &preset.config).unwrap_err();
        assert!(error.message.contains("1 wrongly shaped: decoder.conv_in.weight: found (3, 5)"), "{error}");
        keys.remove("decoder.conv_in.weight");
        let error = load(&hollow(&keys), &preset.config).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.message.contains("1 missing: decoder.conv_in.weight: missing"), "{error}");
    }
}

#[test]
fn presets_survive_json_and_fill_their_images() {
    for preset in Preset::all() {
        let text = serde_json::to_string(&preset.config).unwrap();
        assert_eq!(serde_json::from_str::<TokenizerConfig>(&text).unwrap(), preset.config);
        let side = preset.image_size;
        assert_eq!(Some(&preset.config.grid((side, side)).unwrap()), preset.scales.last());
    }
    let codes = |preset: Preset| preset.scales.iter().map(|(h, w)| h * w).sum::<usize>();
    assert_eq!(Preset::all().map(codes), [817, 2227]);
}

#[test]
fn a_config_without_the_new_fields_is_written_back_as_it_was() {
    let text = include_str!("../assets/nano/config.json");
    let nano = serde_json::from_str::<serde_json::Value>(text).unwrap()["tokenizer"].take();
    let config: TokenizerConfig = serde_json::from_value(nano.clone()).unwrap();
    let keys = |value: &serde_json::Value| {
        let object = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        object(value).into_iter().map(|key| (object(&value[&key]), key)).collect::<Vec<_>>()
    };
    assert_eq!(keys(&serde_json::to_value(&config).unwrap()), keys(&nano));
}

fn picture(golden: &Tensor) -> RgbImage {
    let (height, width, _) = golden.dims3().unwrap();
    let bytes = golden.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    RgbImage::from_raw(width as u32, height as u32, bytes).unwrap()
}

fn normalised(image: &RgbImage) -> Tensor {
    let (width, height) = image.dimensions();
    let batch = pixels::to_tensor(&[image.as_raw()], height as usize, width as usize, &Device::Cpu);
    batch.unwrap().squeeze(0).unwrap()
}

fn close(name: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let off = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(off <= tolerance, "{name}: off by {off}");
}

#[test]
fn images_are_made_square_as_the_reference_does() {
    let golden = tensors("preprocess/tokenflow.safetensors");
    for name in ["recon_square", "recon_tall", "recon_wide"] {
        let get = |part: &str| &golden[&format!("{name}.{part}")];
        let crop = pixels::centre_crop(&picture(get("in_hwc_u8")), 80);
        assert!(crop == picture(get("crop_hwc_u8")), "{name}");
        close(name, &normalised(&crop), get("out_chw_f32"), 1e-6);
    }
    for name in ["understand_small", "understand_tall", "understand_wide"] {
        let get = |part: &str| &golden[&format!("{name}.{part}")];
        let image = picture(get("in_hwc_u8"));
        let square = picture(get("square_hwc_u8"));
        assert!(pixels::pad_to_square(&image, square.width()) == square, "{name}");
        let padded = pixels::pad_to_square(&image, 60);
        let resized = get("resized_chw_u8").permute((1, 2, 0)).unwrap();
        assert!(padded == picture(&resized), "{name}");
        close(name, &normalised(&padded), get("out_chw_f32"), 1e-6);
    }
}

/// Every 13th pixel of what Pillow 13 makes of five pictures.
#[test]
fn pictures_of_odd_sizes_equal_pillow() {
    let golden = tensors("preprocess/pillow.safetensors");
    assert_eq!(golden.len(), 5 * 2 * 2);
    for (key, want) in &golden {
        let (name, way) = key.split_once('.').unwrap();
        let image = image::open(data(&format!("preprocess/{name}.png"))).unwrap().into_rgb8();
        let got = match way.split_at(way.len() - 3) {
            ("crop", side) => pixels::centre_crop(&image, side.parse().unwrap()),
            ("pad", side) => pixels::pad_to_square(&image, side.parse().unwrap()),
            _ => panic!("{key}"),
        };
        let want = picture(want);
        for (x, y, pixel) in want.enumerate_pixels() {
            assert_eq!(got.get_pixel(5 + 13 * x, 3 + 13 * y), pixel, "{key} at {x}, {y}");
        }
    }
}

#[test]
fn extreme_shapes_become_squares_without_much_memory() {
    for (width, height) in [(1, 8000), (8000, 1), (1, 1), (3, 2)] {
        let image = RgbImage::from_pixel(width, height, image::Rgb([10, 200, 90]));
        let crop = pixels::centre_crop(&image, 256);
        assert!(crop.dimensions() == (256, 256) && crop.pixels().all(|p| p.0 == [10, 200, 90]));
    }
    assert_eq!(pixels::resize(&RgbImage::new(0, 0), (2, 2), pixels::ResamplingFilter::Bicubic).dimensions(), (2, 2));
}

/// The final F, 40 channels at each of the finest positions, is what a language model is shown.
#[test]
fn understanding_tokens_equal_the_reference() {
    let mut config = Preset::siglip_32k().config;
    let tiny = serde_json::json!({"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 3, "patch_size": 14, "native_grid": 4, "layout": "siglip", "features": "penultimate"});
    config.semantic = serde_json::from_value(tiny).unwrap();
    let decoder = serde_json::json!({"depth": 2, "num_attention_heads": 3, "intermediate_size": 192});
    config.semantic_decoder = serde_json::from_value(decoder).unwrap();
    for cnn in [&mut config.encoder, &mut config.decoder] {
        (cnn.ch, cnn.ch_mult, cnn.num_res_blocks, cnn.z_channels) = (32, vec![1, 1, 1, 1, 2], 1, 16);
    }
    config.codebook.size = 64;
    let weights = Weights::from_safetensors(&[data("tok_siglip_tiny.weights.safetensors")], DType::F32, &Device::Cpu);
    let tokenizer = ImageTokenizer::load(&weights.unwrap(), &config).unwrap();
    let image = &tensors("tok_siglip_tiny.io.safetensors")["image"];
    let golden = tensors("understanding_tiny.safetensors");
    let encoded = tokenizer.encode(image, &[(1, 1), (2, 2), (3, 3), (4, 4)]).unwrap();
    let tokens: Vec<f32> = encoded.into_iter().flat_map(|e| e.f_hat).collect();
    let tokens = Tensor::from_vec(tokens, (2, 16, 40), &Device::Cpu).unwrap();
    close("vision tokens", &tokens, &golden["vision_tokens"], 2e-4);
    let layer = |x: &Tensor, i: usize| {
        let get = |name: &str| &golden[&format!("mm_projector.{i}.{name}")];
        ops::linear(x, get("weight"), Some(get("bias"))).unwrap()
    };
    let projected = layer(&ops::gelu_erf(&layer(&tokens, 0)).unwrap(), 2);
    close("projected", &projected, &golden["projected"], 2e-4);
}
