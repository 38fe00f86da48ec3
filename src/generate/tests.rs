//! The cached, mask-free loop against one full forward pass with the block-causal mask.

use candle_core::{DType, Device, Tensor};

use super::Filter;
use super::next_input::NextInput;
use super::*;
use crate::backbone::presets::QWEN2_5_VL_7B;
use crate::backbone::{BackboneConfig, Cache, Context, InputMode, Layout, Rope, Step, Vocabulary};
use crate::checkpoint::Weights;
use crate::rng::{Rng, Stream};
use crate::tokenizer::{Code, CodebookConfig, Quantizer};

fn config(input_mode: InputMode) -> BackboneConfig {
    BackboneConfig {
        vocab_size: 50,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rope_theta: 100.0,
        mrope_section: [2, 3, 3],
        spatial_extent: Some(64.0),
        codebook_size: 40,
        code_dim: 6,
        input_mode,
        max_scales: 18,
        scale_length_embedding: true,
        vocabulary: Vocabulary::Markers,
        ..QWEN2_5_VL_7B
    }
}

fn model(input_mode: InputMode) -> (Backbone, Quantizer) {
    model_of(config(input_mode))
}

fn model_of(config: BackboneConfig) -> (Backbone, Quantizer) {
    let weights = Weights::trainable(11, &Device::Cpu);
    let backbone = Backbone::load(&weights, &config).unwrap();
    let book = CodebookConfig { size: 40, semantic_dim: 2, pixel_dim: 4, w_sem: 1.0, w_pix: 1.0, l2_norm: false };
    let rng = Rng::new(2, 0, Stream::Train, 0);
    let table = (0..40 * 6).map(|i| rng.normal(i) as f32).collect();
    (backbone, Quantizer::from_table(&book, table, &Device::Cpu).unwrap())
}

/// A sequence of text and images with known codes.
enum Part {
    Text(Vec<u32>),
    Image(Vec<(usize, usize)>, ImageCodes),
}

fn image(scales: &[(usize, usize)], seed: u64) -> Part {
    let rng = Rng::new(seed, 0, Stream::Train, 0);
    let mut counter = 0;
    let mut draw = |n: usize| {
        (0..n)
            .map(|_| {
                counter += 1;
                rng.below(counter, 40) as Code
            })
            .collect()
    };
    Part::Image(scales.to_vec(), scales.iter().map(|(h, w)| draw(h * w)).collect())
}

