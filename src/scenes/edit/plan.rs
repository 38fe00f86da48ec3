//! What a model says that an edit does, step by step, between what it sees and what that becomes:
//! every step names its object in full and where it is, which an instruction need not.

use super::EditKind;
use super::change::Change;
use crate::scenes::caption::{english, phrase};
use crate::scenes::describe::{centre_of, side};
use crate::scenes::{BACKGROUNDS, COLOURS, Object, ObjectSize, Place, Scene};

/// "the blue heart on the left is now gone", and the same of a second change. `seen` is the source
/// as a viewer describes it.
pub(super) fn steps(changes: &[Change], seen: &Scene) -> String {
    let steps: Vec<String> = changes.iter().map(|change| step(change, seen)).collect();
    steps.join(". ")
}

fn step(change: &Change, seen: &Scene) -> String {
    match change {
        Change::Add { object, side, .. } => format!("{} is now {}", at(*side), plain(object)),
        Change::Remove(object) => format!("{} is now gone", named(object, seen)),
        Change::Alter { kind, old, new } => {
            let becomes = match kind {
                EditKind::Move => at(side(new.centre, centre_of(Place::Unsaid))).into(),
                EditKind::Resize => if new.radius > old.radius { "large" } else { "small" }.into(),
                _ => plain(new),
            };
            format!("{} is now {becomes}", named(old, seen))
        }
        Change::Flip => "left is now right".into(),
        Change::Background(to) => {
            format!("the background is now {}", to.map_or("white", |background| BACKGROUNDS[background].name))
        }
    }
}

/// "a blue heart", whatever its size.
fn plain(object: &Object) -> String {
    phrase(&Object { size: ObjectSize::Plain, ..object.clone() })
}

/// "the blue heart", and of one of two also where it is.
fn named(object: &Object, seen: &Scene) -> String {
    let name = format!("the {} {}", COLOURS[object.colour].name, english(object.shape));
    match &seen.objects[..] {
        [first, _] if seen.place != Place::Unsaid => {
            let place = if first.same(object) { seen.place } else { opposite(seen.place) };
            format!("{name} {}", at(place))
        }
        _ => name,
    }
}

fn opposite(place: Place) -> Place {
    match place {
        Place::Unsaid => Place::Unsaid,
        Place::Left => Place::Right,
        Place::Right => Place::Left,
        Place::Above => Place::Below,
        Place::Below => Place::Above,
    }
}

fn at(place: Place) -> &'static str {
    ["in the middle", "on the left", "on the right", "at the top", "at the bottom"][place as usize]
}
