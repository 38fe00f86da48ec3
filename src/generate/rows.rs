//! The KV-cached sequences of a batch: a conditional one per image and, for guidance, an
//! unconditional one per image.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::sampler::{self, Fault, SampleParams};
use super::{Prefix, Sequences, schedule};
use crate::backbone::{Backbone, Cache, Context, Layout, Position, Rope, Step};

/// Tokens whose logits are in memory at a time: those of a whole 64x64 grid would take 1 GB.
pub const POSITIONS: usize = 1024;

/// A batch of rows with separate prefixes and caches: a conditional one per image and, with
/// guidance, an unconditional one per image, which gets the same codes.
#[derive(Debug)]
pub struct Rows<'a> {
    backbone: &'a Backbone,
    scales: &'a [(usize, usize)],
    /// Per scale, for all rows: copied to a GPU before it has work to do.
    ropes: Vec<Rope>,
    /// Of every row that is still in the batch.
    caches: &'a mut [Cache],
}

impl<'a> Rows<'a> {
    /// Caches for the prefixes and an image of the grids `scales` after each.
    pub fn caches(backbone: &Backbone, prefixes: &[&Prefix], scales: &[(usize, usize)]) -> Result<Vec<Cache>> {
        // Rows that are read together are as long as the longest at first.
        let longest = prefixes.iter().map(|prefix| prefix.ids.len()).max().unwrap_or(0);
        let capacity = longest + schedule::codes(scales);
        let cache = || Cache::new(backbone.config(), capacity, backbone.dtype(), backbone.device());
        prefixes.iter().map(|_| cache()).collect()
    }

    /// Prefills empty caches with the prefixes of images of the grids `scales`. Also returns the
    /// hidden states that predict the first code, (R, 1, hidden). Errors: an empty prefix.
    pub fn start(
        backbone: &'a Backbone,
        caches: &'a mut [Cache],
        prefixes: &[&Prefix],
        scales: &'a [(usize, usize)],
    ) -> Result<(Self, Tensor)> {
        let layout = |prefix: &&Prefix| {
            let mut layout = Layout::after(prefix.pads);
            layout.push_text(prefix.ids.len().saturating_sub(1));
            layout.push_image(scales, backbone.config().spatial_extent);
            layout
        };
        let layouts: Vec<Layout> = prefixes.iter().map(layout).collect();
        let hidden = match backbone.stays_in_cache() {
            true => prefill_apart(backbone, caches, &layouts, prefixes)?,
            false => prefill_together(backbone, caches, &layouts, prefixes)?,
        };
        Ok((Self::resume(backbone, caches, layouts, scales)?, hidden))
    }

    /// Rows that are prefilled up to the token that opens the image, one per layout; the layouts
    /// include the image.
    pub fn resume(
        backbone: &'a Backbone,
        caches: &'a mut [Cache],
        layouts: Vec<Layout>,
        scales: &'a [(usize, usize)],
    ) -> Result<Self> {
        // The first scale is predicted by the prefix, and never an input.
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
}

impl Sequences for Rows<'_> {
    fn forward(&mut self, si: usize, features: &Tensor, step: Step) -> Result<Tensor> {
        let (images, tokens, _) = features.dims3()?;
        let x = self.backbone.embed_codes(&features.to_dtype(self.backbone.dtype())?, si, self.scales)?;
        let (rows, hidden) = (self.caches.len(), self.backbone.config().hidden_size);
        let x = x.broadcast_as((rows / images, images, tokens, hidden))?.contiguous()?;
        let context = Context::Cached { caches: self.caches, step };
        self.backbone.forward(&x.reshape((rows, tokens, hidden))?, &self.ropes[si - 1].narrow(0, rows)?, context)
    }

    fn drop_unconditional(&mut self, images: usize) -> Result<()> {
        let caches = std::mem::take(&mut self.caches);
        self.caches = &mut caches[..images];
        Ok(())
    }

    /// Logits are held for `POSITIONS` of one image at a time, or for fewer of each of several.
    fn sample(&self, hidden: &Tensor, params: &SampleParams) -> std::result::Result<Tensor, Fault> {
        let (tokens, most) = (hidden.dim(1)?, POSITIONS.div_ceil(params.seeds.len().max(1)));
        let mut codes = Vec::new();
        for first in (0..tokens).step_by(most) {
            let part = hidden.narrow(1, first, most.min(tokens - first))?;
            codes.push(sampler::sample(&self.backbone.code_logits(&part)?, params, first)?);
        }
        Ok(Tensor::cat(&codes, 1)?)
    }
}

