//! The sequences that images are drawn in: the prompt's of every image and, for guidance, an unconditional one for each.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::sampler::{self, Draw, Fault};
use super::{Prefix, schedule};
use crate::backbone::sequence::Layout;
use crate::backbone::{Backbone, Cache, Context, Position, Rope, Step};

/// Tokens whose logits are held at a time: 1 GB for all of a 64x64 grid would be too much.
pub const POSITIONS: usize = 1024;

/// A batch of rows, each with a beginning of its own: one of every image and, with guidance, another one of every image,
/// which sees the same codes.
#[derive(Debug)]
pub struct Rows<'a> {
    backbone: &'a Backbone,
    scales: &'a [(usize, usize)],
    /// Of every scale, in all rows, so that nothing is sent to a GPU that has work to do.
    ropes: Vec<Rope>,
    /// Of every row that is still read.
    caches: &'a mut [Cache],
}

impl<'a> Rows<'a> {
    /// Caches for the prefixes and an image of the grids `scales` behind each.
    pub fn caches(backbone: &Backbone, prefixes: &[&Prefix], scales: &[(usize, usize)]) -> Result<Vec<Cache>> {
        let codes = schedule::codes(scales);
        let cache = |prefix: &&Prefix| {
            Cache::new(backbone.config(), prefix.ids.len() + codes, backbone.dtype(), backbone.device())
        };
        prefixes.iter().map(cache).collect()
    }

    /// Reads the prefixes of an image of the grids `scales` into empty caches, equal ones once. Gives the hidden states that
    /// predict the first code as well, (R, 1, hidden). Errors when a prefix is empty.
    pub fn start(
        backbone: &'a Backbone,
        caches: &'a mut [Cache],
        prefixes: &[&Prefix],
        scales: &'a [(usize, usize)],
    ) -> Result<(Self, Tensor)> {
        let layout = |prefix: &&Prefix| {
            let mut layout = Layout::behind(prefix.pads);
            layout.push_text(prefix.ids.len().saturating_sub(1));
            layout.push_image(scales, backbone.config().spatial_extent);
            layout
        };
        let layouts: Vec<Layout> = prefixes.iter().map(layout).collect();
        let same = |row: usize| prefixes[..row].iter().position(|prefix| *prefix == prefixes[row]);
        let read = |(row, cache)| match same(row) {
            Some(_) => Ok(None),
            None => prefill(backbone, cache, &layouts[row], &prefixes[row].ids).map(Some),
        };
        let mut hidden: Vec<Option<Tensor>> = match backbone.stays_in_cache() {
            true => caches.par_iter_mut().enumerate().map(read).collect::<Result<_>>()?,
            false => caches.iter_mut().enumerate().map(read).collect::<Result<_>>()?,
        };
        for row in 0..prefixes.len() {
            if let Some(same) = same(row) {
                let (read, unread) = caches.split_at_mut(row);
                unread[0].copy(&read[same])?;
                hidden[row] = hidden[same].clone();
            }
        }
        let hidden: Vec<Tensor> = hidden.into_iter().flatten().collect();
        Ok((Self::resume(backbone, caches, layouts, scales)?, Tensor::cat(&hidden, 0)?))
    }

    /// Rows that have been read up to what opens the image, one for each of the layouts, which hold the image too.
    pub fn resume(
        backbone: &'a Backbone,
        caches: &'a mut [Cache],
        layouts: Vec<Layout>,
        scales: &'a [(usize, usize)],
    ) -> Result<Self> {
        // The first scale is predicted by what has been read.
        let mut behind = 0;
        let rope = |(h, w): &(usize, usize)| {
            let rows = layouts.iter().zip(&*caches);
            let positions: Vec<&[Position]> =
                rows.map(|(layout, cache)| &layout.positions[cache.len() + behind..][..h * w]).collect();
            behind += h * w;
            Rope::new(backbone.config(), &positions, backbone.device())
        };
        let ropes = scales.iter().skip(1).map(rope).collect::<Result<_>>()?;
        Ok(Self { backbone, scales, ropes, caches: &mut caches[..layouts.len()] })
    }

    /// The transformer.
    pub fn backbone(&self) -> &'a Backbone {
        self.backbone
    }

    /// Reads scale `si`, whose features (images, h * w, D) are those of the rows of each image: hidden states (R, h * w,
    /// hidden), which predict its codes. With `again` the scale, already read, is looked at with other features, which leave
    /// no trace.
    pub fn read(&mut self, si: usize, features: &Tensor, again: bool) -> Result<Tensor> {
        let (images, tokens, _) = features.dims3()?;
        let x = self.backbone.embed_codes(&features.to_dtype(self.backbone.dtype())?, si, self.scales)?;
        let (rows, hidden) = (self.caches.len(), self.backbone.config().hidden_size);
        let x = x.broadcast_as((rows / images, images, tokens, hidden))?.contiguous()?;
        let step = if again { Step::Again } else { Step::Scale };
        let context = Context::Cached { caches: self.caches, step };
        self.backbone.forward(&x.reshape((rows, tokens, hidden))?, &self.ropes[si - 1].narrow(0, rows)?, context)
    }

    /// From here on there is no guidance for the `images`: their unconditional rows are not read any more.
    pub fn drop_unconditional(&mut self, images: usize) {
        let caches = std::mem::take(&mut self.caches);
        self.caches = &mut caches[..images];
    }

    /// One code for each of the tokens, (R, T, hidden), of every image: (images, T) u32. Logits are held for
    /// [`POSITIONS`] of one image at a time, or for fewer of each of several.
    pub fn draw(&self, hidden: &Tensor, draw: &Draw) -> std::result::Result<Tensor, Fault> {
        let (tokens, most) = (hidden.dim(1)?, POSITIONS.div_ceil(draw.seeds.len().max(1)));
        let mut codes = Vec::new();
        for first in (0..tokens).step_by(most) {
            let part = hidden.narrow(1, first, most.min(tokens - first))?;
            codes.push(sampler::sample(&self.backbone.code_logits(&part)?, draw, first)?);
        }
        Ok(Tensor::cat(&codes, 1)?)
    }
}

/// Prefixes differ in length, so each is read by itself: the hidden state of its last token, (1, 1, hidden).
fn prefill(backbone: &Backbone, cache: &mut Cache, layout: &Layout, ids: &[u32]) -> Result<Tensor> {
    let Some(last) = ids.len().checked_sub(1) else { candle_core::bail!("nothing opens the image") };
    let x = backbone.embed_prefix(&Tensor::new(ids, backbone.device())?.unsqueeze(0)?)?;
    let rope = Rope::new(backbone.config(), &[&layout.positions[..=last]], x.device())?;
    let context = Context::Cached { caches: std::slice::from_mut(cache), step: Step::Text };
    backbone.forward(&x, &rope, context)?.narrow(1, last, 1)?.contiguous()
}
