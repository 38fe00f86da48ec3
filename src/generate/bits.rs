//! From logits to bits. Every bit is drawn by itself, by noise that depends on
//! (seed, scale, position, channel) alone.

use candle_core::{DType, Result, Tensor};

use super::Filter;
use super::sampler::{COLD, Fault, NON_FINITE_BIT, SampleParams};
use crate::rng::{Rng, Stream};

/// The bits (images, T, bits) u8 of the positions from `first` on, by their logits
/// (R, T, 2 * bits), those of 0 and of 1 side by side, on the device of the logits. The rows are
/// one of every image and then, with guidance, the unconditional one of every image.
///
/// Errors: logits that are not finite, unless a GPU draws: there the bit is [`NON_FINITE_BIT`].
pub fn sample(logits: &Tensor, params: &SampleParams, first: usize) -> std::result::Result<Tensor, Fault> {
    let (guided, device) = (guided(logits, params)?, logits.device());
    let (images, tokens, bits) = guided.dims3()?;
    let bits = bits / 2;
    let pairs = guided.reshape((images, tokens, bits, 2))?;
    let of = |value: usize| pairs.narrow(3, value, 1)?.squeeze(3);
    let gap = (of(1)? - of(0)?)?;

    let filter = params.sampling.filter(params.pass);
    let greedy = params.sampling.temperature_at(params.scale) < COLD;
    let threshold = |&seed: &u64| {
        let rng = Rng::new(seed, 0, Stream::Code, params.scale as u64 | (params.pass as u64) << 32);
        let counters = (first * bits) as u64..((first + tokens) * bits) as u64;
        counters.map(move |i| if greedy { 0.0 } else { threshold(rng.uniform(i), filter) })
    };
    let thresholds: Vec<f32> = params.seeds.iter().flat_map(threshold).collect();
    let drawn = gap.gt(&Tensor::from_vec(thresholds, (images, tokens, bits), device)?)?;
    let finite = gap.abs()?.le(f32::MAX)?;
    let drawn = finite.where_cond(&drawn, &Tensor::full(NON_FINITE_BIT, drawn.shape(), device)?)?;
    if device.is_cpu() {
        let finite = finite.flatten_all()?.to_vec1::<u8>()?;
        if let Some(at) = finite.iter().position(|&finite| finite == 0) {
            return Err(Fault::NonFinite { position: first + at / bits % tokens });
        }
    }
    Ok(drawn)
}

/// Logits (R, T, 2 * bits) of the images in f32, under guidance and divided by the temperature:
/// (images, T, 2 * bits).
pub fn guided(logits: &Tensor, params: &SampleParams) -> Result<Tensor> {
    let (images, t) = (params.seeds.len(), params.guidance);
    let logits = logits.to_dtype(DType::F32)?;
    let conditional = logits.narrow(0, 0, images)?;
    let guided = match logits.dim(0)? > images && t != 0.0 {
        true => ((conditional * (1.0 + t))? - (logits.narrow(0, images, images)? * t)?)?,
        false => conditional,
    };
    match params.sampling.temperature_at(params.scale) {
        cold if cold < COLD => Ok(guided),
        temperature => guided / temperature,
    }
}

