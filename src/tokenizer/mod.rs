//! Images to codes and back, coarse to fine. TokenFlow: two encoders (semantic, pixel) share one
//! index into a dual codebook. Infinity: an autoencoder whose codes are the signs of its channels.

mod bit_tokenizer;
mod bits;
mod cnn;
mod code;
mod image_decoder;
mod layers;
mod presets;
mod quantizer;
mod semantic_decoder;
#[cfg(test)]
mod tests;
mod vit;

use candle_core::{Result, Tensor, bail};
use image::RgbImage;
use serde::{Deserialize, Serialize};

pub use bit_tokenizer::{BitEncoder, BitTokenizerConfig};
pub use bits::{BitConfig, BitQuantizer};
pub use cnn::{CnnConfig, CnnLayout};
pub use code::{Code, CodeSpace, pack, unpack};
pub use image_decoder::{BitDecoder, ImageDecoder, TableDecoder};
pub use presets::{BitPreset, Preset};
pub use quantizer::{CodebookConfig, Encoded, Quantizer, SelfCorrection};
pub use semantic_decoder::SemanticDecoderConfig;
pub use vit::{PositionResampling, SemanticEncoder, VitConfig, VitFeatures, VitLayout};

use crate::checkpoint::{Init, Weights};
use crate::error::Error;
use crate::nn::{Conv, Linear, check_sizes};
use crate::pixels::GridResampling;
use semantic_decoder::SemanticDecoder;

/// Shape of a whole tokenizer of TokenFlow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Semantic encoder.
    pub semantic: VitConfig,
    /// Semantic decoder.
    pub semantic_decoder: SemanticDecoderConfig,
    /// Pixel encoder.
    pub encoder: CnnConfig,
    /// Pixel decoder.
    pub decoder: CnnConfig,
    /// Dual codebook.
    pub codebook: CodebookConfig,
    /// Side of the square images that come out, where the pixel decoder's are resized
    /// (`siglip_32k`: 432 to 384).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
}

/// The most pixels along a side of images that are resized.
const MAX_SIDE: usize = 1 << 14;

impl TokenizerConfig {
    /// Errors: sizes that fit no tokenizer.
    pub fn check(&self) -> Result<()> {
        self.semantic.check()?;
        self.semantic_decoder.check(&self.semantic)?;
        self.encoder.check()?;
        self.decoder.check()?;
        let CodebookConfig { size, semantic_dim, pixel_dim, .. } = self.codebook;
        let sizes = [("codebook size", size), ("semantic_dim", semantic_dim), ("pixel_dim", pixel_dim)];
        check_sizes(sizes).map_err(candle_core::Error::Msg)?;
        let (grid, pixels) = (self.encoder.stride(), self.decoder.stride());
        if grid != pixels || self.image_size == Some(0) {
            bail!("a tokenizer needs codes, and one stride: its encoder's is {grid}, its decoder's {pixels}");
        }
        if self.image_size > Some(MAX_SIDE) {
            bail!("an image_size above {MAX_SIDE}");
        }
        Ok(())
    }

    /// Pixels per code along each side: the semantic encoder's patch where the output is resized,
    /// else the pixel decoder's cell. The branch with another cell gets the resized image.
    pub fn cell(&self) -> usize {
        if self.image_size.is_some() { self.semantic.patch_size } else { self.decoder.stride() }
    }

    /// Channels of the semantic features that are decoded from codes.
    pub fn semantic_features(&self) -> usize {
        self.semantic_decoder.out_dim.unwrap_or(self.semantic.hidden_size)
    }

    /// The grid of an image of (height, width).
    ///
    /// Errors: an image that is smaller than a code.
    pub fn grid(&self, (height, width): (usize, usize)) -> Result<(usize, usize)> {
        let cell = self.cell();
        match (height / cell, width / cell) {
            (0, _) | (_, 0) => bail!("an image of {height}x{width} has no code of {cell} pixels"),
            grid => Ok(grid),
        }
    }
}

/// A loaded TokenFlow tokenizer: encoder and decoder. To draw, [`ImageDecoder`] is enough.
#[derive(Debug)]
pub struct ImageTokenizer {
    semantic: SemanticEncoder,
    encode_task: (Linear, Linear),
    encoder: cnn::Encoder,
    quant_conv: Conv,
    images: TableDecoder,
    features: SemanticFeatures,
    config: TokenizerConfig,
}

impl ImageTokenizer {
    /// TokenFlow's public keys: `encoder_vqkd`, `encode_task_layer`, `encoder`, `quant_conv`,
    /// `quantize`, `post_quant_conv`, `decoder`, `decoder_vqkd`, `decode_task_layer`.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`TokenizerConfig::check`] refuses.
    pub fn load(w: &Weights, config: &TokenizerConfig) -> Result<Self> {
        config.check()?;
        let (d, codes) = (config.semantic.hidden_size, &config.codebook);
        let semantic = w.pp("encoder_vqkd");
        let semantic = match config.semantic.layout {
            VitLayout::Clip => semantic,
            VitLayout::Siglip | VitLayout::Naflex => semantic.pp("vision_model"),
        };
        // Statistics and a loss's constants, left over from training.
        let unused = w.unused();
        unused.pp("quantize").get(4 * codes.size, "codebook_used", Init::Zeros)?;
        if config.semantic.layout == VitLayout::Siglip {
            unused.pp("scaling_layer").get((1, 3, 1, 1), "shift", Init::Zeros)?;
            unused.pp("scaling_layer").get((1, 3, 1, 1), "scale", Init::Ones)?;
        }
        Ok(Self {
            semantic: SemanticEncoder::load(&semantic, &config.semantic)?,
            encode_task: task(&w.pp("encode_task_layer"), d, codes.semantic_dim)?,
            encoder: cnn::Encoder::load(&w.pp("encoder"), &config.encoder)?,
            quant_conv: Conv::load(&w.pp("quant_conv"), config.encoder.z_channels, codes.pixel_dim, 1)?,
            images: TableDecoder::load(w, config)?,
            features: SemanticFeatures::load(w, config)?,
            config: config.clone(),
        })
    }

