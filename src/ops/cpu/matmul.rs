//! Matrix products with weights of any type: the choice of the kernel.

use std::cell::RefCell;

use candle_core::Result;
use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::columns::{Columns, by_columns, filled};
use super::gemm::{Matrix, MatrixMut, Update, gemm, product};
use super::gemm_f32;
use super::gemv::{self, GEMV_ROWS};
use super::packed_blocks::{self, PackedBlocks};
use super::quants::{WeightRows, dequantize};

#[cfg(target_arch = "x86_64")]
use super::gemm_bf16::{self, Epilogue, Weights};

/// Rows of weights per task of the GEMV, and of the GEMM over dequantised weights.
const GEMV_TASK: usize = 32;
const DEQUANTIZED_TASK: usize = 256;
/// Rows of outputs per task that fills in the bias.
const BIAS_TASK: usize = 64;

/// The most rows of activations for which a GEMV is faster than packing them for a GEMM: on one
/// thread, with 4864 rows of 896 columns.
fn gemv_rows(w: WeightRows, columns: usize) -> usize {
    match w {
        WeightRows::F32(_) if gemm_f32::supports(columns) => 4,
        #[cfg(target_arch = "x86_64")]
        WeightRows::Blocks(_, GgmlDType::BF16) if super::avx512::supports_bf16(columns) => 2,
        _ => GEMV_ROWS,
    }
}

/// `x wᵀ + bias` for x (M, columns), `w` (rows, columns) and `bias` (rows): (M, rows).
///
/// All in f32, except that both factors are rounded to bf16 with weights of bf16 and more than two
/// rows of x where the CPU multiplies bf16.
///
/// Errors: blocks of a type that [`dequantize`] does not support, or that do not divide `columns`.
pub(crate) fn matmul(
    x: &[f32],
    w: WeightRows,
    bias: Option<&[f32]>,
    (rows, columns): (usize, usize),
) -> Result<Vec<f32>> {
    let count = x.len() / columns.max(1);
    if count * rows == 0 {
        return Ok(vec![0.0; count * rows]);
    }
    if count <= gemv_rows(w, columns) {
        let x = gemv::Activations::new(x, columns);
        let products = |y: &mut Columns| {
            let mut transposed = vec![0f32; y.width() * count];
            gemv::gemv(&mut transposed, w.narrow(y.first(), y.width(), columns), &x)?;
            y.put_transposed(&transposed, bias);
            Ok(())
        };
        return filled(count * rows, |y| by_columns(y, rows, GEMV_TASK, products));
    }
    match w {
        WeightRows::F32(w) if gemm_f32::supports(columns) => {
            filled(count * rows, |y| gemm_f32::gemm_f32(y, w, None, bias, x, columns))
        }
        WeightRows::F32(w) => Ok(portable(x, w, bias, (rows, columns))),
        #[cfg(target_arch = "x86_64")]
        WeightRows::Blocks(w, GgmlDType::BF16) if super::avx512::supports_bf16(columns) => {
            filled(count * rows, |y| gemm_bf16::gemm_bf16(y, Weights::Bf16(w), Epilogue::Bias(bias), x, columns))
        }
        WeightRows::Blocks(_, dtype) => dequantized(x, w, dtype, bias, (rows, columns)),
    }
}

/// [`matmul`] by the crate `gemm`, with f32 weights.
pub(crate) fn portable(x: &[f32], w: &[f32], bias: Option<&[f32]>, (rows, columns): (usize, usize)) -> Vec<f32> {
    let count = x.len() / columns;
    let (x, w) = (Matrix::new(x, count, columns), Matrix::new(w, rows, columns));
    let Some(bias) = bias else { return product(x, w.t()) };
    let mut y = vec![0f32; count * rows];
    let tasks = y.par_chunks_mut(rows * BIAS_TASK);
    tasks.for_each(|y| y.chunks_exact_mut(rows).for_each(|y| y.copy_from_slice(bias)));
    gemm(MatrixMut::new(&mut y, count, rows), Update::Add, x, w.t(), 1.0, true);
    y
}

