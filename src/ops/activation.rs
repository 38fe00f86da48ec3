//! Element-wise operations.

use candle_core::cpu::erf::erf_f32;
use candle_core::{DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::exp::{exp, sigmoid};
use super::cpu::operand::{Operand, are_f32};
use super::cpu::reduce::vectorized;
use super::custom_op::{Op, apply1, apply2, supports, supports_f32};

/// Elements per task: fewer are not worth waking another thread.
const CHUNK: usize = 1 << 15;

/// GELU in its tanh approximation: x's shape and dtype.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if supports_f32(&[x]) { apply1(Gelu::Tanh, x) } else { x.gelu() }
}

/// GELU by the error function: x's shape and dtype.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    if supports_f32(&[x]) { apply1(Gelu::Erf, x) } else { x.gelu_erf() }
}

/// `x * sigmoid(1.702 x)`, the GELU of OpenAI's CLIP: x's shape and dtype.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if supports_f32(&[x]) { apply1(Gelu::Quick, x) } else { composed_quick_gelu(x) }
}

fn composed_quick_gelu(x: &Tensor) -> Result<Tensor> {
    (x * f64::from(QUICK))?.silu()? / f64::from(QUICK)
}

/// `silu(gate) * up` for operands of one shape: their shape and dtype.
///
/// Errors: different shapes.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("swiglu: shapes {:?} and {:?} differ", gate.dims(), up.dims());
    }
    if !supports(&[gate, up]) {
        return composed_swiglu(gate, up);
    }
    #[cfg(feature = "cuda")]
    if [gate, up].into_iter().all(super::cuda::has_row_stride) {
        // The two halves of one product, read in place.
        return gate.apply_op2(up, super::custom_op::Custom(SwiGlu));
    }
    apply2(SwiGlu, gate, up)
}

fn composed_swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.to_dtype(DType::F32)?.silu()?.to_dtype(gate.dtype())?.mul(up)
}

/// `a + b` for operands of one shape: their shape and dtype. candle's own sum keeps the threads of
/// a second pool spinning.
///
/// Errors: different shapes.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if are_f32(&[a, b]) && a.dims() == b.dims() { apply2(Add, a, b) } else { a + b }
}

/// `f` of every pair, on all threads.
fn map2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    let mut out = vec![0f32; a.len()];
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(|((out, a), b)| {
        vectorized(
            #[inline(always)]
            || {
                for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
                    *out = f(a, b);
                }
            },
        );
    });
    out
}

/// The discriminants are those of `gelu` in f32.cu.
#[derive(Clone, Copy)]
pub(super) enum Gelu {
    Tanh,
    Erf,
    Quick,
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const INV_SQRT_2PI: f32 = 0.398_942_3;
const CUBIC: f32 = 0.044715;
const QUICK: f32 = 1.702;

/// `(1 + tanh(u)) / 2 = sigmoid(2u)`, which takes one exponential.
#[inline(always)]
fn tanh_gate(x: f32) -> f32 {
    sigmoid(2.0 * SQRT_2_OVER_PI * (x + CUBIC * x * x * x))
}

fn normal_cdf(x: f32) -> f32 {
    0.5 * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2))
}

impl Op<1> for Gelu {
    const NAME: &'static str = "gelu";

    fn forward(&self, [x]: [Operand; 1]) -> Result<(Vec<f32>, Shape)> {
        let (x, shape) = (x.slice()?, x.shape().clone());
        let y = match self {
            Gelu::Tanh => map2(x, x, |x, _| x * tanh_gate(x)),
            Gelu::Erf => map2(x, x, |x, _| x * normal_cdf(x)),
            Gelu::Quick => map2(x, x, |x, _| x * sigmoid(QUICK * x)),
        };
        Ok((y, shape))
    }

