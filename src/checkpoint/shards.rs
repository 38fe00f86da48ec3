//! Which files of a folder hold a set of weights: one, or the shards that an index names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::archive;
use crate::error::{Error, Result};

/// How many names a message spells out.
const SHOWN: usize = 5;

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File by key.
    weight_map: BTreeMap<String, String>,
}

/// The files that hold what `file` (`model.safetensors`) stands for: itself, the shards of its index, or a GGUF file or
/// PyTorch checkpoint of the same stem (`model.gguf`, `model.pt`).
///
/// Errors: a broken index, one that names anything but plain files beside it, or missing shards. Without any of
/// them, the path of `file` itself.
pub(super) fn find(folder: &Path, file: &str) -> Result<Vec<PathBuf>> {
    let whole = folder.join(file);
    let index = folder.join(format!("{file}.index.json"));
    let (gguf, pytorch) = (whole.with_extension("gguf"), whole.with_extension("pt"));
    match () {
        _ if whole.exists() => Ok(vec![whole]),
        _ if index.exists() => shards(folder, &index, |_| true),
        _ if gguf.exists() => Ok(vec![gguf]),
        _ if pytorch.exists() => Ok(vec![pytorch]),
        _ => Ok(vec![whole]),
    }
}

/// Of the files that [`find`] gives, those that hold a key that is `wanted`: others of an index need not be there.
///
/// Errors: as [`find`].
pub fn files_with(folder: &Path, file: &str, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let index = folder.join(format!("{file}.index.json"));
    if folder.join(file).exists() || !index.exists() { find(folder, file) } else { shards(folder, &index, wanted) }
}

/// Names of the files of an index that hold a key that is `wanted`.
///
/// Errors: a broken index, or one that names anything but plain files beside it.
pub fn shard_names(index: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let broken =
        |what: &str| Error::model(format!("{} {what}", index.display())).hint("copy the file from its origin again");
    let Index { weight_map } =
        serde_json::from_slice(&archive::read_json(index)?).map_err(|e| broken(&format!("is not an index: {e}")))?;
    let names: BTreeSet<String> = weight_map.into_iter().filter(|(key, _)| wanted(key)).map(|(_, file)| file).collect();
    if names.is_empty() {
        return Err(broken("names no files"));
    }
    let plain = |name: &str| {
        let mut parts = Path::new(name).components();
        matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) && !name.contains(['/', '\\'])
    };
    if let Some(name) = names.iter().find(|n| !plain(n)) {
        return Err(broken(&format!("names {name:?}, which is not a plain file beside it")));
    }
    Ok(names.into_iter().collect())
}

fn shards(folder: &Path, index: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let paths: Vec<PathBuf> = shard_names(index, wanted)?.iter().map(|n| folder.join(n)).collect();
    let missing: Vec<String> = paths.iter().filter(|p| !p.exists()).map(|p| p.display().to_string()).collect();
    if !missing.is_empty() {
        let more = if missing.len() > SHOWN { ", ..." } else { "" };
        let shown = missing.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let what = format!("{} of {} shards are missing: {shown}{more}", missing.len(), paths.len());
        return Err(Error::model(what).hint(format!("copy them from their origin into {}", folder.display())));
    }
    Ok(paths)
}
