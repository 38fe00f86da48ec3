use std::path::Path;

use super::config::check;
use super::*;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/infinity"))
}

/// The golden encoder as a model folder, without words.
fn source() -> (tempfile::TempDir, Source) {
    let place = tempfile::tempdir().unwrap();
    let text = place.path().join("text_encoder");
    std::fs::create_dir(&text).unwrap();
    std::fs::copy(folder().join("t5_config.json"), text.join("config.json")).unwrap();
    std::fs::copy(folder().join("t5_tiny.weights.safetensors"), text.join("model.safetensors")).unwrap();
    let source = Source::Folder(place.path().into());
    (place, source)
}

fn golden() -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(folder().join("t5_tiny.io.safetensors"), &Device::Cpu).unwrap()
}

fn ids(t: &Tensor) -> Vec<u32> {
    t.to_dtype(DType::U32).unwrap().to_vec1().unwrap()
}

fn far(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// How far an encoder is off the golden features.
fn errors(weights: Option<WeightType>) -> Vec<f32> {
    let (_place, source) = source();
    let mut encoder = Encoder::load(&source, &read_config(&source).unwrap(), &Device::Cpu, weights).unwrap();
    let golden = golden();
    let mut texts: Vec<String> = golden.keys().filter_map(|key| key.strip_prefix("ids.")).map(String::from).collect();
    texts.sort();
    assert!(texts.len() >= 2);
    let short = |i: &String| {
        far(&encoder.forward(&ids(&golden[&format!("ids.{i}")])).unwrap(), &golden[&format!("features.{i}")])
    };
    let mut errors: Vec<f32> = texts.iter().map(short).collect();
    // 512 tokens, of which every 16th is compared.
    let long = encoder.forward(&ids(&golden["long_ids"])).unwrap();
    let want = &golden["long_features_every_16th"];
    let step = long.dim(0).unwrap() / want.dim(0).unwrap();
    let rows: Vec<u32> = (0..want.dim(0).unwrap()).map(|i| (i * step) as u32).collect();
    let rows = Tensor::new(rows, &Device::Cpu).unwrap();
    errors.push(far(&long.index_select(&rows, 0).unwrap(), want));
    errors
}

#[test]
fn features_equal_the_reference() {
    for error in errors(None) {
        assert!(error < 2e-5, "{error}");
    }
}

#[test]
fn smaller_weights_give_nearly_the_same() {
    // Features are about 1 in size, and so are the largest errors of 8 bits among many at these
    // widths.
    for (weights, most) in [(WeightType::Bf16, 0.05), (WeightType::F16, 0.01), (WeightType::Q8_0, 0.6)] {
        for error in errors(Some(weights)) {
            assert!(error < most, "{weights}: {error}");
        }
    }
    assert!(errors(Some(WeightType::Q8_0)).iter().all(|error| *error > 1e-3));
}

#[test]
fn shapes_of_no_encoder_are_refused() {
    let xl = flan_t5_xl();
    assert_eq!(check(&xl), Ok(()));
    for bad in [
        Config { num_layers: 1 << 30, ..xl.clone() },
        Config { num_heads: 0, ..xl.clone() },
        Config { relative_attention_num_buckets: 3, ..xl.clone() },
        Config { eos_token_id: 40_000, ..xl.clone() },
    ] {
        assert!(check(&bad).is_err());
    }
}

#[test]
fn the_encoder_of_flan_t5_xl_has_its_published_size() {
    let requested = Weights::inventory();
    plain(&requested, &flan_t5_xl()).unwrap();
    let elements: usize = requested.requested().values().map(|shape| shape.iter().product::<usize>()).sum();
    assert_eq!(elements / 100_000, 12_235, "{elements}");
}
