//! The semantic encoder learns what pictures are called: sigmoid contrastive loss on captions
//! (SigLIP).

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::optimizer::{Hyperparameters, Optimizer};
use super::progress::Progress;
use super::run::Run;
use super::samples::Samples;
use crate::checkpoint::{Init, Weights};
use crate::dataset::SIDE;
use crate::text::Text;
use crate::tokenizer::SemanticEncoder;
use crate::{error, ops, pixels};

/// The caption side, used in training only: the mean of the token embeddings and one residual
/// layer.
struct TextTower {
    embedding: Tensor,
    hidden: Tensor,
    log_scale: Tensor,
    bias: Tensor,
}

impl TextTower {
    fn load(w: &Weights, vocab: usize, width: usize) -> Result<Self> {
        Ok(Self {
            embedding: w.get((vocab, width), "embedding", Init::Normal { std: 0.3 })?,
            hidden: w.get((width, width), "hidden", Init::Normal { std: 0.05 })?,
            log_scale: w.get(1, "log_scale", Init::Ones)?,
            bias: w.get(1, "bias", Init::Zeros)?,
        })
    }

    /// Unit vectors, (B, width).
    fn embed(&self, captions: &[Vec<u32>]) -> Result<Tensor> {
        let device = self.embedding.device();
        let words = ops::select(&self.embedding, &Tensor::new(captions.concat(), device)?)?;
        // The mean over the words of each caption.
        let shares = captions.iter().enumerate().flat_map(|(row, _)| {
            captions.iter().enumerate().flat_map(move |(of, ids)| {
                std::iter::repeat_n(if of == row { 1.0 / ids.len() as f32 } else { 0.0 }, ids.len())
            })
        });
        let x = Tensor::from_iter(shares, device)?.reshape((captions.len(), ()))?.matmul(&words)?;
        let x = (&x + x.matmul(&self.hidden)?.gelu()?)?;
        x.broadcast_div(&(x.sqr()?.sum_keepdim(1)? + 1e-12)?.sqrt()?)
    }
}

/// Trains the semantic encoder for `plan.steps` steps of `batch` captioned pictures.
pub fn train(run: &Run, dataset: &Samples, text: &Text, batch: usize, plan: &Hyperparameters) -> error::Result<()> {
    const FILE: &str = "semantic.safetensors";
    let config = &run.recipe.tokenizer.semantic;
    let ((encoder, tower), vars) = run.load(&[&run.file(FILE)], |w| {
        let tower = TextTower::load(&w.pp("text_tower"), run.recipe.backbone.vocab_size, config.hidden_size)?;
        Ok((SemanticEncoder::load(&w.pp("encoder_vqkd.vision_model"), config)?, tower))
    })?;
    let mut optimizer = Optimizer::new(&vars, |_| true)?;
    let state = run.file("semantic.state");
    if state.exists() {
        optimizer.restore(&state)?;
    }
    let mut progress = Progress::new("semantic", plan.steps, optimizer.step, batch);
    progress.say(&format!("{} parameters", optimizer.count()));
    while optimizer.step < plan.steps {
        let first = optimizer.step * batch;
        let samples: Vec<_> = (0..batch).into_par_iter().map(|i| dataset.captioned((first + i) as u64)).collect();
        let rows: Vec<&[u8]> = samples.iter().map(|s| s.0.as_slice()).collect();
        let captions = samples.iter().map(|s| text.encode(&s.1)).collect::<error::Result<Vec<_>>>()?;
        let images = encoder.embed(&pixels::to_tensor(&rows, SIDE, SIDE, &run.device)?)?;
        let logits = images.matmul(&tower.embed(&captions)?.t()?)?;
        // exp(ln 10 * s) starts at SigLIP's 10. Its bias of -10 fits batches of 32,768 pairs: -4 is
        // the log-odds of ours.
        let scale = (&tower.log_scale * std::f64::consts::LN_10)?.exp()?;
        let logits = logits.broadcast_mul(&scale)?.broadcast_add(&((&tower.bias - 1.0)? * 4.0)?)?;
        let same = |i: usize, j: usize| if samples[i].2 == samples[j].2 { 1f32 } else { -1.0 };
        let signs = (0..batch).flat_map(|i| (0..batch).map(move |j| (i, j))).map(|(i, j)| same(i, j));
        let signs = Tensor::from_iter(signs, &run.device)?.reshape((batch, batch))?;
        // -log sigmoid(s z) = softplus(-s z), in the form that does not overflow.
        let x = (logits.clone() * signs)?.neg()?;
        let loss = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
        let loss = (loss.sum_all()? / batch as f64)?;
        let best = logits.argmax(1)?.to_vec1::<u32>()?;
        let right = best.iter().enumerate().filter(|&(i, &j)| samples[i].2 == samples[j as usize].2).count();
        let norm = optimizer.descend(&loss, plan)?;
        progress.step(&[
            ("loss", f64::from(loss.to_scalar::<f32>()?)),
            ("top1", right as f64 / batch as f64),
            ("grad", norm),
        ]);
        progress.checkpoint(|| {
            run.save(FILE, "semantic", &vars)?;
            optimizer.save(&state, BTreeMap::new())
        })?;
    }
    Ok(())
}
