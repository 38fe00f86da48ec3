//! Training sequences of text and images, and batches of them.

use std::cmp::Reverse;

use candle_core::{DType, Result, Tensor};

use super::loss::cross_entropy;
use crate::backbone::{Backbone, BackboneConfig, Layout, Position, Rope};
use crate::generate::next_input::NextInput;
use crate::ops;
use crate::tokenizer::{Code, Encoded, Quantizer};

/// What the words to learn of one answer weigh together, where the codes of one image weigh 1; of N
/// answers in a sequence each weighs this by the root of N.
const WORDS: f32 = 0.5;

/// What a token to predict is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A code.
    Code,
    /// A text token or a marker.
    Text,
}

/// A token to predict.
pub(super) struct Target {
    /// Index in the sequence of the token whose hidden state predicts it.
    pub(super) at: usize,
    pub(super) id: u32,
    weight: f32,
    /// Scale of a code.
    scale: usize,
}

/// One sequence: positions, inputs, and targets.
#[derive(Default)]
pub struct Sequence {
    layout: Layout,
    /// (index, id) of text tokens and markers.
    pub(super) words: Vec<(usize, u32)>,
    /// (index, scale) of codes, and their input features, D each.
    codes: Vec<(usize, usize)>,
    features: Vec<f32>,
    pub(super) text_targets: Vec<Target>,
    pub(super) code_targets: Vec<Target>,
}

/// An image in a sequence.
pub struct Picture<'a> {
    /// Grids (height, width), coarse to fine: as many as are read and learnt.
    pub grids: &'a [(usize, usize)],
    /// Its codes, and the nearest ones as targets.
    pub encoded: &'a Encoded,
    /// Others follow it.
    pub context: bool,
    /// The model is to draw it, with weights 1 / (h w)^alpha for the codes of an h x w grid,
    /// normalised to sum to 1.
    pub alpha: Option<f64>,
}

impl Sequence {
    /// Appends text tokens or markers.
    pub fn push_text(&mut self, ids: &[u32]) {
        self.words.extend(ids.iter().enumerate().map(|(i, &id)| (self.layout.len() + i, id)));
        self.layout.push_text(ids.len());
    }

    /// The next token is text or a marker, and the target of the last one.
    pub fn expect_text(&mut self, id: u32) {
        if let Some(at) = self.layout.len().checked_sub(1) {
            self.text_targets.push(Target { at, id, weight: 0.0, scale: 0 });
        }
    }

    /// The targets of a kind.
    pub(super) fn targets(&self, kind: Kind) -> &[Target] {
        match kind {
            Kind::Code => &self.code_targets,
            Kind::Text => &self.text_targets,
        }
    }

    /// The weights of the targets of a kind.
    pub(super) fn weights(&self, kind: Kind) -> Vec<f32> {
        match kind {
            Kind::Code => self.code_targets.iter().map(|target| target.weight).collect(),
            Kind::Text => self.text_weights(),
        }
    }

    /// Weight of every text target: all answers weigh the same, and so do all tokens of one.
    fn text_weights(&self) -> Vec<f32> {
        let answers = || self.text_targets.chunk_by(|a, b| a.at + 1 == b.at);
        let answer = WORDS / (answers().count() as f32).sqrt();
        answers().flat_map(|words| std::iter::repeat_n(answer / words.len() as f32, words.len())).collect()
    }

    /// Appends an image from `<boi>` on.
    pub fn push_image(&mut self, config: &BackboneConfig, quantizer: &Quantizer, picture: &Picture) -> Result<()> {
        let Picture { grids, encoded, context, alpha } = *picture;
        let boi = self.layout.len();
        self.words.push((boi, config.boi()));
        let inputs = NextInput::of_table(quantizer, config.input_mode, grids).all(&encoded.codes)?;
        let mut starts = vec![boi];
        let mut at = boi + 1;
        for (scale, (input, (h, w))) in inputs.iter().zip(&grids[1..]).enumerate() {
            self.features.extend(input);
            starts.push(at);
            let count = h * w;
            self.codes.extend((at..at + count).map(|i| (i, scale + 1)));
            at += count;
        }
        if let Some(alpha) = alpha {
            let weight = |&(h, w): &(usize, usize)| ((h * w) as f64).powf(-alpha);
            let total: f64 = grids.iter().map(|g| weight(g) * (g.0 * g.1) as f64).sum();
            for (scale, (targets, grid)) in encoded.targets.iter().zip(grids).enumerate() {
                let weight = (weight(grid) / total) as f32;
                let target =
                    |(i, &code): (usize, &Code)| Target { at: starts[scale] + i, id: code as u32, weight, scale };
                self.code_targets.extend(targets.iter().enumerate().map(target));
            }
        }
        match context {
            false => self.layout.push_image(grids, config.spatial_extent),
            true => {
                let whole = config.context_last_scale;
                if whole {
                    self.features.extend(&encoded.f_hat);
                    let count = encoded.f_hat.len() / config.code_dim;
                    self.codes.extend((at..at + count).map(|i| (i, grids.len())));
                }
                self.layout.push_context_image(grids, config.spatial_extent, whole);
                self.words.push((self.layout.len() - 1, config.eoi()));
            }
        }
        Ok(())
    }
}

