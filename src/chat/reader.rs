//! The networks of a conversation, of every family.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::backbone::{Backbone, Cache, Context, Position, Rope, Step};
use crate::checkpoint::Weights;
use crate::onecat::{OneCatConfig, Reading, ReadingParts, Trunk};
use crate::vision::VisionTower;

/// A transformer with its image encoder, if it has one.
#[derive(Debug)]
pub enum Reader {
    /// NextFlow's transformer, or Qwen2.5-VL's with its image encoder.
    Backbone(Box<Backbone>, Option<Box<VisionTower>>),
    /// OneCAT's parts that read and answer.
    OneCat(Box<Trunk>, Box<Reading>),
}

impl Reader {
    /// Loads OneCAT's.
    pub(super) fn load_onecat(w: &Weights, config: &OneCatConfig) -> Result<Self> {
        let parts = ReadingParts { pictures: true, head: true };
        Ok(Self::OneCat(Box::new(Trunk::load(w, config)?), Box::new(Reading::load(w, config, parts)?)))
    }

    /// The transformer of NextFlow or Qwen2.5-VL.
    ///
    /// Errors: another family.
    pub fn backbone(&self) -> Result<&Backbone> {
        match self {
            Self::Backbone(backbone, _) => Ok(backbone),
            Self::OneCat(..) => bail!("OneCAT reads no codes"),
        }
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        match self {
            Self::Backbone(backbone, _) => backbone.device(),
            Self::OneCat(trunk, _) => trunk.device(),
        }
    }

    /// Type of the activations.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Backbone(backbone, _) => backbone.dtype(),
            Self::OneCat(trunk, _) => trunk.dtype(),
        }
    }

    /// A cache for a row, with room for `capacity` tokens.
    pub fn cache(&self, capacity: usize) -> Result<Cache> {
        match self {
            Self::Backbone(backbone, _) => Cache::new(backbone.config(), capacity, backbone.dtype(), backbone.device()),
            Self::OneCat(trunk, _) => trunk.cache(capacity),
        }
    }

    /// Embeddings of ids (1, T) u32: (1, T, hidden).
    pub fn embed_text(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Backbone(backbone, _) => backbone.embed_text(ids),
            Self::OneCat(_, reading) => reading.embed(ids),
        }
    }

    /// Hidden states (1, T, hidden) of tokens x (1, T, hidden) at `positions`, behind those in the
    /// cache. The position of OneCAT's tokens is their index; `positions` is not used.
    pub fn read(&self, x: &Tensor, positions: &[Position], cache: &mut Cache, step: Step) -> Result<Tensor> {
        match self {
            Self::Backbone(backbone, _) => {
                let rope = Rope::new(backbone.config(), &[positions], backbone.device())?;
                backbone.forward(x, &rope, Context::Cached { caches: std::slice::from_mut(cache), step })
            }
            Self::OneCat(trunk, reading) => reading.read(trunk, x, cache, step == Step::Scale, false),
        }
    }

    /// Logits of text tokens and, with markers, of `<boi>`, for hidden states (..., hidden).
    pub fn text_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Self::Backbone(backbone, _) => backbone.text_logits(hidden),
            Self::OneCat(_, reading) => reading.logits(hidden),
        }
    }
}
