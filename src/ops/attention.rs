//! Scaled dot-product attention with grouped keys and values.

use candle_core::{D, DType, Device, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::attention::{Heads, Visible, attend, attend_back};
use super::cpu::operand::{Borrowed, Operand, are_f32};
use super::custom_op::{Custom, Op, supports_f32};

/// Which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// All.
    None,
    /// Of T queries over S keys the i-th sees the first S - T + i + 1: the queries are the last T
    /// positions, and see nothing that comes after them.
    Causal,
    /// Those where (T, S) or (B, T, S), u8, is not zero; a query that sees no key gives zeros.
    Kept(&'a Tensor),
}

impl Mask<'_> {
    fn is_causal(self) -> bool {
        matches!(self, Self::Causal)
    }
}

/// `softmax(scale * q kᵀ) v` for q (B, T, H, D) and k, v (B, S, KV, D), where H is a multiple of
/// KV: (B, T, H, D), of q's dtype.
///
/// Keys and values may be views of a cache: any batch and sequence strides, the last two dimensions
/// contiguous. With other strides they are copied. Errors: shapes that do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask, scale: f32) -> Result<Tensor> {
    let (b, t, h, d) = q.dims4()?;
    let (kb, s, kv, kd) = k.dims4()?;
    if (kb, kd) != (b, d) || kv == 0 || h % kv != 0 || v.dims() != k.dims() {
        bail!("attention: queries {:?}, keys {:?} and values {:?} do not fit", q.dims(), k.dims(), v.dims());
    }
    match mask {
        Mask::Kept(m) if m.dtype() != DType::U8 || m.dims() != [t, s] && m.dims() != [b, t, s] => {
            bail!("attention: a {:?} mask {:?} does not fit {t} queries and {s} keys", m.dtype(), m.dims());
        }
        Mask::Causal if t > s => bail!("attention: {t} causal queries have only {s} keys"),
        _ => {}
    }
    #[cfg(feature = "cuda")]
    if supports_flash(q, k, v, mask) {
        let row = |i| Ok((heads_contiguous(&k.narrow(0, i, 1)?)?, heads_contiguous(&v.narrow(0, i, 1)?)?));
        let rows: Vec<(Tensor, Tensor)> = (0..b).map(row).collect::<Result<_>>()?;
        return super::cuda::attention(q, &rows, mask.is_causal(), scale);
    }
    let kept = match mask {
        Mask::None => None,
        Mask::Causal if are_f32(&[q, k, v]) => None,
        Mask::Causal => Some(causal_mask(t, s, q.device())?),
        Mask::Kept(mask) => Some(mask.contiguous()?),
    };
    if !supports_f32(&[q, k, v]) {
        return composed(q, k, v, kept.as_ref(), scale);
    }
    let lay_out = if q.device().is_cpu() { heads_contiguous } else { Tensor::contiguous };
    let op = Attention { causal: kept.is_none() && mask.is_causal() && t > 1, mask: kept, scale };
    q.contiguous()?.apply_op3(&lay_out(k)?, &lay_out(v)?, Custom(op))
}

/// [`attention`] of every row of q (R, T, H, D) over keys and values of its own, each
/// (1, S, KV, D): (R, T, H, D).
///
/// Errors: shapes that do not fit.
pub fn attention_rows(q: &Tensor, rows: &[(Tensor, Tensor)], mask: Mask, scale: f32) -> Result<Tensor> {
    let (r, t, h, d) = q.dims4()?;
    let fits = |(k, v): &(Tensor, Tensor)| match *k.dims() {
        [1, s, kv, kd] => v.dims() == k.dims() && kd == d && kv > 0 && h % kv == 0 && (t <= s || !mask.is_causal()),
        _ => false,
    };
    if r != rows.len() || !rows.iter().all(fits) {
        let keys: Vec<&[usize]> = rows.iter().map(|(k, _)| k.dims()).collect();
        bail!("attention: queries {:?} do not fit the rows of keys {keys:?}", q.dims());
    }
    #[cfg(feature = "cuda")]
    if let [(k, _), others @ ..] = rows
        && rows.iter().all(|(k, v)| supports_flash(q, k, v, mask) && has_contiguous_heads(k) && has_contiguous_heads(v))
        && others.iter().all(|(other, _)| other.dims()[2] == k.dims()[2])
    {
        return super::cuda::attention(q, rows, mask.is_causal(), scale);
    }
    let attend = |(r, (k, v)): (usize, &(Tensor, Tensor))| attention(&q.narrow(0, r, 1)?, k, v, mask, scale);
    let outputs: Vec<Tensor> = match q.device().is_cpu() {
        true => rows.par_iter().enumerate().map(attend).collect::<Result<_>>()?,
        false => rows.iter().enumerate().map(attend).collect::<Result<_>>()?,
    };
    Tensor::cat(&outputs, 0)
}

