//! The files of a model: its repository has no image tokenizer, which is Infinity's.

use std::path::{Path, PathBuf};

use crate::checkpoint::{IMAGE_TOKENIZER, Inventory, Parts, Source};
use crate::error::{Error, Result};
use crate::generate::infinity;
use crate::io::input::quoted;
use crate::onecat;
use crate::tokenizer::BitTokenizerConfig;

/// The model's repository on the hub.
pub const HUB: &str = "onecat-ai/OneCAT-3B";
/// The repository of its image tokenizer.
pub const TOKENIZER_HUB: &str = infinity::HUB;
/// The image tokenizer that it was trained with.
pub const TOKENIZER: &str = "infinity_vae_d32reg.pth";

/// The model in a folder, with an image tokenizer of another name or, if there is none, the one in
/// the folder `cached`.
///
/// Errors: those of reading the folder's `config.json`.
pub fn in_folder(folder: &Path, cached: Option<PathBuf>) -> Result<Source> {
    let source = Source::Folder(folder.into());
    if source.has(IMAGE_TOKENIZER) {
        return Ok(source);
    }
    let elsewhere = cached.map(|cached| cached.join(TOKENIZER)).filter(|file| file.exists());
    let Some(file) = tokenizer(folder).or(elsewhere) else { return Ok(source) };
    let (name, config) = (folder.display().to_string(), source.read_config()?);
    Ok(Source::Parts(Parts { name, folder: folder.into(), config, files: vec![(IMAGE_TOKENIZER, vec![file])] }))
}

/// An image tokenizer under its public name, or the only file that is one.
fn tokenizer(folder: &Path) -> Option<PathBuf> {
    let public = folder.join(TOKENIZER);
    if public.exists() {
        return Some(public);
    }
    let is_weights =
        |path: &Path| path.extension().is_some_and(|kind| kind == "pth" || kind == "pt" || kind == "safetensors");
    let is_model = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("model"));
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.into_iter().find(|path| {
        let known = || Inventory::open(path).is_ok_and(|weights| BitTokenizerConfig::of_weights(&weights).is_some());
        is_weights(path) && !is_model(path) && path.is_file() && known()
    })
}

/// Whether a folder holds a model of this family without an image tokenizer.
pub fn needs_tokenizer(folder: &Path) -> bool {
    let source = Source::Folder(folder.into());
    let ours = source.has_file("config.json") && source.read_config().is_ok_and(|config| onecat::is_config(&config));
    ours && !source.has(IMAGE_TOKENIZER) && tokenizer(folder).is_none()
}

/// The error of a model without an image tokenizer.
pub(super) fn no_tokenizer(source: &Source) -> Error {
    let folder = match source {
        Source::Folder(folder) => folder.clone(),
        Source::Parts(parts) => parts.folder.clone(),
        Source::Embedded => PathBuf::from("FOLDER"),
    };
    Error::model(format!("{source} has no image tokenizer, without which OneCAT reads and answers but does not draw")).hint(
        format!("nextflow models pull {TOKENIZER_HUB} {TOKENIZER}, or hf download {TOKENIZER_HUB} {TOKENIZER} --local-dir {}", quoted(&folder)),
    )
}
