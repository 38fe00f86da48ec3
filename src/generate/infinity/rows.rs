//! The rows that Infinity's images are drawn in: one of every image and, with guidance, an
//! unconditional one of every image.

use candle_core::{Result, Tensor, bail};

use crate::backbone::{Cache, Rope, Step};
use crate::generate::sampler::{Fault, SampleParams};
use crate::generate::{Sampling, Sequences, bits, schedule};
use crate::infinity::{Conditions, Infinity, Mixture};

/// A batch of rows, each conditioned on its own text.
#[derive(Debug)]
pub struct InfinityRows<'a> {
    model: &'a Infinity,
    sampling: &'a Sampling,
    conditions: Conditions,
    /// Scales of an image, left out ones among them.
    scales: usize,
    /// Of every scale.
    ropes: Vec<Rope>,
    caches: Vec<Cache>,
}

impl<'a> InfinityRows<'a> {
    /// Rows for the `texts` of images of the grids `scales`, whose ratio has the `lattice`, and the
    /// states that predict the first token, (R, 1, C).
    pub fn start(
        model: &'a Infinity,
        sampling: &'a Sampling,
        texts: &[Tensor],
        scales: &[(usize, usize)],
        lattice: (usize, usize),
    ) -> Result<(Self, Tensor)> {
        let conditions = model.condition(texts)?;
        // Nothing comes after the last scale.
        let kept = sampling.drawn(scales.len()).saturating_sub(1);
        let capacity = schedule::codes(&scales[..kept]);
        let caches = texts.iter().map(|_| model.cache(capacity)).collect::<Result<_>>()?;
        let ropes = scales.iter().map(|&grid| model.angles(grid, lattice)).collect::<Result<_>>()?;
        let mut rows = Self { model, sampling, conditions, scales: scales.len(), ropes, caches };
        let start = model.start(&rows.conditions)?;
        let hidden = rows.pass(0, start)?;
        Ok((rows, hidden))
    }

    /// The conditions of the rows.
    pub fn conditions(&self) -> &Conditions {
        &self.conditions
    }

    /// Logits of hidden states (R, T, C): (R, T, 2 * bits).
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.model.logits(hidden, &self.conditions)
    }

    fn pass(&mut self, si: usize, x: Tensor) -> Result<Tensor> {
        let images = self.caches.len() / 2;
        let mixture = self.mixture(si);
        let keep = si + 1 < self.sampling.drawn(self.scales);
        let caches = (&mut self.caches[..], keep);
        let hidden = self.model.forward(x, &self.ropes[si], &self.conditions, caches, mixture.as_ref())?;
        // After guidance inside the network the unconditional rows are not needed.
        let guided = mixture.is_some() && !self.sampling.cfg_layers.contains(&0);
        if guided { hidden.narrow(0, 0, images) } else { Ok(hidden) }
    }

    /// Guidance within the network at a scale, if it takes place there.
    fn mixture(&self, si: usize) -> Option<Mixture> {
        let (weight, depth) = (1.0 + self.sampling.guidance(si, self.scales), self.model.config().depth);
        let layers = self.sampling.cfg_layers.iter().filter(|&&from_end| from_end > 0);
        let after: Vec<usize> = layers.filter_map(|&from_end| depth.checked_sub(from_end)).collect();
        let guided = si < self.sampling.guided_scales(self.scales) && weight != 1.0;
        (guided && !after.is_empty()).then_some(Mixture { after, weight })
    }
}

impl Sequences for InfinityRows<'_> {
    fn forward(&mut self, si: usize, features: &Tensor, step: Step) -> Result<Tensor> {
        if step != Step::Scale {
            bail!("Infinity draws every scale in one pass");
        }
        let x = self.model.embed(si, features)?;
        let copies = self.caches.len() / features.dim(0)?;
        let x = if copies > 1 { Tensor::cat(&vec![&x; copies], 0)? } else { x };
        self.pass(si, x)
    }

    fn drop_unconditional(&mut self, images: usize) -> Result<()> {
        self.caches.truncate(images);
        self.conditions.truncate(images)
    }

    fn sample(&self, hidden: &Tensor, params: &SampleParams) -> std::result::Result<Tensor, Fault> {
        bits::sample(&self.logits(hidden)?, params, 0)
    }
}
