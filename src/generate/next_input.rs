//! The transformer's input for the next scale, from the codes of the scales so far.

use candle_core::{Result, Tensor};

use crate::backbone::InputMode;
use crate::pixels::GridResampling;
use crate::tokenizer::{BitQuantizer, Code, ImageDecoder, Quantizer};

/// Turns the codes of one scale into the input of the next, for several images at once, on the
/// device that has the codes.
#[derive(Clone, Debug)]
pub struct NextInput<'a> {
    rule: Rule<'a>,
    /// Grids (height, width), coarse to fine.
    scales: &'a [(usize, usize)],
    /// Sum of the scales before the current one: on the current grid for table codes in cumulative
    /// mode, on the last grid for bits.
    sum: Option<Tensor>,
}

#[derive(Clone, Copy, Debug)]
enum Rule<'a> {
    Table(&'a Quantizer, InputMode),
    Bits(&'a BitQuantizer),
}

impl<'a> NextInput<'a> {
    /// For table codes, (images, h * w) u32, before the first scale.
    pub fn of_table(quantizer: &'a Quantizer, mode: InputMode, scales: &'a [(usize, usize)]) -> Self {
        Self { rule: Rule::Table(quantizer, mode), scales, sum: None }
    }

    /// For bitwise codes, (images, h * w, bits) u8, before the first scale.
    pub fn of_bits(quantizer: &'a BitQuantizer, scales: &'a [(usize, usize)]) -> Self {
        Self { rule: Rule::Bits(quantizer), scales, sum: None }
    }

    /// For the codes of `images`; `mode` applies to table codes.
    pub fn of(images: &'a ImageDecoder, mode: InputMode, scales: &'a [(usize, usize)]) -> Self {
        match images {
            ImageDecoder::Table(images) => Self::of_table(images.quantizer(), mode, scales),
            ImageDecoder::Bits(images) => Self::of_bits(images.quantizer(), scales),
        }
    }

    /// The inputs (h * w, D) of all scales but the first of one image whose codes are known.
    pub fn all(mut self, codes: &[Vec<Code>]) -> Result<Vec<Vec<f32>>> {
        let scales = 1..self.scales.len();
        let next = |(si, codes): (usize, &Vec<Code>)| {
            let codes = match self.rule {
                Rule::Table(q, _) => q.codes(codes)?,
                Rule::Bits(q) => q.codes(codes)?,
            };
            self.next(&codes, si)?.flatten_all()?.to_vec1()
        };
        scales.zip(codes).map(next).collect()
    }

    /// The scale `si` with its own codes: what another pass over it sees, (images, h * w, D).
    pub fn with(&self, codes: &Tensor, si: usize) -> Result<Tensor> {
        match self.rule {
            Rule::Table(q, _) => self.entries(q, codes),
            Rule::Bits(q) => q.shrink(&self.summed(q, codes, si)?, self.last(), self.scales[si]),
        }
    }

    /// The input of scale `si`, (images, h * w, D), from the codes just drawn of the scale before.
    pub fn next(&mut self, codes: &Tensor, si: usize) -> Result<Tensor> {
        match self.rule {
            Rule::Table(q, mode) => {
                let resampling = GridResampling::bicubic(self.scales[si - 1], self.scales[si]);
                let input = resampling.tokens(&self.entries(q, codes)?)?;
                if mode == InputMode::Cumulative {
                    self.sum = Some(input.clone());
                }
                Ok(input)
            }
            Rule::Bits(q) => {
                let sum = self.summed(q, codes, si - 1)?;
                let input = q.shrink(&sum, self.last(), self.scales[si])?;
                self.sum = Some(sum);
                Ok(input)
            }
        }
    }

    /// Codebook entries of the current scale, added to the sum of the scales before.
    fn entries(&self, q: &Quantizer, codes: &Tensor) -> Result<Tensor> {
        let entries = q.lookup(codes)?;
        match &self.sum {
            Some(sum) => entries + sum,
            None => Ok(entries),
        }
    }

    /// The sum of all scales up to the bits of scale `si`.
    fn summed(&self, q: &BitQuantizer, codes: &Tensor, si: usize) -> Result<Tensor> {
        q.add(self.sum.as_ref(), codes, self.scales[si], self.last())
    }

    fn last(&self) -> (usize, usize) {
        self.scales.last().copied().unwrap_or_default()
    }
}
