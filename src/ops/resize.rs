//! Moving pixels: nearest-neighbour upsampling and the pixel shuffles.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::slice::{self, Borrowed};

/// Doubles height and width: (B, C, H, W) to (B, C, 2H, 2W) by repeating each pixel.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    x.dims4()?;
    match slice::fused(&[x]) {
        true => x.contiguous()?.apply_op1(Upsample),
        false => plain_upsample(x),
    }
}

/// Moves `r` by `r` pixels into channels: (B, C, H, W) to (B, C·r², H/r, W/r), the channel outermost.
///
/// Errors when `r` does not divide both sides.
pub fn pixel_unshuffle(x: &Tensor, r: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    if r == 0 || h % r != 0 || w % r != 0 {
        bail!("pixel_unshuffle: {r} does not divide {h}x{w}");
    }
    shuffle(x, Shuffle { r, join: false })
}

/// Moves channels into `r` by `r` pixels: (B, C·r², H, W) to (B, C, H·r, W·r), the inverse of [`pixel_unshuffle`].
///
/// Errors when r² does not divide the channels.
pub fn pixel_shuffle(x: &Tensor, r: usize) -> Result<Tensor> {
    let (_, c, _, _) = x.dims4()?;
    if r == 0 || c % (r * r) != 0 {
        bail!("pixel_shuffle: {r}² does not divide {c} channels");
    }
    shuffle(x, Shuffle { r, join: true })
}

fn shuffle(x: &Tensor, op: Shuffle) -> Result<Tensor> {
    match slice::fused(&[x]) {
        _ if op.r == 1 => Ok(x.clone()),
        true => x.contiguous()?.apply_op1(op),
        false => plain_shuffle(x, &op),
    }
}

fn plain_upsample(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.reshape((b, c, 2 * h, 2 * w))
}

fn plain_shuffle(x: &Tensor, op: &Shuffle) -> Result<Tensor> {
    let (r, (b, c, h, w)) = (op.r, x.dims4()?);
    let split = match op.join {
        true => x.reshape((b, c / r / r, r, r, h, w))?.permute((0, 1, 4, 2, 5, 3))?,
        false => x.reshape((b, c, h / r, r, w / r, r))?.permute((0, 1, 3, 5, 2, 4))?,
    };
    split.reshape(op.shape(x.shape())?)
}

struct Upsample;

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample-nearest2x"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, c, h, w) = l1.shape().dims4()?;
        let x: &[f32] = slice::contiguous(s1, l1)?;
        let mut out = vec![0f32; 4 * x.len()];
        out.par_chunks_mut(4 * h * w).zip(x.par_chunks(h * w)).for_each(|(out, x)| {
            for (out, x) in out.chunks_exact_mut(4 * w).zip(x.chunks_exact(w)) {
                let (first, second) = out.split_at_mut(2 * w);
                first.chunks_exact_mut(2).zip(x).for_each(|(pair, &x)| pair.fill(x));
                second.copy_from_slice(first);
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((b, c, 2 * h, 2 * w))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, h, w) = x.dims4()?;
        let dy = dy.contiguous()?;
        let borrowed = Borrowed::of(&dy);
        let mut dx = vec![0f32; x.elem_count()];
        dx.par_chunks_mut(h * w).zip(borrowed.slice::<f32>()?.par_chunks(4 * h * w)).for_each(|(dx, dy)| {
            for (dx, dy) in dx.chunks_exact_mut(w).zip(dy.chunks_exact(4 * w)) {
                let (first, second) = dy.split_at(2 * w);
                let pairs = first.chunks_exact(2).zip(second.chunks_exact(2));
                dx.iter_mut().zip(pairs).for_each(|(dx, (a, b))| *dx = a[0] + a[1] + b[0] + b[1]);
            }
        });
        slice::gradient(x, dx)
    }
}

struct Shuffle {
    r: usize,
    /// Channels into pixels, as `pixel_shuffle` does, rather than pixels into channels.
    join: bool,
}

impl Shuffle {
    fn shape(&self, from: &Shape) -> Result<Shape> {
        let (r, (b, c, h, w)) = (self.r, from.dims4()?);
        Ok(Shape::from(if self.join { (b, c / r / r, h * r, w * r) } else { (b, c * r * r, h / r, w / r) }))
    }

    /// Each image channel of `area` pixels on its own: `r²` planes of `w` columns on one side, one plane of `w * r`
    /// on the other.
    fn run(&self, x: &[f32], area: usize, w: usize) -> Vec<f32> {
        let (r, plane) = (self.r, area / self.r / self.r);
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(area).zip(x.par_chunks(area)).for_each(|(out, x)| {
            for tap in 0..r * r {
                let (i, j) = (tap / r, tap % r);
                for row in 0..plane / w {
                    let (split, joined) = (tap * plane + row * w, (row * r + i) * w * r + j);
                    match self.join {
                        true => {
                            let to = out[joined..].iter_mut().step_by(r);
                            to.zip(&x[split..split + w]).for_each(|(out, x)| *out = *x);
                        }
                        false => {
                            let from = x[joined..].iter().step_by(r);
                            out[split..split + w].iter_mut().zip(from).for_each(|(out, x)| *out = *x);
                        }
                    }
                }
            }
        });
        out
    }

    fn apply(&self, x: &[f32], shape: &Shape) -> Result<Vec<f32>> {
        let (r, (_, _, h, w)) = (self.r, shape.dims4()?);
        Ok(if self.join { self.run(x, r * r * h * w, w) } else { self.run(x, h * w, w / r) })
    }
}

impl CustomOp1 for Shuffle {
    fn name(&self) -> &'static str {
        "pixel-shuffle"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = self.apply(slice::contiguous(s1, l1)?, l1.shape())?;
        Ok((CpuStorage::F32(out), self.shape(l1.shape())?))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let back = Shuffle { r: self.r, join: !self.join };
        slice::gradient(x, back.apply(Borrowed::of(&dy).slice()?, dy.shape())?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{random, same};
    use super::*;

    #[test]
    fn match_the_compositions() {
        let x = random((2, 18, 6, 9), 1);
        same(&[&x], || upsample_nearest2x(&x), || plain_upsample(&x));
        same(&[&x], || pixel_shuffle(&x, 3), || plain_shuffle(&x, &Shuffle { r: 3, join: true }));
        same(&[&x], || pixel_unshuffle(&x, 3), || plain_shuffle(&x, &Shuffle { r: 3, join: false }));
    }

    #[test]
    fn shuffles_are_inverse_and_checked() -> Result<()> {
        let x = random((1, 3, 4, 6), 1);
        let back = pixel_shuffle(&pixel_unshuffle(&x, 2)?, 2)?;
        assert_eq!(back.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
        assert!(pixel_shuffle(&x, 2).is_err() && pixel_unshuffle(&x, 4).is_err() && pixel_unshuffle(&x, 0).is_err());
        Ok(())
    }
}
