//! Images as integers, and how a convolution reads them.

/// How a convolution reads an image.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Pixels by which the filters move.
    pub stride: usize,
    /// Zero padding: top, bottom, left and right.
    pub padding: [usize; 4],
    /// Factor by which the image is enlarged first, by repeating pixels.
    pub repeat: usize,
}

impl Window {
    /// The padded size of an image (height, width).
    pub(super) fn padded(&self, (h, w): (usize, usize)) -> (usize, usize) {
        let [top, bottom, left, right] = self.padding;
        (h * self.repeat + top + bottom, w * self.repeat + left + right)
    }

    /// The size of the output for filters of `side`; None if they do not fit.
    pub(super) fn size(&self, image: (usize, usize), side: usize) -> Option<(usize, usize)> {
        let (h, w) = self.padded(image);
        let fits = self.stride > 0 && side > 0 && h.min(w) >= side && image.0.min(image.1) > 0;
        fits.then(|| ((h - side) / self.stride + 1, (w - side) / self.stride + 1))
    }
}

/// A padded image as integers, channels last.
pub(super) struct Image {
    pub(super) values: Vec<i16>,
    /// The value of an integer step.
    pub(super) scale: f32,
    pub(super) channels: usize,
    /// Integers per row.
    pub(super) pitch: usize,
    /// Side of the filters.
    pub(super) side: usize,
    /// Pixels by which they move.
    pub(super) stride: usize,
    /// Size of the output, (height, width).
    pub(super) size: (usize, usize),
}
