//! OneCAT's transformer and its loop against the reference's own numbers, in all three modes. Which
//! models and runs there are, their shapes and settings, is read from the files of
//! tests/data/onecat and its tiny.json.

#[path = "common/headers.rs"]
mod headers;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use nextflow::backbone::{Cache, Step};
use nextflow::checkpoint::{Inventory, Weights};
use nextflow::generate::next_input::NextInput;
use nextflow::generate::onecat::{Guided, OneCatRows};
use nextflow::generate::sampler::SampleParams;
use nextflow::generate::{Batch, Event, Guidance, Sampling, Sequences, bits, draw_codes};
use nextflow::onecat::prompt::Piece;
use nextflow::onecat::{Drawing, OneCatConfig, Reading, ReadingParts, Trunk, rope};
use nextflow::ops;
use nextflow::tokenizer::{
    BitConfig, BitQuantizer, BitTokenizerConfig, CnnConfig, CnnLayout, ImageDecoder, pack, unpack,
};
use nextflow::vision::Patches;
use serde_json::{Value, json};

/// Of features, hidden states and logits.
const CLOSE: f32 = 2e-4;
/// Of guided logits, which strong guidance makes large, and of pixels in [-1, 1].
const LOOSE: f32 = 2e-3;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/onecat").join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path(name), &Device::Cpu).unwrap()
}

fn settings() -> Value {
    serde_json::from_str(&std::fs::read_to_string(path("tiny.json")).unwrap()).unwrap()
}

/// Names of the files that end so, without it.
fn files(end: &str) -> Vec<String> {
    let entries = std::fs::read_dir(path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter_map(|name| Some(name.strip_suffix(end)?.to_string())).collect();
    names.sort();
    names
}

/// The `config.json` that the settings' model would have.
fn public_config(model: &Value) -> Value {
    let text: serde_json::Map<String, Value> = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
    ]
    .into_iter()
    .map(|key| (key.to_string(), model[key].clone()))
    .collect();
    let rounded = model.get("bf16_frequencies").cloned().unwrap_or(json!(false));
    json!({
        "model_type": "onecat",
        "template": "onecat",
        "llm_config": text,
        "patch_vision_config": {
            "hidden_size": model["patch_hidden_size"], "patch_size": model["patch_size"], "image_size": model["image_size"]
        },
        "downsample_ratio": model["downsample_ratio"],
        "vae_embed_dim": model["vae_embed_dim"],
        "saa_rank": model["saa_rank"], "saa_alpha": model["saa_alpha"], "saa_scales": model["saa_scales"],
        "bf16_frequencies": rounded,
    })
}

/// The model, its image decoder if there is one, and its weights.
struct Loaded {
    trunk: Trunk,
    reading: Reading,
    drawing: Drawing,
    quantizer: BitQuantizer,
    images: Option<ImageDecoder>,
    weights: HashMap<String, Tensor>,
}

const ALL: ReadingParts = ReadingParts { pictures: true, head: true };

fn model_weights() -> (PathBuf, Weights) {
    let name = files(".weights.safetensors").into_iter().find(|name| !name.starts_with("decoder")).expect("a model");
    let file = path(&format!("{name}.weights.safetensors"));
    let weights = Weights::from_safetensors(std::slice::from_ref(&file), DType::F32, &Device::Cpu).unwrap();
    (file, weights)
}

impl Loaded {
    fn new() -> Self {
        let all = settings();
        let (file, w) = model_weights();
        let model = &all["model"];
        let config = OneCatConfig::of(&Inventory::open(&file).unwrap(), &public_config(model)).unwrap();
        let size = |key: &str| model[key].as_u64().unwrap() as usize;
        let t = &config.transformer;
        assert_eq!((t.vocab_size, t.hidden_size), (size("vocab_size"), size("hidden_size")));
        assert_eq!((config.adapters, config.levels), (size("saa_scales"), size("lvl_rows")));
        assert_eq!(config.adapter_gain, size("saa_alpha") as f64 / size("saa_rank") as f64);
        let images = files(".weights.safetensors").into_iter().find(|name| name.starts_with("decoder")).map(|name| {
            let file = path(&format!("{name}.weights.safetensors"));
            let w = Weights::from_safetensors(&[file], DType::F32, &Device::Cpu).unwrap();
            ImageDecoder::load_bits(&w, &decoder(&all["decoder"])).unwrap()
        });
        Self {
            trunk: Trunk::load(&w, &config).unwrap(),
            reading: Reading::load(&w, &config, ALL).unwrap(),
            drawing: Drawing::load(&w, &config).unwrap(),
            quantizer: BitQuantizer::new(BitConfig { dim: config.bits, patch: 1 }, &Device::Cpu).unwrap(),
            images,
            weights: candle_core::safetensors::load(&file, &Device::Cpu).unwrap(),
        }
    }