/// Hidden states of the whole sequence, by one masked pass.
fn full(backbone: &Backbone, q: &Quantizer, parts: &[Part]) -> Tensor {
    let config = backbone.config();
    let mut layout = Layout::new();
    let mut x = Vec::new();
    let embed =
        |ids: &[u32]| backbone.embed_text(&Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap();
    for part in parts {
        match part {
            Part::Text(ids) => {
                layout.push_text(ids.len());
                x.push(embed(ids));
            }
            Part::Image(scales, codes) => {
                layout.push_context_image(scales, config.spatial_extent, config.context_last_scale);
                x.push(embed(&[config.boi()]));
                let mut input = NextInput::of_table(q, config.input_mode, scales);
                for si in 1..scales.len() {
                    x.push(step_input(backbone, q, &mut input, codes, scales, si));
                }
                x.extend(whole(backbone, q, codes, scales));
                x.push(embed(&[config.eoi()]));
            }
        }
    }
    let x = Tensor::cat(&x, 1).unwrap();
    let tokens = layout.len();
    let rope = Rope::new(config, &[&layout.positions], &Device::Cpu).unwrap();
    let mask = Tensor::from_vec(layout.mask(), (tokens, tokens), &Device::Cpu).unwrap();
    backbone.forward(&x, &rope, Context::Masked(&mask)).unwrap()
}

fn step_input(
    backbone: &Backbone,
    q: &Quantizer,
    input: &mut NextInput,
    codes: &[Vec<Code>],
    scales: &[(usize, usize)],
    si: usize,
) -> Tensor {
    let features = input.next(&q.codes(&codes[si - 1]).unwrap(), si).unwrap();
    backbone.embed_codes(&features, si, scales).unwrap()
}

/// The sum of all scales, for a model that reads it.
fn whole(backbone: &Backbone, q: &Quantizer, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Option<Tensor> {
    let (h, w) = *scales.last()?;
    let features = Tensor::from_vec(q.accumulate(codes, scales, (h, w)), (1, h * w, 6), &Device::Cpu).unwrap();
    let x = || backbone.embed_codes(&features, scales.len(), scales).unwrap();
    backbone.config().context_last_scale.then(x)
}

/// The same, step by step against the cache.
fn cached(backbone: &Backbone, q: &Quantizer, parts: &[Part]) -> Tensor {
    let config = backbone.config();
    let mut cache = Cache::new(config, 400, DType::F32, &Device::Cpu).unwrap();
    let mut layout = Layout::new();
    let mut out = Vec::new();
    let mut step = |x: Tensor, layout: &Layout, step: Step| {
        let (start, tokens) = (cache.len(), x.dim(1).unwrap());
        let rope = Rope::new(config, &[&layout.positions[start..start + tokens]], &Device::Cpu).unwrap();
        let context = Context::Cached { caches: std::slice::from_mut(&mut cache), step };
        out.push(backbone.forward(&x, &rope, context).unwrap());
    };
    let embed =
        |ids: &[u32]| backbone.embed_text(&Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap();
    for part in parts {
        match part {
            Part::Text(ids) => {
                layout.push_text(ids.len());
                step(embed(ids), &layout, Step::Text);
            }
            Part::Image(scales, codes) => {
                layout.push_context_image(scales, config.spatial_extent, config.context_last_scale);
                step(embed(&[config.boi()]), &layout, Step::Text);
                let mut input = NextInput::of_table(q, config.input_mode, scales);
                for si in 1..scales.len() {
                    step(step_input(backbone, q, &mut input, codes, scales, si), &layout, Step::Scale);
                }
                whole(backbone, q, codes, scales).into_iter().for_each(|x| step(x, &layout, Step::Scale));
                step(embed(&[config.eoi()]), &layout, Step::Text);
            }
        }
    }
    Tensor::cat(&out, 1).unwrap()
}

fn assert_same(a: &Tensor, b: &Tensor) {
    let diff = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(diff < 1e-4, "{diff}");
}

#[test]
fn cached_inference_equals_the_masked_pass() {
    for mode in [InputMode::Residual, InputMode::Cumulative] {
        let (backbone, q) = model(mode);
        for ratio in [1.0, 0.5, 3.0] {
            let scales = schedule::nearest(ratio).prefix(6);
            let one = [Part::Text(vec![3, 1, 4]), image(scales, 5)];
            let (full_logits, cached_logits) = (full(&backbone, &q, &one), cached(&backbone, &q, &one));
            assert_same(&full_logits, &cached_logits);
            let logits = |h: &Tensor| backbone.code_logits(h).unwrap();
            assert_same(&logits(&full_logits), &logits(&cached_logits));
        }
        let square = schedule::nearest(1.0);
        let two = [
            Part::Text(vec![3, 1, 4]),
            image(square.prefix(5), 5),
            Part::Text(vec![15, 9, 2, 6]),
            image(schedule::nearest(2.0).prefix(4), 6),
            Part::Text(vec![5]),
        ];
        assert_same(&full(&backbone, &q, &two), &cached(&backbone, &q, &two));
        let (backbone, q) = model_of(BackboneConfig { context_last_scale: true, ..config(mode) });
        assert_same(&full(&backbone, &q, &two), &cached(&backbone, &q, &two));
    }
}

/// The codes drawn after a prompt of these tokens.
fn draw(backbone: &Backbone, q: &Quantizer, prompt: &[u32], job: &Job, observe: Observer) -> Result<ImageCodes> {
    let batch = Batch { scales: &job.scales, sampling: &job.sampling, seeds: &[job.seed] };
    Ok(draw_batch(backbone, q, &[prompt], batch, observe)?.remove(0))
}

fn draw_batch(
    backbone: &Backbone,
    q: &Quantizer,
    prompts: &[&[u32]],
    batch: Batch,
    observe: Observer,
) -> Result<Vec<ImageCodes>> {
    let prefix = |text: &[u32]| PromptConfig::default().prefix(text, &[backbone.config().boi()]);
    let input = NextInput::of_table(q, backbone.config().input_mode, batch.scales);
    let prompts: Vec<Prefix> = prompts.iter().map(|text| prefix(text)).collect();
    draw_after(backbone, input, &prompts, &prefix(&[]), batch, observe)
}

fn job(cfg: f64, seed: u64) -> Job {
    let sampling = Sampling { cfg, top_k: Some(20), top_p: 0.9, ..Sampling::default() };
    Job { prompt: String::new(), negative: None, scales: schedule::nearest(1.0).prefix(5).to_vec(), sampling, seed }
}

#[test]
fn the_loop_draws_what_the_masked_pass_says() {
    // Greedy codes must be the argmax of a teacher-forced pass over those very codes, guidance rows
    // included.
    for (mode, until) in [(InputMode::Residual, None), (InputMode::Cumulative, None), (InputMode::Residual, Some(3))] {
        let (backbone, q) = model(mode);
        let mut job = job(3.0, 1);
        job.sampling.temperature = 0.0;
        job.sampling.cfg_until = until;
        let prompt = [7u32, 8, 9, 10];
        let codes = draw(&backbone, &q, &prompt, &job, &mut |_| ControlFlow::Continue(())).unwrap();
        let rows: Vec<Tensor> = [&prompt[..], &[]]
            .iter()
            .map(|p| {
                let parts = [Part::Text(p.to_vec()), Part::Image(job.scales.clone(), codes.clone())];
                let parts = if p.is_empty() { &parts[1..] } else { &parts[..] };
                let hidden = full(&backbone, &q, parts);
                backbone.code_logits(&hidden.narrow(1, p.len(), schedule::codes(&job.scales)).unwrap()).unwrap()
            })
            .collect();
        let mut start = 0;
        for (si, codes) in codes.iter().enumerate() {
            let t = if until.is_some_and(|n| si >= n) { 0.0 } else { 3.0 * si as f64 / 4.0 };
            let part = |r: &Tensor| r.narrow(1, start, codes.len()).unwrap().squeeze(0).unwrap();
            let logits = ((part(&rows[0]) * (1.0 + t)).unwrap() - (part(&rows[1]) * t).unwrap()).unwrap();
            let likeliest = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
            assert_eq!(likeliest, codes.iter().map(|&code| code as u32).collect::<Vec<_>>(), "{mode:?} scale {si}");
            start += codes.len();
        }
    }
}

#[test]
fn a_seed_decides_everything_and_an_observer_may_stop() {
    let (backbone, q) = model(InputMode::Residual);
    let mut go = |_: Event| ControlFlow::Continue(());
    let draw = |job: &Job, go: Observer| draw(&backbone, &q, &[1, 2], job, go);
    let first = draw(&job(2.0, 1), &mut go).unwrap();
    assert_eq!(first, draw(&job(2.0, 1), &mut go).unwrap());
    assert_ne!(first, draw(&job(2.0, 2), &mut go).unwrap());
    assert_ne!(first, draw(&job(0.0, 1), &mut go).unwrap());
    let mut twice = job(2.0, 1);
    twice.sampling.later_passes.push(Filter { top_k: Some(1), top_p: 1.0 });
    let refined = draw(&twice, &mut go).unwrap();
    assert_eq!(first[0], refined[0]);
    assert_ne!(first[1], refined[1]);
    let mut seen = 0;
    let mut stop = |e: Event| match e {
        Event::Scale { codes, .. } if codes.len() == 2 => ControlFlow::Break(()),
        _ => {
            seen += 1;
            ControlFlow::Continue(())
        }
    };
    assert_eq!(draw(&job(2.0, 1), &mut stop).unwrap_err().kind, Kind::Interrupted);
    assert_eq!(seen, 2);
}

#[test]
fn images_drawn_together_are_those_drawn_alone() {
    for (mode, until) in [(InputMode::Residual, None), (InputMode::Cumulative, Some(2))] {
        let (backbone, q) = model(mode);
        let prompts: [&[u32]; 3] = [&[7, 8, 9, 10], &[3], &[5, 6]];
        let mut job = job(2.0, 1);
        job.sampling.cfg_until = until;
        job.sampling.later_passes.push(Filter { top_k: Some(5), top_p: 0.9 });
        let batch = Batch { scales: &job.scales, sampling: &job.sampling, seeds: &[4, 5, 6] };
        let mut go = |_: Event| ControlFlow::Continue(());
        let together = draw_batch(&backbone, &q, &prompts, batch, &mut go).unwrap();
        for ((prompt, &seed), codes) in prompts.iter().zip(batch.seeds).zip(together) {
            assert_eq!(draw(&backbone, &q, prompt, &Job { seed, ..job.clone() }, &mut go).unwrap(), codes, "{mode:?}");
        }
    }
}

#[test]
fn a_draft_is_the_beginning_of_the_image() {
    let (backbone, q) = model(InputMode::Residual);
    let mut job = job(3.0, 1);
    let mut draw = |draft| {
        job.sampling.draft = draft;
        self::draw(&backbone, &q, &[7, 8], &job, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    assert_eq!(draw(2), draw(0)[..3]);
}

#[test]
fn what_is_not_finite_is_told_with_its_scale() {
    let (backbone, _) = model(InputMode::Residual);
    let broken = Tensor::full(f32::NAN, (1, 1, 64), &Device::Cpu).unwrap();
    let sampling = job(0.0, 1).sampling;
    let params = SampleParams { sampling: &sampling, guidance: 0.0, seeds: &[1], scale: 0, pass: 0 };
    let fault = sampler::sample(&backbone.code_logits(&broken).unwrap(), &params, 0).unwrap_err();
    assert_eq!(non_finite(fault, 0, (1, 1)).kind, Kind::NonFinite);
    // What a GPU marks in its place.
    let marked = Tensor::new(&[[3u32, 5], [1, sampler::NON_FINITE]], &Device::Cpu).unwrap();
    let error = to_host(&[marked], &[(1, 2)]).unwrap_err();
    assert_eq!(error.kind, Kind::NonFinite);
    assert!(error.message.contains("scale 1 (1x2), position 1"), "{}", error.message);
    // The same of bits, of which all are legal that are 0 or 1.
    let mut bits = vec![1u8; 2 * 2 * 32];
    let of_bits = |bits: &[u8]| to_host(&[Tensor::from_slice(bits, (2, 2, 32), &Device::Cpu).unwrap()], &[(1, 2)]);
    assert_eq!(of_bits(&bits).unwrap(), vec![vec![vec![Code::from(u32::MAX); 2]]; 2]);
    bits[3 * 32 + 7] = sampler::NON_FINITE_BIT;
    let error = of_bits(&bits).unwrap_err();
    assert_eq!(error.kind, Kind::NonFinite);
    assert!(error.message.contains("scale 1 (1x2), position 1"), "{}", error.message);
}

#[test]
fn nanos_config_is_written_as_it_was_read() {
    // Fields that only other models have leave no trace in it.
    let text = include_str!("../../assets/nano/config.json");
    let config: ModelConfig = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string_pretty(&config).unwrap() + "\n", text);
}

#[test]
fn nextflow_adds_image_ends_to_a_transformer() {
    use crate::backbone::presets::QWEN2_5_VL_7B;
    let tokenizer = crate::tokenizer::Preset::siglip_32k().config;
    let model = ModelConfig::nextflow("x", QWEN2_5_VL_7B, tokenizer);
    let Sampling { cfg, temperature, top_k, top_p, later_passes, .. } = &model.sampling;
    assert_eq!((*cfg, *temperature, *top_k, *top_p, later_passes.len()), (5.0, 1.0, Some(2), 0.9, 0));
    assert_eq!((model.scales, model.grids.len(), model.backbone.spatial_extent), (18, 0, Some(64.0)));
    assert_eq!((model.backbone.input_mode, model.backbone.max_scales), (InputMode::Residual, 18));
    let c = model.backbone;
    assert_eq!(c.check(), Ok(()));
    // Two markers in embedding and head, the codes' rows in the head, connector and scale
    // embedding.
    let image_ends = (2 + 2 + 32_768 + 40 + 1 + 3584 + 1 + 18) * 3584;
    assert_eq!(c.parameters(), QWEN2_5_VL_7B.parameters() + image_ends);
    assert_eq!((c.boi(), c.eoi(), c.first_code()), (152_064, 152_065, 152_066));
}
