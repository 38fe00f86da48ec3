//! Multi-scale residual vector quantisation with a dual codebook and one shared index.

use candle_core::{DType, Device, Result, Tensor, bail};
use gemm::Parallelism;
use serde::{Deserialize, Serialize};

use super::code::{Code, CodeSpace};
use crate::checkpoint::{Init, Weights, placeholder};
use crate::pixels::GridResampling;
use crate::rng::Rng;

/// Guards divisions by a norm, as the reference does.
const EPS: f32 = 1e-12;
/// Most numbers in a codebook; a larger one is damage.
const MAX_ELEMENTS: usize = 1 << 27;

/// Features whose distances to all codes are held at a time: those of a 64x64 grid to 32,768 codes
/// are half a gigabyte.
const AT_ONCE: usize = 256;

/// Shape and metric of the codebook.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodebookConfig {
    /// Number of codes.
    pub size: usize,
    /// Channels of the semantic half, which come first.
    pub semantic_dim: usize,
    /// Channels of the pixel half.
    pub pixel_dim: usize,
    /// Weight of the semantic half's squared distance.
    pub w_sem: f32,
    /// Weight of the pixel half's squared distance.
    pub w_pix: f32,
    /// Normalise both halves of features and codes to unit length, as TokenFlow does. Without it a
    /// code also holds a magnitude, so that a scale that has nothing to add uses the code nearest
    /// zero.
    pub l2_norm: bool,
}

impl CodebookConfig {
    /// Channels of a code.
    pub fn dim(&self) -> usize {
        self.semantic_dim + self.pixel_dim
    }
}

/// Self-correction (paper, section on training): some codes of every scale are drawn among the
/// nearest, and the residual goes on from the drawn ones, while the targets stay the nearest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfCorrection {
    /// Share of the positions of each scale whose code is drawn.
    pub fraction: f64,
    /// Candidates: the k nearest codes, weighted by inverse squared distance.
    pub top_k: usize,
}

/// The codes of one image, coarse to fine, each scale row-major.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// The nearest code at every position: the transformer's targets.
    pub targets: Vec<Vec<Code>>,
    /// The codes that were subtracted from the residual: the transformer's inputs. Equals `targets`
    /// without self-correction.
    pub codes: Vec<Vec<Code>>,
    /// The sum of all scales on the last grid, (h * w, D).
    pub f_hat: Vec<f32>,
}

/// The dual codebook.
#[derive(Clone, Debug)]
pub struct Quantizer {
    config: CodebookConfig,
    /// (size, D), unit halves if `l2_norm`: the entries that are added to F.
    table: Vec<f32>,
    /// `table` with each half scaled by the square root of its weight: distances are measured here.
    metric: Vec<f32>,
    /// Squared norms of the rows of `metric`.
    norms: Vec<f32>,
    /// `table` on the tokenizer's device.
    rows: Tensor,
}

impl Quantizer {
    /// Keys `embedding_vqkd.weight` (semantic) and `embedding_vqgan.weight` (pixel).
    pub fn load(w: &Weights, config: &CodebookConfig) -> Result<Self> {
        let elements = config.semantic_dim.checked_add(config.pixel_dim).and_then(|dim| dim.checked_mul(config.size));
        if elements.is_none_or(|n| n > MAX_ELEMENTS) {
            bail!("a codebook of {} rows of {} + {} is too large", config.size, config.semantic_dim, config.pixel_dim);
        }
        let half = |name: &str, dim: usize| {
            let bound = 1.0 / config.size as f64;
            w.pp(name).get((config.size, dim), "weight", Init::Uniform { bound })
        };
        let semantic = half("embedding_vqkd", config.semantic_dim)?;
        let pixel = half("embedding_vqgan", config.pixel_dim)?;
        if !w.has_numbers() {
            let rows = placeholder((config.size, config.dim()))?;
            return Ok(Self { config: config.clone(), table: vec![], metric: vec![], norms: vec![], rows });
        }
        let table = Tensor::cat(&[semantic, pixel], 1)?.to_dtype(DType::F32)?;
        let device = table.device().clone();
        Self::from_table(config, table.flatten_all()?.to_vec1()?, &device)
    }

