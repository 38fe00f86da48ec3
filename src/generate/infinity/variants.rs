//! The released models: their files on the hub, and the settings that their authors draw with.

use crate::infinity::InfinityConfig;
use crate::infinity::presets::{INFINITY_2B, INFINITY_8B, INFINITY_125M};

/// Where the transformers and image tokenizers are on the hub.
pub const HUB: &str = "FoundationVision/Infinity";
/// Where their text encoder is.
pub const TEXT_HUB: &str = "google/flan-t5-xl";
/// Bytes of the text encoder's files that are needed, about: the shard with the encoder.
const TEXT_BYTES: u64 = 9_450_000_000;

/// One released model.
#[derive(Debug)]
pub struct Variant {
    /// How a user names it: `FoundationVision/Infinity:2b`.
    pub name: &'static str,
    /// How it is called in full.
    pub title: &'static str,
    /// The transformer's file, or the name that its shards share.
    pub transformer: &'static str,
    /// The only image tokenizer that it was trained with.
    pub tokenizer: &'static str,
    /// Shape of the transformer.
    pub shape: InfinityConfig,
    /// Scales of an image of the size that it was trained for.
    pub level: usize,
    /// Guidance.
    pub cfg: f64,
    /// Temperature.
    pub temperature: f64,
    /// Bytes of the transformer's files on the hub.
    pub bytes: u64,
    /// Bytes of the tokenizer's file.
    pub tokenizer_bytes: u64,
}

/// All of them, small ones first.
pub static VARIANTS: [Variant; 4] = [
    Variant {
        name: "125m",
        title: "Infinity-125M",
        transformer: "infinity_125M_256x256.pth",
        tokenizer: "infinity_vae_d16.pth",
        shape: INFINITY_125M,
        level: 7,
        // The authors name none for it; these are what its users draw with.
        cfg: 3.0,
        temperature: 0.5,
        bytes: 501_000_000,
        tokenizer_bytes: 1_560_000_000,
    },
    Variant {
        name: "2b",
        title: "Infinity-2B",
        transformer: "infinity_2b_reg.pth",
        tokenizer: "infinity_vae_d32reg.pth",
        shape: INFINITY_2B,
        level: 13,
        cfg: 4.0,
        temperature: 0.5,
        bytes: 8_820_000_000,
        tokenizer_bytes: 1_560_000_000,
    },
    Variant {
        name: "8b",
        title: "Infinity-8B",
        transformer: "infinity_8b_weights/model.safetensors",
        tokenizer: "infinity_vae_d56_f8_14_patchify.pth",
        shape: INFINITY_8B,
        level: 13,
        cfg: 3.0,
        temperature: 1.0,
        bytes: 33_500_000_000,
        tokenizer_bytes: 1_220_000_000,
    },
    Variant {
        name: "8b-512",
        title: "Infinity-8B-512",
        transformer: "infinity_8b_512x512_weights/model.safetensors",
        tokenizer: "infinity_vae_d56_f8_14_patchify.pth",
        shape: INFINITY_8B,
        level: 10,
        cfg: 3.0,
        temperature: 1.0,
        bytes: 33_500_000_000,
        tokenizer_bytes: 1_220_000_000,
    },
];

impl Variant {
    /// The one that a user names, in upper or lower case.
    pub fn named(name: &str) -> Option<&'static Self> {
        VARIANTS.iter().find(|variant| variant.name.eq_ignore_ascii_case(name))
    }

    /// Whether a transformer of this shape may be it.
    pub fn fits(&self, shape: &InfinityConfig) -> bool {
        *shape == InfinityConfig { heads_first: shape.heads_first, ..self.shape.clone() }
    }

    /// The one of a shape; of the two with one shape, that for 1024 pixels.
    pub fn of_shape(shape: &InfinityConfig) -> Option<&'static Self> {
        VARIANTS.iter().find(|variant| variant.fits(shape))
    }

    /// Its download size, for people.
    pub fn sizes(&self) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let all = self.bytes + self.tokenizer_bytes + TEXT_BYTES;
        format!(
            "{} for {} px: {:.1} GB in all: transformer {:.1}, image tokenizer {:.1}, text encoder {:.1}",
            self.title,
            [256, 512, 768, 1024][super::LEVELS.iter().position(|&level| level == self.level).unwrap_or(3)],
            gb(all),
            gb(self.bytes),
            gb(self.tokenizer_bytes),
            gb(TEXT_BYTES)
        )
    }
}
