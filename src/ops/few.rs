//! `x wᵀ` for a few inputs, as when one word is read: what counts is how fast weights come from memory.

#[cfg(target_arch = "x86_64")]
mod avx2;

use candle_core::Result;
#[cfg(target_arch = "x86_64")]
use candle_core::quantized::GgmlDType;
use pulp::{Arch, Simd, WithSimd};

use super::blocks::dequantise;
use super::product::Rows;

/// Inputs that are few: for more of them, packing them for a larger kernel pays.
pub(super) const FEW: usize = 8;

/// Numbers that are unpacked at a time, into a buffer that stays in the first-level cache.
const STRIP: usize = 256;
/// Sums of a product that do not wait for each other, in registers.
const CHAINS: usize = 4;

/// Some columns, so aligned that no load takes two lines of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Strip([f32; STRIP]);

/// Some inputs as the kernels read them.
pub(super) struct Inputs {
    /// Of every input in turn, the last strip filled up with zeros: a loop of a fixed length is twice as fast.
    strips: Vec<Strip>,
    /// The sums of the groups of 32 of every strip, where blocks of Q4_K ask for them.
    #[cfg(target_arch = "x86_64")]
    sums: Vec<[f32; STRIP / 32]>,
    columns: usize,
}

impl Inputs {
    /// Inputs, `columns` long, for products with `w`.
    pub(super) fn new(inputs: &[f32], columns: usize, w: Rows) -> Self {
        let strips = inputs.chunks_exact(columns).flat_map(|x| x.chunks(STRIP));
        let strips = strips.map(|x| {
            let mut strip = Strip([0.0; STRIP]);
            strip.0[..x.len()].copy_from_slice(x);
            strip
        });
        let strips: Vec<Strip> = strips.collect();
        #[cfg(target_arch = "x86_64")]
        let sums = match w {
            Rows::Blocks(_, GgmlDType::Q4K) => strips.iter().map(avx2::of_groups).collect(),
            _ => Vec::new(),
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = w;
        Self {
            strips,
            #[cfg(target_arch = "x86_64")]
            sums,
            columns,
        }
    }

    /// Strips of an input.
    fn of_each(&self) -> usize {
        self.columns.div_ceil(STRIP)
    }

    /// How many they are.
    fn count(&self) -> usize {
        self.strips.len() / self.of_each()
    }
}

/// The products of every row of `w` with every one of the inputs: (rows, inputs) in `y`.
///
/// Errors: blocks of another type, or that do not divide the columns.
pub(super) fn products(y: &mut [f32], w: Rows, inputs: &Inputs) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    if let (w, dtype) = w.bytes()
        && avx2::suits(dtype, inputs.columns)
    {
        // SAFETY: the processor has been asked.
        #[allow(unsafe_code)]
        unsafe {
            avx2::products(y, w, dtype, inputs)
        };
        return Ok(());
    }
    Arch::new().dispatch(Products { y, w, inputs })
}

struct Products<'a> {
    y: &'a mut [f32],
    w: Rows<'a>,
    inputs: &'a Inputs,
}

impl WithSimd for Products<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<()> {
        let Self { y, w, inputs } = self;
        let (strips, columns) = (inputs.of_each(), inputs.columns);
        let mut unpacked = Strip([0.0; STRIP]);
        let mut sums = [[simd.splat_f32s(0.0); CHAINS]; FEW];
        for (row, y) in y.chunks_exact_mut(inputs.count()).enumerate() {
            let w = w.narrow(row, 1, columns);
            for strip in 0..strips {
                let at = strip * STRIP;
                let n = STRIP.min(columns - at);
                match w {
                    Rows::Plain(w) => unpacked.0[..n].copy_from_slice(&w[at..at + n]),
                    Rows::Blocks(w, dtype) => {
                        let bytes = |numbers: usize| numbers / dtype.block_size() * dtype.type_size();
                        let w = &w[bytes(at)..bytes(at + n)];
                        match n {
                            STRIP => dequantise(w, dtype, &mut unpacked.0)?,
                            _ => dequantise(w, dtype, &mut unpacked.0[..n])?,
                        }
                    }
                }
                for (sums, x) in sums.iter_mut().zip(inputs.strips[strip..].iter().step_by(strips)) {
                    *sums = add(simd, *sums, &unpacked, x);
                }
            }
            for (y, sums) in y.iter_mut().zip(&mut sums) {
                let [a, b, c, d] = std::mem::replace(sums, [simd.splat_f32s(0.0); CHAINS]);
                *y = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
            }
        }
        Ok(())
    }
}

#[inline(always)]
fn add<S: Simd>(simd: S, mut sums: [S::f32s; CHAINS], w: &Strip, x: &Strip) -> [S::f32s; CHAINS] {
    let (w, x) = (S::as_simd_f32s(&w.0).0.as_chunks::<CHAINS>().0, S::as_simd_f32s(&x.0).0.as_chunks::<CHAINS>().0);
    for (w, x) in w.iter().zip(x) {
        for i in 0..CHAINS {
            sums[i] = simd.mul_add_e_f32s(w[i], x[i], sums[i]);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::blocks::quantise;
    use super::super::check::random;
    use super::*;
    use candle_core::quantized::GgmlDType;

    #[test]
    fn blocks_give_what_their_numbers_give() {
        let numbers = |shape, seed| random(shape, seed).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4K] {
            for (rows, columns, count) in
                [(3, 32, 1), (5, 96, 2), (2, 256, 3), (7, 320, 4), (1, 1088, 5), (4, 512, 8), (3, 768, 1), (3, 77, 3)]
            {
                if columns % dtype.block_size() > 0 {
                    continue;
                }
                let (values, inputs) = (numbers((rows, columns), 1), numbers((count, columns), 2));
                let w = quantise(&values, (rows, columns), dtype, &Device::Cpu).unwrap().data().unwrap().into_owned();
                let (mut dense, mut y) = (vec![0f32; rows * columns], vec![0f32; rows * count]);
                dequantise(&w, dtype, &mut dense).unwrap();
                let w = Rows::Blocks(&w, dtype);
                products(&mut y, w, &Inputs::new(&inputs, columns, w)).unwrap();
                for (i, y) in y.iter().enumerate() {
                    let (w, x) = (&dense[i / count * columns..][..columns], &inputs[i % count * columns..][..columns]);
                    let terms = || w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let (want, most) = (terms().sum::<f64>(), 1e-6 * terms().map(f64::abs).sum::<f64>());
                    assert!(
                        (f64::from(*y) - want).abs() <= most,
                        "{dtype:?} {rows}x{columns}, {count}: {y}, not {want}"
                    );
                }
            }
        }
    }
}
