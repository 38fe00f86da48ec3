//! Element-wise activations.

use candle_core::cpu::erf::erf_f32;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};
use rayon::prelude::*;

use super::exp::exp;
use super::slice::{self, Borrowed};

/// Elements one thread takes at a time: fewer are not worth waking another.
const CHUNK: usize = 1 << 15;

/// GELU in its tanh approximation, of x's shape and dtype.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    match slice::trained(&[x]) {
        true => x.contiguous()?.apply_op1(Gelu::Tanh),
        false => x.gelu(),
    }
}

/// GELU by the error function, of x's shape and dtype.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    match slice::trained(&[x]) {
        true => x.contiguous()?.apply_op1(Gelu::Erf),
        false => x.gelu_erf(),
    }
}

/// `x * sigmoid(1.702 x)`, CLIP's stand-in for GELU, of x's shape and dtype.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    match slice::trained(&[x]) {
        true => x.contiguous()?.apply_op1(Gelu::Quick),
        false => plain_quick_gelu(x),
    }
}

fn plain_quick_gelu(x: &Tensor) -> Result<Tensor> {
    (x * f64::from(QUICK))?.silu()? / f64::from(QUICK)
}

/// `silu(gate) * up`, of their common shape and dtype.
///
/// Errors when the shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("swiglu: shapes {:?} and {:?} differ", gate.dims(), up.dims());
    }
    match slice::kernels(&[gate, up]) {
        // Parts of the rows of one product.
        #[cfg(feature = "cuda")]
        true if [gate, up].into_iter().all(super::cuda::in_rows) => gate.apply_op2(up, SwiGlu),
        true => gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu),
        false => plain_swiglu(gate, up),
    }
}

/// `a + b` of the same shape, of a's dtype. candle's own makes threads of another pool spin.
///
/// Errors when the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match slice::fused(&[a, b]) && a.dims() == b.dims() {
        true => a.contiguous()?.apply_op2(&b.contiguous()?, Sum),
        false => a + b,
    }
}

fn plain_swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.to_dtype(DType::F32)?.silu()?.to_dtype(gate.dtype())?.mul(up)
}

#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `f` of every pair, on all threads.
fn map2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    let mut out = vec![0f32; a.len()];
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(|((out, a), b)| {
        slice::wide(
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

/// In the order of `gelu` in training.cu.
#[derive(Clone, Copy)]
enum Gelu {
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

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice::contiguous(s1, l1)?;
        let y = match self {
            Gelu::Tanh => map2(x, x, |x, _| x * tanh_gate(x)),
            Gelu::Erf => map2(x, x, |x, _| x * normal_cdf(x)),
            Gelu::Quick => map2(x, x, |x, _| x * sigmoid(QUICK * x)),
        };
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout) -> Result<(CudaStorage, Shape)> {
        super::cuda::training::gelu((s1, l1), *self as i32)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::training::gelu_back(x, dy, *self as i32).map(Some);
        }
        let dy = dy.contiguous()?;
        let (bx, bdy) = (Borrowed::of(x), Borrowed::of(&dy));
        let (xs, dys) = (bx.slice()?, bdy.slice()?);
        let dx = match self {
            Gelu::Tanh => map2(xs, dys, |x, dy| {
                let s = tanh_gate(x);
                let slope = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
                dy * (s + x * s * (1.0 - s) * slope)
            }),
            Gelu::Erf => map2(xs, dys, |x, dy| {
                let density = INV_SQRT_2PI * exp(-0.5 * x * x);
                dy * (normal_cdf(x) + x * density)
            }),
            Gelu::Quick => map2(xs, dys, |x, dy| {
                let s = sigmoid(QUICK * x);
                dy * (s + x * QUICK * s * (1.0 - s))
            }),
        };
        slice::gradient(x, dx)
    }
}

struct Sum;

impl CustomOp2 for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = map2(slice::contiguous(s1, l1)?, slice::contiguous(s2, l2)?, |a, b| a + b);
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(&self, _a: &Tensor, _b: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.clone()), Some(dy.clone())))
    }
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = map2(slice::contiguous(s1, l1)?, slice::contiguous(s2, l2)?, |gate, up| gate * sigmoid(gate) * up);
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        match s1.dtype() {
            DType::F32 => super::cuda::training::swiglu((s1, l1), (s2, l2)),
            _ => super::cuda::swiglu((s1, l1), (s2, l2)),
        }
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if gate.device().is_cuda() {
            let (dgate, dup) = super::cuda::training::swiglu_back(gate, up, dy)?;
            return Ok((Some(dgate), Some(dup)));
        }
        let dy = dy.contiguous()?;
        let (bgate, bup, bdy) = (Borrowed::of(gate), Borrowed::of(up), Borrowed::of(&dy));
        let (gates, ups, dys) = (bgate.slice::<f32>()?, bup.slice::<f32>()?, bdy.slice::<f32>()?);
        let (mut dgate, mut dup) = (vec![0f32; gates.len()], vec![0f32; gates.len()]);
        let outputs = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
        let inputs = gates.par_chunks(CHUNK).zip(ups.par_chunks(CHUNK)).zip(dys.par_chunks(CHUNK));
        outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), dy))| {
            for ((dgate, dup), ((g, up), dy)) in dgate.iter_mut().zip(dup).zip(gate.iter().zip(up).zip(dy)) {
                let s = sigmoid(*g);
                *dup = dy * g * s;
                *dgate = dy * up * s * (1.0 + g * (1.0 - s));
            }
        });
        Ok((slice::gradient(gate, dgate)?, slice::gradient(up, dup)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{random, same};
    use super::*;

    #[test]
    fn match_the_compositions() {
        let (x, y) = (random((3, 37), 1), random((3, 37), 2));
        same(&[&x], || gelu_tanh(&x), || x.gelu());
        same(&[&x], || gelu_erf(&x), || x.gelu_erf());
        same(&[&x], || quick_gelu(&x), || plain_quick_gelu(&x));
        same(&[&x, &y], || swiglu(&x, &y), || plain_swiglu(&x, &y));
        same(&[&x, &y], || add(&x, &y), || x.as_tensor() + y.as_tensor());
        same(&[&x], || gelu_erf(&x.t()?), || x.t()?.gelu_erf());
    }

    #[test]
    fn far_out_is_finite() -> Result<()> {
        let x = Tensor::new(&[-200f32, -20.0, 20.0, 200.0], &candle_core::Device::Cpu)?;
        for y in [gelu_tanh(&x)?, gelu_erf(&x)?, quick_gelu(&x)?, swiglu(&x, &x.ones_like()?)?] {
            let y = y.to_vec1::<f32>()?;
            assert!(y[0].abs() < 1e-6 && y[1].abs() < 1e-6 && y[2] == 20.0 && y[3] == 200.0, "{y:?}");
        }
        assert!(swiglu(&x, &x.narrow(0, 0, 2)?).is_err());
        Ok(())
    }
}
