//! Scale schedules: the grids of an image, coarse to fine (paper, appendix A.1).

use std::sync::LazyLock;

use serde::Deserialize;

/// One aspect ratio and its grids.
#[derive(Clone, Debug, Deserialize)]
pub struct Entry {
    /// The paper's name, height to width: "1:1", "3:5", ...
    pub ratio: String,
    /// Height over width.
    pub h_over_w: f64,
    /// (height, width) of every scale, 1x1 first.
    #[serde(rename = "scales_hw")]
    pub scales: Vec<(usize, usize)>,
}

impl Entry {
    /// The first `count` scales: 8, 12, 16 and 18 are the 128, 256, 512 and 1024 px levels.
    pub fn prefix(&self, count: usize) -> &[(usize, usize)] {
        &self.scales[..count.min(self.scales.len())]
    }
}

/// Scales of the paper's 128, 256, 512 and 1024 px levels, as far as a model of `max` scales goes,
/// and these.
pub fn levels(max: usize) -> impl Iterator<Item = usize> {
    [8, 12, 16].into_iter().filter(move |level| *level < max).chain([max])
}

static TABLE: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    // The file is part of the binary and the tests below parse it, so this cannot fail for a user.
    serde_json::from_str(include_str!("scale_schedules.json")).unwrap_or_default()
});

/// All 41 aspect ratios, from 1:4 to 4:1 (height to width), 18 scales each.
pub fn table() -> &'static [Entry] {
    &TABLE
}

/// The entry whose ratio is nearest in log space.
pub fn nearest(h_over_w: f64) -> &'static Entry {
    let distance = |e: &Entry| (e.h_over_w.ln() - h_over_w.ln()).abs();
    table().iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(&TABLE[0])
}

/// Of the entries whose first `count` scales end in the grid that comes nearest to a ratio, in log
/// space, the nearest itself. Small grids round: at the 128 px level the entry nearest to 3:2 ends
/// in a grid of 5:3.
pub fn nearest_of(h_over_w: f64, count: usize) -> &'static Entry {
    let off = |ratio: f64| (ratio.ln() - h_over_w.ln()).abs();
    let distance = |e: &Entry| {
        let (h, w) = e.prefix(count).last().copied().unwrap_or((1, 1));
        (off(h as f64 / w as f64), off(e.h_over_w))
    };
    let order = |a: (f64, f64), b: (f64, f64)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1));
    table().iter().min_by(|a, b| order(distance(a), distance(b))).unwrap_or(&TABLE[0])
}

/// Codes of all `scales`.
pub fn codes(scales: &[(usize, usize)]) -> usize {
    scales.iter().map(|(h, w)| h * w).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The coefficients of h^2 (linear layers) and of h (attention) in the paper's count of
    /// operations for one image after `text` tokens: 12 * tokens, and 4 * (sum of s_t * cum_t +
    /// text^2), where cum_t counts everything that scale t sees, the text included.
    fn flop_coefficients(scales: &[(usize, usize)], text: usize) -> (u64, u64) {
        let (mut seen, mut attention) = (text, text * text);
        for (h, w) in scales {
            seen += h * w;
            attention += h * w * seen;
        }
        (12 * seen as u64, 4 * attention as u64)
    }

    #[test]
    fn the_table_has_41_ratios_of_18_growing_scales() {
        assert_eq!(table().len(), 41);
        for e in table() {
            assert_eq!(e.scales.len(), 18, "{}", e.ratio);
            assert_eq!(e.scales[0], (1, 1));
            assert!(e.scales.windows(2).all(|w| w[0].0 <= w[1].0 && w[0].1 <= w[1].1), "{}", e.ratio);
        }
    }

    #[test]
    fn square_levels_have_the_papers_code_counts() {
        let square = nearest(1.0);
        assert_eq!(square.ratio, "1:1");
        for (scales, count) in [(8, 204), (12, 900), (16, 3_684), (18, 10_084)] {
            assert_eq!(codes(square.prefix(scales)), count);
        }
        assert_eq!(square.prefix(18)[17], (64, 64));
    }

    #[test]
    fn flops_equal_the_papers_oracle() {
        assert_eq!(flop_coefficients(nearest(1.0).prefix(18), 100), (122_208, 256_215_912));
    }

    #[test]
    fn nearest_takes_the_closest_ratio() {
        assert_eq!(nearest(9.0 / 16.0).ratio, "4:7");
        assert_eq!(nearest(100.0).ratio, "4:1");
        assert_eq!(nearest(0.01).ratio, "1:4");
    }

    #[test]
    fn small_grids_are_as_near_to_a_ratio_as_they_can_be() {
        for (ratio, grid) in [(1.0, (8, 8)), (2.0 / 3.0, (6, 9)), (1.5, (9, 6)), (0.75, (7, 9)), (0.5, (6, 12))] {
            assert_eq!(nearest_of(ratio, 8).scales[7], grid, "{ratio}");
        }
        assert_eq!(nearest_of(1.0, 18).ratio, "1:1");
        for entry in table() {
            let off = |e: &Entry| ((e.scales[17].0 as f64 / e.scales[17].1 as f64).ln() - entry.h_over_w.ln()).abs();
            assert!(off(nearest_of(entry.h_over_w, 18)) <= off(entry), "{}", entry.ratio);
        }
    }
}
