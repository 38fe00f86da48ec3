//! Direct convolution at stride 1: some positions of the output at a time, whose patches are
//! unfolded into one panel that serves all output channels from the L2 cache.
//!
//! In a padded image every tap of a kernel is a shift, so a panel is made of copies from a strip of
//! the image. The sums of a few channels at all positions of a panel stay in registers.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::columns::{Columns, by_columns};
use super::gemm_f32::{Strides, in_registers, multiply, registers};
use super::im2col::Geometry;

/// The most numbers in a panel: a megabyte.
const PANEL: usize = 1 << 18;
/// Numbers that are copied at a time.
const COPIED: usize = 16;

/// Whether [`convolve`] is fast for it: with 1x1 kernels the image is the matrix of patches
/// already.
pub(crate) fn supports(g: &Geometry) -> bool {
    let (lanes, wide) = registers();
    g.stride == 1 && g.k > 1 && lanes > 1 && g.patch() * wide * lanes <= PANEL
}

/// Convolves x (B, C, H, W) with w (O, C, K, K) and adds the bias (O): y (B, O, H', W').
///
/// Panics unless it [`supports`] the geometry.
pub(crate) fn convolve(g: &Geometry, x: &[f32], w: &[f32], bias: &[f32], y: &mut [MaybeUninit<f32>]) -> Result<()> {
    assert!(supports(g) && w.len() == g.o * g.patch() && bias.len() == g.o, "a convolution that is not supported");
    let area = g.out_area();
    // The most even split among the threads; the weights are read once per panel, so that narrow
    // ones cost a little more.
    let threads = rayon::current_num_threads();
    let cost = |&(places, cost): &(usize, usize)| area.div_ceil(places).div_ceil(threads) * places * cost;
    let (lanes, wide) = registers();
    let kinds = [(wide * lanes, 10), ((wide - 1) * lanes, 11)];
    let places = kinds.iter().min_by_key(|kind| cost(kind)).map_or(lanes, |kind| kind.0);
    // A strip of a padded image, and a panel.
    thread_local!(static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = RefCell::default());
    y.par_chunks_mut(g.o * area).zip(x.par_chunks(g.c * g.h * g.w)).try_for_each(|(y, x)| {
        by_columns(y, area, places, |y| {
            SCRATCH.with_borrow_mut(|(strip, panel)| {
                let width = wide * lanes;
                unfold(g, x, y.first()..y.first() + y.width(), width, strip, panel);
                Arch::new().dispatch(Channels { panel: &panel[..g.patch() * width], w, bias, y });
            });
            Ok(())
        })
    })
}

/// All output channels at some positions.
struct Channels<'a, 'b> {
    panel: &'a [f32],
    w: &'a [f32],
    bias: &'a [f32],
    y: &'a mut Columns<'b>,
}

impl WithSimd for Channels<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        in_registers!(S, sum(simd, self))
    }
}

#[inline(always)]
fn sum<S: Simd, const HIGH: usize, const WIDE: usize>(simd: S, channels: Channels) {
    let Channels { panel, w, bias, y } = channels;
    let panel = S::as_simd_f32s(panel).0.as_chunks::<WIDE>().0;
    let (n, registers) = (panel.len(), y.width().div_ceil(S::F32_LANES));
    let mut first = 0;
    while first < bias.len() {
        let (w, bias) = (&w[first * n..], &bias[first..]);
        first += match (bias.len(), registers) {
            (left, 1) if left >= HIGH => tile::<S, HIGH, 1, WIDE>(simd, panel, w, bias, first, y),
            (left, 2) if left >= HIGH && WIDE > 2 => tile::<S, HIGH, 2, WIDE>(simd, panel, w, bias, first, y),
            (left, _) if left >= HIGH => tile::<S, HIGH, WIDE, WIDE>(simd, panel, w, bias, first, y),
            (left, _) if left >= 4 => tile::<S, 4, WIDE, WIDE>(simd, panel, w, bias, first, y),
            _ => tile::<S, 1, WIDE, WIDE>(simd, panel, w, bias, first, y),
        };
    }
}

/// Unfolds the patches at the positions `places` into `panel`: for every tap of a kernel,
/// (C, K, K), its inputs at up to `width` positions side by side. What follows the last position is
/// undefined.
fn unfold(g: &Geometry, x: &[f32], places: Range<usize>, width: usize, strip: &mut Vec<f32>, panel: &mut Vec<f32>) {
    let (first, last) = (places.start, places.end - 1);
    let rows = first / g.out_w..last / g.out_w + 1;
    let columns = if rows.len() == 1 { first % g.out_w..last % g.out_w + 1 } else { 0..g.out_w };
    // The part of the padded image that is needed, and room to copy whole registers.
    let (high, pitch) = (rows.len() + g.k - 1, columns.len() + g.k - 1);
    strip.clear();
    strip.resize(g.c * high * pitch + COPIED, 0.0);
    let (to, from) = (g.left.saturating_sub(columns.start), columns.start.saturating_sub(g.left));
    let length = pitch.saturating_sub(to).min(g.w.saturating_sub(from));
    for (strip, x) in strip.chunks_exact_mut(high * pitch).zip(x.chunks_exact(g.h * g.w)) {
        for (strip, row) in strip.chunks_exact_mut(pitch).zip(rows.start..) {
            if let Some(row) = row.checked_sub(g.top).filter(|row| *row < g.h) {
                strip[to..][..length].copy_from_slice(&x[row * g.w + from..][..length]);
            }
        }
    }
    // Stretches of positions in one row: where in the strip, where among the positions, and how
    // many.
    let stretches: Vec<(usize, usize, usize)> = rows
        .clone()
        .map(|row| {
            let start = first.max(row * g.out_w);
            let end = places.end.min((row + 1) * g.out_w);
            ((row - rows.start) * pitch + start - row * g.out_w - columns.start, start - first, end - start)
        })
        .collect();
    panel.resize(g.patch() * width + COPIED, 0.0);
    for tap in 0..g.patch() {
        let (channel, i, j) = (tap / (g.k * g.k), tap / g.k % g.k, tap % g.k);
        let (strip, out) = (&strip[(channel * high + i) * pitch + j..], &mut panel[tap * width..]);
        for &(from, to, length) in &stretches {
            // Numbers copied beyond a stretch are overwritten by the next one, or by the next tap.
            for at in (0..length).step_by(COPIED) {
                let copied: &[f32; COPIED] = strip[from + at..].first_chunk().unwrap_or(&[0.0; COPIED]);
                out[to + at..][..COPIED].copy_from_slice(copied);
            }
        }
    }
}

/// Writes `R` channels from `first` on at the positions in `W` registers. Returns `R`.
#[inline(always)]
fn tile<S: Simd, const R: usize, const W: usize, const WIDE: usize>(
    simd: S,
    panel: &[[S::f32s; WIDE]],
    w: &[f32],
    bias: &[f32],
    first: usize,
    y: &mut Columns,
) -> usize {
    let sums: [[S::f32s; W]; R] = multiply(simd, (w, bias), Strides::dense(panel.len()), panel, true);
    for (channel, sums) in (first..).zip(&sums) {
        for (at, sum) in (0..y.width()).step_by(S::F32_LANES).zip(sums) {
            let sum = pulp::bytemuck::cast_slice::<S::f32s, f32>(std::slice::from_ref(sum));
            y.put(channel, at, &sum[..S::F32_LANES.min(y.width() - at)]);
        }
    }
    R
}
