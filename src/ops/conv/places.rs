//! Convolution at stride 1 on processors with AVX-512: up to 48 places of the result at a time, with all numbers that the kernels
//! are multiplied with there unfolded in one panel, which serves every channel from the second-level cache.
//!
//! In an image with its padding every tap of a kernel is a shift: a panel is made of copies from a strip of it. Eight channels at
//! 48 places keep their sums in registers.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

use super::Geometry;
use crate::ops::avx512::{LANES, load, store};
use crate::ops::columns::{Columns, by_columns};

/// Channels whose sums are in registers.
const HIGH: usize = 8;
/// Registers of places.
const WIDE: usize = 3;
/// Places in a row of a panel.
const PLACES: usize = WIDE * LANES;
/// Numbers in a panel at most: a megabyte.
const PANEL: usize = 1 << 18;

/// Whether [`convolve`] is for it: an image that is its own matrix of patches needs no unfolding.
pub(super) fn suits(g: &Geometry) -> bool {
    g.stride == 1 && g.k > 1 && g.patch() * PLACES <= PANEL && is_x86_feature_detected!("avx512f")
}

/// Convolves x (B, C, H, W) with w (O, C, K, K) and adds the bias (O): y (B, O, H', W').
///
/// Panics unless it [`suits`].
pub(super) fn convolve(g: &Geometry, x: &[f32], w: &[f32], bias: &[f32], y: &mut [MaybeUninit<f32>]) -> Result<()> {
    assert!(suits(g) && w.len() == g.o * g.patch() && bias.len() == g.o, "a convolution of another kind");
    let area = g.out_area();
    // As even a share for every thread as may be; with fewer places a panel is read more often.
    let threads = rayon::current_num_threads();
    let cost = |&(places, cost): &(usize, usize)| area.div_ceil(places).div_ceil(threads) * places * cost;
    let places = [(PLACES, 10), (PLACES - LANES, 11)].iter().min_by_key(|p| cost(p)).map_or(PLACES, |p| p.0);
    y.par_chunks_mut(g.o * area).zip(x.par_chunks(g.c * g.h * g.w)).try_for_each(|(y, x)| {
        by_columns(y, area, places, |y| {
            // SAFETY: the processor was asked for what this is compiled for.
            #[allow(unsafe_code)]
            unsafe {
                block(g, x, w, bias, y)
            }
            Ok(())
        })
    })
}

/// What a thread keeps: a strip of a padded image, and a panel.
type Scratch = (Vec<f32>, Vec<f32>);

/// All channels at some places.
#[target_feature(enable = "avx512f")]
fn block(g: &Geometry, x: &[f32], w: &[f32], bias: &[f32], y: &mut Columns) {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    SCRATCH.with_borrow_mut(|(strip, panel)| {
        unfold(g, x, y.first()..y.first() + y.width(), strip, panel);
        let n = g.patch();
        for (first, (w, bias)) in (0..).step_by(HIGH).zip(w.chunks(HIGH * n).zip(bias.chunks(HIGH))) {
            let panel = panel[..n * PLACES].as_chunks::<PLACES>().0;
            match (bias.len(), y.width().div_ceil(LANES)) {
                (HIGH, 1) => tile::<HIGH, 1>(panel, w, bias, first, y),
                (HIGH, 2) => tile::<HIGH, 2>(panel, w, bias, first, y),
                (HIGH, _) => tile::<HIGH, WIDE>(panel, w, bias, first, y),
                _ => (first..).zip(w.chunks_exact(n).zip(bias)).for_each(|(channel, (w, bias))| {
                    tile::<1, WIDE>(panel, w, std::slice::from_ref(bias), channel, y);
                }),
            }
        }
    });
}

/// For every tap of a kernel, (C, K, K), what it is multiplied with at `places`, [`PLACES`] numbers side by side. Behind the last
/// place stands anything.
fn unfold(g: &Geometry, x: &[f32], places: Range<usize>, strip: &mut Vec<f32>, panel: &mut Vec<f32>) {
    let (first, last) = (places.start, places.end - 1);
    let rows = first / g.out_w..last / g.out_w + 1;
    let columns = if rows.len() == 1 { first % g.out_w..last % g.out_w + 1 } else { 0..g.out_w };
    // The padded image, as far as it is needed, and room to copy whole registers.
    let (high, pitch) = (rows.len() + g.k - 1, columns.len() + g.k - 1);
    strip.clear();
    strip.resize(g.c * high * pitch + LANES, 0.0);
    let (to, from) = (g.left.saturating_sub(columns.start), columns.start.saturating_sub(g.left));
    let length = pitch.saturating_sub(to).min(g.w.saturating_sub(from));
    for (strip, x) in strip.chunks_exact_mut(high * pitch).zip(x.chunks_exact(g.h * g.w)) {
        for (strip, row) in strip.chunks_exact_mut(pitch).zip(rows.start..) {
            if let Some(row) = row.checked_sub(g.top).filter(|row| *row < g.h) {
                strip[to..][..length].copy_from_slice(&x[row * g.w + from..][..length]);
            }
        }
    }
    // Stretches of places in one row: where they are in the strip, and among the places.
    let stretches: Vec<(usize, usize, usize)> = rows
        .clone()
        .map(|row| {
            let start = first.max(row * g.out_w);
            let end = places.end.min((row + 1) * g.out_w);
            ((row - rows.start) * pitch + start - row * g.out_w - columns.start, start - first, end - start)
        })
        .collect();
    panel.resize(g.patch() * PLACES + LANES, 0.0);
    for tap in 0..g.patch() {
        let (channel, i, j) = (tap / (g.k * g.k), tap / g.k % g.k, tap % g.k);
        let (strip, out) = (&strip[(channel * high + i) * pitch + j..], &mut panel[tap * PLACES..]);
        for &(from, to, length) in &stretches {
            // What is copied beyond a stretch is written over by the next one, or the next tap.
            for at in (0..length).step_by(LANES) {
                let lane: &[f32; LANES] = strip[from + at..].first_chunk().unwrap_or(&[0.0; LANES]);
                out[to + at..][..LANES].copy_from_slice(lane);
            }
        }
    }
}

/// Sums of `R` channels from `first` on at the places in `W` registers.
#[target_feature(enable = "avx512f")]
fn tile<const R: usize, const W: usize>(
    panel: &[[f32; PLACES]],
    w: &[f32],
    bias: &[f32],
    first: usize,
    y: &mut Columns,
) {
    let n = panel.len();
    assert!(w.len() == R * n && bias.len() == R, "kernels of another size");
    let mut sums = [[_mm512_setzero_ps(); W]; R];
    for (sums, bias) in sums.iter_mut().zip(bias) {
        *sums = [_mm512_set1_ps(*bias); W];
    }
    for (k, places) in panel.iter().enumerate() {
        let places = places.as_chunks::<LANES>().0;
        let mut x = [_mm512_setzero_ps(); W];
        for i in 0..W {
            x[i] = load(&places[i]);
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `w` has n numbers for each of the channels, which was asserted above. Slices of every channel would be asked
            // for their lengths at every step.
            #[allow(unsafe_code)]
            let w = _mm512_set1_ps(unsafe { *w.as_ptr().add(r * n + k) });
            for i in 0..W {
                sums[i] = _mm512_fmadd_ps(x[i], w, sums[i]);
            }
        }
    }
    for (channel, sums) in (first..).zip(&sums) {
        for (at, sum) in (0..y.width()).step_by(LANES).zip(sums) {
            let mut out = [0f32; LANES];
            store(&mut out, *sum);
            y.put(channel, at, &out[..LANES.min(y.width() - at)]);
        }
    }
}
