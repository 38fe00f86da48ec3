//! Infinity's transformer and its loop against the reference's own numbers. Which models and runs
//! there are, their shapes and settings, is read from tests/data/infinity/infinity.json.

#[path = "common/headers.rs"]
mod headers;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use nextflow::backbone::Step;
use nextflow::checkpoint::{Inventory, Weights};
use nextflow::generate::infinity::{InfinityRows, lattice};
use nextflow::generate::next_input::NextInput;
use nextflow::generate::sampler::{self, SampleParams};
use nextflow::generate::{Batch, Event, Guidance, Sampling, Sequences, bits, draw_codes};
use nextflow::infinity::{Infinity, InfinityConfig, presets};
use nextflow::tokenizer::{BitTokenizerConfig, ImageDecoder, unpack};
use serde::Deserialize;

const FEATURES: f32 = 2e-4;

#[derive(Deserialize)]
struct Shape {
    depth: usize,
    embed_dim: usize,
    num_heads: usize,
    block_chunks: usize,
    mlp_hidden: usize,
    text_channels: usize,
    text_pool_heads: usize,
    text_maxlen: usize,
    d_vae: usize,
    tokenizer: String,
}

#[derive(Deserialize)]
struct Run {
    schedule: Vec<(usize, usize)>,
    text_lens: Vec<usize>,
    negative_lens: Option<Vec<usize>>,
    cfg: Vec<f64>,
    tau: Vec<f64>,
    top_k: usize,
    top_p: f64,
    cfg_insertion_layer: Vec<i64>,
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/infinity").join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path(name), &Device::Cpu).unwrap()
}

fn json() -> BTreeMap<String, serde_json::Value> {
    serde_json::from_str(&std::fs::read_to_string(path("infinity.json")).unwrap()).unwrap()
}

fn weights(name: &str) -> Weights {
    Weights::from_safetensors(&[path(&format!("{name}.weights.safetensors"))], DType::F32, &Device::Cpu).unwrap()
}

/// Every run with the name of its model: the longest that its own begins with.
fn runs() -> Vec<(String, String, Run)> {
    let json = json();
    let models: Vec<&String> =
        json.iter().filter(|(_, v)| v.get("embed_dim").is_some()).map(|(name, _)| name).collect();
    let run = |(name, value): (&String, &serde_json::Value)| {
        value.get("schedule")?;
        let model = models.iter().filter(|model| name.starts_with(**model)).max_by_key(|model| model.len());
        Some((name.clone(), (*model.expect("a model")).clone(), serde_json::from_value(value.clone()).unwrap()))
    };
    json.iter().filter_map(run).collect()
}

struct Loaded {
    model: Infinity,
    /// The model up to its first block.
    first: Infinity,
    images: ImageDecoder,
}

impl Loaded {
    fn new(name: &str) -> Self {
        let shape: Shape = serde_json::from_value(json()[name].clone()).unwrap();
        let inventory = Inventory::open(&path(&format!("{name}.weights.safetensors"))).unwrap();
        let config = InfinityConfig::of(&inventory, name).unwrap();
        let want = InfinityConfig {
            depth: shape.depth,
            chunk: shape.depth / shape.block_chunks,
            width: shape.embed_dim,
            heads: shape.num_heads,
            mlp: shape.mlp_hidden,
            text_width: shape.text_channels,
            text_heads: shape.text_pool_heads,
            max_tokens: shape.text_maxlen,
            bits: shape.d_vae,
            ..config.clone()
        };
        assert_eq!(config, want);
        let tokenizer = Inventory::open(&path(&format!("{}.weights.safetensors", shape.tokenizer))).unwrap();
        let tokenizer = BitTokenizerConfig::of_weights(&tokenizer).unwrap();
        assert_eq!(tokenizer.bits.per_token(), config.bits);
        let w = weights(name);
        Self {
            model: Infinity::load(&w, &config).unwrap(),
            first: Infinity::load(&w, &InfinityConfig { depth: 1, ..config.clone() }).unwrap(),
            images: ImageDecoder::load_bits(&weights(&shape.tokenizer), &tokenizer).unwrap(),
        }
    }

