//! Which files of a folder hold a set of weights: one, or shards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::{archive, keys};
use crate::error::{Error, Result};

/// How many names a message spells out.
const SHOWN: usize = 5;
/// More shards than any model has.
const MAX_SHARDS: usize = 10_000;

/// What transformers calls the PyTorch form of `model.safetensors`.
const PYTORCH: (&str, &str) = ("model.safetensors", "pytorch_model.bin");

/// Extensions of weights, read or not, that a message names where the expected file is missing.
const WEIGHTS: [&str; 10] = ["safetensors", "gguf", "bin", "pt", "pth", "ckpt", "onnx", "npz", "msgpack", "h5"];

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File by key.
    weight_map: BTreeMap<String, String>,
}

/// The files of `file` (`model.safetensors`): itself, the shards of its
/// index, shards without an index, or a GGUF file or PyTorch checkpoint of the same stem
/// (`model.gguf`, `model.pt`); for `model.safetensors` also `pytorch_model.bin` or its shards.
///
/// Errors: a broken index, one that names anything but plain files beside it, missing shards, or
/// none of these files; the message names what is there in their place.
pub(super) fn find(folder: &Path, file: &str) -> Result<Vec<PathBuf>> {
    let whole = folder.join(file);
    let names = [Some(file), Some(PYTORCH.1).filter(|_| file == PYTORCH.0)];
    for (i, name) in names.into_iter().flatten().enumerate() {
        let index = folder.join(format!("{name}.index.json"));
        let (path, counted) = (folder.join(name), counted(folder, name));
        let of_stem = ["gguf", "pt"].map(|kind| path.with_extension(kind)).into_iter().find(|path| path.exists());
        match of_stem {
            _ if path.exists() => return Ok(vec![path]),
            _ if index.exists() => return indexed(folder, &index, |_| true),
            _ if !counted.is_empty() => return present(folder, counted),
            Some(path) if i == 0 => return Ok(vec![path]),
            _ => {}
        }
    }
    Err(absent(&whole))
}

/// Of the files that `find` gives, those that hold a key that is `wanted`: others of an index need
/// not be there.
///
/// Errors: as `find`.
pub fn files_with(folder: &Path, file: &str, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let index = folder.join(format!("{file}.index.json"));
    if folder.join(file).exists() || !index.exists() { find(folder, file) } else { indexed(folder, &index, wanted) }
}

/// The shards that an index names for `wanted` keys.
fn indexed(folder: &Path, index: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    present(folder, shard_names(index, wanted)?.iter().map(|name| folder.join(name)).collect())
}

/// Names of the files of an index that hold a key that is `wanted`.
///
/// Errors: a broken index, or one that names anything but plain files beside it.
pub fn shard_names(index: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let broken =
        |what: &str| Error::model(format!("{} {what}", index.display())).hint("copy the file from its origin again");
    let Index { weight_map } = serde_json::from_slice(&archive::read_small(index)?)
        .map_err(|e| broken(&format!("is not an index: {e}")).because(e))?;
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

/// All shards `STEM-00001-of-00002.KIND`, missing ones included, if a folder has at least one of
/// them. Their headers list their tensors, so they need no index.
fn counted(folder: &Path, file: &str) -> Vec<PathBuf> {
    let file = Path::new(file);
    let (Some(stem), Some(kind)) = (file.file_stem().and_then(|s| s.to_str()), file.extension()) else { return vec![] };
    let count = names(folder).into_iter().find_map(|name| {
        let name = Path::new(&name);
        let shard = name.file_stem()?.to_str()?.strip_prefix(stem)?.strip_prefix('-')?;
        let (number, count) = shard.split_once("-of-").filter(|_| name.extension() == Some(kind))?;
        number.parse::<usize>().ok()?;
        let digits = number.len();
        count.parse().ok().filter(|count| (1..=MAX_SHARDS).contains(count)).map(|count: usize| (count, digits))
    });
    let (count, digits) = count.unwrap_or_default();
    let name = |i: usize| format!("{stem}-{i:0digits$}-of-{count:0digits$}.{}", kind.display());
    (1..=count).map(|i| folder.join(name(i))).collect()
}

/// These shards.
///
/// Errors: some of them are missing.
fn present(folder: &Path, paths: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let missing: Vec<String> = paths.iter().filter(|p| !p.exists()).map(|p| p.display().to_string()).collect();
    if missing.is_empty() {
        return Ok(paths);
    }
    let more = if missing.len() > SHOWN { ", ..." } else { "" };
    let shown = missing.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    let what = format!("{} of {} shards are missing: {shown}{more}", missing.len(), paths.len());
    Err(Error::model(what).hint(format!("copy them from their origin into {}", folder.display())))
}

/// The names of a folder's files, sorted; none if it cannot be read.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// The error of a missing file of a model; it names what the folder holds instead.
pub(super) fn absent(path: &Path) -> Error {
    let folder = path.parent().unwrap_or(Path::new("."));
    let Err(missing) = archive::open(path) else { return Error::model(format!("{} is of no use", path.display())) };
    let file = path.file_name().unwrap_or_default();
    if file == "tokenizer.json" && folder.join("vocab.json").exists() {
        return missing
            .hint("in Python: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes it of vocab.json");
    }
    if file != PYTORCH.0 && file != "config.json" {
        return missing;
    }
    if let Some(adapter) = adapter(folder) {
        return adapter;
    }
    let weights = names(folder).into_iter().filter(|name| {
        Path::new(name).extension().is_some_and(|kind| WEIGHTS.iter().any(|known| kind == *known))
            && !name.starts_with("image_tokenizer.")
    });
    let weights: Vec<String> = weights.collect();
    if weights.is_empty() || file == "config.json" {
        return missing;
    }
    let more = if weights.len() > SHOWN { ", ..." } else { "" };
    let shown = weights.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    let message =
        format!("{}; in its place there is {shown}{more}, whose name is not that of a model", missing.message);
    Error::model(message).hint(format!(
        "nextflow info {}; weights are read from model.safetensors, its shards, model.gguf of nextflow quantize, or \
         pytorch_model.bin",
        crate::io::input::quoted(&folder.join(&weights[0]))
    ))
}

/// The error of a folder that holds a LoRA adapter alone.
fn adapter(folder: &Path) -> Option<Error> {
    const CONFIG: &str = "adapter_config.json";
    let names = names(folder);
    let found = names.iter().find(|name| *name == CONFIG || name.starts_with("adapter_model."))?;
    let config = archive::read_small(&folder.join(CONFIG)).ok();
    let config: Option<serde_json::Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let base = config.as_ref().and_then(|config| config["base_model_name_or_path"].as_str());
    let base = base.map(|base| format!(" for {base}")).unwrap_or_default();
    let message = format!("{} holds a LoRA adapter{base} ({found}), not a whole model", folder.display());
    Some(Error::model(message).hint(keys::MERGE))
}
