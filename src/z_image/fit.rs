//! Whether a Z-Image can be loaded, and the memory that it takes: its networks against inventories.

use candle_core::{DType, Device};

use super::config::{CELL, DTYPE, MAX_TOKENS, PATCH, TRANSFORMER, ZImageConfig};
use super::text::TextEncoder;
use super::transformer::{ROUND, Transformer};
use super::vae::Vae;
use crate::checkpoint::{Matrices, Source, Weights};
use crate::error::Result;

/// Bytes that refining takes, the program aside.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Memory {
    /// Encoding the prompts; dropped before the other networks are loaded.
    pub text: u64,
    /// Weights of the transformer and of the autoencoder, and the most that a pass of either takes.
    pub refining: u64,
}

impl ZImageConfig {
    /// Checks that everything can be loaded, by the text tokenizer and the headers of the weights.
    ///
    /// Errors: those of loading.
    pub fn check(&self, source: &Source) -> Result<()> {
        TextEncoder::check(source, self)?;
        source.check(TRANSFORMER, |w| Transformer::load(w, &self.transformer))?;
        Vae::check(source, self)
    }

    /// Memory of refining a picture of (width, height) pixels, by a prompt of `text_tokens` tokens.
    pub fn memory(&self, (width, height): (u32, u32), text_tokens: usize, device: &Device) -> Result<Memory> {
        let bytes = DTYPE.size_in_bytes();
        let [text, transformer, vae] = [(); 3].map(|()| Weights::inventory());
        TextEncoder::network(&text, &self.text, false)?;
        Transformer::load(&transformer, &self.transformer)?;
        Vae::load(&vae, &self.vae)?;
        // On a CPU products of bf16 are computed in f32: copies of both factors and of the result.
        let scores = if device.is_cpu() { 2 * bytes + 4 } else { 2 * bytes };
        let product = |rows: usize, columns: usize| if device.is_cpu() { 4 * rows * columns } else { 0 };
        let text_tokens = text_tokens.min(MAX_TOKENS);
        let t = &self.text;
        let reading = text_tokens * text_tokens * t.num_attention_heads * scores
            + text_tokens * (3 * t.intermediate_size + 8 * t.hidden_size) * bytes
            + product(t.intermediate_size, t.hidden_size);
        let pixels = width as usize * height as usize;
        let tokens = pixels / (CELL * PATCH).pow(2) + text_tokens.next_multiple_of(ROUND);
        let c = &self.transformer;
        let pass = tokens * tokens * c.n_heads * scores
            + tokens * (4 * c.hidden_dim() + 8 * c.dim) * bytes
            + product(c.hidden_dim(), c.dim);
        // The widest feature maps of full size, and the scores of the middle block's attention.
        let channels = self.vae.block_out_channels[..2].iter().max().copied().unwrap_or(0);
        let latents = pixels / (CELL * CELL);
        let decode = 4 * (4 * channels * pixels).max(3 * latents * latents);
        let loaded = transformer.bytes(DTYPE, Matrices::Tensors) + vae.bytes(DType::F32, Matrices::Tensors);
        Ok(Memory {
            text: text.bytes(DTYPE, Matrices::Tensors) + reading as u64,
            refining: loaded + pass.max(decode) as u64,
        })
    }
}