    fn config(&self) -> &OneCatConfig {
        self.trunk.config()
    }

    /// The first `layers` of it.
    fn shallow(&self, layers: usize) -> Self {
        let mut config = self.config().clone();
        config.transformer.num_hidden_layers = layers;
        let (_, w) = model_weights();
        Self {
            trunk: Trunk::load(&w, &config).unwrap(),
            reading: Reading::load(&w, &config, ALL).unwrap(),
            drawing: Drawing::load(&w, &config).unwrap(),
            quantizer: self.quantizer.clone(),
            images: None,
            weights: self.weights.clone(),
        }
    }

    /// What the last norm makes of hidden states before it.
    fn normed(&self, hidden: &Tensor) -> Tensor {
        let weight = &self.weights["patch_language_model.model.norm.weight"];
        ops::rms_norm(hidden, weight, self.config().transformer.rms_norm_eps as f32).unwrap()
    }

    /// Reads ids, of which those of `context` are the picture's features: hidden states (n, hidden)
    /// and embeddings.
    fn read(
        &self,
        ids: &[u32],
        context: Option<u32>,
        features: Option<&Tensor>,
        rounded: bool,
    ) -> (Tensor, Tensor, Cache) {
        let mut cache = self.trunk.cache(ids.len() + 64).unwrap();
        let (mut hidden, mut embedded) = (Vec::new(), Vec::new());
        for run in ids.chunk_by(|a, b| (Some(*a) == context) == (Some(*b) == context)) {
            let picture = Some(run[0]) == context;
            let x = match features.filter(|_| picture) {
                Some(features) => features.unsqueeze(0).unwrap(),
                None => self.reading.embed(&Tensor::new(run, &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap(),
            };
            assert_eq!(x.dim(1).unwrap(), run.len());
            hidden.push(self.reading.read(&self.trunk, &x, &mut cache, picture, rounded).unwrap());
            embedded.push(x);
        }
        let joined = |parts: &[Tensor]| Tensor::cat(parts, 1).unwrap().squeeze(0).unwrap();
        (joined(&hidden), joined(&embedded), cache)
    }
}

/// The pieces of a prompt's ids.
fn pieces(ids: &[u32], context: Option<u32>) -> Vec<Piece> {
    let run = |run: &[u32]| if Some(run[0]) == context { Piece::Picture } else { Piece::Tokens(run.into()) };
    ids.chunk_by(|a, b| (Some(*a) == context) == (Some(*b) == context)).map(run).collect()
}

fn decoder(shape: &Value) -> BitTokenizerConfig {
    let size = |key: &str| shape[key].as_u64().unwrap() as usize;
    let half = CnnConfig {
        ch: size("base_ch"),
        ch_mult: serde_json::from_value(shape["ch_mult"].clone()).unwrap(),
        num_res_blocks: size("num_res_blocks"),
        z_channels: size("z_channels"),
        groups: 32,
        patch: 1,
        layout: CnnLayout::Infinity,
    };
    BitTokenizerConfig { encoder: half.clone(), decoder: half, bits: BitConfig { dim: size("z_channels"), patch: 1 } }
}

/// Golden tensors, and which of them were compared.
struct Golden {
    run: String,
    all: HashMap<String, Tensor>,
    seen: RefCell<HashSet<String>>,
}

impl Golden {
    fn new(run: &str) -> Self {
        Self { run: run.into(), all: tensors(&format!("{run}.io.safetensors")), seen: RefCell::default() }
    }

    fn has(&self, key: &str) -> bool {
        self.all.contains_key(key)
    }

    fn see(&self, key: &str) -> Option<&Tensor> {
        self.seen.borrow_mut().insert(key.into());
        self.all.get(key)
    }

    /// Compares with a tensor, if there is one.
    fn close(&self, key: &str, got: &Tensor, most: f32) {
        let Some(want) = self.see(key) else { return };
        assert_eq!(got.dims(), want.dims(), "{} {key}", self.run);
        let off = far(got, want);
        assert!(off < most, "{} {key}: off by {off}", self.run);
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        let ids = self.see(key).unwrap_or_else(|| panic!("{} has no {key}", self.run));
        ids.to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
    }

    /// Compares positions (axes, n).
    fn positions(&self, key: &str, got: &[rope::Position]) {
        let Some(want) = self.see(key) else { return };
        let axes: Vec<Vec<i64>> = (0..2).map(|axis| got.iter().map(|p| p[axis] as i64).collect()).collect();
        match want.rank() {
            1 => assert_eq!(axes[0], want.to_vec1::<i64>().unwrap(), "{} {key}", self.run),
            _ => assert_eq!(axes, want.to_vec2::<i64>().unwrap(), "{} {key}", self.run),
        }
    }

    /// Fails unless every tensor was compared, but for those that are `left` out.
    fn all_seen(&self, left: impl Fn(&str) -> bool) {
        let seen = self.seen.borrow();
        let unseen: Vec<&String> = self.all.keys().filter(|key| !seen.contains(*key) && !left(key)).collect();
        assert!(unseen.is_empty(), "{}: {unseen:?} were not compared", self.run);
    }
}

fn far(got: &Tensor, want: &Tensor) -> f32 {
    let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    (wide(got) - wide(want)).unwrap().abs().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Normalised pixels (3, H, W) as patches, those of a token together.
fn cut(pixels: &Tensor, p: usize) -> Patches {
    let (_, height, width) = pixels.dims3().unwrap();
    let (h, w) = (height / p / 2, width / p / 2);
    let cut = pixels.reshape(&[3, h, 2, p, w, 2, p][..]).unwrap().permute(vec![1, 4, 2, 5, 0, 3, 6]).unwrap();
    Patches { values: cut.flatten_all().unwrap().to_vec1().unwrap(), tokens: (h, w) }
}

/// Patches (h * w * 4, C), those of a token together, in rows.
fn in_rows(patches: &Tensor, (h, w): (usize, usize)) -> Tensor {
    let split = patches.reshape(&[h, w, 2, 2, patches.dims()[1]][..]).unwrap().permute(vec![0, 2, 1, 3, 4]).unwrap();
    split.reshape((4 * h * w, patches.dims()[1])).unwrap()
}

/// A run of drawing: its rows by name, and how they guide.
struct Run {
    golden: Golden,
    rows: Vec<&'static str>,
    guided: Guided,
    sampling: Sampling,
    scales: Vec<(usize, usize)>,
    context: Option<u32>,
}

/// Every run that draws, with the settings of its name.
fn runs() -> Vec<Run> {
    let all = settings();
    let runs = files(".io.safetensors").into_iter().filter_map(|name| {
        let settings = all.get(&name).filter(|settings| settings.get("scales").is_some())?;
        let golden = Golden::new(&name);
        let real = |key: &str| settings[key].as_f64().unwrap();
        let edit = golden.has("ids_image_text");
        let (cfg, guided) =
            if edit { (real("cfg_T"), Guided::Edit(real("cfg_I"))) } else { (real("cfg"), Guided::Text) };
        let kinds: &[&str] = match guided {
            Guided::Text => &["cond", "uncond"],
            Guided::Edit(weight) if weight != 0.0 => &["image_text", "text", "none"],
            Guided::Edit(_) => &["image_text", "none"],
        };
        let rows = kinds[..kinds.len() - usize::from(cfg == 1.0)].to_vec();
        assert_eq!(settings["greedy"], "top_k 1", "{name}");
        let sampling = Sampling {
            cfg,
            temperature: real("tau"),
            top_k: Some(1),
            guidance: Guidance::Constant,
            ..Sampling::default()
        };
        let context = settings["ref_context_id"].as_u64().map(|id| id as u32);
        let scales = serde_json::from_value(settings["scales"].clone()).unwrap();
        Some(Run { golden, rows, guided, sampling, scales, context })
    });
    runs.collect()
}

impl Run {
    /// The ids of a row.
    fn ids(&self, row: &str) -> Vec<u32> {
        self.golden.ids(match row {
            "cond" => "prompt_ids",
            "uncond" => "uncond_ids",
            "image_text" => "ids_image_text",
            "text" => "ids_text",
            _ => "ids_none",
        })
    }

    /// The picture that is edited, as features, each step compared.
    fn picture(&self, model: &Loaded) -> Option<Tensor> {
        let pixels = self.golden.see("pixel_values").filter(|_| self.context.is_some())?;
        let patches = cut(pixels, model.config().patch_size);
        let embedder = model.reading.patches().unwrap();
        let projected = embedder.project(&patches).unwrap();
        let placed = (&projected + embedder.positions(patches.tokens).unwrap()).unwrap();
        self.golden.close("patch_embeds", &in_rows(&projected, patches.tokens), CLOSE);
        self.golden.close("patch_embeds_with_positions", &in_rows(&placed, patches.tokens), CLOSE);
        let features = model.reading.features(&[patches]).unwrap();
        self.golden.close("ref_features", &features, CLOSE);
        Some(features)
    }

    /// The caches of all rows, by the way that the program reads them.
    fn prefixes(&self, model: &Loaded) -> Vec<Cache> {
        let picture = self.context.and_then(|_| self.picture(model));
        let read =
            |row: &&str| model.reading.prefix(&model.trunk, &pieces(&self.ids(row), self.context), picture.as_ref());
        self.rows.iter().map(read).collect::<Result<_, _>>().unwrap()
    }

    fn draw(&self, scale: usize) -> SampleParams<'_> {
        let guidance = self.sampling.guidance(scale, self.scales.len());
        SampleParams { sampling: &self.sampling, guidance, seeds: &[0], scale, pass: 0 }
    }

    /// What is not compared: rows that the settings have no use for, and images where there is no
    /// decoder.
    fn is_left(&self, model: &Loaded, key: &str) -> bool {
        let others = ["uncond", "text", "none"].into_iter().filter(|row| !self.rows.contains(row));
        let other = others
            .into_iter()
            .any(|row| key == format!("{row}_ids") || key.contains(&format!(".{row}.")) || key == format!("ids_{row}"));
        other || model.images.is_none() && key.starts_with("image_")
    }
}

#[test]
fn every_tensor_of_every_drawing_equals_the_reference() {
    let (model, runs) = (Loaded::new(), runs());
    let layers = model.config().transformer.num_hidden_layers;
    let shallow: Vec<Loaded> = (1..layers).map(|layers| model.shallow(layers)).collect();
    assert!(!runs.is_empty());
    for run in &runs {
        let (golden, scales) = (&run.golden, &run.scales[..]);
        let rounded = model.config().bf16_frequencies;
        let picture = run.context.and_then(|_| run.picture(&model));
        for row in &run.rows {
            let ids = run.ids(row);
            let (hidden, embedded, _) = model.read(&ids, run.context, picture.as_ref(), rounded);
            golden.close(&format!("prefix.{row}.hidden_0"), &embedded, CLOSE);
            for (i, part) in shallow.iter().enumerate() {
                let (hidden, _, _) = part.read(&ids, run.context, picture.as_ref(), rounded);
                close_before_norm(golden, &model, &format!("prefix.{row}.hidden_{}", i + 1), &hidden);
            }
            golden.close(&format!("prefix.{row}.hidden_{layers}"), &hidden, CLOSE);
            let places: Vec<rope::Position> = (0..ids.len()).map(|i| [i, i]).collect();
            golden.positions(&format!("prefix.{row}.positions"), &places);
        }
        let prefixes = run.prefixes(&model);
        let start = |model: &Loaded, prefixes: &[Cache]| -> Vec<Cache> {
            prefixes
                .iter()
                .map(|prefix| {
                    let mut c = model.trunk.cache(prefix.len()).unwrap();
                    c.copy(prefix).unwrap();
                    c
                })
                .collect()
        };
        let kept = start(&model, &prefixes);
        let kept: Vec<&Cache> = kept.iter().collect();
        let (mut rows, mut hidden) =
            OneCatRows::start(&model.trunk, &model.drawing, &kept, 1, run.guided, scales).unwrap();
        let parts: Vec<Vec<Cache>> = shallow.iter().map(|part| run.prefixes(part)).collect();
        let parts: Vec<Vec<&Cache>> = parts.iter().map(|caches| caches.iter().collect()).collect();
        let mut early: Vec<(OneCatRows, Tensor)> = shallow
            .iter()
            .zip(&parts)
            .map(|(part, prefixes)| {
                OneCatRows::start(&part.trunk, &part.drawing, prefixes, 1, run.guided, scales).unwrap()
            })
            .collect();
        let mut input = NextInput::of_bits(&model.quantizer, scales);
        let mut features = model.drawing.start().unwrap();
        let (mut drawn, mut codes) = (Vec::<Tensor>::new(), Vec::new());
        for (si, &grid) in scales.iter().enumerate() {
            if si > 0 {
                features = input.next(&drawn[si - 1], si).unwrap();
                hidden = rows.forward(si, &features, Step::Scale).unwrap();
                for (rows, hidden) in &mut early {
                    *hidden = rows.forward(si, &features, Step::Scale).unwrap();
                }
            }
            golden.close(&format!("s{si}.features"), &features.squeeze(0).unwrap(), CLOSE);
            let embedded = model.drawing.embed(si, &features).unwrap();
            golden.close(&format!("s{si}.inputs_embeds"), &embedded.squeeze(0).unwrap(), CLOSE);
            let logits = model.drawing.logits(&hidden).unwrap();
            for (r, row) in run.rows.iter().enumerate() {
                let places: Vec<rope::Position> = rope::grid(kept[r].len(), grid, scales[scales.len() - 1]).collect();
                golden.positions(&format!("s{si}.{row}.positions"), &places);
                golden.close(&format!("s{si}.{row}.hidden"), &hidden.get(r).unwrap(), CLOSE);
                golden.close(&format!("s{si}.{row}.logits"), &logits.get(r).unwrap(), CLOSE);
                for (i, (_, hidden)) in early.iter().enumerate() {
                    let key = format!("s{si}.{row}.hidden_{}", i + 1);
                    close_before_norm(golden, &model, &key, &hidden.get(r).unwrap());
                }
            }
            let draw = run.draw(si);
            let guided = bits::guided(&rows.logits(&hidden).unwrap(), &draw).unwrap();
            golden.close(&format!("s{si}.guided"), &guided.reshape((grid.0 * grid.1, (), 2)).unwrap(), LOOSE);
            let sampled = rows.sample(&hidden, &draw).unwrap();
            let want = golden.see(&format!("s{si}.bits")).unwrap().to_vec2::<u8>().unwrap();
            assert_eq!(sampled.get(0).unwrap().to_vec2::<u8>().unwrap(), want, "{} scale {si}", golden.run);
            codes.push(want.iter().map(|bits| pack(bits)).collect::<Vec<_>>());
            drawn.push(sampled);
        }
        let last = scales[scales.len() - 1];
        let sum = model.quantizer.accumulate(&codes, scales).unwrap().squeeze(0).unwrap().t().unwrap();
        golden.close("summed_codes", &sum.reshape(((), last.0, last.1)).unwrap(), CLOSE);
        if let Some(images) = &model.images {
            compare_pixels(golden, images, &codes, scales);
        }
        golden.all_seen(|key| run.is_left(&model, key));
    }
}

/// Compares hidden states behind the last norm with golden ones before it.
fn close_before_norm(golden: &Golden, model: &Loaded, key: &str, normed: &Tensor) {
    if let Some(want) = golden.see(key) {
        let off = far(normed, &model.normed(want));
        assert!(off < CLOSE, "{} {key}: off by {off}", golden.run);
    }
}

fn compare_pixels(golden: &Golden, images: &ImageDecoder, codes: &[Vec<u64>], scales: &[(usize, usize)]) {
    if let Some(want) = golden.see("image_every8") {
        let pixels = images.decode(codes, scales).unwrap();
        let every = |n: usize| Tensor::from_iter((0..n as u32).step_by(8), &Device::Cpu).unwrap();
        let (_, h, w) = pixels.dims3().unwrap();
        let few = pixels.index_select(&every(h), 1).unwrap().index_select(&every(w), 2).unwrap();
        assert!(few.dims() == want.dims() && far(&few, want) < LOOSE, "{}: {}", golden.run, far(&few, want));
    }
    if let Some(want) = golden.see("image_u8") {
        let want = want.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let image = images.decode_image(codes, scales).unwrap();
        assert_eq!(image.as_raw().len(), want.len(), "{}", golden.run);
        assert!(image.as_raw().iter().zip(&want).all(|(a, b)| a.abs_diff(*b) <= 1), "{}", golden.run);
    }
}

#[test]
fn the_loop_draws_the_references_bits() {
    let model = Loaded::new();
    for run in runs() {
        let prefixes = run.prefixes(&model);
        let prefixes: Vec<&Cache> = prefixes.iter().collect();
        let (rows, hidden) =
            OneCatRows::start(&model.trunk, &model.drawing, &prefixes, 1, run.guided, &run.scales).unwrap();
        let batch = Batch { scales: &run.scales, sampling: &run.sampling, seeds: &[0] };
        let input = NextInput::of_bits(&model.quantizer, &run.scales);
        let images = draw_codes(rows, hidden, input, batch, &mut |_: Event| ControlFlow::Continue(())).unwrap();
        for (si, codes) in images[0].iter().enumerate() {
            let want = run.golden.all[&format!("s{si}.bits")].to_vec2::<u8>().unwrap();
            let got: Vec<Vec<u8>> = codes.iter().map(|&code| unpack(code, want[0].len()).collect()).collect();
            assert_eq!(got, want, "{}, scale {si}", run.golden.run);
        }
    }
}

/// An early end of guidance and a draft change nothing before them, one of two images is what it is
/// alone, and a scale has no adapter but its own.
#[test]
fn drafts_and_batches_are_parts_of_the_same() {
    let model = Loaded::new();
    for run in runs().into_iter().filter(|run| run.rows.len() > 1) {
        let scales = &run.scales[..];
        let sampling = Sampling { top_k: None, top_p: 0.97, ..run.sampling.clone() };
        let prefixes = run.prefixes(&model);
        let draw = |sampling: &Sampling, seeds: &[u64]| {
            let of_images =
                prefixes.iter().flat_map(|prefix| std::iter::repeat_n(prefix, seeds.len())).collect::<Vec<_>>();
            let (rows, hidden) =
                OneCatRows::start(&model.trunk, &model.drawing, &of_images, seeds.len(), run.guided, scales).unwrap();
            let input = NextInput::of_bits(&model.quantizer, scales);
            let batch = Batch { scales, sampling, seeds };
            draw_codes(rows, hidden, input, batch, &mut |_: Event| ControlFlow::Continue(())).unwrap()
        };
        let whole = draw(&sampling, &[5, 6]);
        assert_ne!(whole[0], whole[1]);
        assert_eq!(draw(&sampling, &[5])[0], whole[0]);
        assert_eq!(draw(&sampling, &[6])[0], whole[1]);
        let draft = draw(&Sampling { draft: 2, ..sampling.clone() }, &[5]);
        assert_eq!(draft[0], whole[0][..scales.len() - 2]);
        let until = draw(&Sampling { cfg_until: Some(3), ..sampling.clone() }, &[5, 6]);
        assert_eq!(until[0][..3], whole[0][..3]);
        assert_ne!(until, whole);
    }
    let x = model.drawing.start().unwrap();
    assert!(far(&model.drawing.embed(0, &x).unwrap(), &model.drawing.embed(1, &x).unwrap()) > 1e-3);
}

#[test]
fn understanding_equals_the_reference() {
    let (model, all) = (Loaded::new(), settings());
    let layers = model.config().transformer.num_hidden_layers;
    let shallow: Vec<Loaded> = (1..layers).map(|layers| model.shallow(layers)).collect();
    let mut cases = 0;
    for name in files(".io.safetensors") {
        let golden = Golden::new(&name);
        let kinds: Vec<String> =
            golden.all.keys().filter_map(|key| Some(key.strip_suffix(".step_logits")?.into())).collect();
        for kind in &kinds {
            cases += 1;
            let settings = &all[format!("{name}_{kind}")];
            let context = settings["context_id"].as_u64().map(|id| id as u32);
            let key = |part: &str| format!("{kind}.{part}");
            let features = golden.see(&key("pixel_values")).map(|pixels| {
                let parts = [pixels, golden.see(&key("thumbnail")).unwrap()].map(|p| cut(p, model.config().patch_size));
                let each = parts.each_ref().map(|part| model.reading.features(std::slice::from_ref(part)).unwrap());
                golden.close(&key("features"), &each[0], CLOSE);
                golden.close(&key("thumbnail_features"), &each[1], CLOSE);
                model.reading.features(&parts).unwrap()
            });
            let ids = golden.ids(&key("ids"));
            let (hidden, embedded, mut cache) = model.read(&ids, context, features.as_ref(), false);
            golden.close(&key("inputs_embeds"), &embedded, CLOSE);
            for (i, part) in shallow.iter().enumerate() {
                let (hidden, ..) = part.read(&ids, context, features.as_ref(), false);
                close_before_norm(&golden, &model, &key(&format!("hidden_{}", i + 1)), &hidden);
            }
            golden.close(&key(&format!("hidden_{layers}")), &hidden, CLOSE);
            let logits = model.reading.logits(&hidden).unwrap();
            golden.close(&key("logits"), &logits, CLOSE);
            golden.positions(&key("positions"), &(0..ids.len()).map(|i| [i, i]).collect::<Vec<_>>());
            compare_mask(&golden, &key("mask"), &ids, context);
            // Behind a first token that the reference has never fed.
            let words = golden.ids(&key("generated"));
            let mut logits = logits.get(ids.len() - 1).unwrap();
            let mut steps = Vec::new();
            for (i, &word) in words[1..].iter().enumerate() {
                steps.push(logits.clone());
                assert_eq!(logits.argmax(0).unwrap().to_scalar::<u32>().unwrap(), word, "{name} {kind} word {i}");
                let x = model.reading.embed(&Tensor::new(&[[word]], &Device::Cpu).unwrap()).unwrap();
                let hidden = model.reading.read(&model.trunk, &x, &mut cache, false, false).unwrap();
                logits = model.reading.logits(&hidden).unwrap().flatten_all().unwrap();
            }
            golden.close(&key("step_logits"), &Tensor::stack(&steps, 0).unwrap(), CLOSE);
        }
        if !kinds.is_empty() {
            golden.all_seen(|_| false);
        }
    }
    assert!(cases >= 2);
}

/// The reference's mask is what reading a prompt in passes comes to: text sees what is before it, a
/// picture all of itself as well.
fn compare_mask(golden: &Golden, key: &str, ids: &[u32], context: Option<u32>) {
    let Some(mask) = golden.see(key) else { return };
    let mut mine = Vec::new();
    for run in ids.chunk_by(|a, b| (Some(*a) == context) == (Some(*b) == context)) {
        let start = mine.len();
        for i in 0..run.len() {
            let end = start + if Some(run[0]) == context { run.len() } else { i + 1 };
            mine.push((0..ids.len()).map(|j| u8::from(j < end)).collect::<Vec<u8>>());
        }
    }
    assert_eq!(mask.to_vec2::<u8>().unwrap(), mine, "{} {key}", golden.run);
}

#[test]
fn masks_of_edits_are_passes() {
    let all = settings();
    for name in files("_prefix_mask.safetensors") {
        let golden = Golden {
            run: name.clone(),
            all: tensors(&format!("{name}_prefix_mask.safetensors")),
            seen: RefCell::default(),
        };
        let ids = golden.ids("ids");
        let run = all.as_object().unwrap().iter().find(|(run, _)| run.starts_with(&name)).expect("a run");
        let context = run.1["ref_context_id"].as_u64().map(|id| id as u32);
        assert!(context.is_some_and(|context| ids.contains(&context)));
        compare_mask(&golden, "mask", &ids, context);
    }
}

/// Keys and shapes of the whole model.
fn keys() -> BTreeMap<String, Vec<usize>> {
    headers::keys(&path("keys_onecat_3b.txt"))
}

fn ask(w: &Weights, config: &OneCatConfig) -> candle_core::Result<()> {
    Trunk::load(w, config)?;
    Reading::load(w, config, ALL)?;
    Drawing::load(w, config).map(drop)
}

#[test]
fn the_whole_model_has_exactly_what_is_asked_for() {
    let (keys, folder) = (keys(), tempfile::tempdir().unwrap());
    assert_eq!(keys.len(), 888);
    let file = folder.path().join("model.safetensors");
    headers::header_only(&keys, DType::BF16, &file);
    let inventory = Inventory::open(&file).unwrap();
    let config = OneCatConfig::of(&inventory, &json!({"model_type": "onecat"})).unwrap();
    assert!(config.is_3b());
    assert_eq!(config.to_json(), OneCatConfig::onecat_3b().to_json());
    let requested = Weights::inventory();
    ask(&requested, &config).unwrap();
    let fit = inventory.compare(&requested);
    assert!(fit.is_complete() && fit.unknown.is_empty(), "{fit:?}");
    assert_eq!(requested.requested(), keys);
    let numbers: usize = keys.values().map(|shape| shape.iter().product::<usize>()).sum();
    assert_eq!(numbers, 9_465_868_384);
    // What each mode needs of it.
    let count = |ask: &dyn Fn(&Weights)| {
        let requested = Weights::inventory();
        ask(&requested);
        requested.requested().values().map(|shape| shape.iter().product::<usize>()).sum::<usize>() as f64 / 1e9
    };
    let reading =
        |w: &Weights, pictures, head| drop(Reading::load(w, &config, ReadingParts { pictures, head }).unwrap());
    let trunk = |w: &Weights| drop(Trunk::load(w, &config).unwrap());
    let drawing = |w: &Weights| drop(Drawing::load(w, &config).unwrap());
    for (parts, ask) in [
        (
            6.72,
            &(|w: &Weights| {
                trunk(w);
                reading(w, false, false);
                drawing(w)
            }) as &dyn Fn(&Weights),
        ),
        (9.16, &|w: &Weights| {
            trunk(w);
            reading(w, true, false);
            drawing(w)
        }),
        (5.85, &|w: &Weights| {
            trunk(w);
            reading(w, true, true)
        }),
        (3.98, &|w: &Weights| {
            trunk(w);
            drawing(w)
        }),
    ] {
        assert!((count(ask) - parts).abs() < 0.02, "{} for {parts}", count(ask));
    }
}

/// Wrong shapes, tensors that are not there, and a config that says other things have their names
/// in the message.
#[test]
fn what_does_not_fit_is_named() {
    let (keys, folder) = (keys(), tempfile::tempdir().unwrap());
    let file = folder.path().join("model.safetensors");
    let layer = "patch_language_model.model.layers";
    type Change = Option<Vec<usize>>;
    let cases: [(String, Change, &str); 12] = [
        (format!("{layer}.7.mlp_ge.up_proj.lora_B.default.weight"), Some(vec![11008, 831]), "wrongly shaped"),
        (format!("{layer}.35.mlp_ue.down_proj.weight"), Some(vec![2048, 11000]), "wrongly shaped"),
        (format!("{layer}.3.self_attn.k_proj.bias"), None, "missing"),
        ("patch_language_model.lm_head.weight".into(), Some(vec![151_936, 2048]), "wrongly shaped"),
        ("image_gen_out_projector.mlp.2.weight".into(), Some(vec![32, 2048]), "wrongly shaped"),
        ("mlp.1.weight".into(), Some(vec![2048, 4092]), "wrongly shaped"),
        ("patch_vision_model.embeddings.position_embedding".into(), Some(vec![1, 1000, 1024]), "1000 rows"),
        ("patch_vision_model.embeddings.patch_embedding.weight".into(), Some(vec![1024, 588]), "not 4 dimensions"),
        ("patch_language_model.model.embed_tokens.weight".into(), None, "is missing"),
        ("sos_embedding.weight".into(), Some(vec![1, 0]), "bits"),
        ("lvl_embed.weight".into(), Some(vec![12, 2048]), "lvl_embed"),
        (format!("{layer}.0.mlp_ge.gate_proj.lora_A.default.weight"), Some(vec![833, 2048]), "833 rows"),
    ];
    for (key, shape, part) in cases {
        let mut wrong = keys.clone();
        assert!(wrong.contains_key(&key));
        match shape {
            Some(shape) => drop(wrong.insert(key.clone(), shape)),
            None => drop(wrong.remove(&key)),
        }
        headers::header_only(&wrong, DType::BF16, &file);
        let source = nextflow::checkpoint::Source::Folder(folder.path().into());
        std::fs::write(folder.path().join("config.json"), r#"{"model_type": "onecat"}"#).unwrap();
        let checked =
            OneCatConfig::read(&source).and_then(|config| source.check("model.safetensors", |w| ask(w, &config)));
        let error = checked.unwrap_err();
        assert!(error.message.contains(part), "{key}: {}", error.message);
        assert!(error.message.contains(&key) || ["bits", "lvl_embed"].contains(&part), "{key}: {}", error.message);
        assert!(error.exit_code() == 3 && error.hint.is_some());
    }
    headers::header_only(&keys, DType::BF16, &file);
    let inventory = Inventory::open(&file).unwrap();
    for (config, part) in [
        (json!({"llm_config": {"hidden_size": 4096}}), "hidden_size 4096, the weights 2048"),
        (json!({"llm_config": {"num_hidden_layers": 28}}), "num_hidden_layers 28, the weights 36"),
        (json!({"llm_config": {"num_attention_heads": 24}}), "24 heads"),
        (json!({"llm_config": {"num_key_value_heads": 8}}), "num_key_value_heads 8"),
        (json!({"llm_config": {"hidden_act": "gelu"}}), "hidden_act"),
        (json!({"llm_config": {"rms_norm_eps": -1}}), "rms_norm_eps"),
        (json!({"llm_config": {"rope_scaling": {"type": "yarn"}}}), "rope_scaling"),
        (json!({"llm_config": {"use_sliding_window": true}}), "sliding window"),
        (json!({"patch_vision_config": {"hidden_size": 3200}}), "hidden_size 3200, the weights 1024"),
        (json!({"patch_vision_config": {"image_size": 224}}), "image_size 224, the weights 448"),
        (json!({"downsample_ratio": 0.25}), "downsample_ratio"),
        (json!({"downsample_ratio": "half"}), "downsample_ratio"),
        (json!({"vae_embed_dim": 16}), "vae_embed_dim 16, the weights 32"),
        (json!({"template": "internvl"}), "template"),
        (json!({"saa_scales": 5}), "5 scales do not divide"),
        (json!({"system_message": 7}), "system_message"),
        (json!({"bf16_frequencies": "yes"}), "bf16_frequencies"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "quantised for another program"),
    ] {
        let error = OneCatConfig::of(&inventory, &config).unwrap_err();
        assert!(error.contains(part), "{config}: {error}");
    }
    // A vocabulary that is padded is taken as it is.
    let padded = json!({"llm_config": {"vocab_size": 151_665}, "system_message": "You draw."});
    let config = OneCatConfig::of(&inventory, &padded).unwrap();
    assert_eq!((config.transformer.vocab_size, config.system.as_str()), (151_680, "You draw."));
}
