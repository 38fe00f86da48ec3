//! Shares of right cases and how sure they are, at 95%.

use serde::{Serialize, Serializer};

use crate::rng::{Rng, Stream};

/// The share of right cases among some, with every case, so that two models can be compared case by
/// case. As JSON: the share, the ends of its interval, and the cases as ones and zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share(Vec<bool>);

#[derive(Serialize)]
struct Shown {
    share: f64,
    low: f64,
    high: f64,
    cases: String,
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let [low, high] = self.interval();
        let cases = self.0.iter().map(|&right| if right { '1' } else { '0' }).collect();
        Shown { share: self.value(), low, high, cases }.serialize(serializer)
    }
}

impl FromIterator<bool> for Share {
    fn from_iter<I: IntoIterator<Item = bool>>(cases: I) -> Self {
        Self(cases.into_iter().collect())
    }
}

impl Share {
    /// Adds a case.
    pub fn push(&mut self, right: bool) {
        self.0.push(right);
    }

    /// Number of cases.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// 0 to 1; 0 without cases.
    pub fn value(&self) -> f64 {
        self.right() / self.0.len().max(1) as f64
    }

    fn right(&self) -> f64 {
        self.0.iter().filter(|&&right| right).count() as f64
    }

    /// Wilson's score interval (1927), which holds for few cases and for shares near 0 and 1 too;
    /// [0, 1] without cases.
    pub fn interval(&self) -> [f64; 2] {
        let n = self.0.len() as f64;
        if n == 0.0 {
            return [0.0, 1.0];
        }
        let (p, z2) = (self.value(), Z * Z);
        let middle = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
        [(middle - half).max(0.0), (middle + half).min(1.0)]
    }

    /// 1 where a case is right, else 0.
    fn values(&self) -> Vec<f64> {
        self.0.iter().map(|&right| f64::from(u8::from(right))).collect()
    }
}

/// The quantile of the normal distribution that leaves 2.5% above it.
const Z: f64 = 1.959_964;
/// Samples of the bootstrap.
const RESAMPLES: u64 = 2000;

/// The mean of the shares of several kinds, each weighing the same, and its interval, which
/// combines those of the shares (MOVER; Zou and Donner, 2008). Kinds without cases do not count.
pub fn mean(shares: &[&Share]) -> (f64, [f64; 2]) {
    let shares: Vec<&Share> = shares.iter().copied().filter(|share| share.count() > 0).collect();
    let n = shares.len().max(1) as f64;
    let mean = shares.iter().map(|share| share.value()).sum::<f64>() / n;
    let [below, above] = [0, 1].map(|end| {
        let square = |share: &&Share| (share.interval()[end] - share.value()).powi(2);
        shares.iter().map(square).sum::<f64>().sqrt() / n
    });
    (mean, [(mean - below).max(0.0), (mean + above).min(1.0)])
}

/// What the mean of the shares of several kinds in `b` exceeds that in `a` by, and the interval of
/// this difference by the bootstrap over pairs of the same cases: for both models the cases of each
/// kind are the same in the same order.
pub fn difference(a: &[&Share], b: &[&Share]) -> (f64, [f64; 2]) {
    let pair = |(a, b): (&&Share, &&Share)| b.values().iter().zip(a.values()).map(|(b, a)| b - a).collect::<Vec<_>>();
    bootstrap(&a.iter().zip(b).map(pair).collect::<Vec<_>>())
}

/// The mean over kinds of the mean of each, and the 2.5% and 97.5% percentiles of it when the
/// values of each kind are drawn again with replacement. Kinds without values do not count.
fn bootstrap(kinds: &[Vec<f64>]) -> (f64, [f64; 2]) {
    let kinds: Vec<&Vec<f64>> = kinds.iter().filter(|kind| !kind.is_empty()).collect();
    if kinds.is_empty() {
        return (0.0, [0.0, 1.0]);
    }
    let mean = |value: &dyn Fn(usize, usize) -> f64| {
        let of = |(k, kind): (usize, &&Vec<f64>)| (0..kind.len()).map(|i| value(k, i)).sum::<f64>() / kind.len() as f64;
        kinds.iter().enumerate().map(of).sum::<f64>() / kinds.len() as f64
    };
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|sample| {
            let rng = Rng::new(0, sample, Stream::Train, 900);
            mean(&|k, i| kinds[k][rng.below((k as u64) << 32 | i as u64, kinds[k].len())])
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[((RESAMPLES - 1) as f64 * share).round() as usize];
    (mean(&|k, i| kinds[k][i]), [at(0.025), at(0.975)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(right: usize, count: usize) -> Share {
        (0..count).map(|i| i < right).collect()
    }

    #[test]
    fn wilson_intervals_equal_published_ones() {
        // Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for (right, count, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let [l, h] = share(right, count).interval();
            assert!((l - low).abs() < 1e-4 && (h - high).abs() < 1e-4, "{right} of {count}: {l} {h}");
        }
        assert_eq!(Share::default().interval(), [0.0, 1.0]);
    }

    #[test]
    fn the_interval_of_a_mean_narrows_with_more_kinds() {
        let (half, all) = (share(20, 40), share(40, 40));
        assert_eq!(mean(&[&half]), (0.5, half.interval()));
        let [low, high] = half.interval();
        let (of_four, [l, h]) = mean(&[&half, &half, &half, &half, &Share::default()]);
        assert!(of_four == 0.5 && ((h - l) / (high - low) - 0.5).abs() < 1e-9, "{l} {h}");
        // Where all are right it is not sure that all will be.
        let (of_right, [l, h]) = mean(&[&all, &all]);
        assert!(of_right == 1.0 && (0.93..0.95).contains(&l) && h == 1.0, "{l} {h}");
    }

    #[test]
    fn only_a_difference_beyond_chance_exceeds_its_interval() {
        let of = |cases: &str| cases.bytes().map(|c| c == b'1').collect::<Share>();
        // Four of forty cases differ, all in favour of b; and as many either way.
        let a = of(&"1100".repeat(10));
        let better = of(&("1110".repeat(8) + &"1100".repeat(2)));
        let (up, [low, high]) = difference(&[&a], &[&better]);
        assert!((up - 0.2).abs() < 1e-9 && low > 0.0 && high < 0.4, "{low} {high}");
        let other = of(&("1010".repeat(4) + &"1100".repeat(6)));
        let (none, [low, high]) = difference(&[&a], &[&other]);
        assert!(none == 0.0 && low < 0.0 && high > 0.0);
        assert_eq!(difference(&[&a], &[&a]), (0.0, [0.0, 0.0]));
    }

    #[test]
    fn json_shows_share_interval_and_cases() {
        let json = serde_json::to_value(share(1, 4)).unwrap();
        assert_eq!((json["share"].as_f64(), json["cases"].as_str()), (Some(0.25), Some("1000")));
        assert!(json["low"].as_f64().unwrap() < 0.25 && json["high"].as_f64().unwrap() > 0.25);
    }
}
