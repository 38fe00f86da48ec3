//! Shape of the transformer. No public file states it: it is read from the shapes of the tensors.

use crate::checkpoint::Inventory;
use crate::error::{Error, Result};
use crate::nn::MAX_LAYERS;
use crate::tokenizer::Code;

/// Shape of an Infinity transformer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfinityConfig {
    /// Blocks.
    pub depth: usize,
    /// Blocks under one name of `block_chunks`; the keys count them so.
    pub chunk: usize,
    /// Width of the residual stream, C.
    pub width: usize,
    /// Heads of self- and cross-attention.
    pub heads: usize,
    /// Width of the MLP.
    pub mlp: usize,
    /// Channels of the text encoder's features.
    pub text_width: usize,
    /// Heads that pool the text.
    pub text_heads: usize,
    /// Rows of the learned text of unconditional rows: the most tokens of a prompt.
    pub max_tokens: usize,
    /// Rows of the level embedding: the most scales.
    pub levels: usize,
    /// Bits of a token.
    pub bits: usize,
    /// Heads come before rows in the shape of `scale_mul_1H11`, as in the released files.
    pub heads_first: bool,
}

/// The most bits of a token that fit a code.
const MAX_BITS: usize = Code::BITS as usize;
/// A key that every transformer of this family has, and no other model.
const MARK: &str = "text_proj_for_sos.ca.mat_q";
/// More heads, or scales, than any transformer has.
const MOST: usize = 1 << 16;

impl InfinityConfig {
    /// Whether the weights are of this family.
    pub fn is(weights: &Inventory) -> bool {
        weights.has(MARK)
    }

    /// The shape of the transformer whose `weights` are called `name`.
    ///
    /// Errors: [`crate::error::Kind::Model`] for tensors that are missing, or of shapes that fit no
    /// transformer.
    pub fn of(weights: &Inventory, name: &str) -> Result<Self> {
        let bad = |what: String| {
            Error::model(format!("{name} is no transformer of Infinity: {what}"))
                .hint("nextflow info FILE shows its content; --model FOLDER with infinity_2b_reg.pth in it")
        };
        let shape = |key: &str| weights.shape(key).ok_or_else(|| bad(format!("{key} is missing")));
        let two = |key: &str| match shape(key)? {
            &[rows, columns] => Ok((rows, columns)),
            other => Err(bad(format!("{key} has the shape {other:?}"))),
        };
        let mut depth = 0;
        let (mut chunks, mut chunk) = (0, 0);
        while weights.has(&key_of(chunks, 0)) && chunks < MAX_LAYERS {
            let blocks = (0..MAX_LAYERS).take_while(|&i| weights.has(&key_of(chunks, i))).count();
            chunk = if chunks == 0 { blocks } else { chunk };
            if blocks != chunk {
                return Err(bad(format!("block_chunks.{chunks} holds {blocks} blocks, others {chunk}")));
            }
            (chunks, depth) = (chunks + 1, depth + blocks);
        }
        if depth == 0 {
            return Err(bad(format!("{} is missing", key_of(0, 0))));
        }
        let (width, bits) = two("word_embed.weight")?;
        let scales = "block_chunks.0.module.0.sa.scale_mul_1H11";
        let (heads, heads_first) = match shape(scales)? {
            &[1, heads, 1, 1] => (heads, true),
            &[1, 1, heads, 1] => (heads, false),
            other => return Err(bad(format!("{scales} has the shape {other:?}"))),
        };
        let text_heads = match shape(MARK)? {
            &[1, heads, _] => heads,
            other => return Err(bad(format!("{MARK} has the shape {other:?}"))),
        };
        let (max_tokens, text_width) = two("cfg_uncond")?;
        let config = Self {
            depth,
            chunk,
            width,
            heads,
            mlp: two("block_chunks.0.module.0.ffn.fc1.weight")?.0,
            text_width,
            text_heads,
            max_tokens,
            levels: two("lvl_embed.weight")?.0,
            bits,
            heads_first,
        };
        config.check().map_err(bad)?;
        Ok(config)
    }

    /// Errors: a value that would make the transformer panic, as one sentence.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Self { width, heads, text_heads, .. } = *self;
        let counts = [self.depth, self.chunk, heads, text_heads, self.max_tokens, self.levels, self.mlp, self.bits];
        if !counts.iter().all(|n| (1..=MOST).contains(n)) || !(1..=MOST).contains(&self.text_width) {
            return Err("its sizes are those of no transformer".into());
        }
        if width == 0 || width % heads != 0 || width % text_heads != 0 || !self.head_dim().is_multiple_of(4) {
            return Err(format!("{heads} heads and {text_heads} of the text do not divide a width of {width}"));
        }
        if self.bits > MAX_BITS {
            return Err(format!("{} bits a token are more than {}", self.bits, MAX_BITS));
        }
        Ok(())
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// Where the tensors of a block are.
    pub(super) fn block_key(&self, block: usize) -> String {
        format!("block_chunks.{}.module.{}", block / self.chunk, block % self.chunk)
    }
}

/// The first tensor of a block.
fn key_of(chunk: usize, block: usize) -> String {
    format!("block_chunks.{chunk}.module.{block}.ada_gss")
}

/// The released shapes.
pub mod presets {
    use super::InfinityConfig;

    /// Infinity-2B.
    pub const INFINITY_2B: InfinityConfig = InfinityConfig {
        depth: 32,
        chunk: 4,
        width: 2048,
        heads: 16,
        mlp: 8192,
        text_width: 2048,
        text_heads: 16,
        max_tokens: 512,
        levels: 15,
        bits: 32,
        heads_first: true,
    };

    /// Infinity-125M.
    pub const INFINITY_125M: InfinityConfig =
        InfinityConfig { depth: 12, chunk: 3, width: 768, heads: 8, mlp: 3072, bits: 16, ..INFINITY_2B };

    /// Infinity-8B, for 1024 pixels or for 512.
    pub const INFINITY_8B: InfinityConfig =
        InfinityConfig { depth: 40, chunk: 5, width: 3584, heads: 28, mlp: 14_336, bits: 56, ..INFINITY_2B };
}
