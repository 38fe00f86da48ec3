//! The half of a block with attention.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Branch, Trained, trained};
use crate::ops::cpu::attention::{Heads, Visible, attend, attend_back};
use crate::ops::cpu::operand::{Borrowed, are_f32};
use crate::ops::linear::{Linear, add_assign, column_sums};
use crate::ops::matrix::WeightMatrix;
use crate::ops::norm::RmsNorm;
use crate::ops::rope::rotate_rows;

/// Rows per task that copies.
const ROWS: usize = 64;

/// `x + attention(n) oᵀ` with `n` the RMS norm of x (B, T, hidden) by weights (hidden) and epsilon:
/// attention of [`linear_each`](crate::ops::linear_each) of n with `qkv`, in heads of `head_dim`,
/// of which queries and keys are turned by [`rope`](crate::ops::rope), under a mask (T, T) or
/// (B, T, T), u8; of x's shape. None unless all are trained in f32 on a CPU.
pub fn attention_branch(
    x: &Tensor,
    (norm, eps): (&Tensor, f32),
    qkv: [(&WeightMatrix, Option<&Tensor>); 3],
    o: &WeightMatrix,
    (cos, sin): (&Tensor, &Tensor),
    mask: &Tensor,
    head_dim: usize,
) -> Result<Option<Tensor>> {
    let [(q, _), (k, _), (v, _)] = qkv;
    let Some((mixed, weights)) = trained(x, [q, k, v, o]) else { return Ok(None) };
    let [(queries, hidden), (keys, _), ..] = [weights[0].dims2()?, weights[1].dims2()?];
    let (batch, tokens, _) = x.dims3()?;
    let biases: Vec<Tensor> = qkv.into_iter().filter_map(|(_, bias)| bias.cloned()).collect();
    let fits = weights[2].dims() == [keys, hidden]
        && weights[3].dims() == [hidden, queries]
        && [0, 3].contains(&biases.len())
        && queries % keys == 0
        && norm.dims() == [hidden]
        && are_f32(&[cos, sin]);
    if !fits {
        return Ok(None);
    }
    let width = queries + 2 * keys;
    let branch = AttentionBranch {
        norm: RmsNorm { eps },
        products: Linear::training(mixed, &[(width, hidden), (hidden, queries)]),
        angles: [cos.detach().contiguous()?, sin.detach().contiguous()?],
        mask: mask.contiguous()?,
        biased: !biases.is_empty(),
        size: Size { batch, tokens, hidden, queries, keys, head_dim },
    };
    let flat = weights.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
    Trained::apply(branch, x, norm, &[flat, biases].concat()).map(Some)
}

#[derive(Clone, Copy)]
struct Size {
    batch: usize,
    tokens: usize,
    hidden: usize,
    /// Channels of all heads of queries, and of keys.
    queries: usize,
    keys: usize,
    head_dim: usize,
}

impl Size {
    /// Channels of queries, keys and values.
    fn width(self) -> usize {
        self.queries + 2 * self.keys
    }

    /// Heads of queries, keys and values (N, width).
    fn heads(self, projected: &[f32]) -> (Heads<'_>, Heads<'_>, Heads<'_>) {
        let part = |first: usize, channels: usize| {
            Heads::of_rows(&projected[first..], self.tokens, (channels / self.head_dim, self.head_dim), self.width())
        };
        (part(0, self.queries), part(self.queries, self.keys), part(self.queries + self.keys, self.keys))
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

struct AttentionBranch {
    norm: RmsNorm,
    products: Linear,
    /// Cosines and sines, (T, D / 2) or (B, T, D / 2).
    angles: [Tensor; 2],
    mask: Tensor,
    biased: bool,
    size: Size,
}

/// What the forward pass keeps.
struct Kept {
    /// Turned queries and keys, and values, (N, width).
    projected: Vec<f32>,
    /// What is attended to, (N, queries).
    attended: Vec<f32>,
}

impl AttentionBranch {
    /// The projections (width, hidden), that back (hidden, queries), and the biases (width), if
    /// any.
    fn split<'a>(&self, weights: &'a [f32]) -> (&'a [f32], &'a [f32], Option<&'a [f32]>) {
        let Size { hidden, queries, .. } = self.size;
        let (qkv, rest) = weights.split_at(self.size.width() * hidden);
        let (o, biases) = rest.split_at(hidden * queries);
        (qkv, o, self.biased.then_some(biases))
    }

    /// Turns queries and keys; back if `sign` is -1.
    fn rotate(&self, projected: &mut [f32], sign: f32) -> Result<()> {
        let Size { queries, keys, head_dim, .. } = self.size;
        let [cos, sin] = self.angles.each_ref().map(Borrowed::of);
        let heads = ((queries + keys) / head_dim, head_dim);
        rotate_rows(projected, self.size.width(), heads, (cos.slice()?, sin.slice()?), sign);
        Ok(())
    }

    /// Calls `f` with the keys that queries see.
    fn with_visible<R>(&self, f: impl FnOnce(Visible) -> R) -> Result<R> {
        let mask = Borrowed::of(&self.mask);
        let kept = mask.slice()?;
        Ok(f(if self.mask.rank() == 3 { Visible::BatchMask(kept) } else { Visible::Mask(kept) }))
    }
}

impl Branch for AttentionBranch {
    const NAME: &'static str = "attention-branch";
    type Kept = Kept;

