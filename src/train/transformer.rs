//! The transformer learns to draw: cross-entropy over the codes of every scale, with the paper's scale reweighting and
//! self-correction.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::optimizer::{Optimizer, Schedule};
use super::pool::{Item, Pool, Shelf};
use super::progress::Progress;
use super::run::Run;
use crate::backbone::sequence::Layout;
use crate::backbone::{Backbone, Context, Position, Rope};
use crate::error;
use crate::generate::inputs::NextInput;
use crate::generate::schedule;
use crate::ops;
use crate::rng::{Rng, Stream};
use crate::tokenizer::Quantizer;

/// Share of the samples that are drawn from an empty prompt, for guidance.
const CAPTION_DROP: f64 = 0.1;

/// Trains for `plan.steps` steps of `batch` images, of which the first `scales` scales are learnt, and writes the
/// weights into the run's folder. `part` names this part of the training and its state.
pub fn train(
    run: &Run,
    quantizer: &Quantizer,
    pool: &Pool,
    part: &str,
    scales: usize,
    batch: usize,
    plan: &Schedule,
) -> error::Result<()> {
    let file = run.file("model.safetensors");
    let weights = run.trainable(&[&file])?;
    let backbone = Backbone::load(&weights, &run.recipe.backbone)?;
    let vars = weights.vars();
    let mut optimizer = Optimizer::new(&vars, |_| true)?;
    let state = run.file(&format!("transformer-{part}.state"));
    if state.exists() {
        optimizer.restore(&state)?;
    }
    let mut progress = Progress::new(&format!("transformer {part}"), plan.steps, optimizer.step, batch);
    progress.say(&format!("{} parameters, {} images in the pool", optimizer.count(), pool.len()));
    let square = &schedule::nearest(1.0).prefix(run.recipe.scales)[..scales];
    let names: Vec<String> = square.iter().map(|(h, w)| format!("{h}x{w}")).collect();
    while optimizer.step < plan.steps {
        let step = optimizer.step;
        let shelf = pool.shelf(step);
        let grids = &shelf.grids[..scales];
        let batch = Batch::draw(run, quantizer, shelf, grids, batch, step as u64)?;
        let logits = batch.logits(&backbone, run.recipe.scales)?;
        let (targets, weights) = batch.targets(grids, run.recipe.scale_reweight)?;
        let loss = ops::cross_entropy(&logits, &targets, &weights)?;
        let norm = optimizer.descend(&loss, plan)?;
        let rows = ops::cross_entropy_rows(&logits.detach(), &targets)?;
        let mut measured = vec![("loss", f64::from(loss.to_scalar::<f32>()?)), ("grad", norm)];
        measured.extend(names.iter().map(String::as_str).zip(per_scale(&rows, grids)));
        progress.step(&measured);
        if optimizer.step % 200 == 0 || optimizer.step == plan.steps {
            let tensors = vars.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
            crate::checkpoint::save(&file, tensors, None)?;
            optimizer.save(&state)?;
        }
    }
    Ok(())
}

/// Mean loss of each scale over the images of a batch.
fn per_scale(rows: &[f32], grids: &[(usize, usize)]) -> Vec<f64> {
    let image = schedule::codes(grids);
    let mut start = 0;
    grids
        .iter()
        .map(|(h, w)| {
            let range = start..start + h * w;
            start += h * w;
            let sum: f32 = rows.chunks_exact(image).map(|r| r[range.clone()].iter().sum::<f32>()).sum();
            f64::from(sum) / (rows.len() / image * h * w) as f64
        })
        .collect()
}

/// One batch: prompts padded on the left to one length, then `<boi>` and the scales.
struct Batch {
    /// (B, P + 1), `<boi>` last.
    text: Vec<Vec<u32>>,
    /// Inputs of the scales from the second on, (B, n, D).
    features: Vec<Vec<f32>>,
    /// Codes to predict, coarse to fine.
    targets: Vec<u32>,
    positions: Vec<Vec<Position>>,
    mask: Vec<u8>,
    /// Scale index of every input position of an image.
    scale_of: Vec<usize>,
}

