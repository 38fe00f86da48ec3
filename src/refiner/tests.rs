//! The whole network: shapes, batches and progress.

use std::ops::ControlFlow;

use candle_core::{Device, Result, Tensor};

use super::config::CaptionConfig;
use super::*;
use crate::ops::testing::{distance, random};
use crate::rng::Stream;

fn config() -> RefinerConfig {
    RefinerConfig {
        patch: 4,
        upscale: 2,
        widths: vec![16, 24],
        down_blocks: vec![1, 2],
        up_blocks: vec![1],
        attention: vec![0, 1],
        head_dim: 8,
        kernel: 3,
        mlp_ratio: 2,
        embedding: 12,
        code_dim: 5,
        semantic_dim: 6,
        code_cell: 4,
        code_channels: 3,
        noise: 0.5,
        caption: CaptionConfig { vocab_size: 20, width: 16, blocks: 1, heads: 2, max_tokens: 6 },
        steps: 3,
    }
}

/// Random weights everywhere, those that begin as zeros too.
fn refiner(config: &RefinerConfig) -> Result<Refiner> {
    let w = Weights::trainable(1, &Device::Cpu);
    Refiner::load(&w, config)?;
    let vars = w.vars();
    for (i, var) in vars.values().enumerate() {
        var.set(&(random(var.shape().clone(), i as u64).as_tensor() * 0.3)?)?;
    }
    Refiner::load(&w, config)
}

fn condition(config: &RefinerConfig, first: usize, images: usize) -> Result<Condition> {
    let (h, w) = (2, 3);
    let part = |x: &Tensor| x.narrow(0, first, images)?.contiguous();
    let picture = part(&random((3, 3, h * config.code_cell, w * config.code_cell), 1).detach())?;
    let f = part(&random((3, h, w, config.code_dim), 2).detach())?;
    let semantic = part(&random((3, h * w, config.semantic_dim), 3).detach())?;
    Condition::new(&picture, &f, &semantic, config)
}

const CAPTIONS: [&[u32]; 3] = [&[1, 2, 3], &[], &[7, 8, 9, 10, 11, 12, 13, 14]];

#[test]
fn an_image_is_refined_in_a_batch_as_alone() -> Result<()> {
    let config = config();
    let refiner = refiner(&config)?;
    let rngs: Vec<Rng> = (0..3).map(|seed| Rng::new(seed, 0, Stream::Refine, 0)).collect();
    let on = &mut |_, _| ControlFlow::Continue(());
    let all = Captions::new(&CAPTIONS, &config.caption, &Device::Cpu)?;
    let together = refiner.refine(&condition(&config, 0, 3)?, &all, &rngs, 3, on)?.unwrap();
    assert_eq!(together.dims(), [3, 3, 16, 24]);
    for (i, caption) in CAPTIONS.iter().enumerate() {
        let one = Captions::new(&[caption], &config.caption, &Device::Cpu)?;
        let alone = refiner.refine(&condition(&config, i, 1)?, &one, &rngs[i..=i], 3, on)?.unwrap();
        assert!(distance(&alone, &together.narrow(0, i, 1)?) < 1e-4);
    }
    Ok(())
}

#[test]
fn caption_codes_noise_and_picture_all_count() -> Result<()> {
    let config = config();
    let refiner = refiner(&config)?;
    let draw = |caption: &[u32], image: usize, seed: u64| {
        let captions = Captions::new(&[caption], &config.caption, &Device::Cpu)?;
        let rng = Rng::new(seed, 0, Stream::Refine, 0);
        let on = &mut |_, _| ControlFlow::Continue(());
        refiner.refine(&condition(&config, image, 1)?, &captions, &[rng], 2, on).map(Option::unwrap)
    };
    let first = draw(&[1, 2], 0, 1)?;
    assert!(distance(&first, &draw(&[1, 2], 0, 1)?) == 0.0);
    for other in [draw(&[2, 1], 0, 1)?, draw(&[1, 2], 1, 1)?, draw(&[1, 2], 0, 2)?] {
        assert!(distance(&first, &other) > 1e-3);
    }
    // Of a caption that is too long the end is not read.
    let long: Vec<u32> = (1..=7).collect();
    assert!(distance(&draw(&long, 0, 1)?, &draw(&long[..6], 0, 1)?) == 0.0);
    Ok(())
}

#[test]
fn a_break_ends_it_and_what_does_not_fit_is_refused() -> Result<()> {
    let config = config();
    let refiner = refiner(&config)?;
    let captions = Captions::new(&[&[1]], &config.caption, &Device::Cpu)?;
    let mut seen = Vec::new();
    let condition = condition(&config, 0, 1)?;
    let rng = Rng::new(1, 0, Stream::Refine, 0);
    let stop = &mut |step, steps| {
        seen.push((step, steps));
        if step == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    assert!(refiner.refine(&condition, &captions, &[rng], 5, stop)?.is_none());
    assert_eq!(seen, [(1, 5), (2, 5)]);
    assert!(Captions::new(&[&[20]], &config.caption, &Device::Cpu).is_err());
    let picture = random((1, 3, 8, 8), 1);
    assert!(Condition::new(&picture, &random((1, 2, 3, 5), 2), &random((1, 6, 6), 3), &config).is_err());
    Ok(())
}

#[test]
fn impossible_configs_are_refused() {
    let good = config();
    assert_eq!(good.check(), Ok(()));
    for bad in [
        RefinerConfig { widths: vec![], ..good.clone() },
        RefinerConfig { widths: vec![16, 20], ..good.clone() },
        RefinerConfig { up_blocks: vec![1, 1], ..good.clone() },
        RefinerConfig { kernel: 2, ..good.clone() },
        RefinerConfig { patch: 3, ..good.clone() },
        RefinerConfig { patch: 8, ..good.clone() },
        RefinerConfig { steps: 0, ..good.clone() },
        RefinerConfig { noise: f64::NAN, ..good.clone() },
        RefinerConfig { head_dim: 6, ..good.clone() },
        RefinerConfig { down_blocks: vec![1, 1 << 40], ..good.clone() },
        RefinerConfig { caption: CaptionConfig { heads: 3, ..good.caption.clone() }, ..good.clone() },
    ] {
        assert!(bad.check().is_err(), "{bad:?}");
    }
}
