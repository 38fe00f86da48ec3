//! From logits to codes: temperature, top-k, top-p, and noise that depends on
//! (seed, scale, position) alone.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::sampling::{Filter, Sampling};
use crate::rng::{Rng, Stream};
use crate::tokenizer::{Code, pack};

/// Why sampling failed.
#[derive(Debug)]
pub enum Fault {
    /// A row of logits without a finite maximum, or with a NaN.
    NonFinite {
        /// Index of the row.
        position: usize,
    },
    /// An operation failed.
    Tensor(candle_core::Error),
}

impl From<candle_core::Error> for Fault {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(error)
    }
}

/// Parameters of sampling one pass over a scale.
#[derive(Clone, Copy, Debug)]
pub struct SampleParams<'a> {
    /// Temperature and filters.
    pub sampling: &'a Sampling,
    /// VAR's guidance t at this scale.
    pub guidance: f64,
    /// Of every image.
    pub seeds: &'a [u64],
    /// Index of the scale.
    pub scale: usize,
    /// 0 for the first pass.
    pub pass: usize,
}

/// The code that a GPU samples where the logits are not finite, so that nothing has to wait for it:
/// no codebook is as large.
pub const NON_FINITE: u32 = u32::MAX;
/// The same mark in place of a bit, which is 0 or 1.
pub const NON_FINITE_BIT: u8 = u8::MAX;

/// Codes of one scale, (images, T) u32 or, as bits, (images, T, bits) u8, image by image.
///
/// Errors: a position that is marked with [`NON_FINITE`] or [`NON_FINITE_BIT`].
pub fn to_host(codes: &Tensor) -> Result<Vec<Vec<Code>>, Fault> {
    let marked = |position: Option<usize>| position.map_or(Ok(()), |position| Err(Fault::NonFinite { position }));
    if codes.dtype() == DType::U32 {
        let row = |codes: Vec<u32>| {
            marked(codes.iter().position(|&code| code == NON_FINITE))?;
            Ok(codes.into_iter().map(Code::from).collect())
        };
        return codes.to_vec2()?.into_iter().map(row).collect();
    }
    let (_, tokens, bits) = codes.dims3()?;
    let all = codes.flatten_all()?.to_vec1::<u8>()?;
    let row = |image: &[u8]| {
        marked(image.iter().position(|&bit| bit > 1).map(|at| at / bits))?;
        Ok(image.chunks_exact(bits).map(pack).collect())
    };
    all.chunks_exact(tokens * bits).map(row).collect()
}

/// One code for each of the positions from `first` on, by their [`guided`] logits: (R, T, codes) ->
/// (images, T) u32 on the same device. The rows are one of every image and then, with guidance, the
/// unconditional one of every image.
///
/// Errors: logits that are not finite, unless a GPU draws: there the code is [`NON_FINITE`].
pub fn sample(logits: &Tensor, params: &SampleParams, first: usize) -> Result<Tensor, Fault> {
    let ((rows, tokens, codes), images) = (logits.dims3()?, params.seeds.len());
    let uniforms = |&seed: &u64| {
        let rng = Rng::new(seed, 0, Stream::Code, params.scale as u64 | (params.pass as u64) << 32);
        (0..tokens).map(move |position| rng.uniform((first + position) as u64))
    };
    let noise: Vec<f64> = params.seeds.iter().flat_map(uniforms).collect();
    let filter = params.sampling.filter(params.pass);
    // As if the positions of all images were those of one.
    let logits = logits.reshape((rows / images.max(1), images * tokens, codes))?;
    #[cfg(feature = "cuda")]
    if let Some(drawn) = on_gpu(&logits, params, filter, &noise)? {
        return Ok(drawn.reshape((images, tokens))?);
    }
    let drawn = guided(&logits, params.guidance)?.into_par_iter().zip(noise).enumerate().map(|(i, (row, noise))| {
        // To the end of the row: a loop that may stop early takes one number at a time.
        let nan = row.iter().fold(false, |nan, v| nan | v.is_nan());
        if nan || !row.iter().copied().fold(f32::NEG_INFINITY, f32::max).is_finite() {
            return Err(Fault::NonFinite { position: first + i % tokens });
        }
        Ok(sample_row(row, params.sampling.temperature_at(params.scale), filter, noise))
    });
    Ok(Tensor::from_vec(drawn.collect::<Result<Vec<u32>, _>>()?, (images, tokens), logits.device())?)
}