/// Measurements of one batch.
pub struct Measured {
    /// Mean loss of the codes of each scale; NaN where there are none.
    pub scales: Vec<f64>,
    /// Mean loss of text; NaN without any.
    pub words: f64,
}

/// The losses of all targets of a batch, which a GPU may still be at work on.
pub struct Losses {
    /// Of codes, and the scale of each, by parts of the batch.
    codes: Vec<(Tensor, Vec<usize>)>,
    words: Vec<Tensor>,
    /// Scales of a whole image.
    count: usize,
}

impl Losses {
    /// Their means.
    pub fn means(&self) -> Result<Measured> {
        let mut scales = vec![(0.0, 0); self.count];
        for (losses, scale_of) in &self.codes {
            losses.to_vec1::<f32>()?.iter().zip(scale_of).for_each(|(&loss, &scale)| add(&mut scales[scale], loss));
        }
        let mut words = (0.0, 0);
        for losses in &self.words {
            losses.to_vec1::<f32>()?.iter().for_each(|&loss| add(&mut words, loss));
        }
        Ok(Measured { scales: scales.into_iter().map(mean).collect(), words: mean(words) })
    }
}

/// Sequences of a part of a batch have this share of the tokens of its longest, or more: the rest
/// are pads, which cost as much as tokens.
const ALIKE: f64 = 0.75;

/// Sequences to learn from together.
pub struct Batch<'a>(pub &'a [Sequence]);

impl Batch<'_> {
    /// The loss, a scalar, averaged over the sequences, and those of all targets. `count` is the
    /// number of scales of a whole image.
    pub fn loss(&self, backbone: &Backbone, count: usize) -> Result<(Tensor, Losses)> {
        let mut total = Tensor::zeros((), DType::F32, backbone.device())?;
        let mut all = Losses { codes: Vec::new(), words: Vec::new(), count };
        self.cross_entropies(backbone, count, |kind, rows, losses| {
            let weights: Vec<f32> = rows.iter().flat_map(|&row| self.0[row].weights(kind)).collect();
            total = (&total + (&losses * Tensor::new(weights, losses.device())?)?.sum_all()?)?;
            let losses = losses.detach();
            match kind {
                Kind::Text => all.words.push(losses),
                Kind::Code => {
                    let targets = rows.iter().flat_map(|&row| self.0[row].targets(kind));
                    all.codes.push((losses, targets.map(|target| target.scale).collect()));
                }
            }
            Ok(())
        })?;
        Ok(((total / self.0.len() as f64)?, all))
    }

    /// The cross-entropies (N) of all targets, in several calls of `visit`, each with the targets
    /// of one kind of some of the sequences: with the indices of these, in whose order the targets
    /// are.
    pub(super) fn cross_entropies(
        &self,
        backbone: &Backbone,
        count: usize,
        mut visit: impl FnMut(Kind, &[usize], Tensor) -> Result<()>,
    ) -> Result<()> {
        let length = |row: usize| self.0[row].layout.len() as f64;
        let mut order: Vec<usize> = (0..self.0.len()).collect();
        order.sort_by_key(|&row| Reverse(self.0[row].layout.len()));
        let mut rest = order.as_slice();
        while let Some(&longest) = rest.first() {
            let alike = rest.iter().take_while(|&&row| length(row) >= ALIKE * length(longest)).count();
            let (rows, others) = rest.split_at(alike);
            let sequences: Vec<&Sequence> = rows.iter().map(|&row| &self.0[row]).collect();
            Part(&sequences).cross_entropies(backbone, count, |kind, losses| visit(kind, rows, losses))?;
            rest = others;
        }
        Ok(())
    }
}

