//! TokenFlow-t2i's language model and its loop against the public reference, run at tiny widths
//! (tests/data/tokenflow).

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use candle_core::{D, DType, Device, Tensor};
use nextflow::backbone::presets::TOKENFLOW_T2I_7B;
use nextflow::backbone::rope::{Position, text_position};
use nextflow::backbone::{Backbone, BackboneConfig, Context, Rope, Step};
use nextflow::checkpoint::{Source, Weights};
use nextflow::generate::next_input::NextInput;
use nextflow::generate::{Batch, Event, Filter, Prefix, PromptConfig, Rows, Sampling, Sequences, draw_after, sampler};
use nextflow::ops;
use nextflow::tokenizer::{CodebookConfig, Quantizer};

const TINY: BackboneConfig = BackboneConfig {
    vocab_size: 33,
    hidden_size: 64,
    intermediate_size: 96,
    num_hidden_layers: 3,
    num_attention_heads: 4,
    num_key_value_heads: 4,
    mrope_section: [8, 0, 0],
    codebook_size: 64,
    max_scales: 4,
    bf16_frequencies: false,
    code_positions: Some(39),
    ..TOKENFLOW_T2I_7B
};

const SCALES: [(usize, usize); 4] = [(1, 1), (2, 2), (3, 3), (5, 5)];

/// Name, guidance and passes over a scale of the reference's runs.
const RUNS: [(&str, f64, usize); 3] = [("nocfg_greedy", 0.0, 1), ("cfg7p5_greedy", 7.5, 1), ("cfg7p5_refine2", 7.5, 2)];

const FEATURES: f32 = 2e-4;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenflow").join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path(name), &Device::Cpu).unwrap()
}

fn weights(name: &str) -> Weights {
    Weights::from_safetensors(&[path(name)], DType::F32, &Device::Cpu).unwrap()
}

fn backbone(config: &BackboneConfig) -> Backbone {
    Backbone::load(&weights("t2i_tiny_llm.weights.safetensors"), config).unwrap()
}

fn quantizer() -> Quantizer {
    let book = CodebookConfig { size: 64, semantic_dim: 32, pixel_dim: 8, w_sem: 1.0, w_pix: 1.0, l2_norm: true };
    Quantizer::load(&weights("t2i_tiny_codebook.safetensors"), &book).unwrap()
}

fn golden(run: &str) -> HashMap<String, Tensor> {
    tensors(&format!("t2i_tiny_{run}.io.safetensors"))
}

/// Ids of a row of an i64 tensor.
fn ids(t: &Tensor, row: usize) -> Vec<u32> {
    t.get(row).unwrap().to_vec1::<i64>().unwrap().into_iter().map(|i| i as u32).collect()
}

/// The conditional and unconditional prefix of one of the reference's two prompts, laid out anew
/// from their texts.
fn prefixes(golden: &HashMap<String, Tensor>, row: usize) -> [Prefix; 2] {
    const PAD: u32 = 32;
    let config = PromptConfig { bos: Some(1), padded_to: Some(8), ..PromptConfig::default() };
    ["input_ids_cond", "input_ids_uncond"].map(|name| {
        let ids = ids(&golden[name], row);
        let pads = ids.iter().take_while(|&&id| id == PAD).count();
        let prefix = config.prefix(&ids[pads + 1..8], &[10, 11, 12]);
        assert_eq!(prefix, Prefix { ids: ids[pads..].to_vec(), pads });
        prefix
    })
}

fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let error = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(error < tolerance, "{what}: off by {error}");
}

#[test]
fn rotations_equal_the_reference_with_either_frequencies() {
    let golden = tensors("rope_tables.safetensors");
    let positions: Vec<Position> =
        golden["positions"].to_vec1::<i64>().unwrap().into_iter().map(|p| text_position(p as usize)).collect();
    assert!(positions.iter().any(|p| p[0] >= 900.0));
    for (bf16_frequencies, name) in [(false, "f32"), (true, "from_bf16_inv_freq")] {
        let rope = Rope::new(&BackboneConfig { bf16_frequencies, ..TOKENFLOW_T2I_7B }, &[&positions], &Device::Cpu);
        let Rope { cos, sin } = rope.unwrap();
        for (got, axis) in [(cos, "cos"), (sin, "sin")] {
            let both = Tensor::cat(&[&got, &got], D::Minus1).unwrap().squeeze(0).unwrap();
            close(name, &both, &golden[&format!("{axis}_{name}")], FEATURES);
        }
    }
}

