//! Infinity's scale schedules: 15 ratios, of which a level is a prefix (`infinity_schedules.json`).

use std::sync::LazyLock;

use serde::Deserialize;

/// One ratio.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ratio {
    /// Height over width, cut to three digits.
    #[serde(rename = "h_div_w")]
    pub h_over_w: f64,
    /// Token grids (height, width) of all 13 scales, 1x1 first.
    #[serde(rename = "scales_hw")]
    pub scales: Vec<(usize, usize)>,
    /// Per scale, the positions of its rows on the last grid of all 13, at every level (RoPE).
    pub rope_rows: Vec<Vec<usize>>,
    /// The same for its columns.
    #[serde(rename = "rope_cols")]
    pub rope_columns: Vec<Vec<usize>>,
}

impl Ratio {
    /// The scales of a level.
    pub fn prefix(&self, level: usize) -> &[(usize, usize)] {
        &self.scales[..level.min(self.scales.len())]
    }
}

/// Scales of the levels of 0.06, 0.25, 0.6 and 1 megapixel: squares of 256, 512, 768 and 1024
/// pixels.
pub const LEVELS: [usize; 4] = [7, 10, 12, 13];

#[derive(Default, Deserialize)]
struct Table {
    ratios: Vec<Ratio>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    // The file is part of the binary and the tests below parse it, so this cannot fail for a user.
    serde_json::from_str(include_str!("infinity_schedules.json")).unwrap_or_default()
});

/// All ratios, the square first.
pub fn table() -> &'static [Ratio] {
    &TABLE.ratios
}

/// The ratio with the least difference, the first of equals.
pub fn nearest(h_over_w: f64) -> &'static Ratio {
    let off = |ratio: &&Ratio| (ratio.h_over_w - h_over_w).abs();
    table().iter().min_by(|a, b| off(a).total_cmp(&off(b))).unwrap_or(&TABLE.ratios[0])
}
