//! Conversations in files: `/save` and `/load`.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::host;
use crate::chat::{ChatModel, Part, Picture, Role, Session};
use crate::error::{Error, Kind, Result};
use crate::io::output;

/// The largest file that `/load` reads, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// A conversation in a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    system: String,
    turns: Vec<SavedTurn>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedTurn {
    role: Role,
    parts: Vec<SavedPart>,
}

/// A part of a message; an image is its file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SavedPart {
    Text(String),
    Image(String),
}

/// Writes a conversation to a file that does not exist yet.
pub(super) fn save(session: &Session, path: &Path) -> Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        return Err(Error::usage(format!("{} exists already", path.display())).hint("/save ANOTHER_FILE"));
    }
    if !output::parent(path).is_dir() {
        let message = format!("cannot write {}: there is no folder {}", path.display(), output::parent(path).display());
        return Err(Error::usage(message).hint("/save FILE, in a folder that is there"));
    }
    let folder = output::parent(path).canonicalize().unwrap_or_default();
    // Images beside the conversation are named relative to it, so that both can be moved together.
    let file = |name: &str| {
        let file = Path::new(name).canonicalize().unwrap_or_else(|_| name.into());
        file.strip_prefix(&folder).unwrap_or(&file).display().to_string()
    };
    let part = |part: &Part<Picture>| match part {
        Part::Image(picture) => SavedPart::Image(file(&picture.name)),
        Part::Text(text) | Part::Drawn(text, _) => SavedPart::Text(text.clone()),
    };
    let turns = session.turns().iter();
    let turns = turns.map(|turn| SavedTurn { role: turn.role, parts: turn.parts.iter().map(part).collect() });
    let saved = Saved { system: session.system().into(), turns: turns.collect() };
    let json = serde_json::to_vec_pretty(&saved).map_err(|e| Error::new(Kind::Failure, e.to_string()))?;
    output::write(path, &json)
}

/// Replaces a conversation by that of a file. Everything is read before anything changes.
pub(super) fn load(model: &ChatModel, session: &mut Session, path: &Path) -> Result<()> {
    let bad = |what: String| {
        Error::usage(format!("cannot load {}: {what}", path.display())).hint("/load a file that /save wrote")
    };
    let mut bytes = Vec::new();
    // A pipe might never end.
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return Err(bad("it is not a regular file".into()));
    }
    let file = fs::File::open(path).map_err(|e| bad(e.to_string()).because(e))?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| bad(e.to_string()).because(e))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(bad(format!("it is longer than {} MB", MAX_FILE >> 20)));
    }
    let saved: Saved = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()).because(e))?;
    let (folder, mut gallery) = (path.parent().unwrap_or(Path::new("")), Vec::<Picture>::new());
    let mut part = |part: &SavedPart| {
        let file = match part {
            SavedPart::Text(text) => return Ok::<_, Error>(Part::Text(text.clone())),
            SavedPart::Image(file) => folder.join(file),
        };
        if let Some(known) = gallery.iter().find(|known| Path::new(&known.name) == file) {
            return Ok(Part::Image(known.clone()));
        }
        let picture = host::picture(model, &file)
            .map_err(|e| Error { message: format!("cannot load {}: {}", path.display(), e.message), ..e })?;
        gallery.push(picture.clone());
        Ok(Part::Image(picture))
    };
    let turns = saved.turns.iter();
    let turns = turns.map(|turn| Ok((turn.role, turn.parts.iter().map(&mut part).collect::<Result<_>>()?)));
    let turns = turns.collect::<Result<Vec<(Role, Vec<Part<Picture>>)>>>()?;
    session.clear();
    session.set_system(&saved.system);
    turns.into_iter().for_each(|(role, parts)| session.push(role, parts));
    Ok(())
}