#[test]
fn the_loop_draws_the_references_codes() {
    let (backbone, q) = (backbone(&TINY), quantizer());
    for (run, cfg, passes) in RUNS {
        let golden = golden(run);
        let later_passes = vec![Filter { top_k: Some(1), top_p: 1.0 }; passes - 1];
        let sampling = Sampling { cfg, top_k: Some(1), later_passes, ..Sampling::default() };
        let batch = Batch { scales: &SCALES, sampling: &sampling, seeds: &[0, 0] };
        let mut prompts: Vec<[Prefix; 2]> = (0..2).map(|row| prefixes(&golden, row)).collect();
        let unconditional = prompts[0][1].clone();
        assert_eq!(prompts[1][1], unconditional);
        let prompts: Vec<Prefix> = prompts.drain(..).map(|[conditional, _]| conditional).collect();
        let mut go = |_: Event| ControlFlow::Continue(());
        let input = NextInput::of_table(&q, TINY.input_mode, &SCALES);
        let images = draw_after(&backbone, input, &prompts, &unconditional, batch, &mut go).unwrap();
        for (row, codes) in images.into_iter().enumerate() {
            assert_eq!(codes.iter().map(Vec::len).collect::<Vec<_>>(), [1, 4, 9, 25]);
            let codes: Vec<u32> = codes.concat().into_iter().map(|code| code as u32).collect();
            assert_eq!(codes, ids(&golden["codes"], row), "{run}, prompt {row}");
        }
    }
}

#[test]
fn every_step_equals_the_reference() {
    let (backbone, q) = (backbone(&TINY), quantizer());
    for (run, cfg, passes) in RUNS {
        let golden = golden(run);
        for row in 0..2 {
            let prefixes = prefixes(&golden, row);
            // The reference's rows: both conditional ones, then both unconditional ones.
            let pair = |t: &Tensor| Tensor::stack(&[t.get(row).unwrap(), t.get(2 + row).unwrap()], 0).unwrap();
            for (prefix, want) in prefixes.iter().zip([row, 2 + row]) {
                let ids = Tensor::new(&prefix.ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
                let want = golden["step0_inputs_embeds"].get(want).unwrap();
                let want = want.narrow(0, prefix.pads, prefix.ids.len()).unwrap();
                close(run, &backbone.embed_prefix(&ids).unwrap().squeeze(0).unwrap(), &want, FEATURES);
            }
            let both = [&prefixes[0], &prefixes[1]];
            let mut caches = Rows::caches(&backbone, &both, &SCALES).unwrap();
            let (mut rows, mut hidden) = Rows::start(&backbone, &mut caches, &both, &SCALES).unwrap();
            let mut input = NextInput::of_table(&q, TINY.input_mode, &SCALES);
            let (mut step, mut codes) = (0, Tensor::zeros((1, 0), DType::U32, &Device::Cpu).unwrap());
            for si in 0..SCALES.len() {
                for pass in 0..if si == 0 { 1 } else { passes } {
                    let what = format!("{run}, prompt {row}, step {step}");
                    let at = |name: &str| &golden[&format!("step{step}_{name}")];
                    if si > 0 {
                        let features = match pass {
                            0 => input.next(&codes, si).unwrap(),
                            _ => input.with(&codes, si).unwrap(),
                        };
                        let x = backbone.embed_codes(&features, si, &SCALES).unwrap().repeat((2, 1, 1)).unwrap();
                        close(&what, &x, &pair(at("inputs_embeds_tail")), FEATURES);
                        hidden = rows.forward(si, &features, if pass > 0 { Step::Again } else { Step::Scale }).unwrap();
                    }
                    let code_logits = backbone.code_logits(&hidden).unwrap();
                    let logits = [backbone.text_logits(&hidden).unwrap(), code_logits.clone()];
                    let logits = Tensor::cat(&logits, 2).unwrap();
                    let both = [at("logits_cond").get(row).unwrap(), at("logits_uncond").get(row).unwrap()];
                    close(&what, &logits, &Tensor::stack(&both, 0).unwrap(), FEATURES);

                    let guided = sampler::guided(&code_logits, cfg * si as f64 / 3.0).unwrap();
                    let guided = Tensor::new(guided, &Device::Cpu).unwrap();
                    // Guidance magnifies differences by up to 1 + 2 * 7.5.
                    close(&what, &guided, &at("cfg_logits").get(row).unwrap(), 16.0 * FEATURES);
                    let want: Vec<u32> = ids(at("token_ids"), row).iter().map(|id| id - 33).collect();
                    codes = guided.argmax(1).unwrap().unsqueeze(0).unwrap();
                    assert_eq!(codes.to_vec2::<u32>().unwrap(), [want], "{what}");
                    step += 1;
                }
            }
            assert!(!golden.contains_key(&format!("step{step}_token_ids")));
        }
    }
}

#[test]
fn hidden_states_equal_the_reference_layer_by_layer() {
    let norm = weights("t2i_tiny_llm.weights.safetensors");
    let norm = norm.get(64, "model.norm.weight", nextflow::checkpoint::Init::Ones).unwrap();
    let positions: Vec<Position> = (0..49).map(text_position).collect();
    let rope = Rope::new(&TINY, &[&positions[..]; 4], &Device::Cpu).unwrap();
    for (run, ..) in RUNS {
        let golden = golden(run);
        let (x, mask) = (&golden["final_inputs_embeds"], &golden["final_mask_bool"]);
        for layers in 1..=3 {
            // A model cut off after a layer norms what the whole one passes on.
            let cut = backbone(&BackboneConfig { num_hidden_layers: layers, ..TINY });
            let got = cut.forward(x, &rope, Context::Masked(mask)).unwrap();
            let want = &golden[&format!("final_hidden_{layers}")];
            let want = if layers == 3 { want.clone() } else { ops::rms_norm(want, &norm, 1e-5).unwrap() };
            // Rows of the first prompt: three pads, and five in the negative prompt. What pads hold
            // is nobody's business.
            for (row, (from, pads)) in [(0, 3), (2, 5)].into_iter().enumerate() {
                let seen = |t: &Tensor, row| t.get(row).unwrap().narrow(0, pads, 49 - pads).unwrap();
                close(&format!("{run}, layer {layers}"), &seen(&got, from), &seen(&want, row), FEATURES);
            }
        }
    }
}

/// Keys and shapes of the public checkpoint.
fn keys() -> Vec<(String, Vec<usize>)> {
    let list = std::fs::read_to_string(path("t2i_keys_7b.txt")).unwrap();
    let mut keys = Vec::new();
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split(' ');
        let key = words.next().unwrap();
        let shape: Vec<usize> = words.map(|n| n.parse().unwrap()).collect();
        let layers = if key.contains('*') { 32 } else { 1 };
        keys.extend((0..layers).map(|i| (key.replace('*', &i.to_string()), shape.clone())));
    }
    keys
}

