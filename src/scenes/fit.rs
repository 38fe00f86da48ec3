//! Which silhouette a set of pixels is: the template that overlaps it best.

use std::sync::LazyLock;

use super::{SHAPES, Shape, inside};

/// A silhouette laid over a set of pixels.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    /// The silhouette.
    pub shape: Shape,
    /// Centre (x, y) of the box it is drawn in, in pixels.
    pub centre: (f64, f64),
    /// Half of the side of that box, in pixels.
    pub radius: f64,
    /// Intersection over union of the silhouette and the pixels.
    pub iou: f64,
}

/// A silhouette of radius 1: its area, and the distance of the centroid below its centre.
struct Moments {
    shape: Shape,
    area: f64,
    drop: f64,
}

static TEMPLATES: LazyLock<Vec<Moments>> = LazyLock::new(|| SHAPES.map(moments).into());

fn moments(shape: Shape) -> Moments {
    const CELLS: usize = 400;
    let at = |i: usize| 2.0 * (i as f64 + 0.5) / CELLS as f64 - 1.0;
    let (mut count, mut sum) = (0, 0.0);
    for i in 0..CELLS * CELLS {
        let v = at(i / CELLS);
        if inside(shape, at(i % CELLS), v) {
            count += 1;
            sum += v;
        }
    }
    Moments { shape, area: 4.0 * f64::from(count) / (CELLS * CELLS) as f64, drop: sum / f64::from(count.max(1)) }
}

/// Passes of the 1-2-1 kernel over a template (variance 1/2 px^2 each): from a sharp rendering to a
/// soft reconstruction.
const SOFTNESS: [usize; 4] = [0, 2, 6, 12];
/// Pixels around the object, for what a soft template spreads.
const MARGIN: usize = 4;

/// The best of all silhouettes for `pixels`, indices into rows of `width`, each of which the object
/// covers to a share `cover` (0 to 1; of the whole image), `edge` or more. Each silhouette is given
/// the area and the centroid of the pixels, which blur and noise along the outline move less than
/// they do the bounding box, and is compared at several softnesses.
pub fn fit(pixels: &[usize], cover: &[f32], edge: f32, width: usize) -> Fit {
    let place = |p: usize| ((p % width) as f64 + 0.5, (p / width) as f64 + 0.5);
    let weighed = || pixels.iter().map(|&p| (place(p), f64::from(cover[p])));
    let area: f64 = weighed().map(|(_, w)| w).sum();
    let (x, y) = weighed().fold((0.0, 0.0), |s, (p, w)| (s.0 + p.0 * w / area, s.1 + p.1 * w / area));
    let patch = Patch::around(pixels, cover, width);
    let mut best = Fit { shape: SHAPES[0], centre: (x, y), radius: 0.0, iou: 0.0 };
    for t in TEMPLATES.iter() {
        let radius = (area / t.area).sqrt();
        let centre = (x, y - t.drop * radius);
        let mut template = patch.raster(|(x, y)| inside(t.shape, (x - centre.0) / radius, (y - centre.1) / radius));
        let mut passes = 0;
        for softness in SOFTNESS {
            (passes..softness).for_each(|_| template = patch.soften(&template));
            passes = softness;
            let iou = patch.overlap(&template, edge);
            if iou > best.iou {
                best = Fit { shape: t.shape, centre, radius, iou };
            }
        }
    }
    best
}

/// The covers of one object in its bounding box.
struct Patch {
    left: f64,
    top: f64,
    width: usize,
    cover: Vec<f32>,
}

impl Patch {
    fn around(pixels: &[usize], cover: &[f32], width: usize) -> Self {
        let bounds = |f: &dyn Fn(usize) -> usize| {
            let values = || pixels.iter().map(|&p| f(p));
            (values().min().unwrap_or(0), values().max().unwrap_or(0))
        };
        let ((left, right), (top, bottom)) = (bounds(&|p| p % width), bounds(&|p| p / width));
        let size = |from: usize, to: usize| to - from + 1 + 2 * MARGIN;
        let (columns, rows) = (size(left, right), size(top, bottom));
        let mut own = vec![0.0; columns * rows];
        for &p in pixels {
            own[(p / width - top + MARGIN) * columns + p % width - left + MARGIN] = cover[p];
        }
        let corner = |v: usize| v as f64 - MARGIN as f64;
        Self { left: corner(left), top: corner(top), width: columns, cover: own }
    }

    /// 1 at the pixels whose centres are hit.
    fn raster(&self, hit: impl Fn((f64, f64)) -> bool) -> Vec<f32> {
        let centre = |i: usize| (self.left + (i % self.width) as f64 + 0.5, self.top + (i / self.width) as f64 + 0.5);
        (0..self.cover.len()).map(|i| f32::from(u8::from(hit(centre(i))))).collect()
    }

    /// One pass of the 1-2-1 kernel along each axis.
    fn soften(&self, v: &[f32]) -> Vec<f32> {
        let pass = |v: &[f32], stride: usize| -> Vec<f32> {
            let at = |i: Option<usize>| i.and_then(|i| v.get(i)).copied().unwrap_or(0.0);
            (0..v.len()).map(|i| (at(i.checked_sub(stride)) + 2.0 * v[i] + at(Some(i + stride))) / 4.0).collect()
        };
        pass(&pass(v, 1), self.width)
    }

    /// Intersection over union of two fuzzy sets; what of the template lies below `edge` does not
    /// count, as in the covers.
    fn overlap(&self, template: &[f32], edge: f32) -> f64 {
        let (mut both, mut any) = (0.0, 0.0);
        for (&t, &c) in template.iter().zip(&self.cover) {
            let t = if t > edge { t } else { 0.0 };
            both += t.min(c);
            any += t.max(c);
        }
        f64::from(both / any.max(f32::MIN_POSITIVE))
    }
}