/// By the crate `gemm`, on some rows of weights at a time, dequantised to f32.
fn dequantized(
    x: &[f32],
    w: WeightRows,
    dtype: GgmlDType,
    bias: Option<&[f32]>,
    (rows, columns): (usize, usize),
) -> Result<Vec<f32>> {
    thread_local!(static SCRATCH: RefCell<[Vec<f32>; 2]> = RefCell::default());
    let count = x.len() / columns;
    let products = |y: &mut Columns| {
        SCRATCH.with_borrow_mut(|[dense, transposed]| {
            let WeightRows::Blocks(w, _) = w.narrow(y.first(), y.width(), columns) else { return Ok(()) };
            dense.resize(y.width() * columns, 0.0);
            dequantize(w, dtype, dense)?;
            transposed.resize(y.width() * count, 0.0);
            let (w, x) = (Matrix::new(dense, y.width(), columns), Matrix::new(x, count, columns));
            gemm(MatrixMut::new(transposed, y.width(), count), Update::Overwrite, w, x.t(), 1.0, false);
            y.put_transposed(transposed, bias);
            Ok(())
        })
    };
    filled(count * rows, |y| by_columns(y, rows, DEQUANTIZED_TASK, products))
}

/// `silu(x gateᵀ) * (x upᵀ)` for x (M, columns) and two matrices of one shape (rows, columns):
/// (M, rows), as [`matmul`] of each. None where one kernel for both is no faster.
pub(crate) fn gated_matmul(
    x: &[f32],
    gate: WeightRows,
    up: WeightRows,
    (rows, columns): (usize, usize),
) -> Result<Option<Vec<f32>>> {
    if x.len() <= gemv_rows(gate, columns) * columns {
        return Ok(None);
    }
    let count = x.len() / columns * rows;
    match (gate, up) {
        (WeightRows::F32(gate), WeightRows::F32(up)) if gemm_f32::supports(columns) => {
            filled(count, |y| gemm_f32::gemm_f32(y, gate, Some(up), None, x, columns)).map(Some)
        }
        #[cfg(target_arch = "x86_64")]
        (WeightRows::Blocks(gate, GgmlDType::BF16), WeightRows::Blocks(up, GgmlDType::BF16))
            if super::avx512::supports_bf16(columns) =>
        {
            let (gate, up) = (Weights::Bf16(gate), Epilogue::Gate(Weights::Bf16(up)));
            filled(count, |y| gemm_bf16::gemm_bf16(y, gate, up, x, columns)).map(Some)
        }
        _ => Ok(None),
    }
}

/// With more rows of inputs, bf16 products are taken where the CPU has them: they are made for
/// panels of 48 rows.
#[cfg(target_arch = "x86_64")]
const PACKED_ROWS: usize = 64;

/// `x wᵀ + bias` for x (M, columns) and each of several matrices (rows, columns): (M, rows) of
/// each. With more than [`PACKED_ROWS`] rows of x, both factors are rounded to bf16 where the CPU
/// multiplies bf16; else x is rounded to 16-bit integers.
pub(crate) fn packed_matmul_each(
    x: &[f32],
    layers: &[(&PackedBlocks, Option<&[f32]>)],
    columns: usize,
) -> Result<Vec<Vec<f32>>> {
    #[cfg(target_arch = "x86_64")]
    if x.len() > PACKED_ROWS * columns && super::avx512::supports_bf16(columns) {
        let product = |&(w, bias): &(&PackedBlocks, Option<&[f32]>)| {
            let (count, epilogue) = (x.len() / columns * w.shape().0, Epilogue::Bias(bias));
            filled(count, |y| gemm_bf16::gemm_bf16(y, Weights::Packed(w), epilogue, x, columns))
        };
        return layers.par_iter().map(product).collect();
    }
    packed_blocks::matmul_each(x, layers, columns)
}

/// `silu(x gateᵀ) * (x upᵀ)` for x (M, columns) and two matrices (rows, columns) that are
/// [aligned](PackedBlocks::is_aligned_with): (M, rows), as [`packed_matmul_each`].
pub(crate) fn gated_packed(x: &[f32], gate: &PackedBlocks, up: &PackedBlocks) -> Result<Vec<f32>> {
    #[cfg(target_arch = "x86_64")]
    {
        let (rows, columns) = gate.shape();
        if x.len() > PACKED_ROWS * columns && super::avx512::supports_bf16(columns) {
            let (gate, up) = (Weights::Packed(gate), Epilogue::Gate(Weights::Packed(up)));
            return filled(x.len() / columns * rows, |y| gemm_bf16::gemm_bf16(y, gate, up, x, columns));
        }
    }
    packed_blocks::gated_matmul(x, gate, up)
}