/// A batch of sequences, padded on the right to one length; pads are masked and have no targets.
struct Part<'a>(&'a [&'a Sequence]);

impl Part<'_> {
    /// The cross-entropies of the targets of each kind that there is.
    fn cross_entropies(
        &self,
        backbone: &Backbone,
        count: usize,
        mut visit: impl FnMut(Kind, Tensor) -> Result<()>,
    ) -> Result<()> {
        let length = self.0.iter().map(|s| s.layout.len()).max().unwrap_or(0);
        let of = |kind: Kind| {
            let rows = self.0.iter().enumerate();
            rows.flat_map(|(row, s)| s.targets(kind).iter().map(move |t| (row, t))).collect::<Vec<_>>()
        };
        let kinds = [(Kind::Code, of(Kind::Code)), (Kind::Text, of(Kind::Text))];
        let all = kinds.iter().flat_map(|(_, targets)| targets);
        let at: Vec<u32> = all.map(|(row, t)| (row * length + t.at) as u32).collect();
        if at.is_empty() {
            return Ok(());
        }
        let (hidden, mut first) = (self.hidden(backbone, count, length, &at)?, 0);
        for (kind, targets) in kinds.into_iter().filter(|(_, targets)| !targets.is_empty()) {
            let hidden = hidden.narrow(0, first, targets.len())?;
            let logits = match kind {
                Kind::Code => backbone.code_logits(&hidden)?,
                Kind::Text => backbone.text_logits(&hidden)?,
            };
            let ids: Vec<u32> = targets.iter().map(|(_, t)| t.id).collect();
            visit(kind, cross_entropy(&logits, &ids)?)?;
            first += targets.len();
        }
        Ok(())
    }

    /// Hidden states of N of the size * length tokens and pads, (N, hidden).
    fn hidden(&self, backbone: &Backbone, count: usize, length: usize, selected: &[u32]) -> Result<Tensor> {
        let (size, config, device) = (self.0.len(), backbone.config(), backbone.device());
        let words: Vec<u32> = self.0.iter().flat_map(|s| s.words.iter().map(|w| w.1)).collect();
        let scales: Vec<usize> = self.0.iter().flat_map(|s| s.codes.iter().map(|c| c.1)).collect();
        let features: Vec<f32> = self.0.iter().flat_map(|s| &s.features).copied().collect();
        // From tokens in the order of words and then codes to their places; pads read the first
        // word.
        let mut order = vec![0u32; size * length];
        let of_words = self.0.iter().enumerate().flat_map(|(row, s)| s.words.iter().map(move |w| (row, w.0)));
        let of_codes = self.0.iter().enumerate().flat_map(|(row, s)| s.codes.iter().map(move |c| (row, c.0)));
        of_words.chain(of_codes).enumerate().for_each(|(i, (row, at))| order[row * length + at] = i as u32);
        let text = backbone.embed_text(&Tensor::new(words, device)?.unsqueeze(0)?)?.squeeze(0)?;
        let tokens = if scales.is_empty() {
            text
        } else {
            let features = Tensor::from_vec(features, (scales.len(), config.code_dim), device)?;
            Tensor::cat(&[text, backbone.embed_mixed_codes(&features, &scales, count)?], 0)?
        };
        let x = ops::select(&tokens, &Tensor::new(order, device)?)?.reshape((size, length, ()))?;
        let rows = self.0.iter().map(|s| padded(&s.layout.positions, length, [0.0; 3]));
        let positions: Vec<Vec<Position>> = rows.collect();
        let positions: Vec<&[Position]> = positions.iter().map(Vec::as_slice).collect();
        let rope = Rope::new(config, &positions, device)?;
        let ends = self.0.iter().flat_map(|s| padded(&s.layout.ends, length, 1)).map(|end| end as u32);
        let ends = Tensor::from_iter(ends, device)?.reshape((size, length, 1))?;
        let mask = Tensor::arange(0, length as u32, device)?.broadcast_lt(&ends)?;
        backbone.forward_selected(&x, &rope, &mask, &Tensor::new(selected, device)?)
    }
}

fn padded<T: Copy>(values: &[T], length: usize, pad: T) -> Vec<T> {
    values.iter().copied().chain(std::iter::repeat_n(pad, length - values.len())).collect()
}

fn add((sum, count): &mut (f64, u32), loss: f32) {
    *sum += f64::from(loss);
    *count += 1;
}

fn mean((sum, count): (f64, u32)) -> f64 {
    sum / f64::from(count)
}

#[cfg(test)]
mod tests;