    /// A codebook from its (size, D) rows.
    pub fn from_table(config: &CodebookConfig, mut table: Vec<f32>, device: &Device) -> Result<Self> {
        let (semantic, dim) = (config.semantic_dim, config.dim());
        if config.l2_norm {
            table.chunks_exact_mut(dim).for_each(|row| normalise_halves(row, semantic));
        }
        let mut metric = table.clone();
        metric.chunks_exact_mut(dim).for_each(|row| weigh(row, config));
        let norms = metric.chunks_exact(dim).map(|row| row.iter().map(|v| v * v).sum()).collect();
        let rows = Tensor::from_slice(&table, (table.len() / dim, dim), device)?;
        Ok(Self { config: config.clone(), table, metric, norms, rows })
    }

    /// Shape and metric.
    pub fn config(&self) -> &CodebookConfig {
        &self.config
    }

    /// F or other features of one image, (h * w, D), as a (1, h, w, D) tensor on the tokenizer's
    /// device.
    pub fn to_tensor(&self, f: Vec<f32>, grid: (usize, usize)) -> Result<Tensor> {
        Tensor::from_vec(f, (1, grid.0, grid.1, self.config.dim()), self.device())
    }

    /// A copy of this quantizer for a tokenizer on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { rows: self.rows.to_device(device)?, ..self.clone() })
    }

    /// The tokenizer's device.
    pub fn device(&self) -> &Device {
        self.rows.device()
    }

    /// The code table, (size, D) row-major.
    pub fn table(&self) -> &[f32] {
        &self.table
    }

    /// The entry of one code.
    pub fn entry(&self, code: Code) -> &[f32] {
        let dim = self.config.dim();
        &self.table[code as usize * dim..][..dim]
    }

    /// Entries of `codes`, concatenated (codes, D).
    pub fn entries(&self, codes: &[Code]) -> Vec<f32> {
        codes.iter().flat_map(|&c| self.entry(c)).copied().collect()
    }

    /// The codes of one scale of one image as the loop has them: (1, T) u32 on the tokenizer's
    /// device.
    pub fn codes(&self, codes: &[Code]) -> Result<Tensor> {
        let rows: Vec<u32> = codes.iter().map(|&code| code as u32).collect();
        Tensor::from_vec(rows, (1, codes.len()), self.device())
    }

    /// Entries of codes (B, T) u32 on the tokenizer's device: (B, T, D).
    pub fn lookup(&self, codes: &Tensor) -> Result<Tensor> {
        self.rows.index_select(&codes.flatten_all()?, 0)?.reshape((codes.dim(0)?, codes.dim(1)?, self.config.dim()))
    }

    /// Squared distances, up to a constant per row, of `z` (n, D) to every code: (n, size).
    fn distances(&self, z: &[f32]) -> Vec<f32> {
        let (dim, size) = (self.config.dim(), self.config.size);
        let n = z.len() / dim;
        let mut query = z.to_vec();
        for row in query.chunks_exact_mut(dim) {
            if self.config.l2_norm {
                normalise_halves(row, self.config.semantic_dim);
            }
            weigh(row, &self.config);
        }
        let mut out: Vec<f32> = (0..n).flat_map(|_| self.norms.iter().copied()).collect();
        let (s, d) = (size as isize, dim as isize);
        // SAFETY: out is (n, size), query (n, dim) and metric (size, dim), all row-major and
        // exactly that long.
        #[allow(unsafe_code)]
        unsafe {
            let (a, b) = (query.as_ptr(), self.metric.as_ptr());
            let out = out.as_mut_ptr();
            gemm::gemm(
                n,
                size,
                dim,
                out,
                1,
                s,
                true,
                a,
                1,
                d,
                b,
                d,
                1,
                1.0,
                -2.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
        out
    }

    /// Quantises the features `f` (h * w, D) of one image on the grid of the last of `scales`.
    ///
    /// `visit(scale, z, target)` sees every pooled residual z (D) and the code nearest to it.
    pub fn encode(
        &self,
        f: &[f32],
        scales: &[(usize, usize)],
        correction: Option<(&SelfCorrection, &Rng)>,
        mut visit: impl FnMut(usize, &[f32], u32),
    ) -> Encoded {
        let dim = self.config.dim();
        let Some(&grid) = scales.last() else { return Encoded::default() };
        let mut residual = f.to_vec();
        let mut out = Encoded { f_hat: vec![0.0; f.len()], ..Encoded::default() };
        let mut draws = 0;
        for (si, &scale) in scales.iter().enumerate() {
            let z = GridResampling::area(grid, scale).apply(&residual, dim);
            let mut targets = Vec::with_capacity(z.len() / dim);
            let mut codes = Vec::with_capacity(z.len() / dim);
            for z in z.chunks(dim * AT_ONCE) {
                let distances = self.distances(z);
                for (z, row) in z.chunks_exact(dim).zip(distances.chunks_exact(self.config.size)) {
                    let nearest = argmin(row);
                    visit(si, z, nearest);
                    targets.push(Code::from(nearest));
                    codes.push(Code::from(match correction {
                        Some((how, rng)) => {
                            draws += 2;
                            if rng.uniform(draws) < how.fraction {
                                let energy = self.query_energy(z);
                                draw_near(row, energy, how.top_k, rng.uniform(draws + 1))
                            } else {
                                nearest
                            }
                        }
                        None => nearest,
                    }));
                }
            }
            let up = GridResampling::bicubic(scale, grid);
            let step = up.apply(&self.entries(&codes), dim);
            for ((r, f_hat), step) in residual.iter_mut().zip(&mut out.f_hat).zip(step) {
                *r -= step;
                *f_hat += step;
            }
            out.targets.push(targets);
            out.codes.push(codes);
        }
        out
    }

    /// The constant that [`Quantizer::distances`] leaves out.
    fn query_energy(&self, z: &[f32]) -> f32 {
        let mut row = z.to_vec();
        if self.config.l2_norm {
            normalise_halves(&mut row, self.config.semantic_dim);
        }
        weigh(&mut row, &self.config);
        row.iter().map(|v| v * v).sum()
    }

    /// Whether `codes` are those of a prefix of `scales`. Errors: as [`CodeSpace::check`].
    pub fn check(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<()> {
        CodeSpace::Table(self.config.size).check(codes, scales).map_err(candle_core::Error::msg)
    }

    /// F of one image on `grid`, (h * w, D), from the codes of a prefix of the scales.
    pub fn accumulate(&self, codes: &[Vec<Code>], scales: &[(usize, usize)], grid: (usize, usize)) -> Vec<f32> {
        let dim = self.config.dim();
        let mut f_hat = vec![0.0; grid.0 * grid.1 * dim];
        for (codes, &scale) in codes.iter().zip(scales) {
            GridResampling::bicubic(scale, grid).add_to(&self.entries(codes), dim, 1.0, &mut f_hat);
        }
        f_hat
    }
}

fn weigh(row: &mut [f32], config: &CodebookConfig) {
    let (semantic, pixel) = row.split_at_mut(config.semantic_dim);
    semantic.iter_mut().for_each(|v| *v *= config.w_sem.sqrt());
    pixel.iter_mut().for_each(|v| *v *= config.w_pix.sqrt());
}

fn normalise_halves(row: &mut [f32], semantic_dim: usize) {
    let (semantic, pixel) = row.split_at_mut(semantic_dim);
    for half in [semantic, pixel] {
        let norm = half.iter().map(|v| v * v).sum::<f32>().sqrt().max(EPS);
        half.iter_mut().for_each(|v| *v /= norm);
    }
}

fn argmin(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().fold((0, f32::INFINITY), |best, (i, &d)| if d < best.1 { (i, d) } else { best });
    best.0 as u32
}

/// One of the `k` nearest codes, with probability inverse to its squared distance; `u` is uniform
/// on (0, 1).
fn draw_near(row: &[f32], energy: f32, k: usize, u: f64) -> u32 {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let k = k.clamp(1, row.len());
    let by_distance = |a: &u32, b: &u32| row[*a as usize].total_cmp(&row[*b as usize]).then(a.cmp(b));
    if k < row.len() {
        order.select_nth_unstable_by(k - 1, by_distance);
        order.truncate(k);
    }
    order.sort_unstable_by(by_distance);
    let weight = |code: u32| 1.0 / f64::from((row[code as usize] + energy).max(1e-6));
    let mut rest = u * order.iter().map(|&c| weight(c)).sum::<f64>();
    for &code in &order {
        rest -= weight(code);
        if rest <= 0.0 {
            return code;
        }
    }
    order[k - 1]
}

#[cfg(test)]
mod tests;