/// Codes of a further pass, with the marks of a GPU ([`NON_FINITE`], [`NON_FINITE_BIT`]) from the
/// pass before.
pub fn keep_non_finite(codes: Tensor, before: &Tensor) -> candle_core::Result<Tensor> {
    match codes.device().is_cpu() {
        true => Ok(codes),
        false if codes.dtype() == DType::U8 => before.eq(NON_FINITE_BIT)?.where_cond(before, &codes),
        false => before.eq(NON_FINITE)?.where_cond(before, &codes),
    }
}

/// [`sample`] on the GPU that holds the logits; `None` if no kernel supports them.
#[cfg(feature = "cuda")]
fn on_gpu(
    logits: &Tensor,
    params: &SampleParams,
    filter: Filter,
    noise: &[f64],
) -> candle_core::Result<Option<Tensor>> {
    let greedy = params.sampling.temperature_at(params.scale) < COLD;
    let Some(top_k) = (if greedy { Some(1) } else { filter.top_k }) else { return Ok(None) };
    let (temperature, top_p) =
        (if greedy { 0.0 } else { params.sampling.temperature_at(params.scale) as f32 }, filter.top_p as f32);
    let sample = crate::ops::Sample { guidance: params.guidance as f32, temperature, top_k, top_p };
    crate::ops::sample(logits, &sample, noise)
}

/// Logits in f32 under VAR's guidance, (1 + t) conditional - t unconditional: (R, T, codes) -> T
/// rows.
pub fn guided(logits: &Tensor, t: f64) -> candle_core::Result<Vec<Vec<f32>>> {
    let (rows, tokens, codes) = logits.dims3()?;
    let logits = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let (conditional, unconditional) = logits.split_at(tokens * codes);
    if rows == 1 || t == 0.0 {
        return Ok(conditional.chunks_exact(codes).map(<[f32]>::to_vec).collect());
    }
    let (more, less) = ((1.0 + t) as f32, t as f32);
    let both = conditional.par_chunks_exact(codes).zip(unconditional.par_chunks_exact(codes));
    Ok(both.map(|(c, u)| c.iter().zip(u).map(|(c, u)| c * more - u * less).collect()).collect())
}

/// Below this temperature sampling is argmax; dividing the logits by less could overflow.
pub(super) const COLD: f64 = 1e-6;

/// Samples an entry of a row of logits with a finite maximum, filtered by `kept`, with `u` uniform
/// on (0, 1); at temperature 0 the largest.
pub fn sample_row(mut row: Vec<f32>, temperature: f64, kept: Filter, u: f64) -> u32 {
    if temperature < COLD || kept.top_k == Some(1) {
        return argmax(&row);
    }
    row.iter_mut().for_each(|v| *v /= temperature as f32);
    let kept = filter(&row, kept.top_k, kept.top_p);
    let probabilities = softmax(&row, &kept);
    let mut rest = u * probabilities.iter().sum::<f64>();
    for (&index, p) in kept.iter().zip(&probabilities) {
        rest -= p;
        if rest <= 0.0 {
            return index;
        }
    }
    // Rounding can leave a crumb after the last one.
    kept.last().copied().unwrap_or_else(|| argmax(&row))
}

fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, &v)| if v > b.1 { (i, v) } else { b });
    best.0 as u32
}

/// Unnormalised probabilities of the `kept` entries, in f64.
fn softmax(row: &[f32], kept: &[u32]) -> Vec<f64> {
    let top = kept.iter().map(|&i| row[i as usize]).fold(f32::NEG_INFINITY, f32::max);
    kept.iter().map(|&i| f64::from(row[i as usize] - top).exp()).collect()
}

