//! Positions on a lattice that all scales share: that of the last grid of the ratio's largest
//! level.

use candle_core::{Device, Result, Tensor};

use crate::backbone::Rope;

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// The position of line `i` of `count` among the `most` lines of the lattice: `i * most / count`,
/// with halves rounded to even.
pub fn coordinate(i: usize, count: usize, most: usize) -> usize {
    let (whole, rest) = (i * most / count, i * most % count);
    let up = match (2 * rest).cmp(&count) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => whole % 2 == 1,
        std::cmp::Ordering::Greater => true,
    };
    whole + usize::from(up)
}

/// Angles of a grid (height, width) on a lattice (height, width), row-major: cosines and sines
/// (1, h * w, head_dim / 2). The first half of the pairs turns by the row, the second by the
/// column.
pub fn grid((h, w): (usize, usize), lattice: (usize, usize), head_dim: usize, device: &Device) -> Result<Rope> {
    let each = head_dim / 4;
    let frequencies: Vec<f64> = (0..each).map(|j| THETA.powf(-(j as f64) / each as f64)).collect();
    let mut angles = Vec::with_capacity(h * w * 2 * each);
    for i in 0..h {
        let row = coordinate(i, h, lattice.0) as f64;
        for j in 0..w {
            let column = coordinate(j, w, lattice.1) as f64;
            angles.extend(frequencies.iter().map(|f| (row * f) as f32));
            angles.extend(frequencies.iter().map(|f| (column * f) as f32));
        }
    }
    let angles = Tensor::from_vec(angles, (1, h * w, 2 * each), device)?;
    Ok(Rope { cos: angles.cos()?, sin: angles.sin()? })
}

/// The order of the rows of a projection to heads of `head_dim` channels in which the pairs
/// (2j, 2j + 1), which rotate together here, become (j, j + head_dim / 2), as [`crate::ops::rope`]
/// expects.
pub fn halves(rows: usize, head_dim: usize) -> impl Iterator<Item = u32> {
    let half = head_dim / 2;
    (0..rows).map(move |row| {
        let (head, channel) = (row / head_dim, row % head_dim);
        (head * head_dim + if channel < half { 2 * channel } else { 2 * (channel - half) + 1 }) as u32
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::ratios;
    use crate::ops;

    fn golden(name: &str) -> std::collections::HashMap<String, Tensor> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/infinity/");
        candle_core::safetensors::load(format!("{path}{name}"), &Device::Cpu).unwrap()
    }

    fn far(got: &Tensor, want: &Tensor) -> f32 {
        assert_eq!(got.dims(), want.dims());
        (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn halves_go_to_the_even_number() {
        assert_eq!((0..4).map(|i| coordinate(i, 4, 6)).collect::<Vec<_>>(), [0, 2, 3, 4]);
        assert_eq!((0..4).map(|i| coordinate(i, 4, 10)).collect::<Vec<_>>(), [0, 2, 5, 8]);
        assert_eq!(
            (0..32).map(|i| coordinate(i, 32, 64)).collect::<Vec<_>>(),
            (0..32).map(|i| 2 * i).collect::<Vec<_>>()
        );
    }

    /// Every coordinate of every ratio's table.
    #[test]
    fn coordinates_equal_the_references() {
        let table = ratios::table();
        assert_eq!(table.len(), 15);
        for ratio in table {
            let lattice = ratio.scales[ratio.scales.len() - 1];
            for (si, &(h, w)) in ratio.scales.iter().enumerate() {
                assert_eq!((0..h).map(|i| coordinate(i, h, lattice.0)).collect::<Vec<_>>(), ratio.rope_rows[si]);
                assert_eq!((0..w).map(|i| coordinate(i, w, lattice.1)).collect::<Vec<_>>(), ratio.rope_columns[si]);
            }
        }
    }

    /// Names as `0.666_1M_scale4.q`: of the ratio, the level, and a scale of the level.
    #[test]
    fn rotations_equal_the_reference() -> Result<()> {
        let golden = golden("rope.safetensors");
        let mut names: Vec<&str> = golden.keys().filter_map(|key| key.strip_suffix(".q")).collect();
        names.sort();
        assert!(!names.is_empty());
        for name in names {
            let mut parts = name.split('_');
            let (ratio, level, scale) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
            let scale: usize = scale.strip_prefix("scale").unwrap().parse().unwrap();
            let table = ratios::nearest(ratio.parse().unwrap());
            let lattice = table.scales[table.scales.len() - 1];
            let level = ["0.06M", "0.25M", "0.60M", "1M"].iter().position(|known| *known == level).unwrap();
            let scales = ratios::LEVELS[level];
            let at = |part: &str| &golden[&format!("{name}.{part}")];
            let rows = |part: &str| at(part).to_dtype(candle_core::DType::U32).unwrap();

            let (q, want) = (at("q"), at("q_rotated"));
            let (count, d) = q.dims2()?;
            let angles = grid(table.scales[scale], lattice, d, &Device::Cpu)?;
            let pick = |t: &Tensor| t.squeeze(0)?.index_select(&rows("rows"), 0);
            let order = Tensor::from_iter(halves(d, d), &Device::Cpu)?;
            let turned = q.index_select(&order, 1)?.reshape((1, count, 1, d))?;
            let turned = ops::rope(&turned, &pick(&angles.cos)?, &pick(&angles.sin)?)?.reshape((count, d))?;
            assert!(far(&turned, &want.index_select(&order, 1)?) < 2e-4, "{name}");

            let last = grid(table.scales[scales - 1], lattice, d, &Device::Cpu)?;
            let pick = |t: &Tensor| t.squeeze(0)?.index_select(&rows("last_scale_rows"), 0);
            assert!(far(&pick(&last.cos)?, at("last_scale_cos")) < 2e-4, "{name}");
            assert!(far(&pick(&last.sin)?, at("last_scale_sin")) < 2e-4, "{name}");
        }
        Ok(())
    }
}