/// A bit is 1 if the logit of 1 exceeds that of 0 by more than this, where `u` is uniform on
/// (0, 1). The filter `kept` applies to the two values: the rarer one is dropped if its probability
/// is at most 1 - top_p.
fn threshold(u: f64, kept: Filter) -> f32 {
    if kept.top_k == Some(1) {
        return 0.0;
    }
    let certain = (kept.top_p / (1.0 - kept.top_p)).ln().max(0.0);
    (u / (1.0 - u)).ln().clamp(-certain, certain) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Sampling;
    use candle_core::Device;

    fn sampling(temperature: f64, top_k: Option<usize>, top_p: f64) -> Sampling {
        Sampling { temperature, top_k, top_p, ..Sampling::default() }
    }

    /// Names as `prob.topk900_topp0.97`: probabilities after these filters, where 0 is none.
    #[test]
    fn filters_equal_the_reference() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/infinity/sampler.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let logits = golden["logits"].to_vec2::<f32>().unwrap();
        let mut seen = 0;
        for (name, want) in &golden {
            let Some((k, p)) = name.strip_prefix("prob.topk").and_then(|rest| rest.split_once("_topp")) else {
                continue;
            };
            let (k, p): (usize, f64) = (k.parse().unwrap(), p.parse().unwrap());
            let kept = Filter { top_k: Some(k).filter(|&k| k > 0), top_p: if p > 0.0 { p } else { 1.0 } };
            for (pair, want) in logits.iter().zip(want.to_vec2::<f32>().unwrap()) {
                let gap = pair[1] - pair[0];
                let one = |u: f64| gap > threshold(u, kept);
                // The bit is 1 for the share of all noise that its probability is.
                let share = f64::from(want[1]);
                for off in [1e-4, 0.01, 0.3] {
                    assert!(share - off <= 0.0 || one(share - off), "{name}: {pair:?} should be 1");
                    assert!(share + off >= 1.0 || !one(share + off), "{name}: {pair:?} should be 0");
                }
                seen += 1;
            }
        }
        assert!(seen >= 4 * 200, "{seen}");
    }

    /// OneCAT's two filters of two values, with what they keep and its probabilities.
    #[test]
    fn onecats_filter_equals_the_reference() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/onecat/preprocess.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let of = |name: &str| &golden[&format!("bit_filter.{name}")];
        let (pairs, probabilities) = (of("in").to_vec2::<f32>().unwrap(), of("probs").to_vec2::<f32>().unwrap());
        let keep = of("keep").to_vec2::<u8>().unwrap();
        let kept = Filter { top_k: Some(2), top_p: 0.97 };
        for ((pair, want), keep) in pairs.iter().zip(&probabilities).zip(&keep) {
            let one = |u: f64| pair[1] - pair[0] > threshold(u, kept);
            for (value, keep) in keep.iter().enumerate() {
                // Whatever the noise, a value that goes is never drawn, and one that stays is, now
                // and then.
                let drawn = [1e-9, 1.0 - 1e-9].iter().any(|&u| usize::from(one(u)) == value);
                assert_eq!(u8::from(drawn), *keep, "{pair:?}");
            }
            let share = f64::from(want[1]);
            for off in [1e-4, 0.01, 0.3] {
                assert!(share - off <= 0.0 || one(share - off), "{pair:?} should be 1");
                assert!(share + off >= 1.0 || !one(share + off), "{pair:?} should be 0");
            }
        }
        assert_eq!(pairs.len(), 400);
    }

    #[test]
    fn bits_follow_their_probabilities_and_nothing_else() {
        // 0 with 0.7, and with certainty.
        let row = [0.7f32.ln(), 0.3f32.ln(), 9.0, 0.0];
        let logits = Tensor::new(&[[row; 4000]], &Device::Cpu).unwrap();
        let usual = sampling(1.0, None, 0.97);
        let bits = |seed: u64, scale: usize, first: usize, tokens: usize| {
            let params = SampleParams { sampling: &usual, guidance: 0.0, seeds: &[seed], scale, pass: 0 };
            let part = logits.narrow(1, first, tokens).unwrap();
            sample(&part, &params, first).unwrap().to_vec3::<u8>().unwrap().remove(0)
        };
        let drawn = bits(5, 1, 0, 4000);
        let ones = drawn.iter().filter(|bits| bits[0] == 1).count() as f64 / 4000.0;
        assert!((ones - 0.3).abs() < 0.03, "{ones}");
        assert!(drawn.iter().all(|bits| bits[1] == 0));
        assert_ne!(drawn, bits(6, 1, 0, 4000));
        assert_ne!(drawn, bits(5, 2, 0, 4000));
        assert_eq!(drawn[1000..1100], bits(5, 1, 1000, 100));
    }

    #[test]
    fn images_drawn_together_are_those_drawn_alone() {
        let rng = Rng::new(3, 0, Stream::Train, 0);
        let logits: Vec<f32> = (0..4 * 30 * 10).map(|i| rng.normal(i) as f32).collect();
        let logits = Tensor::from_vec(logits, (4, 30, 10), &Device::Cpu).unwrap();
        let usual = sampling(0.5, None, 0.97);
        let draw = |seeds: &[u64], logits: &Tensor| {
            let params = SampleParams { sampling: &usual, guidance: 2.0, seeds, scale: 2, pass: 0 };
            sample(logits, &params, 0).unwrap().to_vec3::<u8>().unwrap()
        };
        let alone = |image: usize, seed: u64| {
            let pair = Tensor::stack(&[logits.get(image).unwrap(), logits.get(2 + image).unwrap()], 0).unwrap();
            draw(&[seed], &pair).remove(0)
        };
        assert_eq!(draw(&[7, 8], &logits), [alone(0, 7), alone(1, 8)]);
    }

    #[test]
    fn logits_that_are_not_finite_stop_the_run() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let logits = Tensor::new(&[[[0f32, 1.0, 1.0, 0.0], [0.0, 1.0, bad, 0.0]]], &Device::Cpu).unwrap();
            for usual in [sampling(1.0, None, 0.97), sampling(0.0, None, 1.0)] {
                let params = SampleParams { sampling: &usual, guidance: 0.0, seeds: &[1], scale: 0, pass: 0 };
                match sample(&logits, &params, 3) {
                    Err(Fault::NonFinite { position }) => assert_eq!(position, 4),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}
