//! An exact detector for compositions: what GenEval's object detector is for photographs.

use std::collections::VecDeque;

use image::RgbImage;

use super::Shape;
use super::colour::{Rgb, cover, distance, nearest_colour, oklab, palette};
use super::fit::{Fit, fit};
use crate::pixels::GridResampling;

/// One object.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Silhouette; `None` if it is like none of them.
    pub shape: Option<Shape>,
    /// Index of the nearest of [`COLOURS`](crate::scenes::COLOURS).
    pub colour: usize,
    /// Centre (x, y), in 1/128 of the image's shorter side.
    pub centre: (f64, f64),
    /// Half of the side of the box that the shape is drawn in, in the same unit.
    pub radius: f64,
}

/// All that is in an image.
#[derive(Clone, Debug)]
pub struct Detection {
    /// The colour around the objects.
    pub background: [u8; 3],
    /// Width and height of the image, in 1/128 of its shorter side.
    pub extent: (f64, f64),
    /// In no particular order.
    pub objects: Vec<Found>,
}

/// The side at which images are looked at: one pixel is one unit.
const UNITS: usize = 128;
/// Fewer pixels are a speck.
const SPECK: usize = 40;
/// Fewer pixels are no core.
const CORE: usize = 6;
/// The share of an object's colour down to which a pixel belongs to it.
const EDGE: f32 = 0.25;
/// Overlap from which a silhouette counts as recognised.
const LIKE: f64 = 0.7;
/// Overlap below which a component may be two objects that touch.
const DOUBTFUL: f64 = 0.8;

/// Pixels of one object or a part of it, and their colour.
type Part = (Vec<usize>, Rgb);

/// Finds the objects of `image`.
///
/// Every pixel is called by the nearest of the background and the palette. Pixels deep inside an
/// area of one name are the cores of objects: the blends along outlines, which may be near a third
/// colour, are too thin for that. From the cores objects grow back to where their colour fades into
/// the background.
pub fn detect(image: &RgbImage) -> Detection {
    let Some(view) = View::new(image) else {
        return Detection { background: [0; 3], extent: (0.0, 0.0), objects: Vec::new() };
    };
    let background = view.background();
    let names = view.names(background);
    let mut objects = Vec::new();
    let cores = view.components(&view.deep(&names, 2, 0.9));
    let colours: Vec<Rgb> = cores.iter().map(|core| view.median(core)).collect();
    let share = |core: usize, p: usize| cover(view.rgb[p], background, colours[core]);
    let grown = view.grow(&cores, |core, p| share(core, p) > EDGE);
    let mut covers = vec![0.0; names.len()];
    for (core, pixels) in grown.iter().enumerate() {
        pixels.iter().for_each(|&p| covers[p] = share(core, p).min(1.0));
    }
    let mut parts: Vec<Part> = grown.into_iter().zip(colours.iter().copied()).collect();
    view.merge(&mut parts, &covers);
    for (pixels, colour) in parts.into_iter().filter(|(pixels, _)| pixels.len() >= SPECK) {
        for fit in view.fits(pixels, &covers) {
            objects.push(Found {
                shape: (fit.iou >= LIKE).then_some(fit.shape),
                colour: nearest_colour(oklab(colour)),
                centre: fit.centre,
                radius: fit.radius,
            });
        }
    }
    Detection {
        background: background.map(|v| v.round() as u8),
        extent: (view.width as f64, view.height as f64),
        objects,
    }
}

/// An image of one pixel per unit, freed of noise.
struct View {
    width: usize,
    height: usize,
    rgb: Vec<Rgb>,
}

impl View {
    /// `None` for an image without pixels.
    fn new(image: &RgbImage) -> Option<Self> {
        let (w, h) = (image.width() as usize, image.height() as usize);
        let short = w.min(h);
        if short == 0 {
            return None;
        }
        let size = |v: usize| (v * UNITS + short / 2) / short;
        let (width, height) = (size(w), size(h));
        let resampling = if short > UNITS { GridResampling::area } else { GridResampling::bicubic };
        let bytes: Vec<f32> = image.as_raw().iter().map(|&v| v.into()).collect();
        let bytes = if short == UNITS { bytes } else { resampling((h, w), (height, width)).apply(&bytes, 3) };
        let mut view = Self { width, height, rgb: bytes.chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect() };
        view.rgb = (0..width * height).map(|p| view.median(&view.window(p, 1).collect::<Vec<_>>())).collect();
        Some(view)
    }