/// The entries that survive top-k (ties with the k-th stay) and then top-p (the smallest set of the
/// likeliest whose probabilities exceed p; always at least one), likeliest first.
pub fn filter(row: &[f32], top_k: Option<usize>, top_p: f64) -> Vec<u32> {
    let likelier = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    let top_k = top_k.filter(|&k| k < row.len());
    let mut order: Vec<u32> = match top_k.and_then(|k| bound(row, k)) {
        Some(bound) => (0..row.len() as u32).filter(|&i| row[i as usize] >= bound).collect(),
        None => (0..row.len() as u32).collect(),
    };
    if let Some(k) = top_k {
        let (_, &mut kth, _) = order.select_nth_unstable_by(k - 1, likelier);
        let threshold = row[kth as usize];
        order.retain(|&i| row[i as usize] >= threshold);
    }
    order.sort_unstable_by(likelier);
    if top_p < 1.0 {
        let probabilities = softmax(row, &order);
        let limit = top_p * probabilities.iter().sum::<f64>();
        let mut before = 0.0;
        let keep = probabilities.iter().take_while(|&p| {
            let keep = before <= limit;
            before += p;
            keep
        });
        let keep = keep.count().max(1);
        order.truncate(keep);
    }
    order
}

/// Of many more than k numbers, what at least k of them reach, and few others do: the k-th largest
/// of the largest of each part of the row.
fn bound(row: &[f32], k: usize) -> Option<f32> {
    let part = Some(row.len() / (2 * k)).filter(|&part| part > 1)?;
    let largest = |part: &[f32]| part.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut largest: Vec<f32> = row.chunks(part).map(largest).collect();
    Some(*largest.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn filters_equal_the_golden_data() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/sampler_filter.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let mut seen = 0;
        for name in golden.keys().filter_map(|k| k.strip_suffix(".in")) {
            let flat = |kind: &str| golden[&format!("{name}.{kind}")].flatten_to(1).unwrap();
            let params = golden[&format!("{name}.params")].to_vec1::<f32>().unwrap();
            let k = (params[0] > 0.0).then_some(params[0] as usize);
            let p = if params[1] > 0.0 { f64::from(params[1]) } else { 1.0 };
            let (rows, keep, probs) = (flat("in"), flat("keep"), flat("probs"));
            for i in 0..rows.dim(0).unwrap() {
                let row = rows.get(i).unwrap().to_vec1::<f32>().unwrap();
                let kept = filter(&row, k, p);
                let mut mask = vec![0u8; row.len()];
                kept.iter().for_each(|&j| mask[j as usize] = 1);
                assert_eq!(mask, keep.get(i).unwrap().to_vec1::<u8>().unwrap(), "{name} row {i}");
                let want = probs.get(i).unwrap().to_vec1::<f32>().unwrap();
                let got = softmax(&row, &kept);
                let total: f64 = got.iter().sum();
                for (&j, p) in kept.iter().zip(&got) {
                    assert!((p / total - f64::from(want[j as usize])).abs() < 1e-5, "{name} row {i}");
                }
                seen += 1;
            }
        }
        assert!(seen >= 30, "{seen}");
    }

    fn sampling(temperature: f64, top_k: Option<usize>, top_p: f64) -> Sampling {
        Sampling { temperature, top_k, top_p, ..Sampling::default() }
    }

    /// Codes of logits (T, codes) without guidance.
    fn sample(logits: &Tensor, sampling: &Sampling, seed: u64, scale: usize, pass: usize) -> Result<Vec<u32>, Fault> {
        let params = SampleParams { sampling, guidance: 0.0, seeds: &[seed], scale, pass };
        Ok(super::sample(&logits.unsqueeze(0)?, &params, 0)?.get(0)?.to_vec1()?)
    }

    #[track_caller]
    fn fault(drawn: Result<Vec<u32>, Fault>) -> usize {
        match drawn {
            Err(Fault::NonFinite { position }) => position,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn top_k_is_what_sorting_everything_gives() {
        let rng = Rng::new(9, 0, Stream::Train, 0);
        for (case, n) in [1usize, 2, 7, 100, 2048].into_iter().enumerate() {
            for k in [1, 2, 5, 50, 2000].into_iter().filter(|&k| k <= n) {
                // Coarse numbers, so that many are equal, and some that are not finite.
                let number = |i: usize| match rng.normal((case * 10_000 + i) as u64) {
                    x if x > 2.5 => f32::NEG_INFINITY,
                    x => (x * 8.0).round() as f32 / 8.0,
                };
                let row: Vec<f32> = (0..n).map(number).collect();
                let mut sorted = row.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let kept = sorted.iter().filter(|x| **x >= sorted[k - 1]).count();
                let got: Vec<f32> = filter(&row, Some(k), 1.0).iter().map(|&i| row[i as usize]).collect();
                assert_eq!(got, sorted[..kept], "{k} of {n}");
            }
        }
    }

    #[test]
    fn temperature_zero_is_argmax() {
        let logits = Tensor::new(&[[0f32, 3.0, 1.0], [2.0, 0.0, 1.0]], &Device::Cpu).unwrap();
        assert_eq!(sample(&logits, &sampling(0.0, None, 1.0), 5, 0, 0).unwrap(), [1, 0]);
        assert_eq!(sample(&logits, &sampling(1e-40, None, 0.9), 5, 0, 0).unwrap(), [1, 0]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let row = [0.7f32, 0.2, 0.1].map(f32::ln);
        let logits = Tensor::new(&[row; 4000], &Device::Cpu).unwrap();
        let drawn = sample(&logits, &sampling(1.0, None, 1.0), 5, 0, 0).unwrap();
        let share = drawn.iter().filter(|&&c| c == 0).count() as f64 / 4000.0;
        assert!((share - 0.7).abs() < 0.03, "{share}");
        assert_ne!(drawn, sample(&logits, &sampling(1.0, None, 1.0), 6, 0, 0).unwrap());
        assert_ne!(drawn, sample(&logits, &sampling(1.0, None, 1.0), 5, 1, 0).unwrap());
    }

    #[test]
    fn guidance_pushes_away_from_the_unconditional_row() {
        let logits = Tensor::new(&[[[1.0f32, 0.9, 0.0]], [[1.0, 0.0, 0.0]]], &Device::Cpu).unwrap();
        let greedy = sampling(0.0, None, 1.0);
        let draw = |guidance| {
            let params = SampleParams { sampling: &greedy, guidance, seeds: &[1], scale: 0, pass: 0 };
            super::sample(&logits, &params, 0).unwrap().to_vec2::<u32>().unwrap()
        };
        assert_eq!(draw(0.0), [[0]]);
        assert_eq!(draw(1.0), [[1]]);
    }

    #[test]
    fn images_drawn_together_are_those_drawn_alone() {
        let rng = Rng::new(3, 0, Stream::Train, 0);
        let logits: Vec<f32> = (0..4 * 30 * 11).map(|i| rng.normal(i) as f32).collect();
        let logits = Tensor::from_vec(logits, (4, 30, 11), &Device::Cpu).unwrap();
        let free = sampling(1.0, Some(8), 0.9);
        let draw = |seeds: &[u64], logits: &Tensor| {
            let params = SampleParams { sampling: &free, guidance: 1.5, seeds, scale: 2, pass: 0 };
            super::sample(logits, &params, 3).unwrap().to_vec2::<u32>().unwrap()
        };
        let alone = |image: usize, seed: u64| {
            let pair = Tensor::stack(&[logits.get(image).unwrap(), logits.get(2 + image).unwrap()], 0).unwrap();
            draw(&[seed], &pair).remove(0)
        };
        assert_eq!(draw(&[7, 8], &logits), [alone(0, 7), alone(1, 8)]);
        assert_ne!(alone(0, 7), alone(0, 8));
    }

    #[test]
    fn every_pass_has_its_own_filter_and_noise() {
        let logits = Tensor::new(&[[0f32, 1.0, 0.5]; 200], &Device::Cpu).unwrap();
        let later_passes = vec![Filter { top_k: None, top_p: 1.0 }, Filter { top_k: Some(1), top_p: 1.0 }];
        let sampling = Sampling { later_passes, ..sampling(1.0, None, 1.0) };
        let draw = |pass| sample(&logits, &sampling, 5, 0, pass).unwrap();
        assert_ne!(draw(0), draw(1));
        assert_eq!(draw(2), [1; 200]);
    }

    #[test]
    fn logits_that_are_not_finite_stop_the_run() {
        let logits = Tensor::new(&[[0f32, 1.0], [f32::NAN, 1.0]], &Device::Cpu).unwrap();
        assert_eq!(fault(sample(&logits, &sampling(1.0, None, 1.0), 5, 0, 0)), 1);
        for row in [[f32::NEG_INFINITY; 2], [f32::INFINITY, 1.0]] {
            let logits = Tensor::new(&[row], &Device::Cpu).unwrap();
            assert_eq!(fault(sample(&logits, &sampling(0.0, None, 1.0), 5, 0, 0)), 0);
        }
    }
}
