//! `x wᵀ + b` on the CPU: the way that is fastest for these weights and this number of inputs.

use std::cell::RefCell;

use candle_core::Result;
use candle_core::quantized::GgmlDType;
#[cfg(target_arch = "x86_64")]
use pulp::bytemuck::cast_slice;
use rayon::prelude::*;

use super::blocks::dequantise;
use super::bytes;
use super::columns::{Columns, by_columns, filled};
use super::few::{self, FEW};
#[cfg(target_arch = "x86_64")]
use super::panels::{self, Then};
use super::slice::{Into, Matrix, MatrixMut, gemm};
use super::tiles;

/// Rows of weights that a thread takes at a time for few inputs, and for many, which are packed anew for every such tile.
const TILE: [usize; 2] = [32, 256];
/// Rows of inputs in which one thread puts a bias.
const BIAS_ROWS: usize = 64;

/// Rows of weights.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// In blocks that [`dequantise`] knows.
    Blocks(&'a [u8], GgmlDType),
}

impl<'a> Rows<'a> {
    /// As they lie in memory, and as what.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn bytes(self) -> (&'a [u8], GgmlDType) {
        match self {
            Self::Plain(w) => (cast_slice(w), GgmlDType::F32),
            Self::Blocks(w, dtype) => (w, dtype),
        }
    }

    /// `count` rows, `columns` long, from `first` on.
    #[inline(always)]
    pub(super) fn narrow(self, first: usize, count: usize, columns: usize) -> Self {
        match self {
            Self::Plain(w) => Self::Plain(&w[first * columns..][..count * columns]),
            Self::Blocks(w, dtype) => {
                let bytes = columns / dtype.block_size() * dtype.type_size();
                Self::Blocks(&w[first * bytes..][..count * bytes], dtype)
            }
        }
    }
}

/// `inputs` (N, columns), `w` (rows, columns) and `bias` (rows) give (N, rows).
///
/// With weights in blocks many inputs are rounded to bf16 where the processor multiplies bf16, or to integers where it does not
/// and those of blocks of Q8_0 are; else all is f32.
///
/// Errors: blocks of a type that [`dequantise`] does not know, or that do not divide `columns`.
pub(super) fn product(
    inputs: &[f32],
    w: Rows,
    bias: Option<&[f32]>,
    (rows, columns): (usize, usize),
) -> Result<Vec<f32>> {
    let count = inputs.len() / columns.max(1);
    if count * rows == 0 {
        return Ok(vec![0.0; count * rows]);
    }
    if count <= FEW {
        let inputs = few::Inputs::new(inputs, columns, w);
        let products = |y: &mut Columns| {
            let mut transposed = vec![0f32; y.width() * count];
            few::products(&mut transposed, w.narrow(y.first(), y.width(), columns), &inputs)?;
            y.put_transposed(&transposed, bias);
            Ok(())
        };
        return filled(count * rows, |y| by_columns(y, rows, TILE[0], products));
    }
    match w {
        #[cfg(target_arch = "x86_64")]
        Rows::Plain(w) if panels::suits(GgmlDType::F32, columns) => {
            filled(count * rows, |y| panels::products(y, Rows::Plain(w).bytes(), Then::Add(bias), inputs, columns))
        }
        Rows::Plain(w) if tiles::suits(columns) => {
            filled(count * rows, |y| tiles::products(y, w, None, bias, inputs, columns))
        }
        Rows::Plain(w) => {
            let mut y = vec![0f32; count * rows];
            if let Some(bias) = bias {
                let rows = y.par_chunks_mut(rows * BIAS_ROWS);
                rows.for_each(|y| y.chunks_exact_mut(bias.len()).for_each(|y| y.copy_from_slice(bias)));
            }
            let into = if bias.is_some() { Into::Add } else { Into::Overwrite };
            let (x, w) = (Matrix::new(inputs, count, columns), Matrix::new(w, rows, columns));
            gemm(MatrixMut::new(&mut y, count, rows), into, x, w.t(), 1.0, true);
            Ok(y)
        }
        #[cfg(target_arch = "x86_64")]
        Rows::Blocks(w, dtype) if panels::suits(dtype, columns) => {
            filled(count * rows, |y| panels::products(y, (w, dtype), Then::Add(bias), inputs, columns))
        }
        Rows::Blocks(w, dtype) if bytes::suits_blocks(dtype, columns) => {
            filled(count * rows, |y| bytes::products_of_blocks(y, w, None, bias, inputs, columns))
        }
        Rows::Blocks(_, dtype) => {
            thread_local!(static SCRATCH: RefCell<[Vec<f32>; 2]> = RefCell::default());
            let products = |y: &mut Columns| {
                SCRATCH.with_borrow_mut(|[tile, transposed]| {
                    let Rows::Blocks(w, _) = w.narrow(y.first(), y.width(), columns) else { return Ok(()) };
                    tile.resize(y.width() * columns, 0.0);
                    dequantise(w, dtype, tile)?;
                    transposed.resize(y.width() * count, 0.0);
                    let (w, x) = (Matrix::new(tile, y.width(), columns), Matrix::new(inputs, count, columns));
                    gemm(MatrixMut::new(transposed, y.width(), count), Into::Overwrite, w, x.t(), 1.0, false);
                    y.put_transposed(transposed, bias);
                    Ok(())
                })
            };
            filled(count * rows, |y| by_columns(y, rows, TILE[1], products))
        }
    }
}

/// `x * sigmoid(x)` of the products with `gate`, times those with `up`: as [`product`] for each, but in one go, or nothing
/// where that is no faster.
pub(super) fn gated(inputs: &[f32], gate: Rows, up: Rows, (rows, columns): (usize, usize)) -> Result<Option<Vec<f32>>> {
    if inputs.len() <= FEW * columns {
        return Ok(None);
    }
    let count = inputs.len() / columns * rows;
    #[cfg(target_arch = "x86_64")]
    if let ((gate, dtype), (up, same)) = (gate.bytes(), up.bytes())
        && dtype == same
        && panels::suits(dtype, columns)
    {
        return filled(count, |y| panels::products(y, (gate, dtype), Then::Gate(up), inputs, columns)).map(Some);
    }
    match (gate, up) {
        (Rows::Plain(gate), Rows::Plain(up)) if tiles::suits(columns) => {
            filled(count, |y| tiles::products(y, gate, Some(up), None, inputs, columns)).map(Some)
        }
        (Rows::Blocks(gate, dtype), Rows::Blocks(up, same)) if dtype == same && bytes::suits_blocks(dtype, columns) => {
            filled(count, |y| bytes::products_of_blocks(y, gate, Some(up), None, inputs, columns)).map(Some)
        }
        _ => Ok(None),
    }
}
