use super::*;
use crate::rng::Stream;

fn quantizer(l2_norm: bool) -> Quantizer {
    let config = CodebookConfig { size: 32, semantic_dim: 3, pixel_dim: 5, w_sem: 0.5, w_pix: 1.0, l2_norm };
    let rng = Rng::new(3, 0, Stream::Train, 0);
    Quantizer::from_table(&config, (0..32 * 8).map(|i| rng.normal(i) as f32).collect(), &Device::Cpu).unwrap()
}

const SCALES: [(usize, usize); 4] = [(1, 1), (2, 2), (2, 3), (4, 5)];

fn features() -> Vec<f32> {
    let rng = Rng::new(4, 0, Stream::Train, 0);
    (0..20 * 8).map(|i| rng.normal(i) as f32).collect()
}

#[test]
fn codes_accumulate_to_f_hat_and_shrink_the_residual() {
    let q = quantizer(false);
    let f = features();
    let encoded = q.encode(&f, &SCALES, None, |_, _, _| {});
    assert_eq!(encoded.codes.iter().map(Vec::len).collect::<Vec<_>>(), [1, 4, 6, 20]);
    let again = q.accumulate(&encoded.codes, &SCALES, (4, 5));
    assert!(again.iter().zip(&encoded.f_hat).all(|(a, b)| (a - b).abs() < 1e-5));
    let energy = |x: &mut dyn Iterator<Item = f32>| x.map(|v| v * v).sum::<f32>();
    let left = energy(&mut f.iter().zip(&encoded.f_hat).map(|(a, b)| a - b));
    assert!(left < energy(&mut f.iter().copied()), "{left}");
}

#[test]
fn the_nearest_code_is_nearest_by_brute_force() {
    for l2_norm in [false, true] {
        let q = quantizer(l2_norm);
        let mut row = features()[..8].to_vec();
        let found = q.encode(&row.clone(), &[(1, 1)], None, |_, _, _| {}).codes[0][0];
        if l2_norm {
            normalise_halves(&mut row, 3);
        }
        let distance = |code: Code| {
            let d = |r: std::ops::Range<usize>| -> f32 { r.map(|i| (q.entry(code)[i] - row[i]).powi(2)).sum() };
            0.5 * d(0..3) + d(3..8)
        };
        let best = (0..32).min_by(|a, b| distance(*a).total_cmp(&distance(*b))).unwrap();
        assert_eq!(Code::from(found), best);
    }
}

#[test]
fn self_correction_keeps_the_nearest_as_target() {
    let q = quantizer(false);
    let how = SelfCorrection { fraction: 0.6, top_k: 4 };
    let rng = Rng::new(9, 0, Stream::Train, 0);
    let mut residual_targets = Vec::new();
    let drawn = q.encode(&features(), &SCALES, Some((&how, &rng)), |_, _, t| residual_targets.push(Code::from(t)));
    assert_eq!(drawn.targets.concat(), residual_targets);
    let again = q.accumulate(&drawn.codes, &SCALES, (4, 5));
    assert!(again.iter().zip(&drawn.f_hat).all(|(a, b)| (a - b).abs() < 1e-5));
    let none = SelfCorrection { fraction: 0.0, top_k: 4 };
    let plain = q.encode(&features(), &SCALES, Some((&none, &rng)), |_, _, _| {});
    assert_eq!(plain.codes, plain.targets);
}

#[test]
fn self_correction_draws_its_share_of_every_scale() {
    // So far from all codes that they are about as near as each other: a draw is another code 31
    // times of 32.
    let (q, far) = (quantizer(false), features().iter().map(|x| 1000.0 * x).collect::<Vec<f32>>());
    let how = SelfCorrection { fraction: 0.6, top_k: 32 };
    let mut others = [0; SCALES.len()];
    for i in 0..1000 {
        let rng = Rng::new(9, i, Stream::Train, 0);
        let Encoded { codes, targets, .. } = q.encode(&far, &SCALES, Some((&how, &rng)), |_, _, _| {});
        for ((others, codes), targets) in others.iter_mut().zip(&codes).zip(&targets) {
            *others += codes.iter().zip(targets).filter(|(code, target)| code != target).count();
        }
    }
    for (others, (h, w)) in others.into_iter().zip(SCALES) {
        let share = others as f64 / (1000 * h * w) as f64;
        assert!((share - 0.6 * 31.0 / 32.0).abs() < 0.06, "{h}x{w}: {share}");
    }
}
