//! Matrices in GGML's blocks of 8 and 4 bits, laid out for products on x86-64, and these products.
//!
//! Slabs of 16 rows stand side by side: every four bytes of a block are followed by the same four
//! bytes of the other 15 rows, so that a register holds the same columns of all rows, and nothing
//! has to be shuffled. Weights are read once for up to a dozen rows of inputs; a slab is as large
//! as the blocks it was made of.
//!
//! Inputs are rounded to 16-bit integers with a scale for every 32 columns, which are multiplied
//! and summed in integers. An output differs from the product in f32 by at most half a step of the
//! rounding, 1/65534 of the largest input of a group, times the magnitudes of the group's weights.
//! It is the same beside any other rows of inputs and with registers of any width.

// On other architectures than x86-64 there is no kernel, and all of this is unreachable.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unused_variables, unreachable_code))]

mod inputs;
mod kernels;
#[cfg(target_arch = "x86_64")]
mod registers;

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Result, bail};
use rayon::prelude::*;

use super::columns::{by_columns, filled};
use super::quants::{dequantize, size_in_bytes};
use inputs::Inputs;
use kernels::Kernel;

/// Columns with a scale of their own, of weights and of inputs.
const GROUP: usize = 32;
/// Rows side by side.
const ROWS: usize = 16;
/// Rows of weights per task: whole slabs.
const TASK: usize = 64;

/// Four bytes of each row of a slab, or the scales of two groups.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line([u8; 64]);

/// How a type's blocks are taken apart.
#[derive(Clone, Copy)]
struct Layout {
    /// Columns of a block.
    columns: usize,
    /// Bytes at its beginning that are stored apart, by slab before all others.
    head: usize,
    /// The rest of it, in units of four bytes.
    words: usize,
}

impl Layout {
    fn of(dtype: GgmlDType) -> Option<Self> {
        match dtype {
            GgmlDType::Q8_0 => Some(Self { columns: 32, head: 2, words: 8 }),
            GgmlDType::Q4_0 => Some(Self { columns: 32, head: 2, words: 4 }),
            GgmlDType::Q4K => Some(Self { columns: 256, head: 0, words: 36 }),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        self.head + 4 * self.words
    }

    /// Lines of a slab before the words.
    fn head_lines(self, blocks: usize) -> usize {
        (blocks * self.head * ROWS).div_ceil(64)
    }

    fn slab_lines(self, blocks: usize) -> usize {
        self.head_lines(blocks) + blocks * self.words
    }
}

/// A range of the rows of a matrix (rows, columns) in blocks, whose memory it shares.
#[derive(Clone, Debug)]
pub struct PackedBlocks {
    slabs: Arc<Vec<Line>>,
    dtype: GgmlDType,
    /// The first row.
    first: usize,
    rows: usize,
    columns: usize,
}

impl PackedBlocks {
    /// Whether this CPU has a kernel for rows of `columns` columns in blocks of this type.
    pub fn supports(dtype: GgmlDType, columns: usize) -> bool {
        Layout::of(dtype).is_some_and(|layout| columns > 0 && columns.is_multiple_of(layout.columns))
            && Kernel::best().is_some()
    }

    /// From GGML's blocks, row by row.
    ///
    /// Errors: bytes that do not fit the shape (rows, columns), and a type or columns that are not
    /// [supported](Self::supports).
    pub fn new(bytes: &[u8], dtype: GgmlDType, (rows, columns): (usize, usize)) -> Result<Self> {
        let Some(layout) = Layout::of(dtype).filter(|_| Self::supports(dtype, columns)) else {
            bail!("no kernel for rows of {columns} columns in {dtype:?} on this CPU");
        };
        let row = size_in_bytes(dtype, columns);
        if Some(bytes.len()) != rows.checked_mul(row) {
            bail!("{} bytes of {dtype:?} are not {rows} rows of {columns}", bytes.len());
        }
        let blocks = columns / layout.columns;
        let lines = layout.slab_lines(blocks);
        let mut slabs = vec![Line([0; 64]); rows.div_ceil(ROWS) * lines];
        slabs.par_chunks_mut(lines).zip(bytes.par_chunks(ROWS * row)).for_each(|(slab, bytes)| {
            let (heads, words) = slab.split_at_mut(layout.head_lines(blocks));
            for (r, row) in bytes.chunks_exact(row).enumerate() {
                let places = words.chunks_exact_mut(layout.words).enumerate();
                for (block, (i, words)) in row.chunks_exact(layout.bytes()).zip(places) {
                    let (head, rest) = block.split_at(layout.head);
                    if let Some(place) = head_place(heads, layout.head, i, r) {
                        place.copy_from_slice(head);
                    }
                    for (word, line) in rest.as_chunks::<4>().0.iter().zip(words) {
                        line.0.as_chunks_mut::<4>().0[r] = *word;
                    }
                }
            }
        });
        Ok(Self { slabs: Arc::new(slabs), dtype, first: 0, rows, columns })
    }

    /// (rows, columns).
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Type of the blocks.
    pub fn dtype(&self) -> GgmlDType {
        self.dtype
    }