    fn input<'a>(&'a self, scales: &'a [(usize, usize)]) -> NextInput<'a> {
        match &self.images {
            ImageDecoder::Bits(images) => NextInput::of_bits(images.quantizer(), scales),
            ImageDecoder::Table(_) => panic!("a codebook"),
        }
    }
}

impl Run {
    fn sampling(&self) -> Sampling {
        // 1 stands for guidance of probabilities, which the reference takes for an option and never
        // does.
        let idle = self.cfg_insertion_layer.contains(&1);
        let layers: Vec<usize> =
            self.cfg_insertion_layer.iter().filter(|&&l| l <= 0).map(|l| l.unsigned_abs() as usize).collect();
        Sampling {
            guidance: Guidance::Constant,
            cfg_scales: if idle { vec![1.0; self.cfg.len()] } else { self.cfg.clone() },
            temperature_scales: self.tau.clone(),
            top_k: Some(self.top_k).filter(|&k| k > 0),
            top_p: if self.top_p > 0.0 { self.top_p } else { 1.0 },
            cfg_layers: if layers == [0] { Vec::new() } else { layers },
            ..Sampling::default()
        }
    }

    /// Features of the texts of all rows: the prompts', then those of guidance.
    fn texts(&self, model: &Infinity, golden: &HashMap<String, Tensor>, guided: bool) -> Vec<Tensor> {
        let split = |features: &Tensor, lens: &[usize]| {
            let mut first = 0;
            let part = |&len: &usize| {
                first += len;
                features.narrow(0, first - len, len).unwrap()
            };
            lens.iter().map(part).collect::<Vec<_>>()
        };
        let mut texts = split(&golden["text_features"], &self.text_lens);
        match &self.negative_lens {
            _ if !guided => {}
            Some(lens) => texts.extend(split(&golden["negative_features"], lens)),
            None => texts.extend(self.text_lens.iter().map(|&len| model.unconditional(len).unwrap())),
        }
        texts
    }
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

    /// Compares with a tensor, if there is one, of as many rows: the reference reads unconditional
    /// rows that nothing needs.
    fn close(&self, key: &str, got: &Tensor) {
        let Some(want) = self.all.get(key).map(|want| want.to_dtype(DType::F32).unwrap()) else { return };
        self.seen.borrow_mut().insert(key.into());
        let want = if got.rank() > 1 && want.dims()[1..] == got.dims()[1..] && want.dims()[0] > got.dims()[0] {
            want.narrow(0, 0, got.dims()[0]).unwrap()
        } else {
            want
        };
        assert_eq!(got.dims(), want.dims(), "{} {key}", self.run);
        let error = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        let error = error.to_scalar::<f32>().unwrap();
        assert!(error < FEATURES, "{} {key}: off by {error}", self.run);
    }

    /// Fails unless every tensor was compared but what goes in.
    fn all_seen(&self) {
        let inputs = ["text_features", "text_lens", "negative_features", "negative_lens"];
        let seen = self.seen.borrow();
        let left: Vec<&String> =
            self.all.keys().filter(|key| !seen.contains(*key) && !inputs.contains(&key.as_str())).collect();
        assert!(left.is_empty(), "{}: {left:?} were not compared", self.run);
    }
}

