//! Checks that an image shows its prompt, by the rules of GenEval.

use super::colour;
use super::detector::{Detection, Found};
use super::{BACKGROUNDS, Edit, Kind, Object, ObjectSize, Place, Scene, radii};

/// Units by which the centres of two objects must differ for one to be beside or above the other.
const APART: f64 = 12.0;
/// The same for a single one and the middle.
const ASIDE: f64 = 8.0;
/// How much larger a large object is than a small one beside it, at least.
const LARGER: f64 = 1.2;

/// Whether the objects of an image are those that `scene` names, each in its shape and colour, and
/// nothing else; where the prompt says so, on the right side of each other or of the image, large
/// or small, and on the named background.
///
/// Stricter than GenEval, whose prompts name colours in two categories only and which ignores extra
/// objects.
pub fn judge(scene: &Scene, found: &Detection) -> bool {
    let Some(order) = in_order(&scene.objects, &found.objects) else { return false };
    if scene.background.is_some() && !on_its_background(scene, found) {
        return false;
    }
    match order[..] {
        [only] => {
            let middle = (found.extent.0 / 2.0, found.extent.1 / 2.0);
            relation(scene.place, only.centre, middle, ASIDE)
                && radii(1, scene.objects[0].size, scene.place).contains(&only.radius)
        }
        [first, second] if scene.kind != Kind::Counting => {
            let larger = match scene.objects[0].size {
                ObjectSize::Plain => true,
                ObjectSize::Large => first.radius > LARGER * second.radius,
                ObjectSize::Small => second.radius > LARGER * first.radius,
            };
            larger && relation(scene.place, first.centre, second.centre, APART)
        }
        _ => true,
    }
}

/// How far the centre of an object may be from where it should, in 1/128 of the image, and how much
/// larger or smaller it may be.
const NEAR: f64 = 9.0;
const SIZE: f64 = 1.2;

/// Whether an image shows what an edit makes of its source: every object in its shape, colour,
/// place and size, nothing else, and the right background.
pub fn as_edited(edit: &Edit, found: &Detection) -> bool {
    let mut rest: Vec<_> = found.objects.iter().collect();
    let there = edit.target.objects.iter().all(|object| {
        let near = |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).hypot(a.1 - b.1) <= NEAR;
        let at = rest.iter().position(|f| {
            let ratio = f.radius / object.radius;
            let same = f.shape == Some(object.shape) && f.colour == object.colour;
            same && near(f.centre, object.centre) && (1.0 / SIZE..SIZE).contains(&ratio)
        });
        at.map(|at| rest.remove(at)).is_some()
    });
    there && rest.is_empty() && on_its_background(&edit.target, found)
}

/// Whether the background is nearest to the scene's, of white and all named ones.
pub fn on_its_background(scene: &Scene, found: &Detection) -> bool {
    let lab = |rgb: [u8; 3]| colour::oklab(rgb.map(f32::from));
    let candidates = BACKGROUNDS.iter().map(|b| b.rgb).chain([[255; 3]]);
    let distance = |rgb: [u8; 3]| colour::distance(lab(rgb), lab(found.background));
    let nearest = candidates.min_by(|a, b| distance(*a).total_cmp(&distance(*b)));
    nearest == Some(scene.background.map_or([255; 3], |b| BACKGROUNDS[b].rgb))
}

/// How many of the expected objects were found in their shape and colour.
pub fn matched(asked: &[Object], found: &[Found]) -> usize {
    let mut rest: Vec<&Found> = found.iter().collect();
    let there = |object: &&Object| {
        let at = rest.iter().position(|f| f.shape == Some(object.shape) && f.colour == object.colour);
        at.map(|at| rest.remove(at)).is_some()
    };
    asked.iter().filter(there).count()
}

/// The objects found, in the order of those expected, if they match entirely.
fn in_order<'a>(asked: &[Object], found: &'a [Found]) -> Option<Vec<&'a Found>> {
    let mut rest: Vec<&Found> = found.iter().collect();
    let order = asked.iter().map(|o| {
        let at = rest.iter().position(|f| f.shape == Some(o.shape) && f.colour == o.colour)?;
        Some(rest.remove(at))
    });
    let order = order.collect::<Option<Vec<_>>>()?;
    rest.is_empty().then_some(order)
}

