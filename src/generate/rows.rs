//! The sequences that images are drawn in: the prompt's of every image and, for guidance, an unconditional one for each.

use candle_core::{Result, Tensor};

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
    rows: usize,
    /// Of every scale, in all rows, so that nothing is sent to a GPU that has work to do.
    ropes: Vec<Rope>,
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
        let layouts: Vec<Layout> = prefixes.iter().map(layout).collect();
        let hidden = prefixes.iter().zip(&layouts).enumerate();
        let hidden = hidden.map(|(row, (prefix, layout))| prefill(backbone, cache, row, layout, &prefix.ids));
        let hidden = Tensor::cat(&hidden.collect::<Result<Vec<_>>>()?, 0)?;
        Ok((Self::resume(backbone, cache, layouts, scales)?, hidden))
    }

    /// Rows that have been read up to what opens the image, one for each of the layouts, which hold the image too.
    pub fn resume(
        backbone: &'a Backbone,
        cache: &'a mut Cache,
        layouts: Vec<Layout>,
        scales: &'a [(usize, usize)],
    ) -> Result<Self> {
        // The first scale is predicted by what has been read.
        let mut behind = 0;
        let rope = |(h, w): &(usize, usize)| {
            let rows = layouts.iter().enumerate();
            let positions: Vec<&[Position]> =
                rows.map(|(row, layout)| &layout.positions[cache.len(row) + behind..][..h * w]).collect();
            behind += h * w;
            Rope::new(backbone.config(), &positions, backbone.device())
        };
        let ropes = scales.iter().skip(1).map(rope).collect::<Result<_>>()?;
        Ok(Self { backbone, scales, rows: layouts.len(), ropes, cache })
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
        let hidden = self.backbone.config().hidden_size;
        let x = x.broadcast_as((self.rows / images, images, tokens, hidden))?.contiguous()?;
        let of = |table: &Tensor| table.narrow(0, 0, self.rows);
        let rope = Rope { cos: of(&self.ropes[si - 1].cos)?, sin: of(&self.ropes[si - 1].sin)? };
        let step = if again { Step::Again } else { Step::Scale };
        let context = Context::Cached { cache: self.cache, first: 0, step };
        self.backbone.forward(&x.reshape((self.rows, tokens, hidden))?, &rope, context)
    }

    /// From here on there is no guidance for the `images`: their unconditional rows are neither read nor kept.
    pub fn drop_unconditional(&mut self, images: usize) {
        self.rows = images;
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
fn prefill(backbone: &Backbone, cache: &mut Cache, row: usize, layout: &Layout, ids: &[u32]) -> Result<Tensor> {
    let Some(last) = ids.len().checked_sub(1) else { candle_core::bail!("nothing opens the image") };
    let x = backbone.embed_prefix(&Tensor::new(ids, backbone.device())?.unsqueeze(0)?)?;
    let rope = Rope::new(backbone.config(), &[&layout.positions[..=last]], x.device())?;
    let context = Context::Cached { cache, first: row, step: Step::Text };
    backbone.forward(&x, &rope, context)?.narrow(1, last, 1)?.contiguous()
}
