//! The visual branch of the condition: what the tokenizer makes of an image's codes.

use candle_core::{Device, Result, Tensor, bail};

use super::config::RefinerConfig;
use crate::pixels::GridResampling;

/// What a batch of pictures is refined from.
#[derive(Clone, Debug)]
pub struct Condition {
    /// The tokenizer's picture, folded: (B, T, c).
    pub(super) picture: Tensor,
    /// The same enlarged to the refined picture's size, folded: what the network's output is added
    /// to.
    base: Tensor,
    /// Code embeddings and semantic features (B, h * w, code_dim + semantic_dim), on the codes'
    /// grid.
    pub(super) codes: Tensor,
    /// Height and width of the codes' grid.
    pub(super) code_grid: (usize, usize),
    grid: (usize, usize),
}

impl Condition {
    /// Of the tokenizer's pictures (B, 3, H, W) around [-1, 1], the code embeddings F (B, h, w, D)
    /// and the semantic features (B, h * w, S) decoded from them.
    ///
    /// Errors: shapes that do not fit each other or the config.
    pub fn new(picture: &Tensor, f: &Tensor, semantic: &Tensor, config: &RefinerConfig) -> Result<Self> {
        let (b, channels, height, width) = picture.dims4()?;
        let (fb, h, w, d) = f.dims4()?;
        let fits = channels == 3 && fb == b && (height, width) == (h * config.code_cell, w * config.code_cell);
        if !fits || d != config.code_dim || semantic.dims() != [b, h * w, config.semantic_dim] {
            bail!(
                "refiner: a picture {:?}, codes {:?} and features {:?} do not fit each other or its config",
                picture.dims(),
                f.dims(),
                semantic.dims()
            );
        }
        let large = (height * config.upscale, width * config.upscale);
        let base = GridResampling::bicubic((height, width), large).channels_first(picture)?;
        Ok(Self {
            picture: fold(picture, config.patch / config.upscale)?,
            base: fold(&base, config.patch)?,
            codes: Tensor::cat(&[&f.reshape((b, h * w, d))?, semantic], 2)?,
            code_grid: (h, w),
            grid: (large.0 / config.patch, large.1 / config.patch),
        })
    }

    /// Height and width of the finest level's grid of tokens.
    pub fn grid(&self) -> (usize, usize) {
        self.grid
    }

    /// The tokenizer's picture in the refined one's size, folded: (B, T, p * p * 3).
    pub fn base(&self) -> &Tensor {
        &self.base
    }

    /// Where the tensors are.
    pub fn device(&self) -> &Device {
        self.picture.device()
    }
}

/// Pictures (B, C, H, W) as tokens of `patch` x `patch` pixels: (B, H/p * W/p, p * p * C).
pub fn fold(x: &Tensor, patch: usize) -> Result<Tensor> {
    let (b, c, height, width) = x.dims4()?;
    let (h, w) = (height / patch, width / patch);
    x.reshape((b, c, h, patch, w, patch))?.permute((0, 2, 4, 3, 5, 1))?.reshape((b, h * w, patch * patch * c))
}

/// The reverse of [`fold`], for three channels: (B, h * w, p * p * 3) -> (B, 3, h p, w p).
pub fn unfold(x: &Tensor, (h, w): (usize, usize), patch: usize) -> Result<Tensor> {
    let b = x.dim(0)?;
    x.reshape((b, h, w, patch, patch, 3))?.permute((0, 5, 1, 3, 2, 4))?.reshape((b, 3, h * patch, w * patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folding_is_undone() -> Result<()> {
        let x = Tensor::arange(0f32, 2.0 * 3.0 * 8.0 * 12.0, &Device::Cpu)?.reshape((2, 3, 8, 12))?;
        let folded = fold(&x, 4)?;
        assert_eq!(folded.dims(), [2, 6, 48]);
        // The first token begins with the three channels of the first two pixels.
        assert_eq!(folded.get(0)?.get(0)?.to_vec1::<f32>()?[..6], [0.0, 96.0, 192.0, 1.0, 97.0, 193.0]);
        assert_eq!(unfold(&folded, (2, 3), 4)?.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    }
}
