//! Named colours, and the nearest name of a colour.

use std::sync::LazyLock;

use crate::scenes::COLOURS;

/// Three channels: sRGB from 0 to 255, or OKLab.
pub type Rgb = [f32; 3];

/// The share of `colour` over `background` in a blend.
pub fn cover(blend: Rgb, background: Rgb, colour: Rgb) -> f32 {
    let (mut along, mut length) = (0.0, 0.0);
    for c in 0..3 {
        let step = colour[c] - background[c];
        along += (blend[c] - background[c]) * step;
        length += step * step;
    }
    along / length.max(1.0)
}

/// Index of the nearest of [`COLOURS`] to a colour in OKLab.
pub fn nearest_colour(lab: Rgb) -> usize {
    let nearer = |a: &usize, b: &usize| distance(lab, palette(*a)).total_cmp(&distance(lab, palette(*b)));
    (0..COLOURS.len()).min_by(nearer).unwrap_or(0)
}

/// A colour of [`COLOURS`] in OKLab.
pub fn palette(colour: usize) -> Rgb {
    static LAB: LazyLock<Vec<Rgb>> = LazyLock::new(|| COLOURS.iter().map(|c| oklab(c.rgb.map(f32::from))).collect());
    LAB[colour]
}

/// Squared distance.
pub fn distance(a: Rgb, b: Rgb) -> f32 {
    (0..3).map(|c| (a[c] - b[c]) * (a[c] - b[c])).sum()
}

/// sRGB (0 to 255) to OKLab (Ottosson, 2020), in which distances are as people see them.
pub fn oklab(rgb: Rgb) -> Rgb {
    let [r, g, b] = rgb.map(|v| match v.clamp(0.0, 255.0) / 255.0 {
        v if v <= 0.04045 => v / 12.92,
        v => ((v + 0.055) / 1.055).powf(2.4),
    });
    let l = (0.412_221_47 * r + 0.536_332_54 * g + 0.051_445_993 * b).cbrt();
    let m = (0.211_903_5 * r + 0.680_699_5 * g + 0.107_396_96 * b).cbrt();
    let s = (0.088_302_46 * r + 0.281_718_84 * g + 0.629_978_7 * b).cbrt();
    [
        0.210_454_26 * l + 0.793_617_8 * m - 0.004_072_047 * s,
        1.977_998_5 * l - 2.428_592_2 * m + 0.450_593_7 * s,
        0.025_904_037 * l + 0.782_771_77 * m - 0.808_675_77 * s,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oklab_has_ottossons_values() {
        for (rgb, lab) in [([255.0; 3], [1.0, 0.0, 0.0]), ([255.0, 0.0, 0.0], [0.6280, 0.2249, 0.1258])] {
            assert!(distance(oklab(rgb), lab).sqrt() < 1e-3, "{:?}", oklab(rgb));
        }
    }
}
