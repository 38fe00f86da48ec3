//! What the transformer sees of the scales drawn so far.

use candle_core::{Result, Tensor};

use crate::backbone::InputMode;
use crate::pixels::GridResampling;
use crate::tokenizer::Quantizer;

/// Turns the codes of one scale into the input of the next, for several images at once, on the device that has the codes.
#[derive(Clone, Debug)]
pub struct NextInput {
    mode: InputMode,
    /// Cumulative mode: the sum of all scales before the current one, on its grid.
    sum: Option<Tensor>,
}

impl NextInput {
    /// Before the first scale.
    pub fn new(mode: InputMode) -> Self {
        Self { mode, sum: None }
    }

    /// The inputs (h * w, D) of all scales but the first of one image whose codes are known.
    pub fn all(mode: InputMode, q: &Quantizer, codes: &[Vec<u32>], scales: &[(usize, usize)]) -> Result<Vec<Vec<f32>>> {
        let mut input = Self::new(mode);
        let next = |(pair, codes): (&[(usize, usize)], &Vec<u32>)| {
            let codes = Tensor::from_slice(codes, (1, codes.len()), q.device())?;
            input.next(q, &codes, pair[0], pair[1])?.flatten_all()?.to_vec1()
        };
        scales.windows(2).zip(codes).map(next).collect()
    }

    /// The current scale with its own codes (B, h * w): what another pass over it sees, (B, h * w, D).
    pub fn with(&self, q: &Quantizer, codes: &Tensor) -> Result<Tensor> {
        let entries = q.lookup(codes)?;
        match &self.sum {
            Some(sum) => entries + sum,
            None => Ok(entries),
        }
    }

    /// The input of the scale on grid `to`, (B, h' * w', D), from the codes just drawn on grid `from`, (B, h * w).
    pub fn next(&mut self, q: &Quantizer, codes: &Tensor, from: (usize, usize), to: (usize, usize)) -> Result<Tensor> {
        let input = GridResampling::bicubic(from, to).tokens(&self.with(q, codes)?)?;
        if self.mode == InputMode::Cumulative {
            self.sum = Some(input.clone());
        }
        Ok(input)
    }
}
