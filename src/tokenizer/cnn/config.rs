//! Shape of the pixel branch.

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

use super::super::vit::is_default;
use crate::checkpoint::Weights;

/// Channels of any level, and pixels for a code along a side, are no more.
const MAX_CHANNELS: usize = 1 << 20;
const MAX_STRIDE: usize = 1 << 10;

/// Shape of one convolutional half.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CnnConfig {
    /// Channels of the level with the most pixels.
    pub ch: usize,
    /// Multiple of `ch` at each level; every level but the last halves the grid.
    pub ch_mult: Vec<usize>,
    /// Residual blocks a level (the decoder has one more).
    pub num_res_blocks: usize,
    /// Channels between this half and its 1x1 quantisation convolution or, without one, those of a
    /// code.
    pub z_channels: usize,
    /// Groups of every group norm.
    pub groups: usize,
    /// Pixels are folded into channels by patches of this side first
    /// (1: plain pixels, as TokenFlow).
    pub patch: usize,
    /// Whose keys, and whether there is attention.
    #[serde(default, skip_serializing_if = "is_default")]
    pub layout: CnnLayout,
}

impl CnnConfig {
    /// Errors: no levels, more than any image has pixels for, no patches, or channels that groups
    /// do not divide.
    pub(in crate::tokenizer) fn check(&self) -> Result<()> {
        if self.ch_mult.is_empty() || self.ch_mult.len() > 16 || self.patch == 0 || self.patch > MAX_STRIDE {
            bail!("a pixel branch needs 1 to 16 levels and a patch: {:?}, {}", self.ch_mult, self.patch);
        }
        let channels = |mult: &usize| self.ch.checked_mul(*mult).filter(|n| (1..=MAX_CHANNELS).contains(n));
        if !(1..=MAX_CHANNELS).contains(&self.z_channels) || self.stride() > MAX_STRIDE {
            let (z, stride) = (self.z_channels, self.stride());
            bail!("{z} z_channels are not 1 to {MAX_CHANNELS}, or {stride} pixels for a code above {MAX_STRIDE}");
        }
        let split = |mult: &usize| channels(mult).is_some_and(|n| n.is_multiple_of(self.groups));
        if self.groups == 0 || self.num_res_blocks > 100 || !self.ch_mult.iter().all(split) {
            bail!("{} groups do not divide {} channels times {:?}", self.groups, self.ch, self.ch_mult);
        }
        Ok(())
    }

    /// Pixels per code along each axis.
    pub fn stride(&self) -> usize {
        self.patch << (self.ch_mult.len() - 1)
    }
}

/// Whose keys a pixel branch follows, and whether it attends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CnnLayout {
    /// TokenFlow: `conv_blocks.N.{res,attn}.B`, numbered as they run; attention at the level with
    /// the fewest pixels.
    #[default]
    Tokenflow,
    /// Infinity: `down.N.block.B` and `up.N.block.B`, both numbered from the level with the most
    /// pixels, and one more part in the key of every convolution (`.conv`) and norm (`.norm`); no
    /// attention.
    Infinity,
    /// Infinity without that part.
    InfinityPlain,
}

impl CnnLayout {
    pub(super) fn conv(self, w: &Weights) -> Weights {
        if self == Self::Infinity { w.pp("conv") } else { w.clone() }
    }

    pub(super) fn norm(self, w: &Weights) -> Weights {
        if self == Self::Infinity { w.pp("norm") } else { w.clone() }
    }

    /// The key of the weight of a convolution.
    pub(in crate::tokenizer) fn weight(self, conv: &str) -> String {
        if self == Self::Infinity { format!("{conv}.conv.weight") } else { format!("{conv}.weight") }
    }

    pub(super) fn attends(self) -> bool {
        self == Self::Tokenflow
    }
}
