//! Sequences to learn from against those that are drawn and read, and batches of them against each
//! alone.

use candle_core::{Device, Var};

use super::*;
use crate::backbone::{Context, InputMode, Step};
use crate::checkpoint::Weights;
use crate::generate::{PromptConfig, Rows, Sequences, schedule};
use crate::rng::{Rng, Stream};
use crate::tokenizer::{CodebookConfig, SelfCorrection};
use crate::train::recipe::Recipe;

/// Nano's transformer and codebook, as small as may be.
fn model(input_mode: InputMode) -> Result<(Backbone, Quantizer)> {
    let recipe = Recipe::nano();
    let config = BackboneConfig {
        vocab_size: 50,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        codebook_size: 40,
        input_mode,
        ..recipe.backbone
    };
    let codebook = CodebookConfig { size: 40, ..recipe.tokenizer.codebook };
    let rng = Rng::new(2, 0, Stream::Train, 0);
    let table = (0..(40 * codebook.dim()) as u64).map(|i| rng.normal(i) as f32).collect();
    let backbone = Backbone::load(&Weights::trainable(11, &Device::Cpu), &config)?;
    Ok((backbone, Quantizer::from_table(&codebook, table, &Device::Cpu)?))
}

/// An image of which some codes are not the nearest.
fn image(quantizer: &Quantizer, grids: &[(usize, usize)]) -> Encoded {
    let rng = Rng::new(4, 0, Stream::Train, 0);
    let numbers = grids.last().map_or(0, |(h, w)| h * w * quantizer.config().dim());
    let features: Vec<f32> = (0..numbers as u64).map(|i| rng.normal(i) as f32).collect();
    let how = SelfCorrection { fraction: 0.6, top_k: 8 };
    quantizer.encode(&features, grids, Some((&how, &rng.fork(1))), |_, _, _| {})
}

/// Hidden states of all tokens.
fn hidden(backbone: &Backbone, sequence: &Sequence, scales: usize) -> Result<Tensor> {
    let all: Vec<u32> = (0..sequence.layout.len() as u32).collect();
    Part(&[sequence]).hidden(backbone, scales, all.len(), &all)
}

fn assert_same(a: &Tensor, b: &Tensor) -> Result<()> {
    let apart = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(apart < 1e-4, "{apart}");
    Ok(())
}

/// What an image's codes are learnt from is what they would be drawn from, were they all drawn so.
#[test]
fn images_are_learnt_as_they_are_drawn() -> Result<()> {
    for mode in [InputMode::Residual, InputMode::Cumulative] {
        let (backbone, quantizer) = model(mode)?;
        let config = backbone.config();
        let grids = schedule::nearest(1.5).prefix(5);
        let encoded = image(&quantizer, grids);
        assert_ne!(encoded.codes, encoded.targets);
        let words = [3, 1, 4];
        let mut sequence = Sequence::default();
        sequence.push_text(&words);
        sequence.push_image(
            config,
            &quantizer,
            &Picture { grids, encoded: &encoded, context: false, alpha: Some(0.9) },
        )?;
        let learnt = hidden(&backbone, &sequence, grids.len())?;
        let learnt = learnt.narrow(0, words.len(), schedule::codes(grids))?;
        let targets: Vec<(usize, u32)> = sequence.code_targets.iter().map(|t| (t.at - words.len(), t.id)).collect();
        let nearest = encoded.targets.concat().into_iter().map(|code| code as u32);
        assert_eq!(targets, nearest.enumerate().collect::<Vec<_>>());

        let prefix = PromptConfig::default().prefix(&words, &[config.boi()]);
        let mut caches = Rows::caches(&backbone, &[&prefix], grids)?;
        let (mut rows, first) = Rows::start(&backbone, &mut caches, &[&prefix], grids)?;
        let (mut drawn, mut input) = (vec![first], NextInput::of_table(&quantizer, mode, grids));
        for (si, codes) in encoded.codes[..grids.len() - 1].iter().enumerate() {
            let features = input.next(&quantizer.codes(codes)?, si + 1)?;
            drawn.push(rows.forward(si + 1, &features, Step::Scale)?);
        }
        let drawn = Tensor::cat(&drawn, 1)?.squeeze(0)?;
        assert_same(&learnt, &drawn)?;
        assert_same(&backbone.code_logits(&learnt)?, &backbone.code_logits(&drawn)?)?;
    }
    Ok(())
}

#[test]
fn codes_weigh_by_the_size_of_their_grid_and_one_together() -> Result<()> {
    let (backbone, quantizer) = model(InputMode::Residual)?;
    let grids = schedule::nearest(1.5).prefix(8);
    let encoded = image(&quantizer, grids);
    for alpha in [0.0, 0.9] {
        let mut sequence = Sequence::default();
        let picture = Picture { grids, encoded: &encoded, context: false, alpha: Some(alpha) };
        sequence.push_image(backbone.config(), &quantizer, &picture)?;
        let targets = &sequence.code_targets;
        assert_eq!(targets.len(), schedule::codes(grids));
        assert!((targets.iter().map(|t| t.weight).sum::<f32>() - 1.0).abs() < 1e-5);
        for target in targets {
            let (h, w) = grids[target.scale];
            let share = f64::from(target.weight / targets[0].weight);
            assert!((share - ((h * w) as f64).powf(-alpha)).abs() < 1e-5, "{h}x{w}: {share}");
        }
    }
    Ok(())
}

