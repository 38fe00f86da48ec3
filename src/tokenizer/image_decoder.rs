//! The half of a tokenizer that drawing needs: from codes to pixels.

use candle_core::{DType, Result, Tensor, bail};
use image::RgbImage;

use super::cnn::Decoder;
use super::{BitConfig, BitQuantizer, BitTokenizerConfig, Code, CodeSpace, Quantizer, TokenizerConfig};
use crate::checkpoint::Weights;
use crate::nn::Conv;
use crate::pixels::{self, GridResampling};

/// Codes to pixels, for both families of tokenizers.
#[derive(Debug)]
pub enum ImageDecoder {
    /// TokenFlow's.
    Table(Box<TableDecoder>),
    /// Infinity's.
    Bits(Box<BitDecoder>),
}

impl ImageDecoder {
    /// As [`TableDecoder::load`].
    pub fn load(w: &Weights, config: &TokenizerConfig) -> Result<Self> {
        Ok(Self::Table(Box::new(TableDecoder::load(w, config)?)))
    }

    /// As [`BitDecoder::load`].
    pub fn load_bits(w: &Weights, config: &BitTokenizerConfig) -> Result<Self> {
        Ok(Self::Bits(Box::new(BitDecoder::load(w, config)?)))
    }

    /// Which codes it decodes.
    pub fn space(&self) -> CodeSpace {
        match self {
            Self::Table(images) => CodeSpace::Table(images.quantizer.config().size),
            Self::Bits(images) => images.quantizer.config().space(),
        }
    }

    /// Pixels of one image from its codes, or from those of a prefix of its scales: (3, H, W)
    /// around [-1, 1].
    ///
    /// Errors: codes that [`CodeSpace::check`] refuses.
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<Tensor> {
        match self {
            Self::Table(images) => images.decode(codes, scales),
            Self::Bits(images) => images.decode(codes, scales),
        }
    }

    /// The same as bytes, rounded as the family does.
    ///
    /// Errors: as [`Self::decode`], and [`crate::error::Kind::NonFinite`] for pixels that are not
    /// finite.
    pub fn decode_image(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> crate::error::Result<RgbImage> {
        match self {
            Self::Table(images) => images.decode_image(codes, scales),
            Self::Bits(images) => pixels::to_image(&images.decode(codes, scales)?, pixels::INFINITY_GREY),
        }
    }
}

/// Eight bits per colour do not need f32: on a GPU pixels are decoded in bf16. Quantisation is f32
/// everywhere.
fn of_pixels(w: &Weights) -> Weights {
    if w.device().is_cuda() { w.with_dtype(DType::BF16) } else { w.clone() }
}

/// TokenFlow's codebook and pixel decoder.
#[derive(Debug)]
pub struct TableDecoder {
    quantizer: Quantizer,
    pub(super) post_quant_conv: Conv,
    pub(super) decoder: Decoder,
    config: TokenizerConfig,
}

impl TableDecoder {
    /// The keys `quantize`, `post_quant_conv` and `decoder` of TokenFlow; what else there is is not
    /// read.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`TokenizerConfig::check`] refuses.
    pub fn load(w: &Weights, config: &TokenizerConfig) -> Result<Self> {
        config.check()?;
        let (codes, pixels) = (&config.codebook, of_pixels(w));
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

    /// As [`ImageDecoder::decode`].
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<Tensor> {
        let Some(&(h, w)) = scales.last() else { bail!("no scales") };
        self.quantizer.check(codes, scales)?;
        let f = self.quantizer.accumulate(codes, scales, (h, w));
        self.decode_features(&self.quantizer.to_tensor(f, (h, w))?)?.squeeze(0)
    }

    /// As [`ImageDecoder::decode_image`].
    pub fn decode_image(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> crate::error::Result<RgbImage> {
        pixels::to_image(&self.decode(codes, scales)?, pixels::TOKENFLOW_GREY)
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

/// Infinity's quantiser and decoder.
#[derive(Debug)]
pub struct BitDecoder {
    quantizer: BitQuantizer,
    decoder: Decoder,
}

impl BitDecoder {
    /// The keys `decoder` of Infinity; what else there is is not read.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`BitTokenizerConfig::check`]
    /// refuses.
    pub fn load(w: &Weights, config: &BitTokenizerConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            quantizer: BitQuantizer::new(config.bits, w.device())?,
            decoder: Decoder::load(&of_pixels(w).pp("decoder"), &config.decoder)?,
        })
    }

    /// The quantiser.
    pub fn quantizer(&self) -> &BitQuantizer {
        &self.quantizer
    }

    /// As [`ImageDecoder::decode`]; pixels are in [-1, 1].
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<Tensor> {
        let f = self.quantizer.accumulate(codes, scales)?;
        let Some(&(h, w)) = scales.last() else { bail!("no scales") };
        let BitConfig { dim, patch } = *self.quantizer.config();
        self.decode_features(&f.reshape((1, h * patch, w * patch, dim))?)?.squeeze(0)
    }

    /// Pixels from F: (B, h, w, dim) -> (B, 3, H, W) in [-1, 1].
    pub fn decode_features(&self, f: &Tensor) -> Result<Tensor> {
        let f = f.permute((0, 3, 1, 2))?.contiguous()?;
        self.decoder.forward(&f.to_dtype(self.decoder.dtype())?)?.to_dtype(DType::F32)?.clamp(-1f32, 1f32)
    }
}
