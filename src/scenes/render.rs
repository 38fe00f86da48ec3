//! Shapes as pixels.

use super::{BACKGROUNDS, COLOURS, Scene, Shape};

/// Whether (u, v), measured from the centre in radii, v downwards, lies inside a shape.
pub fn inside(shape: Shape, u: f64, v: f64) -> bool {
    match shape {
        Shape::Circle => u * u + v * v <= 1.0,
        Shape::Square => u.abs() <= 0.88 && v.abs() <= 0.88,
        Shape::Triangle => v <= 0.8 && u.abs() <= (v + 1.0) / 1.8,
        Shape::Diamond => u.abs() / 0.7 + v.abs() <= 1.0,
        Shape::Heart => {
            let (x, y) = (1.22 * u, 0.15 - 1.18 * v);
            let body = x * x + y * y - 1.0;
            body * body * body <= x * x * y * y * y
        }
        Shape::Star => {
            // By symmetry one tenth of the star is a triangle between a tip and a notch.
            let tenth = std::f64::consts::PI / 5.0;
            let angle = u.atan2(-v).rem_euclid(2.0 * tenth);
            let angle = angle.min(2.0 * tenth - angle);
            let (notch, radius) = (0.45, u.hypot(v));
            let (x, y) = (radius * angle.cos(), radius * angle.sin());
            let (nx, ny) = (notch * tenth.cos(), notch * tenth.sin());
            // Left of the edge from the tip (1, 0) to the notch.
            (nx - 1.0) * y - ny * (x - 1.0) >= 0.0
        }
    }
}

/// Samples along each side of a pixel.
const SAMPLES: usize = 4;

impl Scene {
    /// RGB, (height, width, 3). The drawing square is centred and as large as fits.
    pub fn render(&self, width: usize, height: usize) -> Vec<u8> {
        let background = self.background.map_or([255; 3], |b| BACKGROUNDS[b].rgb);
        let mut rgb = background.repeat(width * height);
        let side = width.min(height);
        let unit = side as f64 / 128.0;
        let (left, top) = ((width - side) as f64 / 2.0, (height - side) as f64 / 2.0);
        for object in &self.objects {
            let (x, y) = (left + object.centre.0 * unit, top + object.centre.1 * unit);
            let radius = object.radius * unit;
            let colour = COLOURS[object.colour].rgb;
            let range = |c: f64, limit: usize| {
                (c - radius).floor().max(0.0) as usize..((c + radius).ceil().max(0.0) as usize).min(limit)
            };
            for row in range(y, height) {
                for column in range(x, width) {
                    let at =
                        |i: usize, cell: usize, c: f64| (cell as f64 + (i as f64 + 0.5) / SAMPLES as f64 - c) / radius;
                    let hits = (0..SAMPLES * SAMPLES)
                        .filter(|s| inside(object.shape, at(s % SAMPLES, column, x), at(s / SAMPLES, row, y)))
                        .count();
                    let cover = hits as f64 / (SAMPLES * SAMPLES) as f64;
                    let pixel = &mut rgb[3 * (row * width + column)..][..3];
                    for (p, c) in pixel.iter_mut().zip(colour) {
                        *p = (f64::from(*p) + (f64::from(c) - f64::from(*p)) * cover).round() as u8;
                    }
                }
            }
        }
        rgb
    }
}
