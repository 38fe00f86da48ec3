//! Input embedding of image codes: connector, per-scale embedding, and the paper's scale-length
//! embedding.

use candle_core::{D, Result, Tensor, bail};

use super::BackboneConfig;
use crate::checkpoint::{Init, Weights};
use crate::nn::Linear;
use crate::ops;

/// Connector, scale embedding and scale-length embedding: from features of codes to inputs of the
/// transformer.
#[derive(Debug)]
pub(super) struct CodeEmbedding {
    connector: [Linear; 2],
    /// Row k is added to the tokens of scale k, or row k + 1 if row 0 is added to text: with
    /// `code_positions`. The first scale is never an input, so its row is not used.
    scale_embed: Tensor,
    /// Row 0 is added to the token that predicts the first code, the others to the codes of the
    /// other scales in order.
    code_positions: Option<Tensor>,
    hidden_size: usize,
    /// Add [`scale_length_embedding`] to every row of `scale_embed`.
    scale_length: bool,
}

impl CodeEmbedding {
    /// TokenFlow's `mm_projector` for the connector; the scale embedding is our `scale_embed`, or
    /// TokenFlow-t2i's `lvl_embed` with its code positions `pos_1LC`.
    pub(super) fn load(model: &Weights, config: &BackboneConfig) -> Result<Self> {
        let hidden = config.hidden_size;
        let connector = model.pp("mm_projector");
        let levels = (config.scale_rows(), hidden);
        let table = Init::Normal { std: 0.1 };
        Ok(Self {
            connector: [
                Linear::load(&connector.pp(0), config.code_dim, hidden)?,
                Linear::load(&connector.pp(2), hidden, hidden)?,
            ],
            scale_embed: match config.code_positions {
                None => model.get(levels, "scale_embed", table)?,
                Some(_) => model.pp("lvl_embed").get(levels, "weight", table)?,
            },
            code_positions: config.code_positions.map(|n| model.get((n, hidden), "pos_1LC", table)).transpose()?,
            hidden_size: hidden,
            scale_length: config.scale_length_embedding,
        })
    }

    /// What is added to text (R, T, hidden).
    pub(super) fn text(&self, x: Tensor) -> Result<Tensor> {
        if self.code_positions.is_some() { x.broadcast_add(&self.scale_embed.narrow(0, 0, 1)?) } else { Ok(x) }
    }

    /// What is added to text whose last token opens an image (R, T, hidden).
    pub(super) fn prefix(&self, x: Tensor) -> Result<Tensor> {
        let Some(positions) = &self.code_positions else { return Ok(x) };
        x.broadcast_add(&positions.narrow(0, 0, 1)?.pad_with_zeros(0, x.dim(1)? - 1, 0)?)
    }

    /// Code features (..., T, code_dim) of images of `count` scales -> (..., T, hidden). `indices`
    /// are the scales (0-based) that they feed, one for all or one for each. Codes of one image
    /// follow one another after its `first` codes; those of many images have no such number.
    ///
    /// Errors: codes of many images, for a model with code positions.
    pub(super) fn codes(
        &self,
        features: &Tensor,
        indices: &[usize],
        count: usize,
        first: Option<usize>,
    ) -> Result<Tensor> {
        let x = self.connect(features)?.broadcast_add(&self.scale_rows(indices, count)?)?;
        match (&self.code_positions, first) {
            (None, _) => Ok(x),
            (Some(positions), Some(first)) => x.broadcast_add(&positions.narrow(0, first, features.dim(D::Minus2)?)?),
            (Some(_), None) => bail!("a model with code positions reads the codes of one image at a time"),
        }
    }

    /// The connector: Linear, GELU, Linear, (..., code_dim) -> (..., hidden).
    fn connect(&self, features: &Tensor) -> Result<Tensor> {
        let [fc1, fc2] = &self.connector;
        fc2.forward(&ops::gelu_erf(&fc1.forward(features)?)?)
    }

    /// Scale embedding plus scale-length embedding of the scales `indices` (0-based) of an image of
    /// `count` scales: (indices, hidden).
    fn scale_rows(&self, indices: &[usize], count: usize) -> Result<Tensor> {
        let text = usize::from(self.code_positions.is_some());
        let (table, device) = (&self.scale_embed, self.scale_embed.device());
        let ids: Vec<u32> = indices.iter().map(|&i| (i + text) as u32).collect();
        let rows = ops::select(table, &Tensor::new(ids, device)?)?;
        if !self.scale_length {
            return Ok(rows);
        }
        let length = scale_length_embedding(count, self.hidden_size);
        rows.broadcast_add(&Tensor::new(length, device)?.to_dtype(table.dtype())?)
    }
}

/// The paper's scale-length embedding: the sinusoidal embedding of K, the number of scales of an
/// image, added to every grid that is an input, so from the second scale on: the first is predicted
/// by the text's last token. As in "Attention Is All You Need": sines, then cosines, of geometric
/// frequencies from 1 to 1e-4; (hidden,).
fn scale_length_embedding(scales: usize, hidden: usize) -> Vec<f32> {
    let half = hidden / 2;
    let angle = |i: usize| scales as f64 * (1e-4f64).powf(i as f64 / half as f64);
    (0..half).map(|i| angle(i).sin() as f32).chain((0..half).map(|i| angle(i).cos() as f32)).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::backbone::presets::QWEN2_5_VL_7B;

    #[test]
    fn the_scale_length_embedding_is_sines_and_cosines() {
        let angles = [8.0f64, 0.8, 0.08, 0.008];
        let want = angles.iter().map(|a| a.sin()).chain(angles.iter().map(|a| a.cos()));
        for (got, want) in scale_length_embedding(8, 8).into_iter().zip(want) {
            assert!((f64::from(got) - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn a_scale_takes_its_row_and_the_number_of_scales() -> Result<()> {
        for (code_positions, key, first) in [(None, "scale_embed", 0), (Some(14), "lvl_embed.weight", 1)] {
            for scale_length_embedding in [false, true] {
                let config = BackboneConfig {
                    hidden_size: 8,
                    codebook_size: 4,
                    code_dim: 3,
                    max_scales: 5,
                    scale_length_embedding,
                    code_positions,
                    ..QWEN2_5_VL_7B
                };
                let weights = Weights::trainable(3, &Device::Cpu);
                let embedding = CodeEmbedding::load(&weights, &config)?;
                let table = weights.vars()[key].to_vec2::<f32>()?;
                let length = if scale_length_embedding { super::scale_length_embedding(4, 8) } else { vec![0.0; 8] };
                let rows = embedding.scale_rows(&[1, 2, 3], 4)?.to_vec2::<f32>()?;
                for (row, k) in rows.iter().zip(1..) {
                    let want: Vec<f32> =
                        table[first + k].iter().zip(&length).map(|(row, length)| row + length).collect();
                    assert_eq!(row, &want);
                }
            }
        }
        Ok(())
    }
}