    /// `count` rows from `start` on, which share the memory of this matrix.
    ///
    /// Errors: rows that do not exist.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        if start.checked_add(count).is_none_or(|end| end > self.rows) {
            bail!("rows {start} to {start} + {count} of {}", self.rows);
        }
        Ok(Self { first: self.first + start, rows: count, ..self.clone() })
    }

    /// Whether the rows of both stand at the same places of their slabs, so that products with both
    /// can be taken together.
    pub(crate) fn is_aligned_with(&self, other: &Self) -> bool {
        self.shape() == other.shape() && self.first % ROWS == other.first % ROWS
    }

    /// GGML's blocks of the rows `order`.
    fn select(&self, order: impl IntoIterator<Item = usize>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for row in order {
            self.append_blocks(row, 0..self.columns, &mut bytes)?;
        }
        Ok(bytes)
    }

    /// The whole matrix in GGML's blocks.
    ///
    /// Errors: none that is known.
    pub fn to_qtensor(&self) -> Result<QTensor> {
        let bytes = self.select(0..self.rows)?;
        QTensor::new(QStorage::from_data(bytes.into(), &Device::Cpu, self.dtype)?, self.shape())
    }

    /// The rows `order`, in this order.
    ///
    /// Errors: a row that does not exist.
    pub fn reordered(&self, order: &[u32]) -> Result<Self> {
        let bytes = self.select(order.iter().map(|&row| row as usize))?;
        Self::new(&bytes, self.dtype, (order.len(), self.columns))
    }

    /// `count` columns from `start` on, in memory of their own; none unless they are whole blocks.
    ///
    /// Errors: columns that do not exist.
    pub fn columns(&self, start: usize, count: usize) -> Result<Option<Self>> {
        if start.checked_add(count).is_none_or(|end| end > self.columns) {
            bail!("columns {start} to {start} + {count} of {}", self.columns);
        }
        let block = self.dtype.block_size();
        if count == 0 || !start.is_multiple_of(block) || !count.is_multiple_of(block) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        for row in 0..self.rows {
            self.append_blocks(row, start..start + count, &mut bytes)?;
        }
        Self::new(&bytes, self.dtype, (self.rows, count)).map(Some)
    }

    /// Some whole blocks of a row as numbers; `bytes` is memory to reuse.
    ///
    /// Errors: a row that does not exist, and numbers that are not those of the columns.
    pub(crate) fn dequantize_row(
        &self,
        row: usize,
        columns: Range<usize>,
        bytes: &mut Vec<u8>,
        out: &mut [f32],
    ) -> Result<()> {
        bytes.clear();
        self.append_blocks(row, columns, bytes)?;
        dequantize(bytes, self.dtype, out)
    }

    /// Appends GGML's blocks of some columns of a row.
    fn append_blocks(&self, row: usize, columns: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        if row >= self.rows {
            bail!("row {row} of {}", self.rows);
        }
        let Some(layout) = Layout::of(self.dtype) else { bail!("{:?} is not packed", self.dtype) };
        let (blocks, row) = (self.columns / layout.columns, self.first + row);
        let slab = self.slab(row / ROWS);
        let (heads, words) = slab.split_at(layout.head_lines(blocks));
        for i in columns.start / layout.columns..columns.end / layout.columns {
            out.extend_from_slice(head_of(heads, layout.head, i, row % ROWS));
            for line in &words[i * layout.words..][..layout.words] {
                out.extend_from_slice(&line.0.as_chunks::<4>().0[row % ROWS]);
            }
        }
        Ok(())
    }

    fn slab(&self, index: usize) -> &[Line] {
        let lines = Layout::of(self.dtype).map_or(0, |layout| layout.slab_lines(self.columns / layout.columns));
        &self.slabs[index * lines..][..lines]
    }
}

/// The line and the first byte in it of the head of block `i` of row `r`.
fn head_at(head: usize, i: usize, r: usize) -> (usize, usize) {
    let byte = (i * ROWS + r) * head;
    (byte / 64, byte % 64)
}

fn head_of(lines: &[Line], head: usize, i: usize, r: usize) -> &[u8] {
    let (line, byte) = head_at(head, i, r);
    lines.get(line).map_or(&[], |line| &line.0[byte..][..head])
}

fn head_place(lines: &mut [Line], head: usize, i: usize, r: usize) -> Option<&mut [u8]> {
    let (line, byte) = head_at(head, i, r);
    lines.get_mut(line).map(|line| &mut line.0[byte..][..head])
}

/// `x wᵀ + bias` for x (M, columns) and each of several matrices (rows, columns): (M, rows) of
/// each.
///
/// Panics unless all have `columns` columns.
pub(crate) fn matmul_each(
    x: &[f32],
    layers: &[(&PackedBlocks, Option<&[f32]>)],
    columns: usize,
) -> Result<Vec<Vec<f32>>> {
    let x = Inputs::round(x, columns, kernel());
    layers.par_iter().map(|(w, bias)| product(&x, w, None, *bias)).collect()
}

/// `silu(x gateᵀ) * (x upᵀ)` for x (M, columns) and two matrices of one shape: (M, rows).
///
/// Panics unless they are [aligned](PackedBlocks::is_aligned_with).
pub(crate) fn gated_matmul(x: &[f32], gate: &PackedBlocks, up: &PackedBlocks) -> Result<Vec<f32>> {
    product(&Inputs::round(x, gate.columns, kernel()), gate, Some(up), None)
}

/// What every matrix has, by the check of its constructor.
fn kernel() -> Kernel {
    Kernel::best().expect("a CPU with a kernel")
}

fn product(x: &Inputs, w: &PackedBlocks, up: Option<&PackedBlocks>, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    assert!(x.columns() == w.columns && up.is_none_or(|up| up.is_aligned_with(w)), "matrices of other shapes");
    filled(x.count() * w.rows, |y| {
        by_columns(y, w.rows, TASK, |y| {
            x.kernel().block_products(x, w, up, bias, y);
            Ok(())
        })
    })
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
