//! The rows of a batch of OneCAT's images: every image has one with its prompt; in edits another
//! one with the instruction alone; and, with guidance, an unconditional one.

use candle_core::{Result, Tensor, bail};

use crate::backbone::{Cache, Context, Rope, Step};
use crate::generate::sampler::{Fault, SampleParams};
use crate::generate::{Sequences, bits, schedule};
use crate::onecat::{Drawing, Trunk, rope};

/// Guidance, by the rows of an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Guided {
    /// Text to image: the prompt's row and, with guidance, an unconditional one.
    Text,
    /// Editing: a row with source and instruction, a row with the instruction alone, of this
    /// weight, and an unconditional one. With weight 0 there is no row with the instruction alone.
    Edit(f64),
}

impl Guided {
    /// Rows of an image that are not unconditional.
    fn conditional(self) -> usize {
        match self {
            Self::Text => 1,
            Self::Edit(weight) => 1 + usize::from(weight != 0.0),
        }
    }
}

/// A batch of rows, each with its own prefix.
#[derive(Debug)]
pub struct OneCatRows<'a> {
    trunk: &'a Trunk,
    drawing: &'a Drawing,
    guided: Guided,
    images: usize,
    /// Of every scale, in all rows.
    ropes: Vec<Rope>,
    /// Of every active row.
    caches: Vec<Cache>,
}

impl<'a> OneCatRows<'a> {
    /// Rows behind `prefixes`, for images of the grids `scales`, and the states that predict the
    /// first code, (R, 1, hidden). The prefixes of one kind of row for all images come before
    /// those of the next kind, in the order of [`Guided`].
    pub fn start(
        trunk: &'a Trunk,
        drawing: &'a Drawing,
        prefixes: &[&Cache],
        images: usize,
        guided: Guided,
        scales: &[(usize, usize)],
    ) -> Result<(Self, Tensor)> {
        let Some(&last) = scales.last() else { bail!("no scales") };
        if scales.len() > trunk.config().adapters {
            bail!("{} scales, the model has adapters for {}", scales.len(), trunk.config().adapters);
        }
        let codes = schedule::codes(scales);
        let row = |prefix: &&Cache| {
            let mut cache = trunk.cache(prefix.len() + codes)?;
            cache.copy(prefix)?;
            Ok(cache)
        };
        let caches: Vec<Cache> = prefixes.iter().map(row).collect::<Result<_>>()?;
        let angles = |&grid: &(usize, usize)| {
            let positions: Vec<Vec<rope::Position>> =
                prefixes.iter().map(|prefix| rope::grid(prefix.len(), grid, last).collect()).collect();
            rope::angles(trunk.config(), trunk.config().bf16_frequencies, &positions, trunk.device())
        };
        let ropes = scales.iter().map(angles).collect::<Result<_>>()?;
        let mut rows = Self { trunk, drawing, guided, images, ropes, caches };
        let start = drawing.start()?;
        let start = Tensor::cat(&vec![&start; images], 0)?;
        let hidden = rows.forward(0, &start, Step::Scale)?;
        Ok((rows, hidden))
    }

    /// Logits of every bit of hidden states (R, T, hidden), the rows of an edit with its source
    /// and without it combined: (images, T, 2 * bits) and, with guidance, as many
    /// unconditional ones behind them.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.drawing.logits(hidden)?;
        let weight = match self.guided {
            Guided::Edit(weight) if weight != 0.0 => weight,
            _ => return Ok(logits),
        };
        let part = |i: usize| logits.narrow(0, i * self.images, self.images);
        let both = ((part(0)? + (part(1)? * weight)?)? / (1.0 + weight))?;
        match logits.dim(0)? > 2 * self.images {
            true => Tensor::cat(&[&both, &part(2)?], 0),
            false => Ok(both),
        }
    }
}

impl Sequences for OneCatRows<'_> {
    fn forward(&mut self, si: usize, features: &Tensor, step: Step) -> Result<Tensor> {
        if step != Step::Scale {
            bail!("OneCAT draws every scale in one pass");
        }
        let x = self.drawing.embed(si, features)?;
        let copies = self.caches.len() / features.dim(0)?;
        let x = if copies > 1 { Tensor::cat(&vec![&x; copies], 0)? } else { x };
        let rope = self.ropes[si].narrow(0, self.caches.len())?;
        let context = Context::Cached { caches: &mut self.caches, step };
        self.trunk.forward(&x, &rope, context, self.drawing.scale(si))
    }

    fn drop_unconditional(&mut self, images: usize) -> Result<()> {
        self.caches.truncate(images * self.guided.conditional());
        Ok(())
    }

    fn sample(&self, hidden: &Tensor, params: &SampleParams) -> std::result::Result<Tensor, Fault> {
        bits::sample(&self.logits(hidden)?, params, 0)
    }
}
