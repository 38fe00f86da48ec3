//! What a model says that an edit does, step by step, between what it sees and what that becomes:
//! every step names its object in full and where it is, which an instruction need not.

use super::EditKind;
use super::change::Change;
use crate::scenes::caption::{at, english, phrase};
use crate::scenes::describe::{centre_of, place_of, side};
use crate::scenes::{BACKGROUNDS, COLOURS, Object, Place, Scene};

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
    phrase(&object.of_plain_size())
}

/// "the blue heart", and of one of two also where it is.
fn named(object: &Object, seen: &Scene) -> String {
    let name = format!("the {} {}", COLOURS[object.colour].name, english(object.shape));
    if seen.objects.len() == 2 && seen.place != Place::Unsaid {
        format!("{name} {}", at(place_of(object, seen)))
    } else {
        name
    }
}
