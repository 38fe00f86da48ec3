//! The half of the tokenizer that drawing needs: from codes to pixels.

use candle_core::{DType, Result, Tensor, bail};

use super::cnn::Decoder;
use super::{Quantizer, TokenizerConfig};
use crate::checkpoint::Weights;
use crate::nn::Conv;
use crate::pixels::GridResampling;

/// Codebook and pixel decoder.
#[derive(Debug)]
pub struct ImageDecoder {
    quantizer: Quantizer,
    pub(super) post_quant_conv: Conv,
    pub(super) decoder: Decoder,
    config: TokenizerConfig,
}

impl ImageDecoder {
    /// The keys `quantize`, `post_quant_conv` and `decoder` of TokenFlow; what else there is is not read.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`TokenizerConfig::check`] refuses.
    pub fn load(w: &Weights, config: &TokenizerConfig) -> Result<Self> {
        config.check()?;
        let codes = &config.codebook;
        // Eight bits a colour need no f32: on a GPU pixels come from bf16. What is quantised is f32 everywhere.
        let pixels = if w.device().is_cuda() { w.with_dtype(DType::BF16) } else { w.clone() };
        Ok(Self {
            quantizer: Quantizer::load(&w.pp("quantize"), codes)?,
            post_quant_conv: Conv::load(&pixels.pp("post_quant_conv"), codes.pixel_dim, config.decoder.z_channels, 1)?,
            decoder: Decoder::load(&pixels.pp("decoder"), &config.decoder)?,
            config: config.clone(),
        })
    }

    /// Codebook and quantiser.
    pub fn quantizer(&self) -> &Quantizer {
        &self.quantizer
    }

    /// Pixels of one image from its codes, or from those of a prefix of its scales: (3, H, W) around [-1, 1].
    ///
    /// Errors: codes that [`Quantizer::check`] refuses.
    pub fn decode(&self, codes: &[Vec<u32>], scales: &[(usize, usize)]) -> Result<Tensor> {
        let Some(&(h, w)) = scales.last() else { bail!("no scales") };
        self.quantizer.check(codes, scales)?;
        let f = self.quantizer.accumulate(codes, scales, (h, w));
        self.decode_features(&self.quantizer.to_tensor(f, (h, w))?)?.squeeze(0)
    }

    /// Pixels from F: (B, h, w, D) -> (B, 3, H, W).
    pub fn decode_features(&self, f: &Tensor) -> Result<Tensor> {
        let codes = &self.config.codebook;
        let pixel = f.narrow(3, codes.semantic_dim, codes.pixel_dim)?.permute((0, 3, 1, 2))?.contiguous()?;
        let pixel = pixel.to_dtype(self.post_quant_conv.dtype())?;
        let image = self.decoder.forward(&self.post_quant_conv.forward(&pixel)?)?.to_dtype(f.dtype())?;
        let Some(side) = self.config.image_size else { return Ok(image) };
        GridResampling::bicubic((image.dim(2)?, image.dim(3)?), (side, side)).channels_first(&image)
    }
}
