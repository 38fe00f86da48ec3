//! What the transformer sees of the scales drawn so far.

use crate::backbone::InputMode;
use crate::pixels::GridResampling;
use crate::tokenizer::Quantizer;

/// Turns the codes of one scale into the input of the next.
#[derive(Clone, Debug)]
pub struct NextInput {
    mode: InputMode,
    /// Cumulative mode: the sum of all scales before the current one, on its grid.
    sum: Vec<f32>,
}

impl NextInput {
    /// Before the first scale.
    pub fn new(mode: InputMode) -> Self {
        Self { mode, sum: Vec::new() }
    }

    /// The current scale with its own codes: what another pass over it sees, (h * w, D).
    pub fn with(&self, q: &Quantizer, codes: &[u32]) -> Vec<f32> {
        let mut entries = q.entries(codes);
        if self.mode == InputMode::Cumulative && !self.sum.is_empty() {
            entries.iter_mut().zip(&self.sum).for_each(|(e, s)| *e += s);
        }
        entries
    }

    /// The input of the scale on grid `to`, (h * w, D), from the codes just drawn on grid `from`.
    pub fn next(&mut self, q: &Quantizer, codes: &[u32], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
        let input = GridResampling::bicubic(from, to).apply(&self.with(q, codes), q.config().dim());
        if self.mode == InputMode::Cumulative {
            self.sum.clone_from(&input);
        }
        input
    }
}
