//! T5's encoder, with which Infinity reads prompts: the network is candle-transformers', its
//! weights come from our checked files.

mod config;
mod network;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::t5::Config;

pub use config::{flan_t5_xl, read_config};
pub use network::{Encoder, ask, blocks, dtype, is_small};

use crate::checkpoint::{Matrices, Source, WeightType, Weights};
use crate::error::{Error, Result};
use crate::text::Text;
use network::{ask_for_blocks, plain};

/// The file of the encoder's weights in a model folder.
pub const TEXT_ENCODER: &str = "text_encoder/model.safetensors";
/// The file of its shape.
pub const TEXT_CONFIG: &str = "text_encoder/config.json";
/// The file of its text tokenizer.
pub const TEXT_WORDS: &str = "text_encoder/tokenizer.json";

/// The most tokens of a prompt, `</s>` among them: the rest is cut off, as the reference does.
pub const MAX_TOKENS: usize = 512;

/// A loaded encoder with its text tokenizer. It is needed before drawing, and can be dropped then.
#[derive(Debug)]
pub struct TextEncoder {
    tokenizer: TextTokenizer,
    encoder: Encoder,
}

/// The text tokenizer.
#[derive(Debug)]
struct TextTokenizer {
    text: Text,
    /// `</s>`.
    end: u32,
}

impl TextTokenizer {
    fn read(source: &Source, config: &Config) -> Result<Self> {
        let text = Text::from_unigram(&source.bytes(TEXT_WORDS)?)
            .map_err(|e| Error { message: format!("{} (of {source})", e.message), ..e })?;
        match text.vocab_size() {
            more if more > config.vocab_size => {
                let message = format!("{TEXT_WORDS} of {source} has {more} tokens, the encoder {}", config.vocab_size);
                Err(Error::model(message).hint("copy tokenizer.json and config.json of google/flan-t5-xl again"))
            }
            _ => Ok(Self { text, end: config.eos_token_id as u32 }),
        }
    }

    /// The ids of a prompt and `</s>`, at most [`MAX_TOKENS`].
    fn ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = self.text.encode(prompt)?;
        ids.truncate(MAX_TOKENS - 1);
        ids.push(self.end);
        Ok(ids)
    }
}

impl TextEncoder {
    /// Checks that [`TextEncoder::load`] can load the files, by text tokenizer and headers.
    ///
    /// Errors: those of [`TextEncoder::load`].
    pub fn check(source: &Source) -> Result<()> {
        let config = read_config(source)?;
        TextTokenizer::read(source, &config)?;
        match source.is_gguf(TEXT_ENCODER) {
            true => source.check(TEXT_ENCODER, |w| ask_for_blocks(w, &config)),
            false => source.check(TEXT_ENCODER, |w| plain(w, &config).map(drop)),
        }
    }

    /// The text tokenizer of the encoder at `source`.
    ///
    /// Errors: files that are missing or broken.
    pub fn text(source: &Source) -> Result<Text> {
        Ok(TextTokenizer::read(source, &read_config(source)?)?.text)
    }

    /// Vocabulary of the encoder at `source`.
    ///
    /// Errors: files that are missing or broken.
    pub fn vocab_size(source: &Source) -> Result<usize> {
        Ok(TextTokenizer::read(source, &read_config(source)?)?.text.vocab_size())
    }

    /// Loads the encoder and its text tokenizer onto `device`, with matrices in f32 or as
    /// `weights`; a GGUF file keeps its types. Activations are f32 in any case.
    ///
    /// Errors: files that are missing, broken, or do not fit.
    pub fn load(source: &Source, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let config = read_config(source)?;
        let tokenizer = TextTokenizer::read(source, &config)?;
        Ok(Self { tokenizer, encoder: Encoder::load(source, &config, device, weights)? })
    }

    /// Features of a prompt, (tokens, d_model) in f32: one for every token, and for `</s>`.
    pub fn encode(&mut self, prompt: &str) -> Result<Tensor> {
        Ok(self.encoder.forward(&self.tokenizer.ids(prompt)?)?)
    }
}

/// Memory of encoding a prompt of `tokens` tokens, with weights as [`TextEncoder::load`] loads them,
/// in bytes; `gguf` is the size of the weights in a GGUF file.
pub fn memory(config: &Config, weights: Option<WeightType>, gguf: Option<u64>, tokens: usize) -> Result<u64> {
    let requested = Weights::inventory();
    plain(&requested, config)?;
    let (inner, f32s) = (config.num_heads * config.d_kv, 4);
    let table = (config.vocab_size * config.d_model * f32s) as u64;
    let kept = match (gguf, weights.and_then(WeightType::blocks).filter(|_| weights.is_some_and(is_small))) {
        (Some(bytes), _) => bytes + table,
        // The file in memory, and the tensors made of it.
        (None, Some(blocks)) => 2 * requested.bytes(DType::F32, Matrices::Blocks(blocks)) + table,
        (None, None) => {
            // Of 16 bits, every matrix becomes f32 when it is needed.
            let at_once = if dtype(weights) == DType::F32 { 0 } else { 2 * config.d_ff * config.d_model * f32s };
            requested.bytes(dtype(weights), Matrices::Tensors) + at_once as u64
        }
    };
    let block = tokens * (3 * config.d_ff + 4 * inner + 4 * config.d_model) + 4 * config.num_heads * tokens * tokens;
    Ok(kept + (block * f32s) as u64)
}

#[cfg(test)]
mod tests;