impl Batch {
    fn draw(
        run: &Run,
        quantizer: &Quantizer,
        shelf: &Shelf,
        grids: &[(usize, usize)],
        size: usize,
        step: u64,
    ) -> error::Result<Self> {
        let (config, correction) = (&run.recipe.backbone, &run.recipe.self_correction);
        let drawn: Vec<(&[u32], Vec<f32>, Vec<u32>)> = (0..size)
            .into_par_iter()
            .map(|i| {
                let rng = Rng::new(run.recipe.seed, i as u64, Stream::Train, 1 << 32 | step);
                let item: &Item = shelf.draw(&rng);
                let caption = if rng.uniform(100) < CAPTION_DROP { &[] } else { item.caption(&rng) };
                let noise = Rng::new(run.recipe.seed, i as u64, Stream::Train, 2 << 32 | step);
                let encoded = quantizer.encode(&item.features, shelf.grids, Some((correction, &noise)), |_, _, _| {});
                let mut input = NextInput::new(config.input_mode);
                let features = grids.windows(2).zip(&encoded.codes);
                let features = features.flat_map(|(g, codes)| input.next(quantizer, codes, g[0], g[1])).collect();
                (caption, features, encoded.targets[..grids.len()].concat())
            })
            .collect();
        let longest = drawn.iter().map(|d| d.0.len()).max().unwrap_or(0);
        let scale_of = grids.iter().enumerate().skip(1).flat_map(|(i, (h, w))| std::iter::repeat_n(i, h * w)).collect();
        let mut out = Self {
            text: Vec::new(),
            features: Vec::new(),
            targets: Vec::new(),
            positions: Vec::new(),
            mask: Vec::new(),
            scale_of,
        };
        for (caption, features, targets) in drawn {
            let padding = longest - caption.len();
            let mut layout = Layout::new();
            layout.push_text(caption.len());
            layout.push_image(grids, config.spatial_extent);
            let layout = layout.padded(padding);
            out.mask.extend(layout.mask(padding));
            out.positions.push(layout.positions);
            let row = std::iter::repeat_n(0, padding).chain(caption.iter().copied()).chain([config.boi()]);
            out.text.push(row.collect());
            out.features.push(features);
            out.targets.extend(targets);
        }
        Ok(out)
    }

    /// Logits of every code of every image, (B * codes, codebook). `count` is the number of scales of a whole image.
    fn logits(&self, backbone: &Backbone, count: usize) -> Result<Tensor> {
        let (size, prefix) = (self.text.len(), self.text[0].len());
        let tokens = self.positions[0].len();
        let ids = Tensor::from_vec(self.text.concat(), (size, prefix), &Device::Cpu)?;
        let features = self.features.concat();
        let n = self.scale_of.len();
        let features = Tensor::from_vec(features, (size, n, backbone.config().code_dim), &Device::Cpu)?;
        let image = backbone.connect(&features)?.broadcast_add(&backbone.scale_rows(&self.scale_of, count)?)?;
        let x = Tensor::cat(&[backbone.embed_text(&ids)?, image], 1)?;
        let positions: Vec<&[Position]> = self.positions.iter().map(Vec::as_slice).collect();
        let rope = Rope::new(backbone.config(), &positions, &Device::Cpu)?;
        let mask = Tensor::from_slice(&self.mask, (size, tokens, tokens), &Device::Cpu)?;
        let hidden = backbone.forward(&x, &rope, Context::Masked(&mask))?;
        let hidden = hidden.narrow(1, prefix - 1, n + 1)?.contiguous()?;
        backbone.code_logits(&hidden.flatten_to(1)?)
    }

    /// Targets, and weights that sum to 1: 1 / (h w)^alpha for the codes of an h x w grid, normalised over the image.
    fn targets(&self, grids: &[(usize, usize)], alpha: f64) -> Result<(Tensor, Tensor)> {
        let weight = |&(h, w): &(usize, usize)| ((h * w) as f64).powf(-alpha);
        let raw: Vec<f64> = grids.iter().flat_map(|g| std::iter::repeat_n(weight(g), g.0 * g.1)).collect();
        let total = raw.iter().sum::<f64>() * self.text.len() as f64;
        let weights = (0..self.text.len()).flat_map(|_| raw.iter().map(|w| (w / total) as f32));
        let weights = Tensor::from_iter(weights, &Device::Cpu)?;
        Ok((Tensor::new(self.targets.as_slice(), &Device::Cpu)?, weights))
    }
}