/// Whether `a` is on that side of `b` by more than `margin`.
fn relation(place: Place, a: (f64, f64), b: (f64, f64), margin: f64) -> bool {
    match place {
        Place::Unsaid => true,
        Place::Left => b.0 - a.0 > margin,
        Place::Right => a.0 - b.0 > margin,
        Place::Above => b.1 - a.1 > margin,
        Place::Below => a.1 - b.1 > margin,
    }
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::*;
    use crate::rng::{Rng, Stream};
    use crate::scenes::detector::detect;
    use crate::scenes::{COLOURS, KINDS, SHAPES, Split};

    fn image(scene: &Scene) -> RgbImage {
        RgbImage::from_raw(128, 128, scene.render(128, 128)).unwrap()
    }

    fn scenes(kind: Kind, count: u64) -> impl Iterator<Item = Scene> {
        (0..count).map(move |i| Scene::of_kind(&Rng::new(11, i, Stream::Train, 9), kind, Split::HeldOut))
    }

    /// In dB.
    fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
        let error: f64 = a.iter().zip(b.iter()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        10.0 * (255.0 * 255.0 / (error / a.len() as f64)).log10()
    }

    /// What a reconstruction does: outlines soften and noise comes in.
    fn worsen(image: &RgbImage, seed: u64) -> RgbImage {
        let rng = Rng::new(seed, 0, Stream::Train, 10);
        let mut blurred = image::imageops::blur(image, 1.0);
        for (i, v) in blurred.iter_mut().enumerate() {
            *v = (f64::from(*v) + 12.0 * rng.normal(i as u64)).round().clamp(0.0, 255.0) as u8;
        }
        blurred
    }

    #[test]
    fn true_scenes_pass() {
        for kind in KINDS {
            let (count, mut right, mut worse, mut quality) = (60, 0, 0, 0.0);
            for (i, scene) in scenes(kind, count).enumerate() {
                let clean = image(&scene);
                let worsened = worsen(&clean, i as u64);
                quality += psnr(&clean, &worsened) / count as f64;
                for (image, passed) in [(clean, &mut right), (worsened, &mut worse)] {
                    let found = detect(&image);
                    if judge(&scene, &found) {
                        *passed += 1;
                    } else {
                        eprintln!("{} {:?} -> {:?}", scene.prompt(), scene.objects, found.objects);
                    }
                }
            }
            eprintln!("{kind:?}: {right} clean, {worse} at {quality:.1} dB, of {count}");
            assert!(right * 100 >= 99 * count && worse * 100 >= 97 * count, "{kind:?}: {right} {worse} of {count}");
            assert!((23.0..28.0).contains(&quality), "{quality} dB");
        }
    }

    #[test]
    fn wrong_scenes_fail() {
        let fails = |asked: &Scene, drawn: &Scene, what: &str| {
            assert!(!judge(asked, &detect(&image(drawn))), "{what}: {} for {}", drawn.prompt(), asked.prompt());
        };
        for kind in KINDS {
            for scene in scenes(kind, 40) {
                let changed = |change: &dyn Fn(&mut Scene)| {
                    let mut drawn = scene.clone();
                    change(&mut drawn);
                    drawn
                };
                fails(&scene, &changed(&|s| s.objects.truncate(s.objects.len() - 1)), "one is missing");
                let last = scene.objects.len() - 1;
                let other = SHAPES.into_iter().find(|&s| scene.objects.iter().all(|o| o.shape != s)).unwrap();
                fails(&scene, &changed(&|s| s.objects[last].shape = other), "another shape");
                let colour = (0..COLOURS.len()).find(|&c| scene.objects.iter().all(|o| o.colour != c)).unwrap();
                fails(&scene, &changed(&|s| s.objects[last].colour = colour), "another colour");
                if scene.objects.len() < 3 {
                    // A corner that no object of so few reaches.
                    let mut extra = scene.objects[0].clone();
                    (extra.centre, extra.radius) = ((12.0, 12.0), 9.0);
                    fails(&scene, &changed(&|s| s.objects.push(extra.clone())), "one too many");
                }
                let swap = |s: &mut Scene, f: &dyn Fn(&mut Object, &mut Object)| {
                    let [a, b] = &mut s.objects[..] else { return };
                    f(a, b);
                };
                if kind == Kind::Position {
                    let places = |a: &mut Object, b: &mut Object| std::mem::swap(&mut a.centre, &mut b.centre);
                    fails(&scene, &changed(&|s| swap(s, &places)), "swapped places");
                }
                let swappable = matches!(&scene.objects[..], [a, b] if a.shape != b.shape && a.colour != b.colour);
                if swappable {
                    let colours = |a: &mut Object, b: &mut Object| std::mem::swap(&mut a.colour, &mut b.colour);
                    fails(&scene, &changed(&|s| swap(s, &colours)), "swapped colours");
                }
                if kind == Kind::AttributeBinding && scene.objects[0].size != ObjectSize::Plain {
                    let sizes = |a: &mut Object, b: &mut Object| std::mem::swap(&mut a.radius, &mut b.radius);
                    fails(&scene, &changed(&|s| swap(s, &sizes)), "swapped sizes");
                }
                if let Some(background) = scene.background {
                    let other = |s: &mut Scene| s.background = Some((background + 1) % BACKGROUNDS.len());
                    fails(&scene, &changed(&other), "another background");
                }
                if kind == Kind::SingleObject && scene.objects[0].size != ObjectSize::Plain {
                    let plain = (radii(1, ObjectSize::Small, scene.place).end
                        + radii(1, ObjectSize::Large, scene.place).start)
                        / 2.0;
                    fails(&scene, &changed(&|s| s.objects[0].radius = plain), "of the usual size");
                }
                if kind == Kind::SingleObject && scene.place != Place::Unsaid {
                    fails(&scene, &changed(&|s| s.objects[0].centre = (64.0, 64.0)), "in the middle");
                    let mirror = |s: &mut Scene| {
                        let (x, y) = s.objects[0].centre;
                        s.objects[0].centre = (128.0 - x, 128.0 - y);
                    };
                    fails(&scene, &changed(&mirror), "the other half");
                }
            }
        }
    }
}