/// What the full model says of a file with a header of these tensors; none of their data is ever
/// read or written.
fn verdict<'a>(keys: impl Iterator<Item = &'a (String, Vec<usize>)>) -> String {
    let mut end = 0;
    let mut entry = |(key, shape): &(String, Vec<usize>)| {
        let (dtype, bytes) = if shape.is_empty() { ("I64", 8) } else { ("BF16", 2) };
        let start = end;
        end += bytes * shape.iter().product::<usize>();
        format!(r#""{key}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{}}}", keys.map(&mut entry).collect::<Vec<_>>().join(","));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::write(&file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let whole = 8 + header.len() + end;
    std::fs::File::options().write(true).open(&file).unwrap().set_len(whole as u64).unwrap();
    let stop = |w: &Weights| -> candle_core::Result<()> {
        Backbone::load(w, &TOKENFLOW_T2I_7B)?;
        candle_core::bail!("all there")
    };
    let source = Source::Folder(folder.path().into());
    source.load("model.safetensors", DType::BF16, &Device::Cpu, stop).unwrap_err().message
}

#[test]
fn the_7b_model_asks_for_exactly_the_public_tensors() {
    let keys = keys();
    assert_eq!(keys.len(), 363);
    let elements: usize = keys.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(elements - 2, TOKENFLOW_T2I_7B.parameters());
    // All that is asked for is there, in its shape; and it is as much as there is, but for the two
    // scalars.
    let all = verdict(keys.iter());
    assert!(all.contains("cannot load") && all.contains("all there"), "{all}");
    let none = verdict(keys.iter().filter(|(_, shape)| shape.is_empty()));
    assert!(none.contains("361 missing: "), "{none}");
    let mut wrong = keys.clone();
    let (key, shape) =
        wrong.iter_mut().find(|(key, _)| key.ends_with("layers.31.self_attn.qknorm.key_norm.weight")).unwrap();
    *shape = vec![64];
    let key = key.clone();
    let message = verdict(wrong.iter());
    assert!(message.contains(&format!("1 wrongly shaped: {key}: found (64), expected (128)")), "{message}");
}