    /// The pixels no further than `r` from `p` along each axis.
    fn window(&self, p: usize, r: usize) -> impl Iterator<Item = usize> + '_ {
        let range = |c: usize, limit: usize| c.saturating_sub(r)..(c + r + 1).min(limit);
        let columns = range(p % self.width, self.width);
        range(p / self.width, self.height).flat_map(move |y| columns.clone().map(move |x| y * self.width + x))
    }

    /// Median of each channel.
    fn median(&self, pixels: &[usize]) -> Rgb {
        [0, 1, 2].map(|c| {
            let mut values: Vec<f32> = pixels.iter().map(|&p| self.rgb[p][c]).collect();
            let middle = values.len() / 2;
            *values.select_nth_unstable_by(middle, f32::total_cmp).1
        })
    }

    /// The mode of the border's colours.
    fn background(&self) -> Rgb {
        let edge = |c: usize, limit: usize| c == 0 || c + 1 == limit;
        let border: Vec<usize> = (0..self.rgb.len())
            .filter(|p| edge(p % self.width, self.width) || edge(p / self.width, self.height))
            .collect();
        let near = |a: Rgb, b: Rgb| (0..3).all(|c| (a[c] - b[c]).abs() <= 20.0);
        let company = |p: &usize| border.iter().filter(|&&q| near(self.rgb[*p], self.rgb[q])).count();
        let mode = border.iter().max_by_key(|p| company(p)).map_or([255.0; 3], |&p| self.rgb[p]);
        let members: Vec<usize> = border.into_iter().filter(|&p| near(self.rgb[p], mode)).collect();
        self.median(&members)
    }

    /// The nearest colour of every pixel; `None` is the background.
    fn names(&self, background: Rgb) -> Vec<Option<usize>> {
        let ground = oklab(background);
        let name = |&p: &Rgb| {
            let lab = oklab(p);
            let colour = nearest_colour(lab);
            (distance(lab, palette(colour)) < distance(lab, ground)).then_some(colour)
        };
        self.rgb.iter().map(name).collect()
    }

    /// Names where at least a `share` of the window of radius `r` has the same one.
    fn deep(&self, names: &[Option<usize>], r: usize, share: f64) -> Vec<Option<usize>> {
        let deep = |p: usize| {
            let (mut same, mut all) = (0, 0.0);
            for q in self.window(p, r) {
                same += usize::from(names[q] == names[p]);
                all += 1.0;
            }
            names[p].filter(|_| same as f64 >= share * all)
        };
        (0..names.len()).map(deep).collect()
    }

    /// Connected areas of one name.
    fn components(&self, names: &[Option<usize>]) -> Vec<Vec<usize>> {
        let mut seen = vec![false; names.len()];
        let mut all = Vec::new();
        for first in 0..names.len() {
            if seen[first] || names[first].is_none() {
                continue;
            }
            seen[first] = true;
            let mut component = vec![first];
            let mut next = 0;
            while let Some(&p) = component.get(next) {
                next += 1;
                for q in self.window(p, 1) {
                    if !seen[q] && names[q] == names[p] {
                        seen[q] = true;
                        component.push(q);
                    }
                }
            }
            all.push(component);
        }
        all.retain(|c| c.len() >= CORE);
        all
    }

    /// Grows all cores at the same speed over the pixels that may `join` them.
    fn grow(&self, cores: &[Vec<usize>], join: impl Fn(usize, usize) -> bool) -> Vec<Vec<usize>> {
        let mut owner = vec![None; self.rgb.len()];
        let mut queue = VecDeque::new();
        for (core, pixels) in cores.iter().enumerate() {
            for &p in pixels {
                owner[p] = Some(core);
                queue.push_back((core, p));
            }
        }
        while let Some((core, p)) = queue.pop_front() {
            for q in self.window(p, 1) {
                if owner[q].is_none() && join(core, q) {
                    owner[q] = Some(core);
                    queue.push_back((core, q));
                }
            }
        }
        let mut grown = vec![Vec::new(); cores.len()];
        for (p, core) in owner.into_iter().enumerate() {
            if let Some(core) = core {
                grown[core].push(p);
            }
        }
        grown
    }

    /// Joins a part that is like no silhouette with a larger one that it touches, if that stays
    /// one: a shade of it.
    fn merge(&self, parts: &mut Vec<Part>, covers: &[f32]) {
        let fit = |pixels: &[usize]| fit(pixels, covers, EDGE, self.width).iou;
        parts.sort_by_key(|(pixels, _)| pixels.len());
        let mut small = 0;
        while small < parts.len() {
            let pixels = parts[small].0.clone();
            let mut near = vec![false; self.rgb.len()];
            pixels.iter().for_each(|&p| self.window(p, 1).for_each(|q| near[q] = true));
            let shaded = |(large, _): &Part| {
                let together = || fit(&[&pixels[..], large].concat());
                large.iter().filter(|&&p| near[p]).count() > 2 && together() >= LIKE.max(fit(large) - 0.05)
            };
            let odd = fit(&pixels) < DOUBTFUL;
            match parts.iter().skip(small + 1).position(|large| odd && shaded(large)) {
                Some(after) => {
                    parts[small + 1 + after].0.extend(pixels);
                    parts.remove(small);
                }
                None => small += 1,
            }
        }
    }

    /// The silhouette of a component, or those of the objects that it falls into when eroded, if
    /// they are clearer.
    fn fits(&self, pixels: Vec<usize>, covers: &[f32]) -> Vec<Fit> {
        let whole = fit(&pixels, covers, EDGE, self.width);
        if whole.iou >= DOUBTFUL {
            return vec![whole];
        }
        let mut names = vec![None; self.rgb.len()];
        pixels.iter().for_each(|&p| names[p] = Some(0));
        for r in 2..12 {
            let cores = self.components(&self.deep(&names, r, 1.0));
            if cores.len() > 1 {
                let parts = self.grow(&cores, |_, p| names[p].is_some());
                let fits: Vec<Fit> = parts.iter().map(|part| fit(part, covers, EDGE, self.width)).collect();
                if fits.iter().all(|f| f.iou >= DOUBTFUL) {
                    return fits;
                }
            }
        }
        vec![whole]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::{Kind, Object, ObjectSize, Place, Scene};

    fn scene(objects: &[(Shape, usize, (f64, f64), f64)]) -> Scene {
        let object =
            |&(shape, colour, centre, radius)| Object { shape, colour, size: ObjectSize::Plain, centre, radius };
        Scene {
            kind: Kind::Counting,
            objects: objects.iter().map(object).collect(),
            place: Place::Unsaid,
            background: Some(1),
        }
    }

    fn found(scene: &Scene, width: usize, height: usize) -> Detection {
        let rgb = scene.render(width, height);
        detect(&RgbImage::from_raw(width as u32, height as u32, rgb).unwrap())
    }

    #[test]
    fn places_and_sizes_are_measured_at_any_resolution() {
        let scene = scene(&[(Shape::Star, 4, (36.0, 64.0), 26.0), (Shape::Triangle, 2, (92.0, 60.0), 20.0)]);
        for (width, height) in [(128, 128), (96, 96), (512, 512), (256, 128), (131, 200)] {
            let found = found(&scene, width, height);
            assert_eq!(found.objects.len(), 2, "{width}x{height}");
            let left = (found.extent.0 - 128.0) / 2.0;
            let top = (found.extent.1 - 128.0) / 2.0;
            for o in &scene.objects {
                let f = found.objects.iter().find(|f| f.shape == Some(o.shape)).unwrap();
                assert_eq!(f.colour, o.colour);
                let (dx, dy) = (f.centre.0 - left - o.centre.0, f.centre.1 - top - o.centre.1);
                assert!(dx.hypot(dy) < 1.5 && (f.radius / o.radius - 1.0).abs() < 0.08, "{f:?} {o:?}");
            }
        }
    }

    #[test]
    fn objects_that_touch_are_told_apart() {
        // Of other colours, with a blend that is a third colour, and of the same.
        for (a, b, gap) in [(0, 4, 0.0), (8, 9, 0.0), (2, 4, -2.0), (3, 3, -1.0)] {
            let x = 64.0 + gap + 25.0;
            let scene = scene(&[(Shape::Circle, a, (39.0, 64.0), 25.0), (Shape::Diamond, b, (x - 8.0, 64.0), 25.0)]);
            let mut colours: Vec<usize> = found(&scene, 128, 128).objects.iter().map(|o| o.colour).collect();
            colours.sort_unstable();
            assert_eq!(colours, [a, b], "gap {gap}");
        }
        let scene = scene(&[(Shape::Circle, 5, (40.0, 64.0), 25.0), (Shape::Circle, 5, (88.0, 64.0), 25.0)]);
        let found = found(&scene, 128, 128).objects;
        assert_eq!(found.iter().filter(|o| o.shape == Some(Shape::Circle)).count(), 2, "{found:?}");
    }

    #[test]
    fn what_is_no_object_is_not_found() {
        assert!(detect(&RgbImage::new(0, 0)).objects.is_empty());
        assert!(detect(&RgbImage::from_pixel(128, 128, image::Rgb([220, 30, 35]))).objects.is_empty());
        let speck = scene(&[(Shape::Circle, 0, (64.0, 64.0), 3.0)]);
        assert!(found(&speck, 128, 128).objects.is_empty());
        let mut bar = RgbImage::from_pixel(128, 128, image::Rgb([255; 3]));
        (20..110).for_each(|x| (60..70).for_each(|y| bar.put_pixel(x, y, image::Rgb([35, 85, 220]))));
        let found = detect(&bar).objects;
        assert_eq!((found.len(), found[0].shape, found[0].colour), (1, None, 4));
    }
}
