//! Reductions that the compiler can vectorise, with the same results on every CPU and on any number
//! of threads.

use rayon::prelude::*;

/// Sum of `f` over pairs, in eight independent lanes: a plain fold may not be reordered, so it
/// never vectorises.
#[inline(always)]
pub(crate) fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| f(a, b)).sum();
    let mut lanes = [0f32; 8];
    for (a, b) in a.zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// The largest element that is not NaN, in eight lanes as [`sum`]; negative infinity for none.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let chunks = x.chunks_exact(8);
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
    let mut lanes = [f32::NEG_INFINITY; 8];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane = larger(*lane, x));
    }
    lanes.iter().fold(tail, |a, &b| larger(a, b))
}

/// Mean and inverse standard deviation, in two passes over `x`.
#[inline(always)]
pub(crate) fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x, x, |x, _| x) / n;
    let variance = sum(x, x, |x, _| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Most partial results of [`in_order`].
const PARTS: usize = 32;

/// Folds items on all threads, joining partial results in the order of the items. Which items go
/// into one is fixed: rayon's own splits differ from run to run, and sums of f32 with them.
/// `finish` drops what a part needed on the way.
pub(crate) fn in_order<I: IndexedParallelIterator, S: Send, T: Send>(
    items: I,
    start: impl Fn() -> S + Sync + Send,
    fold: impl Fn(S, I::Item) -> S + Sync + Send,
    finish: impl Fn(S) -> T + Sync + Send,
    join: impl Fn(T, T) -> T,
) -> T {
    let part = items.len().div_ceil(PARTS).max(1);
    let parts: Vec<T> = items.fold_chunks(part, &start, fold).map(&finish).collect();
    parts.into_iter().reduce(join).unwrap_or_else(|| finish(start()))
}

/// [`in_order`] of vectors that are added.
pub(crate) fn sums_in_order<I: IndexedParallelIterator>(
    items: I,
    zeros: impl Fn() -> Vec<f32> + Sync + Send,
    fold: impl Fn(Vec<f32>, I::Item) -> Vec<f32> + Sync + Send,
) -> Vec<f32> {
    in_order(items, zeros, fold, |sums| sums, add)
}

/// `a + b`, to join partial sums.
pub(super) fn add(mut a: Vec<f32>, b: Vec<f32>) -> Vec<f32> {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    a
}

/// Runs `f`, whose loops are compiled a second time for the CPU's widest vector instructions, with
/// the same results. `f` has to be `#[inline(always)]`.
#[inline(always)]
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_do_not_change_sums() {
        let x: Vec<f32> = (0..10_007).map(|i| (i as f32).sin() * 1e3).collect();
        let sums = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sums_in_order(x.par_chunks(3), || vec![0.0], |sum, x| vec![sum[0] + x.iter().sum::<f32>()]))
        };
        assert!([2, 3, 7].iter().all(|&threads| sums(threads) == sums(1)));
        assert_eq!(sums_in_order(x[..0].par_chunks(3), || vec![5.0], |sum, _| sum), [5.0]);
    }

    #[test]
    fn the_remainder_counts() {
        let x: Vec<f32> = (0..19).map(|i| i as f32).collect();
        assert_eq!(sum(&x, &x, |a, _| a), 171.0);
        assert_eq!((max(&x), max(&x[..3]), max(&[])), (18.0, 2.0, f32::NEG_INFINITY));
    }
}
