//! The sequences that one image is drawn in: the prompt's and, for guidance, the unconditional one.

use candle_core::{Result, Tensor};

use super::sampler::{self, Draw, Fault};
use super::{Prefix, schedule};
use crate::backbone::sequence::Layout;
use crate::backbone::{Backbone, Cache, Context, Position, Rope, Step};

/// Tokens whose logits are held at a time: 1 GB for all of a 64x64 grid would be too much.
pub const POSITIONS: usize = 1024;

/// A batch of rows that see the same codes behind beginnings of their own.
#[derive(Debug)]
pub struct Rows<'a> {
    backbone: &'a Backbone,
    scales: &'a [(usize, usize)],
    /// Of every row, up to the end of the image.
    layouts: Vec<Layout>,
    cache: &'a mut Cache,
}

impl<'a> Rows<'a> {
    /// A cache for the prefixes and an image of the grids `scales` behind them.
    pub fn cache(backbone: &Backbone, prefixes: &[&Prefix], scales: &[(usize, usize)]) -> Result<Cache> {
        let longest = prefixes.iter().map(|p| p.ids.len()).max().unwrap_or(0);
        let capacity = longest + schedule::codes(scales);
        Cache::new(backbone.config(), prefixes.len(), capacity, backbone.dtype(), backbone.device())
    }

    /// Reads the prefixes of an image of the grids `scales` into an empty cache. Gives the hidden states that predict the
    /// first code as well, (R, 1, hidden). Errors when a prefix is empty.
    pub fn start(
        backbone: &'a Backbone,
        cache: &'a mut Cache,
        prefixes: &[&Prefix],
        scales: &'a [(usize, usize)],
    ) -> Result<(Self, Tensor)> {
        let layout = |prefix: &&Prefix| {
            let mut layout = Layout::behind(prefix.pads);
            layout.push_text(prefix.ids.len().saturating_sub(1));
            layout.push_image(scales, backbone.config().spatial_extent);
            layout
        };
        let mut rows = Self::resume(backbone, cache, prefixes.iter().map(layout).collect(), scales);
        let hidden: Vec<Tensor> =
            prefixes.iter().enumerate().map(|(row, prefix)| rows.prefill(row, &prefix.ids)).collect::<Result<_>>()?;
        let hidden = Tensor::cat(&hidden, 0)?;
        Ok((rows, hidden))
    }

    /// Rows that have been read up to what opens the image, one for each of the layouts, which hold the image too.
    pub fn resume(
        backbone: &'a Backbone,
        cache: &'a mut Cache,
        layouts: Vec<Layout>,
        scales: &'a [(usize, usize)],
    ) -> Self {
        Self { backbone, scales, layouts, cache }
    }

    /// The transformer.
    pub fn backbone(&self) -> &'a Backbone {
        self.backbone
    }

    /// Prefixes differ in length, so each is read by itself: the hidden state of its last token, (1, 1, hidden).
    fn prefill(&mut self, row: usize, ids: &[u32]) -> Result<Tensor> {
        let Some(last) = ids.len().checked_sub(1) else { candle_core::bail!("nothing opens the image") };
        let x = self.backbone.embed_prefix(&Tensor::new(ids, self.backbone.device())?.unsqueeze(0)?)?;
        let rope = Rope::new(self.backbone.config(), &[&self.layouts[row].positions[..=last]], x.device())?;
        let context = Context::Cached { cache: self.cache, first: row, step: Step::Text };
        self.backbone.forward(&x, &rope, context)?.narrow(1, last, 1)?.contiguous()
    }

    /// Reads scale `si`, whose features (h * w, D) are the same in every row: hidden states (R, h * w, hidden), which
    /// predict its codes. With `again` the scale, already read, is looked at with other features, which leave no trace.
    pub fn read(&mut self, si: usize, features: Vec<f32>, again: bool) -> Result<Tensor> {
        let (config, (h, w)) = (self.backbone.config(), self.scales[si]);
        let features = Tensor::from_vec(features, (1, h * w, config.code_dim), self.backbone.device())?;
        let x = self.backbone.embed_codes(&features.to_dtype(self.backbone.dtype())?, si, self.scales)?;
        let x = x.broadcast_as((self.layouts.len(), h * w, config.hidden_size))?.contiguous()?;
        let rows = self.layouts.iter().enumerate().map(|(row, layout)| {
            let start = self.cache.len(row) - if again { h * w } else { 0 };
            &layout.positions[start..][..h * w]
        });
        let rope = Rope::new(config, &rows.collect::<Vec<&[Position]>>(), self.backbone.device())?;
        let step = if again { Step::Again } else { Step::Scale };
        self.backbone.forward(&x, &rope, Context::Cached { cache: self.cache, first: 0, step })
    }

    /// From here on there is no guidance: the unconditional row is neither read nor kept.
    pub fn drop_unconditional(&mut self) {
        self.layouts.truncate(1);
    }

    /// One code for each of the tokens, (R, T, hidden). Their logits are held for [`POSITIONS`] of them at a time.
    pub fn draw(&self, hidden: &Tensor, draw: &Draw) -> std::result::Result<Vec<u32>, Fault> {
        let tokens = hidden.dim(1)?;
        let mut codes = Vec::with_capacity(tokens);
        for first in (0..tokens).step_by(POSITIONS) {
            let part = hidden.narrow(1, first, POSITIONS.min(tokens - first))?;
            codes.extend(sampler::sample(&self.backbone.code_logits(&part)?, draw, first)?);
        }
        Ok(codes)
    }
}