#[test]
fn every_tensor_of_every_run_equals_the_reference() {
    let runs = runs();
    assert!(runs.len() >= 6);
    // Guidance within the network, alone and beside guidance of logits.
    let layers = |run: &Run| run.sampling().cfg_layers;
    assert!(runs.iter().any(|(.., run)| !layers(run).is_empty() && !layers(run).contains(&0)));
    assert!(runs.iter().any(|(.., run)| layers(run).len() > 1 && layers(run).contains(&0)));
    for (name, model, run) in runs {
        let (loaded, golden, sampling) = (Loaded::new(&model), Golden::new(&name), run.sampling());
        let (scales, images) = (&run.schedule[..], run.text_lens.len());
        assert_eq!((run.cfg.len(), run.tau.len()), (scales.len(), scales.len()));
        let guided = sampling.guided_scales(scales.len());
        let texts = run.texts(&loaded.model, &golden.all, guided > 0);
        let lattice = lattice(scales).expect("a ratio");
        let plain = Sampling { cfg_layers: Vec::new(), ..sampling.clone() };
        let (mut first, mut early) = InfinityRows::start(&loaded.first, &plain, &texts, scales, lattice).unwrap();
        let (mut rows, mut hidden) = InfinityRows::start(&loaded.model, &sampling, &texts, scales, lattice).unwrap();
        golden.close("cond", &rows.conditions().pooled);
        golden.close("text_kv", &Tensor::cat(&rows.conditions().texts, 1).unwrap().squeeze(0).unwrap());
        golden.close("ada", &rows.conditions().ada.unsqueeze(1).unwrap());
        golden.close("block0_in.0", &loaded.model.start(rows.conditions()).unwrap());

        let mut input = loaded.input(scales);
        let mut codes: Vec<Vec<Vec<u64>>> = vec![Vec::new(); images];
        let mut drawn = Tensor::zeros((images, 1, 1), DType::U8, &Device::Cpu).unwrap();
        for si in 0..scales.len() {
            if si == guided {
                rows.drop_unconditional(images).unwrap();
                first.drop_unconditional(images).unwrap();
            }
            if si > 0 {
                let features = input.next(&drawn, si).unwrap();
                golden.close(&format!("input.{si}"), &features);
                let x = loaded.model.embed(si, &features).unwrap();
                let copies = if si < guided { vec![&x, &x] } else { vec![&x] };
                golden.close(&format!("block0_in.{si}"), &Tensor::cat(&copies, 0).unwrap());
                early = first.forward(si, &features, Step::Scale).unwrap();
                hidden = rows.forward(si, &features, Step::Scale).unwrap();
            }
            golden.close(&format!("block0_out.{si}"), &early);
            golden.close(&format!("hidden.{si}"), &hidden);
            let logits = rows.logits(&hidden).unwrap();
            let seeds = vec![0; images];
            let params = SampleParams {
                sampling: &sampling,
                guidance: sampling.guidance(si, scales.len()),
                seeds: &seeds,
                scale: si,
                pass: 0,
            };
            // The reference has the logits of rows alone that its guidance looks at.
            let looked = if params.guidance == 0.0 { images } else { logits.dim(0).unwrap() };
            golden.close(&format!("logits.{si}"), &logits.narrow(0, 0, looked).unwrap());
            golden.close(&format!("guided.{si}"), &bits::guided(&logits, &params).unwrap());
            drawn = rows.sample(&hidden, &params).unwrap();
            golden.close(&format!("bits.{si}"), &drawn.to_dtype(DType::F32).unwrap());
            for (image, code) in codes.iter_mut().zip(sampler::to_host(&drawn).unwrap()) {
                image.push(code);
            }
        }
        let ImageDecoder::Bits(decoder) = &loaded.images else { panic!("a codebook") };
        let z: Vec<Tensor> = codes.iter().map(|codes| decoder.quantizer().accumulate(codes, scales).unwrap()).collect();
        let z = Tensor::cat(&z, 0).unwrap().transpose(1, 2).unwrap();
        golden.close("z", &z.reshape(golden.all["z"].shape()).unwrap());
        let image = loaded.images.decode_image(&codes[0], scales).unwrap();
        let want = golden.all["image_u8_bgr"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        golden.seen.borrow_mut().insert("image_u8_bgr".into());
        assert_eq!(image.as_raw().len(), want.len(), "{name}");
        for (got, want) in image.pixels().zip(want.chunks_exact(3)) {
            let far = got.0.iter().zip(want.iter().rev()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(far <= Some(1), "{name}: {:?} for {want:?} (blue first)", got.0);
        }
        golden.all_seen();
    }
}

#[test]
fn the_loop_draws_the_references_bits() {
    for (name, model, run) in runs() {
        let (loaded, golden, sampling) = (Loaded::new(&model), Golden::new(&name), run.sampling());
        let scales = &run.schedule[..];
        let texts = run.texts(&loaded.model, &golden.all, sampling.guided_scales(scales.len()) > 0);
        let seeds = vec![0; run.text_lens.len()];
        let batch = Batch { scales, sampling: &sampling, seeds: &seeds };
        let (rows, hidden) =
            InfinityRows::start(&loaded.model, &sampling, &texts, scales, lattice(scales).unwrap()).unwrap();
        let mut go = |_: Event| ControlFlow::Continue(());
        let images = draw_codes(rows, hidden, loaded.input(scales), batch, &mut go).unwrap();
        assert_eq!(images.len(), run.text_lens.len());
        for (i, codes) in images.iter().enumerate() {
            for (si, codes) in codes.iter().enumerate() {
                let want = golden.all[&format!("bits.{si}")].get(i).unwrap().to_vec2::<u8>().unwrap();
                let got: Vec<Vec<u8>> = codes.iter().map(|&code| unpack(code, want[0].len()).collect()).collect();
                assert_eq!(got, want, "{name}, image {i}, scale {si}");
            }
        }
    }
}

/// An early end and a draft change nothing before them, and one of two images is what it is alone.
#[test]
fn drafts_and_batches_are_parts_of_the_same() {
    let (name, model, run) = runs().into_iter().find(|(_, _, run)| run.text_lens.len() > 1).expect("a batch");
    let (loaded, golden, sampling) = (Loaded::new(&model), Golden::new(&name), run.sampling());
    let scales = &run.schedule[..];
    let sampling = Sampling { top_k: None, top_p: 0.97, ..sampling };
    let texts = run.texts(&loaded.model, &golden.all, true);
    let draw = |sampling: &Sampling, texts: &[Tensor], seeds: &[u64]| {
        let batch = Batch { scales, sampling, seeds };
        let (rows, hidden) =
            InfinityRows::start(&loaded.model, sampling, texts, scales, lattice(scales).unwrap()).unwrap();
        let mut go = |_: Event| ControlFlow::Continue(());
        draw_codes(rows, hidden, loaded.input(scales), batch, &mut go).unwrap()
    };
    let images = run.text_lens.len();
    let seeds: Vec<u64> = (5..).take(images).collect();
    let whole = draw(&sampling, &texts, &seeds);
    for (i, &seed) in seeds.iter().enumerate() {
        let alone = draw(&sampling, &[texts[i].clone(), texts[images + i].clone()], &[seed]);
        assert_eq!(alone[0], whole[i]);
    }
    let draft = draw(&Sampling { draft: 2, ..sampling.clone() }, &texts, &seeds);
    assert_eq!(draft[0], whole[0][..scales.len() - 2]);
    let until = draw(&Sampling { cfg_until: Some(3), ..sampling.clone() }, &texts, &seeds);
    assert_eq!(until[0][..3], whole[0][..3]);
    assert_ne!(until[0], whole[0]);
}

/// Keys and shapes of a public checkpoint.
fn keys(name: &str) -> BTreeMap<String, Vec<usize>> {
    headers::keys(&path(&format!("keys_infinity_{name}.txt")))
}

#[test]
fn the_public_checkpoints_have_exactly_what_is_asked_for() {
    for (name, shape) in [("125m", presets::INFINITY_125M), ("2b", presets::INFINITY_2B), ("8b", presets::INFINITY_8B)]
    {
        let keys = keys(name);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        headers::header_only(&keys, DType::F32, &file);
        let inventory = Inventory::open(&file).unwrap();
        assert_eq!(InfinityConfig::of(&inventory, name).unwrap(), shape);
        let requested = Weights::inventory();
        Infinity::load(&requested, &shape).unwrap();
        let fit = inventory.compare(&requested);
        assert!(fit.is_complete() && fit.unknown.is_empty(), "{name}: {fit:?}");
        assert_eq!(requested.requested(), keys, "{name}");

        // Wrong shapes, and tensors that are not there, have their names in the message.
        for (key, shape, part) in
            [("head.weight", Some(vec![31, 768]), "wrongly shaped: head.weight"), ("ffn.fc2.bias", None, "missing")]
        {
            let mut wrong = keys.clone();
            let key = wrong.keys().rev().find(|k| k.ends_with(key)).unwrap().clone();
            match shape {
                Some(shape) => drop(wrong.insert(key.clone(), shape)),
                None => drop(wrong.remove(&key)),
            }
            headers::header_only(&wrong, DType::F32, &file);
            let source = nextflow::checkpoint::Source::Folder(folder.path().into());
            let config = InfinityConfig::of(&Inventory::open(&file).unwrap(), name).unwrap();
            let error = source.check("model.safetensors", |w| Infinity::load(w, &config)).unwrap_err();
            assert!(error.message.contains(part) && error.message.contains(&key), "{}", error.message);
            assert_eq!(error.exit_code(), 3);
        }
    }
}
