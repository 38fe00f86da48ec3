//! Instructions for edits, in English and Chinese.

use super::change::Change;
use super::{EditKind, words};
use crate::scenes::caption::{chinese, english, phrase, phrase_zh};
use crate::scenes::describe::{centre_of, side};
use crate::scenes::wording::{Voice, relation};
use crate::scenes::{BACKGROUNDS, COLOURS, Object, ObjectSize, Place, Scene};

/// An instruction that asks for these changes of a scene.
pub(super) fn say(changes: &[Change], scene: &Scene, voice: Voice) -> String {
    match changes {
        [only] => clause(only, scene, voice, false),
        _ => {
            let gaps = [("{1}", 0), ("{2}", 1)];
            let clauses = gaps.map(|(gap, i)| (gap, clause(&changes[i], scene, voice.again(i as u64), true)));
            voice.say(&words::COMBINATION, &clauses)
        }
    }
}

/// Words for one change; where it is `one_of_two` they do not depend on the other.
fn clause(change: &Change, scene: &Scene, voice: Voice, one_of_two: bool) -> String {
    let zh = voice.chinese;
    let o = |object: &Object| ("{o}", voice.name(object, scene, !one_of_two));
    match change {
        Change::Add { object, side, only } => {
            let new = if zh { format!("一个{}", phrase_zh(object)) } else { phrase(object) };
            let mut gaps = vec![("{n}", new), ("{p}", voice.at(*side))];
            match voice.pick(2, &[0, 0, 1, 2]) {
                1 if !one_of_two => {
                    gaps.extend([("{r}", relation(*side).to_string()), o(&scene.objects[0])]);
                    voice.say(&words::ADD_BESIDE, &gaps)
                }
                2 if *only && !one_of_two => voice.say(&words::ADD_ANYWHERE, &gaps),
                _ => voice.say(&words::ADD, &gaps),
            }
        }
        Change::Remove(object) => voice.say(&words::REMOVE, &[o(object)]),
        Change::Alter { kind: EditKind::Replace, old, new } => {
            let plain = Object { size: ObjectSize::Plain, ..new.clone() };
            // The colour may go without saying where it stays.
            let short = old.colour == new.colour && voice.pick(3, &[false, true]);
            let new = match (zh, short) {
                (true, false) => phrase_zh(&plain),
                (true, true) => chinese(new.shape).to_string(),
                (false, false) => phrase(&plain),
                (false, true) => format!("a {}", english(new.shape)),
            };
            voice.say(&words::REPLACE, &[o(old), ("{n}", new)])
        }
        Change::Alter { kind: EditKind::Move, old, new } => {
            let place = side(new.centre, centre_of(Place::Unsaid));
            voice.say(&words::MOVE, &[o(old), ("{p}", voice.at(place)), ("{t}", towards(place).to_string())])
        }
        Change::Alter { kind: EditKind::Resize, old, new } => {
            let (z, v): (&[&str], _) = match (new.radius > old.radius, zh) {
                (true, false) => (&["bigger", "larger"], "enlarge"),
                (false, false) => (&["smaller"], "shrink"),
                (true, true) => (&["大"], "放大"),
                (false, true) => (&["小"], "缩小"),
            };
            voice.say(&words::RESIZE, &[o(old), ("{z}", voice.pick(3, z).to_string()), ("{v}", v.to_string())])
        }
        Change::Alter { old, new, .. } => {
            let colour = &COLOURS[new.colour];
            voice.say(&words::RECOLOUR, &[o(old), ("{c}", if zh { colour.name_zh } else { colour.name }.to_string())])
        }
        Change::Flip => voice.say(&words::FLIP, &[]),
        Change::Background(background) => {
            let (english, chinese) = background.map_or(("white", "白色"), |b| {
                let background = &BACKGROUNDS[b];
                (background.name, background.name_zh)
            });
            voice.say(&words::BACKGROUND, &[("{b}", if zh { chinese } else { english }.to_string())])
        }
    }
}

/// "to the left".
fn towards(place: Place) -> &'static str {
    ["to the middle", "to the left", "to the right", "to the top", "to the bottom"][place as usize]
}