    /// Shape.
    pub fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// Codebook and quantiser.
    pub fn quantizer(&self) -> &Quantizer {
        self.images.quantizer()
    }

    /// The semantic encoder.
    pub fn semantic(&self) -> &SemanticEncoder {
        &self.semantic
    }

    /// Semantic half before quantisation: encoder tokens (B, n, D) on `grid` ->
    /// (B, h, w, semantic_dim).
    pub fn semantic_half(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        let x = self.encode_task.1.forward(&self.encode_task.0.forward(tokens)?.tanh()?)?;
        x.reshape((tokens.dim(0)?, grid.0, grid.1, self.config.codebook.semantic_dim))
    }

    /// Pixel half before quantisation: (B, 3, H, W) -> (B, h, w, pixel_dim).
    pub fn pixel_half(&self, image: &Tensor) -> Result<Tensor> {
        let image = self.seen_by(self.config.encoder.stride(), image)?;
        self.quant_conv.forward(&self.encoder.forward(&image)?)?.permute((0, 2, 3, 1))?.contiguous()
    }

    /// The image as a branch sees it that has `cell` pixels for a code: resized if others have more
    /// or fewer, so that grids agree.
    fn seen_by(&self, cell: usize, image: &Tensor) -> Result<Tensor> {
        if cell == self.config.cell() {
            return Ok(image.clone());
        }
        let size = (image.dim(2)?, image.dim(3)?);
        let (h, w) = self.config.grid(size)?;
        GridResampling::bicubic(size, (h * cell, w * cell)).channels_first(image)
    }

    /// The features to quantise: (B, 3, H, W) in [-1, 1] -> (B, h, w, D), semantic channels first.
    pub fn features(&self, image: &Tensor) -> Result<Tensor> {
        let pixel = self.pixel_half(image)?;
        let (_, h, w, _) = pixel.dims4()?;
        let tokens = self.semantic.forward(&self.seen_by(self.config.semantic.patch_size, image)?)?;
        Tensor::cat(&[self.semantic_half(&tokens, (h, w))?, pixel], 3)
    }

    /// Codes of every image of a batch (B, 3, H, W), whose grid must be that of the last of
    /// `scales`.
    ///
    /// Errors: another grid, and [`crate::error::Kind::NonFinite`] for features that are not
    /// finite.
    pub fn encode(&self, image: &Tensor, scales: &[(usize, usize)]) -> crate::error::Result<Vec<Encoded>> {
        let f = self.features(image)?;
        let (_, h, w, d) = f.dims4()?;
        if scales.last() != Some(&(h, w)) {
            let message = format!("an image with a {h}x{w} grid does not fit the scales {scales:?}");
            return Err(candle_core::Error::Msg(message).into());
        }
        let f = f.flatten_all()?.to_vec1::<f32>()?;
        if !f.iter().all(|v| v.is_finite()) {
            return Err(Error::non_finite("features"));
        }
        Ok(f.chunks_exact(h * w * d).map(|f| self.quantizer().encode(f, scales, None, |_, _, _| {})).collect())
    }

    /// As [`ImageDecoder::decode`].
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<Tensor> {
        self.images.decode(codes, scales)
    }

    /// As [`ImageDecoder::decode_image`].
    pub fn decode_image(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> crate::error::Result<RgbImage> {
        self.images.decode_image(codes, scales)
    }

    /// As [`TableDecoder::decode_features`].
    pub fn decode_features(&self, f: &Tensor) -> Result<Tensor> {
        self.images.decode_features(f)
    }

    /// As [`SemanticFeatures::decode`].
    pub fn decode_semantic(&self, f: &Tensor) -> Result<Tensor> {
        self.features.decode(f)
    }
}

/// What decodes the semantic half of codes.
#[derive(Debug)]
pub struct SemanticFeatures {
    decoder: SemanticDecoder,
    task: (Linear, Linear),
    channels: usize,
}

impl SemanticFeatures {
    /// TokenFlow's keys `decoder_vqkd` and `decode_task_layer`.
    ///
    /// Errors: tensors that are missing or misshapen.
    pub fn load(w: &Weights, config: &TokenizerConfig) -> Result<Self> {
        let (d, channels) = (config.semantic.hidden_size, config.codebook.semantic_dim);
        let decoder = &w.pp("decoder_vqkd");
        Ok(Self {
            decoder: SemanticDecoder::load(decoder, &config.semantic, &config.semantic_decoder, channels)?,
            task: task(&w.pp("decode_task_layer"), d, config.semantic_features())?,
            channels,
        })
    }

    /// The semantic encoder's features as the codes hold them: F (B, h, w, D) ->
    /// (B, h * w, out_dim).
    pub fn decode(&self, f: &Tensor) -> Result<Tensor> {
        let x = self.decoder.forward(&f.narrow(3, 0, self.channels)?.contiguous()?)?;
        self.task.1.forward(&self.task.0.forward(&x)?.tanh()?)
    }
}

/// The two layers that lead into the codes' semantic half, or out of it.
fn task(w: &Weights, width: usize, to: usize) -> Result<(Linear, Linear)> {
    Ok((Linear::load_dense(&w.pp(0), width, width)?, Linear::load_dense(&w.pp(2), width, to)?))
}
