//! A counter-based generator: every draw is a pure function of a key, so that the same seed gives
//! the same noise on every device, in any batch order and on any number of threads.

use rayon::prelude::*;

/// Purpose of random numbers; separates the streams of one image.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub enum Stream {
    /// A code of an image: step = scale index.
    Code = 1,
    /// A text token: step = position in the sequence.
    Token = 2,
    /// Training and data preparation: step is the caller's.
    Train = 3,
    /// Noise that the refiner begins with: step = 0.
    Refine = 4,
    /// Noise of image-to-image: step = 0 for encoding the picture, 1 for what it begins with.
    ImageToImage = 5,
}

/// The key of one stream of draws.
#[derive(Clone, Copy, Debug)]
pub struct Rng {
    key: u64,
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection that passes BigCrush when
/// fed a counter.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The FNV-1a hash (64 bits) of a text, for ever the same: what splits and initial values are keyed
/// by.
pub fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3))
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Rng {
    /// The stream for `(seed, image, stream, step)`.
    pub fn new(seed: u64, image: u64, stream: Stream, step: u64) -> Self {
        let mut key = 0;
        for word in [seed, image, stream as u64, step] {
            key = mix(key ^ word.wrapping_add(GOLDEN)).wrapping_add(GOLDEN);
        }
        Self { key }
    }

    /// Another stream of the same place: the `n`-th.
    pub fn fork(&self, n: u64) -> Self {
        Self { key: mix(self.key ^ mix(n.wrapping_add(GOLDEN))).wrapping_add(GOLDEN) }
    }

    /// The `counter`-th 64 random bits of this stream.
    pub fn bits(&self, counter: u64) -> u64 {
        mix(self.key.wrapping_add(counter.wrapping_add(1).wrapping_mul(GOLDEN)))
    }

    /// The `counter`-th draw, uniform on the open interval (0, 1).
    pub fn uniform(&self, counter: u64) -> f64 {
        ((self.bits(counter) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// The `counter`-th draw, uniform on `0..n`.
    pub fn below(&self, counter: u64, n: usize) -> usize {
        ((self.bits(counter) as u128 * n as u128) >> 64) as usize
    }

    /// The `counter`-th standard normal draw (Box-Muller over two uniform ones).
    pub fn normal(&self, counter: u64) -> f64 {
        let (u, v) = (self.uniform(2 * counter), self.uniform(2 * counter + 1));
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// The first `count` standard normal draws.
    pub fn normals(&self, count: usize) -> Vec<f32> {
        (0..count).into_par_iter().map(|i| self.normal(i as u64) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_every_part_of_the_key() {
        let base = Rng::new(1, 2, Stream::Code, 3).bits(0);
        assert_eq!(base, Rng::new(1, 2, Stream::Code, 3).bits(0));
        for other in [
            Rng::new(2, 2, Stream::Code, 3),
            Rng::new(1, 3, Stream::Code, 3),
            Rng::new(1, 2, Stream::Token, 3),
            Rng::new(1, 2, Stream::Code, 4),
        ] {
            assert_ne!(base, other.bits(0));
        }
    }

    #[test]
    fn fnv1a_has_its_published_values() {
        assert_eq!(fnv1a(""), 0xCBF2_9CE4_8422_2325);
        assert_eq!(fnv1a("foobar"), 0x8594_4171_F739_67E8);
    }

    #[test]
    fn uniform_and_normal_have_their_moments() {
        let rng = Rng::new(7, 0, Stream::Train, 0);
        let n = 20_000;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        assert!((mean(&|i| rng.uniform(i)) - 0.5).abs() < 0.01);
        assert!(mean(&|i| rng.normal(i)).abs() < 0.03);
        assert!((mean(&|i| rng.normal(i).powi(2)) - 1.0).abs() < 0.05);
        assert!((0..n).all(|i| rng.below(i, 7) < 7));
    }
}