/// Prefills every prefix by itself, on all threads, and equal ones once. Returns the hidden states
/// of the last tokens, (R, 1, hidden).
fn prefill_apart(
    backbone: &Backbone,
    caches: &mut [Cache],
    layouts: &[Layout],
    prefixes: &[&Prefix],
) -> Result<Tensor> {
    let same = |row: usize| prefixes[..row].iter().position(|prefix| *prefix == prefixes[row]);
    let read = |(row, cache): (usize, &mut Cache)| match same(row) {
        Some(_) => Ok(None),
        None => {
            let (cache, row) = (std::slice::from_mut(cache), row..=row);
            prefill_together(backbone, cache, &layouts[row.clone()], &prefixes[row]).map(Some)
        }
    };
    let mut hidden: Vec<Option<Tensor>> = caches.par_iter_mut().enumerate().map(read).collect::<Result<_>>()?;
    for row in 0..prefixes.len() {
        if let Some(same) = same(row) {
            let (read, unread) = caches.split_at_mut(row);
            unread[0].copy(&read[same])?;
            hidden[row] = hidden[same].clone();
        }
    }
    Tensor::cat(&hidden.into_iter().flatten().collect::<Vec<_>>(), 0)
}

/// The same in one pass, which reads the weights once: shorter prefixes are padded with zeros at
/// the end, which causal attention ignores and the caches drop.
fn prefill_together(
    backbone: &Backbone,
    caches: &mut [Cache],
    layouts: &[Layout],
    prefixes: &[&Prefix],
) -> Result<Tensor> {
    let longest = prefixes.iter().map(|prefix| prefix.ids.len()).max().unwrap_or(0);
    let embed = |prefix: &&Prefix| {
        if prefix.ids.is_empty() {
            candle_core::bail!("nothing opens the image");
        }
        let x = backbone.embed_prefix(&Tensor::new(&*prefix.ids, backbone.device())?.unsqueeze(0)?)?;
        x.pad_with_zeros(1, 0, longest - prefix.ids.len())
    };
    let x: Vec<Tensor> = prefixes.iter().map(embed).collect::<Result<_>>()?;
    let positions = |(layout, prefix): (&Layout, &&Prefix)| {
        let mut positions = layout.positions[..prefix.ids.len()].to_vec();
        positions.resize(longest, Position::default());
        positions
    };
    let positions: Vec<Vec<Position>> = layouts.iter().zip(prefixes).map(positions).collect();
    let positions: Vec<&[Position]> = positions.iter().map(Vec::as_slice).collect();
    let rope = Rope::new(backbone.config(), &positions, backbone.device())?;
    let hidden = backbone.forward(&Tensor::cat(&x, 0)?, &rope, Context::Cached { caches, step: Step::Text })?;
    let mut last = Vec::new();
    for (row, (prefix, cache)) in prefixes.iter().zip(caches).enumerate() {
        cache.truncate(prefix.ids.len());
        last.push(hidden.narrow(0, row, 1)?.narrow(1, prefix.ids.len() - 1, 1)?);
    }
    Tensor::cat(&last, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::presets::QWEN2_5_VL_7B;
    use crate::backbone::{BackboneConfig, InputMode};
    use crate::checkpoint::Weights;
    use candle_core::{DType, Device};

    #[test]
    fn prefixes_are_read_together_as_apart() -> Result<()> {
        let config = BackboneConfig {
            vocab_size: 40,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            mrope_section: [4, 2, 2],
            codebook_size: 16,
            code_dim: 8,
            spatial_extent: Some(8.0),
            input_mode: InputMode::Residual,
            max_scales: 3,
            ..QWEN2_5_VL_7B
        };
        let backbone = Backbone::load(&Weights::trainable(3, &Device::Cpu), &config)?;
        let scales = [(1, 1), (2, 2), (3, 3)];
        let prefix = |ids: &[u32]| Prefix { ids: ids.to_vec(), pads: 0 };
        let prefixes = [prefix(&[3, 1, 4, 1, 5]), prefix(&[9, 2, 6]), prefix(&[7]), prefix(&[7])];
        let prefixes: Vec<&Prefix> = prefixes.iter().collect();
        let layout = |prefix: &&Prefix| {
            let mut layout = Layout::after(prefix.pads);
            layout.push_text(prefix.ids.len() - 1);
            layout.push_image(&scales, Some(8.0));
            layout
        };
        let layouts: Vec<Layout> = prefixes.iter().map(layout).collect();
        let (mut apart, mut together) =
            (Rows::caches(&backbone, &prefixes, &scales)?, Rows::caches(&backbone, &prefixes, &scales)?);
        let far = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let first = prefill_apart(&backbone, &mut apart, &layouts, &prefixes)?;
        assert!(far(&first, &prefill_together(&backbone, &mut together, &layouts, &prefixes)?)? < 1e-4);
        // And what comes after them sees the same.
        let features = Tensor::ones((4, 4, 8), DType::F32, &Device::Cpu)?;
        let behind = |caches: &mut [Cache]| {
            Rows::resume(&backbone, caches, layouts.clone(), &scales)?.forward(1, &features, Step::Scale)
        };
        let (one, other) = (behind(&mut apart)?, behind(&mut together)?);
        assert!(far(&one, &other)? < 1e-4);
        assert!(one.abs()?.sum_all()?.to_scalar::<f32>()? > 1.0);
        Ok(())
    }
}