/// An image that others follow is read as in a conversation: its scales, their sum, and the end of
/// it.
#[test]
fn images_to_look_at_are_read_as_in_a_conversation() -> Result<()> {
    let (backbone, quantizer) = model(InputMode::Residual)?;
    let config = backbone.config();
    let grids = schedule::nearest(1.0).prefix(4);
    let encoded = image(&quantizer, grids);
    let mut sequence = Sequence::default();
    sequence.push_text(&[3, 1]);
    sequence.push_image(config, &quantizer, &Picture { grids, encoded: &encoded, context: true, alpha: None })?;
    sequence.push_text(&[4]);

    let mut layout = Layout::new();
    layout.push_text(2);
    layout.push_context_image(grids, config.spatial_extent, true);
    layout.push_text(1);
    let words = |ids: &[u32]| backbone.embed_text(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?);
    let mut x = vec![words(&[3, 1, config.boi()])?];
    let scales = NextInput::of_table(&quantizer, config.input_mode, grids).all(&encoded.codes)?;
    let sum = quantizer.accumulate(&encoded.codes, grids, grids[3]);
    for (i, features) in scales.iter().chain([&sum]).enumerate() {
        let features =
            Tensor::from_slice(features, (1, features.len() / config.code_dim, config.code_dim), &Device::Cpu)?;
        x.push(backbone.embed_codes(&features, i + 1, grids)?);
    }
    x.push(words(&[config.eoi(), 4])?);
    let tokens = layout.len();
    let rope = Rope::new(config, &[&layout.positions], &Device::Cpu)?;
    let mask = Tensor::from_vec(layout.mask(), (tokens, tokens), &Device::Cpu)?;
    let read = backbone.forward(&Tensor::cat(&x, 1)?, &rope, Context::Masked(&mask))?;
    assert_same(&hidden(&backbone, &sequence, grids.len())?, &read.squeeze(0)?)
}

/// Sequences of words, of an image to draw, and of one that is looked at: together they lose what
/// each loses alone.
#[test]
fn padding_and_parts_change_nothing() -> crate::error::Result<()> {
    let recipe = Recipe::nano();
    let config = BackboneConfig { num_hidden_layers: 2, ..recipe.backbone };
    let codebook = &recipe.tokenizer.codebook;
    let rng = Rng::new(3, 0, Stream::Train, 0);
    let normals = |first: usize, count: usize| (first..first + count).map(|i| rng.normal(i as u64) as f32).collect();
    let quantizer = Quantizer::from_table(codebook, normals(0, codebook.size * codebook.dim()), &Device::Cpu)?;
    let grids = schedule::nearest(1.0).prefix(4);
    let image = |sequence: &mut Sequence, context: bool, alpha: Option<f64>, seed: usize| {
        let features: Vec<f32> = normals(100_000 + 1000 * seed, grids[3].0 * grids[3].1 * codebook.dim());
        let encoded = quantizer.encode(&features, grids, None, |_, _, _| {});
        sequence.push_image(&config, &quantizer, &Picture { grids, encoded: &encoded, context, alpha })
    };
    let words = |sequence: &mut Sequence, count: u32| {
        for id in 0..count {
            if id > 0 {
                sequence.expect_text(7 * id);
            }
            sequence.push_text(&[7 * id]);
        }
    };
    let mut sequences: Vec<Sequence> = (0..5).map(|_| Sequence::default()).collect();
    words(&mut sequences[0], 3);
    words(&mut sequences[1], 50);
    words(&mut sequences[2], 9);
    image(&mut sequences[2], false, Some(0.9), 1)?;
    image(&mut sequences[3], true, None, 2)?;
    words(&mut sequences[3], 20);
    words(&mut sequences[4], 5);
    image(&mut sequences[4], true, Some(0.9), 3)?;

    let weights = Weights::trainable(5, &Device::Cpu);
    let backbone = Backbone::load(&weights, &config)?;
    let vars = weights.vars();
    let run = |batches: &[&[Sequence]]| -> Result<(f64, Vec<Tensor>, Vec<Measured>)> {
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        let mut measured = Vec::new();
        for batch in batches {
            let (part, losses) = Batch(batch).loss(&backbone, grids.len())?;
            loss = (loss + (part * (batch.len() as f64 / 5.0))?)?;
            measured.push(losses.means()?);
        }
        let grads = loss.backward()?;
        let grads = vars.values().map(|var: &Var| grads.get(var).cloned().map_or_else(|| var.zeros_like(), Ok));
        Ok((f64::from(loss.to_scalar::<f32>()?), grads.collect::<Result<_>>()?, measured))
    };
    let (together, grads, measured) = run(&[&sequences])?;
    let each: Vec<&[Sequence]> = sequences.chunks(1).collect();
    let (alone, grads_alone, _) = run(&each)?;
    assert!((together - alone).abs() < 1e-5 * alone, "{together} {alone}");
    for (a, b) in grads.iter().zip(&grads_alone) {
        let norm = |t: &Tensor| t.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
        assert!(norm(&(a - b)?)? <= 1e-4 * norm(b)?.max(1e-6), "{:?}", a.dims());
    }
    assert!(measured[0].scales.iter().chain([&measured[0].words]).all(|mean| mean.is_finite() && *mean > 1.0));
    Ok(())
}
