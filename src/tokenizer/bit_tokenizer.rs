//! Infinity's image tokenizer, a convolutional autoencoder whose codes are bits: its shape, and the
//! half that encodes.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::cnn::Encoder;
use super::{BitConfig, BitQuantizer, CnnConfig, CnnLayout, Code};
use crate::checkpoint::{Init, Inventory, Weights};
use crate::error::Error;

/// Pixels per token along each side in every public tokenizer: a stride of 8 means tokens of 2x2
/// cells.
const TOKEN: usize = 16;
/// Groups of every group norm.
const GROUPS: usize = 32;

/// Shape of a whole tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BitTokenizerConfig {
    /// Pixel encoder.
    pub encoder: CnnConfig,
    /// Pixel decoder.
    pub decoder: CnnConfig,
    /// Codes.
    pub bits: BitConfig,
}

impl BitTokenizerConfig {
    /// Errors: sizes that fit no tokenizer.
    pub fn check(&self) -> Result<()> {
        let Self { encoder, decoder, bits } = self;
        encoder.check()?;
        decoder.check()?;
        bits.check()?;
        if encoder.stride() != decoder.stride() {
            bail!(
                "a tokenizer needs one stride: its encoder's is {}, its decoder's {}",
                encoder.stride(),
                decoder.stride()
            );
        }
        if [encoder, decoder].iter().any(|half| half.z_channels != bits.dim) {
            bail!("{} bits need as many channels: {}, {}", bits.dim, encoder.z_channels, decoder.z_channels);
        }
        Ok(())
    }

    /// Pixels of a token along each side.
    pub fn cell(&self) -> usize {
        self.decoder.stride() * self.bits.patch
    }

    /// Derives the config from keys and shapes; `None` if the weights are those of another model.
    /// Group count and patch are in no shape: both are those of the public tokenizers.
    pub fn of_weights(files: &Inventory) -> Option<Self> {
        let layout = [CnnLayout::Infinity, CnnLayout::InfinityPlain]
            .into_iter()
            .find(|layout| files.has(&layout.weight("decoder.up.0.block.0.conv1")))?;
        // Stable Diffusion's autoencoder and its kin have the same keys, and more.
        let attends = ["encoder", "decoder"].iter().any(|half| files.has(&format!("{half}.mid.attn_1.q.weight")));
        let encoder = half(files, layout, "encoder.down")?;
        let decoder = half(files, layout, "decoder.up")?;
        let input = files.shape(&layout.weight("encoder.conv_in"))?.first().copied()?;
        if attends || input != encoder.ch || encoder.z_channels != decoder.z_channels {
            return None;
        }
        let decoder = CnnConfig { num_res_blocks: decoder.num_res_blocks.checked_sub(1)?, ..decoder };
        let patch = if TOKEN.is_multiple_of(decoder.stride()) { TOKEN / decoder.stride() } else { 1 };
        let bits = BitConfig { dim: decoder.z_channels, patch };
        Some(Self { encoder, decoder, bits }).filter(|config| config.check().is_ok())
    }
}

/// Shape of the half whose levels are under `levels`; `num_res_blocks` counts all blocks of a
/// level.
fn half(files: &Inventory, layout: CnnLayout, levels: &str) -> Option<CnnConfig> {
    let shape = |key: String| files.shape(&layout.weight(&key));
    let width = |level: usize| shape(format!("{levels}.{level}.block.0.conv1"))?.first().copied();
    let widths: Vec<usize> = (0..).map_while(width).collect();
    let ch = *widths.first().filter(|&&ch| ch > 0)?;
    let (name, end) = levels.split_once('.')?;
    let z_channels = match end {
        "down" => *shape(format!("{name}.conv_out"))?.first()?,
        _ => *shape(format!("{name}.conv_in"))?.get(1)?,
    };
    if widths.len() > 16 || widths.iter().any(|width| width % ch != 0) {
        return None;
    }
    Some(CnnConfig {
        ch,
        ch_mult: widths.iter().map(|width| width / ch).collect(),
        num_res_blocks: (0..).take_while(|b| files.has(&layout.weight(&format!("{levels}.0.block.{b}.conv1")))).count(),
        z_channels,
        groups: GROUPS,
        patch: 1,
        layout,
    })
}

/// Pixels to codes.
#[derive(Debug)]
pub struct BitEncoder {
    encoder: Encoder,
    quantizer: BitQuantizer,
    cell: usize,
}

impl BitEncoder {
    /// The keys `encoder` of Infinity; what else there is is not read.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`BitTokenizerConfig::check`]
    /// refuses.
    pub fn load(w: &Weights, config: &BitTokenizerConfig) -> Result<Self> {
        config.check()?;
        // Powers of two for integer labels, stored twice.
        for name in ["quantize.lfq", "quantizer.lfq"] {
            w.unused().pp(name).get(config.bits.dim, "mask", Init::Zeros)?;
        }
        Ok(Self {
            encoder: Encoder::load(&w.pp("encoder"), &config.encoder)?,
            quantizer: BitQuantizer::new(config.bits, w.device())?,
            cell: config.cell(),
        })
    }

    /// The quantiser.
    pub fn quantizer(&self) -> &BitQuantizer {
        &self.quantizer
    }

    /// The features to quantise: (B, 3, H, W) in [-1, 1] -> (B, h, w, dim), where h and w count
    /// cells, not tokens.
    pub fn features(&self, image: &Tensor) -> Result<Tensor> {
        self.encoder.forward(image)?.permute((0, 2, 3, 1))?.contiguous()
    }

    /// Codes of every image of a batch (B, 3, H, W), whose token grid must be the last of `scales`.
    ///
    /// Errors: another grid, and [`crate::error::Kind::NonFinite`] for features that are not
    /// finite.
    pub fn encode(&self, image: &Tensor, scales: &[(usize, usize)]) -> crate::error::Result<Vec<Vec<Vec<Code>>>> {
        let (cell, (_, _, height, width)) = (self.cell, image.dims4()?);
        if scales.last().map(|(h, w)| (h * cell, w * cell)) != Some((height, width)) {
            let message = format!("an image of {height}x{width} does not fit the scales {scales:?}");
            return Err(candle_core::Error::Msg(message).into());
        }
        let f = self.features(image)?.flatten_from(1)?.to_vec2::<f32>()?;
        if !f.iter().flatten().all(|v| v.is_finite()) {
            return Err(Error::non_finite("features"));
        }
        Ok(f.iter().map(|f| self.quantizer.encode(f, scales, |_, _| {})).collect())
    }
}