    fn forward(&self, x: &[f32], norm: &[f32], weights: &[f32]) -> Result<(Vec<f32>, Kept)> {
        let (size, (qkv, o, biases)) = (self.size, self.split(weights));
        let mut projected =
            self.products.product(&self.norm.rows(x, norm), qkv, biases, (size.width(), size.hidden))?;
        self.rotate(&mut projected, 1.0)?;
        let heads = size.heads(&projected);
        let attended = self.with_visible(|visible| attend(heads, size.batch, visible, size.scale()))?;
        let mut y = x.to_vec();
        self.products.add_product(&mut y, &attended, o, (size.hidden, size.queries))?;
        Ok((y, Kept { projected, attended }))
    }

    fn backward(
        &self,
        Kept { projected, attended }: Kept,
        [x, norm, weights]: [&[f32]; 3],
        dy: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let (size, (qkv, o, _)) = (self.size, self.split(weights));
        let Size { hidden, queries, keys, .. } = size;
        let width = size.width();
        let d_o = self.products.weight_gradient(dy, &attended, (hidden, queries))?;
        drop(attended);
        let dattended = self.products.input_gradient(dy, o, (hidden, queries))?;
        let heads = size.heads(&projected);
        let [dq, dk, dv] =
            self.with_visible(|visible| attend_back(heads, &dattended, size.batch, visible, size.scale()))?;
        let mut gradients = projected;
        let parts = (dq.par_chunks(ROWS * queries), dk.par_chunks(ROWS * keys), dv.par_chunks(ROWS * keys));
        gradients.par_chunks_mut(ROWS * width).zip(parts.0).zip(parts.1).zip(parts.2).for_each(
            |(((rows, dq), dk), dv)| {
                let parts = dq.chunks_exact(queries).zip(dk.chunks_exact(keys)).zip(dv.chunks_exact(keys));
                for (row, ((dq, dk), dv)) in rows.chunks_exact_mut(width).zip(parts) {
                    row[..queries].copy_from_slice(dq);
                    row[queries..][..keys].copy_from_slice(dk);
                    row[queries + keys..].copy_from_slice(dv);
                }
            },
        );
        self.rotate(&mut gradients, -1.0)?;
        let mut dweights = self.products.weight_gradient(&gradients, &self.norm.rows(x, norm), (width, hidden))?;
        dweights.extend(d_o);
        if self.biased {
            dweights.extend(column_sums(&gradients, width));
        }
        let dnormed = self.products.input_gradient(&gradients, qkv, (width, hidden))?;
        let (mut dx, dnorm) = self.norm.rows_back(x, norm, &dnormed);
        add_assign(&mut dx, dy);
        Ok((dx, dnorm, dweights))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::testing::{random, same};
    use crate::ops::{Mask, add, attention, rms_norm, rope};

    #[test]
    fn is_the_composition() -> Result<()> {
        for (biased, rank, (heads, kv, d)) in [(true, 3, (4, 2, 8)), (false, 2, (2, 2, 6)), (true, 3, (4, 1, 32))] {
            let (b, t, hidden) = (2, 70, 32);
            let (x, norm) = (random((b, t, hidden), 1), random(hidden, 2));
            let w = |rows: usize, columns: usize, seed: u64| -> Result<Var> {
                Var::from_tensor(&(random((rows, columns), seed).as_tensor() * 0.2)?)
            };
            let (q, k, v) = (w(heads * d, hidden, 3)?, w(kv * d, hidden, 4)?, w(kv * d, hidden, 5)?);
            let (o, bias) = (w(hidden, heads * d, 6)?, [random(heads * d, 7), random(kv * d, 8), random(kv * d, 9)]);
            let angles = random((b, t, d / 2), 10);
            let (cos, sin) = (angles.detach().cos()?, angles.detach().sin()?);
            let mask = Tensor::from_iter((0..b * t * t).map(|i| u8::from(i % t <= i / t % t)), &Device::Cpu)?;
            let mask = mask.reshape((b, t, t))?.to_dtype(DType::U8)?;
            let mask = if rank == 3 { mask } else { mask.get(0)? };
            let matrix = |w: &Var| WeightMatrix::Dense(w.as_tensor().clone());
            let fused = || {
                let matrices = [&q, &k, &v, &o].map(matrix);
                let bias = |i: usize| biased.then(|| bias[i].as_tensor());
                let layers = [(&matrices[0], bias(0)), (&matrices[1], bias(1)), (&matrices[2], bias(2))];
                let y = attention_branch(&x, (&norm, 1e-6), layers, &matrices[3], (&cos, &sin), &mask, d)?;
                Ok(y.expect("trained in f32"))
            };
            let composed = || {
                let n = rms_norm(&x, &norm, 1e-6)?;
                let project = |w: &Var, i: usize| {
                    let y = n.broadcast_matmul(&w.t()?)?;
                    let y = if biased { y.broadcast_add(&bias[i])? } else { y };
                    y.reshape((b, t, (), d))
                };
                let (q, k) = (rope(&project(&q, 0)?, &cos, &sin)?, rope(&project(&k, 1)?, &cos, &sin)?);
                let y = attention(&q, &k, &project(&v, 2)?, Mask::Kept(&mask), 1.0 / (d as f32).sqrt())?;
                add(&x, &y.reshape((b, t, ()))?.broadcast_matmul(&o.t()?)?)
            };
            let mut inputs = vec![&x, &norm, &q, &k, &v, &o];
            if biased {
                inputs.extend(&bias);
            }
            same(&inputs, fused, composed);
        }
        Ok(())
    }
}
