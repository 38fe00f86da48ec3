//! The layout of text and images in one sequence: positions, and the tokens that each token attends
//! to.

use super::rope::{Position, grid_positions, text_position};

/// The tokens of a sequence in order: text, `<boi>`, grids from the second scale on (the 1x1 grid
/// is predicted by `<boi>` and never an input), `<eoi>`.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Position of every token.
    pub positions: Vec<Position>,
    /// Token i attends to tokens `0..ends[i]`: up to itself, or to the end of its own scale.
    pub ends: Vec<usize>,
    counter: usize,
}

impl Layout {
    /// An empty sequence.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty sequence that counts from `counter`, the number of left pads: they are masked, and
    /// therefore need not be stored.
    pub fn after(counter: usize) -> Self {
        Self { counter, ..Self::default() }
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there is no token yet.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Appends `count` text tokens.
    pub fn push_text(&mut self, count: usize) {
        for _ in 0..count {
            self.push_marker();
            self.counter += 1;
        }
    }

    /// Appends `<boi>`, or the last word that opens an image, and the grids of an image. `<eoi>` is
    /// [`Layout::push_eoi`], which may be left out at the end of a sequence. Without an `extent`
    /// codes count on like text.
    pub fn push_image(&mut self, scales: &[(usize, usize)], extent: Option<f64>) {
        self.push_marker();
        for (index, &(h, w)) in scales.iter().enumerate().skip(1) {
            match extent {
                Some(extent) => self.positions.extend(grid_positions(self.counter + index, (h, w), extent)),
                None => {
                    self.positions.extend((1..=h * w).map(|i| text_position(self.counter + i)));
                    self.counter += h * w;
                }
            }
            self.ends.resize(self.positions.len(), self.positions.len());
        }
        self.counter += if extent.is_some() { scales.len() } else { 1 };
    }

    /// Appends an image that others may follow: with `whole` one more grid, that of its sum, in the
    /// place of a further scale, and `<eoi>` after it.
    pub fn push_context_image(&mut self, scales: &[(usize, usize)], extent: Option<f64>, whole: bool) {
        self.push_image(scales, extent);
        if let (true, Some(&grid), Some(extent)) = (whole, scales.last(), extent) {
            self.positions.extend(grid_positions(self.counter, grid, extent));
            self.ends.resize(self.positions.len(), self.positions.len());
            self.counter += 1;
        }
        self.push_eoi();
    }

    /// Appends the tokens of an image of Qwen2.5-VL's vision encoder, a grid of (height, width):
    /// rows and columns count from the text position, and text continues after the larger of the
    /// two. They are causal, like text.
    pub fn push_patches(&mut self, (h, w): (usize, usize)) {
        let t = self.counter;
        for i in 0..h * w {
            self.positions.push([t, t + i / w, t + i % w].map(|p| p as f32));
            self.ends.push(self.positions.len());
        }
        self.counter += h.max(w);
    }

    /// Appends `<eoi>`; text goes on counting after it.
    pub fn push_eoi(&mut self) {
        self.push_text(1);
    }

    fn push_marker(&mut self) {
        self.positions.push(text_position(self.counter));
        self.ends.push(self.positions.len());
    }

    /// The block-causal mask, (T, T) row-major.
    #[cfg(test)]
    pub(crate) fn mask(&self) -> Vec<u8> {
        let tokens = self.len();
        self.ends.iter().flat_map(|&end| (0..tokens).map(move |j| u8::from(j < end))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_sees_itself_and_everything_before() {
        let mut layout = Layout::new();
        layout.push_text(2);
        layout.push_image(&[(1, 1), (1, 2), (2, 2)], Some(64.0));
        layout.push_eoi();
        layout.push_text(1);
        assert_eq!(layout.ends, [1, 2, 3, 5, 5, 9, 9, 9, 9, 10, 11]);
        let counters: Vec<f32> = layout.positions.iter().map(|p| p[0]).collect();
        assert_eq!(counters, [0., 1., 2., 3., 3., 4., 4., 4., 4., 5., 6.]);
    }

    #[test]
    fn the_sum_of_an_image_stands_where_a_further_scale_would() {
        let mut layout = Layout::new();
        layout.push_context_image(&[(1, 1), (1, 2)], Some(64.0), true);
        layout.push_text(1);
        assert_eq!(layout.ends, [1, 3, 3, 5, 5, 6, 7]);
        assert_eq!(layout.positions.iter().map(|p| p[0]).collect::<Vec<_>>(), [0., 1., 1., 2., 2., 3., 4.]);
        assert_eq!(layout.positions[1][1..], layout.positions[3][1..]);
    }

    #[test]
    fn codes_count_like_text_without_an_extent() {
        let mut layout = Layout::after(3);
        layout.push_text(1);
        layout.push_image(&[(1, 1), (1, 2), (2, 2)], None);
        layout.push_text(1);
        assert_eq!(layout.positions, (3..12).map(text_position).collect::<Vec<_>>());
        assert_eq!(layout.ends, [1, 2, 4, 4, 8, 8, 8, 8, 9]);
    }

    #[test]
    fn patches_count_along_both_sides() {
        let mut layout = Layout::new();
        layout.push_text(2);
        layout.push_patches((1, 3));
        layout.push_text(1);
        assert_eq!(layout.positions[2..], [[2., 2., 2.], [2., 2., 3.], [2., 2., 4.], [5., 5., 5.]]);
        assert_eq!(layout.ends, [1, 2, 3, 4, 5, 6]);
    }
}
