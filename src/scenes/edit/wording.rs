//! Instructions for edits, in English and Chinese.

use super::change::Change;
use super::{EditKind, words};
use crate::scenes::caption::{chinese, english, phrase, phrase_zh};
use crate::scenes::describe::{centre_of, side};
use crate::scenes::wording::{Said, Voice, relation};
use crate::scenes::{BACKGROUNDS, COLOURS, Object, Place, Scene};

/// An instruction that asks for these changes of a scene.
pub(super) fn say(changes: &[Change], scene: &Scene, voice: Voice) -> Said {
    match changes {
        [only] => clause(only, scene, voice),
        _ => {
            let gaps = [("{1}", 0), ("{2}", 1)];
            let clauses = gaps.map(|(gap, i)| (gap, clause(&changes[i], scene, voice.part(i as u64)).text));
            voice.say(&words::COMBINATION, &clauses)
        }
    }
}

/// Words for one change; where it is one of two they do not depend on the other.
fn clause(change: &Change, scene: &Scene, voice: Voice) -> Said {
    let zh = voice.chinese;
    let name = |object: &Object| ("{o}", voice.pointed_at(object, scene, !voice.clause));
    match change {
        Change::Add { object, side, only } => {
            let new = if zh { format!("一个{}", phrase_zh(object)) } else { phrase(object) };
            let mut gaps = vec![("{n}", new), ("{p}", voice.at(*side))];
            match voice.pick(2, &[0, 0, 1, 2]) {
                1 if !voice.clause => {
                    gaps.extend([("{r}", relation(*side).to_string()), name(&scene.objects[0])]);
                    voice.say(&words::ADD_BESIDE, &gaps)
                }
                2 if *only && !voice.clause => voice.say(&words::ADD_ANYWHERE, &gaps),
                _ => voice.say(&words::ADD, &gaps),
            }
        }
        Change::Remove(object) => {
            let bare = object.of_plain_size();
            let with_article = phrase(&bare);
            let noun = with_article.split_once(' ').map_or("", |(_, noun)| noun).to_string();
            voice.say(&words::REMOVE, &[name(object), ("{s}", noun), ("{a}", with_article)])
        }
        Change::Alter { kind: EditKind::Replace, old, new } => {
            let plain = new.of_plain_size();
            // The colour may go without saying where it stays.
            let short = old.colour == new.colour && voice.pick(3, &[false, true]);
            let new = match (zh, short) {
                (true, false) => format!("{}{}", voice.pick(4, &["", "一个"]), phrase_zh(&plain)),
                (true, true) => chinese(new.shape).to_string(),
                (false, false) => phrase(&plain),
                (false, true) => format!("a {}", english(new.shape)),
            };
            voice.say(&words::REPLACE, &[name(old), ("{n}", new)])
        }
        Change::Alter { kind: EditKind::Move, old, new } => {
            let place = side(new.centre, centre_of(Place::Unsaid));
            voice.say(&words::MOVE, &[name(old), ("{p}", voice.at(place)), ("{t}", towards(place).to_string())])
        }
        Change::Alter { kind: EditKind::Resize, old, new } => {
            let (z, v): (&[&str], _) = match (new.radius > old.radius, zh) {
                (true, false) => (&["bigger", "larger"], "enlarge"),
                (false, false) => (&["smaller"], "shrink"),
                (true, true) => (&["大"], "放大"),
                (false, true) => (&["小"], "缩小"),
            };
            voice.say(&words::RESIZE, &[name(old), ("{z}", voice.pick(3, z).to_string()), ("{v}", v.to_string())])
        }
        Change::Alter { old, new, .. } => {
            let colour = &COLOURS[new.colour];
            let to = if zh { colour.name_zh } else { colour.name };
            let with_article = format!("{} {to}", if to == "orange" { "an" } else { "a" });
            voice.say(&words::RECOLOUR, &[name(old), ("{c}", to.to_string()), ("{ac}", with_article)])
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