    fn backward(&self, [x]: [Operand; 1], _wanted: [bool; 1], dy: &[f32]) -> Result<[Option<Vec<f32>>; 1]> {
        let x = x.slice()?;
        let dx = match self {
            Gelu::Tanh => map2(x, dy, |x, dy| {
                let s = tanh_gate(x);
                let slope = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
                dy * (s + x * s * (1.0 - s) * slope)
            }),
            Gelu::Erf => map2(x, dy, |x, dy| {
                let density = INV_SQRT_2PI * exp(-0.5 * x * x);
                dy * (normal_cdf(x) + x * density)
            }),
            Gelu::Quick => map2(x, dy, |x, dy| {
                let s = sigmoid(QUICK * x);
                dy * (s + x * QUICK * s * (1.0 - s))
            }),
        };
        Ok([Some(dx)])
    }
}

pub(super) struct Add;

impl Op<2> for Add {
    const NAME: &'static str = "add";

    fn forward(&self, [a, b]: [Operand; 2]) -> Result<(Vec<f32>, Shape)> {
        Ok((map2(a.slice()?, b.slice()?, |a, b| a + b), a.shape().clone()))
    }

    fn backward(&self, _: [Operand; 2], wanted: [bool; 2], dy: &[f32]) -> Result<[Option<Vec<f32>>; 2]> {
        Ok(wanted.map(|wanted| wanted.then(|| dy.to_vec())))
    }
}

pub(super) struct SwiGlu;

impl Op<2> for SwiGlu {
    const NAME: &'static str = "swiglu";

    fn forward(&self, [gate, up]: [Operand; 2]) -> Result<(Vec<f32>, Shape)> {
        let y = map2(gate.slice()?, up.slice()?, |gate, up| gate * sigmoid(gate) * up);
        Ok((y, gate.shape().clone()))
    }

    fn backward(&self, [gate, up]: [Operand; 2], _wanted: [bool; 2], dy: &[f32]) -> Result<[Option<Vec<f32>>; 2]> {
        let (gate, up) = (gate.slice::<f32>()?, up.slice::<f32>()?);
        let (mut dgate, mut dup) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
        let outputs = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
        let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
        outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), dy))| {
            vectorized(
                #[inline(always)]
                || {
                    for ((dgate, dup), ((g, up), dy)) in dgate.iter_mut().zip(dup).zip(gate.iter().zip(up).zip(dy)) {
                        let s = sigmoid(*g);
                        *dup = dy * g * s;
                        *dgate = dy * up * s * (1.0 + g * (1.0 - s));
                    }
                },
            );
        });
        Ok([Some(dgate), Some(dup)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{random, same};
    use super::*;

    #[test]
    fn match_the_compositions() {
        let (x, y) = (random((3, 37), 1), random((3, 37), 2));
        same(&[&x], || gelu_tanh(&x), || x.gelu());
        same(&[&x], || gelu_erf(&x), || x.gelu_erf());
        same(&[&x], || quick_gelu(&x), || composed_quick_gelu(&x));
        same(&[&x, &y], || swiglu(&x, &y), || composed_swiglu(&x, &y));
        same(&[&x, &y], || add(&x, &y), || x.as_tensor() + y.as_tensor());
        same(&[&x], || gelu_erf(&x.t()?), || x.t()?.gelu_erf());
    }

    /// candle-nn's takes gate and up as halves of one tensor.
    #[test]
    fn swiglu_is_that_of_candle_nn() {
        let (x, y) = (random((3, 37), 1), random((3, 37), 2));
        same(
            &[&x, &y],
            || swiglu(&x, &y),
            || candle_nn::ops::swiglu(&Tensor::cat(&[x.as_tensor(), y.as_tensor()], 1)?),
        );
    }

    #[test]
    fn large_inputs_give_finite_results() -> Result<()> {
        let x = Tensor::new(&[-200f32, -20.0, 20.0, 200.0], &candle_core::Device::Cpu)?;
        for y in [gelu_tanh(&x)?, gelu_erf(&x)?, quick_gelu(&x)?, swiglu(&x, &x.ones_like()?)?] {
            let y = y.to_vec1::<f32>()?;
            assert!(y[0].abs() < 1e-6 && y[1].abs() < 1e-6 && y[2] == 20.0 && y[3] == 200.0, "{y:?}");
        }
        assert!(swiglu(&x, &x.narrow(0, 0, 2)?).is_err());
        Ok(())
    }
}
