//! Scenes from objects: what there is to say about them, seen by their places and sizes alone.

use super::{FAR, Kind, MIDDLE, NEAR, Object, ObjectSize, Place, Scene, radius};

/// Units by which two centres differ at least where one is said to be beside or above the other.
const APART: f64 = 12.0;
/// Ratio of radii from which one of two objects is said to be large and the other small.
const CONTRAST: f64 = 1.33;

impl Object {
    /// Whether it looks the same; what it is called may differ.
    pub(super) fn same(&self, other: &Self) -> bool {
        let look = |o: &Self| (o.shape, o.colour, o.centre, o.radius);
        look(self) == look(other)
    }

    /// The same, whose size is not worth a word.
    pub(super) fn of_plain_size(&self) -> Self {
        Self { size: ObjectSize::Plain, ..self.clone() }
    }

    /// Left, top, right and bottom of the box that it is drawn in.
    pub(super) fn bounds(&self) -> [f64; 4] {
        let ((x, y), r) = (self.centre, self.radius);
        [x - r, y - r, x + r, y + r]
    }
}

impl Scene {
    /// The scene of these objects: one or two that differ, or up to four equal ones, apart from
    /// each other and inside the drawing square; `None` for any others.
    pub(super) fn of_objects(mut objects: Vec<Object>, background: Option<usize>) -> Option<Self> {
        let inside = |o: &Object| o.bounds().iter().all(|v| (0.0..=128.0).contains(v));
        let apart = |a: &Object, b: &Object| {
            let (dx, dy) = ((a.centre.0 - b.centre.0).abs(), (a.centre.1 - b.centre.1).abs());
            dx.max(dy) > 0.95 * (a.radius + b.radius)
        };
        let fits = |(i, a): (usize, &Object)| inside(a) && objects[..i].iter().all(|b| apart(a, b));
        if !objects.iter().enumerate().all(fits) {
            return None;
        }
        let equal = |a: &Object, b: &Object| (a.shape, a.colour) == (b.shape, b.colour);
        let (kind, place) = match &mut objects[..] {
            [only] => {
                let place = side(only.centre, (MIDDLE, MIDDLE));
                let usual = radius(1, ObjectSize::Plain, place);
                only.size = match only.radius / usual {
                    r if r < 0.8 => ObjectSize::Small,
                    r if r > 1.1 => ObjectSize::Large,
                    _ => ObjectSize::Plain,
                };
                let plain = place == Place::Unsaid && only.size == ObjectSize::Plain;
                (if plain { Kind::Colours } else { Kind::SingleObject }, place)
            }
            [first, second] if !equal(first, second) => {
                let ratio = first.radius / second.radius;
                (first.size, second.size) = match ratio {
                    r if r > CONTRAST => (ObjectSize::Large, ObjectSize::Small),
                    r if r < 1.0 / CONTRAST => (ObjectSize::Small, ObjectSize::Large),
                    _ => (ObjectSize::Plain, ObjectSize::Plain),
                };
                let place = side(first.centre, second.centre);
                let kind = match (first.size, place) {
                    (ObjectSize::Plain, Place::Unsaid) => Kind::TwoObjects,
                    (ObjectSize::Plain, _) => Kind::Position,
                    _ => Kind::AttributeBinding,
                };
                (kind, place)
            }
            [first, rest @ ..] if rest.len() < 4 => {
                let ratio = |o: &Object| (o.radius / first.radius).max(first.radius / o.radius);
                if !rest.iter().all(|o| equal(first, o) && ratio(o) < CONTRAST) {
                    return None;
                }
                objects.iter_mut().for_each(|o| o.size = ObjectSize::Plain);
                (Kind::Counting, Place::Unsaid)
            }
            _ => return None,
        };
        Some(Self { kind, objects, place, background })
    }
}

/// On which side of `b` the point `a` lies.
pub(super) fn side(a: (f64, f64), b: (f64, f64)) -> Place {
    let (dx, dy) = (a.0 - b.0, a.1 - b.1);
    match (dx.abs() > dy.abs(), dx.abs().max(dy.abs())) {
        (_, far) if far <= APART => Place::Unsaid,
        (true, _) if dx < 0.0 => Place::Left,
        (true, _) => Place::Right,
        (false, _) if dy < 0.0 => Place::Above,
        (false, _) => Place::Below,
    }
}

/// Where an object is, seen from the other one or from the middle.
pub(super) fn place_of(object: &Object, scene: &Scene) -> Place {
    let other = scene.objects.iter().find(|o| !o.same(object));
    side(object.centre, other.map_or(centre_of(Place::Unsaid), |o| o.centre))
}

/// The centre of a place of the drawing square.
pub(super) fn centre_of(place: Place) -> (f64, f64) {
    match place {
        Place::Unsaid => (MIDDLE, MIDDLE),
        Place::Left => (NEAR, MIDDLE),
        Place::Right => (FAR, MIDDLE),
        Place::Above => (MIDDLE, NEAR),
        Place::Below => (MIDDLE, FAR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Rng, Stream};
    use crate::scenes::{KINDS, Split};

    #[test]
    fn sampled_scenes_are_described_as_they_were_meant() {
        for kind in KINDS {
            for i in 0..300 {
                let scene = Scene::of_kind(&Rng::new(3, i, Stream::Train, 0), kind, Split::Train);
                let seen = Scene::of_objects(scene.objects.clone(), None).unwrap();
                assert!(scene.place == Place::Unsaid || seen.place == scene.place, "{scene:?}\n{seen:?}");
                let sizes = |s: &Scene| s.objects.iter().map(|o| o.size).collect::<Vec<_>>();
                assert_eq!(sizes(&seen), sizes(&scene), "{scene:?}");
            }
        }
    }

    #[test]
    fn what_has_no_words_is_no_scene() {
        let scene = Scene::of_kind(&Rng::new(3, 0, Stream::Train, 0), Kind::Position, Split::Train);
        let of = |change: &dyn Fn(&mut Vec<Object>)| {
            let mut objects = scene.objects.clone();
            change(&mut objects);
            Scene::of_objects(objects, None).is_some()
        };
        assert!(of(&|_| {}));
        assert!(!of(&|o| o.clear()), "nothing");
        assert!(!of(&|o| o[0].centre = o[1].centre), "one on the other");
        assert!(!of(&|o| o[0].radius = 70.0), "beyond the edge");
        assert!(!of(&|o| o.push(Object { centre: (9.0, 9.0), radius: 9.0, ..o[0].clone() })), "three of two kinds");
    }
}