/// Whether the CUDA kernel for bf16 supports it.
#[cfg(feature = "cuda")]
fn supports_flash(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> bool {
    super::cuda::supports_bf16(&[q, k, v])
        && !matches!(mask, Mask::Kept(_))
        && q.dims().last().is_some_and(|d| super::cuda::HEAD_DIMS.contains(d))
}

/// [`Mask::Causal`] as a mask (T, S).
fn causal_mask(t: usize, s: usize, device: &Device) -> Result<Tensor> {
    let keep = (0..t).flat_map(|i| (0..s).map(move |j| u8::from(j + t <= i + s)));
    Tensor::from_iter(keep, device)?.reshape((t, s))
}

fn has_contiguous_heads(x: &Tensor) -> bool {
    let (dims, stride) = (x.dims(), x.stride());
    let heads = (dims[3] == 1 || stride[3] == 1) && (dims[2] == 1 || stride[2] == dims[3]);
    // The CUDA kernels support no gaps between positions either.
    heads && (x.device().is_cpu() || dims[1] == 1 || stride[1] == dims[2] * dims[3])
}

fn heads_contiguous(x: &Tensor) -> Result<Tensor> {
    if has_contiguous_heads(x) { Ok(x.clone()) } else { x.contiguous() }
}

fn composed(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: f32) -> Result<Tensor> {
    let (b, _, h, d) = q.dims4()?;
    let (_, s, kv, _) = k.dims4()?;
    let repeat = |x: &Tensor| {
        let x = x.transpose(1, 2)?.unsqueeze(2)?.broadcast_as((b, kv, h / kv, s, d))?;
        x.reshape((b, h, s, d))
    };
    let q = q.transpose(1, 2)?.contiguous()?;
    let logits = (q.matmul(&repeat(k)?.t()?)?.to_dtype(DType::F32)? * f64::from(scale))?;
    let keep = mask.map(|m| {
        let m = m.ne(0u8)?.to_dtype(DType::F32)?;
        if m.rank() == 3 { m.unsqueeze(1) } else { Ok(m) }
    });
    let keep = keep.transpose()?;
    let logits = match &keep {
        Some(keep) => logits.broadcast_add(&((keep - 1.0)? * 1e30)?)?,
        None => logits,
    };
    let p = candle_nn::ops::softmax(&logits, D::Minus1)?;
    // Only a query that sees no key still has weight on masked ones.
    let p = match &keep {
        Some(keep) => p.broadcast_mul(keep)?,
        None => p,
    };
    p.to_dtype(v.dtype())?.matmul(&repeat(v)?)?.transpose(1, 2)?.contiguous()
}

/// Of queries, keys and values; keys and values need contiguous heads only.
pub(super) struct Attention {
    pub(super) mask: Option<Tensor>,
    /// Without a mask; for one query it makes no difference.
    causal: bool,
    pub(super) scale: f32,
}

impl Attention {
    /// Calls `f` with the heads of the operands and the keys that the queries see.
    fn with_heads<R>(&self, [q, k, v]: [Operand; 3], f: impl FnOnce((Heads, Heads, Heads), Visible) -> R) -> Result<R> {
        let heads = (
            Heads::new(q.strided()?, q.layout())?,
            Heads::new(k.strided()?, k.layout())?,
            Heads::new(v.strided()?, v.layout())?,
        );
        Ok(match &self.mask {
            None => f(heads, if self.causal { Visible::Causal } else { Visible::All }),
            Some(mask) => {
                let borrowed = Borrowed::of(mask);
                let kept = borrowed.slice()?;
                f(heads, if mask.rank() == 3 { Visible::BatchMask(kept) } else { Visible::Mask(kept) })
            }
        })
    }
}

impl Op<3> for Attention {
    const NAME: &'static str = "attention";

    fn forward(&self, inputs: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let (shape, batch) = (inputs[0].shape().clone(), inputs[0].dims()[0]);
        let y = self.with_heads(inputs, |heads, visible| attend(heads, batch, visible, self.scale))?;
        Ok((y, shape))
    }

    fn backward(&self, inputs: [Operand; 3], _: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let batch = inputs[0].dims()[0];
        let gradients = self.with_heads(inputs, |heads, visible| attend_back(heads, dy, batch, visible, self.scale))?;
        Ok(gradients.map(Some))
    }
}

#[cfg(test)]
mod tests;
