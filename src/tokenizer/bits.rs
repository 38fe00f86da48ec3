//! Multi-scale residual binary spherical quantisation (BSQ, arXiv 2406.07548; Infinity, arXiv
//! 2412.04431): without a codebook, a code is the signs of its channels.

use candle_core::{DType, Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::code::{Code, CodeSpace, MAX_BITS, pack, unpack};
use crate::pixels::GridResampling;

/// A grid, (height, width).
type Grid = (usize, usize);

/// Shape of bitwise codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BitConfig {
    /// Channels of the quantised features, a bit each.
    pub dim: usize,
    /// Autoencoder cells per token along each side: 2 in Infinity 8B, else 1.
    pub patch: usize,
}

impl BitConfig {
    /// Bits of a token: channel c of the cell in row y and column x of the patch is bit (c * patch
    /// + y) * patch + x.
    pub fn per_token(&self) -> usize {
        self.dim.saturating_mul(self.patch).saturating_mul(self.patch)
    }

    /// The codes of tokens.
    pub fn space(&self) -> CodeSpace {
        CodeSpace::Bits(self.per_token())
    }

    /// Errors: no bits, or more than a code holds.
    pub(super) fn check(&self) -> Result<()> {
        match self.per_token() {
            1..=MAX_BITS => Ok(()),
            bits => bail!("a token has 1 to {MAX_BITS} bits, not {bits}"),
        }
    }

    /// The autoencoder's grid of a grid of tokens.
    fn cells(&self, (h, w): Grid) -> Grid {
        (h * self.patch, w * self.patch)
    }
}

/// The quantiser. Grids in its interface are token grids; F is the sum of all scales on the
/// autoencoder's last grid.
#[derive(Clone, Debug)]
pub struct BitQuantizer {
    config: BitConfig,
    device: Device,
}

impl BitQuantizer {
    /// Errors: a shape without bits, or with more than 64 of a token.
    pub fn new(config: BitConfig, device: &Device) -> Result<Self> {
        config.check()?;
        Ok(Self { config, device: device.clone() })
    }

    /// Shape of bitwise codes.
    pub fn config(&self) -> &BitConfig {
        &self.config
    }

    /// Magnitude of every channel of a code, which has unit length.
    fn unit(&self) -> f32 {
        1.0 / (self.config.dim as f32).sqrt()
    }

    /// The codes of one scale of one image as the loop has them: (1, T, bits) u8 on the tokenizer's
    /// device.
    pub fn codes(&self, codes: &[Code]) -> Result<Tensor> {
        let count = self.config.per_token();
        let bits: Vec<u8> = codes.iter().flat_map(|&code| unpack(code, count)).collect();
        Tensor::from_vec(bits, (1, codes.len(), count), &self.device)
    }

    /// F after one more scale: `sum`, (B, H * W, dim) or nothing before the first one, and the
    /// codes of the grid `from`, (B, T, bits) u8, stretched to the grid `last`.
    pub fn add(&self, sum: Option<&Tensor>, codes: &Tensor, from: Grid, last: Grid) -> Result<Tensor> {
        let unit = f64::from(self.unit());
        let signs = codes.to_dtype(DType::F32)?.affine(2.0 * unit, -unit)?;
        let (from_cells, last) = (self.config.cells(from), self.config.cells(last));
        let step = GridResampling::bilinear(from_cells, last).tokens(&self.split(&signs, from)?)?;
        match sum {
            Some(sum) => sum + step,
            None => Ok(step),
        }
    }

    /// The transformer's input of F (B, H * W, dim) on the grid `to`: (B, T, bits).
    pub fn shrink(&self, sum: &Tensor, last: Grid, to: Grid) -> Result<Tensor> {
        let cells = GridResampling::bilinear(self.config.cells(last), self.config.cells(to)).tokens(sum)?;
        self.join(&cells, to)
    }

    /// Tokens (B, h * w, bits) to cells (B, h * w * patch², dim), as `pixel_shuffle`.
    fn split(&self, tokens: &Tensor, (h, w): Grid) -> Result<Tensor> {
        let BitConfig { dim, patch: p } = self.config;
        if p == 1 {
            return Ok(tokens.clone());
        }
        let b = tokens.dim(0)?;
        let x = tokens.reshape(&[b, h, w, dim, p, p][..])?.permute(vec![0, 1, 4, 2, 5, 3])?;
        x.reshape((b, h * w * p * p, dim))
    }

    /// The inverse of [`Self::split`].
    fn join(&self, cells: &Tensor, (h, w): Grid) -> Result<Tensor> {
        let BitConfig { dim, patch: p } = self.config;
        if p == 1 {
            return Ok(cells.clone());
        }
        let b = cells.dim(0)?;
        let x = cells.reshape(&[b, h, p, w, p, dim][..])?.permute(vec![0, 1, 3, 5, 2, 4])?;
        x.reshape((b, h * w, dim * p * p))
    }

    /// The codes of one image's features `f`, (H * W, dim) on the autoencoder's grid of the last of
    /// `scales`.
    ///
    /// `visit(scale, residual)` gets the features to quantise at every scale, (cells, dim).
    pub fn encode(&self, f: &[f32], scales: &[Grid], mut visit: impl FnMut(usize, &[f32])) -> Vec<Vec<Code>> {
        let Some(&last) = scales.last() else { return Vec::new() };
        let (dim, last, unit) = (self.config.dim, self.config.cells(last), self.unit());
        let mut residual = f.to_vec();
        let mut codes = Vec::new();
        for (si, &grid) in scales.iter().enumerate() {
            let cells = self.config.cells(grid);
            let mut x = GridResampling::area(last, cells).apply(&residual, dim);
            visit(si, &x);
            codes.push(self.tokens(&x, grid));
            x.iter_mut().for_each(|x| *x = if *x > 0.0 { unit } else { -unit });
            GridResampling::bilinear(cells, last).add_to(&x, dim, -1.0, &mut residual);
        }
        codes
    }

    /// The signs of cells (h * w * patch², dim) as codes of a grid of tokens.
    fn tokens(&self, cells: &[f32], (h, w): Grid) -> Vec<Code> {
        let BitConfig { dim, patch: p } = self.config;
        let bit = |(y, x): (usize, usize), i: usize| {
            let (c, row, column) = (i / (p * p), y * p + i / p % p, x * p + i % p);
            u8::from(cells[(row * w * p + column) * dim + c] > 0.0)
        };
        let token = |at: (usize, usize)| pack(&(0..self.config.per_token()).map(|i| bit(at, i)).collect::<Vec<_>>());
        (0..h).flat_map(|y| (0..w).map(move |x| (y, x))).map(token).collect()
    }

    /// F of one image, (1, H * W, dim), from the codes of a prefix of the scales.
    ///
    /// Errors: codes that [`CodeSpace::check`] refuses, and no scales.
    pub fn accumulate(&self, codes: &[Vec<Code>], scales: &[Grid]) -> Result<Tensor> {
        let Some(&last) = scales.last() else { bail!("no scales") };
        self.config.space().check(codes, scales).map_err(candle_core::Error::msg)?;
        let (h, w) = self.config.cells(last);
        let mut sum = Tensor::zeros((1, h * w, self.config.dim), DType::F32, &self.device)?;
        for (codes, &grid) in codes.iter().zip(scales) {
            sum = self.add(Some(&sum), &self.codes(codes)?, grid, last)?;
        }
        Ok(sum)
    }
}
